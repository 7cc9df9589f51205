"""Where a prefix has failed, as text and tokens, and the path that saves it."""

import dataclasses
import random
import re

import pytest

from trd_jax.analyze import failed_prefixes
from trd_jax.analyze.failed_prefixes import Prefix
from trd_jax.data.chat import Chat
from trd_jax.data.problems import arithmetic
from trd_jax.data.problems.arithmetic_steps import first_error
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import Problem
from trd_jax.lab import corpus
from trd_jax.model.weights import hub

CHAT = Chat.load(hub.model_folder("lab:student"))
STOP = CHAT.stop_ids[0]
# 3+7=10, 10*4=0, f(0)=13, 13-9=4
CHAIN = arithmetic.Chain(3, (("+", 7), ("*", 4), ("f", 0), ("-", 9)))
RIGHT = CHAIN.solution


def problem(chain=CHAIN, domain="arithmetic") -> Problem:
  answer, solution = str(chain.answer), chain.solution
  return Problem("p", chain.text, answer, solution, domain, "test", None, "{}")


def failed(text, chain=CHAIN, ids=None):
  ids = [*CHAT.encode(text), STOP] if ids is None else ids
  return failed_prefixes.failed_prefix(problem(chain), "k", text, ids, CHAT)


def right(text, chain=CHAIN):
  ids = [*CHAT.encode(text), STOP]
  return failed_prefixes.right_prefix(problem(chain), "k", text, ids, CHAT)


FAILED = {
  "a slip": ("10*4=10\nf(10)=7\n7-9=18\n\\boxed{18}", "10*4=0"),
  "a misremembered fact": ("10*4=0\nf(0)=3\n3-9=14\n\\boxed{14}", "f(0)=13"),
  "a wrong correction": ("10*4=0\nWait, 10*4=10\nf(10)=7\n", "f(0)=13"),
  "truncated behind it": ("10*4=10\nf(1", "10*4=0"),
}


@pytest.mark.parametrize("name", FAILED)
def test_the_path_of_a_failed_draft_corrects_its_step(name):
  rest, line = FAILED[name]
  text = f"3+7=10\n{rest}"
  prefix = failed(text)
  assert isinstance(prefix, Prefix)
  ids = CHAT.encode(text)
  before, path = CHAT.decode(ids[: prefix.place]), CHAT.decode(prefix.path_ids)
  assert before.endswith("\n")
  assert text.startswith(before)
  assert path == f"Wait, {RIGHT[RIGHT.index(line) :]}"
  first = CHAT.decode(prefix.path_ids[: prefix.first])
  assert first == f"Wait, {line}\n"


@pytest.mark.parametrize(
  ("text", "why"),
  [
    (RIGHT, "no wrong step"),
    (RIGHT.replace("3+7", "3+7=0\nWait, 3+7"), "no wrong step"),
    (RIGHT[:-3], "no wrong step"),
    ("", "no wrong step"),
    ("<|im_start|>\\boxed{\n=\n\0\u202e3+7\n٣+٧=٠\n", "no wrong step"),
    (RIGHT.replace("{4}", "{5}"), "in its answer"),
    ("3+7=10\n10*4=10", "ends with the wrong step"),
    ("3+7=10\n10*4=10\n", "ends with the wrong step"),
  ],
)
def test_a_draft_without_a_failed_prefix_says_why(text, why):
  assert why in failed(text)


def test_every_failed_draft_that_is_drawn_is_saved_by_its_path():
  """By another rule: what `first_error` says of the text with the path."""
  rates = corpus.RECIPES["student"].solver.slip
  writer = arithmetic.Writer(rates, caught=0.3, misremembers=0.5)
  rng = random.Random(0)
  found = 0
  for _ in range(300):
    chain = arithmetic.draw(rng, 4, 9, 0.3)
    text = arithmetic.write(chain, writer, rng)
    prefix = failed(text, chain)
    if isinstance(prefix, str):
      continue
    found += 1
    ids = CHAT.encode(text)
    begun, kept = (CHAT.decode(ids[:n]) for n in (prefix.begin, prefix.place))
    path, avoid = map(CHAT.decode, (prefix.path_ids, prefix.avoid_ids))
    asked = problem(chain)
    # The prefix is wrong whatever follows, and the path makes it good.
    assert first_error(asked, kept + "x") == len(begun)
    assert first_error(asked, kept + path) is None
    assert first_error(asked, begun + avoid) is None
    box = f"\\boxed{{{chain.answer}}}"
    assert path.endswith(box)
    assert avoid.endswith(box)
    assert prefix.path_ids[-1] == prefix.avoid_ids[-1] == STOP
    for mark in prefix.marks:
      text_at = CHAT.decode(ids[mark.token :])
      if mark.kind == "value":
        assert text_at[0].isdigit()
        # What follows from the line itself, worked by another rule.
        lines = CHAT.decode(ids[prefix.begin :]).split("\n")
        step = re.match(r"([0-9]+)([-+*])([0-9]+)=", lines[mark.distance])
        if step is not None:
          one, two = int(step[1]), int(step[3])
          value = {"+": one + two, "-": one - two, "*": one * two}[step[2]] % 20
          assert CHAT.decode([mark.consistent_id]) == str(value)[0]
      else:
        assert mark.distance > 0
        assert CHAT.decode(ids[: mark.token]).endswith("\n")
  assert found > 100


def test_marks_tell_the_reference_from_what_follows_from_the_draft():
  text = "3+7=10\n10*4=10\nf(10)=7\n7-9=18\n\\boxed{18}"
  told = [
    (mark.distance, *(CHAT.decode([i]) for i in mark[-2:]))
    for mark in failed(text).marks
    if mark.kind == "value"
  ]
  # The right values 0, 13, 4, 4, and those that follow: 0, 7, 18, 18.
  assert told == [
    (0, "0", "0"),
    (1, "1", "7"),
    (2, "4", "1"),
    (3, "4", "1"),
  ]


def test_a_right_draft_goes_on_as_its_own_path():
  prefix = right(RIGHT)
  assert isinstance(prefix, Prefix)
  ids = (*CHAT.encode(RIGHT), STOP)
  assert prefix.path_ids == ids[prefix.place :]
  assert prefix.avoid_ids == ids[prefix.begin :]
  assert CHAT.decode(ids[prefix.begin : prefix.place]).count("\n") == 1
  assert prefix == right(RIGHT)
  assert isinstance(right(RIGHT.replace("{4}", "{5}")), str)
  # Which step it is cut behind differs from draft to draft.
  ids = [*CHAT.encode(RIGHT), STOP]
  steps = {
    failed_prefixes.right_prefix(problem(), f"{n}", RIGHT, ids, CHAT).step
    for n in range(40)
  }
  assert steps == {0, 1, 2, 3}


def test_tokens_that_do_not_spell_the_text_are_left_out():
  text = "3+7=10\n10*4=10\nf(10)=7\n"
  assert "end of a line" in failed(text, ids=CHAT.encode(f"x{text}"))


def test_another_domain_is_refused():
  with pytest.raises(UserError, match=r"domain=math.*domain=arithmetic"):
    failed_prefixes.verifier("math")
  other = dataclasses.replace(problem(), text="What is 2+2?")
  with pytest.raises(UserError, match="no chain of the laboratory's"):
    failed_prefixes.failed_prefix(other, "k", "3+7=0\n1", [], CHAT)
