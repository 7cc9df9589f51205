"""Adapters on disk in PEFT's format, and merged into the base.

Trees are the nested dicts of `nnx.to_pure_dict`. Shape key: L layers, I
channels in, O channels out, R rank, B rows, T tokens, D residual width, V
vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from trd_jax.errors import UserError
from trd_jax.model.config import ModelConfig
from trd_jax.model.lora import LoraConfig
from trd_jax.model.qwen3 import Qwen3, logits
from trd_jax.model_folder import atomic_folder, read_json, write_json
from trd_jax.tensor_files import TensorFiles
from trd_jax.weights import BLOCK

Tree = Mapping[str, Any]

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
# The adapted linear layers: name in the checkpoint, path in the tree.
_LINEAR = tuple(
  (name, ("layers", *path[:-1]))
  for name, path, _ in BLOCK
  if path[-1] == "kernel"
)
# PEFT's variants of LoRA that compute something else, with their off value.
_VARIANTS = (
  ("use_rslora", False),
  ("use_dora", False),
  ("fan_in_fan_out", False),
  ("bias", "none"),
  ("rank_pattern", {}),
  ("alpha_pattern", {}),
  ("modules_to_save", None),
  ("layers_to_transform", None),
)
# Ways to begin an adapter that take its first value off the base's weights, so
# that it is right beside those alone.
_CHANGES_THE_BASE = ("pissa", "olora", "corda")
# Positions whose logits of two models are in memory at a time.
_POSITIONS = 128


def save_peft(
  adapter: Tree, lora: LoraConfig, folder: Path | str, *, base: str
) -> None:
  """Writes an adapter as PEFT, vLLM and others read it, whole or not at all.

  Args:
    adapter: its tree, float32.
    lora: its size; `alpha` and `dropout` are in no array.
    folder: the folder to write; one that is there is replaced.
    base: hub id or folder of the model that it belongs to.

  Raises:
    ValueError: the tree isn't an adapter of that rank on all seven layers.
  """
  flat = flatten_dict(adapter)
  wanted = {(*p, x) for _, p in _LINEAR for x in ("lora_a", "lora_b")}
  if wrong := wanted ^ flat.keys():
    raise ValueError(f"the adapter's tree is wrong at {min(wrong)}")
  tensors = {}
  for name, path in _LINEAR:
    for part, leaf in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
      value = np.asarray(jax.device_get(flat[*path, leaf]), np.float32)
      if lora.rank != value.shape[2 if leaf == "lora_a" else 1]:
        raise ValueError(f"{name} {leaf} {value.shape}: rank {lora.rank}?")
      for layer, matrix in enumerate(value):
        tensors[_key(layer, name, part)] = np.ascontiguousarray(matrix.T)
  fields = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "lora_dropout": lora.dropout,
    "target_modules": [name.split(".")[-1] for name, _ in _LINEAR],
    "inference_mode": True,
    "init_lora_weights": True,
    **dict(_VARIANTS),
  }
  with atomic_folder(folder) as out:
    save_file(tensors, out / _WEIGHTS, metadata={"format": "pt"})
    write_json(out / _CONFIG, fields)


def load_peft(
  folder: Path | str, config: ModelConfig
) -> tuple[LoraConfig, dict[str, Any]]:
  """An adapter and its size, from a folder that PEFT or `save_peft` wrote.

  Args:
    folder: holds `adapter_config.json` and `adapter_model.safetensors`.
    config: the shape of the model that it belongs to.

  Returns:
    Its size, and its tree of float32 numpy arrays `[L, I, R]`, `[L, R, O]`.

  Raises:
    UserError: a file is missing or damaged, a tensor is unknown, missing or
      of another shape, or the adapter is of a variety that this model lacks.
  """
  folder = Path(folder)
  lora, _ = read_peft_config(folder)
  files = TensorFiles(folder, _WEIGHTS)
  sizes = _sizes(config)
  tree: dict[tuple[str, ...], np.ndarray] = {}
  known = set()
  for name, path in _LINEAR:
    ins, outs = sizes[path[-1]]
    for part, leaf, shape in (
      ("lora_A", "lora_a", (lora.rank, ins)),
      ("lora_B", "lora_b", (outs, lora.rank)),
    ):
      layers = []
      for layer in range(config.num_layers):
        key = _key(layer, name, part)
        known.add(key)
        files.expect(key, shape, _CONFIG)
        layers.append(files.read(key).astype(np.float32).T)
      tree[*path, leaf] = np.stack(layers)
  if more := sorted(set(files) - known):
    raise UserError(
      f"{files.file(more[0])}: tensor {more[0]} {files.shape(more[0])} is not"
      f" part of an adapter on {config.num_layers} layers of"
      f" {config.architecture}; use the model that it was trained on"
    )
  return lora, unflatten_dict(tree)


def begin_with(
  folder: Path | str, config: ModelConfig, lora: LoraConfig, like: Tree
) -> Tree:
  """The adapter of a folder, placed as the fresh one that it replaces.

  Args:
    folder: see `load_peft`.
    config: the model's shape.
    lora: the size that is trained; its dropout may differ from the folder's.
    like: a fresh adapter's tree of float32 arrays, where they are to be.

  Raises:
    UserError: as `load_peft`; or its rank or alpha is not the one trained.
  """
  found, tree = load_peft(folder, config)
  for name in ("rank", "alpha"):
    theirs, ours = getattr(found, name), getattr(lora, name)
    if theirs != ours:
      raise UserError(
        f"student.adapter={folder} has {name} {theirs:g}, and lora.{name} is"
        f" {ours:g}; set lora.{name}={theirs:g} to train it further"
      )
  return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), tree, like)


def read_peft_config(folder: Path | str) -> tuple[LoraConfig, str]:
  """An adapter's size and the name of its base model.

  Raises:
    UserError: `adapter_config.json` is missing, damaged, or describes an
      adapter of a variety that this model lacks.
  """
  path = Path(folder) / _CONFIG
  fields = read_json(path)
  if fields.get("peft_type") != "LORA":
    raise UserError(
      f"{path}: peft_type is {fields.get('peft_type')!r}; only LORA"
      " adapters are read"
    )
  for name, off in _VARIANTS:
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


def _key(layer: int, name: str, part: str) -> str:
  return f"base_model.model.model.layers.{layer}.{name}.{part}.weight"


def _sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
  """Channels in and out of each adapted layer."""
  width, inner = config.hidden_size, config.intermediate_size
  queries = config.num_heads * config.head_dim
  keys = config.num_kv_heads * config.head_dim
  return {
    "q": (width, queries),
    "k": (width, keys),
    "v": (width, keys),
    "o": (queries, width),
    "gate": (width, inner),
    "up": (width, inner),
    "down": (inner, width),
  }


def is_zero(adapter: Tree) -> bool:
  """Returns whether an adapter changes nothing: its every B is zero."""
  flat: dict[Any, Any] = flatten_dict(adapter)
  return not any(
    bool(jnp.any(leaf)) for path, leaf in flat.items() if path[-1] == "lora_b"
  )


def merge(base: Tree, adapter: Tree, lora: LoraConfig) -> dict[str, Any]:
  """The base with the adapter added to its kernels: W + (alpha / r) A B.

  Computed in float32, one layer at a time, and cast to the kernel's dtype
  once: a step of an adapter can be smaller than one of bfloat16.

  Args:
    base: tree of the base, any float dtype; left as it is.
    adapter: tree of the adapter, float32.
    lora: the adapter's size.

  Returns:
    A tree like `base`; what isn't a kernel is the same array.
  """
  merged, flat = flatten_dict(base), flatten_dict(adapter)
  for _, path in _LINEAR:
    kernel = merged[*path, "kernel"]
    merged[*path, "kernel"] = _merge_kernel(
      kernel, flat[*path, "lora_a"], flat[*path, "lora_b"], lora.scale
    )
  return unflatten_dict(merged)


@jax.jit
def _merge_kernel(kernel_LIO, a_LIR, b_LRO, scale):
  def layer(parts):
    kernel_IO, a_IR, b_RO = parts
    change_IO = jnp.matmul(a_IR, b_RO, precision=jax.lax.Precision.HIGHEST)
    sum_IO = kernel_IO.astype(jnp.float32) + scale * change_IO
    return sum_IO.astype(kernel_IO.dtype)

  return jax.lax.map(layer, (kernel_LIO, a_LIR, b_LRO))


def plain_model(config: ModelConfig, base: Tree) -> Qwen3:
  """A model without adapters that holds the arrays of `base`."""
  dtype = base["norm"]["scale"].dtype
  graph, state = nnx.split(
    jax.eval_shape(lambda: Qwen3(config, dtype=dtype, rngs=nnx.Rngs(0)))
  )
  nnx.replace_by_pure_dict(state, dict(base))
  return nnx.merge(graph, state)


def logit_difference(
  one: Qwen3, other: Qwen3, tokens_BT: np.ndarray, length_B: np.ndarray
) -> float:
  """The largest absolute difference of two models' logits.

  Args:
    one: a model, such as a base with its adapter on.
    other: a model of the same vocabulary, such as the merged one.
    tokens_BT: int32 ids, right-padded.
    length_B: int32 tokens a row that count.

  Returns:
    The difference in nats over all counted positions and the vocabulary.
  """
  T = tokens_BT.shape[1]
  position_BT = jnp.broadcast_to(jnp.arange(T), tokens_BT.shape)
  counted_BT = position_BT < jnp.asarray(length_B)[:, None]
  worst = _worst_difference(
    one, other, jnp.asarray(tokens_BT), position_BT, counted_BT
  )
  return float(worst)


@jax.jit
def _worst_difference(one, other, tokens_BT, position_BT, counted_BT):
  segment_BT = counted_BT.astype(jnp.int32)
  chunks = []
  pad = -counted_BT.size % _POSITIONS
  for model in (one, other):
    hidden_BTD = model(tokens_BT, position_BT, segment_BT)
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    hidden_ND = jnp.pad(hidden_ND, [(0, pad), (0, 0)])
    chunks.append(hidden_ND.reshape(-1, _POSITIONS, hidden_ND.shape[-1]))
  counted = jnp.pad(counted_BT.reshape(-1), (0, pad)).reshape(-1, _POSITIONS)

  def chunk(parts):
    first, second, counts = parts
    gap = logits(first, one.head_VD) - logits(second, other.head_VD)
    return jnp.max(jnp.where(counts[:, None], jnp.abs(gap), 0.0))

  return jnp.max(jax.lax.map(chunk, (*chunks, counted)))
