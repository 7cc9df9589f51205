"""Losses and metrics are sums that no layout of the slots changes."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.distill.test_divergence import equations, make_inputs
from tests.support.divergence_reference import error, reference, scoring
from trd_jax.distill.loss import metrics
from trd_jax.distill.loss.divergences import CrossEntropy, SampledReverseKl
from trd_jax.distill.loss.metrics import finish
from trd_jax.distill.loss.objective import Objective, slot_loss, token_loss
from trd_jax.distill.loss.token_stats import Scoring, TokenStats
from trd_jax.distill.loss.token_weights import EntropyGate, Tip
from trd_jax.experiment import experiment, methods

LENGTHS = (5, 1, 9, 3, 7)
CORRECT = (1, 0, -1, 0, 1)
FIELDS = TokenStats._fields


class FlatSlots(NamedTuple):
  label: np.ndarray
  weight: np.ndarray
  trajectory: np.ndarray
  offset: np.ndarray
  correct: np.ndarray


def lay_out(order=(0, 1, 2, 3, 4), gaps=None):
  """Slots of trajectories in an order, with padding after each; and rows.

  `rows` says which token of the batch a slot holds, 0 for padding.
  """
  starts = np.cumsum((0, *LENGTHS))
  gaps = gaps or [0] * len(LENGTHS)
  columns = {name: [] for name in ("weight", "trajectory", "offset", "correct")}
  rows = []
  for i, gap in zip(order, gaps, strict=False):
    length = LENGTHS[i]
    rows += [*range(starts[i], starts[i] + length), *[0] * gap]
    columns["weight"] += [1 / (length * len(LENGTHS))] * length + [0] * gap
    columns["trajectory"] += [i] * length + [-1] * gap
    columns["offset"] += [*range(length), *[0] * gap]
    columns["correct"] += [CORRECT[i]] * length + [-1] * gap
  arrays = {
    name: np.array(x, np.float32 if name == "weight" else np.int32)
    for name, x in columns.items()
  }
  rows = np.array(rows)
  return FlatSlots(label=rows.astype(np.int32), **arrays), rows


SLOTS, _ = lay_out()


def make_stats(seed=0, signed=False):
  rng = np.random.default_rng(seed)
  stats = {
    name: rng.gamma(1.0, 0.3, sum(LENGTHS)).astype(np.float32)
    for name in FIELDS
  }
  if signed:
    stats["divergence"] -= 0.3
  return TokenStats(**stats)


def take(stats, rows):
  return TokenStats(*(x[rows] for x in stats))


def score(stats, slots, spec):
  """(loss, sums, d loss / d divergence)."""

  def loss(divergence):
    return token_loss(stats._replace(divergence=divergence), slots, spec)

  (value, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    stats.divergence
  )
  return value, sums, gradient


def each_trajectory():
  start = 0
  for length in LENGTHS:
    yield slice(start, start + length)
    start += length


OBJECTIVES = {
  "plain": Objective(),
  "clip": Objective(clip=0.2),
  "tip": Objective(
    scoring("reverse_kl"), token_weights=Tip(1.0, 1.0), clip=0.4
  ),
  "sampled": Objective(Scoring(SampledReverseKl(0.8))),
  "gate": Objective(token_weights=EntropyGate(0.3), clip=0.4),
  "cross-entropy beside": Objective(Scoring(cross_entropy=0.5)),
}


def close(sums, wanted):
  """Whether they are the same, in whichever form."""
  assert sums.keys() == wanted.keys()
  for name, x in sums.items():
    for one, other in zip(x, wanted[name], strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_order_padding_and_cuts_change_nothing(name):
  spec, signed = OBJECTIVES[name], name == "sampled"
  stats = make_stats(signed=signed)
  loss, sums, gradient = score(stats, SLOTS, spec)

  slots, rows = lay_out(order=(3, 0, 4, 2, 1), gaps=(0, 3, 1, 0, 2))
  # What stands in padding slots must not matter, so let it be large.
  padded = take(stats, rows)
  padded = TokenStats(*(np.where(slots.weight > 0, x, 99) for x in padded))
  moved, moved_sums, moved_gradient = score(padded, slots, spec)
  np.testing.assert_allclose(moved, loss, rtol=1e-6)
  close(moved_sums, sums)
  back = np.zeros(sum(LENGTHS))
  np.add.at(back, rows, moved_gradient)
  np.testing.assert_allclose(back, gradient, rtol=1e-5, atol=1e-8)
  assert (moved_gradient[slots.weight == 0] == 0).all()

  cut = sum(LENGTHS[:2])
  halves = [
    score(take(stats, part), FlatSlots(*(x[part] for x in SLOTS)), spec)
    for part in (slice(None, cut), slice(cut, None))
  ]
  np.testing.assert_allclose(halves[0][0] + halves[1][0], loss, rtol=1e-6)
  close(metrics.add(*(metrics.as_arrays(half[1]) for half in halves)), sums)


def test_plain_loss_is_the_mean_over_trajectories_of_token_means():
  stats = make_stats()
  loss, _, gradient = score(stats, SLOTS, Objective())
  means = [stats.divergence[part].mean() for part in each_trajectory()]
  np.testing.assert_allclose(loss, np.mean(means), rtol=1e-6)
  np.testing.assert_allclose(gradient, SLOTS.weight, rtol=1e-6)


def test_clip_caps_a_token_and_stops_its_gradient():
  stats = make_stats()
  over = stats.divergence > 0.2
  assert 0 < over.mean() < 1
  loss, sums, gradient = score(stats, SLOTS, Objective(clip=0.2))
  np.testing.assert_allclose(
    loss, SLOTS.weight @ np.minimum(stats.divergence, 0.2), rtol=1e-6
  )
  np.testing.assert_allclose(gradient, np.where(over, 0, SLOTS.weight))
  share = finish(sums)["clipped_share"]
  assert share == pytest.approx(over.mean())
  assert finish(sums)["D"] == pytest.approx(stats.divergence.mean())


def test_a_clip_hides_no_nan():
  stats = make_stats()
  stats.divergence[3] = np.nan
  assert np.isnan(score(stats, SLOTS, Objective(clip=0.2))[0])


@pytest.mark.parametrize("parts", [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0)])
def test_token_weights_are_the_soft_or_of_a_trajectory(parts):
  stats = make_stats()
  spec = Objective(scoring("reverse_kl"), token_weights=Tip(*parts))
  weights = np.ones(sum(LENGTHS))
  for part in each_trajectory():
    h, d = (
      (x - x.min()) / (np.ptp(x) or 1)
      for x in (stats.student_entropy[part], stats.divergence[part])
    )
    s = parts[0] * h + parts[1] * (1 - h) * d
    if s.any():
      weights[part] = s / s.mean()
    assert weights[part].mean() == pytest.approx(1)
  loss, _, gradient = score(stats, SLOTS, spec)
  np.testing.assert_allclose(
    loss, (SLOTS.weight * weights) @ stats.divergence, rtol=1e-5
  )
  # Constant weights: the loss is linear in the divergence.
  np.testing.assert_allclose(gradient, SLOTS.weight * weights, rtol=1e-5)


def test_an_entropy_gate_trains_on_the_hesitant_tokens_alone():
  stats = make_stats()
  stats.student_entropy[: LENGTHS[0]] = 0  # the first trajectory has none
  spec = Objective(token_weights=EntropyGate(0.3))
  loss, _, gradient = score(stats, SLOTS, spec)
  means, wanted = [], np.zeros(sum(LENGTHS))
  for part in each_trajectory():
    counts = stats.student_entropy[part] >= 0.3
    means.append(stats.divergence[part][counts].mean() if counts.any() else 0)
    wanted[part] = counts / max(counts.sum(), 1) / len(LENGTHS)
  assert means[0] == 0
  assert 0 < (wanted > 0).mean() < 1
  np.testing.assert_allclose(loss, np.mean(means), rtol=1e-5)
  np.testing.assert_allclose(gradient, wanted, rtol=1e-5)


def returns(delta, discount):
  out = np.array(delta, np.float64)
  for part in each_trajectory():
    for t in range(part.stop - 2, part.start - 1, -1):
      out[t] += discount * out[t + 1]
  return out


@pytest.mark.parametrize("discount", [0.0, 0.8, 1.0])
def test_sampled_gradient_is_the_return_to_go(discount):
  stats = make_stats(signed=True)
  spec = Objective(Scoring(SampledReverseKl(discount)))
  loss, _, gradient = score(stats, SLOTS, spec)
  np.testing.assert_allclose(loss, SLOTS.weight @ stats.divergence, rtol=1e-5)
  np.testing.assert_allclose(
    gradient,
    SLOTS.weight * returns(stats.divergence, discount),
    rtol=1e-5,
    atol=1e-7,
  )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_cross_entropy_beside_a_divergence_equals_float64(temperature):
  inputs = make_inputs(sum(LENGTHS), 300)
  kind = scoring("reverse_kl", chunk_tokens=8, temperature=temperature)
  spec = Objective(dataclasses.replace(kind, cross_entropy=0.25))
  slots = SLOTS._replace(label=inputs[4])
  loss = slot_loss(spec, tuple(inputs[5].tolist()))
  (value, sums), gradient = jax.jit(
    jax.value_and_grad(lambda h: loss(h, *inputs[1:4], slots), has_aux=True)
  )(inputs[0])
  own = reference(inputs, kind.divergence, temperature)
  nll = reference(inputs, CrossEntropy())  # at T = 1 whatever the other has
  both = own["divergence"] + 0.25 * nll["divergence"]
  np.testing.assert_allclose(value, slots.weight @ both, rtol=1e-5)
  wanted = own["gradient"] + 0.25 * nll["gradient"]
  assert error(gradient, slots.weight[:, None] * wanted) < 1e-5
  # What is recorded is the divergence by itself.
  found = finish(sums)
  assert found["D"] == pytest.approx(own["divergence"].mean(), rel=1e-5)
  assert found["nll_student"] == pytest.approx(nll["divergence"].mean())


def test_supervised_fine_tuning_computes_nothing_of_a_teacher():
  inputs = make_inputs(sum(LENGTHS), 300)
  slots = SLOTS._replace(label=inputs[4])
  loss = slot_loss(Objective(Scoring(CrossEntropy())), (1,))

  def of(hidden):
    return loss(hidden, (), inputs[2], inputs[2], slots)[0]

  products = [
    e
    for e in equations(jax.make_jaxpr(jax.grad(of))(inputs[0]).jaxpr)
    if e.primitive.name == "dot_general"
  ]
  assert len(products) == 2  # the student's logits, and the gradient


@pytest.mark.slow
@pytest.mark.parametrize("method", methods.METHODS)
def test_each_method_end_to_end_equals_float64(method):
  """Gradient with respect to hidden states, through chunks, clip and all."""
  inputs = make_inputs(sum(LENGTHS), 300)
  loss_config = {"top_k": 5, "chunk_tokens": 8, "discount": 1.0, "clip": None}
  if method == "forward_kl_clip":
    loss_config["clip"] = 1.5
  asked = experiment.from_config({"method": method, "loss": loss_config})
  spec = Objective.of(asked)
  slots = SLOTS._replace(label=inputs[4])
  loss = slot_loss(spec, tuple(inputs[5].tolist()))
  (value, sums), gradient = jax.jit(
    jax.value_and_grad(lambda h: loss(h, *inputs[1:4], slots), has_aux=True)
  )(inputs[0])

  wanted = reference(inputs, spec.scoring.divergence)
  divergence = wanted["divergence"]
  factor, per_token = np.ones(len(divergence)), divergence
  if method == "forward_kl_clip":
    assert 0 < (divergence > 1.5).mean() < 1
    factor, per_token = divergence < 1.5, np.minimum(divergence, 1.5)
  elif method == "sampled_reverse_kl":
    factor = returns(divergence, 1.0)
  elif method == "tip":
    stats = TokenStats(**{name: jnp.float32(wanted[name]) for name in FIELDS})
    factor = np.asarray(Tip(1.0, 1.0).of_tokens(stats, slots))
    per_token = factor * divergence
  np.testing.assert_allclose(value, slots.weight @ per_token, rtol=1e-5)
  wanted_gradient = (slots.weight * factor)[:, None] * wanted["gradient"]
  assert error(gradient, wanted_gradient) < 1e-5
  assert ("nll_teacher" in sums) == (method != "sft")
  for name, pair in sums.items():
    if name != "D_spread":
      assert np.isfinite(pair[0]), name
      assert pair[1] > 0, name


@pytest.mark.parametrize(
  ("method", "regime", "kind", "clip"),
  [
    ("trd", "opsd", "forward_kl", None),
    ("forward_kl", "opd", "forward_kl", None),
    ("forward_kl_clip", "opd", "forward_kl", 0.1),
    ("forward_kl_clip", "opsd", "forward_kl", 0.06),
    ("reverse_kl", "opd", "reverse_kl", None),
    ("reverse_kl_topk", "opd", "reverse_kl_topk", None),
    ("sampled_reverse_kl", "opsd", "sampled_reverse_kl", None),
    ("jsd", "opsd", "jsd", None),
    ("tip", "opsd", "reverse_kl", None),
  ],
)
def test_objectives_of_the_methods(method, regime, kind, clip):
  made = Objective.of(
    experiment.from_config({"method": method, "regime": regime})
  )
  assert (made.scoring.divergence.name, made.clip) == (kind, clip)
  assert made.scoring.temperature == 1
  assert getattr(made.scoring.divergence, "top_k", 32) == 32
  assert made.token_weights == (Tip(1.0, 1.0) if method == "tip" else None)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"clip": 0.0}, "clip"),
    ({"scoring": scoring("sampled_reverse_kl"), "clip": 1.0}, "negative"),
    (
      {"scoring": scoring("reverse_kl_topk"), "token_weights": Tip(1.0, 1.0)},
      "ent",
    ),
  ],
)
def test_objectives_that_make_no_sense_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(Objective(), **settings)


def test_parameters_out_of_range_are_refused():
  with pytest.raises(ValueError, match="discount"):
    SampledReverseKl(1.5)
  with pytest.raises(ValueError, match="weighs no token"):
    Tip(0.0, 0.0)
  with pytest.raises(ValueError, match="tip_entropy"):
    Tip(-1.0, 2.0)
