"""What runs inside of vLLM's worker processes.

vLLM loads `SurplusRows` by its name where the model is held. It covers the
head rows that no token belongs to: heads are padded to round sizes, and such a
row decodes to nothing. Log-probabilities that are asked for are vLLM's raw
ones, from before.

The worker also ends when the process that wanted it is gone. vLLM's own
processes outlive a killed one, and with them its hold on the GPU's memory.

Shape key: B requests of a batch, V head rows.
"""

import importlib
import os
from typing import Any

from trd_jax import parent

KEY = "trd_jax_vocab_size"
"""In a request's `extra_args`: ids from here on are never drawn."""

OWNER = "TRD_JAX_VLLM_OWNER"
"""Environment variable: id of the process that a worker works for."""

_Processor: Any = importlib.import_module(
  "vllm.v1.sample.logits_processor"
).LogitsProcessor


def _watch_owner() -> None:
  owner = int(os.environ.get(OWNER, "0"))
  if owner and owner != os.getpid():
    parent.end_with_owner(owner)


class SurplusRows(_Processor):
  """Sets the logits of each request's surplus rows to minus infinity."""

  def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool):
    del vllm_config, device, is_pin_memory
    self._limits: dict[int, int] = {}  # row of the batch → its first surplus id
    _watch_owner()

  def is_argmax_invariant(self) -> bool:
    """False: a greedy request may not choose a surplus row either."""
    return False

  def update_state(self, batch_update: Any) -> None:
    """Follows requests as they enter, leave and move between rows."""
    if batch_update is None:
      return
    limits = self._limits
    for row in batch_update.removed:
      limits.pop(row, None)
    for row, params, *_ in batch_update.added:
      limits.pop(row, None)
      if limit := (params.extra_args or {}).get(KEY):
        limits[row] = limit
    for source, target, direction in batch_update.moved:
      moved, replaced = limits.pop(source, None), limits.pop(target, None)
      if moved is not None:
        limits[target] = moved
      if direction.name == "SWAP" and replaced is not None:
        limits[source] = replaced

  def apply(self, logits: Any) -> Any:
    """Covers them, in place.

    Args:
      logits: [B, V] float32.
    """
    limits = self._limits
    if len(limits) == len(logits) and len(set(limits.values())) == 1:
      logits[:, next(iter(limits.values())) :] = float("-inf")
      return logits
    for row, limit in limits.items():
      logits[row, limit:] = float("-inf")
    return logits
