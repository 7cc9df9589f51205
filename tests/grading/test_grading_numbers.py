"""Whole families of numbers, in every spelling, against the math grader."""

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from trd_jax.grading.math import grade_answer, latex, numbers

_spelling = st.sampled_from(
  [
    lambda n: f"{n}",
    lambda n: f" {n} ",
    lambda n: f"{n:,}",
    lambda n: f"{n:,}".replace(",", "{,}"),
    lambda n: f"{n:,}".replace(",", "\\,"),
    lambda n: f"{n:,}".replace(",", ",\\!"),
    lambda n: f"00{n}" if n >= 0 else f"-00{-n}",
    lambda n: f"x = {n}",
    lambda n: f"{n}.0",
    lambda n: f"\\text{{{n}}}",
    lambda n: f"{n}^\\circ",
    lambda n: f"\\${n}",
    lambda n: f"\\left({n}\\right)",
    lambda n: f"\\frac{{{2 * n}}}{{2}}",
    lambda n: f"{n} \\text{{ apples}}",
    lambda n: f"{n}".translate(
      str.maketrans("0123456789-", "０１２３４５６７８９−")
    ),
  ]
)


@given(st.integers(-(10**12), 10**12), _spelling, st.integers(1, 1000))
@settings(deadline=None)
def test_integers_are_settled_here_and_exactly(value, spell, off):
  right = grade_answer.prepare(f"\\boxed{{{spell(value)}}}", str(value))
  assert (right.correct, right.reason) == (True, "match")
  wrong = grade_answer.prepare(f"\\boxed{{{spell(value + off)}}}", str(value))
  assert (wrong.correct, wrong.reason) == (False, "mismatch")


_fractions = st.fractions(
  min_value=-100, max_value=100, max_denominator=200
).map(lambda value: (value.numerator, value.denominator))


@given(_fractions, _fractions, st.integers(1, 9))
def test_fractions_are_equal_exactly_when_their_values_are(one, other, times):
  gold = f"\\frac{{{one[0]}}}{{{one[1]}}}"
  for answer, value in (
    (f"{other[0]}/{other[1]}", other),
    (f"\\dfrac{{{one[0] * times}}}{{{one[1] * times}}}", one),
    (f"{one[0] * 10**9 + times}/{one[1] * 10**9}", (1, 0)),
  ):
    found = numbers.equal(latex.clean(gold), latex.clean(answer))
    assert found == (value[1] > 0 and Fraction(*one) == Fraction(*value))


@given(st.decimals(-(10**6), 10**6, places=2), st.decimals(0, 1, places=4))
@settings(deadline=None)
def test_a_rounded_gold_takes_what_rounds_to_it_and_nothing_else(gold, more):
  found = numbers.literal(str(gold))
  assert found is not None
  answer = Fraction(gold) + Fraction(more) / 50  # up to four times half a unit
  if found.significant >= 4:
    rounds = abs(answer - found.value) <= Fraction(1, 200)
    assert numbers.close(found, answer, False) == rounds
  elif found.value and answer != found.value:
    relative = abs(answer - found.value) / abs(found.value)
    assert numbers.close(found, answer, False) == (
      relative <= Fraction(1, 10**6)
    )
