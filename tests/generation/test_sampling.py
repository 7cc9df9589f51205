import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from trd_jax.experiment.errors import UserError
from trd_jax.generation.engines.engine import Sampling
from trd_jax.generation.engines.sampling import (
  Plan,
  gumbel,
  nucleus,
  sample,
  seed_words,
  threefry,
)

# Twelve tokens, the likeliest three equal and two more pairs of equals.
LOGITS = np.array(
  [0.3, 2.0, -1.0, 2.0, 1.1, 0.3, 2.0, -4.0, 1.7, -1.0, 0.9, 0.0], np.float32
)


def exact(logits, temperature, top_k, top_p):
  """The distribution by its definition, in float64, by sorting."""
  scaled = logits.astype(np.float64) / temperature
  p = np.exp(scaled - scaled.max())
  order = np.lexsort((np.arange(p.size), -scaled))
  if top_k > 0:
    p[order[top_k:]] = 0
  p /= p.sum()
  before = np.cumsum(p[order]) - p[order]
  p[order[before >= top_p]] = 0
  return p / p.sum()


@functools.partial(jax.jit, static_argnames="plan")
def draw(logits_BV, seed_B2, index_B, temperature, top_p, plan):
  return sample(
    logits_BV, seed_B2, index_B, plan=plan, temperature=temperature, top_p=top_p
  )


def draws(logits, seeds, index, temperature, top_k, top_p):
  """One token for each seed, all from the same logits."""
  rows = jnp.broadcast_to(logits, (len(seeds), logits.size))
  index = jnp.broadcast_to(jnp.asarray(index, jnp.int32), len(seeds))
  plan = Plan.of(temperature, top_k, top_p)
  words = seed_words(seeds)
  return np.asarray(draw(rows, words, index, temperature, top_p, plan))


def assert_drawn_from(tokens, p):
  """Pearson's statistic within 5 deviations of its mean, and no token off."""
  count = np.bincount(tokens, minlength=p.size)
  assert count[p == 0].sum() == 0
  expected = p[p > 0] * len(tokens)
  statistic = np.sum((count[p > 0] - expected) ** 2 / expected)
  freedom = expected.size - 1
  assert statistic <= freedom + 5 * np.sqrt(2 * freedom), (count, expected)


@pytest.mark.parametrize(
  ("temperature", "top_k", "top_p"),
  [
    (1.0, -1, 1.0),
    (0.6, -1, 1.0),
    (2.5, 5, 1.0),
    (1.0, 2, 1.0),  # cuts between equals
    (0.6, 1, 1.0),
    (1.0, -1, 0.9),
    (1.0, -1, 0.3),  # cuts between equals
    (0.6, 20, 0.95),
    (1.5, 7, 0.7),
    (1.0, 2, 0.5),  # top-p of what top-k left: one of two equals
    (1.0, -1, 1e-6),
    (0.05, -1, 0.5),
  ],
)
def test_tokens_follow_the_exact_distribution(temperature, top_k, top_p):
  tokens = draws(LOGITS, range(20_000), 3, temperature, top_k, top_p)
  assert_drawn_from(tokens, exact(LOGITS, temperature, top_k, top_p))


def test_the_tokens_of_one_request_are_independent():
  index = np.arange(20_000)
  tokens = draws(LOGITS, [5] * index.size, index, 1.0, 3, 1.0)
  one, p = tokens[:-1] // 2, np.full(4, 1 / 3) * [1, 1, 0, 1]
  assert set(tokens) == {1, 3, 6}
  assert_drawn_from(one, p)
  for lag in (1, 2):
    pairs = tokens[:-lag] // 2 * 4 + tokens[lag:] // 2
    assert_drawn_from(pairs, np.outer(p, p).ravel())


def test_seeds_that_differ_in_any_bit_draw_differently():
  seeds = [0, 1, -1, 2**31, 2**32, 2**62, -(2**63)]
  first = draws(np.zeros(2**16, np.float32), seeds, 0, 1.0, -1, 1.0)
  assert len(set(first)) == len(seeds)
  assert seed_words([3 << 32 | 9, -1]).tolist() == [[3, 9], [2**32 - 1] * 2]


def test_greedy_takes_the_likeliest_and_of_equals_the_first():
  assert draws(LOGITS, range(3), 0, 0.0, -1, 1.0).tolist() == [1] * 3
  assert draws(LOGITS, range(3), 0, 0.0, 2, 0.1).tolist() == [1] * 3


def test_candidates_draw_the_token_that_masking_the_rest_would():
  generator = np.random.default_rng(0)
  logits = generator.standard_normal((500, 100)).astype(np.float32)
  words, index = seed_words(range(500)), jnp.arange(500)
  best = np.argsort(-logits, axis=1)[:, :9]
  masked = np.full_like(logits, -1e30)
  np.put_along_axis(
    masked, best, np.take_along_axis(logits, best, axis=1), axis=1
  )
  by_top_k = draw(logits, words, index, 0.8, 0.9, Plan(False, 9, True))
  by_mask = draw(masked, words, index, 0.8, 0.9, Plan(False, 0, True))
  np.testing.assert_array_equal(by_top_k, by_mask)
  assert len(np.unique(by_mask)) > 20


def test_a_row_draws_the_same_in_any_company():
  generator = np.random.default_rng(1)
  logits = generator.standard_normal((64, 50)).astype(np.float32)
  words, index = seed_words(range(64)), np.arange(64) % 7
  for plan in (Plan(False, 5, True), Plan(False, 0, True)):
    together = draw(logits, words, index, 1.0, 0.9, plan)
    order = generator.permutation(64)[:10]
    fewer = draw(logits[order], words[order], index[order], 1.0, 0.9, plan)
    np.testing.assert_array_equal(fewer, together[order])


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.95, 1 - 1e-7])
def test_the_nucleus_is_the_sorted_one(top_p):
  generator = np.random.default_rng(2)
  scaled = 3 * generator.standard_normal((200, 300))
  scaled[50:100] = np.round(scaled[50:100])  # ties, with 0.0 and -0.0
  scaled[100:150] -= 40
  scaled[150:] *= 1e-3
  scaled = scaled.astype(np.float32)
  kept = np.asarray(jax.jit(nucleus)(scaled, top_p))
  p = np.exp(scaled - scaled.max(1, keepdims=True), dtype=np.float64)
  p /= p.sum(1, keepdims=True)
  order = np.argsort(-scaled, axis=1, kind="stable")
  sorted_p = np.take_along_axis(p, order, axis=1)
  before = np.cumsum(sorted_p, axis=1) - sorted_p
  assert np.all(np.take_along_axis(kept, order, axis=1)[:, 0])
  # Float32 sums may put the edge elsewhere where it is that close.
  sure = np.abs(before - top_p) > 1e-5
  sorted_kept = np.take_along_axis(kept, order, axis=1)
  np.testing.assert_array_equal(sorted_kept[sure], (before < top_p)[sure])
  assert np.all(np.diff(sorted_kept.astype(int), axis=1) <= 0)


def test_the_hash_is_the_one_of_jax_random():
  generator = np.random.default_rng(3)
  key = generator.integers(0, 2**32, 2, np.uint32)
  counter = generator.integers(0, 2**32, (2, 100), np.uint32)
  left, right = threefry(tuple(key), tuple(counter))
  expected = threefry_2x32(tuple(map(jnp.uint32, key)), counter.ravel())
  np.testing.assert_array_equal(np.concatenate([left, right]), expected)


@pytest.mark.slow
def test_the_noise_is_gumbel_far_into_its_upper_tail():
  ids = jnp.arange(2**22).reshape(64, -1)
  noise = gumbel(seed_words(range(64)), jnp.zeros(64, jnp.int32), ids)
  assert noise.dtype == jnp.float32
  assert np.all(np.isfinite(noise))
  # The rarest values decide among many tokens: their shares, to 5 deviations.
  for level in (0.0, 4.0, 8.0, 12.0):
    share = -np.expm1(-np.exp(-level)) * noise.size
    assert abs(np.sum(noise > level) - share) < 5 * np.sqrt(share)


@pytest.mark.parametrize(
  "wrong",
  [
    {"temperature": -0.1},
    {"temperature": float("inf")},
    {"temperature": float("nan")},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"top_k": 0},
    {"top_k": -2},
    {"vocab_size": 0},
  ],
)
def test_impossible_sampling_is_refused(wrong):
  (name,) = wrong
  with pytest.raises(UserError, match=f"{name}="):
    Sampling(**wrong)
