"""From per-slot statistics to a loss and the sums that metrics are made of.

Shape suffixes: R response slots, D model width, V vocabulary, E onset ids.

A slot is one response token. The slots of a trajectory lie next to each other
in their order, all in one call; padding slots have weight 0 and trajectory
-1, and may stand anywhere between trajectories. Each token brings its weight,
1 / (|y| · trajectories of the batch), so losses and gradients of parts of a
batch add up to those of the whole (SPEC §2), and every metric is a numerator
with its denominator, summed over packs and devices and divided once (§3).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from trd_jax.distill.loss.divergence import Divergence, TokenStats, token_stats
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.methods import DIVERGENCES, TOKEN_WEIGHTS

_FIRST_TOKENS = 5

Sums = dict[str, tuple[jax.Array, jax.Array]]


class Slots(Protocol):
  """What the loss reads of the slots; `packing.Slots` has it too."""

  @property
  def label(self) -> jax.Array:
    """int32 [R], the response token; any id in padding."""
    ...

  @property
  def weight(self) -> jax.Array:
    """float32 [R], 1 / (|y| · trajectories of the batch); 0 in padding."""
    ...

  @property
  def trajectory(self) -> jax.Array:
    """int32 [R], differs between neighbouring trajectories."""
    ...

  @property
  def offset(self) -> jax.Array:
    """int32 [R], number t of the token in its response, from 0."""
    ...

  @property
  def correct(self) -> jax.Array:
    """int32 [R], stage-1 verdict: 1, 0, or anything else for unjudged."""
    ...


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is made of a token's divergence; static under `jax.jit`.

  Attributes:
    divergence: see `Divergence`.
    clip: c > 0 of min(D_t, c), nats, or None.
    token_weights: reweight tokens inside each trajectory, see `tip_weights`.
    tip_entropy: its weight of the student's entropy, >= 0.
    tip_divergence: its weight of the divergence, >= 0.
    discount: γ in [0, 1] of `sampled_reverse_kl`'s return-to-go.

  Raises:
    ValueError: a value outside its range, or two that exclude each other.
  """

  divergence: Divergence = dataclasses.field(default_factory=Divergence)
  clip: float | None = None
  token_weights: bool = False
  tip_entropy: float = 1.0
  tip_divergence: float = 1.0
  discount: float = 0.0

  def __post_init__(self):
    kind = self.divergence.kind
    if self.clip is not None and not self.clip > 0:
      raise ValueError(f"clip must be above 0, not {self.clip}")
    if not 0 <= self.discount <= 1:
      raise ValueError(f"discount must be in [0, 1], not {self.discount}")
    if kind == "sampled_reverse_kl" and (self.clip or self.token_weights):
      raise ValueError(
        "sampled_reverse_kl estimates a divergence by a log-ratio that may be "
        "negative: it has no clip and no token weights"
      )
    if self.token_weights:
      if kind == "reverse_kl_topk":
        raise ValueError("token weights need the student's full entropy")
      parts = self.tip_entropy, self.tip_divergence
      if min(parts) < 0 or not sum(parts) > 0:
        raise ValueError(f"token weights of {parts}: >= 0, and not both 0")

  @classmethod
  def of(cls, experiment: Experiment) -> "Objective":
    """The objective of `experiment.method` (SPEC §2's table)."""
    loss, method = experiment.loss, experiment.chosen_method
    parameters = DIVERGENCES[method.divergence].read(loss)
    weights = TOKEN_WEIGHTS.get(method.token_weights or "")
    return cls(
      divergence=Divergence(
        kind=method.divergence,
        temperature=loss.temperature,
        beta=parameters.get("beta", 0.5),
        top_k=parameters.get("top_k", 32),
        chunk_tokens=loss.chunk_tokens,
        diagnostics=loss.diagnostics,
      ),
      clip=experiment.clip,
      token_weights=weights is not None,
      discount=parameters.get("discount", 0.0),
      **(weights.read(loss) if weights else {}),
    )


def slot_loss(
  objective: Objective, onset_ids: tuple[int, ...]
) -> Callable[..., tuple[jax.Array, Sums]]:
  """The loss as one function of hidden states, heads and slots.

  Args:
    objective: what to compute.
    onset_ids: distinct ids of the epistemic onsets.

  Returns:
    `f(student_hidden_RD, teacher_hidden_RD, student_head_VD,
    teacher_head_VD, slots, vocab_axis=None) -> (loss, sums)`: `token_loss`
    of `token_stats`, which says what a `vocab_axis` is.
  """
  onset_ids_E = np.array(onset_ids, np.int32)

  def loss(
    student_hidden,
    teacher_hidden,
    student_head,
    teacher_head,
    slots,
    vocab_axis=None,
  ):
    stats = token_stats(
      student_hidden,
      teacher_hidden,
      student_head,
      teacher_head,
      slots.label,
      jnp.asarray(onset_ids_E),
      objective.divergence,
      vocab_axis=vocab_axis,
    )
    return token_loss(stats, slots, objective)

  return loss


def token_loss(
  stats: TokenStats, slots: Slots, objective: Objective
) -> tuple[jax.Array, Sums]:
  """Σ weight_t · loss_t, and the sums of every metric.

  loss_t is D_t, or min(D_t, c) under a clip (C.8: after the sum over the
  vocabulary; a clipped token has no gradient), times its token weight. For
  `sampled_reverse_kl` the value is δ_t, a one-sample estimate of the reverse
  KL, and the gradient Eq. 3: G_t ∇ log π_S(y_t), with the constant return
  G_t = Σ_{t' ≥ t} γ^{t'-t} δ_t' over the rest of the trajectory. (γ = 0
  is Eq. 3 as it stands, γ = 1 the full return-to-go of Appendix A.)

  Args:
    stats: of these slots.
    slots: see `Slots`.
    objective: see `Objective`.

  Returns:
    The loss, a float32 scalar, and `name -> (numerator, denominator)`. The
    metrics are unweighted sums over response tokens, of the divergence before
    any clip; `finish` names them.
  """
  token_R = slots.weight > 0
  loss_R = stats.divergence
  if objective.clip is not None:
    loss_R = jnp.where(loss_R > objective.clip, objective.clip, loss_R)
  if objective.token_weights:
    loss_R *= tip_weights(
      stats,
      slots,
      entropy=objective.tip_entropy,
      divergence=objective.tip_divergence,
    )
  if objective.divergence.kind == "sampled_reverse_kl":
    delta_R = lax.stop_gradient(stats.divergence)
    return_R = _return_to_go(delta_R, slots, objective.discount)
    loss_R = delta_R + return_R * (stats.divergence - delta_R)
  loss = jnp.sum(jnp.where(token_R, slots.weight * loss_R, 0))
  stats = jax.tree.map(lax.stop_gradient, stats)
  return loss, _sums(stats, slots, objective.clip)


def _sums(stats, slots, clip) -> Sums:
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
  """Metrics from sums over a whole step, on the host.

  Args:
    sums: `name -> [numerator, denominator]`, added up over packs and devices;
      names that `token_loss` doesn't make are divided like the others.

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


def tip_weights(
  stats: TokenStats, slots: Slots, *, entropy: float, divergence: float
) -> jax.Array:
  """Constant token weights by student entropy and divergence (TIP, [12]).

  Tokens teach where the student is unsure, and where it is sure but far from
  the teacher. With h and d the student's entropy and the divergence, each
  stretched to [0, 1] over the tokens of a trajectory, a token scores

    entropy · h + divergence · (1 - h) · d,

  which for weights 1, 1 is the soft or of the two, h + d - h d. A score over
  its trajectory's mean is the weight: weights of a trajectory average to 1
  and its share of the batch stays what it was. (Stretching inside a
  trajectory rather than a batch leaves the loss independent of packing and
  sharding.) A trajectory without any score, such as one of equal tokens, has
  weights 1.

  Args:
    stats: with `student_entropy`.
    slots: see `Slots`.
    entropy: >= 0.
    divergence: >= 0.

  Returns:
    float32 [R] without gradient, 0 in padding slots.
  """
  token_R = slots.weight > 0
  segment_R = _segments(slots)

  def along(reduction, x_R):
    reduced = reduction(x_R, segment_R, num_segments=len(x_R))
    return reduced[segment_R]

  def stretch(x_R):
    low_R = along(jax.ops.segment_min, x_R)
    span_R = along(jax.ops.segment_max, x_R) - low_R
    return (x_R - low_R) / jnp.where(span_R > 0, span_R, 1)

  h_R = stretch(lax.stop_gradient(stats.student_entropy))
  d_R = stretch(lax.stop_gradient(stats.divergence))
  score_R = entropy * h_R + divergence * (1 - h_R) * d_R
  mean_R = along(jax.ops.segment_sum, score_R) / along(
    jax.ops.segment_sum, jnp.ones_like(score_R)
  )
  weight_R = jnp.where(mean_R > 0, score_R / jnp.maximum(mean_R, 1e-30), 1)
  return jnp.where(token_R, weight_R, 0)


def _segments(slots):
  """A number for each run of slots of one trajectory, or of padding."""
  owner_R = jnp.where(slots.weight > 0, slots.trajectory, -1)
  starts_R = jnp.diff(owner_R, prepend=owner_R[:1]) != 0
  return jnp.cumsum(starts_R)


def _return_to_go(delta_R, slots, discount):
  """Σ_{t' ≥ t} γ^{t'-t} δ_t' within each trajectory."""
  segment_R = _segments(slots)
  goes_on_R = jnp.diff(segment_R, append=len(segment_R) + 1) == 0
  factor_R = jnp.where(goes_on_R, jnp.float32(discount), 0)

  def compose(later, earlier):
    # Slots are maps G -> delta + factor · G; a run of them is one, too.
    return (
      earlier[0] + earlier[1] * later[0],
      earlier[1] * later[1],
    )

  return lax.associative_scan(compose, (delta_R, factor_R), reverse=True)[0]
