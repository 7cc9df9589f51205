"""The run directory, whose paths are spelt only here.

    config.json               the experiment that the directory belongs to
    problems/                 the problems, as rows
    rollout/ refine/          trajectories, as rows
    train/checkpoints/        adapter, optimizer, cursor
    teacher_cache/            the teacher's hidden states (`teacher_cache`)
    merge/adapter/ model/     the PEFT adapter; the merged student
    evaluate/base/ trained/   graded samples, as rows
    analyze/scores/           per-token numbers of some trajectories, as rows
    models/random-<size>/     randomly initialised models
    rounds/<number>/          further rounds, a directory each
    summary.json timings.jsonl locks/
    log/<stage>.txt           what the stage's commands printed

Beside its rows a stage has `rejected.parquet` (rows that it set aside), perhaps
`metrics.jsonl` or `preflight.json` (what it was about to do), and `done.json`,
which is written last. What is visible is whole: a file is written under another
name, flushed to the disk, and renamed.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import pyarrow as pa

from trd_jax.experiment import (
  declarations,
  records,
  scopes,
  shards,
  stage_log,
)
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import atomic_files, file_locks, ownership
from trd_jax.experiment.files.json_files import read_json, write_json
from trd_jax.experiment.records import RecordT, Rejected
from trd_jax.experiment.shards import ShardWriter
from trd_jax.experiment.workdir_config import WorkdirConfig

_STAGE_NAME = re.compile(r"[a-z0-9_-]+(/[a-z0-9_-]+)*")
# What a stage has made; all else that it leaves is a report, written anew.
_DONE = "done.json"
# In the file above, beside the stage's summary: the keys that it was made by,
# the weights that it read or wrote, what it has left on disk, and a digest of
# all the rest of the file.
_MADE_BY, _WEIGHTS, _LEFT, _DIGEST = "made_by", "weights", "left", "digest"
# Who reads the folders that a stage leaves beside rows.
_READERS = {"train": "merge", "merge": "evaluate/trained"}
_ARTIFACTS = (_DONE, "shard-*.parquet", "*.safetensors")

# Locks that this process holds, so that it can take one again: POSIX locks know
# only processes, and closing the file a second time would release the lock. The
# process's id is part of an entry because a fork inherits this table, but not
# the locks.
_held: set[tuple[int, Path]] = set()


class RunDir:
  """The directory of one experiment.

  Args:
    root: the directory; it is made when something is written into it.
    config_json: where given, the directory is claimed for it at once.
  """

  def __init__(self, root: Path | str, config_json: str | None = None):
    self.root = Path(root)
    self._own_config = WorkdirConfig(
      self.root,
      self.config,
      self.root / "locks" / "config",
      self._made,
      self._others_at_work,
    )
    # Folders that the claim has made, inner ones first, and the logs that were
    # there before.
    self._new_folders: list[Path] = []
    self._old_logs: set[Path] = set()
    if config_json is not None:
      self.claim(config_json)

  def __repr__(self) -> str:
    return f"RunDir({str(self.root)!r})"

  # -- whose it is ---------------------------------------------------------

  def claim(self, experiment_json: str) -> bool:
    """Claims the directory for an experiment, or checks that it is its own.

    Returns:
      Whether this call made it this experiment's.

    Raises:
      UserError: what is there was made by another experiment, somebody is at
        work there under another config, it cannot be written, or it holds,
        where it is no run's yet, something foreign under a name of ours.
    """
    root = self.root.absolute()
    # Noted before they are made, so that `abandon` removes only folders that
    # this claim has made. Inner ones come first: they have to be empty first.
    inside = (self.problems_dir, self.root / "locks", self.root / "log")
    mine = (*inside, root, *root.parents)
    new = [path for path in mine if not os.path.lexists(path)]
    self._old_logs = set((self.root / "log").glob("*.txt"))
    is_new = self._own_config.make(experiment_json)
    self._new_folders = new
    return is_new

  def check(self, experiment_json: str) -> bool:
    """Checks that the directory is this experiment's or could become so.

    Returns:
      Whether it has another config, which `claim` would replace.

    Raises:
      UserError: see `claim`.
    """
    return self._own_config.check(experiment_json)

  def restore_config(self) -> None:
    """Writes `config` anew where it is gone and its copy is there.

    Raises:
      UserError: the directory can't be written.
    """
    self._own_config.restore()

  def check_config(self) -> None:
    """Compares `config` with its copy, where there is one.

    Raises:
      UserError: it is damaged, was edited, or is gone.
    """
    self._own_config.check_bytes()

  def abandon(self, logs: bool = True) -> bool:
    """Gives up a claim under which no sample has been made.

    For a config that turned out to be unusable, or was only looked at: when it
    is mended, that must not count as another config in the same place. Problems
    that were read are removed. Reports of a preflight stay, and so does
    everything that is not this program's. Nothing happens while another process
    is at work here.

    Args:
      logs: whether to remove the logs that were begun since the claim.

    Returns:
      Whether the claim is given up.
    """
    with self._alone() as locks:
      if locks is None or self._own_config.give_back():
        return False
      if ownership.has_results(self.root):
        return False
      problems = ownership.problems_in(self.problems_dir)
      new_logs = set((self.root / "log").glob("*.txt")) - self._old_logs
      mine = [path for path in new_logs if logs and stage_log.is_log(path)]
      for path in (*problems, self.config, self.timings, *locks, *mine):
        path.unlink(missing_ok=True)
      self._own_config.forget()
    for folder in self._new_folders:
      with contextlib.suppress(OSError):  # not empty, or not there
        folder.rmdir()
    return True

  @contextlib.contextmanager
  def lock(self, name: str) -> Iterator[None]:
    """Locks a stage for this process; the end of the process releases it.

    A process may take again what it holds. Children don't inherit the lock.

    Raises:
      UserError: another process holds the stage; its id is named.
    """
    path = self.root / "locks" / f"{self._checked(name, '-')}.lock"
    token = (os.getpid(), path.absolute())
    if token in _held:
      yield
      return
    # To lock is to write into it, so a file of somebody's is left alone.
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
      # After the lock: see `WorkdirConfig.hold` for why this order.
      self._own_config.hold()
      _held.add(token)
      try:
        yield
      finally:
        _held.discard(token)

  @contextlib.contextmanager
  def _alone(self) -> Iterator[list[Path] | None]:
    """Locks every stage that has been locked before.

    Yields the locked files, without those that this process held already; None
    where another process holds a stage.
    """
    with contextlib.ExitStack() as stack:
      files = []
      for path in sorted((self.root / "locks").glob("*.lock")):
        if (os.getpid(), path.absolute()) in _held:
          continue  # to open and close the file would release the lock
        if not file_locks.is_signature(path):
          continue
        file = file_locks.acquire(path)
        if file is None:
          yield None
          return
        stack.enter_context(file)
        files.append(path)
      yield files

  def _others_at_work(self) -> bool:
    """Returns whether another process holds a stage."""
    with self._alone() as locks:
      return locks is None

  def _made(self) -> list[str]:
    """Returns the stages that have left artifacts, which depend on keys."""
    return [name for name in scopes.STAGES if _has_artifacts(self.stage(name))]

  # -- paths ---------------------------------------------------------------

  def stage(self, name: str) -> Path:
    """Returns the folder of a stage, such as 'rollout' or 'evaluate/base'."""
    return self.root / self._checked(name, "/")

  @property
  def config(self) -> Path:
    """Returns the file of the experiment that the directory belongs to."""
    return self.root / "config.json"

  @property
  def problems_dir(self) -> Path:
    """Returns the folder of the stage 'problems'."""
    return self.stage("problems")

  @property
  def checkpoints(self) -> Path:
    """Returns the folder of the training checkpoints."""
    return self.stage("train") / "checkpoints"

  @property
  def teacher_cache(self) -> Path:
    """Returns the folder of teacher caches, for a `train.cache_dir` of None."""
    return self.root / "teacher_cache"

  @property
  def adapter(self) -> Path:
    """Returns the folder of the PEFT adapter."""
    return self.stage("merge") / "adapter"

  @property
  def merged(self) -> Path:
    """Returns the folder of the merged student, as Hugging Face reads it."""
    return self.stage("merge") / "model"

  @property
  def summary(self) -> Path:
    """Returns the JSON file of what the pipeline found."""
    return self.root / "summary.json"

  @property
  def sweep(self) -> Path:
    """Returns the JSON file of what the points of a sweep found."""
    return self.root / "sweep.json"

  @property
  def sweep_plot(self) -> Path:
    """Returns the figure of what the points of a sweep found."""
    return self.root / "sweep.svg"

  @property
  def rounds(self) -> Path:
    """Returns the JSON file of what each round found, and the best round."""
    return self.root / "rounds.json"

  def round(self, number: int) -> "RunDir":
    """Returns the directory of a round; the first is this one itself."""
    if number == 1:
      return self
    return RunDir(self.stage("rounds") / str(number))

  def round_before(self, number: int) -> "RunDir":
    """Returns the directory of the round before this one, which is `number`."""
    # Found by its place, so that a run can be moved with all its rounds.
    return RunDir(self.root.absolute().parents[1]).round(number - 1)

  @property
  def parts(self) -> Path:
    """Returns the JSON file of the problems of each split round."""
    return self.stage("rounds") / "parts.json"

  @property
  def timings(self) -> Path:
    """Returns the JSON lines of where time went (see `metrics.Stopwatch`)."""
    return self.root / "timings.jsonl"

  def log(self, stage: str) -> Path:
    """Returns the text file of what a stage's commands printed."""
    return self.root / "log" / f"{self._checked(stage, '-')}.txt"

  def metrics_file(self, stage: str) -> Path:
    """Returns the JSON lines of a stage's `metrics.MetricWriter`."""
    return self.stage(stage) / "metrics.jsonl"

  def preflight(self, stage: str) -> Path:
    """Returns the JSON file of a stage's `preflight.PreflightReport`."""
    return self.stage(stage) / "preflight.json"

  def stage_summary(self, stage: str) -> Path:
    """Returns the JSON file of what an evaluation found (see `scores`)."""
    return self.stage(stage) / "summary.json"

  def comparison(self, stage: str) -> Path:
    """Returns the JSON file of an evaluation beside another run's."""
    return self.stage(stage) / "comparison.json"

  def rejected(self, stage: str) -> Path:
    """Returns the parquet file of the rows that a stage set aside."""
    return self.stage(stage) / "rejected.parquet"

  def model_folder_for_random(self, name: str) -> Path:
    """Returns the folder of the random model `random:<name>`."""
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
    """Yields a writer of a stage's rows, and holds the stage's lock.

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
    """Reads a stage's rows by ascending key, each key once.

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
    """Reads rows as `read` does, as columns: for large runs, or few columns."""
    return shards.read_shards(self.stage(stage), record_cls, columns)

  def keys(self, stage: str) -> set[str]:
    """Reads the keys of the rows that a stage has on disk."""
    return shards.read_keys(self.stage(stage))

  def replace(
    self, stage: str, record_cls: type[RecordT], rows: Sequence[RecordT]
  ) -> None:
    """Replaces all rows of a stage (see `shards.replace_rows`).

    Raises:
      UserError: another process holds the stage.
    """
    with self.lock(stage):
      folder = self.stage(stage)
      if not self.finished(stage):
        shards.replace_rows(folder, record_cls, rows)
        return
      record = self.record(stage)
      left = record.setdefault(_LEFT, {})

      def announce(name: str) -> None:
        # Before the rows: a process that is killed in between leaves a state
        # that this list describes, whether or not they have come.
        left["replaced_by"] = name
        self._write_record(stage, record)

      # Those that an earlier one left, which was killed, are among them.
      left["shards"] = shards.names(folder)
      shards.replace_rows(folder, record_cls, rows, announce)
      record[_LEFT] = _rows_in(folder)
      self._write_record(stage, record)

  def keep(
    self, stage: str, record_cls: type[RecordT], wanted: Set[str]
  ) -> int:
    """Removes a stage's rows but those of wanted keys (`shards.keep_rows`).

    Returns:
      How many rows were removed.

    Raises:
      UserError: another process holds the stage.
    """
    with self.lock(stage):
      return shards.keep_rows(self.stage(stage), record_cls, wanted)

  def write_rejected(self, stage: str, rows: Sequence[Rejected]) -> None:
    """Writes the rows that a stage set aside, over those of an earlier try."""
    shards.write_table(self.rejected(stage), records.to_table(rows, Rejected))

  def read_rejected(self, stage: str) -> list[Rejected]:
    """Reads the rows that a stage set aside."""
    path = self.rejected(stage)
    if not path.exists():
      return []
    return records.from_table(Rejected, shards.read_table(path, Rejected))

  # -- what is done --------------------------------------------------------

  def finished(self, stage: str) -> bool:
    """Returns whether a stage is finished, whichever config it was made by."""
    return (self.stage(stage) / _DONE).exists()

  def done(self, stage: str) -> dict[str, Any] | None:
    """Reads the summary of a finished stage; None if it isn't finished.

    Sees that the stage has left what is there now: names alone, for whoever
    reads a shard compares its bytes.

    Raises:
      UserError: the stage was made by a config that differs from the
        directory's in a key that it depends on, as when its folder was copied
        from another run; a shard of it is gone, or is there that isn't its;
        what it was made of has been made again since; or `done.json` is
        damaged.
    """
    if lost := self.lost(stage):
      raise UserError(f"{lost}; {_again(stage)}")
    return self._summary(stage)

  def complete(self, stage: str) -> dict[str, Any] | None:
    """Reads what `done` reads, for whoever would finish the stage.

    None, too, where something is gone that the stage has left (`lost`): it is
    to be made again.

    Raises:
      UserError: as `done`.
    """
    return None if self.lost(stage) else self._summary(stage)

  def _summary(self, stage: str) -> dict[str, Any] | None:
    if not self.finished(stage):
      return None
    path = self.stage(stage) / _DONE
    summary = self.record(stage)
    made_by, left, _ = (
      summary.pop(name, None) for name in (_MADE_BY, _LEFT, _WEIGHTS)
    )
    # Earlier versions left no keys; neither has a folder that no config claims.
    if made_by is not None and self.config.exists():
      self._own_config.check_made_by(path, stage, made_by)
    # Nor did they list what they left.
    if left is not None:
      self._check_left(stage, left)
    self._check_succession(stage, summary)
    return summary

  def lost(self, stage: str) -> str | None:
    """Says what a finished stage has left and is gone; None where nothing is.

    A checkpoint or weights count as long as a stage is to come that reads them:
    they are large, and one may remove them afterwards.
    """
    if not self.finished(stage):
      return None
    folder, left = self.stage(stage), self.record(stage).get(_LEFT) or {}
    gone = [name for name in left.get("shards", ()) if not _is(folder / name)]
    if (new := left.get("replaced_by")) and _is(folder / new):
      gone = []  # rows that replace all others are there
    if not gone and not self.finished(_READERS.get(stage, "none")):
      gone = [n for n in left.get("folders", ()) if not _is(folder / n)]
    if not gone:
      return None
    more = f" and {len(gone) - 1} more" if gone[1:] else ""
    return f"{folder / gone[0]}{more}, which {stage} had left, is not there"

  def _check_left(self, stage: str, left: Mapping[str, Any]) -> None:
    """Refuses rows that a finished stage hasn't left."""
    known = {*left.get("shards", ()), left.get("replaced_by")}
    folder = self.stage(stage)
    for name in shards.names(folder):
      if name not in known:
        raise UserError(
          f"{folder / name} is none of the shards that {stage} was finished"
          " with: move it away, and give the same command again"
        )

  def _check_succession(self, stage: str, summary: Mapping[str, Any]) -> None:
    """Refuses what was made of something that has been made again since."""
    path = self.stage(stage) / _DONE
    again = f"remove {path} and {_again(stage)}"
    if stage == "merge" and self.finished("train"):
      train = self.record("train")
      last = train.get("first_update", 0) + train.get("updates", 0)
      if "updates" in train and summary.get("step", last) != last:
        raise UserError(
          f"{path} is of the adapter after update {summary['step']}, and the"
          f" training has come to update {last}: {again}"
        )
    if stage == "evaluate/trained" and self.finished("merge"):
      weights = self.record("merge").get(_WEIGHTS, {})
      known = {_revision(fingerprint) for fingerprint in weights.values()}
      for figures in summary.values():
        used = isinstance(figures, dict) and figures.get("model_revision")
        if known and used and used not in known:
          raise UserError(
            f"{path} is of other weights than trd_jax.merge has left: {again}"
          )

  def check_weights(self, name: str, fingerprint: str) -> None:
    """Compares weights with those that finished stages have read or written.

    Args:
      name: folder or hub id, and the adapter's where there is one.
      fingerprint: of their content, see `hub.fingerprint`.

    Raises:
      UserError: they have changed since.
    """
    name = self._name_here(name)
    for stage in scopes.STAGES:
      if not self.finished(stage):
        continue
      then = self.record(stage).get(_WEIGHTS, {}).get(name, fingerprint)
      now = fingerprint
      if ":" not in then:  # an earlier version's, or of small files
        now = _revision(now)
      if then == now:
        continue
      if stage == "merge" and (own := name.partition("./")[2]):
        raise UserError(
          f"{self.root / own} has changed since trd_jax.merge wrote it"
          f" (revision {then}, now {now}): move it and"
          f" {self.stage(stage) / _DONE} away and {_again(stage)}"
        )
      raise UserError(
        f"{name} has changed since {stage} read it in {self.root} (revision"
        f" {then}, now {now}): put back what was there, or name another"
        " --workdir"
      )

  def _name_here(self, name: str) -> str:
    """Returns a model's name with what lies in this directory named from here.

    So that a directory can be moved.
    """
    own = f"{self.root}/"
    parts = name.split(" with ")
    return " with ".join(
      f"./{part.removeprefix(own)}" if part.startswith(own) else part
      for part in parts
    )

  def check_bytes(self, stage: str) -> None:
    """Compares the bytes of a stage's shards with the digests in their names.

    Raises:
      UserError: a shard is damaged.
    """
    for name in shards.names(self.stage(stage)):
      shards.check_bytes(self.stage(stage) / name)

  def made_by(self, stage: str) -> dict[str, Any]:
    """Returns the keys by dotted name that a finished stage was made by.

    Those that it recorded itself count: its folder may come from elsewhere.
    What it has not recorded, being of an earlier version, is the directory's.
    """
    recorded = self.record(stage).get(_MADE_BY)
    return recorded or declarations.flatten(read_json(self.config))

  def record(self, stage: str) -> dict[str, Any]:
    """Reads all that a finished stage recorded, whichever config made it.

    Raises:
      UserError: the file is damaged.
    """
    path = self.stage(stage) / _DONE
    remedy = f"remove it and {_again(stage)}"
    record = read_json(path, remedy)
    if not isinstance(record, dict):
      raise UserError(f"{path} is damaged: {remedy}")
    # Figures stand in this file, and a digit of them that has changed is still
    # JSON. Earlier versions wrote neither digest nor what the stage left.
    digest = record.pop(_DIGEST, None)
    is_older = digest is None and _LEFT not in record
    if not is_older and digest != records.content_key(record):
      raise UserError(
        f"{path} is damaged or was edited (it isn't what the stage wrote):"
        f" {remedy}"
      )
    return record

  def rows_left(self, stage: str) -> dict[str, Any]:
    """Reads `number` and `digest` of a finished stage's rows; {} of none."""
    left = self.record(stage).get(_LEFT) or {}
    return {key: left[key] for key in ("number", "digest") if key in left}

  def mark_done(
    self,
    stage: str,
    summary: Mapping[str, Any],
    folders: Sequence[str] = (),
    weights: Mapping[str, str] | None = None,
  ) -> None:
    """Declares a stage finished; this is its last write.

    The directory's keys are written with it, so that a folder that is copied
    to another run is not taken for that run's own; and what the stage leaves,
    so that what is gone or has come is seen.

    Args:
      stage: its name.
      summary: what it says of itself.
      folders: that it leaves beside rows, by their paths in its own.
      weights: fingerprints of what it read or wrote, by name
        (`check_weights`).

    Raises:
      FileNotFoundError: the directory was removed, or its disk unmounted, since
        this process has claimed it. What is written there is not whole then.
      UserError: one of its shards is damaged.
    """
    self._own_config.check_there()
    record = dict(summary)
    if stage in scopes.STAGES and self.config.exists():
      values = declarations.flatten(read_json(self.config))
      record[_MADE_BY] = {
        name: value
        for name, value in values.items()
        if not scopes.is_runtime(name)
      }
    if weights:
      record[_WEIGHTS] = {
        self._name_here(name): content for name, content in weights.items()
      }
    folder = self.stage(stage)
    left: dict[str, Any] = {"folders": list(folders)} if folders else {}
    # Where it leaves nothing, too: what has it has a digest (see `record`).
    record[_LEFT] = left | _rows_in(folder)
    self._write_record(stage, record)

  def _write_record(self, stage: str, record: Mapping[str, Any]) -> None:
    # As it will be read: JSON makes a key that is a number a text.
    as_read = json.loads(json.dumps(record, allow_nan=False))
    digest = records.content_key(as_read)
    write_json(self.stage(stage) / _DONE, {**as_read, _DIGEST: digest})

  def adopt(self, stage: str, donor: "RunDir") -> bool:
    """Takes a finished stage over from another directory, whole or not at all.

    Files are linked where the file system can, so that they take room once.
    That is safe because no stage changes a file that it has finished.

    Returns:
      Whether the stage was taken over: not if the donor hasn't finished it, nor
      if this directory has begun it.
    """
    # Where a stage's folder is a link, to a larger disk say, the copy is made
    # beside its target: a rename can't cross file systems.
    mine = Path(os.path.realpath(self.stage(stage)))
    theirs = donor.stage(stage)
    if not donor.finished(stage) or (mine.exists() and any(mine.iterdir())):
      return False
    try:
      atomic_files.copy_folder(theirs, mine)
    except OSError:
      if not mine.is_dir() or not any(mine.iterdir()):
        raise
      return False  # another process has begun it meanwhile
    return True

  def forget_keys(self, stage: str) -> None:
    """Lets a finished stage count whichever config it was made by.

    For the base that all rounds are compared with: it is that of the first
    round, though a further round has another student.
    """
    if self.finished(stage):
      record = self.record(stage)
      if record.pop(_MADE_BY, None) is not None:
        # A new file: the donor's link keeps its own.
        self._write_record(stage, record)

  @staticmethod
  def _checked(name: str, slash: str) -> str:
    if not _STAGE_NAME.fullmatch(name):
      raise ValueError(f"{name!r} is no name of a stage")
    return name.replace("/", slash)


def _rows_in(folder: Path) -> dict[str, Any]:
  """Returns what a stage's record says of its rows; {} where it has none."""
  if not (names := shards.names(folder)):
    return {}
  number, digest = shards.digest(folder)
  return {"number": number, "digest": digest, "shards": names}


def _revision(fingerprint: str) -> str:
  """Returns the revision that a fingerprint begins with."""
  return fingerprint.partition(":")[0]


def _is(path: Path) -> bool:
  return os.path.lexists(path)


def _again(stage: str) -> str:
  """Returns what makes a stage anew, as an end of a message."""
  if stage == "problems":
    return "run trd_jax.pipeline with the same --config and --workdir again"
  module, _, model = stage.partition("/")
  return (
    f"run trd_jax.{module}{f' --model={model}' if model else ''} with the same"
    " --config and --workdir again"
  )


def _has_artifacts(folder: Path) -> bool:
  """Returns whether a stage's folder holds more than reports."""
  steps = (folder / "checkpoints").glob("*")
  return any(step.name.isdecimal() for step in steps) or any(
    next(folder.rglob(pattern), None) for pattern in _ARTIFACTS
  )
