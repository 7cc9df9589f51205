"""How long are right answers, before and after? Figures 5 middle, 8 left."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trd_jax.analyze import comparisons, look, spreads, trajectories
from trd_jax.analyze.analysis import (
  Analysis,
  Column,
  Figure,
  Result,
  Table,
)
from trd_jax.analyze.comparisons import Model
from trd_jax.analyze.runs import Run
from trd_jax.analyze.spreads import Spread


class _Row(NamedTuple):
  """Lengths of a model's samples with a verdict, on one benchmark."""

  benchmark: str
  model: str
  verdict: str
  truncated: int
  spread: Spread


def make(runs: Sequence[Run]) -> Result | None:
  """Makes the lengths of evaluation samples by verdict."""
  models = comparisons.models(runs)
  if not models:
    return None
  names = comparisons.benchmarks(models)
  rows = [
    row for name in names for model in models for row in _rows(model, name)
  ]
  figure = Figure(
    "sample_lengths",
    "Tokens of the samples of each benchmark, on a logarithmic axis: right ones"
    " to the left and wrong ones to the right of each middle, the line across"
    " at the median of right ones.",
    look.drawing(_draw, rows, names),
    "; ".join(
      f"{row.benchmark}, {row.model}, {row.verdict}: median"
      f" {look.short(row.spread.median)} tokens"
      for row in rows
    ),
  )
  table = Table(
    "sample_lengths",
    "Lengths of evaluation samples by verdict: number, median, quartiles, mean,"
    " longest, and how many a budget ended.",
    [
      Column("benchmark"),
      Column("model"),
      Column("verdict"),
      Column("samples", "count"),
      Column("median", "tokens"),
      Column("25th percentile", "tokens"),
      Column("75th percentile", "tokens"),
      Column("mean", "tokens"),
      Column("longest", "tokens"),
      Column("truncated", "count"),
    ],
    [
      [
        *row[:3],
        row.spread.number,
        row.spread.median,
        row.spread.low,
        row.spread.high,
        row.spread.mean,
        row.spread.longest,
        row.truncated,
      ]
      for row in rows
    ],
  )
  partial = "; ".join(
    filter(
      None,
      (run.unfinished(comparisons.BASE, comparisons.TRAINED) for run in runs),
    )
  )
  return Result(_findings(rows, models), [figure], [table], partial or None)


def _rows(model: Model, benchmark: str) -> list[_Row]:
  table = model.run.samples(model.stage)
  table = table.filter(pc.equal(table["benchmark"], benchmark))  # type: ignore[attr-defined]
  tokens = table["num_tokens"].to_numpy()
  truncated = table["truncated"].to_numpy()
  verdict = pc.fill_null(  # type: ignore[attr-defined]
    table["correct"].cast(pa.int8()), trajectories.UNJUDGED
  ).to_numpy()
  rows = []
  for value, called in trajectories.VERDICTS.items():
    kept = verdict == value
    if spread := spreads.of(tokens[kept]):
      cut = int(truncated[kept].sum())
      rows.append(_Row(benchmark, model.label, called, cut, spread))
  return rows


def _findings(rows: Sequence[_Row], models: Sequence[Model]) -> list[str]:
  right = {
    (row.benchmark, row.model): row.spread.median
    for row in rows
    if row.verdict == "right"
  }
  base = next((m.label for m in models if m.stage == comparisons.BASE), None)
  said = []
  for (benchmark, model), median in right.items():
    before = right.get((benchmark, base or ""))
    if model == base or before is None:
      continue
    moved = "as before" if median == before else f"{before:,.0f} before"
    whose = "" if model == "trained" else f" of {model}"
    said.append(
      f"Right samples{whose} on {benchmark} have a median of {median:,.0f}"
      f" tokens, {moved}."
    )
  return said


def _draw(rows: Sequence[_Row], names: Sequence[str]) -> Any:
  models = list(dict.fromkeys(row.model for row in rows))
  longest = max(map(len, models))
  upright = longest * len(models) > 36
  height = look.PANEL[1] + 0.07 * longest * upright
  figure, axes = look.panels(len(names), height=height)
  for panel, name in zip(axes, names, strict=True):
    mine = [row for row in rows if row.benchmark == name]
    for place, model in enumerate(models):
      halves = {r.verdict: r.spread for r in mine if r.model == model}
      most = max(
        (int(np.max(one.counts)) for one in halves.values()), default=0
      )
      for verdict, side in (("right", -1), ("wrong", 1)):
        if verdict in halves:
          look.half_violin(
            panel,
            place,
            spreads.EDGES,
            halves[verdict].counts,
            side,
            verdict,
            most=most,
          )
      if "right" in halves:
        panel.plot(
          [place - 0.42, place],
          [halves["right"].median] * 2,
          color=look.color("ink"),
          linewidth=1.2,
        )
    look.log_lengths(panel, [row.spread for row in mine])
    panel.set_xticks(range(len(models)), models, rotation=90 if upright else 0)
    panel.set_xlim(-0.6, len(models) - 0.4)
    panel.grid(axis="x", visible=False)
    panel.set_ylabel("tokens")
    look.name_panel(panel, name)
  look.violin_legend(figure)
  return figure


ANALYSIS = Analysis(
  name="correct_lengths",
  title="How long right answers are",
  question="Did right answers become shorter or longer?",
  paper="Figure 5 middle, Figure 8 left",
  order=75,
  make=make,
)
