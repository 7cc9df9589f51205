"""Grading apart from sampling: settled afterwards, again, and compared."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from tests import test_stages
from tests.data.test_benchmarks import lcb_row, write
from tests.grading.test_scores import sample
from tests.support import sandboxes
from trd_jax import evaluate
from trd_jax.data.problems import livecodebench, questions, rows
from trd_jax.experiment import experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files.json_files import read_json
from trd_jax.experiment.processes import supervise
from trd_jax.experiment.records import GradedSample
from trd_jax.experiment.run_dir import RunDir
from trd_jax.grading import benchmark_verdicts, graders
from trd_jax.grading.code import programs as code_grading
from trd_jax.grading.math import formulas
from trd_jax.grading.math import verifier as math_grading
from trd_jax.pipeline import pipeline

pytestmark = pytest.mark.slow

STAGE = "evaluate/base"
LIVECODEBENCH = ("livecodebench", "LiveCodeBench-v6", "livecodebenchv6")
go, small = test_stages.go, test_stages.small


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run directory with an evaluation of the base student."""
  run_dir = RunDir(tmp_path_factory.mktemp("finished"))
  go(evaluate, small(), run_dir, model="base")
  return run_dir


def copy_of(run_dir, folder, change=lambda row: row):
  """The same samples elsewhere, with other verdicts."""
  other = RunDir(folder)
  with other.shard_writer(STAGE, GradedSample, rows_per_shard=7) as writer:
    for row in run_dir.read(STAGE, GradedSample):
      writer.add(change(row))
  other.mark_done(STAGE, run_dir.done(STAGE))
  return other


def turned(row):
  return dataclasses.replace(
    row, correct=not row.correct, reason="unparsed", grader_version="math-0"
  )


def test_regrading_brings_verdicts_back_and_samples_nothing(
  finished, tmp_path, monkeypatch
):
  from trd_jax.generation import generate

  monkeypatch.setattr(generate, "generate", lambda *_, **__: 1 / 0)
  other = copy_of(finished, tmp_path, turned)
  go(evaluate, small(), other, model="base", regrade=True)
  rows_ = finished.read(STAGE, GradedSample)
  assert other.read(STAGE, GradedSample) == rows_
  assert other.done(STAGE) == finished.done(STAGE)
  assert read_json(other.stage_summary(STAGE)) == read_json(
    finished.stage_summary(STAGE)
  )
  assert len(list(other.stage(STAGE).glob("shard-*.parquet"))) == 1


def test_regrading_needs_a_finished_evaluation_of_the_same_questions(
  finished, tmp_path
):
  with pytest.raises(UserError, match="isn't finished"):
    go(evaluate, small(), RunDir(tmp_path / "a"), model="base", regrade=True)
  other = copy_of(finished, tmp_path / "b", turned)
  chosen = small(**{"evaluate.num_problems": 7})
  with pytest.raises(UserError, match="had other questions"):
    go(evaluate, chosen, other, model="base", regrade=True)
  assert {row.grader_version for row in other.read(STAGE, GradedSample)} == {
    "math-0"
  }


def test_the_summary_says_what_was_read_and_how_it_was_judged(finished):
  (row,) = read_json(finished.stage_summary(STAGE)).values()
  assert row["data"] == {"rows": 8, "files": []}
  assert row["graders"] == {math_grading.VERSION: 32}
  assert row["model"] == "lab:student"
  assert "verdicts" not in row
  assert list(row["pass_curve"]) == ["1", "2", "4"]


def test_buckets_are_a_named_runs(finished, tmp_path, capsys):
  other = copy_of(finished, tmp_path, turned)
  named = small(**{"evaluate.buckets_from": str(finished.root)})
  go(evaluate, named, other, model="base", regrade=True)
  (row,) = other.done(STAGE).values()
  parts = row["buckets"]
  assert list(parts) == ["B0", "B1-2", "B3-4"]
  # By its own verdicts the first bucket has no right sample, the last most.
  assert parts["B0"]["n"] == 0 or parts["B0"]["avg_at_k"] == 0
  assert parts["B3-4"]["n"] == 0 or parts["B3-4"]["avg_at_k"] >= 0.75
  assert "Avg@4 B1-2" in capsys.readouterr().out
  nowhere = small(**{"evaluate.buckets_from": str(tmp_path / "none")})
  with pytest.raises(UserError, match="no finished evaluation of the base"):
    go(evaluate, nowhere, other, model="base", regrade=True)


def unfinished(finished, folder):
  return RunDir(folder)


def without_a_benchmark(finished, folder):
  other = copy_of(finished, folder)
  other.mark_done(STAGE, {"aime24": other.done(STAGE)["arithmetic"]})
  return other


def of_other_questions(finished, folder):
  other = copy_of(finished, folder)
  summary = other.done(STAGE)
  summary["arithmetic"]["verdicts"].popitem()
  other.mark_done(STAGE, summary)
  return other


@pytest.mark.parametrize(
  ("make", "told"),
  [
    (unfinished, "there is no finished evaluation of the base"),
    (without_a_benchmark, "it has no arithmetic"),
    (of_other_questions, "of arithmetic it lacks 1 of 8 questions"),
  ],
)
def test_unfit_buckets_are_refused_before_anything_is_drawn(
  finished, tmp_path, monkeypatch, make, told
):
  from trd_jax.generation.sampling_stage import SamplingStage

  monkeypatch.setattr(SamplingStage, "fill", lambda *_, **__: 1 / 0)
  monkeypatch.setattr(supervise, "run", lambda *_, **__: 1 / 0)
  base = make(finished, tmp_path / "base")
  named = small(**{"evaluate.buckets_from": str(base.root)})
  fresh = RunDir(tmp_path / "fresh")
  told = f"evaluate.buckets_from={base.root}: {told}"
  for stage, flags in (
    (evaluate, {"model": "base"}),
    (pipeline, {"config_argv": []}),
  ):
    with pytest.raises(UserError, match=re.escape(told)):
      go(stage, named, fresh, **flags)
  # Also where only the trained student is still to be evaluated.
  with pytest.raises(UserError, match=re.escape(told)):
    go(pipeline, named, copy_of(finished, tmp_path / "half"), config_argv=[])


def test_two_runs_are_compared_by_one_command(finished, tmp_path):
  other = copy_of(finished, tmp_path / "other")
  mine = copy_of(finished, tmp_path / "mine")
  for run_dir in (other, mine):
    run_dir.claim(experiment.to_json(small()))
  summary = mine.done(STAGE)
  verdicts = summary["arithmetic"]["verdicts"]
  right = sum(one is True for row in verdicts.values() for one in row)
  for name in verdicts:
    verdicts[name] = [True] * 4
  mine.mark_done(STAGE, summary)
  command = [sys.executable, "-m", "trd_jax.evaluate", "--model=base"]
  command += [f"--workdir={mine.root}", f"--compare={other.root}"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "difference (paired)" in done.stdout
  found = read_json(mine.comparison(STAGE))
  assert str(other.root) in found["other"]
  difference = found["benchmarks"]["arithmetic"]["paired_difference"]
  assert difference["avg_at_k"] == pytest.approx(1 - right / 32)
  command[-1] = f"--compare={tmp_path / 'none'}"
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stdout) == (2, "")
  assert "there is no finished evaluation" in done.stderr


# What is settled after sampling


def chosen(**changes):
  config = experiment.default_config()
  config.update_from_flattened_dict(changes)
  return experiment.from_config(config)


def questions_of(name, problems):
  return {name: questions.Questions(problems, {"rows": 1, "files": []})}


def answer(problem, text, number=0, **changes):
  changes = {"benchmark": "b", "text": text, "reason": "ungradable", **changes}
  return sample(problem.problem_id, number, None, **changes)


def test_formulas_wait_for_their_grader_and_are_judged_once():
  problem = dataclasses.replace(
    rows.to_problem({"problem": "a_n?", "answer": "2n+2"}, "amobench"),
    meta=json.dumps({"values": [{"n": 1}, {"n": 4}]}),
  )
  asked = questions_of("amobench", [problem])
  there = [
    answer(problem, "\\boxed{2(n+1)}", benchmark="amobench"),
    answer(problem, "\\boxed{4n}", 1, benchmark="amobench"),
  ]
  judged = benchmark_verdicts.settle(there, asked, chosen())
  assert [row.correct for row in judged] == [True, False]
  assert {row.grader_version for row in judged} == {formulas.VERSION}
  assert benchmark_verdicts.settle(judged, asked, chosen()) == judged
  lied = [dataclasses.replace(row, correct=True) for row in judged]
  assert benchmark_verdicts.settle(lied, asked, chosen()) == lied
  again = benchmark_verdicts.settle(lied, asked, chosen(), again=True)
  assert again == judged


def test_what_is_graded_as_it_is_sampled_is_left_alone():
  problem = rows.to_problem({"problem": "1+1?", "answer": "2"}, "aime24")
  row = answer(problem, "\\boxed{2}", benchmark="aime24")
  row = dataclasses.replace(row, grader_version="math-0", correct=False)
  asked = questions_of("aime24", [problem])
  assert benchmark_verdicts.settle([row], asked, chosen()) == [row]
  (again,) = benchmark_verdicts.settle([row], asked, chosen(), again=True)
  assert (again.correct, again.grader_version) == (True, math_grading.VERSION)
  # Of a question that isn't asked any more nothing is known.
  other = dataclasses.replace(row, problem_id="another")
  assert benchmark_verdicts.settle([other], asked, chosen(), again=True) == [
    other
  ]


@sandboxes.needed
def test_livecodebench_is_run_by_us_where_its_runner_is_not(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)  # where no environment of its own is
  write(tmp_path / "livecodebench.jsonl", [lcb_row(7)])
  config = {
    "evaluate.root": str(tmp_path),
    "evaluate.unchecked": True,
  }
  asked = {"livecodebench": questions.load(chosen(**config), "livecodebench")}
  (problem,) = asked["livecodebench"].problems
  there = [
    answer(problem, f"```python\n{program}\n```", i, benchmark="livecodebench")
    for i, program in enumerate(
      ["print(int(input()) + 1)", "print(2)", "raise SystemExit(1)"]
    )
  ]
  judged = benchmark_verdicts.settle(there, asked, chosen(**config), again=True)
  assert [(row.correct, row.reason) for row in judged] == [
    (True, "match"),
    (False, "mismatch"),  # the public test passes, the packed one does not
    (False, "error"),
  ]
  assert {row.grader_version for row in judged} == {code_grading.VERSION}


def test_a_grader_that_is_missing_is_told_of_before_sampling(tmp_path):
  config = {
    "evaluate.benchmarks": ("humanevalplus",),
    "python.evalplus": str(tmp_path / "none"),
  }
  with pytest.raises(UserError, match=r"third_party/evalplus/install\.sh"):
    go(evaluate, chosen(**config), RunDir(tmp_path / "run"), model="base")
  for name in LIVECODEBENCH:
    config = {
      "evaluate.benchmarks": (name,),
      "python.lcb_runner": str(tmp_path / "none"),
    }
    with pytest.raises(UserError, match=r"third_party/lcb_runner/install\.sh"):
      go(evaluate, chosen(**config), RunDir(tmp_path / "run"), model="base")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", LIVECODEBENCH)
def test_livecodebench_has_one_grader_however_it_is_called(
  name, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  problem = livecodebench.problem(lcb_row(7), "livecodebench")
  grader = graders.of_problem(name, problem, chosen())
  assert grader == "code"
  # One that is named and missing is an error, not a reason to do without.
  missing = chosen(**{"python.lcb_runner": str(tmp_path / "none")})
  assert graders.of_problem(name, problem, missing) == "lcb_runner"
  row = answer(problem, "```python\nprint(1)\n```", benchmark=name)
  with pytest.raises(UserError, match=r"third_party/lcb_runner/install\.sh"):
    benchmark_verdicts.settle([row], questions_of(name, [problem]), missing)
  environment = tmp_path / ".venv-lcb" / "bin"
  environment.mkdir(parents=True)
  (environment / "python").symlink_to(sys.executable)
  grader = graders.of_problem(name, problem, chosen())
  assert grader == "lcb_runner"
