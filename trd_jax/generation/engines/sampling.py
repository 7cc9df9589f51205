"""Choosing the next token: temperature, then top-k, then top-p.

A draw is Gumbel-max: the kept token whose scaled logit plus noise is largest.
The noise of a token is a hash of (request seed, index of the generated token,
token id) and of nothing else, so a request's tokens depend neither on what it
is batched with nor on its slot, and cutting the vocabulary down to k
candidates draws the same token as masking all of it would.

Shape key: B rows, V vocabulary, C candidates of a row.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


@dataclasses.dataclass(frozen=True)
class Plan:
  """What of the sampling decides the shape of the program.

  Attributes:
    greedy: take the likeliest token; nothing else matters then.
    top_k: candidates kept, 0 for all.
    nucleus: whether top-p is on.
  """

  greedy: bool
  top_k: int
  nucleus: bool

  @classmethod
  def of(cls, temperature: float, top_k: int, top_p: float) -> "Plan":
    """The plan of a temperature (0: greedy), a top-k (-1: off) and a top-p."""
    if temperature == 0:
      return cls(greedy=True, top_k=0, nucleus=False)
    return cls(greedy=False, top_k=max(top_k, 0), nucleus=top_p < 1)


class Likeliest(NamedTuple):
  """The likeliest tokens of each row, likeliest first.

  Attributes:
    ids: int32 `[..., K]`.
    logprobs: float32 `[..., K]`.
  """

  ids: jax.Array
  logprobs: jax.Array


def seed_words(seeds: Sequence[int]) -> np.ndarray:
  """Seeds modulo 2^64 as uint32 words `[B, 2]`, the high one first."""
  words = [(seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF) for seed in seeds]
  return np.array(words, np.uint32).reshape(-1, 2)


def sample(
  logits_BV: jax.Array,
  seed_B2: jax.Array,
  index_B: jax.Array,
  *,
  plan: Plan,
  temperature: jax.Array | float = 1.0,
  top_p: jax.Array | float = 1.0,
) -> jax.Array:
  """One token a row.

  With p the softmax of logits / temperature: top-k keeps the k likeliest
  tokens; top-p then keeps the likeliest of those up to and including the one
  with which their renormalised mass reaches `top_p`, so at least one. Among
  equal logits lower ids come first, in both and in greedy choice.

  Args:
    logits_BV: float32.
    seed_B2: uint32, a request's seed (`seed_words`).
    index_B: int32, how many tokens the request has generated before.
    plan: what is on; static.
    temperature: positive; not read by a greedy plan.
    top_p: in (0, 1); read by a plan with `nucleus`.

  Returns:
    int32 token ids `[B]`.
  """
  if plan.greedy:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  scaled_BV = logits_BV / temperature
  V = scaled_BV.shape[-1]
  if not 0 < plan.top_k < V:
    id_BV = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), scaled_BV.shape)
    noisy_BV = scaled_BV + gumbel(seed_B2, index_B, id_BV)
    if plan.nucleus:
      noisy_BV = jnp.where(nucleus(scaled_BV, top_p), noisy_BV, -jnp.inf)
    return jnp.argmax(noisy_BV, axis=-1).astype(jnp.int32)
  # Likeliest first, and of equal ones the lower id first.
  scaled_BC, id_BC = jax.lax.top_k(scaled_BV, plan.top_k)
  noisy_BC = scaled_BC + gumbel(seed_B2, index_B, id_BC)
  if plan.nucleus:
    p_BC = jax.nn.softmax(scaled_BC, axis=-1)
    kept_BC = jnp.cumsum(p_BC, axis=-1) - p_BC < top_p
    noisy_BC = jnp.where(kept_BC, noisy_BC, -jnp.inf)
  best_B1 = jnp.argmax(noisy_BC, axis=-1, keepdims=True)
  return jnp.take_along_axis(id_BC, best_B1, axis=-1)[:, 0].astype(jnp.int32)


def likeliest(logits_BV: jax.Array, count: int) -> Likeliest:
  """The `count` likeliest tokens of each row.

  Their log-probabilities are of the softmax over all of the row. Of equal
  logits the lower id comes first.

  Args:
    logits_BV: float32.
    count: at most V.
  """
  top_BC, id_BC = jax.lax.top_k(logits_BV, count)
  total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
  return Likeliest(id_BC.astype(jnp.int32), top_BC - total_B1)


def nucleus(scaled_BV: jax.Array, top_p: jax.Array | float) -> jax.Array:
  """Which tokens top-p keeps, bool `[B, V]`, without sorting.

  Bisects on the bits of the logits for the smallest one kept: 32 sums over
  the vocabulary, where a sort of 152K ids takes ten times as long on a CPU.
  """
  p_BV = jax.nn.softmax(scaled_BV, axis=-1)
  # Integers in the order of the floats; -0.0 counts as 0.0.
  bits_BV = jax.lax.bitcast_convert_type(
    jnp.where(scaled_BV == 0, 0, scaled_BV), jnp.int32
  )
  order_BV = jnp.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV)

  def halve(_, low_high):
    low_B, high_B = low_high
    # The mean, rounded up, of two int32 of any signs.
    middle_B = (low_B | high_B) - ((low_B ^ high_B) >> 1)
    above_BV = order_BV >= middle_B[:, None]
    enough_B = jnp.sum(jnp.where(above_BV, p_BV, 0), axis=-1) >= top_p
    return (
      jnp.where(enough_B, middle_B, low_B),
      jnp.where(enough_B, high_B, middle_B - 1),
    )

  ends = (jnp.min(order_BV, axis=-1), jnp.max(order_BV, axis=-1))
  edge_B1 = jax.lax.fori_loop(0, 32, halve, ends)[0][:, None]
  above_BV = order_BV > edge_B1
  tied_BV = order_BV == edge_B1
  before_B1 = jnp.sum(jnp.where(above_BV, p_BV, 0), axis=-1, keepdims=True)
  tied_p_BV = jnp.where(tied_BV, p_BV, 0)
  before_BV = before_B1 + jnp.cumsum(tied_p_BV, axis=-1) - tied_p_BV
  return above_BV | (tied_BV & (before_BV < top_p))


def gumbel(
  seed_B2: jax.Array, index_B: jax.Array, id_BC: jax.Array
) -> jax.Array:
  """Standard Gumbel noise `[B, C]`, float32, of token ids `id_BC`."""
  index_BC = jnp.broadcast_to(index_B[:, None], id_BC.shape)
  bits_BC, _ = threefry(
    (seed_B2[:, :1], seed_B2[:, 1:]),
    (index_BC.astype(jnp.uint32), id_BC.astype(jnp.uint32)),
  )
  # In (0, 1), and finest near 0: small exponentials are the large noises,
  # which decide.
  uniform_BC = (bits_BC.astype(jnp.float32) + 0.5) * 2**-32
  uniform_BC = jnp.minimum(uniform_BC, 1 - 2**-24)
  return -jnp.log(-jnp.log1p(-uniform_BC))


def threefry(
  key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Threefry-2x32 with 20 rounds (Salmon et al. 2011), elementwise on uint32.

  `jax.random` is built on the same function; spelt out here it takes its
  counters as they are and compiles several times faster inside a loop.
  """
  keys = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
  left, right = counter[0] + keys[0], counter[1] + keys[1]
  for group in range(5):
    for rotation in _ROTATIONS[group % 2]:
      left = left + right
      right = (right << rotation) | (right >> (32 - rotation))
      right = right ^ left
    left = left + keys[(group + 1) % 3]
    right = right + keys[(group + 2) % 3] + jnp.uint32(group + 1)
  return left, right
