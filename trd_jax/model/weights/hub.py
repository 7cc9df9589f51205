"""Finds the folder on this machine for a model path of a config."""

import difflib
import hashlib
import importlib.resources
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trd_jax.experiment.errors import UserError, one_line
from trd_jax.experiment.run_dir import RunDir

_LAB = "lab:"
_RANDOM = "random:"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
"""What of a model is small: its config and its tokenizer."""
HUB_FILES = (*TOKENIZER_FILES, "*.safetensors")

# A revision reads small files whole and of large ones so many blocks, evenly
# spread: enough to tell two fine-tunes of one model apart, and quick.
_WHOLE_BYTES = 32 * 2**20
_BLOCKS = 256
_BLOCK_BYTES = 4096
# A fingerprint reads all of a large file, in pieces that cores share.
_PIECE_BYTES = 64 * 2**20


def model_folder(
  path: str,
  run_dir: RunDir | None = None,
  revision: str | None = None,
  files: Sequence[str] = HUB_FILES,
) -> Path:
  """Returns the folder with a model's config.json and safetensors.

  Args:
    path: 'lab:student' and 'lab:teacher' ship with this package;
      'random:<size>' is what `trd_jax.convert` made in the run directory;
      else a folder, or a hub id, which is downloaded (or found in the cache).
    run_dir: the run directory, for 'random:<size>'.
    revision: a hub id's commit, tag or branch.
    files: patterns of what is downloaded.

  Raises:
    UserError: there is no such model, or it cannot be downloaded.
  """
  if path.startswith(_LAB):
    return _lab_folder(path)
  if path.startswith(_RANDOM):
    return _random_folder(path, run_dir)
  # A folder wins over the hub: what lies here under that name is meant.
  if (folder := Path(path)).is_dir():
    if not (folder / "config.json").is_file():
      raise UserError(f"{path} has no config.json: it is no model folder")
    return folder
  if is_hub_id(path):
    return _download(path, revision, files)
  if folder.exists():
    raise UserError(
      f'there is no model "{path}": it is a file; name the folder that holds'
      " config.json, tokenizer and safetensors"
    )
  if near := near_folder(path):
    raise UserError(f'there is no model "{path}"; did you mean "{near}"?')
  raise UserError(
    f'there is no model "{path}": name a folder, a hub id (Qwen/Qwen3-8B), '
    "lab:student, lab:teacher, or random:<size>"
  )


def is_hub_id(path: str) -> bool:
  """Returns whether a path can only be a hub id: no file here is called so."""
  return (
    _HUB_ID.fullmatch(path) is not None
    and not path.startswith(".")
    and not Path(path).exists()
  )


def near_folder(path: str) -> str | None:
  """Returns a folder that is spelt nearly as `path`, which isn't there."""
  here, absent = Path(path), []
  while not here.is_dir() and here != here.parent:
    absent.append(here.name)
    here = here.parent
  # From the last part that exists downwards: each part that doesn't is replaced
  # by its nearest neighbour, or the search is over.
  for name in reversed(absent):
    try:
      there = [one.name for one in here.iterdir() if one.is_dir()]
    except OSError:
      return None
    near = name if name in there else nearest(name, there)
    if near is None:
      return None
    here /= near
  return str(here) if absent else None


def nearest(name: str, names: Iterable[str]) -> str | None:
  """Returns the one of `names` that is spelt most like `name`, if any is."""
  by_lower = {each.lower(): each for each in names}
  near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.75)
  return by_lower[near[0]] if near else None


def tokenizer_folder(
  path: str, run_dir: RunDir | None = None, revision: str | None = None
) -> Path:
  """Returns the folder with a tokenizer.json, with weights or without.

  Takes arguments as `model_folder` does; of a hub id no weights are downloaded.

  Raises:
    UserError: as `model_folder`, or the folder has no tokenizer.json.
  """
  folder = Path(path)
  if not folder.is_dir():
    folder = model_folder(path, run_dir, revision, TOKENIZER_FILES)
  if not (folder / "tokenizer.json").is_file():
    raise UserError(f"{folder} has no tokenizer.json: it holds no tokenizer")
  return folder


def model_revision(folder: Path) -> str:
  """Computes a short name of a model's content, equal on every machine.

  The name covers config.json and, of every safetensors file, its name, its size
  and its bytes: all of a file up to 32 MiB, evenly spread blocks of a larger.

  Returns:
    16 hexadecimal digits.

  Raises:
    UserError: the folder lacks config.json or any weights.
  """
  return _revision(folder, "config.json", "model")


def adapter_revision(folder: Path) -> str:
  """Computes such a name of the content of a PEFT adapter's folder."""
  return _revision(folder, "adapter_config.json", "adapter")


def fingerprint(folder: Path, adapter: Path | None = None) -> str:
  """Computes what tells a model from one in which a single bit has changed.

  A revision has to come at once, wherever a model is named, so that of a large
  file it covers blocks. Before a stage loads a model, which reads it whole
  anyway, every byte is hashed, on all cores.

  Args:
    folder: the model's.
    adapter: a PEFT adapter's that is applied to it.

  Returns:
    The revision, `model_revision` or with an adapter `MODEL+ADAPTER`. Where a
    file is over 32 MiB it is followed by ":" and 16 hexadecimal digits of all
    bytes of such files.

  Raises:
    UserError: a folder lacks its config or any weights.
  """
  revision, folders = model_revision(folder), [folder]
  if adapter is not None:
    revision = f"{revision}+{adapter_revision(adapter)}"
    folders.append(adapter)
  pieces = [
    (path, start)
    for one in folders
    for path in sorted(one.glob("*.safetensors"))
    if (size := path.stat().st_size) > _WHOLE_BYTES
    for start in range(0, size, _PIECE_BYTES)
  ]
  if not pieces:
    return revision
  # hashlib lets go of Python's lock.
  with ThreadPoolExecutor(min(len(pieces), os.cpu_count() or 1)) as pool:
    digests = b"".join(pool.map(_piece_digest, *zip(*pieces, strict=True)))
  return f"{revision}:{hashlib.sha256(digests).hexdigest()[:16]}"


def _piece_digest(path: Path, start: int) -> bytes:
  """Returns the SHA-256 of a file's bytes from `start` on, up to a piece."""
  digest, left = hashlib.sha256(), _PIECE_BYTES
  with path.open("rb") as file:
    file.seek(start)
    while left and (block := file.read(min(left, 2**20))):
      digest.update(block)
      left -= len(block)
  return digest.digest()


def _revision(folder: Path, config_name: str, what: str) -> str:
  weights = sorted(folder.glob("*.safetensors"))
  config = folder / config_name
  if not weights or not config.is_file():
    lacks = "*.safetensors" if config.is_file() else config_name
    raise UserError(f"{folder} has no {lacks}: it is no {what} folder")
  digest = hashlib.sha256()
  for path in (config, *weights):
    size = path.stat().st_size
    # Name and size mark where a file begins: without them the same bytes cut
    # into other files would have the same name.
    digest.update(f"{path.name}\0{size}\0".encode())
    with path.open("rb") as file:
      if size <= _WHOLE_BYTES:
        digest.update(file.read())
        continue
      # Tens of gigabytes would take minutes to hash at every start. Training
      # changes tensors all over the file, so blocks spread over it tell.
      last = size - _BLOCK_BYTES
      for block in range(_BLOCKS):
        file.seek(last * block // (_BLOCKS - 1))
        digest.update(file.read(_BLOCK_BYTES))
  return digest.hexdigest()[:16]


def _lab_folder(path: str) -> Path:
  lab = Path(str(importlib.resources.files("trd_jax") / "lab"))
  folder = lab / path.removeprefix(_LAB)
  if path.removeprefix(_LAB) and (folder / "config.json").is_file():
    return folder
  there = sorted(
    _LAB + config.parent.name for config in lab.glob("*/config.json")
  )
  raise UserError(
    f'this installation has no model "{path}"; it has '
    f"{', '.join(there) or 'none: python -m trd_jax.lab.pretrain makes them'}"
  )


def _random_folder(path: str, run_dir: RunDir | None) -> Path:
  if run_dir is None:
    raise UserError(f"{path} lives in a run directory: name it by --workdir")
  size = path.removeprefix(_RANDOM)
  try:
    folder = run_dir.model_folder_for_random(size)
  except ValueError:
    raise UserError(
      f'"{path}": a size is lower-case letters, digits and dashes'
    ) from None
  if not (folder / "config.json").is_file():
    raise UserError(
      f"{path} is not made yet ({folder}): run python -m trd_jax.convert with "
      "the same --config and --workdir"
    )
  return folder


def _download(path: str, revision: str | None, files: Sequence[str]) -> Path:
  # Slow to import, and most models are folders.
  from huggingface_hub import snapshot_download

  try:
    return Path(
      snapshot_download(path, revision=revision, allow_patterns=[*files])
    )
  except Exception as error:  # whatever happens between here and the hub
    at = f" at {revision}" if revision else ""
    why = one_line(error)
    raise UserError(
      f'"{path}" is no folder here and cannot be had from the hub{at}: {why}'
    ) from error
