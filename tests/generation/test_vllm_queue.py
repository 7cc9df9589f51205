"""The queue between vLLM's event loop and a reader, in front of no model."""

import asyncio
import itertools
import tempfile
import threading
import time
from pathlib import Path

import pytest

from trd_jax.experiment.errors import UserError
from trd_jax.experiment.processes.guard import Guard
from trd_jax.generation.engines import feeder
from trd_jax.generation.engines.engine import Completion, Request, Sampling
from trd_jax.generation.engines.feeder import Feeder
from trd_jax.generation.engines.vllm_engine import VllmEngine

GREEDY = Sampling(temperature=0.0)


@pytest.fixture
def patient(monkeypatch):
  """Completions wait for others as long as some can come."""
  monkeypatch.setattr(feeder, "_HAND_SECONDS", 600.0)


class Swift:
  """The engine's own queue in front of a model that answers when it may."""

  def __init__(self, sequences: int, fails_at: str | None = None):
    self.begun, self.held = [], 0
    self.may_answer = threading.Event()
    self.may_answer.set()
    self.engine = VllmEngine.__new__(VllmEngine)
    self.engine._llm = None
    self.engine._folder = Path(tempfile.mkdtemp())
    self.engine._failure = self.engine._folder / "failure"
    self.engine._guard = Guard()
    self.engine._sequences = sequences
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


def test_what_a_slow_reader_has_not_read_is_bounded(patient):
  made = Swift(sequences=2)
  stream = made.stream(100)
  keys = {next(stream).key}
  made.begins(4 * 2 + 8)
  keys |= {next(stream).key for _ in range(7)}
  made.begins(4 * 2 + 8)
  keys |= {next(stream).key for _ in range(3)}
  made.begins(4 * 2 + 16)
  keys |= {completion.key for completion in stream}
  assert keys == set(map(str, range(100)))
  made.end()


def test_a_reader_that_leaves_while_the_model_works_waits_for_it(patient):
  made = Swift(sequences=2)
  stream = made.stream(100)
  next(stream)
  made.begins(16)
  made.may_answer.clear()
  for _ in range(8):
    next(stream)
  made.begins(16 + 6)
  assert made.held == 6
  stream.close()
  assert not made.held
  made.may_answer.set()
  made.end()


@pytest.mark.parametrize(("taken", "begun"), [(1, 16), (50, 64), (100, 100)])
def test_a_reader_may_leave_while_requests_wait_for_it(patient, taken, begun):
  made = Swift(sequences=2)
  stream = made.stream(100)
  assert len(list(itertools.islice(stream, taken))) == taken
  made.begins(begun)
  stream.close()
  # The next one finds an engine that works, and none of the former's.
  assert len(list(made.stream(9))) == 9
  assert len(made.begun) == begun + 9
  # Nor does an engine that is closed wait for a reader that never came back.
  left = made.stream(100)
  next(left)
  made.engine.close()
  left.close()
  made.end()


def test_an_engine_that_is_closed_tells_those_who_read():
  made = Swift(sequences=2)
  made.may_answer.clear()
  told = []

  def read():
    with pytest.raises(UserError, match=r"closed\); .* goes on") as caught:
      next(made.stream(100))
    told.append(caught.value)

  reader = threading.Thread(target=read, daemon=True)
  reader.start()
  made.begins(6)
  made.engine.close()
  reader.join(60)
  assert len(told) == 1
  made.end()


def test_a_failure_reaches_a_reader_behind_what_was_finished(patient):
  made = Swift(sequences=2, fails_at="8")
  stream = made.stream(100)
  keys = {next(stream).key}
  made.begins(8 + 6)
  with pytest.raises(UserError, match="the model is gone"):
    keys.update(completion.key for completion in stream)
  assert keys == set(map(str, range(8)))
  made.end()


class Held:
  """A feeder whose requests are completed one by one, when it is said."""

  def __init__(self, prompts: list[list[int]], sequences: int):
    self.begun: list[str] = []
    self.answers: dict[str, asyncio.Future[None]] = {}
    requests = [Request(f"{n}", p, 0, 1) for n, p in enumerate(prompts)]
    self.feeder = Feeder(requests, self.complete, sequences)

  @classmethod
  async def start(cls, prompts: list[list[int]], sequences: int) -> "Held":
    """One that runs, with all begun that can be."""
    held = cls(prompts, sequences)
    held.run = asyncio.create_task(held.feeder.run())
    await settled()
    return held

  async def complete(self, request: Request) -> Completion:
    self.begun.append(request.key)
    self.answers[request.key] = asyncio.get_running_loop().create_future()
    await self.answers[request.key]
    return Completion(request.key, (), "length")

  async def answer(self, *keys: str) -> None:
    for key in keys:
      self.answers[key].set_result(None)
    await settled()


async def settled() -> None:
  """Whatever the event loop can do by now is done."""
  for _ in range(20):
    await asyncio.sleep(0)


def test_longer_prompts_go_first_and_equal_ones_stay_together():
  lengths = [2, 5, 3, 5, 2, 3]

  async def go():
    held = await Held.start([[1] * n for n in lengths], sequences=2)
    assert held.begun == ["1", "3", "2", "5", "0", "4"]
    await held.answer(*"012345")
    await held.run

  asyncio.run(go())


def test_requests_go_some_at_a_time_before_any_sequence_is_idle():
  async def go():
    held = await Held.start([[1]] * 30, sequences=3)
    numbers = []
    for n in range(9):
      numbers.append(len(held.begun))
      await held.answer(f"{n}")
    # Never fewer than 6 unanswered: a sequence for each of 3, and as many more.
    assert numbers == [9, 9, 9, 12, 12, 12, 12, 12, 12]
    held.run.cancel()
    with pytest.raises(asyncio.CancelledError):
      await held.run

  asyncio.run(go())


def test_a_completion_waits_for_others_and_not_long(patient, monkeypatch):
  async def go():
    held = await Held.start([[1]] * 5, sequences=2)
    await held.answer("3")
    await asyncio.sleep(0.2)
    assert held.feeder._found.empty()
    await held.answer("0")  # Its wait has begun with the first.
    assert held.feeder._found.empty()
    await held.answer("1", "2", "4")
    read = held.feeder.read()
    assert [made.key for made in read] == ["3", "0", "1", "2", "4"]
    await held.run
    monkeypatch.setattr(feeder, "_HAND_SECONDS", 0.05)
    held = await Held.start([[1]] * 5, sequences=2)
    await held.answer("3")
    first = await asyncio.to_thread(next, read := held.feeder.read())
    assert first.key == "3"
    await held.answer("0", "1", "2", "4")
    assert [made.key for made in read] == ["0", "1", "2", "4"]
    await held.run

  asyncio.run(go())


def test_a_request_that_is_cancelled_ends_all():
  async def go():
    held = await Held.start([[1]] * 5, sequences=2)
    held.answers["2"].cancel()
    await held.run
    with pytest.raises(RuntimeError, match="a request was cancelled"):
      next(held.feeder.read())
    assert all(answer.done() for answer in held.answers.values())

  asyncio.run(go())
