"""What was started does not outlive what started it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support import processes
from tests.support.processes import gone
from trd_jax.experiment.errors import Terminated
from trd_jax.experiment.processes import supervise

STAGE = """
import time
from trd_jax.experiment import cli
def run(experiment, run_dir, flags):
  print("at work", flush=True)
  time.sleep(60)
cli.main("rollout", run, "a stage that takes its time", standalone=True)
"""
PIPELINE = """
import os, subprocess, sys
from trd_jax.experiment.processes import supervise as parent
environment = os.environ | {parent.VARIABLE: str(os.getpid())}
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment)
print(child.pid, flush=True)
child.wait()
"""

# A stage that takes some time to tidy up, and what runs it.
TIDY = """
import time
from trd_jax.experiment import cli
def run(experiment, run_dir, flags):
  try:
    print("at work", flush=True)
    time.sleep(60)
  finally:
    time.sleep(1.5)
    print("tidied up", flush=True)
cli.main("rollout", run, "a stage that tidies up", standalone=True)
"""
RUN = """
import sys
from trd_jax.experiment.processes import supervise as parent
parent._TIDY_SECONDS = float(sys.argv[2])
try:
  parent.run([sys.executable, "-c", sys.argv[1]], patient=sys.argv[3] == "True")
except KeyboardInterrupt:
  print("interrupted too")
"""
# The same as a pipeline does it.
PIPE = """
import sys
from trd_jax.experiment import cli
from trd_jax.experiment.processes import supervise as parent
def run(experiment, run_dir, flags):
  sys.exit(parent.run([sys.executable, "-c", stage]))
stage = sys.argv.pop(1)
cli.main("pipeline", run, "runs a stage", standalone=True)
"""


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


def interrupted(
  stage, *, group=False, times=1, tidy_seconds=30.0, patient=False
):
  """What a stage and what runs it say, once it is interrupted at work."""
  process = subprocess.Popen(
    [sys.executable, "-c", RUN, stage, str(tidy_seconds), str(patient)],
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
def test_an_interrupted_stage_tidies_up_whoever_was_signalled(group):
  # As from a terminal, to both; and to the pipeline alone.
  out, err = interrupted(TIDY, group=group)
  assert out == "tidied up\ninterrupted too\n"
  assert err.splitlines() == [
    "trd-jax rollout: interrupted; the same command goes on where it stopped"
  ]


@pytest.mark.parametrize("patient", [True, False])
def test_a_stage_that_may_finish_has_its_own_time(patient):
  out, _ = interrupted(TIDY, tidy_seconds=0.5, patient=patient)
  assert ("tidied up" in out) == patient


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
from trd_jax.experiment.processes import supervise as parent
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with parent.terminable(), parent.deferred() as state:
  os.kill(os.getpid(), signal.SIGTERM)
  print(state.received)
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout == "None\n"


@pytest.mark.parametrize(
  ("number", "raised"),
  [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_second_signal_while_something_is_finished_ends_it_at_once(
  number, raised
):
  before = signal.getsignal(signal.SIGINT)
  with supervise.deferred() as state:
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)  # at once, by whichever: the same
    os.kill(os.getpid(), signal.SIGINT)
    assert state.received == number
    time.sleep(supervise._SAME_SECONDS + 0.1)
    with pytest.raises(KeyboardInterrupt) as caught:
      os.kill(os.getpid(), number)
    assert caught.type is raised
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
  assert signal.getsignal(signal.SIGINT) is before


# Where Python prints an exception and goes on, and where extensions in C++ fall
# over one: a signal that comes there is heard a moment later.
LOST = """
import gc, os, signal, sys, time
from trd_jax.experiment import cli
number = int(sys.argv.pop(1))
class Grave:
  def __del__(self):
    os.kill(os.getpid(), number)
    print("it went on", flush=True)
    time.sleep(0.2)
sent = []
def collected(phase, info):
  if sent:  # a collection at the end, when nobody listens any more
    return
  sent.append(number)
  os.kill(os.getpid(), number)
  print("it went on", flush=True)
def run(experiment, run_dir, flags):
  way = os.environ["WAY"]
  if way == "del":
    Grave()
  elif way == "collector":
    gc.callbacks.append(collected)
    gc.collect()
    gc.callbacks.remove(collected)
  else:
    import imported
  time.sleep(20)
  print("to its end", flush=True)
cli.main("rollout", run, "is told at a bad moment", standalone=True)
"""


@pytest.mark.parametrize("way", ["del", "collector", "import"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_not_lost_where_exceptions_are(way, number, tmp_path):
  (tmp_path / "imported.py").write_text(
    f"import os, time\nos.kill(os.getpid(), {int(number)})\n"
    "print('it went on', flush=True)\ntime.sleep(0.2)\n"
  )
  paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
  done = subprocess.run(
    [sys.executable, "-c", LOST, str(int(number))],
    env=os.environ | {"WAY": way, "PYTHONPATH": os.pathsep.join(paths)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 128 + number, done.stderr
  assert done.stdout == "it went on\n"
  (line,) = done.stderr.splitlines()
  assert line.startswith("trd-jax rollout: ")
