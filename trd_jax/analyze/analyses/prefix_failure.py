"""Do failed prefixes spoil the gradient? Section 4 of the paper, measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trd_jax.analyze import look, prefix_result
from trd_jax.analyze.analysis import (
  Analysis,
  Cell,
  Column,
  Figure,
  Number,
  Result,
  Table,
)
from trd_jax.analyze.prefix_result import GRADIENTS, REFERENCES
from trd_jax.analyze.runs import Run

_GROUPS = {"failed": "failed prefix", "right": "right prefix"}
_TITLES = {
  "ideal": "g_ideal",
  "ideal_certain": "g_ideal, certain teacher",
  "avoid": "the error avoided",
}
_SHOWN = {
  "forward": "dense KL, all of y_o",
  "forward_at": "dense KL, failed line",
  "forward_after": "dense KL, behind it",
  "frag": "g_frag",
  "frag_certain": "g_frag, certain teacher",
  "trd": "TRD, all of y_r",
}
"""The gradients that figures show, by name; tables have them all."""
_MOST_LINES = 4  # behind the failed one that figures show


class _Found(NamedTuple):
  """A run and what was measured on it."""

  run: Run
  result: Mapping[str, Any]

  def rows(self, table: str, **wanted: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a table that have some values."""
    for row in self.result[table]:
      if all(row[name] == value for name, value in wanted.items()):
        yield row

  def row(self, table: str, **wanted: Any) -> Mapping[str, Any] | None:
    """Returns the first of `rows`, None where there is none."""
    return next(self.rows(table, **wanted), None)


def make(runs: Sequence[Run]) -> Result | None:
  """Shows what `prefix_failure.measure` has left in workdirs."""
  every, partial = [], []
  for run in runs:
    result = prefix_result.load(run.run_dir)
    if result is None:
      continue
    try:
      every.append(_made(_Found(run, result), several=len(runs) > 1))
      if _stale(run, result):
        partial.append(
          f"{run.label} has other drafts now than those that were measured"
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
      raise prefix_result.damaged(run.run_dir) from e
  if not every:
    return None
  return Result(
    [sentence for one in every for sentence in one.findings],
    [figure for one in every for figure in one.figures],
    _joined([one.tables for one in every]),
    "; ".join(partial) or None,
  )


def _stale(run: Run, result: Mapping[str, Any]) -> bool:
  digest = result["made_of"]["rollouts"]
  if not run.run_dir.finished("rollout"):
    return False
  return digest != run.run_dir.rows_left("rollout").get("digest")


def _made(found: _Found, several: bool) -> Result:
  """Makes one run's part; each number is looked up here and not when drawn."""
  mark = f"-{found.run.label}" if several else ""
  suffix = "".join(c if c.isalnum() or c in "-_" else "-" for c in mark)
  of = f" of {found.run.label}" if several else ""
  gradients = _gradient_figure(found)
  modes = _mode_figure(found)
  return Result(
    list(_findings(found, of)),
    [
      Figure(
        f"prefix_failure_gradients{suffix}",
        f"How gradients{of} lie to the correction's: means of cosines over"
        " drafts with 95% intervals.",
        look.drawing(_draw_gradients, gradients),
        _told_gradients(gradients),
      ),
      Figure(
        f"prefix_failure_modes{suffix}",
        f"What the teacher{of} holds likely along drafts that have failed, and"
        " where the divergence lies; bands and bars are 95% intervals.",
        look.drawing(_draw_modes, modes),
        _told_modes(modes),
      ),
    ],
    [
      _gradient_table(found),
      _part_table(found),
      _mode_table(found),
      _path_table(found),
      _region_table(found),
    ],
  )


def _joined(every: Sequence[Sequence[Table]]) -> list[Table]:
  """Puts the same tables of several runs into one each."""
  return [
    Table(
      same[0].name,
      same[0].caption,
      same[0].columns,
      [row for table in same for row in table.rows],
    )
    for same in zip(*every, strict=True)
  ]


# -- sentences ---------------------------------------------------------------


def _findings(found: _Found, of: str) -> Iterator[str]:
  counts = found.result["counts"]
  yield (
    f"{counts['failed_prefixes']:,} of {counts['wrong_drafts']:,} wrong drafts"
    f"{of} have a failed prefix; {counts['failed']:,} of them were measured,"
    f" and {counts.get('right', 0):,} right drafts beside them."
  )
  certain = _cosine(found, "frag_certain", "ideal_certain")
  control = _cosine(found, "forward_after", "ideal", "right")
  if certain and control:
    yield (
      "With a teacher that is certain of the correction, g_frag and g_ideal"
      f" have a cosine of {_text(certain)}; behind a right prefix dense KL and"
      f" g_ideal have one of {_text(control)}."
    )
  turned = _cosine(found, "ideal", "ideal_certain")
  first = found.row("paths", group="failed", piece="first token")
  if turned and first:
    student, teacher = first["student"]["mean"], first["teacher"]["mean"]
    how = "less" if teacher < student else "more"
    yield (
      f"The teacher gives the onset word behind an error {100 * teacher:.1f}%,"
      f" {how} than the student ({100 * student:.1f}%): g_ideal of the teacher"
      f" as it is has a cosine of {_text(turned)} with that of a certain one."
    )
  onset = [
    found.row(
      "modes", group=group, side="teacher", place="token", distance=[0, 0]
    )
    for group in _GROUPS
  ]
  if all(onset):
    failed, right = (_number(row["onset"]) for row in onset if row)
    if failed and right:
      yield (
        f"Right behind a failed line the teacher's mass on onset words is"
        f" {_text(failed, 100, '%')}, and behind a right one"
        f" {_text(right, 100, '%')}."
      )
  for reference, what in (
    ("ideal_certain", "g_ideal of a certain teacher"),
    ("avoid", "the gradient that avoids the error"),
  ):
    pair = [_cosine(found, name, reference) for name in ("forward", "trd")]
    dense, trd = pair
    if dense and trd:
      yield (
        f"Against {what}, dense KL along y_o has a cosine of {_text(dense)} and"
        f" TRD along y_r one of {_text(trd)}."
      )


def _text(number: Number, scale: float = 1, unit: str = "") -> str:
  values = [number.value, number.low, number.high]
  value, low, high = (
    f"{scale * x:.{1 if unit else 2}f}".replace("-", "−")
    for x in values
    if x is not None
  )
  return f"{value}{unit} [{low}, {high}]"


def _number(of: Mapping[str, Any] | None) -> Number | None:
  if of is None or of["mean"] is None:
    return None
  return Number(float(of["mean"]), float(of["low"]), float(of["high"]))


def _cosine(
  found: _Found,
  gradient: str,
  reference: str,
  group: str = "failed",
  part: str = "all",
) -> Number | None:
  row = found.row(
    "cosines", group=group, gradient=gradient, reference=reference, part=part
  )
  return _number(row["cosine"]) if row else None


# -- tables ------------------------------------------------------------------


def _gradient_table(found: _Found) -> Table:
  rows: list[list[Cell]] = []
  for group, label in _GROUPS.items():
    for name in GRADIENTS:
      cosines = [_cosine(found, name, r, group) for r in REFERENCES]
      if not any(cosines):
        continue
      means = [
        found.row("means", group=group, gradient=name, reference=r, part="all")
        for r in REFERENCES
      ]
      ratio = found.row(
        "cosines", group=group, gradient=name, reference="ideal", part="all"
      )
      rows.append(
        [
          found.run.label,
          label,
          name,
          *cosines,
          *(row["cosine"] if row else None for row in means),
          _number(ratio["norm_ratio"]) if ratio else None,
        ]
      )
  return Table(
    "prefix_failure_gradients",
    "Cosines of gradients with respect to the adapted layers' kernels: means"
    " over drafts, and of the mean gradients of all drafts; and the norm over"
    " g_ideal's (geometric mean).",
    [
      Column("run"),
      Column("prefix"),
      Column("gradient"),
      *(Column(f"with {r}", "number") for r in REFERENCES),
      *(Column(f"means, with {r}", "number") for r in REFERENCES),
      Column("norm over g_ideal", "number"),
    ],
    rows,
  )


def _part_table(found: _Found) -> Table:
  parts = list(
    dict.fromkeys(row["part"] for row in found.rows("cosines", group="failed"))
  )
  pairs = (
    ("frag_certain", "ideal_certain"),
    ("forward", "ideal"),
    ("forward", "avoid"),
    ("trd", "ideal"),
    ("trd", "avoid"),
  )
  rows: list[list[Cell]] = []
  for part in parts:
    cells = [_cosine(found, one, two, part=part) for one, two in pairs]
    rows.append([found.run.label, part, *cells])
  return Table(
    "prefix_failure_layers",
    "Cosines of failed prefixes by layer, by kind of layer, and with respect to"
    " the adapter's B at its beginning: means over drafts.",
    [
      Column("run"),
      Column("weights"),
      *(Column(f"{one}, {two}", "number") for one, two in pairs),
    ],
    rows,
  )


_MASSES = ("continue", "onset", "right", "consistent")


def _mode_table(found: _Found) -> Table:
  rows: list[list[Cell]] = []
  for row in found.rows("modes"):
    low, high = row["distance"]
    rows.append(
      [
        found.run.label,
        _GROUPS[row["group"]],
        row["side"],
        row["place"],
        f"{low}" if low == high else f"{low}–{high}",
        row["continue"]["n"],
        *(_number(row.get(name)) for name in _MASSES),
        _number(row["entropy"]),
      ]
    )
  return Table(
    "prefix_failure_modes",
    "Masses behind the failed line by distance, in tokens or in lines: on what"
    " the draft has there, on onset words, on the first token of what the"
    " reference has, and on that of what follows from the draft's own line.",
    [
      Column("run"),
      Column("prefix"),
      Column("model"),
      Column("place"),
      Column("distance"),
      Column("drafts", "count"),
      *(Column(name, "share") for name in _MASSES),
      Column("entropy", "number"),
    ],
    rows,
  )


def _path_table(found: _Found) -> Table:
  return Table(
    "prefix_failure_paths",
    "The right path from the cut, piece by piece: mean probability of a token,"
    " and the piece's share of Σ |δ| in g_ideal.",
    [
      Column("run"),
      Column("prefix"),
      Column("piece"),
      Column("student", "share"),
      Column("teacher", "share"),
      Column("weight", "share"),
      Column("tokens", "number"),
    ],
    [
      [
        found.run.label,
        _GROUPS[row["group"]],
        row["piece"],
        *(
          _number(row[name])
          for name in ("student", "teacher", "weight", "tokens")
        ),
      ]
      for row in found.rows("paths")
    ],
  )


def _region_table(found: _Found) -> Table:
  return Table(
    "prefix_failure_divergence",
    "Where along the draft the divergence lies: nats of a token before the"
    " failed line, along it and behind it, and the share of the draft's sum.",
    [
      Column("run"),
      Column("prefix"),
      Column("divergence"),
      Column("region"),
      Column("nats", "number"),
      Column("share", "share"),
    ],
    [
      [
        found.run.label,
        _GROUPS[row["group"]],
        row["divergence"],
        row["region"],
        _number(row["nats"]),
        _number(row["share"]),
      ]
      for row in found.rows("divergence")
    ],
  )


# -- figures -----------------------------------------------------------------

_Series = Sequence[tuple[str, Sequence[float], Sequence[Number]]]
"""Label, places and numbers of each series of a panel."""


class _Panel(NamedTuple):
  """A panel's content.

  Attributes:
    title: what it shows.
    series: see `_Series`.
    ticks: labels of the places 0, 1, …; none for numbers.
    axis: of the places.
    share: whether the numbers are shares.
  """

  title: str
  series: _Series
  ticks: Sequence[str] = ()
  axis: str = ""
  share: bool = False


def _points(
  label: str, numbers: Sequence[Number | None], places: Sequence[float] = ()
) -> tuple[str, list[float], list[Number]]:
  places = places or list(range(len(numbers)))
  there = [
    (place, number)
    for place, number in zip(places, numbers, strict=True)
    if number is not None
  ]
  return label, [place for place, _ in there], [number for _, number in there]


def _gradient_figure(found: _Found) -> list[_Panel]:
  names = [name for name in _SHOWN if _cosine(found, name, "ideal") is not None]
  panels = [
    _Panel(
      f"cosine with {_TITLES[reference]}",
      [
        _points(
          label,
          [
            # Behind a right prefix there is no onset word to be stuck at.
            None
            if group == "right" and name.startswith("frag")
            else _cosine(found, name, reference, group)
            for name in names
          ],
        )
        for group, label in _GROUPS.items()
      ],
      [_SHOWN[name] for name in names],
    )
    for reference in REFERENCES
  ]
  layers = [
    row["part"]
    for row in found.rows(
      "cosines", group="failed", gradient=names[0], reference="ideal"
    )
    if row["part"].startswith("layer ")
  ]
  panels.append(
    _Panel(
      "by layer, failed prefixes",
      [
        _points(
          f"{_SHOWN[name]}; {_TITLES[reference]}",
          [_cosine(found, name, reference, part=part) for part in layers],
        )
        for name, reference in (
          ("frag_certain", "ideal_certain"),
          ("forward", "avoid"),
          ("trd", "avoid"),
        )
        if name in names
      ],
      axis="layer",
    )
  )
  return panels


def _draw_gradients(panels: Sequence[_Panel]) -> Any:
  figure, axes = look.panels(len(panels))
  for number, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
    look.name_panel(axis, panel.title)
    if panel.ticks:
      _draw_dots(axis, panel, names=number % 2 == 0)
    else:
      _draw_lines(axis, panel, first=2)
      look.whole(axis.xaxis)
      axis.set_xlabel(panel.axis)
  look.legend(figure, axes, columns=2)
  return figure


def _draw_dots(axis: Any, panel: _Panel, names: bool) -> None:
  """Draws means with intervals, a line for each tick, from the top down."""
  axis.axvline(0, color=look.color("quiet"), linewidth=0.8)
  count = len(panel.series)
  for number, (label, places, numbers) in enumerate(panel.series):
    series = look.series(number)
    for place, one in zip(places, numbers, strict=True):
      height = -place + 0.3 * ((count - 1) / 2 - number)
      axis.plot([one.low, one.high], [height] * 2, color=series.color)
      axis.plot(
        one.value, height, series.marker, color=series.color, label=label
      )
  axis.set_yticks(
    [-place for place in range(len(panel.ticks))],
    panel.ticks if names else [],
  )
  axis.set_xlim(-1.05, 1.05)


def _draw_lines(axis: Any, panel: _Panel, first: int = 0) -> None:
  for number, (label, places, numbers) in enumerate(panel.series, first):
    look.line(axis, number, places, [x.value for x in numbers], label)
    look.band(
      axis, number, places, [x.low for x in numbers], [x.high for x in numbers]
    )


def _mode_figure(found: _Found) -> list[_Panel]:
  def by_line(side: str, place: str, name: str) -> tuple[list, list]:
    rows = [
      row
      for row in found.rows("modes", group="failed", side=side, place=place)
      if row["distance"][0] <= _MOST_LINES
    ]
    return (
      [_number(row.get(name)) for row in rows],
      [row["distance"][0] for row in rows],
    )

  def series(place: str, names: Mapping[str, str]) -> _Series:
    return [
      _points(label, *by_line("teacher", place, name))
      for name, label in names.items()
    ]

  onset = [
    _points(
      side,
      [
        _number((row or {}).get("onset"))
        for row in (
          found.row(
            "modes", group=group, side=side, place="token", distance=[0, 0]
          )
          for group in _GROUPS
        )
      ],
    )
    for side in ("teacher", "student")
  ]
  nats = [
    _points(
      label,
      [
        _number((row or {}).get("nats"))
        for row in (
          found.row(
            "divergence",
            group=group,
            divergence="forward_kl",
            region=region,
          )
          for region in ("before", "at", "after")
        )
      ],
    )
    for group, label in _GROUPS.items()
  ]
  return [
    _Panel(
      "teacher where a line begins",
      series(
        "line",
        {
          "continue": "goes on as the draft",
          "onset": "onset word",
          "right": "reference",
        },
      ),
      axis="lines behind the failed one",
      share=True,
    ),
    _Panel(
      "teacher where a value stands",
      series(
        "value",
        {
          "continue": "goes on as the draft",
          "right": "reference",
          "consistent": "follows from the draft",
        },
      ),
      axis="lines behind the failed one",
      share=True,
    ),
    _Panel(
      "onset words right behind the line",
      onset,
      ["failed line", "right line"],
      share=True,
    ),
    _Panel(
      "forward KL of a token (nats)",
      nats,
      ["before", "the line", "behind"],
    ),
  ]


def _draw_modes(panels: Sequence[_Panel]) -> Any:
  figure, axes = look.panels(len(panels))
  looks = {
    "goes on as the draft": 0,
    "onset word": 1,
    "reference": 2,
    "follows from the draft": 3,
  }
  for axis, panel in zip(axes, panels, strict=True):
    look.name_panel(axis, panel.title)
    for place, (label, places, numbers) in enumerate(panel.series):
      number = looks.get(label, place + 4 if panel.share else place)
      values = [x.value for x in numbers]
      if panel.ticks:
        _draw_columns(axis, number, place, label, places, numbers)
      else:
        look.line(axis, number, places, values, label)
        look.band(
          axis,
          number,
          places,
          [x.low for x in numbers],
          [x.high for x in numbers],
        )
    if panel.ticks:
      axis.set_xticks(range(len(panel.ticks)), panel.ticks)
      axis.set_xlim(-0.5, len(panel.ticks) - 0.5)
      axis.legend()
    else:
      look.whole(axis.xaxis)
      axis.set_xlabel(panel.axis)
    if panel.share:
      look.percent(axis.yaxis)
    look.from_zero(axis)
  look.legend(figure, axes[:2], columns=2)
  return figure


def _draw_columns(
  axis: Any,
  number: int,
  place: int,
  label: str,
  places: Sequence[float],
  numbers: Sequence[Number],
) -> None:
  """Draws means with intervals above their ticks, two series side by side."""
  series = look.series(number)
  for at, one in zip(places, numbers, strict=True):
    x = at + 0.2 * (place - 0.5)
    axis.plot([x, x], [one.low, one.high], color=series.color)
    mine = label if at == places[0] else None
    axis.plot(x, one.value, series.marker, color=series.color, label=mine)


def _told_gradients(panels: Sequence[_Panel]) -> str:
  return _told(panels, lambda number: _text(number))


def _told_modes(panels: Sequence[_Panel]) -> str:
  return _told(panels, lambda number: f"{number.value:.3g}")


def _told(panels: Sequence[_Panel], shown: Callable[[Number], str]) -> str:
  """Returns what panels show, in words."""
  parts = []
  for panel in panels:
    for label, places, numbers in panel.series:
      values = [
        f"{panel.ticks[int(place)] if panel.ticks else place} {shown(number)}"
        for place, number in zip(places, numbers, strict=True)
      ]
      if values:
        parts.append(f"{panel.title}, {label}: {', '.join(values)}")
  return "; ".join(parts)


ANALYSIS = Analysis(
  name="prefix_failure",
  title="Where prefixes fail",
  question="What do gradients and the teacher say behind a first error?",
  paper="Section 4, Figure 2",
  order=25,
  make=make,
)
