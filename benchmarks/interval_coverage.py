"""How often the intervals of Avg@K, Pass@K and paired differences hold.

    python benchmarks/interval_coverage.py           minutes on two cores
    python benchmarks/interval_coverage.py --quick   a tenth of the draws

Draws benchmarks of n questions from populations whose mean difficulty is known,
K samples a question, and counts how often the interval of `grading.estimators`
holds that mean. Seeded, so that the table is the same each time.

A population is a Beta distribution of question difficulties (`beta 0.2` has
nearly all questions at 0 or 1, `beta 20` few), all questions alike (`alike`),
two kinds that are solved in 2% and in 98% of samples (`two kinds`), or
questions that can't be solved beside some that are in 60% of samples
(`unsolvable`; above a mean of one half its mirror image). In a pair of models
the second finds a share of the questions as hard as the first and the rest
drawn anew, from a population of another mean.

A row has the lowest, the mean and the highest coverage over populations and
true values, in percent, the shares of these that are below 93 and within 93 to
97, and where the lowest is. Scores that are 0 or 1 (Pass@K; K = 1) are computed
exactly and not drawn, for true values a thousandth apart. There coverage jumps
with the true value, as a count of n does, so the lowest mean over neighbouring
true values is given, too.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trd_jax.experiment import tables  # noqa: E402
from trd_jax.grading import estimators  # noqa: E402

QUESTIONS = (15, 30, 64, 100, 500)
SAMPLES = (1, 4, 16)
MEANS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.8, 0.95, 0.98)
# Means of base and of what the trained model finds anew.
PAIRS = (
  (0.02, 0.02),
  (0.05, 0.95),
  (0.3, 0.4),
  (0.3, 0.8),
  (0.5, 0.5),
  (0.5, 0.05),
  (0.98, 0.88),
)
# Shares of questions that both models find equally hard.
EQUAL = (0.0, 0.9)
SEED = 0

Draw = Callable[[np.random.Generator, float, tuple[int, int]], np.ndarray]


def _beta(concentration: float) -> Draw:
  def draw(generator, mean, shape):
    return generator.beta(
      mean * concentration, (1 - mean) * concentration, size=shape
    )

  return draw


def _alike(generator, mean, shape):
  del generator
  return np.full(shape, mean)


def _two_kinds(generator, mean, shape):
  low, high = 0.02, 0.98
  share = (mean - low) / (high - low)
  return np.where(generator.random(shape) < share, high, low)


def _unsolvable(generator, mean, shape):
  solved = 0.6
  lesser = min(mean, 1 - mean)
  drawn = np.where(generator.random(shape) < lesser / solved, solved, 0.0)
  return drawn if mean <= 0.5 else 1 - drawn


POPULATIONS: dict[str, Draw] = {
  "beta 0.2": _beta(0.2),
  "beta 1": _beta(1),
  "beta 4": _beta(4),
  "beta 20": _beta(20),
  "alike": _alike,
  "two kinds": _two_kinds,
  "unsolvable": _unsolvable,
}


def _scores(generator, chances: np.ndarray, k: int) -> np.ndarray:
  return generator.binomial(k, chances) / k


def means(n: int, k: int, trials: int) -> Iterator[tuple[str, str, float]]:
  """Yields the coverage of Avg@K's interval.

  Args:
    n: questions.
    k: samples of each.
    trials: benchmarks drawn a cell.

  Yields:
    Population, true value and coverage.
  """
  for name, draw in POPULATIONS.items():
    for mean in MEANS:
      generator = np.random.default_rng(SEED)
      chances = draw(generator, mean, (trials, n))
      low, high = estimators.mean_intervals(_scores(generator, chances, k))
      held = np.mean((low <= mean) & (mean <= high))
      yield name, f"{mean:g}", float(held)


def differences(
  n: int, k: int, trials: int
) -> Iterator[tuple[str, str, float]]:
  """Yields the coverage of a paired difference's interval; see `means`."""
  for name, draw in POPULATIONS.items():
    for equal in EQUAL:
      for mean, other in PAIRS:
        generator = np.random.default_rng(SEED)
        base = draw(generator, mean, (trials, n))
        anew = draw(generator, other, (trials, n))
        trained = np.where(generator.random((trials, n)) < equal, base, anew)
        truth = (1 - equal) * (other - mean)
        low, high = estimators.difference_intervals(
          _scores(generator, base, k), _scores(generator, trained, k)
        )
        held = np.mean((low - 1e-12 <= truth) & (truth <= high + 1e-12))
        yield f"{name}, {equal:.0%} equal", f"{mean:g} → {other:g}", float(held)


def exact(n: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns true values and coverage of n questions that are 0 or 1."""
  solved = np.arange(n) < np.arange(n + 1)[:, None]
  low, high = estimators.mean_intervals(solved)
  truth = np.linspace(0.02, 0.98, 961)
  counts = np.arange(n + 1)
  ways = np.array([math.lgamma(c + 1) + math.lgamma(n - c + 1) for c in counts])
  logs = math.lgamma(n + 1) - ways
  logs = logs + counts * np.log(truth)[:, None]
  logs = logs + (n - counts) * np.log1p(-truth)[:, None]
  held = (low <= truth[:, None]) & (truth[:, None] <= high)
  return truth, (np.exp(logs) * held).sum(axis=1)


def _percent(share: float) -> str:
  return f"{100 * share:.1f}"


def _row(title: str, cells: list[tuple[str, str, float]]) -> tuple[str, ...]:
  held = np.array([cell[2] for cell in cells])
  where, value, lowest = min(cells, key=lambda cell: cell[2])
  inside = np.mean((held >= 0.93) & (held <= 0.97))
  return (
    title,
    _percent(lowest),
    _percent(float(held.mean())),
    _percent(float(held.max())),
    f"{np.mean(held < 0.93):.0%}",
    f"{inside:.0%}",
    f"{where}, {value}",
  )


def main() -> None:
  """Prints the three tables."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--quick", action="store_true", help="a tenth of it")
  trials = 400 if parser.parse_args().quick else 4000
  head = ("", "lowest", "mean", "highest", "< 93", "93-97", "lowest at")
  print(f"nominal {estimators.LEVEL:.0%}; {trials} draws a cell\n")
  print("Pass@K, and Avg@1: scores that are 0 or 1")
  rows = [head]
  for n in QUESTIONS:
    truth, held = exact(n)
    nearby = np.convolve(held, np.ones(61) / 61, mode="valid")
    cells = [
      ("", f"{t:.3f}", float(c)) for t, c in zip(truth, held, strict=True)
    ]
    row = _row(f"n={n}", cells)
    at = row[-1].removeprefix(", ")
    about = f"{at}; lowest mean of ±0.03: {_percent(float(nearby.min()))}"
    rows.append((*row[:-1], about))
  print(tables.columns(rows), flush=True)
  # Of one sample Avg@K is what stands above, and a difference is Pass@K's.
  for title, cover, samples in (
    ("Avg@K", means, SAMPLES[1:]),
    ("paired difference of Avg@K; K=1: of Pass@K", differences, SAMPLES),
  ):
    print(f"\n{title}")
    rows = [head]
    for k in samples:
      for n in QUESTIONS:
        cells = list(cover(n, k, trials if n < 500 else trials // 2))
        rows.append(_row(f"K={k}, n={n}", cells))
    print(tables.columns(rows), flush=True)


if __name__ == "__main__":
  main()
