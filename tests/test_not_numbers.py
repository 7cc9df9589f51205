"""A value that is no number passes no limit, whichever the limit is.

No comparison with a NaN is true: `if value > limit: refuse` lets it pass, and
Python's `max` passes over one that isn't the first.
"""

import math
import types

import numpy as np
import pytest

from trd_jax.distill import training_loop
from trd_jax.distill.loss.token_stats import Scoring
from trd_jax.distill.teacher import topk_from_rollout
from trd_jax.doctor import engine_checks, training_checks
from trd_jax.experiment import alarms, experiment, metric_log, progress
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.schema import Pipeline
from trd_jax.generation import summaries
from trd_jax.grading import estimators, scores
from trd_jax.merge import _check as check_merge
from trd_jax.pipeline import rounds

NOT_NUMBERS = (math.nan, math.inf)
ROUND = {"base_pass_at_k": 0.5, "pass_at_k": 0.5, "length_share": 1.0}
SHARES = {"truncated_share": 0.0, "no_box_share": 0.0, "median_tokens": 9}
SUMMARY = {"samples": 10, "truncated": 0, "no_box": 0, "median_tokens": 9}
MERGE = {
  "step": 1,
  "without_update": False,
  "adapter_is_zero": False,
  "merged": True,
  "dtype": "float32",
  "largest_logit_difference": 0.0,
  "largest_logit_distance_to_base": 1.0,
}


def refuses(call, *arguments, **options):
  """Returns whether a call ends with an error that says what is wrong."""
  try:
    call(*arguments, **options)
  except (UserError, ValueError):
    return True
  return False


def top(drawn, logprobs):
  return {"drawn": drawn, "ids": [[0, 1]] * len(drawn), "logprobs": logprobs}


def wrong_top(value):
  half = math.log(0.5)
  rows = [[half, half], [half, value]]
  return bool(engine_checks._wrong_top(top([0, 0], rows), 2)[0])


def wrong_attention(value):
  facts = {"errors": [0.0, value]}
  return training_checks.judge_attention(facts, "xla").status != "ok"


# By what is checked: whether a value is refused, or told of.
CHECKS = {
  "loss": lambda x: refuses(
    training_loop._check_finite, 1, {"loss": x, "grad_norm": 1.0}
  ),
  "gradient": lambda x: refuses(
    training_loop._check_finite, 1, {"loss": 1.0, "grad_norm": x}
  ),
  "logits of a merge": lambda x: refuses(
    check_merge, MERGE | {"largest_logit_difference": x}, "student"
  ),
  "logits beside base": lambda x: refuses(
    check_merge, MERGE | {"largest_logit_distance_to_base": x}, "student"
  ),
  "counts of correct samples": lambda x: refuses(
    estimators.per_question_avg, np.array([1.0, x]), 4
  ),
  "weight of the cross entropy": lambda x: refuses(Scoring, cross_entropy=x),
  "temperature of the loss": lambda x: refuses(Scoring, temperature=x),
  "log-probabilities of an engine": wrong_top,
  "attention": wrong_attention,
  "collapse of accuracy": lambda x: bool(
    rounds.collapsed(ROUND | {"pass_at_k": -x}, Pipeline())
  ),
  "collapse of length": lambda x: bool(
    rounds.collapsed(ROUND | {"length_share": -x}, Pipeline())
  ),
  "samples cut off": lambda x: bool(
    list(scores.without_answers({"a": SHARES | {"truncated_share": x}}))
  ),
  "samples without an answer": lambda x: bool(
    list(scores.without_answers({"a": SHARES | {"no_box_share": x}}))
  ),
  "trajectories cut off": lambda x: bool(
    summaries.without_answers("rollout", SUMMARY | {"truncated": x})
  ),
  "trajectories without an answer": lambda x: bool(
    summaries.without_answers("rollout", SUMMARY | {"no_box": x})
  ),
  **{
    name: lambda x, name=name: refuses(experiment.from_config, {name: x})
    for name, key in experiment.KEYS.items()
    if key.type is float
  },
}


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_it_passes_no_limit(check, value):
  assert check(value)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_the_limits_let_numbers_pass(check):
  numbers = (0.0, 0.25, 0.5, 1.0, math.log(0.5), 2000.0)
  assert not all(map(check, numbers))


def test_the_mass_that_is_left_out_is_held_against_its_limit(monkeypatch):
  found = topk_from_rollout.Recorded(
    np.zeros((1, 2), int), np.zeros((1, 2)), np.array([math.nan])
  )
  monkeypatch.setattr(topk_from_rollout, "_read", lambda *_: {"a": found})
  run = types.SimpleNamespace(experiment=experiment.Experiment())
  with pytest.raises(UserError, match="leave out a mass of nan"):
    topk_from_rollout.TopkFromRollout.prepare(run)


def test_trajectories_that_hold_no_answer_are_told_of():
  cut = summaries.without_answers("refine", SUMMARY | {"truncated": 9})
  assert "90% of the samples were cut off at their budget" in cut
  assert "raise refine.max_response_tokens" in cut
  empty = summaries.without_answers("rollout", SUMMARY | {"no_box": 10})
  assert "100% of the samples hold no answer" in empty
  assert summaries.without_answers("rollout", SUMMARY) is None
  assert summaries.without_answers("rollout", SUMMARY | {"samples": 0}) is None


def test_the_update_without_a_loss_is_numbered_as_the_lines_of_progress_are():
  # Steps count from 0; the first update is update 1 to whoever reads the log.
  row = {"loss": math.nan, "grad_norm": 1.0}
  with pytest.raises(UserError, match=r"^update 1: the loss is nan "):
    training_loop._check_finite(0, row)


def test_the_alarm_of_such_an_update_is_said_though_it_has_no_row(
  tmp_path, capsys
):
  path = tmp_path / "metrics.jsonl"
  with (
    metric_log.MetricWriter(path) as writer,
    progress.Progress(10, "train", "updates") as bar,
  ):
    log = training_loop.Log(writer, bar, alarms.Watch(), every=5, last=9)
    sums = {"loss": np.ones(2), "grad_norm": np.ones(2)}
    log.record(0, sums, {})
    with pytest.raises(UserError, match=r"^update 3: the loss is nan"):
      log.record(2, sums | {"loss": np.array([math.nan, 1])}, {})
  out = capsys.readouterr().out
  assert out.startswith("train: alarm nan at update 3: loss: not a finite")
  assert [row["step"] for row in metric_log.read_metrics(path)] == [0]
