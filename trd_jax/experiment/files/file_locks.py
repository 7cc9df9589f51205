"""Locks files, so that one process at a time is at work."""

import fcntl
import os
import socket
from pathlib import Path
from typing import IO


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
  """Writes into a locked file who holds it."""
  file.truncate(0)
  file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
  file.flush()


def holder(path: Path) -> str:
  """Returns who has signed a file last, for a message."""
  text = path.read_bytes().decode(errors="replace").strip()
  return text if is_signature(path) and text else "another process"


def is_signature(path: Path) -> bool:
  """Returns whether a file holds what `sign` writes, or nothing yet."""
  try:
    if not path.is_file():
      return False
    with path.open("rb") as file:
      return file.read(8) in (b"", b"process ")
  except OSError:
    return False
