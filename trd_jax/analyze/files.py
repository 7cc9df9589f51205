"""Writes figures and tables into `WORKDIR/analyze`, each folder whole."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from trd_jax.analyze import formats, look
from trd_jax.analyze.analysis import Figure, Result, Table
from trd_jax.experiment.errors import UserError
from trd_jax.model.weights.model_folder import atomic_folder, check_replaceable

FORMATS = {"svg": look.svg, "png": look.png}
_TABLES = {"csv": formats.to_csv, "tex": formats.to_latex}
_FOLDERS = ("figures", "tables")


def check(folder: Path) -> None:
  """Checks that the folders of figures and tables can be written.

  Raises:
    UserError: they can't, or hold what is somebody's.
  """
  for name in _FOLDERS:
    check_replaceable(folder / name)


def write(
  folder: Path, results: Mapping[str, Result], kinds: Sequence[str]
) -> tuple[int, int]:
  """Writes all figures and tables, in the place of those of an earlier call.

  Args:
    folder: the workdir's folder `analyze`.
    results: by analysis.
    kinds: of `FORMATS`, those that figures are written in.

  Returns:
    How many figures and how many tables there are.

  Raises:
    UserError: a folder can't be written, or holds what is somebody's.
  """
  figures = [one for result in results.values() for one in result.figures]
  tables = [one for result in results.values() for one in result.tables]
  _check_names("figure", (one.name for one in figures))
  _check_names("table", (one.name for one in tables))
  with atomic_folder(folder / "figures") as new:
    for figure in figures:
      _write_figure(new, figure, kinds)
  with atomic_folder(folder / "tables") as new:
    for table in tables:
      _write_table(new, table)
  return len(figures), len(tables)


def _write_figure(folder: Path, figure: Figure, kinds: Sequence[str]) -> None:
  drawn = figure.draw()
  for kind in kinds:
    (folder / f"{figure.name}.{kind}").write_bytes(FORMATS[kind](drawn))


def _write_table(folder: Path, table: Table) -> None:
  for kind, to_bytes in _TABLES.items():
    (folder / f"{table.name}.{kind}").write_bytes(to_bytes(table))


def _check_names(what: str, names: Iterable[str]) -> None:
  """Raises where two would be one file, or one would be none."""
  seen: set[str] = set()
  for name in names:
    if name in seen or not name.replace("-", "").replace("_", "").isalnum():
      raise UserError(
        f"analyze: two analyses make the {what} {name}, or that is no name of a"
        " file; give one of them another name"
      )
    seen.add(name)
