"""Adapters: written and read in PEFT's format, merged into the base, measured.

Trees are the nested dicts of `nnx.to_pure_dict`. Shape key: L layers, I
channels in, O channels out, A rank, B rows, T tokens, D residual channels, V
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

from trd_jax.experiment.files.json_files import write_json
from trd_jax.model.config import ModelConfig
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.qwen3 import Qwen3, logits
from trd_jax.model.weights.model_folder import atomic_folder
from trd_jax.model.weights.peft import (
  CONFIG,
  FILES,
  LINEAR,
  WEIGHTS,
  check_size,
  open_adapter,
  tensor_name,
)

Tree = Mapping[str, Any]

# The adapted linear layers: name in the checkpoint, path in the tree.
_LINEAR = tuple((name, ("layers", *path)) for name, path in LINEAR)
# Positions whose logits of two models are in memory at a time.
_POSITIONS = 128


def save_peft(
  adapter: Tree, lora: LoraConfig, folder: Path | str, *, base: str
) -> None:
  """Writes an adapter in PEFT's format, which vLLM reads; whole or not at all.

  Args:
    adapter: the adapter's tree, float32 arrays `[L, I, A]` and `[L, A, O]`.
    lora: the adapter's size; `alpha` and `dropout` are in no array.
    folder: the folder to write; one that is there is replaced.
    base: hub id or folder of the model that the adapter belongs to.

  Raises:
    ValueError: the tree isn't an adapter of that rank on all seven layers.
  """
  # A layer that is left out would be no error for PEFT: the adapter would load
  # and do less than what was trained.
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
        # PEFT's factors are torch's linear layers, `[out, in]`. A transposed
        # view would be written by its memory, in the wrong order, so it is
        # copied.
        tensors[tensor_name(layer, name, part)] = np.ascontiguousarray(matrix.T)
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
    "bias": "none",
  }
  with atomic_folder(folder, compared_later=FILES) as out:
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    write_json(out / CONFIG, fields)


def load_peft(
  folder: Path | str, config: ModelConfig
) -> tuple[LoraConfig, dict[str, Any]]:
  """Reads an adapter and its size from a folder of PEFT's or `save_peft`'s.

  Args:
    folder: holds `adapter_config.json` and `adapter_model.safetensors`.
    config: the shape of the model that the adapter belongs to.

  Returns:
    The adapter's size, and its tree of float32 numpy arrays `[L, I, A]` and
    `[L, A, O]`. Layers that it doesn't adapt are zero, in both.

  Raises:
    UserError: a file is missing or damaged, a tensor is unknown, missing or
      of another shape, or the adapter is of a variety that this model lacks.
  """
  lora, files = open_adapter(folder, config)
  sizes = config.linear_layers()
  tree: dict[tuple[str, ...], np.ndarray] = {}
  for name, path in _LINEAR:
    ins, outs = sizes[path[-1]]
    for part, leaf, shape in (
      ("lora_A", "lora_a", (ins, lora.rank)),
      ("lora_B", "lora_b", (lora.rank, outs)),
    ):
      tree[*path, leaf] = np.zeros((config.num_layers, *shape), np.float32)
      for layer in range(config.num_layers):
        tensor = tensor_name(layer, name, part)
        if tensor in files:
          tree[*path, leaf][layer] = files.read(tensor).T
  return lora, unflatten_dict(tree)


def begin_with(
  folder: Path | str, config: ModelConfig, lora: LoraConfig, like: Tree
) -> Tree:
  """Reads a folder's adapter and places it like the fresh one it replaces.

  A layer that the folder's doesn't adapt keeps the fresh A beside its B of
  zero: with both at zero neither would ever get a gradient.

  Args:
    folder: see `load_peft`.
    config: the model's shape.
    lora: the size that is trained; its dropout may differ from the folder's.
    like: a fresh adapter's tree of float32 arrays, where they are to be.

  Raises:
    UserError: as `load_peft`; or the folder's rank or alpha is not `lora`'s.
  """
  found, tree = load_peft(folder, config)
  check_size(folder, found, lora)

  def placed(x: np.ndarray, fresh: jax.Array) -> jax.Array:
    return jax.device_put(x, fresh.sharding)

  flat: dict[Any, Any] = flatten_dict(jax.tree.map(placed, tree, like))
  fresh: dict[Any, Any] = flatten_dict(like)
  for path, x in flat.items():
    if path[-1] == "lora_a":
      adapted_L11 = jnp.any(x, axis=(1, 2), keepdims=True)
      flat[path] = jnp.where(adapted_L11, x, fresh[path])
  return unflatten_dict(flat)


def is_zero(adapter: Tree) -> bool:
  """Returns whether an adapter changes nothing, that is every B is zero."""
  flat: dict[Any, Any] = flatten_dict(adapter)
  return not any(
    bool(jnp.any(leaf)) for path, leaf in flat.items() if path[-1] == "lora_b"
  )


def merge(base: Tree, adapter: Tree, lora: LoraConfig) -> dict[str, Any]:
  """Adds an adapter to the base's kernels: W + (alpha / r) A B.

  The sum is computed in float32 and cast to the kernel's dtype once, for what
  an adapter adds can be smaller than a step of bfloat16.

  Args:
    base: tree of the base, any float dtype; left as it is.
    adapter: tree of the adapter, float32.
    lora: the adapter's size.

  Returns:
    A tree like `base`; all but the adapted kernels are the same arrays.
  """
  merged, flat = flatten_dict(base), flatten_dict(adapter)
  for _, path in _LINEAR:
    kernel = merged[*path, "kernel"]
    merged[*path, "kernel"] = _merge_kernel(
      kernel, flat[*path, "lora_a"], flat[*path, "lora_b"], lora.scale
    )
  return unflatten_dict(merged)


@jax.jit
def _merge_kernel(kernel_LIO, a_LIA, b_LAO, scale):
  def layer(parts):
    kernel_IO, a_IA, b_AO = parts
    # Asked for here, whatever the process has set: on GPUs the product would
    # otherwise be in TF32, with 10 bits of each factor.
    change_IO = jnp.matmul(a_IA, b_AO, precision=jax.lax.Precision.HIGHEST)
    sum_IO = kernel_IO.astype(jnp.float32) + scale * change_IO
    return sum_IO.astype(kernel_IO.dtype)

  # One layer at a time: the float32 sum of all of them would need twice the
  # memory of a bfloat16 kernel, besides the kernel.
  return jax.lax.map(layer, (kernel_LIO, a_LIA, b_LAO))


def plain_model(config: ModelConfig, base: Tree) -> Qwen3:
  """Makes a model without adapters that holds the arrays of `base`."""
  # Abstract, so that no weights are drawn at random: `base` fills it.
  dtype = base["norm"]["scale"].dtype
  graph, state = nnx.split(
    jax.eval_shape(lambda: Qwen3(config, dtype=dtype, rngs=nnx.Rngs(0)))
  )
  nnx.replace_by_pure_dict(state, dict(base))
  return nnx.merge(graph, state)


def logit_difference(
  one: Qwen3, other: Qwen3, tokens_BT: np.ndarray, length_B: np.ndarray
) -> float:
  """Computes the largest absolute difference of two models' logits.

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
  # Hidden states of whole rows are small; logits are not. So the head is
  # applied to so many positions at a time, and `[tokens, vocab]` never exists.
  chunks = []
  pad = -counted_BT.size % _POSITIONS
  for model in (one, other):
    hidden_BTD = model(tokens_BT, position_BT, segment_BT)
    hidden_TD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    hidden_TD = jnp.pad(hidden_TD, [(0, pad), (0, 0)])
    chunks.append(hidden_TD.reshape(-1, _POSITIONS, hidden_TD.shape[-1]))
  counted = jnp.pad(counted_BT.reshape(-1), (0, pad)).reshape(-1, _POSITIONS)

  def chunk(parts):
    first, second, counts = parts
    gap = logits(first, one.head_VD) - logits(second, other.head_VD)
    return jnp.max(jnp.where(counts[:, None], jnp.abs(gap), 0.0))

  return jnp.max(jax.lax.map(chunk, (*chunks, counted)))
