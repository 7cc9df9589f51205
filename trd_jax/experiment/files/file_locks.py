"""Locks files, so that one process at a time is at work."""

import fcntl
import os
import re
import socket
import struct
import sys
from pathlib import Path
from typing import IO, NamedTuple

from trd_jax.experiment.files.disk_faults import naming

_SIGNATURE = re.compile(r"process (\d+) on (\S+)")


def acquire(path: Path) -> IO[bytes] | None:
  """Opens a file and locks it for this process until the file is closed.

  When a process ends, however it does, the kernel releases its locks. They are
  POSIX locks, which hold on a shared disk, too. With these a second `open` and
  `close` of the same file in this process releases the lock.

  Args:
    path: the file; it is made where it isn't there, its folder is not.

  Returns:
    The file, for reading and writing; None where another process holds it.

  Raises:
    OSError: the file can't be opened.
  """
  while True:
    file = path.open("a+b")
    try:
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
      file.close()
      return None
    # The process that held the lock may have removed or moved the file before
    # it let go. Then others lock another file under that name, and this lock
    # would exclude nobody.
    try:
      if os.path.samestat(os.fstat(file.fileno()), path.stat()):
        return file
    except FileNotFoundError:
      pass
    file.close()


def sign(file: IO[bytes]) -> None:
  """Writes into a locked file who holds it.

  Raises:
    OSError: the disk refuses it; the error names the file.
  """
  signature = f"process {os.getpid()} on {socket.gethostname()}".encode()
  with naming(file.name):
    file.truncate(0)
    # Past the file's buffer: what a full disk has refused would be tried again,
    # and fail again, when the file is closed.
    os.write(file.fileno(), signature)


def holder(path: Path) -> str:
  """Returns who has signed a file last, for a message."""
  text = path.read_bytes().decode(errors="replace").strip()
  return text if is_signature(path) and text else "another process"


class Holder(NamedTuple):
  """Who has signed a lock last.

  Attributes:
    process, host: the process; None where the file doesn't say.
    since: when, in seconds since the epoch.
    alive: whether the lock is held at this moment.
  """

  process: int | None
  host: str | None
  since: float
  alive: bool


def look(path: Path) -> Holder | None:
  """Returns who holds a lock, or held it last; changes and locks nothing.

  Not for a lock that this process holds: to close the file would release it.

  Returns:
    The holder; None where there is no lock of ours.

  Raises:
    OSError: the file can't be read.
  """
  if not is_signature(path):
    return None
  with path.open("rb") as file:
    by = _SIGNATURE.fullmatch(file.read(1 << 10).decode(errors="replace"))
    since, alive = os.fstat(file.fileno()).st_mtime, _is_locked(file)
  process, host = (int(by[1]), by[2]) if by else (None, None)
  return Holder(process, host, since, alive)


def _is_locked(file: IO[bytes]) -> bool:
  """Returns whether another process has locked an open file."""
  if sys.platform == "linux":
    # As C declares it: kind, whence, start, length (0: to the end), process.
    question = struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
    return struct.unpack("hhqqi", answer)[0] != fcntl.F_UNLCK
  # Elsewhere the only way to ask is to take it, shared, for a moment.
  try:
    fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except (BlockingIOError, PermissionError):
    return True
  fcntl.lockf(file, fcntl.LOCK_UN)
  return False


def is_signature(path: Path) -> bool:
  """Returns whether a file holds what `sign` writes, or nothing yet."""
  try:
    if not path.is_file():
      return False
    with path.open("rb") as file:
      return file.read(8) in (b"", b"process ")
  except OSError:
    return False
