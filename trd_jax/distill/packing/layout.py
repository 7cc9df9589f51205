"""What is packed, and the few static shapes that a run packs it into."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trd_jax.distill.packing.flops import BY_TOKENS, SampleFlops

# Tokens of a pack on a device where the row length is left to us.
_AUTO_PACK_TOKENS = 1024
# Slots of a device's teacher buffer: 1 GiB at D = 4096 in bfloat16.
_MAX_BUFFER_SLOTS = 131_072
# Rounding of lengths, so that small changes of the data compile nothing new.
_ROUND = 64
# Row lengths of a side where a pack is one long row, in parts of the longest.
# Any number of tokens is the sum of a few to within a sixteenth, and often of
# the longest and one other: each row is a run of the whole model, so few rows
# are better than short ones.
_PARTS = 16
_LENGTHS = (2, 4, 5, 6, 16)
_TILE = 128  # tokens that a kernel's block of queries has
# Teacher's tokens of a pack for each of the student's: nothing is kept of its
# layers for a backward pass.
_TEACHER_SHARE = 4
# Row lengths of a side where a row holds one sample, and their least ratio.
_BUCKETS = 10
_LEAST_GROWTH = 1.25


@dataclasses.dataclass(frozen=True)
class Sample:
  """One trajectory with the two contexts that score it.

  Attributes:
    key: content key of the trajectory.
    student_prompt: int32 ids, at least one.
    teacher_prompt: int32 ids, at least one.
    response: int32 ids, at least one; the end-of-turn id is its last only
      where the engine reported `stop`.
    correct: the stage-1 verdict, None where there is none.
    truncated: whether a budget ended the response.
    problem_id: the problem that it answers, where somebody asks for it.
  """

  key: str
  student_prompt: np.ndarray
  teacher_prompt: np.ndarray
  response: np.ndarray
  correct: bool | None
  truncated: bool = False
  problem_id: str = ""

  @property
  def student_length(self) -> int:
    """Counts the student's input: the last response token predicts none."""
    return len(self.student_prompt) + len(self.response) - 1

  @property
  def teacher_length(self) -> int:
    """Counts the teacher's input tokens."""
    return len(self.teacher_prompt) + len(self.response) - 1


class PackShape(NamedTuple):
  """One static shape of the student's or of the teacher's packs.

  Attributes:
    length: tokens of a row.
    rows: rows of a pack on one device (B).
    slots: response slots of a row (R); the row's length on the teacher side,
      where every position may be one.
  """

  length: int
  rows: int
  slots: int


@dataclasses.dataclass(frozen=True)
class Layout:
  """The static shapes that a run compiles, chosen from its data's lengths.

  Attributes:
    groups: shards of the batch (G).
    student: the student's shapes, shortest first; the last holds the longest
      sample.
    teacher: the teacher's shapes; none where its side is known beforehand.
    buffer_slots: slots of a group's teacher buffer (U).
    packing: whether a row holds several samples; else one.
    flops: of a sample, to share samples out by.
    long_rows: whether a pack is one long row, planned for all groups at once.
  """

  groups: int
  student: tuple[PackShape, ...]
  teacher: tuple[PackShape, ...]
  buffer_slots: int
  packing: bool = True
  flops: SampleFlops = BY_TOKENS
  long_rows: bool = False


def choose_layout(
  samples: Sequence[Sample],
  *,
  groups: int,
  batch_size: int,
  pack_tokens: int | None = None,
  teacher_pack_tokens: int | None = None,
  rows_per_device: int = 1,
  packing: bool = True,
  flops: SampleFlops = BY_TOKENS,
  long_rows: int | None = None,
) -> Layout:
  """Chooses a run's shapes so that few programs compile and rows fill well.

  A side's shortest shape has `pack_tokens` a row (or about two median samples)
  and takes most samples; each next one doubles it, for the samples that don't
  fit, with as many rows fewer. Without packing the lengths are about ten in a
  geometric row, from the shortest samples' (or `pack_tokens`) to the longest's.

  Args:
    samples: every sample of the run, at least one.
    groups: shards of the batch.
    batch_size: trajectories an optimizer batch, over all groups.
    pack_tokens: tokens of a student row, None to choose.
    teacher_pack_tokens: tokens of a teacher row, None to choose.
    rows_per_device: rows of a pack; where the row length is chosen here,
      this many times as many rows as make about 1,024 tokens.
    packing: whether a row holds several samples.
    flops: of a sample, to share samples out by.
    long_rows: the most tokens of a student pack that is one long row, as a
      kernel that skips other samples' tokens wants it; four times as many of
      a teacher's. None: rows are as short as the samples allow, which a
      processor's cache wants.
  """
  response = np.array([len(s.response) for s in samples])
  student = np.array([s.student_length for s in samples])
  teacher = np.array([s.teacher_length for s in samples])
  # A tenth more slots than the average row needs: beyond that, wide heads
  # make padding slots dearer than rows that their slots fill up.
  share = min(1.0, 1.1 * response.sum() / student.sum())
  student_shapes = []
  shapes_of = _shared_rows
  if not packing:
    batch = min(batch_size, len(samples)) / groups
    shapes_of = functools.partial(_own_rows, batch=batch)
  if long_rows is not None:
    batch = min(batch_size, len(samples)) / groups
    pack_tokens = pack_tokens or long_rows
    teacher_pack_tokens = teacher_pack_tokens or _TEACHER_SHARE * long_rows
    shapes_of = functools.partial(_long_rows, batch=batch)
  for shape in shapes_of(student, pack_tokens, rows_per_device):
    longest = int(response[student <= shape.length].max(initial=1))
    wanted = _round_up(math.ceil(share * shape.length)) if packing else 1
    slots = min(shape.length, max(longest, wanted))
    student_shapes.append(shape._replace(slots=slots))
  expected = 1.25 * response.mean() * min(batch_size, len(samples)) / groups
  slots = min(_MAX_BUFFER_SLOTS, _round_up(math.ceil(expected)))
  return Layout(
    groups=groups,
    student=tuple(student_shapes),
    teacher=shapes_of(teacher, teacher_pack_tokens, rows_per_device),
    buffer_slots=max(slots, _round_up(int(response.max()))),
    packing=packing,
    flops=flops,
    long_rows=long_rows is not None,
  )


def _round_up(length: int, to: int = _ROUND) -> int:
  return -(-length // to) * to


def _shared_rows(
  lengths: np.ndarray, row_tokens: int | None, rows: int
) -> tuple[PackShape, ...]:
  """Returns shapes of several samples a row, each at most twice the last."""
  longest = int(lengths.max())
  base = row_tokens
  if base is None:
    base = _round_up(2 * int(np.median(lengths)))
    if longest <= 2 * base:
      # One program more costs more than a few longer rows.
      base = max(base, _round_up(longest))
    rows *= max(1, _AUTO_PACK_TOKENS // base)
  tokens = rows * base
  shapes = [PackShape(base, rows, base)]
  while (length := shapes[-1].length) < longest:
    length = min(2 * length, max(_round_up(longest), length + 1))
    shapes.append(PackShape(length, max(1, tokens // length), length))
  return tuple(shapes)


def _long_rows(
  lengths: np.ndarray, row_tokens: int | None, rows: int, *, batch: float
) -> tuple[PackShape, ...]:
  """Returns shapes of one long row, whose lengths are parts of the longest.

  A batch is cut into as many of the longest as it fills and a few others, which
  together have its tokens to within the shortest.
  """
  del rows
  assert row_tokens is not None
  least = int(lengths.max())
  # No longer than what comes together of a batch.
  longest = max(least, min(row_tokens, math.ceil(batch * lengths.mean())))
  part = _round_up(longest, _PARTS * _TILE) // _PARTS
  return tuple(PackShape(n * part, 1, n * part) for n in _LENGTHS)


def _own_rows(
  lengths: np.ndarray, row_tokens: int | None, rows: int, *, batch: float
) -> tuple[PackShape, ...]:
  """Returns shapes of one sample a row, `batch` of a group at a time."""
  longest = int(lengths.max())
  base = row_tokens
  if base is None:
    base = _round_up(int(np.quantile(lengths, 0.05)))
    rows *= max(1, _AUTO_PACK_TOKENS // base)
  tokens = rows * base
  growth = max(_LEAST_GROWTH, (longest / base) ** (1 / (_BUCKETS - 1)))
  sizes = [base]
  while sizes[-1] < longest:
    grown = _round_up(math.ceil(growth * sizes[-1]))
    sizes.append(min(grown, max(_round_up(longest), sizes[-1] + 1)))
  # More rows than come together of a length would be blank.
  shares = np.diff([0, *((lengths <= size).mean() for size in sizes)])
  return tuple(
    PackShape(size, max(1, min(tokens // size, math.ceil(share * batch))), size)
    for size, share in zip(sizes, shares, strict=True)
    if share  # or a program would be compiled for no sample
  )
