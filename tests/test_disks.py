"""A disk that is full, read-only or gone: one line, and the rows stay whole."""

import sys

import pytest

from tests.support import stage_runs
from tests.support.small_disk import SmallDisk
from trd_jax.experiment import experiment
from trd_jax.experiment.metric_log import read_metrics
from trd_jax.experiment.records import Trajectory
from trd_jax.experiment.run_dir import RunDir

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
  with SmallDisk(tmp_path_factory.mktemp("disk")) as made:
    chosen = stage_runs.chosen(
      **{
        "data.arithmetic.num_problems": 16,
        "train.batch_size": 8,
        "train.checkpoint_every": 1,
      }
    )
    (made.seen / "config.json").write_text(experiment.to_json(chosen))
    yield made


def stage(disk, name, workdir):
  command = [sys.executable, "-m", f"trd_jax.{name}"]
  command += [f"--config={disk.path}/config.json"]
  return disk.run(*command, f"--workdir={disk.path / workdir}")


def line_of(done, name):
  """The line that a refused stage ends with; besides it there is progress."""
  assert done.returncode == 2, done.stderr[-3000:]
  lines = [
    line
    for line in done.stderr.splitlines()
    if "%)" not in line and not line.startswith("note: ")
  ]
  assert len(lines) == 1, done.stderr[-3000:]
  assert lines[0].startswith(f"trd-jax {name}: ")
  return lines[0]


# What each stage may still write before the disk is full, in bytes.
STAGES = (
  ("rollout", "rollout", 0),
  ("refine", "refine", 0),
  ("train", "train", 2**20),  # one checkpoint is smaller, two are not
  ("merge", "merge", 2**19),
)


def test_where_a_disk_was_full_the_same_command_goes_on(disk):
  for name, made, free in STAGES:
    disk.fill(free)
    refused = stage(disk, name, "full")
    line = line_of(refused, name)
    assert str(disk.path) in line
    assert "make room" in line
    here = RunDir(disk.seen / "full")
    assert not here.finished(made)
    assert not list(disk.seen.rglob("*.tmp")), made
    disk.empty()
    done = stage(disk, name, "full")
    assert done.returncode == 0, done.stderr[-3000:]
    assert here.finished(made)
  for name, *_ in STAGES[:3]:
    done = stage(disk, name, "undisturbed")
    assert done.returncode == 0, done.stderr[-3000:]
  full, undisturbed = (
    RunDir(disk.seen / name) for name in ("full", "undisturbed")
  )
  for name in ("rollout", "refine"):
    rows = full.read(name, Trajectory)
    assert rows == undisturbed.read(name, Trajectory)
  losses = [
    [row["loss"] for row in read_metrics(one.metrics_file("train"))]
    for one in (full, undisturbed)
  ]
  assert losses[0] == losses[1]


def test_a_disk_that_is_read_only_is_told_of(disk):
  disk.mount("-o", "remount,ro", str(disk.path))
  try:
    refused = stage(disk, "rollout", "new")
  finally:
    disk.mount("-o", "remount,rw", str(disk.path))
  line = line_of(refused, "rollout")
  assert "Read-only file system" in line
  assert "mounted for writing" in line


def test_checkpoints_that_cannot_be_written_end_a_training_at_once(disk):
  checkpoints = disk.path / "full" / "train" / "checkpoints"
  seen = disk.seen / "full" / "train"
  for name in ("rollout", "refine"):  # skipped where they are done
    assert stage(disk, name, "full").returncode == 0
  (seen / "checkpoints").mkdir(parents=True, exist_ok=True)
  for path in (seen / "done.json", seen / "metrics.jsonl"):
    path.unlink(missing_ok=True)
  disk.mount("-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(checkpoints))
  try:
    # Under the 300 s that orbax's threads would wait for a folder.
    refused = stage(disk, "train", "full")
  finally:
    assert disk.run("umount", str(checkpoints)).returncode == 0
  line = line_of(refused, "train")
  assert str(checkpoints) in line
  assert "read-only" in line


@pytest.mark.parametrize("state", ["full", "read-only"])
def test_what_isnt_a_stage_of_the_pipeline_says_a_line_too(disk, state):
  assert stage(disk, "rollout", "full").returncode == 0  # skipped where done
  sweep = "--sweep=configs/sweeps/demo.py"
  commands = {
    "convert": [
      "--source=lab:student",
      f"--target={disk.path}/a",
      "--to=orbax",
    ],
    "analyze": [f"--workdir={disk.path}/full"],
    "sweep": ["--config=configs/demo.py", sweep, f"--workdir={disk.path}/b"],
  }
  if state == "full":
    disk.fill()
  else:
    disk.mount("-o", "remount,ro", str(disk.path))
  try:
    refused = {
      name: disk.run(sys.executable, "-m", f"trd_jax.{name}", *arguments)
      for name, arguments in commands.items()
    }
  finally:
    if state == "read-only":
      disk.mount("-o", "remount,rw", str(disk.path))
    disk.empty()
  for name, done in refused.items():
    line = line_of(done, name)
    assert str(disk.path) in line
    assert "make room" in line or "written" in line
  for made in ("a", "full/analyze/report", "b/config.json"):
    assert not (disk.seen / made).exists(), made
