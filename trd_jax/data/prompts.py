"""What the models are asked, and how it is made to fit.

Four roles per domain, all in one user message (Appendix C.4 names them; the
wording is ours): the initial prompt of stage 1, x; the privileged prompt of
the vanilla OPSD teacher, x and y*; the refinement prompt of OPD, x and y_o;
and that of OPSD, x, y_o and y*. A refined response has to stand on its own,
because the student that learns it sees x alone: it may mention neither the
draft nor the reference.

Changing any wording changes `VERSION`, which every artifact carries.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

from trd_jax.data.chat import Chat, Rendered
from trd_jax.data.final_answer import final_text
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import Problem, Rejected

VERSION = "1"

_T = TypeVar("_T")

_FINISH = {
  "math": "End with the final answer inside \\boxed{}.",
  "code": (
    "End with the complete program in a single ```python code block, and put "
    "no other code block in your response."
  ),
}
_TASK = {
  "math": "Work through this problem step by step.",
  "code": "Think the problem through, then write a Python 3 program for it.",
}
_PRIVILEGED = (
  "The reference above is correct; it may be a full solution or only the "
  "result. Make sure that you see why it holds, then solve the problem "
  "yourself, step by step and in your own words. Write as if you had never "
  "been shown a reference: don't mention it, and derive what you use."
)
_REFINE = (
  "The draft above is somebody's attempt. It may be right, partly wrong, "
  "long-winded, or cut off. Rewrite it into one correct and complete response "
  "to the problem. Keep its approach, its order and its wording wherever they "
  "hold up; replace every step that is wrong or leads nowhere by the right "
  "one; drop repetitions and detours; finish what is unfinished."
)
_REFINE_REFERENCE = (
  "The reference is correct; it may be a full solution or only the result. "
  "Use it to find out where the draft goes wrong and what the response has to "
  "arrive at, but derive every step that you need."
)
_STAND_ALONE = (
  "Your response is read by someone who has the problem and nothing else. So "
  "go straight through the reasoning, with no comment on what was changed and "
  "no mention of a draft{or_reference} or of these instructions."
)
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


def initial(problem: Problem) -> str:
  """Returns the stage-1 message: the same in OPD, OPSD, evaluation."""
  if problem.domain == "arithmetic":
    return problem.text
  ask = f"{_TASK[problem.domain]} {_FINISH[problem.domain]}"
  return f"{problem.text}\n\n{ask}"


def privileged(problem: Problem) -> str:
  """Returns the user message of the vanilla OPSD teacher: x and y*.

  Raises:
    UserError: the problem has neither a solution nor an answer.
  """
  y_star = _require_reference(problem)
  if problem.domain == "arithmetic":
    return f"{problem.text}\nReference:\n{y_star}\nSolve."
  return (
    f"# Problem\n{problem.text}\n\n# Reference\n{y_star}\n\n# Task\n"
    f"{_PRIVILEGED} {_FINISH[problem.domain]}"
  )


def refinement(problem: Problem, draft_text: str, regime: str) -> str:
  """Returns the stage-2 message: x and y_o, in regime 'opsd' also y*.

  Raises:
    UserError: regime 'opsd' and the problem has no reference, or a regime
      that does not exist.
  """
  before, after = _around_draft(problem, regime)
  return before + draft_text + after


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


def fit_initial(
  chat: Chat,
  problem: Problem,
  thinking: bool | None,
  max_tokens: int,
  stage: str = "rollout",
) -> list[int] | Rejected:
  """Fits one problem, as `fit_initials`."""
  return next(fit_initials(chat, [problem], thinking, max_tokens, stage))


def fit_initials(
  chat: Chat,
  problems: Iterable[Problem],
  thinking: bool | None,
  max_tokens: int,
  stage: str = "rollout",
) -> Iterator[list[int] | Rejected]:
  """Yields prompt ids of `initial`, or the rejected row if too many.

  One for each problem, in their order.
  """
  for some in _batches(problems):
    prompts = chat.render_many(map(initial, some), thinking)
    for problem, ids in zip(some, prompts, strict=True):
      if len(ids) <= max_tokens:
        yield ids
        continue
      yield _reject(
        problem,
        stage,
        f"prompt of {len(ids)} tokens, over max_prompt_tokens={max_tokens}",
      )


def fit_refinement(
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
    fit_refinements(
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
    return regime == "opd" or reference(problem) is not None

  for some in _batches(drafts):
    shown = [(p, shown_draft(text, draft_think)) for p, text in some]
    whole = iter(
      chat.render_many(
        (refinement(p, text, regime) for p, text in shown if has_all(p)),
        thinking,
      )
    )
    for problem, text in shown:
      if not has_all(problem):
        yield _reject(
          problem, "refine", "no solution and no answer to refer to"
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
        yield _trimmed(chat, problem, text, regime, thinking, max_tokens)


def _trimmed(
  chat: Chat,
  problem: Problem,
  draft_text: str,
  regime: str,
  thinking: bool | None,
  max_tokens: int,
) -> FittedPrompt | Rejected:
  """Returns the prompt with the draft's middle left out."""
  before, after = _around_draft(problem, regime)
  prompt = chat.render_with_offsets(before + draft_text + after, thinking)
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


def _batches(items: Iterable[_T]) -> Iterator[list[_T]]:
  """Yields as many items as keep all cores busy and memory small."""
  iterator = iter(items)
  while some := list(itertools.islice(iterator, 64)):
    yield some


def _require_reference(problem: Problem) -> str:
  y_star = reference(problem)
  if y_star is None:
    raise UserError(
      f"problem {problem.problem_id} of {problem.source}: neither a solution "
      "nor an answer, and regime=opsd shows one; use regime=opd"
    )
  return y_star


def check_regime(regime: str) -> None:
  """Raises a `UserError` for a regime that does not exist."""
  if regime not in ("opd", "opsd"):
    raise UserError(f"regime={regime}: choose opd or opsd")


def _around_draft(problem: Problem, regime: str) -> tuple[str, str]:
  """Returns the refinement message before and after the draft."""
  check_regime(regime)
  y_star = _require_reference(problem) if regime == "opsd" else None
  if problem.domain == "arithmetic":
    shown = "" if y_star is None else f"\nReference:\n{y_star}"
    return f"{problem.text}\nDraft:\n", f"{shown}\nRewrite."
  shown = "" if y_star is None else f"# Reference\n{y_star}\n\n"
  task = [
    _REFINE,
    *([] if y_star is None else [_REFINE_REFERENCE]),
    _STAND_ALONE.format(or_reference="" if y_star is None else ", a reference"),
    _FINISH[problem.domain],
  ]
  return (
    f"# Problem\n{problem.text}\n\n# Draft\n",
    f"\n\n{shown}# Task\n{' '.join(task)}",
  )


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
