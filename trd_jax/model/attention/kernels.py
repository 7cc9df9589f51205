"""Fused attention kernels from other libraries, for rows of one segment each.

A kernel reads how long a row is and knows no segments, so `choice` never gives
it packed rows.

Shape key: B rows, T tokens, N query heads, K key heads, H channels
of a head.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from trd_jax.model.attention.blockwise import SAVED

_FORWARD = ("dot_product_attention_fwd", "dot_product_attention_fwd_wrapper")
"""The primitives that JAX runs cuDNN's forward pass by."""

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
  if kernel is not cudnn:
    # No name inside of it could be given to what its backward pass reads.
    mixed_BTNH = checkpoint_name(mixed_BTNH, SAVED)
  return jnp.where(real_BT11, mixed_BTNH, 0)


def keeps_attention(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
  """Returns whether a value is one that attention's backward pass reads.

  A policy of `jax.checkpoint`. XLA's attention names its output and log-sum-exp
  `SAVED`. cuDNN's are the outputs of its forward primitive, which has no place
  for names: were only its masked output kept, the backward pass would run the
  forward kernel again for the log-sum-exp.
  """
  named = jax.checkpoint_policies.save_only_these_names(SAVED)
  return primitive.name in _FORWARD or named(
    primitive, *arguments, **parameters
  )
