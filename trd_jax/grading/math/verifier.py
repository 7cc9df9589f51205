"""Grades mathematical answers: `verify` one, `verify_batch` many.

Also usable alone, on a file of answers: `python -m trd_jax.grading.math FILE`.

The last box after the last `</think>` is the answer; an empty or unterminated
one is wrong and never replaced by an earlier one, and thoughts that never
close hold none. Integers, fractions, lists,
tuples, intervals and words are compared right here; what takes algebra goes to
worker processes (`pool`) that are ended at a time limit and only started when
first needed. How values are compared stands in `numbers` (decimals, percent,
units) and `structure` (lists, sets, intervals, equations).

Reasons of a verdict:
  match, mismatch  the answer was read and compared.
  no_box           no answer: no box, an empty or an unterminated one. (A text
                   without any box that ends by plainly stating the right
                   answer is a match; one that states anything else, or hedges,
                   is no_box.)
  unparsed         there is an answer but no way to compare it with the gold.
  timeout          the comparison took too long or too much memory: correct is
                   None, and statistics have to say how many there were.
"""

import collections
import contextlib
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from trd_jax.experiment.errors import ArgumentParser, UserError
from trd_jax.experiment.files import atomic_files, paths
from trd_jax.experiment.metrics import Progress
from trd_jax.experiment.records import Verdict
from trd_jax.grading.math import judge, pool

VERSION = "math-4"
TIMEOUT = 5.0
_REMEMBERED = 100_000

_Question = tuple[str, str]

# A pool serves one caller at a time: `poll` hands out answers to whoever asks.
_lock = threading.RLock()
_pools: dict[tuple[int, int, float], pool.Pool] = {}
# Over all calls of this process: samples of a benchmark ask the same question
# again and again.
_known: dict[_Question, pool.Answer] = {}


def _shared_pool(workers: int, timeout: float) -> pool.Pool:
  """Returns this process's pool with these settings.

  A fork's copy of a pool is never used: the process is part of the key.
  """
  key = (os.getpid(), workers, timeout)
  if key not in _pools:
    _pools[key] = pool.Pool(workers, timeout)
  return _pools[key]


def close() -> None:
  """Ends all grading processes; the next question starts new ones."""
  with _lock:
    for shared in _pools.values():
      shared.close()


def _check(workers: int | None, timeout: float) -> None:
  if timeout <= 0:
    raise UserError(f"grading: timeout is {timeout} s; give a positive one")
  if workers is not None and workers < 1:
    raise UserError(f"grading: workers is {workers}; give at least 1")


def _settled(prepared: judge.Prepared) -> Verdict:
  """Returns the verdict on what took no algebra."""
  correct, reason, extracted, *_, detail = prepared
  return Verdict(correct, reason, extracted, detail)  # type: ignore[arg-type]


def _verdict(prepared: judge.Prepared, answer: pool.Answer) -> Verdict:
  correct, reason = answer
  # As `judge` has it of what needs no algebra: unboxed is right or no_box.
  if correct is False and not prepared.boxed:
    reason = "no_box"
  return Verdict(correct, reason, prepared.extracted)  # type: ignore[arg-type]


def verify_stream(
  pairs: Iterable[tuple[str, str] | None],
  *,
  workers: int | None = None,
  timeout: float = TIMEOUT,
) -> Iterator[tuple[int, Verdict] | None]:
  """Grades pairs as they come; see `verify_batch` for the arguments.

  Yields:
    (position of the pair, its verdict), easy ones first; a None for a None
    among the pairs, which gives a turn to a caller with other things to do.
    One consumer at a time: other callers wait until this iterator is exhausted
    or closed.
  """
  _check(workers, timeout)
  workers = workers or max(1, min(4, os.cpu_count() or 1))
  waiting: dict[_Question, list[tuple[int, judge.Prepared]]] = {}
  with _lock:
    shared = _shared_pool(workers, timeout)
    try:
      for position, pair in enumerate(pairs):
        if pair is None:
          yield None
          if waiting:
            yield from _collect(shared, waiting, 0.0)
          continue
        found = judge.prepare(*pair)
        question = found.question
        if question is None:
          yield position, _settled(found)
        elif question in _known:
          yield position, _verdict(found, _known[question])
        # Samples of one problem often give the same answer: asked once.
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
      # Questions of this caller would come out of the next one's `poll`.
      if shared.pending:
        shared.close()  # abandoned midway, or a worker could not start


def _collect(
  shared: pool.Pool,
  waiting: dict[_Question, list[tuple[int, judge.Prepared]]],
  wait: float,
) -> Iterator[tuple[int, Verdict]]:
  """Yields the verdicts whose questions have been answered."""
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
  progress: Callable[[int], object] | None = None,
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
    UserError: `timeout` isn't positive, `workers` is less than 1, or they
      cannot start.
  """
  verdicts: dict[int, Verdict] = {}
  for graded in verify_stream(pairs, workers=workers, timeout=timeout):
    assert graded is not None
    position, verdict = graded
    verdicts[position] = verdict
    if progress:
      progress(len(verdicts))
  return [verdicts[position] for position in range(len(verdicts))]


def verify(completion: str, gold: str, timeout: float = TIMEOUT) -> Verdict:
  """Grades one completion; see `verify_batch`."""
  found = judge.prepare(completion, gold)
  if found.question is None:
    return _settled(found)
  return verify_batch([(completion, gold)], 1, timeout)[0]


def grade_file(
  source: Path,
  target: Path | None,
  *,
  completion: str = "completion",
  gold: str = "gold",
  workers: int | None = None,
  timeout: float = TIMEOUT,
) -> collections.Counter[str]:
  """Grades a file of JSON lines.

  Args:
    source: an object a line.
    target: gets each line with `correct`, `reason` and `extracted` added, all
      at once at the end; None: nothing is written.
    completion: the field that holds a model's whole output.
    gold: the field that holds the right answer, a text or a number.
    workers: see `verify_batch`.
    timeout: see `verify_batch`.

  Returns:
    How many verdicts there were, by reason.

  Raises:
    UserError: the file can't be read, a line is no object with both fields,
      `target` can't be written or holds something else than verdicts, or see
      `verify_batch`.
  """
  _check(workers, timeout)
  if target is not None:
    _check_target(source, target)
  rows, pairs = [], []
  for number, line in _lines(source):
    try:
      row = json.loads(line)
    except ValueError as error:
      raise UserError(
        f"{source}, line {number}: not JSON ({error}); give an object a line,"
        f" with {completion!r} and {gold!r}"
      ) from error
    try:
      pairs.append((str(row[completion]), str(row[gold])))
    except (KeyError, TypeError) as error:
      raise UserError(
        f"{source}, line {number}: no JSON object with {completion!r} and"
        f" {gold!r} ({type(error).__name__}); name the fields with"
        " --completion and --gold"
      ) from error
    rows.append(row)
  with _written(target) as file:
    with Progress(len(rows), "grading", "answers") as progress:
      verdicts = verify_batch(
        pairs, workers, timeout, lambda _: progress.update()
      )
    if file is not None:
      for row, verdict in zip(rows, verdicts, strict=True):
        graded = row | dataclasses.asdict(verdict)
        line = json.dumps(graded, ensure_ascii=False) + "\n"
        # Half a surrogate pair stays what it was in the source: an escape.
        file.write(line.encode("utf-8", "backslashreplace"))
  return collections.Counter(verdict.reason for verdict in verdicts)


def _check_target(source: Path, target: Path) -> None:
  """Checks that nothing is lost by writing a file.

  Raises:
    UserError: it is the source, or holds something else than verdicts.
  """
  if not os.path.lexists(target) or target.is_dir():  # that is told later
    return
  if target.exists() and source.exists() and target.samefile(source):
    raise UserError(
      f"--out={target} is what is graded; name another file for the verdicts"
    )
  try:
    rows = [json.loads(line) for _, line in _lines(target)]
    ours = all({"correct", "reason", "extracted"} <= row.keys() for row in rows)
  except (AttributeError, ValueError, UserError):
    ours = target.is_file() and not target.stat().st_size
  if not ours:
    raise UserError(
      f"--out={target} is there and holds something else than verdicts, which"
      " would be lost; name another file"
    )


@contextlib.contextmanager
def _written(target: Path | None) -> Iterator[IO[bytes] | None]:
  """Opens the file to write before the work whose result it gets."""
  if target is None:
    yield None
    return
  with contextlib.ExitStack() as stack:
    try:
      if target.is_dir():
        raise IsADirectoryError("it is a folder")
      file = stack.enter_context(atomic_files.atomic_file(target))
    except OSError as error:
      raise UserError(
        f"{target}: can't be written ({error}); name another file with --out"
      ) from error
    yield file


def _lines(source: Path) -> list[tuple[int, str]]:
  """Reads the lines that aren't empty, each with its number in the file."""
  try:
    text = source.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f"{source}: can't be read ({error}); give a file of JSON lines"
    ) from error
  # Not splitlines: JSON may hold other line separators inside its strings.
  every = enumerate(text.split("\n"), 1)
  lines = [(number, line) for number, line in every if line.strip()]
  if not lines:
    raise UserError(f"{source}: no rows; give a file of JSON lines")
  return lines


def main(argv: list[str] | None = None) -> None:
  """Runs the command line `python -m trd_jax.grading.math`.

  Raises:
    SystemExit: 2 after a user's mistake, 130 after an interrupt, with one
      line on stderr.
  """
  parser = ArgumentParser(
    prog="python -m trd_jax.grading.math",
    description="Grades the answers of a file of JSON lines: the last box or,"
    " without one, a last sentence that plainly states the answer.",
  )
  add = parser.add_argument
  add("file", type=paths.argument, help="JSON lines, an answer each")
  add(
    "--out", type=paths.argument, help="where to write them with their verdicts"
  )
  add("--completion", default="completion", help="field of the model's output")
  add("--gold", default="gold", help="field of the right answer")
  add("--workers", type=int, help="processes for algebra (default: cores, ≤ 4)")
  add("--timeout", type=float, default=TIMEOUT, help="CPU-seconds an answer")
  arguments = parser.parse_args(argv)
  try:
    counts = grade_file(
      arguments.file,
      arguments.out,
      completion=arguments.completion,
      gold=arguments.gold,
      workers=arguments.workers,
      timeout=arguments.timeout,
    )
  except UserError as error:
    print(f"trd-jax grading: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("trd-jax grading: interrupted; nothing written", file=sys.stderr)
    sys.exit(130)
  total = counts.total()
  told = ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common())
  share = 100 * counts["match"] / total
  print(f"{total:,} answers, {share:.1f}% right: {told}")
