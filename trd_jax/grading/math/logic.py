r"""Formulas of logic and of sets, compared by their truth tables.

`p \land \neg q` and `A \cap B^c` are the same kind of thing: with letters that
are true or false (is a thing in the set?), two formulas say the same where they
agree in all cases.
"""

import itertools
import re
from collections.abc import Callable

_MAX_LETTERS = 8
_MAX_TOKENS = 80
# The weakest first. Two arrows that are mixed would leave open what is meant.
_BINARY: list[dict[str, Callable[[bool, bool], bool]]] = [
  {"iff": lambda a, b: a == b},
  {"then": lambda a, b: not a or b},
  {"or": lambda a, b: a or b, "xor": lambda a, b: a != b},
  {"and": lambda a, b: a and b, "less": lambda a, b: a and not b},
]
_WORDS = {
  "iff": r"\\(?:leftrightarrow|Leftrightarrow|iff)(?![a-z])",
  "then": r"\\(?:to|rightarrow|Rightarrow|implies|supset)(?![a-z])",
  "or": r"\\(?:lor|vee|cup)(?![a-z])",
  "xor": r"\\(?:oplus|triangle|bigtriangleup)(?![a-z])",
  "and": r"\\(?:land|wedge|cap)(?![a-z])",
  "less": r"\\(?:setminus|backslash)(?![a-z])",
  "not": r"\\(?:neg|lnot|sim)(?![a-z])",
  "bar": r"\\(?:overline|bar)\s*\{",
  "open": r"[(\[]",
  "close": r"[)\]}]",
  "outside": r"'|\^\s*(?:\{\s*(?:c|C|\\complement|\\prime)\s*\}|c|C"
  r"|\\complement(?![a-z])|\\prime(?![a-z]))",
  "letter": r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])|\\emptyset(?![a-z])",
  "space": r"\s+",
}
_TOKEN = re.compile("|".join(f"(?P<{n}>{p})" for n, p in _WORDS.items()))
_OPERATORS = frozenset(
  ("iff", "then", "or", "xor", "and", "less", "not", "bar", "outside")
)

_Formula = Callable[[dict[str, bool]], bool]


class _NoFormula(Exception):
  pass


def _tokens(text: str) -> list[tuple[str, str]]:
  """Splits a formula into kinds and texts; [] where it is none."""
  found, at = [], 0
  while at < len(text):
    token = _TOKEN.match(text, at)
    if token is None or len(found) > _MAX_TOKENS:
      return []
    if token.lastgroup != "space":
      found.append((token.lastgroup or "", token[0]))
    at = token.end()
  return found


class _Reader:
  """Reads a formula by recursive descent, the weakest operator first."""

  def __init__(self, tokens: list[tuple[str, str]]):
    self._tokens = tokens
    self._at = 0

  def _next(self) -> str:
    at = self._at
    return self._tokens[at][0] if at < len(self._tokens) else ""

  def whole(self) -> _Formula:
    formula = self._binary(0)
    if self._next():
      raise _NoFormula
    return formula

  def _binary(self, level: int) -> _Formula:
    if level == len(_BINARY):
      return self._unary()
    formula = self._binary(level + 1)
    first = None
    while (name := self._next()) in _BINARY[level]:
      # A chain of one operator that may be read from either side only.
      if first is not None and (name != first or name in ("then", "less")):
        raise _NoFormula
      first = name
      self._at += 1
      formula = _joined(_BINARY[level][name], formula, self._binary(level + 1))
    return formula

  def _unary(self) -> _Formula:
    kind = self._next()
    if not kind:
      raise _NoFormula
    text = self._tokens[self._at][1]
    self._at += 1
    if kind == "not":
      return _denied(self._unary())
    if kind in ("open", "bar"):
      formula = self._binary(0)
      if self._next() != "close":
        raise _NoFormula
      self._at += 1
      formula = _denied(formula) if kind == "bar" else formula
    elif kind == "letter":
      formula = _of_letter(text)
    else:
      raise _NoFormula
    while self._next() == "outside":
      self._at += 1
      formula = _denied(formula)
    return formula


def _of_letter(text: str) -> _Formula:
  if text.startswith("\\"):
    return lambda case: False
  return lambda case: case[text]


def _denied(formula: _Formula) -> _Formula:
  return lambda case: not formula(case)


def _joined(
  operator: Callable[[bool, bool], bool], one: _Formula, other: _Formula
) -> _Formula:
  return lambda case: operator(one(case), other(case))


def is_formula(text: str) -> bool:
  """Returns whether a text is of letters and signs of logic or sets alone."""
  tokens = _tokens(text)
  kinds = {kind for kind, _ in tokens}
  return "letter" in kinds and bool(kinds & _OPERATORS)


def same(gold: str, answer: str) -> bool | None:
  """Compares two formulas; None where one is none, or can't be read.

  Args:
    gold: cleaned.
    answer: cleaned.
  """
  tokens = [_tokens(text) for text in (gold, answer)]
  kinds = {kind for one in tokens for kind, _ in one}
  # `A'` beside `A` is a point beside another one.
  if not all(tokens) or not kinds & (_OPERATORS - {"outside", "bar"}):
    return None
  letters = {
    text for one in tokens for kind, text in one if kind == "letter"
  } - {"\\emptyset"}
  if not letters or len(letters) > _MAX_LETTERS:
    return None
  try:
    one, other = (_Reader(found).whole() for found in tokens)
  except _NoFormula:
    return None
  cases = itertools.product((False, True), repeat=len(letters))
  return all(
    one(case) == other(case)
    for case in (dict(zip(letters, values, strict=True)) for values in cases)
  )
