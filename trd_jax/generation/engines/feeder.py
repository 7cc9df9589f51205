"""Feeds an engine with requests, and hands over completions, in bursts.

Requests run as coroutines on the thread of an event loop; another thread reads
their completions. On a computer that decodes with all its processors, each
message between threads or processes takes a processor away from decoding. To
wake the reader for every completion, or to send one request for every one that
ends, costs more than reading and sending. So both go some at a time.
"""

import asyncio
import itertools
import queue
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from trd_jax.generation.engines.engine import Completion, Request, longest_first

# All three for each sequence that the engine decodes at once. `_MOST`: requests
# that the engine has at most. `_REFILL`: when it has no more than these, others
# are begun; over 1, so that the next is there when one ends. `_BEGUN`: requests
# begun whose completion the reader hasn't taken, at most, so that a slow reader
# isn't buried.
_MOST, _REFILL, _BEGUN = 3, 2, 4
_HAND_SECONDS = 0.1  # the longest that a completion waits for others


class Feeder:
  """One pass of requests through an engine; a reader takes what they become.

  Args:
    requests: what to complete; those with the longest prompts are begun first.
    complete: completes one request.
    sequences: how many sequences the engine decodes at once.
  """

  def __init__(
    self,
    requests: Sequence[Request],
    complete: Callable[[Request], Coroutine[Any, Any, Completion]],
    sequences: int,
  ):
    self._waiting = iter(longest_first(requests))
    self._count = len(requests)
    self._left = self._count  # not finished
    self._complete = complete
    self._sequences = sequences
    self._working: set[asyncio.Task[Completion]] = set()
    self._held: list[Completion] = []
    self._untaken = 0  # finished, held or on their way to the reader
    self._timer: asyncio.TimerHandle | None = None
    self._found: queue.SimpleQueue[list[Completion] | Exception]
    self._found = queue.SimpleQueue()

  async def run(self) -> None:
    """Runs until all requests are complete, one fails, or it is cancelled.

    The reader learns of each of these, after it has what was finished before.
    On return the engine works on none of the requests any more.
    """
    self._loop = asyncio.get_running_loop()
    self._ended: asyncio.Future[None] = self._loop.create_future()
    try:
      self._begin()
      await self._ended
    except asyncio.CancelledError:
      self._tell(RuntimeError("it was closed"))  # a reader in another thread
      raise
    except Exception as error:
      self._tell(error)
    finally:
      # Waited for, not just cancelled: a call that follows would otherwise
      # share the engine with requests that nobody reads.
      left = list(self._working)
      for task in left:
        task.cancel()
      await asyncio.gather(*left, return_exceptions=True)

  def read(self) -> Iterator[Completion]:
    """Yields completions as they are handed over, in the reader's thread.

    Raises:
      Exception: what a request raised, or that `run` was cancelled.
    """
    left = self._count
    while left:
      some = self._found.get()
      if isinstance(some, Exception):
        raise some
      left -= len(some)
      # The counts belong to the loop's thread, so they need no lock.
      self._loop.call_soon_threadsafe(self._taken, len(some))
      yield from some

  # All below runs on the event loop's thread.

  def _begin(self) -> None:
    """Begins requests when the engine has few; ends when none is left."""
    if not self._left and not self._ended.done():
      self._ended.set_result(None)
    if len(self._working) > _REFILL * self._sequences:
      return
    room = min(
      _MOST * self._sequences - len(self._working),
      _BEGUN * self._sequences - len(self._working) - self._untaken,
    )
    for request in itertools.islice(self._waiting, max(room, 0)):
      task = self._loop.create_task(self._complete(request))
      self._working.add(task)
      task.add_done_callback(self._finished)
    if not self._working:
      # Nothing is being worked on, so nothing comes that those held could wait
      # for: all is complete, or the reader has to make room first.
      self._hand_over()

  def _finished(self, task: asyncio.Task[Completion]) -> None:
    """Takes a request's completion, or its error, which ends all others."""
    self._working.discard(task)
    if task.cancelled():
      error = RuntimeError("a request was cancelled")
    else:
      error = task.exception()
    if self._ended.done():
      return
    if error is not None:
      self._ended.set_exception(error)
      return
    self._left -= 1
    self._untaken += 1
    self._held.append(task.result())
    # The first that is held starts the clock; those that follow go with it.
    if self._timer is None:
      self._timer = self._loop.call_later(_HAND_SECONDS, self._hand_over)
    self._begin()

  def _taken(self, count: int) -> None:
    """Notes that the reader has taken completions, which makes room."""
    self._untaken -= count
    if not self._ended.done():
      self._begin()

  def _hand_over(self) -> None:
    """Gives the reader all that is finished."""
    if self._timer is not None:
      self._timer.cancel()
      self._timer = None
    if self._held:
      self._found.put(self._held)
      self._held = []

  def _tell(self, error: Exception) -> None:
    """Gives the reader an error, after all that is finished."""
    self._hand_over()
    self._found.put(error)
