"""Trajectories of one optimizer batch as arrays of few, fixed shapes.

A micro-batch is a list of teacher packs, which fill a buffer of hidden
states, and a list of student packs, which read it: the two sides are packed
on their own, because their prompts, and so their lengths, differ.

The buffer is where both meet. Here trajectory a has the response a0 a1 after 6
tokens of the teacher's context and 2 of the student's, and b has b0 b1 b2 after
1 and 2; `.` is a token of a context, and G = 1:

    teacher's pack, B = 1, T = 10
      tokens_GBT           .  .  .  .  .  .  a0 .  b0 b1
      predicts                            a0 a1 b0 b1 b2
      slot_GBT             6  6  6  6  6  0  1  2  3  4    6 = U: dropped
                                          |  |  |  |  |
                    buffer_GUD[0].at[slot_GBT.reshape(-1)].set(hidden_TD)
                                          v  v  v  v  v
    buffer, U = 6    predicts             a0 a1 b0 b1 b2 (free)
                     slot                 0  1  2  3  4  5

    student's pack, B = 2 rows of T = 4 and R = 3, so 6 slots in all
      tokens_GBT           .  .  b0 b1    .  .  a0 pad
      index_GBR            1  2  3        1  2  0          in its own row
      label                b0 b1 b2       a0 a1 pad
      teacher_slot         2  3  4        0  1  0          x_GU[0][teacher_slot]
      weight               w  w  w        w' w' 0          pad reads slot 0

Both sides of a slot then predict the same token: the student's hidden state is
`row[index]`, the teacher's `buffer[teacher_slot]`.

Shape key: G groups (shards of the batch, one a data-parallel device), B rows
of a pack on one device, T tokens of a row, R response slots of a student row, U
slots of a group's teacher buffer.
"""

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from trd_jax.distill.packing.flops import SampleFlops
from trd_jax.distill.packing.layout import Layout, PackShape, Sample
from trd_jax.model.attention.segments import segments_of

# A slot of the packs' `correct` where the verdict is neither right nor wrong.
UNJUDGED = -1
# Exchanges of samples between groups: a batch of 128 on 8 takes about 20.
_EXCHANGES = 1000
# What a pack costs beside its tokens, in tokens of an H100 that learns: weights
# are copied, and a short row's products are small.
_ROW_COST = 512
# Rows of a pack's side that are shorter than the longest.
_SHORT_ROWS = 3


class Rows(NamedTuple):
  """Inputs of a model, several trajectories to a row; all int32 `[G, B, T]`.

  Attributes:
    tokens: ids, 0 in padding.
    positions: each trajectory's own from 0.
    segments: from 1 in each row, 0 in padding.
  """

  tokens: np.ndarray
  positions: np.ndarray
  segments: np.ndarray


class TeacherPack(NamedTuple):
  """Rows of the teacher and where their hidden states go.

  Attributes:
    rows: `[G, B, T]`.
    slot: int32 `[G, B, T]` slot of the group's buffer that the position's
      hidden state belongs to; U, one past the end, where it predicts no
      response token.
  """

  rows: Rows
  slot: np.ndarray


class Slots(NamedTuple):
  """Response tokens, one a slot; a trajectory's are consecutive, in order.

  Padding slots have weight 0, trajectory -1 and read position 0.

  Attributes:
    index: int32 `[G, B, R]`, the position in the row whose hidden state
      predicts the slot's token: `prompt_len - 1 + t` from the trajectory's
      start.
    teacher_slot: int32 `[G, B, R]`, the same token in the group's buffer.
    label: int32 `[G, B, R]`, the response token.
    weight: float32 `[G, B, R]`, what the token counts in the loss, see `pack`.
    trajectory: int32 `[G, B, R]`, the trajectory's number in the batch.
    offset: int32 `[G, B, R]`, the token's number t in its response.
    correct: int32 `[G, B, R]`, stage-1 verdict: 1, 0 or UNJUDGED.
  """

  index: np.ndarray
  teacher_slot: np.ndarray
  label: np.ndarray
  weight: np.ndarray
  trajectory: np.ndarray
  offset: np.ndarray
  correct: np.ndarray


class StudentPack(NamedTuple):
  """Rows of the student `[G, B, T]` and their response slots `[G, B, R]`."""

  rows: Rows
  slots: Slots


class MicroBatch(NamedTuple):
  """What fills the teacher's buffer once, and student packs that read it.

  Attributes:
    teacher: packs whose hidden states go there; none where the layout has no
      shapes for them.
    student: the packs.
    buffer: its contents where they are known, a tree of host arrays
      `[G, U, ...]`; None where the teacher's packs make them.
  """

  teacher: list[TeacherPack]
  student: list[StudentPack]
  buffer: Any = None


def pack(
  samples: Sequence[Sample], layout: Layout, mean: str = "trajectory"
) -> list[MicroBatch]:
  """Packs one optimizer batch into the layout's shapes, the same every time.

  Dearest first, each trajectory goes to the group with the fewest FLOPs so far
  (longest processing time first) and there, on each side, into the first row
  with room (first-fit decreasing), or without packing into one of its own.
  A batch whose responses overflow the teacher buffer becomes several
  micro-batches. The weights of all slots together sum to 1.

  Args:
    samples: the whole optimizer batch.
    layout: the run's shapes.
    mean: 'trajectory' weighs a token by 1 / (|y| · trajectories of the batch);
      'token' all alike, by 1 / tokens of the batch.

  Raises:
    ValueError: a sample is longer than the layout's longest row, or has an
      empty prompt or response.
  """
  for s in samples:
    if not (len(s.student_prompt) and len(s.teacher_prompt)):
      raise ValueError(f"sample {s.key} has an empty prompt")
    if not len(s.response):
      raise ValueError(f"sample {s.key} has an empty response")
  numbered = sorted(
    enumerate(samples),
    key=lambda item: (-_flops(item[1], layout.flops), item[0]),
  )
  # A part's weights are of the whole batch: so parts add up, however it is cut.
  tokens = sum(len(s.response) for s in samples)
  weight_of = {
    "trajectory": lambda length: 1 / (length * len(samples)),
    "token": lambda length: 1 / tokens,
  }[mean]
  for parts in range(1, len(samples) + 1):
    dealt = _deal(numbered, parts, layout)
    if layout.long_rows:
      dealt = [_evened(hands) for hands in dealt]
    if all(
      sum(len(s.response) for _, s in group) <= layout.buffer_slots
      for part in dealt
      for group in part
    ):
      return [_micro_batch(part, layout, weight_of) for part in dealt]
  raise ValueError(
    f"a response exceeds the teacher buffer's {layout.buffer_slots} slots"
  )


def blank(layout: Layout) -> MicroBatch:
  """Returns a pack of each shape that the layout has, all padding."""
  rows = [[] for _ in range(layout.groups)]
  return MicroBatch(
    [
      _teacher_pack(rows, shape, layout.buffer_slots)
      for shape in layout.teacher
    ],
    [_student_pack(rows, shape, float) for shape in layout.student],
  )


def padded_tokens(batches: Sequence[MicroBatch]) -> tuple[int, int]:
  """Counts the positions that both models compute, padding included."""
  return (
    sum(p.rows.tokens.size for m in batches for p in m.student),
    sum(p.rows.tokens.size for m in batches for p in m.teacher),
  )


def imbalance(
  samples: Sequence[Sample], batches: Sequence[MicroBatch], flops: SampleFlops
) -> float:
  """Returns the FLOPs of the group that has most over the groups' mean.

  1 is even; at more, the other groups wait for that one.

  Args:
    samples: the optimizer batch that was packed.
    batches: what `pack` made of it.
    flops: of a sample.
  """
  load = np.zeros(batches[0].student[0].rows.tokens.shape[0])
  for batch in batches:
    for packed in batch.student:
      for g, trajectory in enumerate(packed.slots.trajectory):
        numbers = np.unique(trajectory[trajectory >= 0])
        load[g] += sum(_flops(samples[i], flops) for i in numbers)
  return float(load.max() / load.mean())


def _flops(sample: Sample, flops: SampleFlops) -> float:
  return flops.of(
    sample.student_length, sample.teacher_length, len(sample.response)
  )


def _deal(numbered, parts, layout):
  """Deals numbered samples, dearest first, to the group with the fewest FLOPs.

  Returns the groups' hands of every part; a group's load goes on from part
  to part, since nothing waits in between.
  """
  load = [0.0] * layout.groups
  dealt = []
  for part in range(parts):
    hands = [[] for _ in range(layout.groups)]
    # Every `parts`-th rather than a stretch: so each part has dear samples, and
    # cheap ones to even them out with.
    for number, sample in numbered[part::parts]:
      g = load.index(min(load))
      hands[g].append((number, sample))
      load[g] += _flops(sample, layout.flops)
    dealt.append(hands)
  return dealt


def _evened(hands):
  """Exchanges samples until no group has many more tokens than the others.

  A pack has the same shape in all groups, so whatever the fullest group has
  more of, on either side, the others pad. Dealt by FLOPs, groups differ by
  tens of percent on the side that takes few of them; samples of about the same
  cost, exchanged, make both sides alike.

  Args:
    hands: the `(number, sample)` of each group.
  """
  hands = [list(hand) for hand in hands]
  sizes = [
    np.array(
      [(s.student_length, s.teacher_length) for _, s in hand], float
    ).reshape(-1, 2)
    for hand in hands
  ]
  load_G2 = np.array([size.sum(0) for size in sizes])
  mean_2 = np.maximum(load_G2.mean(0), 1.0)
  # Each exchange takes the fullest group's best one. It lowers the sum of
  # squares, so this ends; the bound is for batches of thousands.
  for _ in range(_EXCHANGES):
    excess_G2 = load_G2 / mean_2 - 1
    g = int(excess_G2.max(1).argmax())
    best, found = -1e-9, None
    for k in range(len(hands)):
      if k == g or not (len(hands[g]) and len(hands[k])):
        continue
      moved = (sizes[g][:, None] - sizes[k][None]) / mean_2
      gain = ((excess_G2[g] - moved) ** 2 - excess_G2[g] ** 2).sum(-1)
      gain += ((excess_G2[k] + moved) ** 2 - excess_G2[k] ** 2).sum(-1)
      i, j = np.unravel_index(gain.argmin(), gain.shape)
      if gain[i, j] < best:
        best, found = gain[i, j], (k, i, j)
    if found is None:
      break
    k, i, j = found
    hands[g][i], hands[k][j] = hands[k][j], hands[g][i]
    change = sizes[g][i] - sizes[k][j]
    sizes[g][i], sizes[k][j] = sizes[k][j].copy(), sizes[g][i].copy()
    load_G2[g] -= change
    load_G2[k] += change
  return hands


class _Row:
  """A row that is being filled."""

  def __init__(self, number: int, shape: PackShape):
    self.number = number
    self.length = shape.length
    self.tokens_left = shape.length
    self.slots_left = shape.slots
    self.items = []

  def takes(self, tokens: int, slots: int) -> bool:
    return tokens <= self.tokens_left and slots <= self.slots_left

  def take(self, item, tokens: int, slots: int) -> bool:
    if not self.takes(tokens, slots):
      return False
    self.tokens_left -= tokens
    self.slots_left -= slots
    self.items.append(item)
    return True


def _first_fit(group, shapes, length_of, packing):
  """Fills rows with one group's `(number, sample, buffer_offset)` items.

  Returns the rows of each shape.
  """
  rows = []
  # Longest first, by this side's lengths: a group was dealt out by FLOPs of
  # both sides. The number settles ties, so that a batch always packs alike.
  order = sorted(group, key=lambda item: (-length_of(item[1]), item[0]))
  for item in order:
    need = length_of(item[1]), len(item[1].response)
    if packing and any(row.take(item, *need) for row in rows):
      continue
    # A new row is of the shortest shape that takes it.
    for i, shape in enumerate(shapes):
      row = _Row(i, shape)
      if row.take(item, *need):
        rows.append(row)
        break
    else:
      raise ValueError(
        f"sample {item[1].key} has {need[0]} tokens and the longest row"
        f" {shapes[-1].length}"
      )
  return [
    [row.items for row in rows if row.number == i] for i in range(len(shapes))
  ]


def _fit_long_rows(groups, shapes, length_of):
  """Cuts all groups' items into the same few long rows; returns rows by shape.

  Of the sets of rows that have the tokens of the fullest group the cheapest is
  tried first. A group's longest sample goes first, each into the fullest row
  that still takes it (best-fit decreasing).
  """
  ordered = [
    sorted(group, key=lambda item: (-length_of(item[1]), item[0]))
    for group in groups
  ]
  longest = shapes[-1].length
  for item in (items[0] for items in ordered if items):
    if length_of(item[1]) > longest:
      raise ValueError(
        f"sample {item[1].key} has {length_of(item[1])} tokens and the longest"
        f" row {longest}"
      )
  fullest = max(sum(length_of(i[1]) for i in items) for items in ordered)
  # It ends: with a longest row for each sample all fit.
  for numbers in _sets_of_rows(fullest, [shape.length for shape in shapes]):
    found = [_best_fit(i, shapes, numbers, length_of) for i in ordered]
    fitted = [rows for rows in found if rows is not None]
    if len(fitted) == len(found):
      break
  return [
    [
      [row.items for row in rows if row.number == number]
      for number in range(len(shapes))
    ]
    for rows in fitted
  ]


def _sets_of_rows(tokens: int, lengths: Sequence[int]) -> Iterator[list[int]]:
  """Yields sets of rows that have so many tokens or more, cheapest first.

  A set is any number of the longest and at most `_SHORT_ROWS` others, each by
  its number in `lengths`, the longest first.
  """
  *short, longest = range(len(lengths))
  heap = []

  def add(others, count):
    total = sum(lengths[n] for n in others) + count * lengths[longest]
    cost = total + _ROW_COST * (len(others) + count)
    heapq.heappush(heap, (cost, count, others))

  for many in range(_SHORT_ROWS + 1):
    for others in itertools.combinations_with_replacement(short, many):
      left = tokens - sum(lengths[n] for n in others)
      add(others, max(not others, math.ceil(left / lengths[longest])))
  while True:
    _, count, others = heapq.heappop(heap)
    yield [longest] * count + list(others[::-1])
    add(others, count + 1)


def _best_fit(items, shapes, numbers, length_of):
  """Returns rows of the shapes `numbers` with all items; None: too few."""
  rows = [_Row(number, shapes[number]) for number in numbers]
  for item in items:
    need = length_of(item[1]), len(item[1].response)
    fitting = [
      row
      for row in rows
      if row.takes(*need) and len(row.items) < segments_of(row.length)
    ]
    if not fitting:
      return None
    min(fitting, key=lambda row: row.tokens_left).take(item, *need)
  return rows


def _micro_batch(dealt, layout, weight_of):
  # Buffer slots are given out before either side is packed: they are all that
  # the two sides have to agree on.
  groups = []
  for hand in dealt:
    offset, placed = 0, []
    for number, sample in hand:
      placed.append((number, sample, offset))
      offset += len(sample.response)
    groups.append(placed)

  def rows(shapes, length_of):
    # No shapes: a side that is known beforehand has no rows.
    if shapes and layout.long_rows:
      return _fit_long_rows(groups, shapes, length_of)
    return [
      _first_fit(g, shapes, length_of, layout.packing) for g in groups if shapes
    ]

  student = rows(layout.student, lambda s: s.student_length)
  teacher = rows(layout.teacher, lambda s: s.teacher_length)
  return MicroBatch(
    teacher=[
      _teacher_pack(rows, shape, layout.buffer_slots)
      for rows, shape in _cut(teacher, layout.teacher)
    ],
    student=[
      _student_pack(rows, shape, weight_of)
      for rows, shape in _cut(student, layout.student)
    ],
  )


def _cut(by_group, shapes):
  """Cuts every group's rows into packs, the longest shape's first."""
  for i, shape in reversed(list(enumerate(shapes))):
    # As many packs as the fullest group needs; the others' are padded, for a
    # program runs on all groups at once.
    most = max(len(rows[i]) for rows in by_group)
    for start in range(0, most, shape.rows):
      stop = start + shape.rows
      yield [rows[i][start:stop] for rows in by_group], shape


def _blank(groups, shape, width, count, dtype: DTypeLike = np.int32, fill=0):
  return [
    np.full((groups, shape.rows, width), fill, dtype) for _ in range(count)
  ]


def _lay(rows, arrays, prompt_of):
  """Writes inputs into tokens, positions and segments.

  Yields `(group, row, start, item)` where the item's inputs begin in its row.
  """
  tokens, positions, segments = arrays
  for g, group_rows in enumerate(rows):
    for r, items in enumerate(group_rows):
      start = 0
      for segment, item in enumerate(items, 1):
        # Without the last token: what it would predict is nobody's.
        ids = np.concatenate([prompt_of(item[1]), item[1].response[:-1]])
        at = (g, r, slice(start, start + len(ids)))
        tokens[at] = ids
        positions[at] = np.arange(len(ids))
        segments[at] = segment
        yield g, r, start, item
        start += len(ids)


def _teacher_pack(rows, shape, buffer_slots) -> TeacherPack:
  inputs = _blank(len(rows), shape, shape.length, 3)
  (slot,) = _blank(len(rows), shape, shape.length, 1, fill=buffer_slots)
  for g, r, start, item in _lay(rows, inputs, lambda s: s.teacher_prompt):
    _, sample, offset = item
    first = start + len(sample.teacher_prompt) - 1
    length = len(sample.response)
    slot[g, r, first : first + length] = offset + np.arange(length)
  return TeacherPack(Rows(*inputs), slot)


def _student_pack(rows, shape, weight_of) -> StudentPack:
  groups = len(rows)
  inputs = _blank(groups, shape, shape.length, 3)
  index, teacher_slot, label, offsets = _blank(groups, shape, shape.slots, 4)
  (weight,) = _blank(groups, shape, shape.slots, 1, np.float32)
  (trajectory,) = _blank(groups, shape, shape.slots, 1, fill=-1)
  (correct,) = _blank(groups, shape, shape.slots, 1, fill=UNJUDGED)
  used = np.zeros((groups, shape.rows), int)
  for g, r, start, item in _lay(rows, inputs, lambda s: s.student_prompt):
    number, sample, offset = item
    length = len(sample.response)
    t = np.arange(length)
    at = (g, r, slice(used[g, r], used[g, r] + length))
    used[g, r] += length
    index[at] = start + len(sample.student_prompt) - 1 + t
    teacher_slot[at] = offset + t
    label[at] = sample.response
    weight[at] = weight_of(length)
    trajectory[at] = number
    offsets[at] = t
    correct[at] = UNJUDGED if sample.correct is None else sample.correct
  slots = Slots(
    index, teacher_slot, label, weight, trajectory, offsets, correct
  )
  return StudentPack(Rows(*inputs), slots)
