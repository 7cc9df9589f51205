"""Sends inputs through doors, and counts what becomes of them."""

import dataclasses
import signal
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import hypothesis

from tests.fuzz.doors import Door

SECONDS = 5.0  # that a door may take over one input


class Hang(BaseException):
  """A door has taken too long over an input."""


@dataclasses.dataclass
class Count:
  """What has become of a door's inputs.

  Attributes:
    refused: inputs that were refused, with a reason.
    accepted: inputs that were read.
    slowest: the longest that one has taken, in seconds of processor time.
    faults: tracebacks, hangs and broken assertions, by where they came from:
      the input and the traceback of the first.
  """

  refused: int = 0
  accepted: int = 0
  slowest: float = 0.0
  faults: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
  failed: int = 0

  @property
  def inputs(self) -> int:
    """How many there have been."""
    return self.refused + self.accepted + self.failed


def enter(door: Door, value: Any) -> bool:
  """Sends one input through a door; whether it was accepted.

  Raises:
    Hang: it took too long.
    BaseException: whatever else than its refusals the door raises.
  """

  def ring(*_):
    raise Hang(f"more than {SECONDS:g} s")

  former = signal.signal(signal.SIGPROF, ring)
  # By processor time, of this process: others keep the machine busy.
  signal.setitimer(signal.ITIMER_PROF, SECONDS)
  try:
    with tempfile.TemporaryDirectory() as folder:
      door.enter(value, Path(folder))
    return True
  except door.refusals as error:
    if not str(error).strip():
      raise AssertionError("refused without a word") from error
    return False
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, former)


def send(
  door: Door, examples: int, *, seed: int | None = None, stop: bool = False
) -> Count:
  """Sends inputs through a door.

  Args:
    door: the door.
    examples: how many of its strategy's, besides those it once failed at.
    seed: of the inputs; None: always the same ones.
    stop: whether the first fault is raised, with the smallest input that has
      it.
  """
  count = Count()

  def one(value):
    began = time.process_time()
    try:
      if enter(door, value):
        count.accepted += 1
      else:
        count.refused += 1
    except (KeyboardInterrupt, hypothesis.errors.StopTest):
      raise
    except BaseException as error:
      if stop:
        raise
      count.failed += 1
      frames = traceback.extract_tb(error.__traceback__)
      ours = [f for f in frames if "trd_jax" in f.filename] or frames
      where = f"{type(error).__name__} at {ours[-1].filename}:{ours[-1].lineno}"
      if where not in count.faults:
        text = "".join(traceback.format_exception(error))
        count.faults[where] = repr(value)[:2000], text
    count.slowest = max(count.slowest, time.process_time() - began)

  for value in door.found:
    one(value)
  inputs = hypothesis.given(door.inputs)(one)
  inputs = hypothesis.settings(
    max_examples=examples,
    deadline=None,
    database=None,
    derandomize=seed is None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
  )(inputs)
  if seed is not None:
    inputs = hypothesis.seed(seed)(inputs)
  inputs()
  return count
