"""The registry of graders: names lead to one, and all keep one protocol."""

import dataclasses
import typing

import pytest

from tests.support import judging
from tests.support.places import ROOT
from trd_jax.data.problems import benchmarks
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.records import Domain
from trd_jax.grading import graders
from trd_jax.grading.graders import GRADERS
from trd_jax.grading.math import formulas, verifier


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_a_benchmark_names_a_grader_that_there_is(name):
  assert benchmarks.BENCHMARKS[name].grader in GRADERS


def test_versions_tell_graders_apart():
  assert len({grader.version for grader in GRADERS.values()}) == len(GRADERS)


def test_each_domain_has_one_grader_and_no_other_judges_while_sampling():
  found = [d for grader in GRADERS.values() for d in grader.domains]
  assert sorted(found) == sorted(typing.get_args(Domain))


def test_an_environment_is_named_by_a_key_and_made_by_a_script():
  e = Experiment()
  for grader in GRADERS.values():
    if (needs := grader.environment) is not None:
      assert needs.named(e) is None
      assert needs.path(None).endswith(needs.python)
      script = f"third_party/{needs.package}/install.sh"
      assert (ROOT / script).is_file()
      names = {field.name for field in dataclasses.fields(e.python)}
      assert needs.field in names


def test_graders_are_asked_of_in_one_order_and_once():
  e = dataclasses.replace(
    Experiment(),
    python=dataclasses.replace(Experiment().python, lcb_runner="x"),
  )
  names = ("MBPP+", "LiveCodeBench", "arithmetic", "AIME24", "HumanEval+")
  found = graders.of_benchmarks(names, e)
  assert found == ["math", "evalplus", "lcb_runner"]


def test_what_is_not_finished_is_not_waited_for():
  # Processes of its own, which take a second to start.
  with verifier.Grader(workers=1, timeout=9.0) as grader:
    grader.compare("hard", "\\boxed{q+q+1}", "2q+1")
    assert list(grader.finished()) == []
    grader.compare("easy", "\\boxed{1}", "1")
    assert [key for key, _ in grader.finished()] == ["easy"]
    assert [key for key, _ in grader.finished(wait=True)] == ["hard"]


def test_graders_that_share_processes_get_each_its_own_answers():
  with verifier.Grader(workers=1) as one, verifier.Grader(workers=1) as other:
    for n in range(4):
      one.compare(n, f"\\boxed{{p+p+{n}}}", f"2p+{n}")
      other.compare(n, f"\\boxed{{p+p+{n}}}", f"3p+{n}")
    mine = dict(one.finished(wait=True))
    theirs = dict(other.finished(wait=True))
  assert [mine[n].correct for n in range(4)] == [True] * 4
  assert [theirs[n].correct for n in range(4)] == [False] * 4


def test_a_grader_that_leaves_off_takes_no_question_from_another():
  with verifier.Grader(workers=1) as one:
    with verifier.Grader(workers=1) as other:
      for n in range(3):
        other.compare(n, f"\\boxed{{{n}r+r+r}}", f"{n}r+s")
      one.compare("mine", "\\boxed{t+t+r}", "2t+r")
    ((key, verdict),) = one.finished(wait=True)
  assert (key, verdict.correct) == ("mine", True)


def test_formulas_come_as_they_are_finished_whatever_their_order():
  at = [{"n": 1}, {"n": 2}]
  answers = [
    (judging.formula("2n+v", at), "\\boxed{n+n+v}"),
    (judging.formula("n", at), "\\boxed{n}"),
    (judging.formula("n", at), "none"),
    (judging.formula("n", []), "\\boxed{whatever}"),
  ]
  found = judging.verdicts(formulas.Grader(), answers)
  reasons = [verdict.reason for verdict in found]
  assert reasons == ["match", "match", "no_box", "match"]
