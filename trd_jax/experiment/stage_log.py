"""What a command printed, kept in its workdir: `log/STAGE.txt`.

Each attempt adds a header, its lines with the time of each, and how it ended.
A log only informs: where it can't be written, that is said once, and the stage
goes on.
"""

import contextlib
import datetime
import os
import re
import socket
import stat
import sys
import time
from pathlib import Path
from typing import NamedTuple

_HEAD = "== trd-jax "
_END = "== ended with exit code "
_ENDED = re.compile(re.escape(_END) + r"(\d+)")
_PROCESS = re.compile(r", process (\d+) on ")
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ")
_TAIL_BYTES = 1 << 16


class StageLog:
  """Appends an attempt to a log, from its first line on.

  Processes of one run may append to one file: a line is one write.

  Args:
    path: the file; with its folder it is made by the first line.
    command: what was typed, in one line, for the header.
    version: of the program.
  """

  def __init__(self, path: Path, command: str, version: str):
    self.path = path
    self._command, self._version = command, version
    self._file: int | None = None
    self._closed = False
    self._began = time.monotonic()
    # Of each stream the line that isn't ended yet.
    self._open_lines: dict[int, str] = {}

  def write(self, text: str, stream: int = 0) -> None:
    """Adds text, as the lines in it are complete.

    Args:
      text: what was printed; of a line that a bar has drawn over, the last.
      stream: tells streams apart whose lines are written in turns.
    """
    *lines, rest = (self._open_lines.get(stream, "") + text).split("\n")
    self._open_lines[stream] = rest.rpartition("\r")[2]
    for line in lines:
      self._add(_stamped(line.rpartition("\r")[2]))

  def end(self, code: int) -> None:
    """Says how the attempt ended, where it has said anything."""
    for stream, line in list(self._open_lines.items()):
      if line:
        self.write("\n", stream)
    if self._file is not None:
      seconds = time.monotonic() - self._began
      self._add(f"{_END}{code} after {seconds:.1f} s, {_now()}\n")
    self.close()

  def close(self) -> None:
    """Logs nothing from now on."""
    self._closed = True
    if self._file is not None:
      os.close(self._file)
      self._file = None

  def _add(self, line: str) -> None:
    if self._closed:
      return
    try:
      if self._file is None:
        self._file = self._open()
        os.write(self._file, self._header().encode())
      os.write(self._file, line.encode(errors="backslashreplace"))
    except OSError as error:
      self.close()
      sys.stderr.write(
        f"note: {self.path} can't be written"
        f" ({error.strerror or error}); this stage goes on without a log\n"
      )

  def _open(self) -> int:
    """Opens the file for appending.

    Raises:
      OSError: it can't be, or it is somebody else's.
    """
    self.path.parent.mkdir(parents=True, exist_ok=True)
    # A pipe at that place would be waited for, a link lead to another file.
    flags = os.O_APPEND | os.O_CREAT | os.O_RDWR
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(self.path, flags, 0o666)
    if stat.S_ISREG(os.fstat(file).st_mode):
      head = os.pread(file, len(_HEAD), 0)
      if head in (b"", _HEAD.encode()):
        return file
    os.close(file)
    raise OSError("it is no log of trd-jax")

  def _header(self) -> str:
    return (
      f"{_HEAD}{self._version}, {_now()}, process {os.getpid()} on"
      f" {socket.gethostname()}\n== {self._command}\n"
    )


def is_log(path: Path) -> bool:
  """Returns whether a file is a log of this program's."""
  try:
    if path.is_symlink() or not path.is_file():
      return False
    with path.open("rb") as file:
      return file.read(len(_HEAD)) == _HEAD.encode()
  except OSError:
    return False


class LastAttempt(NamedTuple):
  """What a log's end says of the last attempt.

  Attributes:
    code: its exit code; None: it goes on, or was killed.
    lines: its last lines, each with the time at which it was printed.
    process: the process's id; None where the header is too far up.
    earlier: the last lines of the attempts before it, without their times.
  """

  code: int | None
  lines: list[tuple[datetime.datetime, str]]
  process: int | None
  earlier: list[str]


def last_attempt(path: Path) -> LastAttempt | None:
  """Reads the end of a log; None where there is no log.

  Raises:
    OSError: it can't be read.
  """
  if not is_log(path):
    return None
  with path.open("rb") as file:
    file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
    text = file.read(_TAIL_BYTES).decode(errors="replace")
  lines: list[tuple[datetime.datetime, str]] = []
  earlier: list[str] = []
  code = process = None
  for line in text.split("\n"):
    if line.startswith(_HEAD):
      earlier += [line for _, line in lines]
      lines, code = [], None
      process = int(by[1]) if (by := _PROCESS.search(line)) else None
    elif ended := _ENDED.match(line):
      code = int(ended[1])
    elif stamp := _STAMP.match(line):
      # Torn by a kill or a full disk, it could look like any date.
      with contextlib.suppress(ValueError):
        when = datetime.datetime.fromisoformat(stamp[1])
        lines.append((when, line[stamp.end() :]))
  return LastAttempt(code, lines, process, earlier)


def _stamped(line: str) -> str:
  now = datetime.datetime.now()
  return f"{now:%Y-%m-%d %H:%M:%S} {line}\n"


def _now() -> str:
  return datetime.datetime.now().astimezone().isoformat(" ", "seconds")
