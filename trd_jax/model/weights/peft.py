"""Reads PEFT's folders of adapters without JAX."""

import math
import re
from pathlib import Path
from typing import Any

from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import json_fields
from trd_jax.experiment.files.json_fields import shown
from trd_jax.experiment.files.json_files import read_object
from trd_jax.experiment.schema import Lora
from trd_jax.model.config import ModelConfig
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.weights.tensor_files import TensorFiles
from trd_jax.model.weights.tensor_table import BLOCK

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FILES = (WEIGHTS, CONFIG)
"""What an adapter's folder holds."""
# The adapted linear layers: name in the checkpoint, path in a block's tree.
LINEAR = tuple(
  (name, path[:-1]) for name, path, _ in BLOCK if path[-1] == "kernel"
)
# Fields that say nothing of what an adapter computes, or that are read. Any
# other one has to be off, whatever it is called: PEFT's variants of LoRA
# compute something else, and passed over they would load and be another one.
_KNOWN = frozenset(
  (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "peft_type"),
    *("init_lora_weights", "base_model_name_or_path", "revision"),
    *("task_type", "inference_mode", "auto_mapping", "peft_version"),
    *(
      "megatron_core",
      "qalora_group_size",
      "eva_config",
      "ensure_weight_tying",
    ),
  )
)
_KINDS = {
  "lora_dropout": json_fields.Kind(
    "a number from 0 to below 1",
    lambda x: type(x) in (int, float) and 0 <= x < 1,
  ),
  "base_model_name_or_path": json_fields.TEXT,
}
_OFF = (None, False, "none", {}, [])
# Ways to begin an adapter that leave the base as it is. All others subtract the
# adapter's first value from it, or quantise it, so that the adapter is right
# only beside the changed base.
_KEEPS_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
_ALL_LINEAR = "all-linear"


def open_adapter(
  folder: Path | str, config: ModelConfig
) -> tuple[LoraConfig, TensorFiles]:
  """Opens an adapter and checks that it fits a model.

  Args:
    folder: holds `adapter_config.json` and `adapter_model.safetensors`.
    config: the shape of the model that the adapter belongs to.

  Returns:
    The adapter's size, and its tensors under the names that `tensor_name`
    returns. Layers that it doesn't adapt have none.

  Raises:
    UserError: a file is missing or damaged, a tensor is unknown, missing or
      of another shape, or the adapter is of a variety that this model lacks.
  """
  folder = Path(folder)
  lora, _ = read_peft_config(folder)
  targets = read_object(folder / CONFIG).get("target_modules")
  files = TensorFiles(folder, WEIGHTS)
  sizes = config.linear_layers()
  known = set()
  for name, path in LINEAR:
    ins, outs = sizes[path[-1]]
    for part, shape in (
      ("lora_A", (lora.rank, ins)),
      ("lora_B", (outs, lora.rank)),
    ):
      for layer in range(config.num_layers):
        tensor = tensor_name(layer, name, part)
        if not _is_target(f"model.layers.{layer}.{name}", targets):
          continue
        known.add(tensor)
        files.expect(tensor, shape, CONFIG)
  # A surplus tensor is part of the adapter, too: without it the adapter is not
  # what was trained.
  if more := sorted(set(files) - known):
    raise UserError(
      f"{files.file(more[0])}: tensor {more[0]} {files.shape(more[0])} is not"
      f" part of an adapter on {config.num_layers} layers of"
      f" {config.architecture}; use the model that it was trained on"
    )
  return lora, files


def _is_target(module: str, targets: Any) -> bool:
  """Returns whether `target_modules` names a linear layer, as PEFT reads it.

  Args:
    module: its full name, `model.layers.0.self_attn.q_proj`.
    targets: a list of names or ends of names, a regular expression, or None
      for all.
  """
  if targets is None or targets == _ALL_LINEAR:
    return True
  if isinstance(targets, str):
    return re.fullmatch(targets, module) is not None
  return any(module == end or module.endswith(f".{end}") for end in targets)


def check_size(
  folder: Path | str, found: LoraConfig, lora: Lora | LoraConfig
) -> None:
  """Checks that a folder's adapter has the size of the one that is trained.

  Raises:
    UserError: rank or alpha differ; dropout may.
  """
  for name in ("rank", "alpha"):
    theirs, ours = getattr(found, name), getattr(lora, name)
    if theirs != ours:
      raise UserError(
        f"student.adapter={folder} has {name} {theirs:g}, and lora.{name} is"
        f" {ours:g}; set lora.{name}={theirs:g} to train it further"
      )


def read_peft_config(folder: Path | str) -> tuple[LoraConfig, str]:
  """Reads an adapter's size and the name of its base model.

  Raises:
    UserError: `adapter_config.json` is missing, damaged, or describes an
      adapter of a variety that this model lacks.
  """
  path = Path(folder) / CONFIG
  fields = read_object(path)
  if fields.get("peft_type") != "LORA":
    raise UserError(
      f"{path}: peft_type is {fields.get('peft_type')!r}; only LORA"
      " adapters are read"
    )
  for name in sorted(fields.keys() - _KNOWN):
    # By identity where it counts: 0 is no switch that is off.
    value = fields[name]
    if not any(value is off or value == off != 0 for off in _OFF):
      raise UserError(
        f"{path}: {name[:60]}={shown(value)} is not supported; use a plain"
        " LoRA adapter"
      )
  _check_targets(path, fields.get("target_modules"))
  init = fields.get("init_lora_weights")
  if not any(init is known or init == known != 0 for known in _KEEPS_THE_BASE):
    raise UserError(
      f"{path}: init_lora_weights={init!r} belongs to a base that was changed"
      " with it; have PEFT save it as a plain LoRA adapter"
      " (path_initial_model_for_weight_conversion)"
    )
  rank: Any = fields.get("r")
  alpha: Any = fields.get("lora_alpha")
  json_fields.check(fields, _KINDS, str(path))
  dropout: Any = fields.get("lora_dropout") or 0.0
  # A negative alpha turns what was learnt round, and at zero nothing is left.
  for name, value, least in (("r", rank, 1), ("lora_alpha", alpha, 0)):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < least or not value:
      raise UserError(
        f"{path}: {name} is {value!r}, and not a number above 0; fetch the file"
        " again"
      )
  if rank != int(rank):
    raise UserError(
      f"{path}: r is {rank!r}, and a rank is an integer; fetch the file again"
    )
  lora = LoraConfig(rank=int(rank), alpha=float(alpha), dropout=float(dropout))
  return lora, str(fields.get("base_model_name_or_path"))


def _check_targets(path: Path, targets: Any) -> None:
  """Checks that `target_modules` names layers that are adapted here.

  Raises:
    UserError: it is of another form, or names none of them.
  """
  modules = [f"model.layers.0.{name}" for name, _ in LINEAR]
  is_list = isinstance(targets, list) and all(
    isinstance(one, str) for one in targets
  )
  try:
    if targets is None or isinstance(targets, str) or is_list:
      # A layer's number in a name narrows it down further; the first will do.
      if targets is None or any(_is_target(one, targets) for one in modules):
        return
      if isinstance(targets, list) and any(".layers." in t for t in targets):
        return
  except re.error:
    pass
  raise UserError(
    f"{path}: target_modules={targets!r} names none of"
    f" {', '.join(name.split('.')[-1] for name, _ in LINEAR)}; use an adapter"
    " on these linear layers"
  )


def tensor_name(layer: int, name: str, part: str) -> str:
  """Returns a tensor's name in the file; `part` is lora_A or lora_B."""
  return f"base_model.model.model.layers.{layer}.{name}.{part}.weight"
