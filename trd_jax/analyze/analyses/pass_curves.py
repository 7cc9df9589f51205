"""How much do more samples help? Pass@k from k = 1 to K: Figure 5 right."""

from collections.abc import Sequence
from typing import Any

from trd_jax.analyze import comparisons, look
from trd_jax.analyze.analysis import (
  Analysis,
  Cell,
  Column,
  Figure,
  Number,
  Result,
  Table,
)
from trd_jax.analyze.comparisons import Model
from trd_jax.analyze.runs import Evaluation, Run
from trd_jax.grading import estimators

_MOST_BANDS = 4  # that can be told apart


def make(runs: Sequence[Run]) -> Result | None:
  """Makes Pass@k curves of all models, a panel a benchmark."""
  models = comparisons.models(runs)
  models = [m for m in models if any(e.k > 1 for e in m.evaluation.values())]
  if not models:
    return None
  names = comparisons.benchmarks(models)
  figure = Figure(
    "pass_curves",
    "Unbiased Pass@k, the chance that k samples hold a right one, k on a"
    " logarithmic axis; "
    + (
      "bands are 95% intervals over questions."
      if len(models) <= _MOST_BANDS
      else "the table has the 95% intervals."
    ),
    look.drawing(_draw, models, names),
    "; ".join(
      f"{name}, {model.label}: "
      + ", ".join(
        f"{100 * cell.value:.1f}% at k={k}"
        for k, cell in _curve(model.evaluation[name])
      )
      for name in names
      for model in models
      if name in model.evaluation
    ),
  )
  rows: list[list[Cell]] = []
  for name in names:
    for model in models:
      if name in model.evaluation:
        one = model.evaluation[name]
        rows += [
          [name, model.label, len(one.questions), k, cell]
          for k, cell in _curve(one)
        ]
  table = Table(
    "pass_curves",
    "Unbiased Pass@k with 95% intervals over questions.",
    [
      Column("benchmark"),
      Column("model"),
      Column("questions", "count"),
      Column("k", "count"),
      Column("Pass@k", "share"),
    ],
    rows,
  )
  partial = "; ".join(
    filter(
      None,
      (run.unfinished(comparisons.BASE, comparisons.TRAINED) for run in runs),
    )
  )
  return Result(_findings(models, names), [figure], [table], partial or None)


def _curve(evaluation: Evaluation) -> list[tuple[int, Number]]:
  values = estimators.pass_curve(evaluation.correct, evaluation.k)
  ends = estimators.pass_curve_intervals(evaluation.correct, evaluation.k)
  return [
    (int(k), Number(value, low=ends[k][0], high=ends[k][1]))
    for k, value in values.items()
  ]


def _findings(models: Sequence[Model], names: Sequence[str]) -> list[str]:
  """Says where a curve crosses its base's: better at 1, worse at K, or so."""
  said = []
  for model in models:
    if model.stage == comparisons.BASE:
      continue
    base = comparisons.base_of(model)
    for name in names:
      if name not in model.evaluation or name not in base:
        continue
      mine = dict(_curve(model.evaluation[name]))
      theirs = dict(_curve(base[name]))
      both = sorted(mine.keys() & theirs.keys())
      gaps = [mine[k].value - theirs[k].value for k in both]
      whose = "" if model.label == "trained" else f" of {model.label}"
      if len(both) > 1 and gaps[0] > 0 > gaps[-1]:
        first = next(k for k, gap in zip(both, gaps, strict=True) if gap < 0)
        said.append(
          f"On {name} the trained student{whose} is ahead at k=1 by"
          f" {100 * gaps[0]:.1f} points and behind from k={first} on"
          f" ({100 * gaps[-1]:+.1f} at k={both[-1]})."
        )
      elif len(both) > 1:
        said.append(
          f"On {name} the trained student{whose} is ahead by"
          f" {100 * gaps[0]:+.1f} points at k=1 and {100 * gaps[-1]:+.1f} at"
          f" k={both[-1]}."
        )
  return said


def _draw(models: Sequence[Model], names: Sequence[str]) -> Any:
  figure, axes = look.panels(len(names))
  for panel, name in zip(axes, names, strict=True):
    for number, model in enumerate(models):
      if name not in model.evaluation:
        continue
      curve = _curve(model.evaluation[name])
      k = [one for one, _ in curve]
      cells = [cell for _, cell in curve]
      look.line(panel, number, k, [cell.value for cell in cells], model.label)
      if len(models) <= _MOST_BANDS:
        look.band(
          panel, number, k, [c.low for c in cells], [c.high for c in cells]
        )
    ticks = sorted(
      {
        k
        for model in models
        if name in model.evaluation
        for k, _ in _curve(model.evaluation[name])
      }
    )
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(k) for k in ticks])
    panel.set_xticks([], minor=True)
    panel.set_xlabel("k")
    panel.set_ylim(0, 1.02)
    look.percent(panel.yaxis)
    look.name_panel(panel, f"{name}, Pass@k")
  look.legend(figure, axes)
  return figure


ANALYSIS = Analysis(
  name="pass_curves",
  title="What more samples bring",
  question="How does Pass@k grow with k, before and after training?",
  paper="Figure 5 right",
  order=65,
  make=make,
)
