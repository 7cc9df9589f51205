"""Softmax attention behind one function, and that of one new token.

Shape key: B rows, T queries, S keys, N query heads, K key heads, M = N / K, H
channels of a head.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from trd_jax.model.attention import kernels
from trd_jax.model.attention.blockwise import Places, attend_blockwise

Implementation = Literal["xla", "cudnn", "cudnn_packed", "tokamax"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)


def attend(
  query_BTNH: jax.Array,
  key_BSKH: jax.Array,
  value_BSKH: jax.Array,
  *,
  query_position_BT: jax.Array,
  key_position_BS: jax.Array,
  query_segment_BT: jax.Array,
  key_segment_BS: jax.Array,
  implementation: Implementation = "xla",
) -> jax.Array:
  """Computes causal grouped-query attention that never crosses a segment.

  A query sees the keys of its own segment whose position is at most its own.
  Padding (segment 0) sees nothing, is seen by nothing, and returns 0.

  Args:
    query_BTNH: rotated queries, any float dtype; scaled here by `H ** -0.5`.
    key_BSKH: rotated keys, N a multiple of K.
    value_BSKH: values.
    query_position_BT: int32 positions within the segment.
    key_position_BS: int32 positions within the segment.
    query_segment_BT: int32 segment ids, 0 for padding.
    key_segment_BS: int32 segment ids.
    implementation: `xla` for any rows, on any device, in any float dtype.
      `cudnn` and `tokamax` take rows of one segment each, in order from
      position 0 and padded on the right: they read a row's length and neither
      positions nor segment ids. `cudnn_packed` takes rows of several, side by
      side from the left, at most `segments_of(T)`, and doesn't read positions
      either. `attention.choice` gives them no other rows.

  Returns:
    `[B, T, N, H]` in the queries' dtype; scores and softmax are float32. The
    T x S scores are never in memory at once, forward or backward.

  Raises:
    ValueError: an unknown implementation, or keys other than the queries'
      own where a kernel takes whole rows.
  """
  if implementation == "xla":
    places = Places(
      query_position_BT, key_position_BS, query_segment_BT, key_segment_BS
    )
    return attend_blockwise(query_BTNH, key_BSKH, value_BSKH, places)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"unknown attention {implementation!r}")
  # With a prefix in the cache there are more keys than queries, and a kernel
  # that counts both from 0 would put the causal diagonal in the wrong place.
  if query_BTNH.shape[1] != key_BSKH.shape[1]:
    raise ValueError(f"{implementation} attention takes whole rows")
  if implementation == "cudnn_packed":
    return kernels.attend_packed(
      kernels.cudnn_packed, query_BTNH, key_BSKH, value_BSKH, query_segment_BT
    )
  kernel = kernels.KERNELS[implementation]
  return kernels.attend_rows(
    kernel, query_BTNH, key_BSKH, value_BSKH, query_segment_BT
  )


def attend_one(
  query_BNH: jax.Array,
  key_BKHS: jax.Array,
  value_BKSH: jax.Array,
  position_B: jax.Array,
) -> jax.Array:
  """Attends with one new token a row over the cache of its row.

  The layouts keep both products free of transposes of the cache: the whole
  cache is read once a step, so a copy of it would cost as much again.

  Args:
    query_BNH: rotated queries, any float dtype; scaled here by `H ** -0.5`.
    key_BKHS: rotated keys by cache position.
    value_BKSH: values by cache position.
    position_B: int32; a row sees the cache positions up to its own.

  Returns:
    `[B, N, H]` in the queries' dtype; scores and softmax are float32.
  """
  B, N, H = query_BNH.shape
  K, S = value_BKSH.shape[1:3]
  # The M query heads that share a key head are an axis of the product, so the
  # cache is read once as it lies and never repeated N / K times.
  scores_BKMS = jnp.einsum(
    "BKMH,BKHS->BKMS",
    query_BNH.reshape(B, K, N // K, H),
    key_BKHS,
    preferred_element_type=jnp.float32,
  )
  seen_BS = jnp.arange(S) <= position_B[:, None]
  scores_BKMS = jnp.where(seen_BS[:, None, None], scores_BKMS * H**-0.5, -1e30)
  # A position that isn't written yet holds zeros, or another request's rest:
  # only the mask keeps it out of the softmax.
  weights_BKMS = jax.nn.softmax(scores_BKMS, axis=-1)
  return jnp.einsum(
    "BKMS,BKSH->BKMH", weights_BKMS.astype(value_BKSH.dtype), value_BKSH
  ).reshape(B, N, H)
