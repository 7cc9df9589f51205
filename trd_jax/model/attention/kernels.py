"""Fused attention kernels from other libraries.

Those of `KERNELS` read how long a row is and know no segments, so `choice`
gives them rows of one segment each. `cudnn_packed` is told where each segment
of a row begins and how long it is.

Shape key: B rows, T tokens, N query heads, K key heads, H channels
of a head, M segments that a row may have.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from trd_jax.model.attention.blockwise import SAVED
from trd_jax.model.attention.segments import segments_of
from trd_jax.model.masking import only

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


def cudnn_packed(
  query_BTNH: jax.Array,
  key_BTKH: jax.Array,
  value_BTKH: jax.Array,
  start_BM: jax.Array,
  length_BM: jax.Array,
) -> jax.Array:
  """Runs cuDNN's attention on rows of several segments; from Hopper on.

  JAX has no public name for it. A machine's JAX is held against the XLA path
  before it is used (`choice.settle`), so that one whose private parts have
  moved trains with another attention, and says so.

  Args:
    query_BTNH: queries, scaled here by `H ** -0.5`.
    key_BTKH: keys.
    value_BTKH: values.
    start_BM: int32 first position of each segment, -1 for those that the row
      doesn't have, which stand last.
    length_BM: int32 tokens of each segment, -1 likewise.

  Returns:
    `[B, T, N, H]`, undefined outside of segments.
  """
  from jax._src.cudnn import fused_attention_stablehlo as fused

  _mend_offsets(fused)
  # One more than there are segments, or JAX takes it for an unpacked row.
  start_BS = jnp.pad(start_BM, ((0, 0), (0, 1)), constant_values=-1)
  output = fused.dot_product_attention(
    query_BTNH,
    key_BTKH,
    value_BTKH,
    q_seqlen=length_BM,
    kv_seqlen=length_BM,
    q_offsets=start_BS,
    kv_offsets=start_BS,
    mask_type=fused.MaskType.PADDING_CAUSAL,
    scale=query_BTNH.shape[-1] ** -0.5,
  )
  assert isinstance(output, jax.Array)
  return output


def _mend_offsets(fused: Any) -> None:
  """Makes JAX scale the offsets of keys by the heads of keys.

  cuDNN counts offsets in numbers, not in tokens. JAX before July 2026
  multiplied those of the keys by the queries' heads (jax-ml/jax#39521): with
  fewer heads of keys than of queries the kernel read other tokens' keys, and
  said nothing.

  Args:
    fused: JAX's module of cuDNN's attention.
  """
  fix = fused._fix_seqlen_offsets
  if hasattr(fix, "mended"):
    return

  def mended(q_seqlen, kv_seqlen, q_offsets, kv_offsets, query, key):
    def scaled(heads):
      return fix(q_seqlen, kv_seqlen, q_offsets, kv_offsets, heads, heads)

    # With the same heads on both sides both are right.
    q_seqlen_, _, q_offsets_, _ = scaled(query)
    _, kv_seqlen_, _, kv_offsets_ = scaled(key)
    return q_seqlen_, kv_seqlen_, q_offsets_, kv_offsets_

  mended.mended = True
  fused._fix_seqlen_offsets = mended


KERNELS: Mapping[str, Kernel] = {"cudnn": cudnn, "tokamax": tokamax}


def attend_rows(
  kernel: Kernel,
  query_BTNH: jax.Array,
  key_BTKH: jax.Array,
  value_BTKH: jax.Array,
  segment_BT: jax.Array,
) -> jax.Array:
  """Runs a kernel on rows of one segment each, padded on the right.

  Returns:
    `[B, T, N, H]` in the queries' dtype, 0 for padding.
  """
  # A row of padding only is called 1 long: a softmax over no keys may be NaN,
  # and not every kernel accepts a length of 0.
  length_B = jnp.maximum(1, (segment_BT != 0).sum(1, dtype=jnp.int32))

  def run(query, key, value):
    mixed_BTNH = kernel(query, key, value, length_B)
    if kernel is cudnn:  # see `keeps_attention`
      return mixed_BTNH
    # No name inside of it could be given to what its backward pass reads.
    return checkpoint_name(mixed_BTNH, SAVED)

  return _without_padding(run, (query_BTNH, key_BTKH, value_BTKH), segment_BT)


def segment_places(
  segment_BT: jax.Array, most: int
) -> tuple[jax.Array, jax.Array]:
  """Returns where the segments of packed rows begin and how long they are.

  Args:
    segment_BT: int32 ids, 1 to `most` from left to right, 0 for padding at the
      end.
    most: M.

  Returns:
    Both int32 `[B, M]`, -1 for segments that a row doesn't have. A row of
    padding has one of one token: not every kernel takes rows without any.
  """
  number_M1 = jnp.arange(1, most + 1)[:, None]
  length_BM = (segment_BT[:, None] == number_M1).sum(-1, dtype=jnp.int32)
  length_BM = length_BM.at[:, 0].max(1)
  start_BM = jnp.cumsum(length_BM, axis=1, dtype=jnp.int32) - length_BM
  there_BM = length_BM > 0
  return jnp.where(there_BM, start_BM, -1), jnp.where(there_BM, length_BM, -1)


def attend_packed(
  kernel: Kernel,
  query_BTNH: jax.Array,
  key_BTKH: jax.Array,
  value_BTKH: jax.Array,
  segment_BT: jax.Array,
) -> jax.Array:
  """Runs a kernel on rows of several segments, side by side from the left.

  Args:
    kernel: as `cudnn_packed`.
    query_BTNH: queries.
    key_BTKH: keys.
    value_BTKH: values.
    segment_BT: int32 ids from 1 on, 0 for padding; at most `segments_of(T)`.

  Returns:
    `[B, T, N, H]` in the queries' dtype, 0 for padding.
  """
  places = segment_places(segment_BT, segments_of(segment_BT.shape[1]))
  return _without_padding(
    lambda *inputs: kernel(*inputs, *places),
    (query_BTNH, key_BTKH, value_BTKH),
    segment_BT,
  )


def _without_padding(
  run: Callable[..., jax.Array],
  inputs_BT: tuple[jax.Array, ...],
  segment_BT: jax.Array,
) -> jax.Array:
  """Runs a kernel on queries, keys and values whose padding is 0, and sets its.

  What a kernel computes for padding is undefined. So nothing of padding goes
  in, comes out, or reaches a gradient.
  """
  real_BT11 = (segment_BT != 0)[:, :, None, None]

  def without(x):
    return only(real_BT11, x, segment_BT)

  return without(run(*map(without, inputs_BT)))


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
