"""Keeps surplus rows from being drawn, inside of vLLM's worker processes.

vLLM loads `SurplusRows` by its name in the processes that hold the model. It
covers head rows that no token belongs to: heads are padded to round sizes, and
an id of such a row decodes to nothing. Log-probabilities are vLLM's raw ones,
taken before that.

vLLM has two model runners, V1 (its CPU build) and V2 (wherever Triton is, so on
every CUDA machine), and each has an interface of its own for such a class. This
one has both, and takes the one that vLLM's configuration names.

Shape key: B rows of logits, V head rows. A row is a request's; in V2 with
speculative decoding a request has one for each drafted token.
"""

import importlib
import logging
import os
from typing import Any

import numpy as np

from trd_jax.generation.engines.server_protocol import VOCAB_KEY

KEY = VOCAB_KEY
"""In a request's `extra_args`: ids from here on are never drawn."""

FAILURE = "TRD_JAX_VLLM_FAILURE"
"""Environment variable: the file that gets the first error's last line."""

_NO_LIMIT = np.iinfo(np.int64).max

# Looked up at run time: only vLLM's environment has them.
_V1: Any = importlib.import_module(
  "vllm.v1.sample.logits_processor"
).LogitsProcessor
_V2: Any = importlib.import_module(
  "vllm.v1.worker.gpu.sample.logits_processor"
).LogitsProcessor


class SurplusRows(_V1, _V2):
  """Sets the logits of each request's surplus rows to minus infinity.

  Args:
    vllm_config: says which model runner this is for.
    state: V1's device and whether its memory is pinned; V2's request states,
      of which the number of slots is read.
  """

  def __init__(self, vllm_config: Any, *state: Any):
    # V1: row of the batch → its first surplus id.
    self._by_row: dict[int, int] = {}
    # V2: the same by slot. A request keeps its slot, while rows are ordered
    # anew at each step.
    slots = state[0].max_num_reqs if vllm_config.use_v2_model_runner else 0
    self._by_slot = np.full(slots, _NO_LIMIT, np.int64)
    _report_failures()

  # -- V1 ------------------------------------------------------------------

  def is_argmax_invariant(self) -> bool:
    """Returns False: a greedy request may not choose a surplus row either."""
    return False

  def update_state(self, batch_update: Any) -> None:
    """Follows requests as they enter, leave and move between rows."""
    if batch_update is None:
      return
    # A removed row may be given to another request in the same update, and rows
    # move only afterwards: hence this order.
    limits = self._by_row
    for row in batch_update.removed:
      limits.pop(row, None)
    for row, params, *_ in batch_update.added:
      limits.pop(row, None)
      if (limit := _limit(params)) != _NO_LIMIT:
        limits[row] = limit
    for source, target, direction in batch_update.moved:
      moved, replaced = limits.pop(source, None), limits.pop(target, None)
      if moved is not None:
        limits[target] = moved
      if direction.name == "SWAP" and replaced is not None:
        limits[source] = replaced

  # -- V2 ------------------------------------------------------------------

  def add_request(self, req_idx: int, sampling_params: Any) -> bool:
    """Takes note of a request that enters a slot, whoever had it before.

    Returns:
      Whether its logits are changed. Where no request's are, vLLM spares a
      float32 copy of all logits.
    """
    self._by_slot[req_idx] = limit = _limit(sampling_params)
    return limit != _NO_LIMIT

  # -- both ----------------------------------------------------------------

  def apply(self, logits: Any, context: Any = None) -> Any:
    """Covers surplus rows in place, without waiting for the device.

    Args:
      logits: [B, V] float32.
      context: V2's layout of the batch. It holds the slots of the requests on
        the host, and those of the rows of logits on the device alone.
    """
    V = logits.shape[1]
    if context is not None:
      limits = self._by_slot[context.idx_mapping_np]
    else:
      limits = np.full(len(logits), _NO_LIMIT, np.int64)
      limits[list(self._by_row)] = list(self._by_row.values())
    # Decided on the host, from numbers that are there: to ask the device would
    # make it wait at every step.
    lowest, highest = limits.min(initial=V), limits.max(initial=0)
    if lowest >= V:
      return logits
    if lowest == highest:  # as in all batches of one stage
      logits[:, lowest:] = float("-inf")
      return logits
    torch = importlib.import_module("torch")
    if context is not None:
      of_slot = torch.from_numpy(self._by_slot).to(logits.device)
      limit_B = of_slot[context.expanded_idx_mapping]
    else:
      limit_B = torch.from_numpy(limits).to(logits.device)
    tail = torch.arange(lowest, V, device=logits.device)
    logits[:, lowest:].masked_fill_(tail >= limit_B[:, None], float("-inf"))
    return logits


def _limit(params: Any) -> int:
  """Returns a request's first surplus id, or a number above all ids."""
  return (params.extra_args or {}).get(KEY, _NO_LIMIT)


class _FirstFailure(logging.Handler):
  """Writes the last line of the first error that comes with an exception.

  vLLM tells the process that feeds it that the engine is dead, and leaves the
  reason to its log.
  """

  def __init__(self, path: str):
    super().__init__(logging.ERROR)
    self._path = path

  def emit(self, record: logging.LogRecord) -> None:
    """Writes an error's text; of processes that race the first one wins."""
    if not record.exc_info or record.exc_info[1] is None:
      return
    error = record.exc_info[1]
    try:
      with open(self._path, "x", encoding="utf-8") as file:
        file.write(f"{type(error).__name__}: {error}")
    except OSError:
      pass  # it is there, or nobody waits for it any more


def _report_failures() -> None:
  """Makes this process's errors reach the process that feeds vLLM."""
  path = os.environ.get(FAILURE)
  logger = logging.getLogger("vllm")
  if path and not any(isinstance(h, _FirstFailure) for h in logger.handlers):
    logger.addHandler(_FirstFailure(path))
