"""Statistics of response tokens over token chunks, with their gradient.

Shape key: R response slots, C rows of one chunk, V vocabulary, D model
width (each side has its own), E onset ids, K top-k entries.

The head is frozen, so three matrix products with it are all that a loss
needs: student logits, teacher logits, and the gradient with respect to the
student's hidden states. `token_stats` walks the slots in chunks and makes all
three in the forward pass, because a second visit would have to rebuild the
logits. What it keeps for the backward pass is d divergence / d hidden, one
row a slot and *unweighted*: masks, clipping, normalisation and per-outcome
buckets stay ordinary JAX on `TokenStats.divergence`, and the backward pass is
one multiplication by whatever cotangent they send. Nothing of shape
[tokens, vocab] outlives a chunk:

    hidden [R, D] ──► chunk [C, D] ──head──► logits [C, V] ──► divergence [C]
                                               │ slope [C, V]
                       slope [C, D] ◄──head──┘             kept as [R, D]
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trd_jax.distill.loss.divergences import Chunk, Divergence, ForwardKl
from trd_jax.distill.loss.row_statistics import (
  Part,
  in_chunks,
  logits,
  read_rows,
)

TOP_MASS = 16


@dataclasses.dataclass(frozen=True)
class Scoring:
  """Which divergence, and how slots are walked; static under `jax.jit`.

  Attributes:
    divergence: what is taken of each row.
    temperature: T > 0 divides the logits of both sides inside the divergence
      (never in the diagnostics); its value and gradient carry no T² factor.
    chunk_tokens: the most rows whose logits exist at one time; None for
      `automatic_chunk` of the inputs and JAX's default backend.
    diagnostics: also measure top-16 masses and, for a divergence that doesn't
      read them, what needs the student's full logits.
    cross_entropy: weight of −log π_S(label), which is added to the divergence.

  Raises:
    ValueError: a value outside its range.
  """

  divergence: Divergence = dataclasses.field(default_factory=ForwardKl)
  temperature: float = 1.0
  chunk_tokens: int | None = 512
  diagnostics: bool = True
  cross_entropy: float = 0.0

  def __post_init__(self):
    if not (self.temperature > 0 and math.isfinite(self.temperature)):
      raise ValueError(f"temperature must be > 0, not {self.temperature}")
    if self.chunk_tokens is not None and self.chunk_tokens < 1:
      raise ValueError(f"chunk_tokens must be >= 1, not {self.chunk_tokens}")
    if not 0 <= self.cross_entropy < math.inf:
      raise ValueError(f"cross_entropy must be >= 0, not {self.cross_entropy}")

  @property
  def reads_student(self) -> bool:
    """Returns whether the loss reads the student's logits of whole rows."""
    return self.divergence.reads_student or self.cross_entropy > 0

  def chunk(self, width: int, vocab: int, dtype: jnp.dtype) -> int:
    """Returns the most rows at one time; arguments as `automatic_chunk`."""
    return self.chunk_tokens or automatic_chunk(
      width, vocab, dtype, jax.default_backend()
    )


def automatic_chunk(
  width: int, vocab: int, dtype: jnp.dtype, platform: str
) -> int:
  """Returns how many rows to walk at once where `chunk_tokens` is None.

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
    divergence: in nats, with what `Scoring.cross_entropy` adds to it; at least
      0 unless `Divergence.may_be_negative`.
    student_nll: -log π_S(label), nats.
    teacher_nll: -log π_T(label), nats; None without a teacher, as all of its.
    student_entropy: nats.
    student_onset_mass: π_S on the onset ids, in [0, 1].
    teacher_onset_mass: π_T on the onset ids (C.5, epistemic-token mass).
    student_top16_mass: π_S on its own 16 likeliest ids.
    teacher_top16_mass: π_T on its own 16 likeliest ids.
  """

  divergence: jax.Array
  student_nll: jax.Array | None
  teacher_nll: jax.Array | None
  student_entropy: jax.Array | None
  student_onset_mass: jax.Array | None
  teacher_onset_mass: jax.Array | None
  student_top16_mass: jax.Array | None
  teacher_top16_mass: jax.Array | None


def token_stats(
  student_hidden_RD: jax.Array,
  teacher_hidden_RD: jax.Array | None,
  student_head_VD: jax.Array,
  teacher_head_VD: jax.Array | None,
  labels_R: jax.Array,
  onset_ids_E: jax.Array,
  scoring: Scoring,
  *,
  vocab_axis: str | None = None,
) -> TokenStats:
  """Scores every response slot: a divergence (C.8) and its diagnostics (C.5).

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
    teacher_hidden_RD: same rows; its width may differ. None, as its head, for
      a divergence that reads no teacher: nothing is then computed of it.
    student_head_VD: same dtype as the student's hidden states.
    teacher_head_VD: same dtype as the teacher's hidden states.
    labels_R: int32 response token ids of the whole vocabulary; padding slots
      hold any valid id.
    onset_ids_E: int32, distinct ids of the whole vocabulary; may be empty.
    scoring: what to compute.
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
  return _token_stats(scoring, vocab_axis, *inputs, onset_ids_E)


def _check(student_hidden, teacher_hidden, student_head, teacher_head, labels):
  sides: list[tuple[str, Any, Any]] = [
    ("student", student_hidden, student_head)
  ]
  if teacher_hidden is not None or teacher_head is not None:
    sides.append(("teacher", teacher_hidden, teacher_head))
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
  if teacher_head is not None and len(student_head) != len(teacher_head):
    raise ValueError(
      f"vocabularies differ: {student_head.shape[0]} head rows of the "
      f"student, {teacher_head.shape[0]} of the teacher"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_stats(scoring, vocab_axis, *inputs):
  return _over_chunks(scoring, vocab_axis, False, *inputs)[0]


def _token_stats_fwd(scoring, vocab_axis, *inputs):
  return _over_chunks(scoring, vocab_axis, True, *inputs)


def _token_stats_bwd(_scoring, _vocab_axis, slope_RD, cotangent):
  # The forward pass has made the slope while a chunk's logits were there: to
  # make it here would take all of the logits a second time.
  return scaled(cotangent.divergence, slope_RD), None, None, None, None, None


def scaled(ct_R: jax.Array, slope_RD: jax.Array) -> jax.Array:
  """Returns the kept slope times a cotangent, rounded from float32."""
  grad_RD = ct_R[:, None] * slope_RD.astype(jnp.float32)
  return grad_RD.astype(slope_RD.dtype)


_token_stats.defvjp(_token_stats_fwd, _token_stats_bwd)


def _over_chunks(
  scoring,
  vocab_axis,
  want_slope,
  student_hidden_RD,
  teacher_hidden_RD,
  student_head_VD,
  teacher_head_VD,
  labels_R,
  onset_ids_E,
):
  """Scores equal chunks, one by one: (TokenStats, slope_RD or None)."""
  vocab, width = student_head_VD.shape
  part = Part(vocab, vocab_axis)
  most = scoring.chunk(width, vocab, student_head_VD.dtype)

  def body(student_hidden_CD, teacher_hidden_CD, labels_C):
    chunk = read_chunk(
      scoring,
      part,
      student_hidden_CD,
      teacher_hidden_CD,
      student_head_VD,
      teacher_head_VD,
      labels_C,
    )
    return score_chunk(scoring, chunk, onset_ids_E, want_slope)

  return in_chunks(body, (student_hidden_RD, teacher_hidden_RD, labels_R), most)


def read_chunk(
  scoring: Scoring,
  part: Part,
  student_hidden_CD: jax.Array,
  teacher_hidden_CD: jax.Array | None,
  student_head_VD: jax.Array,
  teacher_head_VD: Any,
  labels_C: jax.Array,
) -> Chunk:
  """Returns the logits of some rows and their sums; see `token_stats`.

  Args:
    scoring: what will be computed of them.
    part: which ids both heads are of.
    student_hidden_CD: as of `token_stats`, and so are all that follow.
    teacher_hidden_CD: None for a divergence that reads no teacher.
    student_head_VD: frozen.
    teacher_head_VD: frozen; not read without a teacher.
    labels_C: the response tokens.
  """
  divergence = scoring.divergence
  # A product with the whole head is the dearest thing here; a divergence that
  # reads a few columns of it, without diagnostics, goes without.
  student_CV = None
  if scoring.diagnostics or scoring.reads_student:
    student_CV = logits(student_hidden_CD, student_head_VD)
  teacher_CV = None
  if teacher_hidden_CD is not None:
    teacher_CV = logits(teacher_hidden_CD, teacher_head_VD)
  q, p, kl_C = read_rows(
    student_CV,
    teacher_CV,
    part,
    temperature=scoring.temperature,
    kl_under=divergence.kl_under,
  )
  return Chunk(
    student=q,
    teacher=p,
    kl_C=kl_C,
    labels_C=labels_C,
    temperature=scoring.temperature,
    part=part,
    hidden_CD=student_hidden_CD,
    head_VD=student_head_VD,
  )


def score_chunk(
  scoring: Scoring, chunk: Chunk, onset_ids_E: jax.Array, want_slope: bool
) -> tuple[TokenStats, jax.Array | None]:
  """Scores some rows: their statistics, and the slope [C, D] where wanted."""
  q, p, part, labels_C = (
    chunk.student,
    chunk.teacher,
    chunk.part,
    chunk.labels_C,
  )
  divergence_C, slope = scoring.divergence.of_rows(chunk)
  if scoring.cross_entropy:
    divergence_C, slope = _with_cross_entropy(
      chunk, scoring.cross_entropy, divergence_C, slope
    )
  slope_CD = None
  if want_slope:
    # Each part of the vocabulary gave the slope of its own ids. They are
    # summed in float32, before the rounding to the hidden states' dtype, so
    # that splitting the vocabulary costs no digit.
    slope_CD = part.total(slope()) / scoring.temperature
    slope_CD = slope_CD.astype(chunk.hidden_CD.dtype)

  more = scoring.diagnostics
  stats = TokenStats(
    divergence=divergence_C,
    student_nll=q.nll(labels_C) if q else None,
    teacher_nll=p.nll(labels_C) if p else None,
    student_entropy=q.entropy_C if q else None,
    student_onset_mass=q.mass_on(onset_ids_E) if q else None,
    teacher_onset_mass=p.mass_on(onset_ids_E) if p else None,
    student_top16_mass=q.top_mass(TOP_MASS) if q and more else None,
    teacher_top16_mass=p.top_mass(TOP_MASS) if p and more else None,
  )
  return stats, slope_CD


def _with_cross_entropy(chunk, weight, divergence_C, slope):
  """Adds `weight` · −log π_S(label), T = 1, to a divergence and its slope."""

  def both():
    # Slopes are on logits / T: that of the other softmax is T times as steep.
    steep = weight * chunk.temperature
    nll_CD = chunk.pull_back(chunk.student.shares(chunk.student.logits_CV))
    return slope() + steep * (nll_CD - chunk.label_rows())

  return divergence_C + weight * chunk.student.nll(chunk.labels_C), both
