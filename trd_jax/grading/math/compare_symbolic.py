"""Compares single values and relations with algebra: the slow half of grading.

Numbers and expressions are worth what `values` says they are. What it cannot
evaluate (sets, integrals, matrices) falls to math-verify, which is not asked
about numbers: it takes two tiny ones for equal.

Only the worker process imports this module.
"""

import re
from fractions import Fraction

import math_verify
import mpmath
import sympy

from trd_jax.grading.math import numbers, opaque, shapes, units, values
from trd_jax.grading.math.compare_structure import Maybe

# What trees raise that have no value, or parts that no value has.
_NO_VALUE = (values.Unsupported, TypeError, ValueError, AttributeError)
_ASIDE = re.compile(r"\S\s*\\approx\s*([+-]?\d[\d,.]*(?<![,.]))\s*\Z")
_RELATION = re.compile(r"(?<!\\)([<>=])|\\(le|ge|ne)(?![a-z])")


def _decimal_equal(
  gold: str, answer: str, trees: tuple[sympy.Basic, sympy.Basic]
) -> Maybe:
  """Compares values of which at least one was written with a decimal point."""
  rationals = []
  for tree in trees:
    rational = values.exact(tree)
    if rational is None:
      with mpmath.workdps(values.DIGITS):
        value = values.Evaluator([tree], 0)(tree)
        if abs(mpmath.im(value)) > mpmath.mpf(10) ** -20:
          return None
        rational = Fraction(str(mpmath.nstr(mpmath.re(value), 30)))
    rationals.append(rational)
  written = numbers.literal(gold) or numbers.Literal(rationals[0], None, 0)
  return numbers.close(written, rationals[1], "." not in answer)


def _relation_equal(gold: str, answer: str) -> Maybe:
  """Compares two equations or two inequalities.

  They are the same where the differences of their sides are, up to a factor.
  """
  sides = []
  signs = []
  functions = opaque.functions_of((gold, answer))
  for text in (gold, answer):
    found = _RELATION.findall(shapes.outside(text))
    if len(found) != 1:
      return None
    sign = found[0][0] or found[0][1]
    left, right = (values.parse(side, functions) for side in _halves(text))
    if left is None or right is None:
      return None
    if sign in (">", "ge"):
      left, right = right, left
      sign = {">": "<", "ge": "le"}[sign]
    sides.append((left, right))
    signs.append(sign)
  if signs[0] != signs[1]:
    return False
  factors = []
  for seed in range(2 * values.POINTS):
    with mpmath.workdps(2 * values.DIGITS):
      try:
        (a, b, c, d), _ = values.values_at((*sides[0], *sides[1]), seed)
      except ZeroDivisionError:
        continue
      one, other = a - b, c - d
      tiny = mpmath.mpf(10) ** -values.DIGITS
      # A point on one curve and not on the other; on both, no ratio exists.
      if (abs(one) < tiny) != (abs(other) < tiny):
        return False
      if abs(one) < tiny:
        continue
      factors.append(one / other)
      if abs(factors[0] - factors[-1]) > tiny * abs(factors[0]):
        return False
  if len(factors) < values.ENOUGH_POINTS:
    return None
  # A negative factor turns an inequality round, and not an equation.
  if signs[0] in ("=", "ne"):
    return True
  return bool(mpmath.im(factors[0]) == 0 and mpmath.re(factors[0]) > 0)


def _is_near(text: str, rounded: str) -> bool:
  r"""Returns whether a number is about what stands after its `\approx`."""
  tree, literal = values.parse(text), numbers.literal(rounded)
  if tree is None or literal is None or values.has_unknowns(tree):
    return True
  try:
    with mpmath.workdps(values.DIGITS):
      value = values.Evaluator([tree], 0)(tree)
      bound = mpmath.mpf(max(abs(literal.value), Fraction(1, 100)).numerator)
      bound /= max(abs(literal.value), Fraction(1, 100)).denominator
      near = mpmath.mpf(literal.value.numerator) / literal.value.denominator
      return bool(abs(value - near) <= bound / 20)
  except (ZeroDivisionError, values.TooLarge, *_NO_VALUE):
    return True


def _halves(text: str) -> tuple[str, str]:
  match = _RELATION.search(shapes.outside(text))
  assert match is not None
  return text[: match.start()], text[match.end() :]


def _library_equal(gold: str, answer: str) -> Maybe:
  """Asks math-verify about what is not a number.

  These are sets, integrals, matrices; None where it can't read them.
  """
  config = [math_verify.LatexExtractionConfig(boxed_match_priority=-1)]
  trees = [
    # Time limits of its own are off: they would take the alarm that ends this
    # process.
    math_verify.parse(
      f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=0
    )
    for text in (gold, answer)
  ]
  if not all(trees):
    return None
  simple = [
    getattr(tree[0], "is_number", False) or isinstance(tree[0], sympy.Symbol)
    for tree in trees
  ]
  if any(simple):
    return None
  return math_verify.verify(trees[0], trees[1], timeout_seconds=0)


def equal(gold: str, answer: str) -> Maybe:
  """Compares two single values or two relations; None where it can't tell.

  Args:
    gold: the right one, cleaned.
    answer: the one being judged, cleaned.

  Raises:
    TooLarge: one of them is a number too large to look at.
  """
  # Literals have policies of their own, for decimals and times of day: what
  # they can say is not left to algebra.
  quick = numbers.equal(gold, answer)
  if quick is not None:
    return quick
  if all(map(_RELATION.search, map(shapes.outside, (gold, answer)))):
    try:
      return _relation_equal(gold, answer)
    except _NO_VALUE:  # a set or a matrix stands on one side
      return None
  mine, unit = units.measure(gold)
  yours, other_unit = units.measure(answer)
  angles = {unit, other_unit}
  if not units.agree(unit, other_unit) and angles != {"degree", "radian"}:
    return False
  if (unit == "degree") != (other_unit == "degree"):
    # 45° is π/4; a bare 45 beside 45° is a degree, too.
    if unit == "degree" and ("radian" in angles or "\\pi" in yours):
      mine = f"({mine})\\cdot\\frac{{\\pi}}{{180}}"
    elif other_unit == "degree" and ("radian" in angles or "\\pi" in mine):
      yours = f"({yours})\\cdot\\frac{{\\pi}}{{180}}"
  if (aside := _ASIDE.search(answer)) and not _is_near(yours, aside[1]):
    return False
  mine, yours = opaque.with_segments(mine, yours)
  functions = opaque.functions_of((mine, yours))
  one, other = (values.parse(text, functions) for text in (mine, yours))
  if one is None or other is None:
    return None
  # A number is asked for, and 0 times whatever would be one.
  if values.has_unknowns(other) and not values.has_unknowns(one):
    return False
  infinities = (sympy.oo, -sympy.oo, sympy.zoo)
  if one in infinities or other in infinities:
    return one == other != sympy.zoo
  try:
    decimal = values.DECIMAL.search(mine) or values.DECIMAL.search(yours)
    if decimal and not any(map(values.has_unknowns, (one, other))):
      return _decimal_equal(mine, yours, (one, other))
    return values.same_values(one, other)
  except ZeroDivisionError:
    return None
  except _NO_VALUE:
    return _library_equal(mine, yours)
