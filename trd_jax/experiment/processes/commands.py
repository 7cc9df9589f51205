"""Runs commands that answer in a moment, or gives up on them."""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

_END_SECONDS = 1.0


class Answer(NamedTuple):
  """How a command ended.

  Attributes:
    code: its exit code, or minus the signal's number.
    out: what it wrote to its standard output.
    err: what it wrote to its standard error.
  """

  code: int
  out: str
  err: str


def ask(command: Sequence[str], seconds: float) -> Answer:
  """Runs a command that reads nothing.

  Args:
    command: the program and its arguments.
    seconds: its time limit.

  Raises:
    OSError: the command can't be started.
    subprocess.TimeoutExpired: the time is over. The command and what it has
      started were killed; one that a driver holds in the kernel can't be, and
      is left there.
  """
  # Files and not pipes: a process that the command leaves behind would keep a
  # pipe open, and reading it would not end.
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
    # A session of its own makes a process group, which can be killed as one.
    process = subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=out,
      stderr=err,
      start_new_session=True,
    )
    try:
      code = process.wait(seconds)
    except BaseException:
      with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)
      raise
    said = []
    for file in (out, err):
      file.seek(0)
      said.append(file.read().decode(errors="replace"))
  return Answer(code, *said)
