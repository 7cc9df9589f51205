"""Prompts, and the samples that they become once their answers are judged."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence

from trd_jax.experiment.records import Problem, Verdict
from trd_jax.generation.engines.engine import Completion
from trd_jax.grading.grader_protocol import Grader

# Answers that wait for a verdict, for each worker that judges: enough to
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
    version: what a benchmark's words are called (`benchmark_prompts`).
    thinks: whether the response may open with thoughts; None: as the stage's
      switch says.
  """

  key: str
  problem: Problem
  ids: Sequence[int]
  seed: int
  sample: int = 0
  draft_key: str | None = None
  elided_tokens: int = 0
  version: str = ""
  thinks: bool | None = None


@dataclasses.dataclass(frozen=True)
class GradedCompletion:
  """A completion of a prompt, decoded and graded.

  Attributes:
    prompt: what was completed.
    completion: the ids as sampled and why they ended.
    text: the decoded response, without the stop token.
    verdict: what the domain's grader says of it.
    grader: name and version of the grader; 'none' where nothing is graded.
  """

  prompt: Prompt
  completion: Completion
  text: str
  verdict: Verdict
  grader: str


Answer = tuple[Prompt, Completion, str]


def graded(
  answers: Iterator[Answer],
  graders: Mapping[str, Grader],
  grade: bool = True,
) -> Iterator[GradedCompletion]:
  """Judges answers as they come; slow ones don't hold up the rest.

  No more of them are taken while many wait for a verdict. An answer to a
  problem without a gold answer is handed on as it is: no grader sees it.

  Args:
    answers: what is to be judged, as it is made.
    graders: by domain of the problems that have a gold answer.
    grade: whether any answer is judged.

  Raises:
    Exception: what `answers` raises, once all before it are judged.
  """
  held: dict[int, Answer] = {}
  open_graders = {id(grader): grader for grader in graders.values()}.values()
  most = _WAITING * max((one.workers for one in open_graders), default=1)

  def judged(wait: bool) -> Iterator[GradedCompletion]:
    for grader in open_graders:
      for number, verdict in grader.finished(wait):
        prompt, completion, text = held.pop(number)
        yield GradedCompletion(
          prompt, completion, text, verdict, grader.version
        )

  failures: list[Exception] = []
  for number, answer in enumerate(_until_failure(answers, failures)):
    prompt, _, text = answer
    if not prompt.problem.has_gold or not grade:
      verdict = Verdict.not_graded() if not grade else Verdict.without_gold()
      yield GradedCompletion(*answer, verdict, "none")
      continue
    held[number] = answer
    graders[prompt.problem.domain].submit(number, text, prompt.problem)
    yield from judged(wait=False)
    while len(held) >= most:
      time.sleep(_LOOK_SECONDS)
      yield from judged(wait=False)
  yield from judged(wait=True)
  if failures:
    raise failures[0]


def _until_failure(
  answers: Iterator[Answer], failures: list[Exception]
) -> Iterator[Answer]:
  """Yields answers; an exception ends them and is put into `failures`.

  What an engine made before it failed is worth its verdict.
  """
  try:
    yield from answers
  except Exception as error:
    failures.append(error)
