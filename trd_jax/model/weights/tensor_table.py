"""Which tensors a checkpoint has, and where they stand in the model's tree."""

from typing import NamedTuple

from trd_jax.model.config import ModelConfig

Keys = tuple[str, ...]

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

# Where the weights of a linear layer or a norm stand within a block: name in
# the checkpoint, path in the tree, and whether the checkpoint has it [out, in].
# Not every architecture has every one; see `entries`.
BLOCK = (
  ("self_attn.q_proj", ("attention", "q", "kernel"), True),
  ("self_attn.k_proj", ("attention", "k", "kernel"), True),
  ("self_attn.v_proj", ("attention", "v", "kernel"), True),
  ("self_attn.o_proj", ("attention", "o", "kernel"), True),
  ("self_attn.q_norm", ("attention", "q_norm", "scale"), False),
  ("self_attn.k_norm", ("attention", "k_norm", "scale"), False),
  ("mlp.gate_proj", ("mlp", "gate", "kernel"), True),
  ("mlp.up_proj", ("mlp", "up", "kernel"), True),
  ("mlp.down_proj", ("mlp", "down", "kernel"), True),
  ("input_layernorm", ("input_norm", "scale"), False),
  ("post_attention_layernorm", ("post_norm", "scale"), False),
)


class Entry(NamedTuple):
  """One tensor of a checkpoint.

  Attributes:
    name: its name there.
    path: where its parameter stands in the tree.
    layer: which layer of the stacked parameter it is, None for all of it.
    transposed: whether the checkpoint has it `[out, in]`.
  """

  name: str
  path: Keys
  layer: int | None
  transposed: bool


def entries(config: ModelConfig) -> list[Entry]:
  """Returns every tensor of a checkpoint of this shape, once each."""
  table = [Entry(EMBEDDING, ("embed", "embedding"), None, False)]
  for layer in range(config.num_layers):
    for name, path, transposed in BLOCK:
      if path[-2] in ("q_norm", "k_norm") and not config.family.qk_norm:
        continue
      name, path = f"model.layers.{layer}.{name}", ("layers", *path)
      table.append(Entry(f"{name}.weight", path, layer, transposed))
      if path[-2] in ("q", "k", "v") and config.family.qkv_bias:
        path = (*path[:-1], "bias")
        table.append(Entry(f"{name}.bias", path, layer, False))
  table.append(Entry("model.norm.weight", ("norm", "scale"), None, False))
  # A tied head is the embedding; files that hold it a second time are looked at
  # in `hf`.
  if not config.tie_embeddings:
    table.append(Entry(HEAD, ("head", "weight"), None, False))
  return table
