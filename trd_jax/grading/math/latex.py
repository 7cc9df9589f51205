"""One spelling for what LaTeX, Unicode and habit write in many ways.

`clean` turns an answer as a model or a data set wrote it into plain LaTeX
without layout: the structural comparison and the symbolic parser both read
only that. It never evaluates anything.
"""

import re
import unicodedata

from trd_jax.grading.math import (
  brackets,
  logic,
  notation,
  program_notation,
  styles,
)

_CHARACTERS = {
  "−": "-",
  "–": "-",
  "—": "-",
  "×": r"\times ",
  "⋅": r"\cdot ",
  "·": r"\cdot ",
  "÷": "/",
  "∕": "/",
  "π": r"\pi ",
  "∞": r"\infty ",
  "∪": r"\cup ",
  "∩": r"\cap ",
  "∈": r"\in ",
  "≤": r"\le ",
  "≥": r"\ge ",
  "≠": r"\ne ",
  "≈": r"\approx ",
  "±": r"\pm ",
  "∓": r"\mp ",
  "°": r"^\circ ",
  "…": r"\ldots ",
  "∅": r"\emptyset ",
  "≡": r"\equiv ",
  "⟨": r"\langle ",
  "⟩": r"\rangle ",
  "∨": r"\lor ",
  "∧": r"\land ",
  "¬": r"\neg ",
  "→": r"\to ",
  "⇒": r"\Rightarrow ",
  "↔": r"\leftrightarrow ",
  "⇔": r"\leftrightarrow ",
  "∖": r"\setminus ",
  "⊕": r"\oplus ",
  "∠": r"\angle ",
  "△": r"\triangle ",
  "∛": r"\sqrt[3]",
  "⁄": "/",
  "⩽": r"\le ",
  "⩾": r"\ge ",
  "≦": r"\le ",
  "≧": r"\ge ",
  "∼": r"\sim ",
  "º": r"^\circ ",
  "Ø": r"\emptyset ",
  "ℝ": r"\mathbb{R}",
  "ℤ": r"\mathbb{Z}",
  "ℕ": r"\mathbb{N}",
  "ℚ": r"\mathbb{Q}",
  "ℂ": r"\mathbb{C}",
  "ω": r"\omega ",
  "θ": r"\theta ",
  "α": r"\alpha ",
  "β": r"\beta ",
  "、": ",",
  "′": "'",
  "″": "''",
  "\u2061": "",
  "\u200b": "",
  "\ufeff": "",
}
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_RUN_ABOVE = re.compile("[" + "".join(_SUPERSCRIPTS) + "]+")
_RUN_BELOW = re.compile("[" + "".join(_SUBSCRIPTS) + "]+")
_VULGAR = re.compile(r"(\d?)([¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])")
_ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z]|\{|\()?")

# What data sets put between groups of three digits.
_SEPARATOR = r"(?:,?\\[,!;: ]\s*|\{,\}\s*|,?\\thinspace\s*|~|\s|[_'’])"
_GROUPED = re.compile(
  rf"(?<![\w.,^{{])\d{{1,3}}(?:{_SEPARATOR}\d{{3}})+(?![\d'])"
  # A dot has to come twice: 1.234 is a decimal.
  r"|(?<![\w.,^{])\d{1,3}(?:\.\d{3}){2,}(?![\d.,])"
)
# An amount of money that is all of an answer, by what stands before or after
# it: a sign, a command or a code, without its backslash and dot.
_CURRENCIES = {
  "US$": "dollars",
  "HK$": "hkd",
  "NT$": "twd",
  "A$": "aud",
  "C$": "cad",
  "R$": "brl",
  "S$": "sgd",
  "$": "dollars",
  "£": "pounds",
  "pounds": "pounds",
  "€": "euros",
  "euro": "euros",
  "¥": "yen",
  "yen": "yen",
  "₹": "rupees",
  "¢": "cents",
  "cent": "cents",
  "₩": "won",
  "₽": "rubles",
  "₱": "pesos",
  "₪": "shekels",
  "฿": "baht",
  "USD": "dollars",
  "GBP": "pounds",
  "EUR": "euros",
  "JPY": "yen",
  "CNY": "yuan",
  "RMB": "yuan",
  "INR": "rupees",
  "Rs": "rupees",
  "KRW": "won",
  "CHF": "francs",
  "CAD": "cad",
  "AUD": "aud",
  "HKD": "hkd",
  "SGD": "sgd",
  "TWD": "twd",
  "BRL": "brl",
  "RUB": "rubles",
}
# Words are commands, or else units, which are read elsewhere.
_SIGN = "|".join(
  rf"\\{name}(?![a-z])"
  if name.islower()
  else re.escape(name).replace("\\$", r"\\?\$")
  for name in _CURRENCIES
)
_SIGN = rf"(?:{_SIGN})\.?"
_AMOUNT = r"\d[\d,.]*(?<![,.])"
_MONEY = re.compile(
  rf"\s*(-?)\s*(?:({_SIGN})\s*({_AMOUNT})|({_AMOUNT})\s*({_SIGN}))"
  # for each of something
  r"(\s*(?:\\text\s*\{)?\s*"
  r"(?:(?:per|each|an?|every)\s[a-zA-Z ]+|each|/\s*[a-z]+)\}?)?"
  r"[\s.]*\Z"
)
# The same all of it as text.
_TEXT_OF_MONEY = re.compile(
  rf"\\text\s*\{{\s*({_SIGN}\s*{_AMOUNT}[^{{}}]*)\}}\s*\Z"
)
# The same as text, or a thin space beside it.
_TEXT_SIGN = re.compile(rf"\\text\s*\{{\s*({_SIGN})\s*\}}|\\[,;: ]|~")
# Of signs that stand elsewhere nothing is left.
_CURRENCY = re.compile(r"\\\$|[£€¥₹¢₩₽₱₪฿]|\\(?:pounds|euro|yen|cent)(?![a-z])")
_NUMBER_A_LINE = re.compile(
  r"(?:[A-Za-z]\w*\s*=\s*)?(?:[-+]?\d+(?:[./]\d+)?|\([^()]+\))[,;]?\Z"
)
# What other languages write between two answers.
_JOINS = "et|ou|und|oder|sowie|и|или|oraz|lub"
_SIGNS = "或者|或|以及|和|与|與|及|および|または|と|그리고|또는"
# The binomial coefficient, as Chinese and Russian books write it.
_C = r"(?:(?<![\\A-Za-z])C|\\text\s*\{\s*C\s*\})"
_FROM = r"(?:\{\s*(\d+|\d*n)\s*\}|(\d|n))"
_TAKEN = r"(?:\{\s*(\d+|[nkmr])\s*\}|(\d|[nkmr]))"
# Applied in this order, each once, to the whole text: a rule may count on what
# those before it have rewritten. `(?![a-z])` ends a command's name, so that
# `\le` is not found in `\left`.
_RULES: list[tuple[re.Pattern[str], str]] = [
  (re.compile(pattern), replacement)
  for pattern, replacement in (
    # Doubled backslashes, dollar signs and math delimiters.
    (r"\\\\(?=(?:[dt]?frac|text|sqrt|left|right|[lg]eq?|pi)(?![a-z]))", r"\\"),
    (r"\\?\$|(?<!\\)\\[()\[\]]", ""),
    # Delimiter sizes and styles.
    (r"\\(?:left|right|middle)\s*\.", ""),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?|mleft|mright)(?![a-z])", ""),
    (r"\\(?:display|text)style(?![a-z])|\\(?:no)?limits(?![a-z])", ""),
    (r"\\langle(?![a-z])", "("),
    (r"\\rangle(?![a-z])", ")"),
    (r"\\lbrace(?![a-z])", r"\\{"),
    (r"\\rbrace(?![a-z])", r"\\}"),
    (r"\\lbrack(?![a-z])", "["),
    (r"\\rbrack(?![a-z])", "]"),
    (r"\\[lr]vert(?![a-z])", "|"),
    # Spaces.
    (r"\\q?quad(?![a-z])|\\(?:en|thin|neg)space(?![a-z])", " "),
    (r"(?<!\\)\\[,;:!> ]|~", " "),
    # One name a command.
    (r"\\(?:[dtcs]frac|nicefrac|flatfrac)(?![a-z])", r"\\frac"),
    (r"\^\s*\{?(\d+)\}?\s*\\?/\s*_\s*\{?(\d+)\}?", r"\\frac{\1}{\2}"),
    # A quotient of units is one unit: \frac{\text{km}}{\text{h}}.
    (
      r"\\frac\s*\{\s*\\text\s*\{([A-Za-z ]+)\}\s*\}"
      r"\s*\{\s*\\text\s*\{([A-Za-z ]+)\}\s*\}",
      r"\\text{ \1/\2}",
    ),
    (
      r"\\text\s*\{([A-Za-z ]+)\}\s*/\s*\\text\s*\{([A-Za-z ]+)\}",
      r"\\text{\1/\2}",
    ),
    (r"\\[dt]binom(?![a-z])", r"\\binom"),
    (r"\\(?:leqslant|leqq|leq)(?![a-z])|<=", r"\\le "),
    (r"\\(?:geqslant|geqq|geq)(?![a-z])|>=", r"\\ge "),
    (r"\\neq(?![a-z])|!=", r"\\ne "),
    (r"\\lt(?![a-z])", "<"),
    (r"\\gt(?![a-z])", ">"),
    (r"\\(?:colon|ratio)(?![a-z])|(?:\\text\s*)?\{:\}", ":"),
    (r"\\log\s*_\s*(?:\{\s*e\s*\}|e(?![a-z]))", r"\\ln "),
    (r"\\lg(?![a-z])", r"\\log_{10} "),
    (r"\\(?:dots|cdots|ldots|dotsc)(?![a-z])|\.\.\.", r"\\ldots "),
    (r"\\(?:simeq|doteq)(?![a-z])|~=", r"\\approx "),
    (
      r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degrees?(?![a-z])",
      r"^\\circ ",
    ),
    # 25 k\Omega, and 13^{th}
    (
      r"(?<=[\d}])(?:\s|\\text\s*\{\s*(?=[kM]))*([kM]?)\s*\}?\s*\\Omega\s*\Z",
      r"\\text{ \1ohm}",
    ),
    (
      r"(?<=\d)\s*\^?\s*\{?\s*\\text\s*\{\s*(st|nd|rd|th)\s*\}\s*\}?\s*\Z",
      r"\\text{\1}",
    ),
    (r"\\imath(?![a-z])", "i"),
    (r"\\varnothing(?![a-z])|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\equiv(?![a-z])", "="),
    (r"\\(?:lor|vee)(?![a-z])", ","),
    # Beside each other, 4!8! is a product.
    (r"!\s*(?=\d+!)", r"!\\cdot "),
    (r"\\backslash(?![a-z])", r"\\setminus "),
    (r"\\big(cup|cap)(?![a-z_])(?!\s*_)", r"\\\1 "),
    (r"(?<=\d)\s*\\text\s*\{\s*(?:is )?to\s*\}\s*(?=\d)", ":"),
    (r"\\mid(?![a-z])", "|"),
    (
      r"(?:\{\s*\})?(?<!\w)[_^]\s*\{?(\w+)\}?\s*C\s*_\s*(?:\{(\w+)\}|(\w))",
      r"\\binom{\1}{\2\3}",
    ),
    # C_{10}^3, and the same with what is chosen first.
    (
      rf"{_C}\s*_\s*{_FROM}\s*\^\s*{_TAKEN}(?!\s*[\^_])",
      r"\\binom{\1\2}{\3\4}",
    ),
    (rf"{_C}\s*\^\s*{_TAKEN}\s*_\s*{_FROM}", r"\\binom{\3\4}{\1\2}"),
    (r"\{([^{}]*)\\choose(?![a-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (
      r"\\text\s*\{\s*infinity\s*\}|(?<![\\a-zA-Z])infinity(?![a-z])",
      r"\\infty ",
    ),
    # Roman text: what is a symbol, a number or a conjunction is not text.
    (r"\\text\s*\{\s*([ei])\s*\}", r" \1 "),
    (r"\\text\s*\{\s*([-+]?[\d.,:/]*\d[A-Z]?(?:\s*\\?%)?)\s*\}", r"\1"),
    (r"\\text\s*\{\s*([-+]?[\d.,]*\d)(\s+[A-Za-z][^{}]*)\}", r"\1\\text{\2}"),
    (
      r"\\text\s*\{([A-Za-z][A-Za-z ]*\s)([-+]?\d[\d.,]*(?<![.,]))\s*\}",
      r"\\text{\1}\2",
    ),
    (rf"\\text\s*\{{[\s,]*(?:and|or|,|;|{_JOINS}|{_SIGNS})[\s,]*\}}", ","),
    (r"\\text\s*\{\s(?:y|o|e|i)\s\}", ","),
    # 2\text{ cm or }3\text{ cm}
    (
      r"(?<=\d)\s*\\text\s*\{([^{}]*[A-Za-z])\s+(?:and|or)\s*\}(?=\s*-?\d)",
      r"\\text{\1},",
    ),
    (rf"(?<=[\d\s)}}])\s*(?:(?:{_JOINS})(?![^\W\d_])|{_SIGNS})\s*", ","),
    (
      r"(?<=[\d\s)}])[\s,]*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])"
      # Of two letters to choose from, "or" leaves open which.
      r"(?<![A-Z] or)"
      # Nor of two words.
      r"(?:(?<![a-z][a-z] or)|(?!\s+[A-Za-z]{2}))",
      ",",
    ),
    (
      r"\\text\s*\{\s*(\(?[A-Z]\)?(?:\s*,\s*\(?[A-Z]\)?)+)\s*\}",
      r"\1",
    ),
    (r"\\text\s*\{\s*\}", " "),
    (
      r"\\text\s*\{\s*(arc)?(ln|log|sin|cos|tan|cot|sec|csc|exp)\s*\}",
      r"\\\1\2 ",
    ),
    # What programs write.
    (r"\*\*", "^"),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"\*", r"\\cdot "),
    # A small e is Euler's number where that can be meant: in `24e-32`, and
    # neither in `1.5e-7`, `3e8` nor in `5e-07`.
    (r"(?<![\w.\\])(\d+(?:\.\d+)?)E([-+]?\d+)(?!\w)", r"\1\\times 10^{\2}"),
    (r"(?<![\w.\\])(\d+\.\d+|1)e([-+]?\d+)(?!\w)", r"\1\\times 10^{\2}"),
    (r"(?<![\w.\\])(\d+)e(\d+|[-+]0\d+)(?!\w)", r"\1\\times 10^{\2}"),
    # 073 = 73 and .5 = 0.5; after a comma it would be a group of digits.
    (r"(?<![\d.,:\\A-Za-z_^])(?<!line\{)(?<!(?:bar|dot)\{)0+(?=\d)", ""),
    (r"(?<![\d.])\.(?=\d)", "0."),
    (r"\s+", " "),
    # A relation without a left side: "≈ 3.14", "= 5".
    (r"\A\s*(?:\\approx(?![a-z])|=)\s*(?=\S)", ""),
  )
]
_OR = re.compile(r"\\(?:lor|vee)(?![a-z])")
_JOINED = re.compile(
  r"[,\s]*(?:\\text\s*\{[\s,]*(?:and|but|(?P<either>or))[\s,]*\}"
  r"|(?<![A-Za-z\\])(?:and|but|(?P<bare>or))(?![A-Za-z])"
  r"|\\(?:wedge|land|(?P<sign>vee|lor))(?![a-z])|&&)"
)
_UNIT_VECTOR = re.compile(
  r"\\(?:(?:wide)?(?:hat|vec)|text)(?![a-z])\s*\{?\s*\\?([ijk])(?:math)?(?![A-Za-z])\s*\}?"
)
_COMPARES = re.compile(r"[<>]|\\(?:[lg](?:t|e|eq|eqq|eqslant)|neq?)(?![a-z])")
_SPACES = re.compile(r"\s+")
# Marks of bold, of code and of a quotation around all of an answer.
_MARKED = re.compile(r"(\*\*?|`|\"|``)([^*`\"]+)(?:\1|'')\Z")
_COMMAND = re.compile(r"\\(frac|binom|sqrt)(?![a-z])")
_INDEX = re.compile(r"\s*\[[^\]]*\]")
_TOKEN = re.compile(r"\\[a-zA-Z]+|[^\\]")
_END = re.compile(r"[\s.;,\\]+\Z")
_ALIGNED = re.compile(
  r"\\begin\{((?:aligned|align|gathered|gather|split|multline|eqnarray)\*?)\}"
  r"(.*?)\\end\{\1\}",
  re.DOTALL,
)
_SYSTEM = re.compile(
  r"\s*(?:\\left\s*)?(?:\\\{)?\s*\\begin\{cases\}(.*)\\end\{cases\}"
  r"\s*(?:\\right\s*\.)?\s*\Z",
  re.DOTALL,
)
# Two backslashes before a command's name are one that was doubled.
_BREAK = re.compile(r"\\\\(?:\[[^\]]*\])?(?![A-Za-z]{2})|\\newline(?![a-z])")
# The space that a matrix leaves below a row.
_ROW_SPACE = re.compile(r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm|in|mu)\s*\]")
# Column after column of tokens is how some models break a formula up.
_COLUMN = re.compile(r"\\begin\{matrix\}(.*)\\end\{matrix\}", re.DOTALL)


def _roots(text: str) -> str:
  r"""Writes each √ as `\sqrt{}`, with its radicand inside the braces."""
  while (found := _ROOT.search(text)) is not None:
    inner = found[1]
    # Unicode's root has no braces of its own: it stands over a group, a number
    # or one letter.
    if inner in ("{", "("):
      end = brackets.end_of(text, found.end() - 1)
      if end < 0:
        return text.replace("√", r"\sqrt ")
      body = text[found.end() : end - 1]
    else:
      body, end = inner or "", found.end()
    text = f"{text[: found.start()]}\\sqrt{{{body}}}{text[end:]}"
  return text


def _plain_characters(text: str) -> str:
  """Replaces what Unicode offers for digits, signs, scripts and roots."""
  if text.isascii():
    return text
  text = _RUN_ABOVE.sub(
    lambda run: "^{" + "".join(_SUPERSCRIPTS[c] for c in run[0]) + "}", text
  )
  text = _RUN_BELOW.sub(
    lambda run: "_{" + "".join(_SUBSCRIPTS[c] for c in run[0]) + "}", text
  )

  def vulgar(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match[2]).partition("⁄")
    return f"{match[1]}\\frac{{{top}}}{{{bottom}}}"

  text = _VULGAR.sub(vulgar, text)
  text = "".join(_CHARACTERS.get(character, character) for character in text)
  return _roots(unicodedata.normalize("NFKC", text))


def _of_money(text: str) -> str:
  r"""Writes `\$5` as five dollars; beside anything else the sign goes."""
  bare = _TEXT_OF_MONEY.sub(r"\1", _TEXT_SIGN.sub(r" \1 ", text))
  amount = _MONEY.match(bare)
  if amount is None:
    return _CURRENCY.sub("", text)
  sign = re.sub(r"[\\.]", "", amount[2] or amount[5])
  rate = re.sub(r"\\text|[{}]", "", amount[6] or "")
  unit = f"{_CURRENCIES[sign]}{rate and ' ' + rate.strip()}"
  return f"{amount[1]}{amount[3] or amount[4]}\\text{{ {unit}}}"


def _one_line(text: str) -> str:
  """Writes a number, a value or a point on each line as a list of them."""
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  listed = len(lines) > 1 and all(map(_NUMBER_A_LINE.match, lines))
  return (", " if listed else " ").join(
    line.rstrip(",;") if listed else line for line in lines
  )


def _lines(text: str) -> str:
  """Writes what is broken over lines as a list; a matrix keeps its rows."""
  text = _ALIGNED.sub(lambda lines: lines[2].replace("&", " "), text)
  # A system of equations is a list of them.
  system = _SYSTEM.match(text)
  if system is not None and "&" not in system[1]:
    return _BREAK.sub(", ", system[1])
  if "\\begin" in text:
    return _ROW_SPACE.sub(r"\\\\", text)
  return _BREAK.sub(", ", text)


def _unit_vectors(text: str) -> str:
  r"""Writes `\hat{\imath}` and `\vec{j}` as the letters that they mark."""
  letters = {match[1] for match in _UNIT_VECTOR.finditer(text)}
  return (
    _UNIT_VECTOR.sub(r" \1 ", text)
    if len(letters) > 1 and "j" in letters
    else text
  )


def _conjunctions(text: str) -> str:
  r"""Writes `and` and `or` between inequalities as `\land` and `\cup`.

  Elsewhere both only list what they stand between.
  """

  def sign(match: re.Match[str]) -> str:
    sides = text[: match.start()], text[match.end() :]
    if not all(map(_COMPARES.search, sides)):
      return match[0]
    either = match["either"] or match["bare"] or match["sign"]
    return r" \cup " if either else r" \land "

  return _JOINED.sub(sign, text)


def _surplus(text: str) -> int:
  """Counts how many more braces a text closes than it opens."""
  return text.count("}") - text.count("{")


def _argument(text: str, at: int) -> tuple[str, int]:
  """Reads the argument that begins at `at`; also the index after it."""
  while at < len(text) and text[at] == " ":
    at += 1
  if at == len(text):
    return "", at
  if text[at] == "{":
    end = brackets.end_of(text, at)
    return ("", at) if end < 0 else (text[at + 1 : end - 1], end)
  token = _TOKEN.match(text, at)
  return (token[0], token.end()) if token else (text[at], at + 1)


def _braced(text: str) -> str:
  r"""Puts braces around the arguments of `\frac`, `\binom` and `\sqrt`."""
  done, at = [], 0
  while (command := _COMMAND.search(text, at)) is not None:
    done.append(text[at : command.end()])
    at = command.end()
    if command[1] == "sqrt" and (root := _INDEX.match(text, at)):
      done.append(root[0].strip())
      at = root.end()
    for _ in range(1 if command[1] == "sqrt" else 2):
      argument, at = _argument(text, at)
      done.append(f"{{{_braced(argument)}}}")
  return "".join([*done, text[at:]])


def strip_braces(text: str) -> str:
  """Drops braces (not `\\{`) that enclose the whole text."""
  while (
    text.startswith("{")
    and text.endswith("}")
    and brackets.end_of(text, 0) == len(text)
  ):
    text = text[1:-1].strip()
  return text


def clean(answer: str) -> str:
  """Writes an answer in one spelling: no layout, no Unicode, one name each.

  Args:
    answer: what a box or a gold column holds; LaTeX, Unicode or plain text.

  Returns:
    LaTeX for the same thing; "" for nothing. Idempotent up to spaces.
  """
  text = _one_line(_plain_characters(answer))
  text = _of_money(styles.plain(text))
  if logic.is_formula(text):
    text = _OR.sub(r"\\cup ", text)  # which lists nothing here
  if (marked := _MARKED.match(text)) is not None:
    text = marked[2]
  # A column with & is a matrix and stays one.
  column = _COLUMN.search(text)
  if column and "&" not in column[1]:
    joined = re.sub(r"\\\\|\\text\{[^{}]*\}|\\,", " ", column[1])
    text = text[: column.start()] + joined + text[column.end() :]
    text = re.sub(r"(?<=\d) +(?=\d)", "", text)
  # Before the rules, which make spaces of `\!` and `\,`: `1,\!234` would be
  # left as the list 1, 234.
  text = _GROUPED.sub(lambda run: re.sub(r"\D", "", run[0]), text)
  text = _unit_vectors(_conjunctions(_lines(text)))
  for pattern, replacement in _RULES:
    text = pattern.sub(replacement, text)
  text = _SPACES.sub(" ", program_notation.to_latex(text))
  text = _END.sub("", _braced(text).strip())
  # A box that closes once too often leaves its brace at the end.
  while text.endswith("}") and _surplus(text) > 0:
    text = text[:-1].rstrip()
  return notation.rewrite(strip_braces(text))
