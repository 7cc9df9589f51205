"""What of a Hugging Face model folder isn't weights, and its atomic writing."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trd_jax import json_text
from trd_jax.errors import UserError
from trd_jax.model.config import ModelConfig

CONFIG = "config.json"
_TEMPLATE = "chat_template.jinja"
# What beside config.json and the weights belongs to a model folder.
_COMPANIONS = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  _TEMPLATE,
  "generation_config.json",
)
_TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@contextlib.contextmanager
def atomic_folder(folder: Path | str) -> Iterator[Path]:
  """A folder to fill that becomes `folder` at the end of the block.

  Readers see what was there before, the whole new folder, or, for the moment
  between two renames, none. Where the block raises, nothing changes. What a
  killed process left is cleared away; where it had come between the renames,
  what was there before is put back first.
  """
  folder = Path(folder)
  folder.parent.mkdir(parents=True, exist_ok=True)
  unfinished = folder.with_name(f".{folder.name}.tmp")
  former = folder.with_name(f".{folder.name}.old")
  _clear(folder, unfinished, former)
  unfinished.mkdir()
  try:
    yield unfinished
    readers = unfinished.stat().st_mode & 0o444
    for path in [*unfinished.rglob("*"), unfinished]:
      # safetensors makes files for their owner alone.
      path.chmod(path.stat().st_mode | readers)
      _flush(path)
    if folder.exists():
      folder.rename(former)
    unfinished.rename(folder)
    _flush(folder.parent)  # before what was there is deleted
  finally:
    _clear(folder, unfinished, former)


def _clear(folder: Path, unfinished: Path, former: Path) -> None:
  """Ends a replacement, wherever it was stopped."""
  if former.exists() and not folder.exists():
    former.rename(folder)
  for left_over in (unfinished, former):
    shutil.rmtree(left_over, ignore_errors=True)


def _flush(path: Path) -> None:
  """Waits until a file, or the names in a folder, are on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def copy_companions(
  source: Path | str, out: Path, chat_template: Path | str | None = None
) -> None:
  """Copies a tokenizer, its chat template and the generation config.

  Args:
    source: a model's or a tokenizer's folder.
    out: the folder to copy them to.
    chat_template: a jinja file to put in the place of the source's template.
  """
  for name in _COMPANIONS:
    if (Path(source) / name).exists():
      shutil.copyfile(Path(source) / name, out / name)
  if chat_template is not None:
    shutil.copyfile(chat_template, out / _TEMPLATE)


def token_ids(source: Path | str) -> dict[str, Any]:
  """The special tokens' ids that a folder's config.json names, if any."""
  path = Path(source) / CONFIG
  fields = read_json(path) if path.exists() else {}
  return {name: fields[name] for name in _TOKEN_FIELDS if name in fields}


def read_config(folder: Path | str) -> ModelConfig:
  """The shape of the model in a folder.

  Raises:
    UserError: `config.json` is missing, no JSON, or of an unknown
      architecture.
  """
  fields = read_json(Path(folder) / CONFIG)
  try:
    return ModelConfig.from_hf(fields)
  except UserError as error:
    raise UserError(f"{folder}/{error}") from error


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object.

  Raises:
    UserError: the file is missing or holds something else.
  """
  try:
    fields = json_text.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"{path} is missing; name a folder that has it") from None
  except (OSError, ValueError) as error:
    raise UserError(f"{path} can't be read ({error}); fetch it again") from None
  if not isinstance(fields, dict):
    raise UserError(f"{path} holds no JSON object; fetch it again")
  return fields


def write_json(path: Path, value: Any) -> None:
  """Writes JSON into a folder that isn't visible yet."""
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
