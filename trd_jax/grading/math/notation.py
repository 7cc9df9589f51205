r"""Notations of whole answers that plain LaTeX rules can't rewrite.

Number words, millions and dozens, all real numbers, repeating decimals, bases,
moduli, names of figures. `rewrite` is the last step of `latex.clean`;
`modulus` is for the comparison, since a residue's modulus may be left out but
not contradict the gold's.
"""

import decimal
import re
from fractions import Fraction

# fmt: off
_ONES = [
  "zero", "one", "two", "three", "four", "five", "six", "seven", "eight",
  "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen",
  "sixteen", "seventeen", "eighteen", "nineteen",
]
_TENS = [
  "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
]
# fmt: on
_NUMBERS = {word: value for value, word in enumerate(_ONES)}
_NUMBERS |= {word: 10 * value for value, word in enumerate(_TENS, 2)}
_NUMBERS |= {
  f"{tens}-{ones}": 10 * ten + one
  for ten, tens in enumerate(_TENS, 2)
  for one, ones in enumerate(_ONES[1:10], 1)
}
_SYSTEMS = {
  "binary": 2,
  "ternary": 3,
  "quaternary": 4,
  "quinary": 5,
  "senary": 6,
  "octal": 8,
  "decimal": 10,
  "duodecimal": 12,
  "hexadecimal": 16,
  "hex": 16,
}
_BASES = _SYSTEMS | _NUMBERS

_SCALES = {
  "dozen": 12,
  "hundred": 100,
  "thousand": 10**3,
  "million": 10**6,
  "billion": 10**9,
  "trillion": 10**12,
}
# The group of \text is closed only where the scale ends it: `5\text{ million
# people}` keeps its brace for the words that follow.
_SCALED = re.compile(
  r"(?<![\w.,/^_}])(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?\s*(\\text\s*\{)?\s*"
  rf"({'|'.join(_SCALES)})s?(?![A-Za-z])(?:(?(3)\s*\}}))?",
  re.IGNORECASE,
)
# A time of day, however its half is written: `9:45 a.m.`, `5:05(PM)`.
_TIME = re.compile(
  r"(?:\\text\s*\{)?\s*(\d{1,2}(?::[0-5]\d){0,2})\s*\(?\s*(?:\\text\s*\{)?"
  r"\s*\(?\s*([ap])\s*\.?\s*m\s*\.?\s*\)?\s*\}?\s*\)?\Z",
  re.IGNORECASE,
)
_HOURS = {"noon": "12:00\\text{ pm}", "midnight": "12:00\\text{ am}"}
_WORD = re.compile(r"(?:\\text\s*\{)?\s*([A-Za-z]+(?:[- ][A-Za-z]+)?)\s*\}?\Z")
_NOTHING = re.compile(
  r"(?:\\text\s*\{)?\s*(?:there\s+(?:is|are)\s+)?(?:no|zero)\s+(?:real\s+)?"
  r"(?:solutions?|roots?)(?:\s+exists?)?\s*\.?\s*\}?\Z",
  re.IGNORECASE,
)
# What is said of a limit or a series, without its subject.
_SUBJECT = (
  r"(?:(?:the|this|it)\s*(?:given\s+|infinite\s+|improper\s+)?"
  r"(?:limit|series|integral|sequence|sum|value|function)?\s+(?:is\s+)?)?"
)
_SAID_OF_LIMITS = [
  (re.compile(rf"{_SUBJECT}(?:{words})\s*\.?\Z", re.IGNORECASE), name)
  for words, name in (
    (r"dne|does\s*n[o']t\s+exist|does not exist", "does not exist"),
    (r"diverges?|divergent", "diverges"),
    (r"converges?|convergent", "converges"),
    (r"undefined|not defined", "undefined"),
  )
]
_REALS = re.compile(
  r"(?:\\text\s*\{)?\s*(?:the\s+set\s+of\s+)?(all|any)?\s*"
  r"((?:non-?)?(?:positive|negative))?\s*"
  r"real(?:s|\s+(?:numbers?|values?))?\s*\}?\s*(?:\s[a-z])?\s*\}?\Z",
  re.IGNORECASE,
)
_SIDES = {
  "positive": "_{>0}",
  "negative": "_{<0}",
  "nonnegative": "_{\\ge 0}",
  "nonpositive": "_{\\le 0}",
}
_REPEATING = re.compile(
  r"(?<![\d.])(\d*)\.(\d*)"
  r"(?:\\(?:overline|bar|dot)\s*(?:\{\s*(\d+)\s*\}|(\d))|\((\d+)\))"
)
# A period counts once it has been written three times. Lengths are bounded: a
# back-reference after two open runs of digits is tried at every split of them.
_GOES_ON = re.compile(
  r"(?<![\d.])(\d*)\.(\d{0,30}?)(\d{1,30}?)\3{2,9}\s*\\ldots(?![a-z])"
)
_MAX_PERIOD = 100  # digits before and in the period
_NUMERAL = r"(?P<digits>[+-]?\d[0-9A-Za-z]*(?:\.\w+)?)"
_SYSTEM = rf"(?P<system>{'|'.join(_SYSTEMS)})"
# 101_{two}; and, with the marks of text taken off, `101 in base 2`, `101
# (binary)`, `binary 101`, 0b101.
_BASE = re.compile(
  rf"{_NUMERAL}\s*_\s*\{{?\s*\(?\s*(?:\\text\s*\{{)?\s*(?P<base>\d+|[a-z]+)"
  r"\s*\}?\s*\)?\s*\}?\Z"
)
_SAID_BASE = [
  re.compile(pattern, re.IGNORECASE)
  for pattern in (
    rf"{_NUMERAL}\s*[,(]*\s*(?:(?:written|expressed)\s+)?(?:in\s+)?"
    r"(?:base[ -]*(?P<base>\d+|[a-z]+)|" + _SYSTEM + r")"
    r"(?:\s+(?:number|notation|form|system|representation))?\s*\)?\Z",
    rf"(?:in\s+)?(?:base[ -]*(?P<base>\d+|[a-z]+)|{_SYSTEM})"
    rf"(?:\s+number)?\s*[:,]?\s+{_NUMERAL}\Z",
  )
]
_PREFIXED_BASE = re.compile(r"([+-]?)0([bxo])([0-9A-Fa-f]+)\Z")
_PREFIXES = {"b": 2, "o": 8, "x": 16}
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_FIGURE = re.compile(
  r"(?:\\(?P<kind>triangle|angle|overline|overrightarrow|overleftarrow|vec"
  r"|overleftrightarrow|widehat|square|parallelogram)(?![a-z])\s*"
  r"|\\text\s*\{\s*(?P<word>segment|line|ray|arc|angle|triangle|vector)\s+"
  r"(?=[A-Z]))?\{?\s*(?P<points>(?:[A-Z]'?){2,4})\s*\}?\Z"
)
_FIGURES = {
  "segment": "overline",
  "line": "overleftrightarrow",
  "ray": "overrightarrow",
  "arc": "widehat",
  "vector": "overrightarrow",
  "vec": "overrightarrow",
}
_MODULUS = re.compile(
  r"(.*?\S)\s*\(?\s*\\?(?:text\s*\{\s*\(?)?\\?[pb]?mod(?:ulo)?(?![a-z])"
  r"\s*\}?\s*\{?\s*([^{}()\\]+?)\s*\}?\s*\)?\s*\Z",
  re.DOTALL,
)

# For which values of a letter a formula is meant, however that is said.
_FOR = r"(?:where|for|with)?\s*(?:(?:all|any|every|each|some|an|arbitrary)\s+)?"
_IS = r"(?:is|are|an|any|some|\s)*integers?"
_FOR_ALL = re.compile(
  rf"""[\s,;.]*\(?\s*(?:\\text\s*\{{[\s,(]*{_FOR}\}}|where|for)?\s*
  ([A-Za-z])\s*\\in\s*\\mathbb\s*\{{?\s*([ZN])\s*\}}?(\^\{{?\+\}}?)?\s*\)?\Z""",
  re.VERBOSE,
)
_FOR_INTEGERS = re.compile(
  rf"""[\s,;.]*\(?\s*\\text\s*\{{[\s,(]*{_FOR}
  (?:
    integers?\s*(?:\}}\s*)?([A-Za-z])                # for any integer n
    | \}}\s*([A-Za-z])\s*\\text\s*\{{\s*{_IS}        # where n is an integer,
    | ([A-Za-z])\s+{_IS}                             # all of it text
  )[\s)}}]*\Z""",
  re.VERBOSE,
)
# An angle in degrees, minutes and seconds.
_MINUTES = re.compile(
  r"""(?<![\d.])(\d+)\s*\^\s*\\circ
  \s*(\d{1,2}(?:\.\d+)?)\s*(?:'|\^\s*\{?\s*\\prime\s*\}?)(?!')
  (?:\s*(\d{1,2}(?:\.\d+)?)\s*(?:''|\^\s*\{?\s*\\prime\s*\\prime\s*\}?))?""",
  re.VERBOSE,
)


def for_all(text: str) -> tuple[str, str, str] | None:
  r"""Splits `k\pi, k \in \mathbb{Z}` into the formula, the letter and the set.

  None where `text` says of no letter that it is any integer.
  """
  if (match := _FOR_ALL.search(text)) is not None:
    letter, numbers = match[1], match[2] + (match[3] or "")
  elif (match := _FOR_INTEGERS.search(text)) is not None:
    letter, numbers = match[1] or match[2] or match[3], "Z"
  else:
    return None
  return text[: match.start()].strip(), letter, numbers


def same_figure(gold: str, answer: str) -> bool | None:
  r"""Compares names of figures by their points; None where they are none.

  What is said of both has to agree: `\angle ABC` is no triangle. An angle may
  be named from either end, a vector from one only, and a triangle from any of
  its corners.
  """
  figures = _FIGURE.match(gold), _FIGURE.match(answer)
  if figures[0] is None or figures[1] is None:
    return None
  kinds, points = [], []
  for figure in filter(None, figures):
    kind = figure["kind"] or figure["word"]
    kinds.append(_FIGURES.get(kind, kind))
    points.append(re.findall(r"[A-Z]'?", figure["points"]))
  if not any(kinds):
    return None
  if all(kinds) and kinds[0] != kinds[1]:
    return False
  kind, (mine, yours) = kinds[0] or kinds[1], points
  if kind == "overleftarrow":
    kind, mine, yours = "overrightarrow", mine[::-1], yours[::-1]
  if kind == "triangle":
    return sorted(mine) == sorted(yours)
  # A quadrangle may begin at any corner; its names go round.
  if kind in ("square", "parallelogram") or len(mine) > 3:
    turns = [mine[at:] + mine[:at] for at in range(len(mine))]
    return yours in turns or yours[::-1] in turns
  return mine == yours or (kind != "overrightarrow" and mine == yours[::-1])


def _bare(text: str) -> str:
  """Returns a text without the marks of words, and single spaces."""
  return " ".join(_TEXT.sub(r" \1 ", text).split())


def rewrite(text: str) -> str:
  """Rewrites a cleaned answer in the spelling that the comparison reads."""
  if (word := _WORD.match(text)) is not None:
    first, _, scale = word[1].lower().partition(" ")
    number = _NUMBERS.get(word[1].lower().replace(" ", "-"))
    if number is None and first in _NUMBERS and scale in _SCALES:
      number = _NUMBERS[first] * _SCALES[scale]
    if number is not None:
      return str(number)
    if word[1].lower() in _HOURS:
      return _HOURS[word[1].lower()]
  if _NOTHING.match(text):
    return "\\emptyset"
  bare = _bare(text)
  for said, name in _SAID_OF_LIMITS:
    if said.match(bare):
      return f"\\text{{{name}}}"
  if (reals := _REALS.match(text)) is not None and (reals[1] or reals[2]):
    side = (reals[2] or "").lower().replace("-", "")
    return "\\mathbb{R}" + _SIDES.get(side, "")
  if (time := _TIME.match(text)) is not None:
    clock = time[1] if ":" in time[1] else f"{time[1]}:00"
    return f"{clock}\\text{{ {time[2].lower()}m}}"
  if (based := _with_base(text)) is not None:
    return based
  while (scaled := _SCALED.sub(_as_digits, text)) != text:
    text = scaled  # hundred thousand
  text = _MINUTES.sub(_as_degrees, text)
  for pattern in (_REPEATING, _GOES_ON):
    text = pattern.sub(_as_fraction, text)
  return text


def _with_base(text: str) -> str | None:
  """Writes a number that says its base with it as an index, else None."""
  if (prefixed := _PREFIXED_BASE.match(text)) is not None:
    sign, letter, digits = prefixed.groups()
    return f"{sign}{digits.lstrip('0') or '0'}_{{{_PREFIXES[letter]}}}"
  based = _BASE.match(text)
  if based is not None:
    # `x_{n}` has a letter for its base: an index, which stays as it is.
    base = _BASES.get(based["base"], based["base"])
  else:
    bare = _bare(text)
    based = next(filter(None, (one.match(bare) for one in _SAID_BASE)), None)
    if based is None:
      return None
    name = (based["base"] or based["system"]).lower()
    base = _BASES.get(name, name)
  return f"{based['digits']}_{{{base}}}" if str(base).isdigit() else None


def _as_digits(match: re.Match[str]) -> str:
  r"""Writes `5\text{ million` as `5000000`, with what may follow inside."""
  number = decimal.Decimal(match[1].replace(",", "") + (match[2] or ""))
  digits = f"{number * _SCALES[match[4].lower()]:f}"
  if "." in digits:
    digits = digits.rstrip("0").rstrip(".")
  goes_on = match[3] and not match[0].endswith("}")
  return digits + (match[3] if goes_on else "")


def _as_degrees(match: re.Match[str]) -> str:
  """Writes degrees, minutes and seconds as the degrees that they are."""
  value = Fraction(match[1]) + Fraction(match[2]) / 60
  value += Fraction(match[3] or 0) / 3600
  if value.denominator == 1:
    return f"{value.numerator}^\\circ "
  return f"\\frac{{{value.numerator}}}{{{value.denominator}}}^\\circ "


def _as_fraction(match: re.Match[str]) -> str:
  """Writes a repeating decimal as the fraction that it is."""
  whole, head, period = match[1], match[2], match[match.lastindex or 3]
  if len(period) + len(head) > _MAX_PERIOD:
    return match[0]
  scale = 10 ** len(head)
  value = Fraction(int(whole + head or "0"), scale)
  value += Fraction(int(period), scale * (10 ** len(period) - 1))
  return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def modulus(text: str) -> tuple[str, str | None]:
  r"""Splits `3 \pmod 7` into residue and modulus; the latter may be None.

  `17 \bmod 5` is no residue but a calculation, and stays whole.
  """
  match = _MODULUS.match(text) if "mod" in text else None
  if match is None:
    return text, None
  residue, whole = match.groups()
  if residue.isdigit() and whole.isdigit() and int(residue) >= int(whole):
    return text, None
  return residue, whole
