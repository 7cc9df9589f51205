"""What a benchmark's questions are put to the models in: whose words.

Trained on and evaluated in are two things: a figure can be set beside a
published one only where the question was asked in the words of the publisher.
So what surrounds a benchmark's question is decided here, a benchmark at a
time, and not by the prompt set alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from trd_jax.data.chat import Chat
from trd_jax.data.problems import benchmarks
from trd_jax.data.problems.questions import Questions
from trd_jax.data.prompts import PromptSet
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.records import Problem
from trd_jax.experiment.schema import Evaluate
from trd_jax.grading.graders import GRADERS

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
    begun: how the answers begin, which then have no thoughts; '': as they like.
  """

  version: str
  messages: list[str]
  system: str | None = None
  begun: str = ""

  def of(
    self, problems: Sequence[Problem]
  ) -> Iterator[tuple[Problem, str, str | None]]:
    """Yields each problem with its message and the system prompt."""
    for problem, message in zip(problems, self.messages, strict=True):
      yield problem, message, self.system

  def switch(self, chat: Chat, thinking: bool | None) -> bool | None:
    """Returns the thinking switch of the prompts, as `Chat.render` takes it.

    Args:
      chat: the answering model's.
      thinking: the experiment's, for prompts that leave room for thoughts.

    Raises:
      UserError: the answer is begun, and the template always opens thoughts.
    """
    if not self.begun:
      return thinking
    try:
      return chat.without_thoughts()
    except UserError as error:
      raise UserError(
        f"{error}; set --config.evaluate.code_prompt=ours"
      ) from error


def of_benchmark(
  benchmark: str,
  questions: Questions,
  prompt_set: PromptSet,
  experiment: Experiment,
) -> Asked:
  """Returns what the questions of a benchmark are asked in.

  Args:
    benchmark: its name, as `evaluate.benchmarks` has it.
    questions: one or more.
    prompt_set: the experiment's.
    experiment: says whose words are wanted, and where tools are that have some.

  Raises:
    UserError: the benchmark's tool is to ask, and isn't here.
  """
  problems, section = questions.problems, experiment.evaluate
  entry = benchmarks.BENCHMARKS.get(benchmarks.published(benchmark))
  domain = problems[0].domain
  if entry is not None and is_official(entry, section):
    asks = GRADERS[entry.grader].official
    return Asked(*asks(experiment, problems, questions.paths))
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


def modes(
  experiment: Experiment, thinking: bool | None
) -> Mapping[str, bool | None]:
  """Returns by benchmark whether its answers may open with thoughts.

  Args:
    experiment: names the benchmarks.
    thinking: of those that leave room for thoughts.
  """
  found = {}
  for name in experiment.evaluate.benchmarks:
    entry = benchmarks.BENCHMARKS.get(benchmarks.published(name))
    begun = (
      entry is not None
      and is_official(entry, experiment.evaluate)
      and GRADERS[entry.grader].begins_answers
    )
    found[name] = False if begun else thinking
  return found


def is_official(entry: benchmarks.Benchmark, section: Evaluate) -> bool:
  """Returns whether a benchmark's own tool asks its questions."""
  return section.code_prompt == "official" and entry.has_tool


def _math_words(prompt_set: PromptSet, section: Evaluate) -> str:
  """Returns `evaluate.math_prompt`; what a user has written isn't overridden.

  Only where it is left open: whoever names the card means it.
  """
  if section.math_prompt is not None:
    return section.math_prompt
  own = {"initial_math", "system_math"} & prompt_set.templates.brought
  return "ours" if own else CARD
