"""Lengths as counts by bin: what a figure of 40,000 of them is drawn from."""

from typing import NamedTuple

import numpy as np

_BINS_A_DECADE = 24
_MOST = 6  # decades: no response is longer
EDGES = 10.0 ** np.linspace(0, _MOST, _MOST * _BINS_A_DECADE + 1)
"""Ends of the bins, in tokens."""


class Spread(NamedTuple):
  """How some lengths are spread.

  Attributes:
    number: how many there are.
    counts: how many are in each bin of `EDGES`.
    median: middle.
    low: the 25th percentile.
    high: the 75th.
    mean: mean.
    longest: the longest.
  """

  number: int
  counts: np.ndarray
  median: float
  low: float
  high: float
  mean: float
  longest: float


def of(lengths: np.ndarray) -> Spread | None:
  """Returns the spread of lengths; None of none.

  Args:
    lengths: tokens of each, integers; one of 0 counts as 1 in the bins.
  """
  if not len(lengths):
    return None
  counts, _ = np.histogram(np.clip(lengths, 1, EDGES[-1]), EDGES)
  low, median, high = np.percentile(lengths, (25, 50, 75))
  return Spread(
    len(lengths),
    counts,
    float(median),
    float(low),
    float(high),
    float(lengths.mean()),
    float(lengths.max()),
  )
