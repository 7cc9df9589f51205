"""A linear layer with a low-rank adapter (Hu et al. 2021)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.masking import only


def kept(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
  """Returns which numbers a dropout keeps: a hash of the key and their place.

  The hash is a few integer operations, which the compiler puts into the loop
  that reads the mask: nothing of it goes through memory, and the backward pass
  computes it again. A generator's bits would be written and read as an array
  of their own, and by every device those of all devices where rows are split.

  Args:
    key: of the layer, the step and the device; any of JAX's kinds.
    shape: of the numbers, at most 2^32 of them.
    rate: the share that isn't kept, below 1.

  Returns:
    Booleans; each False with a probability of `rate`, to within 2^-32,
    whatever the others are.
  """
  first, second = jax.random.key_data(key).reshape(-1)[:2]
  count = math.prod(shape[:-1])
  row = jax.lax.iota(jnp.uint32, count).reshape(*shape[:-1], 1)
  column = jax.lax.iota(jnp.uint32, shape[-1])
  # Rows are mixed on their own first, which costs nothing beside their columns:
  # of two rows no pattern is the other's, moved.
  bits = _mixed(row * jnp.uint32(0x9E3779B1) + first)
  bits = _mixed(bits ^ (column * jnp.uint32(0x85EBCA77) + second))
  return bits >= jnp.uint32(round(rate * 2**32))


def _mixed(bits: jax.Array) -> jax.Array:
  """Spreads every bit of uint32 over all of them (a bijection)."""
  # Shifts and odd factors found by search to have next to no bias (C. Wellons,
  # "lowbias32").
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
  bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
  return bits ^ (bits >> 16)


class Linear(nnx.Module):
  """A linear layer, with an adapter beside it or without.

  Computes `x W + b + (alpha / r) dropout(x) A B`. Kernel and bias are frozen in
  `dtype`. A and B are `nnx.LoRAParam`s in float32, so that an update of 5e-6
  isn't rounded away, and are cast to the input's dtype where they are used. A
  starts uniform in +-1/sqrt(in) and B at zero: the adapter begins as no change.

  Args:
    in_size: channels in.
    out_size: channels out.
    axes: logical axis names of the kernel, in and out.
    lora: the adapter's size, or None for no adapter.
    dtype: dtype of the kernel.
    rngs: source of the initial values.
    bias: whether there is a bias, which begins at zero.
  """

  def __init__(
    self,
    in_size: int,
    out_size: int,
    axes: tuple[str, str],
    *,
    lora: LoraConfig | None,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
    bias: bool = False,
  ):
    self.lora_config = lora
    std = in_size**-0.5
    kernel = std * jax.random.truncated_normal(
      rngs.params(), -3, 3, (in_size, out_size)
    )
    self.kernel = nnx.Param(kernel.astype(dtype), axes=axes)
    if bias:
      self.bias = nnx.Param(jnp.zeros((out_size,), dtype), axes=(axes[1],))
    else:
      self.bias = None
    if lora is None:
      self.lora_a = self.lora_b = None
    else:
      # A type of their own: `nnx.split(model, nnx.LoRAParam, ...)` separates
      # what trains from what is frozen, wherever it stands.
      self.lora_a = nnx.LoRAParam(
        jax.random.uniform(
          rngs.params(), (in_size, lora.rank), minval=-std, maxval=std
        ),
        axes=(axes[0], "rank"),
      )
      self.lora_b = nnx.LoRAParam(
        jnp.zeros((lora.rank, out_size)), axes=("rank", axes[1])
      )

  def __call__(
    self, x: jax.Array, dropout_key: jax.Array | None = None
  ) -> jax.Array:
    """Applies the layer to `x[..., in]`; dropout only where a key is given."""
    y = x @ self.kernel[...]
    if self.bias is not None:
      y += self.bias[...]
    if self.lora_a is None or self.lora_b is None or self.lora_config is None:
      return y
    z = x
    rate = self.lora_config.dropout
    if dropout_key is not None and rate > 0:
      # The adapter's input only: the base sees all of `x`, as in PEFT.
      keep = kept(dropout_key, x.shape, rate)
      z = only(keep, x / (1 - rate), jax.random.key_data(dropout_key))
    # (x A) B and not x (A B): the product of the factors is as large as the
    # kernel, and its gradient would be, too.
    z = z @ self.lora_a[...].astype(x.dtype)
    z = z @ self.lora_b[...].astype(x.dtype)
    # Kept apart from what reads it: else XLA writes the sum by a kernel of its
    # own, where gate and up are read more than once.
    y = jax.lax.optimization_barrier(y)
    return y + self.lora_config.scale * z
