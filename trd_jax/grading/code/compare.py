"""Whether what a solution gave is what a test expects; untrusted data only.

Programs: white space around a line and blank lines don't count, words have to
be the same ones, line by line, and a number may be written in another way
(`2.0` for `2`). Where the format is tolerant (TACO, APPS) a number may be off
by a relative 1e-5 if the test writes a decimal, by 1e-9 if it writes an
integer and the solution a decimal; two integers have to be equal.

Functions: values are JSON on both sides, so that a tuple is a list, an
object's keys are texts, and an object that calls itself equal to everything is
no value at all. Where the format is tolerant, a float that a test writes may be
off by a relative 1e-9, as sums are.
"""

import math
import re
from decimal import Decimal
from typing import Any

from trd_jax.grading.code import code_tests

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?", re.ASCII)
_MAX_NUMBER = 4000
_ABSOLUTE, _RELATIVE, _RELATIVE_TO_INTEGER = 1e-8, 1e-5, 1e-9
_SLACK = 1 << 16


def _words(text: str) -> list[list[str]]:
  lines = (line.split() for line in text.split("\n"))
  return [words for words in lines if words]


def _same_word(expected: str, word: str, tolerant: bool) -> bool:
  if expected == word:
    return True
  # The solution chose these words, and millions of digits would take our time,
  # not its own. So would large exponents: _NUMBER allows three digits.
  if max(len(expected), len(word)) > _MAX_NUMBER:
    return False
  if not (_NUMBER.fullmatch(expected) and _NUMBER.fullmatch(word)):
    return False
  # As decimals, exactly: as floats, long integers that differ can be equal.
  if Decimal(expected) == Decimal(word):
    return True
  decimal, other = (bool(re.search("[.eE]", w)) for w in (expected, word))
  if not tolerant or not (decimal or other):
    return False
  relative = _RELATIVE if decimal else _RELATIVE_TO_INTEGER
  right, given = Decimal(expected), Decimal(word)
  bound = Decimal(_ABSOLUTE) + Decimal(relative) * abs(right)
  return abs(right - given) <= bound


def same_output(expected: str, written: bytes, tolerant: bool) -> bool:
  """Returns whether a program wrote what a test expects.

  Args:
    expected: the test's output.
    written: what the program wrote to standard output.
    tolerant: see `code_tests.Tests`.
  """
  # Far more than is expected is wrong, and costs no memory to say so.
  if len(written) > 8 * len(expected) + _SLACK:
    return False
  right = _words(expected)
  # Bytes that are no UTF-8 make a wrong answer, and no error of ours.
  given = _words(written.decode("utf-8", "replace"))
  return len(right) == len(given) and all(
    len(one) == len(other)
    and all(_same_word(a, b, tolerant) for a, b in zip(one, other, strict=True))
    for one, other in zip(right, given, strict=True)
  )


def _same_json(expected: Any, value: Any, tolerant: bool) -> bool:
  """Compares what JSON holds; floats to a relative 1e-9 where `tolerant`."""
  if expected == value:
    return True
  if not tolerant:
    return False
  if isinstance(expected, list) and isinstance(value, list):
    return len(expected) == len(value) and all(
      _same_json(a, b, True) for a, b in zip(expected, value, strict=True)
    )
  if isinstance(expected, dict) and isinstance(value, dict):
    return expected.keys() == value.keys() and all(
      _same_json(each, value[name], True) for name, each in expected.items()
    )
  # An integer in the test has no rounding: 2.0000000001 is not 2.
  return (
    isinstance(expected, float)
    and isinstance(value, float | int)
    and not isinstance(value, bool)
    and math.isclose(expected, value, rel_tol=_RELATIVE_TO_INTEGER)
  )


def same_value(
  expected: tuple[Any, ...], written: bytes, tolerant: bool = False
) -> bool:
  """Returns whether a function's value, as JSON, is one a test expects.

  Args:
    expected: the values that are right.
    written: what the function gave.
    tolerant: see `code_tests.Tests`.
  """
  size = max(len(code_tests.dumps(value)) for value in expected)
  if len(written) > 8 * size + _SLACK:
    return False
  try:
    value = code_tests.loads(written)
    return any(_same_json(right, value, tolerant) for right in expected)
  # A solution may nest its value as deep as it likes, or give an integer that
  # no float is near: that is its mistake.
  except (ValueError, RecursionError, OverflowError):
    return False
