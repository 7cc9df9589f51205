"""Trajectories that nobody grades, where no verdict is used."""

import json

import pytest

from tests.test_stages import go, small
from trd_jax import refine, rollout
from trd_jax.data import problems
from trd_jax.experiment import experiment, scopes
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import Trajectory
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Data
from trd_jax.generation import summaries
from trd_jax.grading import graders
from trd_jax.pipeline import data_checks

OFF = {"rollout.grade": False, "refine.grade": False}


@pytest.mark.slow
def test_a_stage_that_grades_nothing_opens_no_grader(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(graders.GRADERS["math"], "submit", lambda *_: 1 / 0)
  e = small(**OFF, **{"data.arithmetic.num_problems": 6})
  run_dir = RunDir(tmp_path)
  go(rollout, e, run_dir)
  go(refine, e, run_dir)
  for stage in ("rollout", "refine"):
    rows = run_dir.read(stage, Trajectory)
    assert len(rows) == 6
    assert {(r.correct, r.reason, r.grader_version) for r in rows} == {
      (None, "not_graded", "none")
    }
    done = run_dir.done(stage)
    assert (done["not_graded"], done["unjudged"], done["no_gold"]) == (6, 0, 0)
    told = summaries.describe(done)
    assert "no verdict: 6 rows that weren't graded" in told
    assert "correct" not in told
  assert set(run_dir.done("refine")["by_draft"].values()) == {0}


@pytest.mark.parametrize(
  ("subset", "stage"),
  [
    ("fail", "rollout"),
    ("succ", "rollout"),
    ("fail_to_succ", "rollout"),
    ("fail_to_succ", "refine"),
    ("refined_succ", "refine"),
  ],
)
def test_a_subset_needs_its_verdicts(subset, stage):
  config = {"train": {"subset": subset}, stage: {"grade": False}}
  with pytest.raises(UserError, match=rf"subset={subset} .* {stage}\.grade"):
    experiment.from_config(config)
  config["train"]["subset"] = "all"
  assert experiment.from_config(config).grades


def test_verdicts_decide_what_they_decide():
  assert scopes.of("rollout.grade") == {"problems", "rollout"}
  assert not small(**OFF).grades
  # No y_r is written along y_o, so that whether it is graded says nothing.
  assert not small(method="forward_kl", **{"rollout.grade": False}).grades


def test_taco_takes_rows_without_tests_where_nothing_is_graded(tmp_path):
  tests = json.dumps({"inputs": ["1"], "outputs": ["2"]})
  found = [
    {"question": "Add.", "input_output": tests},
    {"question": "Take.", "input_output": "", "solutions": '["print(1)"]'},
    {"question": "Cut.", "input_output": '{"inputs": ["1"], "outputs": []}'},
    {"question": "", "input_output": ""},
  ]
  path = tmp_path / "taco.jsonl"
  path.write_text("\n".join(map(json.dumps, found)))
  data = Data(source="taco", root=str(path))
  kept, rejected = problems.read(data)
  assert [p.text for p in kept] == ["Add."]
  assert len(rejected) == 3
  kept, rejected = problems.read(data, graded=False)
  assert [(p.text, p.tests) for p in kept] == [
    ("Add.", tests),
    ("Take.", None),
    ("Cut.", None),
  ]
  assert kept[1].solution == "```python\nprint(1)\n```"
  assert [r.reason.partition(": ")[2] for r in rejected] == ["no problem"]
  assert [p.has_gold for p in kept] == [True, False, False]
  # Nothing runs programs then, so that no sandbox is looked for.
  e = small(domain="code", **OFF)
  assert list(data_checks.graders(e, False, None)) == []
