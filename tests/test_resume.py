"""A rollout that is killed again and again ends as an undisturbed one."""

import os
import random
import signal
import subprocess
import sys
import types

import pytest

from tests.support.killed_stage import ROWS_PER_SHARD, Rollout
from trd_jax import rollout
from trd_jax.experiment import experiment
from trd_jax.experiment.records import Trajectory
from trd_jax.experiment.run_dir import RunDir

pytestmark = pytest.mark.multiprocess

SAMPLES = 96


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """The demo's experiment on few problems, as a file."""
  fields = experiment.default_config()
  fields.data.arithmetic.num_problems = SAMPLES
  fields.rollout.max_prompt_tokens = 448
  fields.rollout.max_response_tokens = 160
  fields.engine.jax.slots = 16
  chosen = experiment.from_config(fields)
  path = tmp_path_factory.mktemp("config") / "config.json"
  path.write_text(experiment.to_json(chosen))
  return path


def test_killed_five_times_a_rollout_ends_with_the_same_rows(config, tmp_path):
  made = Rollout(tmp_path, sys.executable, f"--config={config}")
  # Before the first row, then anywhere up to the last shards.
  last = SAMPLES - 3 * ROWS_PER_SHARD
  moments = [0, *sorted(random.Random(7).sample(range(1, last), 4))]
  made.killed_and_restarted(moments, SAMPLES)
  assert made.run_dir.done("rollout")["samples"] == SAMPLES

  whole = RunDir(tmp_path / "whole")
  chosen = experiment.from_json(config)
  rollout.run(chosen, whole, types.SimpleNamespace())
  rows = whole.read("rollout", Trajectory)
  assert made.run_dir.read("rollout", Trajectory) == rows
  assert [row.key for row in rows] == sorted(made.keys_on_disk())


def test_a_second_process_in_a_workdir_is_refused(config, tmp_path):
  made = Rollout(tmp_path, sys.executable, f"--config={config}")
  with made.start() as first:
    try:
      made.wait_for(first, ROWS_PER_SHARD)
      assert first.poll() is None, made.log.read_text()
      rows = made.keys_on_disk()
      # Stopped, it still holds the stage: the second one can't outlast it.
      os.kill(first.pid, signal.SIGSTOP)
      second = subprocess.run(
        made.command, capture_output=True, text=True, check=False
      )
    finally:
      first.kill()
  assert second.returncode == 2
  assert second.stderr.count("\n") == 1
  assert f"process {first.pid} on " in second.stderr
  assert "is at work on rollout" in second.stderr
  assert set(rows) <= set(made.keys_on_disk())
  assert made.run_dir.config.exists()
