"""Texts on a terminal: broken, marked, and their middle left out.

What models wrote may be a line of 100,000 characters, or thousands of lines.
Where nobody says how much room there is, as in a file, texts stay whole.
"""

import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from trd_jax.experiment import printing

Pieces = Sequence[tuple[str, str]]
"""A line: texts, each with one of `printing.STYLES` or `""`."""

_LEAST_ROWS = 5  # of a text, however low the terminal is
_MARGIN = 5  # characters before a row, for its mark
_LONG = 50  # rows of a line from which on it isn't broken at words


class _Row(NamedTuple):
  """A row of a text.

  Attributes:
    text: what fits the terminal's width.
    mark: stands before it.
    note: stands under it.
  """

  text: str
  mark: str = ""
  note: str = ""


def share(texts: int) -> int | None:
  """Returns how many rows each of some texts may take; None: all of its own.

  With a head and a mark each they should fit the terminal's height.
  """
  lines = printing.height(sys.stdout)
  if lines is None:
    return None
  return max(_LEAST_ROWS, (lines - 2 * texts - 2) // texts)


def block(
  text: str, marks: Mapping[int, Sequence[tuple[str, str]]], most: int | None
) -> Iterator[Pieces]:
  """Yields a text's rows, indented, its middle left out where it is too long.

  Args:
    text: what somebody or some model wrote.
    marks: by number of a line, from 1: symbols, with what stands under it.
    most: rows that it may take; None: all.
  """
  room = printing.width(sys.stdout)
  # Not to the last column: a terminal may go on to the next line there.
  room = None if room is None else max(room - 1 - _MARGIN, 20)
  rows: list[_Row] = []
  for number, line in enumerate(text.split("\n"), 1):
    # Cleaned before it is measured: shown, a character is wider.
    first, *rest = _broken(printing.clean(line).expandtabs(4), room)
    said = marks.get(number, ())
    mark = "".join(symbol for symbol, _ in said)
    rows.append(_Row(first, mark, "; ".join(note for _, note in said)))
    rows += [_Row(one) for one in rest]
  margin = " " * _MARGIN
  for row in _elided(rows, most):
    if isinstance(row, int):
      yield [(f"{margin}… {row:,} rows left out; --full shows all", "dim")]
      continue
    style = {"": "", ">": "yellow"}.get(row.mark, "red")
    yield [(f"{row.mark:>{_MARGIN - 2}}  ", style), (row.text, style)]
    if row.note:
      yield [(f"{margin}^ {row.note}", "dim")]


def _broken(line: str, room: int | None) -> list[str]:
  """Returns a line as rows of at most `room` characters."""
  if room is None or len(line) <= room:
    return [line]
  # At words it takes a time that grows with the square of the line's length.
  if len(line) > _LONG * room:
    return [line[at : at + room] for at in range(0, len(line), room)]
  return textwrap.wrap(
    line, room, drop_whitespace=False, break_on_hyphens=False
  )


def _elided(rows: Sequence[_Row], most: int | None) -> Iterator[_Row | int]:
  """Yields rows, and for those in between how many are left out.

  Beginning and end stay, and so does what is marked, with a row around it.
  """
  if most is None or len(rows) <= most:
    yield from rows
    return
  marked = [at for at, row in enumerate(rows) if row.mark]
  around = {at + step for at in marked for step in (-1, 0, 1)}
  ends = max(most - len(around) - 1, 2)
  kept = around | {*range(ends - ends // 2)}
  kept |= {*range(len(rows) - ends // 2, len(rows))}
  gap: list[_Row] = []
  for at, row in enumerate(rows):
    if at not in kept:
      gap.append(row)
      continue
    # To say of one row that it is left out takes as much room.
    if len(gap) == 1:
      yield gap[0]
    elif gap:
      yield len(gap)
    gap = []
    yield row
