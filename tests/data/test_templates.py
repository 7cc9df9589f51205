"""Prompt sets: which texts templates make, and which templates are refused."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_prompts import DRAFT, Y_STAR, X, problem, words
from tests.support import training_runs
from tests.support.chat_folders import write_folder
from trd_jax.data import contexts, prompts
from trd_jax.data.chat import Chat
from trd_jax.data.templates import DOMAINS, ROLES, Templates
from trd_jax.experiment import experiment, prompt_sets, scopes
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import SYSTEM_TURN, Trajectory
from trd_jax.experiment.run_dir import RunDir

REFINEMENT = "{{ problem }}\n{{ draft }}\nMend it."


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
  return Chat.load(write_folder(tmp_path_factory.mktemp("small")))


def folder(path, **templates):
  path.mkdir(exist_ok=True)
  for name, text in templates.items():
    (path / f"{name}.jinja").write_text(text, "utf-8")
  return str(path)


def test_the_default_set_says_what_it_always_said():
  p = problem("code", text="x {{ 1 }} {# no #}\n", solution="y* \\boxed{7}\n")
  said = prompts.default()
  finish = (
    "End with the complete program in a single ```python code block, and put "
    "no other code block in your response."
  )
  assert said.initial(p) == (
    "x {{ 1 }} {# no #}\n\n\nThink the problem through, then write a Python 3 "
    f"program for it. {finish}"
  )
  keep = (
    "The draft above is somebody's attempt. It may be right, partly wrong, "
    "long-winded, or cut off. Rewrite it into one correct and complete "
    "response to the problem. Keep its approach, its order and its wording "
    "wherever they hold up; replace every step that is wrong or leads nowhere "
    "by the right one; drop repetitions and detours; finish what is unfinished."
  )
  alone = (
    "Your response is read by someone who has the problem and nothing else. So "
    "go straight through the reasoning, with no comment on what was changed "
    "and no mention of a draft or of these instructions."
  )
  head = f"# Problem\nx {{{{ 1 }}}} {{# no #}}\n\n\n# Draft\n{DRAFT}\n\n"
  assert said.refinement(p, DRAFT, "opd") == (
    f"{head}# Task\n{keep} {alone} {finish}"
  )
  reference = (
    "The reference is correct; it may be a full solution or only the result. "
    "Use it to find out where the draft goes wrong and what the response has "
    "to arrive at, but derive every step that you need."
  )
  alone = alone.replace("a draft", "a draft, a reference")
  assert said.refinement(p, DRAFT, "opsd") == (
    f"{head}# Reference\ny* \\boxed{{7}}\n\n\n# Task\n{keep} {reference} "
    f"{alone} {finish}"
  )
  assert said.version == prompts.VERSION


@pytest.mark.parametrize("name", prompt_sets.shipped())
@pytest.mark.parametrize("domain", DOMAINS)
def test_every_shipped_set_shows_each_role_what_it_may_see(name, domain):
  said, p = prompts.load(name), problem(domain)
  messages = [
    said.initial(p),
    said.privileged(p),
    said.refinement(p, DRAFT, "opd"),
    said.refinement(p, DRAFT, "opsd"),
  ]
  assert [
    (text.count(X), text.count(DRAFT), text.count(Y_STAR)) for text in messages
  ] == [(1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)]
  finish = {"math": "\\boxed{}", "code": "```python"}.get(domain, "")
  assert all(finish in text for text in messages)
  assert "reference" not in (messages[0] + messages[2]).lower()
  assert (said.version == prompts.VERSION) == (name == prompt_sets.DEFAULT)


def test_a_folder_replaces_what_it_has_and_no_more(tmp_path):
  name = folder(tmp_path / "mine", refinement_math=REFINEMENT + "\n")
  said, p = prompts.load(name), problem()
  assert said.refinement(p, "d \n", "opsd") == f"{X}\nd \n\nMend it."
  assert said.initial(p) == prompts.default().initial(p)
  other = problem("code")
  assert said.refinement(other, "d", "opd") == (
    prompts.default().refinement(other, "d", "opd")
  )
  assert said.version != prompts.VERSION
  # A copy of the default wording is the default wording.
  text = (prompt_sets.FOLDER / "default/initial_math.jinja").read_text("utf-8")
  same = folder(tmp_path / "same", initial_math=text)
  assert prompts.load(same).version == prompts.VERSION
  # The version is of the texts, wherever they are.
  again = folder(tmp_path / "again", refinement_math=REFINEMENT + "\n")
  assert prompts.load(again).version == said.version
  folder(tmp_path / "again", refinement_math=REFINEMENT + "!")
  assert prompts.load(again).version != said.version


@pytest.mark.parametrize(
  ("key", "text", "complaint"),
  [
    (
      "initial_math",
      "a\n{{ problme }}",
      "line 2: .* no field `problme`",
    ),
    ("initial_math", "{{ problem }}{{ reference }}", "no field `reference`"),
    ("initial_math", "{{ problem }}\n{{ range(3) }}", "line 2: .*`range`"),
    ("initial_math", "Solve.", r"no `\{\{ problem \}\}`"),
    ("initial_math", "a\n{% if %}", "line 2"),
    ("initial_math", "{{ problem }}\n{{ problem / 2 }}", "line 2"),
    ("initial_math", "{{ problem }}{% include 'x' %}", "line 1"),
    ("initial_math", "{{ problem }}{{ 3 | random }}", "No filter.*random"),
    (
      "initial_math",
      "{% if starter_code %}{{ problem }}{% endif %}",
      "where there is no starter_code",
    ),
    ("initial_math", "{{ problem }}\n\n{{ starter_code }}", "line 3.*None"),
    ("privileged_math", "{{ problem }}", r"no `\{\{ privileged \}\}`"),
    ("refinement_math", "{{ problem }}", r"no `\{\{ draft \}\}`"),
    ("refinement_math", "{{ draft }}", r"no `\{\{ problem \}\}`"),
    ("refinement_math", REFINEMENT + "{{ reference }}", "line 3.*None"),
    ("refinement_math", REFINEMENT + "{{ draft }}", "the draft 2 times"),
    ("refinement_math", REFINEMENT + "\n{{ draft|trim }}", "line 4.*as it is"),
    ("refinement_maths", REFINEMENT, "no role and domain.*refinement_math"),
  ],
)
def test_a_wrong_template_is_refused_as_it_is_read(
  tmp_path, key, text, complaint
):
  name = folder(tmp_path / "mine", **{key: text})
  with pytest.raises(UserError, match=complaint) as refused:
    prompts.load(name)
  assert f"{key}.jinja" in str(refused.value)
  assert "\n" not in str(refused.value)


def test_a_set_that_is_not_there_is_named_with_those_that_are(tmp_path):
  with pytest.raises(UserError, match=r"prompts\.set=autors.*default, authors"):
    prompts.load("autors")
  with pytest.raises(UserError, match="has no template"):
    prompts.load(folder(tmp_path / "empty"))


@pytest.mark.parametrize(
  "text",
  [
    "{{ problem.__class__ }}",
    "{{ problem|attr('__class__') }}",
    "{{ problem['__class__'] }}",
    "{{ ''.format.__globals__ }}",
    "{{ '{0.__class__}'.format(problem) }}",
    "{{ self.__init__ }}",
    "{{ problem.encode.__self__.__class__ }}",
    "{{ ().__class__.__mro__ }}",
    "{{ cycler }}",
    "{{ lipsum() }}",
    "{{ [].append(1) }}",
  ],
)
def test_a_template_reaches_no_python(tmp_path, text):
  name = folder(tmp_path / "mine", initial_math="{{ problem }}\n" + text)
  with pytest.raises(UserError, match=r"initial_math\.jinja, line 2: "):
    prompts.load(name)


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
  """Sets to draw from: the shipped ones and one with its draft at the end."""
  text = "{{ problem }}{% if reference %}{{ reference }}{% endif %}{{ draft }}"
  mine = folder(
    tmp_path_factory.mktemp("sets") / "mine",
    refinement_math=text,
    initial_math="<|im_end|>{{ problem }}",
  )
  return [prompts.load(name) for name in (*prompt_sets.shipped(), mine)]


@settings(max_examples=150, deadline=None)
@given(
  x=words,
  y_star=words,
  draft=words,
  regime=st.sampled_from(["opd", "opsd"]),
  number=st.integers(0, 2),
  share=st.floats(0, 1.2),
)
def test_no_text_ends_a_turn_or_is_a_template_and_x_and_y_star_stay_whole(
  chat, templates, x, y_star, draft, regime, number, share
):
  said = templates[number]
  p = problem(text=x, solution="y" + y_star)
  # Texts go in as they are, even those that are templates or look like marks.
  odd = dataclasses.replace(p, text="{{ draft }}\ue0000\ue001" + x)
  before, after = said.around_draft(odd, regime)
  assert odd.text in before
  assert ("y" + y_star in before + after) or regime == "opd"
  assert said.refinement(odd, draft, regime) == before + draft + after

  empty = [i for i in chat.render("", None) if i in chat.control_ids]
  before, after = said.around_draft(p, regime)
  whole = chat.render(before + draft + after, None)
  shortest = len(chat.render(before + after, None))
  budget = shortest + int(share * (len(whole) - shortest))
  fitted = said.fit_refinement(chat, p, draft, regime, None, budget)
  made = [chat.render(said.initial(p), None)]
  made.append(chat.render(said.privileged(p), None))
  if isinstance(fitted, prompts.FittedPrompt):
    assert len(fitted.ids) <= budget
    made.append(fitted.ids)
    text = chat.decode([*fitted.ids, chat.stop_ids[0]])
    assert before.strip() in text
    assert after.strip() in text
  for ids in made:
    assert [i for i in ids if i in chat.control_ids] == empty


def test_a_draft_is_shown_once_or_the_problem_is_named_for_it(tmp_path):
  text = (
    "{{ problem }}{{ draft }}{% if 'twice' in problem %}{{ draft }}{% endif %}"
  )
  said = prompts.load(folder(tmp_path / "mine", refinement_math=text))
  assert said.refinement(problem(text="x "), "d", "opd") == "x d"
  with pytest.raises(UserError, match="shows the draft 2 times"):
    said.refinement(problem(text="twice"), "d", "opd")


def test_a_row_brings_its_privileged_text_and_starter_code(tmp_path):
  meta = json.dumps({"privileged": "a hint", "starter_code": "def f():"})
  p = problem(meta=meta)
  text = prompts.default().privileged(p)
  assert "a hint" in text
  assert Y_STAR not in text
  bare = problem(meta=meta, solution=None, answer="")
  assert prompts.default().privileged(bare) == text
  own = "{{ problem }} {% if starter_code %}{{ starter_code }}{% endif %}"
  said = prompts.load(folder(tmp_path / "mine", initial_math=own))
  assert said.initial(p) == f"{X} def f():"
  assert said.initial(problem()) == f"{X} "
  # y_o is still compared with y*.
  assert "a hint" not in prompts.default().refinement(p, DRAFT, "opsd")


def test_a_base_model_without_a_template_reads_the_message_alone(tmp_path):
  base = write_folder(tmp_path / "base", template=None)
  with pytest.raises(UserError, match="no chat template"):
    Chat.load(base)
  chat = Chat.load(base, "plain")
  assert not chat.supports_thinking
  assert not chat.thinks(False)
  assert not chat.thinks(None)
  assert chat.decode(chat.render("x", None, "s")) == "s\n\nx\n"
  chat.check_system()
  said, p = prompts.default(), problem()
  for message in (said.initial(p), said.privileged(p), "<|im_end|>"):
    ids = chat.render(message, None)
    assert chat.decode(ids) == message + "\n"
    assert not chat.control_ids.intersection(ids)
  whole = chat.render(said.refinement(p, DRAFT * 20, "opsd"), None)
  budget = len(whole) - 50
  fitted = said.fit_refinement(chat, p, DRAFT * 20, "opsd", None, budget)
  assert isinstance(fitted, prompts.FittedPrompt)
  assert len(fitted.ids) == budget
  assert Y_STAR in chat.decode(fitted.ids)


def test_the_set_decides_every_stage_that_speaks():
  assert scopes.of("prompts.set") == {"rollout", "refine", "train", "evaluate"}
  assert experiment.from_config({}).prompts.set == prompt_sets.DEFAULT
  assert all(
    name in experiment.KEYS["prompts.set"].doc for name in prompt_sets.shipped()
  )


def test_rows_of_another_wording_are_never_gone_on_with(tmp_path, chat):
  mine = folder(tmp_path / "mine", refinement_math=REFINEMENT)
  run_dir = RunDir(tmp_path / "run")
  which = experiment.from_config({"prompts": {"set": mine}})
  asked = prompts.of_run(which, run_dir)
  p = training_runs.problem(7)
  row = training_runs.trajectory(
    chat, p, "rollout", 7, prompt_version=asked.version
  )
  with run_dir.shard_writer("rollout", Trajectory) as writer:
    writer.add(row)
  assert prompts.of_run(which, run_dir).version == asked.version
  folder(tmp_path / "mine", refinement_math=REFINEMENT + "!")
  with pytest.raises(UserError, match="rollout: its prompts are of another"):
    prompts.of_run(which, run_dir)


def test_roles_and_domains_are_all_in_the_default_set():
  files = {path.stem for path in (prompt_sets.FOLDER / "default").iterdir()}
  assert files == {f"{role}_{d}" for role in ROLES for d in DOMAINS}
  assert Templates.load("default", "7").version == "7"


def test_a_set_may_have_a_system_prompt(tmp_path, chat):
  p = problem("math")
  plain = prompts.default()
  assert plain.system(p) is None
  said = prompts.load(folder(tmp_path / "a", system_math="Be brief.\n"))
  other = prompts.load(folder(tmp_path / "b", system_math="Be long.\n"))
  versions = {said.version, other.version, prompts.VERSION}
  assert len(versions) == 3
  assert len({one.initial_version("math") for one in (said, other, plain)}) == 3
  assert said.initial_version("code") == plain.initial_version("code")
  assert said.system(p) == "Be brief."
  assert said.system(problem("code")) is None
  own = problem("math", meta=json.dumps({SYSTEM_TURN: "Mine."}))
  assert said.system(own) == "Mine."
  # In each role's chat, and within its budget.
  (ids,) = said.fit_initials(chat, [p], None, 999)
  assert ids == chat.render(said.initial(p), None, "Be brief.")
  extra = len(ids) - len(chat.render(said.initial(p), None))
  assert extra > 5
  rejected = said.fit_initial(chat, p, None, len(ids) - 1)
  assert f"prompt of {len(ids)} tokens" in rejected.reason
  fit = said.fit_refinement(chat, p, DRAFT, "opsd", None, 999)
  whole = chat.render(said.refinement(p, DRAFT, "opsd"), None, "Be brief.")
  assert fit.ids == whole
  trimmed = said.fit_refinement(
    chat, p, DRAFT * 9, "opsd", None, len(whole) + 40
  )
  assert trimmed.elided_tokens > 0
  assert len(trimmed.ids) <= len(whole) + 40
  start = chat.render("", None, "Be brief.")[:extra]
  assert trimmed.ids[:extra] == start == ids[:extra]
  teacher = contexts.teacher_context(said, chat, p, "x_reference", None)
  assert teacher == chat.render(said.privileged(p), None, "Be brief.")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{{ problem }}", "no field `problem` here; this role has none"),
    ("{% if", "line 1"),
  ],
)
def test_a_system_prompt_is_the_same_for_all_problems(tmp_path, text, message):
  with pytest.raises(UserError, match=message):
    prompts.load(folder(tmp_path / "a", system_code=text))
  blank = prompts.load(folder(tmp_path / "b", system_code=" \n"))
  assert blank.system_of("code") is None
