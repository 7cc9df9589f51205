"""Draws the next token: temperature, then top-k, then top-p.

A draw is Gumbel-max: of the tokens that are kept, the one whose scaled logit
plus noise is largest. The noise of a token is a hash of (request seed, index of
the generated token, token id) and of nothing else. So a request's tokens depend
neither on what it is batched with nor on its slot, and cutting the vocabulary
down to k candidates draws the same token as masking all of it would.

Shape key: B rows, V vocabulary, K candidates of a row, the likeliest.
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
  """The part of the sampling that decides which program is compiled.

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
    """Makes the plan of temperature (0: greedy), top-k (-1: off) and top-p."""
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
  """Returns seeds modulo 2^64 as uint32 words `[B, 2]`, the high one first."""
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
  """Draws one token a row.

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
  # No noise and no limits: they would not change which token is the likeliest.
  if plan.greedy:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  scaled_BV = logits_BV / temperature
  V = scaled_BV.shape[-1]
  # The limits are values and not part of the program: a sweep over temperatures
  # compiles once. Which of them are on is part of it.
  if not 0 < plan.top_k < V:
    id_BV = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), scaled_BV.shape)
    noisy_BV = scaled_BV + gumbel(seed_B2, index_B, id_BV)
    if plan.nucleus:
      noisy_BV = jnp.where(nucleus(scaled_BV, top_p), noisy_BV, -jnp.inf)
    return jnp.argmax(noisy_BV, axis=-1).astype(jnp.int32)
  # Likeliest first, and of equal ones the lower id first.
  scaled_BK, id_BK = jax.lax.top_k(scaled_BV, plan.top_k)
  noisy_BK = scaled_BK + gumbel(seed_B2, index_B, id_BK)
  if plan.nucleus:
    p_BK = jax.nn.softmax(scaled_BK, axis=-1)
    # The mass before a token, so that the one that reaches `top_p` is kept.
    kept_BK = jnp.cumsum(p_BK, axis=-1) - p_BK < top_p
    noisy_BK = jnp.where(kept_BK, noisy_BK, -jnp.inf)
  best_B1 = jnp.argmax(noisy_BK, axis=-1, keepdims=True)
  return jnp.take_along_axis(id_BK, best_B1, axis=-1)[:, 0].astype(jnp.int32)


def likeliest(logits_BV: jax.Array, count: int) -> Likeliest:
  """Returns the `count` likeliest tokens of each row.

  Log-probabilities are of the softmax over all of the row. Of equal
  logits the lower id comes first.

  Args:
    logits_BV: float32.
    count: at most V.
  """
  top_BK, id_BK = jax.lax.top_k(logits_BV, count)
  total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
  return Likeliest(id_BK.astype(jnp.int32), top_BK - total_B1)


def nucleus(scaled_BV: jax.Array, top_p: jax.Array | float) -> jax.Array:
  """Returns which tokens top-p keeps, bool `[B, V]`, without sorting.

  Bisects on the bits of the logits for the smallest one kept: 32 sums over
  the vocabulary, where a sort of 152K ids takes ten times as long on a CPU.
  """
  p_BV = jax.nn.softmax(scaled_BV, axis=-1)
  # Read as integers, the bits of floats above zero are in the floats' order and
  # those below in the opposite one, so these are turned. -0.0 counts as 0.0.
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

  # 32 halvings of a range of 32 bits leave one value, the smallest kept logit.
  ends = (jnp.min(order_BV, axis=-1), jnp.max(order_BV, axis=-1))
  edge_B1 = jax.lax.fori_loop(0, 32, halve, ends)[0][:, None]
  # Of tokens whose logit equals it only as many are kept as the mass needs,
  # lower ids first, as a stable sort would.
  above_BV = order_BV > edge_B1
  tied_BV = order_BV == edge_B1
  before_B1 = jnp.sum(jnp.where(above_BV, p_BV, 0), axis=-1, keepdims=True)
  tied_p_BV = jnp.where(tied_BV, p_BV, 0)
  before_BV = before_B1 + jnp.cumsum(tied_p_BV, axis=-1) - tied_p_BV
  return above_BV | (tied_BV & (before_BV < top_p))


def gumbel(
  seed_B2: jax.Array, index_B: jax.Array, id_BK: jax.Array
) -> jax.Array:
  """Computes standard Gumbel noise `[B, K]`, float32, of token ids `id_BK`."""
  index_BK = jnp.broadcast_to(index_B[:, None], id_BK.shape)
  bits_BK, _ = threefry(
    (seed_B2[:, :1], seed_B2[:, 1:]),
    (index_BK.astype(jnp.uint32), id_BK.astype(jnp.uint32)),
  )
  # In (0, 1), and finest near 0: small exponentials are the large noises,
  # which decide.
  uniform_BK = (bits_BK.astype(jnp.float32) + 0.5) * 2**-32
  uniform_BK = jnp.minimum(uniform_BK, 1 - 2**-24)
  return -jnp.log(-jnp.log1p(-uniform_BK))


def threefry(
  key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Computes Threefry-2x32 (Salmon et al. 2011) elementwise on uint32.

  It has 20 rounds. `jax.random` is built on the same function; written out here
  it takes its counters as they are, and compiles several times faster inside a
  loop.
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
