"""Did further rounds help? A run's rounds, one after the other."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trd_jax.analyze import look
from trd_jax.analyze.analysis import (
  Analysis,
  Cell,
  Column,
  Figure,
  Number,
  Result,
  Table,
)
from trd_jax.analyze.runs import Run
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files.json_files import read_json
from trd_jax.pipeline import rounds

_AGAIN = "remove it and run the pipeline again"


class _Row(NamedTuple):
  """A round's student on one benchmark; round 0 is base."""

  run: str
  number: int
  benchmark: str
  avg: Number
  passed: Number


def make(runs: Sequence[Run]) -> Result | None:
  """Makes figures by round of runs that have several."""
  several = [run for run in runs if run.config.pipeline.rounds > 1]
  rows = [row for run in several for row in _rows(run)]
  if not rows:
    return None
  figure = Figure(
    "rounds",
    "Avg@K of each round's student, with 95% intervals over questions; round 0"
    " is base.",
    look.drawing(_draw, rows),
    "; ".join(
      f"{row.run}, round {row.number}, {row.benchmark}:"
      f" {100 * row.avg.value:.1f}%"
      for row in rows
    ),
  )
  table = Table(
    "rounds",
    "Avg@K and Pass@K of each round's student, with 95% intervals over"
    " questions; round 0 is base.",
    [
      Column("run"),
      Column("round", "count"),
      Column("benchmark"),
      Column("Avg@K", "share"),
      Column("Pass@K", "share"),
    ],
    [_cells(row, rows) for row in rows],
  )
  findings = []
  for run in several:
    mine = [row for row in rows if row.run == run.label and row.number]
    if mine:
      last = max(row.number for row in mine)
      best = max(mine, key=lambda row: row.avg.value)
      whose = f" of {run.label}" if len(several) > 1 else ""
      findings.append(
        f"The highest Avg@K{whose} was {100 * best.avg.value:.1f}% on"
        f" {best.benchmark} after round {best.number} of {last}."
      )
  missing = [
    f"rounds of {run.label} are still to come"
    for run in several
    if not run.run_dir.rounds.exists()
  ]
  return Result(findings, [figure], [table], "; ".join(missing) or None)


def _cells(row: _Row, rows: Sequence[_Row]) -> list[Cell]:
  alike = [
    one for one in rows if (one.run, one.benchmark) == (row.run, row.benchmark)
  ]
  best = (
    max(one.avg.value for one in alike),
    max(one.passed.value for one in alike),
  )
  return [
    row.run,
    row.number,
    row.benchmark,
    row.avg._replace(best=row.avg.value == best[0]),
    row.passed._replace(best=row.passed.value == best[1]),
  ]


def _rows(run: Run) -> Iterator[_Row]:
  """Yields base and each round that is evaluated, by benchmark."""
  section = run.config.pipeline
  first: Mapping[str, Any] = {}
  found: list[Mapping[str, Any]] = []
  if section.parts > 1:
    if run.run_dir.rounds.exists():
      found = read_json(run.run_dir.rounds, _AGAIN)["rounds"]
  else:
    found = list(rounds.figures(run.run_dir, section.rounds))
  done = run.done("evaluate/base")
  if done is not None:
    first = done
  try:
    for name, figures in first.items():
      yield _row(run, 0, name, figures)
    for one in found:
      for name, figures in one.get("benchmarks", {}).items():
        yield _row(run, one["round"], name, figures)
  except (LookupError, TypeError, AttributeError) as error:
    raise UserError(
      f"{run.run_dir.rounds} says of no round; {_AGAIN}"
    ) from error


def _row(run: Run, number: int, name: str, figures: Mapping[str, Any]) -> _Row:
  cells = []
  for metric in ("avg_at_k", "pass_at_k"):
    low, high = figures[f"{metric}_interval"]
    cells.append(Number(figures[metric], low, high))
  return _Row(run.label, number, name, *cells)


def _draw(rows: Sequence[_Row]) -> Any:
  names = list(dict.fromkeys(row.benchmark for row in rows))
  labels = list(dict.fromkeys(row.run for row in rows))
  figure, axes = look.panels(len(names))
  for panel, name in zip(axes, names, strict=True):
    for number, label in enumerate(labels):
      mine = [r for r in rows if r.run == label and r.benchmark == name]
      mine.sort(key=lambda row: row.number)
      x = [row.number for row in mine]
      look.line(panel, number, x, [row.avg.value for row in mine], label)
      ends = [[row.avg.low for row in mine], [row.avg.high for row in mine]]
      look.band(panel, number, x, *ends)
    look.whole(panel.xaxis)
    panel.set_xlabel("round")
    panel.set_ylim(0, 1.02)
    look.percent(panel.yaxis)
    look.name_panel(panel, f"{name}, Avg@K")
  look.legend(figure, axes)
  return figure


ANALYSIS = Analysis(
  name="rounds",
  title="What further rounds brought",
  question="Did each round make the student better?",
  paper="",
  order=85,
  make=make,
)
