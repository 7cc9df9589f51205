"""The parts of a block.

Shape key: B rows, T tokens, S keys, D residual channels, N query heads, K key
heads, H channels of a head.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from trd_jax.model.attention.attention import Implementation, attend
from trd_jax.model.attention.blockwise import Places
from trd_jax.model.config import ModelConfig, rope_frequencies
from trd_jax.model.lora import Linear
from trd_jax.model.lora_config import LoraConfig


class RMSNorm(nnx.Module):
  """Root-mean-square norm with a learnt scale, computed in float32."""

  def __init__(
    self, size: int, axis: str, eps: float, dtype: jax.typing.DTypeLike
  ):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((size,), dtype), axes=(axis,))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis; keeps the input's dtype."""
    # In float32, for squares summed in bfloat16 lose digits. The cast back
    # comes before the scale, as in transformers, whose logits these are tested
    # against.
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean + self.eps)).astype(x.dtype) * self.scale[
      ...
    ]


def rope_table(
  config: ModelConfig, position_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes cosines and sines `[B, T, 1, H/2]`, float32, of positions."""
  frequencies, factor = rope_frequencies(config)
  # float32: bfloat16 has 8 bits, so that from position 256 on neighbours would
  # have the same angle.
  angle = position_BT[..., None, None].astype(jnp.float32) * jnp.array(
    frequencies, jnp.float32
  )
  return factor * jnp.cos(angle), factor * jnp.sin(angle)


def rotate(x_BTNH: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Applies rotary embedding (Su et al. 2021); pairs channel i with i + H/2."""
  cos, sin = table
  # Halves, not neighbours: Hugging Face's checkpoints have their channels in
  # this order, the paper's formula pairs 2i with 2i + 1.
  left, right = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  out = jnp.concatenate(
    [left * cos - right * sin, right * cos + left * sin], axis=-1
  )
  return out.astype(x_BTNH.dtype)


class Attention(nnx.Module):
  """Grouped-query attention; in Qwen3 each query and key head is normed."""

  def __init__(
    self,
    config: ModelConfig,
    *,
    lora: LoraConfig | None,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.config = config
    H, size = config.head_dim, config.linear_layers()
    make = {"lora": lora, "dtype": dtype, "rngs": rngs}
    bias = config.family.qkv_bias
    self.q = Linear(*size["q"], ("embed", "heads"), bias=bias, **make)
    self.k = Linear(*size["k"], ("embed", "kv_heads"), bias=bias, **make)
    self.v = Linear(*size["v"], ("embed", "kv_heads"), bias=bias, **make)
    self.o = Linear(*size["o"], ("heads", "embed"), **make)
    if config.family.qk_norm:
      self.q_norm = RMSNorm(H, "head_dim", config.norm_eps, dtype)
      self.k_norm = RMSNorm(H, "head_dim", config.norm_eps, dtype)
    else:
      self.q_norm = self.k_norm = None

  def project(self, x_BTD, table, keys=(None, None, None)):
    """Projects to queries `[B, T, N, H]`, and keys and values `[B, T, K, H]`.

    Queries and keys are rotated, and normed first where the model does so;
    `keys` are dropout keys of q, k and v.
    """
    B, T, _ = x_BTD.shape
    c = self.config
    q = self.q(x_BTD, keys[0]).reshape(B, T, c.num_heads, c.head_dim)
    k = self.k(x_BTD, keys[1]).reshape(B, T, c.num_kv_heads, c.head_dim)
    v = self.v(x_BTD, keys[2]).reshape(B, T, c.num_kv_heads, c.head_dim)
    # The norm comes before the rotation: its scale differs from channel to
    # channel, and the rotation mixes channels.
    if self.q_norm is not None and self.k_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    return rotate(q, table), rotate(k, table), v

  def output(self, mixed_BTNH, key=None):
    """Projects the heads' outputs `[B, T, N, H]` to the residual width."""
    B, T, N, H = mixed_BTNH.shape
    return self.o(mixed_BTNH.reshape(B, T, N * H), key)


class Mlp(nnx.Module):
  """SwiGLU: `down(silu(gate(x)) * up(x))`."""

  def __init__(
    self,
    config: ModelConfig,
    *,
    lora: LoraConfig | None,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    size = config.linear_layers()
    make = {"lora": lora, "dtype": dtype, "rngs": rngs}
    self.gate = Linear(*size["gate"], ("embed", "mlp"), **make)
    self.up = Linear(*size["up"], ("embed", "mlp"), **make)
    self.down = Linear(*size["down"], ("mlp", "embed"), **make)

  def __call__(self, x_BTD, keys=(None, None, None)):
    """Applies the layer; `keys` are dropout keys of gate, up and down."""
    inner = jax.nn.silu(self.gate(x_BTD, keys[0])) * self.up(x_BTD, keys[1])
    return self.down(inner, keys[2])


class Block(nnx.Module):
  """One pre-norm transformer block."""

  def __init__(
    self,
    config: ModelConfig,
    *,
    lora: LoraConfig | None,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    make = {"lora": lora, "dtype": dtype, "rngs": rngs}
    eps = config.norm_eps
    self.input_norm = RMSNorm(config.hidden_size, "embed", eps, dtype)
    self.attention = Attention(config, **make)
    self.post_norm = RMSNorm(config.hidden_size, "embed", eps, dtype)
    self.mlp = Mlp(config, **make)

  def __call__(
    self,
    x_BTD,
    table,
    position_BT,
    segment_BT,
    dropout_key=None,
    attention: Implementation = "xla",
  ):
    """Runs the block on rows `[B, T, D]`.

    Args:
      x_BTD: the residual stream.
      table: what `rope_table` gives for the positions.
      position_BT: int32 positions within the segment.
      segment_BT: int32 segment ids, 0 for padding.
      dropout_key: key of the adapters' dropout, None for none.
      attention: what computes it, see `attention.attend`.

    Returns:
      The residual stream, and the pair of rotated keys and values
      `[B, T, K, H]`.
    """
    # Each of the seven linear layers drops channels of its own, in the order q,
    # k, v, o, gate, up, down.
    keys = [None] * 7
    if dropout_key is not None:
      keys = list(jax.random.split(dropout_key, 7))
    q, k, v = self.attention.project(self.input_norm(x_BTD), table, keys[:3])
    places = Places(position_BT, position_BT, segment_BT, segment_BT)
    x_BTD = self._mix(x_BTD, q, k, v, places, keys[3:], attention)
    return x_BTD, (k, v)

  def fill(self, x_BTD, table, position_BT, segment_BT, last, before=None):
    """Runs the block to fill a cache; skips most of the work where `last`.

    Where `last` (a traced bool) is true only the keys and values are right,
    and the residual stream is returned as it came.

    `before` are keys and values, `[1, S, K, H]`, of a prefix that stands before
    each row, at the positions from 0; the returned ones, `[B, S + T, K, H]`,
    begin with them.
    """
    # Also in the last layer: its keys and values are what the cache needs.
    q, k, v = self.attention.project(self.input_norm(x_BTD), table)
    places = Places(position_BT, position_BT, segment_BT, segment_BT)
    if before is not None:
      B, S = len(x_BTD), before[0].shape[1]
      k, v = (
        jnp.concatenate([jnp.broadcast_to(x, (B, *x.shape[1:])), own], axis=1)
        for x, own in zip(before, (k, v), strict=True)
      )
      # The prefix joins the rows' own segment, which is 1 where a row isn't
      # padding, at positions before the row's: every token sees all of it.
      place_BS = jnp.broadcast_to(jnp.arange(S), (B, S))
      key_position_BS = jnp.concatenate([place_BS, position_BT], axis=1)
      segment_BS = jnp.ones((B, S), jnp.int32)
      key_segment_BS = jnp.concatenate([segment_BS, segment_BT], axis=1)
      places = Places(position_BT, key_position_BS, segment_BT, key_segment_BS)
    # Of the last layer nobody reads the output. All layers run as one scan, so
    # which is the last is known only while it runs: hence a `cond`.
    x_BTD = jax.lax.cond(
      last,
      lambda: x_BTD,
      lambda: self._mix(x_BTD, q, k, v, places, [None] * 4),
    )
    return x_BTD, (k, v)

  def _mix(
    self, x_BTD, q, k, v, places, keys, attention: Implementation = "xla"
  ):
    """Adds attention and MLP to the residual; `keys` drop for o and the MLP."""
    mixed = attend(q, k, v, **places._asdict(), implementation=attention)
    x_BTD = x_BTD + self.attention.output(mixed, keys[0])
    return x_BTD + self.mlp(self.post_norm(x_BTD), keys[1:])
