"""The memory that a process and all that it has started hold, through /proc.

Only what no file on disk stands behind counts: a program's own pages, those
that it shares with others, what of both was swapped out, and what the kernel
keeps for it: a record of each file in a file system in memory, which has its
size limited but not its number of files, and what may wait in each socket.
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence

_FILE = 1 << 10  # bytes of the kernel's, about, for a file of no length
_SOCKET = 212_992  # bytes that Linux lets wait in a socket, unless told


def descendants(pid: int) -> Iterator[int]:
  """Yields the ids of a process and of all that it has started."""
  waiting = [pid]
  while waiting:
    one = waiting.pop()
    yield one
    with contextlib.suppress(OSError):
      # Each thread has its own children, and a process may fork in any.
      for thread in os.listdir(f"/proc/{one}/task"):
        with open(f"/proc/{one}/task/{thread}/children") as file:
          waiting += map(int, file.read().split())


def _sum_of(path: str, names: Sequence[str]) -> int:
  """Adds up some lines of a file that counts in kB, in bytes.

  Raises:
    OSError, KeyError, ValueError: there is no such file, or line in it.
  """
  with open(path) as file:
    # smaps_rollup begins with a range of addresses, whose colon comes later.
    lines = dict(line.split(":", 1) for line in file if ":" in line[:16])
  return sum(int(lines[name].split()[0]) for name in names) * 1024


@functools.cache
def _socket() -> int:
  """Returns how many bytes the kernel keeps at most of what a socket sent."""
  size = _SOCKET
  path = "/proc/sys/net/core/wmem_max"  # a container may not be shown it
  with contextlib.suppress(OSError), open(path) as file:
    size = int(file.read())
  return 2 * size  # of which half is its own


def _sockets(pid: int) -> int:
  """Returns how many bytes may wait in a process's sockets."""
  number = 0
  with contextlib.suppress(OSError):
    for fd in os.listdir(folder := f"/proc/{pid}/fd"):
      with contextlib.suppress(OSError):
        number += os.readlink(f"{folder}/{fd}").startswith("socket:")
  return number * _socket()


def _at_most(pid: int) -> int:
  """Returns a process's bytes, with pages that it shares counted whole."""
  with contextlib.suppress(OSError, KeyError, ValueError):
    names = ("RssAnon", "RssShmem", "VmSwap")
    return _sum_of(f"/proc/{pid}/status", names)
  return 0  # it has ended


def _proportional(pid: int) -> int:
  """Returns a process's bytes, with each shared page divided by its users."""
  try:
    return _sum_of(f"/proc/{pid}/smaps_rollup", ("Pss", "SwapPss"))
  except (OSError, KeyError, ValueError):
    return _at_most(pid)


def _device(path: str) -> int | None:
  """Returns the file system that a path is on; None where there is no path."""
  with contextlib.suppress(OSError):
    return os.stat(path).st_dev
  return None


def _files(pid: int, folders: Sequence[str]) -> int:
  """Returns the kernel's bytes about the files in a process's folders."""
  number = 0
  for folder in folders:
    own = f"/proc/{pid}/root{folder}"
    # Until its file systems are mounted it sees this machine's folder, whose
    # files are no doing of its.
    if _device(own) in (None, _device(folder)):
      continue
    with contextlib.suppress(OSError):
      about = os.statvfs(own)
      number += about.f_files - about.f_ffree
  return number * _FILE


def held(pid: int, limit: int, folders: Sequence[str] = ()) -> int:
  """Returns the bytes of a process and its descendants; exact above `limit`.

  Args:
    pid: the process.
    limit: how many matter.
    folders: where it sees file systems in memory that are its alone.
  """
  pids = list(descendants(pid))
  kernel = _files(pid, folders) + sum(map(_sockets, pids))
  # Proportional sizes walk through all pages, which takes long for a large
  # process: only where the quick figure, which is never too low, is above the
  # limit.
  roughly = kernel + sum(map(_at_most, pids))
  if roughly <= limit:
    return roughly
  return kernel + sum(map(_proportional, pids))
