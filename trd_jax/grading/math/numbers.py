"""Number literals, compared.

Policies:
- fractions need not be reduced; mixed numbers and `a/b` are fractions;
- a time of day or a duration (2:30) is no ratio and equals itself alone;
- integers and fractions are compared exactly. A decimal stands for the number
  that it rounds: to a relative 1e-6, and where the gold is itself a decimal
  the answer must also round to the gold's digits. A gold decimal of at least
  four significant digits is taken for a rounded value: then its own digits
  are all that the answer has to reproduce.
"""

import math
import re
from fractions import Fraction
from typing import NamedTuple

from trd_jax.grading.math import units

RELATIVE = Fraction(1, 10**6)
_ROUNDED_DIGITS = 4
_MAX_DIGITS = 4000  # int() refuses more than 4,300
# 10^400 exactly is cheap; 10^9999999 would fill the memory.
_MAX_EXPONENT = 400

_DIGITS = r"\d{1,3}(?:,\d{3})+|\d+"
_UNSIGNED = rf"(?:(?:{_DIGITS})(?:\.\d*)?|\.\d+)"
_DECIMAL = re.compile(rf"([+-]?)\s*({_UNSIGNED})\Z")
_RATIO = re.compile(
  rf"([+-]?)\s*\(?\s*(?:(\d+)\s+(?=\d))?([+-]?\s*{_UNSIGNED})"
  rf"\s*/\s*([+-]?\s*{_UNSIGNED})\s*\)?\Z"
)
_FRACTION = re.compile(
  rf"([+-]?)\s*(\d+)?\s*\\frac\{{\s*([+-]?\s*{_UNSIGNED})\s*\}}"
  rf"\{{\s*([+-]?\s*{_UNSIGNED})\s*\}}\Z"
)
_SCIENTIFIC = re.compile(
  rf"([+-]?)\s*(?:({_UNSIGNED})\s*\\(?:times|cdot)\s*)?"
  r"10\s*\^\s*\{?\s*([+-]?\s*\d{1,4})\s*\}?\Z"
)


# Minutes and seconds; a ratio may look so, but then is not reduced.
_CLOCK = re.compile(r"\d{1,2}(?::[0-5]\d){1,2}\Z")
_COLONS = re.compile(r"\d+(?::\d+)+\Z")
_ASIDE = re.compile(r"\S\s*\\approx\s*([+-]?\d[\d,.]*(?<![,.]))\s*\Z")
_HALVES = ("am", "pm")  # of a day, as `notation.rewrite` writes them
# In a gold this is Euler's number and a difference; a program means 2/1000.
_PROGRAMS = re.compile(r"([+-]?\d+)e([+-]\d{1,3})\Z")


class Literal(NamedTuple):
  """An exact value; `places` is the count of decimals it was written with."""

  value: Fraction
  places: int | None
  significant: int


def _unsigned(text: str) -> tuple[Fraction, int | None, int]:
  """Reads a literal with a sign: value, decimals, significant digits."""
  text = text.replace(",", "").replace(" ", "")
  whole, point, part = text.partition(".")
  digits = (whole.lstrip("+-") + part).lstrip("0")
  value = Fraction(int(whole + part or "0"), 10 ** len(part))
  return value, len(part) if point else None, len(digits)


def literal(text: str) -> Literal | None:
  r"""Reads an integer, decimal, fraction, mixed number or a·10^b.

  Args:
    text: a cleaned answer (`latex.clean`), without words and units.

  Returns:
    The exact value, or None where the text is anything else, divides by zero
    or has more than 4,000 characters.
  """
  text = text.strip()
  if len(text) > _MAX_DIGITS:
    return None
  sign = 1
  if match := _DECIMAL.match(text):
    value, places, significant = _unsigned(match[2])
    sign = -1 if match[1] == "-" else 1
    return Literal(sign * value, places, significant)
  if (match := _RATIO.match(text)) or (match := _FRACTION.match(text)):
    top, bottom, whole = match[3], match[4], match[2]
  elif match := _SCIENTIFIC.match(text):
    mantissa, places, significant = _unsigned(match[2] or "1")
    exponent = int(match[3].replace(" ", ""))
    if abs(exponent) > _MAX_EXPONENT:
      return None
    sign = -1 if match[1] == "-" else 1
    value = sign * mantissa * Fraction(10) ** exponent
    return Literal(value, None, significant)
  else:
    return None
  numerator, denominator = _unsigned(top)[0], _unsigned(bottom)[0]
  if denominator == 0:
    return None
  value = numerator / denominator
  if whole is not None:
    # `1 5/3` is no mixed number but two numbers beside each other.
    if value < 0 or (value >= 1 and "/" in text):
      return None
    value += int(whole)
  return Literal(-value if match[1] == "-" else value, None, 0)


def close(gold: Literal, answer: Fraction, exact: bool) -> bool:
  """Returns whether `answer` is the gold's value under the decimal policy.

  Args:
    gold: the gold's value and how it was written.
    answer: the answer's value (exact, or to well over 6 digits).
    exact: whether the answer was written without a decimal point.
  """
  if gold.value == answer:
    return True
  if gold.places is None:
    if exact:
      return False
    # 1234567.4 is not 1234567, however small the relative difference.
    whole = gold.value.denominator == 1
    scale = min(abs(gold.value), 1) if whole else abs(gold.value)
    return abs(gold.value - answer) <= RELATIVE * scale
  # Half a unit of the gold's last decimal, in exact arithmetic.
  rounds = abs(gold.value - answer) * 2 * 10**gold.places <= 1
  if gold.significant >= _ROUNDED_DIGITS:
    return rounds
  return rounds and abs(gold.value - answer) <= RELATIVE * abs(gold.value)


def literals_equal(gold: Literal, answer: Literal) -> bool:
  """Compares two literals under the policies at the module's head."""
  # An answer with no more decimals than the gold is no finer value that could
  # round to it: 3.1 is not 3.14.
  if gold.places is not None and -1 < (answer.places or -1) <= gold.places:
    return gold.value == answer.value
  return close(gold, answer.value, answer.places is None)


def _same_time(
  gold: tuple[str, str | None], answer: tuple[str, str | None]
) -> bool:
  """Compares times, each with the half of the day or its unit, if said.

  3:30 leaves open which half of the day is meant; 15:30 doesn't.
  """
  if not units.agree(gold[1], answer[1]):
    return False
  if not _CLOCK.match(answer[0]):  # 1:5 is a ratio
    return False
  seconds = []
  for text, half in (gold, answer):
    first, *rest = map(int, text.split(":"))
    if half in _HALVES and first <= 12:
      first = first % 12 + 12 * (half == "pm")
    seconds.append((first, *rest))
  halves = {gold[1], answer[1]} & {*_HALVES}
  return seconds[0] == seconds[1] or (bool(halves) and gold[0] == answer[0])


def equal(gold: str, answer: str) -> bool | None:
  """Compares two single values that are literals; None where one is not.

  Args:
    gold: the right one, cleaned.
    answer: the one being judged, cleaned.
  """
  mine, unit = units.measure(gold)
  yours, other_unit = units.measure(answer)
  # Before the literals: 2:30 would be the ratio 1/15.
  if _CLOCK.match(mine):
    if _COLONS.match(yours):
      return _same_time((mine, unit), (yours, other_unit))
    if unit in _HALVES or math.gcd(*map(int, mine.split(":"))) > 1:
      return False
  one, other = literal(mine), literal(yours)
  if one is not None and (written := _PROGRAMS.match(yours)):
    other = literal(f"{written[1]}\\times 10^{{{written[2]}}}")
  if one is None or other is None:
    return None
  if not units.agree(unit, other_unit):
    return False
  # 36% may be called 36, but a quarter is no quarter of a percent.
  if other_unit == "%" and not unit and abs(one.value) < 1 and one.value:
    return False
  aside = _ASIDE.search(answer)
  rounded = literal(aside[1]) if aside else None
  # 12 ≈ 2 contradicts itself, as 12 = 2 does.
  if rounded and abs(other.value - rounded.value) * 20 > abs(other.value):
    return False
  return literals_equal(one, other)
