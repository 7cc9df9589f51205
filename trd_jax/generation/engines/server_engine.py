"""OpenAI-compatible servers, such as `vllm serve`, as one engine.

    requests ──▶ the ready server with most free slots ──▶ completions
        ▲                        │
        └── later, elsewhere ◀───┘ a try that failed

A thread runs an event loop with as many requests in flight as the servers may
have (`server_run`); the caller takes completions as they come.

The model is recognised among those of a server by its folder. So the student's
and the teacher's servers can stand in one list: each engine uses those that
serve its model. `engine.server.model` overrides that for both models, and is
meant for runs that have only one.

Nobody can see which weights a server holds: if the files of its folder have
changed since it was started, it must be started again.
"""

import asyncio
import contextlib
import dataclasses
import logging
import queue
import time
from collections.abc import Iterator, Sequence

from trd_jax.experiment.engines import ServerEngine as Spec
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files.json_files import read_object
from trd_jax.generation.engines.engine import (
  Completion,
  Drafted,
  Engine,
  Request,
  Sampling,
  check_request,
)
from trd_jax.generation.engines.event_loop import in_thread
from trd_jax.generation.engines.server_client import Server, Wanted
from trd_jax.generation.engines.server_protocol import Failed, check_servable
from trd_jax.generation.engines.server_run import TELL_SECONDS, Run
from trd_jax.model.weights.model_files import ModelFiles
from trd_jax.model.weights.model_folder import CONFIG

_LOG = logging.getLogger(__name__)


def make(spec: Spec, model: ModelFiles, *, max_model_tokens: int) -> Engine:
  """Makes the engine of `factory.make`."""
  return ServerEngine(spec, model, max_model_tokens=max_model_tokens)


class ServerEngine:
  """An engine of servers.

  Args:
    spec: the experiment's `engine.server` section.
    model: the model that they serve.
    max_model_tokens: longest prompt with its response.

  Raises:
    UserError: no server is ready in time or serves the model, one of them
      wants another API key, has too short a context, or refuses the adapter.
  """

  def __init__(self, spec: Spec, model: ModelFiles, *, max_model_tokens: int):
    self._spec = spec
    config = read_object(model.folder / CONFIG)
    self._wanted = Wanted.of(model, config, spec.model, max_model_tokens)
    servers = [Server(url, spec) for url in spec.urls]
    if not servers:
      raise UserError("engine.server.urls names no server")
    # An address that is given twice, with and without /v1, would get twice the
    # requests that a server may have.
    by_url = {server.url: server for server in servers}
    self._servers = list(by_url.values())
    for _ in in_thread(self._start):
      pass
    self._choose()
    # All servers get the shortest context among them: where a completion ends
    # must not depend on the server that made it. One that is ready only later
    # needs as much.
    context = min(server.context for server in self._servers if server.model)
    self._wanted = dataclasses.replace(self._wanted, context=context)

  def generate(
    self, requests: Sequence[Request], sampling: Sampling
  ) -> Iterator[Completion]:
    """Yields completions as `Engine.generate` does.

    Closing the iterator gives up what is in flight.

    Raises:
      UserError: as `Engine.generate`; at once, where servers can't do such
        sampling; and later, where a server refuses a request, a request has
        failed too often, or no server is left.
    """
    requests = list(requests)
    for request in requests:
      check_request(
        request,
        vocab_size=self._wanted.head_rows,
        max_positions=self._wanted.context,
      )
    check_servable(sampling, self._wanted.head_rows)
    return self._stream(requests, sampling)

  def drafted(self) -> Drafted | None:
    """Returns the counts of those servers that draft; None: none does.

    They are the servers' own, with what others ask of them.
    """
    found = [each for each in in_thread(self._count) if each is not None]
    return Drafted(*map(sum, zip(*found, strict=True))) if found else None

  def close(self) -> None:
    """Releases nothing: nothing is held between calls, and servers go on."""

  def _stream(
    self, requests: list[Request], sampling: Sampling
  ) -> Iterator[Completion]:
    asked = []
    for request in requests:
      if request.max_new_tokens:
        asked.append(request)
      else:
        yield Completion(request.key, (), "length")
    if asked:
      # Those that were late are watched as well and join when they are ready;
      # those that serve other models only are left out.
      servers = [s for s in self._servers if s.model or not s.serves]
      run = Run(servers, self._spec, self._wanted, asked, sampling)
      yield from in_thread(run.run)

  async def _start(self, found: queue.SimpleQueue) -> None:
    """Waits for every server and finds the model there."""
    async with contextlib.AsyncExitStack() as stack:
      for server in self._servers:
        await stack.enter_async_context(server)
      # All at once: each may need minutes to start, and start together.
      async with asyncio.TaskGroup() as group:
        for server in self._servers:
          group.create_task(self._await(server))

  async def _count(self, found: queue.SimpleQueue) -> None:
    """Asks each server that drafts for its counts."""
    for server in self._servers:
      if server.drafts:
        async with server:
          found.put(await server.drafted())

  async def _await(self, server: Server) -> None:
    """Waits until a server is well, or too long; then looks for the model."""
    begun = time.monotonic()
    # A server that is up answers at once, and nothing is printed of it.
    tell = begun + 2.0
    while True:
      left = begun + self._spec.start_seconds - time.monotonic()
      try:
        problem = await server.health(max(1.0, min(left, 30.0)))
        if problem is None:
          server.ready = await server.find(self._wanted)
          server.problem = ""
          return
      except Failed as failed:
        problem = str(failed)
      server.problem = problem
      now = time.monotonic()
      waited = now - begun
      if waited >= self._spec.start_seconds:
        return
      if now >= tell:
        _LOG.warning("waiting for %s (%.0f s): %s", server.url, waited, problem)
        tell = now + TELL_SECONDS
      await asyncio.sleep(min(1.0, self._spec.start_seconds - waited))

  def _choose(self) -> None:
    """Warns of servers that can't be used.

    Raises:
      UserError: none can.
    """
    late = [s for s in self._servers if not s.ready and s.problem]
    told = ", ".join(f"{s.url} ({s.problem})" for s in late)
    seconds = self._spec.start_seconds
    if len(late) == len(self._servers):
      raise UserError(
        f"no server answers after {seconds:g} s: {told}; start them with"
        " launch/serve.sh, or correct engine.server.urls"
      )
    if not any(server.ready for server in self._servers):
      lists = "; ".join(
        f"{s.url} serves {', '.join(s.serves) or 'nothing'}"
        for s in self._servers
        if not s.problem
      )
      raise UserError(
        f"no server serves {self._wanted.spoken}: {lists}"
        f"{f'; not ready: {told}' if told else ''}; start one with"
        " launch/serve.sh, or say by engine.server.model what the model is"
        " called there"
      )
    if told:
      _LOG.warning("going on without %s, not ready after %g s", told, seconds)
