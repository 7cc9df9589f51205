"""Sets evaluations side by side: which may be compared, and by how much."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from trd_jax.analyze.analysis import Number
from trd_jax.analyze.runs import Evaluation, Run
from trd_jax.experiment.errors import UserError
from trd_jax.grading import estimators, scores

Metric = Literal["avg", "pass"]
METRICS: Mapping[Metric, str] = {"avg": "Avg@K", "pass": "Pass@K"}
BASE, TRAINED = "evaluate/base", "evaluate/trained"


class Model(NamedTuple):
  """A model that was evaluated.

  Attributes:
    label: as figures call it.
    run: whose evaluation it is.
    stage: `evaluate/base` or `evaluate/trained`.
    evaluation: its verdicts by benchmark.
  """

  label: str
  run: Run
  stage: str
  evaluation: Mapping[str, Evaluation]


def models(runs: Sequence[Run]) -> list[Model]:
  """Returns base and trained models of runs, those that have samples.

  Runs of one student have one base: it is there once, as `base`, where their
  verdicts are the same.
  """
  bases: list[Model] = []
  for run in runs:
    found = run.evaluation(BASE)
    if not found:
      continue
    if any(same(found, one.evaluation) for one in bases):
      continue
    bases.append(Model(f"base of {run.label}", run, BASE, found))
  if len(bases) == 1:
    bases = [bases[0]._replace(label="base")]
  trained = [
    Model(
      run.label if len(runs) > 1 else "trained",
      run,
      TRAINED,
      run.evaluation(TRAINED),
    )
    for run in runs
    if run.evaluation(TRAINED)
  ]
  return [*bases, *trained]


def same(one: Mapping[str, Evaluation], two: Mapping[str, Evaluation]) -> bool:
  """Returns whether two evaluations have the same verdicts."""
  return one.keys() == two.keys() and all(
    one[name].k == two[name].k
    and one[name].questions == two[name].questions
    and np.array_equal(one[name].correct, two[name].correct)
    for name in one
  )


def benchmarks(found: Sequence[Model]) -> list[str]:
  """Returns the benchmarks of some models, in the first config's order."""
  names = {name for model in found for name in model.evaluation}
  order = [n for model in found for n in model.run.config.evaluate.benchmarks]
  return sorted(names, key=lambda n: order.index(n) if n in order else 999)


def per_question(evaluation: Evaluation, metric: Metric) -> np.ndarray:
  """Returns each question's share of right samples, or whether it is solved."""
  if metric == "avg":
    return estimators.per_question_avg(evaluation.correct, evaluation.k)
  return estimators.per_question_pass(
    evaluation.correct, evaluation.k, evaluation.k
  )


def value(evaluation: Evaluation, metric: Metric) -> Number:
  """Returns Avg@K or Pass@K with its interval over questions."""
  values = per_question(evaluation, metric)
  low, high = estimators.mean_intervals(values)
  return Number(float(values.mean()), float(low), float(high))


class Change(NamedTuple):
  """The difference of two models on the questions that both were asked.

  Attributes:
    questions: how many.
    first: the first one's value on them.
    second: the second one's.
    difference: second minus first, with its paired interval.
  """

  questions: int
  first: float
  second: float
  difference: Number


def change(
  first: Evaluation, second: Evaluation, metric: Metric
) -> Change | None:
  """Returns how a metric differs; None where nothing can be compared."""
  if first.k != second.k:
    return None
  one, two = _common(first, second)
  if not len(one):
    return None
  pair = estimators.paired_difference(one, two, first.k)
  name = f"{metric}_at_k"
  sides = []
  for counts in (one, two):
    of_question = (
      estimators.per_question_avg(counts, first.k)
      if metric == "avg"
      else estimators.per_question_pass(counts, first.k, first.k)
    )
    sides.append(float(of_question.mean()))
  low, high = pair[f"{name}_interval"]
  return Change(
    pair["n"], sides[0], sides[1], Number(pair[name], low, high, best=False)
  )


def common(
  first: Evaluation, second: Evaluation
) -> tuple[list[str], np.ndarray, np.ndarray]:
  """Returns the questions of both, and the right samples of each model."""
  one, two = _common(first, second)
  both = sorted(set(first.questions) & set(second.questions))
  return both, one, two


def _common(
  first: Evaluation, second: Evaluation
) -> tuple[np.ndarray, np.ndarray]:
  both = set(first.questions) & set(second.questions)
  sides = []
  for one in (first, second):
    # Questions stand in the order of their ids on both sides.
    kept = np.array([q in both for q in one.questions], bool)
    sides.append(one.correct[kept])
  return sides[0], sides[1]


def base_of(model: Model) -> Mapping[str, Evaluation]:
  """Returns the base evaluation of a model's run."""
  return model.run.evaluation(BASE)


def unlike(found: Sequence[Model], benchmark: str) -> str | None:
  """Says why models may not be compared on a benchmark; None: they may.

  That is where they were asked or graded in different ways.

  Args:
    found: the models.
    benchmark: its name.
  """
  rows: list[tuple[Model, Any]] = []
  for model in found:
    if benchmark in (done := model.run.done(model.stage) or {}):
      rows.append((model, done[benchmark]))
  for model, row in rows[1:]:
    try:
      scores.check_alike(benchmark, rows[0][1], row)
    except UserError as error:
      return f"{model.label} and {rows[0][0].label} differ: {error}"
  return None


def head(found: Sequence[Model], benchmark: str, metric: Metric) -> str:
  """Returns a column's head: the benchmark with K and how many questions."""
  rows = [m.evaluation[benchmark] for m in found if benchmark in m.evaluation]
  name = METRICS[metric].replace("K", f"{rows[0].k}")
  return f"{benchmark}, {name}"


def points(number: Number) -> str:
  """Writes a difference of shares: +49.2 points, 95% interval 41.9 to 55.7."""
  text = f"{100 * number.value:+.1f} points"
  if number.low is None or number.high is None:
    return text
  return (
    f"{text}, 95% interval {100 * number.low:.1f} to {100 * number.high:.1f}"
  )
