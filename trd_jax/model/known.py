"""Shapes of models that are known by their names."""

from trd_jax.model.config import ModelConfig

# Rows of Qwen3's embedding: its tokenizer's ids and some left over.
QWEN3_VOCABULARY = 151_936


def _qwen3(hidden, inner, layers, heads, tied, positions=40_960) -> ModelConfig:
  return ModelConfig(
    vocab_size=QWEN3_VOCABULARY,
    hidden_size=hidden,
    intermediate_size=inner,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=8,
    head_dim=128,
    max_positions=positions,
    tie_embeddings=tied,
  )


# Shapes of the checkpoints that the paper trains and asks.
KNOWN_MODELS = {
  "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, True),
  "Qwen/Qwen3-4B-Instruct-2507": _qwen3(2560, 9728, 36, 32, True, 262_144),
  "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, False),
}

# Of the models called random:<size>.
SIZES = {
  "nano": ModelConfig(
    vocab_size=QWEN3_VOCABULARY,
    hidden_size=64,
    intermediate_size=192,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tie_embeddings=True,
  ),
}
