"""Keeps a run directory to one config, and lets what is free in it change."""

import contextlib
import errno
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from trd_jax.experiment import declarations, scopes
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import (
  atomic_files,
  disk_faults,
  file_locks,
  json_files,
  ownership,
)
from trd_jax.experiment.files.json_files import read_json

_MOST_DIFFERENCES = 6
_WAIT_SECONDS = 0.05  # between two tries of a lock that is held for a moment


class WorkdirConfig:
  """The config that a run directory belongs to.

  The directory keeps one config. Two kinds of keys may differ from it. Those
  that only say how a run is carried out (`scopes.is_runtime`): the config there
  then stays as it is. And those that no artifact there depends on: the
  directory then gets the new config, and what has been made stays.

  A copy with a digest tells a config that was damaged, edited or removed from
  that of another experiment.

  Args:
    root: the directory.
    config: the file of its config.
    lock: a file to lock while the config is looked at and changed; a copy of
      the config lies beside it.
    made: returns the stages (of `scopes.STAGES`) that have left artifacts.
    others_at_work: returns whether another process is making artifacts.
  """

  def __init__(
    self,
    root: Path,
    config: Path,
    lock: Path,
    made: Callable[[], Collection[str]],
    others_at_work: Callable[[], bool],
  ):
    self._root, self._config, self._lock_file = root, config, lock
    self._copy = lock.with_name("config.json")
    self._made, self._others_at_work = made, others_at_work
    # The config that this process has claimed the directory for, and the one
    # that this has replaced.
    self._mine: str | None = None
    self._former: str | None = None

  def make(self, experiment_json: str) -> bool:
    """Claims the directory for an experiment, or checks that it is its own.

    Returns:
      Whether this call gave the directory that experiment's config.

    Raises:
      UserError: what is there was made by another experiment (the keys that
        can't differ are named, with both values and the stages in the way);
        another process is at work there under another config; the directory
        can't be written; or it is no run's yet and holds something foreign
        under a name of ours.
    """
    self.check(experiment_json)
    # What is there was made by that; whether this one may differ comes below.
    self.restore()
    is_new = not self._config.exists()
    try:
      if is_new:
        mine = self._root / f"config.json.{uuid.uuid4().hex}"
        with atomic_files.atomic_file(mine) as file:
          file.write(experiment_json.encode())
        # A rename would replace the config of a process that has claimed the
        # directory meanwhile. A link fails where the name is taken.
        with contextlib.suppress(FileExistsError):
          self._config.hardlink_to(mine)
        mine.unlink()
    except OSError as error:
      raise self._unwritable(error.errno) from error
    # Once more: another process may have been first with another config.
    is_changed = self.check(experiment_json)
    try:
      if is_changed:
        self._change(experiment_json)
      elif self._kept() is None:
        with self._locked():
          self._keep(self._config.read_text())
    except OSError as error:
      raise self._unwritable(error.errno) from error
    self._mine = experiment_json
    return is_new or is_changed

  def check(self, experiment_json: str) -> bool:
    """Checks that the directory is an experiment's or could become so.

    Returns:
      Whether it has another config, which `make` would replace.

    Raises:
      UserError: see `make`.
    """
    root = self._root.absolute()
    there = next(p for p in (root, *root.parents) if os.path.lexists(p))
    # False also where a folder above can't be searched.
    if not os.path.isdir(there):
      raise self._unwritable(errno.ENOTDIR)
    if not os.access(there, os.W_OK | os.X_OK):
      read_only = os.statvfs(there).f_flag & os.ST_RDONLY
      raise self._unwritable(errno.EROFS if read_only else errno.EACCES)
    kept = self._kept()
    if kept is not None and os.path.lexists(self._config):
      self._check_bytes(kept)
    elif kept is None and not ownership.is_config(self._config):
      self._check_foreign()
    # Claimed by another process meanwhile, perhaps.
    if self._config.exists():
      was = declarations.flatten(read_json(self._config))
    elif kept is not None:
      was = declarations.flatten(json_files.loads(kept["config"]))
    else:
      return False
    # Compared key by key and not as text: the order and the spelling of a
    # number mean nothing.
    now = declarations.flatten(json_files.loads(experiment_json))
    try:
      different = scopes.differences(was, now)
      if not different:
        return False
      in_the_way = scopes.obstacles(was, now, self._made())
    except (LookupError, TypeError, AttributeError, ValueError) as error:
      raise self._damaged() from error
    if in_the_way:
      stages = {
        stage for dependent in in_the_way.values() for stage in dependent
      }
      held = [stage for stage in scopes.STAGES if stage in stages]
      raise UserError(
        f"--workdir={self._root} was made by another config:"
        f" {_shown({name: different[name] for name in in_the_way})};"
        f" {', '.join(held)} there depend{'s' if len(held) == 1 else ''} on"
        " that: name another --workdir, or go back to that config"
      )
    return True

  def check_made_by(
    self, path: Path, stage: str, values: Mapping[str, Any]
  ) -> None:
    """Checks that a finished stage is of the directory's config.

    Args:
      path: the stage's record, for the message.
      stage: its name, of `scopes.STAGES`.
      values: the keys that it was made by, by dotted name.

    Raises:
      UserError: a key that the stage depends on differs, or the directory's
        config is damaged.
    """
    self.check_bytes()  # else the stage would be blamed
    here = declarations.flatten(read_json(self._config))
    in_the_way = scopes.obstacles(values, here, [stage])
    if in_the_way:
      different = scopes.differences(values, here)
      raise UserError(
        f"{path} is not of this run: it was made by another config, where"
        f" {_shown({name: different[name] for name in in_the_way})}; move"
        f" {path.parent} away to have it made here, or name another --workdir"
        " for that config"
      )

  def _check_foreign(self) -> None:
    """Refuses a directory that is no run's and has something in a run's way."""
    try:
      named = [self._config] if os.path.lexists(self._config) else []
      strange = next(iter([*named, *ownership.foreign(self._root)]), None)
    except OSError as error:
      raise self._unwritable(error.errno) from error
    if strange is None or ownership.is_config(self._config):
      return
    if strange == self._config and ownership.has_results(self._root):
      raise self._damaged()
    raise UserError(
      f"--workdir={self._root} is no run's of trd-jax, and {strange} is there,"
      " where a run would write; name another, or move that away"
    )

  def restore(self) -> None:
    """Writes the config anew where it is gone and its copy is there.

    Raises:
      UserError: the directory can't be written.
    """
    kept = self._kept()
    if kept is None or os.path.lexists(self._config):
      return
    try:
      with self._locked():
        self._write(kept["config"])
    except OSError as error:
      raise self._unwritable(error.errno) from error

  def check_bytes(self) -> None:
    """Compares the config with its copy, where there is one.

    Raises:
      UserError: it is damaged, was edited, or is gone.
    """
    kept = self._kept()
    if kept is None:
      return
    if not os.path.lexists(self._config):
      raise UserError(
        f"{self._config} is not there: the next command writes it anew out of"
        f" {self._copy}"
      )
    self._check_bytes(kept)

  def hold(self) -> None:
    """Checks that the config is still the one that this process claimed.

    A process that changes the config looks for locked stages first. A process
    that has locked a stage looks at the config then, by this method. So of two
    that come at once at least one sees the other. Without a claim by this
    process nothing is checked.

    Raises:
      UserError: another process has changed the config meanwhile.
    """
    if self._mine is None or not self._config.exists():
      return
    with self._locked():
      if self.check(self._mine):
        raise UserError(
          f"{self._root} has been claimed by another config meanwhile: wait for"
          " who did so, and give the same command again"
        )

  def check_there(self) -> None:
    """Checks that the directory that this process has claimed is still there.

    Raises:
      FileNotFoundError: its config isn't.
    """
    if self._mine is not None and not self._config.exists():
      raise FileNotFoundError(
        errno.ENOENT, os.strerror(errno.ENOENT), str(self._config)
      )

  def give_back(self) -> bool:
    """Restores the config that `make` replaced, if nothing was made since.

    Returns:
      Whether `make` had replaced one.
    """
    former, self._former, self._mine = self._former, None, None
    if former is None:
      return False
    # Silently kept where something was made under the new config meanwhile.
    with contextlib.suppress(UserError), self._locked():
      self.check(former)
      self._write(former)
    return True

  def _change(self, experiment_json: str) -> None:
    """Replaces a config that nothing in the directory depends on.

    Raises:
      UserError: another process is at work there under the former config.
    """
    with self._locked():
      if not self.check(experiment_json):
        return  # another process has been as quick
      former = self._config.read_text()
      if self._others_at_work():
        was = declarations.flatten(json_files.loads(former))
        now = declarations.flatten(json_files.loads(experiment_json))
        raise UserError(
          f"another process is at work in {self._root} by another config:"
          f" {_shown(scopes.differences(was, now))}; wait for it, or stop it"
        )
      self._write(experiment_json)
      self._former = former

  def _write(self, experiment_json: str) -> None:
    former = None
    with contextlib.suppress(OSError):
      former = _sha256(self._config.read_bytes())
    # The copy first: of a process that is killed in between it knows both.
    self._keep(experiment_json, former)
    with atomic_files.atomic_file(self._config) as file:
      file.write(experiment_json.encode())

  def _keep(self, experiment_json: str, former: str | None = None) -> None:
    """Writes the copy, unless something of somebody's is in its place."""
    if os.path.lexists(self._copy) and self._of_copy() is None:
      return
    copy = {
      "config": experiment_json,
      "sha256": _sha256(experiment_json.encode()),
      "former_sha256": former,
    }
    json_files.write_json(self._copy, copy)

  def _of_copy(self) -> dict[str, Any] | None:
    """Reads the copy as it is; None where it is none of ours."""
    try:
      copy = json_files.own_loads(self._copy.read_bytes())
    except (OSError, ValueError):
      return None
    known = {"config", "sha256", "former_sha256"}
    return copy if isinstance(copy, dict) and copy.keys() == known else None

  def _kept(self) -> dict[str, Any] | None:
    """Reads the copy; None where there is none, or it is damaged."""
    copy = self._of_copy()
    if copy is None or not isinstance(copy["config"], str):
      return None
    whole = copy["sha256"] == _sha256(copy["config"].encode())
    return copy if whole else None

  def _check_bytes(self, kept: Mapping[str, Any]) -> None:
    """Compares the config's bytes with its copy's.

    Raises:
      UserError: they are others.
    """
    try:
      content = self._config.read_bytes()
    except OSError as error:
      raise self._unwritable(error.errno) from error
    if _sha256(content) not in (kept["sha256"], kept["former_sha256"]):
      raise UserError(
        f"{self._config} is damaged or was edited: remove it, and the same"
        f" command writes it anew out of {self._copy}"
      )

  def forget(self) -> None:
    """Removes the copy, and the file that is locked while it is looked at."""
    with contextlib.suppress(OSError), self._locked():
      if self._of_copy() is not None:
        self._copy.unlink()
      self._lock_file.unlink()

  @contextlib.contextmanager
  def _locked(self) -> Iterator[None]:
    """Locks the config for a moment; waits where another process has it."""
    self._lock_file.parent.mkdir(parents=True, exist_ok=True)
    while (file := file_locks.acquire(self._lock_file)) is None:
      time.sleep(_WAIT_SECONDS)
    with file:
      yield

  def _damaged(self) -> UserError:
    """Returns the refusal of a run's directory whose config is damaged.

    What is there can't be told from what another config would make.
    """
    return UserError(
      f"{self._config} is damaged: put a copy of it back, and what is there"
      " goes on; any run directory of the same --config and keys has the same"
      " file"
    )

  def _unwritable(self, code: int | None) -> UserError:
    """Returns the refusal of a directory that the system says `code` to."""
    why = os.strerror(code or 0)
    if remedy := disk_faults.remedy(code):
      why += f"; {remedy}"
    if os.path.isfile(self._root):
      why = "it is a file, not a folder; name another"
    return UserError(f"--workdir={self._root} cannot be written: {why}")


def _sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _shown(differences: Mapping[str, tuple[str, str]]) -> str:
  """Returns keys with both values for a message, the first few of many."""
  pairs = [
    f"{name} is {was} there and {now} here"
    for name, (was, now) in differences.items()
  ]
  more = len(pairs) - _MOST_DIFFERENCES
  shown = ", ".join(pairs[:_MOST_DIFFERENCES])
  return f"{shown} and {more} more" if more > 0 else shown
