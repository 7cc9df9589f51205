"""How far a run is, from its workdir alone: whatever state that is in."""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.places import ROOT
from trd_jax.experiment import cli, experiment
from trd_jax.experiment.run_dir import RunDir
from trd_jax.pipeline import pipeline, status

_ARGV = [sys.executable, "-m", "trd_jax.pipeline"]


@pytest.fixture
def run_dir(tmp_path):
  """A run whose config is there, and nothing else."""
  chosen = experiment.from_config({})
  return RunDir(tmp_path / "run", experiment.to_json(chosen))


def _status(root, *argv):
  """The status as its JSON form has it."""
  argv = [f"--workdir={root}", "--status=json", *argv]
  out = subprocess.run(
    [*_ARGV, *argv], capture_output=True, text=True, cwd=ROOT
  )
  assert out.returncode == 0, out.stderr
  assert out.stderr == ""
  return json.loads(out.stdout)


def _here(root, capsys, form="json"):
  """The same, in this process."""
  cli.main(
    "pipeline",
    pipeline.run,
    "runs",
    pipeline.FLAGS,
    argv=[f"--workdir={root}", f"--status={form}"],
  )
  out = capsys.readouterr().out
  return json.loads(out) if form == "json" else out


def _stage(found, name):
  (one,) = (stage for stage in found["stages"] if stage["name"] == name)
  return one


def _shard(run_dir, stage, rows, number=0):
  folder = run_dir.stage(stage)
  folder.mkdir(parents=True, exist_ok=True)
  table = pa.table({"key": [f"{number}-{i}" for i in range(rows)]})
  pq.write_table(table, folder / f"shard-{number}.parquet")


def _log(run_dir, stage, *lines, end=None, process=7):
  path = run_dir.log(stage)
  path.parent.mkdir(exist_ok=True)
  head = f"== trd-jax 0.1.0, 2026-01-01 10:00:00+00:00, process {process} on vm"
  text = "\n".join([head, f"== python -m trd_jax.{stage}", *lines, ""])
  if end is not None:
    text += f"== ended with exit code {end} after 3.0 s, 2026-01-01 10:00:03\n"
  path.write_text(text)


def _files(root):
  return {
    str(path.relative_to(root)): (path.stat().st_mtime_ns, path.is_dir())
    for path in [root, *root.rglob("*")]
  }


_HOLD = """
import contextlib, sys
from trd_jax.experiment.run_dir import RunDir
with contextlib.ExitStack() as stack:
  for name in sys.argv[2:]:
    stack.enter_context(RunDir(sys.argv[1]).lock(name))
  print("held", flush=True)
  sys.stdin.read()
"""


@contextmanager
def _held(run_dir, *names):
  """Another process holds locks; yields its id."""
  process = subprocess.Popen(
    [sys.executable, "-c", _HOLD, str(run_dir.root), *names],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  assert process.stdin
  assert process.stdout
  try:
    assert process.stdout.readline() == b"held\n"
    yield process.pid
  finally:
    process.stdin.close()
    process.wait()
    process.stdout.close()


def test_it_needs_no_config_and_imports_no_jax_and_makes_nothing(run_dir):
  program = (
    "import runpy, sys\n"
    "sys.argv = ['pipeline', *sys.argv[1:]]\n"
    "runpy.run_module('trd_jax.pipeline', run_name='__main__')\n"
    "heavy = {'jax', 'flax', 'tokenizers', 'transformers'} & {*sys.modules}\n"
    "assert not heavy, heavy\n"
  )
  _shard(run_dir, "rollout", 5)
  before = _files(run_dir.root)
  out = subprocess.run(
    [sys.executable, "-c", program, f"--workdir={run_dir.root}", "--status"],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert out.returncode == 0, out.stderr
  assert "rollout" in out.stdout
  assert _files(run_dir.root) == before
  # A config that is given isn't read.
  _status(run_dir.root, "--config=nowhere.py")


def test_a_stage_is_done_waiting_stopped_or_failed(run_dir, capsys):
  _shard(run_dir, "rollout", 8)
  run_dir.mark_done("rollout", {"samples": 8})
  _shard(run_dir, "refine", 3)
  _shard(run_dir, "refine", 2, number=1)
  run_dir.preflight("refine").write_text('{"prompts": 8}')
  _log(
    run_dir,
    "refine",
    "2026-01-01 10:00:01 refine: 4/8 samples (50%) · 4.0 samples/s",
    "2026-01-01 10:00:02 trd-jax refine: out of \x1b[2J memory",
    end=1,
  )
  found = _here(run_dir.root, capsys)
  assert (_stage(found, "rollout")["state"], found["state"]) == (
    "done",
    "failed",
  )
  refine = _stage(found, "refine")
  assert refine["state"] == "failed"
  assert (refine["rows"], refine["expected"], refine["exit_code"]) == (5, 8, 1)
  assert refine["last_line"] == "trd-jax refine: out of \x1b[2J memory"
  assert _stage(found, "train")["state"] == "waiting"
  text = _here(run_dir.root, capsys, "text")
  assert "refine failed, 1 of " in text
  # In one unit, whatever the line of progress counts.
  assert refine["unit"] == "rows"
  assert "5 of 8 rows" in text
  assert "\x1b" not in text
  # An interrupt, a kill, and rows without any log.
  for code in (130, 143, None):
    _log(run_dir, "refine", end=code)
    found = _here(run_dir.root, capsys)
    assert _stage(found, "refine")["state"] == "stopped"
  run_dir.log("refine").unlink()
  assert _stage(_here(run_dir.root, capsys), "refine")["state"] == "stopped"


def test_of_a_stage_at_work_it_says_who_how_fast_and_how_long(run_dir, capsys):
  now = time.time()

  def at(seconds):
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now - seconds))

  run_dir.stage("train").mkdir()
  row = {"step": 11, "loss": 0.25, "learning_rate": 1e-3, "round": None}
  run_dir.metrics_file("train").write_text(
    json.dumps({"step": 10, "loss": 1.0}) + "\n" + json.dumps(row) + "\n{torn"
  )
  _log(
    run_dir,
    "train",
    f"{at(40)} compiling: 3/3 programs (100%) · 1.0 s each",
    f"{at(25)} train: 2/32 updates (6%) · 1.0 s each · loss 1.0",
    f"{at(5)} train: 12/32 updates (38%) · 1.0 s each · loss 0.25",
  )
  with _held(run_dir, "pipeline", "train") as process:
    before = _files(run_dir.root)
    found = _here(run_dir.root, capsys)
    text = _here(run_dir.root, capsys, "text")
    assert _files(run_dir.root) == before
  train = _stage(found, "train")
  assert train["state"] == found["state"] == "running"
  assert (train["rows"], train["expected"]) == (12, 32)
  assert train["per_second"] == pytest.approx(0.5)
  assert train["seconds_left"] == pytest.approx(40)
  assert train["metrics"] == row
  assert train["holder"]["process"] == process
  assert train["holder"]["host"] == os.uname().nodename
  assert train["holder"]["alive"] is True
  assert 0 <= train["holder"]["seconds"] < 60
  assert found["locks"].keys() == {"pipeline", "train"}
  for part in (
    "train running",
    "12 of 32 updates",
    "0.5/s",
    "40.0 s",
    f"at work on train: process {process} on ",
    "last logged update 12: loss 0.25, learning rate 0.001",
  ):
    assert part in text
  # Gone: the lock's file stays, and says so to nobody.
  found = _here(run_dir.root, capsys)
  assert found["locks"] == {}
  assert _stage(found, "train")["state"] == "stopped"


def test_alarms_that_fired_are_told_while_it_runs(run_dir, capsys):
  run_dir.stage("train").mkdir()
  rows = [{"step": 0, "loss": 1.0, "D": 0.3, "D_first_5": 4.0}]
  rows.append({"step": 1, "loss": 1.0, "D": 0.2, "D_first_5": 3.0})
  text = "".join(json.dumps(row) + "\n" for row in rows)
  run_dir.metrics_file("train").write_text(text)
  run_dir.stage("refine").mkdir()
  run_dir.mark_done("refine", {"samples": 8, "truncated": 8, "leaks": 0})
  found = _here(run_dir.root, capsys)
  assert found["damaged"] == []
  assert [(a["name"], a["stage"], a["update"]) for a in found["alarms"]] == [
    ("truncated_share", "refine", None),
    ("first_tokens", "train", 1),
  ]
  text = _here(run_dir.root, capsys, "text")
  assert "train: alarm first_tokens at update 1: D_first_5 is 4 nats" in text
  assert "refine: alarm truncated_share: 100% of y_r are truncated" in text
  assert "loss 1, D 0.2" in text


def test_a_training_that_fails_again_is_still_one_of_so_many(run_dir, capsys):
  run_dir.stage("train").mkdir()
  run_dir.metrics_file("train").write_text('{"step": 2, "loss": 1.0}\n')
  _log(
    run_dir,
    "train",
    "2026-01-01 10:00:01 train: 3/4 updates (75%) · 1.0 s each · loss 1.0",
    end=143,
  )
  first = run_dir.log("train").read_text()
  line = "2026-01-01 11:00:01 trd-jax train: a checkpoint is damaged"
  _log(run_dir, "train", line, end=2)
  run_dir.log("train").write_text(first + run_dir.log("train").read_text())
  train = _stage(_here(run_dir.root, capsys), "train")
  assert (train["state"], train["exit_code"]) == ("failed", 2)
  assert (train["rows"], train["expected"]) == (3, 4)
  assert "3 of 4 updates" in _here(run_dir.root, capsys, "text")


@pytest.mark.parametrize("other", ["--dry_run", "--from=elsewhere"])
def test_status_beside_a_flag_that_asks_for_work_is_refused(
  other, run_dir, capsys
):
  with pytest.raises(SystemExit) as ended:
    cli.main(
      "pipeline",
      pipeline.run,
      "runs",
      pipeline.FLAGS,
      argv=[f"--workdir={run_dir.root}", "--status", other],
    )
  assert ended.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert f"--status and {other.partition('=')[0]}:" in line


def test_the_evaluation_at_work_is_the_one_whose_log_is_that_process_s(
  run_dir, capsys
):
  run_dir.mark_done("evaluate/base", {})
  with _held(run_dir, "evaluate") as process:
    _log(run_dir, "evaluate/base", end=0, process=process)
    _log(run_dir, "evaluate/trained", process=process)
    found = _here(run_dir.root, capsys)
  assert _stage(found, "evaluate/base")["state"] == "done"
  assert _stage(found, "evaluate/trained")["state"] == "running"


def _torn_done(run_dir):
  run_dir.stage("rollout").mkdir()
  (run_dir.stage("rollout") / "done.json").write_text("{")
  return run_dir.stage("rollout") / "done.json"


def _torn_config(run_dir):
  _shard(run_dir, "rollout", 2)
  run_dir.config.write_text("[")
  return run_dir.config


def _no_config(run_dir):
  _shard(run_dir, "rollout", 2)
  run_dir.config.unlink()
  return run_dir.config


def _config_of_a_later_version(run_dir):
  _shard(run_dir, "rollout", 2)
  fields = json.loads(run_dir.config.read_text()) | {"later": 1}
  run_dir.config.write_text(json.dumps(fields))
  return run_dir.config


def _torn_shard(run_dir):
  _shard(run_dir, "rollout", 2)
  path = run_dir.stage("rollout") / "shard-1.parquet"
  path.write_bytes(b"PAR1")
  return path


def _torn_report(run_dir):
  run_dir.stage("rollout").mkdir()
  run_dir.preflight("rollout").write_bytes(b"\xff\0")
  return run_dir.preflight("rollout")


def _metrics_of_somebody(run_dir):
  run_dir.stage("train").mkdir()
  run_dir.metrics_file("train").write_text("a,b\n1,2\n")
  return run_dir.metrics_file("train")


def _a_folder_for_a_file(run_dir):
  (run_dir.stage("rollout") / "done.json").mkdir(parents=True)
  return run_dir.stage("rollout") / "done.json"


@pytest.mark.parametrize(
  "damage",
  [
    _torn_done,
    _torn_config,
    _no_config,
    _config_of_a_later_version,
    _torn_shard,
    _torn_report,
    _metrics_of_somebody,
    _a_folder_for_a_file,
  ],
)
def test_a_damaged_file_is_one_line_and_the_rest_is_told(
  damage, run_dir, capsys
):
  path = damage(run_dir)
  found = _here(run_dir.root, capsys)
  (line,) = found["damaged"]
  assert str(path) in line
  assert "\n" not in line
  assert found["stages"]
  text = _here(run_dir.root, capsys, "text")
  assert text.count(str(path)) == 1


def test_files_that_go_while_it_looks_are_no_damage(
  run_dir, capsys, monkeypatch
):
  _shard(run_dir, "rollout", 2)
  read = pq.read_metadata

  def gone(path):
    path.unlink()
    return read(path)

  monkeypatch.setattr(status.pq, "read_metadata", gone)
  assert _here(run_dir.root, capsys)["damaged"] == []


@pytest.mark.parametrize(
  ("make", "told"),
  [
    (lambda path: None, "it is not there"),
    (lambda path: path.write_text(""), "Not a directory"),
    (lambda path: path.mkdir(), "is no run of trd-jax"),
  ],
)
def test_where_there_is_no_run_it_is_one_line_and_nothing_is_made(
  make, told, tmp_path
):
  make(tmp_path / "run")
  before = sorted(tmp_path.rglob("*"))
  for form in ("--status", "--status=json"):
    out = subprocess.run(
      [*_ARGV, f"--workdir={tmp_path / 'run'}", form],
      capture_output=True,
      text=True,
      cwd=ROOT,
    )
    assert out.returncode == 2
    assert out.stdout == ""
    (line,) = out.stderr.splitlines()
    assert told in line
  assert sorted(tmp_path.rglob("*")) == before


def test_another_form_is_refused(run_dir, capsys):
  with pytest.raises(SystemExit):
    _here(run_dir.root, capsys, "xml")
  assert "choose from text, json" in capsys.readouterr().err


def test_rounds_are_told_one_by_one(tmp_path, capsys):
  chosen = experiment.from_config({"pipeline.rounds": 3})
  run_dir = RunDir(tmp_path, experiment.to_json(chosen))
  second = run_dir.round(2)
  second.claim(experiment.to_json(experiment.from_config({})))
  _shard(second, "rollout", 3)
  found = _here(tmp_path, capsys)
  assert [one["workdir"][-9:] for one in found["rounds"]] == [
    "/rounds/2",
    "/rounds/3",
  ]
  assert _stage(found["rounds"][0], "rollout")["rows"] == 3
  assert found["rounds"][1]["state"] == "waiting"
  text = _here(tmp_path, capsys, "text")
  assert "round 2: rollout stopped" in text
  assert "round 3: waiting" in text


def test_a_sweep_has_a_line_a_point(tmp_path, capsys):
  chosen = experiment.to_json(experiment.from_config({}))
  run_dir = RunDir(tmp_path, chosen)
  names = ("method=jsd", "method=trd", "torn")
  points = [RunDir(tmp_path / "points" / name, chosen) for name in names]
  _shard(points[0], "rollout", 3)
  points[0].preflight("rollout").write_text('{"prompts": 9}')
  points[2].config.write_text("")
  with ExitStack() as stack:
    stack.enter_context(_held(points[0], "rollout"))
    stack.enter_context(_held(run_dir, "sweep"))
    text = _here(tmp_path, capsys, "text")
  (line,) = (each for each in text.splitlines() if "method=jsd" in each)
  assert "rollout running" in line
  assert "3 of 9 rows" in line
  assert "at work on sweep" in text
  assert text.count("points/torn/config.json") == 1


def test_a_pipeline_between_two_stages_is_running(run_dir, capsys):
  run_dir.mark_done("rollout", {"samples": 0})
  assert _here(run_dir.root, capsys)["state"] == "stopped"
  with _held(run_dir, "pipeline"):
    assert _here(run_dir.root, capsys)["state"] == "running"


def test_a_damaged_config_is_no_fault_of_a_stage(run_dir, capsys):
  run_dir.mark_done("rollout", {"samples": 0})
  whole = run_dir.config.read_bytes()
  run_dir.config.write_bytes(whole.replace(b"0.95", b"0.15", 1))
  found = _here(run_dir.root, capsys)
  (line,) = found["damaged"]
  assert "config.json is damaged or was edited: remove it" in line
  assert found["state"] == "damaged"
  assert _stage(found, "rollout")["state"] == "done"
  # As the line says, without the config's file, too.
  run_dir.config.unlink()
  (line,) = _here(run_dir.root, capsys)["damaged"]
  assert "the next command writes it anew" in line
  assert not run_dir.config.exists()
  with pytest.raises(SystemExit):
    cli.main(
      "pipeline",
      pipeline.run,
      "runs",
      pipeline.FLAGS,
      argv=[f"--workdir={run_dir.root}", "--config.rollout.temperature=0.1"],
    )
  assert "temperature is 0.6 there and 0.1 here" in capsys.readouterr().err
  assert run_dir.config.read_bytes() == whole
