"""Fused attention kernels that others make, for rows of one segment each.

They know how long a row is and no segments, so they are never given packed
rows; `choice` sees to that.

Shape key: B rows, T tokens, N query heads, K key heads, H width of a head.
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
  """cuDNN's, through JAX; `xla` as backend is JAX's own reading of the call."""
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
  """tokamax's Mosaic GPU kernel; named, or it would fall back on its own."""
  from absl import flags
  from tokamax import (  # pyright: ignore[reportMissingImports]
    dot_product_attention,
  )

  # It looks flags up that absl would read from the whole command line, where
  # it knows none of ours: its defaults hold.
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
  """A kernel's attention on rows of one segment each, padded on the right.

  What a kernel writes into padding is its own affair, so nothing that stands
  there goes in, comes out, or reaches a gradient: padding is 0.
  """
  real_BT11 = (segment_BT != 0)[:, :, None, None]
  # A row of padding alone has a length all the same: no kernel is asked for
  # the softmax of nothing.
  length_B = jnp.maximum(1, (segment_BT != 0).sum(1, dtype=jnp.int32))
  query, key, value = (
    jnp.where(real_BT11, x, 0) for x in (query_BTNH, key_BTKH, value_BTKH)
  )
  mixed_BTNH = kernel(query, key, value, length_B)
  return checkpoint_name(jnp.where(real_BT11, mixed_BTNH, 0), SAVED)
