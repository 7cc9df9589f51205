"""Packs hold every trajectory whole, once, aligned and rightly weighted."""

import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from trd_jax.distill.packing import packing
from trd_jax.distill.packing.flops import BY_TOKENS, sample_flops
from trd_jax.distill.packing.layout import Sample, choose_layout
from trd_jax.model.attention.segments import segments_of
from trd_jax.model.config import ModelConfig


def make_sample(number, prompt, teacher_prompt, response, correct=None):
  # Ids that name their sample, so that a token in the wrong place shows.
  ids = np.random.default_rng(number).integers(
    1, 1000, prompt + teacher_prompt + response, dtype=np.int32
  )
  return Sample(
    key=f"s{number}",
    student_prompt=ids[:prompt],
    teacher_prompt=ids[prompt : prompt + teacher_prompt],
    response=ids[prompt + teacher_prompt :],
    correct=correct,
  )


def spread(count, seed=0, longest=60):
  rng = np.random.default_rng(seed)
  return [
    make_sample(
      i, *rng.integers(1, longest, 3).tolist(), [True, False, None][i % 3]
    )
    for i in range(count)
  ]


def prefix(rows, g, b, s):
  """What a causal model sees at position s: its segment up to there."""
  row = slice(s - rows.positions[g, b, s], s + 1)
  assert (rows.segments[g, b, row] == rows.segments[g, b, s]).all()
  return rows.tokens[g, b, row]


def unpack(batches, layout):
  """Reads the packs back as the device does: by index, slot and segment.

  Returns, by trajectory number: its prompt and inputs on each side, labels,
  weights and verdict.
  """
  found = {}
  for batch in batches:
    buffer = {}
    for p in batch.teacher:
      for g, b, s in np.argwhere(p.slot < layout.buffer_slots):
        key = (g, p.slot[g, b, s])
        assert key not in buffer
        buffer[key] = prefix(p.rows, g, b, s)
    for p in batch.student:
      for g, b, r in np.argwhere(p.slots.trajectory >= 0):
        slot = packing.Slots(*(x[g, b, r] for x in p.slots))
        entry = found.setdefault(slot.trajectory, [])
        assert slot.offset == len(entry)
        student = prefix(p.rows, g, b, slot.index)
        teacher = buffer.pop((g, slot.teacher_slot))
        entry.append((student, teacher, slot.label, slot.weight, slot.correct))
    assert not buffer
  return found


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  lengths=st.lists(
    st.tuples(*[st.integers(1, 40)] * 3), min_size=1, max_size=30
  ),
  groups=st.integers(1, 4),
  rows=st.integers(1, 3),
  row_tokens=st.sampled_from([None, 16, 64]),
  packed=st.booleans(),
  long_rows=st.sampled_from([None, 128, 4096]),
)
def test_every_token_once_after_its_own_prefix_on_both_sides(
  lengths, groups, rows, row_tokens, packed, long_rows
):
  packed = packed or long_rows is not None
  samples = [make_sample(i, *ls) for i, ls in enumerate(lengths)]
  layout = choose_layout(
    samples,
    groups=groups,
    batch_size=len(samples),
    pack_tokens=row_tokens,
    teacher_pack_tokens=row_tokens,
    rows_per_device=rows,
    packing=packed,
    long_rows=long_rows,
  )
  batches = packing.pack(samples, layout)
  most = max(p.rows.segments.max() for p in all_packs(batches))
  assert packed or most == 1
  if long_rows:
    for p in all_packs(batches):
      assert p.rows.segments.max() <= segments_of(p.rows.tokens.shape[-1])
  found = unpack(batches, layout)
  assert sorted(found) == list(range(len(samples)))
  for number, entries in found.items():
    s = samples[number]
    assert len(entries) == len(s.response)
    for t, (student, teacher, label, weight, _) in enumerate(entries):
      np.testing.assert_array_equal(
        student, np.concatenate([s.student_prompt, s.response[:t]])
      )
      np.testing.assert_array_equal(
        teacher, np.concatenate([s.teacher_prompt, s.response[:t]])
      )
      assert label == s.response[t]
      assert weight == np.float32(1 / (len(s.response) * len(samples)))


def arrays(pack):
  last = pack.slots if isinstance(pack, packing.StudentPack) else [pack.slot]
  return [*pack.rows, *last]


def all_packs(batches):
  return [p for b in batches for p in (*b.teacher, *b.student)]


def test_weights_sum_to_one_and_padding_has_none():
  samples = spread(37)
  layout = choose_layout(samples, groups=3, batch_size=37)
  packs = [p for b in packing.pack(samples, layout) for p in b.student]
  total = sum(p.slots.weight.astype(np.float64).sum() for p in packs)
  assert total == pytest.approx(1, abs=1e-6)
  for p in packs:
    assert ((p.slots.weight > 0) == (p.slots.trajectory >= 0)).all()
    assert (p.slots.correct[p.slots.trajectory < 0] == packing.UNJUDGED).all()


def test_verdicts_follow_their_trajectories():
  samples = spread(12)
  layout = choose_layout(samples, groups=2, batch_size=12)
  found = unpack(packing.pack(samples, layout), layout)
  for number, entries in found.items():
    expected = {True: 1, False: 0, None: -1}[samples[number].correct]
    assert {int(e[4]) for e in entries} == {expected}


def test_few_shapes_and_packing_is_repeatable():
  samples = spread(400, longest=200)
  layout = choose_layout(
    samples,
    groups=2,
    batch_size=32,
    pack_tokens=128,
    teacher_pack_tokens=128,
    rows_per_device=4,
  )
  shapes = set()
  for start in range(0, 400, 32):
    chunk = samples[start : start + 32]
    packs = all_packs(packing.pack(chunk, layout))
    shapes |= {tuple(a.shape for a in arrays(p)) for p in packs}
    again = all_packs(packing.pack(chunk, layout))
    for a, b in zip(packs, again, strict=True):
      for x, y in zip(arrays(a), arrays(b), strict=True):
        np.testing.assert_array_equal(x, y)
  assert len(shapes) <= len(layout.student) + len(layout.teacher) <= 6


def test_short_trajectories_share_rows():
  samples = [make_sample(i, 10, 10, 23) for i in range(32)]
  layout = choose_layout(
    samples,
    groups=1,
    batch_size=32,
    pack_tokens=128,
    teacher_pack_tokens=128,
    rows_per_device=8,
  )
  (batch,) = packing.pack(samples, layout)
  (student,) = batch.student
  assert [len(set(row) - {0}) for row in student.rows.segments[0]] == [4] * 8


def test_flops_are_shared_evenly_by_the_groups():
  samples = spread(64)
  layout = choose_layout(samples, groups=4, batch_size=64)
  work = np.zeros(4)
  for p in all_packs(packing.pack(samples, layout)):
    work += (p.rows.segments > 0).sum((1, 2))
  assert work.max() / work.mean() < 1.05


def test_a_full_teacher_buffer_makes_a_further_micro_batch():
  samples = [make_sample(i, 3, 4, 50) for i in range(8)]
  layout = choose_layout(samples, groups=2, batch_size=8)
  layout = dataclasses.replace(layout, buffer_slots=100)
  batches = packing.pack(samples, layout)
  assert len(batches) == 2
  assert len(unpack(batches, layout)) == 8


def test_nothing_is_cut_to_fit():
  samples = [make_sample(0, 5, 5, 20), make_sample(1, 5, 500, 20)]
  layout = choose_layout(samples[:1], groups=1, batch_size=1)
  with pytest.raises(ValueError, match="s1 has 519 tokens"):
    packing.pack(samples, layout)
  with pytest.raises(ValueError, match="s2 has an empty response"):
    packing.pack([make_sample(2, 5, 5, 0)], layout)


QWEN3_8B = ModelConfig(151_936, 4096, 12_288, 36, 32, 8, 128)


def test_the_flops_of_8b_are_what_its_shape_says():
  costs = sample_flops(QWEN3_8B, QWEN3_8B, rank=64, remat="full")
  # 6.946e9 linear weights, 174.6e6 of the adapter, 622e6 of the head, and
  # 294,912 FLOPs of causal attention, forward, for a squared token.
  assert costs.student_token == pytest.approx(
    6 * 6.946e9 + 8 * 174.6e6, rel=1e-3
  )
  assert costs.student_pair == 4.5 * 294_912
  assert costs.teacher_token == pytest.approx(2 * 6.946e9, rel=1e-3)
  assert costs.teacher_pair == 294_912
  assert costs.response_token == pytest.approx(6 * 622e6, rel=1e-3)
  alone = costs._replace(teacher_token=0, teacher_pair=0, response_token=0)
  assert alone.of(1080, 9420, 900) == pytest.approx(48.0e12, rel=0.01)
  alone = costs._replace(student_token=0, student_pair=0, response_token=0)
  assert alone.of(1080, 9420, 900) == pytest.approx(157.1e12, rel=0.01)


def test_policies_that_compute_less_again_cost_less():
  of = {
    remat: sample_flops(QWEN3_8B, QWEN3_8B, rank=64, remat=remat)
    for remat in ("none", "dots", "full", "attention")
  }
  none, dots, full, attention = (of[r].of(9000, 9000, 8000) for r in of)
  assert none < min(dots, attention)
  assert max(dots, attention) < full


def refined_mix(count, seed):
  """Lengths around the medians of TRD: 1,080 student, 9,420 teacher."""
  rng = np.random.default_rng(seed)
  student = np.clip(rng.lognormal(np.log(1080), 0.7, count), 200, 18_000)
  teacher = np.clip(rng.lognormal(np.log(9420), 0.6, count), 1500, 38_000)
  responses = (0.8 * np.minimum(student, teacher / 2)).astype(int)
  return [
    make_sample(i, int(s) - r, int(t) - r, r)
    for i, (s, t, r) in enumerate(zip(student, teacher, responses, strict=True))
  ]


def test_groups_are_even_in_flops_where_tokens_or_samples_are_not():
  costs = sample_flops(QWEN3_8B, QWEN3_8B, rank=64, remat="full")
  for seed in range(3):
    samples = refined_mix(128, seed)

    def ratio(by, samples=samples):
      layout = choose_layout(samples, groups=8, batch_size=128, flops=by)
      return packing.imbalance(samples, packing.pack(samples, layout), costs)

    flops, tokens = ratio(costs), ratio(BY_TOKENS)
    # Sixteen samples a group, as they come.
    load = [packing._flops(s, costs) for s in samples]
    loads = np.array(load).reshape(16, 8).sum(0)
    assert flops < 1.02
    assert flops < tokens < loads.max() / loads.mean()


def test_one_sample_a_row_takes_about_ten_lengths_and_little_padding():
  samples = refined_mix(512, 0)
  layout = choose_layout(samples, groups=2, batch_size=512, packing=False)
  for shapes in (layout.student, layout.teacher):
    assert 5 <= len(shapes) <= 10
    lengths = [shape.length for shape in shapes]
    assert lengths == sorted(set(lengths))
    assert all(length % 64 == 0 for length in lengths)
  batches = packing.pack(samples, layout)
  for packs in (batches[0].student, batches[0].teacher):
    lengths = [p.rows.tokens.shape[2] for p in packs]
    # Longest first, and packs of one length together.
    assert lengths == sorted(lengths, reverse=True)
  tokens = sum(s.teacher_length for s in samples)
  assert tokens > 0.75 * packing.padded_tokens(batches)[1]


def test_lengths_that_nothing_has_make_no_program():
  """Two lengths far apart: what lies between them is no bucket."""
  lengths = [8] * 16 + [2000] * 16
  samples = [make_sample(n, 8, 8, length) for n, length in enumerate(lengths)]
  layout = choose_layout(samples, groups=1, batch_size=8, packing=False)
  assert [len(shapes) for shapes in (layout.student, layout.teacher)] == [2, 2]
  fits = [shape.length >= 2008 for shape in layout.student]
  assert fits == [False, True]


def test_padding_to_one_length_is_a_matter_of_keys():
  samples = spread(40)
  layout = choose_layout(
    samples,
    groups=1,
    batch_size=40,
    packing=False,
    pack_tokens=200,
    teacher_pack_tokens=300,
    rows_per_device=4,
  )
  assert [(r.length, r.rows) for r in layout.student] == [(200, 4)]
  assert [(r.length, r.rows) for r in layout.teacher] == [(300, 4)]
  (batch,) = packing.pack(samples, layout)
  assert len(batch.student) == len(batch.teacher) == 10


def _of_the_paper(count, seed):
  """Samples with the paper's median lengths, y_o's in the teacher's context."""
  rng = np.random.default_rng(seed)

  def draw(median):
    return np.minimum(16_384, median * np.exp(0.6 * rng.standard_normal(count)))

  return [
    make_sample(i, 200, 840 + int(draft), max(1, int(refined)))
    for i, (draft, refined) in enumerate(
      zip(draw(7700), draw(880), strict=True)
    )
  ]


def test_long_rows_are_full_on_both_sides_in_all_groups():
  samples = _of_the_paper(512, 0)
  layout = choose_layout(samples, groups=8, batch_size=128, long_rows=16_384)
  # Few programs, whose rows a kernel's blocks divide.
  for side in (layout.student, layout.teacher):
    assert len(side) == 5
    assert all(s.rows == 1 and s.length % 128 == 0 for s in side)
  updates = [
    packing.pack(samples[start : start + 128], layout)
    for start in range(0, 512, 128)
  ]
  padded = np.sum([packing.padded_tokens(u) for u in updates], 0)
  student = sum(s.student_length for s in samples) / padded[0]
  teacher = sum(s.teacher_length for s in samples) / padded[1]
  assert student >= 0.92
  assert teacher >= 0.92
  # Groups that are dealt the same tokens cost the same.
  for start, update in zip(range(0, 512, 128), updates, strict=True):
    batch = samples[start : start + 128]
    assert packing.imbalance(batch, update, layout.flops) < 1.02


def test_an_update_is_two_runs_of_the_student():
  """As each run of a program copies all weights."""
  for seed in 0, 1:
    samples = _of_the_paper(512, seed)
    layout = choose_layout(samples, groups=8, batch_size=128, long_rows=16_384)
    for start in range(0, 512, 128):
      update = packing.pack(samples[start : start + 128], layout)
      assert sum(len(micro.student) for micro in update) == 2


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
  tokens=st.integers(0, 2000),
  lengths=st.sets(st.integers(100, 1000), min_size=1, max_size=5),
)
def test_sets_of_rows_come_cheapest_first_and_none_is_left_out(tokens, lengths):
  lengths = sorted(lengths)
  first = list(itertools.islice(packing._sets_of_rows(tokens, lengths), 20))

  def cost(numbers):
    return sum(lengths[n] for n in numbers) + packing._ROW_COST * len(numbers)

  assert all(sum(lengths[n] for n in some) >= tokens for some in first)
  assert [cost(s) for s in first] == sorted(cost(s) for s in first)
  assert len({tuple(s) for s in first}) == len(first)
  *short, longest = range(len(lengths))
  # All others that are as cheap as the dearest of these would cost.
  most = cost(first[-1])
  others = [
    [longest] * count + list(some[::-1])
    for many in range(packing._SHORT_ROWS + 1)
    for some in itertools.combinations_with_replacement(short, many)
    for count in range(most // lengths[-1] + 1)
  ]
  cheaper = [
    s
    for s in others
    if s and sum(lengths[n] for n in s) >= tokens and cost(s) < most
  ]
  assert all(s in first for s in cheaper)


def test_a_sample_longer_than_all_rows_is_refused():
  layout = choose_layout(
    spread(8, longest=40), groups=2, batch_size=8, long_rows=128
  )
  giant = make_sample(0, 5000, 3, 2)
  with pytest.raises(ValueError, match="sample s0 has 5001 tokens"):
    packing.pack([giant, *spread(3)], layout)
