"""What a benchmark's questions are put to the models in: whose words.

Trained on and evaluated in are two things: a figure can be set beside a
published one only where the question was asked in the words of the publisher.
So what surrounds a benchmark's question is decided here, a benchmark at a
time, and not by the prompt set alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

from trd_jax.data.problems import benchmarks
from trd_jax.data.prompts import PromptSet
from trd_jax.experiment.records import Problem

QUESTION = "question"
"""The version of a message that is the question and nothing else."""


class Asked(NamedTuple):
  """The messages of a benchmark.

  Attributes:
    version: whose words they are; each sample carries it (`prompt_version`).
    messages: what the model is asked, a message a problem, in their order.
  """

  version: str
  messages: list[str]


def of_benchmark(
  benchmark: str, problems: Sequence[Problem], prompt_set: PromptSet
) -> Asked:
  """Returns what the questions of a benchmark are asked in.

  Args:
    benchmark: its name, as `evaluate.benchmarks` has it.
    problems: its questions.
    prompt_set: the experiment's.
  """
  entry = benchmarks.BENCHMARKS.get(benchmarks.published(benchmark))
  if entry is not None and entry.whole_message:
    return Asked(QUESTION, [problem.text for problem in problems])
  version = prompt_set.initial_version(problems[0].domain)
  return Asked(version, [*map(prompt_set.initial, problems)])
