"""A toy student, a toy teacher and trajectories, for tests of the update."""

import dataclasses
import functools

import jax
import numpy as np
import optax
from flax import nnx

from tests.support import small_models
from trd_jax.distill.distiller import Distiller
from trd_jax.distill.loss import metrics as loss_metrics
from trd_jax.distill.loss import objective
from trd_jax.distill.loss.objective import Objective
from trd_jax.distill.models import Models, base_graph
from trd_jax.distill.packing import layout, packing
from trd_jax.distill.packing.layout import Sample
from trd_jax.distill.step import Setup
from trd_jax.distill.teacher.source import hidden_slot
from trd_jax.model import sharding

STUDENT = dataclasses.replace(small_models.SMALL, tie_embeddings=True)
# Another width and an untied head.
TEACHER = dataclasses.replace(
  small_models.SMALL, hidden_size=24, num_kv_heads=4
)
ONSETS = (3, 5)

# Its state after an update is the gradient, and the parameters don't move.
GRADIENT = optax.chain(optax.trace(decay=0.0), optax.set_to_zero())


@functools.cache
def models(regime="opsd") -> Models:
  """Random models; in OPSD the teacher is the student's base."""
  made = small_models.model(STUDENT, lora=small_models.LORA)
  student, adapter, base = nnx.split(made, nnx.LoRAParam, ...)
  # On the host, for an update donates what is on the device.
  adapter, base = jax.device_get((adapter, base))
  if regime == "opsd":
    return Models(student, adapter, base, base_graph(STUDENT), base)
  teacher, other = nnx.split(small_models.model(TEACHER, seed=1))
  return Models(student, adapter, base, teacher, jax.device_get(other))


def samples(count, seed=0, longest=14) -> list[Sample]:
  """Random trajectories of 2 tokens and more, half of them correct."""
  rng = np.random.default_rng(seed)

  def ids():
    return rng.integers(1, 64, rng.integers(2, longest)).astype(np.int32)

  return [
    Sample(f"s{i}", ids(), ids(), ids(), correct=bool(i % 2))
    for i in range(count)
  ]


def make_mesh(shape):
  """A mesh over as many devices as its shape needs."""
  devices = jax.devices()[: int(np.prod(shape))]
  return sharding.make_mesh(*shape, devices=devices)


class Run:
  """A distiller with its state and the shapes for some trajectories."""

  def __init__(
    self,
    both: Models,
    data,
    mesh_shape=(1, 1, 1),
    *,
    loss=None,
    optimizer=GRADIENT,
    dropout=False,
    remat="none",
    buffer_slots=None,
    **plan,
  ):
    mesh = make_mesh(mesh_shape)

    def place(state):
      where = nnx.to_pure_dict(sharding.shardings(state, mesh))
      return jax.device_put(nnx.to_pure_dict(state), where)

    self.layout = layout.choose_layout(
      data, groups=sharding.num_groups(mesh), batch_size=len(data), **plan
    )
    if buffer_slots is not None:
      self.layout = dataclasses.replace(self.layout, buffer_slots=buffer_slots)
    self.setup = Setup(
      student=both.student,
      teacher=both.teacher,
      loss=objective.slot_loss(loss or Objective(), ONSETS),
      optimizer=optimizer,
      schedule=lambda step: step * 1.0,
      mesh=mesh,
      remat=remat,
      dropout=dropout,
    )
    lora, base = place(both.lora), place(both.base)
    teacher_base = base
    if both.teacher_base is not both.base:
      teacher_base = place(both.teacher_base)
    self.distiller = Distiller(
      self.setup,
      lora,
      base,
      teacher_base,
      self.layout.buffer_slots,
      hidden_slot(teacher_base["embed"]["embedding"].shape[1], "float32"),
    )
    self.state = self.distiller.init(lora, seed=0)

  def update(self, data) -> dict[str, float]:
    """One update with the whole of `data` as its batch."""
    packs = packing.pack(data, self.layout)
    self.state, metrics = self.distiller.update(self.state, packs)
    return loss_metrics.finish(jax.device_get(metrics))

  @property
  def gradient(self):
    """The last update's gradient, where the optimizer is `GRADIENT`."""
    return jax.device_get(self.state.opt_state[0].trace)
