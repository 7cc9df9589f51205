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

from trd_jax.grading.math import logic, notation, regions, shapes, units
from trd_jax.grading.math.latex import strip_braces

Maybe = bool | None
Equal = Callable[[str, str], Maybe]

MAX_ITEMS = 64  # of a list that is paired off item by item

# Or with a factor: 1,250\pi.
_GROUPED = re.compile(
  r"[+-]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?P<factor>\s*(?:\\(?:pi|sqrt)(?![a-z])|[a-z]).*)?\Z",
  re.DOTALL,
)
_BASED = re.compile(
  r"([+-]?\d[0-9A-Za-z]*)\s*_\s*\{?\s*\(?\s*(\d+)\s*\)?\s*\}?\Z"
)
_INTEGER = re.compile(r"-?\d+\Z")
_CLOCK = re.compile(r"\d{1,2}(?::[0-5]\d){1,2}(?:\D|\Z)")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_CHOICE = re.compile(r"\(?([A-Z])(?:[).:]|\s*\Z)")
_SAYS_CHOICE = re.compile(
  r"\s*(?i:(?:the\s+)?(?:correct\s+|final\s+)?(?:answer|option|choice)"
  r"(?:\s+is|\s*:)?(?:\s+(?:option|choice))?)\s*\(?([A-Z])[\s).]*\Z"
)
# A choice before the value that it stands for: (D) 17, D. 17.
_CHOSEN = re.compile(
  r"(?:\\text\s*\{\s*\(?([A-J])\s*[).:]+\s*\}|\(([A-J])\)(?!\()|([A-J])(?:\)|[.:]\s))"
  r"\s*(?=[-\d\\([|.a-z])(?!\\(?:text\s*\{\s*)?(?:and|or|cdot|times|in|cup)\b)"
)
# Words that answer a question by themselves, short as they are.
_ANSWERS = frozenset(
  [
    "yes",
    "no",
    "true",
    "false",
    "odd",
    "even",
    "none",
    "all",
    "any",
    "both",
    "neither",
    "never",
    "always",
  ]
)
# The same with a sentence after it, which must not take it back.
_SAYS_FIRST = re.compile(
  r"\s*(yes|no|true|false)\s*[,.;:]\s*([A-Za-z].*)\Z", re.IGNORECASE | re.DOTALL
)
_TAKES_BACK = "but|however|unless|if|maybe|perhaps|except|wait"
_OPPOSITES = {
  "yes": rf"not?|never|false|cannot|{_TAKES_BACK}",
  "true": rf"not?|never|false|cannot|{_TAKES_BACK}",
  "no": rf"yes|true|{_TAKES_BACK}",
  "false": rf"yes|true|{_TAKES_BACK}",
}
_SHORT_WORD = 3  # letters of the shortest word besides
_NAME_OF_POINTS = 4  # letters of the shortest in capitals: BAC is an angle
_VOWEL = re.compile("[aeiouy]")
_OPERATOR = re.compile(r"[+*/^=<>_|!?%]|\\(?!text)[A-Za-z]|\s-|-\s|\A\s*-")
_ARTICLE = re.compile(r"(?:an?|the) (?=\w)")
_LONG_WORD = 4  # letters of the shortest that is surely no product
_ACRONYM = re.compile(r"[A-Z]{3,}\Z")
_JOINED_WORDS = re.compile(r"[A-Za-z][a-z'-]{2,}(?:[\s,]+[A-Za-z][a-z'-]+)*\Z")
_CONSTANT = re.compile(r"\+\s*(?:\\text\s*\{\s*)?([CcKk])(?:\s*\})?\Z")
_MEMBER_OF = re.compile(r"(\\?[A-Za-z]\w*)\s*\\in\s*(\\\{.+\\\})\Z", re.DOTALL)
_ENDS_IN_UNIT = re.compile(r"\\text\s*\{\s*([^{}]*[A-Za-z/][^{}]*?)\s*\}\Z")


def every(results: Iterable[Maybe]) -> Maybe:
  """Combines three-valued results: False wins over None, None over True."""
  outcome: Maybe = True
  for result in results:
    if result is False:
      return False
    if result is None:
      outcome = None
  return outcome


def unordered(golds: list, answers: list, equal: Callable) -> Maybe:
  """Returns whether items can be paired off, each with its own equal.

  Equality is transitive on what it can tell, so the first free equal will do.
  """
  if len(golds) != len(answers):
    return False
  # The same texts on both sides need no comparing, at any length: what follows
  # takes up to n² comparisons, each perhaps with algebra.
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


def _words(text: str) -> str:
  """Returns the lower-case words of a text answer."""
  bare = _TEXT.sub(r" \1 ", text)
  words = " ".join(re.sub(r"[^\w\s]", " ", bare).lower().split())
  return _ARTICLE.sub("", words, count=1) if " " in words else words


def _unmarked(text: str) -> str:
  r"""Returns a text answer letter for letter, without `\text` and its dots."""
  return " ".join(_TEXT.sub(r" \1 ", text).split()).strip(" ().")


def _without_marks(text: str) -> str:
  r"""Returns an answer without spaces and without what marks words as such."""
  return shapes.squeeze(_TEXT.sub(r" \1 ", text))


def _reads_as_words(letters: str, *, is_marked: bool) -> bool:
  """Returns whether letters are words, whose case says nothing.

  Names of points and products of variables are none: AB is not ab.
  """
  for word in re.findall(r"[A-Za-z]+", letters):
    lower = word.lower()
    if lower in _ANSWERS:
      return True
    least = _NAME_OF_POINTS if word.isupper() else _SHORT_WORD
    is_word = _VOWEL.search(lower) and sorted(lower) != list(lower)
    if len(word) >= least and (is_word or is_marked):
      return True
  return False


def _names_joined(text: str) -> list[str] | None:
  """Returns words that `and` or commas join, in one order.

  None where there is only one, or something else than words.
  """
  words = _TEXT.sub(r" \1 ", text).strip()
  if not _JOINED_WORDS.match(words) or "respective" in words:
    return None
  found = re.split(r"\s*(?:,[\s,]*(?:and\b)?|\band\b)\s*", words)
  return sorted(map(_words, found)) if len(found) > 1 else None


def _choices(text: str) -> str | None:
  """Returns the letters of several choices, `ABD` or `A, B, D`, else None."""
  letters = re.sub(r"[\s,;()]|\\text|[{}]", "", text)
  if not re.fullmatch("[A-H]{2,}", letters):
    return None
  return "".join(sorted(letters)) if len({*letters}) == len(letters) else None


def _same_choices(gold: str, answer: str) -> bool:
  """Returns whether `A, B, D` and `ABD` choose the same.

  A gold without commas has to be in the alphabet's order: CAB is a name.
  """
  chosen = _choices(gold)
  if chosen is None or chosen != _choices(answer):
    return False
  return "," in gold or ("," in answer and gold.strip() == chosen)


def _compare_text(gold: str, answer: str) -> Maybe:
  """Compares words; None where the gold may be a formula after all."""
  bare = _TEXT.sub(r"\1", gold).strip(" ().")
  if not re.fullmatch(r"[A-Za-z][A-Za-z' -]*", bare):
    return None
  # A multiple choice, or a variable: `(B) 12`, `answer: B` choose.
  if re.fullmatch(r"[A-Z]", bare):
    said = _TEXT.sub(r"\1", answer).strip()
    choice = _CHOICE.match(said) or _SAYS_CHOICE.match(said)
    if choice:
      return choice[1] == bare
  said = _SAYS_FIRST.match(_TEXT.sub(r"\1", answer))
  if said and bare.lower() in _OPPOSITES:
    opposite = _OPPOSITES[bare.lower()]
    return (
      said[1].lower() == bare.lower()
      and re.search(rf"\b(?:{opposite})\b", said[2], re.IGNORECASE) is None
    )
  if len(bare) > 1 and _unmarked(gold) == _unmarked(answer):
    return True
  is_marked = "\\text" in gold or "\\text" in answer
  if (
    _words(gold) == _words(answer)
    and not any(map(_OPERATOR.search, (bare, _TEXT.sub("", answer))))
    and _reads_as_words(bare, is_marked=is_marked)
  ):
    return True
  # A word, not the product of its letters, which an anagram would be, too.
  if _ACRONYM.match(bare) or (
    len(bare) >= _LONG_WORD
    and bare.isalpha()
    and not bare.isupper()
    and _reads_as_words(bare, is_marked=False)
  ):
    return False
  # Short runs of letters may be products of variables, as in `xy`.
  longest = max(map(len, bare.split()))
  is_text = "\\text" in gold or longest > 5 or (" " in bare and longest > 2)
  return False if is_text else None


def _is_grouped(text: str) -> bool:
  """Returns whether commas set groups of digits apart: 1,250 dollars."""
  found = _GROUPED.match(units.measure(text)[0])
  return found is not None and "," not in (found["factor"] or "")


def _ungrouped(text: str) -> str:
  r"""Writes `1,250\pi` without the comma; a number alone keeps it."""
  found = _GROUPED.match(text)
  if found is None or not found["factor"] or not _is_grouped(text):
    return text
  return text[: found.start("factor")].replace(",", "") + found["factor"]


def _distinct(items: list[str], equal: Equal) -> tuple[list[str], bool]:
  """Returns a set's items, each once, and whether they are surely different."""
  if len(items) > MAX_ITEMS:
    return items, True
  kept: list[str] = []
  sure = True
  for item in items:
    # Of one item a set is no other way to write it: {1} beside 1.
    braced = item.startswith("\\{")
    found = [
      compare(other, item, equal)
      for other in kept
      if other.startswith("\\{") == braced
    ]
    if True not in found:
      kept.append(item)
      sure &= None not in found
  return kept, sure


def _compare_lists(
  gold: list[str], answer: str, equal: Equal, *, is_set: bool
) -> Maybe:
  """Compares a gold list or set with whatever the answer is.

  A bare list may be a tuple's or a vector's items, in their order. A set of
  several is neither, and `(1,2)` is no way to write `{1,2}` but an interval or
  a point.
  """
  if len(shapes.split(answer)) == 1:
    name, answer = shapes.named(answer)
    if not all(
      shapes.names_agree(shapes.named(item).name, name) for item in gold
    ):
      return False
  items = shapes.items_of(answer)
  in_order = items is None
  if items is None and len(gold) > 1 and not is_set:
    items = shapes.tuple_of(answer) or shapes.vector_of(answer)
  if items is None:
    items = [answer]
  if is_set and gold == ["\\emptyset"]:
    return False  # what holds the empty set is not empty
  sure = True
  if is_set:
    (gold, mine), (items, yours) = (_distinct(x, equal) for x in (gold, items))
    sure = mine and yours
  # Under the same labels stand the same values: Alice's 5 is not Bob's.
  labels = list(map(shapes.label, gold))
  said = list(map(shapes.label, items))
  if (
    all(labels)
    and len(set(labels)) == len(labels)
    and sorted(map(str, labels)) == sorted(map(str, said))
  ):
    items = [items[said.index(label)] for label in labels]
    in_order = True
  golds, answers = list(map(shapes.named, gold)), list(map(shapes.named, items))
  # Without a name an equation is looked at whole: 3 = 4 is not 4.
  answers = [
    named if named.name else shapes.Named(None, item)
    for named, item in zip(answers, items, strict=True)
  ]

  def pair(one: shapes.Named, other: shapes.Named) -> Maybe:
    if not shapes.names_agree(one.name, other.name):
      return False
    if one.name and not other.name and "=" in shapes.outside(other.value):
      return equal(f"{one.name} = {one.value}", other.value)
    value = shapes.with_argument(one.name, other.name, other.value)
    return compare(one.value, value, equal)

  names = {shapes.squeeze(item.name) for item in golds if item.name}
  unnamed = not any(item.name for item in answers)
  if len(golds) == len(answers) and (
    (in_order and len(gold) > 1) or (len(names) > 1 and unnamed)
  ):
    return every(map(pair, golds, answers))
  outcome = unordered(golds, answers, pair)
  # What may be one item twice may be as many as there are.
  return outcome if outcome or sure else None


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
  # From what is surest to what is least: what one step has taken for its own,
  # those after it never see.
  if shapes.squeeze(gold) == shapes.squeeze(answer):
    return True
  if _without_marks(gold) == _without_marks(answer):
    return True
  if (figure := notation.same_figure(gold, answer)) is not None:
    return figure
  if (formula := logic.same(gold, answer)) is not None:
    return formula
  # Of a single unit each is looked at later, and isn't converted.
  totals = units.total(gold), units.total(answer)
  if totals[0] and totals[1] and max(totals[0][2], totals[1][2]) > 1:
    return totals[0][:2] == totals[1][:2]
  if (pieces := shapes.cases_of(gold)) is not None:
    others = shapes.cases_of(answer)
    if others is None:
      return None
    return unordered(pieces, others, _piece_with(equal))
  if _same_choices(gold, answer):
    return True
  if (names := _names_joined(gold)) is not None:
    return names == _names_joined(answer)
  if (text := _compare_text(gold, answer)) is not None:
    return text
  gold, answer = _with_one_constant(gold, answer)
  chosen, right = _CHOSEN.match(answer), _CHOSEN.match(gold)
  if chosen or right:
    letters = {
      match[match.lastindex or 0] for match in (chosen, right) if match
    }
    if len(letters) > 1:
      return False
    # Of a gold that says both, either will do.
    if right and answer.strip("()") in letters:
      return True
    gold = gold[right.end() if right else 0 :]
    answer = answer[chosen.end() if chosen else 0 :]
    return compare(gold, answer, equal)
  # Of several unknowns it only lists what is known of each, and a gold that is
  # about nothing means the parts of a union.
  if "\\land" in gold + answer and (
    not regions.parse(gold) or regions.parse(answer) is None
  ):
    gold, answer = (text.replace("\\land", ",") for text in (gold, answer))
  gold, answer = _as_points(gold, answer)
  gold, answer = _ungrouped(gold), _ungrouped(answer)
  gold, answer = map(shapes.untransposed, _for_integers(gold, answer))
  gold, answer = _as_tuples(gold, answer)
  answer = _in_order_of_names(gold, answer)
  if "=" in shapes.outside(gold) and not shapes.has_unknowns(gold):
    gold = shapes.named(gold).value  # 2 + 2 = 4
  if not shapes.is_relation(gold):
    if shapes.solves_for_another(answer):
      return False
    values = shapes.values_said(answer)
    if values is not None:
      # All of what is said to be equal: 13 = 12 is not 12.
      return every(compare(gold, value, equal) for value in values)
  mine, yours = _MEMBER_OF.match(gold), _MEMBER_OF.match(answer)
  if mine and yours and not shapes.names_agree(mine[1], yours[1]):
    return False
  gold = mine[2] if mine else gold
  answer = yours[2] if yours else answer
  if shapes.is_equation(gold) or (
    shapes.is_equation(answer) and shapes.named(gold).name is not None
  ):
    both = "=" in shapes.outside(gold) and "=" in shapes.outside(answer)
    return equal(gold, answer) if both else False
  if regions.is_region(gold) or regions.is_region(answer):
    mine, yours = regions.parse(gold), regions.parse(answer)
    if mine is not None and yours is not None:
      names = regions.unknown(gold), regions.unknown(answer)
      if not shapes.names_agree(*names, numbered=True):
        return False
      letters = regions.letters_of(gold), regions.letters_of(answer)
      # a > b is not c > b.
      if (
        max(map(len, letters)) > 1
        and all(letters)
        and len(set(map(frozenset, letters))) > 1
      ):
        return False
      return unordered(mine, yours, lambda a, b: _same_span(a, b, equal))
    if (
      shapes.is_relation(gold)
      and shapes.is_relation(answer)
      and not shapes.items_of(gold)
      and not shapes.items_of(answer)
    ):
      return equal(gold, answer)
    if mine is not None and yours is None:
      return False  # a region is asked for, and this is none
  # `1,234` is a number or a list of two; the list gets its turn below.
  if _is_grouped(gold):
    # Two numbers of a list that are both of three digits would be set apart by
    # a space: 907,200 is not 200,907.
    result = equal(gold, answer)
    is_list = _GROUPED.match(gold) and not _is_grouped(answer)
    if result or (result is False and not is_list):
      return result
  items = shapes.items_of(gold)
  if items is not None:
    is_set = shapes.inside(gold, "\\{", "\\}") is not None
    return _compare_lists(items, answer, equal, is_set=is_set)
  return _compare_single(gold, answer, equal)


def _piece_with(equal: Equal) -> Callable:
  """Returns what compares two pieces of functions, value and condition."""

  def same(mine: tuple[str, str], yours: tuple[str, str]) -> Maybe:
    return every(
      one == other or (bool(one and other) and compare(one, other, equal))
      for one, other in zip(mine, yours, strict=True)
    )

  return same


def _as_points(gold: str, answer: str) -> tuple[str, str]:
  """Writes `p=5, q=2; p=7, q=2` as points, in the gold's order of names."""
  mine, yours = map(shapes.solutions_of, (gold, answer))
  order = list((mine or yours or [{}])[0])

  def points(solutions: list[dict[str, str]] | None, text: str) -> str:
    if solutions is None or sorted(solutions[0]) != sorted(order):
      return text
    rows = [",".join(values[name] for name in order) for values in solutions]
    return ", ".join(f"({row})" for row in rows)

  return points(mine, gold), points(yours, answer)


def _with_one_constant(gold: str, answer: str) -> tuple[str, str]:
  """Writes an answer's constant of integration with the gold's letter."""
  mine, yours = _CONSTANT.search(gold), _CONSTANT.search(answer)
  if not mine or not yours or mine[1] == yours[1]:
    return gold, answer
  # Neither letter may stand for anything else.
  bare = [
    re.sub(r"\\[A-Za-z]+", " ", text[: end.start()])
    for text, end in ((gold, mine), (answer, yours))
  ]
  if any(letter in "".join(bare) for letter in (mine[1], yours[1])):
    return gold, answer
  return gold, f"{answer[: yours.start()]}+ {mine[1]}"


def _for_integers(gold: str, answer: str) -> tuple[str, str]:
  r"""Drops `, k \in \mathbb{Z}` where both say it, with one letter for both."""
  mine, yours = notation.for_all(gold), notation.for_all(answer)
  if mine is None or yours is None or mine[2] != yours[2]:
    return gold, answer
  letter = r"(?<![\\A-Za-z]){}(?![A-Za-z])"
  found = yours[0]
  if mine[1] != yours[1]:
    if re.search(letter.format(mine[1]), found):
      return gold, answer  # it means something else there
    found = re.sub(letter.format(yours[1]), mine[1], found)
  return mine[0], found


def _as_tuples(gold: str, answer: str) -> tuple[str, str]:
  """Writes `3i - 2j + k` as (3, -2, 1), where the other side is a vector."""

  def listed(text: str, other: str) -> str:
    entries = shapes.tuple_of(other) or shapes.vector_of(other)
    units_of = shapes.unit_vectors_of(text, len(entries)) if entries else None
    return f"({','.join(units_of)})" if units_of else text

  return listed(gold, answer), listed(answer, gold)


def _in_order_of_names(gold: str, answer: str) -> str:
  """Writes `(b,a) = (2,1)` as the values of a gold `(a,b) = …`."""
  right, said = (
    [shapes.named(item) for item in shapes.split(text)]
    for text in (gold, answer)
  )
  if not right or not said:
    return answer
  mine, yours = (
    list(map(shapes.squeeze, shapes.tuple_of(one.name or "") or []))
    for one in (right[0], said[0])
  )
  # Or a gold `a = 1, b = 2`, whose items each have a name.
  mine = mine or [shapes.squeeze(item.name or "") for item in right]
  if mine == yours or not mine or sorted(mine) != sorted(yours):
    return answer
  points = []
  for item in said:
    values = shapes.tuple_of(item.value)
    if values is None or len(values) != len(mine):
      return answer
    points.append(f"({','.join(values[yours.index(name)] for name in mine)})")
  return ", ".join(points)


def _same_span(gold: regions.Span, answer: regions.Span, equal: Equal) -> Maybe:
  if (gold.left_open, gold.right_open) != (answer.left_open, answer.right_open):
    return False
  return every(
    shapes.squeeze(mine) == shapes.squeeze(yours)
    or ("\\infty" not in mine + yours and compare(mine, yours, equal))
    for mine, yours in ((gold.low, answer.low), (gold.high, answer.high))
  )


def _compare_single(gold: str, answer: str, equal: Equal) -> Maybe:
  """Compares a gold that is a named value, a tuple, a matrix or one value."""
  is_chain = gold.count("=") > 1
  gold_name, gold = shapes.named(gold)
  # `a = 1, b = 2` answers `(a, b)`, and only here are both seen whole.
  listed = shapes.tuple_of(gold)
  if listed is not None and (entries := shapes.values_of(answer, gold_name)):
    return _in_order(listed, entries, equal)
  said = shapes.values_said(answer)
  answer_name, answer = shapes.named(answer)
  if not shapes.names_agree(gold_name, answer_name, numbered=True):
    # y = 2x and x = y/2 say the same, x = 5 and y = 5 don't.
    both = all(map(shapes.has_unknowns, (gold, answer)))
    return both and equal(f"{gold_name} = {gold}", f"{answer_name} = {answer}")
  answer = shapes.with_argument(gold_name, answer_name, answer)
  # z = 2 + 1 = 2 is not z = 2; of a longer gold only the last side counts.
  if gold_name and answer_name and said and not is_chain:
    return every(
      compare(gold, shapes.with_argument(gold_name, answer_name, value), equal)
      for value in said
    )
  if gold_name or answer_name:
    return compare(gold, answer, equal)
  cells, answer_cells = shapes.matrix_of(gold), shapes.matrix_of(answer)
  items, answer_items = shapes.tuple_of(gold), shapes.tuple_of(answer)
  if cells is not None and answer_cells is None and answer_items is not None:
    # A vector may be written as the tuple of its entries.
    items = [cell for row in cells for cell in row]
    cells = None if 1 in (len(cells), len(cells[0])) else cells
  determinants = shapes.is_determinant(gold), shapes.is_determinant(answer)
  if cells and answer_cells and determinants[0] != determinants[1]:
    return False
  # Of a determinant its value may be said.
  if cells and determinants[0] and answer_cells is None:
    value = shapes.expanded(cells)
    return equal(value, answer) if value else None
  if cells is not None:
    if answer_cells is None:
      return equal(gold, answer) if "\\begin" in answer else False
    if list(map(len, cells)) != list(map(len, answer_cells)):
      return False
    flat = itertools.chain.from_iterable
    both = zip(flat(cells), flat(answer_cells), strict=True)
    return every(compare(mine, yours, equal) for mine, yours in both)
  if items is not None:
    if shapes.inside(answer, "\\{", "\\}") is not None:
      return False
    answers = (
      answer_items
      or shapes.vector_of(answer)
      or shapes.split(strip_braces(answer))
    )
    return _in_order(items, answers, equal)
  if not shapes.labels_agree(gold, answer):
    return False
  (gold, modulus), (answer, other) = map(notation.modulus, (gold, answer))
  if modulus and other and shapes.squeeze(modulus) != shapes.squeeze(other):
    return False
  # Of a number alone is it said with which modulus it is meant.
  if other and not modulus and not _INTEGER.match(answer):
    return False
  if modulus or other:
    return compare(gold, answer, equal)
  return _compare_value(gold, answer, equal)


def _in_order(golds: list[str], answers: list[str], equal: Equal) -> Maybe:
  if len(golds) != len(answers):
    return False
  return every(map(lambda a, b: compare(a, b, equal), golds, answers))


def _compare_value(gold: str, answer: str, equal: Equal) -> Maybe:
  """Compares two single values.

  An answer that hedges or lists is no single value, and wrong.
  """
  based, answer_based = _BASED.match(gold), _BASED.match(answer)
  # Where one names a base, so must the other: 7 is not 12_5, although both are
  # worth the same, and neither is 12.
  if based is not None and answer_based is not None:
    return based[0].casefold() == answer_based[0].casefold()
  if based is not None or answer_based is not None:
    return False
  parts, answer_parts = (shapes.split(text, ":") for text in (gold, answer))
  if len(parts) > 2 and not _CLOCK.match(gold):
    if len(parts) != len(answer_parts):
      return False
    # In proportion: each product crosswise with the first ones.
    first, other = parts[0], answer_parts[0]
    return every(
      equal(f"({mine})\\cdot({other})", f"({yours})\\cdot({first})")
      for mine, yours in zip(parts[1:], answer_parts[1:], strict=True)
    )
  inner = shapes.inside(answer, "\\{", "\\}")
  if inner is not None:
    return compare(gold, inner, equal) if inner != "\\emptyset" else False
  unit = _ENDS_IN_UNIT.search(gold)
  if unit and answer.endswith(unit[1]) and len(answer) > len(unit[1]):
    # Letter for letter the gold's unit, though nothing marks it as text.
    gold = gold[: unit.start()].strip()
    answer = answer[: -len(unit[1])].strip()
  if not _is_grouped(answer) and shapes.items_of(answer) is not None:
    return False
  if shapes.tuple_of(answer) is not None or shapes.is_relation(answer):
    return False
  if shapes.matrix_of(answer) is not None and "\\begin" not in gold:
    return False
  gold = shapes.inside(gold, "(", ")") or gold
  answer = shapes.inside(answer, "(", ")") or answer
  return equal(gold, answer)
