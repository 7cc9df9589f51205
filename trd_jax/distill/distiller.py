"""The compiled programs of a training run, placed on its mesh, and the loop.

`distill_step` says what an update computes; this is the shell around it.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from trd_jax.distill import step as distill_step
from trd_jax.distill.compilation import Program, compile_all
from trd_jax.distill.optimizer import state_shardings
from trd_jax.distill.packing import packing
from trd_jax.distill.packing.layout import Layout
from trd_jax.distill.packing.packing import (
  MicroBatch,
  Slots,
  StudentPack,
  TeacherPack,
)
from trd_jax.distill.step import Setup, Totals, TrainState, Tree
from trd_jax.model import sharding

# Dropout bits from the hardware generator: threefry takes seconds to compile.
_PRNG = "rbg"


class Distiller:
  """The programs of a run, and the loop over the packs of an update.

  Args:
    setup: what they are compiled for.
    lora: the adapter before the first update, placed on the mesh.
    base: the student's base arrays, placed on the mesh.
    teacher_base: the teacher's, or of a teacher that only scores its head;
      the same object in OPSD.
    buffer_slots: slots of a group's teacher buffer (C).
    slot: a tree of the shapes and dtypes of one of them; None for a hidden
      state of the teacher.
  """

  def __init__(
    self,
    setup: Setup,
    lora: Tree,
    base: Tree,
    teacher_base: Tree,
    buffer_slots: int,
    slot: Tree = None,
  ):
    mesh = setup.mesh
    self._setup = setup
    self._bases = base, teacher_base
    self._everywhere = everywhere = sharding.replicated(mesh)
    groups = sharding.batch_sharding(mesh)
    heads = _heads(setup, lora, base, teacher_base)
    if slot is None:
      slot = jax.ShapeDtypeStruct(heads[1].shape[1:], heads[1].dtype)
    shape = sharding.num_groups(mesh), buffer_slots
    like = self.abstract_state(lora)
    totals = _abstract_totals(setup, like.lora, heads, slot)
    places = jax.tree.map(
      lambda x: x.sharding, (like, totals, base, teacher_base)
    )
    state_at, totals_at, base_at, teacher_at = places

    def more(totals, lora, base, teacher_base, buffer, pack, *at):
      rng, step, number = at
      key = jax.random.fold_in(jax.random.wrap_key_data(rng, impl=_PRNG), step)
      key = jax.random.fold_in(key, number)
      one = distill_step.learn(
        setup, lora, base, teacher_base, buffer, pack, key
      )
      return jax.tree.map(jnp.add, totals, one)

    self._teach = Program(
      functools.partial(distill_step.teach, setup),
      varies=2,
      in_shardings=(groups, teacher_at, groups),
      out_shardings=groups,
      donate_argnums=0,
      compiler_options=setup.compiler_options,
    )
    self._learn = Program(
      more,
      varies=5,
      in_shardings=(
        totals_at,
        state_at.lora,
        base_at,
        teacher_at,
        groups,
        groups,
        *[everywhere] * 3,
      ),
      out_shardings=totals_at,
      donate_argnums=0,
      compiler_options=setup.compiler_options,
    )
    self._update = Program(
      functools.partial(distill_step.update, setup),
      in_shardings=(state_at, totals_at),
      out_shardings=(state_at, totals_at, everywhere),
      donate_argnums=(0, 1),
      compiler_options=setup.compiler_options,
    )
    self._init = jax.jit(
      setup.optimizer.init,
      in_shardings=(state_at.lora,),
      out_shardings=state_at.opt_state,
    )
    self._abstract_sums = (
      _abstract_buffer(slot, *shape, groups),
      totals,
    )
    # Made by `_make_sums` when they are needed: `lower` needs no arrays.
    self._buffer: Any = None
    self._totals: Any = None

  def compile(self, layout: Layout, state: TrainState) -> dict[str, Any]:
    """Compiles all that updates run, for every shape of the layout.

    Returns:
      The executables by name and, where there are several, length of a row.
    """
    mesh = self._setup.mesh
    teacher_base = self._bases[1]
    packs = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding.batch_sharding(mesh)
      ),
      packing.blank(layout),
    )
    buffer, totals = self._abstract_sums
    wanted: dict[str, tuple[Program, tuple]] = {}
    for pack in packs.teacher:
      name = f"teach {pack.rows.tokens.shape[-1]}"
      wanted[name] = self._teach, (buffer, teacher_base, pack)
    for pack in packs.student:
      name = f"learn {pack.rows.tokens.shape[-1]}"
      arguments = self._learn_arguments(self._abstract_sums, state, pack, 0)
      wanted[name] = self._learn, arguments
    wanted["update"] = self._update, (state, totals)
    with jax.set_mesh(mesh):
      self._make_sums()
      return compile_all(wanted)

  def init(self, lora: Tree, seed: int) -> TrainState:
    """The state before the first update; `seed` is the dropout's."""
    step, rng = jax.device_put(
      (np.int32(0), jax.random.key_data(jax.random.key(seed, impl=_PRNG))),
      self._everywhere,
    )
    return TrainState(step, lora, self._init(lora), rng)

  def abstract_state(self, lora: Tree) -> TrainState:
    """Shapes, dtypes and shardings of the state, to restore into."""
    setup = self._setup

    def place(x, where) -> Any:
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    lora_at = jax.tree.map(lambda x: x.sharding, lora)
    opt_state_at = state_shardings(setup.optimizer, lora, lora_at, setup.mesh)
    rng = jax.eval_shape(
      lambda: jax.random.key_data(jax.random.key(0, impl=_PRNG))
    )
    return TrainState(
      place(jax.ShapeDtypeStruct((), jnp.int32), self._everywhere),
      jax.tree.map(place, lora, lora_at),
      jax.tree.map(
        place, jax.eval_shape(setup.optimizer.init, lora), opt_state_at
      ),
      place(rng, self._everywhere),
    )

  def abstract_sums(self) -> tuple[Tree, Totals]:
    """The teacher buffer and the totals that an update keeps on the mesh.

    The buffer is a tree of what a slot has: a hidden state, or recorded
    tokens.
    """
    return self._abstract_sums

  def lower(
    self, lora: Tree, teacher: TeacherPack, student: StudentPack
  ) -> dict[str, jax.stages.Lowered]:
    """The programs of an update for packs of these shapes, not yet compiled.

    Nothing is placed or run, so `Distiller` itself may have been made of
    `ShapeDtypeStruct`s that carry their shardings.

    Args:
      lora: the adapter, arrays or abstract.
      teacher: one of its packs, arrays or abstract.
      student: likewise.
    """
    buffer, totals = self._abstract_sums
    state = self.abstract_state(lora)
    learn = self._learn_arguments(self._abstract_sums, state, student, 0)
    with jax.set_mesh(self._setup.mesh):
      return {
        "teach": self._teach.lower((buffer, self._bases[1], teacher)),
        "learn": self._learn.lower(learn),
        "update": self._update.lower((state, totals)),
      }

  def update(
    self, state: TrainState, batches: Iterable[MicroBatch]
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update; returns before the devices have done it.

    Args:
      state: is donated.
      batches: the whole optimizer batch, from `packing.pack`.

    Returns:
      The new state and the metrics, see `update`.
    """
    mesh = self._setup.mesh
    teacher_base = self._bases[1]
    number = 0
    with jax.set_mesh(mesh):
      self._make_sums()
      for batch in batches:
        if batch.buffer is not None:
          self._buffer = sharding.shard_batch(batch.buffer, mesh)
        for pack in batch.teacher:
          pack = sharding.shard_batch(pack, mesh)
          self._buffer = self._teach(self._buffer, teacher_base, pack)
        for pack in batch.student:
          pack = sharding.shard_batch(pack, mesh)
          self._totals = self._learn(
            *self._learn_arguments(
              (self._buffer, self._totals), state, pack, number
            )
          )
          number += 1
      state, self._totals, metrics = self._update(state, self._totals)
    return state, metrics

  def _make_sums(self) -> None:
    if self._totals is None:
      self._buffer, self._totals = _zeros(self._abstract_sums)

  def _learn_arguments(
    self, sums: tuple, state: TrainState, pack: Any, number: int
  ) -> tuple:
    buffer, totals = sums
    return (
      totals,
      state.lora,
      *self._bases,
      buffer,
      pack,
      state.rng,
      state.step,
      np.int32(number),
    )


def _zeros(tree: Tree) -> Tree:
  """Arrays of zeros, placed as their abstract ones say."""
  return jax.jit(
    lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree),
    out_shardings=jax.tree.map(lambda x: x.sharding, tree),
  )()


def _heads(setup, lora, base, teacher_base) -> tuple[jax.Array, jax.Array]:
  """Shapes of the student's and the teacher's head."""
  return jax.eval_shape(
    lambda lora, base, teacher_base: (
      nnx.merge(setup.student, lora, base).head_VD,
      nnx.merge(setup.teacher, teacher_base).head_VD,
    ),
    lora,
    base,
    teacher_base,
  )


def _abstract_buffer(slot, groups, slots, place=None) -> Any:
  """Shapes of the teacher's buffer `[G, C, ...]`, and where it is put."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (groups, slots, *x.shape), x.dtype, sharding=place
    ),
    slot,
  )


def _abstract_totals(setup, lora, heads, slot) -> Totals:
  """Shapes and places of the totals; the loss is asked for its metrics."""
  rows, row = setup.rows, "data" if setup.replicated else None

  def place(shape, spec) -> Any:
    where = NamedSharding(setup.mesh, P(row, *spec))
    return jax.ShapeDtypeStruct((rows, *shape), jnp.float32, sharding=where)

  ints: Any = jax.ShapeDtypeStruct((1, 1, 1), jnp.int32)
  floats: Any = jax.ShapeDtypeStruct((1, 1, 1), jnp.float32)
  width, dtype = heads[0].shape[1], heads[0].dtype
  student = jax.ShapeDtypeStruct((1, 1, 1, width), dtype)
  buffer = _abstract_buffer(slot, 1, 1)
  slots = Slots(*(ints,) * len(Slots._fields))._replace(weight=floats)
  score = functools.partial(distill_step.score, setup.loss)
  _, metrics = jax.eval_shape(score, student, buffer, slots, *heads)
  return Totals(
    jax.tree.map(lambda x: place(x.shape, x.sharding.spec), lora),
    {name: place((2,), ()) for name in metrics},
  )
