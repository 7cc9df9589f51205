"""Softmax attention behind one function.

Shape key: B rows, T queries, S keys, N query heads, K key heads, M = N / K
query heads that share a key head, H width of a head.
"""

import jax
import jax.numpy as jnp

# Queries a block: the scores of one block, not T x S of them, are in memory.
_QUERY_BLOCK = 512


def attend(
  query_BTNH: jax.Array,
  key_BSKH: jax.Array,
  value_BSKH: jax.Array,
  *,
  query_position_BT: jax.Array,
  key_position_BS: jax.Array,
  query_segment_BT: jax.Array,
  key_segment_BS: jax.Array,
) -> jax.Array:
  """Causal grouped-query attention that never crosses a segment.

  A query sees the keys of its own segment whose position is at most its own.
  A query that sees nothing returns the mean of the values; such rows are
  padding and never read.

  Args:
    query_BTNH: queries, any float dtype; scaled here by `H ** -0.5`.
    key_BSKH: keys, N a multiple of K.
    value_BSKH: values.
    query_position_BT: int32 positions within the segment.
    key_position_BS: int32 positions within the segment.
    query_segment_BT: int32 segment ids, 0 for padding.
    key_segment_BS: int32 segment ids.

  Returns:
    `[B, T, N, H]` in the queries' dtype; scores and softmax are float32.
  """
  B, T, N, H = query_BTNH.shape
  K = key_BSKH.shape[2]

  def block(query, position, segment):
    length = query.shape[1]
    query_BTKMH = query.reshape(B, length, K, N // K, H)
    scores_BKMTS = jnp.einsum(
      "BTKMH,BSKH->BKMTS",
      query_BTKMH,
      key_BSKH,
      preferred_element_type=jnp.float32,
    )
    seen_BTS = key_position_BS[:, None, :] <= position[:, :, None]
    seen_BTS &= key_segment_BS[:, None, :] == segment[:, :, None]
    scores_BKMTS = jnp.where(
      seen_BTS[:, None, None], scores_BKMTS * H**-0.5, -1e30
    )
    weights_BKMTS = jax.nn.softmax(scores_BKMTS, axis=-1)
    return jnp.einsum(
      "BKMTS,BSKH->BTKMH", weights_BKMTS.astype(value_BSKH.dtype), value_BSKH
    ).reshape(B, length, N, H)

  if T <= _QUERY_BLOCK:
    return block(query_BTNH, query_position_BT, query_segment_BT)

  pad = -T % _QUERY_BLOCK

  def split(x):
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(B, -1, _QUERY_BLOCK, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  parts = tuple(
    split(x) for x in (query_BTNH, query_position_BT, query_segment_BT)
  )
  # Recomputing a block's scores in the backward pass is what keeps T x S
  # from being stored once a block.
  out = jax.lax.map(jax.checkpoint(lambda part: block(*part)), parts)
  return jnp.moveaxis(out, 0, 1).reshape(B, T + pad, N, H)[:, :T]


def attend_one(
  query_BNH: jax.Array,
  key_BKHS: jax.Array,
  value_BKSH: jax.Array,
  position_B: jax.Array,
) -> jax.Array:
  """Attention of one new token a row over its row's cache.

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
  scores_BKMS = jnp.einsum(
    "BKMH,BKHS->BKMS",
    query_BNH.reshape(B, K, N // K, H),
    key_BKHS,
    preferred_element_type=jnp.float32,
  )
  seen_BS = jnp.arange(S) <= position_B[:, None]
  scores_BKMS = jnp.where(seen_BS[:, None, None], scores_BKMS * H**-0.5, -1e30)
  weights_BKMS = jax.nn.softmax(scores_BKMS, axis=-1)
  return jnp.einsum(
    "BKMS,BKSH->BKMH", weights_BKMS.astype(value_BKSH.dtype), value_BKSH
  ).reshape(B, N, H)
