"""Reads the shape of an answer: its name, its items, its cells.

Everything here takes an answer as `latex.clean` writes it and takes it apart
as text: at an equals sign, at commas, at the cells of a matrix. What the parts
are worth is for others to compare.
"""

import itertools
import re
from typing import NamedTuple

from trd_jax.grading.math import units
from trd_jax.grading.math.brackets import split
from trd_jax.grading.math.latex import strip_braces

_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_MATRIX = re.compile(
  r"[(\[|]?\s*\\begin\{([pbvBV]?(?:small)?matrix|array)\}(?:\{[lcr|]*\})?"
  r"(.*)\\end\{\1\}\s*[)\]|]?\Z",
  re.DOTALL,
)
_CASES = re.compile(
  r"(?:[^=]*=)?\s*(?:\\\{)?\s*\\begin\{cases\}(.*)\\end\{cases\}\Z", re.DOTALL
)
_WHEN = re.compile(r"\A(?:\\text\s*\{\s*)?(?:if|for|when|where)(?![a-z])\s*\}?")
_OTHERWISE = re.compile(r"(?:\\text\s*\{)?\s*(?:otherwise|else)", re.IGNORECASE)
_NOT_IN_NAME = re.compile(
  r"[-+*/^0-9.?]|\\(?:cdot|times|pm|sqrt|sim|neg|lnot|not)(?![a-z])"
)
_RELATION = re.compile(r"(?<!\\)[<>=]|\\(?:le|ge|ne)(?![a-z])")
_PAIR = re.compile(r"\\(pm|mp)(?![a-z])")
# Where a name or word begins; a lone e or i is a number.
_UNKNOWN = re.compile(r"(?<![\\A-Za-z])(?![ei](?![A-Za-z]))[A-Za-z]")
_GREEK = (
  "alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|iota|kappa"
  "|lambda|mu|nu|xi|rho|sigma|tau|upsilon|(?:var)?phi|chi|psi|omega|ell"
)
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}(?:\{[lcr|]*\})?")
_UNKNOWNS = re.compile(
  r"(?<![\\A-Za-z])(?![ei](?![A-Za-z]))[A-Za-z]+"
  rf"|\\(?:{_GREEK}|Gamma|Delta|Lambda|Sigma|Phi|Psi|Omega)(?![a-z])"
)
_MEASURED = re.compile(r"\\text|\\circ|%")
# What a name may carry: an index, a prime, the mark of an inverse.
_MARK = re.compile(
  r"_\s*(?:\{[^{}]*\}|\w)|'|\^\s*\{\s*-\s*1\s*\}(?=\s*\()"
  r"|(?<=[A-Z])\^\s*\{\s*-\s*1\s*\}\Z"
)

_LETTER = re.compile(r"([A-Za-z])(?:_\{?(\d+)\}?)?\Z")
# f(x), P_1(x), f'(x); a_n, which is a function of n as well.
_CALL = re.compile(
  rf"(?P<base>[A-Za-z]|\\(?:{_GREEK}))(?P<primes>'*)(?:_\{{?(?P<index>\d+)\}}?)?"
  r"\(\w+\)\Z"
)
_TERM = re.compile(r"([A-Za-z])_\{?[A-Za-z]\}?\Z")
_GREEK_LETTER = re.compile(rf"\\({_GREEK})(?:_\{{?\w+\}}?)?\Z")
_ANGLE = re.compile(r"\\angle([A-Z]+)\Z")
_OF_LETTER = re.compile(
  r"[A-Za-z]'*(?:_\{?\d+\}?)?\(([A-Za-z])\)\Z|[A-Za-z]_\{?([A-Za-z])\}?\Z"
)
_LABEL = re.compile(
  r"\s*\\text\s*\{([^{}\d]*[A-Za-z][^{}\d]*)\}\s*[:=]?\s*(?=[^\s:=])"
)
# Words that end in a colon, an equals sign or a verb before a value.
_ANNOUNCED = re.compile(
  r"\s*((?:\\text\s*\{[^{}]*\}|[A-Za-z]{2,}\s)(?:[A-Za-z ]*))\s*"
  r"(?:(?<=\})|(?=[:=]))\s*[:=]?\s*(?=[^\s:=])"
)
# fmt: off
_EMPTY_WORDS = frozenset(
  [
    "a", "an", "and", "answer", "are", "as", "be", "final", "for", "get",
    "have", "hence", "i", "in", "is", "it", "number", "of", "required",
    "result", "so", "solution", "solved", "that", "the", "then", "there",
    "therefore", "thu", "to", "total", "value", "we", "with", "you",
  ]
)
# fmt: on
# A logarithm only where its base is given: \ln x may be \log x.
_FUNCTION = re.compile(
  r"\\(?:(?:gcd|lcm|det|dim|deg|arg|Re|Im|sin|cos|tan|cot|sec|csc)(?![a-z])"
  r"|log\s*_\s*(?:\{[^{}]*\}|\w))"
)
_EXTREME = re.compile(r"(?<![a-z])(max|min)(?:im(?:um|al))?(?![a-z])")
# f(2), which is a number, and P(A) of an event; the X of f(X) is a variable.
_PLACE = re.compile(r"([A-Za-z])\((-?\d+|[A-H])\)\Z")
_QUOTIENT = re.compile(
  r"\\frac\s*\{\s*([A-Za-z]{1,3})\s*\}\s*\{\s*([A-Za-z]{1,3})\s*\}\s*\Z"
)
# What is derived, and by what: f and y of a partial derivative, y and x of
# dy/dx.
_DERIVATIVE = re.compile(
  r"\\partial\s*(?:\^\s*\{?\s*\d\s*\}?)?\s*(\\[a-z]+|[A-Za-z])"
  r"|(?<=\{)\s*d\s*(\\[a-z]+|[A-Za-z])\s*(?=\})"
)
_SEGMENT = re.compile(r"\\overline\s*\{\s*([A-Z]{2})\s*\}")
_SIZE = re.compile(r"\|[^|]+\|\Z")
# Words, a command, or one letter of a product.
_PIECE = re.compile(r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]")
_LETTERS = re.compile(r"[A-Za-z]{1,3}\Z")
_WORDS = re.compile(r"[A-Za-z]{4,}(?:\s+[A-Za-z]+)*\Z")
_IN_BRACKETS = re.compile(r"\([^()]*\)")
_CAPITALS = re.compile(r"\b[A-Z]{2,}\b")
# What makes a formula of an unknown; a name may have an index and arguments.
_OF_UNKNOWN = re.compile(
  r"[-+/|!]|\^(?!\s*\{?\s*(?:\\circ|\*|'))|\d\s*\\?[a-z]|\\(?:frac|sqrt|log|ln|exp|lfloor"
  r"|lceil|cdot|times)(?![a-z])"
)
# In a sum or a limit the letter is nobody's unknown.
_BINDS = re.compile(r"\\(?:sum|prod|int|lim|max|min|sup|inf)(?![a-z])")
_ASKED_FOR = frozenset("xytnk")
_NEGATED = re.compile(r"-\s*\\?[A-Za-z]+(?:_\{?\w+\}?)?\Z")
_DETERMINANT = re.compile(r"\|?\s*\\begin\{[vV](?:small)?matrix\}|\|\s*\\begin")


# A point with its name before it; N(0,1) is a distribution.
_POINT = re.compile(
  r"([A-MO-TV-Z](?:_\{?\w+\}?|'{1,2})?)\s*(\((?=.*[\d\\]).+\))\Z", re.DOTALL
)
_TRANSPOSED = re.compile(
  r"(.*\S)\s*\^\s*(?:T|\\top|\{\s*(?:\\top|(?:\\text\s*\{)?\s*T\s*\}?)\s*\})\Z",
  re.DOTALL,
)
_UNIT_VECTOR = re.compile(r"\s*([+-]?)\s*(.*?)\s*(?<![A-Za-z])([ijk])\s*\Z")


class Named(NamedTuple):
  """What an answer is called, if it says so, and its value."""

  name: str | None
  value: str


def squeeze(text: str) -> str:
  """Drops spaces (but for 1 0) and braces around one character."""
  text = re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", text)
  return re.sub(r"\{(\w)\}", r"\1", text)


def outside(text: str) -> str:
  """Blanks all that stands in braces; the text keeps its length."""
  depth, kept, at = 0, list(text), 0
  while at < len(text):
    character = text[at]
    step = 2 if character == "\\" else 1
    depth += (character == "{") - (character == "}")
    if depth > 0:
      # Blanked, not cut: callers use positions found here in the text itself.
      kept[at : at + step] = " " * len(kept[at : at + step])
    at += step
  return "".join(kept)


def inside(text: str, opening: str, closing: str) -> str | None:
  """Returns what stands between outer brackets, if one pair encloses all."""
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
  """Returns whether `text` can stand before = as what an answer is called."""
  bare = _TEXT.sub("x", _MARK.sub("", text))
  if _NOT_IN_NAME.search(bare) or _RELATION.search(bare):
    return False
  # "not x" names nothing; P(A or B) and the segment NO do.
  words = outside(_TEXT.sub(r" \1 ", _IN_BRACKETS.sub("", text)))
  if units.denies(_CAPITALS.sub("", words)):
    return False
  return re.search(r"[A-Za-z]", bare) is not None


def named(text: str) -> Named:
  """Splits `f(x) = a = b` into the name and the last exact value."""
  parts = split(text, "=")
  if len(parts) == 1 and "\\approx" in text:
    name, _, value = text.partition("\\approx")
    if _is_name(name):
      return Named(name.strip(), value.strip())
  if (point := _POINT.match(text)) and tuple_of(point[2]):
    return Named(point[1], point[2])
  # In `m = 1, n = 2` each of the two has its own.
  if len(parts) < 2 or any(len(split(part)) > 1 for part in parts[1:-1]):
    return Named(None, text)
  # The letters e and i are numbers, so this is a calculation.
  if not any(map(_UNKNOWNS.search, parts)):
    return Named(None, parts[-1])  # 2 + 2 = 4
  if _is_name(parts[0]):
    return Named(parts[0], parts[-1])
  constant = not all(map(_UNKNOWNS.search, parts[:-1]))
  if len(parts) == 2 or (constant and _UNKNOWNS.search(parts[-1])):
    return Named(None, text)
  return Named(None, parts[-1])


def names_agree(
  gold: str | None, answer: str | None, numbered: bool = False
) -> bool:
  """Returns whether two names can stand for the same thing.

  Two names of different letters can't.

  Args:
    gold: a name, or None.
    answer: a name, or None.
    numbered: names with different numbers below the letter can't, either;
      not so in a list, whose items anyone may number.
  """
  if gold is None or answer is None:
    return True
  points = [tuple_of(name) or [] for name in (gold, answer)]
  if all(points) and all(map(_LETTERS.match, itertools.chain(*points))):
    return sorted(points[0]) == sorted(points[1])
  if _contradict(gold, answer):
    return False
  # Two names in words: an area is no perimeter.
  if all(_TEXT.search(name) or _WORDS.match(name) for name in (gold, answer)):
    mine, yours = _subject(gold), _subject(answer)
    if mine and yours and not (mine <= yours or yours <= mine):
      return False
  names = [squeeze(_SEGMENT.sub(r"\1", name)) for name in (gold, answer)]
  mine, yours = map(_LETTER.match, names)
  if not mine or not yours:
    calls = [_CALL.match(name) for name in names]
    if calls[0] and calls[1]:
      mine, yours = calls[0].groupdict(), calls[1].groupdict()
      if not mine["index"] or not yours["index"]:
        mine["index"] = yours["index"]
      return mine == yours
    if any(map(_LETTERS.match, names)) and any(map(_GREEK_LETTER.match, names)):
      return False
    angles = [_ANGLE.match(name) for name in names]
    if angles[0] and angles[1]:  # ABC is CBA, but not BAC
      return angles[0][1] in (angles[1][1], angles[1][1][::-1])
    for kind in (_TERM, _GREEK_LETTER, _LETTERS):  # k and kx
      one, other = map(kind.match, names)
      if one and other:
        return sorted(one[one.lastindex or 0]) == sorted(
          other[other.lastindex or 0]
        )
    # |a| = 5 is not |b| = 5.
    sizes = [_SIZE.match(name) for name in names]
    if mine or yours:  # |x| = 3 is not x = 3
      return not any(sizes)
    return not all(sizes) or names[0] == names[1]
  if not numbered and (mine[2] or yours[2]):
    return True
  # A number that only one side gives contradicts nothing: x and x_1.
  one, other = mine[2] or yours[2], yours[2] or mine[2]
  return mine[1] == yours[1] and one == other


def _contradict(gold: str, answer: str) -> bool:
  """Returns whether two names are of other functions, places or ratios.

  The sine of an angle is not its cosine, f(1) not f(2), a slope along x none
  along y, a maximum no minimum, and a:b not b:a.
  """
  functions = [
    sorted(map(squeeze, _FUNCTION.findall(name))) for name in (gold, answer)
  ]
  slopes = [
    ["".join(found) for found in _DERIVATIVE.findall(name)]
    for name in (gold, answer)
  ]
  ends = [_EXTREME.findall(name.lower()) for name in (gold, answer)]
  places = [_PLACE.match(squeeze(name)) for name in (gold, answer)]
  for one, other in (functions, slopes, ends):
    if one and other and one != other:
      return True
  mine, yours = places
  if mine and yours and mine[1] == yours[1] and mine[2] != yours[2]:
    return True
  one, other = (
    [sorted(side) for side in re.split(r"\s*:\s*", ratio)]
    for ratio in (_QUOTIENT.sub(r"\1:\2", n).strip() for n in (gold, answer))
  )
  return one != other and sorted(one) == sorted(other)


def label(item: str) -> str | None:
  """Returns the words that say whose value an item is; None where none do.

  That is `alice` of `Alice: 5` and `mean` of `mean = 5`, words as text.
  """
  match = _LABEL.match(item)
  if match is None:
    return None
  return " ".join(re.findall(r"[^\W\d_]+", match[1].lower()))


def _subject(words: str) -> set[str]:
  """Returns the words of a name or label that say what it is about."""
  found = re.findall(r"[^\W_]+", _TEXT.sub(r" \1 ", words))
  # A letter in capitals is a name: section A.
  found = [word if len(word) == 1 else word.lower() for word in found]
  return {word.removesuffix("s") for word in found} - _EMPTY_WORDS


def labels_agree(gold: str, answer: str) -> bool:
  """Returns whether words before two values can be about the same thing.

  One may say more than the other: `area: 5` and `total area: 5`.
  """
  found = [_ANNOUNCED.match(text) for text in (gold, answer)]
  if not (found[0] and found[1]):
    return True
  mine, yours = (_subject(match[1]) for match in found if match)
  return not mine or not yours or mine <= yours or yours <= mine


def with_argument(gold: str | None, answer: str | None, value: str) -> str:
  """Writes the value of `f(x)` with the letter that a gold `f(t)` has."""
  found = [_OF_LETTER.match(squeeze(name or "")) for name in (gold, answer)]
  letters = [match[match.lastindex or 0] for match in found if match]
  if len(letters) < 2 or letters[0] == letters[1]:
    return value
  mine, yours = letters
  # Where the gold's letter stands in the value, it is another letter there.
  other = {yours: mine, mine: yours}
  return _PIECE.sub(lambda piece: other.get(piece[0], piece[0]), value)


def has_unknowns(text: str) -> bool:
  """Returns whether letters stand in a text that are no numbers."""
  return _UNKNOWNS.search(_ENVIRONMENT.sub("", text)) is not None


def is_relation(text: str) -> bool:
  """Returns whether there is an =, < or the like outside of all braces."""
  return _RELATION.search(outside(text)) is not None


def is_equation(text: str) -> bool:
  """Returns whether there is an = other than between a name and its value."""
  name, value = named(text)
  return name is None and "=" in outside(value) and len(split(text)) == 1


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


def items_of(text: str) -> list[str] | None:
  """Splits a bare list or a set into items; None where `text` is one value."""
  inner = inside(text, "\\{", "\\}")
  if inner is not None:
    return _expand(split(inner))
  parts = split(strip_braces(text))
  if len(parts) > 1 or _PAIR.search(text):
    return _expand(parts)
  return None


def tuple_of(text: str) -> list[str] | None:
  """Splits `(a, b, …)` or `[a, b, c, …]` into items; None: it is neither."""
  inner, least = inside(text, "(", ")"), 2
  if inner is None:  # of two, that is an interval
    inner, least = inside(text, "[", "]"), 3
  items = split(inner) if inner is not None else []
  return items if len(items) >= least else None


def vector_of(text: str) -> list[str] | None:
  """Returns the entries of a matrix of one row or one column.

  Labels between them are left out. None where `text` is no such matrix.
  """
  cells = matrix_of(text)
  if cells is None or 1 not in (len(cells), len(cells[0])):
    return None
  flat = [cell for row in cells for cell in row if cell]
  # A column may hold each entry below its name, a single letter.
  labels, entries = flat[::2], flat[1::2]
  labelled = all(len(name) == 1 and name.isalpha() for name in labels)
  if labelled and len(labels) == len(entries) > 1:
    return entries
  return flat if len(flat) > 1 else None


def matrix_of(text: str) -> list[list[str]] | None:
  """Returns the rows of a matrix's cells; None where `text` is no matrix."""
  match = _MATRIX.match(text)
  if not match:
    return None
  rows = [row.strip() for row in match[2].split("\\\\")]
  return [
    [cell.strip() for cell in row.split("&")]
    for row in rows
    if row and row != "\\hline"
  ]


def cases_of(text: str) -> list[tuple[str, str]] | None:
  """Returns the pieces of a function, each with its condition; "": else.

  None where `text` is no function by pieces. A name before it is left out.
  """
  match = _CASES.match(text)
  if match is None:
    return None
  pieces = []
  for row in filter(None, map(str.strip, match[1].split("\\\\"))):
    value, mark, condition = row.partition("&")
    if not mark:
      value, mark, condition = row.partition(",")
    condition = _WHEN.sub("", condition.strip(" ,.;"))
    if not mark or not condition:
      return None
    otherwise = _OTHERWISE.match(condition) is not None
    pieces.append((value.strip(" ,"), "" if otherwise else condition.strip()))
  return pieces or None


def untransposed(text: str) -> str:
  """Writes `(a, b)^T` and the transpose of a matrix as what they are."""
  match = _TRANSPOSED.match(text)
  if match is None:
    return text
  entries, cells = tuple_of(match[1]), matrix_of(match[1])
  if entries is not None:
    cells = [entries]
  if cells is None or len(set(map(len, cells))) > 1:
    return text
  rows = "\\\\".join(map("&".join, zip(*cells, strict=True)))
  return f"\\begin{{pmatrix}}{rows}\\end{{pmatrix}}"


def unit_vectors_of(text: str, count: int) -> list[str] | None:
  """Returns the coefficients of i, j (and k) in a sum of their multiples.

  Args:
    text: a cleaned answer.
    count: how many coefficients there are to be; of a missing one 0.
  """
  if not 2 <= count <= 3 or not re.search(r"(?<![A-Za-z])j(?![A-Za-z])", text):
    return None
  terms, begin = [], 0
  hidden = outside(text)
  for sign in re.finditer(r"(?<=[ijk])\s*[+-]", hidden):
    terms.append(text[begin : sign.end() - 1])
    begin = sign.end() - 1
  found: dict[str, str] = {}
  for term in [*terms, text[begin:]]:
    match = _UNIT_VECTOR.match(term)
    if not match or match[3] in found:
      return None
    if re.search(r"(?<![\\A-Za-z])[ijk](?![A-Za-z])", match[2]):
      return None
    found[match[3]] = match[1].replace("+", "") + (match[2] or "1")
  if count == 2 and "k" in found:
    return None
  return [found.get(name, "0") for name in "ijk"[:count]]


def is_determinant(text: str) -> bool:
  """Returns whether a matrix stands between bars, for its determinant."""
  return _DETERMINANT.match(text.strip()) is not None


def expanded(cells: list[list[str]]) -> str | None:
  """Writes a determinant of up to three rows as sums of products."""
  size = len(cells)
  if size > 3 or any(len(row) != size for row in cells):
    return None
  if size == 1:
    return f"({cells[0][0]})"
  terms = []
  for at, cell in enumerate(cells[0]):
    rest = expanded([row[:at] + row[at + 1 :] for row in cells[1:]])
    terms.append(f"{'-' if at % 2 else '+'}({cell})\\cdot({rest})")
  return "".join(terms).removeprefix("+")


def solves_for_another(text: str) -> bool:
  """Returns whether an equation states a value of a formula in one unknown.

  `2x = 6` leaves x to be found, and so 6 isn't what it says; `m + n = 6` and
  `|z| = 6` say what is asked for.
  """
  left, *rest = split(text, "=")
  if not rest or "\\approx" in text or _BINDS.search(left):
    return False
  unknowns = set(_UNKNOWNS.findall(left))
  return len(unknowns) == 1 and bool(
    _OF_UNKNOWN.search(left) and unknowns & _ASKED_FOR
  )


def values_said(text: str) -> list[str] | None:
  """Returns the values that one equation gives to something, if it does.

  That is the constant sides of `m + n = 204` and of `2 + 2 = 4`, or the last
  side where it speaks of other letters than the first: `a + b = 2k`. Sides
  with words or units aren't looked at, as 0.5 = 50% and 1 h = 60 min. None
  where `text` is no equation, or there is no telling.
  """
  parts = split(text, "=")
  if len(parts) < 2 or len(split(text)) > 1 or "\\approx" in text:
    return None
  if any(re.search(r"[<>]|\\(?:le|ge|ne)(?![a-z])", part) for part in parts):
    return None
  if _NEGATED.match(parts[0]):
    return None
  unknowns = [
    set(_UNKNOWNS.findall(_ENVIRONMENT.sub("", part))) for part in parts
  ]
  if unknowns[-1]:
    apart = unknowns[0] and unknowns[0].isdisjoint(unknowns[-1])
    return [parts[-1]] if apart else None
  if _MEASURED.search(parts[-1]):
    return [parts[-1]]
  constant = [
    part
    for part, letters in zip(parts[:-1], unknowns[:-1], strict=True)
    if not letters and not _MEASURED.search(part)
  ]
  return [*constant, parts[-1]]


def solutions_of(text: str) -> list[dict[str, str]] | None:
  """Reads `p=5, q=2; p=7, q=2`: the values of each solution by name.

  None where the names don't come round again, all of them, at least two.
  """
  items = [named(item) for item in split(strip_braces(text))]
  names = [squeeze(item.name) for item in items if item.name]
  if len(names) < len(items) or len(items) < 4:
    return None
  count = names.index(names[0], 1) if names[0] in names[1:] else 0
  if count < 2 or len(items) % count:
    return None
  solutions = [
    {squeeze(item.name or ""): item.value for item in items[at : at + count]}
    for at in range(0, len(items), count)
  ]
  same = all(sorted(one) == sorted(solutions[0]) for one in solutions)
  return solutions if same and len(solutions[0]) == count else None


def values_of(text: str, names: str | None) -> list[str] | None:
  """Reads the values of `a = 1, b = 2, …`.

  They come in the order of `names`, `(a, b, …)`, if it is given. None where not
  every item has a name of its own.
  """
  items = [named(item) for item in split(text)]
  values = {squeeze(item.name): item.value for item in items if item.name}
  if len(items) < 2 or len(values) < len(items):
    return None
  order = [squeeze(name) for name in tuple_of(names or "") or []]
  if sorted(order) == sorted(values):
    return [values[name] for name in order]
  return list(values.values())
