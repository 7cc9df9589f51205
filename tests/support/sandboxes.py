"""Where tests need bubblewrap, and what it may not leave behind."""

import os
import shutil

import pytest

from trd_jax.grading.sandbox import sandbox

_missing = shutil.which("bwrap") is None
if _missing and os.environ.get("TRD_REQUIRE_SANDBOX"):
  raise RuntimeError("TRD_REQUIRE_SANDBOX is set and there is no bwrap")
# What a file's `pytestmark` is, of which all tests need it.
NEEDED = [
  pytest.mark.sandbox,
  pytest.mark.skipif(
    _missing, reason="bubblewrap is not installed: apt-get install bubblewrap"
  ),
]


def needed(test):
  """Marks a test that needs bubblewrap."""
  for mark in NEEDED:
    test = mark(test)
  return test


def processes() -> list[int]:
  """Living processes of the sandboxes that this process has opened."""
  mine = set(sandbox._free_users)
  own = os.readlink("/proc/self/ns/pid")
  found = []
  for name in filter(str.isdigit, os.listdir("/proc")):
    try:
      with open(f"/proc/{name}/status") as file:
        user = int(file.read().split("\nUid:")[1].split()[0])
      with open(f"/proc/{name}/stat") as file:
        state = file.read().rpartition(")")[2].split()[0]
      if state in "ZX":
        continue
      if os.geteuid() == 0:
        left = user in mine
      else:
        left = user == os.geteuid()
        left = left and os.readlink(f"/proc/{name}/ns/pid") != own
    except OSError:  # it has ended
      continue
    if left:
      found.append(int(name))
  return found
