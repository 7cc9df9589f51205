"""Attention sees what it may, in whatever blocks, and stores no square."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.small_models import packed
from trd_jax.model.attention import blockwise
from trd_jax.model.attention.attention import attend


def reference(q, k, v, seen):
  """Dense masked attention in float64 and its gradient, by autodiff's rules.

  Returns the output and, of a cotangent, the gradients of q, k and v.
  """
  share = q.shape[2] // k.shape[2]
  k_all, v_all = (np.repeat(x, share, axis=2) for x in (k, v))
  scale = q.shape[-1] ** -0.5
  scores = np.einsum("BTNH,BSNH->BNTS", q, k_all) * scale
  scores = np.where(seen[:, None], scores, -np.inf)
  top = scores.max(-1, keepdims=True)
  weights = np.exp(scores - np.where(np.isinf(top), 0, top))
  total = weights.sum(-1, keepdims=True)
  weights = weights / np.where(total == 0, 1, total)

  def back(ct):
    d_weights = np.einsum("BTNH,BSNH->BNTS", ct, v_all)
    level = (weights * d_weights).sum(-1, keepdims=True)
    d_scores = weights * (d_weights - level) * scale
    d_q = np.einsum("BNTS,BSNH->BTNH", d_scores, k_all)
    d_k = np.einsum("BNTS,BTNH->BSNH", d_scores, q)
    d_v = np.einsum("BNTS,BTNH->BSNH", weights, ct)
    shared = (*k.shape[:3], share, k.shape[3])
    d_k, d_v = (x.reshape(shared).sum(3) for x in (d_k, d_v))
    return d_q, d_k, d_v

  return np.einsum("BNTS,BSNH->BTNH", weights, v_all), back


def visible(query_at, key_at):
  """What may be seen, `[B, T, S]`, from positions and segments alone."""
  (q_position, q_segment), (k_position, k_segment) = query_at, key_at
  seen = k_position[:, None, :] <= q_position[:, :, None]
  seen = seen & (k_segment[:, None, :] == q_segment[:, :, None])
  return seen & (q_segment > 0)[:, :, None]


def places(rows, width):
  """Positions and segments `[B, width]` of rows of documents."""
  return tuple(
    np.stack(x) for x in zip(*(packed(r, width) for r in rows), strict=True)
  )


def random(T, S, rows, seed=0):
  rng = np.random.default_rng(seed)
  q, ct = rng.standard_normal((2, rows, T, 4, 8))
  k, v = rng.standard_normal((2, rows, S, 2, 8))
  return q, k, v, ct


def call(q, k, v, query_at, key_at):
  return attend(
    q,
    k,
    v,
    query_position_BT=query_at[0],
    key_position_BS=key_at[0],
    query_segment_BT=query_at[1],
    key_segment_BS=key_at[1],
  )


def both(q, k, v, ct, query_at, key_at):
  """Output and gradients in float32; compiled anew where blocks change."""
  out, back = jax.vjp(lambda q, k, v: call(q, k, v, query_at, key_at), q, k, v)
  return out, *back(ct)


_both = jax.jit(both)
# A function of its own, whose compiled form is kept apart.
_both_in_blocks_of_8 = jax.jit(lambda *args: both(*args))


def run(q, k, v, ct, query_at, key_at, compiled=_both):
  single = (jnp.asarray(x, jnp.float32) for x in (q, k, v, ct))
  return compiled(*single, query_at, key_at)


def agree(query_at, key_at, seed=0, run=run):
  """Output and gradients equal the float64 reference's everywhere."""
  (B, T), S = query_at[0].shape, key_at[0].shape[1]
  q, k, v, ct = random(T, S, B, seed)
  out, back = reference(q, k, v, visible(query_at, key_at))
  got = run(q, k, v, ct, query_at, key_at)
  for one, other in zip(got, (out, *back(ct)), strict=True):
    np.testing.assert_allclose(one, other, atol=3e-5)


# 40 is one block, 700 two, 1,100 three, the last of them partly padding.
ROWS = {
  40: [(40,), (13, 20)],
  700: [(600, 90), (20,)],
  1100: [(700, 400), (1, 511, 513, 60)],
}


@pytest.mark.slow
@pytest.mark.parametrize("T", ROWS)
def test_value_and_gradient_equal_a_dense_float64_reference(T):
  at = places(ROWS[T], T)
  agree(at, at, seed=T)


def test_padding_sees_nothing_is_seen_by_nothing_and_gives_zero():
  T = 1100
  at = places(ROWS[T], T)
  q, k, v, ct = random(T, T, 2)
  before = run(q, k, v, ct, at, at)
  void = (at[1] == 0)[..., None, None]
  assert void.any()
  q, k, v, ct = (np.where(void, 1e3 * x, x) for x in (q, k, v, ct))
  after = run(q, k, v, ct, at, at)
  for one, other in zip(before, after, strict=True):
    assert not np.asarray(one)[np.broadcast_to(void, one.shape)].any()
    np.testing.assert_array_equal(one, other)


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of 16, so that short rows have many."""
  monkeypatch.setattr(blockwise, "BLOCK", 16)


@pytest.mark.slow
def test_no_query_sees_a_key_to_its_right_in_a_packed_row(small_blocks):
  # Positions start anew in each document: they alone say nothing of right.
  T = 90
  at = places([(30, 5, 25, 20), (90,)], T)
  q, k, v, _ = random(T, T, 2)
  q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
  out = jax.jit(lambda k, v, at: call(q, k, v, at, at))
  before = out(k, v, at)
  for j in range(0, T, 7):
    after = out(k.at[:, j:].add(3.0), v.at[:, j:].set(5.0), at)
    np.testing.assert_array_equal(after[:, :j], before[:, :j])
    assert (after[:, j] != before[:, j]).any(axis=(1, 2)).tolist() == [
      bool(at[1][row, j]) for row in range(2)
    ]


def in_blocks_of_8(*args):
  """As `run`."""
  block, blockwise.BLOCK = blockwise.BLOCK, 8
  try:
    return run(*args, compiled=_both_in_blocks_of_8)
  finally:
    blockwise.BLOCK = block


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_what_is_skipped_is_what_is_unseen(data):
  # Any order of segments and positions, queries that are not the keys.
  def side(length):
    segment = data.draw(
      st.lists(st.integers(0, 3), min_size=length, max_size=length)
    )
    position = data.draw(
      st.lists(st.integers(0, 9), min_size=length, max_size=length)
    )
    if data.draw(st.booleans()):
      position, segment = sorted(position), sorted(segment)
    return np.array([position], np.int32), np.array([segment], np.int32)

  agree(side(23), side(41), run=in_blocks_of_8)


def walked(rows, width):
  """Pairs of blocks that a packed batch computes."""
  at = tuple(blockwise._split(jnp.asarray(x)) for x in places(rows, width))
  first, stop = blockwise._walk(at, at)
  return int((stop - first).sum())


def test_a_long_row_computes_the_triangle_and_packed_ones_less(small_blocks):
  assert walked([(128,)], 128) == 8 * 9 // 2
  # Documents that end with a block: each its own triangle, nothing between.
  assert walked([(32, 32, 48, 16)], 128) == 3 + 3 + 6 + 1
  # Padding behind costs nothing, nor does a row of it.
  assert walked([(32,), ()], 128) == 3


def temporary(T, heads=(2, 2), width=8, gradient=True, dtype=jnp.float32):
  """Bytes that the gradient (or output) of a row of T tokens works in."""
  q, k = (jax.ShapeDtypeStruct((1, T, n, width), dtype) for n in heads)
  ids = jax.ShapeDtypeStruct((1, T), jnp.int32)

  def out(q, k, v, position, segment):
    return call(q, k, v, (position, segment), (position, segment))

  def loss(*args):
    return jnp.sum(out(*args).astype(jnp.float32) ** 2)

  f = jax.grad(loss, (0, 1, 2)) if gradient else out
  analysis = jax.jit(f).lower(q, k, k, ids, ids).compile().memory_analysis()
  assert analysis is not None
  return analysis.temp_size_in_bytes


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_grows_with_the_row_and_not_with_its_square(gradient):
  small, large = (temporary(T, gradient=gradient) for T in (4096, 16384))
  # Four times the tokens: at most four times the memory, not sixteen.
  assert large < 4.2 * small


@pytest.mark.parametrize(("gradient", "bound"), [(False, 2), (True, 3.5)])
def test_the_longest_teacher_row_of_8b_fits(gradient, bound):
  kept = temporary(38912, (32, 8), 128, gradient, jnp.bfloat16)
  # All scores at once would take 32 x 38,912^2 x 4 bytes: 180 GiB.
  assert kept < bound * 2**30
