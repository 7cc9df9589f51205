r"""Answers that are formulas, compared at fixed values of their variables.

Two formulas are taken for the same where they agree at every one of the
values: each variable is replaced by its number in the text of both, which
leaves numbers for `grading.math` to compare.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from trd_jax.data import final_answer
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import Verdict
from trd_jax.grading.math import judge, verifier

VERSION = f"formulas-1, {verifier.VERSION}"

# A LaTeX command, a group of plain text, a function's name, or one letter.
_PIECE = re.compile(
  r"\\[A-Za-z]+|\\."
  r"|\b(?:arc)?(?:sin|cos|tan|sinh|cosh|tanh|ln|log|exp|sqrt|max|min)\b"
  r"|[A-Za-z]"
)
_TEXT = re.compile(r"\\(?:text|mathrm|operatorname|mbox)\s*\{[^{}]*\}")

# Response, gold, and the values of the variables.
Question = tuple[str, str, Sequence[Mapping[str, int]]]


def substitute(formula: str, values: Mapping[str, int]) -> str:
  """Puts numbers for a formula's variables: `n` at 3 becomes `{(3)}`."""
  kept = {span.span(): span[0] for span in _TEXT.finditer(formula)}

  def put(piece: re.Match[str]) -> str:
    inside = any(a <= piece.start() < b for a, b in kept)
    if inside or piece[0] not in values:
      return piece[0]
    # Both pairs: braces make it one argument or exponent, parentheses keep a
    # minus sign with its number.
    return f"{{({values[piece[0]]})}}"

  return _PIECE.sub(put, formula)


def right_side(formula: str) -> str:
  """Returns what stands after the last equals sign outside of groups."""
  depth, start = 0, 0
  for at, character in enumerate(formula):
    depth += (character in "{([") - (character in "})]")
    if character == "=" and depth == 0 and formula[at - 1 : at] not in "<>!\\":
      start = at + 1
  return formula[start:].strip() if start else formula.strip()


def verify_batch(
  questions: Iterable[Question],
  progress: Callable[[int], object] | None = None,
) -> list[Verdict]:
  """Grades responses whose gold is a formula.

  Args:
    questions: (a model's whole output, the gold, values of the variables).
    progress: called with the count of verdicts so far after each of them.

  Returns:
    Verdicts in their order: right where both agree at all values.
  """
  verdicts = []
  for question in questions:
    try:
      verdicts.append(_verify(*question))
    except UserError:
      raise
    except Exception as error:
      verdicts.append(Verdict.unparsed(error))
    if progress:
      progress(len(verdicts))
  return verdicts


def _verify(
  completion: str, gold: str, values: Sequence[Mapping[str, int]]
) -> Verdict:
  box = final_answer.last_box(final_answer.final_text(completion))
  if box is None or not (box.content or "").strip():
    return Verdict(False, "no_box", None)
  answer = (box.content or "").strip()
  if len(answer) > judge.MAX_ANSWER:
    return Verdict(False, "unparsed", answer)
  mine, golden = right_side(answer), right_side(gold)
  pairs = [
    (f"\\boxed{{{substitute(mine, some)}}}", substitute(golden, some))
    for some in values
  ]
  found = verifier.verify_batch(pairs)
  # One value at which they differ settles it, whatever the others gave.
  for reason in ("mismatch", "unparsed", "no_box", "timeout"):
    worst = next((one for one in found if one.reason == reason), None)
    if worst is not None:
      return Verdict(worst.correct, worst.reason, answer)
  return Verdict(True, "match", answer)
