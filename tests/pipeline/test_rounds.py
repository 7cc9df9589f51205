"""Rounds: what each starts from, when they end, and two of them for real."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from tests.support.places import ROOT
from tests.support.small_models import LORA, model
from tests.support.small_models import SMALL as SHAPE
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import Trajectory
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Pipeline
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.weights import adapters
from trd_jax.pipeline import rounds

pytestmark = pytest.mark.multiprocess

SMALL = (
  "--config.data.arithmetic.num_problems=16",
  "--config.train.batch_size=8",
  "--config.evaluate.benchmarks=arithmetic",
  "--config.evaluate.num_problems=4",
  "--config.evaluate.k=2",
  "--config.evaluate.bootstrap=200",
  "--config.pipeline.rounds=2",
)


def _run(workdir, *flags, module="pipeline"):
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  return subprocess.run(
    [
      *(sys.executable, "-m", f"trd_jax.{module}"),
      *("--config=configs/demo.py", f"--workdir={workdir}", *flags),
    ],
    cwd=ROOT,
    env=env,
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
  process = _run(
    tmp_path / "run", "--config.student.adapter=nowhere", module="rollout"
  )
  assert process.returncode == 2
  assert "student.adapter=nowhere: there is no such folder" in process.stderr
