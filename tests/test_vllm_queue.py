"""The queue between vLLM's event loop and a reader, in front of no model."""

import asyncio
import itertools
import threading
import time

import pytest

from trd_jax.engines.engine import Completion, Request, Sampling
from trd_jax.engines.vllm_engine import VllmEngine
from trd_jax.errors import UserError

GREEDY = Sampling(temperature=0.0)


class Swift:
  """The engine's own queue in front of a model that answers when it may."""

  def __init__(self, in_flight: int, fails_at: str | None = None):
    self.begun, self.held = [], 0
    self.may_answer = threading.Event()
    self.may_answer.set()
    self.engine = VllmEngine.__new__(VllmEngine)
    self.engine._llm = None
    self.engine._in_flight = in_flight
    self.engine._work = set()
    self.engine._loop = asyncio.new_event_loop()
    self.engine._thread = threading.Thread(
      target=self.engine._loop.run_forever, daemon=True
    )
    self.engine._thread.start()

    async def one(request, sampling):
      self.begun.append(request.key)
      self.held += 1
      try:
        while not self.may_answer.is_set():
          await asyncio.sleep(0.001)
        await asyncio.sleep(0)
      except asyncio.CancelledError:
        await asyncio.sleep(0.05)  # To let go of a request takes a while.
        raise
      finally:
        self.held -= 1
      if request.key == fails_at:
        raise RuntimeError("the model is gone")
      return Completion(request.key, (), "length")

    self.engine._one = one

  def stream(self, count: int):
    requests = [Request(f"{n}", [1], 0, 1) for n in range(count)]
    return self.engine._stream(requests, GREEDY)

  def begins(self, count: int) -> None:
    """So many requests are begun, and then no more."""
    until = time.monotonic() + 60
    while len(self.begun) < count and time.monotonic() < until:
      time.sleep(0.01)
    time.sleep(0.1)
    assert len(self.begun) == count

  def end(self) -> None:
    """Closes the engine, then lets go of what was left to its event loop."""
    self.engine.close()
    assert not self.engine._thread.is_alive()
    self.engine._loop.run_until_complete(asyncio.sleep(0.05))
    self.engine._loop.close()


def test_what_a_slow_reader_has_not_read_is_bounded():
  made = Swift(in_flight=4)
  stream = made.stream(100)
  keys = {next(stream).key}
  made.begins(2 * 4 + 1)
  keys |= {next(stream).key for _ in range(10)}
  made.begins(2 * 4 + 11)
  keys |= {completion.key for completion in stream}
  assert keys == set(map(str, range(100)))
  made.end()


def test_a_reader_that_leaves_while_the_model_works_waits_for_it():
  made = Swift(in_flight=4)
  stream = made.stream(100)
  next(stream)
  made.begins(9)
  made.may_answer.clear()
  for _ in range(8):
    next(stream)
  made.begins(9 + 4)
  assert made.held == 4
  stream.close()
  assert not made.held
  made.may_answer.set()
  made.end()


@pytest.mark.parametrize("taken", [1, 50, 100])
def test_a_reader_may_leave_while_requests_wait_for_it(taken):
  made = Swift(in_flight=4)
  stream = made.stream(100)
  assert len(list(itertools.islice(stream, taken))) == taken
  made.begins(min(taken + 2 * 4, 100))
  stream.close()
  # The next one finds an engine that works, and none of the former's.
  begun = len(made.begun)
  assert len(list(made.stream(9))) == 9
  assert len(made.begun) == begun + 9
  # Nor does an engine that is closed wait for a reader that never came back.
  left = made.stream(100)
  next(left)
  made.engine.close()
  left.close()
  made.end()


def test_an_engine_that_is_closed_tells_those_who_read():
  made = Swift(in_flight=4)
  made.may_answer.clear()
  told = []

  def read():
    with pytest.raises(UserError, match=r"closed\); .* goes on") as caught:
      next(made.stream(100))
    told.append(caught.value)

  reader = threading.Thread(target=read, daemon=True)
  reader.start()
  made.begins(4)
  made.engine.close()
  reader.join(60)
  assert len(told) == 1
  made.end()


def test_a_failure_reaches_a_reader_behind_what_was_finished():
  made = Swift(in_flight=4, fails_at="8")
  stream = made.stream(100)
  keys = {next(stream).key}
  made.begins(9)
  with pytest.raises(UserError, match="the model is gone"):
    keys.update(completion.key for completion in stream)
  assert keys == set(map(str, range(8)))
  made.end()
