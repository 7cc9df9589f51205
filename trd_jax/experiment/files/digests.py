"""Digests of a folder's files, so that a changed byte is found and named.

The list lies in the folder itself, and goes where the folder goes.
"""

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from trd_jax.experiment.files import json_files

LIST = "digests.json"
"""The file that lists them."""

_OF_LIST = "sha256"  # of the list's own lines, in it


def write(folder: Path, without: Collection[str] = ()) -> None:
  """Lists each file of a folder with its size and SHA-256, atomically.

  Args:
    folder: the folder.
    without: paths in it that are left out, as of files that still change.
  """
  files = {
    name: [size, digest]
    for name in _files(folder)
    if name not in without
    for size, digest in [_digest(folder / name)]
  }
  json_files.write_json(
    folder / LIST, {"files": files, _OF_LIST: _of_list(files)}
  )


def exists(folder: Path) -> bool:
  """Returns whether a folder has such a list."""
  return (folder / LIST).exists()


def difference(folder: Path) -> str | None:
  """Names the first file that isn't as it was listed; None: all are.

  Reads every byte. Files that have come since are none of the list's.

  Returns:
    A clause such as "arrays/d/0f is missing"; of a damaged list one about it.
  """
  try:
    about = json_files.loads((folder / LIST).read_bytes())
    files = about["files"]
    whole = about[_OF_LIST] == _of_list(files)
  # Whatever a flipped bit makes of JSON: no UTF-8, no object, no such key.
  except (ValueError, KeyError, TypeError):
    whole = False
  if not whole:
    return f"{LIST} is damaged"
  for name, (size, digest) in files.items():
    path = folder / name
    if not path.is_file():
      return f"{name} is missing"
    # The cheap look first.
    if (has := path.stat().st_size) != size:
      return f"{name} has {has:,} bytes of {size:,}"
    if _digest(path)[1] != digest:
      return f"{name} is damaged"
  return None


def _files(folder: Path) -> list[str]:
  names = (
    os.path.relpath(os.path.join(top, name), folder)
    for top, _, files in os.walk(folder)
    for name in files
  )
  return sorted(name for name in names if name != LIST)


def _digest(path: Path) -> tuple[int, str]:
  with path.open("rb") as file:
    # SHA-256: the fastest of hashlib's where the processor computes it, which
    # all of the last years do (benchmarks/checksums.py).
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return os.fstat(file.fileno()).st_size, digest


def _of_list(files: Any) -> str:
  text = json.dumps(files, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
