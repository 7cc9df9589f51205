"""The whole pipeline as a user starts it, on few problems."""

import json
import os
import shlex
import subprocess
import sys
import types

import numpy as np
import pytest

from tests.support.devices import xla_flags
from tests.support.places import ROOT
from trd_jax.experiment import metric_log
from trd_jax.experiment.experiment import from_config
from trd_jax.experiment.records import GradedSample, Trajectory
from trd_jax.experiment.run_dir import RunDir
from trd_jax.pipeline import pipeline

pytestmark = pytest.mark.multiprocess

ONE_PROCESS = "tests.support.one_process"
SMALL = (
  "--config.data.arithmetic.num_problems=32",
  "--config.train.batch_size=8",
  "--config.evaluate.benchmarks=arithmetic",
  "--config.evaluate.num_problems=8",
  "--config.evaluate.k=4",
)


def run(workdir, *flags, config="configs/demo.py", processes=False):
  """Runs a pipeline; its stages are processes only where that is tested."""
  here = ("trd_jax.pipeline",) if processes else (ONE_PROCESS, "pipeline")
  command = [sys.executable, "-m", *here, f"--config={config}"]
  command += [f"--workdir={workdir}", *flags]
  env = os.environ | {"XLA_FLAGS": xla_flags(1)}
  return subprocess.run(
    command, cwd=ROOT, env=env, capture_output=True, text=True
  )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("pipeline") / "run"
  process = run(workdir, *SMALL, processes=True)
  assert process.returncode == 0, process.stderr[-3000:]
  return RunDir(workdir), process.stdout


def test_the_summary_says_what_the_rows_say(finished):
  run_dir, _ = finished
  summary = json.loads(run_dir.summary.read_text())
  pair = summary["benchmarks"]["arithmetic"]
  correct = {}
  for side in ("base", "trained"):
    rows = run_dir.read(f"evaluate/{side}", GradedSample)
    assert len(rows) == 8 * 4
    by_problem = {}
    for row in rows:
      by_problem.setdefault(row.problem_id, []).append(row.correct is True)
    verdicts = np.array([by_problem[key] for key in sorted(by_problem)])
    correct[side] = verdicts
    figures = pair[side]
    assert figures["avg_at_k"] == pytest.approx(verdicts.mean())
    assert figures["pass_at_k"] == pytest.approx(verdicts.any(1).mean())
    assert (figures["k"], figures["n"]) == (4, 8)
    low, high = figures["avg_at_k_interval"]
    assert low <= figures["avg_at_k"] <= high
  difference = pair["paired_difference"]
  assert difference["avg_at_k"] == pytest.approx(
    correct["trained"].mean() - correct["base"].mean()
  )
  assert (difference["k"], difference["n"]) == (4, 8)
  assert set(summary["seconds"]) == {
    "evaluate/base",
    "rollout",
    "refine",
    "train",
    "merge",
    "evaluate/trained",
  }
  assert min(summary["seconds"].values()) > 0


def test_base_and_trained_draw_with_the_same_seeds(finished):
  run_dir, _ = finished
  seeds = [
    {
      (row.benchmark, row.problem_id, row.sample): row.seed
      for row in run_dir.read(f"evaluate/{side}", GradedSample)
    }
    for side in ("base", "trained")
  ]
  assert seeds[0] == seeds[1]
  assert len(set(seeds[0].values())) == 8 * 4


def test_every_row_of_the_table_stands_in_the_output(finished):
  run_dir, output = finished
  table = pipeline.table(json.loads(run_dir.summary.read_text()))
  assert table in output
  assert "Avg@4" in table
  assert "Pass@4" in table


def test_at_its_end_it_names_the_commands_that_show_what_happened(finished):
  run_dir, output = finished
  last = output[output.index("look at it:") :].splitlines()
  for line, module in zip(last[1:], ("analyze", "show"), strict=True):
    command = line.split("    ")[0].split()
    assert command == [
      *("python", "-m", f"trd_jax.{module}", f"--workdir={run_dir.root}")
    ]
  # To be copied: a path with a space is one argument.
  said = pipeline.look_at_it(RunDir(run_dir.root / "a b"))
  assert shlex.split(said.splitlines()[-1])[3].endswith("/a b")


def test_a_second_run_starts_no_stage(finished):
  run_dir, _ = finished
  before = {p: p.stat().st_mtime_ns for p in run_dir.root.rglob("*.parquet")}
  again = run(run_dir.root, *SMALL, processes=True)
  assert again.returncode == 0
  assert again.stdout.count("done before") == 6
  assert before == {
    p: p.stat().st_mtime_ns for p in run_dir.root.rglob("*.parquet")
  }


def test_another_config_is_refused_in_one_line(finished):
  run_dir, _ = finished
  config = run_dir.config.read_bytes()
  other = "--config.method=forward_kl"
  refused = run(run_dir.root, *SMALL, other, processes=True)
  assert refused.returncode == 2
  assert refused.stderr.count("\n") == 1
  assert 'method is "trd" there and "forward_kl" here' in refused.stderr
  assert run_dir.config.read_bytes() == config


def test_a_failing_stage_ends_the_pipeline_with_its_exit_code(tmp_path):
  workdir = tmp_path / "run"
  short = "--config.rollout.max_prompt_tokens=5"
  failed = run(workdir, *SMALL, short, processes=True)
  assert failed.returncode == 2
  assert "raise rollout.max_prompt_tokens" in failed.stderr
  assert RunDir(workdir).done("evaluate/base") is not None
  # What the failure took is not told as the stage's time.
  seconds = metric_log.seconds_by_stage(RunDir(workdir).timings)
  assert list(seconds) == ["evaluate/base", "rollout, stopped"]
  assert seconds["rollout, stopped"] > 0


def test_an_interrupted_training_finishes_its_update_in_its_own_time(
  monkeypatch,
):
  """Other stages have half a minute, as an engine may hang."""
  given = {}

  def noted(command, patient=False):
    given[command[2]] = patient
    return 0

  monkeypatch.setattr(pipeline.supervise, "run", noted)
  flags = types.SimpleNamespace(config_argv=[])
  for module in ("rollout", "train", "merge", "evaluate"):
    pipeline._start(module, [], from_config({}), flags)
  assert [name for name, patient in given.items() if patient] == [
    "trd_jax.train"
  ]


def test_a_first_stage_that_fails_leaves_nothing(tmp_path):
  workdir = tmp_path / "run"
  short = "--config.evaluate.max_prompt_tokens=5"
  failed = run(workdir, *SMALL, short, processes=True)
  assert failed.returncode == 2
  # Mended, the same place can be used: nothing had been made there.
  assert {p.name for p in workdir.rglob("*") if p.is_file()} == {
    "preflight.json"
  }


def test_opd_with_reverse_kl_trains_on_raw_rollouts(tmp_path):
  run_dir = RunDir(tmp_path / "run")
  process = run(
    run_dir.root,
    *SMALL,
    "--config.evaluate.k=1",
    "--config.method=reverse_kl",
    config="configs/demo.py:regime=opd",
  )
  assert process.returncode == 0, process.stderr[-3000:]
  assert run_dir.done("refine") is None
  assert not run_dir.read("refine", Trajectory)
  assert run_dir.done("train")["updates"] == 4
  summary = json.loads(run_dir.summary.read_text())
  assert summary["teacher"] == "lab:teacher"


def test_sixteen_real_problems_go_through_every_stage(tmp_path):
  data = ROOT / ".." / "shared" / "data"
  if not data.is_dir():
    pytest.skip("no real data in ../shared/data")
  run_dir = RunDir(tmp_path / "run")
  tokenizer = data / "qwen_tokenizer"
  process = run(
    run_dir.root,
    f"--config.data.root={data / 'deepscaler'}",
    f"--config.evaluate.root={data / 'math_eval'}",
    # A few tokens are enough: each is one of 151,936.
    *(
      f"--config.{stage}.max_response_tokens=16"
      for stage in ("rollout", "refine", "evaluate")
    ),
    # AMO-Bench's statements are not among the local files.
    "--config.evaluate.benchmarks=aime24,aime25,hmmt25,beyondaime",
    config=f"configs/opsd.py:model=nano,tokenizer={tokenizer}",
  )
  assert process.returncode == 0, process.stderr[-3000:]
  rows = run_dir.read("refine", Trajectory)
  assert len(rows) == 16
  # A hybrid's modes: thoughts in rollouts, none while refining.
  assert {row.thinking for row in rows} == {False}
  drafts = run_dir.read("rollout", Trajectory)
  assert {row.thinking for row in drafts} == {True}
  # The real template's control tokens, around the real vocabulary.
  assert all(151_644 in row.prompt_ids for row in rows)
  assert max(max(row.response_ids) for row in rows) < 151_669
  assert "Avg@2" in process.stdout
  assert "randomly initialised: an accuracy of 0" in process.stdout
  summary = json.loads(run_dir.summary.read_text())
  assert set(summary["benchmarks"]) == {
    "aime24",
    "aime25",
    "hmmt25",
    "beyondaime",
  }


def test_another_run_takes_over_what_its_keys_leave_as_it_is(
  finished, tmp_path
):
  """As a user asks for it: another rate, on the rollouts that are there."""
  first, second = finished[0].root, tmp_path / "second"
  asked = *SMALL, "--config.train.learning_rate=1e-3", f"--from={first}"
  dry = run(second, *asked, "--dry_run")
  assert f"refine: would be taken over from {first}" in dry.stdout
  assert not second.exists()
  process = run(second, *asked)
  assert process.returncode == 0, process.stderr[-3000:]
  said = process.stdout
  for stage in ("evaluate/base", "rollout", "refine"):
    assert f"{stage}: taken over from {first}" in said
  assert "train: not taken over" in said
  assert "train.learning_rate is " in said
  summaries = [
    json.loads((one / "summary.json").read_text()) for one in (first, second)
  ]
  assert summaries[0]["stages"]["refine"] == summaries[1]["stages"]["refine"]
  assert summaries[0]["stages"]["train"] != summaries[1]["stages"]["train"]
