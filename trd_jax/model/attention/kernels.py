"""Fused attention kernels from other libraries, for rows of one segment each.

A kernel reads how long a row is and knows no segments, so `choice` never gives
it packed rows.

Shape key: B rows, T tokens, N query heads, K key heads, H channels
of a head.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from trd_jax.model.attention.blockwise import SAVED

# (query_BTNH, key_BTKH, value_BTKH, length_B) -> mixed_BTNH; causal, scaled by
# `H ** -0.5`, keys from a row's length on unseen, outputs there undefined.
Kernel = Callable[..., jax.Array]


def cudnn(
  query_BTNH: jax.Array,
  key_BTKH: jax.Array,
  value_BTKH: jax.Array,
  length_B: jax.Array,
  backend: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
  """Runs cuDNN's attention through JAX.

  The backend `xla` is JAX's own implementation of the same call, with which
  tests check on CPUs that the call means what is wanted.
  """
  return jax.nn.dot_product_attention(
    query_BTNH,
    key_BTKH,
    value_BTKH,
    is_causal=True,
    query_seq_lengths=length_B,
    key_value_seq_lengths=length_B,
    implementation=backend,
  )


def tokamax(
  query_BTNH: jax.Array,
  key_BTKH: jax.Array,
  value_BTKH: jax.Array,
  length_B: jax.Array,
  backend: str = "mosaic",
) -> jax.Array:
  """Runs tokamax's Mosaic GPU kernel.

  The backend is named, for tokamax would otherwise fall back on another one
  without a word.
  """
  from absl import flags
  from tokamax import (  # pyright: ignore[reportMissingImports]
    dot_product_attention,
  )

  # tokamax looks up absl flags, and absl would first parse the whole command
  # line, whose flags it doesn't know. Marked as parsed, its defaults hold.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  return dot_product_attention(
    query_BTNH,
    key_BTKH,
    value_BTKH,
    is_causal=True,
    query_seq_lengths=length_B,
    key_value_seq_lengths=length_B,
    implementation=backend,
  )


KERNELS: Mapping[str, Kernel] = {"cudnn": cudnn, "tokamax": tokamax}


def attend_rows(
  kernel: Kernel,
  query_BTNH: jax.Array,
  key_BTKH: jax.Array,
  value_BTKH: jax.Array,
  segment_BT: jax.Array,
) -> jax.Array:
  """Runs a kernel on rows of one segment each, padded on the right.

  What a kernel computes for padding is undefined, so padding is set to 0 before
  and after: nothing of it goes in, comes out, or reaches a gradient.

  Returns:
    `[B, T, N, H]` in the queries' dtype, 0 for padding.
  """
  real_BT11 = (segment_BT != 0)[:, :, None, None]
  # A row of padding only is called 1 long: a softmax over no keys may be NaN,
  # and not every kernel accepts a length of 0.
  length_B = jnp.maximum(1, (segment_BT != 0).sum(1, dtype=jnp.int32))
  # `where` and not a product with 0, for NaN times 0 is NaN. Its gradient is 0
  # where the mask is, too.
  query, key, value = (
    jnp.where(real_BT11, x, 0) for x in (query_BTNH, key_BTKH, value_BTKH)
  )
  mixed_BTNH = kernel(query, key, value, length_B)
  return checkpoint_name(jnp.where(real_BT11, mixed_BTNH, 0), SAVED)
