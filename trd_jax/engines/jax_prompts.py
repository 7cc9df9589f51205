"""Prompts of the embedded engine: the queue, and caches computed ahead.

Shape key: P prompts of a group, T prompt bucket.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from trd_jax.engines import jax_programs as programs
from trd_jax.engines.engine import Request
from trd_jax.engines.jax_programs import bucket
from trd_jax.model.config import ModelConfig
from trd_jax.model.decoding import Decoder
from trd_jax.model.qwen3 import KVCache, Qwen3

# Tokens that a group of prompts is computed in. A CPU gains nothing from more
# than this; an accelerator needs more to be busy. Of about one size whatever
# the bucket, because products of about equal size sum in equal order. To spare
# so many is worth the programs that a common beginning has of its own.
_PREFILL_TOKENS = {"cpu": 1024}
_PREFILL_TOKENS_ACCELERATOR = 16_384

# Buckets where all prompts are short: finer, and fewer than long ones have.
_SHORT = range(24, 49, 4)


class Runner(Protocol):
  """What prompts and batches need of their engine."""

  config: ModelConfig
  dtype: jnp.dtype
  mesh: Mesh
  model: Qwen3
  decoder: Decoder
  decode_steps: int

  def run(
    self, program: Callable, *arguments: Any, shape: tuple, **static: Any
  ) -> Any:
    """Calls a program."""


class Waiting(NamedTuple):
  """A request in the queue, its prompt as bytes of int32."""

  request: Request
  prompt: bytes
  length: int
  limit: int

  @classmethod
  def of(cls, request: Request, config: ModelConfig) -> "Waiting":
    """The request, its limit cut to the model's longest context."""
    prompt = np.asarray(request.prompt_ids, np.int32)
    limit = min(request.max_new_tokens, config.max_positions - prompt.size)
    return cls(request, prompt.tobytes(), prompt.size, limit)


class Prompts:
  """Requests that wait for a slot, and the caches of those that are next.

  What all prompts begin with, as the chat template and the instructions, is
  computed once and stands before each group.

  Attributes:
    staging: keys and values of the group of prompts that was computed last.
    common: how many tokens all prompts begin with that are computed once.
  """

  def __init__(self, engine: Runner, requests: Sequence[Request]):
    self._engine = engine
    # The longest first, so that what decodes together is about equally long.
    # Equal prompts stand together, to be computed once.
    self._queue = collections.deque(
      sorted(
        (Waiting.of(request, engine.config) for request in requests),
        key=lambda w: (-w.length, w.prompt, w.request.key, w.request.seed),
      )
    )
    # Requests of the group, and the row that each has in `staging`.
    self._staged: collections.deque[tuple[Waiting, int]] = collections.deque()
    self.staging: KVCache | None = None
    self._tokens = _PREFILL_TOKENS.get(
      engine.mesh.devices.flat[0].platform, _PREFILL_TOKENS_ACCELERATOR
    )
    self.common = _common(self._queue, self._tokens)
    self._prefix: KVCache | None = None
    longest = self._queue[0].length - 1 - self.common if self._queue else 0
    self._short = longest <= _SHORT[-1]

  def __bool__(self) -> bool:
    return bool(self._queue or self._staged)

  def take(self, most: int) -> list[tuple[Waiting, int]]:
    """Up to so many requests whose prompts are in `staging`, with the rows."""
    if not self._staged and self._queue:
      self._stage()
    count = min(most, len(self._staged))
    return [self._staged.popleft() for _ in range(count)]

  def _stage(self) -> None:
    """Computes the keys and values of the next group of prompts."""
    engine, queue, common = self._engine, self._queue, self.common
    devices = engine.mesh.size
    if common and self._prefix is None:
      ids = np.frombuffer(queue[0].prompt, np.int32)[:common]
      self._prefix = self._prefill(
        np.tile(ids, (devices, 1)), np.full(devices, common, np.int32)
      )
    longest = queue[0].length - 1 - common
    short = (length for length in _SHORT if length >= longest)
    T = next(short) if self._short else bucket(longest)
    # Rows hold the common beginning as well: a long one makes them fewer, or
    # they would take much memory.
    most = self._tokens // max(T, (common + T) // 2)
    P = max(1, -(-most // devices)) * devices
    tokens_PT = np.zeros((P, T), np.int32)
    length_P = np.zeros(P, np.int32)
    row_of: dict[bytes, int] = {}
    while queue:
      row = row_of.setdefault(queue[0].prompt, len(row_of))
      if row == P:
        break
      waiting = queue.popleft()
      length_P[row] = waiting.length - 1 - common
      prompt = np.frombuffer(waiting.prompt, np.int32)
      tokens_PT[row, : length_P[row]] = prompt[common:-1]
      self._staged.append((waiting, row))
    made = self._prefill(tokens_PT, length_P)
    self.staging = programs.spread(made, mesh=engine.mesh)

  def _prefill(self, tokens_PT: np.ndarray, length_P: np.ndarray) -> KVCache:
    return self._engine.run(
      programs.prefill,
      self._engine.model,
      tokens_PT,
      length_P,
      self._prefix,
      shape=(*tokens_PT.shape, self.common if self._prefix else 0),
    )


def _common(queue: Sequence[Waiting], worth: int) -> int:
  """How many tokens all prompts begin with, where that spares enough of them.

  Rounded down, as each number has programs of its own. The last token of a
  prompt is never among them, nor is the one before, so that no group is empty.
  """
  prompts = {waiting.prompt for waiting in queue}
  if not prompts:
    return 0
  # Sorted, all share what the first and the last of them do.
  ends = [np.frombuffer(p, np.int32) for p in (min(prompts), max(prompts))]
  shortest = min(waiting.length for waiting in queue)
  first, last = (ids[: max(0, shortest - 2)] for ids in ends)
  count = int(np.argmin(np.append(first == last, False)))
  count -= count % max(2, (1 << count.bit_length()) // 16)
  return count if count * (len(prompts) - 1) >= worth else 0
