"""What student and teacher read before the response that both score.

Student and teacher each have their own prompt, their own chat template and
their own lengths; the response's token ids are the same. So position
`len(context) - 1 + t` predicts response token t on both sides.

Both contexts are in the thinking mode in which the response was written
(docs/training.md, "Thinking"; the paper doesn't name one). A model that thinks
opens its response with a thinking block; in a context of the other mode the
first token's divergence is huge, says nothing about the problem, and teaches
the student to open its block or not to.

With `train.context=plain` neither side has a template: both read the message as
plain text, and the response on the line after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from trd_jax.data.chat import Chat
from trd_jax.data.prompts import PromptSet
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.methods import TRAJECTORIES
from trd_jax.experiment.records import Problem

# Between a message in plain text and the response.
_GAP = "\n"


class Modes(NamedTuple):
  """The thinking modes around trajectories of one kind.

  Attributes:
    written: whether they were written with thinking on.
    student: the switch of the student's contexts, as `Chat.render` takes it;
      None where these are plain text.
    teacher: the switch of the teacher's.
  """

  written: bool
  student: bool | None
  teacher: bool | None


def planned_modes(
  experiment: Experiment, student: Chat, teacher: Chat
) -> Modes:
  """Returns the modes around trajectories that are still to be made.

  Raises:
    UserError: a thinking key asks for a mode that a template hasn't.
  """
  refine = experiment.trajectory_stage == "refine"
  section = experiment.refine if refine else experiment.student
  return scoring_modes(experiment, student, teacher, section.thinking)


def _writer(
  experiment: Experiment, student: Chat, teacher: Chat
) -> Chat | None:
  """Returns the model whose words the trajectories are; None: a reference's."""
  sides = {"student": student, "teacher": teacher}
  return sides.get(TRAJECTORIES[experiment.trains_on].writer)


def scoring_modes(
  experiment: Experiment, student: Chat, teacher: Chat, recorded: bool | None
) -> Modes:
  """Returns the modes that score a trajectory: as written, or by key.

  A model without the mode scores in the only one that it has. A reference has
  no thoughts.

  Args:
    experiment: `train.student_thinking` and `teacher.thinking` override the
      mode of their side. The latter isn't read where the teacher has the
      refinement prompt as its context.
    student: renders rollout prompts and the student's contexts.
    teacher: renders refinement prompts and the teacher's contexts.
    recorded: `Trajectory.thinking`; None stands for the writer's default. Of
      a reference it isn't read.

  Raises:
    UserError: a thinking key asks for a mode that a template hasn't.
  """
  # The refinement prompt was stored with its mode; nothing renders it again, so
  # that a key of the teacher's mode has nothing to say there.
  writer = _writer(experiment, student, teacher)
  written = writer is not None and writer.thinks(recorded)
  if experiment.train.context == "plain":
    return Modes(written, None, None)
  as_refined = experiment.context_of_teacher == "refine"
  override = None if as_refined else experiment.teacher.thinking
  return Modes(
    written,
    _switch(student, experiment.train.student_thinking, written),
    _switch(teacher, override, written),
  )


def _switch(chat: Chat, override: bool | None, written: bool) -> bool | None:
  if override is not None:
    chat.thinks(override)  # or a refusal
    return override
  # A model with one mode alone gets no switch, which some templates refuse.
  if chat.supports_thinking or chat.thinks(None) == written:
    return written
  return None


def render_many(
  chat: Chat,
  messages: Iterable[str],
  form: str,
  thinking: bool | None,
  systems: Iterable[str | None] | None = None,
) -> list[list[int]]:
  """Returns the context that each message makes.

  Args:
    chat: of the model that reads them.
    messages: of a prompt set.
    form: of `train.context`: in the chat template (chat), or plain text.
    thinking: as in `Chat.render`, for the template.
    systems: the system prompt of each message; None: there is none.

  Raises:
    UserError: the template has no such mode.
  """
  if form != "plain":
    return chat.render_many(messages, thinking, systems)
  pairs = zip(messages, systems or itertools.repeat(None), strict=False)
  return [chat.encode(_before(s) + message + _GAP) for message, s in pairs]


def _before(system: str | None) -> str:
  """Returns what stands before a message in plain text."""
  return "" if system is None else f"{system}\n\n"


def student_context(
  prompts: PromptSet,
  chat: Chat,
  problem: Problem,
  thinking: bool | None,
  form: str = "chat",
) -> list[int]:
  """Returns the student's prompt before a response: x alone, always."""
  (ids,) = render_many(
    chat, [prompts.initial(problem)], form, thinking, [prompts.system(problem)]
  )
  return ids


def teacher_context(
  prompts: PromptSet,
  chat: Chat,
  problem: Problem,
  context: str,
  thinking: bool | None,
  refinement_ids: list[int] | None = None,
  form: str = "chat",
) -> list[int]:
  """Returns the teacher's prompt before the same response.

  Args:
    prompts: the wording.
    chat: the teacher's.
    problem: x and y*.
    context: of `methods.TEACHER_CONTEXTS`: x, x and y*, or the refinement
      prompt that y_r was made from.
    thinking: as in `Chat.render`; of a stored prompt the mode that it is in.
    refinement_ids: the stored refinement prompt, used verbatim where it is the
      context, and not read otherwise.
    form: as in `render_many`; plain takes the template off a stored prompt.

  Raises:
    UserError: no `refinement_ids` where they are the context, or no reference
      where it is shown.
  """
  if context == "refine":
    if not refinement_ids:
      raise UserError(
        f"problem {problem.problem_id}: teacher_context={context} needs the"
        " prompt of the refine stage; run that stage first"
      )
    if form == "plain":
      system = prompts.system(problem)
      return chat.plain_message(
        refinement_ids, thinking, _GAP, _before(system), system
      )
    return list(refinement_ids)
  message = {"x": prompts.initial, "x_reference": prompts.privileged}[context]
  (ids,) = render_many(
    chat, [message(problem)], form, thinking, [prompts.system(problem)]
  )
  return ids


def describe_modes(
  student: Chat, teacher: Chat, modes: Modes, form: str = "chat"
) -> str:
  """Returns one line: how trajectories are written and scored.

  Args:
    student: the student's template.
    teacher: the teacher's.
    modes: what `scoring_modes` gives.
    form: of `train.context`.
  """
  if form == "plain":
    return (
      f"written with thinking {on_or_off(modes.written)}, scored after plain"
      " text"
    )
  bound = [
    side
    for side, chat in (("student", student), ("teacher", teacher))
    if not chat.supports_thinking
  ]
  only = f" (the {' and the '.join(bound)} can't do otherwise)" if bound else ""
  sides = student.thinks(modes.student), teacher.thinks(modes.teacher)
  written = on_or_off(modes.written)
  if sides == (modes.written, modes.written):
    return f"written and scored with thinking {written}{only}"
  return (
    f"written with thinking {written}, scored by the student with thinking"
    f" {on_or_off(sides[0])} and by the teacher with thinking"
    f" {on_or_off(sides[1])}{only}"
  )


def mode_warnings(
  experiment: Experiment, student: Chat, teacher: Chat, modes: Modes
) -> list[str]:
  """Returns a line for each side that scores in another mode.

  Only a key makes it so, or a model that has one mode alone.
  """
  if experiment.train.context == "plain":
    return []
  along = experiment.trains_on
  override = experiment.teacher.thinking
  sides = [
    (
      "student",
      student,
      modes.student,
      "train.student_thinking",
      experiment.train.student_thinking,
    )
  ]
  warnings = []
  if experiment.context_of_teacher in ("x", "x_reference"):
    sides.append(
      ("teacher", teacher, modes.teacher, "teacher.thinking", override)
    )
  elif override is not None:
    warnings.append(
      f"teacher.thinking={override} is not read: "
      + (
        f"no teacher scores {along}"
        if experiment.context_of_teacher is None
        else f"the teacher scores {along} after the prompt that it was written"
        " after"
      )
    )
  # Two templates that think may still open the block in different places: in
  # the prompt, or as the response's first token.
  writer = _writer(experiment, student, teacher) or student
  opened = writer.opens_thoughts(_switch(writer, None, modes.written))
  for side, chat, switch, key, value in sides:
    thinks = chat.thinks(switch)
    if thinks != modes.written:
      why = f"{chat.name} can't do otherwise"
      if value is not None:
        why = f"{key}={value}"
      warnings.append(
        f"mixed thinking modes: {along} is written with thinking"
        f" {on_or_off(modes.written)}, and the {side} scores it with thinking"
        f" {on_or_off(thinks)} ({why}); the first tokens' divergence will be"
        " dominated by that"
      )
    elif thinks and chat.opens_thoughts(switch) != opened:
      warnings.append(
        f"one of the templates of {writer.name} and {chat.name} opens the"
        f" thinking block in the prompt, the other leaves it to {along}; the"
        " first tokens' divergence will be dominated by that"
      )
  return warnings


class Outlook(NamedTuple):
  """What is known of thinking modes before anything is generated.

  Attributes:
    stages: whether a stage's prompts let a response think, by stage.
    scoring: what `describe_modes` says; None without both models' templates.
    warnings: what `mode_warnings` gives.
  """

  stages: dict[str, bool]
  scoring: str | None
  warnings: list[str]

  def without(self, stage: str) -> dict[str, bool]:
    """Returns the modes of the other stages."""
    return {name: on for name, on in self.stages.items() if name != stage}


def outlook(
  experiment: Experiment, student: Chat | None, teacher: Chat | None
) -> Outlook:
  """Returns the modes of an experiment, as far as templates are at hand.

  Raises:
    UserError: a thinking key asks for a mode that a template hasn't.
  """
  stages = {}
  if student is not None:
    stages["rollout"] = student.thinks(experiment.student.thinking)
  if teacher is not None and experiment.teacher_writes is not None:
    stages["refine"] = teacher.thinks(experiment.refine.thinking)
  if student is not None:
    stages["evaluate"] = student.thinks(experiment.evaluation_thinking)
  if student is None or teacher is None:
    return Outlook(stages, None, [])
  modes = planned_modes(experiment, student, teacher)
  form = experiment.train.context
  return Outlook(
    stages,
    f"{experiment.trains_on}: {describe_modes(student, teacher, modes, form)}",
    mode_warnings(experiment, student, teacher, modes),
  )


def on_or_off(thinks: bool) -> str:
  """Returns a mode as people call it."""
  return "on" if thinks else "off"
