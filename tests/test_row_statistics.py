"""Statistics of wide rows are those of the plain operations."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from trd_jax.row_statistics import reduce_rows, top_k


def test_top_k_breaks_ties_like_lax_top_k():
  rng = np.random.default_rng(0)
  for width in 7, 128, 1000, 5003:
    # Whole numbers with a tail: best entries differ, the k-th has many equals.
    x = jnp.asarray(rng.geometric(0.3, (64, width)), jnp.float32)
    for k in 1, 5, 9:
      values, ids = top_k(x, k)
      wanted_values, wanted_ids = jax.lax.top_k(x, min(k, width))
      np.testing.assert_array_equal(values, wanted_values)
      np.testing.assert_array_equal(ids, wanted_ids)


def test_rows_reduce_in_one_pass_to_their_float64_sums():
  rng = np.random.default_rng(0)
  for width in 3, 128, 300, 151_936:
    x = rng.random((2, width)).astype(np.float32)
    sums, others = reduce_rows(lax.add, 0.0, (jnp.asarray(x), jnp.asarray(-x)))
    (largest,) = reduce_rows(lax.max, -jnp.inf, (jnp.asarray(x),))
    wanted = x.astype(np.float64).sum(-1)
    np.testing.assert_allclose(sums, wanted, rtol=2e-6)
    np.testing.assert_allclose(others, -wanted, rtol=2e-6)
    np.testing.assert_array_equal(largest, x.max(-1))
