"""What processes a process has started, through /proc."""

import os
import time


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
