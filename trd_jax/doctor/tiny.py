"""A tiny random Qwen3 and an adapter for it, as folders that engines load.

It is made by a child, `python -m trd_jax.doctor.tiny`, which is asked for a
`folder` and makes `model` and `adapter` there. No device takes part: neither
JAX's backends nor a driver are touched, so that it is there where these are
what is broken.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trd_jax.doctor.probe import Facts, Tell, answer
from trd_jax.model.config import ModelConfig
from trd_jax.model.lora_config import LoraConfig

MODEL, ADAPTER = "model", "adapter"
# Heads of 64 are what all attention kernels take, and eight of them divide by
# what `tensor_parallel` is on a node.
CONFIG = ModelConfig(
  vocab_size=512,
  hidden_size=128,
  intermediate_size=256,
  num_layers=2,
  num_heads=8,
  num_kv_heads=8,
  head_dim=64,
  max_positions=256,
)
LORA = LoraConfig(rank=8, alpha=16.0, dropout=0.0)
# The likeliest token has a few percent of the mass: seeds matter, and rounding
# rarely decides.
_SCALE = 0.2


def random_trees(seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the base and the adapter as nested dicts of float32 on the host."""
  import jax
  from flax import nnx

  from trd_jax.model.qwen3 import Qwen3

  rng = np.random.default_rng(seed)

  def fill(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: leaf(name, part) for name, part in tree.items()}

  def leaf(name: str, part: Any) -> Any:
    if isinstance(part, Mapping):
      return fill(part)
    if name == "scale":  # of a norm
      return np.ones(part.shape, np.float32)
    return (_SCALE * rng.standard_normal(part.shape)).astype(np.float32)

  made = jax.eval_shape(lambda: Qwen3(CONFIG, lora=LORA, rngs=nnx.Rngs(0)))
  _, lora, base = nnx.split(made, nnx.LoRAParam, ...)
  return fill(nnx.to_pure_dict(base)), fill(nnx.to_pure_dict(lora))


def write(requested: Facts, tell: Tell) -> None:
  """Writes the tiny model and its adapter."""
  from trd_jax.model.weights import adapters, hf

  folder = Path(requested["folder"])
  base, lora = random_trees()
  hf.save_hf(CONFIG, base, folder / MODEL)
  adapters.save_peft(lora, LORA, folder / ADAPTER, base=str(folder / MODEL))
  tell(made=True)


if __name__ == "__main__":
  answer(write)
