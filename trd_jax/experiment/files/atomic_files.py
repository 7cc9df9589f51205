"""Writes files and folders that appear whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from trd_jax.experiment.files import paths
from trd_jax.experiment.files.disk_faults import naming

_UNFINISHED = ".tmp"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
  """Yields a binary file that becomes `path` at the end of the block.

  Readers see what was there before or the whole new file. Where the block
  raises, nothing changes. A link to a file stays one, and the file that it
  leads to is replaced.

  Raises:
    OSError: the disk refuses it; the error names the file.
    UserError: `path` is a link that leads nowhere.
  """
  path = paths.behind_links(path)
  # Not the process's id: processes of two machines, or containers, share those.
  token = uuid.uuid4().hex
  # In the same folder: a rename is atomic within one file system only.
  unfinished = path.with_name(f"{path.name}.{token}{_UNFINISHED}")
  with naming(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      with unfinished.open("wb") as file:
        yield file
        # Before the rename: after a power cut the name could otherwise be on
        # the disk, and the bytes not.
        file.flush()
        os.fsync(file.fileno())
      unfinished.replace(path)
    except BaseException:
      # A disk that is gone refuses this, too; the first error says why.
      with contextlib.suppress(OSError):
        unfinished.unlink(missing_ok=True)
      raise
  # The new name must survive a power cut as the bytes do.
  folder = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(folder)
  finally:
    os.close(folder)


def copy_folder(source: Path, target: Path) -> None:
  """Copies a finished folder whole or not at all, by hard links if it can.

  Args:
    source: the folder; no file in it may change afterwards.
    target: need not be there; if it is, it has to be empty.
  """
  unfinished = target.with_name(
    f"{target.name}.{uuid.uuid4().hex}{_UNFINISHED}"
  )
  target.parent.mkdir(parents=True, exist_ok=True)
  try:
    shutil.copytree(source, unfinished, copy_function=_link_or_copy)
    unfinished.rename(target)
  except BaseException:
    shutil.rmtree(unfinished, ignore_errors=True)
    raise


def _link_or_copy(source: str, target: str) -> None:
  try:
    os.link(source, target)
  except OSError:  # another file system, or one without links
    shutil.copy2(source, target)
