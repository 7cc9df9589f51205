r"""Takes off how an answer looks: fonts, sizes, colours, spaces, end marks.

`plain` leaves the content of `\mathbf{204}`, `{\bf 204}`, `\color{red}{204}` or
`\Large 204`. Words keep one mark that they are text, `\text{cm}`, whatever font
they were in: a run of bare letters would be a product.
"""

import re

from trd_jax.grading.math import brackets

# Commands whose argument is content,
_FONTS = (
  "math(?:rm|bf|it|sf|tt|normal|bfit|op|ord|inner)|boldsymbol|bm|pmb|bold|text"
  "|text(?:bf|it|rm|normal|sf|tt|sc|sl|up|md)|emph|mbox|hbox|operatorname"
)
_WRAPPERS = "ensuremath|underline|uline|smash|bbox|framebox|mathclap|underbrace"
# content after an argument or two that say how,
_WITH_SETTING = (
  "textcolor|colorbox|scalebox|raisebox|rotatebox|style|class|cssId|href"
  "|enclose"
)
_WITH_TWO = "fcolorbox"
# and no content.
_DROPPED = "tag|label|[hv]space|[hv]?phantom|color|mathversion|[bx]?cancel|sout"
# Declarations, which hold up to the end of their group.
_DECLARED = (
  "bf|rm|it|sf|tt|sc|sl|em|(?:bf|md)series|(?:it|up|sl|sc)shape"
  "|(?:rm|sf|tt)family|boldmath"
)
_SIZES = (
  "tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge"
)
_BARE_DROPPED = (
  "nonumber|notag|hfill|strut|mathstrut|selectfont|script(?:script)?style"
)

_COMMAND = re.compile(
  rf"\\(?:(?P<font>{_FONTS})|(?P<wrapper>{_WRAPPERS})|(?P<dropped>{_DROPPED})"
  rf"|(?P<setting>{_WITH_SETTING})|(?P<two>{_WITH_TWO}))\*?(?![a-zA-Z])"
)
_SETTINGS = {"setting": 1, "two": 2}
_GROUP = re.compile(rf"\{{\s*\\(?:{_DECLARED})(?![a-zA-Z])")
_BARE = re.compile(
  rf"\\(?:{_BARE_DROPPED}|{_SIZES}|{_DECLARED})(?![a-zA-Z])"
  # Spaces whose length follows without braces,
  r"|\\(?:[hm]?skip|m?kern)\s*-?[\d.]+\s*(?:em|ex|pt|mu|cm|mm|in)\b"
  # and scripts of digits, which are alphabets for letters only.
  r"|\\math(?:bb|cal|scr|frak)(?=\s*\{?\s*\d)"
  r"|\\rule(?:\[[^\]]*\])?\{[^{}]*\}\{[^{}]*\}"
)
# A box, a tick or QED after the answer, with what is put before it.
_END_MARKS = re.compile(
  r"(?:\s|\\q?quad(?![a-z])|\\hfill(?![a-z])|\\[,;:! ]|\$"
  r"|\\(?:blacksquare|square|Box|qed|qedsymbol|checkmark|bigstar|star|surd"
  r"|blacktriangle|Diamond)(?![a-zA-Z])|[∎■□▪✓✔✅☑🎉])+\Z"
)
_OPTION = re.compile(r"\s*\[[^\]]*\]")
_WORD = re.compile(r"[A-Za-z]{2,}")
_LETTER = re.compile(r"[A-Za-z]")
_COMMANDS = re.compile(r"\\[A-Za-z]+")
# What makes letters beside it variables, and not the names of units.
_FORMULA = re.compile(r"[-+=<>^_!|*/\d,]|\\[A-Za-z]")
# And what no words stand beside, so that short runs of letters are products.
_SURE_FORMULA = re.compile(
  r"[+=<>]|-\s*\d|\\(?:frac|sqrt|cdot|binom|triangle|angle|overline"
  r"|vec)(?![a-z])"
)
_NO_PRODUCT = re.compile(
  r"[A-Za-z]{4}|\b(?:and|or|is|are|the|not?|if|for|all|any|to|of|in|cm|mm|km|ft)\b"
)
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}")
# One unit, perhaps of a quotient or a power: m, m/s, m^2.
_ONE_UNIT = re.compile(
  r"\s*(?:[A-Za-z](?:\s*/\s*[A-Za-z])?|(?:[A-Za-z]\s*/\s*)?[ms]\^\{?\d\}?)\s*\Z"
)
_TEXT = re.compile(r"\\text\s*\{[^{}]*\}")


def _group(text: str, at: int) -> tuple[str | None, int]:
  """Reads the group in braces at `at`, if one is there, and where it ends."""
  while at < len(text) and text[at].isspace():
    at += 1
  if at == len(text) or text[at] != "{":
    return None, at
  end = brackets.end_of(text, at)
  return (None, at) if end < 0 else (text[at + 1 : end - 1], end)


def _as_text(content: str) -> str:
  r"""Writes what stood in a font as words, `\text{…}`, or as mathematics."""
  # What is marked as text within it stays so.
  bare = _ENVIRONMENT.sub(" ", _TEXT.sub(" ", content))
  words = _COMMANDS.sub(" ", bare)
  are_words = _WORD.search(words) and not (
    _SURE_FORMULA.search(bare) and not _NO_PRODUCT.search(words)
  )
  if are_words or _ONE_UNIT.match(content):
    return f"\\text{{{content}}}"
  is_formula = _FORMULA.search(bare) is not None or bare != content
  return content if is_formula else f"\\text{{{content}}}"


def _is_text(content: str) -> bool:
  r"""Returns whether one `\text{…}` is all that there is."""
  bare = content.strip()
  return bare.startswith("\\text{") and brackets.end_of(bare, 5) == len(bare)


def _as_one(before: str, content: str, after: str) -> str:
  """Returns a content, in braces where it is, or has, a script."""
  single = before.rstrip()[-1:] in ("^", "_") or after.lstrip()[:1] in (
    "^",
    "_",
  )
  if single and not content.startswith("\\text{") and len(content) > 1:
    return f"{{{content}}}"
  return content


def plain(text: str) -> str:
  """Returns an answer without styles: words as text, all else bare.

  Args:
    text: LaTeX as a model or a data set wrote it.
  """
  bare = _END_MARKS.sub("", text)
  # A star or a square above or below a letter is part of its name.
  if bare and not bare.endswith(("^", "_")):
    text = bare
  return _unstyled(text) if "\\" in text else text


def _unstyled(text: str) -> str:
  done, at = "", 0
  while True:
    command, group = _COMMAND.search(text, at), _GROUP.search(text, at)
    if group and (not command or group.start() < command.start()):
      end = brackets.end_of(text, group.start())
      if end < 0:  # a brace that never closes
        break
      done += text[at : group.start()]
      content = _as_text(_unstyled(text[group.end() : end - 1]).strip())
    elif command:
      done += text[at : command.start()]
      kind, at = command.lastgroup or "", command.end()
      if kind != "font" and (option := _OPTION.match(text, at)):
        at = option.end()
      for _ in range(_SETTINGS.get(kind, 0)):
        _, at = _group(text, at)
      argument, end = _group(text, at)
      # `\color{red} 5` has one, and a font before a single token none.
      if argument is None or kind == "dropped":
        at = at if argument is None else end
        continue
      content = _unstyled(argument)
      if kind == "font" and not _is_text(content):
        content = _as_text(content)
    else:
      break
    done, at = done + _as_one(done, content, text[end:]), end
  return _BARE.sub(" ", done + text[at:])
