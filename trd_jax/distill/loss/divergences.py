"""Divergences between rows of logits, with their slopes: a class each.

Shape key: R response slots, C rows of one chunk, V the ids of the
vocabulary that are here, D model width, K top entries.

q and p are the softmax of the student and of the teacher at the temperature T.
A slope on logits is the derivative with respect to logits / T; `token_stats`
multiplies by 1/T at the very end. Where the vocabulary is split
(`row_statistics.Part`), values are whole and slopes are of what is here: their
sum over the parts is the gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from trd_jax.distill.loss.row_statistics import (
  LogitRows,
  Part,
  precision,
  pull_back,
  reduce_rows,
)
from trd_jax.distill.loss.trajectories import LossSlots, return_to_go
from trd_jax.experiment import methods


class Chunk(NamedTuple):
  """What a divergence may read of some rows.

  Attributes:
    student: the logits behind q; None for a divergence that doesn't read them
      (`Divergence.reads_student`) where nothing else does.
    teacher: the logits behind p; None for a divergence that reads no teacher.
    kl_C: float32, the KL that `Divergence.kl_under` names; None where it
      names none.
    labels_C: int32 response tokens, ids of the whole vocabulary.
    temperature: T.
    part: which ids the logits and the head are of.
    hidden_CD: the student's hidden states.
    head_VD: the student's head.
  """

  student: LogitRows | None
  teacher: Any
  kl_C: Any
  labels_C: jax.Array
  temperature: float
  part: Part
  hidden_CD: jax.Array
  head_VD: jax.Array

  @property
  def sides(self) -> tuple[LogitRows, LogitRows]:
    """Returns the student's and the teacher's rows of logits."""
    assert self.student is not None
    return self.student, self.teacher

  def log_probs(self) -> tuple[jax.Array, jax.Array]:
    """Returns log q and log p of whole rows, float32 [C, V]."""
    q, p = (side.log_probs(self.temperature) for side in self.sides)
    return q, p

  def pull_back(self, slope_CV: jax.Array) -> jax.Array:
    """Returns a slope on the logits as one on the hidden states, [C, D]."""
    return pull_back(slope_CV, self.head_VD)

  def label_rows(self) -> jax.Array:
    """Returns the head's rows of the labels, float32 [C, D], 0 elsewhere."""
    place_C, here_C = self.part.find(self.labels_C)
    row_CD = self.head_VD[place_C].astype(jnp.float32)
    return jnp.where(here_C[:, None], row_CD, 0)


# The slope on the hidden states, [C, D] without the factor 1/T. A function,
# because where no gradient is asked for it must not even be traced: its
# product with the head is a third of the cost.
Slope = Callable[[], jax.Array]

DIVERGENCES: dict[str, type["Divergence"]] = {}


class Divergence:
  """A divergence; a subclass is a frozen dataclass of its parameters.

  A subclass gives the name of its entry in `experiment.methods.DIVERGENCES`,
  whose parameters are its fields, and says in `of_rows` what it is. It is
  static under `jax.jit`.

  Attributes:
    declared: the entry.
    kl_under: 'teacher' for Σ p log(p/q), 'student' for Σ q log(q/p): the KL
      that the row sums are to give as `Chunk.kl_C`, in the one pass that they
      are made in. None for neither.

  Raises:
    ValueError: a parameter out of its range.
  """

  name: ClassVar[str]
  declared: ClassVar[methods.Term]
  kl_under: ClassVar[str | None] = None

  def __init_subclass__(cls, name: str | None = None):
    if name is not None:  # else a base of some
      cls.name, cls.declared = name, methods.DIVERGENCES[name]
      DIVERGENCES[name] = cls

  @property
  def reads_student(self) -> bool:
    """Returns whether it reads the student's logits of whole rows."""
    return True

  @property
  def may_be_negative(self) -> bool:
    """Returns whether values may be < 0: nothing clips or weighs them."""
    return self.declared.signed

  def __post_init__(self):
    self.declared.check(vars(self))

  def of_rows(self, chunk: Chunk) -> tuple[jax.Array, Slope]:
    """Returns the divergence of each row, float32 [C], and its slope."""
    raise NotImplementedError

  def token_losses(
    self, divergence_R: jax.Array, slots: LossSlots
  ) -> jax.Array:
    """Returns what each token adds to the loss, before clip and weights.

    Args:
      divergence_R: of all slots, with its gradient.
      slots: for losses that are more than a token's own divergence.
    """
    return divergence_R


@dataclasses.dataclass(frozen=True)
class _Kl(Divergence):
  """A KL whose terms may be clipped, one by one, before they are summed.

  Under `clip_entries` the value is Σ min(term, c): what one token of the
  vocabulary adds is bounded, also where many add a little. The negative terms
  stay whole, so the sum may be negative.
  """

  clip_entries: float = 0.0

  @property
  def may_be_negative(self) -> bool:
    """Returns whether values may be < 0: where terms are clipped."""
    return self.clip_entries > 0

  def _clipped(
    self, term_CV: jax.Array, slope_CV: jax.Array, chunk: Chunk
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns Σ min(term, c), Σ of the slopes below it, and which are below.

    Args:
      term_CV: the terms of the sum.
      slope_CV: what each adds to the sum of slopes.
      chunk: of these rows.
    """
    # A term above the bound is constant, so it has no slope; `where` and not a
    # product, as a slope there may be infinite.
    below_CV = term_CV < self.clip_entries
    terms = (
      jnp.minimum(term_CV, self.clip_entries),
      jnp.where(below_CV, slope_CV, 0),
    )
    value_C, slope_C = chunk.part.total(
      jnp.stack(reduce_rows(lax.add, 0.0, terms))
    )
    return value_C, slope_C, below_CV


@dataclasses.dataclass(frozen=True)
class ForwardKl(_Kl, name="forward_kl"):
  """KL(p‖q) (C.8)."""

  kl_under = "teacher"

  def of_rows(self, chunk: Chunk) -> tuple[jax.Array, Slope]:
    """Returns KL(p‖q) and the slope q − p."""
    if self.clip_entries:
      return self._of_clipped_rows(chunk)

    def slope():
      log_q_CV, log_p_CV = chunk.log_probs()
      return chunk.pull_back(jnp.exp(log_q_CV) - jnp.exp(log_p_CV))

    # Rounding can push a vanishing divergence below zero.
    return jnp.maximum(chunk.kl_C, 0), slope

  def _of_clipped_rows(self, chunk: Chunk) -> tuple[jax.Array, Slope]:
    """Returns Σ min(p log p/q, c) and the slope q Σ_below p − p below."""
    log_q_CV, log_p_CV = chunk.log_probs()
    p_CV = jnp.exp(log_p_CV)
    value_C, mass_C, below_CV = self._clipped(
      p_CV * (log_p_CV - log_q_CV), p_CV, chunk
    )

    def slope():
      q_CV = jnp.exp(log_q_CV)
      own_CV = jnp.where(below_CV, p_CV, 0)
      return chunk.pull_back(q_CV * mass_C[:, None] - own_CV)

    return value_C, slope


@dataclasses.dataclass(frozen=True)
class ReverseKl(_Kl, name="reverse_kl"):
  """KL(q‖p), the D of Eq. 1 and 2."""

  kl_under = "student"

  def of_rows(self, chunk: Chunk) -> tuple[jax.Array, Slope]:
    """Returns KL(q‖p) and the slope q (log q/p − KL(q‖p))."""
    if self.clip_entries:
      return self._of_clipped_rows(chunk)

    def slope():
      log_q_CV, log_p_CV = chunk.log_probs()
      above_CV = log_q_CV - log_p_CV - chunk.kl_C[:, None]
      return chunk.pull_back(jnp.exp(log_q_CV) * above_CV)

    return jnp.maximum(chunk.kl_C, 0), slope

  def _of_clipped_rows(self, chunk: Chunk) -> tuple[jax.Array, Slope]:
    """Returns Σ min(q log q/p, c) and the slope q (r below − Σ_below q r).

    With r = log q/p + 1, the slope of a term on log q, over q.
    """
    log_q_CV, log_p_CV = chunk.log_probs()
    q_CV = jnp.exp(log_q_CV)
    ratio_CV = log_q_CV - log_p_CV
    value_C, sum_C, below_CV = self._clipped(
      q_CV * ratio_CV, q_CV * (ratio_CV + 1), chunk
    )

    def slope():
      own_CV = jnp.where(below_CV, ratio_CV + 1, 0)
      return chunk.pull_back(q_CV * (own_CV - sum_C[:, None]))

    return value_C, slope


@dataclasses.dataclass(frozen=True)
class TopKReverseKl(Divergence, name="reverse_kl_topk"):
  """KL(q‖p) on the teacher's top-K ids (Table 13).

  Both are renormalised there, or all other ids are one bucket more. Ties go to
  the lower id. Renormalised, only K head rows a slot are touched for the
  student; without diagnostics its full logits are never made.
  """

  top_k: int
  top_k_tail: str = "renormalise"

  @property
  def reads_student(self) -> bool:
    """Returns whether it reads the student's logits of whole rows."""
    return self.top_k_tail == "bucket"

  def of_rows(self, chunk: Chunk) -> tuple[jax.Array, Slope]:
    """Returns KL(q‖p) on the K ids, and the reverse KL's slope there."""
    if self.top_k_tail == "bucket":
      return self._with_bucket(chunk)
    part, temperature = chunk.part, chunk.temperature
    teacher_CK, ids_CK = part.top_k(chunk.teacher.logits_CV, self.top_k)
    place_CK, here_CK = part.find(ids_CK)
    rows_CKD = chunk.head_VD[place_CK]
    product = functools.partial(
      jnp.einsum,
      precision=precision(rows_CKD.dtype),
      preferred_element_type=jnp.float32,
    )
    # Each part of the vocabulary multiplies with the rows that it has; the
    # logits of the K ids are whole, and so is everything made of them.
    student_CK = product("cd,ckd->ck", chunk.hidden_CD, rows_CKD)
    student_CK = part.total(jnp.where(here_CK, student_CK, 0))
    log_q_CK = jax.nn.log_softmax(student_CK / temperature)
    log_p_CK = jax.nn.log_softmax(teacher_CK / temperature)
    q_CK = jnp.exp(log_q_CK)
    value_C = (q_CK * (log_q_CK - log_p_CK)).sum(-1)

    def slope():
      slope_CK = q_CK * (log_q_CK - log_p_CK - value_C[:, None])
      slope_CK = jnp.where(here_CK, slope_CK, 0).astype(rows_CKD.dtype)
      return product("ck,ckd->cd", slope_CK, rows_CKD)

    return jnp.maximum(value_C, 0), slope

  def _with_bucket(self, chunk: Chunk) -> tuple[jax.Array, Slope]:
    """Returns Σ q log(q/p) over the K ids and the bucket, and its slope.

    The slope of an id is q (r − D), r the log-ratio of the id or, in the
    bucket, of the bucket's masses.
    """
    part = chunk.part
    _, ids_CK = part.top_k(chunk.teacher.logits_CV, self.top_k)
    is_top_CV = part.among(ids_CK)
    log_q_CV, log_p_CV = chunk.log_probs()
    q_CV, p_CV = jnp.exp(log_q_CV), jnp.exp(log_p_CV)
    rests = tuple(
      jnp.where(is_top_CV, -jnp.inf, x) for x in (log_q_CV, log_p_CV)
    )
    most = part.largest(jnp.stack(reduce_rows(lax.max, -jnp.inf, rests)))
    most = jnp.where(most > -jnp.inf, most, 0)  # K = V: no bucket
    terms = (
      jnp.where(is_top_CV, q_CV * (log_q_CV - log_p_CV), 0),
      *(jnp.where(is_top_CV, x, 0) for x in (q_CV, p_CV)),
      *(jnp.exp(x - m_C[:, None]) for x, m_C in zip(rests, most, strict=True)),
    )
    inside_C, *sums = part.total(jnp.stack(reduce_rows(lax.add, 0.0, terms)))
    log_q_rest_C, log_p_rest_C = (
      _log_rest(top_C, most_C, sum_C)
      for top_C, most_C, sum_C in zip(sums[:2], most, sums[2:], strict=True)
    )
    q_rest_C = jnp.where(sums[2] > 0, jnp.exp(log_q_rest_C), 0)
    ratio_C = log_q_rest_C - log_p_rest_C
    value_C = inside_C + q_rest_C * ratio_C

    def slope():
      own_CV = jnp.where(is_top_CV, log_q_CV - log_p_CV, ratio_C[:, None])
      return chunk.pull_back(q_CV * (own_CV - value_C[:, None]))

    return jnp.maximum(value_C, 0), slope


def _log_rest(
  top_C: jax.Array, most_C: jax.Array, sum_C: jax.Array
) -> jax.Array:
  """Returns the logarithm of the mass outside the top, exact at both ends.

  1 minus the top has no digit left where the rest is nearly empty, and the sum
  over the rest none of its distance from 1 where the top is.

  Args:
    top_C: the mass of the top.
    most_C: the largest logarithm outside.
    sum_C: of the rest, over its largest; 0 where there is none.
  """
  summed_C = most_C + jnp.log(jnp.where(sum_C > 0, sum_C, 1))
  small_C = top_C < 0.5
  return jnp.where(small_C, jnp.log1p(-jnp.where(small_C, top_C, 0)), summed_C)


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Divergence, name="cross_entropy"):
  """−log q(label), the loss of supervised fine-tuning; reads no teacher."""

  def of_rows(self, chunk: Chunk) -> tuple[jax.Array, Slope]:
    """Returns −log q(label) and the slope q − onehot."""
    assert chunk.student is not None
    student, temperature = chunk.student, chunk.temperature

    def slope():
      q_CV = jnp.exp(student.log_probs(temperature))
      # The one-hot part is a row of the head: no scatter.
      return chunk.pull_back(q_CV) - chunk.label_rows()

    return -student.log_prob(chunk.labels_C, temperature), slope


@dataclasses.dataclass(frozen=True)
class JensenShannon(Divergence, name="jsd"):
  """β KL(p‖m) + (1−β) KL(q‖m), m = βp + (1−β)q, 0 < β < 1.

  β = 1/2 is the symmetric Jensen-Shannon divergence, at most log 2. It
  vanishes at both ends, where it goes as β KL(p‖q) for β → 0 and (1−β) KL(q‖p)
  for β → 1; no 1/β rescaling is applied.
  """

  beta: float

  def of_rows(self, chunk: Chunk) -> tuple[jax.Array, Slope]:
    """Returns the value and the slope (1−β) q (log q/m − KL(q‖m))."""
    beta, temperature = self.beta, chunk.temperature
    sides = chunk.sides

    def ratios(q, p):
      """Returns q, log m/q and log p/q."""
      log_q_CV, log_p_CV = (x.log_probs(temperature) for x in (q, p))
      # Past e^80 a ratio is as good as infinite: clipped, neither it nor its
      # inverse overflows, and the probability that multiplies it is below
      # e^-80.
      ratio_CV = jnp.clip(log_p_CV - log_q_CV, -80, 80)
      mix_CV = jnp.log((1 - beta) + beta * jnp.exp(ratio_CV))
      return jnp.exp(log_q_CV), mix_CV, ratio_CV

    q_CV, mix_CV, ratio_CV = ratios(*sides)
    p_CV = jnp.exp(chunk.teacher.log_probs(temperature))
    terms = -q_CV * mix_CV, p_CV * (ratio_CV - mix_CV)
    sums = jnp.stack(reduce_rows(lax.add, 0.0, terms))
    student_C, teacher_C = chunk.part.total(sums)
    value_C = beta * teacher_C + (1 - beta) * student_C

    def slope():
      # Kept apart from the sums' terms, which would otherwise be written to
      # memory to be read twice: two blocks more.
      *log_z, kl_C = lax.optimization_barrier(
        (*(side.tempered_log_z_C for side in sides), student_C)
      )
      q, p = (
        side._replace(tempered_log_z_C=z)
        for side, z in zip(sides, log_z, strict=True)
      )
      q_CV, mix_CV, _ = ratios(q, p)
      return chunk.pull_back((beta - 1) * q_CV * (mix_CV + kl_C[:, None]))

    return jnp.maximum(value_C, 0), slope


@dataclasses.dataclass(frozen=True)
class SampledReverseKl(Divergence, name="sampled_reverse_kl"):
  """δ = log q(label) − log p(label), which estimates KL(q‖p) by one sample.

  It can be negative. The value of the loss is δ, and its gradient Eq. 3:
  G_t ∇ log q(y_t), with the constant return G_t = Σ_{t' ≥ t} γ^{t'-t} δ_t'
  over the rest of the trajectory. γ = 0 is Eq. 3 as it stands, γ = 1 the full
  return-to-go of Appendix A.
  """

  discount: float

  def of_rows(self, chunk: Chunk) -> tuple[jax.Array, Slope]:
    """Returns δ and the slope of log q(label), which is onehot − q."""
    log_q_C, log_p_C = (
      side.log_prob(chunk.labels_C, chunk.temperature) for side in chunk.sides
    )

    def slope():
      log_q_CV = chunk.sides[0].log_probs(chunk.temperature)
      # The one-hot part of d log q(label): a row of the head, no scatter.
      return chunk.pull_back(-jnp.exp(log_q_CV)) + chunk.label_rows()

    return log_q_C - log_p_C, slope

  def token_losses(
    self, divergence_R: jax.Array, slots: LossSlots
  ) -> jax.Array:
    """Returns δ, with the gradient that G_t gives it."""
    delta_R = lax.stop_gradient(divergence_R)
    return_R = return_to_go(delta_R, slots, self.discount)
    # The bracket is 0 and has the gradient of log q: the value stays δ.
    return delta_R + return_R * (divergence_R - delta_R)
