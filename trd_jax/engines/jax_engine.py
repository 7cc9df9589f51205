"""The embedded engine: continuous batching with the training model's modules.

A fixed number of slots decode together. Requests wait in a queue, longest
prompt first, so that what decodes together is about equally long and the
cache is no longer than it must be. Each turn does three things:

1. refill: free slots get prompts whose keys and values were computed ahead, a
   group of prompts at a time (equal prompts once), in a staging area;
2. decode: up to `decode_steps` tokens a slot in one program on the device,
   which stops early when an eighth of the slots wait for work;
3. harvest: the tokens come to the host, ended requests are yielded.

Prompts are computed up to their last token but one: decoding begins with the
last, so that only one program draws tokens. Shapes come from `bucket`: what is
compiled depends on the buckets of prompt and context length alone.

Tokens depend on (weights, prompt, seed, sampling). What a request is batched
with changes the shapes of its sums and so the last bits of its logits, never
its noise: a token changes only where two candidates are equal to about 1e-6.

Shape key: B slots, P prompts of a group, T prompt bucket, S context bucket,
C steps of a decoding chunk, V vocabulary, L layers, K key heads, H head width.
"""

import collections
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trd_jax import weights
from trd_jax.engines.engine import Completion, Request, Sampling
from trd_jax.engines.sampling import Plan, sample, seed_words
from trd_jax.errors import UserError
from trd_jax.model.config import ModelConfig
from trd_jax.model.qwen3 import KVCache, Qwen3, logits
from trd_jax.sharding import make_mesh, replicated

_LOG = logging.getLogger(__name__)

# Tokens that a group of prompts is computed in. A CPU gains nothing from more
# than this; an accelerator needs more to be busy.
_PREFILL_TOKENS = {"cpu": 1024}
_PREFILL_TOKENS_ACCELERATOR = 16_384

_WHOLE = PartitionSpec()
_SLOTS = PartitionSpec("data")


class Rows(NamedTuple):
  """What the host tells a decoding chunk about the slots.

  Attributes:
    token: int32 `[B]`, the id to decode next.
    position: int32 `[B]`, its position.
    index: int32 `[B]`, tokens generated so far.
    limit: int32 `[B]`, tokens to generate; a slot is active below it.
    seed: uint32 `[B, 2]`.
  """

  token: np.ndarray
  position: np.ndarray
  index: np.ndarray
  limit: np.ndarray
  seed: np.ndarray


def bucket(length: int) -> int:
  """The smallest of 64, 96, 128, 192, 256, 384, 512, ... that holds it."""
  power = max(64, 1 << (length - 1).bit_length())
  half = power * 3 // 4
  return half if half >= max(length, 96) else power


class JaxEngine:
  """Completes prompts with a Qwen3 in this process (see the module).

  Args:
    model: the model, with adapters or without. Its weights are put whole on
      each device.
    slots: sequences decoded at once, over all devices together.
    decode_steps: most tokens a slot gets before the host looks at what has
      ended.
    devices: each decodes its share of the slots; all local ones by default.

  Attributes:
    programs: what has been compiled or found compiled for this engine, as
      `(name, shape, ...)`.
  """

  def __init__(
    self,
    model: Qwen3,
    *,
    slots: int = 64,
    decode_steps: int = 16,
    devices: Sequence[jax.Device] | None = None,
  ):
    if slots < 1 or decode_steps < 1:
      raise UserError(
        f"engine.jax: slots={slots} and decode_steps={decode_steps} must both"
        " be at least 1"
      )
    devices = jax.local_devices() if devices is None else devices
    self.config: ModelConfig = model.config
    self.mesh = make_mesh(devices=devices)
    self.model = jax.device_put(model, replicated(self.mesh))
    self.slots = -(-slots // len(devices)) * len(devices)
    self.decode_steps = decode_steps
    self.programs: set[tuple] = set()

  @classmethod
  def load(
    cls, folder: Path | str, *, dtype: jax.typing.DTypeLike, **arguments
  ) -> "JaxEngine":
    """An engine with the weights of a Hugging Face folder.

    Args:
      folder: see `weights.load`.
      dtype: of weights, cache and activations.
      **arguments: of the constructor.

    Raises:
      UserError: when the weights can't be read.
    """
    return cls(weights.load(folder, dtype=dtype), **arguments)

  def generate(
    self, requests: Sequence[Request], sampling: Sampling
  ) -> Iterator[Completion]:
    """Yields one completion a request, as they finish.

    A completion ends after the first stop id, at the request's limit, or
    where the model's longest context is full.

    Raises:
      UserError: before anything is generated, on an empty prompt, one that
        fills the model's longest context, an id outside of the vocabulary, or
        a negative limit.
    """
    for request in requests:
      self._check(request)
    if sampling.vocab_size is not None and sampling.vocab_size < 1:
      raise UserError(
        f"vocab_size={sampling.vocab_size} leaves no token to draw; give the"
        " number of the tokenizer's ids"
      )
    return self._stream(list(requests), sampling)

  def _check(self, request: Request):
    ids = np.asarray(request.prompt_ids)
    longest = self.config.max_positions
    if not ids.size:
      raise UserError(
        f"request {request.key}: the prompt is empty; give at least one token"
      )
    if ids.size >= longest:
      raise UserError(
        f"request {request.key}: a prompt of {ids.size} tokens leaves no room"
        f" in the model's context of {longest}; shorten it or lower"
        " max_prompt_tokens"
      )
    if ids.min() < 0 or ids.max() >= self.config.vocab_size:
      wrong = ids.min() if ids.min() < 0 else ids.max()
      raise UserError(
        f"request {request.key}: token id {wrong} is outside of the model's"
        f" vocabulary of {self.config.vocab_size}; use the model's tokenizer"
      )
    if request.max_new_tokens < 0:
      raise UserError(
        f"request {request.key}: max_new_tokens={request.max_new_tokens} must"
        " not be negative"
      )

  def _stream(
    self, requests: list[Request], sampling: Sampling
  ) -> Iterator[Completion]:
    for request in requests:
      if not request.max_new_tokens:
        yield Completion(request.key, (), "length")
    # Equal prompts stand together, to be computed once.
    queue = collections.deque(
      sorted(
        (_Waiting.of(r, self.config) for r in requests if r.max_new_tokens),
        key=lambda w: (-w.length, w.prompt, w.request.key, w.request.seed),
      )
    )
    batch = _Batch(self, sampling)
    while queue or batch.staged or batch.running:
      batch.refill(queue)
      batch.decode(more=bool(queue or batch.staged))
      yield from batch.harvest()

  def run(self, program: Callable, *arguments, name: tuple, **static):
    """Calls a program and notes what it was compiled for."""
    if name not in self.programs:
      self.programs.add(name)
      _LOG.info("program %s (%d so far)", name, len(self.programs))
    return program(*arguments, mesh=self.mesh, **static)


class _Waiting(NamedTuple):
  """A request in the queue: its prompt as bytes, and what it may generate."""

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
  """The slots of one call of `generate`: on the device and on the host."""

  def __init__(self, engine: JaxEngine, sampling: Sampling):
    config, B = engine.config, engine.slots
    self.engine = engine
    self.stop_ids = frozenset(sampling.stop_ids)
    self.vocab_size = min(
      sampling.vocab_size or config.vocab_size, config.vocab_size
    )
    self.plan = Plan(
      greedy=sampling.temperature == 0,
      top_k=max(sampling.top_k, 0),
      nucleus=sampling.top_p < 1,
    )
    if self.plan.greedy:
      self.plan = Plan(True, 0, False)
    self.constants = (
      np.array(sorted(self.stop_ids), np.int32),
      np.float32(sampling.temperature),
      np.float32(sampling.top_p),
    )
    self.running: dict[int, _Waiting] = {}
    self.ids: dict[int, list[int]] = {}
    self.rows = Rows(
      *(np.zeros(B, np.int32) for _ in range(4)), np.zeros((B, 2), np.uint32)
    )
    # Requests whose prompts are in the staging area, with the row there.
    self.staged: collections.deque[tuple[_Waiting, int]] = collections.deque()
    self.staging: KVCache | None = None
    # Not 0: a program over several devices can't take an empty array.
    self.length = bucket(1)
    shape = (B, config.num_kv_heads, config.head_dim)
    dtype = engine.model.embed.embedding[...].dtype
    empty = KVCache(
      tuple(
        np.zeros((*shape, self.length), dtype) for _ in range(config.num_layers)
      ),
      tuple(
        np.zeros((*shape[:2], self.length, shape[2]), dtype)
        for _ in range(config.num_layers)
      ),
    )
    self.cache: KVCache = jax.device_put(
      empty, NamedSharding(engine.mesh, _SLOTS)
    )

  def refill(self, queue: collections.deque[_Waiting]):
    """Puts waiting requests into free slots."""
    free = [b for b in range(self.engine.slots) if b not in self.running]
    while free and (queue or self.staged):
      if not self.staged:
        self._stage(queue)
      placed = []
      while free and self.staged:
        waiting, row = self.staged.popleft()
        placed.append((free.pop(0), row, waiting))
      self._place(placed)

  def _stage(self, queue: collections.deque[_Waiting]):
    """Computes the keys and values of the next group of prompts."""
    engine = self.engine
    T = bucket(queue[0].length - 1)
    devices = engine.mesh.size
    platform = engine.mesh.devices.flat[0].platform
    tokens = _PREFILL_TOKENS.get(platform, _PREFILL_TOKENS_ACCELERATOR)
    P = -(-tokens // (T * devices)) * devices
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
    self.staging = engine.run(
      _prefill, engine.model, tokens_PT, length_P, name=("prefill", P, T)
    )

  def _place(self, placed: list[tuple[int, int, _Waiting]]):
    """Copies staged prompts into slots."""
    engine, rows = self.engine, self.rows
    T = self.staging.values[0].shape[2]
    for slot, _, waiting in placed:
      self.running[slot] = waiting
      self.ids[slot] = []
      rows.token[slot] = waiting.request.prompt_ids[-1]
      rows.position[slot] = waiting.length - 1
      rows.index[slot] = 0
      rows.limit[slot] = waiting.limit
      rows.seed[slot] = seed_words([waiting.request.seed])[0]
    self._fit(T)
    # A row for each slot, -1 for those that keep what they have.
    row_B = np.full(engine.slots, -1, np.int32)
    for slot, row, _ in placed:
      row_B[slot] = row
    self.cache = engine.run(
      _insert,
      self.cache,
      self.staging,
      row_B,
      name=("insert", *self.staging.values[0].shape[::2], self.length),
    )

  def _fit(self, least: int):
    """Makes the cache as long as the next chunk needs, and no longer."""
    rows = self.rows
    steps = np.minimum(self.engine.decode_steps, rows.limit - rows.index)
    active_B = rows.index < rows.limit
    need = max(least, int(np.max((rows.position + steps)[active_B], initial=1)))
    length = bucket(need)
    if length < self.length:
      # Room for what follows, or it would shrink and grow by turns.
      length = min(self.length, bucket(need + 2 * self.engine.decode_steps))
    if length != self.length:
      self.cache = self.engine.run(
        _resize,
        self.cache,
        name=("resize", self.length, length),
        length=length,
      )
      self.length = length

  def decode(self, more: bool):
    """Runs a chunk; `more` says whether anyone waits for a slot."""
    engine = self.engine
    self._fit(1)
    share = engine.slots // engine.mesh.size
    floor = share - max(1, share // 8) if more else 0
    self.cache, self.out_CB = engine.run(
      _decode,
      engine.model,
      self.cache,
      self.rows,
      *self.constants,
      np.int32(floor),
      name=("decode", self.length, self.plan, self.vocab_size),
      plan=self.plan,
      vocab_size=self.vocab_size,
      steps=engine.decode_steps,
    )

  def harvest(self) -> Iterator[Completion]:
    """Takes in the chunk's tokens and yields what has ended."""
    out_BC = np.asarray(self.out_CB).T
    count_B = (out_BC >= 0).sum(axis=1)
    rows = self.rows
    for slot in sorted(self.running):
      count = int(count_B[slot])
      if not count:
        continue
      ids = self.ids[slot]
      ids.extend(out_BC[slot, :count].tolist())
      rows.token[slot] = ids[-1]
      rows.position[slot] += count
      rows.index[slot] = len(ids)
      stopped = ids[-1] in self.stop_ids
      if stopped or len(ids) == rows.limit[slot]:
        rows.limit[slot] = 0
        waiting = self.running.pop(slot)
        reason = "stop" if stopped else "length"
        yield Completion(waiting.request.key, tuple(self.ids.pop(slot)), reason)


def _program(*, static: tuple[str, ...] = (), donate: int | None = None):
  """Compiles a function of one device's slots for all devices of a mesh."""

  def wrap(build: Callable) -> Callable:
    @functools.partial(
      jax.jit, static_argnames=("mesh", *static), donate_argnums=donate
    )
    def program(*arguments, mesh: Mesh, **options):
      function, in_specs, out_specs = build(**options)
      return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
      )(*arguments)

    return program

  return wrap


@_program()
def _prefill():
  """Keys and values of P prompts, shared out and then gathered everywhere."""

  def function(model: Qwen3, tokens_PT, length_P) -> KVCache:
    _, cache = model.prefill(tokens_PT, length_P)
    return jax.lax.all_gather(cache, "data", axis=0, tiled=True)

  return function, (_WHOLE, _SLOTS, _SLOTS), _WHOLE


@_program(donate=0)
def _insert():
  """Copies row `row_B[b]` of the staging area into slot b where it is >= 0."""

  def function(cache: KVCache, staging: KVCache, row_B) -> KVCache:
    # Slots to fill come first, so that the loop is as long as they are many.
    order_B = jnp.argsort(row_B < 0)

    def copy(i, cache):
      slot = order_B[i]

      def one(into, source):
        window = jax.lax.dynamic_slice_in_dim(source, row_B[slot], 1)
        return jax.lax.dynamic_update_slice(into, window, (slot, 0, 0, 0))

      return jax.tree.map(one, cache, staging)

    return jax.lax.fori_loop(0, jnp.sum(row_B >= 0), copy, cache)

  return function, (_SLOTS, _WHOLE, _SLOTS), _SLOTS


@_program(static=("length",))
def _resize(length: int):
  """The cache at another context length, cut or padded with zeros."""

  def fit(axis, x):
    if length <= x.shape[axis]:
      return jax.lax.slice_in_dim(x, 0, length, axis=axis)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)

  def function(cache: KVCache) -> KVCache:
    return KVCache(
      jax.tree.map(functools.partial(fit, 3), cache.keys),
      jax.tree.map(functools.partial(fit, 2), cache.values),
    )

  return function, (_SLOTS,), _SLOTS


@_program(static=("plan", "vocab_size", "steps"), donate=1)
def _decode(plan: Plan, vocab_size: int, steps: int):
  """A chunk of decoding: the cache, and tokens `[C, B]`, -1 for none.

  Ends after `steps`, or when no more than `floor` slots are active.
  """

  def function(
    model: Qwen3,
    cache: KVCache,
    rows: Rows,
    stop_ids,
    temperature,
    top_p,
    floor,
  ):
    # Taken apart once, not at every step.
    blocks = model.blocks()
    head_VD = model.head_VD[:vocab_size]

    def going(carry):
      step, rows, _, _ = carry
      active = jnp.sum(rows.index < rows.limit)
      return (step < steps) & (active > floor)

    def advance(carry):
      step, rows, cache, out_CB = carry
      hidden_BD, cache = model.decode(rows.token, rows.position, cache, blocks)
      token_B = sample(
        logits(hidden_BD, head_VD),
        rows.seed,
        rows.index,
        plan=plan,
        temperature=temperature,
        top_p=top_p,
      )
      active_B = rows.index < rows.limit
      stopped_B = jnp.any(token_B[:, None] == stop_ids, axis=1)
      index_B = rows.index + active_B
      out_CB = out_CB.at[step].set(jnp.where(active_B, token_B, -1))
      rows = Rows(
        token=jnp.where(active_B, token_B, rows.token),
        position=rows.position + active_B,
        index=index_B,
        limit=jnp.where(
          stopped_B, jnp.minimum(index_B, rows.limit), rows.limit
        ),
        seed=rows.seed,
      )
      return step + 1, rows, cache, out_CB

    out_CB = jnp.full((steps, rows.token.shape[0]), -1, jnp.int32)
    _, _, cache, out_CB = jax.lax.while_loop(
      going, advance, (jnp.int32(0), rows, cache, out_CB)
    )
    return cache, out_CB

  in_specs = (_WHOLE, _SLOTS, _SLOTS, *(_WHOLE,) * 4)
  return function, in_specs, (_SLOTS, PartitionSpec(None, "data"))
