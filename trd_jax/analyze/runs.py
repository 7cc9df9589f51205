"""Reads a workdir into columns, whether it is finished or not.

A run of 40,000 problems has gigabytes of token ids and text. So columns are
read when they are asked for, a shard at a time, and ids are turned into their
number at once.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from trd_jax.experiment import experiment, metric_log, records, shards
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.records import GradedSample, Problem, Trajectory
from trd_jax.experiment.run_dir import RunDir

State = Literal["done", "partial", "missing"]
RECORDS = {
  "problems": Problem,
  "rollout": Trajectory,
  "refine": Trajectory,
  "evaluate/base": GradedSample,
  "evaluate/trained": GradedSample,
}
"""The stages that have rows, and what kind of rows."""

# Columns of a trajectory that are small, whatever the run.
_SMALL = (
  "key",
  "problem_id",
  "finish_reason",
  "truncated",
  "thinking",
  "draft_key",
  "draft_elided_tokens",
  "correct",
  "reason",
  "extracted",
)


class Run:
  """A workdir, read only.

  Args:
    workdir: its folder: a run's, a round's, or that of a sweep's point.
    label: what figures call it; its folder's name by default.

  Raises:
    UserError: it is no run's.
  """

  def __init__(self, workdir: Path | str, label: str | None = None):
    self.workdir = Path(workdir)
    self.run_dir = RunDir(self.workdir)
    self.label = label or self.workdir.resolve().name
    if not self.run_dir.config.is_file():
      raise UserError(
        f"{self.workdir} is no run's: it holds no config.json; name the folder"
        " that --workdir named"
      )

  @functools.cached_property
  def config(self) -> Experiment:
    """Returns the config that the workdir belongs to."""
    return experiment.from_json(self.run_dir.config)

  def state(self, stage: str) -> State:
    """Returns how far a stage is."""
    if self.run_dir.finished(stage):
      return "done"
    return "partial" if shards.names(self.run_dir.stage(stage)) else "missing"

  def done(self, stage: str) -> Mapping[str, Any] | None:
    """Returns what a finished stage said of itself, None before.

    Raises:
      UserError: see `RunDir.done`.
    """
    return self.run_dir.done(stage)

  def table(self, stage: str, columns: Sequence[str]) -> pa.Table:
    """Returns some columns of a stage's rows, by ascending key.

    Raises:
      UserError: a shard is damaged, or gone.
    """
    self.run_dir.done(stage)
    return self.run_dir.table(stage, RECORDS[stage], columns)

  def rows(
    self, stage: str, columns: Sequence[str], wanted: frozenset[str]
  ) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of wanted keys, a shard at a time, each key once.

    Args:
      stage: a key of `RECORDS`.
      columns: which of its columns.
      wanted: keys of rows.
    """
    record, folder = RECORDS[stage], self.run_dir.stage(stage)
    left = set(wanted)
    read = [record.KEY, *(name for name in columns if name != record.KEY)]
    for name in shards.names(folder):
      part = shards.read_table(folder / name, record, read)
      mine = [key in left for key in part[record.KEY].to_pylist()]
      for row in part.filter(pa.array(mine, pa.bool_())).to_pylist():
        if row[record.KEY] in left:
          left.discard(row[record.KEY])
          yield row

  @functools.cache  # noqa: B019 (a run is as long-lived as the process)
  def trajectories(self, stage: str) -> pa.Table:
    """Returns the small columns of a stage's trajectories, and `tokens`.

    Args:
      stage: `rollout` or `refine`.

    Returns:
      A table by ascending key; `tokens` is the number of response tokens.
    """
    return self._with_tokens(stage, Trajectory, _SMALL)

  @functools.cache  # noqa: B019
  def samples(self, stage: str) -> pa.Table:
    """Returns an evaluation's samples without their text and ids."""
    columns = ("benchmark", "problem_id", "sample", "num_tokens", "truncated")
    return self.table(stage, (*columns, "correct", "reason", "extracted"))

  @functools.cached_property
  def metrics(self) -> list[Mapping[str, Any]]:
    """Returns the rows of train/metrics.jsonl, a logged update each."""
    path = self.run_dir.metrics_file("train")
    return list(metric_log.read_metrics(path)) if path.exists() else []

  def _with_tokens(self, stage, record, columns) -> pa.Table:
    folder = self.run_dir.stage(stage)
    self.run_dir.done(stage)
    parts, seen = [], set()
    for name in shards.names(folder):
      part = shards.read_table(
        folder / name, record, [*columns, "response_ids"]
      )
      lists = part["response_ids"].combine_chunks()
      tokens = pa.array(np.diff(lists.offsets.to_numpy()), pa.int64())
      part = part.drop_columns("response_ids").append_column("tokens", tokens)
      keys = part[record.KEY].to_pylist()
      # A stage that was killed may have written a row twice: the first counts.
      new = np.array([key not in seen for key in keys], bool)
      seen.update(keys)
      parts.append(part.filter(pa.array(new)))
    if not parts:
      empty = records.schema(record).empty_table().select(list(columns))
      return empty.append_column("tokens", pa.array([], pa.int64()))
    return pa.concat_tables(parts).sort_by(record.KEY)
