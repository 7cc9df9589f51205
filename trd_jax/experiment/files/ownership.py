"""Tells whose a file is: what is not ours is neither removed nor replaced.

A folder that is written whole, a model or an adapter, carries `MARKER`: a JSON
file that lists what was written there. Whatever else lies in the folder, and
whatever has been changed since, belongs to somebody. The folders of a run's
stages carry no such list. There the mark is the run directory's `config.json`:
it is written first, and only where nothing foreign lies under our names
(`foreign`).
"""

import contextlib
import fnmatch
import hashlib
import itertools
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Set
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import file_locks, json_files

MARKER = ".trd-jax.json"
"""Lists, in a folder that was written whole, what was written."""

_MADE_BY = "trd-jax"
_HASHED_BYTES = 1 << 20
_EMPTY = "empty folder"
_UNFINISHED = re.compile(r".+\.[0-9a-f]{32}\.tmp")


# -- folders that are written whole ------------------------------------------


def begin(marker: IO[bytes]) -> None:
  """Marks a folder, by its open `MARKER`, as one that is being written."""
  _write(marker, None)


def finish(marker: IO[bytes], folder: Path) -> None:
  """Lists in a folder's open `MARKER` what lies in it now."""
  _write(marker, {name: _content(folder / name) for name in _leaves(folder)})


def _write(marker: IO[bytes], files: Mapping[str, str] | None) -> None:
  """Writes a marker through its open file, and waits until it is on the disk.

  Not by a rename: a new file would not have the lock of the old one.
  """
  marker.truncate(0)
  about = {"made_by": _MADE_BY, "files": files}
  marker.write((json.dumps(about, indent=1) + "\n").encode())
  marker.flush()
  os.fsync(marker.fileno())


def listed(marker: bytes) -> dict[str, str] | None:
  """Returns what a `MARKER` lists; None where it is none of ours."""
  # A process may be killed between making the file and writing into it.
  if not marker:
    return {}
  try:
    fields = json_files.loads(marker)
  except ValueError:
    return None
  if not isinstance(fields, dict) or fields.get("made_by") != _MADE_BY:
    return None
  files = fields.get("files") or {}
  return files if isinstance(files, dict) else None


def ours_in(
  folder: Path,
  new: Path | None = None,
  *,
  compared_later: Collection[str] = (),
  called: str | None = None,
) -> set[str]:
  """Lists everything in a folder, and checks that it is ours.

  Another process may be removing the folder meanwhile: what is gone when its
  turn comes can't be lost, and passes.

  Args:
    folder: a folder that is to be replaced.
    new: the folder that will take its place; a file that is the same in both
      would not be lost, and passes.
    compared_later: names that pass, since what takes their place isn't there
      yet to be compared with.
    called: the folder's name in an error.

  Returns:
    The files, links and empty folders in it, by their paths from there.

  Raises:
    UserError: something there was not written by this program, or has been
      changed since.
  """
  marker = folder / MARKER
  # A link could name another folder's list as this one's.
  files = None
  if marker.is_file() and not marker.is_symlink():
    with contextlib.suppress(FileNotFoundError):
      files = listed(marker.read_bytes())
  ours = set(_leaves(folder))
  if files is None:
    files, why = {}, f"no {MARKER} there says that trd-jax wrote it"
    if os.path.lexists(marker):
      ours.add(MARKER)
  else:
    why = "trd-jax did not write it, or not as it is now"
  for name in sorted(ours - set(compared_later)):
    content = _content(folder / name)
    # A folder whose files somebody has taken out is still ours.
    emptied = content == _EMPTY and any(f.startswith(f"{name}/") for f in files)
    # Somebody may have copied a file into it that will be there afterwards,
    # too.
    same = new is not None and _same_bytes(folder / name, new / name)
    if files.get(name) != content and not emptied and not same:
      if not os.path.lexists(folder / name):
        continue
      raise UserError(
        f"{called or folder} holds {name}, which would be lost ({why}); name"
        " another folder, or move it away"
      )
  return ours


def remove(folder: Path, names: Set[str]) -> None:
  """Removes what `ours_in` has listed, and the folders that this empties.

  Never removes a tree: a file that came after the list was made makes `rmdir`
  fail, and stays. Two processes may remove one folder at once.
  """
  for name in names:
    path = folder / name
    if path.is_dir() and not path.is_symlink():
      _remove_empty(path)
    else:
      path.unlink(missing_ok=True)
  # In reverse order, as a folder's path sorts before those of what is in it.
  above = {p for name in names for p in (folder / name).parents}
  for path in sorted(p for p in above if folder in p.parents)[::-1]:
    _remove_empty(path)
  # The mark goes last: what is left of a removal that was killed is still ours.
  (folder / MARKER).unlink(missing_ok=True)
  _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
  """Removes an empty folder, if another process has not done so."""
  with contextlib.suppress(FileNotFoundError):
    folder.rmdir()


def _leaves(folder: Path) -> Iterator[str]:
  """Yields the paths of files, links and empty folders below a folder."""
  for top, folders, files in os.walk(folder):
    # `os.walk` lists a link to a folder among the folders and doesn't enter it.
    links = [
      name for name in folders if os.path.islink(os.path.join(top, name))
    ]
    here = sorted([*files, *links])
    if not here and not folders:
      here = [""]
    for name in here:
      path = os.path.relpath(os.path.join(top, name), folder)
      if path not in (MARKER, "."):
        yield path


def _content(path: Path) -> str:
  """Returns a short name for what a path holds.

  Of a file it covers the size and the first MiB: weights are too large to be
  hashed at every look, and a changed file of the same size is rare.
  """
  try:
    if path.is_symlink():
      return f"link to {os.readlink(path)}"
    if path.is_dir():
      return _EMPTY
    if not path.is_file():
      return "no file"
    with path.open("rb") as file:
      digest = hashlib.sha256(file.read(_HASHED_BYTES)).hexdigest()[:32]
      return f"{os.fstat(file.fileno()).st_size}-{digest}"
  except FileNotFoundError:  # another process has removed it between two lines
    return "no file"


def _same_bytes(one: Path, other: Path) -> bool:
  """Returns whether two files hold the same, to the last byte."""
  if not all(p.is_file() and not p.is_symlink() for p in (one, other)):
    return False
  with one.open("rb") as first, other.open("rb") as second:
    while block := first.read(_HASHED_BYTES):
      if block != second.read(_HASHED_BYTES):
        return False
    return not second.read(1)


# -- run directories ---------------------------------------------------------

STAGES = (
  *("problems", "rollout", "refine", "train", "merge", "convert"),
  *("evaluate/base", "evaluate/trained", "analyze/scores"),
)
# Folders whose rows are a report, which is made anew: no result of a run.
_REPORTS = ("problems", "analyze/scores")
_SHARDS = "shard-*.parquet"
# What lies in a stage's folder beside its shards.
_OF_A_STAGE = (
  *("done.json", "preflight.json", "summary.json", "comparison.json"),
  *("metrics.jsonl", "rejected.parquet"),
  *(
    "checkpoints",
    "tensorboard",
    "wandb",
    "trackio",
    "mlflow",
    "adapter",
    "model",
  ),
)

_OF_PROBLEMS = {"problems", "rejected", "files", "made_by", "left", "digest"}
# What a run has made outside of its stages' folders.
_MADE = (
  *("rounds/*/config.json", "points/*/config.json"),
  *("models/random-*/*", "teacher_cache/*/index.json"),
)


def is_record(path: Path) -> bool:
  """Returns whether a file is parquet with rows of one of our record kinds."""
  if path.suffix != ".parquet" or not path.is_file():
    return False
  try:
    # The footer only: the rows may be gigabytes.
    metadata = pq.read_schema(path).metadata
  # ValueError: a name in a damaged footer that is no UTF-8.
  except (pa.ArrowException, OSError, ValueError):
    return False
  return b"trd_jax.record" in (metadata or {})


def is_unfinished(path: Path) -> bool:
  """Returns whether a file is what a killed process has begun to write."""
  return bool(_UNFINISHED.fullmatch(path.name)) and not path.is_symlink()


def is_config(path: Path) -> bool:
  """Returns whether a file is the experiment of a run directory."""
  fields = _json(path)
  # Many programs have a config.json. These two keys are in every version of
  # ours, and together in no model's.
  return isinstance(fields, dict) and {"method", "student"} <= fields.keys()


def has_results(root: Path) -> bool:
  """Returns whether a run has made anything but problems and reports."""
  mine = (
    path
    for stage in STAGES
    if stage not in _REPORTS
    for path in (root / stage).glob("*")
    if path.name in _OF_A_STAGE or fnmatch.fnmatchcase(path.name, _SHARDS)
    if path.name != "preflight.json" and not _is_empty(path)
  )
  others = (path for pattern in _MADE for path in root.glob(pattern))
  return any(True for _ in itertools.chain(mine, others))


def problems_in(folder: Path) -> Iterator[Path]:
  """Yields the files that a run has written into the folder of its problems."""
  for path in sorted(folder.glob("*")):
    if is_record(path) or is_unfinished(path):
      yield path
  # By its keys, for any program may call a file so.
  done = folder / "done.json"
  fields = _json(done)
  if isinstance(fields, dict) and fields.keys() <= _OF_PROBLEMS:
    yield done


def foreign(root: Path) -> Iterator[Path]:
  """Yields what a run would write over in a folder that is no run's yet.

  That is what lies under a name of ours and isn't ours. Reports of a preflight,
  locks, timings and whole rows, which an earlier run may have left, are ours.
  """
  single = ("summary.json", "sweep.json", "sweep.svg", "rounds.json")
  for name in (*single, "rounds/parts.json"):
    if os.path.lexists(root / name):
      yield root / name
  for name in ("teacher_cache", "points", "rounds", "models", "locks"):
    if os.path.lexists(root / name) and not (root / name).is_dir():
      yield root / name
  timings = root / "timings.jsonl"
  if os.path.lexists(timings) and not _is_timings(timings):
    yield timings
  for path in sorted((root / "locks").glob("*.lock")):
    if not file_locks.is_signature(path):
      yield path
  for name in STAGES:
    yield from _foreign_in_stage(root / name)
  for outer in ("analyze", "evaluate"):
    for path in _in(root / outer):
      if f"{outer}/{path.name}" not in STAGES:
        yield path
  for path in sorted((root / "rounds").glob("[0-9]*")):
    config = path / "config.json"
    if not path.is_dir():
      yield path
    elif os.path.lexists(config):
      if not is_config(config):
        yield config
    else:
      yield from foreign(path)


def _in(folder: Path) -> Iterator[Path]:
  """Yields what is in a folder, or what is in its place."""
  if folder.is_dir():
    yield from sorted(folder.iterdir())
  elif os.path.lexists(folder):
    yield folder


def _foreign_in_stage(folder: Path) -> Iterator[Path]:
  """Yields what isn't ours in the folder of a stage, or in its place."""
  if not folder.is_dir():
    if os.path.lexists(folder):
      yield folder
    return
  there = sorted(folder.iterdir())
  rows = {path for path in there if is_record(path)}
  for path in there:
    known = path.name in _OF_A_STAGE and path.suffix != ".parquet"
    if path in rows or is_unfinished(path):
      continue
    if path.name == "preflight.json" and _is_report(path):
      continue
    # Other files with our names could be anybody's; ours stand beside rows,
    # which carry our mark inside.
    if not (known and rows) and not _is_empty(path):
      yield path


def _is_empty(path: Path) -> bool:
  return path.is_dir() and not any(path.iterdir())


def _is_report(path: Path) -> bool:
  fields = _json(path)
  return isinstance(fields, dict) and "max_prompt_tokens" in fields


def _is_timings(path: Path) -> bool:
  try:
    with path.open("rb") as file:
      row = json_files.loads(file.readline()) if path.is_file() else None
  except (OSError, ValueError):
    return False
  return isinstance(row, dict) and {"stage", "seconds"} <= row.keys()


def _json(path: Path) -> Any:
  """Reads a JSON file; None where it isn't there or isn't JSON."""
  try:
    return json_files.loads(path.read_bytes()) if path.is_file() else None
  except (OSError, ValueError):
    return None
