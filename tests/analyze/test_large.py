"""A run of 40,000 problems is read in little memory."""

import json
import os
import subprocess
import sys

import pytest

from tests.support import large_workdir
from tests.support.places import ROOT
from trd_jax.analyze import analysis, runs
from trd_jax.experiment.run_dir import RunDir

LARGE = {"text", "response_ids", "prompt_ids", "solution", "all"}


def alone(workdir) -> dict:
  """What all analyses and their figures take in a process of their own."""
  ended = subprocess.run(
    [sys.executable, "-m", "tests.support.analyses_alone", str(workdir)],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(ended.stdout.splitlines()[-1])


def test_columns_of_texts_and_ids_are_read_a_shard_at_a_time(
  tmp_path, monkeypatch
):
  large_workdir.workdir(tmp_path / "run", 600)
  whole = RunDir.table
  asked = set()

  def table(self, stage, record, columns=None):
    asked.update(columns or ("all",))
    return whole(self, stage, record, columns)

  monkeypatch.setattr(RunDir, "table", table)
  opened = runs.open_runs([tmp_path / "run"])
  made = [one.make(opened) for one in analysis.registry().values()]
  assert sum(one is not None for one in made) >= 8
  assert not asked & LARGE
  assert alone(tmp_path / "run")["gib"] < 1


@pytest.mark.slow
def test_a_run_of_40_000_problems_takes_less_than_3_gib(tmp_path):
  large_workdir.workdir(tmp_path / "run", 40_000)
  found = alone(tmp_path / "run")
  assert found["figures"] >= 8
  assert found["gib"] < 3
