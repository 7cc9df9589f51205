"""What preflight foretells of refinement and training, from lengths alone."""

import dataclasses

import pytest

from tests.support.chat_folders import QWEN, needs_qwen
from tests.support.places import ROOT
from tests.support.stage_runs import chosen
from trd_jax.data import prompts
from trd_jax.data.chat import Chat
from trd_jax.data.prompts import FittedPrompt
from trd_jax.experiment.records import Problem, Rejected
from trd_jax.generation import forecasts
from trd_jax.model.weights import hub

DEEPSCALER = ROOT / "../shared/data/deepscaler"
STEPS = "3 + 4 = 7, 7 * 2 = 14. "


@pytest.fixture(scope="module")
def chat():
  return Chat.load(hub.model_folder("lab:student"))


def brute_force(which, chat, problems):
  """The forecast, by making every prompt with a draft of the full length."""
  full = which.rollout.max_response_tokens
  response = which.refine.max_response_tokens
  draft = "1" * full
  assert len(chat.encode(draft)) == full
  counts = dict.fromkeys(
    ("trimmed", "dropped", "over_student", "over_teacher"), 0
  )
  for problem in problems:
    initial = len(
      chat.render(prompts.default().initial(problem), which.student.thinking)
    )
    if initial > which.rollout.max_prompt_tokens:
      continue
    fitted = prompts.default().fit_refinement(
      chat,
      problem,
      draft,
      which.regime,
      which.refine.thinking,
      which.refine.max_prompt_tokens,
      which.refine.overflow,
    )
    if isinstance(fitted, Rejected):
      counts["dropped"] += 1
      continue
    counts["trimmed"] += fitted.elided_tokens > 0
    # The student learns y_r in the mode in which it was refined, or after its
    # message in plain text.
    message = prompts.default().initial(problem)
    learnt = chat.render(message, which.refine.thinking)
    read = fitted.ids
    if which.train.context == "plain":
      learnt = chat.encode(message + "\n")
      read = chat.plain_message(read, which.refine.thinking, "\n")
    counts["over_student"] += (
      len(learnt) + response > which.train.max_student_tokens
    )
    counts["over_teacher"] += (
      len(read) + response > which.train.max_teacher_tokens
    )
  return counts


def check_forecast(which, chat, problems):
  lengths = {
    p.problem_id: n
    for p in problems
    if (
      n := len(
        chat.render(prompts.default().initial(p), which.student.thinking)
      )
    )
    <= which.rollout.max_prompt_tokens
  }
  found = forecasts.of_rollouts(
    which, prompts.default(), chat, chat, problems, lengths
  )
  wanted = brute_force(which, chat, problems)
  assert {name: getattr(found, name) for name in wanted} == wanted
  assert found.problems == len(lengths)
  return found


@pytest.mark.parametrize("form", ["chat", "plain"])
@pytest.mark.parametrize("overflow", ["trim_middle", "drop"])
@pytest.mark.parametrize("regime", ["opd", "opsd"])
def test_the_forecast_is_what_full_drafts_would_meet(
  chat, overflow, regime, form
):
  problems = [
    Problem(
      f"{i}-{n}", STEPS * i, "7", STEPS * n, "arithmetic", "t", None, "{}"
    )
    for i in range(1, 16)
    for n in (16 - i, 0)
  ]
  bare = dataclasses.replace(problems[0], problem_id="bare", answer="")
  problems.append(dataclasses.replace(bare, solution=None))
  kinds = set()
  # At the edges of one problem: no room for a mark, room for a whole draft.
  one = len(
    chat.render(prompts.default().refinement(problems[4], "1", regime), False)
  )
  edge = one - 1 + len(chat.encode(prompts.elision("arithmetic")))
  whole = one - 1 + 160
  edges = [n + more for n in (one, edge, whole) for more in (-1, 0, 1)]
  for budget in (60, 150, 250, 400, 600, *edges):
    which = chosen(
      regime=regime,
      **{
        "rollout.max_prompt_tokens": 300,
        "refine.max_prompt_tokens": budget,
        "refine.overflow": overflow,
        "train.context": form,
        "train.max_student_tokens": 330,
        "train.max_teacher_tokens": 500,
      },
    )
    found = check_forecast(which, chat, problems)
    assert found.no_reference == (regime == "opsd")
    kinds |= {
      name
      for name in ("trimmed", "dropped", "over_student", "over_teacher")
      if 0 < getattr(found, name) < found.problems
    }
    # No room: even one digit of a draft is too much.
    one = [
      prompts.default().fit_refinement(chat, p, "1", regime, False, budget)
      for p in problems
      if len(chat.render(prompts.default().initial(p), None)) <= 300
    ]
    gone = sum(not isinstance(each, FittedPrompt) for each in one)
    assert found.no_room + found.no_reference == gone
  assert kinds >= {"dropped", "over_student"}
  assert overflow == "drop" or kinds >= {"trimmed", "over_teacher"}


@needs_qwen
def test_the_forecast_holds_for_real_problems_and_the_real_tokenizer():
  if not DEEPSCALER.is_dir():
    pytest.skip(f"no real data at {DEEPSCALER}")
  from trd_jax.data import problems as sources

  chat = Chat.load(QWEN)
  which = chosen(
    domain="math",
    **{
      "data.source": "deepscaler",
      "data.root": str(DEEPSCALER),
      "data.limit": 300,
      "student.thinking": True,
      "rollout.max_prompt_tokens": 160,
      "refine.max_prompt_tokens": 440,
      "train.max_student_tokens": 260,
      "train.max_teacher_tokens": 590,
    },
  )
  found = sources.select(sources.read(which.data)[0], which.data)
  ahead = check_forecast(which, chat, found)
  assert 0 < ahead.problems < 300
  assert ahead.trimmed
  assert ahead.over_student
  assert ahead.over_teacher


def test_raw_rollouts_are_forecast_against_the_privileged_prompt(chat):
  problems = [
    Problem(str(i), STEPS * i, "7", STEPS, "arithmetic", "t", None, "{}")
    for i in range(1, 9)
  ]
  lengths = {p.problem_id: 100 for p in problems}
  which = chosen(
    method="forward_kl",
    **{"train.max_student_tokens": 259, "train.max_teacher_tokens": 320},
  )
  found = forecasts.of_rollouts(
    which, prompts.default(), chat, chat, problems, lengths
  )
  longer = [
    len(chat.render(prompts.default().privileged(p), None)) for p in problems
  ]
  assert found.over_teacher == sum(n + 160 > 320 for n in longer) > 0
  assert found.over_teacher < 8
  assert found.over_student == 8
  assert found.fixed is None
