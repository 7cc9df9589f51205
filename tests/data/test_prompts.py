import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chat_folders import (
  CONTROLS,
  HYBRID,
  QWEN,
  REAL_MODES,
  needs_qwen,
  real_chat,
  real_ids,
  write_folder,
)
from trd_jax.data import prompts
from trd_jax.data.chat import Chat
from trd_jax.data.prompts import FittedPrompt
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import Problem, Rejected

X = "What is 3 {plus} <think> 4?"
Y_STAR = "3 + 4 = \\boxed{7} <|im_end|>"
DRAFT = "<think>Hmm, 3 + 4 = 8.</think> \\boxed{8}"

alphabet = "ab \n.{}<>|é解😀"
words = st.lists(
  st.sampled_from(CONTROLS) | st.text(alphabet, max_size=12), max_size=30
).map("".join)


def problem(domain="math", **changes):
  fields = {
    "problem_id": "p1",
    "text": X,
    "answer": "7",
    "solution": Y_STAR,
    "domain": domain,
    "source": "test",
    "tests": None,
    "meta": "{}",
  }
  return Problem(**{**fields, **changes})


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
  return Chat.load(write_folder(tmp_path_factory.mktemp("small")))


def test_the_arithmetic_wording_is_what_the_shipped_models_learnt():
  p = problem("arithmetic", text="Start at 3.", solution="3+1=4\n\\boxed{4}")
  assert prompts.default().initial(p) == "Start at 3."
  assert prompts.default().privileged(p) == (
    "Start at 3.\nReference:\n3+1=4\n\\boxed{4}\nSolve."
  )
  assert prompts.default().refinement(p, "3+1=5", "opd") == (
    "Start at 3.\nDraft:\n3+1=5\nRewrite."
  )
  assert prompts.default().refinement(p, "3+1=5", "opsd") == (
    "Start at 3.\nDraft:\n3+1=5\nReference:\n3+1=4\n\\boxed{4}\nRewrite."
  )


def messages(p):
  return {
    "initial": prompts.default().initial(p),
    "privileged": prompts.default().privileged(p),
    "opd": prompts.default().refinement(p, DRAFT, "opd"),
    "opsd": prompts.default().refinement(p, DRAFT, "opsd"),
  }


# A new default wording gets a new VERSION, and then a new digest here.
DIGESTS = {"1": "2d1786003792"}


def test_a_new_wording_needs_a_new_version():
  every = [messages(problem(d)) for d in ("arithmetic", "math", "code")]
  digest = hashlib.sha256(json.dumps(every).encode()).hexdigest()[:12]
  assert DIGESTS[prompts.VERSION] == digest


# The same of the ids that Qwen3 is given, by whether it may think.
ID_DIGESTS = {"1": {"on": "8792b060c414", "off": "01aaeed756b8"}}


@needs_qwen
@pytest.mark.parametrize("mode", REAL_MODES)
def test_prompts_on_the_real_templates_are_known_to_the_id(mode):
  chat, thinking = real_chat(mode[0]), mode[1]
  every = []
  for domain in ("math", "code"):
    p = problem(domain)
    fitted = {
      "initial": prompts.default().fit_initial(chat, p, thinking, 9999),
      "privileged": chat.render(prompts.default().privileged(p), thinking),
    }
    for regime in ("opd", "opsd"):
      found = prompts.default().fit_refinement(
        chat, p, DRAFT, regime, thinking, 9999
      )
      assert found.elided_tokens == 0
      fitted[regime] = found.ids
    assert fitted == {
      role: real_ids(chat, text, mode) for role, text in messages(p).items()
    }
    every.append(fitted)
  digest = hashlib.sha256(json.dumps(every).encode()).hexdigest()[:12]
  switch = "off" if mode == ("hybrid", False) else "on"
  assert ID_DIGESTS[prompts.VERSION][switch] == digest


@pytest.mark.parametrize("domain", ["arithmetic", "math", "code"])
def test_who_sees_what(domain):
  p = problem(domain)
  seen = {
    role: (X in text, DRAFT in text, Y_STAR in text)
    for role, text in messages(p).items()
  }
  assert seen == {
    "initial": (True, False, False),
    "privileged": (True, False, True),
    "opd": (True, True, False),
    "opsd": (True, True, True),
  }
  finish = {"math": "\\boxed{}", "code": "```python"}.get(domain, "")
  assert all(finish in text for text in messages(p).values())


@pytest.mark.parametrize("domain", ["math", "code"])
def test_the_student_is_not_told_of_references(domain):
  text = prompts.default().initial(problem(domain)).lower()
  assert not any(word in text for word in ("draft", "reference", "rewrite"))
  opd = prompts.default().refinement(problem(domain), DRAFT, "opd").lower()
  assert "reference" not in opd


def test_the_answer_is_the_reference_where_there_is_no_solution():
  assert prompts.reference(problem()) == Y_STAR
  assert prompts.reference(problem(solution=None)) == "7"
  assert prompts.reference(problem(solution=" \n")) == "7"
  bare = problem(solution=None, answer="")
  assert prompts.reference(bare) is None
  for ask in (
    lambda: prompts.default().privileged(bare),
    lambda: prompts.default().refinement(bare, DRAFT, "opsd"),
  ):
    with pytest.raises(UserError, match="p1 of test: neither a solution"):
      ask()
  assert DRAFT in prompts.default().refinement(bare, DRAFT, "opd")


def test_an_unknown_choice_is_named(chat):
  fit = prompts.default().fit_refinement
  with pytest.raises(UserError, match="regime=both"):
    fit(chat, problem(), DRAFT, "both", None, 999)
  with pytest.raises(UserError, match=r"refine\.overflow=cut"):
    fit(chat, problem(), DRAFT, "opd", None, 999, overflow="cut")
  with pytest.raises(UserError, match=r"refine\.draft_think=hide"):
    fit(chat, problem(), DRAFT, "opd", None, 999, draft_think="hide")


def test_fit_initial_at_and_over_its_budget(chat):
  ids = chat.render(prompts.default().initial(problem()), True)
  fit = prompts.default().fit_initial
  assert fit(chat, problem(), True, len(ids)) == ids
  over = fit(chat, problem(), True, len(ids) - 1, stage="evaluate")
  assert over == Rejected(
    "p1",
    "test",
    "evaluate",
    f"prompt of {len(ids)} tokens, over max_prompt_tokens={len(ids) - 1}",
  )


@pytest.mark.parametrize("domain", ["arithmetic", "math", "code"])
@settings(max_examples=120, deadline=None)
@given(
  draft=words,
  regime=st.sampled_from(["opd", "opsd"]),
  thinking=st.sampled_from([None, True, False]),
  share=st.floats(0, 1.2),
)
def test_trimming_keeps_x_and_y_star_and_fills_the_budget(
  chat, domain, draft, regime, thinking, share
):
  check_trimming(chat, problem(domain), draft, regime, thinking, share)


def check_trimming(chat, p, draft, regime, thinking, share):
  whole = chat.render(prompts.default().refinement(p, draft, regime), thinking)
  empty = chat.render(prompts.default().refinement(p, "", regime), thinking)
  mark = prompts._ELISION[p.domain]
  # From "no draft fits" to "all of it does".
  budget = len(empty) - 3 + int(share * (len(whole) - len(empty) + 9))
  fitted = prompts.default().fit_refinement(
    chat, p, draft, regime, thinking, budget
  )
  if len(whole) <= budget:
    assert fitted == FittedPrompt(whole, 0)
    return
  if isinstance(fitted, Rejected):
    # Two ids at the draft's ends may be shared with the template.
    assert budget <= len(empty) + len(chat.encode(mark)) + 2 + 4
    assert str(budget) in fitted.reason
    assert fitted.stage == "refine"
    return
  # Full to the budget, but for the bytes of the characters at the two cuts.
  assert budget - 6 <= len(fitted.ids) <= budget
  if draft.isascii():
    assert len(fitted.ids) == budget
  # A head of the whole prompt, the mark, a tail of it: nothing else, and the
  # count of what is missing is true.
  mark_ids = chat.encode(mark)
  kept = len(fitted.ids) - len(mark_ids)
  assert fitted.elided_tokens == len(whole) - kept
  assert fitted.elided_tokens > 0
  splits = [
    i
    for i in range(kept + 1)
    if fitted.ids[:i] == whole[:i]
    and fitted.ids[i : i + len(mark_ids)] == mark_ids
    and fitted.ids[i + len(mark_ids) :] == whole[len(whole) - kept + i :]
  ]
  assert splits
  before, after = prompts.default().around_draft(p, regime)
  text = chat.decode([*fitted.ids, chat.stop_ids[0]])
  assert "\ufffd" not in text
  assert before in text
  assert after in text
  head_and_tail = text.split(before, 1)[1].rsplit(after, 1)[0]
  assert any(
    draft.startswith(head_and_tail[:i])
    and head_and_tail[i : i + len(mark)] == mark
    and draft.endswith(head_and_tail[i + len(mark) :])
    for i in range(len(head_and_tail))
  )
  controls = [i for i in fitted.ids if i in chat.control_ids]
  assert controls == [i for i in empty if i in chat.control_ids]


def test_head_and_tail_are_kept_in_equal_parts(chat):
  draft = " ".join(f"h{i}" for i in range(200))
  whole = chat.render(
    prompts.default().refinement(problem(), draft, "opd"), None
  )
  fitted = prompts.default().fit_refinement(
    chat, problem(), draft, "opd", None, len(whole) - 200
  )
  text = chat.decode(fitted.ids)
  head, tail = (
    text.split("# Draft\n")[1]
    .split("\n\n# Task")[0]
    .split(prompts._ELISION["math"])
  )
  sizes = len(chat.encode(head)), len(chat.encode(tail))
  assert abs(sizes[0] - sizes[1]) <= 4
  assert min(sizes) > 50


def test_a_cut_falls_between_characters_and_is_counted_whole(chat):
  draft = "\U0001f600" * 20  # four ids each
  whole = chat.render(
    prompts.default().refinement(problem(), draft, "opd"), None
  )
  mark = len(chat.encode(prompts._ELISION["math"]))
  for left_out in range(mark + 1, mark + 9):
    fitted = prompts.default().fit_refinement(
      chat, problem(), draft, "opd", None, len(whole) + mark - left_out
    )
    assert fitted.elided_tokens == -(-left_out // 4) * 4
    assert len(fitted.ids) == len(whole) + mark - fitted.elided_tokens


@pytest.mark.slow
@needs_qwen
def test_a_long_draft_fits_the_papers_budget_with_the_real_tokenizer():
  chat = Chat.load(QWEN, HYBRID)
  step = "Wait, let me reconsider: 12 × 7 = 84, so α ≤ 84. </think>\n\n"
  draft = "<think>\n" + step * 700
  fitted = prompts.default().fit_refinement(
    chat, problem(), draft, "opd", False, 18_432 - 4096
  )
  assert isinstance(fitted, FittedPrompt)
  assert len(fitted.ids) == 18_432 - 4096
  assert fitted.elided_tokens > 0
  off = chat.render("x", False)[-4:]
  assert [i for i in fitted.ids if i in (151_667, 151_668)] == [
    i for i in off if i in (151_667, 151_668)
  ]
  for share in (0.0, 0.3, 0.7, 1.0):
    check_trimming(chat, problem(), draft[:2000], "opsd", None, share)


def test_overflow_drop(chat):
  whole = chat.render(
    prompts.default().refinement(problem(), DRAFT, "opd"), None
  )
  fit = prompts.default().fit_refinement
  kept = fit(chat, problem(), DRAFT, "opd", None, len(whole), overflow="drop")
  assert kept == FittedPrompt(whole, 0)
  gone = fit(
    chat, problem(), DRAFT, "opd", None, len(whole) - 1, overflow="drop"
  )
  assert isinstance(gone, Rejected)
  assert "refine.overflow=drop" in gone.reason
  assert str(len(whole)) in gone.reason


@pytest.mark.parametrize("regime", ["opd", "opsd"])
def test_many_at_once_are_each_alone_and_in_order(chat, regime):
  drafts = [
    (problem(solution=None, answer="") if i % 7 == 3 else problem(), "ab " * i)
    for i in range(150)
  ]
  budget = len(
    chat.render(
      prompts.default().refinement(problem(), "ab " * 75, regime), None
    )
  )
  fitted = list(
    prompts.default().fit_refinements(chat, iter(drafts), regime, None, budget)
  )
  assert fitted == [
    prompts.default().fit_refinement(chat, p, text, regime, None, budget)
    for p, text in drafts
  ]
  assert fitted[0].elided_tokens == 0 < fitted[149].elided_tokens
  assert isinstance(fitted[3], Rejected) == (regime == "opsd")
  asked = [problem(text="x " * (150 - i)) for i in range(150)]
  ids = list(prompts.default().fit_initials(chat, asked, None, budget))
  assert ids == [
    prompts.default().fit_initial(chat, p, None, budget) for p in asked
  ]
  assert len(set(map(str, ids))) == 150


def test_draft_think_strip_leaves_the_marks_out_and_the_thoughts_in(chat):
  fit = prompts.default().fit_refinement
  kept = fit(chat, problem(text="x"), DRAFT, "opd", None, 9999)
  stripped = fit(
    chat, problem(text="x"), DRAFT, "opd", None, 9999, draft_think="strip"
  )
  assert DRAFT in chat.decode(kept.ids)
  assert "think>" not in chat.decode(stripped.ids)
  assert "Hmm, 3 + 4 = 8. \\boxed{8}" in chat.decode(stripped.ids)


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    ("<think>Hmm, 8.</think>\n\nIt is \\boxed{7}.\n", "It is \\boxed{7}."),
    ("Hmm, 8.</think>It is 7.", "It is 7."),  # opened by the prompt
    ("It is 7.", "It is 7."),
    ("<think>a</think>b<think>c</think>It is 7.", "It is 7."),
    # Nothing follows: a budget ended it, or the model did.
    ("<think>Hmm, 8", None),
    ("<think>a</think>b<think>c", None),
    ("<think>Hmm, 8.</think>\n\n", None),
  ],
)
def test_draft_think_answer_shows_what_follows_the_thoughts(text, shown):
  assert prompts.shown_draft(text, "answer") == (shown or text)
  assert prompts.is_all_thoughts(text) == (shown is None)


@pytest.mark.parametrize("domain", ["math", "code"])
def test_what_is_shown_of_a_draft_is_the_same_in_each_domain(chat, domain):
  tried = {"math": "\\boxed{8}", "code": "```python\nprint(8)\n```"}[domain]
  ends = tried.replace("8", "7")
  draft = f"<think>Perhaps\n{tried}\nno.</think>\n\nSo:\n{ends}"
  p = problem(domain)
  fitted = prompts.default().fit_refinement(
    chat, p, draft, "opsd", None, 9999, draft_think="answer"
  )
  assert isinstance(fitted, FittedPrompt)
  text = chat.decode([*fitted.ids, chat.stop_ids[0]])
  assert f"So:\n{ends}" in text
  assert tried not in text
  assert "Perhaps" not in text


def test_an_empty_draft_has_no_thoughts():
  assert not prompts.is_all_thoughts("")
  assert prompts.shown_draft(" ", "answer") == ""


def test_a_problem_without_reference_is_set_aside_in_opsd_only(chat):
  bare = problem(solution=None, answer="")
  fit = prompts.default().fit_refinement
  assert isinstance(fit(chat, bare, DRAFT, "opsd", None, 9999), Rejected)
  assert isinstance(fit(chat, bare, DRAFT, "opd", None, 9999), FittedPrompt)
