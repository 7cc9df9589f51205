"""Weights of tokens within their trajectory: a class each.

Shape key: R response slots.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from trd_jax.distill.loss.token_stats import TokenStats
from trd_jax.distill.loss.trajectories import LossSlots, segments
from trd_jax.experiment import methods

TOKEN_WEIGHTS: dict[str, type["TokenWeights"]] = {}


class TokenWeights:
  """A way to weigh tokens; a subclass is a frozen dataclass of its parameters.

  It gives the name of its entry in `experiment.methods.TOKEN_WEIGHTS`, whose
  parameters are its fields.

  Raises:
    ValueError: a parameter out of its range.
  """

  declared: ClassVar[methods.Term]

  def __init_subclass__(cls, name: str):
    cls.declared = methods.TOKEN_WEIGHTS[name]
    TOKEN_WEIGHTS[name] = cls

  def __post_init__(self):
    self.declared.check(vars(self))

  def of_tokens(self, stats: TokenStats, slots: LossSlots) -> jax.Array:
    """Returns float32 [R] without gradient, 0 in padding slots."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Tip(TokenWeights, name="tip"):
  """Weighs by student entropy and divergence (TIP, [12]).

  Tokens teach where the student is unsure, and where it is sure but far from
  the teacher. With h and d the student's entropy and the divergence, each
  stretched to [0, 1] over the tokens of a trajectory, a token scores

    tip_entropy · h + tip_divergence · (1 - h) · d,

  which for weights 1, 1 is the soft or of the two, h + d - h d. A score over
  its trajectory's mean is the weight: weights of a trajectory average to 1
  and its share of the batch stays what it was. (Stretching inside a
  trajectory rather than a batch leaves the loss independent of packing and
  sharding.) A trajectory without any score, such as one of equal tokens, has
  weights 1.
  """

  tip_entropy: float
  tip_divergence: float

  def of_tokens(self, stats: TokenStats, slots: LossSlots) -> jax.Array:
    """Returns the weights; reads `student_entropy` and `divergence`."""
    token_R = slots.weight > 0
    segment_R = segments(slots)

    def along(reduction, x_R):
      reduced = reduction(x_R, segment_R, num_segments=len(x_R))
      return reduced[segment_R]

    def stretch(x_R):
      low_R = along(jax.ops.segment_min, x_R)
      span_R = along(jax.ops.segment_max, x_R) - low_R
      return (x_R - low_R) / jnp.where(span_R > 0, span_R, 1)

    h_R = stretch(lax.stop_gradient(stats.student_entropy))
    d_R = stretch(lax.stop_gradient(stats.divergence))
    score_R = self.tip_entropy * h_R + self.tip_divergence * (1 - h_R) * d_R
    mean_R = along(jax.ops.segment_sum, score_R) / along(
      jax.ops.segment_sum, jnp.ones_like(score_R)
    )
    weight_R = jnp.where(mean_R > 0, score_R / jnp.maximum(mean_R, 1e-30), 1)
    return jnp.where(token_R, weight_R, 0)


@dataclasses.dataclass(frozen=True)
class EntropyGate(TokenWeights, name="entropy_gate"):
  """Trains on the tokens where the student hesitates, and on no others.

  A token counts where the student's entropy is at least `gate_entropy` nats.
  The loss of a trajectory is the mean over those that count; one without any
  adds nothing.
  """

  gate_entropy: float

  def of_tokens(self, stats: TokenStats, slots: LossSlots) -> jax.Array:
    """Returns the weights; reads `student_entropy`."""
    token_R = slots.weight > 0
    segment_R = segments(slots)
    entropy_R: Any = lax.stop_gradient(stats.student_entropy)
    counts_R = (token_R & (entropy_R >= self.gate_entropy)).astype(jnp.float32)

    def along(x_R):
      sums = jax.ops.segment_sum(x_R, segment_R, len(segment_R))
      return sums[segment_R]

    length_R = along(token_R.astype(jnp.float32))
    return counts_R * length_R / jnp.maximum(along(counts_R), 1)
