"""Where did it get better? Avg and Pass by base difficulty: Figure 8."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trd_jax.analyze import comparisons, look
from trd_jax.analyze.analysis import (
  Analysis,
  Column,
  Figure,
  Number,
  Result,
  Table,
)
from trd_jax.analyze.comparisons import METRICS, Metric
from trd_jax.analyze.runs import Evaluation, Run
from trd_jax.grading import estimators


class _Row(NamedTuple):
  """A model's figures on the questions of one difficulty."""

  benchmark: str
  bucket: str
  model: str
  questions: int
  avg: Number
  passed: Number


def make(runs: Sequence[Run]) -> Result | None:
  """Makes figures by difficulty, which the first run's base says."""
  models = comparisons.models(runs)
  fixed = runs[0].evaluation(comparisons.BASE)
  if not fixed or all(one.stage == comparisons.BASE for one in models):
    return None
  names = [name for name in comparisons.benchmarks(models) if name in fixed]
  rows = [
    row
    for name in names
    for model in models
    if name in model.evaluation
    for row in _rows(name, model.label, model.evaluation[name], fixed[name])
  ]
  figures = [
    Figure(
      f"difficulty_{metric}",
      f"{called} by how often the base of {runs[0].label} solves a question,"
      " with 95% intervals over questions; the buckets are the same for all.",
      look.drawing(_draw, rows, names, metric),
      "; ".join(
        f"{row.benchmark}, {row.bucket} ({row.questions} questions),"
        f" {row.model}: {100 * _value(row, metric).value:.1f}%"
        for row in rows
      ),
    )
    for metric, called in METRICS.items()
  ]
  table = Table(
    "difficulty",
    "Avg@K and Pass@K by base difficulty: B0 holds the questions that the base"
    f" of {runs[0].label} never solves, B1-8 those that it solves 1 to 8"
    " times.",
    [
      Column("benchmark"),
      Column("bucket"),
      Column("model"),
      Column("questions", "count"),
      Column("Avg@K", "share"),
      Column("Pass@K", "share"),
    ],
    [list(row) for row in rows],
  )
  partial = "; ".join(
    filter(
      None,
      (run.unfinished(comparisons.BASE, comparisons.TRAINED) for run in runs),
    )
  )
  base = next(m.label for m in models if m.stage == comparisons.BASE)
  return Result(_findings(rows, base), figures, [table], partial or None)


def _rows(
  benchmark: str, label: str, evaluation: Evaluation, fixed: Evaluation
) -> list[_Row]:
  """Returns a model's rows, of the questions that the base was asked, too."""
  hard = dict(zip(fixed.questions, fixed.correct, strict=True))
  known = np.array([question in hard for question in evaluation.questions])
  of_base = np.array([hard.get(q, 0) for q in evaluation.questions])
  rows = []
  for bucket, (low, high) in estimators.bucket_ranges(fixed.k).items():
    kept = known & (low <= of_base) & (of_base <= high)
    if not kept.any():
      continue
    inside = evaluation._replace(
      questions=[
        q for q, k in zip(evaluation.questions, kept, strict=True) if k
      ],
      correct=evaluation.correct[kept],
    )
    values = [comparisons.value(inside, metric) for metric in METRICS]
    rows.append(_Row(benchmark, bucket, label, int(kept.sum()), *values))
  return rows


def _value(row: _Row, metric: Metric) -> Number:
  return row.avg if metric == "avg" else row.passed


def _findings(rows: Sequence[_Row], base: str) -> list[str]:
  said = []
  before: Mapping[tuple[str, str], _Row] = {
    (row.benchmark, row.bucket): row for row in rows if row.model == base
  }
  for row in rows:
    if row.model.startswith("base"):
      continue
    whose = "" if row.model == "trained" else f" of {row.model}"
    if row.bucket == "B0":
      solved = round(row.passed.value * row.questions)
      said.append(
        f"Of {_questions(row)} on {row.benchmark} that base never solved, the"
        f" trained student{whose} solves {solved}."
      )
    elif (row.benchmark, row.bucket) in before:
      was = before[row.benchmark, row.bucket].avg.value
      said.append(
        f"On the {_questions(row)} of {row.bucket} on {row.benchmark}"
        f" Avg@K{whose} went from {100 * was:.1f}% to"
        f" {100 * row.avg.value:.1f}%."
      )
  return said


def _questions(row: _Row) -> str:
  return f"{row.questions:,} question{'s' * (row.questions != 1)}"


def _draw(rows: Sequence[_Row], names: Sequence[str], metric: Metric) -> Any:
  figure, axes = look.panels(len(names))
  models = list(dict.fromkeys(row.model for row in rows))
  for panel, name in zip(axes, names, strict=True):
    mine = [row for row in rows if row.benchmark == name]
    buckets = {row.bucket: row.questions for row in mine}
    order = sorted(buckets, key=lambda one: int(one[1:].partition("-")[0]))
    for number, model in enumerate(models):
      style = look.series(number)
      offset = (number - (len(models) - 1) / 2) * 0.7 / len(models)
      for row in mine:
        if row.model != model:
          continue
        place = order.index(row.bucket) + offset
        one = _value(row, metric)
        ends = [one.low or 0.0, one.high or 0.0]
        panel.plot([place, place], ends, color=style.color)
        panel.plot(
          [place],
          [one.value],
          color=style.color,
          marker=style.marker,
          linestyle="none",
          label=model,
        )
    panel.set_xticks(
      range(len(order)), [f"{one}\n{buckets[one]} questions" for one in order]
    )
    panel.set_xlim(-0.6, len(order) - 0.4)
    panel.set_ylim(0, 1.03)
    panel.grid(axis="x", visible=False)
    look.percent(panel.yaxis)
    look.name_panel(panel, f"{name}, {METRICS[metric]}")
  look.legend(figure, axes)
  return figure


ANALYSIS = Analysis(
  name="difficulty",
  title="Where it got better",
  question="Which of the questions that base finds hard does it solve now?",
  paper="Figure 8 middle and right",
  order=70,
  make=make,
)
