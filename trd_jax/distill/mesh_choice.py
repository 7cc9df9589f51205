"""Which mesh a run needs: what a device would hold, against what it has.

With a frozen base, replicated weights move the fewest bytes: the adapter's
gradients alone cross the mesh, once an update. So the base is replicated
where that fits, split over as few devices as it takes (fsdp) where it
doesn't, and split within layers (tensor) where that isn't enough. Only sizes
are looked at; no array is made.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh

from trd_jax.distill.loss.token_stats import Scoring
from trd_jax.distill.packing.layout import Layout, PackShape
from trd_jax.distill.teacher.source import Weights
from trd_jax.experiment import schema, tables
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.schema import PLANNED_SHARE
from trd_jax.model import float8, sharding
from trd_jax.model.attention.blockwise import BLOCK
from trd_jax.model.config import ModelConfig
from trd_jax.model.float8 import Float8Param
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.qwen3 import Qwen3

GIB = 2**30
# The adapter in float32: itself, the sums of its gradient, one pack's
# gradient, and AdamW's two moments.
_ADAPTER_COPIES = 5
# A chunk's logits in float32: student's, teacher's, and their gradient.
_LOGITS = 3

# What to lower, by the part that takes most.
_REMEDIES = {
  "adapter": "lower lora.rank",
  "buffer": "lower train.batch_size",
  "activations": "lower train.pack_tokens and train.teacher_pack_tokens,"
  " train.rows_per_device, or train.max_teacher_tokens and"
  " train.max_student_tokens",
  "loss": "lower loss.chunk_tokens",
}


class ModelSize(NamedTuple):
  """A model that every device takes part in.

  Attributes:
    config: its shape.
    dtype: of its weights and activations, as "bfloat16".
  """

  config: ModelConfig
  dtype: str

  @property
  def itemsize(self) -> int:
    """Bytes of a weight."""
    return jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Sizes:
  """All that a device's memory depends on besides the mesh.

  Attributes:
    student: the model that learns.
    teacher: a teacher of its own; None where it is the student's base.
    lora: the adapter.
    layout: the run's shapes for a number of groups.
    chunk_tokens: response tokens whose logits exist at once; None: automatic.
    remat: what the student's backward pass keeps.
    weights: what the teacher's source needs of it. With `head` the teacher
      runs before the student is there, and training holds its head alone; with
      `none` it is never loaded.
    recorded: tokens a position that are recorded, where no teacher is loaded.
    in_float8: whether the teacher's linear layers are there in eight bits. In
      OPSD that is a copy of its own, beside the student's base.
  """

  student: ModelSize
  teacher: ModelSize | None
  lora: LoraConfig
  layout: Callable[[int], Layout]
  chunk_tokens: int | None
  remat: str
  weights: Weights = "model"
  recorded: int = 0
  in_float8: bool = False

  def vocab(self, tensor: int) -> int:
    """Returns how many rows of a head each of `tensor` devices scores with."""
    rows = self.student.config.vocab_size
    split = self.weights != "none" and rows % tensor == 0
    return rows // tensor if split else rows


Shape = tuple[int, int, int]


class Estimate(NamedTuple):
  """A mesh and the bytes that each device would hold, by part."""

  shape: Shape
  parts: Mapping[str, int]

  @property
  def total(self) -> int:
    """Bytes in all."""
    return sum(self.parts.values())


def make(
  section: schema.Mesh,
  sizes: Sizes,
  attention: str = "xla",
  devices: Sequence[Any] | None = None,
) -> tuple[Mesh, str]:
  """Returns the mesh that the config asks for, or the one that its sizes need.

  Args:
    section: the config's; with sizes in it nothing is estimated.
    sizes: what there is to hold.
    attention: what computes it; a kernel gets whole key heads only.
    devices: that the mesh is of; None for all that JAX runs on.

  Returns:
    The mesh, and how it was chosen: '' where there was nothing to choose.

  Raises:
    UserError: the sizes given don't fit the devices or the attention, or the
      models don't fit into their memory, however split.
  """
  asked = section.sizes
  if asked is not None:
    mesh = sharding.make_mesh(*asked, devices=devices)
    _check_heads(sizes, mesh.shape["tensor"], attention)
    return mesh, ""
  limit = device_memory(section.memory_gib)
  count = jax.device_count() if devices is None else len(devices)
  if limit is None:
    told = (
      f"{count} devices, data={count}: weights replicated; this platform"
      " doesn't say how much memory a device has (mesh.memory_gib)"
    )
    return sharding.make_mesh(devices=devices), told if count > 1 else ""
  tried = choose(sizes, count, limit)
  mesh = sharding.make_mesh(*tried[-1].shape, devices=devices)
  return mesh, table(tried, limit)


def _check_heads(sizes: Sizes, tensor: int, attention: str) -> None:
  """Checks that a kernel gets whole key heads on each device.

  Raises:
    UserError: a model's key heads don't divide.
  """
  if attention == "xla":
    return
  for model in (sizes.student, sizes.teacher):
    if model and model.config.num_kv_heads % tensor:
      raise UserError(
        f"mesh.tensor={tensor}: {attention} attention can't split"
        f" {model.config.num_kv_heads} key heads over {tensor} devices; set"
        " mesh.tensor to a divisor of them, or train.attention=xla"
      )


def device_memory(gib: float | None) -> int | None:
  """Returns the bytes of all processes' smallest device, None if unknown."""
  if gib is not None:
    return int(gib * GIB)
  known = [
    (device.memory_stats() or {}).get("bytes_limit", 0)
    for device in jax.local_devices()
  ]
  least = min(known)
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    # In MiB: without 64-bit integers, bytes wouldn't fit.
    all_known = multihost_utils.process_allgather(np.int32(least // 2**20))
    least = int(np.min(all_known)) * 2**20
  return least or None


def choose(sizes: Sizes, devices: int, limit: int) -> list[Estimate]:
  """Tries ever more parts, from replicated weights on, until a device has room.

  Every mesh uses all devices.

  Args:
    sizes: what there is to hold.
    devices: how many there are.
    limit: bytes of memory of a device.

  Returns:
    What was tried; the last fits.

  Raises:
    UserError: nothing fits; it names the largest part and what to lower.
  """
  models = _abstract(sizes)
  tried = []
  for shape in candidates(sizes, devices):
    tried.append(estimate(sizes, shape, models))
    if tried[-1].total <= PLANNED_SHARE * limit:
      return tried
  best = min(tried, key=lambda e: e.total)
  part = max(best.parts, key=lambda name: best.parts[name])
  raise UserError(
    f"mesh: of {limit / GIB:.1f} GiB a device, {PLANNED_SHARE:.0%} are planned"
    f" with, and at least {best.total / GIB:.1f} GiB are needed on each of"
    f" {devices} ({_shown(best.shape)}; {part} {best.parts[part] / GIB:.1f}):"
    f" {_remedy(sizes, part)}, or take more devices (mesh.data, mesh.fsdp and"
    " mesh.tensor, if given, are taken unchecked)"
  )


def _remedy(sizes: Sizes, part: str) -> str:
  if part in _REMEDIES:
    return _REMEDIES[part]
  wide = [
    f"{name}.dtype"
    for name, model in (("student", sizes.student), ("teacher", sizes.teacher))
    if model and model.dtype == "float32"
  ]
  if wide:
    return f"set {' and '.join(wide)} to bfloat16"
  return "choose smaller models"


def candidates(sizes: Sizes, devices: int) -> Iterator[Shape]:
  """Yields meshes of all the devices, from the least traffic to the most.

  The fsdp axis divides every residual width, the tensor axis the key heads
  and inner widths of both models.
  """
  configs = [model.config for model in (sizes.student, sizes.teacher) if model]
  width = math.gcd(*(c.hidden_size for c in configs))
  inner = math.gcd(
    *(math.gcd(c.num_kv_heads, c.intermediate_size) for c in configs)
  )
  for tensor in _divisors(devices):
    for fsdp in _divisors(devices // tensor):
      if width % fsdp == 0 and inner % tensor == 0:
        yield devices // tensor // fsdp, fsdp, tensor


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]


def estimate(
  sizes: Sizes, shape: Shape, models: list[nnx.State] | None = None
) -> Estimate:
  """Returns the bytes that a device holds at the worst moment of an update.

  Weights and adapter are counted from the parameters and `sharding.RULES`;
  what is computed is estimated from the shapes of the packs.

  Args:
    sizes: what there is to hold.
    shape: devices along data, fsdp and tensor.
    models: what an earlier call has made of `sizes`.
  """
  mesh = AbstractMesh(
    shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape)
  )
  _, fsdp, tensor = shape
  student, teacher = sizes.student, sizes.teacher or sizes.student
  layout = sizes.layout(shape[0] * fsdp)
  models = models or _abstract(sizes)
  adapter, *bases = (_bytes(state, mesh) for state in models)
  parts = {"student": bases[0]}
  if sizes.teacher:
    parts["teacher"] = bases[1]
  elif sizes.in_float8 and sizes.weights == "model":
    # All but its linear layers is the student's.
    parts["teacher"] = _bytes(nnx.filter_state(models[-1], Float8Param), mesh)
  parts["adapter"] = _ADAPTER_COPIES * adapter
  slot = teacher.config.hidden_size * teacher.itemsize
  if sizes.weights == "none":
    slot = sizes.recorded * (4 + 4) + 4
  parts["buffer"] = layout.buffer_slots * slot
  if sizes.weights != "model":
    # The next one comes from the host while this one is read.
    parts["buffer"] *= 2
  if fsdp * tensor > 1:
    # The layer at work and the next one, and what the loss reads of the heads.
    vocab = sizes.vocab(tensor)
    heads = {id(model): _head(model, vocab) for model in (student, teacher)}
    weight = 1 if sizes.in_float8 else teacher.itemsize
    layer = max(_layer(student), teacher.config.linear_parameters() * weight)
    layer //= tensor
    parts["gathered"] = 2 * layer + sum(heads.values())
  # The teacher's forward pass and the student's two passes take turns.
  learning = [
    (_kept(sizes, pack, tensor), _loss(sizes, pack, tensor))
    for pack in layout.student
  ]
  activations, loss = max(learning, key=sum)
  teaching = max(
    _forward(teacher, pack, tensor, sizes.in_float8) for pack in layout.teacher
  )
  if sizes.weights == "model" and teaching > activations + loss:
    activations, loss = teaching, 0
  parts["activations"], parts["loss"] = activations, loss
  found = Estimate(shape, parts)
  if sizes.weights != "head":
    return found
  filling = {
    "teacher": bases[-1],
    "buffer": parts["buffer"],
    "gathered": parts.get("gathered", 0),
    "activations": teaching,
  }
  if sizes.teacher:
    rows = teacher.config.vocab_size
    parts["teacher"] = _head(teacher, rows) // (fsdp * tensor)
  return max(found, Estimate(shape, filling), key=lambda e: e.total)


def most_tokens(
  sizes: Sizes,
  layout_of: Callable[[int], Callable[[int], Layout]],
  shape: Shape,
  limit: int | None,
  choice: Sequence[int],
) -> tuple[int, str]:
  """Chooses how long packs may be: the longest for which a device has room.

  Args:
    sizes: what there is to hold; of its layout nothing is read.
    layout_of: the run's shapes, by tokens of a student pack and groups.
    shape: devices along data, fsdp and tensor.
    limit: bytes of memory of a device, None where it isn't known.
    choice: tokens of a student pack, fewest first; the first where nothing is
      known.

  Returns:
    The tokens, and the arithmetic in a line.
  """
  tokens = choice[0]
  if limit is None:
    return tokens, f"packs of up to {tokens:,} student tokens"
  models = _abstract(sizes)

  def held(tokens: int) -> Estimate:
    made = dataclasses.replace(sizes, layout=layout_of(tokens))
    return estimate(made, shape, models)

  fitting = (t for t in choice[::-1] if held(t).total <= PLANNED_SHARE * limit)
  tokens = next(fitting, tokens)
  found = held(tokens)
  return tokens, (
    f"packs of up to {tokens:,} student tokens: {found.total / GIB:.1f} of"
    f" {limit / GIB:.1f} GiB a device ({found.parts['activations'] / GIB:.1f}"
    " activations)"
  )


def table(tried: list[Estimate], limit: int) -> str:
  """Returns the arithmetic of a choice in a few lines."""
  names = list(dict.fromkeys(name for e in tried for name in e.parts))
  rows = [
    [
      _shown(e.shape),
      *(f"{e.parts.get(name, 0) / GIB:.2f}" for name in names),
      f"{e.total / GIB:.2f}",
      "fits" if e is tried[-1] else "too much",
    ]
    for e in tried
  ]
  rows.insert(0, ["GiB a device", *names, "all", ""])
  return "\n".join(
    [
      f"mesh for {limit / GIB:.2f} GiB a device, of which {PLANNED_SHARE:.0%}"
      " are planned with:",
      tables.columns(rows, "<>"),
    ]
  )


def _shown(shape: Shape) -> str:
  return " ".join(
    f"{name}={size}"
    for name, size in zip(sharding.MESH_AXES, shape, strict=True)
  )


def _abstract(sizes: Sizes) -> list[nnx.State]:
  """Returns the adapter, the student's base, and a teacher's of its own.

  In eight bits the teacher is always one of its own.
  """

  def made(size: ModelSize, lora: LoraConfig | None) -> Qwen3:
    return jax.eval_shape(
      lambda: Qwen3(size.config, lora=lora, dtype=size.dtype, rngs=nnx.Rngs(0))
    )

  states = nnx.split(made(sizes.student, sizes.lora), nnx.LoRAParam, ...)
  found = list(states[1:])
  teacher = sizes.teacher or sizes.student
  if sizes.in_float8:
    found.append(nnx.state(float8.abstract(teacher.config, teacher.dtype)))
  elif sizes.teacher:
    found.append(nnx.state(made(sizes.teacher, None)))
  return found


def _bytes(state: nnx.State, mesh: AbstractMesh) -> int:
  """Returns the bytes of a device's part of a state."""
  places = sharding.shardings(state, mesh)
  return sum(
    math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
    for x, place in zip(
      jax.tree.leaves(state), jax.tree.leaves(places), strict=True
    )
  )


def _head(model: ModelSize, rows: int) -> int:
  return rows * model.config.hidden_size * model.itemsize


def _layer(model: ModelSize) -> int:
  return model.config.linear_parameters() * model.itemsize


def _widths(model: ModelSize, tensor: int) -> tuple[int, int, int, int]:
  """Returns the residual's channels, and a device's of q, of k and of gate."""
  size = model.config.linear_layers()
  D, queries = size["q"]
  keys, inner = size["k"][1], size["gate"][1]
  return D, queries // tensor, keys // tensor, inner // tensor


def _scores(model: ModelSize, pack: PackShape, tensor: int) -> int:
  """Returns the bytes of one block of scores, in float32."""
  heads = -(-model.config.num_heads // tensor)
  return 4 * pack.rows * heads * min(pack.length, BLOCK) ** 2


def _forward(
  model: ModelSize, pack: PackShape, tensor: int, in_float8: bool = False
) -> int:
  """Returns the bytes of activations of a forward pass without a backward."""
  D, queries, keys, inner = _widths(model, tensor)
  width = 3 * D + queries + 2 * keys + 2 * inner
  tokens = pack.rows * pack.length
  # What a product reads is there once more, in eight bits.
  rounded = tokens * inner if in_float8 else 0
  bytes_ = tokens * width * model.itemsize + rounded
  return bytes_ + _scores(model, pack, tensor)


def _kept(sizes: Sizes, pack: PackShape, tensor: int) -> int:
  """Returns the bytes of activations of the student's two passes."""
  model, rank = sizes.student, sizes.lora.rank
  D, queries, keys, inner = _widths(model, tensor)
  # What the backward pass of one block reads, and the gradients that are alive
  # at its widest place, the MLP.
  block = 4 * D + 4 * queries + 4 * keys + 4 * inner
  gradients = 2 * D + 3 * inner
  # The inputs of the seven adapters after their dropout.
  dropped = 5 * D + queries + inner if sizes.lora.dropout else 0
  products = 2 * D + queries + 2 * keys + 2 * inner
  kept = {
    "full": D,
    "attention": D + queries,
    "dots": D + 2 * products + 7 * rank,  # the kernel's and the adapter's
    "none": block + dropped,
  }[sizes.remat]
  layers = model.config.num_layers
  tokens = pack.rows * pack.length
  bytes_ = tokens * (layers * kept + block + gradients) * model.itemsize
  # Scores, their softmax, and its gradient.
  scores = 3 * _scores(model, pack, tensor)
  if sizes.remat == "none" and pack.length <= BLOCK:
    scores *= layers
  return bytes_ + scores


def _loss(sizes: Sizes, pack: PackShape, tensor: int) -> int:
  """Returns the bytes of a chunk's logits and of hidden states at the slots."""
  student, teacher = sizes.student, sizes.teacher or sizes.student
  slots = pack.rows * pack.slots
  D, other = student.config.hidden_size, teacher.config.hidden_size
  vocab = sizes.vocab(tensor)
  scoring = Scoring(chunk_tokens=sizes.chunk_tokens)
  chunk = min(slots, scoring.chunk(D, vocab, jnp.dtype(student.dtype)))
  # The student's once more for the gradient, in float32.
  hidden = D * (student.itemsize + 4) + other * teacher.itemsize
  return _LOGITS * 4 * chunk * vocab + slots * hidden
