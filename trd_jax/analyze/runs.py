"""Reads a workdir into columns, whether it is finished or not.

A run of 40,000 problems has gigabytes of token ids and text. So columns are
read when they are asked for, a shard at a time, and ids are turned into their
number at once.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from trd_jax.experiment import (
  experiment,
  metric_log,
  printing,
  records,
  shards,
)
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.records import (
  Trajectory,
)
from trd_jax.experiment.run_dir import RunDir

State = Literal["done", "partial", "missing"]


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
_OF_SAMPLES = (
  *("key", "benchmark", "problem_id", "sample", "num_tokens", "truncated"),
  *("correct", "reason", "extracted", "model_revision"),
)
_LONGEST_LABEL = 60


class Evaluation(NamedTuple):
  """One model's verdicts on one benchmark.

  Attributes:
    questions: [Q] their ids, ascending.
    correct: [Q] how many samples of each are right.
    unjudged: [Q] how many have no verdict.
    k: samples a question.
    asked: how many questions have samples; more than Q where some of theirs
      are still to come.
  """

  questions: Sequence[str]
  correct: np.ndarray
  unjudged: np.ndarray
  k: int
  asked: int


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
    label = label or self.workdir.resolve().name
    # A folder may be called whatever a file system takes.
    self.label = printing.clean(label).replace("\n", " ")[:_LONGEST_LABEL]
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
    # A training has no rows, but a file of metrics.
    begun = self.run_dir.metrics_file(stage).exists()
    begun = begun or bool(shards.names(self.run_dir.stage(stage)))
    return "partial" if begun else "missing"

  def unfinished(self, *stages: str) -> str | None:
    """Returns which of some stages aren't whole; None where all are.

    A stage that the config has none of counts as whole.
    """
    wanted = {"problems", *self.config.stages}
    if self.config.pipeline.evaluates:
      wanted |= {"evaluate/base", "evaluate/trained"}
    missing = []
    for stage in stages:
      state = self.state(stage)
      if stage in wanted and state != "done":
        told = "isn't finished" if state == "partial" else "hasn't begun"
        missing.append(f"{stage} of {self.label} {told}")
    return "; ".join(missing) or None

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
    return self.run_dir.table(stage, records.BY_STAGE[stage], columns)

  def rows(
    self,
    stage: str,
    columns: Sequence[str],
    wanted: frozenset[str] | None = None,
  ) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of wanted keys, a shard at a time, each key once.

    Args:
      stage: a key of `records.BY_STAGE`.
      columns: which of its columns.
      wanted: keys of rows; None: all.
    """
    key = records.BY_STAGE[stage].KEY
    for part in self.parts(stage, columns):
      if wanted is not None:
        mine = [name in wanted for name in part[key].to_pylist()]
        part = part.filter(pa.array(mine, pa.bool_()))
      yield from part.to_pylist()

  def parts(self, stage: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yields some columns of a stage's rows, a shard at a time, each key once.

    Args:
      stage: a key of `records.BY_STAGE`.
      columns: which of its columns; its key is always among them.

    Raises:
      UserError: a shard is damaged, or gone.
    """
    record, folder = records.BY_STAGE[stage], self.run_dir.stage(stage)
    self.run_dir.done(stage)
    read = [record.KEY, *(name for name in columns if name != record.KEY)]
    seen: set[str] = set()
    known: set[str] = set()
    while names := [n for n in shards.names(folder) if n not in known]:
      for name in names:
        known.add(name)
        try:
          part = shards.read_table(folder / name, record, read)
        except UserError:
          if (folder / name).exists():
            raise
          # A stage under way has put another in its place, which comes next.
          continue
        keys = part[record.KEY].to_pylist()
        # A killed stage may have written a row twice: the first counts.
        new = []
        for key in keys:
          new.append(key not in seen)
          seen.add(key)
        yield part if all(new) else part.filter(pa.array(new, pa.bool_()))

  @functools.cache  # noqa: B019 (a run is as long-lived as the process)
  def trajectories(self, stage: str) -> pa.Table:
    """Returns the small columns of a stage's trajectories, and `tokens`.

    Args:
      stage: `rollout` or `refine`.

    Returns:
      A table by ascending key; `tokens` is the number of response tokens.
    """
    parts = []
    for part in self.parts(stage, [*_SMALL, "response_ids"]):
      tokens = [
        np.diff(chunk.offsets.to_numpy())
        for chunk in part["response_ids"].chunks
      ]
      number = np.concatenate([np.zeros(0, np.int64), *tokens])
      part = part.drop_columns("response_ids")
      parts.append(
        part.append_column("tokens", pa.array(number.astype(np.int64)))
      )
    # (`Schema.empty_table` would import pandas, half a second for no row.)
    whole_rows = pa.Table.from_batches([], schema=records.schema(Trajectory))
    empty = whole_rows.select(list(_SMALL))
    empty = empty.append_column("tokens", pa.array([], pa.int64()))
    schema = empty.schema.remove_metadata()
    whole = [part.cast(schema) for part in (empty, *parts)]
    return pa.concat_tables(whole).combine_chunks().sort_by("key")

  @functools.cache  # noqa: B019
  def samples(self, stage: str) -> pa.Table:
    """Returns an evaluation's samples without their text and token ids.

    Of a finished evaluation those that its figures are of: others may lie
    beside them, of an earlier model or of questions that are asked no more.
    """
    table = self.table(stage, _OF_SAMPLES)
    done = self.run_dir.done(stage)
    kept = np.ones(table.num_rows, bool)
    columns = {
      name: np.array(table[name].to_pylist(), object)
      for name in ("benchmark", "problem_id", "sample", "model_revision")
    }
    if done is not None:
      kept[:] = False
      for name, figures in done.items():
        verdicts = figures["verdicts"]
        mine = columns["benchmark"] == name
        mine &= np.array([q in verdicts for q in columns["problem_id"]], bool)
        mine &= columns["sample"].astype(np.int64) < figures["k"]
        # Earlier versions don't say which weights their figures are of.
        if (revision := figures.get("model_revision")) is not None:
          mine &= columns["model_revision"] == revision
        kept |= mine
    elif table.num_rows:
      # Of one that is under way those of the model that has most of them.
      most = Counter(columns["model_revision"].tolist()).most_common(1)[0][0]
      kept = columns["model_revision"] == most
    table = table.filter(pa.array(kept, pa.bool_()))
    order = [
      (name, "ascending") for name in ("benchmark", "problem_id", "sample")
    ]
    return table.drop_columns("model_revision").sort_by(order)

  @functools.cache  # noqa: B019
  def evaluation(self, stage: str) -> Mapping[str, Evaluation]:
    """Returns an evaluation's verdicts, by benchmark.

    Of one that is under way only questions with all their samples count.

    Args:
      stage: `evaluate/base` or `evaluate/trained`.
    """
    grouped: dict[str, dict[str, list[bool | None]]] = {}
    columns = ("benchmark", "problem_id", "correct")
    table = self.samples(stage)
    for name, question, verdict in zip(
      *(table[column].to_pylist() for column in columns), strict=True
    ):
      of_name = grouped.setdefault(name, {})
      of_name.setdefault(question, []).append(verdict)
    found = {}
    for name, verdicts in grouped.items():
      k = max(map(len, verdicts.values()))
      if self.state(stage) != "done":
        k = self.config.evaluate.k
      whole = sorted(q for q, row in verdicts.items() if len(row) == k)
      right = [sum(one is True for one in verdicts[q]) for q in whole]
      none = [sum(one is None for one in verdicts[q]) for q in whole]
      if whole:
        found[name] = Evaluation(
          whole, np.array(right), np.array(none), k, len(verdicts)
        )
    return found

  @functools.cached_property
  def metrics(self) -> list[Mapping[str, Any]]:
    """Returns the rows of train/metrics.jsonl, a logged update each."""
    return list(metric_log.read_metrics(self.run_dir.metrics_file("train")))


_NUMBER = re.compile(r"(\d+(?:\.\d*)?(?:e[-+]?\d+)?)")


def _by_numbers(name: str) -> list[tuple[int, float, str]]:
  """Returns what sorts names with their numbers by value: 9 before 10."""
  parts = _NUMBER.split(name)
  # Every second part is a number.
  return [
    (1, float(part), "") if place % 2 else (0, 0.0, part)
    for place, part in enumerate(parts)
  ]


def open_runs(workdirs: Sequence[Path | str]) -> list[Run]:
  """Opens workdirs, each with a label of its own.

  The folder of a sweep stands for its points, in the order of their names.

  Raises:
    UserError: one is no run's, or is there twice.
  """
  folders: list[Path] = []
  for workdir in map(Path, workdirs):
    points = sorted(
      (path.parent for path in (workdir / "points").glob("*/config.json")),
      key=lambda path: _by_numbers(path.name),
    )
    folders += points or [workdir]
  real = [folder.resolve() for folder in folders]
  for folder, place in zip(folders, real, strict=True):
    if real.count(place) > 1:
      raise UserError(f"{folder} is named twice; name each workdir once")
  # As much of the path as tells them apart.
  depth = 1
  longest = max(len(place.parts) for place in real)
  while depth < longest and len({p.parts[-depth:] for p in real}) < len(real):
    depth += 1
  opened = [
    Run(folder, "/".join(place.parts[-depth:]))
    for folder, place in zip(folders, real, strict=True)
  ]
  # Long names are cut, and analyses tell runs apart by their labels.
  used: set[str] = set()
  for run in opened:
    label, number = run.label, 1
    while run.label in used:
      number += 1
      run.label = f"{label} ({number})"
    used.add(run.label)
  return opened
