"""Answers become samples: few of them wait, and none that was made is lost."""

import collections
import os

import pytest

from trd_jax.experiment.records import Problem, Verdict
from trd_jax.generation import samples
from trd_jax.generation.engines.engine import Completion
from trd_jax.generation.samples import Prompt
from trd_jax.grading.math import verifier


def answer(name, text, gold="2x", domain="math"):
  problem = Problem(name, "?", gold, None, domain, "s", None, "{}")
  return Prompt(name, problem, [1], 0), Completion(name, (1,), "stop"), text


class Slow:
  """A grader of programs that judges one each time that it is looked at."""

  workers, version = 1, "slow-1"

  def __init__(self):
    self.waiting = collections.deque()

  def submit(self, key, text, problem):
    self.waiting.append(key)

  def finished(self, wait=False):
    for _ in range(len(self.waiting) if wait else min(1, len(self.waiting))):
      yield self.waiting.popleft(), Verdict(True, "match", None)


class Stuck(Slow):
  """One that starts to judge only after many looks."""

  looks = 0

  def finished(self, wait=False):
    self.looks += 1
    if wait or self.looks > 200:
      yield from super().finished(wait)


def taken_ahead(names, make, **graders):
  """How many answers were taken and had no verdict, at most."""
  taken, most, done = 0, 0, []

  def answers():
    nonlocal taken, most
    for name in names:
      taken += 1
      most = max(most, taken - len(done))
      yield make(name)

  for sample in samples.graded(answers(), graders):
    done.append(sample.prompt.key)
  assert sorted(done) == sorted(names)
  return most


def test_no_more_programs_are_taken_while_many_wait(monkeypatch):
  monkeypatch.setattr(samples, "_LOOK_SECONDS", 0.0)
  names = [f"p{n}" for n in range(150)]

  def program(name):
    return answer(name, "", domain="code")

  assert taken_ahead(names, program, code=Stuck()) == samples._WAITING
  # Who keeps up is never waited for.
  assert taken_ahead(names, program, code=Slow()) == 1


def test_no_more_mathematics_is_taken_while_much_waits(monkeypatch):
  monkeypatch.setattr(samples, "_WAITING", 2)
  names = [f"m{n}" for n in range(30)]

  def formula(name):
    return answer(name, f"\\boxed{{{name[1:]}+y+y+z}}", f"2y+z+{name[1:]}")

  with verifier.Grader() as grader:
    most = taken_ahead(names, formula, math=grader)
  assert most <= 2 * (os.cpu_count() or 1)


@pytest.mark.parametrize("domain", ["math", "code"])
def test_what_an_engine_made_before_it_failed_is_judged(domain):
  def answers():
    for n in range(3):
      yield answer(f"a{n}", f"\\boxed{{w+w+{n}}}", f"2w+{n}", domain)
    raise ZeroDivisionError

  found = []

  def judge(graders):
    for sample in samples.graded(answers(), graders):
      found.append((sample.prompt.key, sample.verdict.correct))

  with verifier.Grader() as math, pytest.raises(ZeroDivisionError):
    judge({"math": math, "code": Stuck()})
  assert sorted(found) == [(f"a{n}", True) for n in range(3)]


def test_no_grader_sees_an_answer_without_a_gold_one():
  def answers():
    yield answer("bare", "\\boxed{1}", gold="")
    yield answer("gold", "\\boxed{x+x}")

  with verifier.Grader() as grader:
    found = {
      s.prompt.key: s for s in samples.graded(answers(), {"math": grader})
    }
  assert found["gold"].verdict.correct is True
  assert found["bare"].verdict == Verdict(None, "no_gold", None)
  assert found["bare"].grader == "none"
  only = [answer("bare", "print()", gold="", domain="code")]
  assert [s.verdict.correct for s in samples.graded(iter(only), {})] == [None]
