r"""Writes functions as programs spell them, `sqrt(2)`, in LaTeX.

Also where a backslash was put before such a call, `\sqrt(2)`: LaTeX would take
the bracket alone for the argument.
"""

import re

from trd_jax.grading.math import brackets

# What stands for the argument, `{}`; of two, they are split at the comma.
_CALLS = {
  "sqrt": r"\sqrt{{{}}}",
  "cbrt": r"\sqrt[3]{{{}}}",
  "exp": r"e^{{{}}}",
  "abs": r"|{}|",
  "fabs": r"|{}|",
  "factorial": r"({})!",
  "floor": r"\lfloor {} \rfloor ",
  "ceil": r"\lceil {} \rceil ",
  "ceiling": r"\lceil {} \rceil ",
  "log2": r"\log_{{2}}({})",
  "log10": r"\log_{{10}}({})",
  "asin": r"\arcsin({})",
  "acos": r"\arccos({})",
  "atan": r"\arctan({})",
  "arcsin": r"\arcsin({})",
  "arccos": r"\arccos({})",
  "arctan": r"\arctan({})",
  "binomial": r"\binom{{{}}}{{{}}}",
  "binom": r"\binom{{{}}}{{{}}}",
  "comb": r"\binom{{{}}}{{{}}}",
  "choose": r"\binom{{{}}}{{{}}}",
  "frac": r"\frac{{{}}}{{{}}}",
  "pow": r"({})^{{{}}}",
  "log_e": r"\ln({})",
}
_TWO = frozenset(("binomial", "binom", "comb", "choose", "frac", "pow"))
_CALL = re.compile(
  rf"(?<![\\A-Za-z])(?:math\.|np\.)?\\?({'|'.join(_CALLS)})\s*\("
)
_BARE = re.compile(
  r"(?<![\\a-zA-Z])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc"
  r"|ln|log|pi)(?![a-zA-Z])"
)
# Of these the name alone says nothing.
_OF_SEVERAL = re.compile(
  r"(?:\\text\s*\{\s*|(?<![\\a-zA-Z]))(gcd|lcm|max|min)(?:\s*\})?(?=\s*(?:\(|\\\{))"
)
# Of numbers alone: C may be a point, too.
_CHOOSE = re.compile(r"(?<![\\A-Za-z])C\((\d+),\s*(\d+)\)")
_OF_SET = re.compile(r"\\(gcd|lcm|max|min)\s*\\\{([^{}]*)\\\}")
_CIS = re.compile(
  r"(?:\\text\s*\{\s*cis\s*\}|(?<![A-Za-z])\\?cis(?![A-Za-z]))\s*"
  r"(?:\(([^()]+)\)|\{([^{}]+)\}|((?:\\frac\{[^{}]*\}\{[^{}]*\}|\\?\w+|\^\\circ)+))"
)
_SQRT = re.compile(r"(?<![\\a-zA-Z])sqrt(?=\s*[\d{])")


def _cosine_and_sine(match: re.Match[str]) -> str:
  r"""Writes `\text{cis}60^\circ` as the complex number that it is."""
  angle = match[1] or match[2] or match[3]
  return rf"(\cos({angle})+ i \sin({angle}))"


def to_latex(text: str) -> str:
  """Returns a text with its calls and bare names of functions as LaTeX."""
  text = _CIS.sub(_cosine_and_sine, text)
  done, at = [], 0
  while (call := _CALL.search(text, at)) is not None:
    end = brackets.end_of(text, call.end() - 1)
    arguments = None
    if end > 0:
      arguments = [text[call.end() : end - 1]]
      if call[1] in _TWO:
        arguments = brackets.split(arguments[0], ",")
    if arguments is None or len(arguments) != 1 + (call[1] in _TWO):
      done.append(text[at : call.end()])
      at = call.end()
      continue
    done.append(text[at : call.start()])
    inner = [to_latex(argument.strip()) for argument in arguments]
    done.append(_CALLS[call[1]].format(*inner))
    at = end
  text = _OF_SEVERAL.sub(r"\\\1 ", "".join([*done, text[at:]]))
  text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
  text = _OF_SET.sub(r"\\\1(\2)", text)
  return _BARE.sub(r"\\\1 ", _SQRT.sub(r"\\sqrt", text))
