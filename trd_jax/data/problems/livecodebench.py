"""LiveCodeBench: programs to write, with public and private tests.

The tests stay as they are published, packed, which is a fraction of their
size: `grading.code_tests` unpacks a problem's when a program is graded, and
never unpickles anything.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from trd_jax.data.problems import rows
from trd_jax.experiment.files import json_files
from trd_jax.experiment.records import Problem

_FUNCTIONAL = "Keep to this code, which names what is called:"
_STANDARD_INPUT = (
  "The program reads standard input and writes to standard output."
)
_TESTS = ("public_test_cases", "private_test_cases", "metadata", "starter_code")
_META = ("question_id", "platform", "difficulty", "contest_date")
# In one published copy a statement stands between these, with a format.
_QUESTION, _FORMAT = "### Question:", "### Format:"
_FENCED = re.compile(r"```python\n(.*?)\n?```", re.DOTALL)


def problem(row: Mapping[str, Any], name: str) -> Problem:
  """Reads a row of the hub's files, or of two published copies of some.

  The copies: `content` with all tests in `test` (and `labels`), and `problem`
  with the public ones in `tests`.

  Raises:
    rows.BadRow: a column is missing.
  """
  starter = row.get("starter_code") or ""
  if not isinstance(starter, str):
    raise rows.BadRow(f"starter_code is a {type(starter).__name__}, not a text")
  meta: dict[str, Any] = {}
  if "question_content" in row:
    text = row["question_content"]
    for column in _TESTS[:2]:
      if not row.get(column):
        raise rows.BadRow(f"no {column}")
    tests = json.dumps({key: row[key] for key in _TESTS if row.get(key)})
    meta |= {key: str(row[key]) for key in _META if row.get(key) is not None}
  elif "content" in row:
    text, starter = _unwrapped(rows.statement({"problem": row["content"]}))
    tests, labels = row.get("test"), _object(row.get("labels") or "{}")
    meta |= {key: labels[key] for key in ("difficulty",) if key in labels}
    meta["question_id"] = str(labels.get("task_id", row.get("id")))
  else:
    text = row.get("problem")
    tests = row.get("tests") and json.dumps(
      {"tests": row["tests"], "starter_code": starter}
    )
  if not isinstance(tests, str) or not tests:
    raise rows.BadRow("no tests")
  where = (
    f"{_FUNCTIONAL}\n\n```python\n{starter.rstrip()}\n```"
    if starter.strip()
    else _STANDARD_INPUT
  )
  statement = rows.statement({"problem": text})
  # As its own tool is given it, whose prompt may be asked.
  meta["published"] = {"content": text, "starter_code": starter}
  built = rows.to_problem(
    {},
    name,
    text=f"{statement}\n\n{where}",
    answer="",
    domain="code",
    tests=tests,
  )
  if "question_id" in meta:
    own = f"{name}-{meta['question_id']}"
    built = dataclasses.replace(built, problem_id=own)
  return dataclasses.replace(built, meta=json.dumps(meta, sort_keys=True))


def _object(text: Any) -> dict[str, Any]:
  """Reads a JSON object, given as a text or as it is; {} for anything else."""
  try:
    value = json_files.loads(text) if isinstance(text, str) else text
  except ValueError as error:
    raise rows.BadRow(f"labels are not JSON ({error})") from None
  return value if isinstance(value, dict) else {}


def _unwrapped(content: str) -> tuple[str, str]:
  """Takes statement and starter code out of a copy's prompt."""
  question = content.rpartition(_QUESTION)[2]
  text, mark, form = question.rpartition(_FORMAT)
  if not mark:
    return question.strip(), ""
  code = _FENCED.search(form)
  starter = code[1] if code and "def " in code[1] else ""
  return text.strip(), starter
