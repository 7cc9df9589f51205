"""How many samples a packed row holds at most, as its kernel is told.

A kernel for packed rows is compiled for a number of segments, and what packs
the rows keeps to it. Needs no JAX.
"""

# The fewest tokens of a sample, on average, in a full row.
_TOKENS = 256


def segments_of(length: int) -> int:
  """Returns the most segments of a packed row of so many tokens."""
  return max(2, length // _TOKENS)
