r"""Intervals, unions and inequalities in one unknown, read as lists of spans.

`[0, 1)`, `]0,1[`, `0 \le x < 1`, `x \in [0,1)`, `|x| > 1`, `\mathbb{R}^+` and
unions of them become spans with their ends as text; the ends are compared
elsewhere.
"""

import itertools
import re
from typing import NamedTuple

from trd_jax.grading.math import numbers

_INFINITY = "\\infty"
_COMPARISON = re.compile(r"\\(le|ge|ne)(?![a-z])|(?<!\\)([<>])")
_INTERVAL = re.compile(r"([(\[\]])\s*(.+)\s*([)\]\[])\Z", re.DOTALL)
_NAME = re.compile(r"(?:\\?[A-Za-z]+(?:_\{?\w+\}?)?|[A-Za-z]\([A-Za-z]\))\Z")
_ABSOLUTE = re.compile(r"\|\s*(\\?[A-Za-z]+)\s*\|\Z")
_MEMBER = re.compile(r"\\in(?![a-z])")
# All real numbers, or those on one side of zero.
_REALS = re.compile(
  r"(?:\\mathbb\s*\{?\s*R\s*\}?|\\R)"
  r"(?:\s*[_^]\s*\{?\s*(\+|-|(?:>|<|\\ge|\\le)\s*0)\s*\}?)?\Z"
)
_BUILDER = re.compile(
  r"\\\{\s*(\\?[A-Za-z]+)\s*(?:\\in\s*(?:\\mathbb\s*\{?\s*R\s*\}?|\\R)\s*)?"
  r"[:|]\s*(.+)\\\}\Z",
  re.DOTALL,
)
_WITHOUT = re.compile(
  r"(?:\\mathbb\s*\{?\s*R\s*\}?|\\R)\s*(?:\\setminus(?![a-z])|-)\s*"
  r"\\\{(.+)\\\}\Z",
  re.DOTALL,
)


class Span(NamedTuple):
  """From `low` to `high`; equal and closed where it is a single point."""

  low: str
  high: str
  left_open: bool
  right_open: bool


def is_region(text: str) -> bool:
  r"""Returns whether `text` can only be a region (`(0,1)` is a pair, too)."""
  return bool(
    _COMPARISON.search(text)
    or _MEMBER.search(text)
    or "\\cup" in text
    or _WITHOUT.match(text)
    or _REALS.match(text)
    or re.match(r"\s*[\[\]]", text)
    or re.search(r"(?<!\\)[\[\]]\s*\Z", text)
  )


def unknown(text: str) -> str | None:
  """Finds the letter that an inequality bounds; None where it isn't plain."""
  found = {
    absolute[1] if (absolute := _ABSOLUTE.match(side.strip())) else side.strip()
    for part in re.split(r",|\\cup", text)
    for side in _sides(part)
    if _COMPARISON.search(part)
    and (_NAME.match(side.strip()) or _ABSOLUTE.match(side.strip()))
  }
  return found.pop() if len(found) == 1 else None


def _sides(text: str) -> list[str]:
  """Splits a text at its signs of comparison: one part more than signs."""
  starts, ends = [0], []
  for sign in _COMPARISON.finditer(text):
    ends.append(sign.start())
    starts.append(sign.end())
  ends.append(len(text))
  return [text[a:b] for a, b in zip(starts, ends, strict=True)]


def parse(text: str) -> list[Span] | None:
  """Reads the spans of a region, or None where `text` is none we can read.

  Args:
    text: an answer as `latex.clean` writes it.
  """
  text = text.strip()
  member = _MEMBER.split(text)
  if len(member) == 2 and _NAME.match(member[0].strip()):
    text = member[1].strip()
  if (builder := _BUILDER.match(text)) is not None:
    text = builder[2].strip()
  if (reals := _REALS.match(text)) is not None:
    return _reals(reals[1])
  if (without := _WITHOUT.match(text)) is not None:
    return _all_but(without[1])
  spans: list[Span] = []
  parts = text.split("\\cup")
  # `x < 1, x > 2` is a union as well; in `[0,1), …` the comma is inside.
  if len(parts) == 1 and _COMPARISON.search(text):
    parts = text.split(",")
  for part in map(str.strip, parts):
    read = _inequality(part) if _COMPARISON.search(part) else _interval(part)
    if read is None:
      return None
    spans += read
  return spans


def _reals(side: str | None) -> list[Span]:
  r"""Returns the real numbers as spans.

  All of them for None, else those on a side of zero (`+`, `\ge 0`).
  """
  if not side:
    return [Span("-" + _INFINITY, _INFINITY, True, True)]
  opened = "e" not in side
  if side.startswith(("-", "<", "\\le")):
    return [Span("-" + _INFINITY, "0", True, opened)]
  return [Span("0", _INFINITY, opened, True)]


def _all_but(points: str) -> list[Span] | None:
  """Returns the real numbers without some points.

  None where the points are no literals, whose order could be seen.
  """
  ends = [point.strip() for point in points.split(",")]
  values = {end: numbers.literal(end) for end in ends}
  if len(ends) > 1:
    if not all(values.values()):
      return None
    ends = sorted(values, key=lambda end: values[end].value)  # type: ignore
  ends = ["-" + _INFINITY, *ends, _INFINITY]
  return [Span(*pair, True, True) for pair in itertools.pairwise(ends)]


def _end(text: str) -> str:
  text = text.strip()
  return text.removeprefix("+").strip() if _INFINITY in text else text


def _interval(text: str) -> list[Span] | None:
  """Reads an interval, a set of points or the real numbers."""
  if (reals := _REALS.match(text)) is not None:
    return _reals(reals[1])
  if text.startswith("\\{") and text.endswith("\\}"):
    points = [point.strip() for point in text[2:-2].split(",")]
    if any("(" in point or not point for point in points):
      return None
    return [Span(point, point, False, False) for point in points]
  match = _INTERVAL.match(text)
  if not match:
    return None
  ends = _halves(match[2])
  if ends is None:
    return None
  low, high = map(_end, ends)
  # An infinite end belongs to no interval, whatever bracket is written; `]` on
  # the left is the French open end.
  left_open = match[1] != "[" or low == "-" + _INFINITY
  right_open = match[3] != "]" or high == _INFINITY
  return [Span(low, high, left_open, right_open)]


def _halves(text: str) -> tuple[str, str] | None:
  """Splits at the one comma outside of brackets: both ends of an interval."""
  depth, commas = 0, []
  for at, character in enumerate(text):
    depth += (character in "([{") - (character in ")]}")
    if depth < 0:
      return None
    if character in ",;" and depth == 0:
      commas.append(at)
  if len(commas) != 1 or not text[: commas[0]].strip():
    return None
  high = text[commas[0] + 1 :]
  return (text[: commas[0]], high) if high.strip() else None


def _negative(text: str) -> str:
  return f"-{text}" if re.fullmatch(r"[\w.\\]+", text) else f"-({text})"


def _inequality(text: str) -> list[Span] | None:
  r"""Reads `a < x`, `x \ge b`, `a \le x < b`, and the same of |x|."""
  signs = [one or two for one, two in _COMPARISON.findall(text)]
  sides = [side.strip() for side in _sides(text)]
  if not all(sides) or len(signs) > 2:
    return None
  # Read from right to left, so that below there are only `<` and `\le`.
  if signs[0] in ("ge", ">"):
    flip = {"ge": "le", ">": "<", "le": "ge", "<": ">"}
    if any(sign not in flip for sign in signs):
      return None
    signs = [flip[sign] for sign in reversed(signs)]
    sides.reverse()
  if signs == ["ne"]:
    name, value = sides if _NAME.match(sides[0]) else sides[::-1]
    if not _NAME.match(name):
      return None
    return [
      Span("-" + _INFINITY, value, True, True),
      Span(value, _INFINITY, True, True),
    ]
  if any(sign not in ("le", "<") for sign in signs):
    return None
  opened = [sign == "<" for sign in signs]
  if len(signs) == 2:
    low, middle, high = sides
    if _NAME.match(middle):
      return [Span(_end(low), _end(high), opened[0], opened[1])]
    if _ABSOLUTE.match(middle):
      return [
        # a < |x| < b is two spans, mirrored: their open ends, too.
        Span(_negative(high), _negative(low), opened[1], opened[0]),
        Span(low, high, opened[0], opened[1]),
      ]
    return None
  left, right = sides
  if _NAME.match(right):
    return [Span(_end(left), _INFINITY, opened[0], True)]
  if _NAME.match(left):
    return [Span("-" + _INFINITY, _end(right), True, opened[0])]
  if _ABSOLUTE.match(right):
    return [
      Span("-" + _INFINITY, _negative(left), True, opened[0]),
      Span(left, _INFINITY, opened[0], True),
    ]
  if _ABSOLUTE.match(left):
    return [Span(_negative(right), right, opened[0], opened[0])]
  return None
