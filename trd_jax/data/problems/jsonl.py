"""Anybody's own problems: JSON lines, JSON lists or parquet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trd_jax.data.problems import arithmetic, rows, sources, test_column
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import SYSTEM_TURN, Problem, Rejected
from trd_jax.experiment.schema import Data


def load(data: Data) -> tuple[list[Problem], list[Rejected]]:
  """Reads problems from the file, or all data files of a folder, `data.root`.

  Columns: `problem` (or `question`), and where there are such `answer`,
  `solution` (the reference y*), `tests` (a text, or JSON that becomes one),
  `domain` (default `code` for a row with tests, else `math`). A row without
  answer and tests is one without a verdict; an answer of the laboratory's
  `arithmetic` is one of its numbers. Other scalar columns are kept in `meta`.
  In place of `problem` a row may have `messages`: one user turn, the problem,
  and perhaps a system turn before it.

  Raises:
    UserError: no `data.root`, or it is missing, unreadable or empty.
  """
  return rows.collect("jsonl", files(data.root), _problem, _rows)


def files(root: str | None) -> list[Path]:
  """Lists the local files that the problems are read from.

  Raises:
    UserError: there is no `root`, nothing at it, or no data file in it.
  """
  if root is None:
    raise UserError(
      "data.source=jsonl: no file; set data.root to a .jsonl, .json or "
      ".parquet file with the columns problem and answer"
    )
  path = sources.local_root(root, downloads=False)
  if path.is_file():
    return [path]
  found = sources.data_files(path)
  if not found:
    raise UserError(
      f"data.root={root}: no data file in this folder; give one that "
      f"ends in {', '.join(sources.SUFFIXES)}"
    )
  return found


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
  """Yields a file's rows, with `messages` taken apart."""
  for where, row in rows.read(path):
    row = _as_of_verl(row)
    # Beside a problem they are something else, as what a model was taught.
    if (
      isinstance(row, Mapping)
      and row.get("messages") is not None
      and rows.column(row, rows.PROBLEM_KEYS) is None
    ):
      try:
        row = {**row, **_turns(row["messages"])}
      except rows.BadRow as error:
        row = error
    yield where, row


def _as_of_verl(row: Any) -> Any:
  """Returns a row of verl's form with the columns that this source reads."""
  if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), list):
    return row
  reward = row.get("reward_model")
  truth = reward.get("ground_truth") if isinstance(reward, Mapping) else None
  found = {"messages": row["prompt"], "answer": truth}
  return {**row, **{k: v for k, v in found.items() if row.get(k) is None}}


def _turns(messages: Any) -> dict[str, str | None]:
  """Returns the problem and the system turn of a chat that asks one thing.

  Raises:
    rows.BadRow: it has other turns than these, or one without a text.
  """
  if not isinstance(messages, list) or not all(
    isinstance(turn, Mapping) for turn in messages
  ):
    raise rows.BadRow("messages is no list of turns with role and content")
  roles = [turn.get("role") for turn in messages]
  if roles not in (["user"], ["system", "user"]):
    raise rows.BadRow(
      f"messages has the turns {', '.join(map(str, roles))[:80] or 'none'}; it"
      " may have one of the system and has one of the user, the problem"
    )
  for turn in messages:
    if not isinstance(content := turn.get("content"), str):
      raise rows.BadRow(
        f"the {turn['role']} turn's content is a {type(content).__name__}, not"
        " a text"
      )
  turns = {turn["role"]: turn["content"] for turn in messages}
  return {"problem": turns["user"], SYSTEM_TURN: turns.get("system")}


def _problem(row: Mapping[str, Any]) -> Problem:
  """Makes a problem of a row; tests that are no text become JSON.

  An answer with `####` is a worked solution and, after that, the answer.
  """
  tests = test_column.to_text(row.get("tests"))
  answer, solution = None, None
  given = row.get("answer")
  if isinstance(given, str) and "####" in given:
    answer, solution = rows.worked_answer(given)
    answer = rows.answer_text(answer)
  domain = row.get("domain") or ("code" if tests else "math")
  problem = rows.to_problem(
    row,
    "jsonl",
    answer=answer,
    solution=rows.optional_text(row, ("solution",), "solution") or solution,
    domain=domain,
    tests=tests,
    answer_required=False,
    system=rows.optional_text(row, (SYSTEM_TURN,), "the system turn"),
  )
  answered = bool(problem.answer)
  if (
    domain == "arithmetic"
    and answered
    and not _is_of_laboratory(problem.answer)
  ):
    raise rows.BadRow(
      f"answer {problem.answer[:40]} is none of the laboratory's arithmetic,"
      f" which is modulo {arithmetic.MODULUS}; give an integer from 0 to"
      f" {arithmetic.MODULUS - 1}"
    )
  return problem


def _is_of_laboratory(answer: str) -> bool:
  """Returns whether an answer is a number that laboratory chains end in."""
  try:
    return float(rows.comparable(answer)) in range(arithmetic.MODULUS)
  except ValueError:
    return False


SOURCE = sources.Source(load, files, needs_root=True)
