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

from trd_jax.distill.loss import row_divergence
from trd_jax.distill.loss.row_statistics import (
  Part,
  in_chunks,
  logits,
  pull_back,
  read_rows,
)

KINDS = (
  "forward_kl",
  "reverse_kl",
  "jsd",
  "reverse_kl_topk",
  "sampled_reverse_kl",
)

TOP_MASS = 16


@dataclasses.dataclass(frozen=True)
class Divergence:
  """Which divergence, and how it is walked; static under `jax.jit`.

  Attributes:
    kind: one of `KINDS`, see `token_stats`.
    temperature: T > 0 divides the logits of both sides inside the divergence
      (never in the diagnostics); its value and gradient carry no T² factor.
    beta: the teacher's share of the `jsd` mixture, 0 < beta < 1.
    top_k: size of the teacher's support for `reverse_kl_topk`.
    chunk_tokens: the most rows whose logits exist at one time; None for
      `automatic_chunk` of the inputs and JAX's default backend.
    diagnostics: also measure top-16 masses and, for `reverse_kl_topk`, what
      needs the student's full logits.

  Raises:
    ValueError: a value outside its range.
  """

  kind: str = "forward_kl"
  temperature: float = 1.0
  beta: float = 0.5
  top_k: int = 32
  chunk_tokens: int | None = 512
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
    chunk_tokens = 1 if self.chunk_tokens is None else self.chunk_tokens
    if self.top_k < 1 or chunk_tokens < 1:
      raise ValueError("top_k and chunk_tokens must be at least 1")

  def chunk(self, width: int, vocab: int, dtype: jnp.dtype) -> int:
    """The most rows at one time; see `automatic_chunk` for the arguments."""
    return self.chunk_tokens or automatic_chunk(
      width, vocab, dtype, jax.default_backend()
    )


def automatic_chunk(
  width: int, vocab: int, dtype: jnp.dtype, platform: str
) -> int:
  """How many rows to walk at once where `chunk_tokens` is None.

  On accelerators the third product decides: its result has rows · width
  entries however wide the vocabulary is, and below about 2²² of them there are
  too few tiles to fill a device. So there are 2²² / width rows, but no more
  than keep a chunk's blocks within 2 GiB: the float32 logits of both sides and
  the slope rounded to `dtype`. On CPUs a chunk has 512 rows.

  Args:
    width: of the student's hidden states.
    vocab: head rows on the device.
    dtype: the heads'.
    platform: as `jax.default_backend()` names it.

  Returns:
    A multiple of 128, at least 128.
  """
  if platform == "cpu":
    return 512
  rounded = jnp.dtype(dtype).itemsize
  row = vocab * (4 + 4 + (rounded if rounded < 4 else 0))
  rows = min(2**22 // width, 2**31 // row)
  return max(128, rows // 128 * 128)


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
  *,
  vocab_axis: str | None = None,
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
  when a caller asks for them. Not forward-mode or twice differentiable.

  Under `jax.shard_map` rows are independent, so slots may be split over one
  mesh axis, and the vocabulary over another: with `vocab_axis` each device
  along it brings the same slots, the V ids that follow one another in its own
  part of both heads, and no more. Row statistics and the gradient meet in
  all-reduces; results, the gradient included, are whole and the same on all of
  them (invariant along the axis, where `check_vma` looks). Memory for logits
  and the work of the products shrink by the number of parts.

  Args:
    student_hidden_RD: float32 or bfloat16, after the final norm. Products
      take operands in this dtype and accumulate in float32; the gradient is
      returned and, between the passes, kept in it too. (A cotangent has its
      primal's dtype: a bfloat16 gradient is rounded at the end whatever is
      kept, so float32 would double the memory to save one rounding of two.)
    teacher_hidden_RD: same rows; its width may differ.
    student_head_VD: same dtype as the student's hidden states.
    teacher_head_VD: same dtype as the teacher's hidden states.
    labels_R: int32 response token ids of the whole vocabulary; padding slots
      hold any valid id.
    onset_ids_E: int32, distinct ids of the whole vocabulary; may be empty.
    spec: what to compute.
    vocab_axis: the mesh axis along which both heads are split, in the order
      of their ids and evenly; None where they are whole.

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
  return _token_stats(spec, vocab_axis, *inputs, onset_ids_E)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_stats(spec, vocab_axis, *inputs):
  return _over_chunks(spec, vocab_axis, False, *inputs)[0]


def _token_stats_fwd(spec, vocab_axis, *inputs):
  return _over_chunks(spec, vocab_axis, True, *inputs)


def _token_stats_bwd(spec, vocab_axis, slope_RD, cotangent):
  del spec, vocab_axis
  return scaled(cotangent.divergence, slope_RD), None, None, None, None, None


def scaled(ct_R: jax.Array, slope_RD: jax.Array) -> jax.Array:
  """The kept slope times a cotangent, in float32, rounded to its dtype."""
  grad_RD = ct_R[:, None] * slope_RD.astype(jnp.float32)
  return grad_RD.astype(slope_RD.dtype)


_token_stats.defvjp(_token_stats_fwd, _token_stats_bwd)


def _over_chunks(
  spec,
  vocab_axis,
  want_slope,
  student_hidden_RD,
  teacher_hidden_RD,
  student_head_VD,
  teacher_head_VD,
  labels_R,
  onset_ids_E,
):
  """Runs `_chunk` over equal chunks: (TokenStats, slope_RD or None)."""
  vocab, width = student_head_VD.shape
  part = Part(vocab, vocab_axis)
  most = spec.chunk(width, vocab, student_head_VD.dtype)

  def body(student_hidden_CD, teacher_hidden_CD, labels_C):
    return _chunk(
      spec,
      part,
      want_slope,
      student_hidden_CD,
      teacher_hidden_CD,
      student_head_VD,
      teacher_head_VD,
      labels_C,
      onset_ids_E,
    )

  return in_chunks(body, (student_hidden_RD, teacher_hidden_RD, labels_R), most)


def _chunk(
  spec,
  part,
  want_slope,
  student_hidden_CD,
  teacher_hidden_CD,
  student_head_VD,
  teacher_head_VD,
  labels_C,
  onset_ids_E,
):
  """One chunk: (TokenStats, slope_CD or None)."""
  top = spec.kind == "reverse_kl_topk"
  student_CV = None
  if spec.diagnostics or not top:
    student_CV = logits(student_hidden_CD, student_head_VD)
  teacher_CV = logits(teacher_hidden_CD, teacher_head_VD)
  q, p, divergence_C = read_rows(
    student_CV,
    teacher_CV,
    part,
    temperature=spec.temperature,
    cross=row_divergence.CROSS.get(spec.kind),
  )
  slope_CD = None
  if top:
    divergence_C, slope_CD = row_divergence.top_k_reverse_kl(
      spec.top_k,
      student_hidden_CD,
      student_head_VD,
      p,
      spec.temperature,
      want_slope,
    )
  else:
    divergence_C, slope_CV = row_divergence.FULL[spec.kind](
      q, p, divergence_C, labels_C, spec.temperature, spec.beta, want_slope
    )
    if slope_CV is not None:
      slope_CD = pull_back(slope_CV, student_head_VD)
      if spec.kind == "sampled_reverse_kl":
        # The one-hot part of d log q(label): a row of the head, no scatter.
        place_C, here_C = part.find(labels_C)
        row_CD = student_head_VD[place_C].astype(jnp.float32)
        slope_CD += jnp.where(here_C[:, None], row_CD, 0)
  if slope_CD is not None:
    # Summed before it is rounded to the hidden states' dtype.
    slope_CD = part.total(slope_CD) / spec.temperature
    slope_CD = slope_CD.astype(student_hidden_CD.dtype)

  more = spec.diagnostics
  stats = TokenStats(
    divergence=divergence_C,
    student_nll=q.nll(labels_C) if q else None,
    teacher_nll=p.nll(labels_C),
    student_entropy=q.entropy_C if q else None,
    student_onset_mass=q.mass_on(onset_ids_E) if q else None,
    teacher_onset_mass=p.mass_on(onset_ids_E),
    student_top16_mass=q.top_mass(TOP_MASS) if q and more else None,
    teacher_top16_mass=p.top_mass(TOP_MASS) if more else None,
  )
  return stats, slope_CD
