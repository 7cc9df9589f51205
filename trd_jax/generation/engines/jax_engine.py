"""The embedded engine: continuous batching with the training model's modules.

A fixed number of slots decode together. Requests wait in a queue, the longest
prompts first, so that what decodes together is about equally long and the cache
no longer than it must be. Each turn does three things:

1. refill: free slots get prompts whose keys and values were computed ahead, a
   group of prompts at a time, in a staging area: equal prompts once, and what
   all of them begin with, as a template and instructions, once for all;
2. decode: up to `decode_steps` tokens a slot in one program on the device,
   which stops early once slots have idled for long while others wait;
3. harvest: the tokens come to the host, and ended requests are yielded.

Many slots are several batches that take turns: while one decodes, another is
harvested and refilled. When no request waits, what is left of two batches goes
into one where it fits, and what is left of the last into half its slots or
fewer: a few long completions then cost no more than they must.

Prompts are computed up to their last token but one: decoding begins with the
last, so that only one program draws tokens. What is compiled depends on the
buckets of prompt and context length, on how many tokens all prompts begin with,
and on the number of slots.

A request's tokens follow from weights, prompt, seed and sampling. Nothing that
is computed for it uses its neighbours, its order or its slot. Only through the
compiled shapes and the number of devices can they change the order of sums, and
so the last bits of a logit. A token changes where two candidates with their
noise are that close (about 1e-6 in float32).
"""

import collections
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trd_jax.experiment.engines import JaxEngine as Spec
from trd_jax.experiment.errors import UserError
from trd_jax.generation.engines import jax_memory
from trd_jax.generation.engines import jax_programs as programs
from trd_jax.generation.engines.engine import (
  Completion,
  Engine,
  Request,
  Sampling,
  check_request,
  check_sampling,
)
from trd_jax.generation.engines.jax_batch import Batch, joined, least_share
from trd_jax.generation.engines.jax_prompts import Prompts
from trd_jax.model.backend import enough_memory, exact_products, start
from trd_jax.model.config import ModelConfig
from trd_jax.model.decoding import Decoder
from trd_jax.model.qwen3 import Qwen3
from trd_jax.model.sharding import make_mesh, replicate
from trd_jax.model.weights import adapters, hf
from trd_jax.model.weights.model_files import ModelFiles

_LOG = logging.getLogger(__name__)

# Up to here a model's products are too small to be worth splitting between
# cores.
_SMALL_PARAMETERS = 1 << 25
_MOST_CORES = 8

# A device of a CPU computes a product on its own core alone.
_ALONE = "--xla_cpu_multi_thread_eigen=false"

# Slots of a batch on one device, where the config sets none. A core's caches
# have no room for more; an accelerator computes many in the time of a few, and
# its memory is the limit.
_SLOTS = {"cpu": 64}
_SLOTS_ACCELERATOR = 256
# What a device's memory may cut that down to: powers of two and three times
# such. Few sizes, for each has programs of its own.
_SIZES = [n for n in range(1, 257) if n in (m := n & -n, 3 * m)]
# Batches of a small model on CPUs. While one is read and refilled, the other
# runs; and requests that start together end together, so caches are short.
_BATCHES = 2


def make(spec: Spec, model: ModelFiles, *, max_model_tokens: int) -> Engine:
  """Makes the engine of `factory.make`; its cache grows with what it is given.

  Args:
    spec: the experiment's `engine.jax` section.
    model: the model that it loads.
    max_model_tokens: not used.
  """
  del max_model_tokens
  return JaxEngine.load(
    model.folder,
    dtype=model.dtype,
    adapter=model.adapter,
    slots=spec.slots,
    decode_steps=spec.decode_steps,
  )


class JaxEngine:
  """Completes prompts with a Qwen3 in this process (see the module).

  Args:
    model: the model, with adapters or without. Each device has its weights
      whole; those of CPUs have them together.
    slots: sequences decoded at once, over all devices together. None: 64 a
      device on CPUs, twice that for small models (33M parameters), up to 256 a
      device on accelerators, as many as a call's longest request leaves room
      for (`jax_memory`), and no more than the power of two that holds a call's
      requests.
    decode_steps: most tokens a slot gets before the host looks at what has
      ended.
    devices: each decodes its share of the slots; all local ones by default.
    free: bytes of a device beyond the weights that a call may plan with; None:
      what accelerators say, and CPUs' without a bound.
    name: how messages refer to the model.

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
    free: int | None = None,
    name: str = "the model",
  ):
    if (slots is not None and slots < 1) or decode_steps < 1:
      raise UserError(
        f"engine.jax: slots={slots} and decode_steps={decode_steps} must both"
        " be at least 1"
      )
    devices = jax.local_devices() if devices is None else list(devices)
    self.name = name
    self.config: ModelConfig = model.config
    self.dtype: jnp.dtype = model.embed.embedding[...].dtype
    exact_products(devices[0].platform, [self.dtype])
    self.mesh = make_mesh(devices=devices)
    self.model: Qwen3 = replicate(model, self.mesh)
    self.decoder: Decoder = replicate(programs.lay_out(model), self.mesh)
    self._fixed = slots is not None
    self._free = free
    self._share = _SLOTS.get(devices[0].platform, _SLOTS_ACCELERATOR)
    if slots is None:
      slots = self._share * len(devices)
      if devices[0].platform == "cpu" and _is_small(self.config):
        slots *= _BATCHES
    # Rounded up, for every device has the same shapes.
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
    """Makes an engine with the weights of a Hugging Face folder.

    Where the process hasn't used JAX yet, the model is small (33M parameters)
    and nothing else sets the number of CPU devices, each core becomes one, up
    to 8, and JAX is started. That holds for the rest of the process, and so
    does that each device computes its products alone.

    Args:
      folder: see `weights.load`.
      dtype: of weights, cache and activations.
      adapter: a PEFT folder whose adapter is applied beside the weights,
        without dropout; see `adapters.load_peft`.
      **arguments: of the constructor.

    Raises:
      UserError: when the weights or the adapter can't be read, the adapter is
        of a model of another shape, JAX doesn't use the machine's GPUs, or a
        device's memory is too small for the weights.
    """
    config = hf.read_config(folder)
    if "devices" not in arguments:
      # Before JAX starts: the number of CPU devices can't be changed
      # afterwards.
      _use_cores(config)
    platform = start()
    lora = tree = mesh = None
    if adapter is not None:
      lora, tree = adapters.load_peft(adapter, config)
    if platform != "cpu":
      # Straight to where they stay: a device has the weights twice as it is, as
      # the model's modules and laid out for decoding.
      mesh = make_mesh(devices=arguments.get("devices") or jax.local_devices())
    arguments.setdefault(
      "name", f"{folder} with {adapter}" if adapter else str(folder)
    )
    with enough_memory(
      "the embedded engine keeps all weights on each device, and twice: set the"
      " model's dtype to bfloat16, or take engine.name=vllm, which has them"
      " once, or split over GPUs (engine.vllm.tensor_parallel)"
    ):
      model = hf.load(folder, dtype=dtype, lora=lora, mesh=mesh)
      if tree is not None:
        graph, fresh, base = nnx.split(model, nnx.LoRAParam, ...)
        nnx.replace_by_pure_dict(fresh, jax.tree.map(jnp.asarray, tree))
        model = nnx.merge(graph, fresh, base)
      return cls(model, **arguments)

  def generate(
    self, requests: Sequence[Request], sampling: Sampling
  ) -> Iterator[Completion]:
    """Yields one completion a request, as they finish.

    A completion ends with the first stop id, at the request's limit, or where
    the model's longest context is full.

    Raises:
      UserError: before anything is generated, on an empty prompt, one that
        fills the model's longest context, an id outside of the vocabulary, a
        negative limit, more likeliest tokens than the head has rows, or a
        request that a device's memory has no room for. Later, when a device is
        out of memory all the same, or the model's logits are NaN or infinite.
    """
    requests = list(requests)
    check_sampling(sampling, self.config.vocab_size)
    for request in requests:
      check_request(
        request,
        vocab_size=self.config.vocab_size,
        max_positions=self.config.max_positions,
      )
    # A generator's body runs at its first `next`: the checks are here, outside
    # of it, so that a wrong request is an error of this call.
    return self._stream(requests, sampling)

  def close(self) -> None:
    """Releases nothing: only the engine's own arrays are held."""

  def _stream(
    self, requests: list[Request], sampling: Sampling
  ) -> Iterator[Completion]:
    for request in requests:
      if not request.max_new_tokens:
        top = joined([], sampling.top_logprobs)
        yield Completion(request.key, (), "length", top)
    requests = [r for r in requests if r.max_new_tokens]
    prompts = Prompts(self, requests)
    slots = self._batches(len(requests), prompts)
    with enough_memory(
      f"lower engine.jax.slots, which is {sum(slots)} here; what has been"
      " completed is kept, and the same command goes on"
    ):
      yield from self._decode(prompts, sampling, slots)

  def _decode(
    self, prompts: Prompts, sampling: Sampling, slots: Sequence[int]
  ) -> Iterator[Completion]:
    """Completes all prompts with batches of so many slots.

    Args:
      prompts: the queue.
      sampling: for all of them.
      slots: those of each batch.
    """
    waiting = collections.deque(Batch(self, sampling, n) for n in slots)
    # Batches whose chunks are on their way, the first to end first.
    running: collections.deque[Batch] = collections.deque()
    while waiting or running:
      ended = []
      if not waiting:
        # The batch whose chunk was started first is the first to be ready. The
        # devices work on the others while the host reads it.
        batch = running.popleft()
        ended += batch.harvest()
        joins = running and not prompts and running[0].holds(batch)
        if batch.running and joins:
          other = running.popleft()
          ended += other.harvest()
          other.absorb(batch)
          waiting.append(other)
        if batch.running or prompts:
          waiting.append(batch)
      try:
        while waiting:
          batch = waiting.popleft()
          batch.refill(prompts)
          if batch.running:
            alone = not (running or waiting)
            # Only the last batch shrinks: with others there, or requests
            # waiting, its free slots are soon filled.
            if alone and not prompts:
              batch = batch.compact()
            batch.launch("refill" if prompts else "shrink" if alone else "join")
            running.append(batch)
      except jax.errors.JaxRuntimeError:
        # A device may be out of memory: what has been completed is not lost.
        yield from ended
        raise
      # After the launch, so that the caller's work and the devices' overlap.
      yield from ended

  def _batches(self, requests: int, prompts: Prompts) -> list[int]:
    """Returns the slots of each batch for so many requests."""
    devices, slots = self.mesh.size, self.slots
    if not self._fixed:
      # Few requests get few slots, by powers of two: each number is a program.
      power = 1 << (max(requests, 1) - 1).bit_length()
      slots = min(slots, -(-power // devices) * devices)
      free = self._free
      if free is None:
        free = jax_memory.free_bytes(list(self.mesh.devices.flat))
      if free is not None:
        share = jax_memory.slots_that_fit(
          self.config,
          self.dtype,
          free,
          prompts.call(),
          _SIZES,
          shrinks_from=2 * least_share(self.mesh),
        )
        slots = min(slots, share * devices)
    count = max(1, slots // (devices * self._share))
    # Batches of one size share their programs.
    return [-(-slots // (devices * count)) * devices] * count

  def run(self, program: Callable, *arguments, shape: tuple, **static) -> Any:
    """Calls a program and notes what it has been compiled for."""
    name = (program.__name__, *shape)
    if name not in self.programs:
      self.programs.add(name)
      _LOG.info("program %d: %s", len(self.programs), name)
    return program(*arguments, mesh=self.mesh, **static)


def _is_small(config: ModelConfig) -> bool:
  """Returns whether cores are better used one by one than for one product."""
  return config.num_parameters() <= _SMALL_PARAMETERS


def _use_cores(config: ModelConfig) -> None:
  """Makes each core a device, under the conditions of `JaxEngine.load`."""
  if not _is_small(config):
    return
  flags = os.environ.get("XLA_FLAGS")
  if "host_platform_device_count" in (flags or ""):
    return
  if jax.config.values["jax_num_cpu_devices"] != -1:
    return
  try:
    cores = len(os.sched_getaffinity(0))
    jax.config.update("jax_num_cpu_devices", min(cores, _MOST_CORES))
  except (AttributeError, RuntimeError):
    # No such count on this system, or JAX has started.
    return
  if cores > _MOST_CORES:
    return
  # A device that splits a product over cores takes those of the other devices.
  # XLA reads its flags once, when it starts; then the environment is restored,
  # for this process may start others.
  os.environ["XLA_FLAGS"] = f"{_ALONE} {flags or ''}"
  try:
    start()
    jax.block_until_ready(jnp.zeros(()))
  finally:
    del os.environ["XLA_FLAGS"]
    if flags is not None:
      os.environ["XLA_FLAGS"] = flags
