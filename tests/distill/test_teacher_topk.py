"""The bucketed KL is its formula, and its distance to the full one is bounded.

References are float64 NumPy: whole rows, plain formulas, no chunks.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.distill.test_divergence import make_inputs
from tests.support import training_runs
from tests.support.divergence_reference import (
  error,
  log_softmax,
  reference,
  scoring,
)
from tests.test_train import LORA
from trd_jax import train
from trd_jax.data.chat import Chat
from trd_jax.distill.loss.divergences import ForwardKl
from trd_jax.distill.loss.objective import Objective
from trd_jax.distill.loss.tail_divergence import Recorded, slot_loss, tail_stats
from trd_jax.distill.loss.token_stats import Scoring
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import from_config
from trd_jax.experiment.metric_log import read_metrics
from trd_jax.model.weights.hub import model_revision

ROWS, VOCABULARY = 37, 300
COTANGENT = 0.7


def teacher_log_probs(inputs):
  """float64 [R, V] of the teacher of `make_inputs`."""
  hidden, head = (np.asarray(inputs[i], np.float64) for i in (1, 3))
  return log_softmax(hidden @ head.T)


def record(log_p_RV, k) -> Recorded:
  """What a generation would have kept of a teacher."""
  ids_RK = np.argsort(-log_p_RV, axis=-1, kind="stable")[:, :k]
  top_RK = np.take_along_axis(log_p_RV, ids_RK, 1)
  tail_R = np.maximum(1 - np.exp(top_RK).sum(1), 0)
  return Recorded(
    ids_RK.astype(np.int32),
    top_RK.astype(np.float32),
    tail_R.astype(np.float32),
  )


@functools.partial(jax.jit, static_argnums=2)
def scored(inputs, recorded, spec):
  """(stats, COTANGENT · d sum of divergences / d student hidden)."""
  hidden, _, head, _, labels, onset = inputs

  def total(hidden):
    stats = tail_stats(hidden, head, recorded, labels, onset, spec)
    return COTANGENT * stats.token.divergence.sum(), stats

  gradient, stats = jax.grad(total, has_aux=True)(hidden)
  return stats, gradient


def bucketed(inputs, k):
  """name -> float64 [R]; `gradient` and `slope` by the student's side."""
  hidden, head = (np.asarray(inputs[i], np.float64) for i in (0, 2))
  log_q, log_p = log_softmax(hidden @ head.T), teacher_log_probs(inputs)
  rest = np.ones_like(log_p, bool)
  ids = np.argsort(-log_p, axis=-1, kind="stable")[:, :k]
  np.put_along_axis(rest, ids, False, 1)
  q, p = np.exp(log_q), np.exp(log_p)
  q_t, p_t = ((x * rest).sum(1, keepdims=True) for x in (q, p))
  inside = (np.where(rest, 0, p * (log_p - log_q))).sum(1)
  slope = np.where(rest, q * (1 - p_t / q_t), q - p)
  log_q_c = np.where(rest, log_q - np.log(q_t), 0)
  least = np.take_along_axis(p, ids[:, -1:], 1)
  spread = np.maximum(np.log(p_t / least), 0)[:, 0]
  return {
    "divergence": inside + (p_t * np.log(p_t / q_t))[:, 0],
    "slope": slope,
    "gradient": slope @ head,
    "teacher_tail": p_t[:, 0],
    "student_tail": q_t[:, 0],
    "gap_bound": p_t[:, 0] * (-log_q_c.min(1) - spread),
    "full_slope": q - p,
  }


@pytest.mark.slow
@pytest.mark.parametrize("k", [4, 20])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_equals_float64_reference(k, scale):
  inputs = make_inputs(ROWS, VOCABULARY, scale=scale)
  wanted = bucketed(inputs, k)
  stats, gradient = scored(
    inputs,
    record(teacher_log_probs(inputs), k),
    Scoring(chunk_tokens=8),
  )
  # The recorded mass is known to a few roundings of 1, so a small rest is not
  # known to as many digits as a large one.
  near = 3e-6 + 1e-7 / wanted["teacher_tail"].mean()
  assert error(stats.token.divergence, wanted["divergence"]) < near
  assert error(gradient, COTANGENT * wanted["gradient"]) < near
  for name in "teacher_tail", "student_tail", "gap_bound":
    assert error(getattr(stats, name), wanted[name]) < near, name
  whole = reference(inputs, ForwardKl())
  for name in "student_nll", "student_entropy", "student_onset_mass":
    assert error(getattr(stats.token, name), whole[name]) < 3e-6, name
  assert error(stats.token.student_top16_mass, whole["student_top16_mass"]) < (
    3e-6
  )


def test_reference_slope_is_that_of_its_value():
  inputs = make_inputs(3, 50)
  direction = np.random.default_rng(1).standard_normal(inputs[0].shape)
  high, low = (
    bucketed((np.asarray(inputs[0]) + step * direction, *inputs[1:]), 5)
    for step in (1e-5, -1e-5)
  )
  slope = (bucketed(inputs, 5)["gradient"] * direction).sum(1)
  np.testing.assert_allclose(
    (high["divergence"] - low["divergence"]) / 2e-5, slope, rtol=1e-5, atol=1e-8
  )


def test_with_every_token_recorded_it_is_the_full_divergence():
  inputs = make_inputs(ROWS, 60)
  wanted = reference(inputs, ForwardKl())
  recorded = record(teacher_log_probs(inputs), 60)
  # What rounding would leave of the mass must not become a bucket.
  recorded = recorded._replace(tail=np.full(ROWS, 1e-7, np.float32))
  stats, gradient = scored(inputs, recorded, Scoring(chunk_tokens=8))
  for name, x in stats.token._asdict().items():
    assert error(x, wanted[name]) < 3e-6, name
  assert error(gradient, COTANGENT * wanted["gradient"]) < 3e-6
  assert (np.asarray(stats.gap_bound) == 0).all()


@pytest.mark.parametrize("k", [4, 8, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_it_leaves_out_is_within_the_bounds(k, seed):
  inputs = make_inputs(64, VOCABULARY, seed=seed, scale=2.0)
  stats, _ = scored(
    inputs, record(teacher_log_probs(inputs), k), Scoring(chunk_tokens=16)
  )
  full = reference(inputs, ForwardKl())["divergence"]
  gap = full - np.asarray(stats.token.divergence, np.float64)
  bound = np.asarray(stats.gap_bound)
  assert (gap > -1e-5).all()
  assert (gap < bound + 1e-5).all()
  assert gap.max() > 1e-3
  wanted = bucketed(inputs, k)
  apart = np.abs(wanted["slope"] - wanted["full_slope"]).sum(1)
  assert (apart <= 2 * wanted["teacher_tail"] + 1e-12).all()


def test_the_bound_on_the_divergence_can_be_reached():
  # A student that is sure of all but one token, on which the teacher's rest
  # lies as far as its least recorded probability lets it.
  log_p = np.log(np.array([[0.6, 0.2, 0.2, 0.0, 0.0]]) + 1e-300)
  student = np.array([[3.0, 2.0, -9.0, 1.0, 1.0]], np.float32)
  inputs = (
    jnp.asarray(student),
    None,
    jnp.eye(5),
    None,
    np.array([0], np.int32),
    np.array([0], np.int32),
  )
  stats, _ = scored(inputs, record(log_p, 2), Scoring())
  log_q = log_softmax(np.asarray(student, np.float64))
  full = (np.exp(log_p) * (log_p - log_q)).sum()
  gap = full - float(stats.token.divergence[0])
  assert gap == pytest.approx(float(stats.gap_bound[0]), rel=1e-5)


def test_the_teachers_diagnostics_say_what_is_known_and_no_more():
  inputs = make_inputs(ROWS, VOCABULARY)
  log_p = teacher_log_probs(inputs)
  order = np.argsort(-log_p, axis=-1)
  # A recorded label in the first rows, one that isn't in the others.
  rank = np.where(np.arange(ROWS) < 20, 2, 9)[:, None]
  labels = np.take_along_axis(order, rank, 1)[:, 0].astype(np.int32)
  inputs = (*inputs[:4], labels, inputs[5])
  stats, _ = scored(inputs, record(log_p, 8), Scoring(chunk_tokens=8))
  wanted = -log_p[np.arange(ROWS), labels]
  nll = np.asarray(stats.token.teacher_nll)
  np.testing.assert_allclose(nll[:20], wanted[:20], rtol=1e-5)
  assert np.isnan(nll[20:]).all()
  assert stats.token.teacher_top16_mass is None
  onset = np.exp(log_p)[:, inputs[5]].sum(1)
  short = onset - np.asarray(stats.token.teacher_onset_mass)
  assert (short > -1e-6).all()
  assert (short < np.asarray(stats.teacher_tail) + 1e-6).all()


def test_extreme_logits_stay_finite():
  hidden, teacher, *rest = make_inputs(9, VOCABULARY)
  inputs = 2e3 * hidden, 2e3 * teacher, *rest
  stats, gradient = scored(
    inputs, record(teacher_log_probs(inputs), 4), Scoring(chunk_tokens=8)
  )
  assert np.isfinite(gradient).all()
  finite = stats._replace(token=stats.token._replace(teacher_nll=None))
  for x in jax.tree.leaves(finite):
    assert np.isfinite(x).all()
  wanted = reference(inputs, ForwardKl())
  assert error(stats.token.divergence, wanted["divergence"]) < 1e-5


def test_another_divergence_is_no_business_of_recorded_tokens():
  for spec in scoring("jsd"), Scoring(temperature=2.0):
    with pytest.raises(ValueError, match="forward KL at temperature 1"):
      slot_loss(Objective(spec), (1,))


# -- the stage ---------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tmp_path_factory):
  return training_runs.model_folder(tmp_path_factory.mktemp("student"))


def experiment(folder, **fields):
  section = {
    "batch_size": 4,
    "learning_rate": 1e-2,
    "pack_tokens": 64,
    "teacher": "topk_from_rollout",
    "teacher_tail_limit": 1.0,
  } | fields
  return training_runs.experiment(
    folder,
    lora=LORA,
    mesh={"data": 2},
    refine={"thinking": None, "teacher_top_k": 8},
    train=section,
  )


def columns(number, length, k, vocabulary=training_runs.VOCABULARY):
  """Recorded tokens of a teacher that says much the same everywhere."""
  habit = 3 * np.random.default_rng(99).standard_normal(vocabulary)
  noise = np.random.default_rng(number).standard_normal((length, vocabulary))
  log_p = log_softmax(habit + noise)
  made = record(log_p, k)
  return {
    "teacher_top_ids": made.ids.ravel().tolist(),
    "teacher_top_logprobs": made.log_probs.ravel().tolist(),
    "teacher_top_mass": (1 - made.tail).tolist(),
  }, log_p


def workdir(
  root, student, k=8, revision=None, count=6, vocabulary=None, wrong=None
):
  """A workdir whose refinements have recorded tokens."""
  chat = Chat.load(student)
  revision = revision or model_revision(student)
  changes = {}
  for n in range(count):
    row = training_runs.trajectory(chat, training_runs.problem(n), "refine", n)
    changes[n] = {"model_revision": revision}
    if k:
      size = vocabulary or training_runs.VOCABULARY
      changes[n] |= columns(n, len(row.response_ids), k, size)[0]
      if wrong is not None:
        changes[n]["teacher_top_logprobs"][-1] = wrong
  return training_runs.workdir(root, chat, count=count, refine=changes)


@pytest.mark.slow
def test_a_run_needs_nothing_of_the_teacher_but_its_recorded_tokens(
  tmp_path, student
):
  run_dir = workdir(tmp_path, student)
  train.run(experiment(student, epochs=8, batch_size=6), run_dir, None)
  rows = read_metrics(run_dir.metrics_file("train"))
  assert rows[-1]["loss"] < 0.97 * rows[0]["loss"]
  assert all(row["tokens_teacher"] == 0 for row in rows)
  assert all(row["D_gap_bound"] > 0 for row in rows)
  # A random label is rarely recorded, and a mean over what is would mislead.
  assert all(row["nll_teacher"] is None for row in rows)
  done = run_dir.done("train")["teacher"]
  assert (done["source"], done["tokens_kept"]) == ("topk_from_rollout", 8)
  tails = []
  for n in range(6):
    row = training_runs.trajectory(
      Chat.load(student), training_runs.problem(n), "refine", n
    )
    _, log_p = columns(n, len(row.response_ids), 8)
    tails.append(1 - np.sort(np.exp(log_p))[:, -8:].sum(1).mean())
  assert done["mean_tail_mass"] == pytest.approx(np.mean(tails), rel=1e-5)
  assert done["largest_gap_bound"] == max(row["D_gap_bound"] for row in rows)


def test_what_was_not_recorded_well_is_refused(tmp_path, student):
  def refused(root, match, run=None, **how):
    run_dir = workdir(tmp_path / root, student, **how)
    with pytest.raises(UserError, match=match):
      train.run(run or experiment(student), run_dir, None)
    assert not run_dir.metrics_file("train").exists()

  refused("none", "has no recorded tokens", k=0)
  for wrong in (math.nan, math.inf, -math.inf, 0.5):
    refused(f"log-probability {wrong}", "that are none", wrong=wrong)
  refused("other", r"written by revision 0123 .* is now", revision="0123")
  refused("wide", f"a head of {training_runs.VOCABULARY} rows", vocabulary=4000)
  limit = experiment(student, teacher_tail_limit=1e-3)
  refused(
    "tail",
    r"the 8 recorded tokens leave out a mass of 0\.\d+ .*limit=0\.001; record"
    " more",
    run=limit,
  )


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"method": "jsd"}, "not along y_o .* set trajectory=y_r"),
    ({"refine": {"teacher_top_k": 0}}, "needs refine.teacher_top_k above 0"),
    ({"loss": {"temperature": 2.0}}, "not at loss.temperature=2"),
  ],
)
def test_what_makes_no_sense_is_refused_at_the_door(changes, match):
  sound = {
    "train": {"teacher": "topk_from_rollout"},
    "refine": {"teacher_top_k": 20},
  }
  assert from_config(sound).train.teacher == "topk_from_rollout"
  with pytest.raises(UserError, match=match):
    from_config(sound | changes)


def test_a_float32_cache_of_a_bfloat16_teacher_is_refused():
  with pytest.raises(UserError, match="adds nothing"):
    from_config(
      {"train": {"cache_dtype": "float32"}, "student": {"dtype": "bfloat16"}}
    )
