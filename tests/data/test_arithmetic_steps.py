"""Where a worked chain first fails, on drafts written by hand and drawn."""

import random

import pytest

from trd_jax.data.problems import arithmetic, arithmetic_steps
from trd_jax.data.problems.arithmetic_steps import first_error, first_wrong_step
from trd_jax.experiment.records import Domain, Problem
from trd_jax.lab import corpus


def problem(text: str, domain: Domain = "arithmetic") -> Problem:
  return Problem("p", text, "", None, domain, "test", None, "{}")


# 3+7=10, 10*4=0, f(0)=13, 13-9=4
PROBLEM = problem("Start at 3, add 7, times 4, apply f, minus 9.")
RIGHT = "3+7=10\n10*4=0\nf(0)=13\n13-9=4\n\\boxed{4}"
NINES = "9" * 9999  # more digits than Python makes a number of

DRAFTS = {
  "right": (RIGHT, None, None),
  "right, with words and spaces": (
    "Let us see.\n\n 3 + 7 = 10.\n10*4=00\nf( 0 )=13\nSo 4:\n13-9=4\n"
    "The answer is \\boxed{ 4 }",
    None,
    None,
  ),
  "a caught slip": (RIGHT.replace("3+7", "3+7=0\nWait, 3+7"), None, None),
  "caught after a blank line": (
    RIGHT.replace("3+7", "3+7=0\n\nHold on, 3+7"),
    None,
    None,
  ),
  "a slip, whose right value is gone on from": (
    RIGHT.replace("=10\n", "=0\n"),
    None,
    None,
  ),
  "caught too late": (
    "3+7=0\n0*4=0\nWait, 3+7=10\n10*4=0\nf(0)=13\n13-9=4\n\\boxed{4}",
    "3+7=0",
    "3+7=10",
  ),
  "a slip": ("3+7=10\n10*4=10\nf(10)=7\n7-9=18\n", "10*4=10", "10*4=0"),
  "a wrong correction": (
    "3+7=10\nWait, 3+7=0\n0*4=0\n",
    "Wait, 3+7=0",
    "10*4=0",
  ),
  "a right one that was not needed": (
    RIGHT.replace("10*4", "Hmm, 3+7=10\n10*4"),
    None,
    None,
  ),
  "misremembered": ("3+7=10\n10*4=0\nf(0)=3\n3-9=14\n", "f(0)=3", "f(0)=13"),
  "another's step": ("3+7=10\n10+4=14\n14-9=5\n", "10+4=14", "10*4=0"),
  "a wrong copy": ("3+7=10\n11*4=4\nf(4)=0\n", "11*4=4", "10*4=0"),
  "below zero": (
    RIGHT.replace("=4\n", "=-16\n").replace("{4", "{-16"),
    "13-9=-16",
    "13-9=4",
  ),
  "wrong box": (RIGHT.replace("{4}", "{5}"), "\\boxed{5}", "\\boxed{4}"),
  "an empty box": (RIGHT.replace("{4}", "{}"), "\\boxed{}", "\\boxed{4}"),
  "a step too many": (
    RIGHT.replace("\\b", "4+4=8\n8+1=9\n\\b"),
    "4+4=8",
    "\\boxed{4}",
  ),
  "begun again": ("3+7=10\n10*4=0\nLet me check.\n" + RIGHT, None, None),
  "truncated": (RIGHT[:-15], None, None),
  "truncated in a number": ("3+7=1", None, None),
  "truncated in a wrong number": ("3+7=2", "3+7=2", "3+7=10"),
  "truncated before a correction": (
    "3+7=10\n10*4=10\nWai",
    "10*4=10",
    "10*4=0",
  ),
  "no newline of ours": ("3+7=10\r\n10*4=1\r\n1+1=2", "10*4=1", "10*4=0"),
  "a number without an end": (
    f"3+7={NINES}\nx\n1+1=1",
    f"3+7={NINES}",
    "3+7=10",
  ),
  "garbage": ("<|im_start|>\\boxed{\n=\n\0\u202e3+7\n٣+٧=٠\n" * 9, None, None),
  "nothing": ("", None, None),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_the_first_wrong_step_of_a_draft(name):
  text, wrong, right = DRAFTS[name]
  found = first_wrong_step(PROBLEM, text)
  if wrong is None:
    assert found is None
    assert first_error(PROBLEM, text) is None
  else:
    assert found is not None
    assert text[found.offset : found.end] == wrong
    assert found.right == right
    assert first_error(PROBLEM, text) == found.offset == text.index(wrong)


def test_only_the_laboratorys_problems_are_read():
  assert first_error(problem("What is 2+2?"), "3+7=0") is None
  assert first_error(problem("Start at 33, apply f."), "f(33)=0") is None
  assert first_error(problem(PROBLEM.text, "math"), "3+7=0") is None
  rng = random.Random(0)
  for _ in range(200):
    chain = arithmetic.draw(rng, 1, 9, 0.3)
    assert arithmetic_steps.parse(chain.text) == chain


def drafts(writer):
  rng = random.Random(3)
  for _ in range(500):
    chain = arithmetic.draw(rng, 4, 9, 0.3)
    text = arithmetic.write(chain, writer, rng)
    yield chain, text, first_wrong_step(problem(chain.text), text)


def test_who_catches_every_slip_makes_no_error():
  catches = corpus.RECIPES["student"].solver.slip
  writer = arithmetic.Writer(catches, caught=1.0)
  texts = [text for _, text, found in drafts(writer) if found is None]
  assert len(texts) == 500
  assert sum("Wait" in text for text in texts) > 100


def test_who_catches_none_fails_at_the_first_line_that_is_no_longer_right():
  """Compared with another rule: a common beginning with the reference."""
  rates = corpus.RECIPES["student"].solver.slip
  writer = arithmetic.Writer(rates, caught=0.0, misremembers=0.5)
  failed = 0
  for chain, text, found in drafts(writer):
    offset = 0
    for mine, right in zip(
      text.splitlines(), chain.solution.splitlines(), strict=True
    ):
      if mine != right:
        break
      offset += len(mine) + 1
    else:
      assert found is None
      continue
    failed += 1
    number = text[:offset].count("\n")
    assert found == (offset, offset + len(mine), right, number)
  assert failed > 200
