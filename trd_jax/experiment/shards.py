"""Writes and reads rows as parquet shards that appear whole or not at all.

A shard is written under a name that no reader looks for, flushed to the disk
and renamed. A process that is killed at any moment loses only the rows of one
unfinished shard. A row that was written twice is read once.

    shard-<time>-<process>-<number>-<digest>.parquet

The digest is of the file's bytes, and every reader compares it. So a shard that
a disk or a copy has damaged is named, and is never read as other rows. In the
name it needs no second file, which a killed process could leave behind.
"""

import contextlib
import hashlib
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import Generic, Self

import pyarrow as pa
import pyarrow.parquet as pq

from trd_jax.experiment import records
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import disk_faults, ownership
from trd_jax.experiment.files.atomic_files import atomic_file
from trd_jax.experiment.records import RecordT

_SHARDS = "shard-*.parquet"
# Earlier versions wrote none into the name.
_DIGEST = re.compile(r"shard-.+-([0-9a-f]{32})\.parquet")
# Below all times of a writing, in nanoseconds: rows that replace others sort
# before them.
_BEFORE_ALL_TIMES = 10**18
# What earlier versions called them: nothing sorts before it.
_FORMERLY_REPLACED = "shard-" + 20 * "0" + "-replaced.parquet"


def write_table(path: Path, table: pa.Table) -> None:
  """Writes one parquet file (zstd, pages with checksums), atomically."""
  with atomic_file(path) as file:
    file.write(_encoded(table))


def _encoded(table: pa.Table) -> pa.Buffer:
  """Returns the bytes of a parquet file with a table's rows."""
  sink = pa.BufferOutputStream()
  # Page checksums are for the readers of other programs, which don't know what
  # the name of a shard says.
  pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
  return sink.getvalue()


def _digest(content: pa.Buffer | bytes) -> str:
  # SHA-256 and not BLAKE2: processors have instructions for it, and a shard is
  # hashed at every read (see `benchmarks/checksums.py`).
  return hashlib.sha256(content).hexdigest()[:32]


def _shard(folder: Path, begun: str, table: pa.Table) -> tuple[Path, pa.Buffer]:
  """Returns a shard's path, its digest in the name, and its bytes."""
  content = _encoded(table)
  return folder / f"shard-{begun}-{_digest(content)}.parquet", content


def _write(path: Path, content: pa.Buffer) -> None:
  with atomic_file(path) as file:
    file.write(content)


class ShardWriter(Generic[RecordT]):
  """Collects rows and lands them as shards; a context manager.

  A shard lands when it is full, when the block ends (by an error too: rows
  that were added are good), and every `flush_seconds` from a thread of its
  own, however long the next row takes. One writer a folder at a time:
  `RunDir.shard_writer` sees to that.

  Args:
    folder: where the shards go; unfinished ones of a killed process are
      removed.
    record_cls: the record kind of the rows.
    rows_per_shard: rows of a full shard.
    flush_seconds: the longest that a row stays in memory only.
  """

  def __init__(
    self,
    folder: Path,
    record_cls: type[RecordT],
    rows_per_shard: int = 256,
    flush_seconds: float = 20.0,
  ):
    self._folder = folder
    self._record_cls = record_cls
    self._rows_per_shard = rows_per_shard
    self._flush_seconds = flush_seconds
    self._rows: list[RecordT] = []
    self._mutex = threading.Lock()
    self._closing = threading.Event()
    self._failure: Exception | None = None
    self._clock = threading.Thread(target=self._flush_often, daemon=True)
    self._numbers = itertools.count()

  def __enter__(self) -> Self:
    self._folder.mkdir(parents=True, exist_ok=True)
    # Safe, for this process holds the stage: who began them is gone.
    for path in self._folder.glob(_SHARDS + ".*"):
      if ownership.is_unfinished(path):
        path.unlink()
    self._clock.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._closing.set()
    # First the thread, whose failure the last flush raises again.
    self._clock.join()
    self.flush()

  def add(self, row: RecordT) -> None:
    """Adds a row, and lands a shard if that is full.

    Raises:
      TypeError: the row is of another kind.
      UserError: this or an earlier row could not be written, as on a full disk.
      ValueError: the row doesn't fit its schema.
    """
    if type(row) is not self._record_cls:
      raise TypeError(f"{row!r} is no {self._record_cls.__name__}")
    with self._mutex:
      self._rows.append(row)
      full = len(self._rows) >= self._rows_per_shard
    if full or self._failure:
      self.flush()

  def flush(self) -> None:
    """Lands the rows that are still in memory, if any.

    Raises:
      FileNotFoundError: the folder is not there any more.
      UserError: it can't be written.
    """
    with self._mutex:
      if self._failure:
        raise self._failure
      if not self._rows:
        return
      # Time first, so that shards sort in the order of their writing.
      name = f"{time.time_ns():020d}-{os.getpid()}-{next(self._numbers):06d}"
      # Outside of the `try`: a row that doesn't fit is no fault of the disk.
      table = records.to_table(self._rows, self._record_cls)
      path, content = _shard(self._folder, name, table)
      disk_faults.check_folder(self._folder)
      try:
        _write(path, content)
      except OSError as error:
        raise UserError(
          f"{self._folder} cannot be written ({error.strerror or error}): make"
          " room or correct it; the rows that are there are kept, and the same"
          " command goes on from there"
        ) from error
      # Only now: where writing failed they are still here, for another try.
      self._rows.clear()

  def _flush_often(self) -> None:
    """Lands rows every `flush_seconds`, on a thread of its own."""
    while not self._closing.wait(self._flush_seconds):
      try:
        self.flush()
      # Nobody would see it here: `add` and `flush` raise it again.
      except Exception as error:
        self._failure = error
        return


def read_table(
  path: Path,
  record_cls: type[RecordT],
  columns: Sequence[str] | None = None,
) -> pa.Table:
  """Reads one parquet file of records.

  Raises:
    UserError: the file is damaged, or holds another record kind or version.
  """
  with _parquet(path) as file:
    records.check_schema(record_cls, file.schema_arrow, str(path))
    return file.read(columns=columns)


def read_shards(
  folder: Path,
  record_cls: type[RecordT],
  columns: Sequence[str] | None = None,
) -> pa.Table:
  """Reads all rows of a folder's shards, by ascending key, each key once.

  Of rows with the same key the one that was written first stays.

  Raises:
    UserError: a shard is damaged, or holds another record kind or version.
  """
  schema, key = records.schema(record_cls), record_cls.KEY
  wanted = list(columns or schema.names)
  read = [key, *(name for name in wanted if name != key)]
  tables = [
    read_table(path, record_cls, read) for path in sorted(folder.glob(_SHARDS))
  ]
  # Shards sort by the time of their writing, so the first with a key is the row
  # that later stages may have read already.
  first: dict[str, tuple[int, int]] = {}
  for number, table in enumerate(tables):
    for row, name in enumerate(table[key].to_pylist()):
      first.setdefault(name, (number, row))
  # Slices of the shards, with neighbours joined. To take rows by their numbers
  # would put all shards into one array first, and arrow's lists and strings end
  # at 2^31 elements.
  runs: list[tuple[int, int, int]] = []
  for name in sorted(first):
    number, row = first[name]
    if runs and runs[-1][::2] == (number, row):
      runs[-1] = (number, runs[-1][1], row + 1)
    else:
      runs.append((number, row, row + 1))
  # `schema.empty_table` would import pandas, half a second for nothing.
  empty = pa.Table.from_batches([], schema=schema).select(read)
  slices = (tables[n].slice(start, end - start) for n, start, end in runs)
  return pa.concat_tables([empty, *slices]).select(wanted)


def names(folder: Path) -> list[str]:
  """Returns the names of a folder's shards, in the order of their writing."""
  return sorted(path.name for path in folder.glob(_SHARDS))


def replace_rows(
  folder: Path,
  record_cls: type[RecordT],
  rows: Sequence[RecordT],
  announce: Callable[[str], None] = lambda name: None,
) -> None:
  """Replaces all rows of a folder's shards.

  A reader sees the old rows or the new ones. A process that is killed midway
  leaves the old rows, or the new ones beside shards that they hide.

  Args:
    folder: the folder.
    record_cls: the record kind of the rows.
    rows: the new rows.
    announce: called with the new shard's name before it is written.

  Raises:
    UserError: a shard is damaged, or holds another record kind or version.
  """
  for old in folder.glob(_SHARDS):
    read_table(old, record_cls, [])  # refuses foreign rows before any is lost
  if (zero := folder / _FORMERLY_REPLACED).exists():
    zero.rename(folder / f"shard-{_BEFORE_ALL_TIMES - 1:020d}-replaced.parquet")
  former = sorted(folder.glob(_SHARDS))
  # Before the first: rows that have replaced others may be replaced, too.
  first = min([_BEFORE_ALL_TIMES, *map(_number, former)])
  table = records.to_table(rows, record_cls)
  path, content = _shard(folder, f"{first - 1:020d}-0-000000", table)
  announce(path.name)
  _write(path, content)
  for old in former:
    if old != path:
      old.unlink()


def _number(path: Path) -> int:
  """Returns what a shard's name sorts by; a strange name sorts last."""
  number = path.name.split("-")[1]
  return int(number) if number.isdecimal() else _BEFORE_ALL_TIMES


def keep_rows(folder: Path, record_cls: type[RecordT], wanted: Set[str]) -> int:
  """Removes the rows of other keys than those that are wanted.

  Goes shard by shard, each of which is whole before and after: a process that
  is killed midway has removed some of the rows, and can be started again.

  Returns:
    How many rows were removed.
  """
  removed = 0
  for path in sorted(folder.glob(_SHARDS)):
    # The column of keys first: most shards keep all rows and need no more.
    keys = read_table(path, record_cls, [record_cls.KEY])[0].to_pylist()
    kept = [key in wanted for key in keys]
    if all(kept):
      continue
    removed += kept.count(False)
    if any(kept):
      table = read_table(path, record_cls).filter(pa.array(kept))
      # Under the same time, so that the order of writing stays.
      begun = path.stem.removeprefix("shard-")
      if match := _DIGEST.fullmatch(path.name):
        begun = begun.removesuffix(f"-{match[1]}")
      new, content = _shard(folder, begun, table)
      _write(new, content)
    path.unlink()
  return removed


def read_keys(folder: Path) -> set[str]:
  """Reads the keys of all rows of a folder's shards, of any record kind."""
  keys: set[str] = set()
  for path in folder.glob(_SHARDS):
    with _parquet(path) as file:
      keys.update(file.read(columns=[_key_name(file)])[0].to_pylist())
  return keys


def check_bytes(path: Path) -> None:
  """Compares a shard's bytes with the digest in its name.

  Raises:
    UserError: they differ, or the file can't be read.
  """
  with _parquet(path):
    pass


def digest(folder: Path) -> tuple[int, str]:
  """Computes a digest of a folder's rows, however shards divide them.

  A shard at a time, since what a teacher held likeliest can be more than the
  memory holds.

  Returns:
    How many rows there are, each key counted once, and the digest.

  Raises:
    UserError: a shard is damaged.
  """
  first: dict[str, bytes] = {}
  for path in sorted(folder.glob(_SHARDS)):
    with _parquet(path) as file:
      table = file.read()
      keys = table[_key_name(file)].to_pylist()
      for key, row in zip(keys, records.row_digests(table), strict=True):
        first.setdefault(key, row)
  return len(first), records.digest_of(first)


def _key_name(file: pq.ParquetFile) -> str:
  # It stands in the file: problems are known by another than samples.
  metadata = file.schema_arrow.metadata or {}
  return metadata.get(b"trd_jax.key", b"key").decode()


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
  """Opens a parquet file; makes whatever is wrong with it a `UserError`.

  The bytes that are compared with the digest are those that are parsed: the
  file is read once, and nothing of a damaged one reaches the parser.
  """
  try:
    with pa.OSFile(str(path)) as source:
      content = source.read_buffer()
    match = _DIGEST.fullmatch(path.name)
    if match and _digest(content) != match[1]:
      raise OSError("its bytes are not those that were written")
    with pq.ParquetFile(
      pa.BufferReader(content), page_checksum_verification=True
    ) as file:
      yield file
  # ValueError: text that is no UTF-8.
  except (pa.ArrowException, OSError, IndexError, ValueError) as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(
      f"{path} cannot be read ({reason}): {_remedy(path)}"
    ) from error


def _remedy(path: Path) -> str:
  """Returns what to do about a damaged file of rows.

  A shard that its finished stage has listed is missed when it is gone: the
  pipeline makes it again, a later stage says which to run. What no list names
  is made again only where the stage isn't done.
  """
  done = path.parent / "done.json"
  listed = not done.exists() or path.name.encode() in done.read_bytes()
  return (
    f"remove it{'' if listed else ' and done.json beside it'} and give the same"
    " command again"
  )
