"""Sums up what is recorded of every update, and makes metrics of the sums.

A metric is a numerator with its denominator, summed over packs and devices
and divided once, so that how a batch is packed or sharded can't change it.
To add one: its pair in `sums_of`, and a line in docs/workdir.md. Quantiles are
no such ratio: they are read off the counts of `Spread`.

Shape key: R response slots, H bins.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trd_jax.distill.loss.token_stats import TokenStats
from trd_jax.distill.loss.trajectories import LossSlots

_FIRST_TOKENS = 5
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}

# Bins of a divergence: each 2^(1/16) wide, 4.4%, so that its middle is within
# 2.2% of all in it. The first one is of all below 2^-20 nats.
_BINS = 512
_PER_OCTAVE = 16
_LEAST = 2.0**-20


class Spread(NamedTuple):
  """How a batch's divergences are spread; of what is negative, the size.

  Attributes:
    counts: float32 [..., H], tokens in each bin.
    largest: float32 [...], nats; 0 where there is no token.
  """

  counts: Any
  largest: Any

  @classmethod
  def of(cls, divergence_R: jax.Array, slots: LossSlots) -> "Spread":
    """Counts the tokens of some slots."""
    token_R = slots.weight > 0
    size_R = jnp.where(token_R, jnp.abs(divergence_R), 0)
    # In octaves, because divergences of one batch span ten orders of magnitude:
    # most tokens agree almost exactly, and what matters are the few others.
    octaves_R = jnp.log2(jnp.maximum(size_R, _LEAST) / _LEAST)
    bin_R = jnp.int32(jnp.clip(octaves_R * _PER_OCTAVE, 0, _BINS - 1))
    counts_H = jnp.zeros(_BINS).at[bin_R].add(jnp.float32(token_R))
    return cls(counts_H, size_R.max(initial=0))

  def quantiles(self) -> dict[str, float]:
    """Returns quantiles to 2.2%, and the largest exactly; on the host."""
    counts_H, largest = np.asarray(self.counts), float(self.largest)
    found = {}
    if total := counts_H.sum():
      below_H = np.cumsum(counts_H)
      # The middle of a bin, by its logarithm; no bin reaches past the largest.
      for name, share in QUANTILES.items():
        number = int(np.searchsorted(below_H, share * total))
        middle = _LEAST * 2 ** ((number + 0.5) / _PER_OCTAVE)
        found[f"D_{name}"] = 0.0 if not number else min(middle, largest)
      found["D_max"] = largest
    return found


# By name: a numerator and its denominator, or a spread.
Sums = dict[str, tuple[jax.Array, jax.Array] | Spread]


def as_arrays(sums: Sums) -> dict[str, Any]:
  """Returns the sums with each pair as one float32 array [2]."""
  return {
    name: value
    if isinstance(value, Spread)
    else jnp.stack([jnp.float32(part) for part in value])
    for name, value in sums.items()
  }


def add(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
  """Puts the sums of two packs together, as `as_arrays` gives them."""

  def both(x, y):
    if isinstance(x, Spread):
      largest = jnp.maximum(x.largest, y.largest)
      return Spread(x.counts + y.counts, largest)
    return x + y

  return {name: both(x, other[name]) for name, x in one.items()}


def add_up(sums: Mapping[str, Any]) -> dict[str, Any]:
  """Puts sums together that stand along a first axis."""

  def all_of(x):
    if isinstance(x, Spread):
      return Spread(x.counts.sum(0), x.largest.max(0))
    return x.sum(0)

  return {name: all_of(x) for name, x in sums.items()}


def sums_of(stats: TokenStats, slots: LossSlots, clip: float | None) -> Sums:
  """Returns what the metrics of a pack are made of.

  Args:
    stats: of these slots, without gradient.
    slots: see `LossSlots`.
    clip: c of min(D_t, c), nats, or None.

  Returns:
    `name -> (numerator, denominator)`, float32 scalars: sums over response
    tokens, unweighted, of the divergence before any clip. `D_spread` is a
    `Spread`.
  """
  token_R = slots.weight > 0

  def over(mask_R, x_R):
    return jnp.sum(jnp.where(mask_R, x_R, 0)), jnp.sum(
      mask_R, dtype=jnp.float32
    )

  divergence_R = stats.divergence
  sums: Sums = {
    "D_spread": Spread.of(divergence_R, slots),
    "D": over(token_R, divergence_R),
    "D_correct": over(token_R & (slots.correct == 1), divergence_R),
    "D_incorrect": over(token_R & (slots.correct == 0), divergence_R),
    "D_first_5": over(token_R & (slots.offset < _FIRST_TOKENS), divergence_R),
    "response_length": (
      jnp.sum(token_R, dtype=jnp.float32),
      jnp.sum(token_R & (slots.offset == 0), dtype=jnp.float32),
    ),
  }
  if clip is not None:
    sums["clipped_share"] = over(token_R, divergence_R > clip)
  per_token = {
    "nll_student": stats.student_nll,
    "nll_teacher": stats.teacher_nll,
    "entropy_student": stats.student_entropy,
    "epistemic_mass_student": stats.student_onset_mass,
    "epistemic_mass_teacher": stats.teacher_onset_mass,
    "top16_mass_student": stats.student_top16_mass,
    "top16_mass_teacher": stats.teacher_top16_mass,
  }
  for name, x_R in per_token.items():
    if x_R is not None:
      sums[name] = over(token_R, x_R)
  return sums


def finish(sums: Mapping[str, Any]) -> dict[str, float]:
  """Returns metrics from sums over a whole step, on the host.

  Args:
    sums: `name -> [numerator, denominator]` or `Spread`, added up over packs
      and devices; names that `sums_of` doesn't make are treated likewise.

  Returns:
    `name -> ratio` for each whose denominator isn't 0 (a batch without an
    incorrect trajectory has no D_incorrect), the count `tokens`, of the spread
    `D_p50`, `D_p95`, `D_p99` (to 2.2%) and `D_max`, and of the NLLs the
    perplexities (C.5): `ppl_student`, `ppl_teacher` and `ppl_gap`, student -
    teacher. Nats, probabilities, tokens.
  """
  pairs = {
    name: np.asarray(pair, np.float64)
    for name, pair in sums.items()
    if not isinstance(pair, Spread)
  }
  metrics = {name: float(a / b) for name, (a, b) in pairs.items() if b}
  for value in sums.values():
    if isinstance(value, Spread):
      metrics |= value.quantiles()
  if "D" in pairs:
    metrics["tokens"] = float(pairs["D"][1])
  for side in ("student", "teacher"):
    if f"nll_{side}" in metrics:
      # Past e^700 a double is infinite, which is no JSON.
      metrics[f"ppl_{side}"] = math.exp(min(metrics[f"nll_{side}"], 700))
  if {"ppl_student", "ppl_teacher"} <= metrics.keys():
    metrics["ppl_gap"] = metrics["ppl_student"] - metrics["ppl_teacher"]
  return metrics
