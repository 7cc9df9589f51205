r"""The words and units that stand around a value.

Policies:
- a percent sign is a unit: 28\% = 28, and neither is 0.28;
- a unit may be left out or spelt differently, but not contradict the gold's:
  what both sides name has to agree, be it metres or apples;
- words that deny, bound or change a number are no unit, and stay with it.
"""

import re
from fractions import Fraction

# Canonical name: spellings. But for single letters, which may be variables,
# they may stand bare after a number.
_UNITS = {
  "%": r"\\?% percent percentage pct",
  "permille": "‰ permille",
  "degree": r"\^\\circ degrees? deg",
  "radian": "rad radians?",
  "dollar": "dollars? usd bucks",
  "cent": "cents?",
  "euro": "euros? eur",
  "yen": "yen jpy",
  "rupee": "rupees? rs inr",
  "yuan": "yuan rmb cny",
  "won": "won krw",
  "franc": "francs? chf",
  "ruble": "rubles? roubles? rub",
  "peso": "pesos?",
  "cad": "cad",
  "aud": "aud",
  "mm": "mm millimet(?:er|re)s?",
  "cm": "cm centimet(?:er|re)s?",
  "m": "m met(?:er|re)s?",
  "km": "km kilomet(?:er|re)s?",
  "inch": "inch inches",
  "foot": "ft feet foot",
  "yard": "yards? yd",
  "mile": "miles? mi",
  "second": "s seconds? secs?",
  "minute": "minutes? mins?",
  "hour": "h hours? hrs?",
  "day": "days?",
  "week": "weeks?",
  "month": "months?",
  "year": "years?",
  "gram": "g grams?",
  "kg": "kg kilograms?",
  "pound": "pounds? lbs?",
  "liter": "l lit(?:er|re)s?",
  "ounce": "oz ounces?",
  "celsius": "celsius",
  "fahrenheit": "fahrenheit",
  "newton": "n newtons?",
  "joule": "j joules?",
  "watt": "w watts?",
  "volt": "v volts?",
  "ohm": "ohms?",
  "kohm": "kohms? kiloohms?",
  "ampere": "a amps? amperes?",
  "coulomb": "coulombs?",
  "kelvin": "k kelvins?",
  "hertz": "hz hertz",
  "pascal": "pa pascals?",
  "mole": "mol moles?",
  "mile/hour": "mph",
  "km/hour": "kmh kph",
  "unit": "units?",
}
_SPELLINGS = [
  (name, re.compile(f"(?:{'|'.join(spellings.split())})\\Z", re.IGNORECASE))
  for name, spellings in _UNITS.items()
]
_LONG_WORD = 6  # letters; of shorter ones any change makes another word
# Words of which one with a letter too many or too few is no other unit.
_LONG_SPELLINGS = {
  spelling.replace("(?:er|re)", ending).replace("s?", plural): name
  for name, spellings in _UNITS.items()
  for spelling in spellings.split()
  for ending in ("er", "re")
  for plural in ("", "s")
  if spelling[0].isalpha() and len(spelling.partition("(")[0]) >= _LONG_WORD
}
_LENGTH = "[kcm]?m|ft|feet|mi|miles?|(?:kilo|centi)?met(?:er|re)s?"
_TIME = "s|secs?|seconds?|min|minutes?|h|hrs?|hours?"
_WORD = "|".join(
  [
    spelling
    for names in _UNITS.values()
    for spelling in names.split()
    if len(spelling) > 1
  ]
  + [rf"(?:{_LENGTH})\s*(?:/|\s+per\s+)\s*(?:{_TIME})"]
)
_POWER = r"(?:\s*\^\s*\{?\s*[23]\s*\}?)?"
_TEXT_UNIT = re.compile(
  rf"\s*\\text\s*\{{((?:[^{{}}]|\^\s*\{{\d\}})*)\}}({_POWER})\Z"
)
# A letter straight after a number may be a variable; a unit word is not.
_BARE_UNIT = re.compile(
  rf"(?<=[\d}})\s])\s*((?:sq(?:uare|\.)?|cubic)?\s*(?:{_WORD}))({_POWER})\Z",
  re.IGNORECASE,
)
_BARE_WORDS = re.compile(
  r"[+-]?\d[\d.,/]*(\s+[A-Za-z]+(?:\s+[A-Za-z]+){0,2})\Z"
)
_MARKED = re.compile(r"([+-]?\d[\d.,]*)\s*'{1,2}\Z")  # feet, or minutes
_FACTORS = frozenset(("hr", "mi", "rad"))
# What stands for several units: whose is left open.
_MARKS = {
  "'": {"foot", "minute"},
  "''": {"inch", "second"},
  "c": {"celsius", "coulomb"},
  "f": {"fahrenheit", "farad"},
}
_MONEY = frozenset(("dollar", "cent", "euro", "rupee", "yen", "yuan"))
_FACTORS_OF_PARTS = {
  "day": ("second", 86400),
  "hour": ("second", 3600),
  "minute": ("second", 60),
  "second": ("second", 1),
  "week": ("second", 604800),
  "year": ("month", 12),
  "month": ("month", 1),
  "mile": ("inch", 63360),
  "yard": ("inch", 36),
  "foot": ("inch", 12),
  "inch": ("inch", 1),
  "dollar": ("cent", 100),
  "cent": ("cent", 1),
  "pound": ("ounce", 16),
  "ounce": ("ounce", 1),
}
_SHORT = {"'": "foot", "''": "inch", "in": "inch"}
_PART = re.compile(
  r"\s*(?:and\b|,)?\s*(\d+(?:\.\d+)?)\s*('{1,2}(?!')|[A-Za-z]+\.?)(?=[\s,]|\d|\Z)"
)
_VOWEL = re.compile(r"[aeiou]", re.IGNORECASE)
_ALONE = re.compile(r"\\text\s*\{\s*([A-Za-z]+)\}\Z")
_ANNOUNCES = re.compile(
  r"(?:about|approx|approximately|roughly|exactly|answer|total|is|only)\Z",
  re.IGNORECASE,
)
_WORDS_BEFORE = re.compile(
  r"\s*(\\text\s*\{[^{}]*\}|(?:[A-Za-z]+\s+)+(?:is|are))\s*:?\s*(?=\S)"
)
# What can be said about a number without its being another one: words that
# don't hold a number of their own, and by which it isn't
_ONLY_WORDS = re.compile(r"[^\d,;:<>=+*^_|!?\\{}]*\Z")
_GREEK = (
  "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi"
  "|omicron|pi|rho|sigma|tau|upsilon|phi|chi|psi|omega"
)
_DENIALS = (
  r"n['’]t\b|\b(?:not?|nor|none|never|cannot|wrong|false|incorrect|fails?"
  r"|impossible|or|n?either|if|unless|except|without|instead"
  # or leave it open.
  r"|maybe|perhaps|possibl[ey]|probabl[ey]|likely|could|might|may|should"
  r"|guess\w*|think|suppos\w+|assum\w+|believe|doubt\w*|un(?:sure|clear|known"
  r"|certain)|sure|tentative\w*|suspect|wait|hmm+|conjectur\w+)\b"
)
_DENIES = re.compile(_DENIALS, re.IGNORECASE)
_BOUNDS = re.compile(
  r"\b(?:greater|less|more|fewer|larger|smaller) than\b|\bat (?:least|most)\b",
  re.IGNORECASE,
)
_CHANGES = re.compile(
  rf"{_DENIALS}|\b(?:"
  # bounded,
  r"and|but|other|between|more|less|fewer|greater|larger|smaller|bigger|least"
  r"|most|than|under|over|above|below|beyond|up|to|too|through|almost|nearly"
  r"|exceed(?:s|ing)?|exclud(?:es|ing)"
  # calculated with (in the plural, these are what is counted),
  r"|plus|minus|negative|times|divided|divisible|multiple|mod|modulo|choose"
  r"|factorial|ish|power|root|sqrt|inverse|reciprocal|base|twice|double|triple"
  r"|half|halves|thirds?|quarters?"
  r"|binary|ternary|octal|duodecimal|hex(?:adecimal)?|degrees? of"
  r"|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand|million)ths?"
  rf"|(?:hundred|thousand|million|billion|trillion|dozen)s?|{_GREEK})\b"
  # of which it is only the number (the 5th term)
  r"|\A\W*(?:st|nd|rd|th)\s+[a-z]\w+"
  # or, alone, an operation or a letter that is no unit's and so a variable.
  r"|\A\W*(?:squared|cubed?|(?-i:(?![ACFJKLNVWghlms])[A-Za-z]))\W*\Z",
  re.IGNORECASE,
)
_SUBJECT = re.compile(r"\b(?:is|are|equals?)\W*\Z", re.IGNORECASE)
_CALLS_FOR_MORE = re.compile(r"(?<!total) of\W*\Z|\bby\W*\Z", re.IGNORECASE)
_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_ASIDE = re.compile(
  r"\s*(?:\\approx|\(\s*\\approx|,?\s*\(?\s*\\text\s*\{\s*\(?\s*(?:or )?"
  r"(?:approx|about|i\.e|roughly)).*\Z",
  re.DOTALL,
)


def _leaves_the_value(words: str) -> bool:
  """Returns whether words beside a number leave its value as it is."""
  return bool(_ONLY_WORDS.match(words)) and not _CHANGES.search(words)


def denies(words: str) -> bool:
  """Returns whether words deny, hedge or bound what they stand before."""
  return bool(_DENIES.search(words) or _BOUNDS.search(words))


def _introduces(before: str) -> bool:
  """Returns whether words before a number only announce it."""
  # A single word, with nothing that sets it off, is a function's name: sgn 5.
  if (alone := _ALONE.match(before)) and not _ANNOUNCES.match(alone[1]):
    return False
  words = re.sub(r"\\text|[{}:]", "", before)
  if _SUBJECT.search(words):  # the least root of … is
    return not _DENIES.search(words)
  return _leaves_the_value(words) and not _CALLS_FOR_MORE.search(words)


def _known(words: str) -> str | None:
  """Returns the canonical name of a unit, None where we know none."""
  for name, spelling in _SPELLINGS:
    if spelling.match(words):
      return name
  near = {
    name for word, name in _LONG_SPELLINGS.items() if _slipped(words, word)
  }
  return near.pop() if len(near) == 1 else None


def _slipped(word: str, other: str) -> bool:
  """Returns whether long words differ by one letter that one has more.

  Another letter makes another word: kittens and mittens.
  """
  if min(len(word), len(other)) < _LONG_WORD or not (word + other).isalpha():
    return False
  short, long = sorted((word.lower(), other), key=len)
  if len(long) - len(short) != 1:
    return False
  at = next((i for i, c in enumerate(short) if c != long[i]), len(short))
  return short[at:] == long[at + 1 :]


def _name(words: str, power: str) -> str:
  """Spells a unit one way: a known name, or its words in the singular."""
  words = words.strip(" ().").lower()
  exponent = "".join(filter(str.isdigit, power))
  for pattern, number in (
    (r"(?:square|sq\.?)\s+|\s+squared\Z", "2"),
    (r"cubic\s+|\s+cubed\Z", "3"),
  ):
    words, found = re.subn(rf"\A(?:{pattern})|{pattern}", "", words, count=1)
    exponent = number if found else exponent
  parts = []
  for part in re.split(r"\s*/\s*|\s+per\s+", words):
    # Only as all of a unit: "in" may be any word else.
    known = "inch" if part == "in" else _known(part)
    parts.append(
      known
      or " ".join(
        _known(word) or re.sub(r"(?<=[^s]{2})s\Z", "", word)
        for word in re.findall(r"[^\W\d_]+", part)
      )
    )
  return "/".join(parts) + exponent


def agree(gold: str | None, answer: str | None) -> bool:
  """Returns whether two units, as `measure` gives them, don't contradict.

  One may say more than the other: apples and red apples.
  """
  if not gold or not answer or gold == answer:
    return True
  # For what a sum of money is paid need not be said.
  whole, part = sorted((gold, answer), key=len)[::-1]
  if part in _MONEY and whole.startswith(f"{part}/"):
    return True
  mine, yours = set(gold.split()), set(answer.split())
  # A dash at a number is a foot's or a minute's, two are an inch's or second's.
  for mark, names in _MARKS.items():
    for one, other in ((mine, yours), (yours, mine)):
      if mark in one and names & other:
        one.remove(mark)
        one |= names & other
  rest = [sorted(mine - yours), sorted(yours - mine)]
  if not all(rest):
    return True
  # A slip of the pen names no other thing: banannas.
  return len(rest[0]) == len(rest[1]) and all(map(_slipped, *rest))


def _is_word(letters: str) -> bool:
  """Returns whether letters can only be a word.

  The factors of a product are written in alphabetical order.
  """
  return (
    len(letters) > 3
    and _VOWEL.search(letters) is not None
    and sorted(letters) != list(letters)
  )


def _unit_at_end(value: str) -> tuple[int, str] | None:
  """Finds where the unit after a value begins, and its name."""
  if (text := _TEXT_UNIT.search(value)) is not None:
    words = re.sub(r"\^\s*\{?\s*([23])\s*\}?\s*\Z", "", text[1])
    if not _leaves_the_value(words) and words.strip() != "\\%":
      return None
    return text.start(), _name(words, text[2] or text[1][len(words) :])
  bare = _BARE_UNIT.search(value)
  # After a name these are factors: \pi hr is an area.
  if (
    bare
    and bare[1] in _FACTORS
    and value[: bare.start()].rstrip()[-1:].isalpha()
  ):
    bare = None
  if bare is not None:
    return bare.start(), _name(bare[1], bare[2])
  words = _BARE_WORDS.match(value)
  if words and _leaves_the_value(words[1]) and _is_word(words[1].split()[-1]):
    return words.start(1), _name(words[1], "")
  return None


def total(text: str) -> tuple[Fraction, str, int] | None:
  r"""Adds up an amount in several units: 1 hour 15 minutes, 5' 10''.

  Returns:
    How much it is in the least unit of its kind, that unit, and of how many
    parts it was; None where the parts aren't of one kind, the largest first.
  """
  bare = re.sub(r"\\text|[{}~]|\\[, ]", " ", text).strip()
  amount, kind, at, factors = Fraction(0), None, 0, []
  while at < len(bare):
    part = _PART.match(bare, at)
    if part is None:
      return None
    name = _SHORT.get(part[2].rstrip(".")) or _known(part[2].rstrip("."))
    base, factor = _FACTORS_OF_PARTS.get(name or "", (None, 0))
    if base is None or kind not in (None, base):
      return None
    kind, at = base, part.end()
    amount += Fraction(part[1]) * factor
    factors.append(factor)
  if kind is None or factors != sorted(set(factors), reverse=True):
    return None
  return amount, kind, len(factors)


def measure(text: str) -> tuple[str, str | None]:
  """Splits a scalar answer into its value and its unit.

  Args:
    text: a cleaned answer.

  Returns:
    The text without words before it, asides ("≈ 4.15") and units after it,
    and the unit's name, None for none: see `agree`.
  """
  # An answer that is nothing but an aside, `\approx 3`, is its value.
  value = _ASIDE.sub("", text) or text
  before = _WORDS_BEFORE.match(value)
  if before is not None and _introduces(before[1]):
    value = value[before.end() :]
  unit = None
  if (marked := _MARKED.match(value)) is not None:
    value, unit = marked[1], "'" * value.rstrip().count("'")
  # Twice: one unit may follow another, as in `5\text{ cm}\text{ each}`.
  for _ in range(2):
    found = _unit_at_end(value)
    rest = value[: found[0]].strip() if found else ""
    if not found or not rest or rest.endswith(("+", "-", "=", "^", "_")):
      break
    # sin 30° is a number, not degrees: there, ° is a factor (below).
    if found[1].startswith("degree") and _ANGLE.search(rest):
      break
    unit = " ".join(filter(None, (found[1], unit)))
    value = rest
  if "\\circ" in value:
    value = value.replace("^\\circ", "\\cdot\\frac{\\pi}{180}")
  return value.strip() or text, unit or None
