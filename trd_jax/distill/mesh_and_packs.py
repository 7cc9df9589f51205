"""The mesh of a run and the shapes of its packs, which depend on each other.

The mesh has to hold the packs, and the packs are cut for as many groups as the
mesh has.
"""

import functools
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from trd_jax.distill import mesh_choice
from trd_jax.distill.mesh_choice import ModelSize
from trd_jax.distill.model_pair import Pair
from trd_jax.distill.models import own_teacher
from trd_jax.distill.packing.flops import sample_flops
from trd_jax.distill.packing.layout import Layout, Sample, choose_layout
from trd_jax.distill.teacher.source import Weights
from trd_jax.experiment.experiment import Experiment
from trd_jax.model import sharding
from trd_jax.model.lora_config import LoraConfig

# Tokens of a student pack that is one long row, by the memory that there is. A
# product of 16K rows is as fast as one of 32K.
_LONG_ROWS = (2048, 4096, 8192, 16_384)


def choose(
  experiment: Experiment,
  pair: Pair,
  samples: Sequence[Sample],
  weights: Weights,
  devices: Sequence[Any] | None = None,
) -> tuple[Mesh, Layout, str]:
  """Chooses the mesh, as given or as the sizes ask for, and the packs' shapes.

  Args:
    experiment: its sections `mesh`, `train`, `loss` and `lora`.
    pair: the models, and their attention.
    samples: every sample of the run.
    weights: what the teacher's source needs of the teacher.
    devices: that the run is planned for, where JAX doesn't run on them: then
      `mesh` says their memory or how they are shared out.

  Returns:
    The mesh, the shapes, and how the mesh was chosen: '' where there was
    nothing to choose.

  Raises:
    UserError: see `mesh_choice.make`.
  """
  train, attention = experiment.train, pair.attention.implementation
  flops = sample_flops(
    *pair.configs, rank=experiment.lora.rank, remat=train.remat
  )
  if weights == "none":  # no teacher is there to run
    flops = flops._replace(teacher_token=0.0, teacher_pair=0.0)
  layout = functools.partial(
    choose_layout,
    samples,
    batch_size=train.batch_size,
    pack_tokens=train.pack_tokens,
    teacher_pack_tokens=train.teacher_pack_tokens,
    rows_per_device=train.rows_per_device,
    packing=pair.attention.packing,
    flops=flops,
    long_rows=_LONG_ROWS[0] if attention == "cudnn_packed" else None,
  )
  student, teacher = (
    ModelSize(config, files.dtype)
    for config, files in zip(
      pair.configs, (pair.student, pair.teacher), strict=True
    )
  )
  sizes = mesh_choice.Sizes(
    student=student,
    teacher=teacher if own_teacher(experiment, weights) else None,
    lora=LoraConfig(**vars(experiment.lora)),
    layout=lambda groups: layout(groups=groups),
    chunk_tokens=experiment.loss.chunk_tokens,
    remat=train.remat,
    weights=weights,
    recorded=experiment.refine.teacher_top_k,
    in_float8=train.teacher_dtype == "float8",
  )
  mesh, told = mesh_choice.make(experiment.mesh, sizes, attention, devices)
  groups = sharding.num_groups(mesh)
  if attention != "cudnn_packed":
    return mesh, layout(groups=groups), told
  # How weights are split was decided by the shortest packs: longer ones bring
  # less than it costs to split weights further.
  most, why = mesh_choice.most_tokens(
    sizes,
    lambda tokens: lambda groups: layout(groups=groups, long_rows=tokens),
    (mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"]),
    mesh_choice.device_memory(experiment.mesh.memory_gib),
    _LONG_ROWS,
  )
  told = "\n".join(filter(None, [told, why]))
  return mesh, layout(groups=groups, long_rows=most), told
