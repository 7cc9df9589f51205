"""Exact statistics of very wide rows: normalisers, masses, top entries.

Shape key: R all rows, C those of a chunk, V the ids of the vocabulary that are
here, K top entries, D residual channels.

Everything here reads rows of logits that are float32 and as wide as the
vocabulary, so each function is written to read them once, and to be right at
a width of 152K. Where the vocabulary is split over devices, each reads its own
part of the rows, and `Part` puts the findings together.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Partial results of a row are kept in this many lanes before they are
# combined: XLA's CPU backend adds a flat float32 reduction in sequence, which
# costs 3e-4 of relative error over 152K terms.
_LANES = 128
_TERMS = 2048


def _lanes(width):
  """Returns as many lanes as leave no rest, unless one would add over `_TERMS`.

  What a rest reads, too, XLA writes to memory. The 151,936 ids of Qwen3 are
  1187 · 128, and a quarter of them are 1187 · 32.
  """
  lanes = math.gcd(width, _LANES)
  return lanes if width <= _TERMS * lanes else _LANES


def in_chunks(body: Callable[..., Any], per_row: Any, most: int) -> Any:
  """Returns what `body` makes of all rows, at most so many at a time.

  Chunks are of equal height: 513 rows at 512 are two chunks of 257, not 512
  and 511 of padding.

  Args:
    body: takes the parts `[C, ...]` of `per_row` one by one, and gives a tree
      of arrays `[C, ...]`.
    per_row: a sequence of trees of arrays `[R, ...]`.
    most: rows of a chunk (C), at least 1.

  Returns:
    The trees of all chunks one behind the other, `[R, ...]`.
  """
  rows = jax.tree.leaves(per_row)[0].shape[0]
  chunks = max(1, -(-rows // most))
  height = max(1, -(-rows // chunks))

  def split(x):
    pad = [(0, chunks * height - rows)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, pad).reshape(chunks, height, *x.shape[1:])

  _, out = lax.scan(
    lambda carry, chunk: (carry, body(*chunk)),
    None,
    jax.tree.map(split, tuple(per_row)),
  )
  return jax.tree.map(
    lambda x: x.reshape(chunks * height, *x.shape[2:])[:rows], out
  )


def logits(hidden_CD: jax.Array, head_VD: jax.Array) -> jax.Array:
  """Returns `hidden_CD @ head_VD.T`, accumulated and kept in float32."""
  return _product(hidden_CD, head_VD, 1)


def pull_back(slope_CV: jax.Array, head_VD: jax.Array) -> jax.Array:
  """Returns a slope on logits as one on hidden states: float32 [C, D].

  The slope is rounded to the head's dtype, since both operands of a fast
  product have the same.
  """
  return _product(slope_CV.astype(head_VD.dtype), head_VD, 0)


def _product(left, head_VD, axis):
  return lax.dot_general(
    left,
    head_VD,
    (((1,), (axis,)), ((), ())),
    precision=precision(head_VD.dtype),
    preferred_element_type=jnp.float32,
  )


def precision(dtype: jnp.dtype) -> lax.Precision | None:
  """Returns what makes a product of operands of `dtype` exact in float32.

  By default a GPU may round float32 operands to TF32. Products of bfloat16
  are exact in the accumulator as they are.
  """
  return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def reduce_rows(
  operation: Callable[[jax.Array, jax.Array], jax.Array],
  start: float,
  operands: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
  """Reduces several float32 [C, V] arrays to [C] in one pass.

  One pass matters more than it looks: separate reductions of terms that share
  an exponential make XLA write that exponential to memory. On GPUs lanes would
  make it write every term; there it splits a flat reduction by itself.
  """
  return lax.platform_dependent(
    *operands,
    cpu=functools.partial(_in_lanes, operation, start),
    default=lambda *x: _reduce(operation, start, x),
  )


def _in_lanes(operation, start, *operands):
  """Reduces lanes that are far apart, then the lanes."""
  rows, width = operands[0].shape
  lanes = _lanes(width)
  body = width // lanes * lanes
  parts = tuple(x[:, body:] for x in operands)
  if body:
    bodies = tuple(x[:, :body].reshape(rows, -1, lanes) for x in operands)
    parts = tuple(
      jnp.concatenate([lane, rest], axis=1)
      for lane, rest in zip(
        _reduce(operation, start, bodies), parts, strict=True
      )
    )
  return _reduce(operation, start, parts)


def _reduce(operation, start, operands):
  def together(a, b):
    return tuple(operation(x, y) for x, y in zip(a, b, strict=True))

  starts = tuple(jnp.float32(start) for _ in operands)
  return tuple(lax.reduce(operands, starts, together, (1,)))


def top_k(x_CV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Returns `lax.top_k` of wide rows: values and ids, [C, min(k, V)].

  It looks at few candidates.

  The k best entries lie in the k groups of neighbours with the best maxima.
  The groups are taken in rising order, so ties still go to the lower id.
  """
  rows, width = x_CV.shape
  k = min(k, width)
  lanes = _lanes(width)
  groups = width // lanes
  if groups <= k:
    values, ids = lax.top_k(x_CV, k)
    return values, ids
  body = groups * lanes
  maxima = x_CV[:, :body].reshape(rows, groups, lanes).max(-1)
  best = jnp.sort(lax.top_k(maxima, k)[1], axis=-1)
  ids = (best[:, :, None] * lanes + jnp.arange(lanes)).reshape(rows, -1)
  rest = jnp.broadcast_to(jnp.arange(body, width), (rows, width - body))
  ids = jnp.concatenate([ids, rest], axis=-1)
  values, where = lax.top_k(jnp.take_along_axis(x_CV, ids, 1), k)
  return values, jnp.take_along_axis(ids, where, 1)


@dataclasses.dataclass(frozen=True)
class Part:
  """The part of the vocabulary whose head rows this device holds.

  With an axis, each device along it holds the next `width` ids, and what they
  find in the same rows meets in all-reduces: few numbers a row, whatever the
  vocabulary. Without one, the part is the whole.

  Attributes:
    width: how many ids are here.
    axis: a mesh axis of the enclosing `jax.shard_map`, or None.
  """

  width: int
  axis: str | None = None

  def total(self, x: jax.Array) -> jax.Array:
    """Returns the sum over all parts."""
    return lax.psum(x, self.axis) if self.axis else x

  def largest(self, x: jax.Array) -> jax.Array:
    """Returns the maximum over all parts."""
    return lax.pmax(x, self.axis) if self.axis else x

  def find(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ids of the whole vocabulary as positions here, and which are.

    Those of another part stand at 0. An id that no part has is "here"
    everywhere and past the end, so that what is taken there is NaN.
    """
    if not self.axis:
      return ids, jnp.ones(ids.shape, bool)
    place = ids - lax.axis_index(self.axis) * self.width
    here = (place >= 0) & (place < self.width)
    nowhere = (ids < 0) | (ids >= self.width * lax.axis_size(self.axis))
    return (
      jnp.where(here, place, jnp.where(nowhere, self.width, 0)),
      here | nowhere,
    )

  def among(self, ids_CK: jax.Array) -> jax.Array:
    """Returns which ids here are among some of each row, bool [C, V]."""
    place_CK, here_CK = self.find(ids_CK)
    # Past the end is dropped: what another part has.
    place_CK = jnp.where(here_CK, place_CK, self.width)
    row_C1 = jnp.arange(len(ids_CK))[:, None]
    none_CV = jnp.zeros((len(ids_CK), self.width), bool)
    return none_CV.at[row_C1, place_CK].set(True, mode="drop")

  def top_k(self, x_CV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns `top_k` of rows over all parts, ids of the whole vocabulary."""
    values, ids = top_k(x_CV, k)
    if not self.axis:
      return values, ids
    number, parts = lax.axis_index(self.axis), lax.axis_size(self.axis)
    mine = (jnp.arange(parts) == number)[:, None]

    def of_all(x_CK):
      # Each writes its own lines and zeros elsewhere: the sum gathers them by
      # an all-reduce. The parts stand in the order of their ids, so ties still
      # go to the lower one.
      lines = jnp.where(mine, x_CK[:, None], 0)  # [C, parts, K]
      return self.total(lines).reshape(len(x_CK), -1)

    values, ids = of_all(values), of_all(ids + number * self.width)
    values, where = lax.top_k(values, min(k, values.shape[1]))
    return values, jnp.take_along_axis(ids, where, 1)


class LogitRows(NamedTuple):
  """The logits of a student or a teacher, and what their row sums gave.

  The logarithms of the normalisers stand relative to the row maximum, so that
  small differences between large logits stay exact. All but the logits
  themselves is of the whole vocabulary, and the same for all its parts.

  Attributes:
    part: which ids the logits are of.
    logits_CV: float32.
    max_C: row maxima.
    log_z_C: log Σ exp(logit - max).
    tempered_log_z_C: log Σ exp((logit - max) / T), T the divergence's.
    entropy_C: nats at T = 1; None where not asked for.
  """

  part: Part
  logits_CV: jax.Array
  max_C: jax.Array
  log_z_C: jax.Array
  tempered_log_z_C: jax.Array
  entropy_C: jax.Array | None

  def at(self, ids_C: jax.Array) -> jax.Array:
    """Returns logits of one id a row; NaN for an id that isn't there."""
    place_C, here_C = self.part.find(ids_C)
    found_C = jnp.take_along_axis(self.logits_CV, place_C[:, None], 1)[:, 0]
    return self.part.total(jnp.where(here_C, found_C, 0))

  def nll(self, ids_C: jax.Array) -> jax.Array:
    """Returns -log softmax of one id a row, at T = 1."""
    return self.log_z_C + (self.max_C - self.at(ids_C))

  def shares(self, some_logits_CK: jax.Array) -> jax.Array:
    """Returns probabilities at T = 1 of entries with these logits."""
    shift_CK = some_logits_CK - self.max_C[:, None]
    return jnp.exp(shift_CK - self.log_z_C[:, None])

  def mass_on(self, ids_K: jax.Array) -> jax.Array:
    """Returns the probability at T = 1 of the same distinct ids in each row."""
    place_K, here_K = self.part.find(ids_K)
    share_CK = self.shares(jnp.take(self.logits_CV, place_K, axis=1))
    return self.part.total(jnp.where(here_K, share_CK, 0).sum(-1))

  def top_mass(self, k: int) -> jax.Array:
    """Returns the probability at T = 1 of a row's k likeliest entries."""
    return self.shares(self.part.top_k(self.logits_CV, k)[0]).sum(-1)

  def likeliest(self, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns ids and log softmax at T = 1 of a row's k likeliest entries.

    int32 and float32 [C, min(k, V)], the likeliest first; ties go to the lower
    id.
    """
    top_CK, ids_CK = self.part.top_k(self.logits_CV, k)
    return ids_CK, top_CK - self.max_C[:, None] - self.log_z_C[:, None]

  def own_entropy(self) -> jax.Array:
    """Returns the entropy at T = 1, float32 [C] in nats.

    `read_rows` has it of the student, in the pass that it makes anyway; this
    is a pass of its own, for the other side.
    """
    shift_CV = self.logits_CV - self.max_C[:, None]
    (moment_C,) = reduce_rows(lax.add, 0.0, (jnp.exp(shift_CV) * shift_CV,))
    return self.log_z_C - self.part.total(moment_C) * jnp.exp(-self.log_z_C)

  def log_prob(self, ids_C: jax.Array, temperature: float) -> jax.Array:
    """Returns log softmax of one id a row, at `temperature`."""
    return (self.at(ids_C) - self.max_C) / temperature - self.tempered_log_z_C

  def log_probs(self, temperature: float) -> jax.Array:
    """Returns log softmax of whole rows, at `temperature`."""
    shift_CV = self.logits_CV - self.max_C[:, None]
    return shift_CV / temperature - self.tempered_log_z_C[:, None]


def read_rows(
  student_CV: jax.Array | None,
  teacher_CV: jax.Array | None,
  part: Part,
  *,
  temperature: float,
  kl_under: str | None,
) -> tuple[LogitRows | None, LogitRows | None, jax.Array | None]:
  """Returns both sides after two reads of their rows.

  One is for maxima, one for every sum: terms of one reduction share what they
  have in common (`reduce_rows`).

  Args:
    student_CV: float32 logits, or None where the student has none.
    teacher_CV: float32 logits, or None where the teacher has none.
    part: which ids both are of.
    temperature: T of the divergence.
    kl_under: 'student', 'teacher' or None: whose probabilities weigh the
      log-ratio own/other in the third result.

  Returns:
    The student with its entropy, the teacher, and Σ p log(p/q) at T for
    p = softmax of the `kl_under` side and q = the other.
  """
  both = {"student": student_CV, "teacher": teacher_CV}
  both = {name: x_CV for name, x_CV in both.items() if x_CV is not None}
  maxima = reduce_rows(lax.max, -jnp.inf, tuple(both.values()))
  maxima = dict(zip(both, part.largest(jnp.stack(maxima)), strict=True))
  tempered = temperature != 1

  terms, shifted, weight = {}, {}, {}
  for name, x_CV in both.items():
    shift_CV = x_CV - maxima[name][:, None]
    terms[name] = jnp.exp(shift_CV)
    if name == "student":
      terms["entropy"] = terms[name] * shift_CV
    shifted[name], weight[name] = shift_CV, terms[name]
    if tempered:
      shifted[name] = shift_CV / temperature
      weight[name] = terms[name, "T"] = jnp.exp(shifted[name])
  if kl_under:
    other = "teacher" if kl_under == "student" else "student"
    ratio_CV = shifted[kl_under] - shifted[other]
    terms["kl"] = weight[kl_under] * ratio_CV
  sums = reduce_rows(lax.add, 0.0, tuple(terms.values()))
  sums = dict(zip(terms, part.total(jnp.stack(sums)), strict=True))

  sides = {}
  for name, x_CV in both.items():
    log_z_C = jnp.log(sums[name])
    entropy_C = None
    if name == "student":
      entropy_C = log_z_C - sums["entropy"] / sums[name]
    tempered_C = jnp.log(sums[name, "T"]) if tempered else log_z_C
    sides[name] = LogitRows(
      part, x_CV, maxima[name], log_z_C, tempered_C, entropy_C
    )
  kl_C = None
  if kl_under:
    own_C = sides[kl_under].tempered_log_z_C
    other_C = sides[other].tempered_log_z_C
    kl_C = sums["kl"] * jnp.exp(-own_C) + (other_C - own_C)
  return sides.get("student"), sides.get("teacher"), kl_C
