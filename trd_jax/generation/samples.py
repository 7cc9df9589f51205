"""Prompts, and the samples that they become once their answers are judged."""

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence

from trd_jax.experiment.records import Problem, Verdict
from trd_jax.generation.engines.engine import Completion
from trd_jax.grading.code import programs as code_grading
from trd_jax.grading.math import verifier as math_grading

# Answers that wait for a verdict, for each processor that judges: enough to
# have all of them busy, and few to lose.
_WAITING = 64
_LOOK_SECONDS = 0.01  # between looks at what has been judged meanwhile


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A problem with the token ids that are to be completed.

  Attributes:
    key: content key of the sample: of all that determines its tokens.
    problem: the problem that the completion answers.
    ids: prompt ids, generation prompt included.
    seed: seed of the sample's own random numbers.
    sample: which of a problem's samples it is, from 0.
    draft_key: key of the draft in a refinement prompt, else None.
    elided_tokens: tokens of the draft that were left out.
  """

  key: str
  problem: Problem
  ids: Sequence[int]
  seed: int
  sample: int = 0
  draft_key: str | None = None
  elided_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class GradedCompletion:
  """A completion of a prompt, decoded and graded.

  Attributes:
    prompt: what was completed.
    completion: the ids as sampled and why they ended.
    text: the decoded response, without the stop token.
    verdict: what the domain's grader says of it.
    grader: name and version of the grader.
  """

  prompt: Prompt
  completion: Completion
  text: str
  verdict: Verdict
  grader: str


Answer = tuple[Prompt, Completion, str]


def graded(
  answers: Iterator[Answer], programs: code_grading.Grader | None
) -> Iterator[GradedCompletion]:
  """Judges answers as they come; slow ones don't hold up the rest.

  No more of them are taken while many wait for a verdict.

  Raises:
    Exception: what `answers` raises, once all before it are judged.
  """
  held: dict[int, Answer] = {}
  most = _WAITING * (programs.workers if programs else os.cpu_count() or 1)
  failures: list[Exception] = []

  def whole() -> Iterator[Answer]:
    try:
      yield from answers
    except Exception as error:
      failures.append(error)

  def pairs() -> Iterator[tuple[str, str] | None]:
    position = 0  # among all that is yielded here
    for answer in whole():
      prompt, _, text = answer
      held[position] = answer
      if prompt.problem.domain != "code":
        yield text, prompt.problem.answer
      else:
        assert programs is not None
        programs.submit(position, text, prompt.problem)
        yield None
      position += 1
      while len(held) >= most:
        time.sleep(_LOOK_SECONDS)
        yield None
        position += 1

  def sample(position: int, verdict: Verdict, grader: str) -> GradedCompletion:
    prompt, completion, text = held.pop(position)
    return GradedCompletion(prompt, completion, text, verdict, grader)

  def run(wait: bool) -> Iterator[GradedCompletion]:
    if programs is not None:
      for position, verdict in programs.finished(wait):
        yield sample(position, verdict, code_grading.VERSION)

  for found in math_grading.verify_stream(pairs()):
    if found is not None:
      yield sample(*found, math_grading.VERSION)
    yield from run(wait=False)
  yield from run(wait=True)
  if failures:
    raise failures[0]
