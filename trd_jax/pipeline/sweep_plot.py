"""Shows what a sweep found: a table for the terminal, and a figure.

Both get the rows that `trd_jax.sweep.collect` returns, a row a point and
benchmark.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trd_jax.experiment import tables
from trd_jax.experiment.files.atomic_files import atomic_file
from trd_jax.grading import scores


def _label(row: Mapping[str, Any]) -> str:
  """Returns a row's point, and its round where there were several."""
  if row["rounds"] == 1:
    return row["point"]
  return f"{row['point']} (round {row['round']} of {row['rounds']})"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Writes the rows as a person reads them, the best of a benchmark marked."""
  if not rows:
    return "no point is done yet"
  lines = ["", "percent, 95% intervals over questions; * the highest Avg@K", ""]
  for title, here in _alike(rows):
    best = max(row["trained"]["avg_at_k"] for row in here)
    first = here[0]["base"]
    k = first["k"]
    cells = [(title, f"Avg@{k}", f"Pass@{k}")]
    for row in here:
      mark = "*" if row["trained"]["avg_at_k"] == best else " "
      cells.append((f"{mark} {_label(row)}", *_cells(row["trained"])))
    cells.append(("  (base)", *_cells(first)))
    lines += [tables.columns(cells), ""]
  return "\n".join(lines)


def _alike(
  rows: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
  """Groups rows that may stand side by side: of a benchmark, in one mode."""
  groups: dict[str, list[Mapping[str, Any]]] = {}
  mode = {True: ", thinking on", False: ", thinking off", None: ""}
  for row in rows:
    title = f"{row['benchmark']} (n={row['base']['n']})"
    groups.setdefault(title + mode[row["thinking"]], []).append(row)
  yield from groups.items()


def _cells(figures: Mapping[str, Any]) -> tuple[str, str]:
  return scores.cell(figures, "avg_at_k"), scores.cell(figures, "pass_at_k")


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
  """Plots Avg@K and interval of each point, a panel a benchmark and mode."""
  from matplotlib.figure import Figure

  groups = list(_alike(rows))
  labels = [[_label(row) for row in here] for _, here in groups]
  figure = Figure(figsize=(4 * len(groups), 1.2 + 0.35 * max(map(len, labels))))
  axes = figure.subplots(
    1, len(groups), sharey=labels.count(labels[0]) == len(labels), squeeze=False
  )[0]
  for panel, (title, here) in zip(axes, groups, strict=True):
    here = here[::-1]
    for place, row in enumerate(here):
      low, high = row["trained"]["avg_at_k_interval"]
      panel.plot([100 * low, 100 * high], [place, place], color="tab:blue")
      panel.plot(100 * row["trained"]["avg_at_k"], place, "o", color="tab:blue")
    panel.axvline(100 * here[0]["base"]["avg_at_k"], color="gray", ls=":")
    panel.set_yticks(range(len(here)), [_label(row) for row in here])
    panel.set_title(f"{title}, Avg@{here[0]['base']['k']} (%)", fontsize=9)
  figure.tight_layout()
  # The tasks of an array job end when they like, and each draws all points.
  with atomic_file(path) as file:
    figure.savefig(file, format="svg")
