import pytest
from chat_folders import (
  CONTROLS,
  HYBRID,
  INSTRUCT,
  QWEN,
  REAL_MODES,
  TEMPLATE,
  needs_qwen,
  real_chat,
  real_ids,
  write_folder,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trd_jax import contexts, prompts
from trd_jax.chat import Chat
from trd_jax.errors import UserError
from trd_jax.records import Problem

words = st.lists(
  st.sampled_from(CONTROLS) | st.text("ab \n.{}<>|é解", max_size=12), max_size=9
).map("".join)


def problem(
  text="What is 3 + 4?", solution="3 + 4 = \\boxed{7}", domain="math"
):
  return Problem("p1", text, "7", solution, domain, "test", None, "{}")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
  return Chat.load(write_folder(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
  """The same vocabulary under a template without thinking."""
  template = TEMPLATE.split("{% if enable")[0] + "{% endif %}"
  folder = tmp_path_factory.mktemp("instruct")
  return Chat.load(write_folder(folder, template=template))


@settings(max_examples=60, deadline=None)
@given(
  x=words,
  y_star=words,
  draft=words,
  method=st.sampled_from(["trd", "forward_kl", "reverse_kl_topk"]),
  regime=st.sampled_from(["opd", "opsd"]),
  thinking=st.sampled_from([None, True, False]),
)
def test_contexts_hand_over_to_the_same_response(
  chat, x, y_star, draft, method, regime, thinking
):
  """In one mode both contexts end in the same ids, so any response follows
  the same last tokens on both sides, at slots that match one to one."""
  assume(x.strip() and y_star.strip())
  p = problem(text=x, solution=y_star)
  refined = prompts.fit_refinement(
    chat, p, draft, regime, thinking, 100_000
  ).ids
  student = contexts.student_context(chat, p, thinking)
  teacher = contexts.teacher_context(chat, p, method, regime, thinking, refined)
  end = chat.stop_ids[0]
  handover = student[len(student) - student[::-1].index(end) :]
  assert handover
  assert teacher[-len(handover) - 1 :] == [end, *handover]
  response = chat.encode(draft)
  for context in (student, teacher):
    row = context + response
    for t, i in enumerate(response):
      assert row[len(context) + t] == i
  # Who sees what holds for ids as it does for text.
  assert student == chat.render(prompts.initial(p), thinking)
  if method == "trd":
    assert teacher == refined
  elif regime == "opd":
    assert teacher == student
  else:
    assert teacher == chat.render(prompts.privileged(p), thinking)


@needs_qwen
@pytest.mark.parametrize("domain", ["math", "code"])
@pytest.mark.parametrize("theirs", REAL_MODES)
@pytest.mark.parametrize("ours", REAL_MODES)
def test_contexts_on_the_real_templates_are_known_to_the_id(
  ours, theirs, domain
):
  """Each pair of student and teacher; in OPSD they are one model."""
  student, teacher = real_chat(ours[0]), real_chat(theirs[0])
  p = problem(domain=domain)
  draft = "<think>Hmm: 3 + 4 = 8.</think> \\boxed{8}"
  found = contexts.student_context(student, p, ours[1])
  assert found == real_ids(student, prompts.initial(p), ours)
  regimes = ["opd"] if student is not teacher else ["opd", "opsd"]
  for regime in regimes:
    refined = prompts.fit_refinement(
      teacher, p, draft, regime, theirs[1], 9999
    ).ids
    message = prompts.initial if regime == "opd" else prompts.privileged
    expected = {
      "trd": real_ids(teacher, prompts.refinement(p, draft, regime), theirs),
      "forward_kl": real_ids(teacher, message(p), theirs),
    }
    for method, ids in expected.items():
      context = contexts.teacher_context(
        teacher, p, method, regime, theirs[1], refined
      )
      assert context == ids


def test_trd_without_its_refinement_prompt(chat):
  with pytest.raises(UserError, match="p1: method=trd needs the prompt"):
    contexts.teacher_context(chat, problem(), "trd", "opd", None, None)
  ids = [1, 2, 3]
  found = contexts.teacher_context(chat, problem(), "trd", "opd", None, ids)
  assert found == ids
  assert found is not ids


# method, student, teacher, refine, keys of the warning
HYBRID_CASES = [
  ("trd", None, None, False, ("refine.thinking", "student.thinking")),
  ("trd", True, False, False, ("refine.thinking", "student.thinking")),
  ("trd", False, True, False, ()),
  ("trd", None, None, True, ()),
  ("trd", True, None, None, ()),
  ("forward_kl", None, False, False, ("student.thinking", "teacher.thinking")),
  ("forward_kl", False, None, False, ("student.thinking", "teacher.thinking")),
  ("forward_kl", None, True, False, ()),
  ("reverse_kl", False, False, True, ()),
]


@pytest.mark.parametrize(
  ("method", "student", "teacher", "refine", "keys"), HYBRID_CASES
)
def test_thinking_warnings(chat, method, student, teacher, refine, keys):
  warnings = contexts.thinking_warnings(
    method=method,
    regime="opsd",
    student_chat=chat,
    teacher_chat=chat,
    student=student,
    teacher=teacher,
    refine=refine,
  )
  assert len(warnings) == bool(keys)
  for line in warnings:
    assert all(key in line for key in keys)
    named = [k for k in ("student", "teacher", "refine") if f"{k}.th" in line]
    assert len(named) == 2


def test_thinking_warnings_between_two_models(chat, instruct):
  """A student without thinking under a hybrid teacher."""

  def warn(method, teacher, refine):
    return contexts.thinking_warnings(
      method=method,
      regime="opd",
      student_chat=instruct,
      teacher_chat=chat,
      student=None,
      teacher=teacher,
      refine=refine,
    )

  assert warn("forward_kl", None, False)
  assert not warn("forward_kl", False, True)
  assert warn("trd", False, True)
  assert not warn("trd", None, False)


@needs_qwen
def test_the_warning_is_right_about_the_real_templates():
  hybrid, instruct = Chat.load(QWEN, HYBRID), Chat.load(QWEN, INSTRUCT)
  ends = {
    "on": hybrid.render("x", None)[-3:],
    "off": hybrid.render("x", False)[-3:],
  }
  assert ends["on"] == instruct.render("x", None)[-3:]
  assert ends["off"] == [271, 151_668, 271]
  assert hybrid.thinks(None)
  assert not instruct.thinks(None)
