"""Exact softmax attention whose scores exist a block at a time.

Queries and keys are cut into blocks. A block of queries walks over the blocks
of keys that hold anything for it, keeping each query's running maximum, sum
and weighted values (Milakov and Gimelshein 2018; Dao et al. 2022); the backward
pass computes the scores again from the queries' log-sum-exp. So memory grows
with T and S, never with their product, and on a causal row the half of the
blocks that lie above the diagonal costs nothing.

Shape key: B rows, T queries, S keys, N query heads, K key heads, M = N / K
query heads that share a key head, H width of a head; P blocks of X queries, J
blocks of Y keys, R = M x X rows of a block's scores.
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
  """Causal grouped-query attention that never crosses a segment.

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
    query_PBKRH: head-major within a block's rows.
    key_JBKYH: keys.
    value_JBKYH: values.
    query_at: position and segment, int32 `[P, B, X]`.
    key_at: position and segment, int32 `[J, B, Y]`; padding has segment -1,
      which no query has.
    first_P: first block of keys that a block of queries may see.
    stop_P: one past the last one.
  """

  query_PBKRH: jax.Array
  key_JBKYH: jax.Array
  value_JBKYH: jax.Array
  query_at: tuple[jax.Array, jax.Array]
  key_at: tuple[jax.Array, jax.Array]
  first_P: jax.Array
  stop_P: jax.Array


def _blocks(length: int) -> tuple[int, int]:
  """How many blocks, and how long: alike, so that little is padding."""
  count = -(-length // BLOCK)
  size = -(-length // count)
  return count, min(BLOCK, -(-size // 8) * 8)


def _split(x: jax.Array) -> jax.Array:
  """`[B, T, ...]` to `[P, B, X, ...]`, zeros behind."""
  count, size = _blocks(x.shape[1])
  pad = count * size - x.shape[1]
  x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
  return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)


def _split_queries(x_BTNH: jax.Array, K: int) -> jax.Array:
  """`[P, B, K, R, H]`."""
  x_PBXNH = _split(x_BTNH)
  P, B, X, N, H = x_PBXNH.shape
  x_PBXKMH = x_PBXNH.reshape(P, B, X, K, N // K, H)
  return jnp.einsum("PBXKMH->PBKMXH", x_PBXKMH).reshape(P, B, K, -1, H)


def _join_queries(x_PBKRH: jax.Array, like_BTNH: jax.Array) -> jax.Array:
  """The inverse, in the shape and dtype of `like_BTNH`."""
  B, T, N, H = like_BTNH.shape
  P, _, K, _, _ = x_PBKRH.shape
  x_PBKMXH = x_PBKRH.reshape(P, B, K, N // K, -1, H)
  x_BTNH = jnp.einsum("PBKMXH->BPXKMH", x_PBKMXH).reshape(B, -1, N, H)
  return x_BTNH[:, :T].astype(like_BTNH.dtype)


def _split_keys(x_BSKH: jax.Array) -> jax.Array:
  """`[J, B, K, Y, H]`."""
  return jnp.einsum("JBYKH->JBKYH", _split(x_BSKH))


def _join_keys(x_JBKYH: jax.Array, like_BSKH: jax.Array) -> jax.Array:
  """The inverse, in the shape and dtype of `like_BSKH`."""
  B, S, K, H = like_BSKH.shape
  x_BSKH = jnp.einsum("JBKYH->BJYKH", x_JBKYH).reshape(B, -1, K, H)
  return x_BSKH[:, :S].astype(like_BSKH.dtype)


def _cut(query_BTNH, key_BSKH, value_BSKH, places) -> _Cut:
  query_at = _split(places.query_position_BT), _split(places.query_segment_BT)
  position_JBY, segment_JBY = (
    _split(places.key_position_BS),
    _split(places.key_segment_BS),
  )
  first_P, stop_P = _walk(query_at, (position_JBY, segment_JBY))
  return _Cut(
    _split_queries(query_BTNH, key_BSKH.shape[2]),
    _split_keys(key_BSKH),
    _split_keys(value_BSKH),
    query_at,
    (position_JBY, jnp.where(segment_JBY == 0, -1, segment_JBY)),
    first_P,
    stop_P,
  )


def _walk(query_at, key_at) -> tuple[jax.Array, jax.Array]:
  """The blocks of keys that each block of queries must see, as ranges.

  A key that is seen has its query's segment and no later a position. So a
  pair of blocks may be left out when its first key, in the order of segment
  and position, comes after its last query, or its last key's segment comes
  before its first query's. That holds whatever the order within the row. In
  rows that are laid out left to right, as ours are, both orders agree, and
  what remains is one stretch of blocks that ends at the diagonal and begins
  where the oldest segment of the queries does.
  """
  query_low, _ = _lowest(*query_at)
  query_high = _highest(*query_at)
  key_low = _lowest(*key_at)
  key_high, _ = _highest(*key_at)

  def pairs(x_PB, y_JB):
    return x_PB[:, None], y_JB[None]

  last_segment, first_segment = pairs(query_high[0], key_low[0])
  last_position, first_position = pairs(query_high[1], key_low[1])
  later_PJB = (first_segment > last_segment) | (
    (first_segment == last_segment) & (first_position > last_position)
  )
  low, high = pairs(query_low, key_high)
  needed_PJ = jnp.any(~later_PJB & (high >= low), axis=-1)
  J = needed_PJ.shape[1]
  first_P = jnp.argmax(needed_PJ, axis=1)
  stop_P = J - jnp.argmax(needed_PJ[:, ::-1], axis=1)
  return first_P, jnp.where(needed_PJ.any(1), stop_P, first_P)


def _lowest(position, segment) -> tuple[jax.Array, jax.Array]:
  """Segment and position of a block's first token that isn't padding."""
  segment = jnp.where(segment == 0, _LARGEST, segment)
  first = segment.min(-1)
  same = segment == first[..., None]
  return first, jnp.where(same, position, _LARGEST).min(-1)


def _highest(position, segment) -> tuple[jax.Array, jax.Array]:
  """Segment and position of its last one; segment 0 where there is none."""
  last = segment.max(-1)
  same = segment == last[..., None]
  return last, jnp.where(same, position, -1).max(-1)


def _scores(query_BKRH, key_BKYH, query_at, key_at) -> jax.Array:
  """Scaled float32 scores `[B, K, R, Y]`, -inf where nothing is seen."""
  B, K, R, H = query_BKRH.shape
  scores_BKRY = jnp.einsum(
    "BKRH,BKYH->BKRY",
    query_BKRH,
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
  scores = scores_BKRY.reshape(B, K, -1, X, Y) * H**-0.5
  seen = seen_BXY[:, None, None]
  return jnp.where(seen, scores, -jnp.inf).reshape(B, K, R, Y)


def _each(cut: _Cut, first, stop, step, carry):
  """Walks over the blocks of keys; a single one needs no loop."""
  if cut.key_JBKYH.shape[0] == 1:
    return step(0, carry)
  return jax.lax.fori_loop(first, stop, step, carry)


def _forward(query_BTNH, key_BSKH, value_BSKH, places):
  """The output and its log-sum-exp, float32 `[P, B, K, R]`."""
  cut = _cut(query_BTNH, key_BSKH, value_BSKH, places)

  def of_queries(block):
    query_BKRH, query_at, first, stop = block

    def step(j, carry):
      top_BKR, sum_BKR, mixed_BKRH = carry
      key_BKYH, value_BKYH, key_at = jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, j, keepdims=False),
        (cut.key_JBKYH, cut.value_JBKYH, cut.key_at),
      )
      scores_BKRY = _scores(query_BKRH, key_BKYH, query_at, key_at)
      new_BKR = jnp.maximum(top_BKR, scores_BKRY.max(-1))
      weights_BKRY = jnp.exp(scores_BKRY - new_BKR[..., None])
      shrink_BKR = jnp.exp(top_BKR - new_BKR)
      mixed_BKRH = shrink_BKR[..., None] * mixed_BKRH + jnp.einsum(
        "BKRY,BKYH->BKRH",
        weights_BKRY.astype(value_BKYH.dtype),
        value_BKYH,
        preferred_element_type=jnp.float32,
      )
      return new_BKR, shrink_BKR * sum_BKR + weights_BKRY.sum(-1), mixed_BKRH

    zeros_BKR = jnp.zeros(query_BKRH.shape[:-1])
    nothing = zeros_BKR + _LOWEST, zeros_BKR, jnp.zeros(query_BKRH.shape)
    top_BKR, sum_BKR, mixed_BKRH = _each(cut, first, stop, step, nothing)
    sum_BKR = jnp.where(sum_BKR == 0, 1, sum_BKR)
    mixed_BKRH = (mixed_BKRH / sum_BKR[..., None]).astype(query_BTNH.dtype)
    return mixed_BKRH, top_BKR + jnp.log(sum_BKR)

  mixed_PBKRH, lse_PBKR = jax.lax.map(
    of_queries, (cut.query_PBKRH, cut.query_at, cut.first_P, cut.stop_P)
  )
  return _join_queries(mixed_PBKRH, query_BTNH), lse_PBKR


def _attend_fwd(query_BTNH, key_BSKH, value_BSKH, places):
  mixed_BTNH, lse_PBKR = _forward(query_BTNH, key_BSKH, value_BSKH, places)
  mixed_BTNH = checkpoint_name(mixed_BTNH, SAVED)
  lse_PBKR = checkpoint_name(lse_PBKR, SAVED)
  kept = query_BTNH, key_BSKH, value_BSKH, places, mixed_BTNH, lse_PBKR
  return mixed_BTNH, kept


def _attend_bwd(kept, ct_BTNH):
  query_BTNH, key_BSKH, value_BSKH, places, mixed_BTNH, lse_PBKR = kept
  K, H = key_BSKH.shape[2:]
  dtype = query_BTNH.dtype
  cut = _cut(query_BTNH, key_BSKH, value_BSKH, places)
  ct_PBKRH = _split_queries(ct_BTNH.astype(dtype), K)
  # What the softmax's own gradient takes off every score of a query.
  level_PBKR = jnp.einsum(
    "PBKRH,PBKRH->PBKR",
    ct_PBKRH,
    _split_queries(mixed_BTNH, K),
    preferred_element_type=jnp.float32,
  )
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def of_queries(sums, block):
    query_BKRH, ct_BKRH, lse_BKR, level_BKR, query_at, first, stop = block

    def step(j, carry):
      d_query_BKRH, d_key_JBKYH, d_value_JBKYH = carry
      key_BKYH, value_BKYH, key_at = jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, j, keepdims=False),
        (cut.key_JBKYH, cut.value_JBKYH, cut.key_at),
      )
      scores_BKRY = _scores(query_BKRH, key_BKYH, query_at, key_at)
      weights_BKRY = jnp.exp(scores_BKRY - lse_BKR[..., None])
      d_weights_BKRY = product("BKRH,BKYH->BKRY", ct_BKRH, value_BKYH)
      d_scores_BKRY = weights_BKRY * (d_weights_BKRY - level_BKR[..., None])
      d_scores_BKRY = (d_scores_BKRY * H**-0.5).astype(dtype)
      weights_BKRY = weights_BKRY.astype(dtype)
      add = product("BKRY,BKRH->BKYH", d_scores_BKRY, query_BKRH)
      d_key_JBKYH = d_key_JBKYH.at[j].add(add)
      add = product("BKRY,BKRH->BKYH", weights_BKRY, ct_BKRH)
      d_value_JBKYH = d_value_JBKYH.at[j].add(add)
      d_query_BKRH += product("BKRY,BKYH->BKRH", d_scores_BKRY, key_BKYH)
      return d_query_BKRH, d_key_JBKYH, d_value_JBKYH

    nothing = jnp.zeros(query_BKRH.shape)
    d_query_BKRH, *sums = _each(cut, first, stop, step, (nothing, *sums))
    return tuple(sums), d_query_BKRH.astype(dtype)

  zeros = jnp.zeros(cut.key_JBKYH.shape), jnp.zeros(cut.value_JBKYH.shape)
  (d_key_JBKYH, d_value_JBKYH), d_query_PBKRH = jax.lax.scan(
    of_queries,
    zeros,
    (
      cut.query_PBKRH,
      ct_PBKRH,
      lse_PBKR,
      level_PBKR,
      cut.query_at,
      cut.first_P,
      cut.stop_P,
    ),
  )
  return (
    _join_queries(d_query_PBKRH, query_BTNH),
    _join_keys(d_key_JBKYH, key_BSKH),
    _join_keys(d_value_JBKYH, value_BSKH),
    None,
  )


attend_blockwise.defvjp(_attend_fwd, _attend_bwd)
