"""Where a completion says its program: the last fenced block of Python.

As with boxes, what comes last counts: after the last `</think>`, the last
block that is marked as Python or not marked at all. A last block that never
closes is no answer, and an earlier one is not fallen back to.
"""

import re

from trd_jax.grading.extract import final_text

_FENCE = re.compile(
  r"^([ \t]*)(`{3,}|~{3,})[ \t]*([^`\r\n]*?)[ \t]*\r?$", re.MULTILINE
)
_PYTHON = {"", "python", "py", "python3", "py3"}


def last_program(completion: str) -> str | None:
  """The program that a completion ends with, or None."""
  text = final_text(completion)
  found, opened = None, None
  for fence in _FENCE.finditer(text):
    indent, marks, language = fence.groups()
    if opened is None:
      opened = (fence.end() + 1, indent, marks, language.split(" ")[0].lower())
      continue
    start, outer, opening, name = opened
    if language or not marks.startswith(opening):
      continue  # a line of the block
    opened = None
    if name in _PYTHON:
      lines = text[start : fence.start()].splitlines(keepends=True)
      found = "".join(line.removeprefix(outer) for line in lines)
  if opened is not None:
    return None
  return found if found and found.strip() else None
