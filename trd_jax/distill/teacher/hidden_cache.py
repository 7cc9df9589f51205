"""The teacher's hidden states are computed once and read from disk.

Shape key: G groups, U buffer slots, R response tokens, D the teacher's residual
channels, V vocabulary.
"""

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from trd_jax.distill import step
from trd_jax.distill.loss import objective
from trd_jax.distill.packing import packing
from trd_jax.distill.packing.layout import Layout, Sample
from trd_jax.distill.packing.packing import MicroBatch
from trd_jax.distill.step import TeacherSetup
from trd_jax.distill.teacher.cache import Identity, TeacherCache, entry_key
from trd_jax.distill.teacher.source import (
  TeacherRun,
  Weights,
  hidden_slot,
  places,
)
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.progress import Progress
from trd_jax.model import sharding
from trd_jax.model.weights import hf


@dataclasses.dataclass(frozen=True)
class HiddenCache:
  """See `source.TeacherSource`; the buffer comes from disk."""

  weights: ClassVar[Weights] = "head"
  slot_loss = staticmethod(objective.slot_loss)

  layout: Layout
  slot: jax.ShapeDtypeStruct
  cache: TeacherCache
  facts: dict[str, Any]

  @classmethod
  def prepare(cls, run: TeacherRun) -> "HiddenCache":
    """Fills the cache with what it lacks, and with what is damaged in it.

    What is missing is computed batch by batch in the run's own packs, by the
    program that recomputes. So the first epoch's losses are `recompute`'s, bit
    for bit where hidden states are stored in the dtype they are computed in.
    Later epochs of `recompute` have the same bits only where a trajectory has a
    row for itself: what stands beside it in its row moves the order in which
    sums are rounded.

    Raises:
      UserError: the run has several processes, the disk has no room, or the
        cache's index is damaged.
    """
    train = run.experiment.train
    if jax.process_count() > 1:
      raise UserError(
        "train.teacher=hidden_cache is for runs of one process; use"
        " train.teacher=recompute on several machines"
      )
    width = run.pair.configs[1].hidden_size
    computed = run.teacher.dtype
    if train.teacher_dtype is not None:
      # Of eight bits come other states, whatever they are stored in.
      computed = f"{computed}_{train.teacher_dtype}"
    identity = Identity(
      run.teacher.revision,
      computed,
      train.cache_dtype or run.teacher.dtype,
      width,
    )
    root = train.cache_dir or run.run_dir.teacher_cache
    cache = TeacherCache(root, identity)
    wanted = {
      entry_key(sample): len(sample.response)
      for batch in run.batches
      for sample in batch
    }
    cache.check_bytes(wanted)
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
      _compute(cache, missing, run)
    facts = {
      "source": "hidden_cache",
      "folder": str(cache.folder),
      "trajectories": len(wanted),
      "computed": len(missing),
      "bytes": sum(wanted.values()) * identity.token_bytes,
      "seconds": round(time.monotonic() - began, 3),
    }
    # Training reads the cache: no teacher's packs, so no shapes for them.
    layout = dataclasses.replace(run.layout, teacher=())
    slot = hidden_slot(width, run.teacher.dtype)
    return cls(layout, slot, cache, facts)

  def fill(
    self, batch: Sequence[Sample], packs: Iterable[MicroBatch]
  ) -> Iterator[MicroBatch]:
    """Adds buffers of hidden states, see `TeacherSource`."""
    size = self.layout.groups, self.layout.buffer_slots, *self.slot.shape
    for micro in packs:
      # A new one each time: the last may still be on its way to the devices.
      buffer_GUD = np.zeros(size, self.slot.dtype)
      for number, at in places(batch, micro):
        sample = batch[number]
        hidden_RD = self.cache.read(entry_key(sample), len(sample.response))
        buffer_GUD[at] = hidden_RD
      yield micro._replace(buffer=buffer_GUD)

  def summary(self, logged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what was computed and where it is, see `TeacherSource`."""
    del logged
    return self.facts


def _compute(
  cache: TeacherCache, missing: dict[str, int], run: TeacherRun
) -> None:
  """Runs the teacher over the batches that have something missing."""
  teacher, mesh, layout = run.teacher, run.mesh, run.layout
  model = hf.load(
    teacher.folder,
    dtype=teacher.dtype,
    mesh=mesh,
    in_float8=run.experiment.train.teacher_dtype == "float8",
  )
  graph, base = nnx.split(model)
  base = nnx.to_pure_dict(base)
  setup = TeacherSetup(
    teacher=graph,
    mesh=mesh,
    attention=run.pair.attention.implementation,
    deterministic=run.experiment.train.deterministic,
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
  size = layout.groups, layout.buffer_slots, head_VD.shape[1]
  # Made on the devices, each its own part. `teach` takes a buffer over, so the
  # two below are all that there ever are.
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
      host_GUD = jax.device_get(buffer)
      before = len(left)
      for number, at in places(batch, micro):
        key = entry_key(batch[number])
        if key in left:
          filler.add(key, host_GUD[at])
          left.discard(key)
      progress.update(before - len(left))

    # One buffer is fetched while the devices fill the other.
    buffers, pending = [blank(), blank()], None
    for batch in run.batches:
      if not any(entry_key(sample) in left for sample in batch):
        continue
      for micro in packing.pack(batch, layout):
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
