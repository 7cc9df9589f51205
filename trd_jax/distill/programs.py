"""The programs of an update, and the shapes that they are compiled for.

`step` says what an update computes; here it is jitted, with the places of all
that goes in and comes out.

Shape key as in `packing`: G groups, U buffer slots; D residual channels, V
vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from trd_jax.distill import step as distill_step
from trd_jax.distill.compilation import Program
from trd_jax.distill.loss import metrics as loss_metrics
from trd_jax.distill.optimizer import state_shardings
from trd_jax.distill.packing.packing import Slots, StudentPack
from trd_jax.distill.step import (
  Setup,
  TeacherSetup,
  Totals,
  TrainState,
  Tree,
)
from trd_jax.model import sharding

# Of the keys of dropout, which checkpoints hold: threefry takes seconds to
# compile.
PRNG = "rbg"


class Kept(NamedTuple):
  """What stays on the mesh from update to update, as shapes and places.

  Attributes:
    state: the adapter, the optimizer's state, counters.
    totals: the sums over the packs of an update.
    buffer: a tree of what the teacher's slots hold, `[G, U, ...]`.
  """

  state: TrainState
  totals: Totals
  buffer: Tree

  @classmethod
  def of(
    cls,
    setup: Setup,
    lora: Tree,
    base: Tree,
    teacher_base: Tree,
    buffer_slots: int,
    slot: Tree,
  ) -> "Kept":
    """Derives the shapes from a setup and the arrays that it is for.

    Args:
      setup: what programs are compiled for.
      lora: the adapter, arrays or abstract, with its places.
      base: the student's base, likewise.
      teacher_base: the teacher's weights, likewise.
      buffer_slots: slots of a group's teacher buffer (U).
      slot: shapes and dtypes of what one of them holds.
    """
    state = abstract_state(setup, lora)
    heads = _heads(setup, lora, base, teacher_base)
    groups = sharding.num_groups(setup.mesh)
    place = sharding.batch_sharding(setup.mesh)
    return cls(
      state,
      _abstract_totals(setup, state.lora, heads, slot),
      _abstract_buffer(slot, groups, buffer_slots, place),
    )


class Programs(NamedTuple):
  """The jitted functions of a run.

  Attributes:
    teach: `(buffer, teacher_base, pack) -> buffer`.
    learn: see `add_pack`.
    update: `(state, totals) -> (state, totals of zero, metrics)`.
    init: `lora -> opt_state`.
  """

  teach: Program
  learn: Program
  update: Program
  init: Any

  @classmethod
  def of(
    cls, setup: Setup, kept: Kept, base: Tree, teacher_base: Tree
  ) -> "Programs":
    """Jits the functions of `step` for what is kept and where it stays."""
    everywhere = sharding.replicated(setup.mesh)
    groups = sharding.batch_sharding(setup.mesh)
    state_at, totals_at, base_at, teacher_at = jax.tree.map(
      lambda x: x.sharding, (kept.state, kept.totals, base, teacher_base)
    )
    # Places are said on both sides. What is donated can only be written over
    # where it comes back in the same place, and what came back in another one
    # wouldn't fit the executable of the next call.
    teach = teacher_program(setup, teacher_at)
    learn = Program(
      functools.partial(add_pack, setup),
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
    update = Program(
      functools.partial(distill_step.update, setup),
      in_shardings=(state_at, totals_at),
      out_shardings=(state_at, totals_at, everywhere),
      donate_argnums=(0, 1),
      compiler_options=setup.compiler_options,
    )
    init = jax.jit(
      setup.optimizer.init,
      in_shardings=(state_at.lora,),
      out_shardings=state_at.opt_state,
    )
    return cls(teach, learn, update, init)


def teacher_program(setup: TeacherSetup, teacher_at: Tree) -> Program:
  """Jits `step.teach`: `(buffer, teacher_base, pack) -> buffer`, donated.

  Args:
    setup: the teacher and its mesh.
    teacher_at: where the teacher's weights are placed.
  """
  groups = sharding.batch_sharding(setup.mesh)
  return Program(
    functools.partial(distill_step.teach, setup),
    varies=2,
    in_shardings=(groups, teacher_at, groups),
    out_shardings=groups,
    donate_argnums=0,
    compiler_options=setup.compiler_options,
  )


def add_pack(
  setup: Setup,
  totals: Totals,
  lora: Tree,
  base: Tree,
  teacher_base: Tree,
  buffer: Tree,
  pack: StudentPack,
  rng: jax.Array,
  step: jax.Array,
  number: jax.Array,
) -> Totals:
  """Adds a student pack's gradient and metrics to the totals.

  Args:
    setup: see `Setup`.
    totals: of the packs before.
    lora: see `step.learn`, also for the next four.
    base: the student's.
    teacher_base: the teacher's.
    buffer: what is known of the teacher.
    pack: the student's rows and slots.
    rng: uint32 key data of the run.
    step: number of the update.
    number: of the pack in it; with the two before it keys the dropout.
  """
  key = jax.random.fold_in(jax.random.wrap_key_data(rng, impl=PRNG), step)
  key = jax.random.fold_in(key, number)
  one = distill_step.learn(setup, lora, base, teacher_base, buffer, pack, key)
  # Two kinds of sums: gradients are added up, and of the metrics the largest
  # divergence is kept.
  return Totals(
    jax.tree.map(jnp.add, totals.grads, one.grads),
    loss_metrics.add(totals.metrics, one.metrics),
  )


def abstract_state(setup: Setup, lora: Tree) -> TrainState:
  """Returns shapes, dtypes and shardings of the state, to restore into."""

  def place(x, where) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  everywhere = sharding.replicated(setup.mesh)
  lora_at = jax.tree.map(lambda x: x.sharding, lora)
  opt_state_at = state_shardings(setup.optimizer, lora, lora_at, setup.mesh)
  rng = jax.eval_shape(
    lambda: jax.random.key_data(jax.random.key(0, impl=PRNG))
  )
  return TrainState(
    place(jax.ShapeDtypeStruct((), jnp.int32), everywhere),
    jax.tree.map(place, lora, lora_at),
    jax.tree.map(
      place, jax.eval_shape(setup.optimizer.init, lora), opt_state_at
    ),
    place(rng, everywhere),
  )


def zeros(tree: Tree) -> Tree:
  """Makes arrays of zeros, placed as their abstract ones say."""
  return jax.jit(
    lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree),
    out_shardings=jax.tree.map(lambda x: x.sharding, tree),
  )()


def _heads(setup, lora, base, teacher_base) -> tuple[jax.Array, jax.Array]:
  """Returns the shapes of the student's and the teacher's head."""
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
  """Returns the shapes of the teacher's buffer `[G, U, ...]`, placed."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (groups, slots, *x.shape), x.dtype, sharding=place
    ),
    slot,
  )


def _abstract_totals(setup, lora, heads, slot) -> Totals:
  """Returns the shapes of the totals; the loss is asked for its metrics."""
  copies, axis = setup.copies, "data" if setup.replicated else None

  def place(shape, spec) -> Any:
    where = NamedSharding(setup.mesh, P(axis, *spec))
    return jax.ShapeDtypeStruct((copies, *shape), jnp.float32, sharding=where)

  # One group, one row, one slot: names of metrics depend on no size.
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
    jax.tree.map(lambda x: place(x.shape[1:], ()), metrics),
  )
