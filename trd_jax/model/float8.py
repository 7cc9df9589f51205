"""A frozen model whose linear layers multiply in eight bits.

A product `x W` of a row x and a kernel W is computed as

    x8 = round(x / s),  s = max |x| / 448        a scale a row
    W8 = round(W / c),  c = max |W[:, j]| / 448  a scale a channel j, made once
    x W ~ (x8 W8) s c

with both operands in float8_e4m3fn: 4 bits of exponent, 3 of mantissa, no
infinity, at most 448. The sums of a product are float32's. Both scales stand
outside of the sum, so that a library that knows of no scales multiplies, too.

Nothing else of the model changes: attention, norms, embeddings and the head
stay in its own dtype.

Shape key: D channels in, F channels out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from trd_jax.experiment.errors import UserError
from trd_jax.experiment.processes import nvidia
from trd_jax.model.config import ModelConfig
from trd_jax.model.lora import Linear
from trd_jax.model.qwen3 import Qwen3

DTYPE = jnp.float8_e4m3fn
LARGEST = float(jnp.finfo(DTYPE).max)
# Of a row of zeros, which has to stay one: no scale is below it.
_LEAST = float(jnp.finfo(jnp.float32).tiny)

# Where a block's linear layers stand.
_LAYERS = {
  "attention": ("q", "k", "v", "o"),
  "mlp": ("gate", "up", "down"),
}

Keys = tuple[str, ...]
Tree = Mapping[str, Any]


class Float8Param(nnx.Param):
  """A kernel in eight bits, or its scales."""


def rounded(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
  """Rounds to eight bits, with a scale for all numbers along an axis.

  Returns:
    The rounded numbers and, in float32, the scales that undo it, with 1 in the
    place of the axis.
  """
  x32 = x.astype(jnp.float32)
  largest = jnp.max(jnp.abs(x32), axis=axis, keepdims=True)
  scale = jnp.maximum(largest / LARGEST, _LEAST)
  # A division: the inverse of a small scale would be infinite.
  return (x32 / scale).astype(DTYPE), scale


def quantize(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns kernels `[..., D, F]` in eight bits, `[..., F, D]`, and scales.

  The channels in come last, as eight-bit tensor cores read both operands: in
  the other order a layer would be transposed each time that it is used.

  Returns:
    The kernels, and float32 scales `[..., F]`.
  """
  rounded_DF, scale = rounded(kernel, axis=-2)
  return jnp.swapaxes(rounded_DF, -1, -2), jnp.squeeze(scale, -2)


@jax.custom_jvp
def product(x: jax.Array, kernel_FD: jax.Array, scale_F: jax.Array):
  """Multiplies rows `x[..., D]` with a kernel as `quantize` gives it.

  Returns:
    `[..., F]` in the dtype of `x`.

  Raises:
    TypeError: somebody asks for its derivative.
  """
  x8, row_scale = rounded(x, axis=-1)
  # Highest: at the default precision NVIDIA's library adds up in fewer bits
  # than float32 has. The result comes in the activations' dtype, before the
  # scales, so that half as much of it goes through memory; they are then
  # multiplied by whoever reads it.
  y = jax.lax.dot_general(
    x8,
    kernel_FD,
    (((x.ndim - 1,), (1,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=x.dtype,
  )
  # One scale after the other: two small ones multiplied would be 0.
  return (y.astype(jnp.float32) * row_scale * scale_F).astype(x.dtype)


@product.defjvp
def _product_jvp(primals, tangents):
  # Rounding has no useful derivative, and one of zero would go unnoticed.
  raise TypeError("a layer in eight bits is frozen: it has no derivative")


class Float8Linear(nnx.Module):
  """A frozen `Linear` without an adapter, in eight bits.

  Args:
    linear: whose place it takes; of one layer, or of all, stacked.
  """

  def __init__(self, linear: Linear):
    if linear.lora_a is not None:
      raise ValueError("a layer with an adapter is trained, not rounded")
    kernel, scale = quantize(linear.kernel[...])
    axis_in, axis_out = linear.kernel.get_metadata()["axes"]
    self.kernel = Float8Param(kernel, axes=(axis_out, axis_in))
    self.scale = Float8Param(scale, axes=(axis_out,))
    self.bias = linear.bias

  def __call__(
    self, x: jax.Array, dropout_key: jax.Array | None = None
  ) -> jax.Array:
    """Applies the layer to `x[..., in]`; there is no adapter to drop from."""
    del dropout_key
    y = product(x, self.kernel[...], self.scale[...])
    return y if self.bias is None else y + self.bias[...]


def in_float8(model: Qwen3) -> Qwen3:
  """Puts a `Float8Linear` in the place of each linear layer of a model.

  For shapes, under `jax.eval_shape`: of a model that is there, `of_tree` rounds
  a kernel at a time.
  """
  for part, names in _LAYERS.items():
    module = getattr(model.layers, part)
    for name in names:
      setattr(module, name, Float8Linear(getattr(module, name)))
  return model


def abstract(config: ModelConfig, dtype: jax.typing.DTypeLike) -> Qwen3:
  """Returns a model of this shape in eight bits, without its arrays."""
  return jax.eval_shape(
    lambda: in_float8(Qwen3(config, dtype=dtype, rngs=nnx.Rngs(0)))
  )


def parts(path: Keys, value: jax.Array) -> dict[Keys, jax.Array]:
  """Returns what stands for a parameter in a model in eight bits.

  Args:
    path: of a parameter of a `Qwen3` without adapters.
    value: its array, of all layers.

  Returns:
    The kernel in eight bits and its scales, each on the devices that hold the
    same part of the kernel; anything else as it is.
  """
  if not _is_kernel(path):
    return {path: value}
  places = None
  if isinstance(value.sharding, NamedSharding):
    mesh, spec = value.sharding.mesh, value.sharding.spec
    # A spec may leave out what is whole at its end.
    layers, axis_in, axis_out = (*spec, *[None] * (value.ndim - len(spec)))
    places = tuple(
      NamedSharding(mesh, PartitionSpec(layers, *axes))
      for axes in ((axis_out, axis_in), (axis_out,))
    )
  kernel, scale = jax.jit(quantize, out_shardings=places)(value)
  return {path: kernel, (*path[:-1], "scale"): scale}


def of_tree(base: Tree) -> Tree:
  """Returns the tree of a model in eight bits, made from its own.

  What isn't a kernel of a linear layer is the same array in both.
  """
  flat: dict[Keys, jax.Array] = {}
  for path, value in nnx.traversals.flatten_mapping(base).items():
    flat |= parts(path, value)
  return nnx.traversals.unflatten_mapping(flat)


def _is_kernel(path: Keys) -> bool:
  known = {
    ("layers", part, name, "kernel")
    for part, names in _LAYERS.items()
    for name in names
  }
  return path in known


def check_devices(devices: Sequence[Any], setting: str) -> None:
  """Checks that devices can multiply in eight bits, before they are asked to.

  Args:
    devices: JAX's. On CPUs XLA computes such products in float32, slowly.
    setting: key and value that ask for it.

  Raises:
    UserError: a GPU can't.
  """
  for device in devices:
    if device.platform != "gpu":
      continue
    if not nvidia.has_float8(device.compute_capability):
      raise UserError(
        f"{setting} needs {nvidia.FLOAT8_GPUS}, and {device.device_kind} has"
        f" {device.compute_capability}: leave it at None"
      )
