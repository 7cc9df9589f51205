"""Full-vocabulary divergences over token chunks, with their gradient.

Shape suffixes: R response slots, C rows of one chunk, V vocabulary, D model
width (each side has its own), E onset ids, K top-k entries.

The head is frozen, so three matrix products with it are all that a loss
needs: student logits, teacher logits, and the gradient with respect to the
student's hidden states. `token_stats` walks the slots in chunks and makes all
three in the forward pass, because a second visit would have to rebuild the
logits. What it keeps for the backward pass is d divergence / d hidden, one
row a slot and *unweighted*: masks, clipping, normalisation and per-outcome
buckets stay ordinary JAX on `TokenStats.divergence`, and the backward pass is
one multiplication by whatever cotangent they send. Nothing of shape
[tokens, vocab] outlives a chunk.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from trd_jax.row_statistics import (
  logits,
  precision,
  pull_back,
  read_rows,
  reduce_rows,
  top_k,
)

KINDS = (
  "forward_kl",
  "reverse_kl",
  "jsd",
  "reverse_kl_topk",
  "sampled_reverse_kl",
)

_TOP_MASS = 16


@dataclasses.dataclass(frozen=True)
class Divergence:
  """Which divergence, and how it is walked; static under `jax.jit`.

  Attributes:
    kind: one of `KINDS`, see `token_stats`.
    temperature: T > 0 divides the logits of both sides inside the divergence
      (never in the diagnostics); its value and gradient carry no T² factor.
    beta: the teacher's share of the `jsd` mixture, 0 < beta < 1.
    top_k: size of the teacher's support for `reverse_kl_topk`.
    chunk_tokens: the most rows whose logits exist at one time.
    diagnostics: also measure top-16 masses and, for `reverse_kl_topk`, what
      needs the student's full logits.

  Raises:
    ValueError: a value outside its range.
  """

  kind: str = "forward_kl"
  temperature: float = 1.0
  beta: float = 0.5
  top_k: int = 32
  chunk_tokens: int = 512
  diagnostics: bool = True

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f"divergence kind {self.kind!r} is none of {KINDS}")
    if not (self.temperature > 0 and math.isfinite(self.temperature)):
      raise ValueError(f"temperature must be > 0, not {self.temperature}")
    if not 0 < self.beta < 1:
      raise ValueError(
        f"jsd needs 0 < beta < 1, not {self.beta}: at the ends it vanishes; "
        "forward_kl and reverse_kl are its limits after rescaling"
      )
    if self.top_k < 1 or self.chunk_tokens < 1:
      raise ValueError("top_k and chunk_tokens must be at least 1")


class TokenStats(NamedTuple):
  """Per-slot float32 [R] statistics; only `divergence` carries gradient.

  Probabilities, entropies and NLLs are those of the plain softmax (T = 1),
  whatever temperature the divergence has. A field that the settings do not
  measure is None.

  Attributes:
    divergence: in nats; at least 0, but for `sampled_reverse_kl`.
    student_nll: -log π_S(label), nats.
    teacher_nll: -log π_T(label), nats.
    student_entropy: nats.
    student_onset_mass: π_S on the onset ids, in [0, 1].
    teacher_onset_mass: π_T on the onset ids (C.5, epistemic-token mass).
    student_top16_mass: π_S on its own 16 likeliest ids.
    teacher_top16_mass: π_T on its own 16 likeliest ids.
  """

  divergence: jax.Array
  student_nll: jax.Array | None
  teacher_nll: jax.Array
  student_entropy: jax.Array | None
  student_onset_mass: jax.Array | None
  teacher_onset_mass: jax.Array
  student_top16_mass: jax.Array | None
  teacher_top16_mass: jax.Array | None


def token_stats(
  student_hidden_RD: jax.Array,
  teacher_hidden_RD: jax.Array,
  student_head_VD: jax.Array,
  teacher_head_VD: jax.Array,
  labels_R: jax.Array,
  onset_ids_E: jax.Array,
  spec: Divergence,
) -> TokenStats:
  """Scores every response slot: a divergence (C.8) and its diagnostics (C.5).

  With p = π_T and q = π_S at temperature T, both over the same V ids:

  - `forward_kl`: KL(p‖q).
  - `reverse_kl`: KL(q‖p), the D of Eq. 1 and 2.
  - `jsd`: β KL(p‖m) + (1−β) KL(q‖m), m = βp + (1−β)q. β = 1/2 is the
    symmetric Jensen-Shannon divergence, at most log 2. It vanishes at both
    ends, where it goes as β KL(p‖q) for β → 0 and (1−β) KL(q‖p) for β → 1;
    no 1/β rescaling is applied.
  - `reverse_kl_topk`: KL(q‖p) with both renormalised on the teacher's top-K
    ids (ties go to the lower id). Only K head rows a slot are touched for the
    student; without diagnostics its full logits are never made.
  - `sampled_reverse_kl`: δ = log q(label) − log p(label), a one-sample
    estimate of KL(q‖p) that can be negative. Its gradient is that of
    log q(label) alone; `objective.token_loss` multiplies it by a return to
    get Eq. 3.

  The gradient reaches `student_hidden_RD` only. Both heads and the teacher
  are frozen **by definition**: their cotangents are symbolic zeros, also
  when a caller asks for them. Rows are independent, so slots may be split
  over devices under `jax.shard_map` with replicated heads. Not forward-mode
  or twice differentiable.

  Args:
    student_hidden_RD: float32 or bfloat16, after the final norm. Products
      take operands in this dtype and accumulate in float32; the gradient is
      returned and, between the passes, kept in it too. (A cotangent has its
      primal's dtype: a bfloat16 gradient is rounded at the end whatever is
      kept, so float32 would double the memory to save one rounding of two.)
    teacher_hidden_RD: same rows; its width may differ.
    student_head_VD: same dtype as the student's hidden states.
    teacher_head_VD: same dtype as the teacher's hidden states.
    labels_R: int32 response token ids in [0, V); padding slots hold any
      valid id.
    onset_ids_E: int32, distinct ids in [0, V); may be empty.
    spec: what to compute.

  Returns:
    `TokenStats` of float32 [R].

  Raises:
    ValueError: shapes that do not fit together.
    TypeError: a head and its hidden states differ in dtype.
  """
  inputs = (
    student_hidden_RD,
    teacher_hidden_RD,
    student_head_VD,
    teacher_head_VD,
    labels_R,
  )
  _check(*inputs)
  return _token_stats(spec, *inputs, onset_ids_E)


def _check(student_hidden, teacher_hidden, student_head, teacher_head, labels):
  sides = (
    ("student", student_hidden, student_head),
    ("teacher", teacher_hidden, teacher_head),
  )
  for name, hidden, head in sides:
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
      raise ValueError(
        f"{name}: hidden [R, D] and head [V, D] do not fit: "
        f"{hidden.shape}, {head.shape}"
      )
    if hidden.dtype != head.dtype:
      raise TypeError(
        f"{name}: hidden states are {hidden.dtype}, the head is {head.dtype}"
      )
    if hidden.shape[0] != labels.shape[0] or labels.ndim != 1:
      raise ValueError(
        f"{name}: {hidden.shape[0]} hidden rows for labels {labels.shape}"
      )
  if student_head.shape[0] != teacher_head.shape[0]:
    raise ValueError(
      f"vocabularies differ: {student_head.shape[0]} head rows of the "
      f"student, {teacher_head.shape[0]} of the teacher"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_stats(spec, *inputs):
  return _over_chunks(spec, False, *inputs)[0]


def _token_stats_fwd(spec, *inputs):
  return _over_chunks(spec, True, *inputs)


def _token_stats_bwd(spec, slope_RD, cotangent):
  del spec
  ct_R = cotangent.divergence
  grad_RD = ct_R[:, None] * slope_RD.astype(jnp.float32)
  return grad_RD.astype(slope_RD.dtype), None, None, None, None, None


_token_stats.defvjp(_token_stats_fwd, _token_stats_bwd)


def _over_chunks(
  spec,
  want_slope,
  student_hidden_RD,
  teacher_hidden_RD,
  student_head_VD,
  teacher_head_VD,
  labels_R,
  onset_ids_E,
):
  """Runs `_chunk` over equal chunks: (TokenStats, slope_RD or None)."""
  rows = labels_R.shape[0]
  chunks = max(1, -(-rows // spec.chunk_tokens))
  # Equal heights: 513 rows are two chunks of 257, not 512 and 511 of padding.
  height = max(1, -(-rows // chunks))

  def split(x):
    pad = [(0, chunks * height - rows)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, pad).reshape(chunks, height, *x.shape[1:])

  def body(carry, chunk):
    student_hidden_CD, teacher_hidden_CD, labels_C = chunk
    return carry, _chunk(
      spec,
      want_slope,
      student_hidden_CD,
      teacher_hidden_CD,
      student_head_VD,
      teacher_head_VD,
      labels_C,
      onset_ids_E,
    )

  per_row = (student_hidden_RD, teacher_hidden_RD, labels_R)
  _, out = lax.scan(body, None, jax.tree.map(split, per_row))
  return jax.tree.map(
    lambda x: x.reshape(chunks * height, *x.shape[2:])[:rows], out
  )


def _chunk(
  spec,
  want_slope,
  student_hidden_CD,
  teacher_hidden_CD,
  student_head_VD,
  teacher_head_VD,
  labels_C,
  onset_ids_E,
):
  """One chunk: (TokenStats, slope_CD or None).

  `slope` is the derivative of the divergence; it meets 1/T at the very end.
  """
  top = spec.kind == "reverse_kl_topk"
  student_CV = None
  if spec.diagnostics or not top:
    student_CV = logits(student_hidden_CD, student_head_VD)
  teacher_CV = logits(teacher_hidden_CD, teacher_head_VD)
  q, p, divergence_C = read_rows(
    student_CV,
    teacher_CV,
    temperature=spec.temperature,
    cross={"forward_kl": "teacher", "reverse_kl": "student"}.get(spec.kind),
  )
  slope_CD = None
  if top:
    divergence_C, slope_CD = _top_k_reverse_kl(
      spec, student_hidden_CD, student_head_VD, teacher_CV, want_slope
    )
  else:
    divergence_C, slope_CV = _FULL[spec.kind](
      spec, q, p, divergence_C, labels_C, want_slope
    )
    if slope_CV is not None:
      slope_CD = pull_back(slope_CV, student_head_VD)
      if spec.kind == "sampled_reverse_kl":
        # The one-hot part of d log q(label): a row of the head, no scatter.
        slope_CD += student_head_VD[labels_C].astype(jnp.float32)
  if slope_CD is not None:
    slope_CD = (slope_CD / spec.temperature).astype(student_hidden_CD.dtype)

  more = spec.diagnostics
  stats = TokenStats(
    divergence=divergence_C,
    student_nll=q.nll(labels_C) if q else None,
    teacher_nll=p.nll(labels_C),
    student_entropy=q.entropy_C if q else None,
    student_onset_mass=q.mass_on(onset_ids_E) if q else None,
    teacher_onset_mass=p.mass_on(onset_ids_E),
    student_top16_mass=q.top_mass(_TOP_MASS) if q and more else None,
    teacher_top16_mass=p.top_mass(_TOP_MASS) if more else None,
  )
  return stats, slope_CD


# Each: (divergence_C, its slope on student logits / T as [C, V] or None), from
# both sides and from the KL that the row sums gave, if they gave one.


def _forward_kl(spec, q, p, kl_C, labels_C, want_slope):
  del labels_C
  slope_CV = None
  if want_slope:
    log_q_CV, log_p_CV = (x.log_probs(spec.temperature) for x in (q, p))
    slope_CV = jnp.exp(log_q_CV) - jnp.exp(log_p_CV)
  # Rounding can push a vanishing divergence below zero.
  return jnp.maximum(kl_C, 0), slope_CV


def _reverse_kl(spec, q, p, kl_C, labels_C, want_slope):
  del labels_C
  slope_CV = None
  if want_slope:
    log_q_CV, log_p_CV = (x.log_probs(spec.temperature) for x in (q, p))
    slope_CV = jnp.exp(log_q_CV) * (log_q_CV - log_p_CV - kl_C[:, None])
  return jnp.maximum(kl_C, 0), slope_CV


def _jsd(spec, q, p, kl_C, labels_C, want_slope):
  del kl_C, labels_C
  beta = spec.beta
  log_q_CV, log_p_CV = (x.log_probs(spec.temperature) for x in (q, p))
  # Past e^80 a ratio is as good as infinite: clipped, neither it nor its
  # inverse overflows, and the probability that multiplies it is below e^-80.
  ratio_CV = jnp.clip(log_p_CV - log_q_CV, -80, 80)
  mix_CV = jnp.log((1 - beta) + beta * jnp.exp(ratio_CV))  # log m/q
  q_CV, p_CV = jnp.exp(log_q_CV), jnp.exp(log_p_CV)
  student_C, teacher_C = reduce_rows(
    lax.add, 0.0, (-q_CV * mix_CV, p_CV * (ratio_CV - mix_CV))
  )
  value_C = beta * teacher_C + (1 - beta) * student_C
  slope_CV = None
  if want_slope:
    slope_CV = (beta - 1) * q_CV * (mix_CV + student_C[:, None])
  return jnp.maximum(value_C, 0), slope_CV


def _sampled_reverse_kl(spec, q, p, kl_C, labels_C, want_slope):
  del kl_C
  log_q_C, log_p_C = (x.log_prob(labels_C, spec.temperature) for x in (q, p))
  slope_CV = None
  if want_slope:
    slope_CV = -jnp.exp(q.log_probs(spec.temperature))
  return log_q_C - log_p_C, slope_CV


_FULL = {
  "forward_kl": _forward_kl,
  "reverse_kl": _reverse_kl,
  "jsd": _jsd,
  "sampled_reverse_kl": _sampled_reverse_kl,
}


def _top_k_reverse_kl(
  spec, student_hidden_CD, student_head_VD, teacher_CV, want_slope
):
  """On the teacher's top-K support: (divergence_C, T · slope_CD or None)."""
  teacher_CK, ids_CK = top_k(teacher_CV, spec.top_k)
  rows_CKD = student_head_VD[ids_CK]
  product = functools.partial(
    jnp.einsum,
    precision=precision(rows_CKD.dtype),
    preferred_element_type=jnp.float32,
  )
  student_CK = product("cd,ckd->ck", student_hidden_CD, rows_CKD)
  log_q_CK = jax.nn.log_softmax(student_CK / spec.temperature)
  log_p_CK = jax.nn.log_softmax(teacher_CK / spec.temperature)
  q_CK = jnp.exp(log_q_CK)
  value_C = (q_CK * (log_q_CK - log_p_CK)).sum(-1)
  slope_CD = None
  if want_slope:
    slope_CK = q_CK * (log_q_CK - log_p_CK - value_C[:, None])
    slope_CD = product("ck,ckd->cd", slope_CK.astype(rows_CKD.dtype), rows_CKD)
  return jnp.maximum(value_C, 0), slope_CD
