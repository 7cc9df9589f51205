"""How figures look: one palette, readable in grey, in light and in dark.

Figures are drawn without pyplot and without a title (captions say what they
show), from counts and not from points, so that a run of 40,000 problems draws
as quickly as one of forty. An SVG's text stays text, and equal figures have
equal bytes.

Every colour is one of `COLORS`, and each of those stands in an SVG as a hex
that nothing else has: `themed` makes variables of them, with which a page shows
the same figure in light and in dark.
"""

import functools
import io
import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from trd_jax.analyze import spreads

COLORS = {
  # For lines, marks and text.
  "ink": ("#1b1c20", "#eceef2"),
  "quiet": ("#696b75", "#a5a8b3"),
  "grid": ("#dcdde3", "#383a42"),
  "paper": ("#fefefe", "#17181c"),
  # Series, in this order. No two have one lightness, nor look alike to people
  # who don't see red, green or blue.
  "series-1": ("#13258c", "#dde9f6"),
  "series-2": ("#a4581f", "#e8a25b"),
  "series-3": ("#2578f4", "#62a5e9"),
  "series-4": ("#822182", "#e85fa4"),
  "series-5": ("#289e63", "#68e9a9"),
  "series-6": ("#969608", "#cdcd1d"),
  # Areas behind ink: right, wrong, and what has no verdict.
  "right": ("#3d6fb6", "#3f78c9"),
  "wrong": ("#f2b880", "#b8702c"),
  "unjudged": ("#c4c6ce", "#5b5e69"),
}
"""By name each colour's hex, in light and in dark."""

_SERIES = 6
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES: tuple[Any, ...] = (
  "-",
  (0, (5, 2)),
  (0, (1.5, 1.5)),
  (0, (6, 2, 1.5, 2)),
  (0, (3, 1.5, 1.5, 1.5, 1.5, 1.5)),
  (0, (9, 3)),
)
HATCHES = {"right": "", "wrong": "////", "unjudged": "---"}
"""What tells areas apart without colour; dots would make large files."""

PANEL = (3.2, 2.3)
"""Width and height of a panel in inches; two stand side by side."""

_DPI = 72  # of an SVG: its points
_FONT = 9.0
_LEGEND_LINE = 0.17  # inches


def color(name: str) -> str:
  """Returns the hex of a colour, in light."""
  return COLORS[name][0]


_STYLE = {
  "figure.dpi": _DPI,
  "figure.facecolor": color("paper"),
  "axes.facecolor": color("paper"),
  "savefig.facecolor": color("paper"),
  "font.family": ["sans-serif"],
  "font.sans-serif": ["DejaVu Sans"],  # what matplotlib brings
  "font.size": _FONT,
  "axes.titlesize": _FONT,
  "axes.labelsize": _FONT,
  "xtick.labelsize": _FONT - 1,
  "ytick.labelsize": _FONT - 1,
  "legend.fontsize": _FONT - 1,
  "text.color": color("ink"),
  "axes.labelcolor": color("ink"),
  "axes.edgecolor": color("quiet"),
  "xtick.color": color("quiet"),
  "ytick.color": color("quiet"),
  "xtick.labelcolor": color("ink"),
  "ytick.labelcolor": color("ink"),
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": color("grid"),
  "grid.linewidth": 0.6,
  "lines.linewidth": 1.6,
  "lines.markersize": 4.5,
  "hatch.linewidth": 0.7,
  "hatch.color": color("ink"),
  "patch.edgecolor": color("ink"),
  "legend.frameon": False,
  "legend.handlelength": 2.6,
  # Names of runs and problems are text, whatever they hold.
  "text.parse_math": False,
  "axes.unicode_minus": True,
  "svg.fonttype": "none",
  "svg.hashsalt": "trd-jax",
}


class Series(NamedTuple):
  """How a series is drawn: by colour, mark and dash at once.

  Attributes:
    color: its hex.
    marker: its mark.
    dash: its line style.
  """

  color: str
  marker: str
  dash: Any


def series(number: int) -> Series:
  """Returns the look of a series, counted from 0."""
  # Past the sixth the colours come again, with other marks and dashes.
  turn = number // _SERIES
  return Series(
    color(f"series-{number % _SERIES + 1}"),
    _MARKERS[(number + turn) % len(_MARKERS)],
    _DASHES[(number + turn) % len(_DASHES)],
  )


def drawing(draw: Callable[..., Figure], *args: Any) -> Callable[[], Figure]:
  """Returns a function that draws a figure in our look, once.

  Args:
    draw: draws it.
    *args: what it is given.
  """

  # Files and page show one figure: it is drawn for both at once.
  @functools.cache
  def drawn() -> Figure:
    with _styled():
      return draw(*args)

  return drawn


def _styled():
  # Not a user's own matplotlibrc: figures of one run should look alike
  # wherever they are made.
  return matplotlib.style.context(["default", _STYLE])


def panels(
  count: int = 1, *, height: float = PANEL[1], share_x: bool = False
) -> tuple[Figure, list[Axes]]:
  """Makes a figure with panels, two a row.

  Args:
    count: how many panels.
    height: of each, in inches.
    share_x: whether all have one horizontal axis.

  Returns:
    The figure and its panels.
  """
  columns = min(count, 2)
  rows = -(-count // 2)
  figure = Figure(
    figsize=(PANEL[0] * columns if count > 1 else 4.4, height * rows),
    layout="constrained",
  )
  FigureCanvasAgg(figure)
  grid = figure.subplots(rows, columns, squeeze=False, sharex=share_x)
  every = [axes for row in grid for axes in row]
  for axes in every[count:]:
    axes.remove()
  return figure, every[:count]


def name_panel(axes: Axes, text: str) -> None:
  """Names a panel among several."""
  axes.set_title(text, loc="left", color=color("ink"))


def line(
  axes: Axes,
  number: int,
  x: Any,
  y: Any,
  label: str | None = None,
  *,
  solid: bool | None = None,
  bare: bool = False,
) -> None:
  """Draws a series as a line with a mark here and there.

  Args:
    axes: the panel.
    number: of the series, which has its look.
    x: where.
    y: what; NaN leaves a gap.
    label: of the legend.
    solid: True or False for a whole or a dashed line instead of the series'
      own dash.
    bare: leaves the marks out.
  """
  look = series(number)
  dash = look.dash if solid is None else ("-" if solid else _DASHES[1])
  some = max(len(x) // 12, 1)
  axes.plot(
    x,
    y,
    color=look.color,
    linestyle=dash,
    marker=None if bare else look.marker,
    markevery=some,
    label=label,
  )


def band(axes: Axes, number: int, x: Any, low: Any, high: Any) -> None:
  """Draws the interval around a series."""
  axes.fill_between(
    x, low, high, color=series(number).color, alpha=0.18, linewidth=0
  )


def legend(
  figure: Figure, axes: Sequence[Axes], columns: int | None = None
) -> None:
  """Puts one legend of all panels below them, each label once."""
  found: dict[str, Any] = {}
  for one in axes:
    for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
      found.setdefault(label, handle)
  if len(found) > 1:
    longest = max(map(len, found))
    fit = columns or max(1, min(len(found), 90 // (longest + 8)))
    # What a long legend needs is added below, and not taken from the panels.
    more = -(-len(found) // fit) - 1
    figure.set_figheight(figure.get_figheight() + _LEGEND_LINE * more)
    figure.legend(
      found.values(), found.keys(), loc="outside lower left", ncols=fit
    )


def whole(axis: Any) -> None:
  """Marks an axis of counts at whole numbers only."""
  axis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def from_zero(axes: Axes) -> None:
  """Lets the vertical axis begin at zero, with room above what is highest."""
  low, high = axes.get_ylim()
  if high > 0:
    axes.set_ylim(min(low, 0.0) if low < -0.05 * high else 0.0, 1.03 * high)


def percent(axis: Any) -> None:
  """Writes an axis of shares in percent."""
  axis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def thousands(axis: Any) -> None:
  """Writes an axis of counts as 200, 5K or 1M."""
  axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
  axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def short(value: float) -> str:
  """Writes a count as 200, 5K or 1.5M."""
  for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
    if abs(value) >= size:
      return f"{value / size:.3g}{letter}"
  return f"{value:.3g}"


def half_violin(
  axes: Axes,
  place: float,
  edges: np.ndarray,
  counts: np.ndarray,
  side: int,
  kind: str,
  *,
  most: float | None = None,
  width: float = 0.42,
) -> None:
  """Draws one half of a violin from counts by bin.

  Args:
    axes: the panel; its vertical axis is that of the bins.
    place: where the violin stands.
    edges: [bins + 1] ends of the bins.
    counts: [bins] how many are in each.
    side: -1 for its left half, 1 for its right one.
    kind: `right`, `wrong` or `unjudged`.
    most: the count that is as wide as a half may be; default its own highest.
    width: of a half.
  """
  highest = most or counts.max(initial=0)
  if not highest:
    return
  # Each bin with half of its neighbours': lengths are whole numbers, and of
  # small ones not every bin has one.
  smooth = np.convolve(np.pad(counts, 1), (0.25, 0.5, 0.25), "valid")
  there = np.flatnonzero(smooth)
  kept = slice(there[0], there[-1] + 1)
  axes.stairs(
    place + side * width * smooth[kept] / highest,
    edges[there[0] : there[-1] + 2],
    baseline=place,
    orientation="horizontal",
    fill=True,
    facecolor=color(kind),
    edgecolor=color("ink"),
    hatch=HATCHES[kind],
    linewidth=0.5,
  )


def violin_legend(figure: Figure) -> None:
  """Says below a figure which half of a violin is which."""
  handles = [
    Patch(
      facecolor=color(kind),
      edgecolor=color("ink"),
      hatch=HATCHES[kind],
      linewidth=0.5,
      label=kind,
    )
    for kind in ("right", "wrong")
  ]
  figure.legend(handles=handles, loc="outside lower left", ncols=2)


def log_lengths(axes: Axes, shown: Iterable[Any]) -> None:
  """Makes the vertical axis one of lengths, as far as there are some.

  Args:
    axes: the panel.
    shown: the `spreads.Spread`s in it.
  """
  counts = sum(one.counts for one in shown)
  there = np.flatnonzero(counts)
  axes.set_yscale("log")
  if len(there):
    axes.set_ylim(
      float(spreads.EDGES[max(there[0] - 2, 0)]),
      float(spreads.EDGES[min(there[-1] + 3, len(spreads.EDGES) - 1)]),
    )
  low, high = axes.get_ylim()
  if high / low < 12:
    ticks = MaxNLocator(nbins=5, integer=True).tick_values(low, high)
  else:
    steps = (1, 3) if high / low < 3000 else (1,)
    ticks = [step * 10.0**power for power in range(7) for step in steps]
  axes.set_yticks([tick for tick in ticks if low <= tick <= high])
  axes.set_yticks([], minor=True)
  thousands(axes.yaxis)


def interval(axes: Axes, place: float, number: Any, style: Series) -> None:
  """Draws a share and its interval on a line of their own.

  Args:
    axes: the panel, whose horizontal axis is that of the share.
    place: of the line.
    number: an `analysis.Number`.
    style: the look.
  """
  if number.low is not None:
    axes.plot([number.low, number.high], [place, place], color=style.color)
  axes.plot(
    [number.value],
    [place],
    color=style.color,
    marker=style.marker,
    linestyle="none",
  )


def interval_label(axes: Axes, style: Series, label: str) -> None:
  """Puts a look of `interval` into the legend."""
  axes.plot(
    [], [], color=style.color, marker=style.marker, linestyle="-", label=label
  )


# -- bytes -------------------------------------------------------------------


_made: weakref.WeakKeyDictionary[Figure, bytes] = weakref.WeakKeyDictionary()


def svg(figure: Figure) -> bytes:
  """Returns a figure as SVG; equal figures give equal bytes.

  What has been returned once is returned again: a figure isn't changed after.
  """
  if figure not in _made:
    _made[figure] = _svg(figure)
  return _made[figure]


def _svg(figure: Figure) -> bytes:
  file = io.BytesIO()
  with _styled():
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
  return file.getvalue()


def png(figure: Figure) -> bytes:
  """Returns a figure as PNG, two pixels a point."""
  file = io.BytesIO()
  with _styled():
    figure.savefig(
      file, format="png", dpi=2 * _DPI, metadata={"Software": None}
    )
  return file.getvalue()


_ID = re.compile(r'( id="|xlink:href="#|href="#|url\(#)([^")]+)')


def themed(content: bytes, prefix: str) -> str:
  """Returns an SVG to be put into a page, its colours as variables.

  Args:
    content: of `svg`.
    prefix: letters and digits that begin its ids, so that those of two figures
      on a page differ.

  Returns:
    The element `svg`; each colour is `var(--trd-NAME, #hex)`, and `variables`
    has the values.
  """
  text = content.decode()
  text = text[text.index("<svg") :]
  text = _ID.sub(rf"\g<1>{prefix}-\g<2>", text)
  for name, (light, _) in COLORS.items():
    variable = f"var(--trd-{name}, {light})"
    for what in ("fill", "stroke"):
      text = text.replace(f"{what}: {light}", f"{what}: {variable}")
      # The ground of a hatch: an attribute knows no variables.
      text = text.replace(f'{what}="{light}"', f'style="{what}: {variable}"')
  return text


def variables(dark: bool) -> str:
  """Returns the declarations of the colours, as CSS, in light or in dark."""
  return " ".join(
    f"--trd-{name}: {pair[dark]};" for name, pair in COLORS.items()
  )
