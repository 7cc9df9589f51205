"""Rows of data files: read, checked, counted.

A source says how one row becomes a `Problem` and raises `BadRow` for a row
that can't; `collect` does the rest. No row vanishes: it becomes a problem, or
a `Rejected` that says why not.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import gzip
import io
import itertools
import json
import math
import re
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from trd_jax.data.problems.sources import SUFFIXES
from trd_jax.experiment import usual_names
from trd_jax.experiment.errors import UserError, one_line
from trd_jax.experiment.files import json_files
from trd_jax.experiment.records import (
  SYSTEM_TURN,
  Domain,
  Problem,
  Rejected,
  content_key,
)

STAGE = "problems"

# What ends the reason of a row that an earlier one has the statement of.
WORD_FOR_WORD = ", word for word"

_BATCH = 10_000  # rows of a columnar file that are Python's at a time
_DOMAINS: tuple[str, ...] = typing.get_args(Domain)
PROBLEM_KEYS = ("problem", "question", "Problem", "Question")
_ANSWER_KEYS = ("answer", "Answer")
_SOLUTION_KEYS = ("solution", "Solution")
_USED = {
  *(SYSTEM_TURN, *PROBLEM_KEYS, *_ANSWER_KEYS, *_SOLUTION_KEYS),
  *("tests", "domain"),
}
_CALCULATOR = re.compile(r"<<[^<>]*>>")


class BadRow(Exception):
  """A row that can't become a problem; its text is the reason."""


def read(path: Path) -> Iterator[tuple[str, Any]]:
  """Yields `(where, row)`; for a line that is no JSON `row` is a `BadRow`.

  Raises:
    UserError: the file can't be read, is of a kind that we don't know, or is
      empty.
  """
  count = 0
  for where, row in _read(path):
    count += 1
    try:
      yield where, _plain(row)
    except BadRow as error:
      yield where, error
  if not count:
    raise UserError(f"{path}: no rows; give a file with at least one problem")


def _plain(value: Any) -> Any:
  """Writes what columnar files hold besides JSON's kinds as JSON has it.

  Raises:
    BadRow: bytes that are no text.
  """
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError:
      raise BadRow("bytes that are no UTF-8 text") from None
  if isinstance(value, decimal.Decimal):
    whole = value.is_finite() and value == value.to_integral_value()
    return int(value) if whole else float(value)
  if isinstance(value, datetime.date | datetime.time):
    return value.isoformat()
  if isinstance(value, datetime.timedelta):
    return value.total_seconds()
  if isinstance(value, Mapping):
    return {name: _plain(one) for name, one in value.items()}
  if isinstance(value, list | tuple):
    # A map comes as pairs.
    if value and all(
      isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str)
      for one in value
    ):
      return {name: _plain(one) for name, one in value}
    return [_plain(one) for one in value]
  return value


def collect(
  source: str,
  files: Iterable[Path],
  build: Callable[[Mapping[str, Any]], Problem | None],
  reader: Callable[[Path], Iterator[tuple[str, Any]]] | None = None,
) -> tuple[list[Problem], list[Rejected]]:
  """Builds problems of all rows of some files, each statement once.

  Rows that repeat a statement (up to white space) with the same answer are
  set aside but for one, preferably one with an answer and with a worked
  solution. Where they
  disagree on the answer all of them are, since none can be trusted.

  Args:
    source: names the source.
    files: read one after the other.
    build: one row to one problem, or raises `BadRow`; None for a row of the
      file that isn't the source's.
    reader: a file's rows, as `read` gives them (the default).
  """
  groups: dict[str, list[_Row]] = {}
  aside: list[tuple[_Row, str]] = []
  for path in files:
    for where, row in (reader or read)(path):
      verbatim = _verbatim(row)
      try:
        if isinstance(row, BadRow):
          raise row
        if not isinstance(row, Mapping):
          raise BadRow(f"a {type(row).__name__}, not an object with columns")
        problem = build(row)
      except (BadRow, RecursionError) as error:
        # What could just be read may still be too deep to be looked through.
        why = error if isinstance(error, BadRow) else "nested too deeply"
        aside.append((_Row(where, None, verbatim), f"{where}: {why}"))
        continue
      if problem is not None:
        groups.setdefault(problem.problem_id, []).append(
          _Row(where, problem, verbatim)
        )
  kept: list[_Row] = []
  for group in groups.values():
    # All files are read before any row is judged: the row that disagrees may be
    # the last one. One without an answer disagrees with none.
    graded = [row for row in group if row.problem.has_gold]
    answers = {comparable(row.problem.answer) for row in graded}
    if len(answers) > 1:
      shown = ", ".join(dict.fromkeys(r.problem.answer for r in graded))
      aside += [
        (
          row,
          f"{row.where}: {len(group)} rows of this problem disagree on its"
          f" answer ({shown[:80]})",
        )
        for row in group
      ]
      continue
    # The first of those that tell most.
    best = max(
      group, key=lambda r: (r.problem.has_gold, bool(r.problem.solution))
    )
    kept.append(best)
    aside += [
      (row, f"{row.where}: repeats {best.where}")
      for row in group
      if row is not best
    ]
  # What repeats another row character by character is marked: `count` tells
  # distinct prompts from distinct problems by it.
  seen = {row.verbatim for row in kept}
  rejected = []
  for row, reason in aside:
    name = row.problem.problem_id if row.problem else row.where
    if row.verbatim is not None and row.verbatim in seen:
      reason += WORD_FOR_WORD
    seen.add(row.verbatim)
    rejected.append(Rejected(name, source, STAGE, reason))
  return [row.problem for row in kept], rejected


class _Row(NamedTuple):
  """A row of a file: where it is, its problem, and its statement as it is."""

  where: str
  problem: Any
  verbatim: str | None


def _verbatim(row: Any) -> str | None:
  if not isinstance(row, Mapping):
    return None
  found, system = column(row, PROBLEM_KEYS), row.get(SYSTEM_TURN)
  if not isinstance(found, str):
    return None
  return f"{system}\n{found}" if isinstance(system, str) else found


def count(found: Sequence[Problem], rejected: Sequence[Rejected]) -> str:
  """Says what a source's rows came to, for a person.

  Args:
    found: all problems of the source.
    rejected: all rows that were set aside.
  """
  total = len(found) + len(rejected)
  no_gold = sum(not problem.has_gold for problem in found)
  again = sum(row.reason.endswith(WORD_FOR_WORD) for row in rejected)
  parts = [
    f"{total:,} rows",
    f"{total - again:,} distinct prompts",
    f"{len(found):,} problems",
  ]
  if no_gold:
    parts.append(f"{no_gold:,} of them without an answer")
  # A `Rejected` has its reason and nothing else to tell kinds apart by: these
  # marks have to be words of the reasons above and in `answer_text`.
  kinds = {
    "repeat another but for white space": " repeats ",
    "disagree on the answer": " disagree on its answer",
    "have several answers": " different answers (",
    "have no answer": ": no answer",
  }
  left = list(rejected)
  for kind, mark in kinds.items():
    here = [row for row in left if mark in row.reason]
    left = [row for row in left if mark not in row.reason]
    if here:
      parts.append(f"{len(here):,} {kind}")
  if left:
    parts.append(f"{len(left):,} can't be used for other reasons")
  return ", ".join(parts)


def to_problem(
  row: Mapping[str, Any],
  source: str,
  *,
  text: str | None = None,
  answer: str | None = None,
  solution: str | None = None,
  domain: str = "math",
  tests: str | None = None,
  answer_required: bool = True,
  system: str | None = None,
) -> Problem:
  """Builds a problem of a row's columns; arguments win over columns.

  Scalar columns that are not used otherwise go to `meta`. A row that may do
  without an answer has '' where it has none.

  Raises:
    BadRow: a column is missing, empty or of the wrong type.
  """
  if text is None:
    text = statement(row)
  if answer is None:
    given = column(row, _ANSWER_KEYS)
    if given is None and answer_required:
      raise BadRow("no answer" + _meant(row, "answer"))
    answer = answer_text(given, required=answer_required)
  if solution is None:
    solution = optional_text(row, _SOLUTION_KEYS, "solution")
  if domain not in _DOMAINS:
    raise BadRow(f"domain {domain!r} is not one of {', '.join(_DOMAINS)}")
  meta = {
    key: value
    for key, value in row.items()
    if key not in _USED
    and isinstance(value, str | int | float)
    and not (isinstance(value, float) and not math.isfinite(value))
  }
  if system is not None:
    meta[SYSTEM_TURN] = system
  return Problem(
    problem_id=problem_id(source, text, system),
    text=text,
    answer=answer,
    solution=solution,
    domain=typing.cast(Domain, domain),
    source=source,
    tests=tests,
    meta=json.dumps(meta, sort_keys=True),
  )


def problem_id(source: str, text: str, system: str | None = None) -> str:
  """Returns a problem's id.

  The same for the same source, statement and system turn, white space apart.
  """
  turns = [" ".join(text.split())]
  if system is not None:
    turns.append(" ".join(system.split()))
  # 64 bits of the hash: of 100,000 problems any two share them with a chance of
  # 3e-10.
  return f"{source}-{content_key(source, *turns)[:16]}"


def statement(row: Mapping[str, Any]) -> str:
  """Returns the problem statement of a row, without white space around it."""
  found = column(row, PROBLEM_KEYS)
  if found is None:
    raise BadRow("no problem" + _meant(row, "problem"))
  return _text(found, "problem")


def _meant(row: Mapping[str, Any], ours: str) -> str:
  """Returns a clause about the column that likely is meant by one of ours."""
  near = usual_names.column(ours, row, _USED)
  return f'; did you mean "{ours}" by its column "{near}"?' if near else ""


def misspelt(found: Sequence[Problem]) -> Iterator[str]:
  """Yields a line for each column that no problem has and some likely mean.

  Such a row is a good one, as it may do without: nobody would say so later.
  """
  lacking = {
    "answer": all(not each.has_gold for each in found),
    "solution": all(each.solution is None for each in found),
  }
  if not any(lacking.values()):
    return
  # Most rows of a file have the same columns: few sets are compared.
  columns = collections.Counter(tuple(json.loads(p.meta)) for p in found)
  for ours in [name for name, lacks in lacking.items() if lacks]:
    near: collections.Counter[str] = collections.Counter()
    for there, count in columns.items():
      if name := usual_names.column(ours, there, _USED):
        near[name] += count
    for name, count in near.most_common(1):
      yield (
        f'no row has a column "{ours}", and {count:,} of {len(found):,} have'
        f' "{name}": did you mean "{ours}"?'
      )


def column(row: Mapping[str, Any], names: Sequence[str]) -> Any:
  """Returns the first of the named columns that holds something, or None."""
  return next((row[n] for n in names if row.get(n) is not None), None)


def answer_text(value: Any, *, required: bool = True) -> str:
  """Writes a gold answer as text.

  Whole floats become integers; of a list with one answer that is taken.

  Args:
    value: what the row has.
    required: whether there has to be one; without, none is ''.

  Raises:
    BadRow: there is none and has to be one, or there are several that differ.
  """
  if isinstance(value, list | tuple):
    answers: dict[str, str] = {}
    for answer in map(answer_text, value):
      answers.setdefault(comparable(answer), answer)
    if len(answers) > 1:
      raise BadRow(
        f"{len(answers)} different answers ({', '.join(answers.values())}); "
        "one can be graded"
      )
    value = next(iter(answers.values()), None)
  if isinstance(value, float) and not math.isfinite(value):
    value = None
  if value is None or (isinstance(value, str) and not value.strip()):
    if required:
      raise BadRow("no answer")
    return ""
  if isinstance(value, bool) or not isinstance(value, str | int | float):
    raise BadRow(f"answer is a {type(value).__name__}, not a text or a number")
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  return _text(str(value), "answer")


def worked_answer(text: str) -> tuple[str, str | None]:
  """Splits an answer as GSM8K has it: (answer, worked solution or None).

  The solution stands before the last `####` and the answer behind it.
  """
  work, _, answer = text.rpartition("####")
  # Without the marks for a calculator (`<<48/2=24>>`), which no model is to
  # learn, and without what groups digits.
  solution = _CALCULATOR.sub("", work).strip()
  answer = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer)
  return answer.strip(), solution or None


def comparable(answer: str) -> str:
  """Strips differences of notation off an answer, to compare golds only."""
  # Not `grading.math`, which builds on this package: what is missed here sets a
  # row aside that disagrees in notation alone.
  answer = re.sub(r"\\[dt]frac", r"\\frac", answer)
  answer = re.sub(r"\\left|\\right|\\[!,;\s]|\\\$|[\s$]", "", answer)
  answer = answer.rstrip(".")
  # At most 100 digits: int() refuses texts of over 4,300.
  return str(int(answer)) if re.fullmatch(r"-?[0-9]{1,100}", answer) else answer


def _text(value: Any, what: str) -> str:
  if value is None:
    raise BadRow(f"no {what}")
  if not isinstance(value, str):
    raise BadRow(f"{what} is a {type(value).__name__}, not a text")
  if not (value := value.strip()):
    raise BadRow(f"no {what}")
  try:
    # JSON can hold half a surrogate pair, parquet can't: better here than when
    # the problems are written.
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    raise BadRow(f"{what} is not valid Unicode") from error
  return value


def optional_text(
  row: Mapping[str, Any], names: Sequence[str], what: str
) -> str | None:
  """Returns the text of the first of the named columns that has one, or None.

  Raises:
    BadRow: it is no text; `what` names it.
  """
  value = column(row, names)
  if value is None or (isinstance(value, str) and not value.strip()):
    return None
  return _text(value, what)


def _read(path: Path) -> Iterator[tuple[str, Any]]:
  if path.name.endswith(".parquet"):
    try:
      batches = pq.read_table(path).to_batches(max_chunksize=_BATCH)
    except (OSError, pa.ArrowException) as error:
      raise UserError(
        f"{path}: can't be read as parquet ({_arrow_s(error)}); fetch the file"
        " again"
      ) from error
    yield from _numbered(path, map(_python_rows, batches))
    return
  if path.name.endswith(".arrow"):
    yield from _read_arrow(path)
    return
  if not path.name.endswith(SUFFIXES):
    raise UserError(
      f"{path}: not a data file; give one that ends in {', '.join(SUFFIXES)}"
    )
  try:
    with _text_file(path) as file:
      if ".jsonl" in path.name:
        yield from _read_lines(path, file)
        return
      text = file.read()
  except UnicodeDecodeError as error:
    raise UserError(
      f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); write it"
      " in UTF-8"
    ) from error
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(
      f"{path}: can't be read as text ({error}); fetch the file again"
    ) from error
  try:
    rows = json_files.loads(text) if text.strip() else []
  except ValueError as error:
    # A `.json` file that holds JSON lines: some data sets come so.
    if "Extra data" not in str(error):
      raise UserError(
        f"{path}: not JSON ({error}); fetch the file again"
      ) from error
    yield from _read_lines(path, io.StringIO(text, newline="\n"))
    return
  if not isinstance(rows, list):
    raise UserError(
      f"{path}: one JSON {type(rows).__name__}; give a list of objects"
    )
  yield from _numbered(path, [rows])


def _numbered(
  path: Path, batches: Iterable[Iterable[Any]]
) -> Iterator[tuple[str, Any]]:
  """Yields the rows of all batches, each with its number in the file."""
  for i, row in enumerate(itertools.chain.from_iterable(batches), 1):
    yield f"{path.name} row {i}", row


def _arrow_s(error: Exception) -> str:
  """Returns the reason of arrow, which may be long or none."""
  return one_line(error)[:160]


def _python_rows(batch: pa.RecordBatch) -> Iterator[Any]:
  """Yields the rows of a batch; for one that Python can't hold a `BadRow`.

  Columnar files have moments of the year 100,000, and nanoseconds.
  """
  for number, field in enumerate(batch.schema):
    if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
      kind = pa.timestamp("us", field.type.tz)
      coarser = batch.column(number).cast(kind, safe=False)
      batch = batch.set_column(number, field.name, coarser)
  try:
    yield from batch.to_pylist()
    return
  except (ValueError, OverflowError, pa.ArrowException):
    pass
  for start in range(len(batch)):
    try:
      yield batch.slice(start, 1).to_pylist()[0]
    except (ValueError, OverflowError, pa.ArrowException) as error:
      yield BadRow(f"a value that can't be read ({_arrow_s(error)})")


def _text_file(path: Path) -> typing.TextIO:
  """Opens a text; its lines end at line feeds, which JSON has in no string."""
  if path.name.endswith(".gz"):
    return gzip.open(path, "rt", encoding="utf-8-sig", newline="\n")
  return path.open(encoding="utf-8-sig", newline="\n")


def _read_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
  for i, line in enumerate(lines):
    if line.strip():
      try:
        row = json_files.loads(line)
      except ValueError as error:
        row = BadRow(f"not JSON ({error})")
        if "integer string conversion" in str(error):
          row = BadRow(
            "an integer of over 4,300 digits; in tests that are a text of JSON"
            " it may have any length"
          )
      yield f"{path.name} line {i + 1}", row


def _read_arrow(path: Path) -> Iterator[tuple[str, Any]]:
  """Reads a file as the library `datasets` keeps it, batch by batch."""
  try:
    with pa.memory_map(str(path)) as source:
      batches = map(_python_rows, pa.ipc.open_stream(source))
      yield from _numbered(path, batches)
  except (OSError, pa.ArrowException) as error:
    raise UserError(
      f"{path}: can't be read as an arrow stream ({_arrow_s(error)}); fetch the"
      " file again"
    ) from error
