"""The teacher's side of the loss where it is known before training.

`train.teacher` names three sources. `recompute` passes every context through
the teacher in every update (`distill_step.teach`). `hidden_cache` does so once
and keeps the hidden states on disk; `topk_from_rollout` reads what Stage 2
recorded. The latter two are here: both fill the buffer that `teach` would have
filled, from the host.

Shape key: G groups, C buffer slots, D the teacher's residual width, T tokens
of a response, K recorded tokens.
"""

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from trd_jax.distill import step
from trd_jax.distill.loss.tail_divergence import Recorded
from trd_jax.distill.packing import packing
from trd_jax.distill.packing.layout import Layout, Sample
from trd_jax.distill.packing.packing import MicroBatch
from trd_jax.distill.step import TeacherSetup
from trd_jax.distill.teacher.cache import Identity, TeacherCache, entry_key
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.metrics import Progress
from trd_jax.experiment.records import Trajectory
from trd_jax.experiment.run_dir import RunDir
from trd_jax.model import sharding
from trd_jax.model.attention.attention import Implementation
from trd_jax.model.weights import hf
from trd_jax.model.weights.model_files import ModelFiles


class Source(Protocol):
  """What fills the buffer in the teacher's place.

  Attributes:
    slot: shapes and dtypes of a slot; None for a hidden state of the teacher.
    summary: what it is, for people and for the stage's summary.
  """

  slot: Any
  summary: dict[str, Any]

  def fill(
    self, batch: Sequence[Sample], packs: Iterable[MicroBatch]
  ) -> Iterator[MicroBatch]:
    """The micro-batches of a batch with their buffers, one at a time."""
    ...


def known(
  experiment: Experiment,
  run_dir: RunDir,
  teacher: ModelFiles,
  batches: Sequence[Sequence[Sample]],
  shapes: Layout,
  mesh: Mesh,
  attention: Implementation,
) -> Source | None:
  """The source that `train.teacher` names; None for `recompute`.

  Args:
    experiment: its section `train`.
    run_dir: holds the recorded tokens and, by default, the cache.
    teacher: the model whose distributions are wanted.
    batches: the whole run's, in their order.
    shapes: what the teacher's packs are cut into.
    mesh: where the teacher is run, if it has to be.
    attention: what computes it there.

  Raises:
    UserError: the cache can't be used or has no room; recorded tokens are
      missing or leave out too much.
  """
  source = experiment.train.teacher
  if source == "hidden_cache":
    return hidden_cache(
      experiment, run_dir, teacher, batches, shapes, mesh, attention
    )
  if source == "topk_from_rollout":
    return recorded(experiment, run_dir, teacher, batches, shapes)
  return None


def summary(
  source: Source | None, logged: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
  """What is said of the teacher once the updates are done.

  Args:
    source: what `known` gave.
    logged: the rows of metrics.
  """
  if source is None:
    return {"source": "recompute"}
  gaps = [row["D_gap_bound"] for row in logged if "D_gap_bound" in row]
  return source.summary | ({"largest_gap_bound": max(gaps)} if gaps else {})


@dataclasses.dataclass
class HiddenCache:
  """Hidden states from disk."""

  cache: TeacherCache
  shapes: Layout
  dtype: str
  summary: dict[str, Any]
  slot: None = None

  def fill(
    self, batch: Sequence[Sample], packs: Iterable[MicroBatch]
  ) -> Iterator[MicroBatch]:
    """See `Source`."""
    width = self.cache.identity.width
    size = self.shapes.groups, self.shapes.buffer_slots, width

    for micro in packs:
      buffer_GCD = np.zeros(size, self.dtype)
      for number, at in _places(batch, micro):
        sample = batch[number]
        hidden_TD = self.cache.read(entry_key(sample), len(sample.response))
        buffer_GCD[at] = hidden_TD
      yield micro._replace(buffer=buffer_GCD)


def hidden_cache(
  experiment: Experiment,
  run_dir: RunDir,
  teacher: ModelFiles,
  batches: Sequence[Sequence[Sample]],
  shapes: Layout,
  mesh: Mesh,
  attention: Implementation,
) -> HiddenCache:
  """Fills the cache with what it lacks, and reads from it from then on.

  What is missing is computed batch by batch in the run's own packs, by the
  program that recomputes. So the first epoch's losses are `recompute`'s, bit
  for bit where hidden states are stored in the dtype they are computed in.
  Later epochs of `recompute` have the same bits only where a trajectory has a
  row for itself: what stands beside it in its row moves the order in which
  sums are rounded.

  Args:
    experiment: see `known`, also for the rest.
    run_dir: holds the cache unless `train.cache_dir` does.
    teacher: the model whose hidden states are kept.
    batches: the whole run's, in their order.
    shapes: what the teacher's packs are cut into.
    mesh: where the teacher is run if something is missing.
    attention: what computes it there.

  Raises:
    UserError: the run has several processes, the disk has no room, or the
      cache's files are damaged.
  """
  train = experiment.train
  if jax.process_count() > 1:
    raise UserError(
      "train.teacher=hidden_cache is for runs of one process; use"
      " train.teacher=recompute on several machines"
    )
  config = hf.read_config(teacher.folder)
  identity = Identity(
    teacher.revision,
    teacher.dtype,
    train.cache_dtype or teacher.dtype,
    config.hidden_size,
  )
  root = Path(train.cache_dir) if train.cache_dir else run_dir.teacher_cache
  cache = TeacherCache(root, identity)
  wanted = {
    entry_key(sample): len(sample.response)
    for batch in batches
    for sample in batch
  }
  missing = {key: n for key, n in wanted.items() if key not in cache}
  tokens = sum(missing.values())
  need = tokens * identity.token_bytes
  free = cache.check_room(tokens)
  print(
    f"train: teacher cache {cache.folder}: {len(missing):,} of"
    f" {len(wanted):,} trajectories to compute, {tokens:,} tokens,"
    f" {need / 1e6:,.1f} MB of {free / 1e6:,.1f} MB free",
    flush=True,
  )
  began = time.monotonic()
  if missing:
    _compute(
      cache,
      teacher,
      batches,
      missing,
      shapes,
      mesh,
      attention,
      train.deterministic,
    )
  summary = {
    "source": "hidden_cache",
    "folder": str(cache.folder),
    "trajectories": len(wanted),
    "computed": len(missing),
    "bytes": sum(wanted.values()) * identity.token_bytes,
    "seconds": round(time.monotonic() - began, 3),
  }
  return HiddenCache(cache, shapes, teacher.dtype, summary)


def _compute(
  cache: TeacherCache,
  teacher: ModelFiles,
  batches: Sequence[Sequence[Sample]],
  missing: dict[str, int],
  shapes: Layout,
  mesh: Mesh,
  attention: Implementation,
  deterministic: bool,
) -> None:
  """Runs the teacher over the batches that have something missing."""
  model = hf.load(teacher.folder, dtype=teacher.dtype, mesh=mesh)
  graph, base = nnx.split(model)
  base = nnx.to_pure_dict(base)
  setup = TeacherSetup(
    teacher=graph,
    mesh=mesh,
    attention=attention,
    deterministic=deterministic,
  )
  groups = sharding.batch_sharding(mesh)
  teach = jax.jit(
    functools.partial(step.teach, setup),
    in_shardings=(groups, jax.tree.map(lambda x: x.sharding, base), groups),
    out_shardings=groups,
    donate_argnums=0,
    compiler_options=setup.compiler_options,
  )
  head_VD = model.head_VD
  size = shapes.groups, shapes.buffer_slots, head_VD.shape[1]
  blank = jax.jit(
    lambda: jax.numpy.zeros(size, head_VD.dtype), out_shardings=groups
  )
  with (
    cache.filling() as filler,
    # Another process may have computed some while this one waited.
    Progress(
      len(missing),
      "teacher cache",
      "trajectories",
      initial=sum(key in filler for key in missing),
    ) as progress,
  ):
    left = {key for key in missing if key not in filler}

    def keep(batch, micro, buffer):
      """Fetches what a micro-batch has made and hands it on."""
      host_GCD = jax.device_get(buffer)
      before = len(left)
      for number, at in _places(batch, micro):
        key = entry_key(batch[number])
        if key in left:
          filler.add(key, host_GCD[at])
          left.discard(key)
      progress.update(before - len(left))

    # One buffer is fetched while the devices fill the other.
    buffers, pending = [blank(), blank()], None
    for batch in batches:
      if not any(entry_key(sample) in left for sample in batch):
        continue
      for micro in packing.pack(batch, shapes):
        buffer = buffers.pop()
        with jax.set_mesh(mesh):
          for pack in micro.teacher:
            buffer = teach(buffer, base, sharding.shard_batch(pack, mesh))
        if pending is not None:
          keep(*pending)
          buffers.append(pending[-1])
        pending = batch, micro, buffer
    if pending is not None:
      keep(*pending)


def _places(
  batch: Sequence[Sample], micro: MicroBatch
) -> Iterator[tuple[int, tuple[int, slice]]]:
  """Number in the batch, and group and slots, of a micro-batch's trajectories.

  Read off the student's slots, which say where in the buffer they look.
  """
  for pack in micro.student:
    slots = pack.slots
    starts = (slots.trajectory >= 0) & (slots.offset == 0)
    for g, number, first in zip(
      starts.nonzero()[0],
      slots.trajectory[starts],
      slots.teacher_slot[starts],
      strict=True,
    ):
      length = len(batch[number].response)
      yield int(number), (int(g), slice(int(first), int(first) + length))


@dataclasses.dataclass
class RecordedTokens:
  """The likeliest tokens that Stage 2 has kept, by trajectory."""

  by_key: dict[str, Recorded]
  shapes: Layout
  slot: Recorded
  summary: dict[str, Any]

  def fill(
    self, batch: Sequence[Sample], packs: Iterable[MicroBatch]
  ) -> Iterator[MicroBatch]:
    """See `Source`."""
    size = self.shapes.groups, self.shapes.buffer_slots
    for micro in packs:
      buffer = jax.tree.map(
        lambda x: np.zeros((*size, *x.shape), x.dtype), self.slot
      )
      for number, at in _places(batch, micro):
        rows = self.by_key[batch[number].key]
        for all_GC, one_T in zip(buffer, rows, strict=True):
          all_GC[at] = one_T
      yield micro._replace(buffer=buffer)


def recorded(
  experiment: Experiment,
  run_dir: RunDir,
  teacher: ModelFiles,
  batches: Sequence[Sequence[Sample]],
  shapes: Layout,
) -> RecordedTokens:
  """Reads and checks what Stage 2 has recorded, and what that leaves out.

  Args:
    experiment: see `known`, also for the rest.
    run_dir: holds Stage 2's trajectories.
    teacher: the model that must have recorded them.
    batches: the whole run's.
    shapes: the size of the buffer that is filled.

  Raises:
    UserError: a trajectory has no recorded tokens, another model's, or ones
      that don't belong to it; their number varies; or they leave out more
      than `train.teacher_tail_limit`.
  """
  where = run_dir.stage("refine")
  again = (
    "run trd_jax.refine with refine.teacher_top_k above 0 in a new --workdir,"
    " or use train.teacher=recompute"
  )
  samples = {sample.key: sample for batch in batches for sample in batch}
  columns = ["key", "model_revision", "teacher_top_ids", "teacher_top_logprobs"]
  head_rows = hf.read_config(teacher.folder).vocab_size
  table = run_dir.table("refine", Trajectory, columns)
  by_key: dict[str, Recorded] = {}
  # Scalars of arrow rather than lists of Python: there may be 10^9 numbers.
  for key, revision, ids, log_probs in zip(
    *(table[name] for name in columns), strict=True
  ):
    key = key.as_py()
    if key not in samples:
      continue
    if not ids.is_valid:
      raise UserError(
        f"{where}: trajectory {key} has no recorded tokens of the teacher;"
        f" {again}"
      )
    if revision.as_py() != teacher.revision:
      raise UserError(
        f"{where}: trajectory {key} was written by revision {revision} of the"
        f" teacher, and {teacher.name} is now {teacher.revision}; {again}"
      )
    length = len(samples[key].response)
    ids, log_probs = (x.values.to_numpy() for x in (ids, log_probs))
    if (
      not ids.size
      or ids.size % length
      or ids.size != log_probs.size
      or not (0 <= ids.min() <= ids.max() < head_rows)
    ):
      raise UserError(
        f"{where}: trajectory {key} has {ids.size} recorded ids and"
        f" {log_probs.size} log-probabilities for {length} tokens and a head of"
        f" {head_rows} rows: they don't belong together; {again}"
      )
    log_probs_TK = log_probs.reshape(length, -1)
    mass_T = np.exp(log_probs_TK.astype(np.float64)).sum(1)
    tail_T = np.maximum(1 - mass_T, 0).astype(np.float32)
    by_key[key] = Recorded(ids.reshape(length, -1), log_probs_TK, tail_T)
  widths = {made.ids.shape[1] for made in by_key.values()}
  if len(widths) != 1:
    raise UserError(
      f"{where}: between {min(widths)} and {max(widths)} tokens a position are"
      f" recorded; {again}"
    )
  (K,) = widths
  # As the loss weighs them: the mean over trajectories of the mean over tokens.
  tail = float(np.mean([made.tail.mean() for made in by_key.values()]))
  limit = experiment.train.teacher_tail_limit
  told = f"the {K} recorded tokens leave out a mass of {tail:.3g} on average"
  if tail > limit:
    raise UserError(
      f"train.teacher=topk_from_rollout: {told}, over"
      f" train.teacher_tail_limit={limit:g}; record more"
      " (refine.teacher_top_k, in a new --workdir), raise the limit, or use"
      " train.teacher=hidden_cache"
    )
  print(
    f"train: teacher: {told} (train.teacher_tail_limit={limit:g}); gradients"
    " with respect to the logits are off by at most twice that in the L1 norm",
    flush=True,
  )
  slot = Recorded(
    ids=jax.ShapeDtypeStruct((K,), np.int32),
    log_probs=jax.ShapeDtypeStruct((K,), np.float32),
    tail=jax.ShapeDtypeStruct((), np.float32),
  )
  summary = {
    "source": "topk_from_rollout",
    "trajectories": len(by_key),
    "tokens_kept": K,
    "mean_tail_mass": tail,
  }
  return RecordedTokens(by_key, shapes, slot, summary)
