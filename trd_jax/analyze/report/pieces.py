"""Pieces of the report: scripts beside the page, loaded when they are needed.

A page that is opened from the disk may not read other files, but it may run
scripts. So a piece is a script that hands rows to the page's one function for
it:

    trdPiece("3f2a90c1","r0-o-000",[["text",…],…])

The rows of a family (all y_o of a run, say) are numbered through its pieces,
and the index says with which row each piece begins.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trd_jax.analyze.report.escaping import json_text
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files.atomic_files import atomic_file

_SIGNATURE = b"/* trd-jax report */ "
_MOST_BYTES = 900_000


class Family:
  """Writes the rows of one family into pieces.

  Args:
    folder: of the pieces.
    build: what tells this report from an earlier one in the same place.
    name: of the family, letters, digits and dashes.
  """

  def __init__(self, folder: Path, build: str, name: str):
    self._folder, self._build, self.name = folder, build, name
    self._rows: list[str] = []
    self._bytes = 0
    self._number = 0
    self.starts: list[int] = []
    self.files: list[Path] = []

  def add(self, row: Sequence[Any]) -> int:
    """Adds a row; returns its number."""
    made = json_text(row)
    size = len(made.encode())
    if self._rows and self._bytes + size > _MOST_BYTES:
      self.flush()
    self._rows.append(made)
    self._bytes += size
    self._number += 1
    return self._number - 1

  def flush(self) -> None:
    """Writes what has been added since the last piece.

    Raises:
      UserError: the folder can't be written.
    """
    if not self._rows:
      return
    name = f"{self.name}-{len(self.starts):03d}"
    path = self._folder / f"{self._build}-{name}.js"
    self.starts.append(self._number - len(self._rows))
    body = ",\n".join(self._rows)
    call = f'trdPiece("{self._build}","{name}",[{body}]);\n'
    try:
      with atomic_file(path) as file:
        file.write(_SIGNATURE + call.encode())
    except OSError as error:
      raise UserError(
        f"{self._folder} cannot be written ({error.strerror or error}): make"
        " room or correct it, and give the same command again"
      ) from error
    self.files.append(path)
    self._rows, self._bytes = [], 0


def remove_others(folder: Path, kept: Sequence[Path]) -> None:
  """Removes the pieces of earlier reports; what isn't a piece stays."""
  names = {path.name for path in kept}
  for path in folder.glob("*.js"):
    if path.name in names or path.is_symlink() or not path.is_file():
      continue
    with path.open("rb") as file:
      is_ours = file.read(len(_SIGNATURE)) == _SIGNATURE
    if is_ours:
      with contextlib.suppress(FileNotFoundError):
        path.unlink()
