"""Queues the embedded engine's prompts, and computes their caches ahead.

Shape key: P prompts of a group, T prompt bucket.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from trd_jax.generation.engines import jax_programs as programs
from trd_jax.generation.engines.engine import Request
from trd_jax.generation.engines.jax_memory import Call
from trd_jax.generation.engines.jax_programs import bucket
from trd_jax.model.config import ModelConfig
from trd_jax.model.decoding import Decoder
from trd_jax.model.qwen3 import KVCache, Qwen3

# Tokens of a group of prompts that is computed together. A CPU gains nothing
# from more than this; an accelerator needs more to be busy. Groups have about
# one size whatever the bucket, because products of about equal size sum in the
# same order. A common beginning that spares so many tokens is worth having
# programs of its own.
_PREFILL_TOKENS = {"cpu": 1024}
_PREFILL_TOKENS_ACCELERATOR = 16_384

# Buckets where all prompts are short: finer steps, since there are only few.
_SHORT = range(24, 49, 4)


class Runner(Protocol):
  """What prompts and batches need of their engine."""

  name: str
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
    """Makes it of a request, its limit cut to the model's longest context."""
    prompt = np.asarray(request.prompt_ids, np.int32)
    limit = min(request.max_new_tokens, config.max_positions - prompt.size)
    return cls(request, prompt.tobytes(), prompt.size, limit)


class Staged(NamedTuple):
  """A request whose prompt is in a row of the staging area."""

  waiting: Waiting
  row: int


class Prompts:
  """Requests that wait for a slot, and the caches of those that are next.

  What all prompts begin with, such as the chat template and the instructions,
  is computed once and stands before each group. Each device computes its share
  of a group. Its rows stay there, for its own slots, as long as each is needed
  once. They are copied to all devices if one is needed again, or when the free
  slots and the rows that are left are on different devices.

  Attributes:
    staging: keys and values of the group of prompts that was computed last.
    split: whether each device has rows of its own in `staging`, and counts
      them from its first, or has all of them.
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
    # Those of each device where they are split, else of all in the first.
    self._staged: list[collections.deque[Staged]] = []
    self.staging: KVCache | None = None
    self.split = False
    self._tokens = _PREFILL_TOKENS.get(
      engine.mesh.devices.flat[0].platform, _PREFILL_TOKENS_ACCELERATOR
    )
    self.common = _common(self._queue, self._tokens)
    self._prefix: KVCache | None = None
    longest = self._queue[0].length - 1 - self.common if self._queue else 0
    self._short = longest <= _SHORT[-1]

  def __bool__(self) -> bool:
    return bool(self._queue or any(self._staged))

  def take(self, devices: Sequence[int]) -> dict[int, Staged]:
    """Takes requests for free slots, at least one where any waits.

    Args:
      devices: the number of the device of each free slot, those to fill first
        at the beginning.

    Returns:
      By place in `devices`, requests with their rows of `staging`.
    """
    if not any(self._staged) and self._queue:
      self._stage()
    if self.split and not any(self._staged[device] for device in devices):
      self._spread()
    taken = {}
    for place, device in enumerate(devices):
      staged = self._staged[device if self.split else 0]
      if staged:
        taken[place] = staged.popleft()
    return taken

  def _stage(self) -> None:
    """Computes the keys and values of the next group of prompts."""
    engine, queue, common = self._engine, self._queue, self.common
    devices = engine.mesh.size
    if common and self._prefix is None:
      ids = np.frombuffer(queue[0].prompt, np.int32)[:common]
      self._prefix = self._prefill(
        np.tile(ids, (devices, 1)), np.full(devices, common, np.int32)
      )
    P, T = self._group(queue[0].length)
    # All rows of the last group are in slots by now. Freed before the next is
    # computed, so that two groups are never in memory together.
    self.staging = None
    tokens_PT = np.zeros((P, T), np.int32)
    length_P = np.zeros(P, np.int32)
    count_of: dict[bytes, int] = {}
    staged: list[collections.deque[Staged]] = [
      collections.deque() for _ in range(devices)
    ]
    while queue:
      # Samples of one prompt stand together in the queue and share a row: it is
      # computed once and copied into as many slots.
      count = count_of.setdefault(queue[0].prompt, len(count_of))
      if count == P:
        break
      waiting = queue.popleft()
      # Dealt out by turns, so that devices have about as many, and about as
      # long ones.
      row, device = divmod(count, devices)
      staged[device].append(Staged(waiting, row))
      of_all = device * (P // devices) + row
      length_P[of_all] = waiting.length - 1 - common
      prompt = np.frombuffer(waiting.prompt, np.int32)
      # Without its last token, with which decoding begins.
      tokens_PT[of_all, : length_P[of_all]] = prompt[common:-1]
    self.staging = self._prefill(tokens_PT, length_P)
    self._staged, self.split = staged, True
    distinct = min(len(count_of), P)
    if devices == 1 or sum(map(len, staged)) > distinct:
      self._spread()

  def _group(self, length: int) -> tuple[int, int]:
    """Returns rows and bucket of a group whose longest prompt is `length`."""
    common, devices = self.common, self._engine.mesh.size
    longest = length - 1 - common
    short = (bound for bound in _SHORT if bound >= longest)
    T = next(short) if self._short else bucket(longest)
    # Rows hold the common beginning as well: where that is long there are fewer
    # of them, or they would take much memory.
    most = self._tokens // max(T, (common + T) // 2)
    return max(1, -(-most // devices)) * devices, T

  def call(self) -> Call:
    """Returns what all requests that wait ask of a device's memory."""
    positions, most = 1, 0
    for waiting in self._queue:
      P, T = self._group(waiting.length)
      end = waiting.length - 1 + waiting.limit
      positions = max(positions, end, self.common + T)
      most = max(most, P * (self.common + T))
    share = most // self._engine.mesh.size
    # What all prompts begin with stands on each device by itself, too.
    return Call(bucket(positions), share, most + self.common)

  def _spread(self) -> None:
    """Gives every device all rows of the staging area."""
    assert self.staging is not None
    share = len(self.staging.values[0]) // self._engine.mesh.size
    everywhere = [
      (waiting, row, device)
      for device, staged in enumerate(self._staged)
      for waiting, row in staged
    ]
    everywhere.sort(key=lambda one: one[1:])  # as they stood in the queue
    self._staged = [
      collections.deque(
        Staged(waiting, device * share + row)
        for waiting, row, device in everywhere
      )
    ]
    self.staging = programs.spread(self.staging, mesh=self._engine.mesh)
    self.split = False

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
  """Returns how many tokens all prompts begin with, 0 where it spares few.

  The number is rounded down, for each has programs of its own. It leaves a
  prompt at least its last two tokens, so that no row of a group is empty.

  Args:
    queue: the requests.
    worth: how many tokens the common beginning has to spare.
  """
  prompts = {waiting.prompt for waiting in queue}
  if not prompts:
    return 0
  # In sorted order all prompts share what the first and the last one share, so
  # two are compared instead of all.
  ends = [np.frombuffer(p, np.int32) for p in (min(prompts), max(prompts))]
  shortest = min(waiting.length for waiting in queue)
  first, last = (ids[: max(0, shortest - 2)] for ids in ends)
  count = int(np.argmin(np.append(first == last, False)))
  count -= count % max(2, (1 << count.bit_length()) // 16)
  return count if count * (len(prompts) - 1) >= worth else 0
