"""What did the rewrite change? Verdicts of y_o and y_r: Figures 6 and 7."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from trd_jax.analyze import look, trajectories
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
from trd_jax.data import leakage
from trd_jax.grading import estimators

_STAGES = (("rollout", "y_o"), ("refine", "y_r"))
_CELLS = {
  (True, True): ("right → right", "right", ""),
  (False, True): ("wrong → right", "series-5", "|||"),
  (False, False): ("wrong → wrong", "wrong", "////"),
  (True, False): ("right → wrong", "series-4", "xxxx"),
}
"""By verdicts of y_o and y_r: name, colour and hatch."""


class _Accuracy(NamedTuple):
  """How many of some graded trajectories are right."""

  run: str
  references: str
  trajectory: str
  graded: int
  right: int
  share: Number


def make(runs: Sequence[Run]) -> Result | None:
  """Makes verifier accuracy and the outcomes of drafts and their rewrites."""
  runs, shared = trajectories.distinct(runs)
  accuracies = [row for run in runs for row in _accuracies(run)]
  if not accuracies:
    return None
  pairs = {run.label: trajectories.pairs(run) for run in runs}
  paired = {label: one for label, one in pairs.items() if one is not None}
  figures = [
    Figure(
      "verifier_accuracy",
      "Share of graded trajectories that are right, with 95% intervals.",
      look.drawing(_draw_accuracy, accuracies),
      "; ".join(
        f"{row.run}, references {row.references}, {row.trajectory}:"
        f" {100 * row.share.value:.1f}% of {row.graded:,}"
        for row in accuracies
      ),
    )
  ]
  tables = [_accuracy_table(accuracies)]
  outcomes = [
    (label, kind, _counts(one, mine))
    for label, one in paired.items()
    for kind, mine in trajectories.groups(one.reference).items()
  ]
  if outcomes:
    figures.append(
      Figure(
        "outcomes",
        "What became of drafts when they were rewritten: verdict of y_o, then"
        " of y_r, as shares of all pairs that were graded.",
        look.drawing(_draw_outcomes, outcomes),
        "; ".join(
          f"{label}, references {kind}: "
          + ", ".join(f"{_CELLS[cell][0]} {n:,}" for cell, n in counts.items())
          for label, kind, counts in outcomes
        ),
      )
    )
    tables.append(_outcome_table(outcomes))
  tables.append(_reasons(runs))
  leaks = [(run, found) for run in runs if (found := _leaks(run))]
  if leaks:
    tables.append(_leak_table(leaks))
  partial = filter(None, (run.unfinished("rollout", "refine") for run in runs))
  findings = [
    *(
      s
      for label, kind, counts in outcomes
      if kind == trajectories.ALL
      for s in _findings(label, counts, len(runs))
    ),
    *(_leak_finding(run, found, len(runs)) for run, found in leaks),
    *shared,
  ]
  return Result(findings, figures, tables, "; ".join(partial) or None)


def _share(marks: np.ndarray) -> Number:
  """Returns the share of true marks, with Wilson's interval."""
  low, high = estimators.mean_intervals(marks.astype(float))
  return Number(float(marks.mean()), float(low), float(high))


def _of(count: int, total: int) -> Number | None:
  """Returns a share of a total, with Wilson's interval; None of nothing."""
  return _share(np.arange(total) < count) if total else None


def _accuracies(run: Run) -> Iterator[_Accuracy]:
  for stage, name in _STAGES:
    found = trajectories.rows(run, stage)
    if found is None:
      continue
    called = name if stage == "rollout" else trajectories.written(run)
    for kind, mine in trajectories.groups(found.reference).items():
      marks = found.verdict[mine & found.graded] == trajectories.RIGHT
      if len(marks):
        right = int(marks.sum())
        yield _Accuracy(
          run.label, kind, called, len(marks), right, _share(marks)
        )


def _accuracy_table(rows: Sequence[_Accuracy]) -> Table:
  return Table(
    "verifier_accuracy",
    "Graded trajectories that are right, with 95% intervals; one that could"
    " not be judged counts as not right.",
    [
      Column("run"),
      Column("references"),
      Column("trajectory"),
      Column("graded", "count"),
      Column("right", "count"),
      Column("accuracy", "share"),
    ],
    [list(row) for row in rows],
  )


_Counts = dict[tuple[bool, bool], int]


def _counts(pairs: trajectories.Pairs, mine: np.ndarray) -> _Counts:
  return {
    (before, after): int(
      (mine & (pairs.before == before) & (pairs.after == after)).sum()
    )
    for before, after in _CELLS
  }


def _outcome_table(outcomes: Sequence[tuple[str, str, _Counts]]) -> Table:
  rows: list[list[Cell]] = []
  for label, kind, counts in outcomes:
    for cell, (name, _, _) in _CELLS.items():
      total = sum(counts.values())
      before = sum(n for (b, _), n in counts.items() if b == cell[0])
      shares = (_of(counts[cell], total), _of(counts[cell], before))
      rows.append([label, kind, name, counts[cell], *shares])
  return Table(
    "outcomes",
    "Verdict of y_o, then of its y_r: counts, shares of all pairs and of the"
    " drafts with that verdict, with 95% intervals.",
    [
      Column("run"),
      Column("references"),
      Column("outcome"),
      Column("pairs", "count"),
      Column("of all", "share"),
      Column("of such drafts", "share"),
    ],
    rows,
  )


def _reasons(runs: Sequence[Run]) -> Table:
  rows: list[list[Cell]] = []
  for run in runs:
    for stage, name in _STAGES:
      found = trajectories.rows(run, stage)
      if found is None:
        continue
      total = len(found.keys)
      counts: list[tuple[str, int]] = [
        (f"verdict: {reason}", n)
        for reason, n in Counter(found.reasons.tolist()).most_common()
      ]
      counts.append(("ended by the budget", int(found.truncated.sum())))
      if stage == "refine":
        counts.append(("draft shortened", int((found.elided > 0).sum())))
      called = name if stage == "rollout" else trajectories.written(run)
      for reason, n in counts:
        rows.append([run.label, called, reason, n, n / total])
  return Table(
    "verdict_reasons",
    "Why trajectories have the verdict that they have, and how many were ended"
    " by their budget or written after a shortened draft.",
    [
      Column("run"),
      Column("trajectory"),
      Column("what"),
      Column("number", "count"),
      Column("share", "share"),
    ],
    rows,
  )


class _Leaks(NamedTuple):
  """How many refined trajectories speak of a draft or a reference."""

  rows: int
  anywhere: int
  in_thoughts: int
  in_answer: int


def _leaks(run: Run) -> _Leaks | None:
  """Returns the refine stage's own count, or counts where it isn't finished."""
  table = run.trajectories("refine")
  if not table.num_rows:
    return None
  done = run.done("refine") or {}
  names = ("leaks", "leaks_in_thoughts", "leaks_in_answer")
  if all(name in done for name in names):
    return _Leaks(table.num_rows, *(int(done[name]) for name in names))
  texts = (row["text"] for row in run.rows("refine", ("text",)))
  return _Leaks(table.num_rows, *leakage.count_leakage(texts))


def _leak_table(leaks: Sequence[tuple[Run, _Leaks]]) -> Table:
  return Table(
    "leaks",
    "Refined trajectories that speak of a draft or a reference, which the"
    " student won't have: anywhere, in thoughts, in the answer.",
    [
      Column("run"),
      Column("y_r", "count"),
      Column("anywhere", "count"),
      Column("share", "share"),
      Column("in thoughts", "count"),
      Column("in the answer", "count"),
    ],
    [
      [
        run.label,
        found.rows,
        found.anywhere,
        _of(found.anywhere, found.rows),
        found.in_thoughts,
        found.in_answer,
      ]
      for run, found in leaks
    ],
  )


def _findings(label: str, counts: _Counts, runs: int) -> Iterator[str]:
  whose = f" of {label}" if runs > 1 else ""
  won, lost = counts[False, True], counts[True, False]
  wrong = won + counts[False, False]
  right = lost + counts[True, True]
  parts = []
  for n, total, what in (
    (won, wrong, "wrong drafts right"),
    (lost, right, "right ones wrong"),
  ):
    if share := _of(n, total):
      assert share.low is not None
      assert share.high is not None
      parts.append(
        f"{n:,} of {total:,} {what} ({100 * share.value:.1f}%, 95% interval"
        f" {100 * share.low:.1f} to {100 * share.high:.1f})"
      )
  yield f"The rewrite{whose} turned {' and '.join(parts)}."
  if lost:
    yield (
      f"For each right draft{whose} that it spoilt it repaired"
      f" {won / lost:,.3g} wrong ones."
    )


def _leak_finding(run: Run, found: _Leaks, runs: int) -> str:
  whose = f" of {run.label}" if runs > 1 else ""
  if not found.anywhere:
    return f"No refined trajectory{whose} speaks of a draft or a reference."
  return (
    f"{found.anywhere:,} of {found.rows:,} refined trajectories{whose}"
    f" ({100 * found.anywhere / found.rows:.2g}%) speak of a draft or a"
    f" reference, {found.in_answer:,} of them in their answer."
  )


def _row_label(run: str, kind: str, by_kind: bool) -> str:
  return f"references: {kind}" if by_kind else run


def _draw_accuracy(rows: Sequence[_Accuracy]) -> Any:
  labels = list(dict.fromkeys((row.run, row.references) for row in rows))
  one_run = len({run for run, _ in labels}) == 1
  if not one_run:
    labels = [one for one in labels if one[1] == trajectories.ALL]
  names = list(dict.fromkeys(row.trajectory for row in rows))
  figure, (panel,) = look.panels(height=1.0 + 0.3 * len(labels))
  for row in rows:
    if (row.run, row.references) not in labels:
      continue
    number = names.index(row.trajectory)
    offset = (number - (len(names) - 1) / 2) * 0.3
    style = look.series(number)
    place = labels.index((row.run, row.references)) + offset
    look.interval(panel, place, row.share, style)
  for number, name in enumerate(names):
    look.interval_label(panel, look.series(number), name)
  panel.set_yticks(
    range(len(labels)),
    [
      _row_label(run, kind, len(labels) > 1 and one_run) for run, kind in labels
    ],
  )
  panel.set_ylim(len(labels) - 0.5, -0.5)
  panel.set_xlim(0, 1)
  look.percent(panel.xaxis)
  panel.set_xlabel("right")
  look.legend(figure, [panel])
  return figure


def _draw_outcomes(outcomes: Sequence[tuple[str, str, _Counts]]) -> Any:
  one_run = len({label for label, _, _ in outcomes}) == 1
  if not one_run:
    outcomes = [one for one in outcomes if one[1] == trajectories.ALL]
  figure, (panel,) = look.panels(height=1.0 + 0.34 * len(outcomes))
  for place, (_, _, counts) in enumerate(outcomes):
    total, left = sum(counts.values()), 0.0
    for cell, (name, color, hatch) in _CELLS.items():
      share = counts[cell] / total
      panel.barh(
        place,
        share,
        0.62,
        left,
        facecolor=look.color(color),
        edgecolor=look.color("ink"),
        linewidth=0.5,
        hatch=hatch,
        label=None if place else name,
      )
      left += share
  panel.set_yticks(
    range(len(outcomes)),
    [
      _row_label(label, kind, len(outcomes) > 1 and one_run)
      for label, kind, _ in outcomes
    ],
  )
  panel.set_ylim(len(outcomes) - 0.5, -0.5)
  panel.set_xlim(0, 1)
  panel.grid(axis="y", visible=False)
  look.percent(panel.xaxis)
  panel.set_xlabel("of all pairs")
  look.legend(figure, [panel], columns=2)
  return figure


ANALYSIS = Analysis(
  name="verdicts",
  title="What the rewrite changed",
  question="Which wrong drafts did the rewrite make right, and which did it"
  " spoil?",
  paper="Figures 6 and 7 middle and right",
  order=40,
  make=make,
)
