r"""Answers that are formulas, compared at fixed values of their variables.

Two formulas are taken for the same where they agree at every one of the
values: each variable is replaced by its number in the text of both, which
leaves numbers for `grading.math` to compare.
"""

import collections
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from trd_jax.data import final_answer
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.records import Problem, Verdict
from trd_jax.grading import grader_protocol
from trd_jax.grading.math import grade_answer, verifier

VERSION = f"formulas-1, {verifier.VERSION}"

# A LaTeX command, a group of plain text, a function's name, or one letter.
_PIECE = re.compile(
  r"\\[A-Za-z]+|\\."
  r"|\b(?:arc)?(?:sin|cos|tan|sinh|cosh|tanh|ln|log|exp|sqrt|max|min)\b"
  r"|[A-Za-z]"
)
_TEXT = re.compile(r"\\(?:text|mathrm|operatorname|mbox)\s*\{[^{}]*\}")


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


class Grader(grader_protocol.Grader):
  """Grades answers whose gold is a formula, at each of the values.

  `Problem.meta` has the values of the variables (`values`); what has none is
  an answer for `grading.math` alone.
  """

  version = VERSION

  def __init__(self):
    self._numbers = verifier.Grader()
    self.workers = self._numbers.workers
    self._ready: collections.deque[tuple[Any, Verdict]] = collections.deque()
    # By submission: the caller's key, the answer, verdicts that are in, and
    # how many there will be.
    self._open: dict[int, tuple[Any, str, list[Verdict], int]] = {}
    self._count = itertools.count()

  @classmethod
  def open(cls, experiment: Experiment, files: Sequence[Path] = ()) -> Self:
    """Opens `grader.Grader`, which reads no files."""
    del experiment, files
    return cls()

  @classmethod
  def stand_in(
    cls, experiment: Experiment, problem: Problem | None
  ) -> str | None:
    """Names `math`, where the gold is a number and no formula."""
    del experiment
    if problem is None or "values" in json.loads(problem.meta):
      return None
    return "math"

  def submit(self, key: Any, text: str, problem: Problem) -> None:
    """Takes a response, as `grader.Grader`, for a gold that is a formula."""
    self.compare(key, text, problem.answer, json.loads(problem.meta)["values"])

  def compare(
    self,
    key: Any,
    completion: str,
    gold: str,
    values: Sequence[Mapping[str, int]],
  ) -> None:
    """Takes a completion, its gold formula and the variables' values."""
    try:
      found = _pairs(completion, gold, values)
    except UserError:
      raise
    except Exception as error:
      found = Verdict.unparsed(error)
    if isinstance(found, Verdict):
      self._ready.append((key, found))
      return
    answer, pairs = found
    if not pairs:
      self._ready.append((key, _worst(answer, [])))
      return
    number = next(self._count)
    self._open[number] = key, answer, [], len(pairs)
    for pair in pairs:
      self._numbers.compare(number, *pair)

  def finished(self, wait: bool = False) -> Iterator[tuple[Any, Verdict]]:
    """Yields verdicts, as `grader.Grader`."""
    while self._ready:
      yield self._ready.popleft()
    for number, verdict in self._numbers.finished(wait):
      key, answer, found, count = self._open[number]
      found.append(verdict)
      if len(found) == count:
        del self._open[number]
        yield key, _worst(answer, found)

  def close(self) -> None:
    """Forgets the responses that have no verdict yet."""
    self._numbers.close()
    self._open.clear()
    self._ready.clear()


def _pairs(
  completion: str, gold: str, values: Sequence[Mapping[str, int]]
) -> tuple[str, list[tuple[str, str]]] | Verdict:
  """Returns the answer and (boxed answer, gold) at each value, or a verdict."""
  box = final_answer.last_box(final_answer.final_text(completion))
  if box is None or not (box.content or "").strip():
    return Verdict(False, "no_box", None)
  answer = (box.content or "").strip()
  if len(answer) > grade_answer.MAX_ANSWER:
    return Verdict(False, "unparsed", answer)
  mine, golden = right_side(answer), right_side(gold)
  return answer, [
    (f"\\boxed{{{substitute(mine, some)}}}", substitute(golden, some))
    for some in values
  ]


def _worst(answer: str, found: Sequence[Verdict]) -> Verdict:
  """Returns a match where every value has one, else the gravest verdict."""
  # One value at which they differ settles it, whatever the others gave.
  for reason in ("mismatch", "unparsed", "no_box", "timeout"):
    worst = next((one for one in found if one.reason == reason), None)
    if worst is not None:
      return Verdict(worst.correct, worst.reason, answer)
  return Verdict(True, "match", answer)
