import dataclasses

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.support.chat_folders import (
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
from trd_jax.data import contexts, prompts
from trd_jax.data.chat import Chat
from trd_jax.experiment import experiment, methods
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import Problem

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
  refined = (
    prompts.default()
    .fit_refinement(chat, p, draft, regime, thinking, 100_000)
    .ids
  )
  student = contexts.student_context(prompts.default(), chat, p, thinking)
  context = methods.default_context(methods.METHODS[method].trajectory, regime)
  teacher = contexts.teacher_context(
    prompts.default(), chat, p, context, thinking, refined
  )
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
  assert student == chat.render(prompts.default().initial(p), thinking)
  if method == "trd":
    assert teacher == refined
  elif regime == "opd":
    assert teacher == student
  else:
    assert teacher == chat.render(prompts.default().privileged(p), thinking)


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
  found = contexts.student_context(prompts.default(), student, p, ours[1])
  assert found == real_ids(student, prompts.default().initial(p), ours)
  regimes = ["opd"] if student is not teacher else ["opd", "opsd"]
  for regime in regimes:
    refined = (
      prompts.default()
      .fit_refinement(teacher, p, draft, regime, theirs[1], 9999)
      .ids
    )
    message = (
      prompts.default().initial
      if regime == "opd"
      else prompts.default().privileged
    )
    expected = {
      "trd": real_ids(
        teacher, prompts.default().refinement(p, draft, regime), theirs
      ),
      "forward_kl": real_ids(teacher, message(p), theirs),
    }
    for method, ids in expected.items():
      along = methods.METHODS[method].trajectory
      read = methods.default_context(along, regime)
      context = contexts.teacher_context(
        prompts.default(), teacher, p, read, theirs[1], refined
      )
      assert context == ids


@needs_qwen
@pytest.mark.parametrize("regime", ["opd", "opsd"])
@pytest.mark.parametrize("max_tokens", [9999, 190])
def test_plain_contexts_are_the_text_of_the_message(regime, max_tokens):
  """No control token, whatever the template was; a whole draft or not."""
  student, teacher = real_chat("instruct"), real_chat("hybrid")
  asked, p = prompts.load("authors"), problem()
  draft = "<think>Hmm: 3 + 4 = 8.</think>\n" + "So it is 8.\n" * 30

  def plain(chat, message):
    ids = chat._tokenizer.encode(message + "\n", add_special_tokens=False).ids
    assert chat.control_ids.isdisjoint(ids)
    return ids

  of_student = contexts.student_context(asked, student, p, None, "plain")
  assert of_student == plain(student, asked.initial(p))
  for thinking in (True, False):
    fitted = asked.fit_refinement(
      teacher, p, draft, regime, thinking, max_tokens
    )
    assert (fitted.elided_tokens > 0) == (max_tokens < 9999)
    found = {
      context: contexts.teacher_context(
        asked, teacher, p, context, thinking, fitted.ids, "plain"
      )
      for context in methods.TEACHER_CONTEXTS
    }
    assert found["x"] == of_student
    assert found["x_reference"] == plain(teacher, asked.privileged(p))
    before, after = asked.around_draft(p, regime)
    read = teacher.decode(found["refine"])
    assert read.startswith(before)
    assert read.endswith(after + "\n")
    assert teacher.control_ids.isdisjoint(found["refine"])
    assert ("left out here" in read) == (max_tokens < 9999)
    if max_tokens == 9999:
      message = asked.refinement(p, draft, regime)
      assert found["refine"] == teacher.encode(message + "\n")


def test_plain_contexts_have_no_mode(chat, instruct):
  """So nothing is mixed, even where one model alone can think."""
  for method, recorded in (("trd", True), ("trd", False), ("jsd", False)):
    e = chosen(method, **{"regime": "opd", "train.context": "plain"})
    modes = contexts.scoring_modes(e, instruct, chat, recorded)
    assert modes == (recorded, None, None)
    assert not contexts.mode_warnings(e, instruct, chat, modes)
  told = contexts.outlook(e, instruct, chat).scoring
  assert told == "y_o: written with thinking off, scored after plain text"


@pytest.mark.parametrize("key", ["train.student_thinking", "teacher.thinking"])
def test_a_switch_of_the_template_says_nothing_without_one(key):
  with pytest.raises(UserError, match=f"{key}=True sets a switch of the chat"):
    chosen(**{key: True, "train.context": "plain"})


def test_trd_without_its_refinement_prompt(chat):
  with pytest.raises(UserError, match="p1: teacher_context=refine needs"):
    contexts.teacher_context(
      prompts.default(), chat, problem(), "refine", None, None
    )
  ids = [1, 2, 3]
  found = contexts.teacher_context(
    prompts.default(), chat, problem(), "refine", None, ids
  )
  assert found == ids
  assert found is not ids


def chosen(method="trd", **changes):
  config = experiment.default_config()
  config.method = method
  config.update_from_flattened_dict(changes)
  return experiment.from_config(config)


# method, what the artifact recorded, the keys; written, student, teacher.
FOLLOWED = [
  ("trd", False, {}, (False, False, False)),
  ("trd", True, {}, (True, True, True)),
  ("trd", None, {}, (True, True, True)),  # the template's default
  ("forward_kl", False, {}, (False, False, False)),
  ("forward_kl", None, {}, (True, True, True)),
  # What is recorded counts, whatever the config says of writing today.
  ("trd", True, {"refine.thinking": False}, (True, True, True)),
  ("jsd", False, {"student.thinking": True}, (False, False, False)),
  # A key overrides it; trd's teacher has its stored prompt.
  ("trd", False, {"train.student_thinking": True}, (False, True, False)),
  ("trd", False, {"teacher.thinking": True}, (False, False, False)),
  ("jsd", True, {"teacher.thinking": False}, (True, True, False)),
  ("jsd", True, {"train.student_thinking": False}, (True, False, True)),
]


@pytest.mark.parametrize(("method", "recorded", "keys", "found"), FOLLOWED)
def test_contexts_follow_what_was_written(chat, method, recorded, keys, found):
  e = chosen(method, **keys)
  modes = contexts.scoring_modes(e, chat, chat, recorded)
  assert modes == found
  written, *sides = found
  scoring = sides[:1] if method == "trd" else sides
  warnings = contexts.mode_warnings(e, chat, chat, modes)
  mixed = [line for line in warnings if line.startswith("mixed thinking modes")]
  assert len(mixed) == sum(side != written for side in scoring)
  ours = {"teacher.thinking", "train.student_thinking"}
  assert len(warnings) == len(keys.keys() & ours)
  assert all(key in "".join(warnings) for key in keys.keys() & ours)


def test_what_is_planned_is_what_the_stages_will_record(chat):
  for method, key in (("trd", "refine"), ("jsd", "student")):
    for switch in (None, True, False):
      e = chosen(method, **{f"{key}.thinking": switch})
      planned = contexts.planned_modes(e, chat, chat)
      recorded = chat.thinks(switch)
      assert planned == contexts.scoring_modes(e, chat, chat, recorded)


def test_a_model_without_the_mode_scores_in_its_own(chat, instruct):
  """A student without thinking under a hybrid teacher."""

  def look(method, recorded):
    e = chosen(method, regime="opd")
    modes = contexts.scoring_modes(e, instruct, chat, recorded)
    told = contexts.describe_modes(instruct, chat, modes)
    assert told.endswith("(the student can't do otherwise)")
    return modes, contexts.mode_warnings(e, instruct, chat, modes)

  assert look("forward_kl", False) == ((False, False, False), [])
  assert look("trd", False) == ((False, False, False), [])
  modes, (warning,) = look("trd", True)
  assert modes == (True, None, True)
  assert "y_r is written with thinking on" in warning
  assert "can't do otherwise" in warning
  for key in ("train.student_thinking", "student.thinking"):
    e = chosen("jsd", regime="opd", **{key: True})
    with pytest.raises(UserError, match="no enable_thinking and never thinks"):
      contexts.planned_modes(e, instruct, chat)


def test_a_template_that_opens_the_block_itself_is_told_of(chat, tmp_path):
  template = TEMPLATE.split("{% if enable")[0] + "<think>\n{% endif %}"
  always = Chat.load(write_folder(tmp_path, template=template))
  assert always.opens_thoughts(None)
  assert not chat.opens_thoughts(True)
  e = chosen("forward_kl", regime="opd")
  modes = contexts.scoring_modes(e, always, chat, None)
  assert modes == (True, True, True)
  (warning,) = contexts.mode_warnings(e, always, chat, modes)
  assert "opens the thinking block in the prompt" in warning
  modes = contexts.scoring_modes(e, always, always, None)
  assert not contexts.mode_warnings(e, always, always, modes)
  # It has no other mode, which the teacher's has.
  e = chosen("trd", regime="opd", **{"refine.thinking": False})
  modes = contexts.planned_modes(e, always, chat)
  assert modes == (False, None, False)
  assert "on (" in contexts.mode_warnings(e, always, chat, modes)[0]


def test_the_outlook_is_of_the_templates_at_hand(chat, instruct):
  e = chosen("trd", regime="opd", **{"evaluate.thinking": False})
  whole = contexts.outlook(e, chat, instruct)
  assert whole.stages == {"rollout": True, "refine": False, "evaluate": False}
  assert whole.without("refine") == {"rollout": True, "evaluate": False}
  assert whole.scoring.startswith("y_r: written and scored with thinking off")
  assert contexts.outlook(e, None, instruct) == ({"refine": False}, None, [])
  of_student = contexts.outlook(e, chat, None)
  assert of_student == ({"rollout": True, "evaluate": False}, None, [])


@needs_qwen
def test_the_modes_are_those_of_the_real_templates():
  hybrid, instruct = Chat.load(QWEN, HYBRID), Chat.load(QWEN, INSTRUCT)
  ends = {
    "on": hybrid.render("x", None)[-3:],
    "off": hybrid.render("x", False)[-3:],
  }
  assert ends["on"] == instruct.render("x", None)[-3:]
  assert ends["off"] == [271, 151_668, 271]
  assert hybrid.thinks(None)
  assert not instruct.thinks(None)


def test_plain_contexts_begin_with_the_system_prompt(chat):
  asked, p = prompts.default(), problem()
  p = dataclasses.replace(p, meta='{"system_turn": "Be brief."}')
  x, privileged = asked.initial(p), asked.privileged(p)
  plain = contexts.student_context(asked, chat, p, None, "plain")
  assert plain == chat.encode(f"Be brief.\n\n{x}\n")
  refined = asked.fit_refinement(chat, p, "draft", "opsd", None, 999)
  for context, message in (
    ("x_reference", privileged),
    ("refine", asked.refinement(p, "draft", "opsd")),
  ):
    found = contexts.teacher_context(
      asked, chat, p, context, None, refined.ids, "plain"
    )
    assert found == chat.encode(f"Be brief.\n\n{message}\n")
