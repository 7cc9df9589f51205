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
from trd_jax.experiment.schema import Evaluate

QUESTION = "question"
"""The version of a message that is the question and nothing else."""
CARD = "card"
"""The version of a question with the sentence of the model card after it."""

# What the model card of Qwen3 has put after a mathematical problem, and so what
# its published figures, and those of most who train it, were asked with.
_CARD = (
  "Please reason step by step, and put your final answer within \\boxed{}."
)


class Asked(NamedTuple):
  """The messages of a benchmark.

  Attributes:
    version: whose words they are; each sample carries it (`prompt_version`).
    messages: what the model is asked, a message a problem, in their order.
  """

  version: str
  messages: list[str]


def of_benchmark(
  benchmark: str,
  problems: Sequence[Problem],
  prompt_set: PromptSet,
  section: Evaluate,
) -> Asked:
  """Returns what the questions of a benchmark are asked in.

  Args:
    benchmark: its name, as `evaluate.benchmarks` has it.
    problems: its questions, one or more.
    prompt_set: the experiment's.
    section: its `evaluate`, which says whose words are wanted.
  """
  entry = benchmarks.BENCHMARKS.get(benchmarks.published(benchmark))
  if entry is not None and entry.whole_message:
    return Asked(QUESTION, [problem.text for problem in problems])
  domain = problems[0].domain
  if domain == "math" and _math_words(prompt_set, section) == CARD:
    messages = [f"{problem.text}\n\n{_CARD}" for problem in problems]
    return Asked(CARD, messages)
  version = prompt_set.initial_version(domain)
  return Asked(version, [*map(prompt_set.initial, problems)])


def _math_words(prompt_set: PromptSet, section: Evaluate) -> str:
  """Returns `evaluate.math_prompt`; what a user has written isn't overridden.

  Only where it is left open: whoever names the card means it.
  """
  if section.math_prompt is not None:
    return section.math_prompt
  return "ours" if "initial_math" in prompt_set.templates.brought else CARD
