"""Estimators: held to brute force, to exact theory, and to their coverage."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import brentq

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


scores_of_questions = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 14, 29, 63, 1318])
def test_the_quantile_of_t_is_scipys(degrees):
  quantile = estimators._t_quantile(degrees)
  assert quantile == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-12)


@pytest.mark.parametrize("questions", [2, 15, 30, 500])
def test_of_scores_that_are_0_or_1_it_is_wilsons_interval(questions):
  t = stats.t.ppf(0.975, questions - 1)
  for solved in {0, 1, questions // 3, questions - 1, questions}:
    low, high = estimators.mean_intervals(np.arange(questions) < solved)
    # Its definition: the means whose score statistic is within ±t.
    share = solved / questions

    def score(mean, share=share):
      return (share - mean) ** 2 - t**2 * mean * (1 - mean) / questions

    if solved:
      assert low == pytest.approx(brentq(score, 0, share - 1e-9), abs=1e-9)
    else:
      assert low == 0
    if solved < questions:
      assert high == pytest.approx(brentq(score, share + 1e-9, 1), abs=1e-9)
    else:
      assert high == 1


def test_of_other_scores_it_is_wilsons_and_what_may_be_unseen():
  scores = [0.25, 0.5, 0.5, 0.125, 0.0, 0.75, 0.25, 0.25]
  mean, n = np.mean(scores), len(scores)
  effect = np.var(scores, ddof=1) / (mean * (1 - mean))
  t = stats.t.ppf(0.975, n - 1)
  # Wilson's own form: centre and half width.
  few = n / effect
  centre = (mean + t**2 / (2 * few)) / (1 + t**2 / few)
  half = np.sqrt(mean * (1 - mean) / few + t**2 / (4 * few**2))
  half *= t / (1 + t**2 / few)
  none_of_n = t**2 / (n + t**2)
  low, high = estimators.mean_intervals(scores)
  for end, sign, room in ((low, -1, mean), (high, 1, 1 - mean)):
    seen = centre + sign * half - mean
    unseen = (1 - effect) * room * none_of_n
    assert end == pytest.approx(mean + sign * np.hypot(seen, unseen))


@given(scores_of_questions)
def test_an_interval_has_a_width_holds_the_mean_and_stays_inside(scores):
  low, high = estimators.mean_intervals(scores)
  assert 0 <= low <= np.mean(scores) <= high <= 1
  assert high - low > 1 / (2 * len(scores) + 2)


@given(scores_of_questions)
def test_an_interval_turns_round_with_its_scores(scores):
  low, high = estimators.mean_intervals(scores)
  turned = estimators.mean_intervals(1 - np.array(scores))
  assert turned == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(scores_of_questions, st.randoms())
def test_an_interval_is_a_formula_of_the_scores_in_any_order(scores, random):
  shuffled = random.sample(scores, len(scores))
  one = estimators.mean_intervals(scores)
  assert one == pytest.approx(estimators.mean_intervals(shuffled), abs=1e-12)
  both = estimators.mean_intervals([scores, shuffled])
  assert (both[0][0], both[1][0]) == one


@given(scores_of_questions.filter(lambda scores: len(scores) > 1))
def test_an_interval_shrinks_with_the_questions(scores):
  widths = [
    np.subtract(*estimators.mean_intervals(scores * times)[::-1])
    for times in (1, 2, 4, 8)
  ]
  assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("questions", [2, 15, 64])
def test_an_interval_rises_with_every_question_solved(questions):
  solved = np.arange(questions) < np.arange(questions + 1)[:, None]
  low, high = estimators.mean_intervals(solved)
  assert np.diff(low).min() > 0
  assert np.diff(high).min() > 0


def test_one_question_says_nothing():
  assert estimators.mean_intervals([0.3]) == (0, 1)


# Questions, samples of each, mean difficulty, and the concentration of the Beta
# that difficulties are drawn from (None: all alike).
POPULATIONS = [
  (questions, n, mean, spread)
  for questions in (15, 64)
  for n in (1, 16)
  for mean in (0.05, 0.3, 0.5, 0.9)
  for spread in (0.2, 1.0, None)
]


def difficulties(generator, spread, mean, shape):
  if spread is None:
    return np.full(shape, mean)
  return generator.beta(mean * spread, (1 - mean) * spread, size=shape)


@pytest.mark.parametrize(("questions", "n", "mean", "spread"), POPULATIONS)
def test_intervals_of_a_mean_cover(questions, n, mean, spread):
  generator = np.random.default_rng(1)
  trials = 2000
  drawn = difficulties(generator, spread, mean, (trials, questions))
  low, high = estimators.mean_intervals(generator.binomial(n, drawn) / n)
  covered = np.mean((low <= mean) & (mean <= high))
  # 95%, less three standard errors of the simulation and 1 for what discrete
  # counts can't do.
  assert covered >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials) - 0.01
  # Where questions differ, no wider than need be.
  if spread == 1.0 and questions == 64 and 0.1 < mean < 0.9:
    assert covered <= 0.975


@pytest.mark.parametrize(("questions", "n", "mean", "spread"), POPULATIONS)
@pytest.mark.parametrize("alike", [0.0, 0.8])
def test_intervals_of_a_difference_cover(questions, n, mean, spread, alike):
  generator = np.random.default_rng(2)
  trials, other = 2000, 0.6
  shape = (trials, questions)
  base = difficulties(generator, spread, mean, shape)
  # The other model finds most questions as hard, and the rest anew.
  trained = np.where(
    generator.random(shape) < alike,
    base,
    difficulties(generator, spread, other, shape),
  )
  truth = (1 - alike) * (other - mean)
  low, high = estimators.difference_intervals(
    generator.binomial(n, base) / n, generator.binomial(n, trained) / n
  )
  covered = np.mean((low <= truth) & (truth <= high))
  assert covered >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials) - 0.01
  assert np.min(high - low) > 0
  assert max(-low.min(), high.max()) <= 1


@given(scores_of_questions, st.data())
def test_a_difference_holds_its_estimate_and_turns_round(base, data):
  trained = data.draw(
    st.lists(st.floats(0, 1), min_size=len(base), max_size=len(base))
  )
  low, high = estimators.difference_intervals(base, trained)
  middle = np.mean(trained) - np.mean(base)
  assert -1 <= low <= middle + 1e-12
  assert middle - 1e-12 <= high <= 1
  assert high - low > 1 / (2 * len(base) + 2)
  back = estimators.difference_intervals(trained, base)
  assert back == pytest.approx((-high, -low), abs=1e-12)


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
        *estimators.mean_intervals(estimators.per_question_avg(counts, k))
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
  result = estimators.paired_difference(base, trained, k)
  assert result["avg_at_k"] == pytest.approx(
    estimators.avg_at_k(trained, k) - estimators.avg_at_k(base, k)
  )
  assert result["pass_at_k"] == pytest.approx(
    estimators.pass_at_k(trained, k, k) - estimators.pass_at_k(base, k, k)
  )
  same = estimators.paired_difference(base, base, k)
  for name in ("avg_at_k", "pass_at_k"):
    low, high = same[f"{name}_interval"]
    assert low < same[name] == 0 < high


def test_a_summary_counts_what_could_not_be_judged_as_not_correct():
  verdicts = {"b": [True, None, False, True], "a": [None, None, False, False]}
  summary = estimators.summarize(verdicts)
  assert summary["avg_at_k"] == 0.25
  assert summary["pass_at_k"] == 0.5
  assert summary["unjudged_share"] == pytest.approx(3 / 8)
  assert (summary["k"], summary["n"]) == (4, 2)
  assert summary["pass_curve"]["2"] == pytest.approx((1 - 1 / 6) / 2)


def test_compare_pairs_questions_by_name_and_goes_into_json():
  base = {"q1": [True, False], "q2": [False, False]}
  trained = {"q2": [True, True], "q1": [True, False]}
  result = estimators.compare(base, trained)
  assert json.loads(json.dumps(result)) == result
  for key in ("base", "trained", "paired_difference"):
    part = result[key]
    assert (part["k"], part["n"]) == (2, 2)
    for name in ("avg_at_k", "pass_at_k"):
      low, high = part[f"{name}_interval"]
      assert low <= part[name] <= high
  assert result["paired_difference"]["avg_at_k"] == 0.5
  # Question by question it is 0 and 1; pairing by position would say 1/2 twice.
  expected = estimators.difference_intervals([0.5, 0.0], [0.5, 1.0])
  found = result["paired_difference"]["avg_at_k_interval"]
  assert tuple(found) == pytest.approx(expected)


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
    (lambda: estimators.mean_intervals([]), "at least one question"),
    (lambda: estimators.mean_intervals([0.5, 1.5]), "lie in 0..1"),
    (lambda: estimators.mean_intervals([0.5, math.nan]), "lie in 0..1"),
  ],
)
def test_what_cannot_be_summarised_is_a_user_error(call, words):
  with pytest.raises(UserError, match=words.replace(".", r"\.")):
    call()
