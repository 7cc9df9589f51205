"""How long are y*, y_o and y_r, by verdict? Figures 5 to 7, left."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from trd_jax.analyze import look, spreads, trajectories
from trd_jax.analyze.analysis import (
  Analysis,
  Cell,
  Column,
  Figure,
  Result,
  Table,
)
from trd_jax.analyze.runs import Run
from trd_jax.analyze.spreads import Spread

_MOST_PANELS = 8
_FIRST = f" Of many runs the first {_MOST_PANELS} are shown."


class _Row(NamedTuple):
  """Lengths of some trajectories, or of references."""

  run: str
  references: str
  trajectory: str
  verdict: str
  unit: str
  truncated: int | None
  spread: Spread


def make(runs: Sequence[Run]) -> Result | None:
  """Makes the lengths of runs' trajectories and references."""
  runs, shared = trajectories.distinct(runs)
  rows = [row for run in runs for row in _rows(run)]
  if not any(row.trajectory != "y*" for row in rows):
    return None
  panels = _panels(rows)
  figure = Figure(
    "trajectory_lengths",
    "Tokens of references (y*), drafts (y_o) and refined trajectories (y_r), on"
    " a logarithmic axis: right ones to the left and wrong ones to the right of"
    " each middle, the line across at the median of all."
    + _FIRST
    * (len(runs) > _MOST_PANELS),
    look.drawing(_draw, rows, panels),
    "; ".join(_said(row) for row in rows if row.verdict == "all"),
  )
  table = Table(
    "trajectory_lengths",
    "Lengths of references, drafts and refined trajectories by verdict: number,"
    " median, quartiles, mean, longest, and how many a budget ended.",
    [
      Column("run"),
      Column("references"),
      Column("trajectory"),
      Column("verdict"),
      Column("unit"),
      Column("number", "count"),
      Column("median", "tokens"),
      Column("25th percentile", "tokens"),
      Column("75th percentile", "tokens"),
      Column("mean", "tokens"),
      Column("longest", "tokens"),
      Column("truncated", "count"),
    ],
    [_cells(row) for row in rows],
  )
  partial = filter(None, (run.unfinished("rollout", "refine") for run in runs))
  findings = [said for run in runs for said in _findings(run, rows, len(runs))]
  findings += shared
  return Result(findings, [figure], [table], "; ".join(partial) or None)


def _rows(run: Run) -> Iterator[_Row]:
  """Yields a run's lengths, by reference, trajectory and verdict."""
  for stage, name in (("rollout", "y_o"), ("refine", _written(run))):
    found = trajectories.rows(run, stage)
    if found is None:
      continue
    for references, mine in trajectories.groups(found.reference).items():
      kinds = {"all": mine}
      for verdict, called in trajectories.VERDICTS.items():
        kinds[called] = mine & (found.verdict == verdict)
      for called, kept in kinds.items():
        if spread := spreads.of(found.tokens[kept]):
          cut = int(found.truncated[kept].sum())
          yield _Row(run.label, references, name, called, "tokens", cut, spread)
  lengths = trajectories.reference_lengths(run)
  if lengths is None:
    return
  for references, mine in trajectories.groups(lengths.reference).items():
    if spread := spreads.of(lengths.lengths[mine]):
      yield _Row(run.label, references, "y*", "all", lengths.unit, None, spread)


def _written(run: Run) -> str:
  written = trajectories.written(run)
  return "teacher's answer" if written == "teacher" else written


def _cells(row: _Row) -> list[Cell]:
  one = row.spread
  numbers = (one.median, one.low, one.high, one.mean, one.longest)
  return [*row[:5], one.number, *numbers, row.truncated]


def _said(row: _Row) -> str:
  return (
    f"{row.run}, references {row.references}, {row.trajectory}: median"
    f" {look.short(row.spread.median)} {row.unit}"
  )


def _findings(run: Run, rows: Sequence[_Row], count: int) -> Iterator[str]:
  whose = f" in {run.label}" if count > 1 else ""
  mine = {
    (row.trajectory, row.verdict): row
    for row in rows
    if row.run == run.label and row.references == trajectories.ALL
  }
  draft, refined = mine.get(("y_o", "all")), mine.get(("y_r", "all"))
  if draft and refined:
    ratio = draft.spread.median / max(refined.spread.median, 1)
    told = (
      "as long as"
      if 0.95 < ratio < 1.05
      else (f"{ratio:.2g} times as long as" if ratio > 1 else "shorter than")
    )
    yield (
      f"The median draft{whose} has {draft.spread.median:,.0f} tokens, {told}"
      f" the median refined one ({refined.spread.median:,.0f})."
    )
  right, wrong = mine.get(("y_o", "right")), mine.get(("y_o", "wrong"))
  if right and wrong:
    yield (
      f"Right drafts{whose} have a median of {right.spread.median:,.0f} tokens,"
      f" wrong ones of {wrong.spread.median:,.0f}."
    )
  if draft and draft.truncated:
    share = draft.truncated / draft.spread.number
    yield (
      f"{draft.truncated:,} drafts{whose} ({100 * share:.1f}%) were ended by"
      " their budget."
    )


def _panels(rows: Sequence[_Row]) -> list[tuple[str, str]]:
  """Returns run and kind of reference of each panel."""
  labels = list(dict.fromkeys(row.run for row in rows))
  kinds = list(dict.fromkeys(row.references for row in rows))
  if len(labels) > 1 or len(kinds) == 1:
    return [(label, trajectories.ALL) for label in labels][:_MOST_PANELS]
  # Of one run those with a solution and those without stand apart.
  return [(labels[0], kind) for kind in kinds if kind != trajectories.ALL]


def _draw(rows: Sequence[_Row], panels: Sequence[tuple[str, str]]) -> Any:
  figure, axes = look.panels(len(panels), height=2.6)
  for panel, (label, kind) in zip(axes, panels, strict=True):
    mine = [
      row
      for row in rows
      if row.run == label and row.references == kind and row.unit == "tokens"
    ]
    names = list(dict.fromkeys(row.trajectory for row in mine))
    names.sort(key=["y*", "y_o", "y_r", "teacher's answer"].index)
    for row in mine:
      place = names.index(row.trajectory)
      if row.verdict == "all":
        panel.plot(
          [place - 0.42, place + 0.42],
          [row.spread.median] * 2,
          color=look.color("ink"),
          linewidth=0.8,
          zorder=3,
        )
      if row.trajectory == "y*":
        most = row.spread.counts.max()
        for side in (-1, 1):
          look.half_violin(
            panel,
            place,
            spreads.EDGES,
            row.spread.counts,
            side,
            "unjudged",
            most=most,
          )
    for name in names:
      _violin(
        panel, names.index(name), [r for r in mine if r.trajectory == name]
      )
    look.log_lengths(panel, [row.spread for row in mine])
    panel.set_xticks(range(len(names)), names)
    panel.set_xlim(-0.6, len(names) - 0.4)
    panel.grid(axis="x", visible=False)
    panel.set_ylabel("tokens")
    if len(panels) > 1:
      title = label if kind == trajectories.ALL else f"references: {kind}"
      look.name_panel(panel, title)
  look.violin_legend(figure)
  return figure


def _violin(panel: Any, place: int, rows: Sequence[_Row]) -> None:
  halves = {row.verdict: row.spread.counts for row in rows}
  # Both halves in one scale: which is wider has more.
  most = max(
    (int(np.max(halves[v])) for v in ("right", "wrong") if v in halves),
    default=0,
  )
  for verdict, side in (("right", -1), ("wrong", 1)):
    if verdict in halves:
      look.half_violin(
        panel, place, spreads.EDGES, halves[verdict], side, verdict, most=most
      )


ANALYSIS = Analysis(
  name="lengths",
  title="How long drafts and rewrites are",
  question="How long are y*, y_o and y_r, right and wrong?",
  paper="Figure 5 left, Figures 6 and 7 left",
  order=50,
  make=make,
)
