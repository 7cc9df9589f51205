"""What notebooks and scripts use: load_config, run, open_run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pyarrow as pa
import pytest

import trd_jax
from tests.support.places import ROOT
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.records import Trajectory, schema
from trd_jax.pipeline import notebook

SMALL = {
  "data.arithmetic.num_problems": 8,
  "rollout.max_response_tokens": 64,
  "refine.max_response_tokens": 64,
}

needs_a_run = pytest.mark.multiprocess


def small(**overrides) -> Experiment:
  return trd_jax.load_config("demo", **SMALL, **overrides)


@pytest.fixture(scope="module")
def rolled_out(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("surface") / "run"
  return trd_jax.run(small(), workdir, ["rollout"])


def test_the_import_is_light():
  """Neither JAX nor arrow comes with the package's name."""
  code = (
    "import sys, trd_jax; assert 'run' in dir(trd_jax);"
    "heavy = {'jax', 'pyarrow', 'numpy', 'absl'} & set(sys.modules);"
    "assert not heavy, heavy; trd_jax.load_config('demo');"
    "assert 'jax' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_interrupt_that_python_would_lose_among_the_imports_is_one_line():
  code = """
import sys
sys.argv[0] = "-m"
import trd_jax

class Lost:
  def __del__(self):
    raise KeyboardInterrupt

Lost()
print("went on")
"""
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  said = (done.returncode, done.stdout, done.stderr)
  assert said == (130, "", "trd-jax: interrupted\n")


@pytest.mark.parametrize("module", ["evaluate", "train", "pipeline"])
def test_an_interrupt_among_the_imports_is_one_line(module):
  command = [sys.executable, "-m", f"trd_jax.{module}", "--help_config"]
  with subprocess.Popen(
    command,
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    # By then the package is there, and most of what it imports isn't.
    maps = f"/proc/{process.pid}/maps"
    while process.poll() is None:
      with open(maps) as file:
        if "_multiarray_umath" in file.read():
          break
    process.send_signal(signal.SIGINT)
    told = process.stderr.read()
  # On a busy machine it may have ended before.
  assert process.returncode in (-signal.SIGINT, 130, 0)
  assert told.count("\n") <= 1, told
  assert process.returncode == 0 or "interrupted" in told


def test_a_bare_python_is_refused_in_one_line():
  code = "import sys; sys.path.insert(0, '.'); import trd_jax; trd_jax.run"
  told = subprocess.run(
    [sys.executable, "-I", "-S", "-c", code],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert told.returncode == 2
  (line,) = told.stderr.splitlines()
  assert line.startswith("trd-jax: ")
  assert " without absl" in line


def test_another_name_is_no_attribute():
  with pytest.raises(AttributeError, match="no attribute 'runs'"):
    trd_jax.runs  # noqa: B018


@pytest.mark.parametrize(
  "given", ["demo", "configs/demo.py", ROOT / "configs/demo.py"]
)
def test_a_config_is_found_by_path_and_name(given, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert trd_jax.load_config(given).student.path == "lab:student"


def test_a_name_is_found_from_elsewhere_with_its_variant(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert trd_jax.load_config("demo:regime=opd").regime == "opd"


def test_overrides_take_dots_in_two_ways():
  config = trd_jax.load_config(
    "demo", seed=3, train__learning_rate=0.5, **{"lora.rank": 2}
  )
  assert (config.seed, config.lora.rank) == (3, 2)
  assert config.train.learning_rate == 0.5


@pytest.mark.parametrize(
  ("name", "overrides", "message"),
  [
    ("dem", {}, 'no config "dem".*demo'),
    ("nowhere.py", {}, "there is no file nowhere.py"),
    ("demo", {"sed": 1}, 'no key "sed".*seed'),
    ("demo", {"train__learning_rate": -1.0}, "greater than 0"),
    ("demo", {"lora.rank": "two"}, "lora.rank"),
  ],
)
def test_a_wrong_config_is_refused(name, overrides, message):
  with pytest.raises(UserError, match=message):
    trd_jax.load_config(name, **overrides)


def test_a_metric_that_the_first_row_lacks_is_in_the_frame(
  tmp_path, monkeypatch
):
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "train").mkdir()
  rows = [{"step": 0}, {"step": 1, "D_incorrect": 0.5}]
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (tmp_path / "train/metrics.jsonl").write_text(lines)
  monkeypatch.setattr(notebook, "_frame", lambda table: table)
  table = trd_jax.open_run(tmp_path).metrics_frame()
  assert table.to_pydict() == {"step": [0, 1], "D_incorrect": [None, 0.5]}
  # What somebody has edited is refused in a line.
  for wrong, told in (
    ({"step": "1"}, 'line 3: its step is "1", and has to be'),
    ({"step": 2, "D_incorrect": "?"}, "values of D_incorrect make no column ("),
  ):
    edited = f"{lines}{json.dumps(wrong)}\n"
    (tmp_path / "train/metrics.jsonl").write_text(edited)
    with pytest.raises(UserError) as caught:
      trd_jax.open_run(tmp_path).metrics_frame()
    assert told in str(caught.value)


@needs_a_run
def test_a_stage_runs_alone_and_its_rows_are_tables(rolled_out, capfd):
  assert rolled_out.stages == ("problems", "rollout")
  done = rolled_out.done("rollout")
  assert done["samples"] == 8
  assert rolled_out.done("train") is None
  table = rolled_out.table("rollout")
  assert isinstance(table, pa.Table)
  assert table.num_rows == 8
  assert table.column_names == list(schema(Trajectory).names)
  assert sum(table["correct"].to_pylist()) == done["correct"]
  assert rolled_out.table("rollout", ["key", "text"]).num_columns == 2
  problems = rolled_out.table("problems")["problem_id"].to_pylist()
  assert set(table["problem_id"].to_pylist()) == set(problems)
  assert rolled_out.rejected("problems").num_rows == 0
  assert rolled_out.metrics() == []
  assert rolled_out.config == small()
  assert "done: problems, rollout" in repr(rolled_out)


@needs_a_run
def test_what_is_printed_is_printed_here(rolled_out, capsys):
  """A stage that is done says so; a notebook shows what Python prints."""
  again = trd_jax.run(small(), rolled_out.workdir, ["rollout"])
  assert "8 samples" in capsys.readouterr().out
  assert again.table("rollout").equals(rolled_out.table("rollout"))


@needs_a_run
def test_a_command_s_refusal_is_raised_with_its_words(rolled_out):
  with pytest.raises(UserError, match=r"was made by another config: seed"):
    trd_jax.run(small(seed=1), rolled_out.workdir, ["rollout"])


def test_a_pipeline_s_refusal_is_the_stage_s(tmp_path, monkeypatch):
  """Its stage's line says more than the pipeline's own about the stage."""
  said = [
    "working\n",
    "trd-jax rollout: there is no room; make some\n",
    "trd-jax pipeline: rollout ended with exit code 2; mend what it says\n",
  ]
  assert "no room" in notebook._mistake(said)
  said = ["trd-jax pipeline: one\n", "trd-jax pipeline: also: two\n"]
  assert notebook._mistake(said) == "trd-jax pipeline: one; also: two"
  with pytest.raises(subprocess.CalledProcessError) as failed:
    notebook._start(
      [sys.executable, "-c", "print('so far'); raise SystemExit(7)"]
    )
  assert (failed.value.returncode, failed.value.output) == (7, "so far\n")


def test_an_interrupt_is_passed_on_and_waited_for(tmp_path, capsys):
  """What the stage says while it tidies up is shown, however much it is."""
  began = tmp_path / "began"
  child = f"""
import pathlib, time
try:
  pathlib.Path({str(began)!r}).touch()
  time.sleep(60)
except KeyboardInterrupt:
  print("x" * 200_000)
  print("tidied up")
"""

  def interrupt():
    while not began.exists():
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

  threading.Thread(target=interrupt, daemon=True).start()
  with pytest.raises(KeyboardInterrupt):
    notebook._start([sys.executable, "-c", child])
  assert capsys.readouterr().out.endswith("tidied up\n")


def test_unknown_stages_are_refused_before_any_runs(tmp_path):
  with pytest.raises(UserError, match=r'no stage "rolout".*rollout'):
    trd_jax.run(small(), tmp_path / "run", ["rollout", "rolout"])
  assert not (tmp_path / "run").exists()
  with pytest.raises(UserError, match='no stage "refine"'):
    trd_jax.run(small(method="jsd"), tmp_path / "run", ["refine"])


def test_a_folder_that_is_no_run_s_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"holds no config\.json"):
    trd_jax.open_run(tmp_path)


@needs_a_run
def test_a_stage_without_rows_is_refused(rolled_out):
  with pytest.raises(UserError, match='"train" is no stage with rows'):
    rolled_out.table("train")
  # No empty table, which would pass for a result.
  with pytest.raises(UserError, match="has no rows here"):
    rolled_out.table("evaluate/trained")
  with pytest.raises(UserError, match=r"summary.json is not there"):
    _ = rolled_out.summary


@needs_a_run
def test_metrics_and_summary_are_what_the_files_hold(rolled_out, tmp_path):
  (tmp_path / "train").mkdir()
  text = (rolled_out.workdir / "config.json").read_text()
  (tmp_path / "config.json").write_text(text)
  rows = [{"step": 0, "loss": 0.5}, {"step": 1, "loss": None}]
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (tmp_path / "train" / "metrics.jsonl").write_text(lines)
  (tmp_path / "summary.json").write_text('{"method": "trd"}')
  run = trd_jax.open_run(tmp_path)
  assert run.metrics() == rows
  assert run.summary == {"method": "trd"}


@needs_a_run
def test_frames_need_pandas(rolled_out):
  try:
    import pandas  # pyright: ignore[reportMissingImports]
  except ModuleNotFoundError:
    with pytest.raises(UserError, match="pip install pandas"):
      rolled_out.frame("rollout")
    return
  frame = rolled_out.frame("rollout")
  assert isinstance(frame, pandas.DataFrame)
  assert len(frame) == 8
