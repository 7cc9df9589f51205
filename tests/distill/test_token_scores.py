"""Per-token scores are what float64 makes of whole logits, and training's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.support import distilling, divergence_reference
from tests.support.divergence_reference import FORMS, made, scoring
from trd_jax.distill import token_scores
from trd_jax.distill.loss.objective import Objective
from trd_jax.distill.loss.token_weights import EntropyGate, Tip
from trd_jax.distill.models import Models, base_graph
from trd_jax.distill.packing.layout import choose_layout
from trd_jax.distill.teacher.source import hidden_slot
from trd_jax.distill.token_scores import Scorer, ScoreSetup
from trd_jax.experiment import methods
from trd_jax.model import sharding
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.weights import hf, hub

K = 5
# Both heads' products are sums of a few hundred float32 terms, and what an NLL
# or a divergence is made of is logits of up to 30: their last bit is 2e-6.
NEAR = {"rtol": 2e-5, "atol": 2e-5}
SUMS = {
  "D": "divergence",
  "nll_student": "student_nll",
  "nll_teacher": "teacher_nll",
  "entropy_student": "student_entropy",
  "epistemic_mass_student": "student_onset_mass",
  "epistemic_mass_teacher": "teacher_onset_mass",
}


@functools.cache
def laboratory(regime: str) -> Models:
  """The models that ship with the package; the student has been adapted."""
  lora = LoraConfig(rank=4, alpha=8.0, dropout=0.5)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  load = functools.partial(hf.load, dtype="float32", mesh=mesh)
  student = load(hub.model_folder("lab:student"), lora=lora)
  graph, adapter, base = nnx.split(student, nnx.LoRAParam, ...)
  rng = np.random.default_rng(0)
  # A new adapter's B is zero, which would make the student its own teacher.
  adapter = jax.tree.map(
    lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), adapter
  )
  if regime == "opsd":
    return Models(graph, adapter, base, base_graph(student.config), base)
  teacher, other = nnx.split(load(hub.model_folder("lab:teacher")))
  return Models(graph, adapter, base, teacher, other)


def scorer_of(both: Models, data, mesh_shape=(1, 1, 1), objective=None, **plan):
  """A scorer of trajectories under some models, and the adapter, placed."""
  mesh = distilling.make_mesh(mesh_shape)

  def place(state):
    where = nnx.to_pure_dict(sharding.shardings(state, mesh))
    return jax.device_put(nnx.to_pure_dict(state), where)

  lora, base = place(both.lora), place(both.base)
  teacher_base = base
  if both.teacher_base is not both.base:
    teacher_base = place(both.teacher_base)
  setup = ScoreSetup(
    teacher=both.teacher,
    mesh=mesh,
    student=both.student,
    objective=objective or Objective(),
    onset_ids=distilling.ONSETS,
    top_k=K,
  )
  layout = choose_layout(
    data, groups=sharding.num_groups(mesh), batch_size=len(data), **plan
  )
  width = teacher_base["embed"]["embedding"].shape[1]
  placed = Models(both.student, lora, base, both.teacher, teacher_base)
  return Scorer(setup, placed, layout, hidden_slot(width, "float32")), lora


def plain(both: Models, data):
  """Hidden states of each response and both heads, a padded row each.

  Nothing of packs, of the buffer or of chunks.
  """
  width = max(max(s.student_length, s.teacher_length) for s in data)
  position = np.arange(width)[None]
  sides = (
    (nnx.merge(both.student, both.lora, both.base), "student_prompt"),
    (nnx.merge(both.teacher, both.teacher_base), "teacher_prompt"),
  )
  found = []
  for model, side in sides:
    forward = nnx.jit(lambda model, *rows: model(*rows))
    hidden = []
    for s in data:
      prompt = getattr(s, side)
      tokens = np.zeros((1, width), np.int32)
      ids = np.concatenate([prompt, s.response])[:-1]
      tokens[0, : len(ids)] = ids
      row = forward(model, tokens, position, np.int32(position < len(ids)))
      at = len(prompt) - 1 + np.arange(len(s.response))
      hidden.append(np.asarray(row)[0, at])
    found.append((hidden, np.asarray(model.head_VD)))
  return found


def likeliest(hidden, head, ids):
  """Log-probabilities of given ids, and of the K likeliest, in float64."""
  log_prob = divergence_reference.log_softmax(
    np.float64(hidden) @ np.float64(head).T
  )
  best = -np.sort(-log_prob, axis=-1)[:, : ids.shape[1]]
  return np.take_along_axis(log_prob, ids, 1), best


def check(scores, hidden, heads, labels, divergence, temperature=1.0):
  """Compares all that comes of logits with the reference."""
  inputs = *hidden, *heads, labels, np.array(distilling.ONSETS)
  wanted = divergence_reference.reference(inputs, divergence, temperature)
  for name in wanted.keys() & set(scores._fields):
    np.testing.assert_allclose(
      getattr(scores, name), wanted[name], err_msg=name, **NEAR
    )
  for side, h, head in zip(("student", "teacher"), hidden, heads, strict=True):
    ids = np.asarray(getattr(scores, f"{side}_top_ids"))
    log_probs = getattr(scores, f"{side}_top_logprobs")
    assert all(len(set(row)) == K for row in ids.tolist())
    own, best = likeliest(h, head, ids)
    # Each is the id's own, and they are the largest, in their order; which of
    # two equal ones is first is for rounding to say.
    np.testing.assert_allclose(log_probs, own, **NEAR)
    np.testing.assert_allclose(log_probs, best, **NEAR)


@pytest.mark.parametrize("regime", ["opsd", "opd"])
def test_scores_of_the_laboratorys_models_are_those_of_whole_logits(regime):
  both = laboratory(regime)
  data = distilling.samples(5, longest=40)
  scorer, lora = scorer_of(both, data)
  scorer.compile(lora)
  no_adapter = jax.tree.map(jnp.zeros_like, lora)
  found = dict(scorer.score(data, [lora, no_adapter]))
  assert sorted(found) == list(range(len(data)))
  bare = plain(both._replace(lora=no_adapter), data)
  adapted = plain(both, data)
  for number, sample in enumerate(data):
    for scores, sides in zip(found[number], (adapted, bare), strict=True):
      hidden, heads = zip(
        *((h[number], head) for h, head in sides), strict=True
      )
      assert len(scores.divergence) == len(sample.response)
      check(scores, hidden, heads, sample.response, made("forward_kl"))
      assert (scores.loss_weight == 1).all()
      assert not scores.clipped.any()


def random_slots(rows, rng):
  """Hidden states, heads and slots of a few trajectories, padding between."""
  trajectory = np.repeat([0, -1, 1, 2, -1], [7, 2, 1, rows - 12, 2])
  token = trajectory >= 0
  slots = token_scores.packing.Slots(
    index=np.zeros(rows, np.int32),
    teacher_slot=np.zeros(rows, np.int32),
    label=rng.integers(0, 64, rows).astype(np.int32),
    weight=np.where(token, 0.1, 0).astype(np.float32),
    trajectory=trajectory,
    offset=np.zeros(rows, np.int32),
    correct=np.zeros(rows, np.int32),
  )
  hidden = [
    rng.standard_normal((rows, width), np.float32) for width in (16, 24)
  ]
  heads = [
    0.5 * rng.standard_normal((64, x.shape[1]), np.float32) for x in hidden
  ]
  return hidden, heads, slots


@pytest.mark.parametrize("kind", [*methods.DIVERGENCES, *FORMS])
def test_the_divergence_is_the_runs_own_at_its_temperature(kind):
  hidden, heads, slots = random_slots(40, np.random.default_rng(1))
  # Without diagnostics an update wouldn't make all of the student's logits.
  own = scoring(kind, top_k=4, temperature=1.5, diagnostics=False)
  own = dataclasses.replace(own, chunk_tokens=16)
  onset_ids = jnp.asarray(distilling.ONSETS)
  scores = jax.jit(
    lambda: token_scores.slot_scores(
      *map(jnp.asarray, (*hidden, *heads)),
      slots,
      Objective(own),
      onset_ids,
      K,
    )
  )()
  # A loss without a teacher is shown beside one all the same.
  told = made("forward_kl") if kind == "cross_entropy" else own.divergence
  check(scores, hidden, heads, slots.label, told, own.temperature)


def weights(rule, entropy, divergence):
  """A trajectory's token weights, from the formulas of `token_weights`."""
  if isinstance(rule, EntropyGate):
    counts = np.float64(entropy >= rule.gate_entropy)
    return counts * len(counts) / max(counts.sum(), 1)

  def stretch(x):
    return (x - x.min()) / (np.ptp(x) or 1)

  h, d = stretch(entropy), stretch(divergence)
  score = rule.tip_entropy * h + rule.tip_divergence * (1 - h) * d
  return score / score.mean() if score.mean() > 0 else np.ones_like(score)


@pytest.mark.parametrize("kind", ["forward_kl", "cross_entropy"])
@pytest.mark.parametrize("rule", [Tip(1.0, 0.5), EntropyGate(3.0)])
def test_weights_and_clip_are_of_the_runs_own_loss(kind, rule):
  hidden, heads, slots = random_slots(40, np.random.default_rng(2))
  own = made(kind)
  inputs = *hidden, *heads, slots.label, np.array(distilling.ONSETS)
  wanted = divergence_reference.reference(inputs, own)
  clip = float(np.median(wanted["divergence"])) + 1e-3
  scores = token_scores.slot_scores(
    *map(jnp.asarray, (*hidden, *heads)),
    slots,
    Objective(scoring(kind), clip=clip, token_weights=rule),
    jnp.asarray(distilling.ONSETS),
    K,
  )
  token = slots.trajectory >= 0
  clipped = wanted["divergence"] > clip
  assert 0 < clipped[token].sum() < token.sum()
  np.testing.assert_array_equal(scores.clipped[token], clipped[token])
  for number in range(3):
    mine = slots.trajectory == number
    want = weights(
      rule, wanted["student_entropy"][mine], wanted["divergence"][mine]
    )
    np.testing.assert_allclose(scores.loss_weight[mine], want, rtol=1e-4)
    # What a weight is over: the mean in its own trajectory.
    assert want.any() == np.isclose(scores.loss_weight[mine].mean(), 1)


LAYOUTS = {
  "one sample a row, many packs": (
    (2, 1, 1),
    {"packing": False, "pack_tokens": 26, "teacher_pack_tokens": 26},
  ),
  "data 8": ((8, 1, 1), {"pack_tokens": 32}),
  "data 2, fsdp 2, tensor 2": ((2, 2, 2), {"pack_tokens": 64}),
  # 64 ids don't divide by 3: every device has the whole vocabulary.
  "tensor 3": ((1, 1, 3), {"pack_tokens": 64}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_devices_and_packs_change_no_number(name):
  mesh_shape, plan = LAYOUTS[name]
  both, data = distilling.models("opd"), distilling.samples(9)
  objective = Objective(scoring("reverse_kl", chunk_tokens=4), clip=0.2)
  alone, lora = scorer_of(both, data, objective=objective)
  spread, split = scorer_of(both, data, mesh_shape, objective, **plan)
  wanted = dict(alone.score(data, [lora]))
  found = dict(spread.score(data, [split]))
  assert found.keys() == wanted.keys() == set(range(len(data)))
  for number, (one,) in found.items():
    (other,) = wanted[number]
    for name in one._fields:
      x, y = getattr(one, name), getattr(other, name)
      assert len(x) == len(data[number].response)
      if x.dtype == np.int32:
        np.testing.assert_array_equal(x, y, err_msg=name)
      else:
        np.testing.assert_allclose(x, y, err_msg=name, **NEAR)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl_topk"])
def test_the_mean_over_a_batch_is_what_training_logs(kind):
  both, data = distilling.models(), distilling.samples(10)
  objective = Objective(scoring(kind, top_k=4), clip=0.1, token_weights=None)
  logged = distilling.Run(both, data, loss=objective).update(data)
  scorer, lora = scorer_of(both, data, objective=objective)
  rows = [scores for _, (scores,) in sorted(scorer.score(data, [lora]))]

  def mean(name, correct=(True, False)):
    return np.concatenate(
      [
        np.float64(getattr(scores, name))
        for scores, sample in zip(rows, data, strict=True)
        if sample.correct in correct
      ]
    ).mean()

  found = {name: mean(column) for name, column in SUMS.items()}
  found["D_correct"] = mean("divergence", [True])
  found["D_incorrect"] = mean("divergence", [False])
  found["clipped_share"] = mean("clipped")
  # Sums of some hundred float32 numbers, in another order.
  for name, value in found.items():
    np.testing.assert_allclose(value, logged[name], rtol=1e-6, err_msg=name)
