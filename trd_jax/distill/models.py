"""The student and the teacher of a run, placed on its mesh."""

import functools
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from trd_jax.data import vocabulary
from trd_jax.distill.model_pair import Pair
from trd_jax.distill.step import Tree
from trd_jax.distill.teacher.source import Weights
from trd_jax.experiment.experiment import Experiment
from trd_jax.model import float8, sharding
from trd_jax.model.config import ModelConfig
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.qwen3 import Qwen3
from trd_jax.model.weights import adapters, hf


class Models(NamedTuple):
  """Graph definitions, and trees of arrays or of what stands for them.

  Attributes:
    student: graph definition of the adapted student.
    lora: the adapter as nested dicts.
    base: the student's base.
    teacher: graph definition of the teacher, or of its head alone.
    teacher_base: its weights; the object `base` itself where the student's
      base teaches, or where no teacher is needed. In eight bits the student's
      base shares with it all but the kernels of linear layers.
  """

  student: Any
  lora: Tree
  base: Tree
  teacher: Any
  teacher_base: Tree


def own_teacher(experiment: Experiment, weights: Weights) -> bool:
  """Returns whether a teacher is loaded that isn't the student's base."""
  return experiment.regime == "opd" and weights != "none"


def load(
  experiment: Experiment,
  pair: Pair,
  weights: Weights,
  mesh: Mesh,
) -> Models:
  """Loads the models, each part onto the devices that hold it.

  Args:
    experiment: `regime`, `lora`, `seed` (of a new adapter),
      `student.adapter`, which a new adapter gives way to, and
      `train.teacher_dtype`.
    pair: the student and the teacher on disk.
    weights: what the teacher's source needs of it.
    mesh: where they are placed.

  Raises:
    UserError: a file is missing or damaged, or an adapter doesn't fit.
  """
  student, teacher = pair.student, pair.teacher
  lora_config = LoraConfig(**vars(experiment.lora))
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
  # A head alone scores as it does without.
  in_float8 = experiment.train.teacher_dtype == "float8" and weights == "model"
  if not own_teacher(experiment, weights):
    if in_float8:
      # Half a copy more: the student reads the kernels as they are.
      return Models(
        graph,
        lora,
        base,
        nnx.graphdef(float8.abstract(model.config, model.head_VD.dtype)),
        float8.of_tree(base),
      )
    # One copy of the weights: the same arrays under a graph definition without
    # adapters. Recorded tokens need no teacher; this one holds its place.
    bare = base_graph(model.config, model.head_VD.dtype)
    return Models(graph, lora, base, bare, base)
  if weights == "model":
    read = functools.partial(hf.load, in_float8=in_float8)
  else:
    read = hf.load_head
  other = read(teacher.folder, dtype=teacher.dtype, mesh=mesh)
  teacher_graph, teacher_base = nnx.split(other)
  teacher_base = nnx.to_pure_dict(teacher_base)
  rows, _ = vocabulary.shared_rows([c.vocab_size for c in pair.configs])
  return Models(
    graph,
    lora,
    with_head_rows(base, rows, mesh),
    teacher_graph,
    with_head_rows(teacher_base, rows, mesh),
  )


def with_head_rows(base: Tree, rows: int, mesh: Mesh) -> Tree:
  """Returns a model's weights with only the head's first rows.

  What is above the ids of the tokenizer is padding, of which families have
  more or less: a softmax over what both heads have is the one that both give.
  Where the head is the embedding, that loses the same rows, which no text has.

  Args:
    base: of a `Qwen3` or of a `Head` alone.
    rows: how many stay, no more than there are.
    mesh: where the head is placed.
  """
  if "weight" in base:
    path = ("weight",)
  elif "head" in base:
    path = ("head", "weight")
  else:
    path = ("embed", "embedding")
  # Equal heads stay as they are, so that nothing is copied in the common case.
  flat = nnx.traversals.flatten_mapping(base)
  head_VD = flat[path]
  if len(head_VD) == rows:
    return base
  spec = sharding.partition((rows, head_VD.shape[1]), ("vocab", "embed"), mesh)
  first_rows = jax.jit(
    lambda x_VD: x_VD[:rows],
    out_shardings=jax.sharding.NamedSharding(mesh, spec),
  )
  flat[path] = first_rows(head_VD)
  return nnx.traversals.unflatten_mapping(flat)


def base_graph(
  config: ModelConfig, dtype: jax.typing.DTypeLike = "float32"
) -> nnx.GraphDef:
  """Returns the graph definition of a model without adapters."""
  return nnx.graphdef(
    jax.eval_shape(lambda: Qwen3(config, dtype=dtype, rngs=nnx.Rngs(0)))
  )
