"""Checkpoints of a training run, in orbax's format.

A checkpoint is a tree of arrays and plain values (text, numbers, None). On
disk the arrays are nested dicts with readable names, the plain values JSON;
the caller's own structure (named tuples, optimizer states) comes back from
the abstract tree that `restore` is given, and what doesn't agree with it is
an error, never a guess.

Each checkpoint has `digests.json`, which lists its files with a digest each. It
becomes visible with the checkpoint, and is compared before anything is read.
"""

import contextlib
import functools
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from trd_jax.experiment.errors import UserError, one_line
from trd_jax.experiment.files import digests, disk_faults
from trd_jax.model.weights import finite_weights

_UNFINISHED = "[0-9]*.orbax-checkpoint-tmp*"
_ARRAYS = "arrays"
# What orbax writes after the digests. Neither is needed to restore.
_WRITTEN_LAST = ("_CHECKPOINT_METADATA", "commit_success.txt")
# All that orbax writes into one of our checkpoints, by its path there.
_OF_ORBAX = re.compile(
  r"""
  (_CHECKPOINT_METADATA | commit_success\.txt
  | plain(\.orbax-checkpoint-tmp[^/]*)?/(metadata | commit_success\.txt)
  | arrays(\.orbax-checkpoint-tmp[^/]*)?/(
      _METADATA | _sharding | commit_success\.txt
      | array_metadatas/process_\d+
      | (ocdbt\.process_\d+/)?(manifest\.ocdbt | d/[0-9a-f]{32}))
  | digests\.json(\.[0-9a-f]{32}\.tmp)?)
  (\.__lock)?
  """,
  re.VERBOSE,
)


class Checkpoints:
  """The checkpoints in one directory.

  A checkpoint appears whole or not at all: a save that was killed leaves
  nothing that `latest` sees. Saves run in the background; the arrays may be
  donated as soon as `save` returns.

  Args:
    directory: where they are; made by the first save.
    keep: how many of the newest stay.
  """

  def __init__(self, directory: Path | str, keep: int):
    self.directory = Path(directory).absolute()
    self.keep = keep
    self._open: ocp.CheckpointManager | None = None
    self._cleared = False
    # The step that is being written, and those whose bytes were compared.
    self._saving: int | None = None
    self._compared: set[int] = set()

  def save(self, step: int, tree: Any) -> None:
    """Starts to write a checkpoint; one of the same step stays as it is.

    Args:
      step: updates done.
      tree: arrays (of JAX, sharded or not, or numpy) and plain values.

    Raises:
      OSError: the disk refuses this one or the one before.
      ValueError: two leaves have one name, or a leaf is neither an array nor
        plain.
    """
    arrays, plain = {}, {}
    for name, leaf in _named(tree).items():
      if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        arrays[name] = leaf if isinstance(leaf, jax.Array) else np.array(leaf)
      elif leaf is None or isinstance(leaf, str | int | float):
        plain[name] = leaf
      else:
        raise ValueError(f"{name} is a {type(leaf).__name__}, not an array")
    # Left by a process that was killed in a save. Orbax passes them over, and
    # would keep them for ever. Before the first save only: later ones of that
    # form may be this process's own, which is still writing.
    with self._writing():
      if self._open is not None:
        disk_faults.check_folder(self.directory)
      if not self._cleared:
        self._clear()
      self._cleared = True
      manager = self._manager()
      manager.wait_until_finished()  # `_saving` is still the former one's
      if step not in manager.all_steps():
        self._saving = step
        items = {
          _ARRAYS: ocp.args.PyTreeSave(unflatten_dict(arrays, sep="/")),
          "plain": ocp.args.JsonSave(plain),
        }
        manager.save(step, args=ocp.args.Composite(**items), force=True)

  def latest(self) -> int | None:
    """Returns the newest checkpoint's step; None where none is whole."""
    if not self.directory.exists():
      return None
    return self._manager().latest_step()

  def restore(
    self, abstract_tree: Any, *, partial: bool = False
  ) -> tuple[int, Any]:
    """Reads the newest checkpoint into the structure of `abstract_tree`.

    Args:
      abstract_tree: like the tree that was saved: `jax.ShapeDtypeStruct`s
        (with the shardings wanted) or arrays; the values of its plain leaves
        don't matter.
      partial: whether the checkpoint may hold more than is asked for.

    Returns:
      The step and the tree, bit for bit as it was saved. Numpy leaves come
      back as numpy arrays, all other arrays as `jax.Array`s.

    Raises:
      UserError: there is no checkpoint, it is damaged, a leaf is missing,
        left over, or of another shape or dtype, or an array has a value that
        is NaN or infinite.
    """
    step = self._newest_whole()
    wanted = _named(abstract_tree)
    arrays = {n: x for n, x in wanted.items() if hasattr(x, "shape")}
    saved = self._saved(step)
    self._compare(step, wanted, saved, partial)
    # Each array is read straight onto the devices that hold it: made first and
    # placed then, a state that is split may not fit into one device's memory.
    nested = unflatten_dict(arrays, sep="/")
    how = ocp.args.PyTreeRestore(
      jax.tree.map(_abstract, nested),
      restore_args=jax.tree.map(_restore_args, nested),
      partial_restore=partial,
    )
    items = ocp.args.Composite(arrays=how)
    try:
      found = self._manager().restore(step, args=items)["arrays"]
    except (OSError, ValueError, KeyError) as error:
      raise self._damaged(step, error) from error
    flat = flatten_dict(found, sep="/") | saved[1]
    for name in arrays:
      self._check_finite(step, name, flat[name])
    # `wanted` has the names in the order of the abstract tree's leaves.
    leaves = [flat[name] for name in wanted]
    _, structure = jax.tree.flatten(abstract_tree, is_leaf=_is_none)
    return step, jax.tree.unflatten(structure, leaves)

  def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of the newest checkpoint's arrays, by name.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    step = self._newest_whole()
    return {
      name: jax.ShapeDtypeStruct(shape, dtype)
      for name, (shape, dtype) in self._saved(step)[0].items()
    }

  def wait(self) -> None:
    """Returns when the last save is on disk; raises what went wrong in it."""
    if self._open is not None:
      with self._writing():
        self._open.wait_until_finished()

  def check(self) -> None:
    """Raises what has gone wrong in a save; doesn't wait for one."""
    if self._open is not None:
      with self._writing():
        self._open.check_for_errors()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Names the directory in an error of its disk, and clears what it left.

    Raises:
      OSError: the disk refuses to hold a checkpoint.
    """
    try:
      with disk_faults.naming(self.directory):
        yield
    except OSError:
      # What is there of it takes the room that is missing.
      with contextlib.suppress(OSError):
        self._clear()
      raise

  def _clear(self) -> None:
    """Removes what saves that didn't end have left."""
    if jax.process_index() == 0:
      for left_over in self.directory.glob(_UNFINISHED):
        if left_over.is_dir() and not left_over.is_symlink():
          _remove_unfinished(left_over)

  def _manager(self) -> ocp.CheckpointManager:
    if self._open is None:
      # Orbax takes each folder with a number for a checkpoint, and in time
      # removes all but the newest.
      for path in sorted(self.directory.glob("*")):
        if path.name.isdecimal() and not (path / _ARRAYS).is_dir():
          raise UserError(f"{path} is no checkpoint of trd-jax; move it away")
      for path in sorted(self.directory.glob(_UNFINISHED)):
        for name in _not_of_orbax(path):
          raise UserError(
            f"{path} holds {name}, which is no checkpoint's; move it away"
          )
      # Each error is raised in the main thread, too. Logged from a thread of
      # orbax's as well, it would bury the line about it in tracebacks.
      # asyncio logs those of writes beside the one that failed first.
      for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_no_traceback)
      _pass_over_closed_loops()
      try:
        self._open = ocp.CheckpointManager(
          self.directory,
          options=ocp.CheckpointManagerOptions(
            max_to_keep=self.keep,
            async_options=ocp.AsyncOptions(
              # Made in a thread, a folder that can't be made is waited for, for
              # minutes, by the threads that write into it.
              create_directories_asynchronously=False,
              post_finalization_callback=self._list_digests,
            ),
          ),
          item_handlers={
            _ARRAYS: ocp.PyTreeCheckpointHandler(),
            "plain": ocp.JsonCheckpointHandler(),
          },
        )
      except (AttributeError, KeyError, TypeError, ValueError) as error:
        # It looks into every checkpoint's.
        raise UserError(
          f"{self.directory}/*/{_WRITTEN_LAST[0]} can't be read"
          f" ({one_line(error)}); remove the damaged one, which nothing is"
          " restored from"
        ) from error
    return self._open

  def _list_digests(self) -> None:
    """Lists the files of the checkpoint that is about to become visible.

    Orbax calls this in the thread that writes, so that no update waits for it,
    before it renames the folder: there is no checkpoint without its list.
    """
    if jax.process_index() == 0:
      (unfinished,) = self.directory.glob(f"{self._saving}.orbax-*-tmp*")
      digests.write(unfinished, without=_WRITTEN_LAST)

  def _newest_whole(self) -> int:
    """Returns the newest checkpoint's step, once its bytes are compared.

    Raises:
      UserError: there is none, or a file of it is missing or damaged.
    """
    step = self.latest()
    if step is None:
      raise UserError(f"{self.directory} holds no checkpoint")
    if step in self._compared:
      return step
    folder = self.directory / str(step)
    if not digests.exists(folder):
      if jax.process_index() == 0:
        print(
          f"note: {folder} has no {digests.LIST}, as of an earlier version: its"
          " bytes aren't compared",
          flush=True,
        )
    elif differs := digests.difference(folder):
      if differs.startswith(digests.LIST):
        raise UserError(
          f"{folder / differs}: remove it, and the checkpoint is read without"
          " it"
        )
      raise self._damaged(step, ValueError(differs))
    self._compared.add(step)
    return step

  def _saved(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads shapes and dtypes of a checkpoint's arrays, and its plain part."""
    try:
      about = self._manager().item_metadata(step)["arrays"].tree
      items = ocp.args.Composite(plain=ocp.args.JsonRestore())
      plain = self._manager().restore(step, args=items)["plain"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
      raise self._damaged(step, error) from error
    flat: dict[str, Any] = flatten_dict(about, sep="/")
    arrays = {
      name: (tuple(leaf.shape), np.dtype(leaf.dtype))
      for name, leaf in flat.items()
    }
    return arrays, plain

  def _compare(
    self, step: int, wanted: dict[str, Any], saved: Any, partial: bool
  ) -> None:
    """Refuses a checkpoint of another tree: orbax would pad, cut or cast."""
    there = saved[0] | dict.fromkeys(saved[1], "a plain value")
    for name, leaf in wanted.items():
      here = "a plain value"
      if hasattr(leaf, "shape"):
        here = (tuple(leaf.shape), np.dtype(leaf.dtype))
      if there.get(name) != here:
        raise UserError(
          f"{self.directory / str(step)}: {name} is {_shown(there.get(name))}"
          f" there and {_shown(here)} in this run; go back to the config that"
          " wrote it, or name another --workdir"
        )
    if not partial and (more := sorted(there.keys() - wanted.keys())):
      raise UserError(
        f"{self.directory / str(step)}: {more[0]} is {_shown(there[more[0]])}"
        " there and absent in this run; go back to the config that wrote it,"
        " or name another --workdir"
      )

  def _check_finite(self, step: int, name: str, array: Any) -> None:
    """Refuses an array with values that are no numbers.

    Of one that is split over devices this process looks at its own part.
    """
    parts = [array]
    if isinstance(array, jax.Array):
      parts = [shard.data for shard in array.addressable_shards]
    counts = [(finite_weights.count(np.asarray(x)), x.size) for x in parts]
    wrong, size = max(counts, default=(0, 0))
    if wrong:
      raise finite_weights.refusal(
        self.directory / str(step), f"array {name}", wrong, size
      )

  def _damaged(self, step: int, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    before = [s for s in self._manager().all_steps() if s < step]
    onward = "go on from the one before" if before else "begin anew"
    return UserError(
      f"{self.directory / str(step)} can't be read ({reason}); remove it to"
      f" {onward}"
    )


def _remove_unfinished(folder: Path) -> None:
  """Removes an unfinished checkpoint, unless anything in it isn't orbax's."""
  if _not_of_orbax(folder):
    return
  for name in list(_paths_in(folder)):
    (folder / name).unlink()
  # Inner ones first; a file that has just come keeps its folder.
  for top, _, _ in os.walk(folder, topdown=False):
    try:
      os.rmdir(top)
    except OSError:
      return


def _not_of_orbax(folder: Path) -> list[str]:
  """Returns what orbax has not written of an unfinished checkpoint."""
  return sorted(n for n in _paths_in(folder) if not _OF_ORBAX.fullmatch(n))


def _paths_in(folder: Path) -> Iterator[str]:
  """Yields the files and links below a folder, by their paths from there."""
  for top, folders, files in os.walk(folder):
    links = [f for f in folders if os.path.islink(os.path.join(top, f))]
    for name in (*files, *links):
      yield os.path.relpath(os.path.join(top, name), folder)


def _is_no_traceback(record: logging.LogRecord) -> bool:
  """Returns whether a line of the log is no traceback of orbax's."""
  if not record.exc_info:
    return True
  places = [record.pathname]
  frame = record.exc_info[2]
  while frame is not None:
    places.append(frame.tb_frame.f_code.co_filename)
    frame = frame.tb_next
  return not any("orbax" in place for place in places)


@functools.cache
def _pass_over_closed_loops() -> None:
  """Lets Python say nothing of writes that end after the first one failed.

  Orbax stops waiting for them then, and each would print a traceback that has
  nothing to do with the disk.
  """
  hook = sys.unraisablehook

  def quiet(about: Any) -> None:
    if str(about.exc_value) != "Event loop is closed":
      hook(about)

  sys.unraisablehook = quiet


def _named(tree: Any) -> dict[str, Any]:
  """Returns the leaves by name: keys, fields and indices joined by '/'."""
  named = {}
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_none)
  for path, leaf in leaves:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name in named:
      raise ValueError(f"two leaves are named {name}")
    named[name] = leaf
  return named


def _is_none(leaf: Any) -> bool:
  # To JAX None is an empty tree. Here it is a value that is saved as such.
  return leaf is None


def _abstract(leaf: Any) -> Any:
  """Returns what stands for a leaf in a read: numpy's stay numpy's."""
  if isinstance(leaf, np.ndarray | np.generic):
    return np.empty(leaf.shape, leaf.dtype)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
  if isinstance(leaf, np.ndarray | np.generic):
    return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return ocp.ArrayRestoreArgs(
    sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype
  )


def _shown(about: Any) -> str:
  if about is None:
    return "absent"
  return about if isinstance(about, str) else f"{about[0]} {about[1]}"
