"""Did it learn? Avg@K and Pass@K of base and trained on each benchmark."""

from collections.abc import Mapping, Sequence
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
from trd_jax.analyze.comparisons import METRICS, Change, Metric, Model
from trd_jax.analyze.runs import Run


def make(runs: Sequence[Run]) -> Result | None:
  """Makes Tables 1 to 8 of runs' evaluations."""
  found = comparisons.models(runs)
  if not found:
    return None
  names = comparisons.benchmarks(found)
  unlike = {name: comparisons.unlike(found, name) for name in names}
  changes = _changes(found, names)
  tables = [_table(found, names, metric, unlike) for metric in METRICS]
  if changes:
    tables.append(_differences(changes))
  tables += _subsets(found, names)
  figures = []
  if changes:
    figures.append(
      Figure(
        "results_changes",
        "Trained minus base in percentage points, by benchmark, with 95%"
        " intervals over questions.",
        look.drawing(_draw, changes),
        "; ".join(_said(*one) for one in changes),
      )
    )
  findings = [_sentence(*one) for one in changes]
  findings += [
    f"On {name} the models can't be compared with one another: {why}"
    for name, why in unlike.items()
    if why
  ]
  partial = "; ".join(filter(None, map(_partial, runs))) or None
  return Result(findings, figures, tables, partial)


def _partial(run: Run) -> str | None:
  return run.unfinished(comparisons.BASE, comparisons.TRAINED)


_Row = tuple[Model, str, Metric, Change]


def _changes(found: Sequence[Model], names: Sequence[str]) -> list[_Row]:
  """Returns trained against its own base, by benchmark, metric and model."""
  rows = []
  for name in names:
    for metric in METRICS:
      for model in found:
        base = comparisons.base_of(model).get(name)
        mine = model.evaluation.get(name)
        if model.stage == comparisons.BASE or base is None or mine is None:
          continue
        change = comparisons.change(base, mine, metric)
        if change is not None:
          rows.append((model, name, metric, change))
  return rows


def _table(
  found: Sequence[Model],
  names: Sequence[str],
  metric: Metric,
  unlike: Mapping[str, str | None],
) -> Table:
  columns = [Column("model"), Column("method")]
  columns += [
    Column(comparisons.head(found, name, metric), "share") for name in names
  ]
  rows: list[list[Cell]] = [
    [model.label, "" if model.stage == comparisons.BASE else _method(model.run)]
    for model in found
  ]
  for name in names:
    cells = _cells(found, name, metric, rank=unlike[name] is None)
    for row, cell in zip(rows, cells, strict=True):
      row.append(cell)
  sizes = sorted(
    {len(m.evaluation[n].questions) for m in found for n in m.evaluation}
  )
  spread = (
    f"{sizes[0]:,}" if len(sizes) == 1 else (f"{sizes[0]:,} to {sizes[-1]:,}")
  )
  meaning = (
    "mean share of right samples"
    if metric == "avg"
    else "share of questions that one of K samples solves"
  )
  return Table(
    f"results_{metric}",
    f"{METRICS[metric]}, the {meaning}, over {spread} questions a benchmark,"
    " with 95% intervals over questions; changes are against the run's own"
    " base, and the best of a benchmark is marked.",
    columns,
    rows,
  )


def _cells(
  found: Sequence[Model], name: str, metric: Metric, *, rank: bool
) -> list[Number | None]:
  """Returns a benchmark's column, the best marked where it may be ranked."""
  cells: list[Number | None] = []
  for model in found:
    mine = model.evaluation.get(name)
    if mine is None:
      cells.append(None)
      continue
    cell = comparisons.value(mine, metric)
    base = comparisons.base_of(model).get(name)
    if model.stage == comparisons.TRAINED and base is not None:
      change = comparisons.change(base, mine, metric)
      if change is not None:
        cell = cell._replace(change=change.difference.value)
    cells.append(cell)
  there = [cell.value for cell in cells if cell is not None]
  if not rank or len(there) < 2:
    return cells
  return [
    cell and cell._replace(best=cell.value == max(there)) for cell in cells
  ]


def _method(run: Run) -> str:
  config = run.config
  subset = "" if config.train.subset == "all" else f", {config.train.subset}"
  return f"{config.method}, {config.regime}{subset}"


def _differences(changes: Sequence[_Row]) -> Table:
  return Table(
    "results_differences",
    "Trained minus base on the questions that both were asked, with 95%"
    " intervals of the paired difference.",
    [
      Column("benchmark"),
      Column("model"),
      Column("metric"),
      Column("questions", "count"),
      Column("base", "share"),
      Column("trained", "share"),
      Column("difference", "share"),
    ],
    [
      [
        name,
        model.label,
        METRICS[metric].replace("K", str(model.evaluation[name].k)),
        change.questions,
        change.first,
        change.second,
        change.difference,
      ]
      for model, name, metric, change in changes
    ],
  )


def _subsets(found: Sequence[Model], names: Sequence[str]) -> list[Table]:
  """Returns a table a method of its runs on subsets against that on all."""
  trained = [one for one in found if one.stage == comparisons.TRAINED]
  groups: dict[tuple[Any, ...], list[Model]] = {}
  for model in trained:
    config = model.run.config
    key = (config.method, config.regime, config.student.path)
    groups.setdefault(key, []).append(model)
  tables = []
  methods = [key[0] for key in groups]
  for (method, regime, student), group in groups.items():
    whole = [m for m in group if m.run.config.train.subset == "all"]
    if not whole or len(group) == len(whole):
      continue
    name = f"subsets_{method}"
    if methods.count(method) > 1:  # of two students or regimes
      name += f"_{len(tables) + 1}"
    tables.append(
      Table(
        name,
        f"{method} ({regime}, {student}) trained on subsets of the problems;"
        f" changes are against {whole[0].label}, which was trained on all.",
        [
          Column("subset"),
          Column("model"),
          *(
            Column(comparisons.head(group, name, metric), "share")
            for name in names
            for metric in METRICS
          ),
        ],
        _subset_rows(whole[0], group, names),
      )
    )
  return tables


def _subset_rows(
  whole: Model, group: Sequence[Model], names: Sequence[str]
) -> list[list[Cell]]:
  ordered = [whole, *(one for one in group if one is not whole)]
  rows: list[list[Cell]] = [
    [one.run.config.train.subset, one.label] for one in ordered
  ]
  for name in names:
    for metric in METRICS:
      cells: list[Number | None] = []
      for model in ordered:
        mine, all_ = model.evaluation.get(name), whole.evaluation.get(name)
        cell = None if mine is None else comparisons.value(mine, metric)
        if cell and mine and all_ and model is not whole:
          change = comparisons.change(all_, mine, metric)
          if change is not None:
            cell = cell._replace(change=change.difference.value)
        cells.append(cell)
      best = max((c.value for c in cells if c is not None), default=None)
      for row, cell in zip(rows, cells, strict=True):
        row.append(cell and cell._replace(best=cell.value == best))
  return rows


def _said(model: Model, name: str, metric: Metric, change: Change) -> str:
  k = model.evaluation[name].k
  called = METRICS[metric].replace("K", str(k))
  return (
    f"{model.label}, {called} on {name}: {100 * change.first:.1f}% to"
    f" {100 * change.second:.1f}% ({comparisons.points(change.difference)})"
  )


def _sentence(model: Model, name: str, metric: Metric, change: Change) -> str:
  k = model.evaluation[name].k
  called = METRICS[metric].replace("K", str(k))
  whose = "" if model.label == "trained" else f" of {model.label}"
  one = change.difference
  unclear = (one.low or 0.0) <= 0 <= (one.high or 0.0)
  span = f"from {100 * change.first:.1f}% to {100 * change.second:.1f}%"
  if not one.value:
    return f"{called}{whose} on {name} stayed at {100 * change.first:.1f}%."
  elif unclear:
    moved = "went"
  else:
    moved = "rose" if one.value > 0 else "fell"
  doubt = ": no clear change" if unclear else ""
  return (
    f"{called}{whose} on {name} {moved} {span}"
    f" ({comparisons.points(one)}){doubt}."
  )


def _draw(changes: Sequence[_Row]) -> Any:
  """Draws differences with their intervals, a panel a metric."""
  metrics: list[Metric] = list(dict.fromkeys(row[2] for row in changes))
  labels = list(dict.fromkeys(row[1] for row in changes))
  runs = list(dict.fromkeys(row[0].label for row in changes))
  height = 0.9 + 0.26 * len(labels) * max(len(runs), 1)
  figure, axes = look.panels(len(metrics), height=height)
  for panel, metric in zip(axes, metrics, strict=True):
    look.name_panel(panel, METRICS[metric])
    for model, name, kind, change in changes:
      if kind != metric:
        continue
      number = runs.index(model.label)
      style = look.series(number)
      offset = (number - (len(runs) - 1) / 2) * 0.7 / len(runs)
      place = labels.index(name) + offset
      one = change.difference
      panel.plot(
        [100 * (one.low or 0), 100 * (one.high or 0)],
        [place, place],
        color=style.color,
      )
      panel.plot(
        [100 * one.value],
        [place],
        color=style.color,
        marker=style.marker,
        linestyle="none",
        label=model.label,
      )
    panel.axvline(0, color=look.color("ink"), linewidth=0.8)
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.5, -0.5)
    panel.set_xlabel("points against base")
  if len(axes) > 1:
    axes[1].tick_params(labelleft=False)
  look.legend(figure, axes)
  return figure


ANALYSIS = Analysis(
  name="results",
  title="Did it learn?",
  question="How good are base and trained student on each benchmark?",
  paper="Tables 1-8",
  order=10,
  make=make,
)
