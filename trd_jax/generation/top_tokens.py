"""The teacher's likeliest tokens, kept while it writes y_r.

Training along y_r needs the teacher's distribution at every response token,
and the teacher has just computed it. Its K likeliest tokens with the mass that
they cover are kept as columns beside the sampled ids; what they leave out is
known from the mass.

Shape key: R response tokens, K tokens kept at each.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from trd_jax.generation.engines.engine import (
  Engine,
  Request,
  Sampling,
  TopTokens,
)

# What the cost is measured on.
_REQUESTS = 64
_TOKENS = 256


class Cost(NamedTuple):
  """What keeping them costs.

  Attributes:
    k: how many are kept.
    kept: tokens/s with them.
    bare: tokens/s of the same requests without.
    requests: how many requests each was measured on.
  """

  k: int
  kept: float
  bare: float
  requests: int

  def __str__(self) -> str:
    """Returns one line for a person."""
    return (
      f"keeping the teacher's {self.k} likeliest tokens: {self.kept:,.0f}"
      f" tokens/s, {self.bare:,.0f} without ({self.bare / self.kept:.2f} times"
      f" the time, on {self.requests} requests of up to {_TOKENS} tokens)"
    )


def columns(top: TopTokens | None) -> dict[str, Any]:
  """Returns the columns of a `Trajectory` for them; None without any."""
  if top is None:
    names = ("teacher_top_ids", "teacher_top_logprobs", "teacher_top_mass")
    return dict.fromkeys(names)
  mass_R = np.exp(top.logprobs.astype(np.float64)).sum(axis=1)
  return {
    "teacher_top_ids": top.ids.ravel().tolist(),
    "teacher_top_logprobs": top.logprobs.ravel().tolist(),
    # Rounding must not make it more than there is.
    "teacher_top_mass": np.minimum(mass_R, 1.0).tolist(),
  }


def cost(
  engine: Engine, requests: Sequence[Request], sampling: Sampling
) -> Cost:
  """Measures what the likeliest tokens cost on a few of the requests.

  The first requests are completed, up to 256 tokens, with and without, once to
  warm up and once on the clock; the completions are dropped.

  Args:
    engine: what will complete all of them.
    requests: at least one.
    sampling: with `top_logprobs` above 0.
  """
  few = [
    dataclasses.replace(
      request, max_new_tokens=min(request.max_new_tokens, _TOKENS)
    )
    for request in requests[:_REQUESTS]
  ]
  ways = (sampling, dataclasses.replace(sampling, top_logprobs=0))
  for way in ways:
    for _ in engine.generate(few, way):
      pass
  rates: list[float] = []
  for way in ways:
    start = time.perf_counter()
    tokens = sum(len(made.ids) for made in engine.generate(few, way))
    rates.append(tokens / (time.perf_counter() - start))
  kept, bare = rates
  return Cost(sampling.top_logprobs, kept, bare, len(few))
