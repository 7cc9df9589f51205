"""Stage 3: trains the student's adapter on the teacher's distributions.

Reads the trajectories that the method names. Scores their tokens twice:
under the student after its own prompt, and under the teacher after its own.
Takes AdamW steps on the method's divergence between the two (Equation 6 and
Table 13 of the paper; docs/training.md).

A training that was killed and started again, on as many devices and with the
same packing, ends with the same bits as one that wasn't killed: on CPUs always,
on GPUs with `train.deterministic` (docs/gpu.md says how far).
"""

import contextlib
import functools
import signal
from typing import TYPE_CHECKING

from trd_jax.experiment import cli
from trd_jax.experiment.errors import Interrupted, Terminated
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.run_dir import RunDir

if TYPE_CHECKING:
  from trd_jax.distill.training_loop import Done

STAGE = "train"

# What helps where a device is full though the estimate said it would do. All
# are runtime keys: what has been generated and trained stays.
_REMEDY = (
  "split the weights (mesh.fsdp=-1), lower train.pack_tokens and"
  " train.teacher_pack_tokens, train.rows_per_device or loss.chunk_tokens, or"
  " set train.remat=full: the same command with such a key goes on from the"
  " last checkpoint"
)


def run(experiment: Experiment, run_dir: RunDir, flags) -> None:
  """Trains the adapter for `train.epochs` or `train.max_steps`.

  Raises:
    Interrupted: Ctrl-C or SIGTERM (`Terminated`) came while it trained; the
      update under way is finished and saved.
    UserError: the trajectories are missing or none is left, a model or a
      tokenizer is bad, the teacher's ids or vocabulary are not the student's,
      the processes of the run can't join, JAX doesn't use the machine's GPUs,
      a device's memory is too small, a writer of metrics can't be used, or the
      loss stops being a number.
  """
  del flags
  from trd_jax.distill import processes
  from trd_jax.model import backend

  backend.reserve_memory()
  # Before JAX is used: from here on its devices are those of all processes.
  with processes.joined(experiment.distributed, STAGE):
    backend.start()
    only_here = processes.first()
    with (
      run_dir.lock(STAGE) if only_here else contextlib.nullcontext(),
      backend.enough_memory(_REMEDY),
    ):
      _train(experiment, run_dir)


def _train(experiment: Experiment, run_dir: RunDir) -> None:
  """Trains in each of the run's processes: the stage's chapters, in order."""
  from trd_jax.distill import (
    mesh_and_packs,
    model_pair,
    models,
    processes,
    split_rounds,
    training_loop,
    training_set,
  )
  from trd_jax.distill.distiller import Distiller
  from trd_jax.distill.teacher.registry import source_of
  from trd_jax.distill.teacher.source import TeacherRun
  from trd_jax.experiment import alarms, metric_log
  from trd_jax.generation import chat_model, summaries

  if summaries.skip_if_done(run_dir, STAGE, describe):
    return
  summaries.refuse_preflight(experiment, STAGE)
  train, writes = experiment.train, processes.first()
  metrics_file = run_dir.metrics_file(STAGE)
  if writes:
    metric_log.check(metrics_file)  # minutes before the first row

  # 1. Who learns and who teaches: they must speak in the same ids.
  both = model_pair.find(
    experiment, functools.partial(chat_model.open_model, run_dir=run_dir)
  )

  # 2. What they read: trajectories in the contexts of both sides.
  data = training_set.read(experiment, run_dir, *both.chats)

  # 3. The trajectories of each update, and which updates of a split training.
  print(f"train: {experiment.coordinates.describe()}", flush=True)
  batches = data.batches(train, experiment.seed)
  if note := data.less_than_a_batch(train, len(batches)):
    print(f"train: {note}", flush=True)
  place = split_rounds.place(experiment, run_dir, len(batches))

  # 4. Mesh and shapes: how the models are split, and the few lengths of rows
  #    that programs are compiled for.
  teaching = source_of(experiment)
  mesh, layout, told = mesh_and_packs.choose(
    experiment, both, data.samples, teaching.weights
  )
  if told:
    print(f"train: {told}", flush=True)

  # 5. What may refuse the run is seen before models are loaded: where the
  #    numbers go, and what of the teacher is known beforehand.
  outputs = training_loop.outputs(experiment, run_dir)
  source = teaching.prepare(
    TeacherRun(experiment, run_dir, both, batches, layout, mesh)
  )

  # 6. The models on the mesh. In OPSD the teacher is the student's own base:
  #    the same arrays under a graph definition without adapters.
  loaded = models.load(experiment, both, source.weights, mesh)

  # 7. The programs of an update, for as few shapes as the lengths allow.
  distiller = Distiller.for_run(
    experiment, both, loaded, source, mesh, num_steps=place.total
  )

  # 8. Where to begin: the newest checkpoint, the round before, or the start.
  #    The state alone holds the adapter from here on.
  start, state = training_loop.begin(
    distiller, loaded.lora, outputs.checkpoints, experiment.seed, place
  )
  del loaded
  distiller.compile(source.layout, state)

  # 9. Updates, each compiled beforehand.
  done = training_loop.run(
    distiller,
    start,
    state,
    batches,
    source,
    outputs,
    train,
    experiment.loss.mean,
    place,
  )
  _end_if_told(done)

  # 10. What was done.
  if not writes:
    return
  logged = metric_log.read_metrics(metrics_file)
  summary = {
    **place.summary(),
    "coordinates": experiment.coordinates._asdict(),
    "updates": len(batches),
    "trajectories": len(data.samples),
    "dropped": dict(data.dropped),
    "truncated": data.truncated,
    "thinking": data.thinking,
    # None where the file was damaged and moved away, and no update was left.
    "first_loss": logged[0].get("loss") if logged else None,
    "last_loss": logged[-1].get("loss") if logged else None,
    **done.speed(),
    "restarted_after": start,
    "teacher": source.summary(logged),
    "alarms": [fired._asdict() for fired in alarms.of_rows(logged)],
  }
  run_dir.mark_done(
    STAGE,
    summary,
    folders=[f"checkpoints/{done.updates}"],
    weights={one.name: one.fingerprint for one in (both.student, both.teacher)},
  )
  print(f"train: {describe(summary)}", flush=True)


def _end_if_told(done: "Done") -> None:
  """Ends the stage where a signal has ended the updates.

  Raises:
    Interrupted, Terminated: by which signal, and after what update.
  """
  if done.stopped_by is not None:
    after = f"after update {done.updates}, which is saved"
    kinds = {signal.SIGINT: Interrupted, signal.SIGTERM: Terminated}
    raise kinds[done.stopped_by](after if done.updates else "", agreed=True)


def describe(summary: dict) -> str:
  """Returns one line about a finished training run."""
  after = ""
  if summary.get("first_update"):
    after = f" after {summary['first_update']:,} of earlier rounds"
  return (
    f"{summary['updates']} updates{after} on"
    f" {summary['trajectories']:,} trajectories"
    f" ({sum(summary['dropped'].values()):,} dropped), loss"
    f" {_shown(summary['first_loss'])} → {_shown(summary['last_loss'])},"
    f" {summary['tokens_per_second']:,.0f} tokens/s"
  )


def _shown(loss: float | None) -> str:
  return "?" if loss is None else f"{loss:.4f}"


if __name__ == "__main__":
  cli.main(
    STAGE,
    run,
    "distils the teacher into the student's adapter",
    exclusive=False,  # of several processes the first one holds the stage
  )
