"""What was started does not outlive what started it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from trd_jax import parent

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


def test_a_process_that_is_long_gone_counts_as_gone():
  process = subprocess.Popen([sys.executable, "-c", ""])
  process.wait()
  noticed = threading.Event()
  parent.when_gone(process.pid, noticed.set)
  assert noticed.wait(20)
