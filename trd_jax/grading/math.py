"""Grades mathematical answers: `verify` one, `verify_batch` many.

The last box after the last `</think>` is the answer; an empty or unterminated
one is wrong and never replaced by an earlier one. Integers, fractions, lists,
tuples, intervals and words are compared right here; what takes algebra goes to
worker processes (`pool`) that are ended at a time limit and only started when
first needed. How values are compared stands in `numbers` (decimals, percent,
units) and `structure` (lists, sets, intervals, equations).

Reasons of a verdict:
  match, mismatch  the answer was read and compared.
  no_box           no answer: no box, an empty or an unterminated one. (A text
                   without any box that ends by stating the right answer is a
                   match; one that states anything else is no_box.)
  unparsed         there is an answer but no way to compare it with the gold.
  timeout          the comparison took too long or too much memory: correct is
                   None, and statistics have to say how many there were.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator

from trd_jax.errors import UserError
from trd_jax.grading import judge, pool
from trd_jax.records import Verdict

VERSION = "math-1"
TIMEOUT = 5.0
_REMEMBERED = 100_000

_Question = tuple[str, str]

_lock = threading.RLock()
_pools: dict[tuple[int, int, float], pool.Pool] = {}
_known: dict[_Question, pool.Answer] = {}


def _shared_pool(workers: int, timeout: float) -> pool.Pool:
  """This process's pool with these settings."""
  key = (os.getpid(), workers, timeout)
  if key not in _pools:
    _pools[key] = pool.Pool(workers, timeout)
  return _pools[key]


def close() -> None:
  """Ends all grading processes; the next question starts new ones."""
  with _lock:
    for shared in _pools.values():
      shared.close()


def _verdict(prepared: judge.Prepared, answer: pool.Answer) -> Verdict:
  correct, reason = answer
  if correct is False and not prepared.boxed:
    reason = "no_box"
  return Verdict(correct, reason, prepared.extracted)  # type: ignore[arg-type]


def verify_stream(
  pairs: Iterable[tuple[str, str]],
  *,
  workers: int | None = None,
  timeout: float = TIMEOUT,
) -> Iterator[tuple[int, Verdict]]:
  """Grades pairs as they come; see `verify_batch` for the arguments.

  Yields:
    (position of the pair, its verdict), easy ones first. One consumer at a
    time: other callers wait until this iterator is exhausted or closed.
  """
  if timeout <= 0:
    raise UserError(f"grading: timeout is {timeout} s; give a positive one")
  workers = workers or max(1, min(4, os.cpu_count() or 1))
  waiting: dict[_Question, list[tuple[int, judge.Prepared]]] = {}
  with _lock:
    shared = _shared_pool(workers, timeout)
    try:
      for position, (completion, gold) in enumerate(pairs):
        found = judge.prepare(completion, gold)
        question = found.question
        if question is None:
          yield position, Verdict(found.correct, found.reason, found.extracted)  # type: ignore[arg-type]
        elif question in _known:
          yield position, _verdict(found, _known[question])
        elif question in waiting:
          waiting[question].append((position, found))
        else:
          waiting[question] = [(position, found)]
          shared.submit(question, question)
        if waiting:
          yield from _collect(shared, waiting, 0.0)
      while waiting:
        yield from _collect(shared, waiting, timeout)
    finally:
      if shared.pending:
        shared.close()  # abandoned midway, or a worker could not start


def _collect(
  shared: pool.Pool,
  waiting: dict[_Question, list[tuple[int, judge.Prepared]]],
  wait: float,
) -> Iterator[tuple[int, Verdict]]:
  """Verdicts whose questions have been answered."""
  for question, answer in shared.poll(wait):
    if answer != pool.GAVE_UP:  # under another load it may be in time
      if len(_known) >= _REMEMBERED:
        _known.clear()
      _known[question] = answer
    for position, found in waiting.pop(question):
      yield position, _verdict(found, answer)


def verify_batch(
  pairs: Iterable[tuple[str, str]],
  workers: int | None = None,
  timeout: float = TIMEOUT,
  progress: Callable[[int], None] | None = None,
) -> list[Verdict]:
  """Grades (completion, gold) pairs.

  Args:
    pairs: a model's whole output, thoughts included, and the gold answer.
    workers: processes for algebra (default: the cores, at most 4); they start
      only if some pair needs them, and stay for the next call.
    timeout: seconds of processor time for one comparison; three times that by
      the wall clock, on a machine that is busy with other things.
    progress: called with the count of verdicts so far after each of them.

  Returns:
    Verdicts, in the order of the pairs.

  Raises:
    UserError: `timeout` isn't positive, or the workers cannot start.
  """
  verdicts: dict[int, Verdict] = {}
  for position, verdict in verify_stream(
    pairs, workers=workers, timeout=timeout
  ):
    verdicts[position] = verdict
    if progress:
      progress(len(verdicts))
  return [verdicts[position] for position in range(len(verdicts))]


def verify(completion: str, gold: str, timeout: float = TIMEOUT) -> Verdict:
  """Grades one completion; see `verify_batch`."""
  found = judge.prepare(completion, gold)
  if found.question is None:
    return Verdict(found.correct, found.reason, found.extracted)  # type: ignore[arg-type]
  return verify_batch([(completion, gold)], 1, timeout)[0]
