"""The run directory: the only place that spells a path.

    config.json               the experiment that the directory belongs to
    problems/                 the problems, as rows
    rollout/ refine/          trajectories, as rows
    train/checkpoints/        adapter, optimizer, cursor
    teacher_cache/            the teacher's hidden states (`teacher_cache`)
    merge/adapter/ model/     the PEFT adapter; the merged student
    evaluate/base/ trained/   graded samples, as rows
    models/random-<size>/     randomly initialised models
    summary.json timings.jsonl locks/

Beside its rows a stage has `rejected.parquet` (what it set aside), possibly
`metrics.jsonl` or `preflight.json` (what it was about to do), and, last of all,
`done.json`. What is visible is whole: a file is written under another name,
flushed to the disk, and renamed.
"""

import contextlib
import errno
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import pyarrow as pa

from trd_jax import (
  experiment,
  file_locks,
  json_text,
  ownership,
  records,
  shards,
)
from trd_jax.errors import UserError
from trd_jax.records import RecordT, Rejected
from trd_jax.shards import ShardWriter

_STAGE_NAME = re.compile(r"[a-z0-9_-]+(/[a-z0-9_-]+)*")
_MOST_DIFFERENCES = 6

# Locks of this process, so that taking one again is no conflict: POSIX locks
# know processes only. With the process's id, for a fork inherits the table
# and not the locks.
_held: set[tuple[int, Path]] = set()


def write_json_atomic(path: Path, value: Any) -> None:
  """Writes JSON so that a reader sees the old file or the new, whole.

  Raises:
    TypeError: the value is not JSON-serialisable.
    ValueError: it holds a NaN or an infinity.
  """
  text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
  with shards.atomic_file(path) as file:
    file.write((text + "\n").encode())


def read_json(path: Path) -> Any:
  """Reads JSON that `write_json_atomic` wrote.

  Raises:
    UserError: it is absent or damaged.
  """
  try:
    return json_text.loads(path.read_bytes())
  except FileNotFoundError:
    raise UserError(f"{path} is not there: run its stage first") from None
  except ValueError as error:
    raise UserError(f"{path} is not JSON ({error}): remove it") from None


class RunDir:
  """The directory of one experiment.

  Args:
    root: the directory; it is made when something is written into it.
    config_json: where given, the directory is claimed for it at once.
  """

  def __init__(self, root: Path | str, config_json: str | None = None):
    self.root = Path(root)
    self._made: list[Path] = []  # folders that the claim has made, inner first
    if config_json is not None:
      self.claim(config_json)

  def __repr__(self) -> str:
    return f"RunDir({str(self.root)!r})"

  # -- whose it is ---------------------------------------------------------

  def claim(self, experiment_json: str) -> bool:
    """Makes the directory this experiment's, or sees that it is.

    Keys that say only how a run is carried out may differ (see
    `experiment.RUNTIME_KEYS`); the file keeps what it was first made with.

    Returns:
      Whether this call made it this experiment's.

    Raises:
      UserError: it belongs to another experiment (the differing keys are
        named with both values), cannot be written, or holds, where it is no
        run's yet, something foreign under a name of ours.
    """
    self.check(experiment_json)
    is_new = not self.config.exists()
    root = self.root.absolute()
    mine = (self.problems_dir, self.root / "locks", root, *root.parents)
    self._made = [path for path in mine if not os.path.lexists(path)]
    try:
      if is_new:
        mine = self.root / f"config.json.{uuid.uuid4().hex}"
        with shards.atomic_file(mine) as file:
          file.write(experiment_json.encode())
        # A rename would replace what another process has claimed meanwhile.
        with contextlib.suppress(FileExistsError):
          self.config.hardlink_to(mine)
        mine.unlink()
    except OSError as error:
      raise self._unwritable(error.strerror) from error
    self.check(experiment_json)
    return is_new

  def check(self, experiment_json: str) -> None:
    """Sees that the directory is this experiment's or could be, as it is.

    Raises:
      UserError: it belongs to another, or cannot be written (see `claim`).
    """
    root = self.root.absolute()
    there = next(p for p in (root, *root.parents) if os.path.lexists(p))
    if not os.path.isdir(there):  # which is False where it can't be seen
      raise self._unwritable(os.strerror(errno.ENOTDIR))
    if not os.access(there, os.W_OK | os.X_OK):
      raise self._unwritable(os.strerror(errno.EACCES))
    if not ownership.is_config(self.config):
      try:
        named = [self.config] if os.path.lexists(self.config) else []
        strange = next(iter([*named, *ownership.foreign(self.root)]), None)
      except OSError as error:
        raise self._unwritable(error.strerror) from error
      if not ownership.is_config(self.config):  # nor claimed meanwhile
        if strange is None:
          return
        raise UserError(
          f"--workdir={self.root} is no run's of trd-jax, and {strange} is"
          " there, where a run would write; name another, or move that away"
        )
    if differences := experiment.differences(
      read_json(self.config), json.loads(experiment_json)
    ):
      shown = ", ".join(differences[:_MOST_DIFFERENCES])
      if more := len(differences) - _MOST_DIFFERENCES:
        shown += f" and {more} more" if more > 0 else ""
      raise UserError(
        f"--workdir={self.root} was made by another config: {shown}; name "
        "another --workdir, or go back to that config"
      )

  def _unwritable(self, why: str | None) -> UserError:
    if os.path.isfile(self.root):
      why = "it is a file, not a folder; name another"
    return UserError(f"--workdir={self.root} cannot be written: {why}")

  def abandon(self) -> None:
    """Gives up a claim under which no sample has been made.

    For a config that turned out to be unusable, or was only looked at:
    mending it must not count as another config in the same place. Problems
    that were read are forgotten, reports of a preflight stay, and of all
    others what is not this program's. Nothing happens while another process
    is at work here.
    """
    with self._alone() as locks:
      if locks is None or ownership.has_results(self.root):
        return
      problems = ownership.problems_in(self.problems_dir)
      for path in (*problems, self.config, self.timings, *locks):
        path.unlink(missing_ok=True)
    for folder in self._made:
      with contextlib.suppress(OSError):  # not empty, or not there
        folder.rmdir()

  @contextlib.contextmanager
  def lock(self, name: str) -> Iterator[None]:
    """Holds a stage for this process; a process that ends lets go.

    A process that holds it already may take it again. Not inherited by
    children.

    Raises:
      UserError: another process holds it; its id is named.
    """
    path = self.root / "locks" / f"{self._checked(name, '-')}.lock"
    token = (os.getpid(), path.absolute())
    if token in _held:
      yield
      return
    if path.exists() and not file_locks.is_signature(path):
      raise UserError(f"{path} is no lock of trd-jax; move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = file_locks.acquire(path)
    if file is None:
      raise UserError(
        f"{file_locks.holder(path)} is at work on {name} in {self.root}: wait"
        " for it, or stop it"
      )
    with file:
      file_locks.sign(file)
      _held.add(token)
      try:
        yield
      finally:
        _held.discard(token)

  @contextlib.contextmanager
  def _alone(self) -> Iterator[list[Path] | None]:
    """Holds every stage; the files that do it, or None where others hold one.

    A stage that this process holds anyhow is not among them.
    """
    with contextlib.ExitStack() as stack:
      files = []
      for path in sorted((self.root / "locks").glob("*.lock")):
        if (os.getpid(), path.absolute()) in _held:
          continue  # opening and closing it would let go of it
        if not file_locks.is_signature(path):
          continue
        file = file_locks.acquire(path)
        if file is None:
          yield None
          return
        stack.enter_context(file)
        files.append(path)
      yield files

  # -- paths ---------------------------------------------------------------

  def stage(self, name: str) -> Path:
    """The folder of a stage, such as 'rollout' or 'evaluate/base'."""
    return self.root / self._checked(name, "/")

  @property
  def config(self) -> Path:
    """The experiment that the directory belongs to, as JSON."""
    return self.root / "config.json"

  @property
  def problems_dir(self) -> Path:
    """The folder of the stage 'problems'."""
    return self.stage("problems")

  @property
  def checkpoints(self) -> Path:
    """Folder of the training checkpoints."""
    return self.stage("train") / "checkpoints"

  @property
  def teacher_cache(self) -> Path:
    """Folder of the caches of teachers, where `train.cache_dir` is None."""
    return self.root / "teacher_cache"

  @property
  def adapter(self) -> Path:
    """Folder of the PEFT adapter."""
    return self.stage("merge") / "adapter"

  @property
  def merged(self) -> Path:
    """Folder of the merged student, as Hugging Face reads it."""
    return self.stage("merge") / "model"

  @property
  def summary(self) -> Path:
    """JSON of what the pipeline found."""
    return self.root / "summary.json"

  @property
  def sweep(self) -> Path:
    """JSON of what the points of a sweep found."""
    return self.root / "sweep.json"

  @property
  def sweep_plot(self) -> Path:
    """The same as a figure."""
    return self.root / "sweep.svg"

  @property
  def rounds(self) -> Path:
    """JSON of what each round found, and which is the best."""
    return self.root / "rounds.json"

  def round(self, number: int) -> "RunDir":
    """The directory of a round; the first is this one itself."""
    if number == 1:
      return self
    return RunDir(self.stage("rounds") / str(number))

  @property
  def timings(self) -> Path:
    """JSON lines of where the time went (see `metrics.Stopwatch`)."""
    return self.root / "timings.jsonl"

  def metrics_file(self, stage: str) -> Path:
    """JSON lines of a stage's metrics (see `metrics.MetricWriter`)."""
    return self.stage(stage) / "metrics.jsonl"

  def preflight(self, stage: str) -> Path:
    """JSON of what a stage is about to do (see `preflight.Report`)."""
    return self.stage(stage) / "preflight.json"

  def stage_summary(self, stage: str) -> Path:
    """JSON of what an evaluation found (see `scores`)."""
    return self.stage(stage) / "summary.json"

  def comparison(self, stage: str) -> Path:
    """JSON of an evaluation beside another run's."""
    return self.stage(stage) / "comparison.json"

  def rejected(self, stage: str) -> Path:
    """Parquet file of the rows that a stage set aside."""
    return self.stage(stage) / "rejected.parquet"

  def model_folder_for_random(self, name: str) -> Path:
    """Folder of the randomly initialised model `random:<name>`."""
    return self.stage("models") / f"random-{self._checked(name, '-')}"

  # -- rows ----------------------------------------------------------------

  @contextlib.contextmanager
  def shard_writer(
    self,
    stage: str,
    record_cls: type[RecordT],
    rows_per_shard: int = 256,
    flush_seconds: float = 20.0,
  ) -> Iterator[ShardWriter[RecordT]]:
    """A writer of the stage's rows, which holds the stage's lock.

    Raises:
      UserError: another process holds the stage.
    """
    folder = self.stage(stage)
    with (
      self.lock(stage),
      ShardWriter(folder, record_cls, rows_per_shard, flush_seconds) as writer,
    ):
      yield writer

  def read(self, stage: str, record_cls: type[RecordT]) -> list[RecordT]:
    """A stage's rows by ascending key, each key once.

    Raises:
      UserError: a shard is damaged, or holds another record kind or version.
    """
    return records.from_table(record_cls, self.table(stage, record_cls))

  def table(
    self,
    stage: str,
    record_cls: type[RecordT],
    columns: Sequence[str] | None = None,
  ) -> pa.Table:
    """As `read`, in columns: for a large run, or a few columns of it."""
    return shards.read_shards(self.stage(stage), record_cls, columns)

  def keys(self, stage: str) -> set[str]:
    """The keys of the rows that a stage has on disk."""
    return shards.read_keys(self.stage(stage))

  def replace(
    self, stage: str, record_cls: type[RecordT], rows: Sequence[RecordT]
  ) -> None:
    """Puts rows in the place of all that a stage has (`shards.replace_rows`).

    Raises:
      UserError: another process holds the stage.
    """
    with self.lock(stage):
      shards.replace_rows(self.stage(stage), record_cls, rows)

  def keep(
    self, stage: str, record_cls: type[RecordT], wanted: Set[str]
  ) -> int:
    """Removes a stage's rows of other keys (`shards.keep_rows`).

    Returns:
      How many rows were removed.

    Raises:
      UserError: another process holds the stage.
    """
    with self.lock(stage):
      return shards.keep_rows(self.stage(stage), record_cls, wanted)

  def write_rejected(self, stage: str, rows: Sequence[Rejected]) -> None:
    """Sets rows aside, in the place of those that were there."""
    shards.write_table(self.rejected(stage), records.to_table(rows, Rejected))

  def read_rejected(self, stage: str) -> list[Rejected]:
    """The rows that a stage set aside."""
    path = self.rejected(stage)
    if not path.exists():
      return []
    return records.from_table(Rejected, shards.read_table(path, Rejected))

  # -- what is done --------------------------------------------------------

  def done(self, stage: str) -> dict[str, Any] | None:
    """What a finished stage said of itself; None for an unfinished one."""
    path = self.stage(stage) / "done.json"
    return read_json(path) if path.exists() else None

  def mark_done(self, stage: str, summary: Mapping[str, Any]) -> None:
    """Declares a stage finished: its last write."""
    write_json_atomic(self.stage(stage) / "done.json", dict(summary))

  def adopt(self, stage: str, donor: "RunDir") -> bool:
    """Takes a finished stage over from another directory, whole or not at all.

    Files are linked where the file system can, so they take no room twice; no
    stage ever changes a file that it has finished.

    Returns:
      Whether it did: not where the donor hasn't finished the stage, or this
      directory has begun it.
    """
    mine = Path(os.path.realpath(self.stage(stage)))
    theirs = donor.stage(stage)
    if donor.done(stage) is None or (mine.exists() and any(mine.iterdir())):
      return False
    try:
      shards.copy_folder(theirs, mine)
    except OSError:
      if not mine.is_dir() or not any(mine.iterdir()):
        raise
      return False  # another process has begun it meanwhile
    return True

  @staticmethod
  def _checked(name: str, slash: str) -> str:
    if not _STAGE_NAME.fullmatch(name):
      raise ValueError(f"{name!r} is no name of a stage")
    return name.replace("/", slash)
