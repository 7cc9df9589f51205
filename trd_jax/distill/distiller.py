"""The loop over the packs of an update, on the compiled programs of a run.

`step` says what an update computes, `programs` how it is compiled.
"""

from collections.abc import Iterable
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from trd_jax.distill import optimizer, programs
from trd_jax.distill.compilation import Program, compile_all
from trd_jax.distill.loss.objective import Objective
from trd_jax.distill.model_pair import Pair
from trd_jax.distill.models import Models
from trd_jax.distill.packing import packing
from trd_jax.distill.packing.layout import Layout
from trd_jax.distill.packing.packing import MicroBatch, StudentPack, TeacherPack
from trd_jax.distill.programs import PRNG, Kept, Programs
from trd_jax.distill.step import Setup, Totals, TrainState, Tree
from trd_jax.distill.teacher.source import TeacherSource
from trd_jax.experiment.experiment import Experiment
from trd_jax.model import sharding
from trd_jax.model.qwen3 import Remat


class Distiller:
  """Runs updates: the programs of a run, and what stays on its mesh.

  Args:
    setup: what the programs are compiled for.
    lora: the adapter before the first update, placed on the mesh.
    base: the student's base arrays, placed on the mesh.
    teacher_base: the teacher's, or of a teacher that only scores its head;
      the same object in OPSD.
    buffer_slots: slots of a group's teacher buffer (U).
    slot: a tree of the shapes and dtypes of what one of them holds; see
      `source.hidden_slot` for a teacher that is run.
  """

  def __init__(
    self,
    setup: Setup,
    lora: Tree,
    base: Tree,
    teacher_base: Tree,
    buffer_slots: int,
    slot: Tree,
  ):
    self._setup = setup
    self._bases = base, teacher_base
    self._kept = Kept.of(setup, lora, base, teacher_base, buffer_slots, slot)
    self._programs = Programs.of(setup, self._kept, base, teacher_base)
    # Made by `_make_sums` when they are needed: `lower` needs no arrays.
    self._buffer: Any = None
    self._totals: Any = None

  @classmethod
  def for_run(
    cls,
    experiment: Experiment,
    pair: Pair,
    models: Models,
    source: TeacherSource,
    mesh: Mesh,
    num_steps: int,
  ) -> "Distiller":
    """Makes the distiller that a config asks for.

    Args:
      experiment: its sections `train`, `loss` and `lora`, and its method.
      pair: its attention, and the onsets' ids in the student's vocabulary.
      models: student and teacher on the mesh.
      source: what fills the teacher's buffer.
      mesh: where everything is.
      num_steps: updates of the whole run, for the schedule.
    """
    train = experiment.train
    setup = Setup(
      student=models.student,
      teacher=models.teacher,
      loss=source.slot_loss(
        Objective.of(experiment), pair.chats[0].onset_ids()
      ),
      optimizer=optimizer.make_optimizer(train, num_steps),
      schedule=optimizer.schedule(train, num_steps),
      mesh=mesh,
      remat=cast(Remat, train.remat),
      attention=pair.attention.implementation,
      deterministic=train.deterministic,
      dropout=experiment.lora.dropout > 0,
      split_vocab=source.weights != "none",
    )
    return cls(
      setup,
      models.lora,
      models.base,
      models.teacher_base,
      source.layout.buffer_slots,
      source.slot,
    )

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
    # Shapes are all that compiling needs; no pack of zeros is ever placed.
    buffer, totals = self.abstract_sums()
    wanted: dict[str, tuple[Program, tuple]] = {}
    for pack in packs.teacher:
      name = f"teach {pack.rows.tokens.shape[-1]}"
      wanted[name] = self._programs.teach, (buffer, teacher_base, pack)
    for pack in packs.student:
      name = f"learn {pack.rows.tokens.shape[-1]}"
      arguments = self._learn_arguments(self.abstract_sums(), state, pack, 0)
      wanted[name] = self._programs.learn, arguments
    wanted["update"] = self._programs.update, (state, totals)
    with jax.set_mesh(mesh):
      self._make_sums()
      return compile_all(wanted)

  def init(self, lora: Tree, seed: int) -> TrainState:
    """Returns the state before the first update; `seed` is the dropout's."""
    step, rng = jax.device_put(
      (np.int32(0), jax.random.key_data(jax.random.key(seed, impl=PRNG))),
      sharding.replicated(self._setup.mesh),
    )
    return TrainState(step, lora, self._programs.init(lora), rng)

  def abstract_state(self, lora: Tree) -> TrainState:
    """Returns shapes, dtypes and shardings of the state, to restore into."""
    return programs.abstract_state(self._setup, lora)

  def abstract_sums(self) -> tuple[Tree, Totals]:
    """Returns the abstract teacher buffer and totals that stay on the mesh.

    The buffer is a tree of what a slot has: a hidden state, or recorded
    tokens.
    """
    return self._kept.buffer, self._kept.totals

  def lower(
    self, lora: Tree, teacher: TeacherPack, student: StudentPack
  ) -> dict[str, jax.stages.Lowered]:
    """Lowers the programs of an update for packs of these shapes.

    Nothing is compiled, placed or run, so `Distiller` itself may have been made
    of `ShapeDtypeStruct`s that carry their shardings.

    Args:
      lora: the adapter, arrays or abstract.
      teacher: one of its packs, arrays or abstract.
      student: likewise.
    """
    buffer, totals = self.abstract_sums()
    state = self.abstract_state(lora)
    learn = self._learn_arguments(self.abstract_sums(), state, student, 0)
    with jax.set_mesh(self._setup.mesh):
      return {
        "teach": self._programs.teach.lower((buffer, self._bases[1], teacher)),
        "learn": self._programs.learn.lower(learn),
        "update": self._programs.update.lower((state, totals)),
      }

  def update(
    self, state: TrainState, batches: Iterable[MicroBatch]
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one update; returns before the devices have done it.

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
        # A new array: launched packs that read the one before keep it, and
        # nothing has to be waited for.
        if batch.buffer is not None:
          self._buffer = sharding.shard_batch(batch.buffer, mesh)
        for pack in batch.teacher:
          pack = sharding.shard_batch(pack, mesh)
          self._buffer = self._programs.teach(self._buffer, teacher_base, pack)
        for pack in batch.student:
          pack = sharding.shard_batch(pack, mesh)
          self._totals = self._programs.learn(
            *self._learn_arguments(
              (self._buffer, self._totals), state, pack, number
            )
          )
          # Over all micro-batches of the update: it keys the dropout, and two
          # packs of one number would drop the same channels.
          number += 1
      state, self._totals, metrics = self._programs.update(state, self._totals)
    return state, metrics

  def _make_sums(self) -> None:
    if self._totals is None:
      self._buffer, self._totals = programs.zeros(self.abstract_sums())

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
