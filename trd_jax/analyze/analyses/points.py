"""What do the keys change that runs differ in? Sweeps and compared runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from trd_jax.analyze import comparisons, look
from trd_jax.analyze.analysis import (
  Analysis,
  Cell,
  Column,
  Figure,
  Result,
  Table,
)
from trd_jax.analyze.comparisons import METRICS, Model
from trd_jax.analyze.runs import Run
from trd_jax.experiment import experiment, scopes

_MOST_KEYS = 12


def make(runs: Sequence[Run]) -> Result | None:
  """Makes a row a run, with the keys that runs differ in and their figures."""
  if len(runs) < 2:
    return None
  keys = _keys(runs)
  models = {
    model.run.label: model
    for model in comparisons.models(runs)
    if model.stage == comparisons.TRAINED
  }
  names = comparisons.benchmarks(list(models.values()))
  values = {run.label: experiment.flat(run.config) for run in runs}
  columns = [Column("run"), *(Column(key) for key in keys)]
  columns += [
    Column(comparisons.head(list(models.values()), name, metric), "share")
    for name in names
    for metric in METRICS
  ]
  rows: list[list[Cell]] = []
  for run in runs:
    row: list[Cell] = [run.label]
    row += [_text(values[run.label].get(key)) for key in keys]
    for name in names:
      for metric in METRICS:
        model = models.get(run.label)
        one = model and model.evaluation.get(name)
        row.append(comparisons.value(one, metric) if one else None)
    rows.append(row)
  table = Table(
    "points",
    "The keys that the runs differ in, and what their trained students reach,"
    " with 95% intervals over questions.",
    columns,
    rows,
  )
  figures = []
  axis = _axis(runs, keys, values)
  if models and axis is not None:
    figures.append(
      Figure(
        "points",
        f"Avg@K of the trained students by {axis}, with 95% intervals over"
        " questions; the dotted line is base.",
        look.drawing(_draw, list(models.values()), names, axis, values),
        "; ".join(
          f"{axis} {_text(values[label][axis])}, {name}: {_avg(model, name)}"
          for label, model in models.items()
          for name in names
          if name in model.evaluation
        ),
      )
    )
  return Result(_findings(models, names, keys), figures, [table])


def _keys(runs: Sequence[Run]) -> list[str]:
  """Returns the keys in which runs differ and that decide what they make."""
  flat = [experiment.flat(run.config) for run in runs]
  names = [key for key in flat[0] if not scopes.is_runtime(key)]
  differ = [
    key for key in names if any(one.get(key) != flat[0][key] for one in flat)
  ]
  return differ[:_MOST_KEYS]


def _axis(
  runs: Sequence[Run], keys: Sequence[str], values: Mapping[str, Any]
) -> str | None:
  """Returns the one key that has a number in every run, where only one is."""
  numbers = [
    key
    for key in keys
    if all(
      isinstance(values[run.label].get(key), int | float)
      and not isinstance(values[run.label].get(key), bool)
      for run in runs
    )
  ]
  return numbers[0] if len(keys) == len(numbers) == 1 else None


def _avg(model: Model, name: str) -> str:
  value = comparisons.value(model.evaluation[name], "avg").value
  return f"{100 * value:.1f}%"


def _text(value: Any) -> str:
  if isinstance(value, tuple | list):
    return ",".join(map(str, value))
  return "none" if value is None else str(value)


def _findings(
  models: Mapping[str, Model], names: Sequence[str], keys: Sequence[str]
) -> list[str]:
  said = []
  if keys:
    said.append(f"The runs differ in {', '.join(keys)}.")
  for name in names:
    reached = {
      label: comparisons.value(model.evaluation[name], "avg")
      for label, model in models.items()
      if name in model.evaluation
    }
    if len(reached) < 2:
      continue
    best, second = sorted(reached, key=lambda one: -reached[one].value)[:2]
    change = comparisons.change(
      models[second].evaluation[name], models[best].evaluation[name], "avg"
    )
    lead = f", {comparisons.points(change.difference)}" if change else ""
    said.append(
      f"On {name} the highest Avg@K is that of {best} with"
      f" {100 * reached[best].value:.1f}%, before {second} with"
      f" {100 * reached[second].value:.1f}%{lead}."
    )
  return said


def _draw(
  models: Sequence[Model],
  names: Sequence[str],
  axis: str,
  values: Mapping[str, Any],
) -> Any:
  figure, axes = look.panels(len(names))
  for panel, name in zip(axes, names, strict=True):
    mine = [one for one in models if name in one.evaluation]
    mine.sort(key=lambda one: values[one.run.label][axis])
    x = [values[one.run.label][axis] for one in mine]
    cells = [comparisons.value(one.evaluation[name], "avg") for one in mine]
    look.line(panel, 0, x, [cell.value for cell in cells], "trained")
    ends = [[cell.low for cell in cells], [cell.high for cell in cells]]
    look.band(panel, 0, x, *ends)
    base = comparisons.base_of(mine[0]).get(name) if mine else None
    if base is not None:
      panel.axhline(
        comparisons.value(base, "avg").value,
        color=look.color("quiet"),
        linestyle=":",
        label="base",
      )
    if min(x) > 0 and max(x) / min(x) >= 8:
      panel.set_xscale("log")
      ticks = sorted(set(x))
      ticks = ticks if len(ticks) <= 5 else [ticks[0], ticks[-1]]
      panel.set_xticks(ticks, [f"{one:g}" for one in ticks])
      panel.set_xticks([], minor=True)
    panel.set_xlabel(axis)
    panel.set_ylim(0, 1.02)
    look.percent(panel.yaxis)
    look.name_panel(panel, f"{name}, Avg@K")
  look.legend(figure, axes)
  return figure


ANALYSIS = Analysis(
  name="points",
  title="What the runs differ in",
  question="What did the keys change that the runs differ in?",
  paper="",
  order=80,
  make=make,
)
