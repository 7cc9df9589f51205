"""Has the answers to benchmarks judged, each by its benchmark's grader.

Most are judged as they are sampled, by the grader of their domain. A benchmark
whose grader takes all answers at once, or more than the gold, is settled
afterwards, by what is also behind `--regrade`: `settle`.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from trd_jax.data.problems.questions import Questions
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.progress import Progress
from trd_jax.experiment.records import GradedSample, Problem
from trd_jax.grading import graders
from trd_jax.grading.graders import GRADERS


def check(experiment: Experiment) -> None:
  """Checks that the graders of the experiment's benchmarks are there.

  Raises:
    UserError: one is not.
  """
  for name in graders.of_benchmarks(experiment.evaluate.benchmarks, experiment):
    # What judges while it is sampled is opened, and so seen, before that.
    if not GRADERS[name].domains:
      GRADERS[name].check(experiment)


def to_sample(
  benchmark: str, problem: Problem, experiment: Experiment
) -> Problem:
  """Returns a problem without the tests that a later grader runs."""
  if GRADERS[graders.of_problem(benchmark, problem, experiment)].domains:
    return problem
  return dataclasses.replace(problem, tests=None)


def settle(
  rows: Sequence[GradedSample],
  questions: Mapping[str, Questions],
  experiment: Experiment,
  *,
  again: bool = False,
) -> list[GradedSample]:
  """Judges the rows that their grader hasn't judged yet.

  Args:
    rows: samples of the benchmarks in `questions`.
    questions: by benchmark.
    experiment: says where graders are and how programs run.
    again: judge those that it has judged, too.

  Returns:
    The rows in their order, those that were judged with their new verdicts;
    a row of a question that isn't asked stays as it is.

  Raises:
    UserError: a grader isn't there.
  """
  of_id = {
    (name, problem.problem_id): problem
    for name, asked in questions.items()
    for problem in asked.problems
  }
  waiting: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
  for index, row in enumerate(rows):
    problem = of_id.get((row.benchmark, row.problem_id))
    if problem is None:
      continue
    grader = graders.of_problem(row.benchmark, problem, experiment)
    # A grader that judges during sampling has given its verdict. A newer
    # version of it judges again only with `again`: figures of a finished
    # evaluation don't change by themselves.
    stale = row.grader_version != GRADERS[grader].version
    if again or (stale and not GRADERS[grader].domains):
      waiting[row.benchmark, grader].append(index)
  settled = list(rows)
  for (name, grader), indices in waiting.items():
    version, files = GRADERS[grader].version, questions[name].paths
    with (
      Progress(len(indices), f"grade {name}", "samples") as bar,
      GRADERS[grader].open(experiment, files) as judging,
    ):
      for index in indices:
        row = rows[index]
        problem = of_id[name, row.problem_id]
        judging.submit(index, row.text, problem)
      for index, verdict in judging.finished(wait=True):
        settled[index] = dataclasses.replace(
          rows[index],
          correct=verdict.correct,
          reason=verdict.reason,
          extracted=verdict.extracted,
          detail=verdict.detail,
          grader_version=version,
        )
        bar.update()
  return settled
