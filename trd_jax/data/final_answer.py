"""Where a completion says its answer.

An answer is what stands in the last `\\boxed{}` (or `\\fbox{}`) after the last
`</think>`; thoughts that never close hold none. A last box that is empty or
never closes is no answer at all: an earlier box is what the model moved away
from, so it is never fallen back to.
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
  r"(?:I hope (?:it|this) is correct\.?|<\|im_(?:start|end)\|>\s*\w*"
  r"|<\|endoftext\|>|\s|[*□■∎])+\Z"
)
_ANCHOR = re.compile(
  r"\b(?:answer|solution|option|choice|therefore|thus|hence|is(?=[^a-z]*\.\s*\Z))\b"
  r"|(?<!\S)####(?=[ \t]*[-$\\\d])",
  re.IGNORECASE | re.MULTILINE,
)
# Bold, or code: with a digit or a command in it this may be the answer.
_MARKED = re.compile(r"(\*\*|__|`)(?=\S)([^*_`$\n]+?)\1")
_HOLDS_VALUE = re.compile(r"[\d\\]")
_SPAN = re.compile(
  r"\$\$(.+?)\$\$|(?<!\\)\$((?:\\\$|[^$\n])+?)(?<!\\)\$"
  r"|\\\((.+?)\\\)|\\\[(.+?)\\\]",
  re.DOTALL,
)
_STATED_NUMBER = re.compile(
  r"(?:^|[\s:])(-?(?:\d[\d,.]*)?\d(?:/\d+)?(?:\\?%)?"
  r"(?:\s(?:hundred|thousand|million|billion|trillion|dozen)\b)?)"
  # What is counted or its unit, of which a letter alone may be a variable.
  r"(?P<words>\s?(?:[A-Za-z]{2,}|°|[CFKLghlms]\b)[²³]?(?:\s[A-Za-z]+[²³]?){0,2})?"
  r"\.?\Z"
)
# A choice, where it is all that is said after the word "answer".
_STATED_CHOICE = re.compile(
  r"\s*(?:is|[:=])?\s*:?\s*(?:(?:option|choice)\s+)?\(?"
  r"([A-J]|(?i:yes|no|true|false))\)?\.?\Z"
)
_CALLED = re.compile(r"\b(?:answer|option|choice)\s*\Z", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?]\s+\S")
# What takes a statement back, bounds it, or leaves it open.
_HEDGE = re.compile(
  r"[?]|n['’]t\b|\b(?:not?|nor|n?either|never|cannot|false|wrong|incorrect|or"
  r"|between|within|if|unless|suppose|assum\w+|guess\w*|doubt\w*|wait|maybe"
  r"|perhaps|possibly|probably|likely|unclear|could|might|may|should|less"
  r"|more|fewer|greater|larger|smaller|bigger|most|least|below|above|under"
  r"|over|beyond|exceed\w*|up to|except|almost|nearly)\b",
  re.IGNORECASE,
)
# The same before it is introduced, where a subject may hold many a word.
_DOUBT = re.compile(
  r"n['’]t\b|\b(?:not (?:true|clear|sure|certain|the case)|doubt\w*|false|wrong"
  r"|incorrect|suppose|assum\w+|guess\w*|n?either|whether|maybe|perhaps"
  r"|possibly|if|unless)\b|\bor(?:\s+\S+)?\s*\Z",
  re.IGNORECASE,
)
# What makes another value of the number that it stands beside, or a second
# number of the same statement.
_OPERATOR = re.compile(
  r"[\d=<>≤≥≠^√!]|\\[a-z]|(?:[-+−–±/×·]|(?<!\*)\*)\s*\Z"
  r"|\b(?:plus|minus|times|negative|root|squared?|cubed?|power|half|twice"
  r"|double|sqrt|log|ln|exp|sin|cos|tan|factorial|hundred|thousand|million"
  r"|billion|trillion|dozen)\b",
  re.IGNORECASE,
)
_CLAUSE_END = re.compile(r"[.,;:!?\n]\s")


# `(D) ` at the end of what stands before a value.
_OPTION = re.compile(r"(?<![\w(])(\([A-J]\)|[A-J][.)])[\s:]*\Z")
# Where a prompt asks for it, the answer stands between these.
_TAGGED = re.compile(r"<answer>([^<>]{1,300})</answer>\s*\Z")


class Box(NamedTuple):
  """One box: `text[start:end]` is the command with its braces."""

  start: int
  end: int
  content: str | None  # None: it never closes


def final_text(completion: str) -> str:
  """Returns what follows the last `</think>`; the whole text without one.

  Nothing does where a later `<think>` never closes: what thoughts try out is
  no answer.
  """
  text = completion.rpartition("</think>")[2]
  return "" if "<think>" in text else text


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
  """Returns where the last box command before `before` begins, or -1."""
  return max(
    text.rfind("\\boxed", 0, before),
    text.rfind("\\fbox", 0, before),
    text.rfind(_TOKEN_BOX[0], 0, before),
  )


def last_box(text: str) -> Box | None:
  """Finds the box whose command comes last (innermost where they nest)."""
  start = _last_command(text, len(text))
  return None if start < 0 else _read_box(text, start)


def unboxed(text: str) -> str:
  r"""Returns a text without the box and the dollars around all of it.

  `\boxed{1},\boxed{2}` is two boxes and stays as it is.
  """
  bare = text.strip().strip("$").strip()
  if not bare.startswith(_COMMANDS):
    return bare
  box = _read_box(bare, 0)
  if box.content is None or box.end < len(bare):
    return bare
  return unboxed(box.content)


def _joins(gap: str) -> bool:
  """Returns whether two boxes with `gap` between them are of one list."""
  gap = gap.rstrip("\\")  # of a command whose backslash was doubled
  if len(gap) > _MAX_GAP or "\n\n" in gap:
    return False
  if _GAP_WORD.search(gap) or _GAP_RULE.match(gap):
    return True
  return not _GAP_MARKUP.sub("", gap)


def adjacent_boxes(text: str, last: Box) -> list[str]:
  """Returns the run of boxes that ends with `last`, in reading order.

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


def _unmarked(text: str) -> str:
  """Writes `**73**` as a formula, and drops the marks around other words."""

  def formula(match: re.Match[str]) -> str:
    inner = match[2]
    is_value = _HOLDS_VALUE.search(inner) and not _ANCHOR.search(inner)
    return f"${inner}$" if is_value else inner

  return _MARKED.sub(formula, text)


def _option(before: str) -> str:
  """Returns the letter that is chosen right before its value: (D) 17."""
  chosen = _OPTION.search(before)
  return chosen[1] + " " if chosen else ""


def stated_answer(text: str) -> str | None:
  """Returns the answer that an unboxed text unmistakably ends with.

  Only the last sentence counts, only where it announces itself (answer,
  solution, therefore, thus, hence, or "is" right before the end), and only
  the one formula or number that follows. None where there is no such
  statement, and where its words deny, bound or hedge it or make another value
  of the number.
  """
  if (tagged := _TAGGED.search(text)) is not None:
    return tagged[1].strip() or None
  tail = _TAIL.sub("", _unmarked(text[-4 * _MAX_STATEMENT :]))
  anchors = _ANCHOR.finditer(tail, max(0, len(tail) - _MAX_STATEMENT))
  for anchor in list(anchors)[::-1]:
    sentence = tail[anchor.end() :]
    if sentence.count("$") == 1:  # money
      sentence = sentence.replace("$", "")
    spans = list(_SPAN.finditer(sentence))
    rest = sentence[spans[-1].end() :] if spans else sentence
    number = _STATED_NUMBER.search(rest) if "$" not in rest else None
    # An option is a letter: option 5 is no answer.
    is_option = anchor[0].lower() in ("option", "choice")
    if is_option or (number is None and not spans):
      choice = _STATED_CHOICE.match(sentence)
      called = tail[: anchor.end()].removesuffix("is")
      if choice is None or not _CALLED.search(called):
        continue
      doubted = _DOUBT.search(_CLAUSE_END.split(tail[: anchor.start()])[-1])
      return None if doubted else choice[1]
    if len(spans) + (number is not None) > 1:
      return None
    found, group = (number, 1) if number is not None else (spans[0], 0)
    before, after = sentence[: found.start(group)], sentence[found.end(group) :]
    introduced = _CLAUSE_END.split(tail[: anchor.start()])[-1]
    if _DOUBT.search(introduced) or any(map(_HEDGE.search, (before, after))):
      return None
    if _SENTENCE_END.search(before):
      return None
    if before.rstrip().endswith("="):  # a = b = 5 states no more than 5
      before = ""
    if _OPERATOR.search(before) or _OPERATOR.search(after):
      return None
    said = _option(before) + next(filter(None, found.groups()))
    if number is not None and len((number["words"] or "").split()) == 1:
      said, after = said + number["words"], ""
    # A dollar that is escaped within a formula was to end it, or is money.
    return said.rpartition("\\$")[2].strip(" =") or said
  return None
