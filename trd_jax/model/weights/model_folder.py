"""Reads what isn't weights in a model's folder, and writes folders whole."""

import contextlib
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from trd_jax.experiment import chat_templates
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import (
  disk_faults,
  file_locks,
  ownership,
  paths,
)
from trd_jax.experiment.files.json_files import read_object
from trd_jax.model.config import CONFIG, ModelConfig

_TEMPLATE = "chat_template.jinja"
# What belongs to a model folder besides config.json and the weights.
_COMPANIONS = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  _TEMPLATE,
  "generation_config.json",
)
_TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@contextlib.contextmanager
def atomic_folder(
  folder: Path | str, compared_later: Collection[str] = ()
) -> Iterator[Path]:
  """Yields a folder to fill that becomes `folder` at the end of the block.

      .NAME.trd-jax.tmp  --2-->  NAME  --1-->  .NAME.trd-jax.old, then removed

  Readers see what was there before, the whole new folder, or, for the moment
  between the two renames, none. Where the block raises, nothing changes. What a
  killed process left is cleared away; if it was killed between the renames,
  what was there before is put back first. A link to a folder stays a link, and
  the folder that it leads to is replaced.

  Args:
    folder: need not be there.
    compared_later: names of files in it that need not be ours before the
      block, but after it have to equal what the block has made.

  Raises:
    OSError: the disk refuses it; the error names the folder, or a file in it.
    UserError: before the block as `check_replaceable`, or another process
      writes the folder; after it, where something foreign has come into it.
  """
  folder = check_replaceable(folder, compared_later=compared_later)
  with disk_faults.naming(folder), _replaced(folder) as unfinished:
    yield unfinished


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
  """Yields what takes a folder's place after the block (`atomic_folder`)."""
  unfinished = folder.with_name(f".{folder.name}.trd-jax.tmp")
  former = folder.with_name(f".{folder.name}.trd-jax.old")
  # Beside the target and not in a temporary directory: a rename is atomic
  # within one file system only.
  marker = _begun(folder, unfinished)
  is_there, ours = True, None
  try:
    _settle(folder, former)
    yield unfinished
    if folder.exists():  # who may see it stays as it is
      unfinished.chmod(stat.S_IMODE(folder.stat().st_mode))
    readers = unfinished.stat().st_mode & 0o444
    for path in [*unfinished.rglob("*"), unfinished]:
      # safetensors makes files for their owner alone.
      path.chmod(path.stat().st_mode | readers)
      # Before the rename: after a power failure it could otherwise be on the
      # disk, and the files empty. The marker is left out because to close any
      # descriptor of a file that is locked unlocks it.
      if path.name != ownership.MARKER:
        _flush(path)
    ownership.finish(marker, unfinished)
    # A full folder can't be the target of a rename, so the former one steps
    # aside first. It is looked through again at the last moment: the block may
    # have taken hours, and somebody may have put a file there.
    if folder.exists() and any(folder.iterdir()):
      ours = ownership.ours_in(folder, unfinished)
      folder.rename(former)
    unfinished.rename(folder)  # in the place of an empty folder, too
    is_there = False
    _flush(folder.parent)  # before what was there is deleted
    if ours is not None:
      # What has come into it since stays, under that name.
      with contextlib.suppress(OSError):
        ownership.remove(former, ours)
  finally:
    # The second rename failed: what was there before comes back.
    if is_there and ours is not None and not folder.exists():
      former.rename(folder)
    if is_there:
      _clear(unfinished)
      (unfinished / ownership.MARKER).unlink(missing_ok=True)
      with contextlib.suppress(OSError):  # another process has begun
        unfinished.rmdir()
    marker.close()


def check_replaceable(
  folder: Path | str,
  called: str | None = None,
  compared_later: Collection[str] = (),
) -> Path:
  """Checks that a folder can be written whole, and that nothing is lost by it.

  Args:
    folder: need not be there.
    called: its name in an error; default: the path.
    compared_later: names of files in it that pass (see `ownership.ours_in`).

  Returns:
    The folder's path behind all links.

  Raises:
    UserError: the folder is a file, a link that leads nowhere or the root of a
      file system, it can't be written, or it holds what this program has not
      written.
  """
  called = called or str(folder)
  folder = paths.behind_links(folder)
  while True:
    identity = _identity(folder)
    try:
      _check_once(folder, called, compared_later)
      return folder
    # Another process may have replaced the folder in the midst of the look,
    # which then saw half of the former one and half of the new: look again.
    except (UserError, OSError):
      if _identity(folder) == identity:
        raise


def _identity(folder: Path) -> tuple[int, int] | None:
  """Returns what tells a folder from the one that replaces it; None of none.

  The inode alone would not: file systems use the number of a removed one again.
  """
  try:
    status = folder.stat()
  except OSError:
    return None
  return status.st_ino, status.st_ctime_ns


def _check_once(
  folder: Path, called: str, compared_later: Collection[str]
) -> None:
  """Checks a folder as `check_replaceable` does, while nobody replaces it."""
  there = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
  if not os.path.isdir(there):
    raise UserError(f"{called}: {there} is no folder; name another")
  # A rename changes the folder above; what is in the folder is removed from it.
  # So both have to be writable.
  for path in {there, folder.parent if there == folder else there}:
    if not os.access(path, os.W_OK | os.X_OK):
      raise UserError(
        f"{called}: {path} cannot be written; name another folder, or see to"
        " its permissions"
      )
  if os.path.ismount(folder):
    raise UserError(
      f"{called} is the root of a file system, which nothing can take the place"
      " of; name a folder in it"
    )
  if folder.is_dir():
    ownership.ours_in(folder, compared_later=compared_later, called=called)


def _begun(folder: Path, unfinished: Path) -> IO[bytes]:
  """Makes the folder to fill, for this process only.

  Returns:
    The folder's marker, open and locked.

  Raises:
    UserError: another process holds the folder, or it is not ours or can't be
      made.
  """
  while True:
    try:
      unfinished.mkdir(parents=True, exist_ok=True)
      there = sorted(path.name for path in unfinished.iterdir())
      if there and ownership.MARKER not in there:
        # Seen once it may be another process's that is just ending. Seen twice,
        # it is somebody's.
        if unfinished.exists() and sorted(os.listdir(unfinished)) == there:
          raise _in_the_way(folder, unfinished, there[0])
        continue
      marker = file_locks.acquire(unfinished / ownership.MARKER)
    except OSError as error:
      # Another process has removed it between two lines, or while `mkdir` saw
      # that it was there.
      if isinstance(error, FileNotFoundError | FileExistsError) and (
        unfinished.is_dir() or not os.path.lexists(unfinished)
      ):
        continue
      raise UserError(
        f"{folder} cannot be written ({error.strerror}); name another folder"
      ) from error
    if marker is None:
      raise UserError(
        f"another process is at work on {folder}: wait for it, or name another"
        " folder"
      )
    marker.seek(0)
    if ownership.listed(marker.read()) is None:
      marker.close()
      raise _in_the_way(folder, unfinished, ownership.MARKER)
    # The lock is ours, so whoever began this folder is gone: what a killed
    # process left in it can go.
    _clear(unfinished)
    ownership.begin(marker)
    return marker


def _in_the_way(folder: Path, unfinished: Path, name: str) -> UserError:
  """Returns the error about something foreign in the folder to fill."""
  return UserError(
    f"{folder} is written by way of {unfinished}, which holds {name} and is not"
    " ours; move it away"
  )


def _settle(folder: Path, former: Path) -> None:
  """Finishes or undoes the renames of a process that was killed.

  With a new folder in place the former one is only to be removed, which the
  process that has put it there may still be doing: its lock went with the new
  folder. Without one the process was killed between the renames, and the former
  one comes back.
  """
  if not former.exists():
    return
  ours = ownership.ours_in(former)
  if folder.exists():
    ownership.remove(former, ours)
  else:
    former.rename(folder)


def _clear(unfinished: Path) -> None:
  """Empties a folder that carries our marker, and keeps the marker."""
  for path in unfinished.iterdir():
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    elif path.name != ownership.MARKER:
      path.unlink()


def _flush(path: Path) -> None:
  """Waits until a file, or the names in a folder, are on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def copy_companions(
  source: Path | str, out: Path, chat_template: Path | str | None = None
) -> None:
  """Copies a tokenizer, its chat template and the generation config.

  Args:
    source: a model's or a tokenizer's folder.
    out: the folder to copy them to.
    chat_template: a jinja file, or a shipped template's name, to put in the
      place of the source's template.
  """
  for name in _COMPANIONS:
    if (Path(source) / name).exists():
      shutil.copyfile(Path(source) / name, out / name)
  if chat_template is not None:
    shutil.copyfile(chat_templates.file(chat_template), out / _TEMPLATE)


def token_ids(source: Path | str) -> dict[str, Any]:
  """Reads the special tokens' ids that a folder's config.json names, if any."""
  path = Path(source) / CONFIG
  fields = read_object(path) if path.exists() else {}
  return {name: fields[name] for name in _TOKEN_FIELDS if name in fields}


def read_config(folder: Path | str) -> ModelConfig:
  """Reads the shape of the model in a folder.

  Raises:
    UserError: `config.json` is missing, no JSON, or of an unknown
      architecture.
  """
  fields = read_object(Path(folder) / CONFIG)
  try:
    return ModelConfig.from_hf(fields)
  except UserError as error:
    raise UserError(f"{folder}/{error}") from error
