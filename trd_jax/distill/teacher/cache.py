"""The teacher's hidden states of responses, kept on disk.

The teacher is frozen, so what it makes of a context and a response is the same
in every epoch, under every divergence and every learning rate. A cache holds it
for one teacher: the hidden states after the final norm, at the positions that
predict the response's tokens.

    <cache_dir>/<revision>-<computed>-<stored>/
      index.json                 what is there, and the shards' checksums
      hidden-<number>.safetensors   a tensor [R, D] a trajectory

The folder's name is the teacher's identity, a tensor's that of the ids that it
was computed from; so a run finds what another one with the same teacher has
computed, and never what another teacher has. A shard is listed in the index
once it is whole: a process that is killed loses the shard that it was filling.

Whoever trains from a cache compares the shards with their checksums first. All
in them can be computed again, so a damaged one counts as not computed.

Shape key: R response tokens, D the teacher's residual channels.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  gives numpy the bfloat16 that shards may hold
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trd_jax.distill.packing.layout import Sample
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import file_locks, ownership
from trd_jax.experiment.files.atomic_files import atomic_file
from trd_jax.experiment.files.json_files import read_json, write_json
from trd_jax.experiment.progress import Progress

VERSION = 1
SHARD_BYTES = 128 * 2**20
"""Bytes of hidden states after which a shard is written."""

_INDEX = "index.json"
_SHARD = "hidden-{:06d}.safetensors"
_SHARD_NAME = re.compile(r"hidden-\d{6,}\.safetensors")
# What the index says of a shard.
_OF_A_SHARD = ("bytes", "sha256", "tokens")


@dataclasses.dataclass(frozen=True)
class Identity:
  """Whose hidden states a cache holds, and how.

  Attributes:
    revision: of the teacher's weights, see `hub.model_revision`.
    computed: dtype of the teacher, "float32" or "bfloat16"; with
      `train.teacher_dtype` behind it, as "bfloat16_float8".
    stored: dtype of the tensors on disk.
    width: D.
  """

  revision: str
  computed: str
  stored: str
  width: int

  @property
  def folder(self) -> str:
    """Returns the name of its folder."""
    return f"{self.revision}-{self.computed}-{self.stored}"

  @property
  def token_bytes(self) -> int:
    """Returns the bytes of one token on disk."""
    return self.width * np.dtype(self.stored).itemsize


def entry_key(sample: Sample) -> str:
  """Returns a name for what the teacher's hidden states are computed from."""
  # With lengths: where the context ends and the response begins decides which
  # positions are kept. In one byte order, for a cache may move to another
  # machine.
  digest = hashlib.sha256()
  for ids in (sample.teacher_prompt, sample.response):
    digest.update(len(ids).to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(ids, "<i4").tobytes())
  return digest.hexdigest()[:32]


class TeacherCache:
  """The hidden states of one teacher; a mapping from `entry_key`s.

  Args:
    root: where caches are kept; this one's folder is in it.
    identity: whose it is.

  Raises:
    UserError: the folder or its index can't be read, or belongs to something
      else. A listed shard that is not there counts as not computed.
  """

  def __init__(self, root: Path | str, identity: Identity):
    self.identity = identity
    self.folder = Path(root) / identity.folder
    # Checksums that were compared, and names of shards that have others.
    self._checked: set[str] = set()
    self._damaged: set[str] = set()
    self._shards: dict[str, dict[str, Any]] = {}
    self._place: dict[str, str] = {}
    self.reload()

  def __contains__(self, key: str) -> bool:
    return key in self._place

  def reload(self) -> None:
    """Reads the index again, as another process may have left it."""
    path = self.folder / _INDEX
    try:
      index = read_json(path) if path.exists() else self._index({})
      if {**index, "shards": None} != {**self._index({}), "shards": None}:
        raise UserError(
          f"{path} describes another teacher's cache, or one of another"
          " version; name another train.cache_dir"
        )
      if not all(
        isinstance(s["sha256"], str) for s in index["shards"].values()
      ):
        raise TypeError("a checksum is no text")
      # One that somebody has removed is computed anew.
      self._list(
        {
          name: {field: shard[field] for field in _OF_A_SHARD}
          for name, shard in index["shards"].items()
          if _SHARD_NAME.fullmatch(name) and (self.folder / name).exists()
        }
      )
    except (OSError, AttributeError, KeyError, TypeError) as error:
      raise UserError(
        f"{path} can't be read ({error}); remove it, or name another"
        " train.cache_dir"
      ) from error

  def _list(self, shards: dict[str, dict[str, Any]]) -> None:
    """Makes these shards all that the cache has."""
    self._shards = shards
    self._place = {
      key: name for name, shard in shards.items() for key in shard["tokens"]
    }

  def check_bytes(self, keys: Collection[str]) -> None:
    """Compares the shards that hold some keys with their checksums.

    Reads every byte of them once: about 1.5 s a GiB on each core. A damaged
    shard is printed, and what it held isn't in the cache any more: `filling`
    removes it.

    Args:
      keys: of `entry_key`; those that nobody has computed are passed over.
    """
    names = sorted({self._place[key] for key in keys if key in self._place})
    if not names:
      return
    # hashlib lets go of Python's lock, so that all cores work at it.
    with (
      ThreadPoolExecutor(min(len(names), os.cpu_count() or 1)) as pool,
      Progress(len(names), "teacher cache compared", "shards") as progress,
    ):
      for name, differs in zip(
        names, pool.map(self._difference, names), strict=True
      ):
        progress.update(1)
        if differs:
          self._damaged.add(name)
          print(
            f"train: {self.folder / name} {differs}: what it held is computed"
            " anew",
            flush=True,
          )
    self._drop(self._damaged)

  def _drop(self, names: Collection[str]) -> None:
    """Lets shards count as not computed."""
    kept = {n: shard for n, shard in self._shards.items() if n not in names}
    self._list(kept)

  def _difference(self, name: str) -> str | None:
    """Says how a shard isn't what was written; None: it is, to the last bit."""
    path, shard = self.folder / name, self._shards[name]
    if shard["sha256"] in self._checked:
      return None
    try:
      # The cheap look first.
      if (size := path.stat().st_size) != shard["bytes"]:
        return f"has {size} bytes of {shard['bytes']}"
      with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
      return f"can't be read ({error.strerror})"
    if found != shard["sha256"]:
      return "has another checksum than when it was written"
    self._checked.add(found)
    return None

  def check_room(self, tokens: int) -> int:
    """Checks that so many more tokens fit on the disk; returns its free bytes.

    Raises:
      UserError: they don't.
    """
    need = tokens * self.identity.token_bytes
    there = self.folder
    # The folder isn't made yet: its disk is that of the nearest one above.
    while not there.exists():
      there = there.parent
    free = shutil.disk_usage(there).free
    if need > free:
      raise UserError(
        f"{self.folder}: the teacher's hidden states of {tokens:,} tokens need"
        f" {need:,} bytes and {free:,} are free there; name another"
        " train.cache_dir, or use train.teacher=recompute"
      )
    return free

  @contextlib.contextmanager
  def filling(self) -> Iterator["Filler"]:
    """Opens a writer, for one process at a time; others wait until it is done.

    What was added lands when the block ends, unless by an error; an interrupt
    is none.

    Raises:
      UserError: the folder can't be written.
    """
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      path = self.folder / "lock"
      if path.exists() and not file_locks.is_signature(path):
        raise UserError(f"{path} is no lock of trd-jax; move it away")
      lock = path.open("a+b")
    except OSError as error:
      raise UserError(
        f"{self.folder} cannot be written ({error.strerror}); name another"
        " train.cache_dir"
      ) from error
    with lock:
      try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except (BlockingIOError, PermissionError):
        holder = file_locks.holder(path)
        print(
          f"train: {self.folder}: waiting for {holder}, which fills it",
          flush=True,
        )
        fcntl.lockf(lock, fcntl.LOCK_EX)
      file_locks.sign(lock)
      # Whoever held the lock may have computed what this process wants, and
      # replaced a damaged shard by one of the same name.
      self.reload()
      again = self._damaged & self._shards.keys()
      self._drop([name for name in again if self._difference(name)])
      # What a killed process had not listed yet; all else is somebody's.
      for left in self.folder.glob("*.*"):
        mine = _SHARD_NAME.fullmatch(left.name) or ownership.is_unfinished(left)
        if mine and left.is_file() and left.name not in self._shards:
          left.unlink()
      filler = Filler(self)
      try:
        yield filler
      except KeyboardInterrupt:  # SIGTERM too: what is computed is whole
        filler.flush()
        raise
      filler.flush()

  def read(self, key: str, tokens: int) -> np.ndarray:
    """Reads hidden states `[tokens, D]` in the stored dtype.

    The first read from a shard compares its checksum.

    Raises:
      UserError: the shard is damaged.
      KeyError: nobody has computed them.
    """
    name = self._place[key]
    path = self.folder / name
    try:
      # Those that this process has made are compared here.
      if differs := self._difference(name):
        raise _damaged(path, differs)
      with safe_open(path, framework="np") as file:
        hidden_RD = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
      raise _damaged(path, f"can't be read ({error})") from error
    if hidden_RD.shape != (tokens, self.identity.width):
      raise _damaged(path, f"holds {hidden_RD.shape} for {tokens} tokens")
    return hidden_RD

  def land(self, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a shard and lists it; for `Filler`."""
    number = 1
    while (self.folder / _SHARD.format(number)).exists():
      number += 1
    name = _SHARD.format(number)
    data = save(dict(tensors))
    try:
      # The shard first, then the index that lists it: a process that is killed
      # in between leaves a shard that nobody reads.
      with atomic_file(self.folder / name) as file:
        file.write(data)
      self._shards[name] = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "tokens": {key: len(x) for key, x in tensors.items()},
      }
      write_json(self.folder / _INDEX, self._index(self._shards))
    except OSError as error:
      raise UserError(
        f"{self.folder / name} cannot be written ({error.strerror}); make room,"
        " or name another train.cache_dir: what is there is kept"
      ) from error
    self._place |= dict.fromkeys(tensors, name)

  def _index(self, shards: Mapping[str, Any]) -> dict[str, Any]:
    about = {"version": VERSION, "teacher": dataclasses.asdict(self.identity)}
    return about | {"shards": dict(shards)}


class Filler:
  """Collects hidden states and lands them as shards."""

  def __init__(self, cache: TeacherCache):
    self._cache = cache
    self._tensors: dict[str, np.ndarray] = {}
    self._bytes = 0

  def __contains__(self, key: str) -> bool:
    return key in self._cache or key in self._tensors

  def add(self, key: str, hidden_RD: np.ndarray) -> None:
    """Takes hidden states over, cast to the stored dtype."""
    stored = np.dtype(self._cache.identity.stored)
    self._tensors[key] = hidden_RD = np.array(hidden_RD, stored, order="C")
    self._bytes += hidden_RD.nbytes
    if self._bytes >= SHARD_BYTES:
      self.flush()

  def flush(self) -> None:
    """Lands what is in memory, if anything."""
    if self._tensors:
      self._cache.land(self._tensors)
      self._tensors, self._bytes = {}, 0


def _damaged(path: Path, what: str) -> UserError:
  return UserError(
    f"{path} {what}: remove it, and the same command computes anew what it held"
  )
