"""The tests of a code problem, in the formats that data sets write them in.

TACO, APPS     {"inputs": […], "outputs": […], "fn_name": …?}. Without
               `fn_name` both are texts (or lists of lines), for a program's
               standard input and output; with it an input is a list of
               arguments and an output the value, bare or as a list of one.
LiveCodeBench  [{"input": …, "output": …, "testtype": "stdin" | "functional"}];
               functional inputs are one JSON value a line. Private tests are
               base64 of zlib of a pickle, which is read without unpickling:
               only strings are taken out of it.

A problem that has a checker of its own ("special_judge": true) can't be graded
by comparison: `Tests.ungradable` says so.
"""

import base64
import binascii
import dataclasses
import io
import json
import pickletools
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from trd_jax.experiment.files import json_files

_MAX_UNPACKED = 1 << 30
_EXACT_DIGITS = 4000
# What a pickle of strings, and of a dict of strings, consists of.
_HARMLESS = {
  *("PROTO", "FRAME", "STOP", "MEMOIZE", "EMPTY_DICT", "MARK", "SETITEM"),
  *("SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
}
_TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
_METHOD = re.compile(r"^\s*def\s+([A-Za-z]\w*)\s*\(", re.MULTILINE)


class BadTests(ValueError):
  """Tests that can't be read; the text says why."""


@dataclasses.dataclass(frozen=True)
class Digits:
  """An integer with more digits than Python turns into one by default."""

  text: str


@dataclasses.dataclass(frozen=True)
class Case:
  """One test.

  Attributes:
    given: a program's standard input, or a JSON list of arguments.
    expected: its standard output as text, or the values that are right, any
      one of them.
  """

  given: str
  expected: str | tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Tests:
  """All tests of a problem.

  Attributes:
    cases: in their order.
    function: what to call, or None for a program with standard input.
    tolerant: whether decimals in a program's output may be off by a relative
      1e-5 (TACO and APPS), or must be the same number (LiveCodeBench).
    ungradable: why no comparison can tell right from wrong, or None.
  """

  cases: tuple[Case, ...]
  function: str | None
  tolerant: bool
  ungradable: str | None = None


def loads(text: str | bytes) -> Any:
  """Reads JSON with integers of any length, the long ones as `Digits`.

  Raises:
    ValueError: it is no JSON, or nested too deeply.
  """

  def integer(digits: str) -> int | Digits:
    # Python refuses to convert over 4,300 digits (its cost is quadratic), and
    # some tests have them; as text they can still be compared.
    return int(digits) if len(digits) <= _EXACT_DIGITS else Digits(digits)

  return json_files.loads(text, parse_int=integer)


def dumps(value: Any) -> str:
  """Writes the JSON that `loads` reads."""
  if isinstance(value, Digits):
    return value.text
  if isinstance(value, list):
    return f"[{', '.join(map(dumps, value))}]"
  if isinstance(value, dict):
    items = (f"{json.dumps(name)}: {dumps(v)}" for name, v in value.items())
    return f"{{{', '.join(items)}}}"
  return json.dumps(value)


def parse(tests: Any, about: Mapping[str, Any] | None = None) -> Tests:
  """Reads tests in any of the formats.

  Args:
    tests: JSON text, packed text, or what either holds.
    about: what else the source says: `fn_name` or `func_name`,
      `starter_code`, `metadata`, `special_judge`.

  Raises:
    BadTests: it is none of the formats, or holds no test.
  """
  about = dict(about or {})
  packed = False
  if isinstance(tests, str | bytes):
    tests, packed = _unpack(tests)
  # From the outside in: a row of TACO, a row of LiveCodeBench, an object that
  # holds the tests. What the caller says of the problem wins over what a row
  # says.
  if isinstance(tests, Mapping) and "input_output" in tests:
    inner = tests["input_output"]
    tests = _json(inner) if isinstance(inner, str) else inner
  if isinstance(tests, Mapping) and (parts := _row(tests)) is not None:
    about = dict(tests) | about
    tests = parts
  if isinstance(tests, Mapping) and "tests" in tests:
    about = dict(tests) | about
    tests = tests["tests"]
  if isinstance(tests, Mapping):
    found = _taco(dict(tests), about, tolerant=not packed)
  elif isinstance(tests, list):
    found = _livecodebench(tests, about)
  else:
    raise BadTests(f"tests are a {type(tests).__name__}, not an object or list")
  if not found.cases:
    raise BadTests("there is no test")
  if about.get("special_judge"):
    why = "the problem has a checker of its own"
    return dataclasses.replace(found, ungradable=why)
  return found


def _json(text: str | bytes) -> Any:
  try:
    return loads(text)
  except ValueError as error:
    raise BadTests(f"not JSON ({str(error)[:100]})") from None


def _unpack(text: str | bytes) -> tuple[Any, bool]:
  """Reads a test column's text: (content, whether it was packed)."""
  if isinstance(text, bytes):
    text = text.decode("utf-8", "replace")
  if text.lstrip()[:1] in ("{", "["):
    return _json(text), False
  try:
    packed = base64.b64decode(text, validate=True)
    inflate = zlib.decompressobj()
    # Bounded: a few packed kilobytes may unpack to any size.
    data = inflate.decompress(packed, _MAX_UNPACKED)
  except (binascii.Error, zlib.error, ValueError):
    raise BadTests("neither JSON nor packed tests") from None
  if not inflate.eof:
    raise BadTests(
      f"packed tests that are cut off, or over {_MAX_UNPACKED:,} bytes"
    )
  # Every pickle since protocol 2 begins so; anything else is packed JSON.
  if not data.startswith(b"\x80"):
    return _json(data), True
  texts = _texts_of(data)
  # A pickled dict of one entry.
  if len(texts) == 2 and texts[0] == "input_output":
    texts = texts[1:]
  if len(texts) != 1:
    raise BadTests("a pickle of something else than one text")
  return _json(texts[0]), True


def _texts_of(data: bytes) -> list[str]:
  """Takes the strings out of a pickle of strings; executes nothing in it."""
  texts = []
  try:
    # Only looked at, never loaded: loading a pickle runs what it names.
    for operation, argument, _ in pickletools.genops(io.BytesIO(data)):
      if operation.name in _TEXTS:
        texts.append(argument)
      elif operation.name not in _HARMLESS:
        raise BadTests(f"a pickle of more than texts: {operation.name}")
  except ValueError as error:
    if isinstance(error, BadTests):
      raise
    raise BadTests(f"a damaged pickle ({str(error)[:100]})") from None
  return texts


def _row(row: Mapping[str, Any]) -> list[Any] | None:
  """Reads a LiveCodeBench row's public and private tests; None: no row."""
  columns = ("public_test_cases", "private_test_cases")
  if not any(name in row for name in columns):
    return None
  tests: list[Any] = []
  for name in columns:
    part = row.get(name) or []
    content = _unpack(part)[0] if isinstance(part, str | bytes) else part
    if not isinstance(content, list):
      raise BadTests(f"{name} is a {type(content).__name__}, not a list")
    tests += content
  return tests


def _lines(value: Any, what: str) -> str:
  """Joins a program's input or output, which some rows have line by line."""
  if isinstance(value, list):
    value = "\n".join(map(str, value))
  if not isinstance(value, str):
    raise BadTests(f"an {what} is a {type(value).__name__}, not a text")
  return value


def _taco(
  tests: dict[str, Any], about: Mapping[str, Any], tolerant: bool
) -> Tests:
  inputs, outputs = tests.get("inputs"), tests.get("outputs")
  if not isinstance(inputs, list) or not isinstance(outputs, list):
    raise BadTests("no lists of inputs and outputs")
  if len(inputs) != len(outputs):
    raise BadTests(f"{len(inputs)} inputs and {len(outputs)} outputs")
  function = tests.get("fn_name") or about.get("fn_name")
  case = _program_case if function is None else _function_case
  pairs = zip(inputs, outputs, strict=True)
  return Tests(tuple(case(*pair) for pair in pairs), function, tolerant)


def _program_case(given: Any, expected: Any) -> Case:
  return Case(_lines(given, "input"), _lines(expected, "output"))


def _function_case(given: Any, expected: Any) -> Case:
  """Reads one test of a function.

  LiveCodeBench has texts, one JSON value a line; TACO has the values.
  """
  if isinstance(given, str):
    lines = [_json(line) for line in given.split("\n") if line.strip()]
    if not isinstance(expected, str):
      raise BadTests("a function's input is a text and its output is none")
    return Case(dumps(lines), (_json(expected),))
  arguments = given if isinstance(given, list) else [given]
  # Some rows wrap the value in a list and some return a list of one: either is
  # right.
  if isinstance(expected, list) and len(expected) == 1:
    return Case(dumps(arguments), (expected, expected[0]))
  return Case(dumps(arguments), (expected,))


def _livecodebench(tests: Iterable[Any], about: Mapping[str, Any]) -> Tests:
  cases, kinds = [], set()
  for test in tests:
    if not isinstance(test, Mapping) or not {"input", "output"} <= test.keys():
      raise BadTests("a test without input and output")
    functional = test.get("testtype", "stdin") != "stdin"
    kinds.add(functional)
    case = _function_case if functional else _program_case
    cases.append(case(test["input"], test["output"]))
  if len(kinds) > 1:
    raise BadTests("tests of programs and of functions in one problem")
  function = _function(about) if True in kinds else None
  if True in kinds and function is None:
    raise BadTests("tests of a function whose name nothing says")
  return Tests(tuple(cases), function, tolerant=False)


def _function(about: Mapping[str, Any]) -> str | None:
  """Finds the function's name in what the source says of the problem."""
  metadata = about.get("metadata")
  if isinstance(metadata, str):
    try:
      metadata = json_files.loads(metadata)
    except ValueError:
      metadata = None
  for place in (about, metadata if isinstance(metadata, Mapping) else {}):
    for name in ("fn_name", "func_name"):
      if isinstance(place.get(name), str) and place[name]:
        return place[name]
  starter = about.get("starter_code")
  methods = _METHOD.findall(starter) if isinstance(starter, str) else []
  # Starter code has the method to write last, after its helpers.
  public = [name for name in methods if not name.startswith("_")]
  return public[-1] if public else None
