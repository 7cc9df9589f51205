"""The registry of graders, and which of them judges what."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

from trd_jax.data.problems import benchmarks
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.records import Problem
from trd_jax.grading.code import evalplus, lcb_runner, programs
from trd_jax.grading.grader_protocol import Grader
from trd_jax.grading.math import formulas, verifier

GRADERS: Mapping[str, type[Grader]] = {
  "math": verifier.Grader,
  "formulas": formulas.Grader,
  "code": programs.Grader,
  "evalplus": evalplus.Grader,
  "lcb_runner": lcb_runner.Grader,
}
"""By the names that a benchmark's entry gives (`Benchmark.grader`)."""


def of_domain(domain: str) -> str:
  """Returns the name of the grader that judges a domain while it is sampled."""
  return next(name for name in GRADERS if domain in GRADERS[name].domains)


def of_problem(benchmark: str, problem: Problem, experiment: Experiment) -> str:
  """Returns the name of the grader of answers to a benchmark's problem."""
  entry = benchmarks.BENCHMARKS.get(benchmarks.published(benchmark))
  name = of_domain(problem.domain) if entry is None else entry.grader
  return GRADERS[name].stand_in(experiment, problem) or name


def of_benchmarks(names: Iterable[str], experiment: Experiment) -> list[str]:
  """Returns the names of the graders of benchmarks, in the registry's order."""
  wanted = set()
  for name in map(benchmarks.published, names):
    if name in benchmarks.BENCHMARKS:
      grader = benchmarks.BENCHMARKS[name].grader
      wanted.add(GRADERS[grader].stand_in(experiment, None) or grader)
  return [name for name in GRADERS if name in wanted]


@contextlib.contextmanager
def opened(
  domains: Iterable[str], experiment: Experiment
) -> Iterator[dict[str, Grader]]:
  """Opens the graders of domains, each once, and yields them by domain.

  Raises:
    UserError: what one needs isn't here.
  """
  names = {domain: of_domain(domain) for domain in domains}
  with contextlib.ExitStack() as stack:
    found = {
      name: stack.enter_context(GRADERS[name].open(experiment))
      for name in dict.fromkeys(names.values())
    }
    yield {domain: found[name] for domain, name in names.items()}
