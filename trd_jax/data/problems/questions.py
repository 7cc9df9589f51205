"""The questions of an experiment's benchmarks, read and checked once a process.

`evaluate.benchmarks` names them: the laboratory's held-out splits, made here,
and the published ones of `problems.benchmarks`, from `evaluate.root` or the
hub.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from trd_jax.data import problems
from trd_jax.data.problems import arithmetic, benchmarks
from trd_jax.experiment.errors import UserError, did_you_mean
from trd_jax.experiment.experiment import LAB_BENCHMARKS, Experiment
from trd_jax.experiment.records import Problem

ROOT = "evaluate.root"
"""The key that names the benchmarks' local copies."""

_LAB_PROBLEMS = 64


@dataclasses.dataclass(frozen=True)
class Questions:
  """The questions of a benchmark.

  Attributes:
    problems: those that are asked, `evaluate.num_problems` of them.
    data: what they were read from: `rows`, the whole benchmark's, and `files`
      (see `benchmarks.record`), none for the laboratory's.
    paths: these files.
    whole: all that the benchmark has, which no training problem may be.
  """

  problems: list[Problem]
  data: dict[str, Any]
  paths: tuple[Path, ...] = ()
  whole: list[Problem] = dataclasses.field(default_factory=list)


def load_all(experiment: Experiment) -> dict[str, Questions]:
  """Returns the questions of every benchmark of an experiment, by its name.

  Raises:
    UserError: as `load`.
  """
  return {
    name: load(experiment, name) for name in experiment.evaluate.benchmarks
  }


def load(experiment: Experiment, name: str) -> Questions:
  """Finds, reads and checks a benchmark, and chooses what is asked of it.

  Args:
    experiment: `evaluate` says where, how many, and by which seed.
    name: as `evaluate.benchmarks` has it. `arithmetic` and `arithmetic_hard`
      have 64 problems unless `evaluate.num_problems` says otherwise.

  Raises:
    UserError: an unknown name, or files that are missing, unusable, or not
      what the benchmark's are.
  """
  section = experiment.evaluate
  if name in LAB_BENCHMARKS:
    size = section.num_problems or _LAB_PROBLEMS
    # The first are the same, however many are made.
    whole = arithmetic.generate(
      LAB_BENCHMARKS[name], max(size, _LAB_PROBLEMS), section.seed
    )
    return Questions(whole[:size], {"rows": size, "files": []}, whole=whole)
  canonical = canonical_name(experiment, name)
  files = benchmarks.find(canonical, section.root, ROOT)
  whole, rejected = benchmarks.read(canonical, files)
  if rejected:
    raise UserError(
      f"{name}: {len(rejected)} rows can't be used, the first because:"
      f" {rejected[0].reason}; a benchmark has to be whole"
    )
  record = benchmarks.record(canonical, files, len(whole), section.unchecked)
  return Questions(
    problems.choose(whole, section.num_problems, section.seed),
    record,
    tuple(file.path for file in files),
    whole,
  )


def load_local(experiment: Experiment, name: str) -> list[Problem] | None:
  """Returns what is asked of a benchmark, if this machine has it already.

  For a command that only looks: nothing is downloaded. It has to be called
  before anything imports huggingface_hub, which is told to stay off the net.

  Returns:
    The questions; None: they aren't here, or can't be used any more.
  """
  os.environ.setdefault("HF_HUB_OFFLINE", "1")
  try:
    published = name not in LAB_BENCHMARKS
    if published and experiment.evaluate.root is None:
      name = canonical_name(experiment, name)
      if benchmarks.would_fetch(name):
        return None
    return load(experiment, name).problems
  except UserError:
    return None


def number(experiment: Experiment, name: str) -> int:
  """Returns how many questions of a benchmark are asked, without reading it.

  Raises:
    UserError: an unknown name.
  """
  limit = experiment.evaluate.num_problems
  if name in LAB_BENCHMARKS:
    return limit or _LAB_PROBLEMS
  rows = benchmarks.BENCHMARKS[canonical_name(experiment, name)].rows
  return min(rows, limit or rows)


def canonical_name(experiment: Experiment, name: str) -> str:
  """Returns a benchmark's key in `benchmarks.BENCHMARKS`.

  Raises:
    UserError: there is none.
  """
  canonical = benchmarks.canonical(name)
  if canonical not in benchmarks.BENCHMARKS:
    known = (*LAB_BENCHMARKS, *benchmarks.BENCHMARKS)
    raise UserError(
      f"evaluate.benchmarks: there is no benchmark {name};"
      f" {did_you_mean(name, known)}"
    )
  release = experiment.evaluate.livecodebench
  if canonical == "livecodebench" and release == "v6":
    return "livecodebenchv6"
  return canonical
