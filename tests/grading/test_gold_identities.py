"""Every gold answer is right against itself and wrong against another's."""

import json
import re

import pytest

from tests.support import judging
from tests.support.places import SHARED
from trd_jax.data import final_answer, problems
from trd_jax.data.problems import amo
from trd_jax.experiment.schema import Data
from trd_jax.grading.math import formulas, verifier

MATH = SHARED / "data/math_eval"
RESPONSES = MATH / "amo_bench_reference_responses.jsonl"

needs_data = pytest.mark.skipif(
  not MATH.exists(), reason=f"no real data at {MATH}"
)


def golds(name):
  if name != "amobench":
    found, rejected = problems.read(Data(source=name, root=str(MATH)))
    assert rejected == []
    return [problem.answer for problem in found]
  rows = map(json.loads, RESPONSES.read_text().splitlines())
  found = {row["question_id"]: row["model_response"] for row in rows}
  boxes = {
    number: final_answer.last_box(found[number])
    for number in amo.PARSED - amo.VALUES.keys()
  }
  return [amo.REVISED.get(n, box.content) for n, box in boxes.items()]


@needs_data
@pytest.mark.parametrize(
  ("name", "count"),
  [
    ("aime24", 30),
    ("aime25", 30),
    ("hmmt25", 30),
    ("beyondaime", 100),
    ("math500", 500),
    ("gsm8k", 1319),
    ("amobench", 37),
  ],
)
def test_a_gold_is_right_against_itself_and_wrong_against_others(name, count):
  answers = golds(name)
  assert len(answers) == count
  same = [(f"So the answer is $\\boxed{{{gold}}}$.", gold) for gold in answers]
  wrong = [
    (pair, verdict.reason)
    for pair, verdict in zip(same, verifier.verify_batch(same), strict=True)
    if verdict.correct is not True
  ]
  assert wrong == []
  crossed = [
    (f"So the answer is $\\boxed{{{gold}}}$.", other)
    for gold, other in zip(answers, answers[1:] + answers[:1], strict=True)
    if unnamed(gold) != unnamed(other)
  ]
  assert len(crossed) > 0.9 * count
  taken = [
    (pair, verdict.reason)
    for pair, verdict in zip(
      crossed, verifier.verify_batch(crossed), strict=True
    )
    if verdict.correct is not False
  ]
  assert taken == []


def unnamed(gold):
  """`x=5` and `5` are one answer."""
  return re.sub(r"^[a-z]=", "", gold)


def amo_formulas():
  rows = map(json.loads, RESPONSES.read_text().splitlines())
  found = {row["question_id"]: row["model_response"] for row in rows}
  return [(n, found[n], amo.VALUES[n]) for n in sorted(amo.VALUES)]


@needs_data
def test_amo_benchs_formulas_are_right_against_themselves_alone():
  (_, first, at_n), (_, second, at_abc) = amo_formulas()
  one, two = (final_answer.last_box(text).content for text in (first, second))
  verdicts = judging.verdicts(
    formulas.Grader(),
    [
      (judging.formula(one, at_n), first),
      (judging.formula(two, at_abc), second),
      (judging.formula(two, at_abc), first),
    ],
  )
  assert [verdict.correct for verdict in verdicts] == [True, True, False]


GOLD = r"\frac{x^{2^{1-n}} + x^{-2^{1-n}}}{2}".replace("x", r"(2+\sqrt{3})")
AT = [{"n": n} for n in range(1, 6)]


@pytest.mark.parametrize(
  ("answer", "reason"),
  [
    (GOLD, "match"),
    (r"a_n = \cosh\left(2^{1-n}\ln(2+\sqrt3)\right)", "match"),
    (r"\frac12\left((2+\sqrt3)^{2/2^n}+(2-\sqrt3)^{2/2^n}\right)", "match"),
    (GOLD.replace("+ (", "- ("), "mismatch"),
    ("2", "mismatch"),  # right at n=1, and nowhere else
    (GOLD.replace("1-n", "1-m"), "mismatch"),
  ],
)
def test_formulas_are_compared_at_every_value(answer, reason):
  problem = judging.formula(GOLD, AT)
  answers = [(problem, f"\\boxed{{{answer}}}")]
  (verdict,) = judging.verdicts(formulas.Grader(), answers)
  assert (verdict.reason, verdict.extracted) == (reason, answer)


@pytest.mark.parametrize("text", ["n = 3", "\\boxed{}", "\\boxed{n"])
def test_a_formula_needs_a_box(text):
  answers = [(judging.formula("n", AT), text)]
  (verdict,) = judging.verdicts(formulas.Grader(), answers)
  assert (verdict.correct, verdict.reason) == (False, "no_box")


@pytest.mark.parametrize(
  ("formula", "expected"),
  [
    ("2^n", "2^{(3)}"),
    ("nm", "{(3)}{(5)}"),
    (r"\sin n + \min(n, 2)", r"\sin {(3)} + \min({(3)}, 2)"),
    (r"\frac{n}{m}", r"\frac{{(3)}}{{(5)}}"),
    (r"\text{in n} + max(n)", r"\text{in n} + max({(3)})"),
    (r"\lfloor n \rfloor", r"\lfloor {(3)} \rfloor"),
  ],
)
def test_only_variables_are_replaced(formula, expected):
  assert formulas.substitute(formula, {"n": 3, "m": 5}) == expected


@pytest.mark.parametrize(
  ("formula", "expected"),
  [
    ("n+1", "n+1"),
    ("a_n = n+1", "n+1"),
    (r"R^3 = \frac{a}{b} = c", "c"),
    (r"\sum_{i=1}^{n} i", r"\sum_{i=1}^{n} i"),
    ("n <= 3", "n <= 3"),
  ],
)
def test_what_is_compared_stands_after_the_last_equals_sign(formula, expected):
  assert formulas.right_side(formula) == expected
