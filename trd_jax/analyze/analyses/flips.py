"""What did the student take over? Questions won and lost by training."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from trd_jax.analyze import comparisons, look
from trd_jax.analyze.analysis import (
  Analysis,
  Cell,
  Column,
  Figure,
  Result,
  Table,
)
from trd_jax.analyze.comparisons import Model
from trd_jax.analyze.runs import Run

_MOST_LISTED = 20  # questions of a model and benchmark
_MOST_PANELS = 12
_FIRST = f" Of many runs and benchmarks the first {_MOST_PANELS} are shown."


class _Flips(NamedTuple):
  """One model against its base on one benchmark, question by question."""

  model: Model
  benchmark: str
  k: int
  questions: Sequence[str]
  before: np.ndarray
  after: np.ndarray

  @property
  def won(self) -> np.ndarray:
    """Returns which questions base never solves and the trained one does."""
    return (self.before == 0) & (self.after > 0)

  @property
  def lost(self) -> np.ndarray:
    """Returns which questions base solves and the trained one never does."""
    return (self.before > 0) & (self.after == 0)


def make(runs: Sequence[Run]) -> Result | None:
  """Makes what became of each question."""
  models = comparisons.models(runs)
  found = [
    one
    for name in comparisons.benchmarks(models)
    for model in models
    if model.stage == comparisons.TRAINED
    and (one := _flips(model, name)) is not None
  ]
  if not found:
    return None
  figure = Figure(
    "question_flips",
    "How many of K samples solve a question, base against trained; a mark's"
    " area is the number of questions. Above the diagonal training helped."
    + _FIRST
    * (len(found) > _MOST_PANELS),
    look.drawing(_draw, found[:_MOST_PANELS]),
    "; ".join(_said(one) for one in found),
  )
  summary = Table(
    "question_flips",
    "Questions by what training changed: solved by any of K samples before and"
    " after, won, lost; and solved more often, equally, less often.",
    [
      Column("benchmark"),
      Column("model"),
      Column("questions", "count"),
      Column("solved by base", "count"),
      Column("solved after", "count"),
      Column("won", "count"),
      Column("lost", "count"),
      Column("more often", "count"),
      Column("equally often", "count"),
      Column("less often", "count"),
    ],
    [_row(one) for one in found],
  )
  listed = Table(
    "question_changes",
    "The questions whose number of right samples changed most, at most"
    f" {_MOST_LISTED} of a model and benchmark.",
    [
      Column("benchmark"),
      Column("model"),
      Column("question"),
      Column("right samples of base", "count"),
      Column("right samples after", "count"),
      Column("of", "count"),
    ],
    [row for one in found for row in _listed(one)],
  )
  partial = "; ".join(
    filter(
      None,
      (run.unfinished(comparisons.BASE, comparisons.TRAINED) for run in runs),
    )
  )
  findings = [_said(one) + "." for one in found]
  return Result(findings, [figure], [summary, listed], partial or None)


def _flips(model: Model, name: str) -> _Flips | None:
  base, mine = comparisons.base_of(model).get(name), model.evaluation.get(name)
  if base is None or mine is None or base.k != mine.k:
    return None
  questions, before, after = comparisons.common(base, mine)
  if not questions:
    return None
  return _Flips(model, name, mine.k, questions, before, after)


def _row(one: _Flips) -> list[Cell]:
  counts = (
    one.before > 0,
    one.after > 0,
    one.won,
    one.lost,
    one.after > one.before,
    one.after == one.before,
    one.after < one.before,
  )
  return [
    one.benchmark,
    one.model.label,
    len(one.questions),
    *(int(marks.sum()) for marks in counts),
  ]


def _said(one: _Flips) -> str:
  whose = "" if one.model.label == "trained" else f" {one.model.label}"
  return (
    f"Of {len(one.questions):,} questions on {one.benchmark} the trained"
    f" student{whose} solves {int((one.after > one.before).sum()):,} more often"
    f" and {int((one.after < one.before).sum()):,} less often; it won"
    f" {int(one.won.sum()):,} that base never solved and lost"
    f" {int(one.lost.sum()):,}"
  )


def _listed(one: _Flips) -> list[list[Cell]]:
  questions = list(one.questions)
  change = np.abs(one.after - one.before)
  order = np.argsort(-change, kind="stable")[:_MOST_LISTED]
  rows: list[list[Cell]] = [
    [
      one.benchmark,
      one.model.label,
      questions[place],
      int(one.before[place]),
      int(one.after[place]),
      one.k,
    ]
    for place in order
    if change[place]
  ]
  return rows


def _draw(found: Sequence[_Flips]) -> Any:
  figure, axes = look.panels(len(found), height=2.6)
  for panel, one in zip(axes, found, strict=True):
    # As many marks as there are pairs of counts, not as questions.
    pairs, counts = np.unique(
      np.stack([one.before, one.after]), axis=1, return_counts=True
    )
    panel.plot([0, one.k], [0, one.k], color=look.color("quiet"), linewidth=0.8)
    panel.scatter(
      pairs[0],
      pairs[1],
      s=12 + 220 * counts / max(counts.sum(), 1),
      facecolor=look.color("right"),
      edgecolor=look.color("ink"),
      linewidth=0.5,
      alpha=0.85,
    )
    edge = 0.06 * one.k
    panel.set_xlim(-edge, one.k + edge)
    panel.set_ylim(-edge, one.k + edge)
    look.whole(panel.xaxis)
    look.whole(panel.yaxis)
    panel.set_xlabel(f"right of {one.k}, base")
    panel.set_ylabel(f"right of {one.k}, trained")
    whose = "" if one.model.label == "trained" else f", {one.model.label}"
    look.name_panel(panel, f"{one.benchmark}{whose}")
  return figure


ANALYSIS = Analysis(
  name="flips",
  title="What the student took over",
  question="Which questions did training win, and which did it lose?",
  paper="",
  order=60,
  make=make,
)
