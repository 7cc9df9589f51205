"""The figures of stages, under the names that trackers group by.

    rollout/accuracy        share of y_o that is right, of those graded
    refine/leak_share       share of y_r that speaks of a draft or a reference
    evaluate/NAME/avg_at_k  of a benchmark

They are made of what a stage said of itself (`RunDir.record`).
"""

import math
from collections.abc import Mapping
from typing import Any

from trd_jax.experiment.run_dir import RunDir

_OF_BENCHMARK = ("avg_at_k", "pass_at_k", "truncated_share", "median_tokens")
_BEFORE_TRAINING = ("rollout", "refine", "evaluate/base")


def before_training(run_dir: RunDir) -> dict[str, float]:
  """Returns the figures of the stages before training that are finished.

  Raises:
    UserError: the record of one is damaged.
  """
  found: dict[str, float] = {}
  for stage in _BEFORE_TRAINING:
    if run_dir.finished(stage):
      found |= of_stage(stage, run_dir.record(stage))
  return found


def of_stage(stage: str, summary: Mapping[str, Any]) -> dict[str, float]:
  """Returns a finished stage's figures.

  Args:
    stage: `rollout`, `refine`, `evaluate/base` or `evaluate/trained`. The two
      evaluations have the same names: they are two points of one curve.
    summary: what its `done.json` has.

  Returns:
    Finite numbers by grouped name; shares are between 0 and 1.
  """
  if not stage.startswith("evaluate/"):
    return {f"{stage}/{name}": x for name, x in _of_rows(summary).items()}
  return {
    f"evaluate/{benchmark}/{name}": float(value)
    for benchmark, figures in summary.items()
    # Beside its benchmarks a record has what it was made by.
    if isinstance(figures, Mapping)
    for name in _OF_BENCHMARK
    if isinstance(value := figures.get(name), (int, float))
    and math.isfinite(value)
  }


def _of_rows(summary: Mapping[str, Any]) -> dict[str, float]:
  samples = summary.get("samples") or 0
  without = summary.get("not_graded", 0) + summary.get("no_gold", 0)
  shares = {
    "accuracy": (summary.get("correct"), samples - without),
    "truncated_share": (summary.get("truncated"), samples),
    "leak_share": (summary.get("leaks"), samples),
  }
  found = {
    name: count / total
    for name, (count, total) in shares.items()
    if count is not None and total > 0
  }
  if samples:
    found["median_tokens"] = float(summary.get("median_tokens", 0))
  return found
