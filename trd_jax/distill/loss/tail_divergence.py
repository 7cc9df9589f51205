"""Forward KL against a teacher of which K tokens a position are recorded.

Shape key: R response slots, C those of a chunk, V vocabulary, D the student's
residual channels, E onset ids, K recorded tokens.

While it wrote y_r, the teacher's K likeliest tokens and their log-probabilities
were kept. The rest of its vocabulary is one bucket, with the mass p_t that they
leave; the student's bucket has the mass q_t of the same tokens. With p and q on
the K recorded ids,

    D~ = Σ p log(p/q) + p_t log(p_t/q_t).

What that leaves out is, by the chain rule of the KL divergence, the
disagreement inside the bucket: KL(p‖q) = D~ + p_t KL(p_c‖q_c), where p_c and
q_c are the two sides' conditional distributions there. So D~ is never more
than the full divergence, and equals it where K = V. Of p_c is known that none
of its probabilities is above p_K / p_t, p_K the least recorded one; so its
entropy is at least log(p_t / p_K), and

    0 <= KL(p‖q) - D~ <= p_t (max -log q_c - max(0, log(p_t / p_K))),

the maximum over the tokens of the bucket, which the student's logits give. It
is attained where the teacher's rest lies on the student's least likely tokens,
and is loose otherwise. The gradients are closer than that: the slopes on the
student's logits differ by p_t (q_c - p_c), at most 2 p_t in the L1 norm,
whatever the two are.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from trd_jax.distill.loss.divergences import ForwardKl
from trd_jax.distill.loss.metrics import Sums
from trd_jax.distill.loss.objective import Objective, token_loss
from trd_jax.distill.loss.row_statistics import (
  in_chunks,
  logits,
  pull_back,
  reduce_rows,
  top_k,
)
from trd_jax.distill.loss.token_stats import (
  TOP_MASS,
  Scoring,
  TokenStats,
  scaled,
)


class Recorded(NamedTuple):
  """What is known of the teacher at each slot.

  Attributes:
    ids: int32 [R, K], distinct in each row, the likeliest first.
    log_probs: float32 [R, K], of the softmax over the whole head at T = 1.
    tail: float32 [R], the probability of all other ids, >= 0.
  """

  ids: Any
  log_probs: Any
  tail: Any


class TailStats(NamedTuple):
  """Per-slot float32 [R] statistics; only `token.divergence` has gradient.

  Attributes:
    token: as of `token_stats`, with D~ as the divergence. Of the
      teacher, `teacher_nll` is NaN where the label is not recorded,
      `teacher_onset_mass` counts recorded ids alone (too low by at most the
      tail), and `teacher_top16_mass` is None for K < 16.
    teacher_tail: p_t.
    student_tail: q_t.
    gap_bound: the most by which the full divergence can exceed D~, nats.
  """

  token: TokenStats
  teacher_tail: jax.Array
  student_tail: jax.Array
  gap_bound: jax.Array


def slot_loss(
  objective: Objective, onset_ids: tuple[int, ...]
) -> Callable[..., tuple[jax.Array, Sums]]:
  """Returns a loss as `objective.slot_loss` does, against `Recorded` rows.

  Returns:
    `f(student_hidden_RD, recorded, student_head_VD, teacher_head, slots) ->
    (loss, sums)`; the teacher's head isn't read. `sums` has three metrics
    more: `tail_mass_teacher`, `tail_mass_student` and `D_gap_bound`.

  Raises:
    ValueError: an objective other than a forward KL at temperature 1.
  """
  scoring = objective.scoring
  if scoring.divergence != ForwardKl() or scoring.temperature != 1:
    raise ValueError(
      "recorded tokens give the forward KL at temperature 1, not"
      f" {scoring.divergence.name} at {scoring.temperature}"
    )
  onset_ids_E = np.array(onset_ids, np.int32)

  # Called as every loss of a step is, with a teacher's head that is no one's.
  def loss(
    student_hidden, recorded, student_head, _head, slots, vocab_axis=None
  ):
    assert vocab_axis is None, "the student's head has to be whole"
    stats = tail_stats(
      student_hidden,
      student_head,
      recorded,
      slots.label,
      jnp.asarray(onset_ids_E),
      scoring,
    )
    value, sums = token_loss(stats.token, slots, objective)
    token_R = slots.weight > 0
    count = jnp.sum(token_R, dtype=jnp.float32)
    for name, x_R in (
      ("tail_mass_teacher", stats.teacher_tail),
      ("tail_mass_student", stats.student_tail),
      ("D_gap_bound", stats.gap_bound),
    ):
      total = jnp.sum(jnp.where(token_R, lax.stop_gradient(x_R), 0))
      sums[name] = total, count
    return value, sums

  return loss


def tail_stats(
  student_hidden_RD: jax.Array,
  student_head_VD: jax.Array,
  recorded: Recorded,
  labels_R: jax.Array,
  onset_ids_E: jax.Array,
  scoring: Scoring,
) -> TailStats:
  """Returns D~, the bound on what it leaves out, and diagnostics.

  Two products with the student's head: its logits, and the gradient with
  respect to its hidden states, which is made in the forward pass and is all
  that has a gradient (see `token_stats`).

  Args:
    student_hidden_RD: float32 or bfloat16, after the final norm.
    student_head_VD: same dtype.
    recorded: of these slots; anything valid in padding.
    labels_R: int32 response tokens.
    onset_ids_E: int32, distinct; may be empty.
    scoring: its `chunk_tokens` and `diagnostics` are read.
  """
  return _tail_stats(
    scoring, student_hidden_RD, student_head_VD, recorded, labels_R, onset_ids_E
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tail_stats(scoring, *inputs):
  return _over_chunks(scoring, False, *inputs)[0]


def _forward(scoring, *inputs):
  return _over_chunks(scoring, True, *inputs)


def _backward(_scoring, slope_RD, cotangent):
  ct_R = cotangent.token.divergence
  return scaled(ct_R, slope_RD), None, None, None, None


_tail_stats.defvjp(_forward, _backward)


def _over_chunks(
  scoring, want_slope, hidden_RD, head_VD, recorded, labels_R, onset_ids_E
) -> tuple[TailStats, Any]:
  """Runs `_chunk` over chunks of equal height."""
  most = scoring.chunk(hidden_RD.shape[1], head_VD.shape[0], head_VD.dtype)

  def body(*chunk):
    return _chunk(scoring, want_slope, head_VD, onset_ids_E, *chunk)

  return in_chunks(body, (hidden_RD, recorded, labels_R), most)


def _chunk(
  scoring, want_slope, head_VD, onset_ids_E, hidden_CD, known, labels_C
):
  """Scores one chunk: (TailStats, slope_CD or None)."""
  ids_CK, log_p_CK, p_tail_C = known
  student_CV = logits(hidden_CD, head_VD)
  V, K = student_CV.shape[1], ids_CK.shape[1]
  row_C1 = jnp.arange(len(labels_C))[:, None]

  # The student's logits relative to the row's maximum, and those of the bucket
  # by themselves, so that a bucket of 1e-12 is as exact as one of a half.
  (max_C,) = reduce_rows(lax.max, -jnp.inf, (student_CV,))
  shift_CV = student_CV - max_C[:, None]
  shift_CK = jnp.take_along_axis(shift_CV, ids_CK, axis=1)
  rest_CV = shift_CV.at[row_C1, ids_CK].set(-jnp.inf)
  (rest_max_C,) = reduce_rows(lax.max, -jnp.inf, (rest_CV,))
  rest_max_C = jnp.where(K < V, rest_max_C, 0)
  inside_CV = rest_CV > -jnp.inf
  above_CV = jnp.where(inside_CV, rest_CV - rest_max_C[:, None], 0)
  weight_CV = jnp.where(inside_CV, jnp.exp(above_CV), 0)
  sum_C, moment_C = reduce_rows(lax.add, 0.0, (weight_CV, weight_CV * above_CV))
  (least_C,) = reduce_rows(lax.min, 0.0, (above_CV,))
  log_rest_C = rest_max_C + jnp.log(sum_C)
  log_z_C = jax.nn.logsumexp(
    jnp.concatenate([shift_CK, log_rest_C[:, None]], axis=1), axis=1
  )
  log_q_CK = shift_CK - log_z_C[:, None]
  log_q_tail_C = log_rest_C - log_z_C
  q_CK, q_tail_C = jnp.exp(log_q_CK), jnp.exp(log_q_tail_C)

  # The teacher's. With nothing outside, rounding must not leave a bucket.
  p_CK = jnp.exp(log_p_CK)
  p_tail_C = jnp.where(K < V, p_tail_C, 0)
  filled_C = p_tail_C > 0
  log_p_tail_C = jnp.log(jnp.where(filled_C, p_tail_C, 1))
  rest_kl_C = jnp.where(filled_C, p_tail_C * (log_p_tail_C - log_q_tail_C), 0)
  kl_C = (p_CK * (log_p_CK - log_q_CK)).sum(-1) + rest_kl_C

  # The least of q_c, and the least entropy that p_c can have.
  worst_C = jnp.log(jnp.where(sum_C > 0, sum_C, 1)) - least_C
  spread_C = jnp.maximum(log_p_tail_C - log_p_CK[:, -1], 0)
  gap_C = jnp.where(filled_C, p_tail_C * jnp.maximum(worst_C - spread_C, 0), 0)

  # Σ q x over the row is that of the recorded ids and that of the bucket.
  mean_C = (q_CK * shift_CK).sum(-1) + jnp.where(
    sum_C > 0, q_tail_C * (rest_max_C + moment_C / sum_C), 0
  )
  label_C = jnp.take_along_axis(shift_CV, labels_C[:, None], axis=1)[:, 0]
  is_label_CK = ids_CK == labels_C[:, None]
  onset_CE = jnp.take(shift_CV, onset_ids_E, axis=1)
  is_onset_CK = (ids_CK[:, :, None] == onset_ids_E).any(-1)
  more = scoring.diagnostics
  token = TokenStats(
    divergence=jnp.maximum(kl_C, 0),
    student_nll=log_z_C - label_C,
    teacher_nll=jnp.where(
      is_label_CK.any(-1), -(is_label_CK * log_p_CK).sum(-1), jnp.nan
    ),
    student_entropy=log_z_C - mean_C,
    student_onset_mass=jnp.exp(onset_CE - log_z_C[:, None]).sum(-1),
    teacher_onset_mass=(is_onset_CK * p_CK).sum(-1),
    student_top16_mass=jnp.exp(
      top_k(shift_CV, TOP_MASS)[0] - log_z_C[:, None]
    ).sum(-1)
    if more
    else None,
    teacher_top16_mass=p_CK[:, :TOP_MASS].sum(-1)
    if more and K >= TOP_MASS
    else None,
  )
  slope_CD = None
  if want_slope:
    # q - p on the recorded ids; on the others q - p_t q_c, as if the teacher's
    # rest were shared out like the student's.
    rest_slope_CV = jnp.exp(rest_CV - log_z_C[:, None])
    rest_slope_CV -= (p_tail_C / jnp.where(sum_C > 0, sum_C, 1))[
      :, None
    ] * weight_CV
    slope_CV = rest_slope_CV.at[row_C1, ids_CK].set(q_CK - p_CK)
    slope_CD = pull_back(slope_CV, head_VD).astype(hidden_CD.dtype)
  return TailStats(token, p_tail_C, q_tail_C, gap_C), slope_CD
