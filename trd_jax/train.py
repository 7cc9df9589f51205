"""Stage 3: the student's adapter learns the teacher's distributions.

Reads trajectories (y_r for method=trd, else y_o), scores their tokens under
the student's and the teacher's own prompts, and takes AdamW steps on the
divergence that the method names (SPEC §2). Killed and started again on as many
devices, with the same packing, it ends with the bits of a run that was not: on
CPUs always, on GPUs as far as `train.deterministic` goes (docs/gpu.md).
"""

import contextlib
import dataclasses
import time
from typing import Any, cast

from trd_jax.experiment import cli
from trd_jax.experiment.errors import Terminated
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.processes import supervise
from trd_jax.experiment.run_dir import RunDir

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
    Terminated: SIGTERM came; the update under way is finished and saved.
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
  """As `run`, in each of the run's processes."""
  import functools

  import grain
  import jax
  from flax import nnx

  from trd_jax.data import vocabulary
  from trd_jax.distill import mesh_choice, optimizer, processes, training_set
  from trd_jax.distill.checkpoint import Checkpoints
  from trd_jax.distill.distiller import Distiller
  from trd_jax.distill.loss import objective, tail_divergence
  from trd_jax.distill.packing import layout, packing
  from trd_jax.distill.packing.flops import sample_flops
  from trd_jax.distill.step import Setup
  from trd_jax.distill.teacher import source
  from trd_jax.experiment.metrics import (
    MetricWriter,
    Progress,
    open_sinks,
    read_metrics,
  )
  from trd_jax.generation import chat_model, summaries
  from trd_jax.model import backend, sharding
  from trd_jax.model.attention import choice
  from trd_jax.model.lora_config import LoraConfig
  from trd_jax.model.qwen3 import Qwen3, Remat
  from trd_jax.model.weights import adapters, hf

  if summaries.skip_if_done(run_dir, STAGE, describe):
    return
  summaries.refuse_preflight(experiment, STAGE)
  train, teacher_model = experiment.train, experiment.teacher_model

  platform = jax.default_backend()
  idle = processes.idle_gpus(jax.local_device_count())
  if platform == "gpu" and idle:
    print(f"train: note: {idle}", flush=True)
  dtypes = [experiment.student.dtype, teacher_model.dtype]
  backend.exact_products(platform, dtypes)
  attention = choice.choose(
    train.attention, train.packing, platform=platform, dtypes=dtypes
  )

  # 1. Who learns and who teaches: they must speak in the same ids.
  student = chat_model.open_model(experiment.student, run_dir)
  teacher = chat_model.open_model(teacher_model, run_dir)
  configs = [hf.read_config(s.folder) for s in (student, teacher)]
  vocabulary.check_same(
    [experiment.student.path, teacher_model.path],
    [student.chat, teacher.chat],
    [config.vocab_size for config in configs],
  )
  attention = choice.settle(
    attention, train.attention, train.packing, configs, processes.all_agree
  )
  rows = "several samples" if attention.packing else "one sample"
  print(
    f"train: attention {attention.implementation}, {rows} a row"
    f" ({attention.why})",
    flush=True,
  )

  # 2. What they read: trajectories in the contexts of both sides.
  data = training_set.build(experiment, run_dir, student.chat, teacher.chat)
  writes = processes.first()
  if writes:
    run_dir.write_rejected(STAGE, data.rejected)
  processes.check_same(len(data.samples), "how many trajectories they find")
  for line in data.describe():
    print(f"train: {line}", flush=True)

  # 3. The order: shuffled anew each epoch, cut into batches. The last batch
  #    is what is left; its loss is the mean over the trajectories it has.
  order = (
    grain.MapDataset.source(range(len(data.samples)))
    .shuffle(seed=experiment.seed)
    .repeat(train.epochs)
    .batch(train.batch_size, batch_fn=list)
  )
  num_steps = min(len(order), train.max_steps or len(order))

  # 4. The mesh, as given or as the sizes ask for, the shapes, and what of the
  #    teacher is known beforehand.
  lora_config = LoraConfig(**vars(experiment.lora))
  recorded = train.teacher == "topk_from_rollout"
  costs = sample_flops(*configs, rank=experiment.lora.rank, remat=train.remat)
  if recorded:  # no teacher is there to run
    costs = costs._replace(teacher_token=0.0, teacher_pair=0.0)
  plan = functools.partial(
    layout.choose_layout,
    data.samples,
    batch_size=train.batch_size,
    pack_tokens=train.pack_tokens,
    teacher_pack_tokens=train.teacher_pack_tokens,
    rows_per_device=train.rows_per_device,
    packing=attention.packing,
    flops=costs,
  )
  own_teacher = experiment.regime == "opd" and not recorded
  sides = [
    mesh_choice.ModelSize(config, side.dtype)
    for config, side in zip(configs, (student, teacher), strict=True)
  ]
  mesh, chosen = mesh_choice.make(
    experiment.mesh,
    mesh_choice.Sizes(
      student=sides[0],
      teacher=sides[1] if own_teacher else None,
      lora=lora_config,
      layout=lambda groups: plan(groups=groups),
      chunk_tokens=experiment.loss.chunk_tokens,
      remat=train.remat,
      source=train.teacher,
      recorded=experiment.refine.teacher_top_k,
    ),
    attention.implementation,
  )
  if chosen:
    print(f"train: {chosen}", flush=True)
  shapes = plan(groups=sharding.num_groups(mesh))

  # Where the numbers go may refuse the run: seen before models are loaded.
  metrics_file = run_dir.metrics_file(STAGE)
  sinks = open_sinks(metrics_file, **vars(experiment.metrics)) if writes else []

  def batch_of(step: int) -> list[layout.Sample]:
    """The trajectories of an update."""
    chosen: Any = order[step]
    return [data.samples[i] for i in chosen]

  batches = [batch_of(step) for step in range(num_steps)]
  known = source.known(
    experiment,
    run_dir,
    teacher,
    batches,
    shapes,
    mesh,
    attention.implementation,
  )
  if known is not None:
    shapes = dataclasses.replace(shapes, teacher=())

  # 5. The models, placed on the mesh. In OPSD the teacher is the student's
  #    own base: the same arrays under a graph definition without adapters.
  model = hf.load(
    student.folder,
    dtype=student.dtype,
    mesh=mesh,
    lora=lora_config,
    seed=experiment.seed,
  )
  graph, lora, base = nnx.split(model, nnx.LoRAParam, ...)
  lora, base = nnx.to_pure_dict(lora), nnx.to_pure_dict(base)
  if experiment.student.adapter is not None:
    lora = adapters.begin_with(
      experiment.student.adapter, model.config, lora_config, lora
    )
  if not own_teacher:
    # Recorded tokens are scored without a teacher: its place is held.
    teacher_graph, teacher_base = _base_graph(Qwen3, model), base
  else:
    load = hf.load if known is None else hf.load_head
    other = load(teacher.folder, dtype=teacher.dtype, mesh=mesh)
    teacher_graph, teacher_base = nnx.split(other)
    teacher_base = nnx.to_pure_dict(teacher_base)

  # 6. The programs of an update, for as few shapes as the lengths allow.
  slot_loss = (tail_divergence if recorded else objective).slot_loss
  setup = Setup(
    student=graph,
    teacher=teacher_graph,
    loss=slot_loss(
      objective.Objective.of(experiment), student.chat.onset_ids()
    ),
    optimizer=optimizer.make_optimizer(train, num_steps),
    schedule=optimizer.schedule(train, num_steps),
    mesh=mesh,
    remat=cast(Remat, train.remat),
    attention=attention.implementation,
    deterministic=train.deterministic,
    dropout=experiment.lora.dropout > 0,
    split_vocab=not recorded,
  )
  distiller = Distiller(
    setup,
    lora,
    base,
    teacher_base,
    shapes.buffer_slots,
    None if known is None else known.slot,
  )

  # 7. Where to begin: the newest checkpoint, or the start. The number of
  #    updates done is the cursor into the order and the key of the dropout.
  checkpoints = Checkpoints(run_dir.checkpoints, train.keep_checkpoints)
  # To look into the folder is done by all processes together, or by none.
  exists = checkpoints.directory.exists()
  processes.check_same(int(exists), "whether there are checkpoints")
  start = checkpoints.latest() or 0
  processes.check_same(start, "the checkpoint that they find")
  if start:
    start, state = checkpoints.restore(distiller.abstract_state(lora))
    print(f"train: goes on after update {start}", flush=True)
  else:
    state = distiller.init(lora, experiment.seed)
  del lora, model

  # 8. Everything is compiled before the first update.
  distiller.compile(shapes, state)

  # 9. Updates. The metrics of one are fetched after the next is launched, so
  #    that packing overlaps with the devices' work.
  began = time.monotonic()
  seen = 0
  done = start
  with (
    # SIGTERM waits for the end of an update.
    supervise.deferred() as ending,
    MetricWriter(metrics_file, start, sinks)
    if writes
    else contextlib.nullcontext() as writer,
    Progress(num_steps, "train", "updates", initial=start) as progress,
  ):

    def record(step, metrics, facts):
      """Waits for an update and writes its row."""
      row = objective.finish(jax.device_get(metrics)) | facts
      _check_finite(step, row)
      row["elapsed_seconds"] = time.monotonic() - began
      if writer and (step % train.log_every == 0 or step == num_steps - 1):
        writer.write(step, row)
      progress.update(1, f"loss {row['loss']:.4f}")

    pending = None
    for step in range(start, num_steps):
      if processes.stop_before(step, ending.asked):
        break
      packs = packing.pack(batch := batches[step], shapes)
      state, metrics = distiller.update(
        state, packs if known is None else known.fill(batch, packs)
      )
      if pending is not None:
        record(*pending)
      facts = _facts(batch, packs, shapes.flops)
      seen += facts["tokens_student"] + facts["tokens_teacher"]
      pending = step, metrics, facts
      done = step + 1
      if done % train.checkpoint_every == 0 or done == num_steps:
        # Rows first: a run that goes on from here must find them written.
        record(*pending)
        pending = None
        checkpoints.save(done, state)
    if pending is not None:  # stopped between two checkpoints
      record(*pending)
      checkpoints.save(done, state)
    checkpoints.wait()
  if done < num_steps:
    after = f"after update {done}, which is saved" if done else ""
    raise Terminated(after, agreed=True)

  # 10. What was done.
  if not writes:
    return
  seconds = time.monotonic() - began
  logged = read_metrics(metrics_file)
  summary = {
    "updates": num_steps,
    "trajectories": len(data.samples),
    "dropped": dict(data.dropped),
    "truncated": data.truncated,
    "thinking": data.thinking,
    "first_loss": logged[0]["loss"],
    "last_loss": logged[-1]["loss"],
    "seconds": round(seconds, 3),
    "tokens_per_second": round(seen / seconds, 1),
    "restarted_after": start,
    "teacher": source.summary(known, logged),
  }
  run_dir.mark_done(STAGE, summary)
  print(f"train: {describe(summary)}", flush=True)


def describe(summary: dict) -> str:
  """One line about a finished training run."""
  return (
    f"{summary['updates']} updates on {summary['trajectories']:,} trajectories"
    f" ({sum(summary['dropped'].values()):,} dropped), loss"
    f" {summary['first_loss']:.4f} → {summary['last_loss']:.4f},"
    f" {summary['tokens_per_second']:,.0f} tokens/s"
  )


def _base_graph(model_class, model):
  """The graph definition of the model without its adapters."""
  import jax
  from flax import nnx

  dtype = model.head_VD.dtype
  return nnx.graphdef(
    jax.eval_shape(
      lambda: model_class(model.config, dtype=dtype, rngs=nnx.Rngs(0))
    )
  )


def _facts(batch, packs, flops) -> dict[str, float]:
  """What the host knows of an update."""
  from trd_jax.distill.packing import packing

  padded = packing.padded_tokens(packs)
  # Of a teacher that is known beforehand no token is computed here.
  student = sum(s.student_length for s in batch)
  teacher = sum(s.teacher_length for s in batch) if padded[1] else 0
  facts = {
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


def _check_finite(step: int, row: dict[str, float]) -> None:
  import math

  from trd_jax.experiment.errors import UserError

  if not all(math.isfinite(row[name]) for name in ("loss", "grad_norm")):
    raise UserError(
      f"update {step}: the loss is {row['loss']} and its gradient's norm"
      f" {row['grad_norm']}; the checkpoints before it are kept: lower"
      " train.learning_rate, in a new --workdir"
    )


if __name__ == "__main__":
  cli.main(
    STAGE,
    run,
    "distils the teacher into the student's adapter",
    exclusive=False,  # of several processes the first one holds the stage
  )
