"""Reads PEFT's folders of adapters without JAX."""

from pathlib import Path

from trd_jax.experiment.errors import UserError
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
# PEFT's variants of LoRA that compute something else, each with the value that
# turns it off. Passed over, the adapter would load and be another one.
VARIANTS = (
  ("use_rslora", False),
  ("use_dora", False),
  ("fan_in_fan_out", False),
  ("bias", "none"),
  ("rank_pattern", {}),
  ("alpha_pattern", {}),
  ("modules_to_save", None),
  ("layers_to_transform", None),
)
# Ways to begin an adapter that subtract its first value from the base, so that
# the adapter is right only beside the changed base.
_CHANGES_THE_BASE = ("pissa", "olora", "corda")


def open_adapter(
  folder: Path | str, config: ModelConfig
) -> tuple[LoraConfig, TensorFiles]:
  """Opens an adapter and checks that it fits a model.

  Args:
    folder: holds `adapter_config.json` and `adapter_model.safetensors`.
    config: the shape of the model that the adapter belongs to.

  Returns:
    The adapter's size, and its tensors under the names that `tensor_name`
    returns.

  Raises:
    UserError: a file is missing or damaged, a tensor is unknown, missing or
      of another shape, or the adapter is of a variety that this model lacks.
  """
  folder = Path(folder)
  lora, _ = read_peft_config(folder)
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
  for name, off in VARIANTS:
    if fields.get(name, off) not in (off, None):
      raise UserError(
        f"{path}: {name}={fields[name]!r} is not supported; use a"
        " plain LoRA adapter"
      )
  init = fields.get("init_lora_weights")
  if str(init).lower().startswith(_CHANGES_THE_BASE):
    raise UserError(
      f"{path}: init_lora_weights={init!r} belongs to a base that was changed"
      " with it; have PEFT save it as a plain LoRA adapter"
      " (path_initial_model_for_weight_conversion)"
    )
  try:
    lora = LoraConfig(
      rank=int(fields["r"]),
      alpha=float(fields["lora_alpha"]),
      dropout=float(fields.get("lora_dropout", 0.0)),
    )
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(
      f"{path}: r or lora_alpha is missing or no number ({error});"
      " fetch the file again"
    ) from error
  return lora, str(fields.get("base_model_name_or_path"))


def tensor_name(layer: int, name: str, part: str) -> str:
  """Returns a tensor's name in the file; `part` is lora_A or lora_B."""
  return f"base_model.model.model.layers.{layer}.{name}.{part}.weight"
