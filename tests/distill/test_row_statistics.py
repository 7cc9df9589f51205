"""Statistics of wide rows are those of the plain operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from trd_jax.distill.loss.row_statistics import (
  Part,
  read_rows,
  reduce_rows,
  top_k,
)


@pytest.mark.slow
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


def test_on_a_gpu_rows_are_reduced_flat():
  """Lanes would make XLA write every term there."""
  x = jax.ShapeDtypeStruct((2, 256), jnp.float32)

  @jax.jit
  def sums(x):
    return reduce_rows(lax.add, 0.0, (x, x * x))

  text = {
    platform: sums.trace(x).lower(lowering_platforms=(platform,)).as_text()
    for platform in ("cpu", "cuda")
  }
  assert "tensor<2x2x128xf32>" in text["cpu"]
  assert "tensor<2x2x128xf32>" not in text["cuda"]
  assert "stablehlo.reduce" in text["cuda"]


def over_parts(f, *arrays):
  """`f(part, *arrays)` with their columns split over eight devices."""
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((8,), ("ids",), axis_types=auto)

  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=P(None, "ids"), out_specs=P()
  )
  def run(*here):
    return f(Part(here[0].shape[1], "ids"), *here)

  return jax.jit(run)(*arrays)


# Parts of 2, 12 and 160 ids; the first two have fewer than k.
@pytest.mark.parametrize("width", [16, 96, 1280])
def test_top_k_of_parts_is_that_of_the_whole(width):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.geometric(0.3, (64, width)), jnp.float32)
  for k in 1, 9, 20:
    values, ids = over_parts(lambda part, here, k=k: part.top_k(here, k), x)
    wanted_values, wanted_ids = jax.lax.top_k(x, min(k, width))
    np.testing.assert_array_equal(values, wanted_values)
    np.testing.assert_array_equal(ids, wanted_ids)


def test_an_id_is_found_in_its_part_and_none_outside_of_all():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 24)) * 9)
  ids = np.array([0, 23, 7, 24, -1])

  def read(part, student, teacher):
    q, _, _ = read_rows(student, teacher, part, temperature=1.0, kl_under=None)
    return q.at(ids), q.mass_on(ids[:3])

  found, mass = over_parts(read, x, x)
  np.testing.assert_array_equal(found[:3], x[np.arange(3), ids[:3]])
  assert np.isnan(found[3:]).all()
  wanted = jax.nn.softmax(x)[:, ids[:3]].sum(-1)
  np.testing.assert_allclose(mass, wanted, rtol=1e-5)
