"""Estimators: held to brute force, to exact theory, and to their coverage."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trd_jax.experiment.errors import UserError
from trd_jax.grading import estimators


@st.composite
def counts_and_n(draw, max_n=10, max_questions=12):
  n = draw(st.integers(1, max_n))
  counts = draw(st.lists(st.integers(0, n), min_size=1, max_size=max_questions))
  return counts, n


@given(counts_and_n(max_n=8, max_questions=4), st.data())
@settings(deadline=None)
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(case, data):
  counts, n = case
  k = data.draw(st.integers(1, n))
  shares = []
  for c in counts:
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    shares.append(Fraction(sum(map(any, subsets)), len(subsets)))
  expected = float(sum(shares) / len(shares))
  assert estimators.pass_at_k(counts, n, k) == pytest.approx(
    expected, abs=1e-15
  )


@given(st.integers(1, 7), st.integers(0, 10), st.data())
def test_pass_at_k_is_unbiased(n, tenths, data):
  k = data.draw(st.integers(1, n))
  p = tenths / 10
  mean = sum(
    math.comb(n, c)
    * p**c
    * (1 - p) ** (n - c)
    * estimators.pass_at_k([c], n, k)
    for c in range(n + 1)
  )
  assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize("n", [16, 128, 1200])
def test_pass_at_k_is_stable_where_binomials_overflow(n):
  for k in (1, n // 2, n - 1, n):
    for c in (0, 1, n // 3, n - 1, n):
      exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
      value = estimators.pass_at_k([c], n, k)
      assert value == pytest.approx(float(exact), rel=1e-9, abs=1e-12)


@given(counts_and_n())
def test_the_ends_of_the_curve_are_avg_and_solved_at_all(case):
  counts, n = case
  curve = estimators.pass_curve(counts, n)
  assert curve["1"] == pytest.approx(estimators.avg_at_k(counts, n))
  assert curve[str(n)] == pytest.approx(np.mean(np.array(counts) > 0))
  values = [curve[key] for key in sorted(curve, key=int)]
  assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))


def test_the_curve_has_the_powers_of_two_and_n():
  assert list(estimators.pass_curve([1, 2], 12)) == ["1", "2", "4", "8", "12"]
  assert list(estimators.pass_curve([1, 2], 16)) == ["1", "2", "4", "8", "16"]


def test_the_bootstrap_resamples_whole_questions():
  # Two questions, one always right, one never: a resample's mean is 0, 1/2
  # or 1 with chance 1/4, 1/2, 1/4, however many samples each has.
  scores = estimators.per_question_avg([16, 0], 16)
  low, high = estimators.bootstrap_interval(scores, resamples=4000)
  assert (low, high) == (0.0, 1.0)
  low, high = estimators.bootstrap_interval(scores, resamples=4000, level=0.4)
  assert (low, high) == (0.5, 0.5)


def test_the_bootstrap_agrees_with_resampling_one_by_one():
  scores = np.random.default_rng(3).random((7, 2))
  generator = np.random.default_rng(11)
  draws = generator.integers(0, 7, size=(500, 7))
  means = np.stack([scores[row].mean(axis=0) for row in draws])
  low, high = estimators.bootstrap_intervals(scores, resamples=500, seed=11)
  np.testing.assert_allclose(low, np.quantile(means, 0.025, axis=0))
  np.testing.assert_allclose(high, np.quantile(means, 0.975, axis=0))


def test_the_bootstrap_is_seeded_and_blocks_change_nothing(monkeypatch):
  scores = np.random.default_rng(0).random(30)
  one = estimators.bootstrap_interval(scores, resamples=1000, seed=5)
  assert one == estimators.bootstrap_interval(scores, resamples=1000, seed=5)
  assert one != estimators.bootstrap_interval(scores, resamples=1000, seed=6)
  monkeypatch.setattr(estimators, "_BLOCK", 64)
  assert one == estimators.bootstrap_interval(scores, resamples=1000, seed=5)


def test_intervals_cover_about_as_often_as_they_say():
  generator = np.random.default_rng(1)
  truth, questions, n, trials = 0.5, 60, 8, 300
  covered = 0
  for trial in range(trials):
    # Questions differ in difficulty: resampling samples would be too narrow.
    chances = generator.beta(0.6, 0.6, size=questions)
    scores = estimators.per_question_avg(generator.binomial(n, chances), n)
    low, high = estimators.bootstrap_interval(scores, resamples=400, seed=trial)
    covered += low <= truth <= high
  assert 0.90 <= covered / trials <= 0.98


def test_a_paired_interval_is_narrower_on_correlated_questions():
  generator = np.random.default_rng(2)
  k = 16
  chances = generator.beta(0.5, 0.5, size=200)
  base = generator.binomial(k, chances)
  trained = generator.binomial(k, np.minimum(1, chances + 0.05))
  paired = estimators.paired_difference(base, trained, k)
  low, high = paired["avg_at_k_interval"]
  assert low < paired["avg_at_k"] < high
  # The same two models as if they had been asked different questions.
  unpaired = math.hypot(
    *(
      np.subtract(
        *estimators.bootstrap_interval(estimators.per_question_avg(counts, k))
      )
      for counts in (base, trained)
    )
  )
  assert high - low < 0.5 * unpaired


@given(counts_and_n(max_questions=6), st.data())
@settings(max_examples=30, deadline=None)
def test_a_paired_difference_is_the_difference(case, data):
  base, k = case
  trained = data.draw(
    st.lists(st.integers(0, k), min_size=len(base), max_size=len(base))
  )
  result = estimators.paired_difference(base, trained, k, resamples=50)
  assert result["avg_at_k"] == pytest.approx(
    estimators.avg_at_k(trained, k) - estimators.avg_at_k(base, k)
  )
  assert result["pass_at_k"] == pytest.approx(
    estimators.pass_at_k(trained, k, k) - estimators.pass_at_k(base, k, k)
  )
  same = estimators.paired_difference(base, base, k, resamples=50)
  assert same["avg_at_k_interval"] == same["pass_at_k_interval"] == [0, 0]


def test_a_summary_counts_what_could_not_be_judged_as_not_correct():
  verdicts = {"b": [True, None, False, True], "a": [None, None, False, False]}
  summary = estimators.summarize(verdicts, resamples=100)
  assert summary["avg_at_k"] == 0.25
  assert summary["pass_at_k"] == 0.5
  assert summary["unjudged_share"] == pytest.approx(3 / 8)
  assert (summary["k"], summary["n"]) == (4, 2)
  assert summary["pass_curve"]["2"] == pytest.approx((1 - 1 / 6) / 2)


def test_compare_pairs_questions_by_name_and_goes_into_json():
  base = {"q1": [True, False], "q2": [False, False]}
  trained = {"q2": [True, True], "q1": [True, False]}
  result = estimators.compare(base, trained, resamples=200)
  assert json.loads(json.dumps(result)) == result
  for key in ("base", "trained", "paired_difference"):
    part = result[key]
    assert (part["k"], part["n"]) == (2, 2)
    for name in ("avg_at_k", "pass_at_k"):
      low, high = part[f"{name}_interval"]
      assert low <= part[name] <= high
  assert result["paired_difference"]["avg_at_k"] == 0.5
  # q1 is unchanged in every resample: pairing by position would deny that.
  low, high = result["paired_difference"]["avg_at_k_interval"]
  assert (low, high) == (0.0, 1.0)


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: estimators.pass_at_k([1], 4, 5), "k=5, n=4"),
    (lambda: estimators.pass_at_k([1], 4, 0), "k=0, n=4"),
    (lambda: estimators.avg_at_k([5], 4), "0..4"),
    (lambda: estimators.avg_at_k([], 4), "at least one question"),
    (lambda: estimators.summarize({}), "nothing graded"),
    (lambda: estimators.summarize({"a": [True], "b": []}), "nothing graded"),
    (
      lambda: estimators.summarize({"a": [True], "b": [True, False]}),
      "question a has 1 samples where others have 2",
    ),
    (
      lambda: estimators.compare({"a": [True]}, {"b": [True]}),
      "one model only",
    ),
    (
      lambda: estimators.compare({"a": [True]}, {"a": [True, True]}),
      "1 samples a question for the base model and 2",
    ),
    (lambda: estimators.paired_difference([1], [1, 1], 1), "1 questions"),
  ],
)
def test_what_cannot_be_summarised_is_a_user_error(call, words):
  with pytest.raises(UserError, match=words.replace(".", r"\.")):
    call()
