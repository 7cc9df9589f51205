"""Ends what a process has left running when the process itself is gone.

A killed process can't tidy up, and the programs that it has started may not be
ours, such as vLLM's processes, which hold a GPU's memory. A `Guard` watches the
process and ends what is left of it. Run as a script, with a process's id, this
file is such a guard: it needs nothing but Python's own library.
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
    pid: a process, which may have ended already. Below 1, which `kill` takes
      for groups of processes, nothing is watched.
    do: what is to be done; it must not take long.
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

  The guard is a process of its own, so that it outlives a SIGKILL of this one.
  The programs that it ends need not know of it. Without a /proc it does
  nothing.
  """

  def __init__(self) -> None:
    self._process = subprocess.Popen(
      # Isolated and without site-packages, so that it starts at once.
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

  By then nobody can tell who was started by whom, for a process whose parent
  has ended is given to another parent. So that is noted while the owner lives.
  """
  gone = threading.Event()
  when_gone(owner, gone.set)
  known: dict[int, int] = {}  # ids, and times of birth
  ended = False
  while not ended:
    ended = gone.wait(_GLANCE_SECONDS)
    families = _families()
    # The id of a process that has ended may be another's by now; the time of
    # birth tells them apart.
    known = {
      pid: born
      for pid, born in known.items()
      if families.get(pid, (0, 0))[1] == born
    }
    # After its end the owner's id may be another's, too.
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
  processes = {}
  for stat in Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):
      # The name, in brackets, may hold anything, brackets too: so the last
      # bracket counts. Behind it stand the state and numbers.
      fields = stat.read_bytes().rpartition(b")")[2].split()
      processes[int(stat.parent.name)] = int(fields[1]), int(fields[19])
  return processes


def _by_descriptor(pid: int) -> None:
  """Waits by a descriptor, which also tells of a process that is unreaped."""
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
  """Waits by looking now and then, where a process has no descriptor."""
  while True:
    try:
      os.kill(pid, 0)
    except ProcessLookupError:
      return
    except PermissionError:
      pass  # the process is there, and another user's
    time.sleep(_LOOK_SECONDS)


if __name__ == "__main__":
  _guard(int(sys.argv[1]))
