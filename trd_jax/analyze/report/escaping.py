"""Text of models and data sets inside a page: never markup, never script.

Every such text reaches the page as JSON, or as HTML that `text` has escaped.
Control characters and those that turn the direction of text around are spelt
out in JSON, so that the files hold none, and shown by name in HTML; for JSON
the page's script shows them (`visible.js`).
"""

import html
import json
import math
import re
from typing import Any

# What could end a script's element or a comment, and what ends a line in
# older JavaScript; controls, and what reorders or hides text.
_UNSAFE = re.compile(
  "[<>&\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff"
  "\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)
_HIDDEN = re.compile(
  "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e"
  "\u2060-\u2069\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)


def json_text(value: Any) -> str:
  """Returns JSON that may stand in a script's element, or in a script.

  A number that is none (NaN, infinite) becomes null. What is unsafe can stand
  in strings alone, so that it is spelt as JSON spells it there.
  """
  try:
    made = json.dumps(
      value, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )
  except ValueError:
    made = json.dumps(
      _finite(value),
      ensure_ascii=False,
      allow_nan=False,
      separators=(",", ":"),
    )
  return _UNSAFE.sub(_spelt, made)


def text(value: Any) -> str:
  """Returns text as HTML that shows it: markup escaped, controls by name."""
  escaped = html.escape(str(value))
  return _HIDDEN.sub(
    lambda found: f'<span class="hidden">{_name(found[0])}</span>', escaped
  )


def _spelt(found: re.Match[str]) -> str:
  code = ord(found[0])
  if code < 0x10000:
    return f"\\u{code:04x}"
  code -= 0x10000
  return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"


def _name(character: str) -> str:
  code = ord(character)
  if code < 0x20:
    return chr(0x2400 + code)
  return "\u2421" if code == 0x7F else f"U+{code:04X}"


def _finite(value: Any) -> Any:
  """Returns a value with null in place of numbers that are none."""
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, dict):
    return {key: _finite(one) for key, one in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(one) for one in value]
  return value
