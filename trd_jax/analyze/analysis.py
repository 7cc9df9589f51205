"""What an analysis is and makes, and the registry of all of them.

An analysis reads runs and makes figures, tables and sentences. Its numbers stay
raw (a share is 0.25, a length is a count) until they are shown, so that the
terminal, CSV, LaTeX and the report write the same ones.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from trd_jax.analyze import analyses
from trd_jax.analyze.runs import Run

Unit = Literal["text", "share", "count", "tokens", "seconds", "number"]


class Number(NamedTuple):
  """A figure with what is known about it.

  Attributes:
    value: raw; NaN is never one.
    low: lower end of its 95% interval, None without one.
    high: upper end.
    change: against the run or model that it is compared with.
    best: whether it is the best of its column.
  """

  value: float
  low: float | None = None
  high: float | None = None
  change: float | None = None
  best: bool = False


Cell = str | int | float | Number | None
"""What a table holds; None is shown as a dash."""


class Column(NamedTuple):
  """A column's head.

  Attributes:
    name: as it is shown.
    unit: what its numbers are, which decides how they are written.
  """

  name: str
  unit: Unit = "text"


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of raw numbers.

  Attributes:
    name: of its files, without a suffix.
    caption: one sentence that says what is counted, over what.
    columns: the heads.
    rows: a cell a column.
  """

  name: str
  caption: str
  columns: Sequence[Column]
  rows: Sequence[Sequence[Cell]]


class Figure(NamedTuple):
  """A figure.

  Attributes:
    name: of its files, without a suffix.
    caption: one sentence that says what is seen, over what.
    draw: returns a `matplotlib.figure.Figure`; called only where it is wanted.
    described: the same in words, for whoever can't see it.
  """

  name: str
  caption: str
  draw: Callable[[], Any]
  described: str


@dataclasses.dataclass(frozen=True)
class Result:
  """What an analysis made of some runs.

  Attributes:
    findings: sentences with the figures in them, the most telling first.
    figures: its figures.
    tables: its tables.
    partial: why it isn't of a whole run, None where it is.
  """

  findings: Sequence[str] = ()
  figures: Sequence[Figure] = ()
  tables: Sequence[Table] = ()
  partial: str | None = None


@dataclasses.dataclass(frozen=True)
class Analysis:
  """One analysis.

  Attributes:
    name: of its section and of its anchor in the report.
    title: of its section.
    question: what it answers, as a reader would ask it.
    paper: the paper's figures and tables that it makes, "" for none.
    order: where it stands among all, smaller first.
    make: of the runs, the first of which is `--workdir` and the others
      `--compare`; None where they hold nothing to make it of.
  """

  name: str
  title: str
  question: str
  paper: str
  order: int
  make: Callable[[Sequence[Run]], Result | None]


@functools.cache
def registry() -> dict[str, Analysis]:
  """Returns every analysis by name, in the order in which they are shown."""
  found = []
  for module in pkgutil.iter_modules(analyses.__path__):
    found.append(
      importlib.import_module(f"{analyses.__name__}.{module.name}").ANALYSIS
    )
  found.sort(key=lambda one: (one.order, one.name))
  return {one.name: one for one in found}
