"""Writes and reads rows as parquet shards that appear whole or not at all.

A shard is written under a name that no reader looks for, flushed to the disk
and renamed. A process that is killed at any moment loses only the rows of one
unfinished shard. A row that was written twice is read once.
"""

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Generic, Self

import pyarrow as pa
import pyarrow.parquet as pq

from trd_jax.experiment import records
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import ownership
from trd_jax.experiment.files.atomic_files import atomic_file
from trd_jax.experiment.records import RecordT

_SHARDS = "shard-*.parquet"
# Sorts before all others, so that its rows are the ones that are read.
_REPLACED = "shard-" + 20 * "0" + "-replaced.parquet"


def write_table(path: Path, table: pa.Table) -> None:
  """Writes one parquet file (zstd), atomically."""
  with atomic_file(path) as file:
    pq.write_table(table, file, compression="zstd")


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
    """Lands the rows that are still in memory, if any."""
    with self._mutex:
      if self._failure:
        raise self._failure
      if not self._rows:
        return
      # Time first, so that shards sort in the order of their writing.
      name = f"{time.time_ns():020d}-{os.getpid()}-{next(self._numbers):06d}"
      # Outside of the `try`: a row that doesn't fit is no fault of the disk.
      table = records.to_table(self._rows, self._record_cls)
      try:
        write_table(self._folder / _SHARDS.replace("*", name), table)
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
  empty = schema.empty_table().select(read)
  slices = (tables[n].slice(start, end - start) for n, start, end in runs)
  return pa.concat_tables([empty, *slices]).select(wanted)


def replace_rows(
  folder: Path, record_cls: type[RecordT], rows: Sequence[RecordT]
) -> None:
  """Replaces all rows of a folder's shards.

  A reader sees the old rows or the new ones. A process that is killed midway
  leaves the old rows, or the new ones beside shards that they hide.

  Raises:
    UserError: a shard is damaged, or holds another record kind or version.
  """
  path = folder / _REPLACED
  former = [old for old in folder.glob(_SHARDS) if old != path]
  for old in former:
    read_table(old, record_cls, [])  # refuses foreign rows before any is lost
  write_table(path, records.to_table(rows, record_cls))
  for old in former:
    old.unlink()


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
      table = read_table(path, record_cls)
      write_table(path, table.filter(pa.array(kept)))
    else:
      path.unlink()
  return removed


def read_keys(folder: Path) -> set[str]:
  """Reads the keys of all rows of a folder's shards, of any record kind."""
  keys: set[str] = set()
  for path in folder.glob(_SHARDS):
    with _parquet(path) as file:
      # The name of the key's column stands in the file: problems are known by
      # another than samples.
      name = (file.schema_arrow.metadata or {}).get(b"trd_jax.key", b"key")
      keys.update(file.read(columns=[name.decode()])[0].to_pylist())
  return keys


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
  """Opens a parquet file; makes whatever is wrong with it a `UserError`."""
  try:
    with pq.ParquetFile(path) as file:
      yield file
  except (pa.ArrowException, OSError, IndexError) as error:
    raise UserError(
      f"{path} cannot be read ({str(error).splitlines()[0]}): remove it and "
      "run its stage again"
    ) from error
