"""LiveCodeBench: programs to write, with public and private tests.

`Problem.tests` is what the benchmark's own runner calls `input_output`, as
JSON: `inputs` and `outputs`, texts both, and `fn_name`, null where a program
reads its standard input. With a function's name each line of an input is one
argument as JSON and the output is the result as JSON.

In the hub's files the private tests are a compressed pickle of one text.
Nothing is ever unpickled: `plain_pickle` reads the few instructions that make
texts and flat dicts of texts and refuses all others.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import pickletools
import re
import zlib
from collections.abc import Mapping
from typing import Any

from trd_jax.problems import rows
from trd_jax.records import Problem

_MOST_BYTES = 1 << 30  # of one problem's tests
_METHOD = re.compile(r"^\s+def\s+(?!__)(\w+)\s*\(\s*self\b", re.MULTILINE)
_FUNCTION = re.compile(r"^def\s+(\w+)\s*\(", re.MULTILINE)
_FUNCTIONAL = "Keep to this code, which names what is called:"
_STANDARD_INPUT = (
  "The program reads standard input and writes to standard output."
)
# In one published copy a statement stands between these, with a format.
_QUESTION, _FORMAT = "### Question:", "### Format:"
_FENCED = re.compile(r"```python\n(.*?)\n?```", re.DOTALL)
_TEXTS = frozenset({"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"})
_NO_EFFECT = frozenset(
  {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"}
)


def problem(row: Mapping[str, Any], name: str) -> Problem:
  """A row of the hub's files, or of two published copies of some of them.

  The copies: `content` with all tests in `test` (and `labels`), and `problem`
  with the public ones in `tests`.

  Raises:
    rows.BadRow: a column is missing, or its tests can't be read.
  """
  if "question_content" in row:
    text, starter = row["question_content"], row.get("starter_code") or ""
    tests = [
      *_cases(row.get("public_test_cases"), "public_test_cases"),
      *_cases(row.get("private_test_cases"), "private_test_cases"),
    ]
    called = _object(row.get("metadata") or "{}", "metadata").get("func_name")
    keys = ("question_id", "platform", "difficulty", "contest_date")
    meta = {key: str(row[key]) for key in keys if row.get(key) is not None}
  elif "content" in row:
    text, starter = _unwrapped(rows.statement({"problem": row["content"]}))
    packed = plain_pickle(_unpacked(row.get("test"), "test"))
    if not isinstance(packed, dict) or "input_output" not in packed:
      raise rows.BadRow("test holds no input_output")
    found = _object(packed["input_output"], "input_output")
    called = found.get("fn_name")
    tests = _paired(found.get("inputs"), found.get("outputs"))
    labels = _object(row.get("labels") or "{}", "labels")
    keys = ("difficulty", "category")
    meta = {key: labels[key] for key in keys if key in labels}
    meta["question_id"] = str(labels.get("task_id", row.get("id")))
  else:
    text, starter = row.get("problem"), row.get("starter_code") or ""
    tests = _cases(row.get("tests"), "tests")
    functional = any(case.get("testtype") == "functional" for case in tests)
    called, meta = _called(starter) if functional else None, {}
  if not tests:
    raise rows.BadRow("no tests")
  where = (
    f"{_FUNCTIONAL}\n\n```python\n{starter.rstrip()}\n```"
    if starter.strip()
    else _STANDARD_INPUT
  )
  statement = rows.statement({"problem": text})
  built = rows.to_problem(
    {},
    name,
    text=f"{statement}\n\n{where}",
    answer="",
    domain="code",
    tests=json.dumps(
      {
        "inputs": [case["input"] for case in tests],
        "outputs": [case["output"] for case in tests],
        "fn_name": called,
      }
    ),
  )
  own = {"problem_id": f"{name}-{meta['question_id']}"} if meta else {}
  return dataclasses.replace(
    built, meta=json.dumps(meta, sort_keys=True), **own
  )


def plain_pickle(data: bytes) -> str | dict[str, str]:
  """The text, or flat dict of texts, that a pickle holds; nothing is run.

  Raises:
    rows.BadRow: it holds anything else, or is damaged.
  """
  stack: list[Any] = []
  try:
    for opcode, argument, _ in pickletools.genops(data):
      if opcode.name in _NO_EFFECT:
        continue
      if opcode.name in _TEXTS:
        stack.append(argument)
      elif opcode.name == "EMPTY_DICT":
        stack.append({})
      elif opcode.name == "MARK":
        stack.append(None)
      elif opcode.name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        _put(stack[-1], key, value)
      elif opcode.name == "SETITEMS":
        mark = len(stack) - 1 - stack[::-1].index(None)
        for at in range(mark + 1, len(stack), 2):
          _put(stack[mark - 1], stack[at], stack[at + 1])
        del stack[mark:]
      elif opcode.name == "STOP":
        if len(stack) == 1 and isinstance(stack[0], str | dict):
          return stack[0]
        break
      else:
        raise rows.BadRow(
          f"its tests are a pickle with {opcode.name}, which is not read"
        )
  except (ValueError, IndexError, AttributeError, TypeError) as error:
    raise rows.BadRow(f"its tests are no pickle of texts ({error})") from None
  raise rows.BadRow("its tests are no pickle of texts")


def _put(into: Any, key: Any, value: Any) -> None:
  if not (isinstance(key, str) and isinstance(value, str)):
    raise ValueError("a dict of other things than texts")
  into.update({key: value})


def _unpacked(value: Any, column: str) -> bytes:
  """Bytes of a base64 text of zlib's."""
  if not isinstance(value, str):
    raise rows.BadRow(f"no {column}")
  try:
    stream = zlib.decompressobj()
    data = stream.decompress(base64.b64decode(value), _MOST_BYTES)
  except (binascii.Error, ValueError, zlib.error) as error:
    raise rows.BadRow(f"{column} can't be unpacked ({error})") from None
  if not stream.eof:
    raise rows.BadRow(f"{column} is cut, or over {_MOST_BYTES >> 30} GiB")
  return data


def _cases(value: Any, column: str) -> list[dict[str, Any]]:
  """Tests from a list, its JSON, or that packed as the hub's files have it."""
  if isinstance(value, str) and not value.lstrip().startswith("["):
    value = plain_pickle(_unpacked(value, column))
  if isinstance(value, str):
    try:
      value = json.loads(value)
    except ValueError as error:
      raise rows.BadRow(f"{column} is not JSON ({error})") from None
  if not isinstance(value, list):
    raise rows.BadRow(f"no {column}")
  for case in value:
    if not isinstance(case, dict) or not (
      isinstance(case.get("input"), str) and isinstance(case.get("output"), str)
    ):
      raise rows.BadRow(f"{column} has a test without input and output")
  return value


def _paired(inputs: Any, outputs: Any) -> list[dict[str, Any]]:
  if not (isinstance(inputs, list) and isinstance(outputs, list)):
    raise rows.BadRow("input_output has no inputs and outputs")
  if len(inputs) != len(outputs):
    raise rows.BadRow(f"{len(inputs)} inputs but {len(outputs)} outputs")
  pairs = zip(inputs, outputs, strict=True)
  return [{"input": given, "output": wanted} for given, wanted in pairs]


def _object(text: Any, column: str) -> dict[str, Any]:
  try:
    value = json.loads(text) if isinstance(text, str) else text
  except ValueError as error:
    raise rows.BadRow(f"{column} is not JSON ({error})") from None
  if not isinstance(value, dict):
    raise rows.BadRow(f"{column} is no JSON object")
  return value


def _unwrapped(content: str) -> tuple[str, str]:
  """Statement and starter code of a copy that wraps them in a prompt."""
  question = content.rpartition(_QUESTION)[2]
  text, mark, form = question.rpartition(_FORMAT)
  if not mark:
    return question.strip(), ""
  code = _FENCED.search(form)
  starter = code[1] if code and "def " in code[1] else ""
  return text.strip(), starter


def _called(starter: str) -> str:
  """The name of the function that starter code declares."""
  found = _METHOD.search(starter) or _FUNCTION.search(starter)
  if found is None:
    raise rows.BadRow("starter_code names no function")
  return found[1]
