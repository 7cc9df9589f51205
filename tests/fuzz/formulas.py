"""Formulas with known values, for what compares them.

A formula is a nested tuple, `("+", ("x",), (3,))`. It can be written in several
ways, evaluated without the grader's code, and changed in one place.
"""

import math
import random
from collections.abc import Callable
from typing import Any

import mpmath
from hypothesis import strategies as st

Formula = tuple[Any, ...]

_LETTERS = ("x", "y", "n")
_DIGITS = 30
# Positive, since roots and logarithms exist there.
_POINTS = (
  {"x": "0.7312", "y": "1.9077", "n": "3"},
  {"x": "2.4131", "y": "0.3391", "n": "5"},
  {"x": "1.1177", "y": "3.0219", "n": "8"},
)
# Here a root may be meant otherwise: they only leave it open.
_NEGATIVE = (
  {"x": "-0.7312", "y": "1.9077", "n": "-3"},
  {"x": "1.1177", "y": "-0.4219", "n": "-2"},
)
_CLOSE = mpmath.mpf(10) ** -12
_LARGEST = mpmath.mpf(10) ** 30

_leaves = st.one_of(
  st.integers(0, 20).map(lambda n: (n,)),
  st.integers(0, 20).map(lambda n: (n,)),
  st.sampled_from([(name,) for name in (*_LETTERS, "pi", "e")]),
  st.tuples(st.integers(1, 19), st.integers(2, 12)).map(
    lambda p: ("ratio", *p)
  ),
)


def _grown(inner):
  two = st.tuples(st.sampled_from(["+", "-", "*", "/"]), inner, inner)
  power = st.tuples(st.just("^"), inner, st.integers(2, 4).map(lambda n: (n,)))
  one = st.tuples(
    st.sampled_from(["sqrt", "neg", "sin", "cos", "ln", "abs", "exp"]), inner
  )
  small = st.integers(0, 9).map(lambda n: (n,))
  whole = st.one_of(
    st.tuples(st.just("binom"), st.integers(2, 12).map(lambda n: (n,)), small),
    st.tuples(st.just("!"), small),
    st.tuples(st.just("floor"), inner),
  )
  return st.one_of(two, two, two, power, one, whole)


formulas = st.recursive(_leaves, _grown, max_leaves=6)


def value(formula: Formula, point: dict[str, str]) -> Any:
  """Evaluates a formula; None where it has no real value, or a huge one."""
  with mpmath.workdps(_DIGITS):
    try:
      found = _value(formula, point)
    except (ZeroDivisionError, ValueError, OverflowError):
      return None
    if mpmath.im(found) != 0 or not abs(found) < _LARGEST:
      return None
    return mpmath.re(found)


_VALUES: dict[str, Callable] = {
  "+": lambda a, b: a + b,
  "-": lambda a, b: a - b,
  "*": lambda a, b: a * b,
  "/": lambda a, b: a / b,
  "neg": lambda a: -a,
  "sqrt": mpmath.sqrt,
  "sin": mpmath.sin,
  "cos": mpmath.cos,
  "abs": abs,
}


def _value(formula: Formula, point: dict[str, str]) -> Any:
  head = formula[0]
  if isinstance(head, int):
    return mpmath.mpf(head)
  if len(formula) == 1:
    constants = {"pi": mpmath.pi, "e": mpmath.e}
    return +constants[head] if head in constants else mpmath.mpf(point[head])
  if head == "ratio":
    return mpmath.mpf(formula[1]) / formula[2]
  if head in ("binom", "!"):
    return mpmath.mpf(
      math.comb(formula[1][0], formula[2][0])
      if head == "binom"
      else math.factorial(formula[1][0])
    )
  parts = [_value(part, point) for part in formula[1:]]
  if any(mpmath.im(part) != 0 or abs(part) > _LARGEST for part in parts):
    raise ValueError("outside of what is looked at")
  if head == "^":
    return parts[0] ** int(parts[1])
  if head == "ln":
    if parts[0] <= 0:
      raise ValueError("no real logarithm")
    return mpmath.ln(parts[0])
  if head == "exp":
    return mpmath.exp(min(parts[0], 1000))
  if head == "floor":
    # At a step the last digits decide: of no use as an oracle.
    if abs(parts[0] - mpmath.nint(parts[0])) < _CLOSE and not _is_exact(
      formula[1]
    ):
      raise ValueError("at a step")
    return mpmath.floor(parts[0])
  return _VALUES[head](*parts)


def _is_exact(formula: Formula) -> bool:
  return isinstance(formula[0], int)


def differ(one: Formula, other: Formula) -> bool | None:
  """Returns whether two formulas have different values somewhere.

  None where they can't be compared at any of the points.
  """
  apart = [_apart(one, other, point) for point in _POINTS]
  if True in apart:
    return True
  elsewhere = [_apart(one, other, point) for point in _NEGATIVE]
  return False if False in apart and True not in elsewhere else None


def _apart(one: Formula, other: Formula, point: dict[str, str]) -> bool | None:
  mine, yours = value(one, point), value(other, point)
  if mine is None or yours is None:
    return None
  return bool(abs(mine - yours) > _CLOSE * max(1, abs(mine), abs(yours)))


def changed(formula: Formula, choose: random.Random) -> Formula:
  """Returns a formula with one near miss in it."""
  parts = [i for i, part in enumerate(formula) if isinstance(part, tuple)]
  inside = [i for i in parts if formula[0] not in ("binom", "!")]
  if inside and choose.random() < 0.6:
    at = choose.choice(inside)
    new = changed(formula[at], choose)
    if formula[0] == "^" and at == 2 and not isinstance(new[0], int):
      new = (formula[2][0] + 1,)
    return (*formula[:at], new, *formula[at + 1 :])
  head = formula[0]
  if isinstance(head, int):
    return (choose.choice([head + 1, max(0, head - 1), head * 10, head + 2]),)
  if len(formula) == 1:
    return (choose.choice([*_LETTERS, "pi", "e"]),)
  if head == "ratio":
    return choose.choice(
      [
        ("ratio", formula[2], formula[1]),
        ("ratio", formula[1] + 1, formula[2]),
        ("neg", formula),
      ]
    )
  if head in ("+", "-", "*", "/"):
    swapped = (head, formula[2], formula[1])
    other = choose.choice([name for name in "+-*/" if name != head])
    return choose.choice([swapped, (other, *formula[1:]), formula[1]])
  if head == "^":
    return choose.choice([("^", formula[1], (formula[2][0] + 1,)), formula[1]])
  if head in ("sin", "cos"):
    return ("cos" if head == "sin" else "sin", formula[1])
  if head == "binom":
    return ("binom", formula[1], (formula[2][0] + 1,))
  if head == "!":
    return formula[1]
  return choose.choice([formula[1], ("neg", formula)])


_MARKED = {
  "sqrt": "\\sqrt{{{}}}",
  "abs": "\\left|{}\\right|",
  "floor": "\\lfloor {} \\rfloor",
  "exp": "e^{{{}}}",
  "sin": "\\sin\\left({}\\right)",
  "cos": "\\cos\\left({}\\right)",
  "ln": "\\ln\\left({}\\right)",
}
_SUMS = ("+", "-", "neg")


def latex(formula: Formula, choose: random.Random) -> str:
  """Writes a formula in one of the ways that people write it."""
  head = formula[0]
  if len(formula) == 1:
    return {"pi": "\\pi"}.get(head, str(head))
  if head == "ratio":
    form = choose.choice(["\\frac{{{}}}{{{}}}", "\\dfrac{{{}}}{{{}}}"])
    return form.format(*formula[1:])
  parts = [latex(part, choose) for part in formula[1:]]
  if head in _MARKED:
    return _MARKED[head].format(parts[0])
  if head == "binom":
    return f"\\binom{{{parts[0]}}}{{{parts[1]}}}"
  if head == "!":
    return f"{parts[0]}!"
  if head == "/":
    return f"\\frac{{{parts[0]}}}{{{parts[1]}}}"
  if head == "neg":
    return f"-{_bracketed(parts[0], formula[1][0] in _SUMS)}"
  if head == "^":
    base = _bracketed(parts[0], len(formula[1]) > 1)
    return f"{base}^{{{parts[1]}}}"
  heads = [part[0] for part in formula[1:]]
  if head != "-" and choose.random() < 0.5:
    parts, heads = parts[::-1], heads[::-1]
  if head == "*":
    if choose.random() < 0.3:  # beside each other, as (2)(3)
      return "".join(_bracketed(text, True) for text in parts)
    sign = choose.choice(["\\cdot ", "\\times "])
    return sign.join(
      _bracketed(text, name in _SUMS)
      for text, name in zip(parts, heads, strict=True)
    )
  right = _bracketed(parts[1], heads[1] in (("neg",) if head == "+" else _SUMS))
  return f"{parts[0]}{head}{right}"


def _bracketed(text: str, needed: bool) -> str:
  return f"\\left({text}\\right)" if needed else text


# Of each kind of answer: what stands around it.
_BRACKETS = {
  "value": [("", "")],
  "tuple": [("(", ")")],
  "set": [("\\{", "\\}")],
  "interval": [("(", "]"), ("[", ")"), ("[", "]")],
}


def _answers_differ(
  kind: str, one: list[Formula], other: list[Formula]
) -> bool | None:
  """Returns whether two answers of one kind differ; None: it can't be told."""
  if kind == "set":
    pairs = [[differ(a, b) for b in other] for a in one]
    if any(found is None for row in pairs for found in row):
      return None
    missing = [all(column) for column in (*pairs, *zip(*pairs, strict=True))]
    return any(missing)
  if len(one) != len(other):
    return True
  found = [differ(a, b) for a, b in zip(one, other, strict=True)]
  return True if True in found else None if None in found else False


@st.composite
def answers(draw):
  """Two answers as LaTeX, and whether they differ; None where nobody knows."""
  kind = draw(st.sampled_from(["value", "value", *_BRACKETS]))
  size = {"value": 1, "interval": 2}.get(kind) or draw(st.integers(2, 3))
  one = draw(st.lists(formulas, min_size=size, max_size=size))
  choose = random.Random(draw(st.integers(0, 2**32)))
  brackets = choose.choice(_BRACKETS[kind])
  other, others = list(one), brackets
  how = choose.choice(["same", "item", "item", "order", "less", "bracket"])
  if how == "item":
    at = choose.randrange(size)
    other[at] = changed(one[at], choose)
  elif how == "order":
    other.reverse()
  elif how == "less" and size > 2:
    other.pop()
  elif how == "bracket":
    others = choose.choice(_BRACKETS[kind])
  found = _answers_differ(kind, one, other)
  if others != brackets:
    found = True
  texts = []
  for (left, right), items in ((brackets, one), (others, other)):
    written = ", ".join(latex(item, choose) for item in items)
    texts.append(f"{left}{written}{right}")
  return *texts, found
