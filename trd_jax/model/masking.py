"""Masks inside of a loop over layers."""

import jax
import jax.numpy as jnp


def only(keep: jax.Array, x: jax.Array, varying: jax.Array) -> jax.Array:
  """Returns `x` where `keep` is true and 0 elsewhere; so is its gradient.

  Of a loop's body JAX computes what no turn changes before the loop. A literal
  0 would be an array as large as `x`, written once and read by every layer, so
  the 0 is made of something that changes.

  Args:
    keep: bool, of a shape that broadcasts to that of `x`.
    x: anything, NaN where it isn't kept, too: a product with 0 would keep that.
    varying: integers of which the loop has others in each turn.
  """
  zero = 0 * varying.reshape(-1)[0]
  return jnp.where(keep, x, zero.astype(x.dtype))
