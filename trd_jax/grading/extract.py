"""Where a completion says its answer.

An answer is what stands in the last `\\boxed{}` (or `\\fbox{}`) after the last
`</think>`. A last box that is empty or never closes is no answer at all: an
earlier box is what the model moved away from, so it is never fallen back to.
Everything here is linear in the length of the text and imports only `re`.
"""

import re
from typing import NamedTuple

# Boxes further apart than this are separate statements, not one list.
_MAX_GAP = 48
_MAX_JOINED = 64
# An answer that is stated without a box has to be the end of the text.
_MAX_STATEMENT = 300

_COMMANDS = ("\\boxed", "\\fbox")
_TOKEN_BOX = ("<|begin_of_box|>", "<|end_of_box|>")
_BARE = re.compile(r"\s*([+-]?\d[\d,.]*(?<![.,])|\\?[A-Za-z]+)")
_GAP_MARKUP = re.compile(
  r"\\(?:quad|qquad|text|mbox|mathrm|[()\[\],;:! ])|[\s${}.]"
)
# What some data sets put between two answers: three or more of one sign.
_GAP_RULE = re.compile(r"\s*([-+*=_~|/])\1{2,}\s*\Z")
_GAP_WORD = re.compile(r"[,;]|\b(?:and|or)\b")

_TAIL = re.compile(
  r"(?:\s*I hope (?:it|this) is correct\.?|<\|im_(?:start|end)\|>\s*\w*"
  r"|<\|endoftext\|>|\s|[*□■∎])+\Z"
)
_ANCHOR = re.compile(
  r"\b(?:answer|solution|therefore|thus|hence|is(?=[^a-z]*\.\s*\Z))\b",
  re.IGNORECASE,
)
_SPAN = re.compile(
  r"\$\$(.+?)\$\$|(?<!\\)\$((?:\\\$|[^$\n])+?)(?<!\\)\$"
  r"|\\\((.+?)\\\)|\\\[(.+?)\\\]",
  re.DOTALL,
)
_STATED_NUMBER = re.compile(
  r"(?:^|[\s:])(-?(?:\d[\d,.]*)?\d(?:/\d+)?(?:\\?%)?)"
  r"(?:\s?[A-Za-z²³°]+){0,3}\.?\Z"
)


class Box(NamedTuple):
  """One box: `text[start:end]` is the command with its braces."""

  start: int
  end: int
  content: str | None  # None: it never closes


def final_text(completion: str) -> str:
  """What follows the last `</think>`; the whole text where there is none."""
  cut = completion.rfind("</think>")
  return completion if cut < 0 else completion[cut + len("</think>") :]


def _read_box(text: str, start: int) -> Box:
  """Reads the box whose command begins at `start`."""
  if text.startswith(_TOKEN_BOX[0], start):
    begin = start + len(_TOKEN_BOX[0])
    end = text.find(_TOKEN_BOX[1], begin)
    if end < 0:
      return Box(start, len(text), None)
    return Box(start, end + len(_TOKEN_BOX[1]), text[begin:end])
  begin = start + (6 if text.startswith("\\boxed", start) else 5)
  brace = begin
  while brace < len(text) and text[brace].isspace():
    brace += 1
  if brace == len(text) or text[brace] != "{":
    bare = _BARE.match(text, begin)
    if not bare:
      return Box(start, begin, None)
    return Box(start, bare.end(), bare[1])
  depth, at = 0, brace
  while at < len(text):
    character = text[at]
    if character == "\\":
      at += 1  # whatever it escapes is not a delimiter
    elif character == "{":
      depth += 1
    elif character == "}":
      depth -= 1
      if depth == 0:
        return Box(start, at + 1, text[brace + 1 : at])
    at += 1
  return Box(start, len(text), None)


def _last_command(text: str, before: int) -> int:
  """Index of the last box command that begins before `before`, or -1."""
  return max(
    text.rfind("\\boxed", 0, before),
    text.rfind("\\fbox", 0, before),
    text.rfind(_TOKEN_BOX[0], 0, before),
  )


def last_box(text: str) -> Box | None:
  """The box whose command comes last (innermost where they nest)."""
  start = _last_command(text, len(text))
  return None if start < 0 else _read_box(text, start)


def _joins(gap: str) -> bool:
  """Whether two boxes with `gap` between them are parts of one list."""
  gap = gap.rstrip("\\")  # of a command whose backslash was doubled
  if len(gap) > _MAX_GAP or "\n\n" in gap:
    return False
  if _GAP_WORD.search(gap) or _GAP_RULE.match(gap):
    return True
  return not _GAP_MARKUP.sub("", gap)


def adjacent_boxes(text: str, last: Box) -> list[str]:
  """Contents of the run of boxes that ends with `last`, in reading order.

  Boxes belong to one run where only a comma, "and", "or" or mark-up stands
  between them. Repeated contents are kept once.
  """
  contents = [last.content or ""]
  following = last
  while len(contents) < _MAX_JOINED:
    start = _last_command(text, following.start)
    if start < 0:
      break
    box = _read_box(text, start)
    if box.content is None or box.end > following.start:
      break
    if not _joins(text[box.end : following.start]):
      break
    if box.content not in contents:
      contents.append(box.content)
    following = box
  return contents[::-1]


def stated_answer(text: str) -> str | None:
  """The answer that an unboxed text unmistakably ends with.

  Only the last sentence counts, only where it announces itself (answer,
  solution, therefore, thus, hence, or "is" right before the end), and only its
  last formula or the number that it ends with. None where there is no such
  statement.
  """
  tail = _TAIL.sub("", text[-4 * _MAX_STATEMENT :])
  anchors = _ANCHOR.finditer(tail, max(0, len(tail) - _MAX_STATEMENT))
  for anchor in list(anchors)[::-1]:
    sentence = tail[anchor.end() :]
    spans = list(_SPAN.finditer(sentence))
    rest = sentence[spans[-1].end() :] if spans else sentence
    number = _STATED_NUMBER.search(rest)
    if number and "$" not in rest:
      return number[1]
    if spans:
      return next(group for group in spans[-1].groups() if group)
  return None
