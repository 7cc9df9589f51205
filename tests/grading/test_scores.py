"""What an evaluation's figures say, from rows that are made up."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trd_jax.experiment import shards
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import GradedSample
from trd_jax.experiment.run_dir import RunDir
from trd_jax.grading import estimators, scores

DATA = {"rows": 3, "files": []}


def sample(problem, number, correct, **changes):
  fields = {
    "key": f"{problem}-{number}",
    "benchmark": "b",
    "problem_id": problem,
    "sample": number,
    "prompt_sha256": "0",
    "response_ids": [1, 2],
    "text": "",
    "num_tokens": 2,
    "finish_reason": "stop",
    "truncated": False,
    "seed": 0,
    "thinking": None,
    "sampling": "{}",
    "model": "m",
    "model_revision": "r",
    "prompt_version": "1",
    "correct": correct,
    "reason": "match" if correct else "mismatch",
    "extracted": None,
    "grader_version": "math-1",
  }
  return GradedSample(**fields | changes)


def rows_of(counts, k, **changes):
  return [
    sample(f"p{i}", j, j < count, **changes)
    for i, count in enumerate(counts)
    for j in range(k)
  ]


counts_of_k = st.integers(1, 9).flatmap(
  lambda k: st.tuples(
    st.just(k), st.lists(st.integers(0, k), min_size=1, max_size=6)
  )
)


@settings(max_examples=40, deadline=None)
@given(counts_of_k)
def test_figures_are_of_the_rows_in_any_order(drawn):
  k, counts = drawn
  rows = rows_of(counts, k)
  found = scores.figures(rows, DATA)
  assert found["avg_at_k"] == pytest.approx(sum(counts) / (k * len(counts)))
  assert (found["n"], found["k"]) == (len(counts), k)
  assert found["graders"] == {"math-1": len(rows)}
  assert scores.figures(rows[::-1], DATA) == found
  for point, value in found["pass_curve"].items():
    low, high = found["pass_curve_intervals"][point]
    assert low - 1e-9 <= value <= high + 1e-9 or len(counts) < 4
    each = estimators.per_question_pass(counts, k, int(point))
    assert value == pytest.approx(each.mean())
    alone = estimators.mean_intervals(each)
    assert (low, high) == pytest.approx(alone)
  curve = list(found["pass_curve"].values())
  assert curve == sorted(curve)
  assert found["pass_curve"]["1"] == pytest.approx(found["avg_at_k"])
  assert list(found["pass_curve"])[-1] == str(k)


def test_shares_are_of_samples_and_by_reason():
  reasons = ("match", "no_box", "no_code", "unparsed", "timeout", "ungradable")
  rows = [
    sample(
      "p",
      i,
      {"match": True, "timeout": None, "ungradable": None}.get(reason, False),
      reason=reason,
      truncated=i < 3,
    )
    for i, reason in enumerate(reasons)
  ]
  found = scores.figures(rows, DATA)
  shares = {key: 6 * found[key] for key in scores.SHARES}
  assert shares == pytest.approx(
    {
      "truncated_share": 3,
      "no_box_share": 2,
      "unparsed_share": 1,
      "timeout_share": 1,
      "unjudged_share": 2,
    }
  )


@pytest.mark.parametrize("k", range(1, 40))
def test_every_count_is_in_one_bucket(k):
  ranges = estimators.bucket_ranges(k)
  inside = [c for low, high in ranges.values() for c in range(low, high + 1)]
  assert inside == list(range(k + 1))


def test_the_buckets_of_sixteen_samples_are_the_papers():
  assert estimators.bucket_ranges(16) == {
    "B0": (0, 0),
    "B1-8": (1, 8),
    "B9-16": (9, 16),
  }


@settings(max_examples=40, deadline=None)
@given(counts_of_k, st.randoms())
def test_buckets_part_the_questions_and_add_up(drawn, random):
  k, counts = drawn
  base = {f"p{i}": [random.random() < 0.4 for _ in range(5)] for i in range(9)}
  found = scores.figures(rows_of(counts, k), DATA, base)
  parts = found["buckets"].values()
  assert sum(part["n"] for part in parts) == len(counts)
  total = sum(part["n"] * part.get("avg_at_k", 0) for part in parts)
  assert total / len(counts) == pytest.approx(found["avg_at_k"])
  # By the base model's samples, not by the model's own.
  solved = [sum(base[f"p{i}"]) for i in range(len(counts))]
  ranges = ((0, 0), (1, 2), (3, 5))
  assert [part["n"] for part in parts] == [
    sum(low <= c <= high for c in solved) for low, high in ranges
  ]


def test_a_question_without_base_samples_is_named():
  with pytest.raises(UserError, match=r"no base samples .* p1 for one"):
    scores.figures(rows_of([1, 1], 2), DATA, {"p0": [True]})


def run_of(counts, k, **changes):
  return {"b": scores.figures(rows_of(counts, k, **changes), DATA)}


def test_a_comparison_turns_round_with_its_sides():
  one, two = run_of([0, 1, 4, 2], 4), run_of([2, 1, 4, 4], 4)
  there, back = (
    scores.compare(a, b)["b"]["paired_difference"]
    for a, b in ((one, two), (two, one))
  )
  assert there["avg_at_k"] == pytest.approx(-4 / 16)
  assert back["avg_at_k"] == pytest.approx(4 / 16)
  low, high = there["avg_at_k_interval"]
  assert back["avg_at_k_interval"] == pytest.approx([-high, -low])
  same = scores.compare(one, one)["b"]["paired_difference"]
  low, high = same["avg_at_k_interval"]
  assert low < same["avg_at_k"] == 0 < high
  table = scores.comparison_table(scores.compare(two, one), "new", "old")
  assert "old" in table.split("\n")[0].split("new")[0]
  assert "25.0" in table


@pytest.mark.parametrize(
  ("other", "message"),
  [
    (run_of([1, 1], 2), "other questions"),
    (run_of([1, 1, 1], 3), "k=2 in one run and n=3, k=3"),
    (
      run_of([1, 1, 1], 2, grader_version="math-0"),
      r"math-1 and by math-0; .* --regrade",
    ),
    ({"c": run_of([1, 1, 1], 2)["b"]}, "no benchmark is in both"),
  ],
)
def test_runs_that_were_not_asked_the_same_are_not_compared(other, message):
  with pytest.raises(UserError, match=message):
    scores.compare(run_of([1, 1, 1], 2), other)


def test_two_thinking_modes_are_not_compared_without_a_word():
  on, off = (run_of([1, 2], 2, thinking=mode) for mode in (True, False))
  old = run_of([1, 2], 2)
  assert on["b"]["thinking"] is True
  assert old["b"]["thinking"] is None
  for one, two in ((on, off), (off, on)):
    with pytest.raises(UserError, match=r"thinking (on|off) in one run and"):
      scores.compare(one, two)
  both = scores.compare(on, off, across_modes=True)["b"]
  assert both["mine"]["thinking"] is True
  assert both["other"]["thinking"] is False
  # An earlier version doesn't say: that is told.
  scores.compare(on, old)
  assert scores.describe_modes(old) == "thinking not recorded"
  assert scores.describe_modes(off) == "thinking off"
  assert "thinking" in scores.table(on)
  # Part of the rows are an earlier version's.
  rows = rows_of([1], 2)
  rows += rows_of([2], 2, thinking=False, problem_id="q")
  assert scores.figures(rows, DATA)["thinking"] is False


def test_other_words_are_not_compared():
  mine, other = (run_of([1, 2], 2, prompt_version=v) for v in ("card", "1"))
  assert mine["b"]["prompt_version"] == "card"
  assert "asked as" in scores.table(mine)
  with pytest.raises(UserError, match=r"other words in one run \(card\)"):
    scores.compare(mine, other)
  del other["b"]["prompt_version"]  # as an earlier version's summary
  scores.compare(mine, other)
  assert "asked as" not in scores.table(other)


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"truncated": True, "finish_reason": "length"}, "100% .* cut off"),
    ({"reason": "no_box"}, "100% .* hold no answer"),
    ({"reason": "no_code"}, "100% .* hold no answer"),
    ({}, None),
  ],
)
def test_a_benchmark_that_was_hardly_answered_is_warned_of(changes, says):
  rows = rows_of([0, 0, 0], 4, **changes)
  summary = {"b": scores.figures(rows, DATA)}
  lines = list(scores.without_answers(summary))
  assert len(lines) == (says is not None)
  for line in lines:
    assert line.startswith("warning: ")
    assert re.search(says or "", line)
  # One sample in four that says something is an answer.
  some = [sample("q", n, True) for n in range(4)]
  mixed = {"b": scores.figures(rows[:8] + some, DATA)}
  assert not list(scores.without_answers(mixed))


def test_the_table_has_every_figure():
  base = {"p0": [False] * 4, "p1": [True] * 4}
  found = scores.figures(rows_of([0, 2], 4), DATA, base)
  table = scores.table({"b": found})
  for text in ("b (n=2)", "Avg@4", "Pass@2", "B0 (n=1)", "B1-2 (n=0)"):
    assert text in table
  assert "no question" in table
  assert "truncated 0.0" in table
  assert scores.without_verdicts({"b": found})["b"].keys() == found.keys() - {
    "verdicts"
  }


def test_replaced_rows_are_seen_whole_at_any_moment(tmp_path, monkeypatch):
  old = rows_of([0, 0], 3)
  with shards.ShardWriter(tmp_path, GradedSample, rows_per_shard=2) as writer:
    for row in old:
      writer.add(row)
  assert read(tmp_path) == old
  new = rows_of([3, 3], 3)
  # Killed before it is there: the old ones.
  with monkeypatch.context() as patch:
    patch.setattr(shards.Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      shards.replace_rows(tmp_path, GradedSample, new)
  assert read(tmp_path) == old
  # Killed before the old ones are gone: the new ones hide them.
  with monkeypatch.context() as patch:
    patch.setattr(shards.Path, "unlink", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      shards.replace_rows(tmp_path, GradedSample, new)
  assert len(list(tmp_path.glob("*.parquet"))) > 1
  assert read(tmp_path) == new
  # And again, with rows that a later writer has added.
  with shards.ShardWriter(tmp_path, GradedSample) as writer:
    writer.add(sample("p9", 0, True))
  assert read(tmp_path) == [*new, sample("p9", 0, True)]
  shards.replace_rows(tmp_path, GradedSample, old)
  assert read(tmp_path) == old
  assert len(list(tmp_path.glob("*.parquet"))) == 1


def read(folder):
  from trd_jax.experiment import records

  table = shards.read_shards(folder, GradedSample)
  return records.from_table(GradedSample, table)


def test_base_was_asked_in_the_same_words(tmp_path):
  run_dir, base = RunDir(tmp_path), "evaluate/base"
  with run_dir.shard_writer(base, GradedSample) as writer:
    for row in rows_of([1, 1], 2, prompt_sha256="old"):
      writer.add(row)
  asked = {("b", "p0"): "old", ("b", "p1"): "new"}
  scores.check_prompts(asked, run_dir)  # it isn't finished
  run_dir.mark_done(base, {})
  with pytest.raises(UserError, match="b, problem p1 was put to base after"):
    scores.check_prompts(asked, run_dir)
  scores.check_prompts({("b", "p0"): "old", ("c", "p1"): "new"}, run_dir)
  # Of an evaluation that was begun in other words there may be rows left.
  with run_dir.shard_writer(base, GradedSample) as writer:
    writer.add(sample("p1", 9, True, prompt_sha256="new"))
  run_dir.mark_done(base, {})
  scores.check_prompts(asked, run_dir)
