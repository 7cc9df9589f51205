"""Looks at the tests of a row as it is read, so that none is found bad later.

What the tests say is the grader's to read (`grading.code.code_tests`). Here
their form is checked: after hours of generation nothing could be done about it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trd_jax.data.problems import rows
from trd_jax.experiment.files import json_files

# An object that holds tests in one of these is looked into by the grader.
_HOLDERS = ("input_output", "tests", "public_test_cases", "private_test_cases")
_WRAPPINGS = 3  # times that JSON may stand in a text of JSON


def to_text(tests: Any) -> str | None:
  """Returns a row's tests as JSON text; None where it has none.

  Args:
    tests: the column: JSON, text of JSON (perhaps encoded twice), or packed
      text, which is left as it is.

  Raises:
    rows.BadRow: they are of no known form, or hold no test.
  """
  if tests is None or (isinstance(tests, str) and not tests.strip()):
    return None
  for _ in range(_WRAPPINGS):
    if not isinstance(tests, str):
      break
    if tests.lstrip()[:1] not in ("{", "[", '"'):
      return tests  # packed
    try:
      # Digits stay digits: integers of any length are none too long.
      inner = json_files.loads(tests, parse_int=_Integer)
    except ValueError as error:
      raise rows.BadRow(f"tests are not JSON ({error})") from None
    if not isinstance(inner, str):
      _check(inner)
      return tests
    tests = inner
  _check(tests)
  try:
    return json.dumps(tests, allow_nan=False)
  except ValueError:
    raise rows.BadRow("tests hold a number that is none (NaN)") from None


class _Integer(str):
  """An integer's digits."""


def _check(tests: Any) -> None:
  if isinstance(tests, Mapping):
    if any(tests.get(name) for name in _HOLDERS):
      return
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
      raise rows.BadRow("tests have no lists of inputs and outputs")
    if len(inputs) != len(outputs):
      raise rows.BadRow(
        f"tests have {len(inputs)} inputs but {len(outputs)} outputs"
      )
    if not inputs:
      raise rows.BadRow("tests hold no test")
  elif isinstance(tests, list):
    if not tests:
      raise rows.BadRow("tests hold no test")
    for test in tests:
      if not isinstance(test, Mapping) or not {"input", "output"} <= {*test}:
        raise rows.BadRow(
          "a test is no object with input and output (assertions can't be run:"
          " a test is an input and the output that is right)"
        )
  else:
    raise rows.BadRow(
      f"tests are a {type(tests).__name__}, not inputs and outputs"
    )
