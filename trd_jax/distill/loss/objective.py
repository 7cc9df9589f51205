"""Makes a loss of per-slot statistics.

Shape key: R response slots, D model width, V vocabulary, E onset ids.

A slot is one response token (`trajectories`). Each brings its weight,
1 / (|y| · trajectories of the batch), so losses and gradients of parts of a
batch add up to those of the whole. `metrics` says what is recorded of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from trd_jax.distill.loss import metrics
from trd_jax.distill.loss.divergences import DIVERGENCES
from trd_jax.distill.loss.token_stats import Scoring, TokenStats, token_stats
from trd_jax.distill.loss.token_weights import TOKEN_WEIGHTS, TokenWeights
from trd_jax.distill.loss.trajectories import LossSlots
from trd_jax.experiment.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is made of a token's divergence; static under `jax.jit`.

  Attributes:
    scoring: the divergence, and how slots are walked.
    clip: c > 0 of min(D_t, c), nats, or None.
    token_weights: how tokens weigh inside each trajectory, or None.

  Raises:
    ValueError: a value outside its range, or two that exclude each other.
  """

  scoring: Scoring = dataclasses.field(default_factory=Scoring)
  clip: float | None = None
  token_weights: TokenWeights | None = None

  def __post_init__(self):
    scoring, divergence = self.scoring, self.scoring.divergence
    if self.clip is not None and not self.clip > 0:
      raise ValueError(f"clip must be above 0, not {self.clip}")
    shaped = self.clip is not None or self.token_weights is not None
    if divergence.may_be_negative and shaped:
      raise ValueError(
        f"{divergence.name} gives a token a value that may be negative: it has"
        " no clip and no token weights"
      )
    if scoring.cross_entropy and shaped:
      raise ValueError(
        "a clip and token weights are of a divergence alone, not of one with"
        " cross-entropy added"
      )
    if self.token_weights and not scoring.reads_student:
      raise ValueError("token weights need the student's full entropy")

  @property
  def reads_teacher(self) -> bool:
    """Returns whether the loss needs the teacher's distributions."""
    return self.scoring.divergence.declared.reads_teacher

  @classmethod
  def of(cls, experiment: Experiment) -> "Objective":
    """Returns the objective of an experiment's method, with its keys."""
    loss, chosen = experiment.loss, experiment.coordinates
    divergence = DIVERGENCES[chosen.divergence]
    weights = TOKEN_WEIGHTS.get(chosen.token_weights or "")
    return cls(
      Scoring(
        divergence(**divergence.declared.read(loss)),
        temperature=loss.temperature,
        chunk_tokens=loss.chunk_tokens,
        diagnostics=loss.diagnostics,
        cross_entropy=loss.cross_entropy,
      ),
      clip=chosen.clip,
      token_weights=weights(**weights.declared.read(loss)) if weights else None,
    )


def slot_loss(
  objective: Objective, onset_ids: tuple[int, ...]
) -> Callable[..., tuple[jax.Array, metrics.Sums]]:
  """Returns the loss as one function of hidden states, heads and slots.

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
    if not objective.reads_teacher:
      # Whatever stands in the teacher's place is no one's.
      teacher_hidden = teacher_head = None
    stats = token_stats(
      student_hidden,
      teacher_hidden,
      student_head,
      teacher_head,
      slots.label,
      jnp.asarray(onset_ids_E),
      objective.scoring,
      vocab_axis=vocab_axis,
    )
    return token_loss(stats, slots, objective)

  return loss


def token_loss(
  stats: TokenStats, slots: LossSlots, objective: Objective
) -> tuple[jax.Array, metrics.Sums]:
  """Returns Σ weight_t · loss_t, and the sums of every metric.

  loss_t is D_t (or what the divergence makes of it, `token_losses`), or
  min(D_t, c) under a clip (C.8: after the sum over the vocabulary; a clipped
  token has no gradient), times its token weight; or D_t with a share of
  −log π_S(label).

  Args:
    stats: of these slots.
    slots: see `LossSlots`.
    objective: see `Objective`.

  Returns:
    The loss, a float32 scalar, and `name -> (numerator, denominator)`. The
    metrics are unweighted sums over response tokens, of the divergence before
    any clip and without cross-entropy beside it; `metrics.finish` names them.
  """
  token_R = slots.weight > 0
  loss_R = objective.scoring.divergence.token_losses(stats.divergence, slots)
  if objective.clip is not None:
    # A NaN is not above anything: it stays one, and is told.
    loss_R = jnp.where(loss_R > objective.clip, objective.clip, loss_R)
  if objective.token_weights is not None:
    loss_R *= objective.token_weights.of_tokens(stats, slots)
  # Padding may hold anything, and 0 · NaN is NaN: it is left out, and not just
  # weighed by 0.
  loss = jnp.sum(jnp.where(token_R, slots.weight * loss_R, 0))
  # Metrics only watch: without this their derivatives would be traced, too.
  stats = jax.tree.map(lax.stop_gradient, stats)
  if objective.scoring.cross_entropy:
    # What is recorded is the divergence by itself, so that runs with and
    # without cross-entropy can be compared.
    nll_R: Any = stats.student_nll
    own_R = objective.scoring.cross_entropy * nll_R
    stats = stats._replace(divergence=stats.divergence - own_R)
  return loss, metrics.sums_of(stats, slots, objective.clip)
