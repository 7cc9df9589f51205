"""What was started does not outlive what started it."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import processes
import pytest

from trd_jax import parent
from trd_jax.errors import Terminated

STAGE = """
import time
from trd_jax import cli
def run(experiment, run_dir, flags):
  print("at work", flush=True)
  time.sleep(60)
cli.main("rollout", run, "a stage that takes its time", standalone=True)
"""
PIPELINE = """
import os, subprocess, sys
from trd_jax import parent
environment = os.environ | {parent.VARIABLE: str(os.getpid())}
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment)
print(child.pid, flush=True)
child.wait()
"""

# A stage that takes some time to tidy up, and what runs it.
TIDY = """
import time
from trd_jax import cli
def run(experiment, run_dir, flags):
  print("at work", flush=True)
  try:
    time.sleep(60)
  finally:
    time.sleep(1.5)
    print("tidied up", flush=True)
cli.main("rollout", run, "a stage that tidies up", standalone=True)
"""
RUN = """
import sys
from trd_jax import parent
parent._TIDY_SECONDS = float(sys.argv[2])
try:
  parent.run([sys.executable, "-c", sys.argv[1]])
except KeyboardInterrupt:
  print("interrupted too")
"""
# The same as a pipeline does it.
PIPE = """
import sys
from trd_jax import cli, parent
def run(experiment, run_dir, flags):
  sys.exit(parent.run([sys.executable, "-c", stage]))
stage = sys.argv.pop(1)
cli.main("pipeline", run, "runs a stage", standalone=True)
"""
# An owner, with or without a process between it and its worker.
OWNER = """
import os, subprocess, sys, time
from trd_jax import parent
role, *below = sys.argv[1].split(",")
owner = sys.argv[2] if len(sys.argv) > 2 else str(os.getpid())
if below:
  subprocess.Popen([sys.executable, sys.argv[0], ",".join(below), owner])
else:
  if role == "late":  # the owner is gone before the worker watches it
    print(role, os.getpid(), flush=True)
    while os.getppid() == int(owner):
      time.sleep(0.01)
  parent.end_with_owner(int(owner))
print(role, os.getpid(), flush=True)
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


def test_a_stage_is_interrupted_when_its_pipeline_is_killed():
  pipeline = subprocess.Popen(
    [sys.executable, "-c", PIPELINE, STAGE],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert pipeline.stdout is not None
  stage = int(pipeline.stdout.readline())
  assert pipeline.stdout.readline() == "at work\n"
  assert not gone(stage, 0.5)
  os.kill(pipeline.pid, signal.SIGKILL)
  assert gone(stage)
  told = pipeline.communicate()[1]
  assert "interrupted" in told


@pytest.mark.parametrize(
  ("wait", "reaped"),
  [
    (parent._by_descriptor, False),
    (parent._by_descriptor, True),
    (parent._by_looking, True),
  ],
)
def test_the_end_of_a_process_is_noticed_and_not_before(
  wait, reaped, monkeypatch
):
  monkeypatch.setattr(parent, "_LOOK_SECONDS", 0.05)
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
    parent._by_descriptor, True, monkeypatch
  )


def test_another_users_process_is_there(monkeypatch):
  answers = iter([PermissionError, PermissionError, ProcessLookupError])

  def kill(pid, number):
    raise next(answers)

  monkeypatch.setattr(parent, "_LOOK_SECONDS", 0.0)
  monkeypatch.setattr(os, "kill", kill)
  parent._by_looking(1)
  assert next(answers, None) is None


@pytest.mark.parametrize("pid", [0, -1])
def test_what_is_no_process_is_not_watched(pid):
  before = threading.enumerate()
  noticed = threading.Event()
  parent.when_gone(pid, noticed.set)
  assert not noticed.wait(0.2)
  assert threading.enumerate() == before


def test_a_process_that_is_long_gone_counts_as_gone():
  process = subprocess.Popen([sys.executable, "-c", ""])
  process.wait()
  noticed = threading.Event()
  parent.when_gone(process.pid, noticed.set)
  assert noticed.wait(20)


@pytest.mark.parametrize(
  "family", ["owner,worker", "owner,between,worker", "owner,late"]
)
def test_a_worker_ends_with_its_owner_and_takes_no_stranger_along(
  family, tmp_path
):
  script = tmp_path / "owner.py"
  script.write_text(OWNER)
  reaper = subprocess.Popen(
    [sys.executable, "-c", SUBREAPER, script, family],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert reaper.stdout is not None
  roles = family.split(",")
  pids = {}
  try:
    while len(pids) < len(roles):
      role, pid = reaper.stdout.readline().split()
      pids[role] = int(pid)
    os.kill(pids["owner"], signal.SIGKILL)
    assert [role for role, pid in pids.items() if not gone(pid)] == []
    assert reaper.poll() is None
  finally:
    for pid in pids.values():
      if not gone(pid, 0):
        os.kill(pid, signal.SIGKILL)
    reaper.kill()
    reaper.communicate()


def test_a_worker_ends_though_the_process_above_it_may_not_be_ended(
  monkeypatch,
):
  owner, asked = os.getppid(), []

  def kill(pid, number):
    asked.append(pid)
    if pid != os.getpid():
      raise PermissionError

  monkeypatch.setattr(parent, "when_gone", lambda pid, do: do())
  monkeypatch.setattr(parent, "_ancestors", lambda pid: iter([owner]))
  monkeypatch.setattr(os, "kill", kill)
  parent.end_with_owner(owner)
  assert asked == [os.getppid(), os.getpid()]


def interrupted(stage, *, group=False, times=1, tidy_seconds=30.0):
  """What a stage and what runs it say, once it is interrupted at work."""
  process = subprocess.Popen(
    [sys.executable, "-c", RUN, stage, str(tidy_seconds)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  assert process.stdout is not None
  assert process.stdout.readline() == "at work\n"
  for _ in range(times):
    time.sleep(0.5)
    if group:
      os.killpg(process.pid, signal.SIGINT)
    else:
      process.send_signal(signal.SIGINT)
  return process.communicate(timeout=30)


@pytest.mark.parametrize("group", [True, False])
def test_an_interrupted_stage_tidies_up_whoever_was_told(group):
  # As from a terminal, to both; and to the pipeline alone.
  out, err = interrupted(TIDY, group=group)
  assert out == "tidied up\ninterrupted too\n"
  assert err.splitlines() == [
    "trd-jax rollout: interrupted; the same command goes on where it stopped"
  ]


@pytest.mark.parametrize(
  ("times", "tidy_seconds"), [(1, 0.5), (2, 30.0)], ids=["time", "impatience"]
)
def test_a_stage_that_does_not_end_is_ended(times, tidy_seconds):
  deaf = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("at work", flush=True)
time.sleep(60)
print("slept", flush=True)
"""
  began = time.monotonic()
  out, _ = interrupted(deaf, times=times, tidy_seconds=tidy_seconds)
  assert out == "interrupted too\n"
  assert time.monotonic() - began < 20


def terminated(*command, group=False, whom=None, times=1):
  """Exit code and words of what is terminated at work."""
  process = subprocess.Popen(
    [sys.executable, "-c", *command],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  assert process.stdout is not None
  assert process.stdout.readline() == "at work\n"
  for _ in range(times):
    if group:
      os.killpg(process.pid, signal.SIGTERM)
    else:
      os.kill(process.pid if whom is None else whom(process), signal.SIGTERM)
    time.sleep(0.3)
  out, err = process.communicate(timeout=30)
  return process.returncode, out, err.splitlines()


ENDED = "trd-jax {}: terminated; the same command goes on where it stopped"


@pytest.mark.parametrize("times", [1, 2])  # at once: one that came twice
def test_a_terminated_stage_tidies_up_and_says_a_line(times):
  code, out, err = terminated(TIDY, times=times)
  assert (code, out) == (143, "tidied up\n")
  assert err == [ENDED.format("rollout")]


@pytest.mark.parametrize("group", [True, False])
def test_a_terminated_pipeline_passes_it_on_and_waits(group):
  # As Slurm sends it, to all; and as a person does, to the pipeline alone.
  code, out, err = terminated(PIPE, TIDY, group=group)
  assert (code, out) == (143, "tidied up\n")
  assert err == [ENDED.format("rollout"), ENDED.format("pipeline")]


def test_a_pipeline_ends_with_its_terminated_stage():
  def stage(process):
    return processes.below(process.pid)[0]

  code, out, err = terminated(PIPE, TIDY, whom=stage)
  assert (code, out, err) == (143, "tidied up\n", [ENDED.format("rollout")])


def test_what_was_started_to_ignore_the_signal_goes_on():
  code = """
import os, signal
from trd_jax import parent
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with parent.terminable(), parent.deferred() as state:
  os.kill(os.getpid(), signal.SIGTERM)
  print(state.asked)
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout == "False\n"


def test_a_second_signal_while_something_is_finished_ends_it_at_once():
  with parent.deferred() as state:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # at once: the same
    assert state.asked
    time.sleep(parent._SAME_SECONDS + 0.1)
    with pytest.raises(Terminated):
      os.kill(os.getpid(), signal.SIGTERM)
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
