"""Runs a coroutine in a thread of its own, to be read as an iterator."""

import asyncio
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from trd_jax.experiment.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Ended:
  """The last item of a queue."""

  error: BaseException | None = None


def in_thread(
  work: Callable[[queue.SimpleQueue], Coroutine[Any, Any, None]],
) -> Iterator[Any]:
  """Yields what a coroutine function puts into a queue, as it does so.

  The coroutine runs on an event loop in a thread of its own, and is cancelled
  when the iterator is closed. An error of the coroutine is raised here; where
  there are several, only one of them.
  """
  found: queue.SimpleQueue[Any] = queue.SimpleQueue()
  loop = asyncio.new_event_loop()
  task = loop.create_task(work(found))

  def run() -> None:
    try:
      loop.run_until_complete(task)
    except BaseException as error:
      # Any error, a cancellation too: the reader blocks on the queue and would
      # wait forever for a thread that is gone.
      found.put(_Ended(_first(error)))
    else:
      found.put(_Ended())
    finally:
      loop.run_until_complete(loop.shutdown_asyncgens())
      loop.run_until_complete(loop.shutdown_default_executor())
      loop.close()

  thread = threading.Thread(target=run, name="servers", daemon=True)
  thread.start()
  try:
    while not isinstance(item := found.get(), _Ended):
      yield item
    if item.error is not None:
      raise item.error
  finally:
    with contextlib.suppress(RuntimeError):  # The loop has ended.
      loop.call_soon_threadsafe(task.cancel)
    # So that no request is in flight when the iterator is closed.
    thread.join()


def _first(error: BaseException) -> BaseException:
  """Returns a user's mistake among a group's errors, else the first one."""
  if not isinstance(error, BaseExceptionGroup):
    return error
  inner = [_first(each) for each in error.exceptions]
  return next((e for e in inner if isinstance(e, UserError)), inner[0])
