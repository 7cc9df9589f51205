"""What the models are asked, and how it is made to fit.

Four roles per domain, each in one user message, before which a system prompt
may stand (Appendix C.4 names the roles; the wording is ours): the initial
prompt of stage 1, x; the privileged prompt of the vanilla OPSD teacher, x and
y*; the refinement prompt of OPD, x and y_o; and that of OPSD, x, y_o and y*. A
refined response has to stand on its own, because the student that learns it
sees x alone: it may mention neither the draft nor the reference.

The wording is data: a prompt set (see `templates`), which the key `prompts.set`
names. Every artifact carries its version.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from trd_jax.data.chat import Chat, Rendered
from trd_jax.data.final_answer import final_text
from trd_jax.data.templates import Templates
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.prompt_sets import DEFAULT
from trd_jax.experiment.records import (
  SYSTEM_TURN,
  Problem,
  Rejected,
  Trajectory,
)
from trd_jax.experiment.run_dir import RunDir

# Of the default wording; another one is known by a hash of its templates.
# Changing the default wording changes this.
VERSION = "1"

_T = TypeVar("_T")

# In place of the part of a draft that doesn't fit.
_ELISION = {
  "arithmetic": "\n...\n",
  "math": "\n\n[... the middle of the draft is left out here ...]\n\n",
  "code": "\n\n[... the middle of the draft is left out here ...]\n\n",
}


@dataclasses.dataclass(frozen=True)
class FittedPrompt:
  """A refinement prompt within its budget.

  Attributes:
    ids: token ids, generation prompt included.
    elided_tokens: how many of the draft's tokens were left out; 0 if none.
  """

  ids: list[int]
  elided_tokens: int


def reference(problem: Problem) -> str | None:
  """Returns y*: the worked solution, else the bare answer, else None."""
  for text in (problem.solution, problem.answer):
    if text and text.strip():
      return text
  return None


def privileged_text(problem: Problem) -> str | None:
  """Returns what a privileged teacher is shown: the row's own text, else y*.

  The row's own is what it has in a column `privileged`.
  """
  return _own_privileged(problem) or reference(problem)


def refinement_reference(problem: Problem) -> str | None:
  """Returns what a refinement prompt of OPSD shows as the reference.

  That is y*; of a problem without one the row's own privileged text.
  """
  return reference(problem) or _own_privileged(problem)


def lacks(experiment: Experiment, problem: Problem) -> str | None:
  """Returns what the run is to show or train on and a problem hasn't, or None.

  A reference as trajectory is learnt word for word, so that a privileged text,
  which may be a hint, can't stand for it.
  """
  e = experiment
  if e.trains_on == "y_star" and reference(problem) is None:
    return "trajectory=y_star has nothing to train on"
  shown = e.context_of_teacher == "x_reference"
  shown |= e.regime == "opsd" and e.teacher_writes == "y_r"
  if shown and privileged_text(problem) is None:
    return "the teacher has nothing to be shown"
  return None


def shown_draft(draft_text: str, draft_think: str) -> str:
  """Returns y_o as a refinement prompt has it (`refine.draft_think`).

  A draft whose thoughts nothing follows, as where a budget ended it, has no
  answer to show: under 'answer' it is shown whole, like under 'keep_text', for
  truncated drafts are refined, too.

  Raises:
    UserError: a choice that does not exist.
  """
  if draft_think not in ("keep_text", "strip", "answer"):
    raise UserError(
      f"refine.draft_think={draft_think}: choose keep_text, strip or answer"
    )
  if draft_think == "strip":
    return draft_text.replace("<think>", "").replace("</think>", "")
  if draft_think == "keep_text" or is_all_thoughts(draft_text):
    return draft_text
  return final_text(draft_text).strip()


def is_all_thoughts(text: str) -> bool:
  """Returns whether a response is thoughts with nothing after them."""
  return bool(text.strip()) and not final_text(text).strip()


def elision(domain: str) -> str:
  """Returns what stands for the part of a draft that doesn't fit."""
  return _ELISION[domain]


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """What the models are asked, in one wording.

  Attributes:
    templates: the wording.
  """

  templates: Templates

  @property
  def version(self) -> str:
    """Returns what tells this wording from others, for artifacts."""
    return self.templates.version

  def initial_version(self, domain: str) -> str:
    """Returns what tells the wording of `initial` alone from others.

    A system prompt of the set's is part of it.
    """
    return self.templates.version_of("initial", domain)

  def system_of(self, domain: str) -> str | None:
    """Returns the set's own system prompt, or None: it has none."""
    return self.templates.system(domain)

  def system(self, problem: Problem) -> str | None:
    """Returns the system turn before each message about a problem, or None.

    The row's own is part of x and goes before the set's.
    """
    own = _meta(problem).get(SYSTEM_TURN)
    return str(own) if own else self.system_of(problem.domain)

  def initial(self, problem: Problem) -> str:
    """Returns the stage-1 message: the same in OPD, OPSD, evaluation."""
    return self.templates.message(
      "initial", problem.domain, **_common_fields(problem)
    )

  def privileged(self, problem: Problem) -> str:
    """Returns the user message of the vanilla OPSD teacher: x and y*.

    Where the problem has a privileged text of its own, that is in y*'s place.

    Raises:
      UserError: the problem has neither that, nor a solution or an answer.
    """
    return self.templates.message(
      "privileged",
      problem.domain,
      privileged=_required(privileged_text(problem), problem),
      reference=reference(problem),
      **_common_fields(problem),
    )

  def refinement(self, problem: Problem, draft_text: str, regime: str) -> str:
    """Returns the stage-2 message: x and y_o, in regime 'opsd' also y*.

    In place of a y* that isn't there stands the row's own privileged text.

    Raises:
      UserError: regime 'opsd' and the problem has neither, or a regime that
        does not exist.
    """
    before, after = self.around_draft(problem, regime)
    return before + draft_text + after

  def around_draft(self, problem: Problem, regime: str) -> tuple[str, str]:
    """Returns the refinement message before and after the draft.

    Raises:
      UserError: as `refinement`.
    """
    check_regime(regime)
    shown: dict[str, str | None] = {}
    if regime == "opsd":
      shown["reference"] = _required(refinement_reference(problem), problem)
      shown["privileged"] = privileged_text(problem)
    return self.templates.around_draft(
      problem.domain, **shown, **_common_fields(problem)
    )

  def fit_initial(
    self,
    chat: Chat,
    problem: Problem,
    thinking: bool | None,
    max_tokens: int,
    stage: str = "rollout",
  ) -> list[int] | Rejected:
    """Fits one problem, as `fit_initials`."""
    return next(self.fit_initials(chat, [problem], thinking, max_tokens, stage))

  def fit_initials(
    self,
    chat: Chat,
    problems: Iterable[Problem],
    thinking: bool | None,
    max_tokens: int,
    stage: str = "rollout",
  ) -> Iterator[list[int] | Rejected]:
    """Yields prompt ids of `initial`, or the rejected row if too many.

    One for each problem, in their order.
    """
    asked = ((p, self.initial(p), self.system(p)) for p in problems)
    yield from fit_messages(chat, asked, thinking, max_tokens, stage)

  def fit_refinement(
    self,
    chat: Chat,
    problem: Problem,
    draft_text: str,
    regime: str,
    thinking: bool | None,
    max_tokens: int,
    overflow: str = "trim_middle",
    draft_think: str = "keep_text",
  ) -> FittedPrompt | Rejected:
    """Fits one draft, as `fit_refinements`."""
    return next(
      self.fit_refinements(
        chat,
        [(problem, draft_text)],
        regime,
        thinking,
        max_tokens,
        overflow,
        draft_think,
      )
    )

  def fit_refinements(
    self,
    chat: Chat,
    drafts: Iterable[tuple[Problem, str]],
    regime: str,
    thinking: bool | None,
    max_tokens: int,
    overflow: str = "trim_middle",
    draft_think: str = "keep_text",
  ) -> Iterator[FittedPrompt | Rejected]:
    """Yields a `refinement` prompt within `max_tokens` for each draft.

    x and y* are never cut. Under 'trim_middle' an over-long draft loses its
    middle: the ids of the whole prompt are kept up to a point inside the draft
    and again from a later one, with an elision mark between, so that as few
    tokens as possible go and none outside the draft. Cuts fall between
    characters.

    Args:
      chat: the refining model's.
      drafts: each problem (x, and y* in regime 'opsd') with a draft y_o, as
        text.
      regime: 'opd' or 'opsd'.
      thinking: as in `Chat.render`.
      max_tokens: the prompt's budget.
      overflow: 'trim_middle' or 'drop'.
      draft_think: 'keep_text' writes `<think>` and `</think>` as plain text,
        'strip' leaves the two marks out, and the thoughts stay; 'answer' leaves
        out the thoughts, too (see `shown_draft`).

    Yields:
      For each draft, in their order, the prompt, or the row set aside: dropped,
      without a reference, or too long even with the draft gone.
    """
    if overflow not in ("trim_middle", "drop"):
      raise UserError(f"refine.overflow={overflow}: choose trim_middle or drop")
    check_regime(regime)

    def has_all(problem: Problem) -> bool:
      return regime == "opd" or privileged_text(problem) is not None

    for some in _batches(drafts):
      shown = [(p, shown_draft(text, draft_think)) for p, text in some]
      whole = iter(
        chat.render_many(
          (self.refinement(p, text, regime) for p, text in shown if has_all(p)),
          thinking,
          (self.system(p) for p, _ in shown if has_all(p)),
        )
      )
      for problem, text in shown:
        if not has_all(problem):
          yield _reject(
            problem,
            "refine",
            "no solution, no answer and no privileged text to refer to",
          )
        elif len(ids := next(whole)) <= max_tokens:
          yield FittedPrompt(ids, 0)
        elif overflow == "drop":
          yield _reject(
            problem,
            "refine",
            f"refinement prompt of {len(ids)} tokens, over "
            f"refine.max_prompt_tokens={max_tokens} (refine.overflow=drop)",
          )
        else:
          yield self._trimmed(chat, problem, text, regime, thinking, max_tokens)

  def _trimmed(
    self,
    chat: Chat,
    problem: Problem,
    draft_text: str,
    regime: str,
    thinking: bool | None,
    max_tokens: int,
  ) -> FittedPrompt | Rejected:
    """Returns the prompt with the draft's middle left out."""
    before, after = self.around_draft(problem, regime)
    prompt = chat.render_with_offsets(
      before + draft_text + after, thinking, self.system(problem)
    )
    mark = chat.encode(elision(problem.domain))
    excess = len(prompt.ids) + len(mark) - max_tokens
    span = (len(before), len(before) + len(draft_text))
    cut = _middle_cut(prompt, span, excess)
    if cut is None:
      return _reject(
        problem,
        "refine",
        f"refinement prompt over refine.max_prompt_tokens={max_tokens} even "
        "with the whole draft left out",
      )
    start, stop = cut
    ids = prompt.ids[:start] + mark + prompt.ids[stop:]
    return FittedPrompt(ids, stop - start)


def load(name: str) -> PromptSet:
  """Reads a prompt set, by the value of `prompts.set`.

  Raises:
    UserError: see `Templates.load`.
  """
  return PromptSet(Templates.load(name, VERSION))


def of_run(experiment: Experiment, run_dir: RunDir) -> PromptSet:
  """Reads an experiment's prompt set; the run's rows are of the same wording.

  A folder's name is in the config, and what is in the folder may have changed
  since the rows there were made.

  Raises:
    UserError: they are of another wording, or see `load`.
  """
  prompts = load(experiment.prompts.set)
  for stage in ("rollout", "refine"):
    if others := other_wordings(run_dir, stage, prompts):
      raise UserError(
        f"{run_dir.stage(stage)}: its prompts are of another wording"
        f" ({', '.join(sorted(others))}) than that of"
        f" prompts.set={experiment.prompts.set} ({prompts.version}): bring the"
        " templates back to what they were, or start in a new --workdir"
      )
  return prompts


def other_wordings(run_dir: RunDir, stage: str, prompts: PromptSet) -> set[str]:
  """Returns the versions of a stage's prompts that aren't the set's."""
  rows = run_dir.table(stage, Trajectory, ["prompt_version"])
  return {*rows["prompt_version"].unique().to_pylist()} - {prompts.version}


@functools.cache
def default() -> PromptSet:
  """Returns the default prompt set."""
  return load(DEFAULT)


def fit_messages(
  chat: Chat,
  asked: Iterable[tuple[Problem, str, str | None]],
  thinking: bool | None,
  max_tokens: int,
  stage: str,
  begun: str = "",
) -> Iterator[list[int] | Rejected]:
  """Yields the prompt ids of messages, or the rejected row if too many.

  Args:
    chat: the answering model's.
    asked: each problem with the message that asks it and the system prompt
      before that.
    thinking: as in `Chat.render`.
    max_tokens: a prompt's budget.
    stage: names what rejects.
    begun: how all responses begin.
  """
  for some in _batches(asked):
    _, messages, systems = zip(*some, strict=True)
    prompts = chat.render_many(messages, thinking, systems, begun)
    for (problem, *_), ids in zip(some, prompts, strict=True):
      if len(ids) <= max_tokens:
        yield ids
        continue
      yield _reject(
        problem,
        stage,
        f"prompt of {len(ids)} tokens, over max_prompt_tokens={max_tokens}",
      )


def _batches(items: Iterable[_T]) -> Iterator[list[_T]]:
  """Yields as many items as keep all cores busy and memory small."""
  iterator = iter(items)
  while some := list(itertools.islice(iterator, 64)):
    yield some


def _own_privileged(problem: Problem) -> str | None:
  own = str(_meta(problem).get("privileged") or "")
  return own if own.strip() else None


def _required(text: str | None, problem: Problem) -> str:
  if text is None:
    raise UserError(
      f"problem {problem.problem_id} of {problem.source}: neither a solution "
      "nor an answer nor a privileged text, and regime=opsd shows one; use"
      " regime=opd"
    )
  return text


def check_regime(regime: str) -> None:
  """Raises a `UserError` for a regime that does not exist."""
  if regime not in ("opd", "opsd"):
    raise UserError(f"regime={regime}: choose opd or opsd")


def _meta(problem: Problem) -> dict[str, Any]:
  """Returns what else the source knows of a problem."""
  return json.loads(problem.meta)


def _common_fields(problem: Problem) -> dict[str, str | None]:
  """Returns the fields that every role's templates have."""
  starter_code = _meta(problem).get("starter_code")
  return {
    "problem": problem.text,
    "starter_code": str(starter_code) if starter_code else None,
  }


def _reject(problem: Problem, stage: str, reason: str) -> Rejected:
  return Rejected(problem.problem_id, problem.source, stage, reason)


def _middle_cut(
  prompt: Rendered, span: tuple[int, int], excess: int
) -> tuple[int, int] | None:
  """Chooses at least `excess` of the draft's ids to leave out.

  Args:
    prompt: the whole prompt.
    span: the draft's half-open range of characters.
    excess: how many ids have to go.

  Returns:
    The half-open range of ids that is nearest the draft's middle, among the
    shortest near it; None where it would leave nothing of the draft.
  """
  # Ids of the draft alone: one that also covers a character of the prompt
  # around it stays.
  inside = [
    i
    for i, range_ in enumerate(prompt.offsets)
    if range_ and span[0] <= range_[0] and range_[1] <= span[1]
  ]
  if excess >= len(inside):
    return None
  first, last = inside[0], inside[-1] + 1

  def clean(i: int) -> bool:  # between two characters, not inside one
    if i in (first, last):
      return True
    left, right = prompt.offsets[i - 1], prompt.offsets[i]
    return bool(left and right and left[1] <= right[0])

  # A character may be spread over several ids. A few starts to either side of
  # the middle are enough to find a cut between characters without loss.
  centre = first + (len(inside) - excess + 1) // 2
  best = None
  for start in range(
    max(first, centre - 8), min(last - excess, centre + 8) + 1
  ):
    if not clean(start):
      continue
    stop = start + excess
    while not clean(stop):
      stop += 1
    if stop - start < len(inside):
      cost = (stop - start, abs(start - centre))
      best = min(best or (cost, start, stop), (cost, start, stop))
  return None if best is None else (best[1], best[2])
