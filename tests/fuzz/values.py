"""Strategies for what a stranger may have put anywhere."""

import json
from typing import Any

from hypothesis import strategies as st

# Texts that mean something to some reader, beside those that mean nothing.
_TEXTS = (
  *("", " ", "\0", "\n", "\x1b[31m", "é", "\ud800", "\u2028", "../../x", "/"),
  *("nan", "inf", "-inf", "1e308", "1e999", "-0.0", "None", "true", "0x10"),
  *("1" * 5000, "9" * 20, "١٢", "1_000", "{{ x }}", "[[[[", '{"a": 1}', "%s"),
  *("<|im_end|>", "<think>", "\\boxed{", "float32", "a" * 10_000),
)
texts = st.one_of(
  st.sampled_from(_TEXTS),
  st.text(max_size=20),
  st.text(st.characters(categories=["Cs", "Cc", "L", "N"]), max_size=8),
)
numbers = st.one_of(
  st.sampled_from(
    [0, -1, 1, 2, 2**31 - 1, 2**31, 2**63, 10**18, 10**100, -(10**18), 7]
  ),
  st.integers(),
  st.sampled_from([0.0, -0.0, 0.5, 1e308, 5e-324, -1.5, 1e18]),
  st.sampled_from([float("nan"), float("inf"), float("-inf")]),
  st.floats(),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
anything = st.one_of(
  scalars,
  st.recursive(
    scalars,
    lambda inner: (
      st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4)
    ),
    max_leaves=6,
  ),
)


@st.composite
def mutated(draw, *bases, values=anything):
  """An object of JSON's, with a few fields replaced, removed or added.

  A field is named by its path, so that what is nested is changed, too.
  """
  fields = json.loads(json.dumps(draw(st.sampled_from(bases))))
  for _ in range(draw(st.integers(1, 3))):
    inside: Any = fields
    while True:
      names = [*inside] if isinstance(inside, dict) else [*range(len(inside))]
      if not names:
        break
      name = draw(st.sampled_from(names))
      if isinstance(inside[name], dict | list) and draw(st.booleans()):
        inside = inside[name]
        continue
      how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
      if how == "replace":
        inside[name] = draw(values)
      elif how == "remove":
        del inside[name]
      elif isinstance(inside, dict):
        inside[draw(texts)] = draw(values)
      break
  return fields


def as_json(value) -> bytes:
  """What a file of JSON holds; half surrogates stand as escapes in it."""
  return json.dumps(value).encode()


@st.composite
def damaged(draw, contents):
  """Bytes of a file that a few accidents have happened to."""
  data = bytearray(draw(contents))
  for _ in range(draw(st.integers(0, 3))):
    if not data:
      break
    at = draw(st.integers(0, len(data) - 1))
    how = draw(st.sampled_from(["cut", "flip", "put", "twice"]))
    if how == "cut":
      del data[at:]
    elif how == "flip":
      data[at] ^= draw(st.integers(1, 255))
    elif how == "put":
      data[at:at] = draw(
        st.sampled_from(
          [
            b"\xff\xfe",
            b"\xef\xbb\xbf",
            b"\0",
            b"\r\n",
            b"\xed\xa0\x80",
            b"[" * 5000,
          ]
        )
      )
    else:
      data += data[at:]
  return bytes(data)
