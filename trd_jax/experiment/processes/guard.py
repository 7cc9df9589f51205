"""Ends what a process has left running when the process itself is gone.

A killed process can't tidy up, and what it has started may be others' programs,
as vLLM's processes, which hold a GPU's memory. A `Guard` watches it and ends
them. Run as a script, with a process's id, this file is such a guard: it needs
nothing but Python's own library.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

_LOOK_SECONDS = 1.0
_GLANCE_SECONDS = 0.5  # between two notes of who has started whom


def when_gone(pid: int, do: Callable[[], object]) -> None:
  """Calls `do`, from a thread of its own, once process `pid` has ended.

  Args:
    pid: a process that may have ended already; none below 1, of which there
      is no end.
    do: what ends this process; it must not take long.
  """
  if pid < 1:
    return
  wait = _by_descriptor if hasattr(os, "pidfd_open") else _by_looking
  thread = threading.Thread(
    target=lambda: (wait(pid), do()), name=f"watch-{pid}", daemon=True
  )
  thread.start()


class Guard:
  """Kills what this process has started, once this process is gone.

  A process of its own, so that it outlives a SIGKILL. It needs nothing of the
  programs that it ends, and nothing happens where there is no /proc.
  """

  def __init__(self) -> None:
    self._process = subprocess.Popen(
      # Isolated, without site-packages: it is there at once.
      [sys.executable, "-IS", __file__, str(os.getpid())],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      start_new_session=True,  # a terminal's interrupts are not for it
    )

  def close(self) -> None:
    """Ends the watch, and no other process."""
    self._process.kill()
    self._process.wait()


def _guard(owner: int) -> None:
  """Waits for the end of a process and kills what it has left behind.

  Who was started by whom can't be told any more by then: processes whose parent
  has ended are given to another. So it is noted while the owner lives.
  """
  gone = threading.Event()
  when_gone(owner, gone.set)
  known: dict[int, int] = {}  # ids, and times of birth
  ended = False
  while not ended:
    ended = gone.wait(_GLANCE_SECONDS)
    families = _families()
    # Of those that have ended the id may be another's by now.
    known = {
      pid: born
      for pid, born in known.items()
      if families.get(pid, (0, 0))[1] == born
    }
    above = [*known] if ended else [owner, *known]
    for pid in above:
      for child, (parent, born) in families.items():
        if parent == pid and child not in known:
          known[child] = born
          above.append(child)
  for pid in known.keys() - {os.getpid()}:
    with contextlib.suppress(OSError):
      os.kill(pid, signal.SIGKILL)


def _families() -> dict[int, tuple[int, int]]:
  """Returns every process's parent and time of birth, as far as Linux tells."""
  found = {}
  for stat in Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):
      # Behind the name, which may hold anything: the state, then numbers.
      told = stat.read_bytes().rpartition(b")")[2].split()
      found[int(stat.parent.name)] = int(told[1]), int(told[19])
  return found


def _by_descriptor(pid: int) -> None:
  """Waits for the kernel's word, which an unreaped process gives too."""
  try:
    descriptor = os.pidfd_open(pid)
  except ProcessLookupError:
    return
  except OSError:  # an older kernel, or a sandbox, has no such call
    _by_looking(pid)
    return
  poll = select.poll()
  poll.register(descriptor, select.POLLIN)
  poll.poll()
  os.close(descriptor)


def _by_looking(pid: int) -> None:
  """Looks now and then, where a process has no descriptor."""
  while True:
    try:
      os.kill(pid, 0)
    except ProcessLookupError:
      return
    except PermissionError:
      pass  # another user's, and there
    time.sleep(_LOOK_SECONDS)


if __name__ == "__main__":
  _guard(int(sys.argv[1]))
