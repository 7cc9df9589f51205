"""Qwen3 as a Flax NNX module: a typed container around plain JAX transforms.

Its relatives, Qwen2 and Llama (`config.ARCHITECTURES`), are the same module
with a bias more or a norm less.

Shape key: B rows, T tokens, S positions of a cache, D residual channels, V
vocabulary, L layers, K key heads, H channels of a head.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from trd_jax.model.attention.attention import Implementation
from trd_jax.model.attention.kernels import keeps_attention
from trd_jax.model.config import ModelConfig
from trd_jax.model.layers import Block, RMSNorm, rope_table
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.sharding import constrain

# Rows stay where the batch put them. Left alone, the compiler follows the
# split of the weights under FSDP and gathers activations instead of weights.
_RESIDUAL = ("batch", None, None)

Remat = Literal["none", "full", "dots", "attention"]


class KVCache(NamedTuple):
  """Rotated keys and values by position in the sequence, a pair a layer.

  Separate arrays, so that a decoding step updates each in place and reads it
  whole: slicing a stacked or over-long cache would copy it at every step.
  Sequence length is the keys' last axis because that is the order in which
  the scores are computed.

  Attributes:
    keys: L arrays `[B, K, H, S]`.
    values: L arrays `[B, K, S, H]`.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]


class Embed(nnx.Module):
  """The table of token embeddings, `[V, D]`."""

  def __init__(self, config: ModelConfig, dtype, rngs: nnx.Rngs):
    shape = (config.vocab_size, config.hidden_size)
    values = 0.02 * jax.random.normal(rngs.params(), shape)
    self.embedding = nnx.Param(values.astype(dtype), axes=("vocab", "embed"))


class Head(nnx.Module):
  """The untied output matrix, kept `[V, D]` like the embedding."""

  def __init__(self, config: ModelConfig, dtype, rngs: nnx.Rngs):
    shape = (config.vocab_size, config.hidden_size)
    values = 0.02 * jax.random.normal(rngs.params(), shape)
    self.weight = nnx.Param(values.astype(dtype), axes=("vocab", "embed"))

  @property
  def head_VD(self) -> jax.Array:
    """Returns the output matrix `[V, D]`, as `Qwen3.head_VD` does."""
    return self.weight[...]


class Qwen3(nnx.Module):
  """A dense Qwen3 decoder, with adapters on its seven linear kinds or without.

  The blocks' parameters are stacked along a leading layer axis and run by one
  `lax.scan`. With `lora=None` the state is exactly the base state of the
  adapted model, so a self-distillation teacher is the same arrays under the
  other graph definition (`nnx.split(model, nnx.LoRAParam, ...)`).

  Args:
    config: the model's shape.
    lora: the adapters' size, or None for the base alone.
    dtype: dtype of the base parameters and of the activations.
    rngs: source of initial values; use `jax.eval_shape` where weights are
      going to be loaded.
  """

  def __init__(
    self,
    config: ModelConfig,
    *,
    lora: LoraConfig | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.config = config
    self.embed = Embed(config, dtype, rngs)
    # `vmap` over the constructor stacks every parameter along L, so that one
    # block is traced and compiled however many layers there are. `nnx.scan`
    # would emit every frozen kernel as an output of the loop.
    self.layers = jax.vmap(
      lambda key: Block(config, lora=lora, dtype=dtype, rngs=nnx.Rngs(key))
    )(jax.random.split(rngs.params(), config.num_layers))
    self.norm = RMSNorm(config.hidden_size, "embed", config.norm_eps, dtype)
    if config.tie_embeddings:
      self.head = None
    else:
      self.head = Head(config, dtype, rngs)

  @property
  def head_VD(self) -> jax.Array:
    """Returns the output matrix `[V, D]`; logits are `hidden @ head_VD.T`."""
    if self.head is None:
      return self.embed.embedding[...]
    return self.head.head_VD

  def __call__(
    self,
    tokens_BT: jax.Array,
    position_BT: jax.Array,
    segment_BT: jax.Array,
    *,
    remat: Remat = "none",
    dropout_key: jax.Array | None = None,
    attention: Implementation = "xla",
  ) -> jax.Array:
    """Returns hidden states `[B, T, D]` after the final norm.

    Args:
      tokens_BT: int32 token ids.
      position_BT: int32 positions, each segment's own from 0.
      segment_BT: int32 segment ids; 0 is padding. Attention is causal and
        never crosses a segment.
      remat: what is kept of a block for the backward pass, which computes the
        rest again: `none` keeps all, `full` the block's input only, `dots`
        also the products with weights, `attention` also the attention's
        output and log-sum-exp, so that attention is not run again.
      dropout_key: key of the adapters' dropout, None for none.
      attention: what computes it, see `attention.attend`.
    """
    hidden_BTD, _ = self._forward(
      tokens_BT, position_BT, segment_BT, remat, dropout_key, attention
    )
    return hidden_BTD

  def prefill(
    self, tokens_BT: jax.Array, length_B: jax.Array
  ) -> tuple[jax.Array, KVCache]:
    """Returns hidden states of left-aligned prompts, and their cache.

    Args:
      tokens_BT: int32 ids, one prompt a row, right-padded.
      length_B: int32 tokens a row that count.

    Returns:
      Hidden states `[B, T, D]` after the final norm, and a cache of length T;
      both are meaningless at padding.
    """
    hidden_BTD, cache = self._forward(
      *_padded(tokens_BT, length_B), "none", None, cache=True
    )
    return hidden_BTD, _cache_of(*cache)

  def prefill_cache(
    self,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    prefix: KVCache | None = None,
  ) -> KVCache:
    """Returns the cache that `prefill` returns, without the hidden states.

    That is cheaper: the last layer computes keys and values only.

    Args:
      tokens_BT: int32 ids, one prompt a row, right-padded.
      length_B: int32 tokens a row that count.
      prefix: keys and values, `B = 1`, of what stands before every row; the
        returned rows begin with them.
    """
    start = 0 if prefix is None else prefix.values[0].shape[2]
    tokens_BT, position_BT, segment_BT = _padded(tokens_BT, length_B)
    # Segments are made before positions move: what is padding follows from a
    # row's own length, without the prefix.
    position_BT += start
    table = rope_table(self.config, position_BT)
    L = self.config.num_layers

    def body(x, block_last_and_prefix):
      block, last, before = block_last_and_prefix
      x, kv = block.fill(x, table, position_BT, segment_BT, last, before)
      return constrain(x, *_RESIDUAL), kv

    x_BTD = constrain(self.embed.embedding[tokens_BT], *_RESIDUAL)
    last_L = jnp.arange(L) == L - 1
    stacked = None if prefix is None else _stacked(prefix)
    _, cache = jax.lax.scan(body, x_BTD, (self.layers, last_L, stacked))
    return _cache_of(*cache)

  def _forward(
    self,
    tokens_BT,
    position_BT,
    segment_BT,
    remat,
    dropout_key,
    attention: Implementation = "xla",
    cache=False,
  ) -> tuple[jax.Array, Any]:
    """Returns hidden states, and stacked keys and values where `cache`."""
    table = rope_table(self.config, position_BT)
    keys = None
    if dropout_key is not None:
      keys = jax.random.split(dropout_key, self.config.num_layers)

    def body(x, block_and_key):
      block, key = block_and_key
      segments = segment_BT
      if remat != "none":
        # As if they changed from layer to layer: of what doesn't, JAX computes
        # masks as large as the activations before the loop, to be read in it.
        segments, _ = jax.lax.optimization_barrier((segments, x[0, 0, 0]))
      x, kv = block(x, table, position_BT, segments, key, attention)
      # What a scan's body returns is stacked over layers and kept: in training
      # keys and values would be memory that nothing reads.
      return constrain(x, *_RESIDUAL), (kv if cache else None)

    # The body is wrapped, not the scan: a block's input is all that is kept of
    # the blocks whose backward pass is yet to come.
    policies = jax.checkpoint_policies
    if remat == "full":
      # A loop lies between both passes, so there is nothing for XLA to merge.
      body = jax.checkpoint(body, prevent_cse=False)
    elif remat == "dots":
      body = jax.checkpoint(
        body,
        policy=policies.dots_with_no_batch_dims_saveable,
        prevent_cse=False,
      )
    elif remat == "attention":
      body = jax.checkpoint(body, policy=keeps_attention, prevent_cse=False)
    elif remat != "none":
      raise ValueError(f"unknown remat policy {remat!r}")
    x_BTD = constrain(self.embed.embedding[tokens_BT], *_RESIDUAL)
    x_BTD, kv = jax.lax.scan(body, x_BTD, (self.layers, keys))
    return self.norm(x_BTD), kv


def _padded(tokens_BT, length_B):
  """Returns tokens, positions and segments of left-aligned rows."""
  position_BT = jnp.broadcast_to(
    jnp.arange(tokens_BT.shape[1]), tokens_BT.shape
  )
  segment_BT = (position_BT < length_B[:, None]).astype(jnp.int32)
  return tokens_BT, position_BT, segment_BT


def _cache_of(k_LBTKH, v_LBTKH) -> KVCache:
  """Makes a cache of all layers' keys and values."""
  return KVCache(
    # Turned once, after the prompt, into the order in which each step of
    # decoding reads them.
    tuple(jnp.einsum("LBTKH->LBKHT", k_LBTKH)),
    tuple(jnp.einsum("LBTKH->LBKTH", v_LBTKH)),
  )


def _stacked(cache: KVCache) -> tuple[jax.Array, jax.Array]:
  """Stacks a cache's keys and values `[L, B, S, K, H]`; undoes `_cache_of`."""
  return (
    jnp.einsum("LBKHS->LBSKH", jnp.stack(cache.keys)),
    jnp.einsum("LBKSH->LBSKH", jnp.stack(cache.values)),
  )


def logits(hidden: jax.Array, head_VD: jax.Array) -> jax.Array:
  """Returns float32 logits `[..., V]` of hidden states `[..., D]`."""
  return jnp.einsum(
    "...D,VD->...V", hidden, head_VD, preferred_element_type=jnp.float32
  )
