"""What did it cost? Wall clock by stage: Tables 11 and 12."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from trd_jax.analyze import look
from trd_jax.analyze.analysis import (
  Analysis,
  Column,
  Figure,
  Result,
  Table,
)
from trd_jax.analyze.comparisons import BASE, TRAINED
from trd_jax.analyze.runs import Run
from trd_jax.experiment.metric_log import seconds_by_stage
from trd_jax.experiment.progress import duration

_ORDER = (BASE, "rollout", "refine", "convert", "train", "merge", TRAINED)
_STOPPED = ", stopped"


class _Row(NamedTuple):
  """What a stage of a run took."""

  run: str
  stage: str
  seconds: float
  stopped: float
  tokens: int | None


def make(runs: Sequence[Run]) -> Result | None:
  """Makes the seconds of each stage, and its tokens a second."""
  rows = [row for run in runs for row in _rows(run)]
  if not rows:
    return None
  total = {run.label: 0.0 for run in runs}
  for row in rows:
    total[row.run] += row.seconds + row.stopped
  figure = Figure(
    "wall_clock",
    "Wall clock by stage, of attempts that finished and of those that were"
    " stopped.",
    look.drawing(_draw, rows),
    "; ".join(f"{r.run}, {r.stage}: {duration(r.seconds)}" for r in rows),
  )
  table = Table(
    "wall_clock",
    "Wall clock by stage over all processes that worked on it; tokens are those"
    " sampled, of train those that both sides read.",
    [
      Column("run"),
      Column("stage"),
      Column("time", "seconds"),
      Column("stopped attempts", "seconds"),
      Column("of the run", "share"),
      Column("tokens", "tokens"),
      Column("tokens a second", "count"),
    ],
    [
      [
        row.run,
        row.stage,
        row.seconds,
        row.stopped or None,
        (row.seconds + row.stopped) / total[row.run]
        if total[row.run]
        else None,
        row.tokens,
        row.tokens / row.seconds if row.tokens and row.seconds else None,
      ]
      for row in rows
    ],
  )
  findings = []
  for run in runs:
    mine = [row for row in rows if row.run == run.label]
    if mine:
      whose = f"{run.label} took" if len(runs) > 1 else "The stages took"
      longest = max(mine, key=lambda row: row.seconds)
      share = longest.seconds / total[run.label] if total[run.label] else 0
      findings.append(
        f"{whose} {duration(total[run.label])} in all; the longest was"
        f" {longest.stage} with {duration(longest.seconds)}"
        f" ({100 * share:.0f}%)."
      )
  partial = filter(
    None,
    (
      run.unfinished(BASE, "rollout", "refine", "train", "merge", TRAINED)
      for run in runs
    ),
  )
  return Result(findings, [figure], [table], "; ".join(partial) or None)


def _rows(run: Run) -> Iterator[_Row]:
  seconds = seconds_by_stage(run.run_dir.timings)
  stages = dict.fromkeys(name.removesuffix(_STOPPED) for name in seconds)
  place = {name: number for number, name in enumerate(_ORDER)}
  for name in sorted(stages, key=lambda one: (place.get(one, 99), one)):
    yield _Row(
      run.label,
      name,
      seconds.get(name, 0.0),
      seconds.get(name + _STOPPED, 0.0),
      _tokens(run, name),
    )


def _tokens(run: Run, stage: str) -> int | None:
  """Returns how many tokens a stage sampled or read; None: nobody knows."""
  done = run.done(stage) if stage in _ORDER else None
  if done is None:
    return None
  if stage in ("rollout", "refine"):
    return done.get("tokens")
  if stage in (BASE, TRAINED):
    return int(sum(run.samples(stage)["num_tokens"].to_pylist()))
  if stage == "train" and run.metrics:
    # Where every update has a row, they add up to all that was read.
    names = ("tokens_student", "tokens_teacher")
    rows = run.metrics
    if rows[0]["step"] + len(rows) == rows[-1]["step"] + 1 and all(
      name in row for row in rows for name in names
    ):
      return int(sum(row[name] for row in rows for name in names))
  return None


def _draw(rows: Sequence[_Row]) -> Any:
  runs = list(dict.fromkeys(row.run for row in rows))
  stages = list(dict.fromkeys(row.stage for row in rows))
  stages.sort(key=lambda one: _ORDER.index(one) if one in _ORDER else 99)
  longest = max(row.seconds + row.stopped for row in rows)
  unit, size = next(
    (name, size)
    for name, size in (("hours", 3600), ("minutes", 60), ("seconds", 1))
    if longest >= 2 * size or size == 1
  )
  height = 0.9 + 0.2 * len(stages) * max(len(runs), 1)
  figure, (panel,) = look.panels(height=height)
  for number, run in enumerate(runs):
    style = look.series(number)
    for row in rows:
      if row.run != run:
        continue
      place = stages.index(row.stage) + (
        (number - (len(runs) - 1) / 2) * 0.8 / len(runs)
      )
      panel.barh(
        place,
        row.seconds / size,
        0.7 / len(runs),
        color=style.color,
        edgecolor=look.color("ink"),
        linewidth=0.5,
        label=run,
      )
      if row.stopped:
        panel.barh(
          place,
          row.stopped / size,
          0.7 / len(runs),
          row.seconds / size,
          facecolor=look.color("unjudged"),
          edgecolor=look.color("ink"),
          hatch="////",
          linewidth=0.5,
          label="stopped",
        )
  panel.set_yticks(range(len(stages)), stages)
  panel.set_ylim(len(stages) - 0.4, -0.6)
  panel.grid(axis="y", visible=False)
  panel.set_xlabel(unit)
  look.legend(figure, [panel])
  return figure


ANALYSIS = Analysis(
  name="wall_clock",
  title="What it cost",
  question="How long did each stage take?",
  paper="Tables 11 and 12",
  order=95,
  make=make,
)
