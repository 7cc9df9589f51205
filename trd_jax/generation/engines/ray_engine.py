"""Runs any other engine in several processes and machines, under Ray Data.

The requests become a data set whose blocks are batches. An actor pool maps
them; each actor holds an engine of its own. Ray Data hands batches to actors
that are free, restarts actors that died, and gives their batches to others.

A batch comes back whole and in the order of its requests. Ray runs a lost batch
again and goes on where its output had stopped, so it has to come back with the
same keys in the same order. Its tokens may differ where an engine's do from run
to run (vLLM on GPUs); rows that were taken before stay as they were.
"""

import dataclasses
import importlib
import logging
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from trd_jax.experiment.errors import UserError, one_line
from trd_jax.experiment.files.json_files import read_object
from trd_jax.experiment.processes import supervise
from trd_jax.experiment.schema import Engine as Spec
from trd_jax.experiment.schema import Ray
from trd_jax.generation.engines.engine import (
  Completion,
  Engine,
  Request,
  Sampling,
  TopTokens,
  check_request,
  check_sampling,
  longest_first,
  missing,
)
from trd_jax.model.config import read_positions, read_size
from trd_jax.model.weights.model_files import ModelFiles

_GOES_ON = "what is there is kept, and the same command goes on from there"
# Spelt out: inferred from rows, an empty list or a None would give a column
# another type in one batch than in the next.
_REQUESTS = pa.schema(
  [
    ("key", pa.string()),
    ("prompt_ids", pa.list_(pa.int32())),
    ("seed", pa.int64()),
    ("max_new_tokens", pa.int32()),
  ]
)
_COMPLETIONS = pa.schema(
  [
    ("key", pa.string()),
    ("ids", pa.list_(pa.int32())),
    ("finish_reason", pa.string()),
    ("top_ids", pa.list_(pa.int32())),
    ("top_logprobs", pa.list_(pa.float32())),
  ]
)


class RayEngine:
  """An actor pool of engines.

  Args:
    spec: the experiment's `engine` section; each actor makes the engine that
      it names.
    model: the model that each actor loads, from a path that all machines see.
    max_model_tokens: longest prompt with its response.
    make: makes an actor's engine, `factory.make`.

  Raises:
    UserError: Ray isn't installed here, can't be reached, or has less than an
      actor needs.
  """

  def __init__(
    self,
    spec: Spec,
    model: ModelFiles,
    *,
    max_model_tokens: int,
    make: Callable[..., Engine],
  ):
    self._ray, self._data = _import()
    self._make = make
    self._spec = spec
    self._model = model
    self._max_model_tokens = max_model_tokens
    config = read_object(model.folder / "config.json")
    self._vocab_size = read_size(config, "vocab_size")
    self._max_positions = read_positions(config)
    # A cluster that somebody else has joined in this process stays joined.
    self._started = not self._ray.is_initialized()
    if self._started:
      _connect(self._ray, spec.ray)
    self._resources = self._reserve()

  def generate(
    self, requests: Sequence[Request], sampling: Sampling
  ) -> Iterator[Completion]:
    """Yields completions as `Engine.generate` does, a batch at a time."""
    check_sampling(sampling, self._vocab_size)
    for request in requests:
      check_request(
        request,
        vocab_size=self._vocab_size,
        max_positions=self._max_positions,
      )
    return self._stream(requests, sampling)

  def close(self) -> None:
    """Leaves the cluster, or ends the local one that it started."""
    if self._started and self._ray.is_initialized():
      self._ray.shutdown()

  def _stream(
    self, requests: Sequence[Request], sampling: Sampling
  ) -> Iterator[Completion]:
    if not requests:
      return
    ray = self._spec.ray
    ordered = longest_first(requests)
    blocks = [
      _to_table(ordered[start : start + ray.batch])
      for start in range(0, len(ordered), ray.batch)
    ]
    # vLLM and servers batch the requests of several calls themselves; two calls
    # of an engine that doesn't would only compete for its devices.
    at_once = ray.batches if self._spec.chosen.batches_calls else 1
    completed = self._data.from_arrow(blocks).map_batches(
      _Worker,
      fn_constructor_args=(
        self._make,
        # Without its `ray` section, or each actor would start a pool of its
        # own.
        dataclasses.replace(self._spec, ray=Ray()),
        self._model,
        self._max_model_tokens,
        sampling,
      ),
      # A block is a batch as it is; cut anew, a batch that is run again would
      # have other keys.
      batch_size=None,
      batch_format="pyarrow",
      compute=self._data.ActorPoolStrategy(
        size=min(ray.actors, len(blocks)),
        # One more than the actor works on, so that the next is there when one
        # ends.
        max_tasks_in_flight_per_actor=at_once + 1,
        max_concurrent_calls_per_actor=at_once,
      ),
      **self._resources,
    )
    left = {request.key for request in requests}
    try:
      for table in completed.iter_batches(
        batch_size=None, batch_format="pyarrow"
      ):
        for completion in _completions(table, sampling.top_logprobs):
          # Raises where a key comes twice, which would be a row too many.
          left.remove(completion.key)
          yield completion
    except Exception as error:
      raise _explained(error, self._ray.exceptions) from error
    if left:
      raise UserError(
        f"Ray returned without {len(left)} of {len(requests)} completions;"
        f" {_GOES_ON}"
      )

  def _reserve(self) -> dict[str, float]:
    """Returns what an actor reserves, after a check that the cluster has it.

    Without the check Ray would wait for such resources without an end.

    Raises:
      UserError: all actors together need more than there is.
    """
    ray, engine = self._spec.ray, self._spec.chosen
    has = self._ray.cluster_resources()
    gpus = ray.gpus
    # An actor holds all GPUs of its engine: vLLM starts its own processes for
    # them, of which Ray knows nothing.
    if gpus is None:
      # JAX takes all that its process is shown, which is one.
      each = 1 if engine.devices == "jax" else 0
      if engine.gpus is not None:
        each = engine.gpus.count
      gpus = each if has.get("GPU") else 0
    wanted = {"num_cpus": ray.cpus, "num_gpus": gpus}
    for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
      there = has.get(name, 0)
      if wanted[key] * ray.actors > there:
        raise UserError(
          f"engine.ray.actors={ray.actors} with {wanted[key]:g} {name}s each:"
          f" the cluster has {there:g}; ask for fewer actors, or set"
          f" engine.ray.{name.lower()}s"
        )
    return wanted


class _Worker:
  """An actor of the pool: holds an engine and completes batches."""

  def __init__(
    self,
    make: Callable[..., Engine],
    spec: Spec,
    model: ModelFiles,
    max_model_tokens: int,
    sampling: Sampling,
  ):
    self._engine = make(spec, model, max_model_tokens=max_model_tokens)
    self._sampling = sampling

  def __call__(self, batch: pa.Table) -> pa.Table:
    """Completes a batch of requests, in their order."""
    requests = [Request(**row) for row in batch.to_pylist()]
    made = {
      completion.key: completion
      for completion in self._engine.generate(requests, self._sampling)
    }
    return _from_completions([made[request.key] for request in requests])

  def __del__(self):
    """Closes the engine; Ray deletes an actor that is no longer needed."""
    self._engine.close()


def _import() -> tuple[Any, Any]:
  os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
  try:
    ray = importlib.import_module("ray")
    data = importlib.import_module("ray.data")
  except ImportError as error:
    advice = Ray.packages["ray"]
    raise missing("engine.ray.actors", "ray", advice, error) from error
  context = data.DataContext.get_current()
  context.enable_progress_bars = False  # the stage has its own
  context.print_on_execution_start = False
  logging.getLogger("ray.data").setLevel(logging.WARNING)
  return ray, data


def _connect(ray: Any, spec: Ray) -> None:
  """Joins the cluster that the config names, or starts a local one."""
  # Ray gives its workers the lowest priority but four. Beside anything else
  # that is at work on the machine an engine would hardly come to its turn.
  os.environ.setdefault("RAY_worker_niceness", "0")
  try:
    # Ray would have SIGTERM end this process with a code of its own.
    with supervise.handlers_kept():
      ray.init(
        address=spec.address or "local",
        include_dashboard=False if spec.address is None else None,
        logging_level=logging.WARNING,
      )
  except Exception as error:
    raise UserError(
      f"engine.ray.address={spec.address}: {one_line(error)}; give the"
      " address of a running cluster, or None for this machine"
    ) from error


def _explained(error: Exception, rays: Any) -> Exception:
  """Returns the error to show: a user's mistake, or that Ray itself failed.

  Args:
    error: what Ray Data raised.
    rays: the module `ray.exceptions`.

  Returns:
    `error` itself where an actor's code raised it: its traceback says more.
  """
  cause: BaseException | None = error
  lost: BaseException | None = None
  while cause is not None:
    if isinstance(cause, UserError):
      return UserError(f"in a Ray actor: {cause}")
    # Ray wraps an actor's exception in several of its own; the first that is a
    # `UserError` inside is what the user has to read.
    by_code = isinstance(cause, (rays.RayTaskError, rays.UserCodeException))
    by_code = by_code or getattr(cause, "actor_init_failed", False)
    if isinstance(cause, rays.RayError) and not by_code:
      lost = cause
    cause = getattr(cause, "cause", None) or cause.__cause__
  if lost is None:
    return error
  told = textwrap.shorten(str(lost) or type(lost).__name__, 400)
  return UserError(f"Ray failed ({told}); {_GOES_ON}")


def _to_table(requests: Sequence[Request]) -> pa.Table:
  rows = [
    {**vars(request), "prompt_ids": [int(i) for i in request.prompt_ids]}
    for request in requests
  ]
  return pa.Table.from_pylist(rows, schema=_REQUESTS)


def _from_completions(completions: Sequence[Completion]) -> pa.Table:
  rows = [
    {
      "key": made.key,
      "ids": list(made.ids),
      "finish_reason": made.finish_reason,
      "top_ids": None if made.top is None else made.top.ids.ravel(),
      "top_logprobs": None if made.top is None else made.top.logprobs.ravel(),
    }
    for made in completions
  ]
  return pa.Table.from_pylist(rows, schema=_COMPLETIONS)


def _completions(table: pa.Table, k: int) -> Iterator[Completion]:
  for row in table.to_pylist():
    top = None
    if row["top_ids"] is not None:
      top = TopTokens(
        np.array(row["top_ids"], np.int32).reshape(-1, k),
        np.array(row["top_logprobs"], np.float32).reshape(-1, k),
      )
    yield Completion(row["key"], tuple(row["ids"]), row["finish_reason"], top)
