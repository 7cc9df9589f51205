"""Sums up what is recorded of every update, and makes metrics of the sums.

A metric is a numerator with its denominator, summed over packs and devices
and divided once, so that how a batch is packed or sharded can't change it.
To add one: its pair in `sums_of`, and a line in docs/workdir.md.

Shape suffixes: R response slots.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from trd_jax.distill.loss.token_stats import TokenStats
from trd_jax.distill.loss.trajectories import LossSlots

_FIRST_TOKENS = 5

Sums = dict[str, tuple[jax.Array, jax.Array]]


def sums_of(stats: TokenStats, slots: LossSlots, clip: float | None) -> Sums:
  """Returns what the metrics of a pack are made of.

  Args:
    stats: of these slots, without gradient.
    slots: see `LossSlots`.
    clip: c of min(D_t, c), nats, or None.

  Returns:
    `name -> (numerator, denominator)`, float32 scalars: sums over response
    tokens, unweighted, of the divergence before any clip.
  """
  token_R = slots.weight > 0

  def over(mask_R, x_R):
    return jnp.sum(jnp.where(mask_R, x_R, 0)), jnp.sum(
      mask_R, dtype=jnp.float32
    )

  divergence_R = stats.divergence
  sums = {
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


def finish(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Returns metrics from sums over a whole step, on the host.

  Args:
    sums: `name -> [numerator, denominator]`, added up over packs and devices;
      names that `sums_of` doesn't make are divided like the others.

  Returns:
    `name -> ratio` for each whose denominator isn't 0 (a batch without an
    incorrect trajectory has no D_incorrect), the count `tokens`, and of the
    NLLs the perplexities (C.5): `ppl_student`, `ppl_teacher` and `ppl_gap`,
    student - teacher. Nats, probabilities, tokens.
  """
  pairs = {name: np.asarray(pair, np.float64) for name, pair in sums.items()}
  metrics = {name: float(a / b) for name, (a, b) in pairs.items() if b}
  if "D" in pairs:
    metrics["tokens"] = float(pairs["D"][1])
  for side in ("student", "teacher"):
    if f"nll_{side}" in metrics:
      # Past e^700 a double is infinite, which is no JSON.
      metrics[f"ppl_{side}"] = math.exp(min(metrics[f"nll_{side}"], 700))
  if {"ppl_student", "ppl_teacher"} <= metrics.keys():
    metrics["ppl_gap"] = metrics["ppl_student"] - metrics["ppl_teacher"]
  return metrics
