import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trd_jax.model.attention import attend


def _reference(q, k, v, position, segment):
  """Dense masked attention in float64, one head at a time."""
  B, T, N, H = q.shape
  share = N // k.shape[2]
  out = np.zeros((B, T, N, H))
  for b in range(B):
    later = position[b][None, :] > position[b][:, None]
    other = segment[b][None, :] != segment[b][:, None]
    for n in range(N):
      scores = q[b, :, n] @ k[b, :, n // share].T / np.sqrt(H)
      scores = np.where(later | other, -np.inf, scores)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      out[b, :, n] = weights @ v[b, :, n // share]
  return out


def _inputs(T, lengths):
  generator = np.random.default_rng(T)
  q = generator.standard_normal((2, T, 4, 8))
  k, v = generator.standard_normal((2, 2, T, 2, 8))
  position = np.zeros((2, T), np.int32)
  segment = np.zeros((2, T), np.int32)
  for row, parts in enumerate(lengths):
    start = 0
    for number, length in enumerate(parts, 1):
      position[row, start : start + length] = np.arange(length)
      segment[row, start : start + length] = number
      start += length
  return q, k, v, position, segment


def _attend(q, k, v, position, segment):
  return attend(
    q,
    k,
    v,
    query_position_BT=position,
    key_position_BS=position,
    query_segment_BT=segment,
    key_segment_BS=segment,
  )


# 1,100 queries are three blocks, the last of them partly padding.
@pytest.mark.parametrize(
  ("T", "lengths"),
  [(40, [(40,), (13, 20)]), (1100, [(700, 400), (1, 511, 513, 60)])],
)
def test_attention_equals_a_dense_float64_reference(T, lengths):
  q, k, v, position, segment = _inputs(T, lengths)
  expected = _reference(q, k, v, position, segment)
  single = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
  got = _attend(*single, position, segment)
  counts = segment > 0
  np.testing.assert_allclose(got[counts], expected[counts], atol=2e-5)


def test_gradients_through_query_blocks_equal_those_of_one_block():
  T = 600
  q, k, v, position, segment = _inputs(T, [(600,), (350, 200)])
  ct = (
    np.random.default_rng(1).standard_normal(q.shape)
    * (segment > 0)[..., None, None]
  )

  def blocked(q, k, v):
    return jnp.sum(_attend(q, k, v, position, segment) * ct)

  def halves(q, k, v):
    # Queries of at most a block each: the path without blocks.
    out = [
      attend(
        q[:, part],
        k,
        v,
        query_position_BT=position[:, part],
        key_position_BS=position,
        query_segment_BT=segment[:, part],
        key_segment_BS=segment,
      )
      for part in (slice(0, 300), slice(300, 600))
    ]
    return jnp.sum(jnp.concatenate(out, axis=1) * ct)

  single = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
  for got, expected in zip(
    jax.grad(blocked, (0, 1, 2))(*single),
    jax.grad(halves, (0, 1, 2))(*single),
    strict=True,
  ):
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_scores_of_all_queries_are_never_in_memory_at_once():
  def peak(T):
    shape = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def loss(q, k, v, position, segment):
      return jnp.sum(_attend(q, k, v, position, segment) ** 2)

    program = jax.jit(jax.grad(loss, (0, 1, 2)))
    compiled = program.lower(shape, shape, shape, ids, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # Twice the tokens: twice a block's scores, where all scores are four times.
  assert peak(8192) < 2.5 * peak(4096)
