"""More sections of an experiment: the evaluation, and what runs the stages."""

import dataclasses

from trd_jax.experiment import schema
from trd_jax.experiment.schema import above, at_least, key, one_of
from trd_jax.experiment.sections import Generation


@dataclasses.dataclass(frozen=True)
class Evaluate(Generation):
  """Stage 5: base and trained student on the benchmarks."""

  benchmarks: tuple[str, ...] = key(
    ("arithmetic",), "their names, separated by commas", schema.filled()
  )
  root: str | None = schema.path(
    None, "folder with local copies of the benchmarks; None: download them"
  )
  thinking: bool | None = key(
    None, "the template's thinking switch; None: student.thinking"
  )
  k: int = key(16, "samples a problem: Avg@k, Pass@k", at_least(1))
  max_response_tokens: int = key(
    38912, "a longer response is cut and marked as truncated", at_least(1)
  )
  num_problems: int | None = key(
    None, "problems a benchmark; None: all", at_least(1)
  )
  livecodebench: str = key(
    "release_v6",
    "which of its problems: release_v6 (all) or v6 (those that v6 added)",
    one_of("release_v6", "v6"),
  )
  unchecked: bool = key(
    False, "take benchmark files of another length or SHA-256 than declared"
  )
  evalplus_seconds: float = key(
    1.0,
    "EvalPlus's shortest time limit of an input; published results have 1",
    above(0),
  )
  buckets_from: str | None = schema.path(
    None,
    "workdir whose base samples sort the questions by difficulty; None: this"
    " one",
  )
  bootstrap: int = key(10000, "resamples behind an interval", at_least(1))
  seed: int = key(0, "seed of the samples and the resamples", at_least(0))


@dataclasses.dataclass(frozen=True)
class Python:
  """The interpreter that `trd_jax.pipeline` starts each stage with."""

  generation: str | None = schema.path(
    None, "for rollout, refine and evaluate; None: the pipeline's own"
  )
  rollout: str | None = schema.path(None, "None: python.generation")
  refine: str | None = schema.path(None, "None: python.generation")
  evaluate: str | None = schema.path(None, "None: python.generation")
  train: str | None = schema.path(None, "None: the pipeline's own")
  merge: str | None = schema.path(None, "None: the pipeline's own")
  convert: str | None = schema.path(None, "None: the pipeline's own")
  evalplus: str | None = schema.path(
    None, "EvalPlus's, for HumanEval+ and MBPP+; None: .venv-evalplus's"
  )
  lcb_runner: str | None = schema.path(
    None, "lcb_runner's, for LiveCodeBench; None: .venv-lcb's if it is there"
  )

  def of(self, stage: str) -> str | None:
    """The interpreter of a stage; None for the pipeline's own."""
    own = getattr(self, stage)
    if own is None and stage in ("rollout", "refine", "evaluate"):
      return self.generation
    return own
