"""The seven programs that the embedded engine runs on its devices.

Each works on a device's own share of the slots (`shard_map` over the mesh's
`data` axis) and is compiled once for a shape.

Shape key: B slots, P prompts of a group, T prompt bucket, S context bucket,
C steps of a decoding chunk, V vocabulary, D residual channels, K likeliest
tokens that are asked for.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from trd_jax.generation.engines.sampling import (
  Likeliest,
  Plan,
  likeliest,
  sample,
)
from trd_jax.model.config import ModelConfig
from trd_jax.model.decoding import Decoder, Layer, logits
from trd_jax.model.qwen3 import KVCache, Qwen3
from trd_jax.model.sharding import replicate

# Weights are whole on each device and slots are split: no step of decoding
# needs another device.
WHOLE = PartitionSpec()
SLOTS = PartitionSpec("data")


# What stands where there is no token.
NO_TOKEN = -1  # the slot is inactive
NO_NUMBER = -2  # the model's logits there are NaN or infinite


def bucket(length: int) -> int:
  """Returns the smallest of 64, 96, 128, 192, 256, ... that holds a length.

  Each length would otherwise have a program of its own; steps of at most a half
  waste little.
  """
  if length <= 64:
    return 64
  step = (1 << (length - 1).bit_length()) // 4
  return -(-length // step) * step


class Rows(NamedTuple):
  """What a decoding chunk knows about each slot; int32 `[B]` each.

  Attributes:
    token: the id to decode next.
    position: its position.
    index: tokens generated so far.
    limit: tokens to generate; a slot is active below it.
    high: the bits of the seed's high word; see `sampling.seed_words`.
    low: those of the low one.
  """

  token: Any
  position: Any
  index: Any
  limit: Any
  high: Any
  low: Any


class Draw(NamedTuple):
  """The part of the sampling that all slots share; values, not compiled in.

  Attributes:
    stop_ids: int32, the ids that end a completion.
    temperature: float32.
    top_p: float32.
  """

  stop_ids: Any
  temperature: Any
  top_p: Any


class Ends(NamedTuple):
  """When a device ends a chunk of decoding before its last step; int32 each.

  Attributes:
    patience: ends it when idle steps, summed over its slots, reach this.
    active: ends it when no more slots than this are active, if more were at
      the beginning.
  """

  patience: Any
  active: Any


@functools.partial(
  jax.jit, static_argnames=("config", "dtype", "slots", "length", "mesh")
)
def empty(
  *,
  config: ModelConfig,
  dtype: jax.typing.DTypeLike,
  slots: int,
  length: int,
  mesh: Mesh,
) -> KVCache:
  """Makes a cache of zeros; `slots` are those of all devices together."""
  shape = (slots // mesh.size, config.num_kv_heads)
  ends = (config.head_dim, length), (length, config.head_dim)

  def run():
    return KVCache(
      *(
        tuple(jnp.zeros(shape + end, dtype) for _ in range(config.num_layers))
        for end in ends
      )
    )

  return _on_each(run, mesh, (), SLOTS)()


def lay_out(model: Qwen3) -> Decoder:
  """Lays weights out for `decode`; shares embedding and head with the model."""
  # Embedding and head go around the compiled part: what a program returns is a
  # copy, and these two are the largest arrays.
  return Decoder(
    model.embed.embedding.get_value(),
    _lay_out_layers(model),
    model.norm.scale.get_value(),
    model.head_VD,
  )


@jax.jit
def _lay_out_layers(model: Qwen3) -> tuple[Layer, ...]:
  return Decoder.of(model).layers


@functools.partial(jax.jit, static_argnames="mesh")
def prefill(
  model: Qwen3,
  tokens_PT: jax.Array,
  length_P: jax.Array,
  prefix: KVCache | None = None,
  *,
  mesh: Mesh,
) -> KVCache:
  """Computes keys and values of P prompts, each device its share of them.

  Args:
    model: the model, whole on each device.
    tokens_PT: int32 ids, right-padded.
    length_P: int32 ids of each prompt that count.
    prefix: what stands before every prompt, a row on each device; its keys and
      values come first in each row.
    mesh: the devices.
  """

  def run(model, tokens_PT, length_P, prefix):
    return model.prefill_cache(tokens_PT, length_P, prefix)

  return _on_each(run, mesh, (WHOLE, SLOTS, SLOTS, SLOTS), SLOTS)(
    model, tokens_PT, length_P, prefix
  )


@functools.partial(jax.jit, static_argnames="mesh")
def pick(cache: KVCache, row_P: jax.Array, *, mesh: Mesh) -> KVCache:
  """Picks rows of a cache; each device's share comes from its own slots.

  Args:
    cache: the slots.
    row_P: int32, counted from each device's first slot.
    mesh: the devices.
  """

  def run(cache, row_P):
    return jax.tree.map(lambda x: x[row_P], cache)

  return _on_each(run, mesh, (SLOTS, SLOTS), SLOTS)(cache, row_P)


def spread(cache: KVCache, *, mesh: Mesh) -> KVCache:
  """Copies what `prefill` or `pick` gives to all devices, whole on each.

  On CPUs the copy goes through the host. CPU devices are threads of one
  process: one that waits in a collective may hold the thread that another needs
  to get there, and on a busy machine both wait until XLA ends the process.
  """
  if mesh.size == 1:
    return cache
  if mesh.devices.flat[0].platform == "cpu":
    return replicate(cache, mesh)
  return _gather(cache, mesh=mesh)


@functools.partial(jax.jit, static_argnames="mesh")
def _gather(cache: KVCache, *, mesh: Mesh) -> KVCache:
  def run(cache):
    return jax.lax.all_gather(cache, "data", axis=0, tiled=True)

  return _on_each(run, mesh, (SLOTS,), WHOLE)(cache)


@functools.partial(jax.jit, static_argnames=("split", "mesh"), donate_argnums=0)
def insert(
  cache: KVCache,
  source: KVCache,
  row_B: jax.Array,
  *,
  split: bool,
  mesh: Mesh,
) -> KVCache:
  """Copies row `row_B[b]` of the source into slot b where it is >= 0.

  Args:
    cache: the slots.
    source: no longer than the cache.
    row_B: int32.
    split: whether the source's rows are split over the devices like the slots,
      and counted from each device's first, or whole on each device.
    mesh: the devices.
  """

  def run(cache, source, row_B):
    # Slots to fill come first, so that the loop runs only over them. They are
    # copied one by one: a gather would touch the whole cache for a few rows.
    order_B = jnp.argsort(row_B < 0)

    def copy(i, cache):
      slot = order_B[i]

      def one(into, source):
        # Only the source's positions are written. What a former request has
        # left behind them is overwritten as the slot decodes, and masked until
        # then.
        window = jax.lax.dynamic_slice_in_dim(source, row_B[slot], 1)
        return jax.lax.dynamic_update_slice(into, window, (slot, 0, 0, 0))

      return jax.tree.map(one, cache, source)

    return jax.lax.fori_loop(0, jnp.sum(row_B >= 0), copy, cache)

  in_specs = (SLOTS, SLOTS if split else WHOLE, SLOTS)
  return _on_each(run, mesh, in_specs, SLOTS)(cache, source, row_B)


def resize(cache: KVCache, *, length: int, mesh: Mesh) -> KVCache:
  """Resizes a cache to another context length, cut or padded with zeros.

  Goes layer by layer and deletes each old one once its new form is there, so
  that a device holds little more than the longer of the two.
  """
  keys, values = [], []
  for old in zip(*cache, strict=True):
    key, value = _resize_layer(*old, length=length, mesh=mesh)
    # An array that is deleted before it has been read is freed only later, and
    # all layers would be there twice. CPUs are not short of memory, and there
    # the wait would be for another batch's chunk, too.
    if mesh.devices.flat[0].platform != "cpu":
      jax.block_until_ready((key, value))
    for array in old:
      array.delete()
    keys.append(key)
    values.append(value)
  return KVCache(tuple(keys), tuple(values))


@functools.partial(jax.jit, static_argnames=("length", "mesh"))
def _resize_layer(
  keys: jax.Array, values: jax.Array, *, length: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
  def fit(axis, x):
    if length <= x.shape[axis]:
      return jax.lax.slice_in_dim(x, 0, length, axis=axis)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)

  def run(keys, values):
    return fit(3, keys), fit(2, values)

  return _on_each(run, mesh, (SLOTS, SLOTS), SLOTS)(keys, values)


@functools.partial(
  jax.jit,
  static_argnames=("config", "plan", "vocab_size", "steps", "top", "mesh"),
  donate_argnums=1,
)
def decode(
  decoder: Decoder,
  cache: KVCache,
  rows_6B: jax.Array,
  draw: Draw,
  ends: Ends,
  *,
  config: ModelConfig,
  plan: Plan,
  vocab_size: int,
  steps: int,
  top: int = 0,
  mesh: Mesh,
) -> tuple[KVCache, jax.Array, Likeliest | None]:
  """Decodes a chunk of up to C tokens a slot.

  Returns the cache, int32 tokens `[C, B]`, and where `top` is positive the
  likeliest tokens, `[C, B, K]`, which are meaningless beside no token.
  `NO_TOKEN` or `NO_NUMBER` may stand in a token's place; as the latter comes
  with the tokens, to look for it costs no transfer.

  Args:
    decoder: weights, whole on each device.
    cache: must hold all positions that the chunk can reach.
    rows_6B: `Rows` of the slots, one array because each costs its own
      transfer; inactive slots are carried along and write nothing that is
      read.
    draw: what all slots share.
    ends: when to end the chunk before its last step.
    config: the model's.
    plan: see `sampling`.
    vocab_size: ids from here on are never drawn.
    steps: most tokens a slot (C).
    top: how many of the likeliest tokens to return (K).
    mesh: the devices.
  """

  def run(decoder, cache, rows_6B, draw, ends):
    # Rows of the head that no token has are left out of the product, but not
    # where log-probabilities are asked for: those are of the whole head.
    head_VD = decoder.head_VD if top else decoder.head_VD[:vocab_size]
    rows = Rows(*rows_6B)
    words_B2 = jnp.stack([rows.high, rows.low], axis=1)
    seed_B2 = jax.lax.bitcast_convert_type(words_B2, jnp.uint32)

    # Each device counts its own slots, and its loop ends by itself: no
    # collective, so devices need not wait for each other at every step.
    active = jnp.sum(rows.index < rows.limit)
    least = jnp.where(active > ends.active, ends.active, 0)

    def going(carry):
      step, idle, rows, *_ = carry
      active = jnp.sum(rows.index < rows.limit)
      return (step < steps) & (active > least) & (idle < ends.patience)

    def advance(carry):
      step, idle, rows, cache, out_CB, top_CBK = carry
      hidden_DB, cache = decoder.step(rows.token, rows.position, cache, config)
      logits_BV = logits(hidden_DB, head_VD)
      if top_CBK is not None:
        top_CBK = jax.tree.map(
          lambda all_CBK, new_BK: all_CBK.at[step].set(new_BK),
          top_CBK,
          likeliest(logits_BV, top),
        )
      # The noise comes from the request's seed and the number of its token, so
      # a token doesn't depend on the slot, the chunk or the neighbours.
      token_B = sample(
        logits_BV[:, :vocab_size],
        seed_B2,
        rows.index,
        plan=plan,
        temperature=draw.temperature,
        top_p=draw.top_p,
      )
      active_B = rows.index < rows.limit
      # A maximum carries a NaN and sees an infinity; it is one pass.
      numbers_B = jnp.isfinite(jnp.max(logits_BV[:, :vocab_size], axis=1))
      out_B = jnp.where(numbers_B, token_B, NO_NUMBER)
      out_CB = out_CB.at[step].set(jnp.where(active_B, out_B, NO_TOKEN))
      index_B = rows.index + active_B
      stopped_B = jnp.any(token_B[:, None] == draw.stop_ids, axis=1)
      # Ended slots go on being computed, for a program's shapes are fixed. They
      # stay at their position, so what they write into the cache is theirs.
      rows = rows._replace(
        token=jnp.where(active_B, token_B, rows.token),
        position=rows.position + active_B,
        index=index_B,
        limit=jnp.where(active_B & stopped_B, index_B, rows.limit),
      )
      idle += jnp.sum(rows.index >= rows.limit)
      return step + 1, idle, rows, cache, out_CB, top_CBK

    B = rows.token.shape[0]
    out_CB = jnp.full((steps, B), NO_TOKEN, jnp.int32)
    top_CBK = None
    if top:
      shape = (steps, B, top)
      top_CBK = Likeliest(jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    zero = jnp.int32(0)
    *_, cache, out_CB, top_CBK = jax.lax.while_loop(
      going, advance, (zero, zero, rows, cache, out_CB, top_CBK)
    )
    return cache, out_CB, top_CBK

  of_slots = PartitionSpec(None, "data")
  in_specs = (WHOLE, SLOTS, of_slots, WHOLE, WHOLE)
  out_specs = (SLOTS, of_slots, of_slots)
  return _on_each(run, mesh, in_specs, out_specs)(
    decoder, cache, rows_6B, draw, ends
  )


def _on_each(
  run: Callable, mesh: Mesh, in_specs: Any, out_specs: Any
) -> Callable:
  """Returns `run` on each device with its share of what is split over `data`.

  Loops run for other numbers of steps on each device, so their carry isn't
  replicated and the check of that is off.
  """
  return jax.shard_map(
    run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )
