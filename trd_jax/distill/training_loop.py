"""The updates of a run: where they begin, their loop, and what they record.

The metrics of an update are fetched after the next is launched, so that packing
overlaps with the devices' work.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from trd_jax.distill import processes
from trd_jax.distill.checkpoint import Checkpoints
from trd_jax.distill.distiller import Distiller
from trd_jax.distill.loss import metrics as loss_metrics
from trd_jax.distill.packing import packing
from trd_jax.distill.packing.flops import SampleFlops
from trd_jax.distill.packing.layout import Sample
from trd_jax.distill.packing.packing import MicroBatch
from trd_jax.distill.split_rounds import Place
from trd_jax.distill.step import TrainState, Tree
from trd_jax.distill.teacher.source import TeacherSource
from trd_jax.experiment import (
  alarms,
  metric_log,
  metric_sinks,
  stage_figures,
)
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment, flat
from trd_jax.experiment.metric_log import MetricWriter
from trd_jax.experiment.metric_sinks import Sink
from trd_jax.experiment.processes import supervise
from trd_jax.experiment.progress import Progress
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Train


@dataclasses.dataclass(frozen=True)
class Done:
  """What a process has done of a run's updates.

  Attributes:
    updates: how many are done, by earlier processes too.
    tokens: that both models have read in this one.
    seconds: since this process's first update.
    stopped_by: the signal that the loop was left by; None: all are done.
  """

  updates: int
  tokens: int
  seconds: float
  stopped_by: signal.Signals | None

  def speed(self) -> dict[str, float]:
    """Returns seconds and tokens a second, as a stage's record has them."""
    return {
      "seconds": round(self.seconds, 3),
      "tokens_per_second": round(self.tokens / self.seconds, 1),
    }


@dataclasses.dataclass(frozen=True)
class Outputs:
  """Where updates leave what they make.

  Attributes:
    checkpoints: the state, every so many updates.
    metrics_file: their rows, as JSON lines; the first process writes them.
    sinks: further places for the rows.
    figures: of the stages before, by grouped name, for these places.
  """

  checkpoints: Checkpoints
  metrics_file: Path
  sinks: Sequence[Sink]
  figures: Mapping[str, float] = dataclasses.field(default_factory=dict)


def outputs(experiment: Experiment, run_dir: RunDir) -> Outputs:
  """Returns a run's, seen to be usable.

  Raises:
    UserError: a writer of metrics isn't installed or refuses the run, or the
      record of a stage before is damaged.
  """
  path, sinks, figures = run_dir.metrics_file("train"), [], {}
  if processes.first():
    figures = stage_figures.before_training(run_dir)
    sinks = metric_sinks.open_sinks(path, experiment.metrics, flat(experiment))
  kept = Checkpoints(run_dir.checkpoints, experiment.train.keep_checkpoints)
  return Outputs(kept, path, sinks, figures)


def begin(
  distiller: Distiller,
  lora: Tree,
  checkpoints: Checkpoints,
  seed: int,
  place: Place,
) -> tuple[int, TrainState]:
  """Goes on from the newest checkpoint, or from the round before, or anew.

  The number of updates done is the cursor into the order of batches and the
  key of the dropout, so nothing else has to be restored.

  Args:
    distiller: knows the state's shapes and places.
    lora: the adapter before the first update.
    checkpoints: the run's.
    seed: of the dropout.
    place: has the checkpoints of the round before.

  Returns:
    How many updates are done, and the state after them.

  Raises:
    UserError: the processes find different checkpoints, one doesn't fit, or
      the last of the round before isn't there any more.
  """
  # To look into the folder is done by all processes together, or by none.
  exists = checkpoints.directory.exists()
  processes.check_same(int(exists), "whether there are checkpoints")
  start = checkpoints.latest() or 0
  processes.check_same(start, "the checkpoint that they find")
  told = ""
  if not start and place.before is not None:
    checkpoints, told = place.before, f" of round {(place.round or 0) - 1}"
    # Whole or not at all: an earlier one of that round would be trained on
    # from here as if nothing was missing.
    newest = checkpoints.latest()
    if newest != place.first:
      raise UserError(
        f"{checkpoints.directory}: the checkpoint after update {place.first},"
        f" the last{told}, is not there; put it back, or remove that round's"
        " train/done.json and give the whole run's command again"
      )
    start = place.first
  if not start:
    return 0, distiller.init(lora, seed)
  start, state = checkpoints.restore(distiller.abstract_state(lora))
  print(
    f"train: goes on after update {start}{told}; {place.total} in all",
    flush=True,
  )
  return start, state


class Log:
  """Writes the rows of metrics and shows how far the updates are.

  Args:
    writer: where rows go; None in processes that don't write.
    progress: the line that a person sees.
    watch: looks at each row for alarms.
    every: updates between rows.
    last: number of the last update, which always has one.
  """

  def __init__(
    self,
    writer: MetricWriter | None,
    progress: Progress,
    watch: alarms.Watch,
    every: int,
    last: int,
  ):
    self._writer, self._progress, self._watch = writer, progress, watch
    self._every, self._last = every, last
    self.began = time.monotonic()

  def record(
    self,
    step: int,
    metrics: Mapping[str, jax.Array],
    facts: dict[str, float],
  ) -> None:
    """Waits for an update, writes its row, and says which alarms it fires.

    Raises:
      UserError: its loss or its gradient is no number.
    """
    row = loss_metrics.finish(jax.device_get(metrics)) | facts
    row["elapsed_seconds"] = time.monotonic() - self.began
    logged = step % self._every == 0 or step == self._last
    # What ends the run is said by its name, too, in an update without a row.
    if self._writer and (logged or not _is_finite(row)):
      for fired in self._watch.look({"step": step, **row}):
        self._progress.say(f"train: {fired.line}")
    # Of every update, one without a row too: its state must not be saved.
    _check_finite(step, row)
    if self._writer and logged:
      self._writer.write(step, row)
    self._progress.update(1, _last_values(row))

  def stop(self) -> None:
    """Shows that the update that has begun is the last.

    Until it is done may take a minute. It stands in the line of progress, which
    may get lost: where nobody reads the output any more, a line of its own
    would raise, and the update would not be saved.
    """
    self._progress.update(0, "asked to stop, finishing this update")
    self._progress.refresh()


def run(
  distiller: Distiller,
  start: int,
  state: TrainState,
  batches: Sequence[Sequence[Sample]],
  source: TeacherSource,
  outputs: Outputs,
  section: Train,
  mean: str,
  place: Place,
) -> Done:
  """Takes the updates that are left, until a signal asks to stop between two.

  Args:
    distiller: the compiled programs.
    start: updates that are done, those of earlier rounds among them.
    state: after them; donated.
    batches: of this round's updates, in their order.
    source: adds the teacher's side to each.
    outputs: where checkpoints and rows of metrics go.
    section: `checkpoint_every` and `log_every`.
    mean: over what the loss is one, see `packing.pack`.
    place: where this round's updates stand.

  Raises:
    UserError: the loss stops being a number.
  """
  end = place.first + len(batches)
  of_round = {} if place.round is None else {"round": place.round}
  pending: tuple[int, dict[str, jax.Array], dict[str, float]] | None = None
  done, tokens, stopped_by = start, 0, None
  with (
    # SIGTERM and Ctrl-C wait for the end of an update.
    supervise.deferred() as ending,
    _log(outputs, start, place.first, end, section.log_every) as log,
  ):
    for step in range(start, end):
      # An update is one program of all processes: they stop at the same one.
      stopped_by = processes.stop_before(step, ending.received)
      if stopped_by is not None:
        break
      batch = batches[step - place.first]
      packs = packing.pack(batch, source.layout, mean)
      state, metrics = distiller.update(state, source.fill(batch, packs))
      # An update is waited for only after the next has been handed over, so
      # that the devices work on while the host packs and writes.
      if pending is not None:
        log.record(*pending)
      # A checkpoint that the disk refuses ends the run now, not at the next.
      outputs.checkpoints.check()
      facts = of_round | _facts(batch, packs, source.layout.flops)
      tokens += int(facts["tokens_student"] + facts["tokens_teacher"])
      pending = step, metrics, facts
      done = step + 1
      if done % section.checkpoint_every == 0 or done == end:
        # Rows first: a run that goes on from here must find them written.
        log.record(*pending)
        pending = None
        outputs.checkpoints.save(done, state)
    if pending is not None:  # stopped between two checkpoints
      log.stop()
      log.record(*pending)
      outputs.checkpoints.save(done, state)
    outputs.checkpoints.wait()
  return Done(done, tokens, time.monotonic() - log.began, stopped_by)


@contextlib.contextmanager
def _log(
  outputs: Outputs, start: int, first: int, end: int, every: int
) -> Iterator[Log]:
  """Opens a `Log` for the updates from `start` on, of those of a round."""
  # Rows after the checkpoint are made again, and their alarms said again.
  before = []
  if processes.first():
    rows = metric_log.read_metrics(outputs.metrics_file)
    before = [row for row in rows if row["step"] < start]
  with (
    # All processes have the same row, so one of them writes it.
    MetricWriter(outputs.metrics_file, start, outputs.sinks)
    if processes.first()
    else contextlib.nullcontext() as writer,
    Progress(
      end - first, "train", "updates", initial=start - first
    ) as progress,
  ):
    if writer is not None and start == first:
      writer.write_figures(start, outputs.figures)
    yield Log(writer, progress, alarms.Watch(before), every, end - 1)


def _last_values(row: Mapping[str, float]) -> str:
  """Returns what a training's line of progress ends with."""
  shown = [f"loss {row['loss']:.4f}"]
  for name, label, form in (
    ("D", "D", ".4f"),
    ("grad_norm", "grad", ".3g"),
    ("learning_rate", "lr", ".2g"),
  ):
    if name in row:
      shown.append(f"{label} {row[name]:{form}}")
  return ", ".join(shown)


def _facts(
  batch: Sequence[Sample], packs: Sequence[MicroBatch], flops: SampleFlops
) -> dict[str, float]:
  """Returns what the host knows of an update, as metrics."""
  padded = packing.padded_tokens(packs)
  # Of a teacher that is known beforehand no token is computed here.
  student = sum(s.student_length for s in batch)
  teacher = sum(s.teacher_length for s in batch) if padded[1] else 0
  facts: dict[str, Any] = {
    "truncated_share": sum(s.truncated for s in batch) / len(batch),
    "trajectories": len(batch),
    "tokens_student": student,
    "tokens_teacher": teacher,
    "fill_student": student / padded[0],
    "imbalance": packing.imbalance(batch, packs, flops),
  }
  if padded[1]:
    facts["fill_teacher"] = teacher / padded[1]
  return facts


def _is_finite(row: Mapping[str, float]) -> bool:
  return all(math.isfinite(row[name]) for name in ("loss", "grad_norm"))


def _check_finite(step: int, row: Mapping[str, float]) -> None:
  """Refuses to go on from a loss that is no number.

  Raises:
    UserError: the loss or its gradient's norm is NaN or infinite.
  """
  if not _is_finite(row):
    raise UserError(
      f"update {step + 1}: the loss is {row['loss']} and its gradient's norm"
      f" {row['grad_norm']}; the checkpoints before it are kept: lower"
      " train.learning_rate, in a new --workdir"
    )
