"""The embedded engine: continuous batching with the training model's modules.

A fixed number of slots decode together. Requests wait in a queue, longest
prompt first, so that what decodes together is about equally long and the
cache is no longer than it must be. Each turn does three things:

1. refill: free slots get prompts whose keys and values were computed ahead, a
   group of prompts at a time (equal prompts once), in a staging area;
2. decode: up to `decode_steps` tokens a slot in one program on the device,
   which stops early when an eighth of the slots wait for work;
3. harvest: the tokens come to the host, and ended requests are yielded.

Prompts are computed up to their last token but one: decoding begins with the
last, so that only one program draws tokens. Shapes come from `bucket`: what is
compiled depends on the buckets of prompt and context length, and on the number
of slots.

A request's tokens follow from weights, prompt, seed and sampling. Neighbours,
order and slot enter nothing that is computed for it. Through the shapes of
the buckets, and more through the number of slots and devices, they can change
the order of sums and so the last bits of a logit: a token changes only where
two candidates with their noise are that close (about 1e-6 in float32).

Shape key: B slots, P prompts of a group, T prompt bucket, C steps of a chunk.
"""

import collections
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trd_jax import adapters, weights
from trd_jax.engines import jax_programs as programs
from trd_jax.engines.engine import (
  Completion,
  Request,
  Sampling,
  TopTokens,
  check_request,
)
from trd_jax.engines.jax_programs import Draw, Rows, bucket
from trd_jax.engines.sampling import Likeliest, Plan, seed_words
from trd_jax.errors import UserError
from trd_jax.model.config import ModelConfig
from trd_jax.model.qwen3 import KVCache, Qwen3
from trd_jax.sharding import make_mesh, replicated

_LOG = logging.getLogger(__name__)

# Tokens that a group of prompts is computed in. A CPU gains nothing from more
# than this; an accelerator needs more to be busy. Of one size whatever the
# bucket, because products of about equal size sum in equal order.
_PREFILL_TOKENS = {"cpu": 1024}
_PREFILL_TOKENS_ACCELERATOR = 16_384

# Slots where none are asked for: a core's caches have room for no more of
# them, while an accelerator computes many in the time of a few.
_SLOTS = {"cpu": 64}
_SLOTS_ACCELERATOR = 256

# Up to here a model's products are too small to be worth splitting between
# cores, and a copy of the weights a core is affordable.
_SMALL_PARAMETERS = 1 << 25
_MOST_CORES = 8


class JaxEngine:
  """Completes prompts with a Qwen3 in this process (see the module).

  Args:
    model: the model, with adapters or without. Its weights are put whole on
      each device.
    slots: sequences decoded at once, over all devices together. None: 64 a
      device on CPUs, 256 a device on accelerators, and no more than the power
      of two that holds a call's requests.
    decode_steps: most tokens a slot gets before the host looks at what has
      ended.
    devices: each decodes its share of the slots; all local ones by default.

  Attributes:
    programs: what this engine has had compiled, as `(name, shape, ...)`.

  Raises:
    UserError: when slots or steps aren't positive.
  """

  def __init__(
    self,
    model: Qwen3,
    *,
    slots: int | None = None,
    decode_steps: int = 16,
    devices: Sequence[Any] | None = None,
  ):
    if (slots is not None and slots < 1) or decode_steps < 1:
      raise UserError(
        f"engine.jax: slots={slots} and decode_steps={decode_steps} must both"
        " be at least 1"
      )
    devices = jax.local_devices() if devices is None else list(devices)
    self.config: ModelConfig = model.config
    self.dtype: jnp.dtype = model.embed.embedding[...].dtype
    self.mesh = make_mesh(devices=devices)
    self.model: Qwen3 = jax.device_put(model, replicated(self.mesh))
    self._fixed = slots is not None
    if slots is None:
      share = _SLOTS.get(devices[0].platform, _SLOTS_ACCELERATOR)
      slots = share * len(devices)
    self.slots = -(-slots // len(devices)) * len(devices)
    self.decode_steps = decode_steps
    self.programs: set[tuple] = set()

  @classmethod
  def load(
    cls,
    folder: Path | str,
    *,
    dtype: jax.typing.DTypeLike,
    adapter: Path | str | None = None,
    **arguments: Any,
  ) -> "JaxEngine":
    """An engine with the weights of a Hugging Face folder.

    Where the process hasn't used JAX yet, the model is small (33M parameters)
    and nothing else sets the number of CPU devices, each core becomes one, up
    to 8. That holds for the rest of the process.

    Args:
      folder: see `weights.load`.
      dtype: of weights, cache and activations.
      adapter: a PEFT folder whose adapter is applied beside the weights,
        without dropout; see `adapters.load_peft`.
      **arguments: of the constructor.

    Raises:
      UserError: when the weights or the adapter can't be read, or the adapter
        is of a model of another shape.
    """
    if "devices" not in arguments:
      _use_cores(weights.read_config(folder))
    if adapter is None:
      return cls(weights.load(folder, dtype=dtype), **arguments)
    lora, tree = adapters.load_peft(adapter, weights.read_config(folder))
    model = weights.load(folder, dtype=dtype, lora=lora)
    graph, fresh, base = nnx.split(model, nnx.LoRAParam, ...)
    nnx.replace_by_pure_dict(fresh, jax.tree.map(jnp.asarray, tree))
    return cls(nnx.merge(graph, fresh, base), **arguments)

  def generate(
    self, requests: Sequence[Request], sampling: Sampling
  ) -> Iterator[Completion]:
    """Yields one completion a request, as they finish.

    A completion ends with the first stop id, at the request's limit, or where
    the model's longest context is full.

    Raises:
      UserError: before anything is generated, on an empty prompt, one that
        fills the model's longest context, an id outside of the vocabulary, a
        negative limit, or more likeliest tokens than the head has rows.
    """
    requests = list(requests)
    if sampling.top_logprobs > self.config.vocab_size:
      raise UserError(
        f"top_logprobs={sampling.top_logprobs} is more than the"
        f" {self.config.vocab_size} tokens of the model's head; lower it"
      )
    for request in requests:
      check_request(
        request,
        vocab_size=self.config.vocab_size,
        max_positions=self.config.max_positions,
      )
    return self._stream(requests, sampling)

  def close(self) -> None:
    """Nothing is held beyond the engine's own arrays."""

  def _stream(
    self, requests: list[Request], sampling: Sampling
  ) -> Iterator[Completion]:
    slots = self.slots
    if not self._fixed and requests:
      least = -(-len(requests) // self.mesh.size) * self.mesh.size
      power = 1 << (least - 1).bit_length()
      slots = min(slots, -(-power // self.mesh.size) * self.mesh.size)
    longest = max((len(r.prompt_ids) for r in requests), default=0)
    batch = _Batch(self, sampling, slots, longest)
    for request in requests:
      if not request.max_new_tokens:
        top = batch.top_of([])
        yield Completion(request.key, (), "length", top)
    # Equal prompts stand together, to be computed once.
    queue = collections.deque(
      sorted(
        (_Waiting.of(r, self.config) for r in requests if r.max_new_tokens),
        key=lambda w: (-w.length, w.prompt, w.request.key, w.request.seed),
      )
    )
    while queue or batch.staged or batch.running:
      batch.refill(queue)
      out_CB, top_CBK = batch.decode(more=bool(queue or batch.staged))
      yield from batch.harvest(out_CB, top_CBK)

  def run(self, program: Callable, *arguments, shape: tuple, **static) -> Any:
    """Calls a program and notes what it has been compiled for."""
    name = (program.__name__, *shape)
    if name not in self.programs:
      self.programs.add(name)
      _LOG.info("program %d: %s", len(self.programs), name)
    return program(*arguments, mesh=self.mesh, **static)


def _use_cores(config: ModelConfig) -> None:
  """Makes each core a device, where `JaxEngine.load` says so."""
  if config.num_parameters() > _SMALL_PARAMETERS:
    return
  if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return
  if jax.config.values["jax_num_cpu_devices"] != -1:
    return
  try:
    cores = min(len(os.sched_getaffinity(0)), _MOST_CORES)
    jax.config.update("jax_num_cpu_devices", cores)
  except (AttributeError, RuntimeError):
    # No such count on this system, or JAX has started.
    return


class _Waiting(NamedTuple):
  """A request in the queue, its prompt as bytes of int32."""

  request: Request
  prompt: bytes
  length: int
  limit: int

  @classmethod
  def of(cls, request: Request, config: ModelConfig) -> "_Waiting":
    prompt = np.asarray(request.prompt_ids, np.int32)
    limit = min(request.max_new_tokens, config.max_positions - prompt.size)
    return cls(request, prompt.tobytes(), prompt.size, limit)


class _Batch:
  """The slots during one call of `generate`.

  Attributes:
    slots: how many there are.
    running: the request in each slot that has one.
    staged: requests whose prompts have been computed, and the row each has in
      the staging area.
  """

  def __init__(
    self, engine: JaxEngine, sampling: Sampling, slots: int, longest: int
  ):
    B, V = slots, engine.config.vocab_size
    self.engine = engine
    self.slots = slots
    self.running: dict[int, _Waiting] = {}
    self.staged: collections.deque[tuple[_Waiting, int]] = collections.deque()
    self._staging: KVCache | None = None
    # Finer where all prompts are short, at no more programs than elsewhere.
    self._least_bucket = 32 if longest <= 49 else 64
    self._ids: dict[int, list[int]] = {}
    # Of each slot, what each chunk found.
    self._top: dict[int, list[TopTokens]] = {}
    self._count = sampling.top_logprobs
    self._stop_ids = frozenset(sampling.stop_ids)
    self._vocab_size = min(sampling.vocab_size or V, V)
    self._plan = Plan.of(sampling.temperature, sampling.top_k, sampling.top_p)
    self._draw = Draw(
      np.array(sorted(self._stop_ids), np.int32),
      np.float32(sampling.temperature),
      np.float32(sampling.top_p),
      np.int32(0),
    )
    token, position, index, limit = np.zeros((4, B), np.int32)
    seed = np.zeros((B, 2), np.uint32)
    self._rows = Rows(token, position, index, limit, seed)
    self._length = 0
    self._cache: KVCache | None = None

  def refill(self, queue: collections.deque[_Waiting]):
    """Puts waiting requests into free slots."""
    free = [b for b in range(self.slots) if b not in self.running]
    while free and (queue or self.staged):
      if not self.staged:
        self._stage(queue)
      taken = min(len(free), len(self.staged))
      self._place(free[:taken])
      free = free[taken:]

  def _stage(self, queue: collections.deque[_Waiting]):
    """Computes the keys and values of the next group of prompts."""
    engine = self.engine
    devices = engine.mesh.devices.flat
    tokens = _PREFILL_TOKENS.get(
      devices[0].platform, _PREFILL_TOKENS_ACCELERATOR
    )
    T = bucket(queue[0].length - 1, self._least_bucket)
    P = -(-tokens // (T * len(devices))) * len(devices)
    tokens_PT = np.zeros((P, T), np.int32)
    length_P = np.zeros(P, np.int32)
    row_of: dict[bytes, int] = {}
    while queue:
      row = row_of.setdefault(queue[0].prompt, len(row_of))
      if row == P:
        break
      waiting = queue.popleft()
      length_P[row] = waiting.length - 1
      prompt = np.frombuffer(waiting.prompt, np.int32)
      tokens_PT[row, : waiting.length - 1] = prompt[:-1]
      self.staged.append((waiting, row))
    self._staging = engine.run(
      programs.prefill, engine.model, tokens_PT, length_P, shape=(P, T)
    )

  def _place(self, slots: list[int]):
    """Moves as many staged requests into these free slots."""
    engine, rows = self.engine, self._rows
    # The staged row that goes into a slot, -1 where it keeps what it has.
    row_B = np.full(self.slots, -1, np.int32)
    for slot in slots:
      waiting, row_B[slot] = self.staged.popleft()
      self.running[slot] = waiting
      self._ids[slot] = []
      self._top[slot] = []
      rows.token[slot] = waiting.request.prompt_ids[-1]
      rows.position[slot] = waiting.length - 1
      rows.index[slot] = 0
      rows.limit[slot] = waiting.limit
      rows.seed[slot] = seed_words([waiting.request.seed])[0]
    assert self._staging is not None
    P, _, T, _ = self._staging.values[0].shape
    self._fit(T)
    self._cache = engine.run(
      programs.insert,
      self._cache,
      self._staging,
      row_B,
      shape=(self.slots, P, T, self._length),
    )

  def _fit(self, least: int):
    """Makes the cache as long as the next chunk needs, and not much longer."""
    rows, steps = self._rows, self.engine.decode_steps
    ahead_B = np.minimum(steps, rows.limit - rows.index)
    end_B = (rows.position + ahead_B)[ahead_B > 0]
    need = max(least, int(np.max(end_B, initial=1)))
    length = bucket(need)
    if length < self._length:
      # Room for what follows, or it would shrink and grow by turns.
      length = min(self._length, bucket(need + 2 * steps))
    if self._cache is None:
      self._cache = self.engine.run(
        programs.empty,
        shape=(self.slots, length),
        config=self.engine.config,
        dtype=self.engine.dtype,
        slots=self.slots,
        length=length,
      )
    elif length != self._length:
      self._cache = self.engine.run(
        programs.resize,
        self._cache,
        shape=(self.slots, self._length, length),
        length=length,
      )
    self._length = length

  def decode(self, more: bool) -> tuple[jax.Array, Likeliest | None]:
    """Runs a chunk, see `programs.decode`. `more`: someone waits for a slot."""
    engine = self.engine
    self._fit(1)
    share = self.slots // engine.mesh.size
    floor = share - max(1, share // 8) if more else 0
    self._cache, out_CB, top_CBK = engine.run(
      programs.decode,
      engine.model,
      self._cache,
      self._rows,
      self._draw._replace(floor=np.int32(floor)),
      shape=(
        self.slots,
        self._length,
        self._plan,
        self._vocab_size,
        self._count,
      ),
      plan=self._plan,
      vocab_size=self._vocab_size,
      steps=engine.decode_steps,
      top=self._count,
    )
    return out_CB, top_CBK

  def harvest(
    self, out_CB: jax.Array, top_CBK: Likeliest | None
  ) -> Iterator[Completion]:
    """Takes in a chunk's tokens and yields what has ended."""
    rows = self._rows
    found = None if top_CBK is None else TopTokens(*map(np.asarray, top_CBK))
    out_BC = np.asarray(out_CB).T
    count_B = np.sum(out_BC >= 0, axis=1)
    for slot in sorted(self.running):
      count = int(count_B[slot])
      if not count:
        continue
      ids = self._ids[slot]
      ids.extend(out_BC[slot, :count].tolist())
      if found is not None:
        # Copies, so that a chunk's arrays don't stay for one slot's sake.
        part = TopTokens(*(x[:count, slot].copy() for x in found))
        self._top[slot].append(part)
      rows.token[slot] = ids[-1]
      rows.position[slot] += count
      rows.index[slot] = len(ids)
      stopped = ids[-1] in self._stop_ids
      if stopped or len(ids) == rows.limit[slot]:
        rows.limit[slot] = 0
        del self._ids[slot]
        key = self.running.pop(slot).request.key
        reason = "stop" if stopped else "length"
        top = self.top_of(self._top.pop(slot))
        yield Completion(key, tuple(ids), reason, top)

  def top_of(self, parts: list[TopTokens]) -> TopTokens | None:
    """A completion's likeliest tokens, of what its chunks found."""
    if not self._count:
      return None
    none_TK = np.zeros((0, self._count))
    ids = [none_TK.astype(np.int32), *(part.ids for part in parts)]
    logprobs = [none_TK.astype(np.float32), *(p.logprobs for p in parts)]
    return TopTokens(np.concatenate(ids), np.concatenate(logprobs))
