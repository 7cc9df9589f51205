"""Compares answers by the shape of the gold: what is inside is left to others.

The gold decides: a list or a set is compared without order, a tuple with it,
an interval by its ends, a matrix by its cells, words as words, an equation as
an equation, and anything else as one value. Values are compared by a function
that the caller passes, which may answer None where it cannot tell; None then
goes up through the shapes (False still wins). That is how one comparison
serves both the parent process (literals only) and the symbolic worker.
"""

import collections
import itertools
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from trd_jax.grading import notation, regions
from trd_jax.grading.latex import strip_braces

Maybe = bool | None
Equal = Callable[[str, str], Maybe]

MAX_ITEMS = 64  # of a list that is paired off item by item

_GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?\Z")
_BASED = re.compile(r"([0-9A-Za-z]+)\s*_\s*\{?\s*(\d+)\s*\}?\Z")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_CHOICE = re.compile(r"\(?([A-Z])(?:[).:]|\s*\Z)")
_MATRIX = re.compile(
  r"[(\[|]?\s*\\begin\{([pbvBV]?(?:small)?matrix|array)\}(?:\{[lcr|]*\})?"
  r"(.*)\\end\{\1\}\s*[)\]|]?\Z",
  re.DOTALL,
)
_RELATION = re.compile(r"(?<!\\)[<>=]|\\(?:le|ge|ne)(?![a-z])")
_PAIR = re.compile(r"\\(pm|mp)(?![a-z])")
_NOT_IN_NAME = re.compile(r"[-+*/^0-9.]|\\(?:cdot|times|pm|sqrt)(?![a-z])")
_UNKNOWN = re.compile(r"(?<![\\A-Za-z])(?![ei](?![A-Za-z]))[A-Za-z]")
_MEMBER_OF = re.compile(r"\\?[A-Za-z]\w*\s*\\in\s*(\\\{.+\\\})\Z", re.DOTALL)
_ENDS_IN_UNIT = re.compile(r"\\text\s*\{\s*([^{}]*[A-Za-z/][^{}]*?)\s*\}\Z")
_SUBSCRIPT = re.compile(r"_\s*(?:\{[^{}]*\}|\w)|'")


class _Named(NamedTuple):
  name: str | None
  value: str


def squeeze(text: str) -> str:
  """The text without spaces (but for 1 0) and braces around one character."""
  text = re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", text)
  return re.sub(r"\{(\w)\}", r"\1", text)


def every(results: Iterable[Maybe]) -> Maybe:
  """Three-valued `all`: False wins over None, None over True."""
  outcome: Maybe = True
  for result in results:
    if result is False:
      return False
    if result is None:
      outcome = None
  return outcome


def some(results: Iterable[Maybe]) -> Maybe:
  """Three-valued `any`: True wins over None, None over False."""
  outcome: Maybe = False
  for result in results:
    if result:
      return True
    if result is None:
      outcome = None
  return outcome


def unordered(golds: list, answers: list, equal: Callable) -> Maybe:
  """Whether the items can be paired off, each with an equal of its own.

  Equality is transitive on what it can tell, so the first free equal will do.
  """
  if len(golds) != len(answers):
    return False
  rest = collections.Counter(map(str, answers))
  rest.subtract(map(str, golds))
  if not any(rest.values()):
    return True
  if len(golds) > MAX_ITEMS:
    return None
  free = list(range(len(answers)))
  outcome: Maybe = True
  for gold in golds:
    undecided = False
    for index in free:
      result = equal(gold, answers[index])
      if result:
        free.remove(index)
        break
      undecided |= result is None
    else:
      if not undecided:
        return False
      outcome = None
  return outcome


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


def outside(text: str) -> str:
  """The text with all that stands in braces blanked, at the same length."""
  depth, kept, at = 0, list(text), 0
  while at < len(text):
    character = text[at]
    step = 2 if character == "\\" else 1
    depth += (character == "{") - (character == "}")
    if depth > 0:
      kept[at : at + step] = " " * len(kept[at : at + step])
    at += step
  return "".join(kept)


def _inside(text: str, opening: str, closing: str) -> str | None:
  """What stands between an outer pair of brackets, if one pair encloses all."""
  if not (text.startswith(opening) and text.endswith(closing)):
    return None
  inner = text[len(opening) : len(text) - len(closing)]
  depth, at = 0, 0
  while at < len(inner):
    if inner.startswith(closing, at):
      depth -= 1
      if depth < 0:
        return None
      at += len(closing)
    elif inner.startswith(opening, at):
      depth += 1
      at += len(opening)
    else:
      at += 2 if inner[at] == "\\" else 1
  return inner.strip() if depth == 0 else None


def _is_name(text: str) -> bool:
  """Whether `text` can stand before = as what an answer is called."""
  bare = _TEXT.sub("x", _SUBSCRIPT.sub("", text))
  if _NOT_IN_NAME.search(bare) or _RELATION.search(bare):
    return False
  return re.search(r"[A-Za-z]", bare) is not None


def named(text: str) -> _Named:
  """Splits `f(x) = a = b` into the name and the last exact value."""
  parts = split(text, "=")
  if len(parts) == 1 and "\\approx" in text:
    name, _, value = text.partition("\\approx")
    if _is_name(name):
      return _Named(name.strip(), value.strip())
  if len(parts) < 2:
    return _Named(None, text)
  if not any(map(_UNKNOWN.search, parts)):
    return _Named(None, parts[-1])  # 2 + 2 = 4
  if _is_name(parts[0]):
    return _Named(parts[0], parts[-1])
  return _Named(None, parts[-1] if len(parts) > 2 else text)


def _names_agree(gold: str | None, answer: str | None) -> bool:
  """Two different single letters name two different things."""
  if gold is None or answer is None:
    return True
  gold, answer = squeeze(gold).lower(), squeeze(answer).lower()
  return gold == answer or not (len(gold) == len(answer) == 1)


def _is_relation(text: str) -> bool:
  return _RELATION.search(outside(text)) is not None


def is_equation(text: str) -> bool:
  """Whether there is an = that doesn't just give a value its name."""
  return named(text).name is None and "=" in outside(named(text).value)


def _expand(items: list[str]) -> list[str]:
  """Writes each item with ± as two, the upper signs first."""
  expanded = []
  for item in items:
    if not _PAIR.search(item):
      expanded.append(item)
      continue
    name, value = named(item)
    prefix = f"{name} = " if name else ""
    for upper in (True, False):
      signs = {"pm": "+" if upper else "-", "mp": "-" if upper else "+"}
      signed = _PAIR.sub(lambda m, s=signs: s[m[1]], value).strip()
      expanded.append(prefix + signed.removeprefix("+").strip())
  return expanded


def _items(text: str) -> list[str] | None:
  """Items of a bare list or a set; None where `text` is one value."""
  inner = _inside(text, "\\{", "\\}")
  if inner is not None:
    return _expand(split(inner))
  parts = split(strip_braces(text))
  if len(parts) > 1 or _PAIR.search(text):
    return _expand(parts)
  return None


def _tuple(text: str) -> list[str] | None:
  """Items of `(a, b, …)` or `[a, b, c, …]`; None where it is neither."""
  inner, least = _inside(text, "(", ")"), 2
  if inner is None:  # of two, that is an interval
    inner, least = _inside(text, "[", "]"), 3
  items = split(inner) if inner is not None else []
  return items if len(items) >= least else None


def _vector(text: str) -> list[str] | None:
  """Entries of a matrix of one row or column, without labels between them."""
  cells = _matrix(text)
  if cells is None or 1 not in (len(cells), len(cells[0])):
    return None
  flat = [cell for row in cells for cell in row if cell]
  labels, entries = flat[::2], flat[1::2]
  labelled = all(len(name) == 1 and name.isalpha() for name in labels)
  if labelled and len(labels) == len(entries) > 1:
    return entries
  return flat if len(flat) > 1 else None


def _matrix(text: str) -> list[list[str]] | None:
  match = _MATRIX.match(text)
  if not match:
    return None
  rows = [row.strip() for row in match[2].split("\\\\")]
  return [
    [cell.strip() for cell in row.split("&")]
    for row in rows
    if row and row != "\\hline"
  ]


def _words(text: str) -> str:
  """Lower-case words of a text answer."""
  bare = _TEXT.sub(r" \1 ", text)
  return " ".join(re.sub(r"[^\w\s]", " ", bare).lower().split())


def _compare_text(gold: str, answer: str) -> Maybe:
  """Words against words; None where the gold may be a formula after all."""
  bare = _TEXT.sub(r"\1", gold).strip(" ().")
  if not re.fullmatch(r"[A-Za-z][A-Za-z' -]*", bare):
    return None
  if re.fullmatch(r"[A-Z]", bare):
    choice = _CHOICE.match(_TEXT.sub(r"\1", answer).strip())
    if choice:
      return choice[1] == bare
  if _words(gold) == _words(answer) and len(bare) > 1:
    return True
  longest = max(map(len, bare.split()))
  is_text = "\\text" in gold or longest > 5 or (" " in bare and longest > 2)
  return False if is_text else None


def _compare_lists(gold: list[str], answer: str, equal: Equal) -> Maybe:
  """A gold list or set against whatever the answer is."""
  if len(split(answer)) == 1:
    answer = named(answer).value
  items = _items(answer)
  in_order = items is None
  if items is None and len(gold) > 1:
    items = _tuple(answer) or _vector(answer)
  if items is None:
    items = [answer]
  golds, answers = list(map(named, gold)), list(map(named, items))

  def pair(one: _Named, other: _Named) -> Maybe:
    if not _names_agree(one.name, other.name):
      return False
    return compare(one.value, other.value, equal)

  names = {squeeze(item.name) for item in golds if item.name}
  unnamed = not any(item.name for item in answers)
  if len(golds) == len(answers) and (
    (in_order and len(gold) > 1) or (len(names) > 1 and unnamed)
  ):
    return every(map(pair, golds, answers))
  return unordered(golds, answers, pair)


def compare(gold: str, answer: str, equal: Equal) -> Maybe:
  """Compares an answer with the gold, both as `latex.clean` writes them.

  Args:
    gold: the right answer; its shape decides how they are compared.
    answer: what is being judged.
    equal: compares two single values, gold first; None where it cannot tell.

  Returns:
    True or False, or None where `equal` could not tell and it matters.
  """
  if not gold or not answer:
    return False
  if squeeze(gold) == squeeze(answer):
    return True
  if (text := _compare_text(gold, answer)) is not None:
    return text
  if (member := _MEMBER_OF.match(answer)) is not None:
    answer = member[1]
  if (member := _MEMBER_OF.match(gold)) is not None:
    gold = member[1]
  if is_equation(gold) or (
    is_equation(answer) and named(gold).name is not None
  ):
    both = "=" in outside(gold) and "=" in outside(answer)
    return equal(gold, answer) if both else False
  if regions.is_region(gold) or regions.is_region(answer):
    mine, yours = regions.parse(gold), regions.parse(answer)
    if mine is not None and yours is not None:
      return unordered(mine, yours, lambda a, b: _same_span(a, b, equal))
    if _is_relation(gold) and _is_relation(answer) and not _items(answer):
      return equal(gold, answer)
    if mine is not None and yours is None:
      return False  # a region is asked for, and this is none
  if _GROUPED.match(gold) and (result := equal(gold, answer)):
    return result
  items = _items(gold)
  if items is not None:
    return _compare_lists(items, answer, equal)
  return _compare_single(gold, answer, equal)


def _same_span(gold: regions.Span, answer: regions.Span, equal: Equal) -> Maybe:
  if (gold.left_open, gold.right_open) != (answer.left_open, answer.right_open):
    return False
  return every(
    squeeze(mine) == squeeze(yours)
    or ("\\infty" not in mine + yours and compare(mine, yours, equal))
    for mine, yours in ((gold.low, answer.low), (gold.high, answer.high))
  )


def _compare_single(gold: str, answer: str, equal: Equal) -> Maybe:
  """A gold that is a named value, a tuple, a matrix or one value."""
  gold_name, gold = named(gold)
  listed = _tuple(gold)
  if listed is not None and (entries := _values_of(answer, gold_name)):
    return _in_order(listed, entries, equal)
  answer_name, answer = named(answer)
  if not _names_agree(gold_name, answer_name):
    return False
  if gold_name or answer_name:
    return compare(gold, answer, equal)
  cells, answer_cells = _matrix(gold), _matrix(answer)
  items, answer_items = _tuple(gold), _tuple(answer)
  if cells is not None and answer_cells is None and answer_items is not None:
    # A vector may be written as the tuple of its entries.
    items = [cell for row in cells for cell in row]
    cells = None if 1 in (len(cells), len(cells[0])) else cells
  if cells is not None:
    if answer_cells is None:
      return equal(gold, answer) if "\\begin" in answer else False
    if list(map(len, cells)) != list(map(len, answer_cells)):
      return False
    flat = itertools.chain.from_iterable
    both = zip(flat(cells), flat(answer_cells), strict=True)
    return every(compare(mine, yours, equal) for mine, yours in both)
  if items is not None:
    if _inside(answer, "\\{", "\\}") is not None:
      return False
    answers = answer_items or _vector(answer) or split(strip_braces(answer))
    return _in_order(items, answers, equal)
  (gold, modulus), (answer, other) = map(notation.modulus, (gold, answer))
  if modulus and other and squeeze(modulus) != squeeze(other):
    return False
  if modulus or other:
    return compare(gold, answer, equal)
  return _compare_value(gold, answer, equal)


def _in_order(golds: list[str], answers: list[str], equal: Equal) -> Maybe:
  if len(golds) != len(answers):
    return False
  return every(map(lambda a, b: compare(a, b, equal), golds, answers))


def _values_of(text: str, names: str | None) -> list[str] | None:
  """The values of `a = 1, b = 2, …`, in the order of `(a, b, …)` if it's given.

  None where not every item has a name of its own.
  """
  items = [named(item) for item in split(text)]
  values = {squeeze(item.name): item.value for item in items if item.name}
  if len(items) < 2 or len(values) < len(items):
    return None
  order = [squeeze(name) for name in _tuple(names or "") or []]
  if sorted(order) == sorted(values):
    return [values[name] for name in order]
  return list(values.values())


def _compare_value(gold: str, answer: str, equal: Equal) -> Maybe:
  """Two single values: an answer that hedges or lists is not one."""
  based, answer_based = _BASED.match(gold), _BASED.match(answer)
  if based and based[1][0].isdigit():
    return bool(answer_based) and based.groups() == answer_based.groups()
  inner = _inside(answer, "\\{", "\\}")
  if inner is not None:
    return compare(gold, inner, equal)
  unit = _ENDS_IN_UNIT.search(gold)
  if unit and answer.endswith(unit[1]) and len(answer) > len(unit[1]):
    # Letter for letter the gold's unit, though nothing marks it as text.
    gold = gold[: unit.start()].strip()
    answer = answer[: -len(unit[1])].strip()
  if not _GROUPED.match(answer) and _items(answer) is not None:
    return False
  if _tuple(answer) is not None or _is_relation(answer):
    return False
  if _matrix(answer) is not None and "\\begin" not in gold:
    return False
  gold = _inside(gold, "(", ")") or gold
  answer = _inside(answer, "(", ")") or answer
  return equal(gold, answer)
