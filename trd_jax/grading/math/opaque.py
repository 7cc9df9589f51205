r"""Parts of a formula that are known by name only.

`f(2x)`, `E[X^2]`, `\overrightarrow{AB}`, `\angle ABC`, `\bar{x}`: the grammar
would make products of letters of them, in which order and brackets are lost.
Here they become symbols, which say what they stand for.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from trd_jax.grading.math import brackets

# Letters that name functions; others before a bracket are factors.
_LETTERS = "fghuFGHEPQT"
_GREEK = r"\\(?:phi|varphi|psi|Phi|Psi)"
_INDEX = r"(?:\s*_\s*(?:\{\w+\}|\w))?'{0,3}(?:\s*\^\s*\{\s*-\s*1\s*\})?"
# Each of them, in a product with others, too.
_LETTER = re.compile(
  rf"(?P<head>{_GREEK}(?![a-z])|[{_LETTERS}])(?P<called>(?<!\w\w){_INDEX}\s*\()?"
  r"|\\[A-Za-z]+"
)
_TEXT = re.compile(r"\\text\s*\{[^{}]*\}")
_CALL = re.compile(
  # Only of these is a square bracket one of a call.
  rf"(?P<square>(?:\\mathbb\s*\{{?\s*[EP]\s*\}}?|\\Pr(?![a-z])"
  rf"|(?<![\\A-Za-z])[EP]|\\text\s*\{{\s*[A-Za-z]{{2,8}}\s*\}})"
  rf"(?P<mark>{_INDEX})\s*[(\[])"
  rf"|(?P<name>(?<![\\A-Za-z])[{_LETTERS}]|{_GREEK}(?![a-z]))"
  rf"(?P<index>{_INDEX})\s*\("
  r"|\\(?:bar|overline)\s*(?:\{|(?=[a-z]))"
  r"|\\(?:Re|Im)(?![a-z])\s*[({]"
)
_POINTS = re.compile(
  r"\\(?P<kind>overrightarrow|vec|overleftarrow|overline|overleftrightarrow"
  r"|widehat|angle|triangle)(?![a-z])\s*"
  r"(?:\{\s*(?P<braced>[A-Z]'?(?:\s*[A-Z]'?){0,2})\s*\}"
  r"|(?P<bare>[A-Z]{1,3})(?![A-Za-z]))"
)
_SEGMENT = re.compile(r"\\overline\s*\{\s*[A-Z]\s*[A-Z]\s*\}")
_PAIR = re.compile(r"(?<![\\A-Za-z{])[A-Z]{2}(?![A-Za-z}])")
_COMPLEX = re.compile(r"(?<![\\A-Za-z])[izw](?![A-Za-z])")


class Part(NamedTuple):
  """A function of other formulas; without any, it is only a name."""

  function: str
  arguments: tuple[str, ...]


def functions_of(texts: Iterable[str]) -> frozenset[str]:
  """Finds the letters that name functions: brackets follow wherever they stand.

  `h(a+b)` is a product where another text has `ha`.
  """
  seen: dict[str, bool] = {}
  for text in texts:
    for letter in _LETTER.finditer(_TEXT.sub("", text)):
      if letter["head"] is None:
        continue  # a command
      head, called = letter["head"], letter["called"] is not None
      seen[head] = seen.get(head, True) and called
  return frozenset(head for head, called in seen.items() if called)


def with_segments(gold: str, answer: str) -> tuple[str, str]:
  r"""Writes `AB` as `\overline{AB}` where one of two texts writes so."""
  if not any(map(_SEGMENT.search, (gold, answer))):
    return gold, answer
  marked = (
    _PAIR.sub(lambda pair: f"\\overline{{{pair[0]}}}", text)
    for text in (gold, answer)
  )
  return next(marked), next(marked)


def points_of(kind: str, letters: str) -> tuple[str, bool]:
  """Returns the letters of points in one order, and whether they turned round.

  Args:
    kind: what the points make, as LaTeX names it.
    letters: the points, in capitals.
  """
  names = re.findall(r"[A-Z]'?", letters)
  if kind == "triangle":
    return "".join(sorted(names)), False
  turned = names[::-1] < names
  return "".join(names[::-1] if turned else names), turned


def _points(match: re.Match[str]) -> str:
  kind, letters = match["kind"], match["braced"] or match["bare"]
  names, turned = points_of(kind, letters)
  kind = {"overrightarrow": "vec", "overleftarrow": "vec"}.get(kind, kind)
  # A vector that is turned round is its opposite.
  turned ^= match["kind"] == "overleftarrow"
  symbol = f"V_{{{kind}{names.replace(chr(39), 'prime')}}}"
  return f" (-{symbol}) " if kind == "vec" and turned else f" {symbol} "


def take_out(
  text: str, functions: frozenset[str]
) -> tuple[str, dict[str, Part]]:
  """Writes symbols for what is known by name only.

  Args:
    text: a cleaned formula.
    functions: letters that name functions, as `functions_of` finds them.

  Returns:
    The formula, and what each symbol in it stands for.
  """
  parts: dict[str, Part] = {}
  done, at = [], 0
  text = _POINTS.sub(_points, text)
  while (call := _CALL.search(text, at)) is not None:
    done.append(text[at : call.start()])
    at = call.end()
    part, end = _read(text, call, functions)
    if part is None:
      done.append(call[0])
      continue
    symbol = f"X_{{call{len(parts)}}}"
    parts[symbol] = part
    # Straight before a bracket it would be a function again.
    follows = re.match(r"\s*[(\[]", text[end:]) is not None
    done.append(f" {symbol} " + ("\\cdot " if follows else ""))
    at = end
  return "".join([*done, text[at:]]), parts


def _read(
  text: str, call: re.Match[str], functions: frozenset[str]
) -> tuple[Part | None, int]:
  """Reads the arguments of a call; also the index after it."""
  head = call[0]
  if head.startswith(("\\bar", "\\overline")):
    start = call.end()
    if head.endswith("{"):
      end = brackets.end_of(text, start - 1)
      inner = text[start : end - 1]
    else:
      end, inner = start + 1, text[start]
    if end < 0 or not inner.strip():
      return None, start
    if _COMPLEX.search(inner):
      return Part("conjugate", (inner,)), end
    return Part("bar " + re.sub(r"\s", "", inner), ()), end
  end = brackets.end_of(text, call.end() - 1)
  if end < 0:
    return None, call.end()
  inner = text[call.end() : end - 1]
  name = re.sub(r"[\s{}]", "", head[:-1])
  if name in ("\\Re", "\\Im", "\\textRe", "\\textIm"):
    return Part(name[-2:].lower(), (inner,)), end
  if call["name"] is not None and call["name"] not in functions:
    # E and P are read above, but with a round bracket may be factors, too.
    return None, call.end()
  is_letter = call["square"] and head[-1] == "(" and name[0] in "EP"
  if is_letter and name[0] not in functions:
    return None, call.end()
  name = name.replace("\\mathbb", "").replace("\\Pr", "P")
  arguments = brackets.split(inner.replace("|", ","), ",")
  return (Part(name, tuple(arguments)), end) if arguments else (None, end)
