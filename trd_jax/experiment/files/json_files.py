"""Reads JSON files with one kind of error, and writes them whole."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trd_jax.experiment.errors import UserError, one_line
from trd_jax.experiment.files.atomic_files import atomic_file


def loads(
  text: str | bytes, parse_int: Callable[[str], Any] | None = None
) -> Any:
  """Parses JSON as `json.loads`, with one kind of error.

  Raises:
    ValueError: the text is no JSON, or nested too deeply.
  """
  try:
    return json.loads(text, parse_int=parse_int)
  except RecursionError:  # how the parser gives up on deep nesting
    raise ValueError("nested too deeply") from None


def own_loads(text: str | bytes) -> Any:
  """Parses JSON that a stage wrote.

  Raises:
    ValueError: the text is no JSON, nested too deeply, or has what no stage
      writes: a NaN, an infinity, or a key that comes twice.
  """
  try:
    return json.loads(
      text, parse_constant=_refuse, object_pairs_hook=_without_twins
    )
  except RecursionError:
    raise ValueError("nested too deeply") from None


def _refuse(constant: str) -> Any:
  raise ValueError(f"{constant} is no number of JSON")


def _without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  """Makes an object of its pairs, whose keys must differ."""
  made = dict(pairs)
  if len(made) != len(pairs):
    raise ValueError("a key comes twice")
  return made


def read_json(path: Path, remedy: str = "remove it") -> dict[str, Any]:
  """Reads a JSON object that a stage wrote.

  What no stage writes is damage: a NaN, an infinity, or a key that comes twice.

  Args:
    path: the file.
    remedy: what to do where it is damaged.

  Raises:
    UserError: the file is absent or damaged; the line is named.
  """
  if not path.exists():
    raise UserError(f"{path} is not there: run its stage first")
  value = _read(path, remedy, own_loads)
  if not isinstance(value, dict):
    raise UserError(f"{path}: holds no JSON object; {remedy}")
  return value


def read_object(path: Path, remedy: str = "fetch the file again") -> dict:
  """Reads a JSON object that others wrote, such as a model's config.

  Args:
    path: the file.
    remedy: what to do where it is damaged.

  Raises:
    UserError: the file is absent or damaged, or holds something else.
  """
  value = _read(path, remedy, loads)
  if not isinstance(value, dict):
    raise UserError(f"{path}: holds no JSON object; {remedy}")
  return value


def _read(path: Path, remedy: str, parse: Callable[[bytes], Any]) -> Any:
  try:
    return parse(path.read_bytes())
  except FileNotFoundError:
    why, remedy = "the file is missing", "name a folder that has it"
  except OSError as error:
    why = error.strerror
  except ValueError as error:  # says the line
    why = one_line(error)
  raise UserError(f"{path}: can't be read as JSON ({why}); {remedy}")


def write_json(path: Path, value: Any) -> None:
  """Writes JSON so that a reader sees the old file or the new, whole.

  Raises:
    TypeError: the value is not JSON-serialisable.
    ValueError: the value holds a NaN or an infinity.
  """
  # `allow_nan=False`: NaN is no JSON, and other programs would refuse the file.
  # It is refused here, where the number comes from.
  text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
  with atomic_file(path) as file:
    file.write((text + "\n").encode())
