"""The programs of an update for a given model shape, from shapes alone.

`abstract` gives both sides as they are on a mesh without an array being made,
`random_arrays` fills such a tree on the devices, `make` builds the trainer's
own `Distiller` from either.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from shapes import Lengths

from trd_jax.distill import optimizer
from trd_jax.distill.distiller import Distiller
from trd_jax.distill.loss import objective
from trd_jax.distill.loss.token_stats import automatic_chunk
from trd_jax.distill.models import Models
from trd_jax.distill.packing import layout
from trd_jax.distill.packing.layout import Layout, Sample
from trd_jax.distill.step import Setup
from trd_jax.distill.teacher.source import hidden_slot
from trd_jax.experiment.experiment import (
  Experiment,
  default_config,
  from_config,
)
from trd_jax.model import float8, sharding
from trd_jax.model.config import ModelConfig
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.qwen3 import Qwen3

# Updates that the paper's run has: 40,245 trajectories in batches of 128.
_NUM_STEPS = 315
ONSETS = tuple(range(40))


def abstract(
  student: ModelConfig,
  teacher: ModelConfig | None,
  experiment: Experiment,
  mesh: jax.sharding.Mesh,
) -> Models:
  """Both sides as `ShapeDtypeStruct`s that carry their shardings.

  Args:
    student: the student's shape.
    teacher: the teacher's; None in OPSD.
    experiment: `lora`, the weights' dtype as `student.dtype`, and
      `train.teacher_dtype`.
    mesh: where they are placed.
  """

  def model(config, lora=None):
    dtype = experiment.student.dtype
    return jax.eval_shape(
      lambda: Qwen3(config, lora=lora, dtype=dtype, rngs=nnx.Rngs(0))
    )

  def place(state):
    return nnx.to_pure_dict(sharding.abstract(state, mesh))

  lora_config = LoraConfig(**vars(experiment.lora))
  graph, lora, base = nnx.split(model(student, lora_config), nnx.LoRAParam, ...)
  base = place(base)
  if experiment.train.teacher_dtype == "float8":
    dtype = experiment.student.dtype
    bare = float8.abstract(teacher or student, dtype)
    teacher_graph, teacher_base = nnx.split(bare)
    teacher_base = place(teacher_base)
    if teacher is None:
      teacher_base = _shared(base, teacher_base)
  else:
    teacher_graph, teacher_base = nnx.split(model(teacher or student))
    teacher_base = base if teacher is None else place(teacher_base)
  return Models(graph, place(lora), base, teacher_graph, teacher_base)


def _shared(base: Any, teacher_base: Any) -> Any:
  """Returns a teacher's tree with all of a student's base that it can use."""
  flat = nnx.traversals.flatten_mapping(teacher_base)
  for path, x in nnx.traversals.flatten_mapping(base).items():
    if path in flat and flat[path].dtype == x.dtype:
      flat[path] = x
  return nnx.traversals.unflatten_mapping(flat)


def random_arrays(sides: Models, seed: int = 0) -> Models:
  """The same trees as small random arrays, made where they stay."""

  def fill(tree, seed):
    leaves, form = jax.tree.flatten(tree)

    def values():
      keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(leaves))
      return [
        0.02 * jax.random.normal(key, x.shape, x.dtype)
        for key, x in zip(keys, leaves, strict=True)
      ]

    made = jax.jit(values, out_shardings=[x.sharding for x in leaves])()
    return jax.tree.unflatten(form, made)

  base = fill(sides.base, seed)
  teacher_base = base
  if sides.teacher_base is not sides.base:
    teacher_base = fill(sides.teacher_base, seed + 1)
  return sides._replace(
    lora=fill(sides.lora, seed + 2), base=base, teacher_base=teacher_base
  )


def slot_loss(
  experiment: Experiment, sides: Models, mesh: jax.sharding.Mesh
) -> Callable[..., Any]:
  """The loss of the experiment's method, with as many onsets as Qwen3 has."""
  wanted = objective.Objective.of(experiment)
  rows = chunk_tokens(experiment, sides, mesh)
  scoring = dataclasses.replace(wanted.scoring, chunk_tokens=rows)
  wanted = dataclasses.replace(wanted, scoring=scoring)
  return objective.slot_loss(wanted, ONSETS)


def chunk_tokens(
  experiment: Experiment, sides: Models, mesh: jax.sharding.Mesh
) -> int:
  """Returns `loss.chunk_tokens`; an automatic one is the mesh's devices'.

  These need not be those that JAX runs on here.
  """
  table_VD = sides.base["embed"]["embedding"]
  V, D = table_VD.shape
  return experiment.loss.chunk_tokens or automatic_chunk(
    D,
    V // mesh.shape["tensor"],
    table_VD.dtype,
    mesh.devices.flat[0].platform,
  )


def make(
  sides: Models,
  experiment: Experiment,
  mesh: jax.sharding.Mesh,
  shapes: Layout,
) -> Distiller:
  """The trainer's programs, with the optimizer and loss of `experiment`."""
  train: Any = experiment.train
  setup = Setup(
    student=sides.student,
    teacher=sides.teacher,
    loss=slot_loss(experiment, sides, mesh),
    optimizer=optimizer.make_optimizer(train, _NUM_STEPS),
    schedule=optimizer.schedule(train, _NUM_STEPS),
    mesh=mesh,
    remat=train.remat,
    dropout=experiment.lora.dropout > 0,
  )
  # The teacher's embedding is as wide as its hidden states.
  table_VD = sides.teacher_base["embed"]["embedding"]
  return Distiller(
    setup,
    sides.lora,
    sides.base,
    sides.teacher_base,
    shapes.buffer_slots,
    hidden_slot(table_VD.shape[1], table_VD.dtype),
  )


def samples(lengths: Lengths, count: int, vocab_size: int) -> list[Sample]:
  """Trajectories of these lengths with random ids."""
  rng = np.random.default_rng(0)

  def ids(length):
    return rng.integers(0, vocab_size, length, np.int32)

  return [
    Sample(
      f"s{number}",
      ids(lengths.student - lengths.response),
      ids(lengths.teacher - lengths.response),
      ids(lengths.response),
      correct=bool(number % 2),
    )
    for number in range(count)
  ]


def one_row_packs(data: list[Sample], groups: int, lengths: Lengths) -> Layout:
  """Packs of one row of these lengths, the buffer as the trainer makes it."""
  return layout.choose_layout(
    data,
    groups=groups,
    batch_size=len(data),
    pack_tokens=lengths.student,
    teacher_pack_tokens=lengths.teacher,
  )


def experiment_with(**changes: Any) -> Experiment:
  """The default experiment in bfloat16, with `section__key=value` changes."""
  config = default_config()
  config.student.dtype = "bfloat16"
  for name, value in changes.items():
    section, key = name.split("__")
    config[section][key] = value
  return from_config(config)


def shape_of(tree: Any) -> Any:
  """The shapes and dtypes of a tree of host arrays."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
