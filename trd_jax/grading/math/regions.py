r"""Intervals, unions and inequalities in one unknown, read as lists of spans.

`[0, 1)`, `]0,1[`, `0 \le x < 1`, `x \in [0,1)`, `|x| > 1`, `\mathbb{R}^+`, what
several of these have in common, and unions of them become spans with their
ends as text; the ends are compared elsewhere. Only where two regions are put
together are ends put in order here, as far as they are literals.
"""

import functools
import itertools
import re
from typing import NamedTuple

from trd_jax.grading.math import brackets, numbers

_INFINITY = "\\infty"
_COMPARISON = re.compile(r"\\(le|ge|ne)(?![a-z])|(?<!\\)([<>])")
_INTERVAL = re.compile(r"([(\[\]])\s*(.+)\s*([)\]\[])\Z", re.DOTALL)
_NAME = re.compile(r"(?:\\?[A-Za-z]+(?:_\{?\w+\}?)?|[A-Za-z]\([A-Za-z]\))\Z")
_ABSOLUTE = re.compile(r"\|\s*(\\?[A-Za-z]+)\s*\|\Z")
# |2x - 3|, with the factor and what is added as literals.
_LINEAR = re.compile(
  r"\|\s*(?P<sign>-?)\s*(?P<factor>\d+|\\frac\{\d+\}\{\d+\})?\s*"
  r"(?P<name>[a-z]|\\[a-z]+)\s*(?P<added>[+-]\s*[^|<>=]+?)\s*\|\Z"
)
# |3 - x| is |x - 3|.
_TURNED = re.compile(
  r"\|\s*(\d[\d./]*|\\frac\{\d+\}\{\d+\})\s*-\s*(\d*\s*[a-z])\s*\|"
)
_NOT_BOTH = re.compile(r"\\ne\s*\\pm\s*([^\s,]+)")
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
_LESS = re.compile(r"(.*\S)\s*\\setminus(?![a-z])\s*(\S.*)\Z", re.DOTALL)
_OUTSIDE = re.compile(r"\\notin(?![a-z])|\\not\s*\\in(?![a-z])")
_AND = re.compile(r"\\land(?![a-z])")
_POINT = re.compile(r"\s*([A-Za-z])\s*=\s*([^=]*[^=\s])\s*\Z")
_LEFT_OUT = re.compile(r"\\ne(?![a-z])")


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
    or "\\setminus" in text
    or _OUTSIDE.search(text)
    or _WITHOUT.match(text)
    or _REALS.match(text)
    or re.match(r"\s*[\[\]]", text)
    or re.search(r"(?<!\\)[\[\]]\s*\Z", text)
  )


def letters_of(text: str) -> set[str]:
  """Finds the letters that stand alone on a side: in `a > b` these are two."""
  found = set()
  for part in re.split(r",|\\cup", text):
    sides = _sides(part)
    if len(sides) == 1:
      sides = _MEMBER.split(part)[:-1]
    for side in map(str.strip, sides):
      absolute = _ABSOLUTE.match(side) or _LINEAR.match(side)
      if absolute or (_NAME.match(side) and _INFINITY not in side):
        found.add(_letter(absolute) if absolute else side)
  return found


def _letter(absolute: re.Match[str]) -> str:
  """Returns the unknown between the bars of a magnitude."""
  return absolute.groupdict().get("name") or absolute[1]


def unknown(text: str) -> str | None:
  """Finds the letter that a region bounds; None where it isn't plain."""
  found = letters_of(text)
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
  text = _TURNED.sub(r"|\2-\1|", text)
  text = _NOT_BOTH.sub(r"\\ne \1, -\1", text)
  if not _share_an_unknown(text):
    return None  # bounds on two unknowns are no region of one
  if _AND.search(text) or len(brackets.split(text, ",")) > 1:
    return _conditions(text)
  text = text.strip()
  member = _MEMBER.split(text)
  if len(member) == 2 and _NAME.match(member[0].strip()):
    text = member[1].strip()
  if (builder := _BUILDER.match(text)) is not None:
    return parse(builder[2].strip())
  if (reals := _REALS.match(text)) is not None:
    return _reals(reals[1])
  if (without := _WITHOUT.match(text)) is not None:
    return _all_but(without[1])
  apart = _OUTSIDE.split(text)
  if len(apart) == 2 and _NAME.match(apart[0].strip()):
    return _without(_reals(None), parse(apart[1]))
  if (less := _LESS.match(text)) is not None:
    return _without(parse(less[1]), parse(less[2]))
  spans: list[Span] = []
  for part in map(str.strip, text.split("\\cup")):
    read = _inequality(part) if _COMPARISON.search(part) else _interval(part)
    if read is None:
      return None
    spans += read
  return spans


def _share_an_unknown(text: str) -> bool:
  """Returns whether all comparisons may bound one and the same unknown."""
  found: list[set[str]] = []
  for part in re.split(r",|\\cup(?![a-z])|\\land(?![a-z])", text):
    sides = _sides(part)
    if len(sides) == 1:
      point = _POINT.match(part)
      sides = [point[1]] if point else _MEMBER.split(part)[:-1]
    elif len(sides) == 3:  # of `a < x < b` the middle is what is bounded
      sides = sides[1:2]
    named = set()
    for side in map(str.strip, sides):
      absolute = _ABSOLUTE.match(side) or _LINEAR.match(side)
      if absolute or (_NAME.match(side) and side != _INFINITY):
        named.add(_letter(absolute) if absolute else side)
    if named:
      found.append(named)
  return not found or bool(set.intersection(*found))


def _conditions(text: str) -> list[Span] | None:
  r"""Reads several statements on one unknown; None where one can't be read.

  `x < 1, x > 2` says either, `x > 1 \land x < 2` both. A comma says both, too,
  where the next part only takes points out or says where x is from, and where
  either would say nothing: `x > 1, x < 2`.
  """
  # `a, b and c` lists all three.
  if len(brackets.split(text, ",")) > 1:
    text = _AND.sub(",", text)
  if len(all_of := _AND.split(text)) > 1:
    if "\\cup" in text:
      return None
    read = [parse(part.strip(" ,")) for part in all_of]
    return functools.reduce(_common, read)
  parts = brackets.split(text, ",")
  if not _COMPARISON.search(text):
    # It increases on (-1, 0), (2, 3).
    listed = [read for read in map(_interval, parts) if read]
    if len(listed) < len(parts):
      return None
    return list(itertools.chain.from_iterable(listed))
  # `x \ne 0, 1`
  for at in range(1, len(parts)):
    name, _, out = parts[at - 1].partition("\\ne ")
    if out and not _COMPARISON.search(parts[at]) and "\\in" not in parts[at]:
      parts[at] = f"{name}\\ne {parts[at]}"
  either: list[Span] = []
  within: list[list[Span] | None] = []
  points: list[Span] = []
  for part in parts:
    point = _POINT.match(part)
    read = [Span(point[2], point[2], False, False)] if point else parse(part)
    if read is None:
      return None
    if _LEFT_OUT.search(part):
      points.append(Span(read[0].high, read[0].high, False, False))
    elif _MEMBER.search(part):
      within.append(read)
    else:
      either += read
  if len(either) == 2:
    common = _common(either[:1], either[1:])
    if common and _order(common[0].low, common[0].high) == -1:
      ends = {common[0].low, common[0].high}
      if not ends & {_INFINITY, "-" + _INFINITY}:
        either = common
  region = functools.reduce(
    _common, [either, *within] if either else [*within] or [_reals(None)]
  )
  return _without(region, points) if points else region


def _order(one: str, other: str) -> int | None:
  """Compares two ends: -1, 0 or 1, or None where they are no literals."""
  if one == other:
    return 0
  for end, sign in (("-" + _INFINITY, -1), (_INFINITY, 1)):
    if one == end:
      return sign
    if other == end:
      return -sign
  values = numbers.literal(one), numbers.literal(other)
  if values[0] is None or values[1] is None:
    return None
  return (values[0].value > values[1].value) - (
    values[0].value < values[1].value
  )


def _common(
  one: list[Span] | None, other: list[Span] | None
) -> list[Span] | None:
  """Returns what two regions have in common, [] for nothing.

  None where that can't be told.
  """
  if one is None or other is None:
    return None
  found: list[Span] = []
  for mine, yours in itertools.product(one, other):
    lows, highs = _order(mine.low, yours.low), _order(mine.high, yours.high)
    if lows is None or highs is None:
      return None
    low = mine.low if lows > 0 else yours.low
    high = mine.high if highs < 0 else yours.high
    left = (lows >= 0 and mine.left_open) or (lows <= 0 and yours.left_open)
    right = (highs <= 0 and mine.right_open) or (
      highs >= 0 and yours.right_open
    )
    width = _order(low, high)
    # Ends that can't be put in order are taken to be in it.
    if width is None or width < 0 or (width == 0 and not (left or right)):
      found.append(Span(low, high, left, right))
  return found


def _without(
  region: list[Span] | None, others: list[Span] | None
) -> list[Span] | None:
  """Returns a region less others, points or spans; None: it can't be told."""
  if region is None or others is None:
    return None
  for other in others:
    if other.low != other.high:
      rest = [
        Span("-" + _INFINITY, other.low, True, not other.left_open),
        Span(other.high, _INFINITY, not other.right_open, True),
      ]
      region = _common(
        region, [one for one in rest if _order(one.low, one.high)]
      )
      if region is None:
        return None
      continue
    point, rest = other.low, []
    for span in region:
      left, right = _order(span.low, point), _order(point, span.high)
      if 1 in (left, right):
        rest.append(span)  # the point is outside
        continue
      # Where that can't be told it is inside: else it would not be named.
      if left != 0:
        rest.append(Span(span.low, point, span.left_open, True))
      if right != 0:
        rest.append(Span(point, span.high, True, span.right_open))
    region = rest
  return region


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


def _shifted(spans: list[Span], linear: re.Match[str]) -> list[Span] | None:
  """Returns for which x the values ax + b lie in spans; None: not literals."""
  factor, added = (
    numbers.literal(text)
    for text in (
      linear["sign"] + (linear["factor"] or "1"),
      re.sub(r"\s", "", linear["added"]).removeprefix("+"),
    )
  )
  if factor is None or added is None or not factor.value:
    return None

  def end(text: str) -> str | None:
    if _INFINITY in text:
      negative = text.startswith("-") != (factor.value < 0)
      return "-" + _INFINITY if negative else _INFINITY
    negated = re.fullmatch(r"-\((.*)\)", text)
    value = numbers.literal(negated[1] if negated else text)
    if value is None:
      return None
    found = (-value.value if negated else value.value) - added.value
    return str(found / factor.value)

  read = []
  for span in spans:
    low, high = end(span.low), end(span.high)
    if low is None or high is None:
      return None
    read.append(Span(low, high, span.left_open, span.right_open))
  if factor.value < 0:
    read = [Span(s.high, s.low, s.right_open, s.left_open) for s in read]
  return read


def _inequality(text: str) -> list[Span] | None:
  r"""Reads `a < x`, `x \ge b`, `a \le x < b`, and the same of |x|."""
  signs = [one or two for one, two in _COMPARISON.findall(text)]
  sides = [side.strip() for side in _sides(text)]
  if not all(sides) or len(signs) > 2:
    return None
  # |ax + b| < c is first read for t = ax + b.
  for side in sides:
    if (linear := _LINEAR.match(side)) and not _ABSOLUTE.match(side):
      spans = _inequality(text.replace(side, f"|{linear['name']}|"))
      return spans and _shifted(spans, linear)
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
