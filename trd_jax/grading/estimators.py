"""Avg@K, unbiased pass@k, and their intervals, from verdict counts.

A benchmark's result is its verdicts: one row a question (Q of them), one
column a sample (n a question), each True, False or None (could not be judged,
counted as not correct and reported as a share). Everything here works on
c, the number of correct samples of each question:

  Avg@K  = mean over questions of c / n
  pass@k = mean over questions of 1 − C(n − c, k) / C(n, k)

The latter is the unbiased estimate, from n samples, of the chance that k
samples hold a correct one; Pass@K is its value at k = n, the share of
questions solved at least once. Questions are what a benchmark draws, so
intervals are over questions, never over samples: `mean_interval` and, for two
models on the same questions, `difference_interval`. They are formulas, without
a random number; `benchmarks/interval_coverage.py` measures how often they hold.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trd_jax.experiment.errors import UserError

LEVEL = 0.95
# What the intervals of a summary were computed by; another formula, another
# name.
INTERVALS = "wilson-t-1"


def _checked(counts: ArrayLike, n: int) -> np.ndarray:
  """Checks counts of correct samples and returns them as int64 [Q]."""
  values = np.asarray(counts)
  if values.ndim != 1 or values.size == 0:
    raise UserError(
      f"estimators: correct counts have shape {values.shape}; they must be one"
      " a question, for at least one question"
    )
  # Not `min < 0 or max > n`, which lets NaN pass.
  if n < 1 or not (values.min() >= 0 and values.max() <= n):
    raise UserError(
      f"estimators: correct counts must lie in 0..{n}, the samples a question;"
      f" they reach from {values.min()} to {values.max()}"
    )
  return values.astype(np.int64)


def per_question_avg(counts: ArrayLike, n: int) -> np.ndarray:
  """Returns c / n of each question, float64 [Q]."""
  return _checked(counts, n) / n


def per_question_pass(counts: ArrayLike, n: int, k: int) -> np.ndarray:
  """Returns the unbiased pass@k of each question, float64 [Q].

  1 − C(n−c, k) / C(n, k) as a product of k factors, each at most one, so
  that nothing overflows and the result is exact to a few ulp for any n.

  Args:
    counts: correct samples of each question, integers [Q] in 0..n.
    n: samples a question.
    k: 1 ≤ k ≤ n.

  Raises:
    UserError: k or a count is out of range, or there is no question.
  """
  values = _checked(counts, n)
  if not 1 <= k <= n:
    raise UserError(f"estimators: pass@k needs 1 <= k <= n; k={k}, n={n}")
  # At most n + 1 different counts: the products are made once for each, not for
  # thousands of questions.
  distinct, where = np.unique(values, return_inverse=True)
  steps = np.arange(k)
  # With fewer than k wrong samples one factor is zero: certain to hold a
  # correct one.
  wrong = np.maximum(n - distinct[:, None] - steps, 0)
  return (1.0 - np.prod(wrong / (n - steps), axis=1))[where]


def avg_at_k(counts: ArrayLike, n: int) -> float:
  """Returns Avg@K: the mean over questions of the share of correct samples."""
  return float(per_question_avg(counts, n).mean())


def pass_at_k(counts: ArrayLike, n: int, k: int) -> float:
  """Returns the mean over questions of unbiased `per_question_pass`."""
  return float(per_question_pass(counts, n, k).mean())


@functools.cache
def _t_quantile(degrees: int) -> float:
  """Returns the two-sided quantile of Student's t at `LEVEL`.

  By bisection of P(|T| < t), which for whole degrees of freedom is a finite sum
  in θ = arctan(t / √degrees): exact, and scipy isn't needed for one number.

  Args:
    degrees: of freedom; infinity is returned for 0.
  """
  if degrees < 1:
    return math.inf
  odd = degrees % 2
  # cosθ (odd) or 1 (even), and each further term the one before times
  # cos²θ · (power − 1) / power.
  powers = np.arange(3 if odd else 2, degrees - 1, 2)
  factors = np.cumprod((powers - 1) / powers)
  low, high = 0.0, math.pi / 2
  for _ in range(60):
    angle = (low + high) / 2
    cosine = math.cos(angle)
    first = cosine if odd else 1.0
    terms = first * factors * cosine ** (2 * np.arange(1, len(factors) + 1))
    inside = math.sin(angle) * (first + float(terms.sum()))
    if odd:
      inside = (angle + (inside if degrees > 1 else 0.0)) * 2 / math.pi
    low, high = (angle, high) if inside < LEVEL else (low, angle)
  return math.sqrt(degrees) * math.tan((low + high) / 2)


def _scores(scores: ArrayLike) -> np.ndarray:
  """Checks scores in [0, 1] and returns them as float64 [..., Q]."""
  values = np.asarray(scores, dtype=np.float64)
  if values.ndim == 0 or values.shape[-1] == 0:
    raise UserError(
      f"estimators: scores have shape {values.shape}; they must be one a"
      " question, for at least one question"
    )
  if not (values.min() >= 0 and values.max() <= 1):
    raise UserError("estimators: scores must lie in 0..1")
  return values


def _upper(
  mean: np.ndarray, variance: np.ndarray, questions: int
) -> np.ndarray:
  """Returns the upper limit of a mean of scores in [0, 1].

  Args:
    mean: of the scores, [...].
    variance: of the scores, with the divisor Q − 1, [...].
    questions: Q.
  """
  most = mean * (1 - mean)  # the variance, were all scores 0 or 1
  effect = np.minimum(variance / np.where(most > 0, most, 1.0), 1.0)
  t = _t_quantile(questions - 1)
  if math.isinf(t):
    return np.ones_like(mean)
  # What was seen: Wilson's interval of Q / effect questions that are 0 or 1.
  width = t * t / questions
  seen = width * effect
  root = np.sqrt(seen * most + seen * seen / 4)
  above = (mean + seen / 2 + root) / (1 + seen) - mean
  # What was not: a kind of question, always solved, of which Q hold none. Its
  # share is at most Wilson's limit for none of Q. Where scores are 0 or 1
  # (effect 1) Wilson's interval holds this already.
  unseen = (1 - effect) * (1 - mean) * width / (1 + width)
  return np.minimum(mean + np.hypot(above, unseen), 1.0)


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns mean and variance (divisor Q − 1; 0 of one) over questions."""
  mean = values.mean(axis=-1)
  squares = np.square(values - mean[..., None]).sum(axis=-1)
  return mean, squares / max(values.shape[-1] - 1, 1)


def mean_intervals(scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Computes intervals of means over questions at `LEVEL`.

  Wilson's score interval, with Student's t for the normal quantile and with as
  many questions as would give the variance that was seen if all scores were 0
  or 1; its arms are lengthened, by square-and-add, by what a kind of question
  could change of which none is among the Q. It lies in [0, 1], holds the mean,
  turns round with the scores (0 for 1), and has a width whatever the scores.

  Args:
    scores: float [..., Q] in [0, 1].

  Returns:
    (low, high), float64 [...] each.

  Raises:
    UserError: there is no question, or a score is outside [0, 1].
  """
  values = _scores(scores)
  mean, variance = _moments(values)
  questions = values.shape[-1]
  low = 1 - _upper(1 - mean, variance, questions)
  high = _upper(mean, variance, questions)
  # Rounding may not put the mean outside.
  return np.clip(low, 0, mean), np.maximum(high, mean)


def difference_intervals(
  base: ArrayLike, trained: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
  """Computes intervals of mean trained minus mean base, question by question.

  Square-and-add of both `mean_intervals` (Newcombe; Zou and Donner's MOVER),
  less what the scores' correlation r cancels:

    high = difference + √(a² + b² − 2 r a b)

  with a from trained's mean up to its high and b from base's mean down to its
  low; and the other arms for the low end. r is taken smaller by (Q − 1) / (Q +
  1), so that equal scores leave a width.

  Args:
    base: scores, float [..., Q] in [0, 1].
    trained: the other model's, of the same questions in the same order.

  Returns:
    (low, high), float64 [...] each, in [−1, 1].

  Raises:
    UserError: there is no question, or a score is outside [0, 1].
  """
  first, second = _scores(base), _scores(trained)
  questions = first.shape[-1]
  (one, one_variance), (two, two_variance) = _moments(first), _moments(second)
  products = (first - one[..., None]) * (second - two[..., None])
  spread = np.sqrt(one_variance * two_variance) * max(questions - 1, 1)
  correlation = products.sum(axis=-1) / np.where(spread > 0, spread, 1.0)
  correlation = np.clip(correlation, -1, 1) * (questions - 1) / (questions + 1)
  one_low, one_high = mean_intervals(first)
  two_low, two_high = mean_intervals(second)

  def arm(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(a * a + b * b - 2 * correlation * a * b, 0))

  difference = two - one
  low = difference - arm(two - two_low, one_high - one)
  high = difference + arm(two_high - two, one - one_low)
  return np.maximum(low, -1), np.minimum(high, 1)


def _with_intervals(
  means: np.ndarray,
  limits: tuple[np.ndarray, np.ndarray],
  k: int,
  questions: int,
) -> dict[str, Any]:
  """Returns Avg@K and Pass@K, each with its `_interval`, k and n."""
  found: dict[str, Any] = {}
  for place, name in enumerate(("avg_at_k", "pass_at_k")):
    found[name] = float(means[place])
    found[f"{name}_interval"] = [float(limit[place]) for limit in limits]
  return {**found, "k": int(k), "n": questions}


def _ends(counts: ArrayLike, k: int) -> np.ndarray:
  """Returns each question's c / k and Pass@K, float64 [2, Q]."""
  return np.stack(
    [per_question_avg(counts, k), per_question_pass(counts, k, k)]
  )


def _estimate(counts: ArrayLike, k: int) -> dict[str, Any]:
  """Computes Avg@K and Pass@K with intervals, from correct counts [Q]."""
  scores = _ends(counts, k)
  limits = mean_intervals(scores)
  return _with_intervals(scores.mean(axis=1), limits, k, scores.shape[1])


def paired_difference(
  base_counts: ArrayLike, trained_counts: ArrayLike, k: int
) -> dict[str, Any]:
  """Computes trained minus base on the same questions.

  Args:
    base_counts: correct samples of each question, int [Q] in 0..k.
    trained_counts: the same of the other model, in the same order.
    k: samples a question, of both.

  Returns:
    avg_at_k, pass_at_k (differences), their `_interval`s, k, n (questions).

  Raises:
    UserError: the two don't have the same number of questions.
  """
  base, trained = _checked(base_counts, k), _checked(trained_counts, k)
  if len(base) != len(trained):
    raise UserError(
      f"estimators: {len(base)} questions for the base model and"
      f" {len(trained)} for the trained one; a paired difference needs the same"
    )
  sides = _ends(base, k), _ends(trained, k)
  # Question by question: what makes one hard for both models cancels, and the
  # interval is narrower than from two separate ones.
  means = (sides[1] - sides[0]).mean(axis=1)
  return _with_intervals(means, difference_intervals(*sides), k, len(base))


def correct_counts(
  verdicts: Mapping[str, Sequence[bool | None]],
) -> tuple[np.ndarray, int, float]:
  """Counts correct samples, question by question, in the order of their ids.

  Args:
    verdicts: question id to its samples' verdicts (None: not judged).

  Returns:
    counts int64 [Q] sorted by id, samples a question, share of None.

  Raises:
    UserError: no question, or questions with different numbers of samples.
  """
  sizes = {len(samples) for samples in verdicts.values()}
  if not sizes or 0 in sizes:
    raise UserError("estimators: there is nothing graded to summarise")
  if len(sizes) > 1:
    few = min(verdicts, key=lambda name: len(verdicts[name]))
    raise UserError(
      f"estimators: question {few} has {len(verdicts[few])} samples where"
      f" others have {max(sizes)}; run the evaluation again to fill them in"
    )
  (samples_each,) = sizes
  # Sorted, so that the questions of any two runs stand in the same order,
  # whatever that of their rows.
  rows = [verdicts[name] for name in sorted(verdicts)]
  counts = np.array([sum(one is True for one in row) for row in rows])
  unjudged = sum(one is None for row in rows for one in row)
  return counts, samples_each, unjudged / (len(rows) * samples_each)


def curve_points(n: int) -> list[int]:
  """Returns the k of a pass@k curve over n samples: 1, 2, 4, … and n."""
  return sorted({1 << power for power in range(n.bit_length())} | {n})


def pass_curve(counts: ArrayLike, n: int) -> dict[str, float]:
  """Computes pass@k at k = 1, 2, 4, … and n, by k as text (for JSON)."""
  return {str(k): pass_at_k(counts, n, k) for k in curve_points(n)}


def pass_curve_intervals(counts: ArrayLike, n: int) -> dict[str, list[float]]:
  """Computes [low, high] at each point of `pass_curve`."""
  points = curve_points(n)
  low, high = mean_intervals([per_question_pass(counts, n, k) for k in points])
  return {str(k): [float(low[i]), float(high[i])] for i, k in enumerate(points)}


def bucket_ranges(k: int) -> dict[str, tuple[int, int]]:
  """Names difficulties by correct samples of k: B0, B1-8, B9-16 for 16.

  Returns:
    By name the fewest and the most correct samples; no range is empty.
  """
  half = k // 2
  # With k = 1 the middle range is empty, and left out below.
  ranges = ((0, 0), (1, half), (half + 1, k))
  return {
    f"B{low}" if low == high else f"B{low}-{high}": (low, high)
    for low, high in ranges
    if low <= high
  }


def by_bucket(
  verdicts: Mapping[str, Sequence[bool | None]],
  base: Mapping[str, Sequence[bool | None]],
) -> dict[str, dict[str, Any]]:
  """Computes a model's figures on the questions of each difficulty.

  Args:
    verdicts: question id to its samples' verdicts.
    base: the same of the model that says how hard a question is; it may have
      been asked more questions, and another number of times.

  Returns:
    By bucket (see `bucket_ranges`) n, the number of its questions, and, where
    there is one, k, avg_at_k, pass_at_k and their `_interval`s.

  Raises:
    UserError: the base model wasn't asked one of the questions.
  """
  if missing := sorted(verdicts.keys() - base.keys()):
    raise UserError(
      f"estimators: {len(missing)} questions have no base samples to tell their"
      f" difficulty by, {missing[0]} for one; take a base run of the same"
      " questions"
    )
  base_counts, k, _ = correct_counts({name: base[name] for name in verdicts})
  of_name = dict(zip(sorted(verdicts), base_counts, strict=True))
  found: dict[str, dict[str, Any]] = {}
  for bucket, (low, high) in bucket_ranges(k).items():
    inside = {
      name: samples
      for name, samples in verdicts.items()
      if low <= of_name[name] <= high
    }
    found[bucket] = {"n": len(inside)}
    if inside:
      counts, samples_each, _ = correct_counts(inside)
      found[bucket] |= _estimate(counts, samples_each)
  return found


def summarize(
  verdicts: Mapping[str, Sequence[bool | None]],
) -> dict[str, Any]:
  """Computes one model's figures on one benchmark, for `summary.json`.

  Returns:
    avg_at_k, pass_at_k, their `_interval`s [low, high], k (samples a
    question), n (questions), pass_curve and pass_curve_intervals (by k as
    text), `intervals` (how they were computed), unjudged_share.
  """
  counts, k, unjudged = correct_counts(verdicts)
  return {
    **_estimate(counts, k),
    "pass_curve": pass_curve(counts, k),
    "pass_curve_intervals": pass_curve_intervals(counts, k),
    "intervals": INTERVALS,
    "unjudged_share": unjudged,
  }


def compare(
  base: Mapping[str, Sequence[bool | None]],
  trained: Mapping[str, Sequence[bool | None]],
) -> dict[str, Any]:
  """Compares two models on one benchmark, for `summary.json`.

  Returns:
    base, trained (see `summarize`) and paired_difference.

  Raises:
    UserError: they weren't asked the same questions equally often.
  """
  if set(base) != set(trained):
    missing = sorted(set(base) ^ set(trained))
    raise UserError(
      f"estimators: {len(missing)} questions were graded for one model only,"
      f" {missing[0]} for one; evaluate both on the same problems"
    )
  base_counts, k, _ = correct_counts(base)
  trained_counts, trained_k, _ = correct_counts(trained)
  if k != trained_k:
    raise UserError(
      f"estimators: {k} samples a question for the base model and {trained_k}"
      " for the trained one; evaluate both with the same evaluate.k"
    )
  return {
    "base": summarize(base),
    "trained": summarize(trained),
    "paired_difference": paired_difference(base_counts, trained_counts, k),
  }
