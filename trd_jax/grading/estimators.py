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
intervals resample questions, never samples; for two models on the same
questions they are resampled together.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trd_jax.experiment.errors import UserError

LEVEL = 0.95
_BLOCK = 1 << 22  # elements of a resampling block

Interval = tuple[float, float]


def _checked(counts: ArrayLike, n: int) -> np.ndarray:
  """Checks counts of correct samples and returns them as int64 [Q]."""
  values = np.asarray(counts)
  if values.ndim != 1 or values.size == 0:
    raise UserError(
      f"estimators: correct counts have shape {values.shape}; they must be one"
      " a question, for at least one question"
    )
  if n < 1 or values.min() < 0 or values.max() > n:
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


def bootstrap_intervals(
  scores: ArrayLike,
  *,
  resamples: int = 10_000,
  seed: int = 0,
  level: float = LEVEL,
) -> tuple[np.ndarray, np.ndarray]:
  """Computes percentile intervals of means over the same questions.

  Args:
    scores: float [Q, M]; the M columns are resampled together.
    resamples: bootstrap samples of Q questions each, at least 1.
    seed: the same seed resamples the same questions, whatever the scores.
    level: coverage, between 0 and 1.

  Returns:
    (low, high), float64 [M] each.

  Raises:
    UserError: there is no question, or an argument is out of range.
  """
  values = np.asarray(scores, dtype=np.float64)
  if values.ndim != 2 or values.shape[0] == 0:
    raise UserError(
      f"estimators: scores have shape {values.shape}; they must be one row a"
      " question, for at least one question"
    )
  if resamples < 1 or not 0 < level < 1:
    raise UserError(
      f"estimators: resamples={resamples}, level={level}; they need at least"
      " 1 resample and a level between 0 and 1"
    )
  generator = np.random.default_rng(seed)
  questions = len(values)
  means = np.empty((resamples, values.shape[1]))
  # All resamples at once would take resamples x Q integers; the blocks draw the
  # same ones, in the same order.
  block = max(1, _BLOCK // questions)
  for start in range(0, resamples, block):
    count = min(block, resamples - start)
    drawn = generator.integers(0, questions, size=(count, questions))
    # How often each question was drawn, then one product for all statistics.
    drawn += np.arange(count)[:, None] * questions
    times = np.bincount(drawn.ravel(), minlength=count * questions)
    means[start : start + count] = times.reshape(count, -1) @ values / questions
  tail = (1.0 - level) / 2
  low, high = np.quantile(means, [tail, 1.0 - tail], axis=0)
  return low, high


def bootstrap_interval(
  scores: ArrayLike,
  *,
  resamples: int = 10_000,
  seed: int = 0,
  level: float = LEVEL,
) -> Interval:
  """Computes a percentile interval of the mean of scores, float [Q].

  See `bootstrap_intervals` for the other arguments and the errors.
  """
  low, high = bootstrap_intervals(
    np.asarray(scores, dtype=np.float64)[..., None],
    resamples=resamples,
    seed=seed,
    level=level,
  )
  return float(low[0]), float(high[0])


def _estimate(
  avg_scores: np.ndarray,
  pass_scores: np.ndarray,
  k: int,
  resamples: int,
  seed: int,
) -> dict[str, Any]:
  """Computes Avg@K and Pass@K with intervals from scores or differences."""
  # Together: both intervals are of the same resampled questions.
  both = np.stack([avg_scores, pass_scores], axis=1)
  low, high = bootstrap_intervals(both, resamples=resamples, seed=seed)
  mean = both.mean(axis=0)
  return {
    "avg_at_k": float(mean[0]),
    "avg_at_k_interval": [float(low[0]), float(high[0])],
    "pass_at_k": float(mean[1]),
    "pass_at_k_interval": [float(low[1]), float(high[1])],
    "k": int(k),
    "n": len(avg_scores),
  }


def paired_difference(
  base_counts: ArrayLike,
  trained_counts: ArrayLike,
  k: int,
  *,
  resamples: int = 10_000,
  seed: int = 0,
) -> dict[str, Any]:
  """Computes trained minus base on the same questions, resampled together.

  Args:
    base_counts: correct samples of each question, int [Q] in 0..k.
    trained_counts: the same of the other model, in the same order.
    k: samples a question, of both.
    resamples: see `bootstrap_interval`.
    seed: see `bootstrap_interval`.

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
  return _estimate(
    # Question by question: what makes one hard for both models cancels, and the
    # interval is narrower than from two separate ones.
    per_question_avg(trained, k) - per_question_avg(base, k),
    per_question_pass(trained, k, k) - per_question_pass(base, k, k),
    k,
    resamples,
    seed,
  )


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
  # Sorted, so that the same seed resamples the same questions in any two runs,
  # whatever the order of their rows.
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


def pass_curve_intervals(
  counts: ArrayLike, n: int, *, resamples: int = 10_000, seed: int = 0
) -> dict[str, list[float]]:
  """Computes [low, high] at each point of `pass_curve`, resampled alike."""
  points = curve_points(n)
  scores = [per_question_pass(counts, n, k) for k in points]
  low, high = bootstrap_intervals(
    np.stack(scores, axis=1), resamples=resamples, seed=seed
  )
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
  *,
  resamples: int = 10_000,
  seed: int = 0,
) -> dict[str, dict[str, Any]]:
  """Computes a model's figures on the questions of each difficulty.

  Args:
    verdicts: question id to its samples' verdicts.
    base: the same of the model that says how hard a question is; it may have
      been asked more questions, and another number of times.
    resamples: see `bootstrap_interval`.
    seed: see `bootstrap_interval`.

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
      found[bucket] |= _estimate(
        per_question_avg(counts, samples_each),
        per_question_pass(counts, samples_each, samples_each),
        samples_each,
        resamples,
        seed,
      )
  return found


def summarize(
  verdicts: Mapping[str, Sequence[bool | None]],
  *,
  resamples: int = 10_000,
  seed: int = 0,
) -> dict[str, Any]:
  """Computes one model's figures on one benchmark, for `summary.json`.

  Returns:
    avg_at_k, pass_at_k, their `_interval`s [low, high], k (samples a
    question), n (questions), pass_curve and pass_curve_intervals (by k as
    text), unjudged_share.
  """
  counts, k, unjudged = correct_counts(verdicts)
  return {
    **_estimate(
      per_question_avg(counts, k),
      per_question_pass(counts, k, k),
      k,
      resamples,
      seed,
    ),
    "pass_curve": pass_curve(counts, k),
    "pass_curve_intervals": pass_curve_intervals(
      counts, k, resamples=resamples, seed=seed
    ),
    "unjudged_share": unjudged,
  }


def compare(
  base: Mapping[str, Sequence[bool | None]],
  trained: Mapping[str, Sequence[bool | None]],
  *,
  resamples: int = 10_000,
  seed: int = 0,
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
    "base": summarize(base, resamples=resamples, seed=seed),
    "trained": summarize(trained, resamples=resamples, seed=seed),
    "paired_difference": paired_difference(
      base_counts, trained_counts, k, resamples=resamples, seed=seed
    ),
  }
