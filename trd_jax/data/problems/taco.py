"""TACO: competitive programming with tests and programs that solve them.

`Problem.tests` is a row's `input_output`, JSON as it stands: without
`fn_name` the inputs are texts for standard input, with it they are lists of
arguments and the outputs lists of one result. The reference y* is the first
solution that parses as Python 3.

What comparing outputs can't grade is marked in `meta` as `special_judge`, and
no verdict is given on it: interactive problems, and those of which several
outputs are right. The latter are known where a file
`<data file's stem>_special_judge_flags.jsonl` with `idx` (the row, from 0) and
`special_judge` lies beside the data file.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trd_jax.data.problems import rows, sources
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import json_files
from trd_jax.experiment.records import Problem, Rejected
from trd_jax.experiment.schema import Data

HUB = sources.Hub("BAAI/TACO", "train/*.arrow")
_FLAGS = "_special_judge_flags"
_SPECIAL = "special_judge"
_INTERACTIVE = "this is an interactive problem"
_NO_TEST = '{"inputs": [""], "outputs": [""]}'  # has the form of one
_META = ("difficulty", "source", "name", "url", "time_limit", "memory_limit")


def load(
  data: Data, graded: bool = True
) -> tuple[list[Problem], list[Rejected]]:
  """Reads the problems from `data.root` or the hub's training split.

  `data.root` is a file or a folder. Where nothing is graded, a row without
  usable tests is a problem, too.

  Raises:
    UserError: a file is missing, unreadable or empty.
  """
  if data.root is None:
    found = sources.fetch(HUB, "data.source=taco")[1]
  else:
    found = [file for file in files(data.root) if _FLAGS not in file.name]
    if not found:
      raise UserError(
        f"data.root={data.root}: no data file in this folder; give one that"
        f" ends in {', '.join(sources.SUFFIXES)}"
      )
  build = problem if graded else _with_or_without_tests
  return rows.collect("taco", found, build, _flagged)


def files(root: str | None) -> list[Path]:
  """Lists the local files that the problems are read from, and of flags.

  Raises:
    UserError: there is nothing at `root`.
  """
  assert root is not None
  path = sources.local_root(root)
  if not path.is_file():
    return sources.data_files(path)
  beside = _flags_of(path)
  return [path, beside] if beside.is_file() else [path]


def problem(row: Mapping[str, Any]) -> Problem:
  """Reads a row with `question`, `input_output` and perhaps `solutions`.

  Raises:
    rows.BadRow: a column is missing or unusable.
  """
  text = rows.statement(row)
  starter = row.get("starter_code")
  if isinstance(starter, str) and starter.strip():
    text = f"{text}\n\n```python\n{starter.rstrip()}\n```"
  meta = {key: row[key] for key in _META if row.get(key) is not None}
  if row.get(_SPECIAL) or _INTERACTIVE in text[:2000].lower():
    meta[_SPECIAL] = True
  return rows.to_problem(
    meta,
    "taco",
    text=text,
    answer="",
    solution=_reference(row.get("solutions")),
    domain="code",
    tests=tests(row.get("input_output")),
  )


def _with_or_without_tests(row: Mapping[str, Any]) -> Problem:
  """Reads a row, as `problem`; one whose tests can't be used has none."""
  try:
    tests(row.get("input_output"))
  except rows.BadRow:
    # What is wrong besides is said of the row itself.
    whole = problem({**row, "input_output": _NO_TEST})
    return dataclasses.replace(whole, tests=None)
  return problem(row)


def tests(input_output: Any) -> str:
  """Checks a row's tests for their form; the text stays as it is.

  Integers of any length are left as digits, so that none is too long.

  Raises:
    rows.BadRow: there are none, or as many outputs as inputs are not there.
  """
  if not isinstance(input_output, str) or not input_output.strip():
    raise rows.BadRow("no input_output")
  try:
    found = json_files.loads(input_output, parse_int=str)
  except ValueError as error:
    raise rows.BadRow(f"input_output is not JSON ({error})") from None
  if not isinstance(found, dict):
    raise rows.BadRow("input_output is no JSON object")
  inputs, outputs = found.get("inputs"), found.get("outputs")
  if not (isinstance(inputs, list) and isinstance(outputs, list) and inputs):
    raise rows.BadRow("input_output has no inputs and outputs")
  if len(inputs) != len(outputs):
    raise rows.BadRow(f"{len(inputs)} inputs but {len(outputs)} outputs")
  return input_output


def _reference(solutions: Any) -> str | None:
  """Returns the first solution in Python 3, as a response would give it."""
  if isinstance(solutions, str) and solutions.strip():
    try:
      solutions = json_files.loads(solutions)
    except ValueError:
      raise rows.BadRow("solutions is not JSON") from None
  if solutions is not None and not isinstance(solutions, list | str):
    raise rows.BadRow(f"solutions are a {type(solutions).__name__}, not a list")
  for program in solutions or ():
    if isinstance(program, str) and _is_python(program):
      return f"```python\n{program.strip()}\n```"
  return None


def _is_python(program: str) -> bool:
  """Returns whether a program parses, to some statement; runs nothing."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of odd escapes in old programs
      return bool(ast.parse(program).body)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return False


def _flags_of(path: Path) -> Path:
  stem = path.name.partition(".")[0]
  return path.with_name(f"{stem}{_FLAGS}.jsonl")


def _flagged(path: Path) -> Iterator[tuple[str, Any]]:
  """Yields a file's rows, with what is known of special judges."""
  beside = _flags_of(path)
  flags = {}
  if beside.is_file():
    for where, row in rows.read(beside):
      if not isinstance(row, Mapping) or not {"idx", _SPECIAL} <= row.keys():
        raise UserError(
          f"{where}: a row of flags has the fields idx and {_SPECIAL}; mend the"
          " file, or remove it where nothing is known of special judges"
        )
      flags[row["idx"]] = bool(row[_SPECIAL])
  for index, (where, row) in enumerate(rows.read(path)):
    # Where there is a file of flags it speaks for all rows; without one the
    # rows' own column stands.
    if isinstance(row, Mapping) and flags:
      row = {**row, _SPECIAL: flags.get(index, False)}
    yield where, row


SOURCE = sources.Source(
  load,
  files,
  hub=(HUB,),
  load_ungraded=functools.partial(load, graded=False),
  in_paper="about 25,000",
)
