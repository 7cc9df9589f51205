"""Slots of the embedded engine that decode together.

Shape key: B slots of a batch, C steps of a chunk, V vocabulary, K likeliest
tokens that are asked for.
"""

import collections
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from trd_jax.experiment.errors import UserError
from trd_jax.generation.engines import jax_programs as programs
from trd_jax.generation.engines.engine import Completion, Sampling, TopTokens
from trd_jax.generation.engines.jax_programs import Draw, Ends, Rows, bucket
from trd_jax.generation.engines.jax_prompts import Prompts, Runner, Staged
from trd_jax.generation.engines.sampling import Likeliest, Plan, seed_words
from trd_jax.model.qwen3 import KVCache
from trd_jax.model.sharding import replicate

# Slots of a device below which a step of fewer costs hardly less, and doesn't
# pay for compiling it.
_LEAST_SHARE = {"cpu": 16}
_LEAST_SHARE_ACCELERATOR = 64

Then = Literal["refill", "join", "shrink"]


class _Answer(NamedTuple):
  """A request's tokens so far: ids, and each chunk's likeliest ones."""

  key: str
  ids: list[int]
  top: list[TopTokens]


class Batch:
  """Slots that decode together.

  Attributes:
    slots: how many there are.
    running: by slot, the request that is in it and its tokens so far.
  """

  def __init__(self, engine: Runner, sampling: Sampling, slots: int):
    B, V = slots, engine.config.vocab_size
    self.slots = slots
    self.running: dict[int, _Answer] = {}
    self._engine = engine
    self._sampling = sampling
    self._count = sampling.top_logprobs
    self._stop_ids = frozenset(sampling.stop_ids)
    self._vocab_size = min(sampling.vocab_size or V, V)
    self._plan = Plan.of(sampling.temperature, sampling.top_k, sampling.top_p)
    share = B // engine.mesh.size
    draw = Draw(
      np.array(sorted(self._stop_ids), np.int32),
      np.float32(sampling.temperature),
      np.float32(sampling.top_p),
    )
    # To end a chunk and begin the next takes about as long as half a step of
    # all of a device's slots. Nobody knows when the next slot will end, and no
    # rule without that knowledge beats waiting until idling has cost as much.
    # Where slots aren't refilled, to end a chunk gains less.
    ends = {
      "refill": Ends(np.int32(max(1, share // 2)), np.int32(0)),
      "join": Ends(np.int32(2 * share), np.int32(0)),
      "shrink": Ends(
        np.int32(engine.decode_steps * share),
        np.int32(self._half(B) // engine.mesh.size),
      ),
    }
    # On the devices for good, or each chunk would send them again.
    self._draw, self._ends = replicate((draw, ends), engine.mesh)
    self._rows_6B = np.zeros((len(Rows._fields), B), np.int32)
    self._rows = Rows(*self._rows_6B)
    self._length = 0
    self._cache: KVCache | None = None
    # The results of the chunk that runs; JAX fills them while the host goes on.
    self._coming: tuple[jax.Array, Likeliest | None] | None = None

  def refill(self, prompts: Prompts) -> None:
    """Puts waiting requests into free slots."""
    free = self._free()
    while free and prompts:
      taken = prompts.take([self._device(slot) for slot in free])
      self._place({free[n]: one for n, one in taken.items()}, prompts)
      free = [slot for n, slot in enumerate(free) if n not in taken]

  def launch(self, then: Then) -> None:
    """Starts a chunk (see `programs.decode`) and returns before it has ended.

    `harvest` waits for it. `then` says what comes after, and so when to end:
    `refill` soon after slots have become free; `join` a while after, for what
    is left may fit into another batch; `shrink` once what is left fits into
    half the slots.
    """
    engine = self._engine
    ends, steps = self._ends[then], engine.decode_steps
    # A program can't lengthen the cache, so it gets room for all that the chunk
    # can reach.
    self._fit(1, steps)
    self._cache, *coming = engine.run(
      programs.decode,
      engine.decoder,
      self._cache,
      self._rows_6B,
      self._draw,
      ends,
      shape=(
        self.slots,
        self._length,
        self._plan,
        self._vocab_size,
        self._count,
      ),
      config=engine.config,
      plan=self._plan,
      vocab_size=self._vocab_size,
      steps=engine.decode_steps,
      top=self._count,
    )
    self._coming = tuple(coming)

  def harvest(self) -> list[Completion]:
    """Waits for the chunk, takes its tokens and returns what has ended.

    Raises:
      UserError: a request's logits are NaN or infinite.
    """
    assert self._coming is not None
    # The first read waits for the device; until here the host was free.
    out_CB, top_CBK = self._coming
    self._coming = None
    rows, ended = self._rows, []
    found = None if top_CBK is None else TopTokens(*map(np.asarray, top_CBK))
    out_BC = np.asarray(out_CB).T
    if wrong := np.argwhere(out_BC == programs.NO_NUMBER).tolist():
      slot, step = wrong[0]
      answer = self.running[slot]
      raise UserError(
        f"{self._engine.name}: the logits of token {len(answer.ids) + step + 1}"
        f" of request {answer.key} are NaN or infinite in"
        f" {self._engine.dtype.name}, so that nothing can be drawn from them;"
        " use dtype=float32 if it is bfloat16, or weights that don't overflow"
      )
    count_B = np.sum(out_BC >= 0, axis=1)
    for slot in sorted(self.running):
      count = int(count_B[slot])
      if not count:
        continue
      answer = self.running[slot]
      ids = answer.ids
      ids.extend(out_BC[slot, :count].tolist())
      if found is not None:
        # Copies, so that a chunk's arrays don't stay for one slot's sake.
        part = TopTokens(*(x[:count, slot].copy() for x in found))
        answer.top.append(part)
      rows.token[slot] = ids[-1]
      rows.position[slot] += count
      rows.index[slot] = len(ids)
      stopped = ids[-1] in self._stop_ids
      if stopped or len(ids) == rows.limit[slot]:
        # A slot is active while its index is below its limit: 0 frees it.
        rows.limit[slot] = 0
        del self.running[slot]
        # A stop id that is the last token allowed counts as a stop.
        reason = "stop" if stopped else "length"
        top = joined(answer.top, self._count)
        ended.append(Completion(answer.key, tuple(ids), reason, top))
    return ended

  def holds(self, other: "Batch") -> bool:
    """Returns whether what runs in another batch finds free slots here."""
    return len(self.running) + len(other.running) <= self.slots

  def absorb(self, other: "Batch") -> None:
    """Takes over what runs in another batch, between two chunks of both.

    `holds` has to be true of it. A request that finds no free slot on its own
    device goes to another's.
    """
    engine, cache = self._engine, other._cache
    assert cache is not None
    devices = engine.mesh.size
    share = other.slots // devices
    free: list[list[int]] = [[] for _ in range(devices)]
    for slot in self._free():
      free[self._device(slot)].append(slot)
    # Rows stay on their device where they can: a copy there is cheap, one to
    # another device goes over a link or, on CPUs, through the host.
    stays: dict[int, int] = {}
    moves: list[list[int]] = [[] for _ in range(devices)]
    for source in other.running:
      device, row = divmod(source, share)
      if free[device]:
        slot = free[device].pop()
        stays[slot] = row
        self._take_over(slot, other, source)
      else:
        moves[device].append(row)
    if stays:
      self._insert(stays, cache, split=True)
    if most := max(map(len, moves)):
      # Rounded up to a power of two: each size has a program of its own.
      count = 1 << (most - 1).bit_length()
      row_P = np.zeros((devices, count), np.int32)
      arrives: dict[int, int] = {}
      for device, rows in enumerate(moves):
        row_P[device, : len(rows)] = rows
        for n, row in enumerate(rows):
          # To the device with most free slots, so that all stay about equally
          # busy.
          slot = max(free, key=len).pop()
          arrives[slot] = device * count + n
          self._take_over(slot, other, device * share + row)
      picked = engine.run(
        programs.pick,
        cache,
        row_P.ravel(),
        shape=(other.slots, other._length, row_P.size),
      )
      moved = programs.spread(picked, mesh=engine.mesh)
      self._insert(arrives, moved, split=False)
    other.running.clear()

  def _take_over(self, slot: int, other: "Batch", source: int) -> None:
    """Puts a request of another batch into this slot, all but its cache."""
    self.running[slot] = other.running[source]
    self._rows_6B[:, slot] = other._rows_6B[:, source]

  def compact(self) -> "Batch":
    """Returns a batch of half the slots or fewer if what runs fits, or self."""
    slots = self.slots
    while (half := self._half(slots)) and len(self.running) <= half:
      slots = half
    if slots == self.slots:
      return self
    smaller = Batch(self._engine, self._sampling, slots)
    smaller.absorb(self)
    return smaller

  def _half(self, slots: int) -> int:
    """Returns half of so many slots, 0 where fewer would cost hardly less."""
    mesh = self._engine.mesh
    share, odd = divmod(slots // mesh.size, 2)
    return 0 if odd or share < least_share(mesh) else share * mesh.size

  def _device(self, slot: int) -> int:
    """Returns the number of the device that has the slot."""
    return slot * self._engine.mesh.size // self.slots

  def _free(self) -> list[int]:
    """Lists slots without a request, those of the least busy device first.

    So every device gets its share where fewer requests than slots are left.
    """
    busy = collections.Counter(map(self._device, self.running))
    rank = []
    for slot in range(self.slots):
      if slot not in self.running:
        device = self._device(slot)
        rank.append((busy[device], slot))
        busy[device] += 1
    return [slot for _, slot in sorted(rank)]

  def _place(self, taken: dict[int, Staged], prompts: Prompts) -> None:
    """Moves requests into these free slots from rows of the staging area."""
    assert prompts.staging is not None
    rows = self._rows
    for slot, (waiting, _) in taken.items():
      self.running[slot] = _Answer(waiting.request.key, [], [])
      # The prompt is computed up to its last token but one. Decoding begins
      # with the last, so that the program that decodes draws the first token,
      # too.
      rows.token[slot] = waiting.request.prompt_ids[-1]
      rows.position[slot] = waiting.length - 1
      rows.index[slot] = 0
      rows.limit[slot] = waiting.limit
      words = seed_words([waiting.request.seed]).view(np.int32)
      rows.high[slot], rows.low[slot] = words[0]
    rows_of = {slot: row for slot, (_, row) in taken.items()}
    self._insert(rows_of, prompts.staging, split=prompts.split)

  def _insert(
    self, taken: dict[int, int], source: KVCache, split: bool
  ) -> None:
    """Copies rows of another cache into these slots; see `programs.insert`."""
    # The row that goes into a slot, -1 where it keeps what it has.
    row_B = np.full(self.slots, -1, np.int32)
    row_B[list(taken)] = list(taken.values())
    P, _, T, _ = source.values[0].shape
    self._fit(T, 1)
    self._cache = self._engine.run(
      programs.insert,
      self._cache,
      source,
      row_B,
      shape=(self.slots, P, T, self._length, split),
      split=split,
    )

  def _fit(self, least: int, steps: int) -> None:
    """Resizes the cache for so many steps, and at least `least` positions."""
    rows = self._rows
    # A step reads the whole cache, so it is no longer than the longest row
    # needs for this chunk; it grows and shrinks by buckets.
    ahead_B = np.minimum(steps, rows.limit - rows.index)
    end_B = (rows.position + ahead_B)[ahead_B > 0]
    need = max(least, int(np.max(end_B, initial=1)))
    length = bucket(need)
    if length < self._length:
      # Shrinks only to what the next chunks will need as well, or it would
      # shrink and grow by turns.
      ahead = 2 * self._engine.decode_steps
      length = min(self._length, bucket(need + ahead))
    if self._cache is None:
      self._cache = self._engine.run(
        programs.empty,
        shape=(self.slots, length),
        config=self._engine.config,
        dtype=self._engine.dtype,
        slots=self.slots,
        length=length,
      )
    elif length != self._length:
      self._cache = self._engine.run(
        programs.resize,
        self._cache,
        shape=(self.slots, self._length, length),
        length=length,
      )
    self._length = length


def least_share(mesh: Mesh) -> int:
  """Returns the fewest slots of a device that a batch is halved to."""
  platform = mesh.devices.flat[0].platform
  return _LEAST_SHARE.get(platform, _LEAST_SHARE_ACCELERATOR)


def joined(parts: Sequence[TopTokens], count: int) -> TopTokens | None:
  """Joins a completion's `count` likeliest tokens from those of its chunks."""
  if not count:
    return None
  none_RK = np.zeros((0, count))
  ids = [none_RK.astype(np.int32), *(part.ids for part in parts)]
  logprobs = [none_RK.astype(np.float32), *(part.logprobs for part in parts)]
  return TopTokens(np.concatenate(ids), np.concatenate(logprobs))
