"""Who judges a benchmark's answers, and having rows judged.

Most answers are graded as they are sampled, mathematics and programs by
`grading.math` and `grading.code`. What takes all answers at once (EvalPlus,
lcb_runner) or more than the gold (formulas) is settled afterwards, by what is
also behind `--regrade`: `settle`.
"""

import collections
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence

from trd_jax.data.problems import benchmarks
from trd_jax.data.problems.questions import Questions
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.metrics import Progress
from trd_jax.experiment.records import GradedSample, Problem, Verdict
from trd_jax.grading.code import evalplus, lcb_runner
from trd_jax.grading.code import programs as code
from trd_jax.grading.math import formulas, verifier

VERSIONS = {
  "math": verifier.VERSION,
  "code": code.VERSION,
  "formulas": formulas.VERSION,
  "evalplus": evalplus.VERSION,
  "lcb_runner": lcb_runner.VERSION,
}
"""By grader: what a row that it judged has as `grader_version`."""

_AS_SAMPLED = {"math", "code"}
_Told = Callable[[int], None]


def grader_of(benchmark: str, problem: Problem, experiment: Experiment) -> str:
  """The grader of a problem's answers: a key of `VERSIONS`."""
  name = benchmarks.published(benchmark)
  if name in evalplus.DATASETS:
    return "evalplus"
  if name == "livecodebench" and lcb_runner.wanted(
    experiment.python.lcb_runner
  ):
    return "lcb_runner"
  if problem.domain == "code":
    return "code"
  return "formulas" if "values" in json.loads(problem.meta) else "math"


def check(experiment: Experiment) -> None:
  """Sees that the graders of the experiment's benchmarks are there.

  Raises:
    UserError: one is not.
  """
  names = set(map(benchmarks.published, experiment.evaluate.benchmarks))
  unsafe = experiment.sandbox.unsafe
  if names & evalplus.DATASETS.keys():
    evalplus.check(experiment.python.evalplus, unsafe)
  runner = experiment.python.lcb_runner
  if "livecodebench" in names and lcb_runner.wanted(runner):
    lcb_runner.check(runner, unsafe)


def to_sample(
  benchmark: str, problem: Problem, experiment: Experiment
) -> Problem:
  """The problem as it is sampled: without tests that another grader runs."""
  if grader_of(benchmark, problem, experiment) in _AS_SAMPLED:
    return problem
  return dataclasses.replace(problem, tests=None)


def settle(
  rows: Sequence[GradedSample],
  questions: Mapping[str, Questions],
  experiment: Experiment,
  *,
  again: bool = False,
) -> list[GradedSample]:
  """Has rows judged that their grader hasn't judged yet.

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
    grader = grader_of(row.benchmark, problem, experiment)
    stale = row.grader_version != VERSIONS[grader]
    if again or (stale and grader not in _AS_SAMPLED):
      waiting[row.benchmark, grader].append(index)
  settled = list(rows)
  for (name, grader), indices in waiting.items():
    answers = [
      (of_id[name, rows[index].problem_id], rows[index].text)
      for index in indices
    ]
    with Progress(len(indices), f"grade {name}", "samples") as bar:
      told = _counter(bar)
      found = _judged(grader, name, questions[name], answers, experiment, told)
      told(len(indices))  # some graders count programs, each once
    for index, verdict in zip(indices, found, strict=True):
      settled[index] = dataclasses.replace(
        rows[index],
        correct=verdict.correct,
        reason=verdict.reason,
        extracted=verdict.extracted,
        detail=verdict.detail,
        grader_version=VERSIONS[grader],
      )
  return settled


def _counter(bar: Progress) -> _Told:
  """Tells a bar how many there are so far; it wants how many more."""
  seen = 0

  def told(count: int) -> None:
    nonlocal seen
    bar.update(count - seen)
    seen = count

  return told


def _judged(
  grader: str,
  name: str,
  asked: Questions,
  answers: Sequence[tuple[Problem, str]],
  experiment: Experiment,
  progress: _Told,
) -> list[Verdict]:
  """Verdicts of one grader, in the order of the answers."""
  section = experiment.sandbox
  if grader == "math":
    pairs = ((text, problem.answer) for problem, text in answers)
    return verifier.verify_batch(pairs, progress=progress)
  if grader == "formulas":
    return formulas.verify_batch(
      [
        (text, problem.answer, json.loads(problem.meta)["values"])
        for problem, text in answers
      ],
      progress=progress,
    )
  if grader == "code":
    return _run_tests(answers, experiment, progress)
  if grader == "lcb_runner":
    return lcb_runner.grade(
      answers,
      python=experiment.python.lcb_runner,
      unsafe=section.unsafe,
      workers=section.workers,
      progress=progress,
    )
  if len(asked.paths) != 1:
    raise UserError(
      f"benchmark {name}: {len(asked.paths)} files; EvalPlus takes its one"
    )
  return evalplus.grade(
    benchmarks.published(name),
    asked.paths[0],
    [(problem.problem_id, text) for problem, text in answers],
    python=experiment.python.evalplus,
    unsafe=section.unsafe,
    workers=section.workers,
    least_seconds=experiment.evaluate.evalplus_seconds,
    progress=progress,
  )


def _run_tests(
  answers: Iterable[tuple[Problem, str]],
  experiment: Experiment,
  progress: _Told,
) -> list[Verdict]:
  """Our own executor's verdicts."""
  verdicts: dict[int, Verdict] = {}
  with code.Grader(experiment.sandbox) as programs:
    for index, (problem, text) in enumerate(answers):
      programs.submit(index, text, problem)
    for index, verdict in programs.finished(wait=True):
      verdicts[index] = verdict
      progress(len(verdicts))
  return [verdicts[index] for index in range(len(verdicts))]
