r"""Where a draft's prefix fails, and the path that would still correct it.

Section 4 of the paper calls a prefix failed that nothing can continue to the
right answer without taking something back. A verifier of prefixes finds it in
the text, one a domain (`VERIFIERS`); here it becomes places among the draft's
tokens:

    Start at 3, add 7, times 4, minus 9.

    draft y_o      3+7=10 ⏎ 10*4=2 ⏎ 2-9=13 ⏎ \boxed{13}
                            └ begin  └ place t: y_o[:t] has failed
    correction     3+7=10 ⏎ 10*4=2 ⏎ Wait, 10*4=0 ⏎ 0-9=11 ⏎ \boxed{11}
                                     └ path, its first step up to ⏎

A right prefix has the same parts, without a word that takes something back.
"""

import dataclasses
import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

from trd_jax.data.chat import Chat
from trd_jax.data.problems import arithmetic_steps
from trd_jax.data.problems.arithmetic import Chain, evaluate
from trd_jax.data.problems.arithmetic_steps import Line, first_wrong_step
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import Problem

ONSET = "Wait"
"""What a correction begins with: the paper's first onset word."""

_OPERATION = re.compile(r"f\(|[0-9]+([-+*])([0-9]+)")

MarkKind = Literal["line", "value"]


class Mark(NamedTuple):
  """A place of a draft where going on and going right part.

  Attributes:
    offset: in characters of the draft.
    kind: `line` where a line begins, `value` where the value of a step does.
    distance: lines after the one that failed, which is 0.
    right: what the reference has there.
    consistent: at a value, what follows from the draft's own left side.
  """

  offset: int
  kind: MarkKind
  distance: int
  right: str
  consistent: str | None = None


class Fork(NamedTuple):
  """A place of a draft, and a path from it to the right answer.

  Attributes:
    begin: offset of the line before the place, which a failed draft gets wrong.
    place: offset of what follows that line; the path begins here instead.
    path: the right continuation, up to its answer.
    first: characters of the path that are its first step.
    avoid: the right text from `begin` on, as if that line were still to come.
    step: number of the step of that line.
    marks: places where the draft and the reference can be told apart.
  """

  begin: int
  place: int
  path: str
  first: int
  avoid: str
  step: int
  marks: tuple[Mark, ...] = ()


class PrefixVerifier(NamedTuple):
  """What is known of the prefixes of a domain's texts.

  Attributes:
    first_error: the offset, in characters, of where a text first fails; None:
      nowhere, or it can't be said.
    failed: the fork right after that; a text that says why there is none.
    right: every fork of a text that is right from its first line to its last;
      none of any other text.
  """

  first_error: Callable[[Problem, str], int | None]
  failed: Callable[[Problem, str], Fork | str]
  right: Callable[[Problem, str], list[Fork]]


def verifier(domain: str) -> PrefixVerifier:
  """Returns a domain's verifier of prefixes.

  Raises:
    UserError: it has none.
  """
  if domain not in VERIFIERS:
    raise UserError(
      f"domain={domain}: nothing here can say which step of a draft is the"
      " first wrong one, so that prefix failure can't be measured; that is"
      f" known for domain={', '.join(VERIFIERS)}"
    )
  return VERIFIERS[domain]


# -- the laboratory's chains -------------------------------------------------


def _chain(problem: Problem) -> Chain:
  chain = arithmetic_steps.parse(problem.text)
  if chain is None:
    raise UserError(
      f"problem {problem.problem_id}: its text is no chain of the laboratory's,"
      " so that nobody knows its steps"
    )
  return chain


def _arithmetic_failed(problem: Problem, text: str) -> Fork | str:
  chain = _chain(problem)
  wrong = first_wrong_step(problem, text)
  if wrong is None:
    return "no wrong step was found"
  lines = chain.solution.split("\n")
  # Nothing is ever taken back behind an answer, in no text of this world.
  if wrong.step >= len(chain.steps):
    return "it fails in its answer"
  place = _next_line(text, wrong.end)
  if place is None:
    return "it ends with the wrong step"
  first = f"{ONSET}, {lines[wrong.step]}\n"
  path = first + "\n".join(lines[wrong.step + 1 :])
  marks = tuple(_marks(chain, lines, text, wrong.offset, wrong.step))
  avoid = "\n".join(lines[wrong.step :])
  return Fork(wrong.offset, place, path, len(first), avoid, wrong.step, marks)


def _arithmetic_right(problem: Problem, text: str) -> list[Fork]:
  solution = _chain(problem).solution
  # Only a draft that is the reference, line for line: its own end is then the
  # right path, token for token.
  if text != solution:
    return []
  forks, begin = [], 0
  lines = solution.split("\n")
  for step, line in enumerate(lines[:-1]):
    place = begin + len(line) + 1
    first = len(lines[step + 1]) + (step + 2 < len(lines))
    path, avoid = solution[place:], solution[begin:]
    forks.append(Fork(begin, place, path, first, avoid, step))
    begin = place
  return forks


def _marks(
  chain: Chain, lines: list[str], text: str, begin: int, step: int
) -> Iterator[Mark]:
  """Yields where a draft works the reference's steps, from its wrong one on.

  It ends where the draft's lines are the reference's steps no longer.
  """
  offset, before = begin, ""
  for distance, line in enumerate(text[begin:].splitlines(keepends=True)):
    read = arithmetic_steps.read_line(line)
    if read is None or step + distance >= len(lines):
      return
    # Once the draft takes something back it is on another way.
    if read.has_onset and distance:
      return
    right = arithmetic_steps.read_line(lines[step + distance])
    assert right is not None  # it is a line of a reference
    if not _same_operation(read, right):
      return
    if distance:
      lead = len(line) - len(line.lstrip())
      right_line = lines[step + distance]
      yield Mark(offset + lead, "line", distance, right_line)
    # Where the wrong line has another left side it fails before its value.
    if distance or read.left == right.left:
      consistent = _follows(chain, step + distance, read, before)
      at = offset + read.value_at
      yield Mark(at, "value", distance, right.value, consistent)
    offset, before = offset + len(line), read.value


def _same_operation(line: Line, right: Line) -> bool:
  """Returns whether a line works a step, perhaps from another value."""
  if "box" in (line.left, right.left):
    return line.left == right.left
  mine, other = (_OPERATION.match(one.left) for one in (line, right))
  return bool(mine and other and mine.groups() == other.groups())


def _follows(chain: Chain, step: int, line: Line, before: str) -> str | None:
  """Returns the value that follows from a line's own left side."""
  if line.left == "box":
    return before or None
  start = re.search("[0-9]+", line.left)
  # Longer numbers than the world's are no values of it.
  if start is None or len(start[0]) > 2 or int(start[0]) > 19:
    return None
  return str(evaluate(*_step_from(chain, step, int(start[0]))))


def _step_from(chain: Chain, step: int, value: int) -> tuple[str, int, int]:
  operation, operand = chain.steps[step]
  return operation, value, operand


def _next_line(text: str, end: int) -> int | None:
  """Returns where the line after an end of a line begins; None: nowhere."""
  rest = text[end:]
  found = re.match(r"[^\S\r\n]*(\r\n|\r|\n)", rest)
  if found is None or found.end() == len(rest):
    return None
  return end + found.end()


VERIFIERS: Mapping[str, PrefixVerifier] = {
  "arithmetic": PrefixVerifier(
    arithmetic_steps.first_error, _arithmetic_failed, _arithmetic_right
  ),
}


# -- as tokens ---------------------------------------------------------------


class TokenMark(NamedTuple):
  """A `Mark` among the tokens of a draft.

  Attributes:
    token: number of the draft's token that stands there.
    kind: as `Mark`.
    distance: as `Mark`.
    right_id: the first token of what the reference has there.
    consistent_id: the first token of what follows from the draft's own line;
      None where nothing does.
  """

  token: int
  kind: MarkKind
  distance: int
  right_id: int
  consistent_id: int | None


@dataclasses.dataclass(frozen=True)
class Prefix:
  """A draft cut at a fork, as tokens.

  Attributes:
    key: of the draft's trajectory.
    problem_id: of its problem.
    failed: whether its prefix has failed; else it is right.
    step: number of the step before the place, from 0.
    begin: the first token of the line before the place.
    place: the first token after it: t of the paper's y_o[:t].
    path_ids: the right continuation, the end of the turn included.
    first: tokens of it that are its first step.
    avoid_ids: the right text from `begin` on, with the end of the turn.
    marks: see `TokenMark`.
  """

  key: str
  problem_id: str
  failed: bool
  step: int
  begin: int
  place: int
  path_ids: tuple[int, ...]
  first: int
  avoid_ids: tuple[int, ...]
  marks: tuple[TokenMark, ...]


def failed_prefix(
  problem: Problem, key: str, text: str, response_ids: list[int], chat: Chat
) -> Prefix | str:
  """Finds where a draft's prefix fails.

  Args:
    problem: what the draft answers.
    key: of its trajectory.
    text: the draft.
    response_ids: its tokens, which stay as they were sampled.
    chat: whose tokens they are.

  Returns:
    The prefix, or a clause that says why there is none.

  Raises:
    UserError: the problem's domain has no verifier.
  """
  fork = verifier(problem.domain).failed(problem, text)
  if isinstance(fork, str):
    return fork
  return _as_tokens(problem, key, text, response_ids, chat, fork, True)


def right_prefix(
  problem: Problem, key: str, text: str, response_ids: list[int], chat: Chat
) -> Prefix | str:
  """Cuts a right draft behind one of its steps, drawn by its key.

  Args and returns as `failed_prefix`.
  """
  forks = verifier(problem.domain).right(problem, text)
  if not forks:
    return "it isn't the reference line for line"
  fork = random.Random(f"prefix_failure/{key}").choice(forks)
  return _as_tokens(problem, key, text, response_ids, chat, fork, False)


def _as_tokens(
  problem: Problem,
  key: str,
  text: str,
  response_ids: list[int],
  chat: Chat,
  fork: Fork,
  failed: bool,
) -> Prefix | str:
  number_of = _token_numbers(chat, response_ids, text)
  if fork.begin not in number_of or fork.place not in number_of:
    return "a token of it reaches over the end of a line"
  marks = []
  for mark in fork.marks:
    if mark.offset not in number_of:
      continue
    consistent = mark.consistent
    marks.append(
      TokenMark(
        number_of[mark.offset],
        mark.kind,
        mark.distance,
        chat.encode(mark.right)[0],
        chat.encode(consistent)[0] if consistent else None,
      )
    )
  first_ids = chat.encode(fork.path[: fork.first])
  path_ids, avoid_ids = (
    (*chat.encode(text), chat.stop_ids[0]) for text in (fork.path, fork.avoid)
  )
  return Prefix(
    key,
    problem.problem_id,
    failed,
    fork.step,
    number_of[fork.begin],
    number_of[fork.place],
    path_ids,
    len(first_ids),
    avoid_ids,
    tuple(marks),
  )


def _token_numbers(
  chat: Chat, response_ids: list[int], text: str
) -> dict[int, int]:
  """Returns the number of the token that begins at an offset of the text.

  Empty where the tokens' texts one by one aren't the text, as where a
  character is cut into several.
  """
  parts = [chat.decode([i]) for i in response_ids]
  if "".join(parts) != text:
    return {}
  numbers, offset = {}, 0
  for number, part in enumerate(parts):
    if part:
      numbers[offset] = number
    offset += len(part)
  return numbers
