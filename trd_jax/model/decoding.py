"""Qwen3's weights laid out for decoding, where each row adds one token.

A matrix product first brings its right side into the order that the registers
want. With few rows on the left and a kernel on the right that takes much of the
time. So here activations are columns, `[D, B]`, and kernels stand on the left,
`[out, in]`: what is brought into order is a few columns instead of a kernel.
Kernels that read the same input stand one under the other, as one product.
Layers are separate arrays rather than stacked, or each chunk of decoding would
begin by copying them out of the stack.

Shape key: B rows, S positions of a cache, D residual channels, N query heads, K
key heads, H channels of a head, F inner channels of the SwiGLU, V vocabulary, I
channels in, O channels out, A rank of the adapters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trd_jax.model.attention.attention import attend_one
from trd_jax.model.config import ModelConfig
from trd_jax.model.layers import rope_table
from trd_jax.model.lora import Linear
from trd_jax.model.qwen3 import KVCache, Qwen3


class Kernel(NamedTuple):
  """Linear layers that read the same columns, with their adapters.

  Attributes:
    weight_OI: their kernels.
    bias_O: their biases, None for none.
    a_AI: their adapters' first factors, one under the other; None for none.
    b_OA: their second factors, scaled and block-diagonal, so that each
      layer's outputs take only its own rows of `a x`.
  """

  weight_OI: jax.Array
  bias_O: jax.Array | None
  a_AI: jax.Array | None
  b_OA: jax.Array | None

  @classmethod
  def of(cls, linears: Sequence[Linear], layer: int) -> "Kernel":
    """Builds the kernel of one layer from stacked linears."""
    weights = [linear.kernel[...][layer].T for linear in linears]
    biases = [x.bias[...][layer] for x in linears if x.bias is not None]
    bias = jnp.concatenate(biases) if biases else None
    a, b = [], []
    for linear in linears:
      if linear.lora_a is None or linear.lora_b is None:
        return cls(jnp.concatenate(weights), bias, None, None)
      # Transposed factors trade places: (x A B)^T = B^T A^T x^T. B is scaled
      # while it is float32 and cast once, at the end.
      assert linear.lora_config is not None
      a.append(linear.lora_a[...][layer].T)
      b.append(linear.lora_config.scale * linear.lora_b[...][layer].T)
    dtype = weights[0].dtype
    return cls(
      jnp.concatenate(weights),
      bias,
      jnp.concatenate(a).astype(dtype),
      jax.scipy.linalg.block_diag(*b).astype(dtype),
    )

  def __call__(self, x_IB: jax.Array) -> jax.Array:
    """Applies the layers to columns `[I, B]`; returns `[O, B]`."""
    y_OB = self.weight_OI @ x_IB
    if self.bias_O is not None:
      y_OB += self.bias_O[:, None]
    if self.a_AI is None or self.b_OA is None:
      return y_OB
    # Not merged into the weight: a small adapter would be lost in bfloat16, and
    # an engine that applies it unmerged has to give what training saw.
    return y_OB + self.b_OA @ (self.a_AI @ x_IB)


# A block's mathematics stands here a second time. `layers`' own modules, run on
# rows a layer at a time, were measured against these columns in turns: at the
# laboratory's size they took about as long; with adapters on, or with wider
# kernels, clearly longer, for there the order of the product and the kernels
# that are joined into one tell. `layers` can't be laid out so: training shards,
# adapts and saves its kernels one by one. Tests hold each step of this against
# the whole forward pass.
class Layer(NamedTuple):
  """A block's weights: the norms' scales and the kernels, by what they read.

  Attributes:
    input_norm_D: before the attention.
    heads_norm: `[N + K, H]`, of the query heads and then of the key heads;
      None where heads aren't normed.
    post_norm_D: before the SwiGLU.
    qkv: queries, keys and values.
    o: the attention's output.
    gate_up: gate and then up.
    down: back to the residual.
  """

  input_norm_D: jax.Array
  heads_norm: jax.Array | None
  post_norm_D: jax.Array
  qkv: Kernel
  o: Kernel
  gate_up: Kernel
  down: Kernel


class Decoder(NamedTuple):
  """What a step of decoding reads.

  Attributes:
    embedding_VD: the table of token embeddings.
    layers: the blocks.
    norm_D: the final norm's scale.
    head_VD: the output matrix.
  """

  embedding_VD: jax.Array
  layers: tuple[Layer, ...]
  norm_D: jax.Array
  head_VD: jax.Array

  @classmethod
  def of(cls, model: Qwen3) -> "Decoder":
    """Lays a model's weights out; copies all but embedding and head."""
    c, stack = model.config, model.layers
    attention, mlp = stack.attention, stack.mlp

    def layer(i):
      # One norm for the query heads and the key heads together, each with its
      # own scale: a step is many small operations, and each costs.
      heads = [
        jnp.broadcast_to(norm.scale[...][i], (count, c.head_dim))
        for norm, count in (
          (attention.q_norm, c.num_heads),
          (attention.k_norm, c.num_kv_heads),
        )
        if norm is not None
      ]
      # The layer's own arrays, cut out of the stack once and for all.
      return Layer(
        stack.input_norm.scale[...][i],
        jnp.concatenate(heads) if heads else None,
        stack.post_norm.scale[...][i],
        Kernel.of([attention.q, attention.k, attention.v], i),
        Kernel.of([attention.o], i),
        Kernel.of([mlp.gate, mlp.up], i),
        Kernel.of([mlp.down], i),
      )

    return cls(
      model.embed.embedding[...],
      tuple(layer(i) for i in range(c.num_layers)),
      model.norm.scale[...],
      model.head_VD,
    )

  def step(
    self,
    tokens_B: jax.Array,
    position_B: jax.Array,
    cache: KVCache,
    config: ModelConfig,
  ) -> tuple[jax.Array, KVCache]:
    """Decodes one token a row: writes it into the cache and attends to it.

    The whole cache is read, so its length is the cost: it should be no longer
    than the rows need.

    Args:
      tokens_B: int32 ids, one a row.
      position_B: int32 position of the token in its row's cache; a position
        past the cache writes nothing.
      cache: keys and values of the positions before.
      config: the model's.

    Returns:
      Hidden states `[D, B]` after the final norm, and the cache.
    """
    c, eps = config, config.norm_eps
    B = tokens_B.shape[0]
    queries, heads = c.num_heads, c.num_heads + c.num_kv_heads
    # For all positions of the cache rather than for these B: that depends on no
    # step, so the compiler moves it out of a loop over steps.
    table = rope_table(c, jnp.arange(cache.values[0].shape[2]))
    cos_HB, sin_HB = (x[:, 0][position_B].T for x in table)
    row = jnp.arange(B)
    # The rows of these tokens only; from here on a token is a column.
    x_DB = self.embedding_VD[tokens_B].T
    keys, values = [], []
    for layer, key_BKHS, value_BKSH in zip(self.layers, *cache, strict=True):
      qkv_OB = layer.qkv(_norm(x_DB, layer.input_norm_D, eps))
      # Heads of all three kinds, one under the other: N, K and K of them.
      qkv = qkv_OB.reshape(-1, c.head_dim, B)
      qk = qkv[:heads]
      if layer.heads_norm is not None:
        qk = _norm(qk, layer.heads_norm, eps)
      qk = _rotate(qk, cos_HB, sin_HB).transpose(2, 0, 1)
      v_BKH = qkv[heads:].transpose(2, 0, 1)
      key_BKHS = key_BKHS.at[row, :, :, position_B].set(
        qk[:, queries:], mode="drop"
      )
      value_BKSH = value_BKSH.at[row, :, position_B].set(v_BKH, mode="drop")
      # After the write: a token attends to itself, too.
      mixed_BNH = attend_one(qk[:, :queries], key_BKHS, value_BKSH, position_B)
      x_DB = x_DB + layer.o(mixed_BNH.reshape(B, -1).T)
      inner = layer.gate_up(_norm(x_DB, layer.post_norm_D, eps))
      gate_FB, up_FB = jnp.split(inner, 2)
      x_DB = x_DB + layer.down(jax.nn.silu(gate_FB) * up_FB)
      keys.append(key_BKHS)
      values.append(value_BKSH)
    hidden_DB = _norm(x_DB, self.norm_D, eps)
    return hidden_DB, KVCache(tuple(keys), tuple(values))


def logits(hidden_DB: jax.Array, head_VD: jax.Array) -> jax.Array:
  """Returns float32 logits `[B, V]` of columns of hidden states `[D, B]`."""
  logits_VB = jax.lax.dot(
    head_VD, hidden_DB, preferred_element_type=jnp.float32
  )
  # Without the barrier the compiler merges the transpose into the product and
  # swaps its sides, which takes three times as long on a CPU.
  return jax.lax.optimization_barrier(logits_VB).T


def _norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """Applies `layers.RMSNorm` to columns: over the last axis but one."""
  x32 = x.astype(jnp.float32)
  mean = jnp.mean(x32 * x32, axis=-2, keepdims=True)
  return (x32 * jax.lax.rsqrt(mean + eps)).astype(x.dtype) * scale[..., None]


def _rotate(x: jax.Array, cos_HB: jax.Array, sin_HB: jax.Array) -> jax.Array:
  """Applies `layers.rotate` to columns of heads, `[heads, H, B]`."""
  left, right = jnp.split(x.astype(jnp.float32), 2, axis=1)
  out = jnp.concatenate(
    [left * cos_HB - right * sin_HB, right * cos_HB + left * sin_HB], axis=1
  )
  return out.astype(x.dtype)
