"""Where a completion says its program: the last fenced block of Python.

As with boxes, what comes last counts: after the last `</think>`, the last
block that is marked as Python. What is not marked may be a sample of input or
output, and is a program only where no block is marked as Python. A last block
that never closes is no answer, and an earlier one is not fallen back to. A
block of Markdown is looked into where nothing else is marked as Python.
"""

import re
from typing import NamedTuple

from trd_jax.data.final_answer import final_text

# Nothing that it has taken is given back: a line of 100,000 spaces, which a
# model that has lost its way does write, is read once.
# A fence may stand in a quotation (`> `), as in a list.
_FENCE = re.compile(
  r"^([ \t]*+(?:>[ \t]*+)*+)(`{3,}+|~{3,}+)([^`\r\n]*+)\r?$", re.MULTILINE
)
# `python`, `Python 3`, `python3.11`, `{.python .numberLines}`, `py,linenos`,
# `pypy3`
_PYTHON = re.compile(
  r"\{?[ \t]*\.?(?:py(?:thon)?|pypy|ipython)(?:3(?:\.\d+)*)?(?![\w.+#-])",
  re.IGNORECASE,
)
# A block that is marked may begin behind the words that announce it.
_BEHIND_WORDS = re.compile(
  rf"(?<=[^\s`~>])[ \t]*+(?P<marks>`{{3,}}+)"
  rf"(?P<name>[ \t]*+{_PYTHON.pattern}[^`\r\n]*+)\r?$",
  re.IGNORECASE | re.MULTILINE,
)
_MARKDOWN = re.compile(r"(?:markdown|md)\b", re.IGNORECASE)
# What a triple quote may stand in, and not open a string: a comment, a string
# of one line. Or it does, and ends at the next one.
_PIECE = re.compile(
  r"#[^\n]*+|(?P<triple>\'\'\'|\"\"\")"
  r"|'(?:[^'\\\n]|\\.)*+'|\"(?:[^\"\\\n]|\\.)*+\"",
  re.DOTALL,
)
# Some models put their program between these instead of fences.
_TAGGED = re.compile(r"\[PYTHON\][ \t]*\r?\n(.*?)\[/PYTHON\]", re.DOTALL)
_MOST_FENCES = 12  # that are looked through for one outside of strings
_MOST_INDENT = 3  # columns, as CommonMark has it


def _width(indent: str) -> int:
  """Returns how many columns an indent takes."""
  return len(indent.expandtabs(4))


def _open_string(block: str) -> bool:
  """Returns whether a piece of Python ends within triple quotes."""
  at = 0
  while (piece := _PIECE.search(block, at)) is not None:
    at = piece.end()
    if mark := piece["triple"]:
      end = re.compile(rf"(?:[^\\]|\\.)*?{mark}", re.DOTALL).match(block, at)
      if end is None:
        return True
      at = end.end()
  return False


class _Fence(NamedTuple):
  """A line that may begin or end a block, from `start` to `end` in the text."""

  start: int
  end: int
  indent: str
  marks: str
  name: str


def _fences(text: str) -> list[_Fence]:
  """Finds all lines that may be fences, in their order."""
  found = [
    _Fence(*match.span(), *match.groups()) for match in _FENCE.finditer(text)
  ]
  found += [
    _Fence(*match.span(), "", match["marks"], match["name"])
    for match in _BEHIND_WORDS.finditer(text)
  ]
  return sorted(found)


def _closing(text: str, fences: list[_Fence], at: int) -> int | None:
  """Finds which fence closes the block that `fences[at]` opens, if one does.

  That is the first one with as many marks, and nothing after them, that does
  not stand in a string of the program. Where all do, the quotes are wrong.
  """
  opening = fences[at]
  found: list[int] = []
  for number in range(at + 1, len(fences)):
    fence = fences[number]
    if found and number > at + _MOST_FENCES:
      break
    if fence.name.strip(" \t") or not fence.marks.startswith(opening.marks):
      continue  # a line of the block
    # Far to the right of its own they are part of it: an example in a
    # docstring.
    if _width(fence.indent) > _width(opening.indent) + _MOST_INDENT:
      continue
    if not _PYTHON.match(opening.name.strip(" \t")):
      return number
    found.append(number)
    if not _open_string(text[opening.end + 1 : fence.start]):
      return number
  return found[0] if found else None


def last_program(completion: str) -> str | None:
  """Returns the program that a completion ends with, or None."""
  text = final_text(completion).removeprefix("\ufeff")
  marked, nested, unmarked = None, None, None
  fences, at = _fences(text), 0
  while at < len(fences):
    fence = fences[at]
    start, name = fence.end + 1, fence.name.strip(" \t")
    end = _closing(text, fences, at)
    if end is None:
      # What the last line of code ends with closes it, too.
      last = re.compile(rf"(?<=[^\s`~]){fence.marks}[ \t]*+$", re.MULTILINE)
      closed = last.search(text, start)
      if closed is None or (name and not _PYTHON.match(name)):
        return None
      return _unindented(text[start : closed.start()], fence.indent)
    program = _unindented(text[start : fences[end].start], fence.indent)
    if not name:
      unmarked = program
    elif _PYTHON.match(name):
      marked = program
    elif _MARKDOWN.match(name):
      nested = last_program(program)
    at = end + 1
  if not fences and (tagged := _TAGGED.findall(text)):
    marked = tagged[-1]
  found = next(
    (one for one in (marked, nested, unmarked) if one is not None), None
  )
  return found if found and found.strip() else None


def _unindented(block: str, indent: str) -> str:
  """Returns a block without the indent of its fence, as it has in a list."""
  bare = indent.rstrip()  # an empty line of a quotation has no more
  lines = block.splitlines(keepends=True)
  return "".join(
    line.removeprefix(indent if line.startswith(indent) else bare)
    for line in lines
  )
