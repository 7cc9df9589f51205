"""Where a completion says its program: the last fenced block of Python.

As with boxes, what comes last counts: after the last `</think>`, the last
block that is marked as Python. What is not marked may be a sample of input or
output, and is a program only where no block is marked as Python. A last block
that never closes is no answer, and an earlier one is not fallen back to.
"""

import re

from trd_jax.data.final_answer import final_text

# Nothing that it has taken is given back: a line of 100,000 spaces, which a
# model that has lost its way does write, is read once.
_FENCE = re.compile(r"^([ \t]*+)(`{3,}+|~{3,}+)([^`\r\n]*+)\r?$", re.MULTILINE)
# `python`, `Python 3`, `python3.11`, `{.python .numberLines}`, `py,linenos`,
# `pypy3`
_PYTHON = re.compile(
  r"\{?[ \t]*\.?(?:py(?:thon)?|pypy)(?:3(?:\.\d+)*)?(?![\w.+#-])",
  re.IGNORECASE,
)
_MOST_INDENT = 3  # columns, as CommonMark has it


def _width(indent: str) -> int:
  """Returns how many columns an indent takes."""
  return len(indent.expandtabs(4))


def last_program(completion: str) -> str | None:
  """Returns the program that a completion ends with, or None."""
  text = final_text(completion)
  opened, marked, unmarked = None, None, None
  for fence in _FENCE.finditer(text):
    indent, marks, language = fence.groups()
    language = language.strip(" \t")
    if opened is None:
      opened = (fence.end() + 1, indent, marks, language)
      continue
    start, outer, opening, name = opened
    # A block is closed by at least as many marks, and nothing after them. Far
    # to the right of its own they are part of it: an example in a docstring.
    if language or not marks.startswith(opening):
      continue  # a line of the block
    if _width(indent) > _width(outer) + _MOST_INDENT:
      continue
    opened = None
    program = _unindented(text[start : fence.start()], outer)
    if not name:
      unmarked = program
    elif _PYTHON.match(name):
      marked = program
  if opened is not None:
    start, outer, opening, name = opened
    # What the last line of code ends with closes it, too.
    end = re.compile(rf"(?<=[^\s`~]){opening}[ \t]*+$", re.MULTILINE)
    closed = end.search(text, start)
    if closed is None or (name and not _PYTHON.match(name)):
      return None
    return _unindented(text[start : closed.start()], outer)
  found = unmarked if marked is None else marked
  return found if found and found.strip() else None


def _unindented(block: str, indent: str) -> str:
  """Returns a block without the indent of its fence, as it has in a list."""
  lines = block.splitlines(keepends=True)
  return "".join(line.removeprefix(indent) for line in lines)
