r"""Reads worked chains of the laboratory against the chain that is asked for.

A draft works one line a step (see `arithmetic`). As the problem's text says
what each line has to be, the place where a draft first fails is known exactly:

    Start at 3, add 7, times 4, minus 9.

    3+7=0            a slip, and no error: the next line corrects it
    Wait, 3+7=10
    10*4=2           the first error: nobody corrects it
    2-9=13
    \boxed{13}

What is no step, as prose, is passed over.
"""

import re
from typing import NamedTuple

from trd_jax.data.problems.arithmetic import (
  MODULUS,
  WORDS,
  Chain,
  evaluate,
)
from trd_jax.experiment.records import Problem

# Numbers are compared as text: a model may write one of any length.
_STEP = re.compile(
  r"\s*(?P<onset>[A-Za-z][A-Za-z ]{0,20}[,.:!]\s*)?"
  r"(?P<left>f\s*\(\s*[0-9]+\s*\)|[0-9]+\s*[-+*]\s*[0-9]+)"
  r"\s*=\s*(?P<value>-?[0-9]+)\s*[.,;]?\s*"
)
_BOX = re.compile(r"\\boxed\s*\{(?P<value>[^{}]*)\}")
_START = re.compile(r"Start at ([0-9]{1,2})")
_OPERATIONS = {word: operation for operation, word in WORDS.items()}
_OPERATION = re.compile(rf"({'|'.join(_OPERATIONS)}) ([0-9]{{1,9}})|apply f")


class WrongStep(NamedTuple):
  """A step that a text gets wrong and doesn't correct on its next line.

  Attributes:
    offset: of its line's first character in the text; with an onset word, that
      word's.
    end: of the character after its line's last one, the newline left out.
    right: the line that should stand there, as `3+7=10` or `\\boxed{11}`; None
      where the chain has ended and nothing should.
    step: the number of that line among the reference's, from 0; that of all
      its lines where the chain has ended.
  """

  offset: int
  end: int
  right: str | None
  step: int


class Line(NamedTuple):
  """A line that works a step, or boxes an answer.

  Attributes:
    left: its left side without spaces, `box` of a box.
    value: what it says it is, as text.
    has_onset: whether a word opens it, as in "Wait, 3+7=10".
    value_at: of the value's first character in the line.
  """

  left: str
  value: str
  has_onset: bool
  value_at: int


def first_error(problem: Problem, text: str) -> int | None:
  """Finds where a text first fails: the offset of the wrong step's line.

  Args:
    problem: what it answers.
    text: a draft, or a refined one.

  Returns:
    The offset, in characters, of the first wrong step that the text does not
    correct on the next line. None: there is none, the text has no steps, or
    the problem is none of the laboratory's.
  """
  wrong = first_wrong_step(problem, text)
  return None if wrong is None else wrong.offset


def first_wrong_step(problem: Problem, text: str) -> WrongStep | None:
  """Finds what `first_error` finds, with the line that should stand there."""
  chain = parse(problem.text) if problem.domain == "arithmetic" else None
  if chain is None:
    return None
  steps = _worked(chain)
  box = len(steps) - 1
  at = 0  # the step that is due
  pending: WrongStep | None = None
  offset = 0
  for line in text.splitlines(keepends=True):
    begin, offset = offset, offset + len(line)
    read = read_line(line)
    if read is None:
      continue
    left, value, has_onset, _ = read
    # After a wrong step only that step, or the one that goes on from its right
    # value, makes good for it. Else steps may be said again, and one be done in
    # the head: what such a line says of the chain is right.
    due = [at, at + 1]
    if pending is None:
      before = [*range(at - 1, -1, -1)]
      due = [*before[:1], *due, *before[1:]] if has_onset else [*due, *before]
      due.append(box)
    said = next(
      (i for i in due if i <= box and steps[i] == (left, value)), None
    )
    if said is not None:
      at, pending = said + 1, None
    elif pending is not None:
      return pending
    elif not _is_torn(line, text, offset, value, steps[min(at, box)][1]):
      right = None if at > box else _written(*steps[at])
      begin += len(line) - len(line.lstrip())
      pending = WrongStep(begin, begin + len(line.strip()), right, at)
  return pending


def parse(text: str) -> Chain | None:
  """Reads a problem's text; None: it is no chain of the laboratory's."""
  first, *rest = text.removesuffix(".").split(", ")
  start = _START.fullmatch(first)
  if start is None or int(start[1]) >= MODULUS:
    return None
  steps = []
  for part in rest:
    found = _OPERATION.fullmatch(part)
    if found is None:
      return None
    operation = _OPERATIONS[found[1]] if found[1] else "f"
    steps.append((operation, int(found[2] or 0)))
  return Chain(int(start[1]), tuple(steps))


def _worked(chain: Chain) -> list[tuple[str, str]]:
  """Returns left and right side of each right line, the box as the last."""
  lines = []
  value = chain.start
  for operation, operand in chain.steps:
    left = f"{value}{operation}{operand}"
    left = f"f({value})" if operation == "f" else left
    value = evaluate(operation, value, operand)
    lines.append((left, str(value)))
  return [*lines, ("box", str(value))]


def _written(left: str, value: str) -> str:
  return rf"\boxed{{{value}}}" if left == "box" else f"{left}={value}"


def read_line(line: str) -> Line | None:
  """Reads a line of a draft; None: it works no step and boxes nothing."""
  if box := _BOX.search(line):
    return Line("box", _plain(box["value"].strip()), False, box.start("value"))
  step = _STEP.fullmatch(line)
  if step is None:
    return None
  left = re.sub(
    "[0-9]+", lambda found: _plain(found[0]), re.sub(r"\s+", "", step["left"])
  )
  has_onset = step["onset"] is not None
  return Line(left, _plain(step["value"]), has_onset, step.start("value"))


def _plain(number: str) -> str:
  """Returns a number without leading zeros; what is none as it is."""
  return number.lstrip("0") or "0" if number.isdecimal() else number


def _is_torn(line: str, text: str, end: int, value: str, right: str) -> bool:
  """Returns whether a text ends inside a number that may yet become right."""
  open_ended = end == len(text) and line[-1:].isdecimal()
  return open_ended and value != right and right.startswith(value)
