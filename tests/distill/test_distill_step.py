"""An update computes the loss and its gradient, however it is laid out."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.support import distilling
from tests.support.distilling import Run
from tests.support.divergence_reference import scoring
from trd_jax.distill import step
from trd_jax.distill.loss.divergences import SampledReverseKl
from trd_jax.distill.loss.objective import Objective
from trd_jax.distill.loss.token_stats import Scoring
from trd_jax.distill.loss.token_weights import Tip
from trd_jax.distill.packing import packing
from trd_jax.model import sharding
from trd_jax.model.qwen3 import logits

pytestmark = pytest.mark.slow

DATA = distilling.samples(12)


@functools.cache
def padded_reference(regime):
  """Loss, gradient and NLLs of DATA from one padded row a trajectory.

  Written out with a full-vocabulary log-softmax and nothing of the packs, the
  buffer, the chunked loss or the weights on tokens.
  """
  both = distilling.models(regime)
  width = max(max(s.student_length, s.teacher_length) for s in DATA)

  def rows(prompts):
    tokens = np.zeros((len(DATA), width), np.int32)
    segments = np.zeros_like(tokens)
    for i, (s, prompt) in enumerate(zip(DATA, prompts, strict=True)):
      ids = np.concatenate([prompt, s.response])[:-1]
      tokens[i, : len(ids)] = ids
      segments[i, : len(ids)] = 1
    return tokens, np.broadcast_to(np.arange(width), tokens.shape), segments

  def log_probs(model, prompts):
    hidden = model(*rows(prompts))
    return jax.nn.log_softmax(logits(hidden, model.head_VD))

  def loss(lora):
    student = nnx.merge(both.student, lora, both.base)
    teacher = nnx.merge(both.teacher, both.teacher_base)
    log_q = log_probs(student, [s.student_prompt for s in DATA])
    log_p = log_probs(teacher, [s.teacher_prompt for s in DATA])
    means, nlls = [], []
    for i, s in enumerate(DATA):
      q, p = (
        x[i, len(prompt) - 1 : len(prompt) - 1 + len(s.response)]
        for x, prompt in ((log_q, s.student_prompt), (log_p, s.teacher_prompt))
      )
      means.append((jnp.exp(p) * (p - q)).sum(-1).mean())
      t = np.arange(len(s.response))
      nlls.append((-q[t, s.response], -p[t, s.response]))
    nll = [jnp.concatenate(side).mean() for side in zip(*nlls, strict=True)]
    return jnp.stack(means).mean(), nll

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, nll), grads = run(both.lora)
  nll = [float(side) for side in nll]
  return float(value), nll, jax.device_get(nnx.to_pure_dict(grads))


@pytest.fixture(scope="module")
def plain():
  """One device, no dropout, and an optimizer that moves nothing."""
  return Run(distilling.models(), DATA)


LAYOUTS = {
  "one device": ("opsd", (1, 1, 1), {}),
  "many packs": (
    "opd",
    (1, 1, 1),
    {
      "pack_tokens": 16,
      "teacher_pack_tokens": 20,
      "buffer_slots": 40,
      "remat": "full",
    },
  ),
  "one sample a row": (
    "opd",
    (2, 1, 1),
    {
      "packing": False,
      "pack_tokens": 12,
      "teacher_pack_tokens": 12,
      "rows_per_device": 2,
      "remat": "attention",
    },
  ),
  "long rows": ("opsd", (2, 1, 1), {"long_rows": 2048}),
  "data 8": ("opsd", (8, 1, 1), {"rows_per_device": 2, "pack_tokens": 32}),
  "data 2, fsdp 2, tensor 2": ("opsd", (2, 2, 2), {"pack_tokens": 64}),
  "data 2, tensor 4": ("opd", (2, 1, 4), {"pack_tokens": 64}),
  # 64 ids don't divide by 3: every device has the whole vocabulary.
  "tensor 3": ("opd", (1, 1, 3), {"pack_tokens": 64}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_and_sharded_is_padded_and_alone(name, plain):
  regime, mesh_shape, how = LAYOUTS[name]
  run = plain
  if how:
    run = Run(distilling.models(regime), DATA, mesh_shape, **how)
  packs = packing.pack(DATA, run.layout)
  if name == "one sample a row":
    assert len(run.layout.student) > 1
    rows = [p.rows for m in packs for p in (*m.student, *m.teacher)]
    assert max(r.segments.max() for r in rows) == 1
  if name == "many packs":
    assert len(packs) > 1
    assert len(run.layout.student) > 1
    assert sum(len(p.student) for p in packs) > 4
  metrics = run.update(DATA)
  loss, nll, grads = padded_reference(regime)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-6)
  np.testing.assert_allclose(
    [metrics["nll_student"], metrics["nll_teacher"]], nll, rtol=2e-6
  )
  norm = float(optax.tree.norm(grads))
  assert norm > 0.1
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
  apart = optax.tree.norm(jax.tree.map(np.subtract, run.gradient, grads))
  assert apart < 3e-6 * norm


def test_updates_are_counted_and_their_totals_start_anew(plain):
  before = int(plain.state.step)
  # The optimizer moves nothing, so a second update sees the same gradient:
  # what was summed before must be gone.
  first, second = plain.update(DATA), plain.update(DATA)
  assert first.pop("learning_rate") == before
  assert second.pop("learning_rate") == before + 1
  assert first == second
  assert int(plain.state.step) == before + 2


def test_the_teachers_prompt_reaches_the_teacher_alone(plain):
  data = [
    dataclasses.replace(s, teacher_prompt=(s.teacher_prompt + 7) % 60)
    for s in DATA
  ]
  before, after = plain.update(DATA), plain.update(data)
  student = [
    "nll_student",
    "entropy_student",
    "epistemic_mass_student",
    "top16_mass_student",
  ]
  teacher = ["D", "nll_teacher", "epistemic_mass_teacher", "top16_mass_teacher"]
  assert [before[k] for k in student] == [after[k] for k in student]
  assert all(abs(before[k] - after[k]) > 1e-4 for k in teacher)


def test_a_fresh_adapter_differs_from_its_base_by_the_prompt_alone(plain):
  trained = jax.device_get(plain.state.lora)
  fresh = jax.tree.map_with_path(
    lambda path, x: x * 0 if "lora_b" in jax.tree_util.keystr(path) else x,
    trained,
  )
  data = [dataclasses.replace(s, teacher_prompt=s.student_prompt) for s in DATA]
  plain.state = plain.state._replace(lora=jax.device_put(fresh))
  metrics = plain.update(data)
  plain.state = plain.state._replace(lora=jax.device_put(trained))
  assert metrics["loss"] < 1e-6
  assert metrics["nll_student"] == pytest.approx(metrics["nll_teacher"])


def test_dropout_is_the_students_and_changes_with_the_update_only():
  run = Run(distilling.models(), DATA, dropout=True)
  first, second = run.update(DATA), run.update(DATA)
  run.state = run.state._replace(step=jnp.zeros_like(run.state.step))
  assert run.update(DATA) == first
  nll_student, nll_teacher = padded_reference("opsd")[1]
  nlls = [first["nll_student"], second["nll_student"], nll_student]
  assert np.diff(sorted(nlls)).min() > 1e-4
  assert first["nll_teacher"] == second["nll_teacher"]
  assert first["nll_teacher"] == pytest.approx(nll_teacher, rel=2e-6)


def collectives(lowered):
  text = lowered.compile().as_text()
  return set(re.findall(r"all-\w+|reduce-scatter|collective-\w+", text))


def test_replicas_meet_once_an_update():
  run = Run(distilling.models(), DATA, (8, 1, 1))
  mesh = run.setup.mesh
  everywhere, groups = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  both = distilling.models()
  base = nnx.to_pure_dict(both.base)
  batch = packing.pack(DATA, run.layout)[0]
  buffer = np.zeros((8, run.layout.buffer_slots, 32), np.float32)
  learn = jax.jit(
    functools.partial(step.learn, run.setup),
    in_shardings=(everywhere,) * 3 + (groups, groups, everywhere),
  )
  args = nnx.to_pure_dict(both.lora), base, base, buffer, batch.student[0]
  totals = jax.eval_shape(learn, *args, jax.random.key(0))
  assert not collectives(learn.lower(*args, jax.random.key(0)))
  teach = jax.jit(
    functools.partial(step.teach, run.setup),
    in_shardings=(groups, everywhere, groups),
  )
  assert not collectives(teach.lower(buffer, base, batch.teacher[0]))
  rows = jax.tree.map(lambda _: groups, totals)
  update = jax.jit(
    functools.partial(step.update, run.setup),
    in_shardings=(everywhere, rows),
    out_shardings=(everywhere, rows, everywhere),
  )
  assert collectives(update.lower(run.state, totals)) == {"all-reduce"}


def test_a_split_head_is_scored_where_it_lies():
  run = Run(distilling.models(), DATA, (2, 1, 4))
  mesh = run.setup.mesh
  slots = packing.pack(DATA, run.layout)[0].student[0].slots
  groups = sharding.batch_sharding(mesh)
  heads = NamedSharding(mesh, P("tensor"))

  @functools.partial(jax.jit, in_shardings=(*[groups] * 3, heads))
  def gradient(hidden, buffer, slots, head):
    def loss(hidden):
      scored = step.score_groups(run.setup, hidden, buffer, slots, head, head)
      return scored[0].sum(), scored[1]

    return jax.grad(loss, has_aux=True)(hidden)

  # Lengths that no part of a head has.
  hidden = np.zeros((2, 1, 48, 32), np.float32)
  buffer = np.zeros((2, 100, 32), np.float32)
  lowered = gradient.lower(hidden, buffer, slots, np.zeros((64, 32), "f"))
  assert collectives(lowered) == {"all-reduce"}
  text = lowered.compile().as_text()
  assert "f32[16,32]" in text
  assert "f32[64,32]" not in text


# forward_kl's gradient is compared with the reference's above.
METHODS = {
  "forward_kl_clip": Objective(clip=4.0),
  "reverse_kl_topk": Objective(scoring("reverse_kl_topk", top_k=8)),
  "jsd": Objective(scoring("jsd", beta=0.3)),
  "tip": Objective(scoring("reverse_kl"), token_weights=Tip(1.0, 1.0)),
}
SMALL_PACKS = {
  "pack_tokens": 32,
  "teacher_pack_tokens": 32,
  "rows_per_device": 3,
}


SAMPLED = Objective(Scoring(SampledReverseKl(0.8)))


@pytest.mark.parametrize(
  "loss", [METHODS["tip"], METHODS["reverse_kl_topk"], SAMPLED]
)
def test_weights_supports_and_returns_survive_a_split_vocabulary(loss):
  both = distilling.models("opd")
  alone = Run(both, DATA, loss=loss)
  split = Run(both, DATA, (2, 1, 4), loss=loss, pack_tokens=64)
  wanted, metrics = alone.update(DATA), split.update(DATA)
  assert wanted["grad_norm"] > 0.1
  assert metrics == pytest.approx(wanted, rel=1e-5)
  apart = jax.tree.map(np.subtract, split.gradient, alone.gradient)
  assert optax.tree.norm(apart) < 1e-5 * wanted["grad_norm"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_brings_the_student_to_the_teacher(method):
  data = distilling.samples(4)
  run = Run(
    distilling.models("opd"),
    data,
    loss=METHODS[method],
    optimizer=optax.adam(3e-3),
    **SMALL_PACKS,
  )
  losses = [run.update(data)["loss"] for _ in range(12)]
  assert losses[-1] < 0.8 * losses[0]


def test_sampled_reverse_kl_moves_against_the_log_ratio():
  # One sample's estimate may have either sign; what its gradient must do is
  # lower log-probabilities where the student's exceed the teacher's.
  data = distilling.samples(4)
  run = Run(
    distilling.models("opd"),
    data,
    loss=Objective(scoring("sampled_reverse_kl")),
    optimizer=optax.adam(3e-3),
    **SMALL_PACKS,
  )
  rows = [run.update(data) for _ in range(12)]
  ratios = [r["nll_teacher"] - r["nll_student"] for r in rows]
  assert abs(ratios[-1]) < abs(ratios[0])
