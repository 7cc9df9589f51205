"""Places for metrics besides their file, each where it is installed."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest

from tests.support.places import ROOT
from trd_jax.experiment import metric_sinks, stage_figures
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.metric_log import MetricWriter, read_metrics
from trd_jax.experiment.metric_sinks import SINKS, open_sinks
from trd_jax.experiment.schema import Metrics


def asks(name) -> Metrics:
  wanted: dict[str, Any] = {name: True}
  return Metrics(**wanted)


def needs(name):
  """Skips where a sink's package is not installed."""
  package = SINKS[name].package
  if importlib.util.find_spec(package) is None:
    pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("name", SINKS)
def test_a_writer_that_is_not_installed_is_reported(
  name, tmp_path, monkeypatch
):
  # As Python has it of a package that isn't there.
  monkeypatch.setitem(sys.modules, SINKS[name].package, None)
  path = tmp_path / "train" / "metrics.jsonl"
  told = rf"metrics.{name} needs \w+: pip install 'trd-jax\[{name}\]', or set"
  with pytest.raises(UserError, match=told):
    open_sinks(path, asks(name))
  assert not path.parent.exists()


def test_every_key_that_turns_one_on_is_a_sink():
  keys = {k for k, v in vars(Metrics()).items() if isinstance(v, bool)}
  assert keys == {*SINKS}
  assert metric_sinks.requested(Metrics()) == {}
  setup = (ROOT / "setup.py").read_text()
  for name, kind in SINKS.items():
    assert f'"{name}": ["{kind.package}"]' in setup


class _Seen:
  """A sink that keeps what it is given."""

  def __init__(self):
    self.rows = []

  def begin(self, start_step):
    self.rows.append(("begin", start_step))

  def write(self, step, metrics):
    self.rows.append((step, dict(metrics)))

  def close(self):
    self.rows.append("close")


def test_rows_come_grouped_and_without_what_is_no_number(tmp_path):
  path, seen = tmp_path / "metrics.jsonl", _Seen()
  with MetricWriter(path, 3, [seen]) as writer:
    writer.write_figures(3, {"rollout/accuracy": 0.5})
    writer.write(3, {"loss": np.float32(0.5), "nan": np.nan, "said": "so"})
  assert seen.rows == [
    ("begin", 3),
    (3, {"rollout/accuracy": 0.5}),
    (3, {"train/loss": 0.5}),
    "close",
  ]
  # The file itself has its own names, and no figures of stages.
  assert read_metrics(path) == [
    {"step": 3, "loss": 0.5, "nan": None, "said": "so"}
  ]


def test_figures_of_stages_are_shares_of_what_was_graded():
  rows = {
    "samples": 10,
    "correct": 3,
    "not_graded": 4,
    "no_gold": 0,
    "truncated": 1,
    "leaks": 2,
    "median_tokens": 45.0,
    "made_by": {"seed": 0},
  }
  assert stage_figures.of_stage("refine", rows) == {
    "refine/accuracy": 0.5,
    "refine/truncated_share": 0.1,
    "refine/leak_share": 0.2,
    "refine/median_tokens": 45.0,
  }
  ungraded = rows | {"not_graded": 10}
  assert "rollout/accuracy" not in stage_figures.of_stage("rollout", ungraded)
  assert stage_figures.of_stage("rollout", {"samples": 0, "correct": 0}) == {}
  evaluation = {
    "aime": {"avg_at_k": 0.25, "pass_at_k": 1.0, "model": "m", "n": 30},
    "made_by": {"evaluate.k": 16},
    "weights": {"m": "1"},
    "digest": "0",
  }
  assert stage_figures.of_stage("evaluate/trained", evaluation) == {
    "evaluate/aime/avg_at_k": 0.25,
    "evaluate/aime/pass_at_k": 1.0,
  }


def test_a_tracker_that_fails_afterwards_costs_a_note(
  tmp_path, capsys, monkeypatch
):
  class Broken(_Seen):
    def write(self, step, metrics):
      raise RuntimeError("the server is gone\nand more")

  kind = SINKS["wandb"]._replace(package="json", open=lambda *_: Broken())
  monkeypatch.setitem(SINKS, "wandb", kind)
  path = tmp_path / "train" / "metrics.jsonl"
  figures = {"evaluate/a/avg_at_k": 0.5}
  metric_sinks.write_figures(path, asks("wandb"), {}, 5, figures)
  out = capsys.readouterr().out
  assert out == (
    "note: metrics.wandb: the figures aren't there (the server is gone)\n"
  )
  metric_sinks.write_figures(path, Metrics(), {}, 5, figures)
  assert capsys.readouterr().out == ""


def log(path, name, first, steps, config=None):
  """Logs as a training does, from a step on, and then the evaluation."""
  sinks = open_sinks(path, asks(name), config or {"seed": 1, "names": ("a",)})
  with MetricWriter(path, first, sinks) as writer:
    if not first:
      writer.write_figures(0, {"rollout/accuracy": 0.5})
    for step in steps:
      writer.write(step, {"loss": 1 / (step + 1), "note": "text", "none": None})


def test_tensorboard_gets_the_numbers(tmp_path):
  needs("tensorboard")
  path = tmp_path / "train" / "metrics.jsonl"
  log(path, "tensorboard", 0, [0, 3])
  (events,) = (tmp_path / "train" / "tensorboard").iterdir()
  content = events.read_bytes()
  assert b"train/loss" in content
  assert b"rollout/accuracy" in content
  assert np.float32(0.25).tobytes() in content


# Both open files or threads of their own: each in a process of its own.
_LOG = """
import sys
from pathlib import Path
from tests.experiment.test_metric_sinks import log
log(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), map(int, sys.argv[4:]))
"""


def in_a_process(path, name, first, *steps, **variables):
  ended = subprocess.run(
    [sys.executable, "-c", _LOG, path, name, str(first), *map(str, steps)],
    cwd=path.parents[2],
    env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 0, ended.stderr


def test_trackio_finds_a_run_again(tmp_path):
  needs("trackio")
  path = tmp_path / "run" / "train" / "metrics.jsonl"
  store = {"TRACKIO_DIR": str(tmp_path / "store")}
  in_a_process(path, "trackio", 0, 0, 1, **store)
  in_a_process(path, "trackio", 2, 2, **store)
  (database,) = (tmp_path / "store").glob("*.db")
  read = (
    "import json; from trackio.sqlite_storage import SQLiteStorage as S;"
    "runs = S.get_runs('trd-jax'); rows = S.get_logs('trd-jax', runs[0]);"
    "print(json.dumps([runs, rows, S.get_run_config('trd-jax', runs[0])]))"
  )
  ended = subprocess.run(
    [sys.executable, "-c", read],
    env=os.environ | store,
    capture_output=True,
    text=True,
    check=True,
  )
  runs, rows, config = json.loads(ended.stdout.splitlines()[-1])
  assert database.is_file()
  assert len(runs) == 1
  assert runs[0].startswith("run-")
  assert config["seed"] == 1
  losses = {
    row["step"]: row["train/loss"] for row in rows if "train/loss" in row
  }
  assert losses == {0: 1.0, 1: 0.5, 2: pytest.approx(1 / 3)}
  assert [r["rollout/accuracy"] for r in rows if "rollout/accuracy" in r] == (
    [0.5]
  )


def test_mlflow_finds_a_run_again_and_stays_in_the_workdir(tmp_path):
  needs("mlflow")
  path = tmp_path / "run" / "train" / "metrics.jsonl"
  in_a_process(path, "mlflow", 0, 0, 1)
  in_a_process(path, "mlflow", 2, 2)
  assert {one.name for one in tmp_path.iterdir()} == {"run"}
  read = """
import json, sys, mlflow
client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{sys.argv[1]}")
experiment = client.get_experiment_by_name("trd-jax")
(run,) = client.search_runs([experiment.experiment_id])
history = client.get_metric_history(run.info.run_id, "train/loss")
points = [(one.step, one.value) for one in history]
print(json.dumps([dict(run.info), run.data.to_dictionary(), points]))
"""
  ended = subprocess.run(
    [sys.executable, "-c", read, path.parent / "mlflow" / "mlflow.db"],
    capture_output=True,
    text=True,
    check=True,
  )
  info, data, points = json.loads(ended.stdout.splitlines()[-1])
  assert (info["run_name"], info["status"]) == ("run", "FINISHED")
  assert data["params"] == {"seed": "1", "names": "('a',)"}
  assert points == [[0, 1.0], [1, 0.5], [2, pytest.approx(1 / 3)]]
  assert {*data["metrics"]} == {"train/loss", "rollout/accuracy"}
  assert data["metrics"]["rollout/accuracy"] == 0.5


def test_weights_and_biases_writes_offline(tmp_path):
  needs("wandb")
  path = tmp_path / "run" / "train" / "metrics.jsonl"
  in_a_process(path, "wandb", 0, 0, 1, WANDB_MODE="offline")
  (found,) = (path.parent / "wandb").glob("offline-run-*/run-*.wandb")
  content = found.read_bytes()
  assert b"train/loss" in content
  assert b"rollout/accuracy" in content


class _Run:
  """A run of a `wandb` that isn't there."""

  def __init__(self):
    self.rows, self.finished = [], False

  def log(self, row, step):
    self.rows.append((step, row))

  def finish(self):
    self.finished = True


def _wandb(monkeypatch, init):
  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))


def test_weights_and_biases_gets_rows_under_an_id_that_stays(
  tmp_path, monkeypatch
):
  made = []

  def init(**asked):
    made.append((asked, _Run()))
    return made[-1][1]

  _wandb(monkeypatch, init)
  path = tmp_path / "run" / "train" / "metrics.jsonl"
  for step in (3, 4):
    metrics = Metrics(wandb=True, wandb_project="mine")
    sinks = open_sinks(path, metrics, {"seed": 7})
    with MetricWriter(path, step, sinks) as writer:
      writer.write(step, {"loss": 0.5, "none": None})
    asked, run = made[-1]
    assert run.rows == [(step, {"train/loss": 0.5})]
    assert run.finished
    assert (asked["project"], asked["name"]) == ("mine", "run")
    assert asked["config"] == {"seed": 7}
  assert made[0][0]["id"] == made[1][0]["id"]


def test_a_run_that_weights_and_biases_refuses_is_reported(
  tmp_path, monkeypatch
):
  def init(**asked):
    raise RuntimeError("api_key not configured (no-tty)\ncall wandb.login")

  _wandb(monkeypatch, init)
  with pytest.raises(UserError, match=r"\(api_key .*no-tty\)\); set WANDB_API"):
    open_sinks(tmp_path / "train" / "metrics.jsonl", asks("wandb"))
