"""What a benchmark's questions are put to the models in: whose words.

Trained on and evaluated in are two things: a figure can be set beside a
published one only where the question was asked in the words of the publisher.
So what surrounds a benchmark's question is decided here, a benchmark at a
time, and not by the prompt set alone.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from trd_jax.data.problems import benchmarks
from trd_jax.data.prompts import PromptSet
from trd_jax.experiment.records import Problem
from trd_jax.experiment.schema import Evaluate

QUESTION = "question"
"""The version of a message that is the question and nothing else.

After a system prompt of the prompt set its version follows.
"""
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
    system: the system prompt before each; None: there is none.
  """

  version: str
  messages: list[str]
  system: str | None = None

  def of(
    self, problems: Sequence[Problem]
  ) -> Iterator[tuple[Problem, str, str | None]]:
    """Yields each problem with its message and the system prompt."""
    for problem, message in zip(problems, self.messages, strict=True):
      yield problem, message, self.system


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
  domain = problems[0].domain
  words = _math_words(prompt_set, section) if domain == "math" else "ours"
  # Published words have no system prompt.
  system = prompt_set.system_of(domain) if words == "ours" else None
  if entry is not None and entry.whole_message:
    version = QUESTION
    if system is not None:
      version += f" after {prompt_set.templates.version_of('system', domain)}"
    return Asked(version, [problem.text for problem in problems], system)
  if words == CARD:
    messages = [f"{problem.text}\n\n{_CARD}" for problem in problems]
    return Asked(CARD, messages)
  version = prompt_set.initial_version(domain)
  messages = [*map(prompt_set.initial, problems)]
  return Asked(version, messages, system)


def _math_words(prompt_set: PromptSet, section: Evaluate) -> str:
  """Returns `evaluate.math_prompt`; what a user has written isn't overridden.

  Only where it is left open: whoever names the card means it.
  """
  if section.math_prompt is not None:
    return section.math_prompt
  own = {"initial_math", "system_math"} & prompt_set.templates.brought
  return "ours" if own else CARD
