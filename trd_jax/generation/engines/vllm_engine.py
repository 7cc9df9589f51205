"""Runs vLLM from the stage's own process, on GPUs or as its CPU build.

`AsyncLLM` runs its copies of the model in processes of their own. A thread of
this process feeds them and hands on what they finish, while the caller grades
and writes. Token ids go in and come out: vLLM neither tokenizes nor makes text.

vLLM gets as many requests as keep it busy; the rest wait here (`feeder`), so
that 40,000 prompts don't lie in vLLM's queue. They also wait for a caller who
is slower than vLLM.

docs/generation.md says what each argument does in vLLM, on GPUs too.
"""

import asyncio
import atexit
import contextlib
import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent import futures
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np

from trd_jax.experiment.engines import FLOAT32_ADAPTER, LORA_RANKS, vllm_refuses
from trd_jax.experiment.engines import VllmEngine as Spec
from trd_jax.experiment.errors import UserError, one_line
from trd_jax.experiment.files.json_files import read_object
from trd_jax.experiment.processes.guard import Guard
from trd_jax.generation.engines.engine import (
  Completion,
  Drafted,
  Engine,
  Request,
  Sampling,
  TopTokens,
  check_request,
  check_sampling,
  missing,
)
from trd_jax.generation.engines.feeder import Feeder
from trd_jax.generation.engines.server_protocol import COUNTERS, MINUS_ONE
from trd_jax.model.config import read_positions, read_size
from trd_jax.model.weights.model_files import ModelFiles
from trd_jax.model.weights.model_folder import CONFIG

_SILENT_SECONDS = 60.0  # of a start, after which it says that it goes on
_END_SECONDS = 30.0  # that vLLM has to let go of what was cancelled
_MOST_TOP_LOGPROBS = 1024  # as `refine.teacher_top_k` allows
_CPU_CACHE_BYTES = 4 << 30
_WORKER = "trd_jax.generation.engines.vllm_worker"
# By its name: CPU builds take the word "uni" for processes of workers.
_IN_ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
_LEAST_SHARE = 0.01  # of a GPU's memory; vLLM wants one above 0
# Lengths of what is looked up in the prompt. Shorter ends of a text are found
# too often: more tokens would be checked in vain. Longer ones tell no more.
LOOKUP_MIN, LOOKUP_MAX = 3, 8
_NOT_NUMBERS = "NaNs detected in logits"  # in vLLM's words


def make(spec: Spec, model: ModelFiles, *, max_model_tokens: int) -> Engine:
  """Makes the engine of `factory.make`."""
  return VllmEngine(spec, model, max_model_tokens=max_model_tokens)


def refuses_drafts(spec: Spec, sampling: Sampling) -> str | None:
  """Returns why vLLM here can't draft at such sampling, or None: it can.

  Its CPU build hands its check of drafts a temperature that was never written
  (vllm-project/vllm#55005). A greedy choice reads none.
  """
  _import(spec)
  if sampling.temperature and _on_cpu() and not _runs_v2():
    return (
      f"vLLM's CPU build checks drafts at temperature 0 alone, and it is"
      f" {sampling.temperature:g}"
    )
  return None


class VllmEngine:
  """An engine of vLLM; several threads may generate at once.

  Args:
    spec: the experiment's `engine.vllm` section.
    model: the model that it loads.
    max_model_tokens: longest prompt with its response.

  Raises:
    UserError: vLLM isn't installed here or refuses to start, or
      `max_model_tokens` of the section is too small.
  """

  def __init__(self, spec: Spec, model: ModelFiles, *, max_model_tokens: int):
    config = read_object(model.folder / CONFIG)
    self._rows = read_size(config, "vocab_size")
    self._longest = _longest(spec, read_positions(config), max_model_tokens)
    self._model = model
    vllm = _import(spec)
    self._lora = None
    if model.adapter is not None:
      request = importlib.import_module("vllm.lora.request").LoRARequest
      self._lora = request(model.revision, 1, str(model.adapter.resolve()))
    self._params = vllm.SamplingParams
    self._final = importlib.import_module(
      "vllm.sampling_params"
    ).RequestOutputKind.FINAL_ONLY
    self._tokens = importlib.import_module("vllm.inputs").TokensPrompt
    self._llm: Any = None
    # V1 refuses `SurplusRows` beside drafts and is told the allowed ids.
    self._drafts = spec.drafts
    self._v1_drafts = spec.drafts and not _runs_v2()
    arguments = _arguments(spec, model, self._longest)
    copies = spec.tensor_parallel * spec.data_parallel
    self._worker: Any = importlib.import_module(_WORKER)
    self._folder = Path(tempfile.mkdtemp(prefix="trd-jax-vllm-"))
    self._failure = self._folder / "failure"
    os.environ[self._worker.FAILURE] = str(self._failure)
    # Where this process is killed, vLLM's live on and keep the GPU's memory.
    self._guard = Guard()
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(
      target=_run, args=(self._loop,), name="vllm", daemon=True
    )
    self._thread.start()
    # A task for each iterator that has not come to its end.
    self._work: set[asyncio.Task[None]] = set()
    self._serial = 0
    self._mutex = threading.Lock()
    start = time.monotonic()
    _say(f"loading {model.name} ({model.dtype})")
    if self._drafts:
      _say(f"drafts {spec.speculative_tokens} tokens ahead, from the prompt")
    try:
      # For vLLM's processes only; this one goes on using threads.
      with _default_environment(_of_processes(copies)):
        self._llm = self._wait(_start(vllm, arguments), patiently=True)
    except Exception as error:
      reason = self._reason(error)
      self.close()
      raise UserError(
        f"vLLM can't start with {model.folder}: {reason}; what it says above"
        " tells more"
      ) from error
    sequences = self._llm.vllm_config.scheduler_config.max_num_seqs
    self._sequences = sequences * spec.data_parallel
    # What is loaded by now stays loaded. A full collection would spend nearly
    # all its time on it, and this process stands still meanwhile.
    gc.collect()
    gc.freeze()
    # At exit, before vLLM's own tidying up, which fails once modules are gone.
    atexit.register(self.close)
    _say(f"ready after {time.monotonic() - start:.0f} s")

  def generate(
    self, requests: Sequence[Request], sampling: Sampling
  ) -> Iterator[Completion]:
    """Yields completions as `Engine.generate` does.

    Raises:
      UserError: as `Engine.generate`, and for a temperature that vLLM doesn't
        draw at.
    """
    check_sampling(sampling, self._rows)
    if problem := vllm_refuses(sampling.temperature):
      raise UserError(problem)
    for request in requests:
      check_request(
        request,
        vocab_size=self._rows,
        max_positions=self._longest,
      )
    return self._stream(requests, sampling)

  def reset_prefix_cache(self) -> None:
    """Forgets the KV cache of earlier prompts, for a fair measurement."""
    self._wait(self._llm.reset_prefix_cache())

  def drafted(self) -> Drafted | None:
    """Returns vLLM's own counts of drafts, of all copies of the model."""
    if not self._drafts:
      return None
    reader = importlib.import_module("vllm.v1.metrics.reader")
    names = [f"vllm:spec_decode_num_{each}" for each in COUNTERS]
    counts = dict.fromkeys(names, 0)
    for metric in reader.get_metrics_snapshot():
      if metric.name in counts:
        counts[metric.name] += int(metric.value)
    return Drafted(*counts.values())

  def close(self) -> None:
    """Ends vLLM's processes; what is in flight is lost."""
    atexit.unregister(self.close)
    while self._work:
      self._end(self._work.pop())
    if self._llm is not None:
      llm, self._llm = self._llm, None
      try:
        # First the task that reads from its processes, or it takes their end
        # for a failure and says so.
        if llm.output_handler is not None:
          self._end(llm.output_handler)
        llm.shutdown()
      finally:
        # Its `__del__` would shut down again, when modules may be gone.
        llm.shutdown = lambda: None
        gc.unfreeze()
    if self._loop.is_running():
      self._loop.call_soon_threadsafe(self._loop.stop)
      self._thread.join()
    self._guard.close()
    shutil.rmtree(self._folder, ignore_errors=True)

  def _stream(
    self, requests: Sequence[Request], sampling: Sampling
  ) -> Iterator[Completion]:
    """Yields completions as the event loop's thread finds them."""
    feeder = Feeder(
      requests, lambda request: self._one(request, sampling), self._sequences
    )
    work = self._wait(_begin(feeder.run()))
    self._work.add(work)
    try:
      yield from feeder.read()
    except Exception as error:
      raise UserError(self._told(self._reason(error))) from error
    finally:
      # Waits until vLLM has let go of these requests, or the next call would
      # share it with them. Work that isn't in the set was ended by `close`.
      if work in self._work:
        self._work.discard(work)
        self._end(work)

  def _reason(self, error: Exception) -> str:
    """Returns why vLLM failed: what its process said first, or the error."""
    with contextlib.suppress(OSError):
      return one_line(Exception(self._failure.read_text("utf-8")))
    return one_line(error)

  def _told(self, reason: str) -> str:
    """Returns the message for a user when vLLM ends while it generates."""
    if _NOT_NUMBERS in reason:
      return (
        f"{self._model.name}: its logits in {self._model.dtype} are no numbers"
        f" ({reason}); look for damaged weights in {self._model.folder}, or for"
        " values that this dtype can't hold"
      )
    return (
      f"vLLM stopped while it generated ({reason}); what is finished is kept,"
      " and the same command goes on from there"
    )

  def _end(self, work: asyncio.Task[Any]) -> None:
    """Cancels a task; returns once it has tidied up, or takes too long."""
    if threading.current_thread() is self._thread:
      # An iterator was collected as garbage on the loop's own thread, which
      # can't wait for itself.
      work.cancel()
      return
    ended = asyncio.run_coroutine_threadsafe(_cancel(work), self._loop)
    with contextlib.suppress(TimeoutError):
      ended.result(_END_SECONDS)

  async def _one(self, request: Request, sampling: Sampling) -> Completion:
    """Completes one request."""
    if not request.max_new_tokens:
      return Completion(request.key, (), "length")
    with self._mutex:
      self._serial += 1
      # Several threads may generate with equal keys; vLLM wants unique names.
      name = f"{self._serial}-{request.key}"
    room = self._longest - len(request.prompt_ids)
    params = self._params(
      temperature=sampling.temperature,
      top_p=sampling.top_p,
      top_k=sampling.top_k,
      seed=MINUS_ONE if request.seed == -1 else request.seed,
      max_tokens=min(request.max_new_tokens, room),
      # vLLM refuses ids outside of the head, which could end nothing anyway.
      stop_token_ids=[i for i in sampling.stop_ids if 0 <= i < self._rows],
      # A model's own stop ids count only if the caller asks for them.
      ignore_eos=True,
      detokenize=False,
      logprobs=sampling.top_logprobs or None,
      flat_logprobs=bool(sampling.top_logprobs),
      output_kind=self._final,
      extra_args=self._limit(sampling),
      allowed_token_ids=self._allowed(sampling),
      skip_clone=True,
    )
    prompt = self._tokens(
      type="token", prompt_token_ids=[int(i) for i in request.prompt_ids]
    )
    stream = self._llm.generate(prompt, params, name, lora_request=self._lora)
    # FINAL_ONLY: one output, the whole completion.
    (output,) = [output async for output in stream]
    made = output.outputs[0]
    if made.finish_reason not in ("stop", "length"):
      raise RuntimeError(f"request {request.key} ended: {made.finish_reason}")
    ids = tuple(made.token_ids)
    top = None
    if sampling.top_logprobs:
      top = _top(made.logprobs, len(ids), sampling.top_logprobs)
    return Completion(request.key, ids, made.finish_reason, top)

  def _limit(self, sampling: Sampling) -> dict[str, int] | None:
    """Returns the note for `SurplusRows`, None where no row is surplus."""
    rows = sampling.vocab_size
    if rows is None or rows >= self._rows:
      return None
    return {self._worker.KEY: rows}

  def _allowed(self, sampling: Sampling) -> list[int] | None:
    """Returns the ids that may be drawn, where `SurplusRows` can't be had."""
    if not self._v1_drafts or self._limit(sampling) is None:
      return None
    return list(range(sampling.vocab_size or self._rows))

  def _wait(
    self, work: Coroutine[Any, Any, Any], patiently: bool = False
  ) -> Any:
    """Runs a coroutine on the loop's thread; returns what it returns.

    Args:
      work: the coroutine.
      patiently: it may take minutes; says every so often that it still does.
    """
    future = asyncio.run_coroutine_threadsafe(work, self._loop)
    start = time.monotonic()
    while patiently:
      done, _ = futures.wait([future], _SILENT_SECONDS)
      if done:
        break
      _say(f"still starting after {time.monotonic() - start:.0f} s")
    return future.result()


def _run(loop: asyncio.AbstractEventLoop) -> None:
  """Runs an event loop in a thread whose processes don't hear a Ctrl-C.

  A terminal sends it to all of them. This process hears it and ends the others
  in order. vLLM's processes inherit the thread's mask; without it they would
  break off with tracebacks.
  """
  # Started here, before the mask: it starts with the first of vLLM's processes
  # otherwise, and unblocks the signal again.
  resource_tracker.ensure_running()
  signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  loop.run_forever()


async def _begin(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
  """Starts a coroutine on this thread's event loop; returns its task."""
  return asyncio.ensure_future(work)


async def _cancel(work: asyncio.Task[Any]) -> None:
  work.cancel()
  await asyncio.wait([work])


async def _start(vllm: Any, arguments: dict[str, Any]) -> Any:
  """Starts an AsyncLLM on this thread's event loop."""
  module = importlib.import_module("vllm.v1.engine.async_llm")
  usage = importlib.import_module("vllm.usage.usage_lib").UsageContext
  return module.AsyncLLM.from_engine_args(
    vllm.AsyncEngineArgs(**arguments),
    # Batches are as large as offline, where nobody waits for a first token.
    usage_context=usage.LLM_CLASS,
  )


def _of_processes(copies: int) -> dict[str, str]:
  """Returns variables for the processes of so many copies of the model."""
  # vLLM forks processes, of which tokenizers warns where it has threads.
  variables = {"TOKENIZERS_PARALLELISM": "false"}
  if _on_cpu():
    # OpenMP's threads spin while they wait for one another. One on each core
    # would spin against the thread that feeds them.
    cores = importlib.import_module("torch").get_num_threads()
    variables["OMP_NUM_THREADS"] = str(max(1, (cores - 1) // copies))
  return variables


def _runs_v2() -> bool:
  """Returns whether vLLM will run its second model runner, as it decides it."""
  asked = importlib.import_module("vllm.envs").VLLM_USE_V2_MODEL_RUNNER
  if asked is not None:
    return bool(asked)
  return bool(importlib.import_module("vllm.triton_utils").HAS_TRITON)


def _on_cpu() -> bool:
  """Returns whether vLLM here is its CPU build."""
  return importlib.import_module("vllm.platforms").current_platform.is_cpu()


@contextlib.contextmanager
def _default_environment(defaults: Mapping[str, str]) -> Iterator[None]:
  """Sets absent variables in the block, for processes that start in it."""
  mine = {k: v for k, v in defaults.items() if k not in os.environ}
  os.environ.update(mine)
  try:
    yield
  finally:
    for name in mine:
      os.environ.pop(name, None)


def _import(spec: Spec) -> Any:
  """Returns the package, told to be quiet and to stay off the network."""
  defaults = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    # vLLM would have it compiled at its start, for which there has to be a CUDA
    # toolkit, and then not use it: it samples without seeds.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # Without it vLLM draws tokens from NaNs, and nobody notices.
    "VLLM_RAISE_ON_LOGIT_NANS": "1",
  }
  for name, value in defaults.items():
    os.environ.setdefault(name, value)
  if spec.batch_invariant:
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
  try:
    return importlib.import_module("vllm")
  except ImportError as error:
    advice = spec.packages["vllm"]
    raise missing("engine.name=vllm", "vllm", advice, error) from error


def _longest(spec: Spec, positions: int, asked: int) -> int:
  """Returns the longest prompt with its response that vLLM makes room for.

  Raises:
    UserError: the config allows less than is needed and than the model has.
      Responses would end there as if the model's context were full.
  """
  needed = min(asked, positions)
  allowed = spec.max_model_tokens
  if allowed is not None and allowed < needed:
    raise UserError(
      f"engine.vllm.max_model_tokens={allowed} and {needed} are needed; raise"
      " it, leave it out, or lower the token limits"
    )
  return min(allowed or asked, positions)


def _arguments(spec: Spec, model: ModelFiles, longest: int) -> dict[str, Any]:
  """Returns the keys in vLLM's words; what is left to vLLM is left out.

  Raises:
    UserError: the adapter is none that vLLM can apply.
  """
  copies = spec.tensor_parallel * spec.data_parallel
  arguments: dict[str, Any] = {
    "model": str(model.folder),
    "dtype": model.dtype,
    "skip_tokenizer_init": True,
    # The experiment says how to sample, not the model's folder.
    "generation_config": "vllm",
    "seed": 0,
    "max_model_len": longest,
    "tensor_parallel_size": spec.tensor_parallel,
    "data_parallel_size": spec.data_parallel,
    # Within a placement group of Ray vLLM would take Ray for it.
    "distributed_executor_backend": "mp" if copies > 1 else "uni",
    "gpu_memory_utilization": spec.memory_share,
    "enable_prefix_caching": spec.prefix_caching,
    "enable_chunked_prefill": spec.chunked_prefill,
    "enforce_eager": bool(spec.eager),
    "max_logprobs": _MOST_TOP_LOGPROBS,
    # The model's own distribution, before temperature and masks.
    "logprobs_mode": "raw_logprobs",
    "logits_processors": [f"{_WORKER}:SurplusRows"],
    "disable_log_stats": True,
    "use_tqdm_on_load": False,
    "max_num_seqs": spec.max_num_seqs,
    "max_num_batched_tokens": spec.max_batched_tokens,
  }
  if spec.drafts:
    arguments["speculative_config"] = {
      "method": spec.speculative,
      "num_speculative_tokens": spec.speculative_tokens,
      "prompt_lookup_min": LOOKUP_MIN,
      "prompt_lookup_max": LOOKUP_MAX,
    }
    # Which drafts were right is among vLLM's statistics.
    arguments["disable_log_stats"] = False
    if not _runs_v2():
      del arguments["logits_processors"]
  on_cpu = _on_cpu()
  if on_cpu:
    # By itself vLLM takes most of the computer's memory for its cache.
    arguments["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
    # With it vLLM draws a token for a part of a prompt, too, and then sets the
    # generator back a step. A CPU's generator can't do that: vLLM 0.32 ends.
    arguments["enable_chunked_prefill"] = False
    # For small models compiling takes longer than it saves.
    arguments["enforce_eager"] = spec.eager is not False
    if spec.tensor_parallel == 1:
      # A worker's process would import all of vLLM once more, after the
      # engine's, and spin on shared memory while it waits for work.
      arguments["distributed_executor_backend"] = _IN_ONE_PROCESS
  if spec.kv_cache_gib is not None:
    arguments["kv_cache_memory_bytes"] = int(spec.kv_cache_gib * 2**30)
    if not on_cpu:
      # vLLM refuses to start where this share isn't free, though with a size
      # of the cache it takes no more than that.
      arguments["gpu_memory_utilization"] = _LEAST_SHARE
  if model.adapter is not None:
    if model.dtype == "float32" and not on_cpu:
      raise UserError(FLOAT32_ADAPTER)
    rank = read_object(model.adapter / "adapter_config.json")["r"]
    arguments |= {"enable_lora": True, "max_lora_rank": _lora_rank(rank)}
  return arguments


def _lora_rank(rank: int) -> int:
  """Returns the smallest rank that vLLM has room for and that holds `rank`.

  Raises:
    UserError: there is none.
  """
  for room in LORA_RANKS:
    if room >= max(8, rank):
      return room
  raise UserError(
    f"engine.weights=adapter: the adapter has rank {rank}, and vLLM applies"
    f" adapters up to rank {LORA_RANKS[-1]}; set engine.weights=merged"
  )


def _top(flat: Any, tokens: int, k: int) -> TopTokens:
  """Returns vLLM's flat log-probabilities as arrays.

  At each position vLLM lists the sampled token first, then the K likeliest,
  likeliest first.
  """
  starts = np.asarray(flat.start_indices)
  inside_RK = starts[:, None] + 1 + np.arange(k)
  ids = np.asarray(flat.token_ids, np.int32)
  logprobs = np.asarray(flat.logprobs, np.float32)
  if len(starts) != tokens or np.any(np.diff(starts) != k + 1):
    raise RuntimeError(f"{len(starts)} log-probabilities of {tokens} tokens")
  return TopTokens(ids[inside_RK], logprobs[inside_RK])


def _say(text: str) -> None:
  print(f"vllm: {text}", file=sys.stderr, flush=True)
