"""What student and teacher read before the response that both score.

Student and teacher each have their own prompt, their own chat template and
their own lengths; the response's token ids are the same. So position
`len(context) - 1 + t` predicts response token t on both sides.
"""

from __future__ import annotations

from trd_jax.chat import Chat
from trd_jax.errors import UserError
from trd_jax.prompts import check_regime, initial, privileged
from trd_jax.records import Problem


def student_context(
  chat: Chat, problem: Problem, thinking: bool | None
) -> list[int]:
  """The student's prompt before a response it learns: x alone, always."""
  return chat.render(initial(problem), thinking)


def teacher_context(
  chat: Chat,
  problem: Problem,
  method: str,
  regime: str,
  thinking: bool | None,
  refinement_ids: list[int] | None = None,
) -> list[int]:
  """The teacher's prompt before the same response.

  Args:
    chat: the teacher's.
    problem: x and y*.
    method: 'trd' scores y_r after the refinement prompt it was made from;
      every other method scores y_o after x (OPD) or x and y* (OPSD).
    regime: 'opd' or 'opsd'.
    thinking: as in `Chat.render`; 'trd' takes the stored prompt's.
    refinement_ids: the stored refinement prompt, used verbatim; 'trd' only.

  Raises:
    UserError: 'trd' without `refinement_ids`, or OPSD without a reference.
  """
  if method == "trd":
    if not refinement_ids:
      raise UserError(
        f"problem {problem.problem_id}: method=trd needs the prompt of the "
        "refine stage; run that stage first"
      )
    return list(refinement_ids)
  check_regime(regime)
  message = privileged if regime == "opsd" else initial
  return chat.render(message(problem), thinking)


def thinking_warnings(
  *,
  method: str,
  regime: str,
  student_chat: Chat,
  teacher_chat: Chat,
  student: bool | None,
  teacher: bool | None,
  refine: bool | None,
) -> list[str]:
  """One line for each context that scores a trajectory in another mode.

  A model that thinks opens its response with a thinking block; a context in
  the other mode then puts a huge divergence on the first token that says
  nothing about the problem. Models without thinking count as
  thinking off.

  Args:
    method: 'trd' or a method on raw rollouts.
    regime: 'opd' or 'opsd'; in the latter `teacher_chat` is the student's.
    student_chat: renders rollout prompts and student contexts.
    teacher_chat: renders refinement prompts and teacher contexts.
    student: `student.thinking`.
    teacher: `teacher.thinking`.
    refine: `refine.thinking`.
  """
  # y_o methods score the student's own mode on the student's side, trd scores
  # after the refinement prompt on the teacher's: the other side can differ.
  on_student = student_chat.thinks(student)
  if method == "trd":
    made, scored = teacher_chat.thinks(refine), on_student
    keys = f"refine.thinking={refine}", f"student.thinking={student}"
    side = "student"
  else:
    made, scored = on_student, teacher_chat.thinks(teacher)
    keys = f"student.thinking={student}", f"teacher.thinking={teacher}"
    side = "teacher"
  if made == scored:
    return []
  return [
    f"mixed thinking modes (method={method}, regime={regime}): {keys[0]} made "
    f"the trajectories with thinking {_on(made)}, and the {side} scores them "
    f"under {keys[1]} with thinking {_on(scored)}; the first tokens' "
    "divergence will be dominated by that"
  ]


def _on(thinks: bool) -> str:
  return "on" if thinks else "off"
