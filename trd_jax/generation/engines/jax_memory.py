"""Estimates how many of the embedded engine's slots fit into a device.

Weights are on the device by then and are counted as they lie there. All else is
known before a call begins: how long its longest request can get, and so how
much cache a slot takes; and how many prompts are computed at once. The memory
of CPUs is not looked at.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from trd_jax.experiment.errors import UserError
from trd_jax.experiment.schema import PLANNED_SHARE
from trd_jax.model.attention.blockwise import BLOCK
from trd_jax.model.config import ModelConfig

GIB = 2**30
# What is taken to be free where a device doesn't say how much it has.
_UNKNOWN_FREE = 8 * GIB
# Float32 copies of a slot's logits in a step that samples: themselves, scaled,
# sorted with their ids, and cut.
_LOGITS = 6
# Arrays of a layer that are there twice while a cache is resized.
_RESIZED_LAYERS = 2
# A batch that has shrunk to half its slots is copied into a smaller one.
_HALF = 0.5


class Call(NamedTuple):
  """What a call asks of a device's memory besides slots.

  Attributes:
    positions: of the longest bucket that a request can reach.
    staged: tokens of the prompts that are computed at once, on this device.
    held: tokens of prompts that it holds until slots are free for them, those
      that the other devices have computed among them.
  """

  positions: int
  staged: int
  held: int


def free_bytes(devices: Sequence[Any]) -> int | None:
  """Returns the bytes that a call may plan with on each of some devices.

  Args:
    devices: JAX devices of one platform.

  Returns:
    `PLANNED_SHARE` of the device that has least, without what is in use now;
    None on CPUs.
  """
  if devices[0].platform == "cpu":
    return None
  told = [device.memory_stats() or {} for device in devices]
  return min(
    int(PLANNED_SHARE * stats["bytes_limit"]) - stats.get("bytes_in_use", 0)
    if "bytes_limit" in stats
    else _UNKNOWN_FREE
    for stats in told
  )


def cache_bytes(config: ModelConfig, dtype: Any) -> int:
  """Returns the bytes of the keys and values of one position."""
  heads = 2 * config.num_layers * config.num_kv_heads
  return heads * config.head_dim * jnp.dtype(dtype).itemsize


def slots_that_fit(
  config: ModelConfig,
  dtype: Any,
  free: int,
  call: Call,
  sizes: Sequence[int],
  shrinks_from: int,
) -> int:
  """Returns the most slots of a device that a call has room for.

  Args:
    config: the model's shape.
    dtype: of cache and activations.
    free: bytes beyond the weights.
    call: what the call asks for besides slots.
    sizes: numbers of slots to choose from.
    shrinks_from: slots from which on a batch is halved once it is half empty.

  Raises:
    UserError: not even the smallest size fits.
  """
  token = cache_bytes(config, dtype)
  slot = call.positions * token
  # Two moments are the fullest: a batch at its longest, with prompts held for
  # slots that become free; and a group of prompts being computed beside the
  # cache. A device runs one program at a time, so the larger of both counts.
  fits = [
    slots
    for slots in sizes
    if free
    >= max(
      _decoding(config, slots, slot, call, shrinks_from) + call.held * token,
      slots * slot + _prefill(config, dtype, call),
    )
  ]
  if fits:
    return max(fits)
  raise UserError(
    f"engine.name=jax: a request may reach {call.positions:,} positions, whose"
    f" keys and values take {slot / GIB:.2g} GiB, and a device has"
    f" {max(free, 0) / GIB:.2g} GiB beside the weights: lower the stage's"
    " max_response_tokens and max_prompt_tokens, take engine.name=vllm, or try"
    " all the same with engine.jax.slots"
  )


def _decoding(
  config: ModelConfig, slots: int, slot: int, call: Call, shrinks_from: int
) -> float:
  """Returns a batch's most bytes at its longest: resized, shrunk, stepping."""
  # Layers are resized one by one, so only few are there twice; a batch that
  # shrinks is copied whole into one of half its slots.
  more = _RESIZED_LAYERS / config.num_layers
  if slots >= shrinks_from:
    more = max(more, _HALF)
  scores = config.num_heads * call.positions
  step = 4 * slots * (_LOGITS * config.vocab_size + 3 * scores)
  return slots * slot * (1 + more) + step


def _prefill(config: ModelConfig, dtype: Any, call: Call) -> int:
  """Returns the bytes of a group of prompts while it is computed.

  Its keys and values are there twice: as the layers make them, and as they are
  held.
  """
  c, itemsize = config, jnp.dtype(dtype).itemsize
  size = c.linear_layers()
  made = sum(size[name][1] for name in ("q", "k", "v", "gate", "up"))
  width = 3 * c.hidden_size + made
  # Of each row one block of scores in float32, with its softmax.
  rows = -(-call.staged // BLOCK)
  scores = 3 * 4 * rows * c.num_heads * BLOCK**2
  kept = (call.staged + call.held) * cache_bytes(config, dtype)
  return kept + call.staged * width * itemsize + scores
