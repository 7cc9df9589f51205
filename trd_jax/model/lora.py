"""A linear layer with a low-rank adapter (Hu et al. 2021)."""

import jax
import jax.numpy as jnp
from flax import nnx

from trd_jax.model.lora_config import LoraConfig


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
      keep = jax.random.bernoulli(dropout_key, 1 - rate, x.shape)
      z = jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
    # (x A) B and not x (A B): the product of the factors is as large as the
    # kernel, and its gradient would be, too.
    z = z @ self.lora_a[...].astype(x.dtype)
    z = z @ self.lora_b[...].astype(x.dtype)
    return y + self.lora_config.scale * z
