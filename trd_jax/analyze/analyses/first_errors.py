"""Where do drafts fail first? Known exactly on the laboratory's chains."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from trd_jax.analyze import look, trajectories
from trd_jax.analyze.analysis import (
  Analysis,
  Column,
  Figure,
  Result,
  Table,
)
from trd_jax.analyze.runs import Run
from trd_jax.data.problems import arithmetic_steps
from trd_jax.experiment.records import Problem

_MOST_STEPS = 24
_STAGES = (("rollout", "y_o"), ("refine", "y_r"))


class _Row(NamedTuple):
  """The first errors of one run's trajectories of one kind.

  Attributes:
    run: its label.
    trajectory: y_o or y_r.
    number: how many trajectories there are.
    at_step: [steps] how many go wrong first at each step of the chain.
    reached: [steps] how many come to each step without an error before.
  """

  run: str
  trajectory: str
  number: int
  at_step: np.ndarray
  reached: np.ndarray


def make(runs: Sequence[Run]) -> Result | None:
  """Makes the step at which drafts and rewrites first go wrong."""
  runs, shared = trajectories.distinct(runs)
  rows = [row for run in runs for row in _rows(run)]
  if not rows:
    return None
  figure = Figure(
    "first_errors",
    "Chance that a trajectory that was right so far goes wrong at a step of the"
    " chain and doesn't correct it on the next line.",
    look.drawing(_draw, rows),
    "; ".join(_said(row, len(runs)) for row in rows),
  )
  table = Table(
    "first_errors",
    "First wrong steps that a trajectory doesn't correct, by their number in"
    " the chain; the last one is the answer's box.",
    [
      Column("run"),
      Column("trajectory"),
      Column("step", "count"),
      Column("right so far", "count"),
      Column("first wrong here", "count"),
      Column("share", "share"),
    ],
    [
      [
        row.run,
        row.trajectory,
        step + 1,
        int(reached),
        int(wrong),
        wrong / reached,
      ]
      for row in rows
      for step, (reached, wrong) in enumerate(
        zip(row.reached.tolist(), row.at_step.tolist(), strict=True)
      )
      if reached
    ],
  )
  partial = filter(None, (run.unfinished("rollout", "refine") for run in runs))
  findings = [f"{_said(row, len(runs))}." for row in rows] + shared
  return Result(findings, [figure], [table], "; ".join(partial) or None)


def _rows(run: Run) -> Iterator[_Row]:
  """Yields a run's first errors; none where the problems are no chains."""
  if run.config.domain != "arithmetic" or run.state("problems") == "missing":
    return
  problems: dict[str, tuple[Problem, int]] = {}
  for row in run.rows("problems", [f for f in Problem.__annotations__]):
    problem = Problem(**row)
    chain = arithmetic_steps.parse(problem.text)
    if chain is not None:
      problems[problem.problem_id] = problem, len(chain.steps) + 1
  if not problems:
    return
  for stage, name in _STAGES:
    at_step = np.zeros(_MOST_STEPS, np.int64)
    ended = np.zeros(_MOST_STEPS, np.int64)
    number = 0
    for row in run.rows(stage, ("problem_id", "text")):
      known = problems.get(row["problem_id"])
      if known is None:
        continue
      problem, length = known
      wrong = arithmetic_steps.first_wrong_step(problem, row["text"])
      number += 1
      last = min(length, _MOST_STEPS) - 1
      if wrong is None:
        ended[last] += 1
      else:
        at_step[min(wrong.step, last)] += 1
    if number:
      # Who was right up to a step: all but those that ended or erred before.
      gone = np.cumsum(at_step + ended)
      reached = number - np.concatenate([[0], gone[:-1]])
      yield _Row(run.label, name, number, at_step, reached)


def _said(row: _Row, runs: int) -> str:
  wrong = int(row.at_step.sum())
  share = 100 * wrong / row.number
  whose = f" of {row.run}" if runs > 1 else ""
  text = (
    f"{wrong:,} of {row.number:,} {row.trajectory}{whose} ({share:.1f}%)"
    " hold a wrong step that they don't correct"
  )
  if wrong:
    first = int(np.searchsorted(np.cumsum(row.at_step), (wrong + 1) // 2))
    text += f", first at step {first + 1} (the median)"
  return text


def _draw(rows: Sequence[_Row]) -> Any:
  figure, (panel,) = look.panels(height=2.4)
  several = len({row.run for row in rows}) > 1
  for number, row in enumerate(rows):
    there = row.reached > 0
    steps = np.flatnonzero(there) + 1
    label = f"{row.run}, {row.trajectory}" if several else row.trajectory
    look.line(
      panel, number, steps, row.at_step[there] / row.reached[there], label
    )
  panel.set_xlabel("step of the chain")
  look.whole(panel.xaxis)
  look.from_zero(panel)
  look.percent(panel.yaxis)
  look.legend(figure, [panel])
  return figure


ANALYSIS = Analysis(
  name="first_errors",
  title="Where drafts fail",
  question="At which step does a draft first go wrong?",
  paper="",
  order=30,
  make=make,
)
