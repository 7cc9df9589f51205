"""What a disk refuses is one line with a place and a remedy."""

import contextlib
import errno
import os
import resource
import signal

import pytest
from safetensors import SafetensorError

from trd_jax.experiment import cli, shards
from trd_jax.experiment.files import atomic_files, disk_faults, file_locks
from trd_jax.experiment.metric_log import MetricWriter, read_metrics, timed
from trd_jax.experiment.records import Problem
from trd_jax.experiment.run_dir import RunDir

OF_DISKS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EROFS,
  errno.EFBIG,
  errno.EIO,
  errno.ESTALE,
)
OF_FILES = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)


def stage(tmp_path, capsys, run):
  """Runs a stage of one function; returns its exit code and its last line."""
  workdir = tmp_path / "run"
  with pytest.raises(SystemExit) as ended:
    cli.main(
      "rollout",
      run,
      "",
      argv=["--config=configs/demo.py", f"--workdir={workdir}"],
    )
  return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("code", OF_DISKS + OF_FILES)
def test_an_error_with_a_file_is_one_line(tmp_path, capsys, code):
  def run(*_):
    raise OSError(code, os.strerror(code), "/there/shard")

  ended, err = stage(tmp_path, capsys, run)
  assert ended == 2
  assert err.count("\n") == 1
  assert err.startswith("trd-jax rollout: /there/shard: ")
  assert "; " in err
  # A claim under which nothing was made is given up, as after a user's mistake.
  assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("code", OF_DISKS)
@pytest.mark.parametrize(
  "error",
  [
    lambda code: ValueError(f"RESOURCE_EXHAUSTED: [{errno.errorcode[code]} x]"),
    lambda code: SafetensorError(f"I/O error: it (os error {code})"),
    lambda code: RuntimeError(f"Can't write: {os.strerror(code)}"),
    lambda code: ExceptionGroup("two", [ValueError(), OSError(code, "")]),
  ],
)
def test_an_error_of_a_library_is_one_line_too(tmp_path, capsys, code, error):
  def run(*_):
    try:
      raise error(code)
    except Exception as cause:
      raise RuntimeError("a library failed") from cause

  ended, err = stage(tmp_path, capsys, run)
  assert ended == 2
  assert err.count("\n") == 1
  # No file is named: the likeliest place is.
  assert str(tmp_path / "run") in err or "/tmp" in err


@pytest.mark.parametrize(
  "error",
  [
    FileNotFoundError(errno.ENOENT, "", "/elsewhere/file"),
    OSError(errno.EACCES, ""),  # of a socket, as it names no file
    OSError("of no code"),
    ConnectionRefusedError(errno.ECONNREFUSED, ""),
    KeyError("a mistake of ours"),
  ],
)
def test_other_errors_keep_their_traceback(tmp_path, error):
  def run(*_):
    raise error

  argv = ["--config=configs/demo.py", f"--workdir={tmp_path / 'run'}"]
  with pytest.raises(type(error)):
    cli.main("rollout", run, "", argv=argv)


def test_a_workdir_that_has_gone_is_told_of(tmp_path, capsys):
  def run(_, run_dir, __):
    run_dir.root.rename(tmp_path / "elsewhere")
    (run_dir.root / "rollout" / "shard").open()

  ended, err = stage(tmp_path, capsys, run)
  assert ended == 2
  assert err.startswith(f"trd-jax rollout: {tmp_path / 'run'}: it is not there")
  assert "removed meanwhile, or its disk unmounted" in err


def test_no_stage_is_done_in_a_workdir_that_has_gone(tmp_path, capsys):
  def run(_, run_dir, __):
    run_dir.root.rename(tmp_path / "elsewhere")
    run_dir.mark_done("rollout", {"samples": 0})

  ended, err = stage(tmp_path, capsys, run)
  assert (ended, err.count("\n")) == (2, 1)
  assert not (tmp_path / "run").exists()


def test_no_rows_are_written_into_a_folder_that_has_gone(tmp_path):
  row = Problem("a", "b", "c", None, "arithmetic", "d", None, "{}")
  folder = tmp_path / "rollout"
  with (
    contextlib.suppress(FileNotFoundError),
    shards.ShardWriter(folder, Problem, rows_per_shard=1) as writer,
  ):
    writer.add(row)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="rollout"):
      writer.add(row)
  assert not folder.exists()


@contextlib.contextmanager
def largest_file(size):
  """Limits how large this process's files may become."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_that_a_disk_refuses_is_named_and_stays_as_it_was(tmp_path):
  path = tmp_path / "file"
  path.write_bytes(b"before")
  with (
    pytest.raises(OSError, match="large") as refused,
    largest_file(1000),
    atomic_files.atomic_file(path) as file,
  ):
    file.write(bytes(5000))
  assert refused.value.filename == str(path)
  assert disk_faults.described(refused.value).startswith(f"{path}: ")
  assert path.read_bytes() == b"before"
  assert list(tmp_path.iterdir()) == [path]


def test_a_row_of_metrics_lands_whole_or_not_at_all(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with MetricWriter(path) as writer:
    writer.write(0, {"loss": 1.0})
    size = path.stat().st_size
    with (
      largest_file(size + 10),
      pytest.raises(OSError, match="large") as refused,
    ):
      writer.write(1, {"loss": 2.0})
    assert refused.value.filename == str(path)
    assert path.stat().st_size == size
    writer.write(1, {"loss": 2.0})
  assert [row["step"] for row in read_metrics(path)] == [0, 1]


def test_seconds_that_cannot_be_written_are_a_note(tmp_path, capsys):
  path = tmp_path / "timings.jsonl"
  path.symlink_to("/dev/full")
  with timed(path, "rollout"):
    pass
  note = capsys.readouterr().out
  assert note.count("\n") == 1
  assert note.startswith(f"note: {path} can't be written (No space left")
  with pytest.raises(KeyError), timed(path, "rollout"):
    raise KeyError
  assert not capsys.readouterr().out


def test_a_lock_that_cannot_be_signed_names_its_file(tmp_path):
  run_dir = RunDir(tmp_path)
  with (
    largest_file(0),
    pytest.raises(OSError, match="large") as refused,
    run_dir.lock("rollout"),
  ):
    pass
  path = tmp_path / "locks" / "rollout.lock"
  assert refused.value.filename == str(path)
  assert file_locks.is_signature(path)
  with run_dir.lock("rollout"):  # it was released
    pass
