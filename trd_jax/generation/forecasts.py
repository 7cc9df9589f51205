"""What later stages would make of responses that use their whole budget.

Known before the first token is generated: a prompt without its draft has a
length, a draft and a response have a longest one, and budgets are keys.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Self

from trd_jax.data import contexts
from trd_jax.data.chat import Chat
from trd_jax.data.prompts import (
  PromptSet,
  elision,
  lacks,
)
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.progress import Progress
from trd_jax.experiment.records import Problem

# Stands for a draft while the prompt around it is counted: what a tokenizer
# makes of the template's ends beside a draft, it makes of them beside this.
_DIGIT = "1"
_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Lengths:
  """How some lengths, in tokens, are spread.

  Attributes:
    min: the shortest.
    median: the middle one, or between the two in the middle.
    p95: the shortest that is no shorter than 95% of them.
    max: the longest.
  """

  min: int
  median: float
  p95: int
  max: int

  @classmethod
  def of(cls, lengths: Iterable[int]) -> Self | None:
    """Summarizes lengths; returns None where there is none."""
    ordered = sorted(lengths)
    if not ordered:
      return None
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return cls(ordered[0], statistics.median(ordered), p95, ordered[-1])


@dataclasses.dataclass(frozen=True)
class Forecast:
  """Counts of problems, for rollouts and refinements as long as may be.

  Attributes:
    problems: how many are counted: those whose rollout prompt fits.
    fixed: tokens of a refinement prompt without its draft; None for methods
      that don't refine.
    no_reference: problems without what `prompts.lacks` names.
    no_room: refinement prompts that have no room for any draft.
    trimmed: refinement prompts in which a draft of
      `rollout.max_response_tokens` would lose its middle.
    dropped: those that such a draft would have set aside; `no_reference` and
      `no_room` are among them.
    over_student: trajectories over `train.max_student_tokens`, among those
      that are there.
    over_teacher: the same for `train.max_teacher_tokens`.
    impossible: keys whose budget leaves nothing of any problem, and why.
    max_prompt_tokens: `refine.max_prompt_tokens`.
    max_student_tokens: `train.max_student_tokens`.
    max_teacher_tokens: `train.max_teacher_tokens`.
  """

  problems: int
  fixed: Lengths | None
  no_reference: int
  no_room: int
  trimmed: int
  dropped: int
  over_student: int
  over_teacher: int
  impossible: list[str]
  max_prompt_tokens: int
  max_student_tokens: int
  max_teacher_tokens: int


def of_rollouts(
  experiment: Experiment,
  prompts: PromptSet,
  student: Chat,
  teacher: Chat,
  problems: Sequence[Problem],
  initial_tokens: Mapping[str, int],
) -> Forecast:
  """Looks ahead from the rollout stage to refinement and training.

  Args:
    experiment: its budgets.
    prompts: the wording.
    student: renders the student's contexts.
    teacher: renders refinement prompts and teacher contexts.
    problems: x and y*.
    initial_tokens: length of the rollout prompt by problem id; a problem
      without one is left out.

  Raises:
    UserError: a thinking key asks for a mode that the template hasn't.
  """
  train, refine = experiment.train, experiment.refine
  context = experiment.context_of_teacher
  problems = [p for p in problems if p.problem_id in initial_tokens]
  usable = [p for p in problems if lacks(experiment, p) is None]
  modes = contexts.planned_modes(experiment, student, teacher)
  form = train.context
  student_tokens = _student_tokens(
    experiment, prompts, student, modes, problems, initial_tokens
  )
  fixed: list[int] = []
  trimmed = no_room = 0
  # Prompt and response lengths of each trajectory that would be there.
  students: list[int] = []
  teachers: list[int] = []
  response = experiment.rollout.max_response_tokens
  if experiment.trajectory_stage == "refine":
    response = refine.max_response_tokens
  # Contexts that hold no draft have their true length already.
  scored = _scored_tokens(experiment, prompts, teacher, modes, usable)
  if experiment.teacher_writes == "y_r":
    draft = experiment.rollout.max_response_tokens
    budget = refine.max_prompt_tokens
    # A prompt without its draft can't be rendered as such, so one of a single
    # token stands for it, and is taken off again.
    digit = len(teacher.encode(_DIGIT))
    # What the template adds to a message, where training leaves it out.
    around = 0
    if form == "plain":
      (plain,), (chat,) = (
        contexts.render_many(teacher, [_DIGIT], how, refine.thinking)
        for how in ("plain", "chat")
      )
      around = len(chat) - len(plain)
    for problem, length in _counted(
      teacher,
      prompts,
      usable,
      (prompts.refinement(p, _DIGIT, experiment.regime) for p in usable),
      refine.thinking,
      "refinement forecast",
    ):
      fixed.append(length - digit)
      no_room += fixed[-1] >= budget
      prompt = fixed[-1] + draft
      if prompt > budget:
        mark = len(teacher.encode(elision(problem.domain)))
        if refine.overflow == "drop" or fixed[-1] + mark >= budget:
          continue
        trimmed += 1
        prompt = budget
      students.append(student_tokens[problem.problem_id])
      if context is not None:
        teachers.append(scored.get(problem.problem_id, prompt - around))
    shortest = min(scored.values() or fixed, default=None)
  else:
    students = [student_tokens[problem.problem_id] for problem in usable]
    teachers = list(scored.values())
    shortest = min(teachers, default=None)
  return Forecast(
    problems=len(problems),
    fixed=Lengths.of(fixed),
    no_reference=len(problems) - len(usable),
    no_room=no_room,
    trimmed=trimmed,
    dropped=len(problems) - len(students),
    over_student=sum(n + response > train.max_student_tokens for n in students),
    over_teacher=sum(n + response > train.max_teacher_tokens for n in teachers),
    impossible=list(
      _impossible(
        experiment,
        min(student_tokens.values()),
        shortest,
        min(fixed, default=None),
      )
    ),
    max_prompt_tokens=refine.max_prompt_tokens,
    max_student_tokens=train.max_student_tokens,
    max_teacher_tokens=train.max_teacher_tokens,
  )


def _student_tokens(
  experiment: Experiment,
  prompts: PromptSet,
  student: Chat,
  modes: contexts.Modes,
  problems: Sequence[Problem],
  initial_tokens: Mapping[str, int],
) -> Mapping[str, int]:
  """Returns the length of the student's context in training, by problem id.

  It is the rollout prompt's, but where the student learns after another prompt
  than the one that it answered.
  """
  form = experiment.train.context
  same_mode = student.thinks(modes.student) == student.thinks(
    experiment.student.thinking
  )
  if form == "chat" and same_mode:
    return initial_tokens
  counted = _counted(
    student,
    prompts,
    problems,
    map(prompts.initial, problems),
    modes.student,
    "student's contexts forecast",
    form,
  )
  return {p.problem_id: length for p, length in counted}


def _scored_tokens(
  experiment: Experiment,
  prompts: PromptSet,
  teacher: Chat,
  modes: contexts.Modes,
  usable: Sequence[Problem],
) -> dict[str, int]:
  """Returns the length of each teacher context that holds no draft."""
  context = experiment.context_of_teacher
  if context not in ("x", "x_reference"):
    return {}
  message = {"x": prompts.initial, "x_reference": prompts.privileged}[context]
  counted = _counted(
    teacher,
    prompts,
    usable,
    map(message, usable),
    modes.teacher,
    "training forecast",
    experiment.train.context,
  )
  return {p.problem_id: length for p, length in counted}


def _counted(
  chat: Chat,
  wording: PromptSet,
  problems: Sequence[Problem],
  messages: Iterable[str],
  thinking: bool | None,
  desc: str,
  form: str = "chat",
) -> Iterator[tuple[Problem, int]]:
  """Yields each problem with the length of its prompt."""
  texts = iter(messages)
  with Progress(len(problems), desc, "prompts") as progress:
    for at in range(0, len(problems), _BATCH):
      some = problems[at : at + _BATCH]
      batch = (next(texts) for _ in some)
      prompts = contexts.render_many(
        chat, batch, form, thinking, map(wording.system, some)
      )
      yield from zip(some, map(len, prompts), strict=True)
      progress.update(len(some))


def _impossible(
  experiment: Experiment,
  shortest_initial: int,
  shortest: int | None,
  shortest_fixed: int | None,
) -> Iterator[str]:
  """Yields the budgets that contradict every problem, one line each.

  Args:
    experiment: its budgets.
    shortest_initial: tokens of the student's shortest context.
    shortest: of the teacher's; None where it has none.
    shortest_fixed: of a refinement prompt without its draft, likewise.
  """
  refine, train = experiment.refine, experiment.train
  if shortest_fixed is not None and shortest_fixed >= refine.max_prompt_tokens:
    yield (
      f"refine.max_prompt_tokens={refine.max_prompt_tokens} leaves no room for"
      f" any draft: the shortest prompt takes {shortest_fixed:,} tokens without"
      " one; raise it"
    )
  for side, prompt, bound in (
    ("student", shortest_initial, train.max_student_tokens),
    ("teacher", shortest, train.max_teacher_tokens),
  ):
    if prompt is not None and prompt >= bound:
      yield (
        f"train.max_{side}_tokens={bound} leaves nothing to train on: the"
        f" shortest prompt on this side takes {prompt:,} tokens; raise it"
      )
