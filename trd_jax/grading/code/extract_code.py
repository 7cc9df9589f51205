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
# `python`, `Python 3`, `python3.11`, `{.python .numberLines}`, `py,linenos`
_PYTHON = re.compile(
  r"\{?[ \t]*\.?py(?:thon)?(?:3(?:\.\d+)*)?(?![\w.+#-])", re.IGNORECASE
)


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
    # A block is closed by at least as many marks, and nothing after them.
    if language or not marks.startswith(opening):
      continue  # a line of the block
    opened = None
    if name and not _PYTHON.match(name):
      continue
    lines = text[start : fence.start()].splitlines(keepends=True)
    # A block in a list is indented, and Python minds.
    program = "".join(line.removeprefix(outer) for line in lines)
    if name:
      marked = program
    else:
      unmarked = program
  if opened is not None:
    return None
  found = unmarked if marked is None else marked
  return found if found and found.strip() else None
