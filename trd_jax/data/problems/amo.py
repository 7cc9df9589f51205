"""AMO-Bench: the 39 problems that a parser can grade, of 50.

The other eleven ask for a description, which takes a judge. Two answers are
formulas; they are compared at fixed values of their variables, which go into
`Problem.meta` as `values` (see `grading.formulas`). A prompt ends with the form
in which the data set wants the answer, so that it is the whole message.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from trd_jax.data import final_answer
from trd_jax.data.problems import rows
from trd_jax.experiment.records import Problem

# All but the descriptions: 2, 24 to 27, 38 to 42 and 46.
PARSED = frozenset(
  {1, *range(3, 24), *range(28, 38), 43, 44, 45, *range(47, 51)}
)

# Where the formulas are compared: n; the sides a, b, c of a triangle.
VALUES: Mapping[int, tuple[dict[str, int], ...]] = {
  5: tuple({"n": n} for n in range(1, 21)),
  37: tuple({"a": a, "b": a + 1, "c": a + 2} for a in range(2, 19)),
}
# The gold of problem 35 as its revised statement has it.
REVISED = {35: "7657"}


def problem(row: Mapping[str, Any], name: str) -> Problem | None:
  """Reads a row with `question_id`, `prompt`, `answer`, maybe `solution`.

  Returns:
    None for a question that no parser can grade.

  Raises:
    rows.BadRow: a column is missing or unusable.
  """
  number = row.get("question_id")
  # A bool is an int to Python, and True would be question 1.
  if isinstance(number, bool) or not isinstance(number, int):
    raise rows.BadRow("no question_id")
  if number not in PARSED:
    return None
  answer = rows.answer_text(row.get("answer"))
  gold = REVISED.get(number) or final_answer.unboxed(answer)
  prompt = row.get("prompt")
  built = rows.to_problem(
    {"problem": prompt, "solution": row.get("solution")}, name, answer=gold
  )
  meta: dict[str, Any] = {"question_id": number}
  if number in VALUES:
    meta["values"] = VALUES[number]
  return dataclasses.replace(
    built, problem_id=f"{name}-{number}", meta=json.dumps(meta, sort_keys=True)
  )
