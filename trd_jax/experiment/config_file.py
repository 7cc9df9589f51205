"""Loads a config file: Python with a `get_config`, or a run's config.json."""

import ast
import inspect
import linecache
import re
import runpy
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from trd_jax.experiment import declarations
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import KEYS, unknown_key
from trd_jax.experiment.files import json_files


def load(spec: str) -> tuple[dict[str, Any], str]:
  """Loads the values that a config file sets.

  Args:
    spec: FILE.py, FILE.py:ARG (ARG is handed to its `get_config`), or a
      config.json of a run directory.

  Returns:
    The config's values by dotted key, and the file's name for errors.

  Raises:
    UserError: there is no such file, it holds no config, or it fails. An
      assignment to an unknown key, or of an ill-typed value, is reported with
      its line, the key and the nearest right name.
  """
  name, _, arg = spec.partition(":")
  path = Path(name)
  if not path.is_file():
    raise UserError(
      f"--config={spec}: there is no file {name}; name one of configs/*.py or "
      "a run's config.json"
    )
  if path.suffix == ".json":
    config = json_files.read_json(path, "name a run's config.json")
  else:
    config = _load_python(path, arg)
  if isinstance(config, config_dict.ConfigDict):
    config = config.to_dict()
  if not isinstance(config, Mapping):
    raise UserError(
      f"{name}: it must give a ConfigDict, not a {type(config).__name__}"
    )
  return declarations.flatten(config), name


def expected(spec: str) -> str | None:
  """Reads what a config file's docstring, its experiment card, expects.

  Args:
    spec: as for `load`.

  Returns:
    The card's paragraph that begins with "Expected", on one line; None without
    one.
  """
  path = Path(spec.partition(":")[0])
  if path.suffix != ".py":
    return None
  # Parsed and not run: a config's code is run once, with its argument.
  card = ast.get_docstring(ast.parse(path.read_bytes())) or ""
  for paragraph in card.split("\n\n"):
    if paragraph.startswith("Expected"):
      return " ".join(paragraph.split())
  return None


def _load_python(path: Path, arg: str) -> Any:
  """Runs a config file and calls its `get_config`.

  Raises:
    UserError: the file or the function fails, or gives no config.
  """
  try:
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
      raise UserError("it defines no get_config")
    if not inspect.signature(get_config).parameters:
      if arg:
        raise UserError(f'its get_config takes no argument (":{arg}")')
      return get_config()
    return get_config(arg or None)
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  # `sys.exit` in it would end the stage without a word.
  except (Exception, SystemExit) as error:
    raise _failure(path, error) from error


def _failure(path: Path, error: BaseException) -> UserError:
  """Returns the error, in one line, about a config file that failed."""
  frames = traceback.extract_tb(error.__traceback__)
  # The last frame in the file itself: below it are libraries, and their lines
  # say nothing to who wrote the config.
  lines = [frame.lineno for frame in frames if frame.filename == str(path)]
  line = lines[-1] if lines else getattr(error, "lineno", None)
  where = f"{path}:{line}" if line else str(path)
  if frames and "ml_collections" in frames[-1].filename:
    written = _complained_of(
      str(error), linecache.getline(str(path), line or 0)
    )
    inside = [key for key in KEYS if key.endswith(f".{written}")]
    unclear = written not in KEYS and len(inside) == 1
    name = inside[0] if unclear else written
    if isinstance(error, TypeError) and name in KEYS:
      return UserError(f"{where}: {KEYS[name].must_be()}")
    # As it is written there: without its section it is no key either.
    if written and not isinstance(error, TypeError):
      return unknown_key(written, where)
    if name and name not in KEYS:
      return unknown_key(name, where)
  what = " ".join(str(error).split())
  return UserError(f"{where}: {type(error).__name__}: {what}")


def _complained_of(complaint: str, source_line: str) -> str:
  """Returns the dotted key that a ConfigDict's error is about, '' for none.

  The error names the key's last part only. The line that raised it, such as
  `config.train.epochs = 1`, has the rest.
  """
  # ml_collections says it only in words, and differently for each mistake.
  quoted = re.search(r"""["'](\w+)["'\\]""", complaint)
  if quoted is None:
    return ""
  last = quoted[1]
  dotted = re.search(rf"\w+\.((?:\w+\.)*{last})\b", source_line)
  return dotted[1] if dotted else last
