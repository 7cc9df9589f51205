"""Writes tables for people, as CSV and as LaTeX.

A table's numbers are raw until here; what each unit looks like is said once,
for the terminal, the page and LaTeX alike.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trd_jax.analyze.analysis import Cell, Column, Number, Table, Unit
from trd_jax.experiment.progress import duration

_LATEX = {
  "\\": r"\textbackslash{}",
  "{": r"\{",
  "}": r"\}",
  "$": r"\$",
  "&": r"\&",
  "#": r"\#",
  "%": r"\%",
  "_": r"\_",
  "^": r"\textasciicircum{}",
  "~": r"\textasciitilde{}",
  "<": r"\textless{}",
  ">": r"\textgreater{}",
  "|": r"\textbar{}",
  "→": r"$\rightarrow$",
  "−": "$-$",
  "–": "--",
  "…": r"\ldots{}",
}


def shown(value: Cell, unit: Unit = "text") -> str:
  """Returns a cell's value as a person reads it; a dash for None.

  Args:
    value: of a `Number`, its value alone.
    unit: of its column.
  """
  if isinstance(value, Number):
    value = value.value
  if value is None:
    return "–"
  if isinstance(value, str):
    return value
  if unit == "share":
    return f"{100 * value:.1f}%"
  if unit in ("count", "tokens"):
    whole = float(value).is_integer()
    return f"{value:,.0f}" if whole or value >= 100 else f"{value:,.1f}"
  if unit == "seconds":
    return duration(value)
  if isinstance(value, int):
    return f"{value:,}"
  return f"{value:.4g}"


def shown_change(change: float, unit: Unit = "number") -> str:
  """Returns a change with its sign: +49.2 of shares are points."""
  if unit == "share":
    return _signed(f"{100 * change:+.1f}")
  if unit in ("count", "tokens"):
    return _signed(f"{change:+,.0f}")
  return _signed(f"{change:+.3g}")


def _signed(text: str) -> str:
  """Returns a written number with a minus sign, and without one for zero."""
  if not text.strip("+-0.,"):
    return text.lstrip("+-")
  return text.replace("-", "−")


def shown_interval(cell: Number, unit: Unit = "number") -> str | None:
  """Returns a number's interval as [low, high], None where there is none."""
  if cell.low is None or cell.high is None:
    return None
  ends = (shown(end, unit).removesuffix("%") for end in (cell.low, cell.high))
  return f"[{', '.join(ends)}]"


def in_full(cell: Cell, unit: Unit = "text") -> str:
  """Returns a cell with its change and interval, in one line of text."""
  text = shown(cell, unit)
  if not isinstance(cell, Number):
    return text
  if cell.best:
    text += " *"
  if cell.change is not None:
    text += f" ({shown_change(cell.change, unit)})"
  if interval := shown_interval(cell, unit):
    text += f" {interval}"
  return text


# -- CSV ---------------------------------------------------------------------

_PARTS: Sequence[tuple[str, Callable[[Number], Any]]] = (
  ("low", lambda cell: cell.low),
  ("high", lambda cell: cell.high),
  ("change", lambda cell: cell.change),
)


def to_csv(table: Table) -> bytes:
  """Returns a table as CSV with raw numbers.

  What is known of a number has columns of its own: `NAME, low`, `NAME, high`
  and `NAME, change`. Empty stands for what there isn't.
  """
  columns: list[list[Any]] = []
  for place, column in enumerate(table.columns):
    cells = [row[place] for row in table.rows]
    columns.append([column.name, *map(_raw, cells)])
    numbers = [cell if isinstance(cell, Number) else None for cell in cells]
    for part, of in _PARTS:
      values = [None if cell is None else of(cell) for cell in numbers]
      if any(value is not None for value in values):
        columns.append([f"{column.name}, {part}", *values])
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows(zip(*columns, strict=True))
  return text.getvalue().encode("utf-8", "backslashreplace")


def _raw(cell: Cell) -> Any:
  return cell.value if isinstance(cell, Number) else cell


# -- LaTeX -------------------------------------------------------------------


def to_latex(table: Table) -> bytes:
  """Returns a table as LaTeX, for the package booktabs.

  The best of a column is bold, a change a small index, an interval small
  beside its number.
  """
  columns = table.columns
  sides = "".join("l" if one.unit == "text" else "r" for one in columns)
  rows = [
    [_latex(c, o.unit) for c, o in zip(row, columns, strict=True)]
    for row in table.rows
  ]
  lines = [
    "% needs \\usepackage{booktabs}",
    r"\begin{table}",
    r"\centering",
    rf"\caption{{{escaped(table.caption)}}}",
    rf"\label{{tab:{_label(table.name)}}}",
    rf"\begin{{tabular}}{{{sides}}}",
    r"\toprule",
    _row([_head(one) for one in columns]),
    r"\midrule",
    *map(_row, rows),
    r"\bottomrule",
    r"\end{tabular}",
    r"\end{table}",
    "",
  ]
  return "\n".join(lines).encode("utf-8", "backslashreplace")


def escaped(text: str) -> str:
  """Returns text as LaTeX shows it, whatever it holds."""
  plain = "".join(one if one.isprintable() else " " for one in text)
  return "".join(_LATEX.get(one, one) for one in plain)


def _label(name: str) -> str:
  return "".join(one if one.isalnum() else "-" for one in name)


def _head(column: Column) -> str:
  suffix = r" (\%)" if column.unit == "share" else ""
  return f"{escaped(column.name)}{suffix}"


def _row(cells: Sequence[str]) -> str:
  return f"{' & '.join(cells)} \\\\"


def _latex(cell: Cell, unit: Unit) -> str:
  text = shown(cell, unit)
  if unit == "share" and not isinstance(cell, str):
    text = text.removesuffix("%")  # the head says so
  text = escaped(text)
  if isinstance(cell, Number):
    text = "".join(_parts(cell, unit, text))
  return text


def _parts(cell: Number, unit: Unit, text: str) -> Iterator[str]:
  yield rf"\textbf{{{text}}}" if cell.best else text
  if cell.change is not None:
    change = shown_change(cell.change, unit).replace("−", "-")
    change = change.replace(",", "{,}")
    yield rf"$_{{{change}}}$"
  if interval := shown_interval(cell, unit):
    yield rf" {{\scriptsize {escaped(interval)}}}"
