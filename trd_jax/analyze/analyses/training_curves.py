"""How did training go? Figure 3, and what else an update logs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from trd_jax.analyze import look
from trd_jax.analyze.analysis import (
  Analysis,
  Cell,
  Column,
  Figure,
  Result,
  Table,
)
from trd_jax.analyze.runs import Run

_MOST_POINTS = 400
_OF_SEVERAL = (
  " The divergence is whole where y_o was wrong, dashed where right."
)


class _Metric(NamedTuple):
  """A metric of an update: its name in metrics.jsonl, and a reader's."""

  name: str
  title: str


_OUTCOMES = (
  _Metric("D_incorrect", "y_o wrong"),
  _Metric("D_correct", "y_o right"),
)
_GAP = _Metric("ppl_gap", "perplexity, student minus teacher")
_MASS = _Metric("epistemic_mass_teacher", "teacher's onset-word mass")
_REST = (
  _Metric("loss", "loss"),
  _Metric("grad_norm", "gradient norm"),
  _Metric("response_length", "tokens of a response"),
  _Metric("entropy_student", "student's entropy"),
)
_ALL = (*_REST[:1], *_OUTCOMES, _GAP, _MASS, *_REST[1:])


def make(runs: Sequence[Run]) -> Result | None:
  """Makes Figure 3 of runs' metrics, and small multiples of others."""
  runs = [run for run in runs if run.metrics]
  if not runs:
    return None
  figures = []
  panels = [
    one
    for one in ("D", _GAP.name, _MASS.name)
    if any(_has(run, one) for run in runs)
  ]
  if panels:
    figures.append(
      Figure(
        "training_signal",
        "Mean divergence of a token by the verdict of y_o, perplexity of the"
        " student minus the teacher's, and the teacher's probability of onset"
        " words (Wait, However, …), at each update."
        + _OF_SEVERAL
        * (len(runs) > 1),
        look.drawing(_draw_signal, runs, panels),
        _described(runs, (*_OUTCOMES, _GAP, _MASS)),
      )
    )
  rest = [one for one in _REST if any(_has(run, one.name) for run in runs)]
  if rest:
    figures.append(
      Figure(
        "training_health",
        "Loss, norm of the adapter's gradient before it is clipped, length of"
        " the responses trained on and the student's entropy, at each update.",
        look.drawing(_draw_health, runs, rest),
        _described(runs, rest),
      )
    )
  partial = "; ".join(filter(None, (r.unfinished("train") for r in runs)))
  findings = [sentence for run in runs for sentence in _findings(run, runs)]
  return Result(findings, figures, [_table(runs)], partial or None)


def _has(run: Run, name: str) -> bool:
  return any(row.get(name) is not None for row in run.metrics)


def _values(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the updates that have a metric, counted from 1, and its values."""
  rows = [row for row in run.metrics if row.get(name) is not None]
  return (
    np.array([row["step"] + 1 for row in rows], float),
    np.array([row[name] for row in rows], float),
  )


def _ends(values: np.ndarray) -> tuple[float, float]:
  """Returns the means of the first and of the last tenth, or one update."""
  some = max(len(values) // 10, 1)
  return float(values[:some].mean()), float(values[-some:].mean())


def _table(runs: Sequence[Run]) -> Table:
  rows: list[list[Cell]] = []
  for run in runs:
    for metric in _ALL:
      _, values = _values(run, metric.name)
      if len(values):
        first, last = _ends(values)
        ends = (first, last, float(values.min()), float(values.max()))
        rows.append([run.label, metric.name, len(values), *ends])
  return Table(
    "training_metrics",
    "Metrics of the updates: means over the first and the last tenth of them,"
    " and the lowest and the highest.",
    [
      Column("run"),
      Column("metric"),
      Column("updates", "count"),
      Column("first tenth", "number"),
      Column("last tenth", "number"),
      Column("lowest", "number"),
      Column("highest", "number"),
    ],
    rows,
  )


def _findings(run: Run, runs: Sequence[Run]) -> list[str]:
  whose = f" of {run.label}" if len(runs) > 1 else ""
  said = []
  updates = int(run.metrics[-1]["step"]) + 1
  _, loss = _values(run, "loss")
  if len(loss):
    first, last = _ends(loss)
    moved = "fell" if last < first else "rose"
    said.append(
      f"The loss{whose} {moved} from {first:.3g} to {last:.3g} in {updates:,}"
      " updates (means of the first and last tenth)."
    )
  by_outcome = [_values(run, one.name)[1] for one in _OUTCOMES]
  if all(map(len, by_outcome)):
    (wrong, wrong_last), (right, right_last) = map(_ends, by_outcome)
    said.append(
      f"A token{whose} of a problem whose draft was wrong had a divergence of"
      f" {wrong:.3g} at first and {wrong_last:.3g} at the end; where the draft"
      f" was right it was {right:.3g} and {right_last:.3g}."
    )
  _, mass = _values(run, _MASS.name)
  if len(mass):
    first, last = _ends(mass)
    said.append(
      f"The teacher{whose} put {1000 * first:.2g}‰ of its probability on onset"
      f" words at first and {1000 * last:.2g}‰ at the end."
    )
  return said


def _described(runs: Sequence[Run], metrics: Sequence[_Metric]) -> str:
  parts = []
  for run in runs:
    for metric in metrics:
      _, values = _values(run, metric.name)
      if len(values):
        first, last = _ends(values)
        parts.append(
          f"{run.label}, {metric.title}: {first:.3g} at first, {last:.3g} at"
          " the end"
        )
  return "; ".join(parts)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns means of neighbours, so that a long run is no longer to draw."""
  if len(x) <= _MOST_POINTS:
    return x, y
  groups = np.array_split(np.arange(len(x)), _MOST_POINTS)
  return (
    np.array([x[group].mean() for group in groups]),
    np.array([y[group].mean() for group in groups]),
  )


def _draw_signal(runs: Sequence[Run], panels: Sequence[str]) -> Any:
  figure, axes = look.panels(len(panels))
  for panel, name in zip(axes, panels, strict=True):
    for number, run in enumerate(runs):
      if name != "D":
        x, y = _thinned(*_values(run, name))
        scale = 1000 if name == _MASS.name else 1
        look.line(panel, number, x, scale * y, run.label, solid=True)
        continue
      outcomes = [one for one in _OUTCOMES if _has(run, one.name)]
      for one in outcomes or [_Metric("D", "all")]:
        values = _thinned(*_values(run, one.name))
        # One run's outcomes differ by colour, several runs' by dash.
        if len(runs) == 1:
          look.line(
            panel, outcomes.index(one) if outcomes else 0, *values, one.title
          )
        else:
          is_wrong = one.name != "D_correct"
          label = run.label if is_wrong else None
          look.line(panel, number, *values, label, solid=is_wrong)
    titles = {"D": "divergence (nats)", _GAP.name: _GAP.title}
    look.name_panel(panel, titles.get(name, f"{_MASS.title} (‰)"))
    panel.set_xlabel("update")
    look.whole(panel.xaxis)
    look.from_zero(panel)
  if len(runs) == 1:
    axes[0].legend()
  else:
    look.legend(figure, axes)
  return figure


def _draw_health(runs: Sequence[Run], metrics: Sequence[_Metric]) -> Any:
  figure, axes = look.panels(len(metrics), height=1.7)
  for panel, metric in zip(axes, metrics, strict=True):
    for number, run in enumerate(runs):
      look.line(panel, number, *_thinned(*_values(run, metric.name)), run.label)
    look.name_panel(panel, metric.title)
    panel.set_xlabel("update")
    look.whole(panel.xaxis)
    look.from_zero(panel)
  look.legend(figure, axes)
  return figure


ANALYSIS = Analysis(
  name="training_curves",
  title="How training went",
  question="What did the teacher's signal look like, and did the loss fall?",
  paper="Figure 3",
  order=20,
  make=make,
)
