"""HumanEval+ and MBPP+: functions to write, for EvalPlus to test.

The tests stay in EvalPlus's own file, which `grading.evalplus` gives to it;
a `Problem` knows its task by `task_id` in `meta`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from trd_jax.data.problems import rows
from trd_jax.experiment.records import Problem

_COMPLETE = (
  "Complete the Python function `{entry}` below. Give the whole program: its "
  "imports, every function that is shown, and the body that is missing."
)
_DESCRIBED = (
  "Write the Python function `{entry}` that is described below. Give the whole "
  "program, imports included."
)


def problem(row: Mapping[str, Any], name: str) -> Problem:
  """Reads a row of an EvalPlus file; y* is its canonical solution.

  Raises:
    rows.BadRow: a column is missing.
  """
  for column in ("task_id", "prompt", "entry_point", "canonical_solution"):
    if not isinstance(row.get(column), str) or not row[column].strip():
      raise rows.BadRow(f"no {column}")
  task, prompt, entry = row["task_id"], row["prompt"], row["entry_point"]
  # HumanEval+ shows the head of the function, MBPP+ describes it in a text.
  task_is = _COMPLETE if f"def {entry}" in prompt else _DESCRIBED
  built = rows.to_problem(
    {},
    name,
    text=f"{task_is.format(entry=entry)}\n\n```python\n{prompt.rstrip()}\n```",
    answer="",
    solution=fenced(prompt + row["canonical_solution"]),
    domain="code",
  )
  meta = {"task_id": task, "entry_point": entry}
  return dataclasses.replace(
    built, problem_id=task, meta=json.dumps(meta, sort_keys=True)
  )


def fenced(program: str) -> str:
  """Writes a program as a response gives it, in a block of Python."""
  return f"```python\n{program.strip()}\n```"
