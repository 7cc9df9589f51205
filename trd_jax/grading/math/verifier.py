"""Grades mathematical answers: `verify` one, `verify_batch` many, or a stream.

Also usable alone, on a file of answers: `python -m trd_jax.grading.math FILE`.

The last box after the last `</think>` is the answer; an empty or unterminated
one is wrong and never replaced by an earlier one, and thoughts that never
close hold none. Integers, fractions, lists,
tuples, intervals and words are compared right here; what takes algebra goes to
worker processes (`pool`) that are ended at a time limit and only started when
first needed. How values are compared stands in `numbers` (decimals, percent,
units) and `compare_structure` (lists, sets, intervals, equations).

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Self

from trd_jax.experiment.errors import ArgumentParser, UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.files import atomic_files, paths
from trd_jax.experiment.progress import Progress
from trd_jax.experiment.records import Problem, Verdict
from trd_jax.grading import grader_protocol
from trd_jax.grading.math import grade_answer, pool

VERSION = "math-8"
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


def _settled(prepared: grade_answer.Prepared) -> Verdict:
  """Returns the verdict on what took no algebra."""
  correct, reason, extracted, *_, detail = prepared
  return Verdict(correct, reason, extracted, detail)  # type: ignore[arg-type]


def _verdict(prepared: grade_answer.Prepared, answer: pool.Answer) -> Verdict:
  correct, reason = answer
  # As `grade_answer` does without algebra: unboxed, it is right or no_box.
  if correct is False and not prepared.boxed:
    reason = "no_box"
  return Verdict(correct, reason, prepared.extracted)  # type: ignore[arg-type]


class Grader(grader_protocol.Grader):
  """Grades answers as they come: easy ones at once, algebra in processes.

  The processes are shared by all graders with the same settings; they start
  with the first question that needs them, and stay for the next grader.

  Args:
    workers: processes for algebra (default: the cores, at most 4).
    timeout: seconds of processor time for one comparison; three times that by
      the wall clock, on a machine that is busy with other things.

  Raises:
    UserError: `timeout` isn't positive, or `workers` is less than 1.
  """

  version = VERSION
  domains = frozenset({"arithmetic", "math"})

  def __init__(self, workers: int | None = None, timeout: float = TIMEOUT):
    _check(workers, timeout)
    self.workers = workers or max(1, min(4, os.cpu_count() or 1))
    self._timeout = timeout
    self._waiting: dict[_Question, list[tuple[Any, grade_answer.Prepared]]] = {}
    self._ready: collections.deque[tuple[Any, Verdict]] = collections.deque()

  @classmethod
  def open(cls, experiment: Experiment, files: Sequence[Path] = ()) -> Self:
    """Opens `grader.Grader`, which reads no files."""
    del experiment, files
    return cls()

  def submit(self, key: Any, text: str, problem: Problem) -> None:
    """Takes a response, as `grader.Grader`, and compares `problem.answer`."""
    self.compare(key, text, problem.answer)

  def compare(self, key: Any, completion: str, gold: str) -> None:
    """Takes a completion and its gold answer; see `submit`."""
    prepared = grade_answer.prepare(completion, gold)
    question = prepared.question
    if question is None:
      self._ready.append((key, _settled(prepared)))
      return
    with _lock:
      if question in _known:
        self._ready.append((key, _verdict(prepared, _known[question])))
      # Samples of one problem often give the same answer: asked once.
      elif question in self._waiting:
        self._waiting[question].append((key, prepared))
      else:
        self._waiting[question] = [(key, prepared)]
        self._pool.submit((self, question), question)

  def finished(self, wait: bool = False) -> Iterator[tuple[Any, Verdict]]:
    """Yields verdicts, as `grader.Grader`."""
    self._collect(0.0)
    while self._ready or (wait and self._waiting):
      while self._ready:
        yield self._ready.popleft()
      if wait:
        self._collect(self._timeout)

  def close(self) -> None:
    """Ends what this grader alone has asked; other graders go on."""
    with _lock:
      if self._waiting:
        self._pool.forget(lambda tag: tag[0] is self)
    self._waiting.clear()
    self._ready.clear()

  @property
  def _pool(self) -> pool.Pool:
    return _shared_pool(self.workers, self._timeout)

  def _collect(self, wait: float) -> None:
    """Gives each grader of the pool the answers to its questions.

    Waits for at most `wait` seconds, and only where something is asked.
    """
    if not self._waiting:
      return
    with _lock:
      # Where a worker could not start the pool has dropped all questions.
      if not self._pool.pending:
        for question in self._waiting:
          self._pool.submit((self, question), question)
      for (asker, question), answer in self._pool.poll(wait):
        if answer != pool.GAVE_UP:  # under another load it may be in time
          if len(_known) >= _REMEMBERED:
            _known.clear()
          _known[question] = answer
        for key, prepared in asker._waiting.pop(question):
          asker._ready.append((key, _verdict(prepared, answer)))


def verify_batch(
  pairs: Iterable[tuple[str, str]],
  workers: int | None = None,
  timeout: float = TIMEOUT,
  progress: Callable[[int], object] | None = None,
) -> list[Verdict]:
  """Grades (completion, gold) pairs.

  Args:
    pairs: a model's whole output, thoughts included, and the gold answer.
    workers: see `Grader`.
    timeout: see `Grader`.
    progress: called with the count of verdicts so far after each of them.

  Returns:
    Verdicts, in the order of the pairs.

  Raises:
    UserError: see `Grader`; or a process can't start.
  """
  verdicts: dict[int, Verdict] = {}

  def take(judged: Iterable[tuple[int, Verdict]]) -> None:
    for position, verdict in judged:
      verdicts[position] = verdict
      if progress:
        progress(len(verdicts))

  with Grader(workers, timeout) as judging:
    for position, (completion, gold) in enumerate(pairs):
      judging.compare(position, completion, gold)
      take(judging.finished())
    take(judging.finished(wait=True))
  return [verdicts[position] for position in range(len(verdicts))]


def verify(completion: str, gold: str, timeout: float = TIMEOUT) -> Verdict:
  """Grades one completion; see `verify_batch`."""
  found = grade_answer.prepare(completion, gold)
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
