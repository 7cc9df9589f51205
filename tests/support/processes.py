"""What processes a process has started, through /proc."""

import contextlib
import os
import re
import signal
import time

SHOWS_STACKS = """
import faulthandler, signal
faulthandler.register(signal.SIGUSR1, all_threads=True)
"""
"""For a `sitecustomize.py`: a process writes its stacks on SIGUSR1."""


def parents() -> dict[int, int]:
  """Every living process with its parent."""
  found = {}
  for folder in os.listdir("/proc"):
    if folder.isdigit():
      try:
        with open(f"/proc/{folder}/stat") as file:
          # The name stands in brackets and may hold any.
          state, parent = file.read().rpartition(")")[2].split()[:2]
      except OSError:  # It has ended.
        continue
      if state not in "ZX":
        found[int(folder)] = int(parent)
  return found


def below(pid: int) -> list[int]:
  """A process's children, theirs, and so on."""
  all_parents = parents()
  found = [pid]
  for each in found:
    found += [child for child, its in all_parents.items() if its == each]
  return found[1:]


def title(pid: int) -> str:
  """What a process calls itself; '' once it has ended."""
  try:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
      return file.read().replace(b"\0", b" ").decode(errors="replace").strip()
  except OSError:
    return ""


def still_there(pids: list[int], seconds: float) -> list[int]:
  """Those of some processes that have not ended after so long."""
  deadline = time.monotonic() + seconds
  while True:
    living = [pid for pid in pids if pid in parents()]
    if not living or time.monotonic() > deadline:
      return living
    time.sleep(0.1)


def gone(pid: int, seconds: float = 20.0) -> bool:
  """Whether a process ends within so many seconds."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    try:
      with open(f"/proc/{pid}/stat") as file:
        if file.read().rpartition(")")[2].split()[0] == "Z":
          return True
    except FileNotFoundError:
      return True
    time.sleep(0.05)
  return False


def stuck(pid: int, seconds: float = 10.0) -> str:
  """What a process and those below it are at, for a test that gives up on them.

  Those that ran `SHOWS_STACKS` are asked for their stacks, which they write to
  their stderr within `seconds`.

  Returns:
    a line a process: id, state, CPU-seconds, what it waits for in the kernel.
  """
  found = []
  for each in [pid, *below(pid)]:
    with contextlib.suppress(OSError):
      with open(f"/proc/{each}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
      with open(f"/proc/{each}/wchan") as file:
        waits = file.read()
      ran = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
      name = title(each)
      found.append(f"{each} {fields[0]} {ran:.1f} s {waits} {name[:100]}")
      with open(f"/proc/{each}/status") as file:
        caught = re.search(r"^SigCgt:\s*(\w+)", file.read(), re.MULTILINE)
      # Whom the signal would end isn't asked.
      if caught and int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1:
        os.kill(each, signal.SIGUSR1)
  time.sleep(seconds)
  return "\n".join(found)
