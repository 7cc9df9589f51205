"""Exact softmax attention whose scores exist a block at a time.

Queries and keys are cut into blocks. A block of queries walks over the blocks
of keys that hold anything for it, keeping each query's running maximum, sum
and weighted values (Milakov and Gimelshein 2018; Dao et al. 2022); the backward
pass computes the scores again from the queries' log-sum-exp. So memory grows
with T and S, never with their product, and on a causal row the half of the
blocks that lie above the diagonal costs nothing.

Shape key: B rows, T queries, S keys, N query heads, K key heads, M = N / K, H
channels of a head; Q blocks of X queries, J blocks of Y keys, Z = M x X rows of
a block's scores.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

# The most queries and keys of a block: its float32 scores, B x N of these,
# are all that is in memory of T x S. Few enough for a processor's cache, as
# many as keep its matrix units busy.
BLOCK = 512
# What the `attention` remat policy keeps: the output and its log-sum-exp.
SAVED = "attention"
_LARGEST = np.iinfo(np.int32).max
# The maximum of nothing; finite, so that a masked score is exp(-inf) = 0.
_LOWEST = -1e30


class Places(NamedTuple):
  """Where queries and keys stand; all int32.

  Attributes:
    query_position_BT: positions within the segment.
    key_position_BS: likewise.
    query_segment_BT: segment ids, 0 for padding.
    key_segment_BS: likewise.
  """

  query_position_BT: jax.Array
  key_position_BS: jax.Array
  query_segment_BT: jax.Array
  key_segment_BS: jax.Array


@jax.custom_vjp
def attend_blockwise(
  query_BTNH: jax.Array,
  key_BSKH: jax.Array,
  value_BSKH: jax.Array,
  places: Places,
) -> jax.Array:
  """Computes causal grouped-query attention that never crosses a segment.

  Args:
    query_BTNH: queries, any float dtype; scaled here by `H ** -0.5`.
    key_BSKH: keys, N a multiple of K.
    value_BSKH: values.
    places: what may see what.

  Returns:
    `[B, T, N, H]` in the queries' dtype, 0 for padding; scores, statistics
    and sums are float32.
  """
  return _forward(query_BTNH, key_BSKH, value_BSKH, places)[0]


class _Cut(NamedTuple):
  """The arguments in blocks.

  Attributes:
    query_QBKZH: head-major within a block's rows.
    key_JBKYH: keys.
    value_JBKYH: values.
    query_at: position and segment, int32 `[Q, B, X]`.
    key_at: position and segment, int32 `[J, B, Y]`; padding has segment -1,
      which no query has.
    first_Q: first block of keys that a block of queries may see.
    stop_Q: one past the last one.
  """

  query_QBKZH: jax.Array
  key_JBKYH: jax.Array
  value_JBKYH: jax.Array
  query_at: tuple[jax.Array, jax.Array]
  key_at: tuple[jax.Array, jax.Array]
  first_Q: jax.Array
  stop_Q: jax.Array


def _blocks(length: int) -> tuple[int, int]:
  """Returns how many blocks a length is cut into, and their common size.

  Blocks are alike, rather than full ones and a rest, so that little of them is
  padding. A size is a multiple of 8 and at most `BLOCK`.
  """
  count = -(-length // BLOCK)
  size = -(-length // count)
  return count, min(BLOCK, -(-size // 8) * 8)


def _split(x: jax.Array) -> jax.Array:
  """Splits `[B, T, ...]` into blocks `[Q, B, X, ...]`, zeros behind."""
  count, size = _blocks(x.shape[1])
  pad = count * size - x.shape[1]
  x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
  # Blocks come first: `map`, `scan` and a dynamic index walk over that axis.
  return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)


def _split_queries(x_BTNH: jax.Array, K: int) -> jax.Array:
  """Splits queries `[B, T, N, H]` into blocks `[Q, B, K, Z, H]`."""
  x_QBXNH = _split(x_BTNH)
  Q, B, X, N, H = x_QBXNH.shape
  # All query heads of a key head are rows of one product with its keys, so
  # grouped-query attention repeats neither keys nor values.
  x_QBXKMH = x_QBXNH.reshape(Q, B, X, K, N // K, H)
  return jnp.einsum("QBXKMH->QBKMXH", x_QBXKMH).reshape(Q, B, K, -1, H)


def _join_queries(x_QBKZH: jax.Array, like_BTNH: jax.Array) -> jax.Array:
  """Joins blocks of queries, in the shape and dtype of `like_BTNH`."""
  B, T, N, H = like_BTNH.shape
  Q, _, K, _, _ = x_QBKZH.shape
  x_QBKMXH = x_QBKZH.reshape(Q, B, K, N // K, -1, H)
  x_BTNH = jnp.einsum("QBKMXH->BQXKMH", x_QBKMXH).reshape(B, -1, N, H)
  return x_BTNH[:, :T].astype(like_BTNH.dtype)


def _split_keys(x_BSKH: jax.Array) -> jax.Array:
  """Splits keys or values `[B, S, K, H]` into blocks `[J, B, K, Y, H]`."""
  return jnp.einsum("JBYKH->JBKYH", _split(x_BSKH))


def _join_keys(x_JBKYH: jax.Array, like_BSKH: jax.Array) -> jax.Array:
  """Joins blocks of keys or values, in `like_BSKH`'s shape and dtype."""
  B, S, K, H = like_BSKH.shape
  x_BSKH = jnp.einsum("JBKYH->BJYKH", x_JBKYH).reshape(B, -1, K, H)
  return x_BSKH[:, :S].astype(like_BSKH.dtype)


def _cut(query_BTNH, key_BSKH, value_BSKH, places) -> _Cut:
  """Cuts the arguments into blocks and finds which pairs of them to visit."""
  query_at = _split(places.query_position_BT), _split(places.query_segment_BT)
  position_JBY, segment_JBY = (
    _split(places.key_position_BS),
    _split(places.key_segment_BS),
  )
  first_Q, stop_Q = _walk(query_at, (position_JBY, segment_JBY))
  return _Cut(
    _split_queries(query_BTNH, key_BSKH.shape[2]),
    _split_keys(key_BSKH),
    _split_keys(value_BSKH),
    query_at,
    # Padding has segment 0 on both sides. Left so, padding would attend to
    # padding; with -1 here a padded query sees nothing and returns 0.
    (position_JBY, jnp.where(segment_JBY == 0, -1, segment_JBY)),
    first_Q,
    stop_Q,
  )


def _walk(query_at, key_at) -> tuple[jax.Array, jax.Array]:
  """Returns the range of blocks of keys that each block of queries must see.

  A query sees keys of its own segment at its own position or before. So a
  pair of blocks can be left out in two cases: its first key, in the order of
  segment and position, comes after its last query; or the segment of its last
  key comes before that of its first query. Both hold whatever the order of
  tokens within the row.

  Our rows are laid out left to right, segment after segment. In such a row
  the blocks that remain are one stretch: it begins where the oldest segment
  of the queries begins and ends at the diagonal.

                 keys, block j
      queries    # . . . . .      two segments, the second from block 2 on;
      block p    # # . . . .      `#` is visited, `.` is not
                 . . # . . .
                 . . # # . .
                 . . # # # .
                 . . # # # #

  Returns:
    First block and one past the last, integers `[Q]`, for all rows together.
  """
  query_low, _ = _lowest(*query_at)
  query_high = _highest(*query_at)
  key_low = _lowest(*key_at)
  key_high, _ = _highest(*key_at)

  def pairs(x_QB, y_JB):
    return x_QB[:, None], y_JB[None]

  last_segment, first_segment = pairs(query_high[0], key_low[0])
  last_position, first_position = pairs(query_high[1], key_low[1])
  later_QJB = (first_segment > last_segment) | (
    (first_segment == last_segment) & (first_position > last_position)
  )
  low, high = pairs(query_low, key_high)
  # One range for all rows of the batch: the loop over blocks is theirs
  # together, so a block is visited where any row needs it.
  needed_QJ = jnp.any(~later_QJB & (high >= low), axis=-1)
  J = needed_QJ.shape[1]
  # `argmax` of booleans finds the first True. Where there is none it says 0,
  # and the range is made empty below.
  first_Q = jnp.argmax(needed_QJ, axis=1)
  stop_Q = J - jnp.argmax(needed_QJ[:, ::-1], axis=1)
  return first_Q, jnp.where(needed_QJ.any(1), stop_Q, first_Q)


def _lowest(position, segment) -> tuple[jax.Array, jax.Array]:
  """Returns segment and position of each block's first token, but padding.

  Both `[..., B]`; the largest int32 where a block is padding only.
  """
  segment = jnp.where(segment == 0, _LARGEST, segment)
  first = segment.min(-1)
  same = segment == first[..., None]
  return first, jnp.where(same, position, _LARGEST).min(-1)


def _highest(position, segment) -> tuple[jax.Array, jax.Array]:
  """Returns segment and position of each block's last token.

  Both `[..., B]`; segment 0 where a block is padding only.
  """
  last = segment.max(-1)
  same = segment == last[..., None]
  return last, jnp.where(same, position, -1).max(-1)


def _scores(query_BKZH, key_BKYH, query_at, key_at) -> jax.Array:
  """Returns scaled float32 scores `[B, K, Z, Y]`, -inf for unseen keys."""
  B, K, Z, H = query_BKZH.shape
  scores_BKZY = jnp.einsum(
    "BKZH,BKYH->BKZY",
    query_BKZH,
    key_BKYH,
    preferred_element_type=jnp.float32,
  )
  (query_position, query_segment), (key_position, key_segment) = (
    query_at,
    key_at,
  )
  seen_BXY = key_position[:, None, :] <= query_position[:, :, None]
  seen_BXY &= key_segment[:, None, :] == query_segment[:, :, None]
  X, Y = seen_BXY.shape[1:]
  # The scale multiplies float32 scores: on bfloat16 queries it would round once
  # more. The mask is the same for all heads and is broadcast over them.
  scores = scores_BKZY.reshape(B, K, -1, X, Y) * H**-0.5
  seen = seen_BXY[:, None, None]
  return jnp.where(seen, scores, -jnp.inf).reshape(B, K, Z, Y)


def _each(cut: _Cut, first, stop, step, carry):
  """Walks over the blocks of keys; a single one needs no loop."""
  if cut.key_JBKYH.shape[0] == 1:
    return step(0, carry)
  return jax.lax.fori_loop(first, stop, step, carry)


def _forward(query_BTNH, key_BSKH, value_BSKH, places):
  """Returns the output and its log-sum-exp, float32 `[Q, B, K, Z]`."""
  cut = _cut(query_BTNH, key_BSKH, value_BSKH, places)

  def of_queries(block):
    query_BKZH, query_at, first, stop = block

    def step(j, carry):
      top_BKZ, sum_BKZ, mixed_BKZH = carry
      key_BKYH, value_BKYH, key_at = jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, j, keepdims=False),
        (cut.key_JBKYH, cut.value_JBKYH, cut.key_at),
      )
      scores_BKZY = _scores(query_BKZH, key_BKYH, query_at, key_at)
      # Exponentials are taken from the largest score so far. When a block
      # brings a larger one, what was summed before is shrunk to the new
      # reference.
      new_BKZ = jnp.maximum(top_BKZ, scores_BKZY.max(-1))
      weights_BKZY = jnp.exp(scores_BKZY - new_BKZ[..., None])
      shrink_BKZ = jnp.exp(top_BKZ - new_BKZ)
      # Weights are cast down so that the product has operands of one dtype, as
      # matrix units want them; what is summed over blocks stays float32.
      mixed_BKZH = shrink_BKZ[..., None] * mixed_BKZH + jnp.einsum(
        "BKZY,BKYH->BKZH",
        weights_BKZY.astype(value_BKYH.dtype),
        value_BKYH,
        preferred_element_type=jnp.float32,
      )
      return new_BKZ, shrink_BKZ * sum_BKZ + weights_BKZY.sum(-1), mixed_BKZH

    zeros_BKZ = jnp.zeros(query_BKZH.shape[:-1])
    nothing = zeros_BKZ + _LOWEST, zeros_BKZ, jnp.zeros(query_BKZH.shape)
    top_BKZ, sum_BKZ, mixed_BKZH = _each(cut, first, stop, step, nothing)
    # Padding has seen no key: 0 / 1 rather than 0 / 0. Its log-sum-exp is
    # finite, so the backward pass gets exp(-inf) = 0 for its weights.
    sum_BKZ = jnp.where(sum_BKZ == 0, 1, sum_BKZ)
    mixed_BKZH = (mixed_BKZH / sum_BKZ[..., None]).astype(query_BTNH.dtype)
    return mixed_BKZH, top_BKZ + jnp.log(sum_BKZ)

  # One block of queries after the other. Under `vmap` the scores of all of them
  # would be in memory together, which is T x S again.
  mixed_QBKZH, lse_QBKZ = jax.lax.map(
    of_queries, (cut.query_QBKZH, cut.query_at, cut.first_Q, cut.stop_Q)
  )
  return _join_queries(mixed_QBKZH, query_BTNH), lse_QBKZ


def _attend_fwd(query_BTNH, key_BSKH, value_BSKH, places):
  mixed_BTNH, lse_QBKZ = _forward(query_BTNH, key_BSKH, value_BSKH, places)
  # Both are named among the residuals, so that a remat policy can keep them:
  # without the log-sum-exp it would have to run the whole forward pass again.
  mixed_BTNH = checkpoint_name(mixed_BTNH, SAVED)
  lse_QBKZ = checkpoint_name(lse_QBKZ, SAVED)
  kept = query_BTNH, key_BSKH, value_BSKH, places, mixed_BTNH, lse_QBKZ
  return mixed_BTNH, kept


def _attend_bwd(kept, ct_BTNH):
  """Returns the gradients of queries, keys and values, in their dtypes.

  With s the scaled scores and w = exp(s - lse): d_v = w^T ct,
  d_s = w (ct v^T - level) H^-0.5, d_q = d_s k and d_k = d_s^T q, each summed
  over blocks in float32.
  """
  query_BTNH, key_BSKH, value_BSKH, places, mixed_BTNH, lse_QBKZ = kept
  K, H = key_BSKH.shape[2:]
  dtype = query_BTNH.dtype
  cut = _cut(query_BTNH, key_BSKH, value_BSKH, places)
  ct_QBKZH = _split_queries(ct_BTNH.astype(dtype), K)
  # What the softmax's own gradient takes off every score of a query: the sum
  # of w (ct v^T) over its keys. That equals ct . output, which is known, so no
  # second walk over the keys is needed.
  level_QBKZ = jnp.einsum(
    "QBKZH,QBKZH->QBKZ",
    ct_QBKZH,
    _split_queries(mixed_BTNH, K),
    preferred_element_type=jnp.float32,
  )
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def of_queries(sums, block):
    query_BKZH, ct_BKZH, lse_BKZ, level_BKZ, query_at, first, stop = block

    def step(j, carry):
      d_query_BKZH, d_key_JBKYH, d_value_JBKYH = carry
      key_BKYH, value_BKYH, key_at = jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, j, keepdims=False),
        (cut.key_JBKYH, cut.value_JBKYH, cut.key_at),
      )
      scores_BKZY = _scores(query_BKZH, key_BKYH, query_at, key_at)
      # Computed again rather than kept. The log-sum-exp holds the maximum and
      # the sum, so these are final weights and there is nothing to shrink.
      weights_BKZY = jnp.exp(scores_BKZY - lse_BKZ[..., None])
      d_weights_BKZY = product("BKZH,BKYH->BKZY", ct_BKZH, value_BKYH)
      d_scores_BKZY = weights_BKZY * (d_weights_BKZY - level_BKZ[..., None])
      d_scores_BKZY = (d_scores_BKZY * H**-0.5).astype(dtype)
      weights_BKZY = weights_BKZY.astype(dtype)
      add = product("BKZY,BKZH->BKYH", d_scores_BKZY, query_BKZH)
      d_key_JBKYH = d_key_JBKYH.at[j].add(add)
      add = product("BKZY,BKZH->BKYH", weights_BKZY, ct_BKZH)
      d_value_JBKYH = d_value_JBKYH.at[j].add(add)
      d_query_BKZH += product("BKZY,BKYH->BKZH", d_scores_BKZY, key_BKYH)
      return d_query_BKZH, d_key_JBKYH, d_value_JBKYH

    # A query's gradient is complete after its own walk. A key's comes from many
    # blocks of queries, so the sums for all keys travel along in the carry.
    nothing = jnp.zeros(query_BKZH.shape)
    d_query_BKZH, *sums = _each(cut, first, stop, step, (nothing, *sums))
    return tuple(sums), d_query_BKZH.astype(dtype)

  zeros = jnp.zeros(cut.key_JBKYH.shape), jnp.zeros(cut.value_JBKYH.shape)
  (d_key_JBKYH, d_value_JBKYH), d_query_QBKZH = jax.lax.scan(
    of_queries,
    zeros,
    (
      cut.query_QBKZH,
      ct_QBKZH,
      lse_QBKZ,
      level_QBKZ,
      cut.query_at,
      cut.first_Q,
      cut.stop_Q,
    ),
  )
  return (
    _join_queries(d_query_QBKZH, query_BTNH),
    _join_keys(d_key_JBKYH, key_BSKH),
    _join_keys(d_value_JBKYH, value_BSKH),
    None,  # places are integers
  )


attend_blockwise.defvjp(_attend_fwd, _attend_bwd)
