"""Ends a stage and the pipeline that runs it in order, and together.

A stage that is interrupted or terminated tidies up first. A pipeline passes
such a signal on to its stage, and a stage ends when its pipeline is gone.
"""

import contextlib
import gc
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from trd_jax.experiment.errors import Terminated
from trd_jax.experiment.processes.guard import when_gone

VARIABLE = "TRD_JAX_PIPELINE"
"""Environment variable: id of the pipeline, or of the connection to another
machine, that a stage belongs to."""

_TIDY_SECONDS = 30.0  # what a stage may take to write what it has and to end
_SAME_SECONDS = 2.0  # two interrupts within them are one that came twice
_AGAIN_SECONDS = 0.05  # until a signal that came at a bad moment comes again


def end_with_pipeline() -> None:
  """Interrupts this process when the pipeline that started it is gone."""
  pipeline = os.environ.get(VARIABLE)
  if pipeline:
    # A shell starts background jobs with interrupts ignored: for them SIGTERM.
    deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    end = signal.SIGTERM if deaf else signal.SIGINT
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
      # A terminal's interrupt reaches this process and the pipeline, whose end
      # then sends another one. Close together they count once.
      signal.signal(signal.SIGINT, _once(signal.default_int_handler))
    when_gone(int(pipeline), lambda: os.kill(os.getpid(), end))


class Deferred:
  """The state that `deferred` yields.

  Attributes:
    received: the signal that has come first; None: none has.
  """

  received: signal.Signals | None = None


@contextlib.contextmanager
def terminable() -> Iterator[None]:
  """Makes SIGTERM raise `Terminated` in the block, in the main thread.

  An interrupt goes on raising `KeyboardInterrupt`. Neither is lost in places
  where Python prints an exception and goes on (`_is_deaf`). A signal that comes
  twice within two seconds counts once: whoever ends a whole job sends it to a
  pipeline and to its stage, and the pipeline passes it on. A process that was
  started to ignore a signal goes on ignoring it.
  """

  def terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated

  interrupt = signal.default_int_handler
  with contextlib.ExitStack() as stack:
    if signal.getsignal(signal.SIGINT) is interrupt:
      stack.enter_context(_handling(signal.SIGINT, _once(interrupt)))
    stack.enter_context(_handling(signal.SIGTERM, _once(terminate)))
    yield


@contextlib.contextmanager
def deferred() -> Iterator[Deferred]:
  """Makes SIGTERM and Ctrl-C in the block only note that they have come.

  A second one that comes later raises `Terminated` or `KeyboardInterrupt` at
  once. Both together count once, as a script sends them that passes a Ctrl-C
  on as SIGTERM.
  """
  state = Deferred()

  def note(number: int, frame: FrameType | None) -> None:
    if state.received is None:
      state.received = signal.Signals(number)
    elif number == signal.SIGTERM:
      raise Terminated
    else:
      raise KeyboardInterrupt

  once = _once(note)
  with _handling(signal.SIGTERM, once), _handling(signal.SIGINT, once):
    yield state


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
  """Undoes what a library in the block does to the handling of SIGTERM."""
  before = signal.getsignal(signal.SIGTERM)
  try:
    yield
  finally:
    # Python sets handlers in the main thread only; elsewhere the library can't
    # have changed them either.
    if threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextlib.contextmanager
def _handling(
  number: int, handler: Callable[[int, FrameType | None], object]
) -> Iterator[None]:
  """Sets a signal's handler in the block, where that can be done.

  That is in the main thread, and not where the signal is ignored.
  """
  before = signal.getsignal(number)
  main = threading.current_thread() is threading.main_thread()
  if before is signal.SIG_IGN or not main:
    yield
    return
  signal.signal(number, handler)
  try:
    yield
  finally:
    signal.signal(number, before or signal.SIG_DFL)


def _once(
  handler: Callable[[int, FrameType | None], object],
) -> Callable[[int, FrameType | None], None]:
  """Returns a handler that counts a signal that comes twice at once as one.

  Otherwise the second, which a pipeline passes on, would interrupt the tidying
  up that the first has begun.
  """
  last = float("-inf")

  def handle(number: int, frame: FrameType | None) -> None:
    nonlocal last
    if _is_deaf(frame):
      # Not raised here, where the exception would be lost, and not dropped:
      # sent to this process once more a moment later.
      again = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number))
      again.daemon = True
      again.start()
      return
    now = time.monotonic()
    if now - last > _SAME_SECONDS:
      last = now
      handler(number, frame)

  return handle


def _is_deaf(frame: FrameType | None) -> bool:
  """Returns whether an exception raised in a frame would be lost or do harm.

  Python prints an exception in what the garbage collector calls, and goes on.
  During an import it may hit the start of an extension written in C++, which
  aborts the process.
  """
  names = {"__del__", *(getattr(each, "__name__", "") for each in gc.callbacks)}
  while frame is not None:
    code = frame.f_code
    if code.co_name in names or code.co_filename.startswith(
      "<frozen importlib"
    ):
      return True
    frame = frame.f_back
  return False


def run(command: Sequence[str], patient: bool = False) -> int:
  """Runs a stage or a pipeline that ends with this process.

  Args:
    command: the program and its arguments.
    patient: whether an interrupt, too, leaves the other one its own time: a
      training has an update to finish and to save, and a pipeline limits the
      time of its other stages itself.

  Returns:
    Its exit code as a shell gives it: 128 plus the number of the signal that
    ended it.

  Raises:
    KeyboardInterrupt: this process was interrupted. So was the other one, which
      has had half a minute to tidy up, or its own time where this is `patient`;
      a second interrupt cuts that short.
    Terminated: this process had a SIGTERM. The other one has had it too, and
      has ended in its own time: a training has an update to finish and to save.
      Whoever finds that too long sends another signal.
  """
  environment = os.environ | {VARIABLE: str(os.getpid())}
  process = subprocess.Popen(command, env=environment)
  try:
    code = process.wait()
  except KeyboardInterrupt as error:
    # A terminal sends it to both, `kill` perhaps to this one only. The other
    # counts it once (`_once`), so it is passed on in any case.
    terminated = isinstance(error, Terminated)
    process.send_signal(signal.SIGTERM if terminated else signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(None if terminated or patient else _TIDY_SECONDS)
    raise
  finally:
    # Whatever happens here, the stage must not go on without its pipeline.
    process.kill()
  return code if code >= 0 else 128 - code
