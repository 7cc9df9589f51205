"""Finds where brackets close, and what stands outside of them."""

_CLOSING = {"{": "}", "(": ")", "[": "]"}


def end_of(text: str, start: int) -> int:
  """Finds the index past the bracket that opens at `start`; -1 if none.

  Only brackets of its own kind count, and none behind a backslash.
  """
  opening = text[start]
  closing = _CLOSING[opening]
  depth, at = 0, start
  while at < len(text):
    if text[at] == "\\":
      at += 1
    elif text[at] == opening:
      depth += 1
    elif text[at] == closing:
      depth -= 1
      if depth == 0:
        return at + 1
    at += 1
  return -1


def split(text: str, separators: str = ",;") -> list[str]:
  """Splits at separators that stand outside of all brackets."""
  parts, depth, begin, at = [], 0, 0, 0
  while at < len(text):
    character = text[at]
    if character == "\\":
      at += 1
      if text[at : at + 1] in ("{", "}"):
        depth += 1 if text[at] == "{" else -1
      elif text.startswith(("begin{", "end{"), at):
        depth += 1 if text[at] == "b" else -1
    elif character in "([{":
      depth += 1
    elif character in ")]}":
      depth -= 1
    elif character in separators and depth == 0:
      parts.append(text[begin:at])
      begin = at + 1
    at += 1
  parts.append(text[begin:])
  return [part for part in map(str.strip, parts) if part]
