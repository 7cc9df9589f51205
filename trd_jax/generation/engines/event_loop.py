"""A coroutine in a thread of its own, read as an iterator."""

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

  It runs on an event loop in a thread of its own, and is cancelled when the
  iterator is closed. What it raises is raised here, the first error alone
  where there are several.
  """
  found: queue.SimpleQueue[Any] = queue.SimpleQueue()
  loop = asyncio.new_event_loop()
  task = loop.create_task(work(found))

  def run() -> None:
    try:
      loop.run_until_complete(task)
    except BaseException as error:
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
    thread.join()


def _first(error: BaseException) -> BaseException:
  """A user's mistake if there is one, else the first error."""
  if not isinstance(error, BaseExceptionGroup):
    return error
  inner = [_first(each) for each in error.exceptions]
  return next((e for e in inner if isinstance(e, UserError)), inner[0])
