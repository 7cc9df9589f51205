"""Divergences of rows of logits, and their slopes.

Shape suffixes: C rows, V the ids of the vocabulary that are here, D model
width, K top entries.

q and p are the softmax of the student and of the teacher at the temperature T.
A slope is the derivative with respect to logits / T; it meets 1/T at the very
end. Where the vocabulary is split (`row_statistics.Part`), values are whole and
slopes are of what is here: their sum over the parts is the gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from trd_jax.distill.loss.row_statistics import Side, precision, reduce_rows

# Whose probabilities weigh the KL that `read_rows` finds with the row sums.
CROSS = {"forward_kl": "teacher", "reverse_kl": "student"}


# Each: (divergence_C, its slope on student logits / T as [C, V] or None), from
# both sides and from the KL that the row sums gave, if they gave one.


def _forward_kl(q, p, kl_C, labels_C, temperature, beta, want_slope):
  del labels_C, beta
  slope_CV = None
  if want_slope:
    log_q_CV, log_p_CV = (x.log_probs(temperature) for x in (q, p))
    slope_CV = jnp.exp(log_q_CV) - jnp.exp(log_p_CV)
  # Rounding can push a vanishing divergence below zero.
  return jnp.maximum(kl_C, 0), slope_CV


def _reverse_kl(q, p, kl_C, labels_C, temperature, beta, want_slope):
  del labels_C, beta
  slope_CV = None
  if want_slope:
    log_q_CV, log_p_CV = (x.log_probs(temperature) for x in (q, p))
    slope_CV = jnp.exp(log_q_CV) * (log_q_CV - log_p_CV - kl_C[:, None])
  return jnp.maximum(kl_C, 0), slope_CV


def _jsd(q, p, kl_C, labels_C, temperature, beta, want_slope):
  del kl_C, labels_C

  def ratios(q, p):
    """q, log m/q and log p/q."""
    log_q_CV, log_p_CV = (x.log_probs(temperature) for x in (q, p))
    # Past e^80 a ratio is as good as infinite: clipped, neither it nor its
    # inverse overflows, and the probability that multiplies it is below e^-80.
    ratio_CV = jnp.clip(log_p_CV - log_q_CV, -80, 80)
    mix_CV = jnp.log((1 - beta) + beta * jnp.exp(ratio_CV))
    return jnp.exp(log_q_CV), mix_CV, ratio_CV

  q_CV, mix_CV, ratio_CV = ratios(q, p)
  p_CV = jnp.exp(p.log_probs(temperature))
  sums = reduce_rows(lax.add, 0.0, (-q_CV * mix_CV, p_CV * (ratio_CV - mix_CV)))
  student_C, teacher_C = q.part.total(jnp.stack(sums))
  value_C = beta * teacher_C + (1 - beta) * student_C
  slope_CV = None
  if want_slope:
    # Kept apart from the sums' terms, which would otherwise be written to
    # memory to be read twice: two blocks more.
    *log_z, student_C = lax.optimization_barrier(
      (q.tempered_log_z_C, p.tempered_log_z_C, student_C)
    )
    q, p = (
      x._replace(tempered_log_z_C=z) for x, z in zip((q, p), log_z, strict=True)
    )
    q_CV, mix_CV, _ = ratios(q, p)
    slope_CV = (beta - 1) * q_CV * (mix_CV + student_C[:, None])
  return jnp.maximum(value_C, 0), slope_CV


def _sampled_reverse_kl(q, p, kl_C, labels_C, temperature, beta, want_slope):
  del kl_C, beta
  log_q_C, log_p_C = (x.log_prob(labels_C, temperature) for x in (q, p))
  slope_CV = None
  if want_slope:
    # Without the one-hot part, which the caller adds.
    slope_CV = -jnp.exp(q.log_probs(temperature))
  return log_q_C - log_p_C, slope_CV


FULL = {
  "forward_kl": _forward_kl,
  "reverse_kl": _reverse_kl,
  "jsd": _jsd,
  "sampled_reverse_kl": _sampled_reverse_kl,
}


def top_k_reverse_kl(
  k: int,
  student_hidden_CD: jax.Array,
  student_head_VD: jax.Array,
  p: Side,
  temperature: float,
  want_slope: bool,
) -> tuple[jax.Array, jax.Array | None]:
  """KL(q‖p) on the teacher's k likeliest ids, from their head rows alone.

  Returns:
    The divergence [C] and its slope on the hidden states [C, D], without the
    factor 1/T, or None. Each part of the vocabulary gives the slope of its own
    ids.
  """
  teacher_CK, ids_CK = p.part.top_k(p.logits_CV, k)
  place_CK, here_CK = p.part.find(ids_CK)
  rows_CKD = student_head_VD[place_CK]
  product = functools.partial(
    jnp.einsum,
    precision=precision(rows_CKD.dtype),
    preferred_element_type=jnp.float32,
  )
  student_CK = product("cd,ckd->ck", student_hidden_CD, rows_CKD)
  student_CK = p.part.total(jnp.where(here_CK, student_CK, 0))
  log_q_CK = jax.nn.log_softmax(student_CK / temperature)
  log_p_CK = jax.nn.log_softmax(teacher_CK / temperature)
  q_CK = jnp.exp(log_q_CK)
  value_C = (q_CK * (log_q_CK - log_p_CK)).sum(-1)
  slope_CD = None
  if want_slope:
    slope_CK = q_CK * (log_q_CK - log_p_CK - value_C[:, None])
    slope_CK = jnp.where(here_CK, slope_CK, 0).astype(rows_CKD.dtype)
    slope_CD = product("ck,ckd->cd", slope_CK, rows_CKD)
  return jnp.maximum(value_C, 0), slope_CD
