"""Small random models that several tests build on."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trd_jax.model.config import ModelConfig
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.qwen3 import Qwen3

# head_dim * num_heads differs from hidden_size on purpose.
SMALL = ModelConfig(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=48,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=12,
  rope_theta=10_000.0,
)
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1)


def model(config=SMALL, *, lora=None, dtype=jnp.float32, seed=0) -> Qwen3:
  """A model whose every parameter is random, norms and adapters too."""
  made = Qwen3(config, lora=lora, dtype=dtype, rngs=nnx.Rngs(seed))
  graph, state = nnx.split(made)
  leaves, structure = jax.tree.flatten(state)
  generator = np.random.default_rng(seed)
  scattered = [
    (leaf + 0.2 * generator.standard_normal(leaf.shape)).astype(leaf.dtype)
    for leaf in leaves
  ]
  return nnx.merge(graph, jax.tree.unflatten(structure, scattered))


def tree(made: Qwen3, only=...) -> dict:
  """The model's state, or the part that `only` filters, as nested dicts."""
  return nnx.to_pure_dict(nnx.state(made, only))


def packed(lengths, width):
  """Positions and segments of one row of documents, padded to `width`."""
  position, segment = np.zeros((2, width), np.int32)
  start = 0
  for number, length in enumerate(lengths, 1):
    position[start : start + length] = np.arange(length)
    segment[start : start + length] = number
    start += length
  return position, segment


@jax.jit
def forward(made: Qwen3, tokens, position, segment, dropout_key=None):
  """Hidden states, compiled once for all models of one shape."""
  return made(tokens, position, segment, dropout_key=dropout_key)
