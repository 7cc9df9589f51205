"""Rounds: what each starts from, when they end, and two of them for real."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from tests.support.devices import xla_flags
from tests.support.places import ROOT
from tests.support.small_models import LORA, model
from tests.support.small_models import SMALL as SHAPE
from trd_jax import rollout
from trd_jax.distill import optimizer
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.metric_log import seconds_by_stage
from trd_jax.experiment.records import Trajectory
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Pipeline, Student, Train
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.weights import adapters
from trd_jax.pipeline import data_checks, pipeline, rounds
from trd_jax.pipeline.notebook import open_run

pytestmark = pytest.mark.multiprocess

ONE_PROCESS = "tests.support.one_process"
SMALL = (
  "--config.data.arithmetic.num_problems=8",
  "--config.train.batch_size=4",
  "--config.evaluate.benchmarks=arithmetic",
  "--config.evaluate.num_problems=4",
  "--config.evaluate.k=2",
  "--config.pipeline.rounds=2",
)


def _run(workdir, *flags, processes=False):
  """Runs a pipeline; its rounds and stages are processes where asked for."""
  command = ("trd_jax.pipeline",) if processes else (ONE_PROCESS, "pipeline")
  return subprocess.run(
    [
      *(sys.executable, "-m", *command, "--config=configs/demo.py"),
      *(f"--workdir={workdir}", *flags),
    ],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": xla_flags(1)},
    capture_output=True,
    text=True,
  )


def _row(number, avg, passed, length=1.0):
  return {
    "round": number,
    "weights": f"w{number}",
    "avg_at_k": avg,
    "pass_at_k": passed,
    "base_avg_at_k": 0.5,
    "base_pass_at_k": 0.9,
    "length_share": length,
  }


def test_rounds_end_where_the_student_collapses():
  section = Pipeline(collapse_pass=0.2, collapse_length=0.25)
  assert rounds.collapsed(_row(1, 0.6, 0.71), section) is None
  assert "20.1 points below" in rounds.collapsed(_row(1, 0.6, 0.699), section)
  assert rounds.collapsed(_row(1, 0.6, 0.9, 0.25), section) is None
  assert "down to 24%" in rounds.collapsed(_row(1, 0.6, 0.9, 0.24), section)


def test_the_best_round_is_the_earliest_with_the_highest_mean():
  rows = [_row(1, 0.6, 0.9), _row(2, 0.7, 0.8), _row(3, 0.7, 0.9)]
  assert rounds.best(rows)["round"] == 2
  told = rounds.table(rows, "it fell apart")
  assert "* the best: w2" in told
  assert "stopped after round 3: it fell apart" in told


@pytest.mark.parametrize("weights", ["merged", "adapter"])
def test_the_second_round_starts_from_what_the_first_has_trained(
  weights, tmp_path
):
  root = RunDir(tmp_path / "run")
  flags = (*SMALL, f"--config.engine.weights={weights}")
  process = _run(root.root, *flags)
  assert process.returncode == 0, process.stderr[-3000:]
  second = root.round(2)
  # Fresh drafts of the trained student, on the same problems.
  first_rows = root.read("rollout", Trajectory)
  second_rows = second.read("rollout", Trajectory)
  assert {r.problem_id for r in first_rows} == {
    r.problem_id for r in second_rows
  }
  (model,) = {row.model for row in second_rows}
  folder = root.merged if weights == "merged" else root.adapter
  assert str(folder) in model
  assert {r.model_revision for r in first_rows}.isdisjoint(
    r.model_revision for r in second_rows
  )
  # The refinements are of those drafts.
  drafts = {row.key for row in second_rows}
  assert {r.draft_key for r in second.read("refine", Trajectory)} <= drafts
  # Training went on from the first adapter, or began with a new one.
  name = "adapter_model.safetensors"
  before, after = (load_file(run.adapter / name) for run in (root, second))
  gaps = [np.abs(after[key] - before[key]).max() for key in before]
  sizes = [np.abs(before[key]).max() for key in before if "lora_B" in key]
  if weights == "adapter":
    # Two more updates move a factor by at most a few learning rates.
    assert max(gaps) < 4 * 2e-3
    assert max(sizes) > 0
  found = json.loads(root.rounds.read_text())
  assert [row["round"] for row in found["rounds"]] == [1, 2]
  assert found["stopped"] is None
  assert "* the best" in process.stdout
  # Both rounds are compared with one base, which is evaluated once.
  assert root.done("evaluate/base") == second.done("evaluate/base")
  assert "[1/6] evaluate/base: done before" in process.stdout


def _adapter(run_dir):
  return load_file(run_dir.adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("weights", ["merged", "adapter"])
def test_split_rounds_are_one_training_on_fresh_drafts_of_each_part(
  weights, tmp_path
):
  root = RunDir(tmp_path / "run")
  flags = (
    *SMALL,
    "--config.data.arithmetic.num_problems=16",
    "--config.pipeline.split=True",
    f"--config.engine.weights={weights}",
  )
  process = _run(root.root, *flags)
  assert process.returncode == 0, process.stderr[-3000:]
  second = root.round(2)
  first_rows = root.read("rollout", Trajectory)
  second_rows = second.read("rollout", Trajectory)
  ids = [{row.problem_id for row in rows} for rows in (first_rows, second_rows)]
  assert [len(part) for part in ids] == [8, 8]
  assert ids[0] | ids[1] == root.keys("problems")
  recorded = json.loads(root.parts.read_text())["parts"]
  assert [set(part) for part in recorded] == ids
  # The student of the first round drafts, and the base itself rewrites.
  (model,) = {row.model for row in second_rows}
  assert str(root.merged if weights == "merged" else root.adapter) in model
  base = {row.model_revision for row in first_rows}
  for run in (root, second):
    refined = run.read("refine", Trajectory)
    assert {row.model_revision for row in refined} == base
  # Updates are numbered over both rounds, and so is the schedule.
  metrics = [row for one in open_run(root.root).rounds for row in one.metrics()]
  assert [row["step"] for row in metrics] == [0, 1, 2, 3]
  assert [row["round"] for row in metrics] == [1, 1, 2, 2]
  rates = optimizer.schedule(Train(learning_rate=2e-3), 4)
  for row in metrics:
    assert row["learning_rate"] == pytest.approx(float(rates(row["step"])))
  # The adapter of the first round went on: it moved by two updates.
  before, after = _adapter(root), _adapter(second)
  gaps = [np.abs(after[key] - before[key]).max() for key in before]
  assert 0 < max(gaps) < 4 * 2e-3

  # Only the last student is evaluated, and its figures are the run's.
  assert root.done("evaluate/trained") is None
  summary = json.loads(root.summary.read_text())
  own = json.loads(second.summary.read_text())
  assert summary["benchmarks"] == own["benchmarks"] != {}
  assert summary["rounds"] == 2
  for stage in ("rollout", "train"):
    seconds = [seconds_by_stage(run.timings)[stage] for run in (root, second)]
    assert summary["seconds"][stage] == pytest.approx(sum(seconds))
  found = json.loads(root.rounds.read_text())
  assert found["best"] == 2
  assert ["avg_at_k" in row for row in found["rounds"]] == [False, True]
  assert re.search(r"^1 +1-2 +8 .* - +-$", process.stdout, re.MULTILINE)

  # As if it had been killed between the rounds, and in the second.
  if weights == "merged":
    shutil.rmtree(second.root)
  else:
    shutil.rmtree(second.stage("merge"))
    (second.stage("train") / "done.json").unlink()
  for path in (root.summary, root.rounds):
    path.unlink()
  # What is left is done by processes, as a user's: they end with the same bits.
  process = _run(root.root, *flags, processes=weights == "adapter")
  assert process.returncode == 0, process.stderr[-3000:]
  again = _adapter(second)
  for key, value in after.items():
    np.testing.assert_array_equal(again[key], value, err_msg=key)
  assert json.loads(root.rounds.read_text()) == found
  process = _run(root.root, *flags)
  assert process.returncode == 0, process.stderr[-3000:]
  assert "[round 2/2] done before" in process.stdout

  for change in ("pipeline.rounds=4", "pipeline.split=False"):
    process = _run(root.root, *flags, f"--config.{change}")
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    name, _, value = change.partition("=")
    assert f"{name} is " in process.stderr
    assert f"and {value.lower()} here; rollout, refine, train" in process.stderr


def test_more_split_rounds_than_updates_are_seen_before_anything(tmp_path):
  section = Pipeline(rounds=5, split=True)
  e = dataclasses.replace(Experiment(), pipeline=section)  # 512 problems
  run_dir = RunDir(tmp_path / "run")
  with pytest.raises(UserError, match="512 problems make 4 updates"):
    data_checks.split(e, run_dir)
  assert not run_dir.root.exists()
  # Once they are read, what is left of them counts.
  run_dir.mark_done("problems", {"problems": 513})
  assert data_checks.split(e, run_dir) == []


class _Pair(dict):
  """Figures of one benchmark: base at 0.9, trained at what is given."""

  def __init__(self, passed):
    row = {"avg_at_k": 0.5, "pass_at_k": 0.9, "median_tokens": 10}
    super().__init__(base=row, trained=row | {"pass_at_k": passed})


@pytest.mark.parametrize(
  ("every", "passed", "started"),
  [
    (None, [0.0, 0.0, 0.0, 0.8], [2, 3, 4]),
    (2, [0.0, 0.8, 0.0, 0.8], [2, 3, 4]),
    (2, [0.8, 0.0, 0.8, 0.8], [2]),
    (1, [0.0, 0.8, 0.8, 0.8], []),
  ],
)
def test_split_rounds_end_where_an_evaluated_student_has_collapsed(
  every, passed, started, tmp_path, monkeypatch
):
  section = Pipeline(rounds=4, split=True, evaluate_every=every)
  e = dataclasses.replace(Experiment(), pipeline=section)
  run_dir = RunDir(tmp_path / "run")
  ran = []

  def summarise(own, here):
    number = own.pipeline.round
    assert here.root == run_dir.round(number).root
    done = {"first_update": number - 1, "updates": 1, "trajectories": 8}
    pairs = {"b": _Pair(passed[number - 1])} if own.pipeline.evaluates else {}
    return {
      "benchmarks": pairs,
      "stages": {"train": done | {"last_loss": 0.1}},
    }

  def start(command, patient):
    assert patient  # a round trains
    ran.append(int(command[-2].rpartition("=")[2]))
    return 0

  monkeypatch.setattr(pipeline, "summarise", summarise)
  monkeypatch.setattr(pipeline, "table", lambda summary: "")
  monkeypatch.setattr(pipeline.supervise, "run", start)
  flags = types.SimpleNamespace(config_argv=["--config=c", "--workdir=w"])
  pipeline._go_on_split(e, run_dir, flags)
  assert ran == started
  found = json.loads(run_dir.rounds.read_text())
  assert (found["stopped"] is None) == (len(started) == 3)
  assert [row["round"] for row in found["rounds"]] == [1, *started]
  # What is evaluated is what the stages are told to.
  told = [
    number
    for number in range(1, 5)
    if "evaluate/trained"
    in [name for name, _, _ in pipeline.commands(rounds.at(e, number))]
  ]
  assert told == {None: [4], 2: [2, 4], 1: [1, 2, 3, 4]}[every]


def test_an_adapter_of_another_size_is_refused(tmp_path):
  made = model(SHAPE, lora=LORA)
  tree = nnx.to_pure_dict(nnx.state(made, nnx.LoRAParam))
  adapters.save_peft(tree, LORA, tmp_path / "adapter", base="x")
  fresh = nnx.to_pure_dict(
    nnx.state(model(SHAPE, lora=LORA, seed=1), nnx.LoRAParam)
  )
  begun = adapters.begin_with(tmp_path / "adapter", SHAPE, LORA, fresh)
  jax.tree.map(np.testing.assert_array_equal, begun, tree)
  other = LoraConfig(rank=LORA.rank, alpha=2 * LORA.alpha)
  with pytest.raises(UserError, match=r"set lora.alpha=8 to train"):
    adapters.begin_with(tmp_path / "adapter", SHAPE, other, fresh)
  changed = dataclasses.replace(Student(), adapter="nowhere")
  e = dataclasses.replace(Experiment(), student=changed)
  with pytest.raises(UserError, match="adapter=nowhere: there is no such fold"):
    rollout.run(e, RunDir(tmp_path / "run"), types.SimpleNamespace())
