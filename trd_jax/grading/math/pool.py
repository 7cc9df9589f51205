"""Worker processes for the grader's algebra, each ended at a time limit.

The workers are plain child processes that speak JSON over pipes, not
`multiprocessing` ones: they import nothing of the caller's main module, so
that the pool works from a script, a notebook or a stage alike.

A pool of our own, because those that end a task at a time limit (pebble's
`ProcessPool`, billiard's `Pool`) are built on `multiprocessing`, whose workers
either fork a process that may have JAX's threads or import its main module
again, and because their limit is the wall clock's: on a busy machine that
makes a verdict depend on the load. Here the kernel counts processor time (see
`worker`), starting a worker is outside the limit, a worker that dies costs its
own question alone, and none starts before there is something to ask.
"""

import atexit
import collections
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trd_jax.experiment.errors import UserError
from trd_jax.grading.math import worker

MEMORY = 2 << 30  # bytes of address space a worker may take
_START = 120.0  # seconds that importing sympy may take on a loaded machine
_ROOT = str(Path(__file__).resolve().parents[3])

Answer = tuple[bool | None, str]
GAVE_UP: Answer = (None, "timeout")


class _Worker:
  """One child process and the question that it is busy with."""

  def __init__(self, timeout: float, memory: int):
    path = os.environ.get("PYTHONPATH")
    environment = os.environ | {
      "PYTHONPATH": _ROOT + (os.pathsep + path if path else ""),
      "PYTHONIOENCODING": "utf-8",
    }
    self.process = subprocess.Popen(
      [
        # Without -P, a `json.py` in the working directory would be imported
        # instead of the library's.
        *(sys.executable, "-P", "-m", "trd_jax.grading.math.worker"),
        *(str(timeout), str(memory)),
      ],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      env=environment,
      start_new_session=True,  # an interrupt is the parent's to handle
    )
    assert self.process.stdin is not None
    assert self.process.stdout is not None
    self.stdin, self.stdout = self.process.stdin, self.process.stdout
    # select() promises one read without waiting, and no more than that.
    os.set_blocking(self.stdout.fileno(), False)
    self.ready = False
    self.tag: Any = None
    self.busy = False
    self.deadline = time.monotonic() + _START
    self._buffer = b""

  def lines(self) -> list[dict] | None:
    """Reads the replies that have come in; None where the process has ended."""
    try:
      data = os.read(self.stdout.fileno(), 1 << 16)
    except BlockingIOError:
      return []
    if not data:
      return None
    # A read may end in the midst of a reply: the rest waits for the next.
    *lines, self._buffer = (self._buffer + data).split(b"\n")
    return [json.loads(line) for line in lines]

  def ask(self, tag: Any, question: tuple[str, str], timeout: float) -> bool:
    """Sends a question; False where the process is gone."""
    gold, answer = question
    line = json.dumps({"gold": gold, "answer": answer}) + "\n"
    try:
      self.stdin.write(line.encode())
      self.stdin.flush()
    except OSError:
      return False
    self.tag, self.busy = tag, True
    self.deadline = time.monotonic() + worker.WALL * timeout
    return True

  def kill(self) -> None:
    """Ends the process, whatever it is at, and waits for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
      # It leads a group of its own (start_new_session), so whatever a library
      # has started goes with it.
      os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()
    for stream in (self.stdin, self.stdout):
      with contextlib.suppress(OSError):
        stream.close()


class Pool:
  """Up to `workers` processes; they start when there is something to ask.

  Not thread-safe: callers take turns.

  Args:
    workers: how many processes at most.
    timeout: seconds of processor time a question may take; it may take three
      times that by the wall clock, on a machine too busy to give it more.
    memory: bytes of address space a process may take.
  """

  def __init__(self, workers: int, timeout: float, memory: int = MEMORY):
    self.workers, self.timeout, self.memory = workers, timeout, memory
    self._owner = os.getpid()
    self._alive: list[_Worker] = []
    self._queue: collections.deque[tuple[Any, tuple[str, str]]] = (
      collections.deque()
    )
    self._selector = selectors.DefaultSelector()
    atexit.register(self.close)

  @property
  def pending(self) -> int:
    """Counts the questions without an answer yet."""
    return len(self._queue) + sum(one.busy for one in self._alive)

  def pids(self) -> list[int]:
    """Returns the process ids of the living workers."""
    return [one.process.pid for one in self._alive]

  def submit(self, tag: Any, question: tuple[str, str]) -> None:
    """Queues a question; its answer comes out of `poll` with its tag."""
    self._queue.append((tag, question))
    self._feed()

  def _drop(self, one: _Worker) -> None:
    self._selector.unregister(one.stdout)
    self._alive.remove(one)
    one.kill()

  def _feed(self) -> None:
    """Gives queued questions to idle workers, starting some where needed."""
    for one in [w for w in self._alive if w.ready and not w.busy]:
      if not self._queue:
        return
      tag, question = self._queue.popleft()
      if not one.ask(tag, question, self.timeout):
        # It never began: not a time-out, and another worker gets it.
        self._queue.appendleft((tag, question))
        self._drop(one)
    # A worker costs about a second of importing sympy: no more are started than
    # there are questions that no starting one will take.
    starting = sum(not one.ready for one in self._alive)
    while len(self._alive) < self.workers and len(self._queue) > starting:
      one = _Worker(self.timeout, self.memory)
      self._alive.append(one)
      self._selector.register(one.stdout, selectors.EVENT_READ, one)
      starting += 1

  def poll(self, wait: float = 0.0) -> list[tuple[Any, Answer]]:
    """Collects answers that have come in, after at most `wait` seconds.

    Raises:
      UserError: a worker could not start.
    """
    done: list[tuple[Any, Answer]] = []
    deadlines = [one.deadline for one in self._alive if self._waits(one)]
    if deadlines:
      # Wakes for the first deadline, so that a stuck worker is not waited for
      # longer than it has.
      wait = max(0.0, min(wait, min(deadlines) - time.monotonic()))
      for key, _ in self._selector.select(wait):
        done += self._receive(key.data)
    now = time.monotonic()
    for one in [w for w in self._alive if self._waits(w)]:
      if now > one.deadline:
        if not one.ready:
          self.close()
          raise UserError(
            f"grading: a worker did not start within {_START:.0f} s; is the"
            " machine overloaded?"
          )
        done.append((one.tag, GAVE_UP))
        self._drop(one)
    self._feed()
    return done

  @staticmethod
  def _waits(one: _Worker) -> bool:
    return one.busy or not one.ready

  def _receive(self, one: _Worker) -> list[tuple[Any, Answer]]:
    replies = one.lines()
    # The pipe is closed: the kernel ended the worker at its time limit, or it
    # ran out of memory. One that ends while it starts did neither, and starting
    # another would go on for ever.
    if replies is None:
      tag, busy, ready = one.tag, one.busy, one.ready
      self._drop(one)
      if not ready:
        self.close()
        raise UserError(
          "grading: a worker ended while starting; try"
          f" '{sys.executable} -m trd_jax.grading.math.worker 5 {self.memory}'"
        )
      return [(tag, GAVE_UP)] if busy else []
    done = []
    for reply in replies:
      if "error" in reply:
        self.close()
        raise UserError(
          f"grading: {reply['error']}; run 'pip install math-verify'"
        )
      if "ready" in reply:
        one.ready, one.deadline = True, 0.0
        continue
      one.busy = False
      done.append((one.tag, (reply["correct"], reply["reason"])))
    return done

  def forget(self, mine: Callable[[Any], bool]) -> None:
    """Drops the questions whose tags are `mine`; ends workers at one of them.

    A worker can't be told to leave off: its successor starts when needed.
    """
    kept = [item for item in self._queue if not mine(item[0])]
    self._queue = collections.deque(kept)
    for one in [w for w in self._alive if w.busy and mine(w.tag)]:
      self._drop(one)
    self._feed()

  def close(self) -> None:
    """Ends all workers and forgets what was queued; may be used again."""
    self._queue.clear()
    if os.getpid() != self._owner:
      self._alive.clear()  # a fork's copies: not ours to end
      return
    for one in list(self._alive):
      self._drop(one)
