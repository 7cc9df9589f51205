"""What a command printed, in its workdir: whole, clean, never in the way."""

import errno
import os
import re
import sys

import pytest

from tests.support.places import ROOT
from trd_jax.experiment import cli, printing, stage_log
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.progress import Progress
from trd_jax.experiment.run_dir import RunDir

_DEMO = f"--config={ROOT / 'configs' / 'demo.py'}"
_STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def _main(run, root, *argv, **options):
  """Runs a stage in this process; returns its exit code."""
  argv = [_DEMO, f"--workdir={root}", *argv]
  try:
    cli.main("rollout", lambda *a: run(), "does it", argv=argv, **options)
  except SystemExit as end:
    return end.code
  return 0


def _log(root, stage="rollout"):
  return RunDir(root).log(stage).read_text("utf-8")


def test_each_attempt_has_its_header_its_lines_and_its_end(tmp_path, capsys):
  def first():
    print("out → \x1b[2J")
    print("err", file=sys.stderr)
    raise KeyboardInterrupt

  def second():
    print("again")
    print("not ended", end="")

  assert _main(first, tmp_path / "run", "--config.seed=3") == 130
  assert _main(second, tmp_path / "run", "--config.seed=3") == 0
  lines = _log(tmp_path / "run").splitlines()
  head = rf"== trd-jax \S+, .*, process {os.getpid()} on \S+"
  stamped = [
    "out → \\x1b[2J",
    "err",
    "trd-jax rollout: interrupted; the same command goes on where it stopped",
  ]
  wanted = [
    head,
    r"== python -m trd_jax\.rollout --config=\S+ --workdir=\S+ --config.seed=3",
    *(_STAMP + re.escape(line) for line in stamped),
    r"== ended with exit code 130 after \S+ s, .*",
    head,
    "== python .*",
    _STAMP + "again",
    _STAMP + "not ended",
    r"== ended with exit code 0 after .*",
  ]
  assert len(lines) == len(wanted)
  for line, pattern in zip(lines, wanted, strict=True):
    assert re.fullmatch(pattern, line), (line, pattern)
  last = stage_log.last_attempt(RunDir(tmp_path / "run").log("rollout"))
  assert last is not None
  assert last.code == 0
  assert [line for _, line in last.lines] == ["again", "not ended"]
  assert stamped[0] in last.earlier
  assert last.process == os.getpid()


def test_an_unexpected_error_is_there_with_its_traceback(tmp_path):
  def fail():
    print("begun")
    raise ValueError("a bug \x1b")

  with pytest.raises(ValueError, match="a bug"):
    _main(fail, tmp_path)
  text = _log(tmp_path)
  assert "Traceback" in text
  assert "ValueError: a bug \\x1b\n" in text
  assert "== ended with exit code 1 " in text


def test_a_line_that_a_bar_draws_over_is_there_as_it_was_last(tmp_path):
  def draw():
    for share in range(5):
      sys.stderr.write(f"\rfetch: {share}")
    sys.stderr.write("\n")

  _main(draw, tmp_path)
  assert len(re.findall("fetch", _log(tmp_path))) == 1
  assert "fetch: 4\n" in _log(tmp_path)


def test_of_a_bar_on_a_terminal_there_is_a_line_now_and_then(
  tmp_path, monkeypatch
):
  class Clock:
    now = 0.0

    def __call__(self):
      return self.now

  def draw():
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(100, "train", "updates", clock=clock) as progress:
      for _ in range(100):
        clock.now += 0.5
        progress.update(1, "loss 1")

  clock = Clock()
  _main(draw, tmp_path)
  lines = [
    line.partition("train: ")[2]
    for line in _log(tmp_path).splitlines()
    if "train: " in line
  ]
  assert 5 <= len(lines) <= 7
  assert (
    lines[-1] == "100/100 updates (100%) · 2.0 updates/s · took 50.0 s · loss 1"
  )
  assert all(line[0].isdigit() for line in lines)  # no bar


def test_an_evaluation_s_log_is_of_its_side(tmp_path):
  _main(lambda: print("x"), tmp_path, account=lambda own: "evaluate/base")
  assert "x" in _log(tmp_path, "evaluate/base")
  assert os.listdir(tmp_path / "log") == ["evaluate-base.txt"]


def test_who_says_nothing_has_no_log(tmp_path):
  # As all processes of a training but the first.
  assert _main(lambda: None, tmp_path) == 0
  assert not (tmp_path / "log").exists()


def test_a_command_that_only_looks_has_no_log(tmp_path):
  looks = [cli.Flag("dry_run", False, "looks", looks_only=True)]
  _main(lambda: print("x"), tmp_path, "--dry_run", flags=looks)
  _main(lambda: print("x"), tmp_path, looks_only=True)
  assert os.listdir(tmp_path) == []


def test_a_refused_command_leaves_no_log_and_one_that_failed_does(tmp_path):
  def refuse():
    print("before")
    raise UserError("not like this")

  def fail():
    print("before")
    sys.exit(1)

  root = tmp_path / "run"
  assert _main(refuse, root) == 2
  assert not root.exists()
  assert _main(fail, root) == 1
  # The config is given back all the same: a mended one may be another.
  assert [str(p.relative_to(root)) for p in sorted(root.rglob("*"))] == [
    "log",
    "log/rollout.txt",
  ]
  assert "== ended with exit code 1 " in _log(root)
  # It stays when another command is refused, which adds nothing to it.
  before = _log(root)
  assert _main(refuse, root, "--config.seed=1") == 2
  assert _log(root).startswith(before)
  assert _main(lambda: print("well"), root, "--config.seed=2") == 0
  assert _log(root).endswith("\n")


def _a_file_for_the_folder(root):
  (root / "log").write_text("mine")


def _a_file_of_somebody(root):
  (root / "log").mkdir()
  (root / "log" / "rollout.txt").write_text("mine")


def _a_link_to_somebody(root):
  (root / "log").mkdir()
  (root / "mine.txt").write_text("")
  (root / "log" / "rollout.txt").symlink_to(root / "mine.txt")


def _a_pipe(root):
  (root / "log").mkdir()
  os.mkfifo(root / "log" / "rollout.txt")


def _a_folder(root):
  (root / "log" / "rollout.txt").mkdir(parents=True)


@pytest.mark.parametrize(
  "make",
  [
    _a_file_for_the_folder,
    _a_file_of_somebody,
    _a_link_to_somebody,
    _a_pipe,
    _a_folder,
  ],
)
def test_what_is_in_a_log_s_way_is_said_once_and_ends_nothing(
  make, tmp_path, capsys
):
  make(tmp_path)
  before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

  def run():
    print("one\ntwo")
    print("three", file=sys.stderr)

  assert _main(run, tmp_path) == 0
  out, err = capsys.readouterr()
  assert out == "one\ntwo\n"
  assert err.count("note: ") == 1
  assert "goes on without a log" in err
  assert {path: path.read_bytes() for path in before} == before


def test_a_full_disk_ends_no_stage(tmp_path, capsys, monkeypatch):
  write, times = os.write, []

  def full(file, data):
    if data.startswith(b"== ") or b"line" in data:
      times.append(data)
      if len(times) > 3:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(file, data)

  def run():
    for number in range(9):
      print(f"line {number}")

  monkeypatch.setattr(os, "write", full)
  assert _main(run, tmp_path) == 0
  out, err = capsys.readouterr()
  assert out.count("line") == 9
  assert err.count("\n") == 1
  assert "No space left on device" in err
  assert _log(tmp_path).count("line") == 2


def test_without_a_run_there_is_no_log(capsys):
  with printing.opened():
    print("x")
    printing.log_line("y")
  assert capsys.readouterr().out == "x\n"
