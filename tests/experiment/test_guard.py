"""What was started does not outlive what started it, and nothing else ends."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.support.processes import gone
from trd_jax.experiment.processes import guard

# An owner under a guard, what it starts, and what that starts; each says its
# role and id. One that is "brief" ends before the owner does.
OWNER = """
import os, subprocess, sys, time
from trd_jax.experiment.processes.guard import Guard
role, *below = sys.argv[1].split(",")
if role == "owner":
  guard = Guard()
  print("guard", guard._process.pid, flush=True)
print(role, os.getpid(), flush=True)
if below:
  child = subprocess.Popen([sys.executable, sys.argv[0], ",".join(below)])
if role == "brief":
  time.sleep(2)
  sys.exit()
if role == "owner":
  for line in sys.stdin:
    guard.close()
    print("closed", os.getpid(), flush=True)
time.sleep(60)
"""
# Takes up what its descendants leave behind, as a user's or a job's manager.
SUBREAPER = """
import ctypes, os, signal, subprocess, sys
PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
subprocess.Popen([sys.executable, *sys.argv[1:]])
while True:
  signal.pause()
"""


@pytest.mark.parametrize(
  ("wait", "reaped"),
  [
    (guard._by_descriptor, False),
    (guard._by_descriptor, True),
    (guard._by_looking, True),
  ],
)
def test_the_end_of_a_process_is_noticed_and_not_before(
  wait, reaped, monkeypatch
):
  monkeypatch.setattr(guard, "_LOOK_SECONDS", 0.05)
  process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
  watching = threading.Thread(target=wait, args=[process.pid])
  watching.start()
  watching.join(0.5)
  assert watching.is_alive()
  process.kill()
  if reaped:
    process.communicate()
  watching.join(20)
  assert not watching.is_alive()
  process.communicate()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_where_the_kernel_gives_no_descriptor_processes_are_looked_at(
  code, monkeypatch
):
  def refused(pid):
    raise OSError(code, os.strerror(code))

  monkeypatch.setattr(os, "pidfd_open", refused)
  test_the_end_of_a_process_is_noticed_and_not_before(
    guard._by_descriptor, True, monkeypatch
  )


def test_another_users_process_is_there(monkeypatch):
  answers = iter([PermissionError, PermissionError, ProcessLookupError])

  def kill(pid, number):
    raise next(answers)

  monkeypatch.setattr(guard, "_LOOK_SECONDS", 0.0)
  monkeypatch.setattr(os, "kill", kill)
  guard._by_looking(1)
  assert next(answers, None) is None


@pytest.mark.parametrize("pid", [0, -1])
def test_what_is_no_process_is_not_watched(pid):
  before = threading.enumerate()
  noticed = threading.Event()
  guard.when_gone(pid, noticed.set)
  assert not noticed.wait(0.2)
  assert threading.enumerate() == before


def test_a_process_that_is_long_gone_counts_as_gone():
  process = subprocess.Popen([sys.executable, "-c", ""])
  process.wait()
  noticed = threading.Event()
  guard.when_gone(process.pid, noticed.set)
  assert noticed.wait(20)


@pytest.mark.slow
@pytest.mark.parametrize(
  "family", ["owner,worker", "owner,between,worker", "owner,brief,worker"]
)
@pytest.mark.parametrize("closed", [False, True])
def test_a_guard_ends_what_was_started_and_no_stranger(
  family, closed, tmp_path
):
  script = tmp_path / "owner.py"
  script.write_text(OWNER)
  # Whose parent has ended goes to the reaper, as any stranger's children do.
  reaper = subprocess.Popen(
    [sys.executable, "-c", SUBREAPER, script, family],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert reaper.stdin is not None
  assert reaper.stdout is not None
  roles = ["guard", *family.split(",")]
  pids = {}
  try:
    while len(pids) < len(roles):
      role, pid = reaper.stdout.readline().split()
      pids[role] = int(pid)
    time.sleep(1.0)  # the guard has looked, twice
    if "brief" in pids:
      assert gone(pids["brief"])
      assert not gone(pids["worker"], 0.5)
    if closed:
      reaper.stdin.write("close\n")
      reaper.stdin.flush()
      assert reaper.stdout.readline().startswith("closed")
      assert gone(pids["guard"])
    os.kill(pids["owner"], signal.SIGKILL)
    if closed:
      assert not gone(pids["worker"], 2.0)
    else:
      assert [role for role, pid in pids.items() if not gone(pid)] == []
    assert reaper.poll() is None
  finally:
    for pid in pids.values():
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    reaper.kill()
    reaper.communicate()
