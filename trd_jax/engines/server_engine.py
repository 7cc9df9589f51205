"""OpenAI-compatible servers, such as `vllm serve`, as one engine.

    requests ──▶ the ready server with most free slots ──▶ completions
        ▲                        │
        └── later, elsewhere ◀───┘ a try that failed

A thread runs an event loop with as many requests in flight as the servers may
have; the caller takes completions as they come. A server that dies is set
aside, asked now and then how it is, and taken back; its requests go
elsewhere. A request keeps its seed through all its tries and ends in one
completion.

Which of a server's models is ours is found by its folder, so the student's and
the teacher's servers can stand in one list: each engine uses those that serve
its model. `engine.server.model` overrides that for both models, and is meant
for runs that have only one.

A server's weights can't be looked into: one that was started on a folder
whose files have changed since must be started again.
"""

import asyncio
import collections
import contextlib
import dataclasses
import heapq
import logging
import queue
import random
import time
from collections.abc import Iterator, Sequence

from trd_jax.engine_sections import ServerEngine as Spec
from trd_jax.engines.engine import (
  Completion,
  ModelFiles,
  Request,
  Sampling,
  check_request,
)
from trd_jax.engines.event_loop import in_thread
from trd_jax.engines.server_client import Server, Wanted
from trd_jax.engines.server_protocol import Failed, check_sampling
from trd_jax.errors import UserError
from trd_jax.model_folder import CONFIG, read_json

_LOG = logging.getLogger(__name__)

_FIRST_PAUSE = 0.5  # seconds before a second try; doubles each time
_LONGEST_PAUSE = 60.0
_STRIKES = 8  # failures in a row that set a server aside, however well it is
# Seconds between questions to a server that is set aside; doubles each time it
# is, until it completes something.
_FIRST_PROBE = 1.0
_LONGEST_PROBE = 30.0
_WATCH_SECONDS = 30.0  # between looks at a server that is at work
_SILENCES = 3  # looks without an answer after which it is taken for dead
_TELL_SECONDS = 10.0  # between lines about a server that is waited for


class ServerEngine:
  """An engine of servers.

  Args:
    spec: the experiment's `engine.server` section.
    model: what they serve.
    max_model_tokens: longest prompt with its response.

  Raises:
    UserError: no server is ready in time or serves the model, one of them
      wants another API key, has too short a context, or refuses the adapter.
  """

  def __init__(self, spec: Spec, model: ModelFiles, *, max_model_tokens: int):
    self._spec = spec
    config = read_json(model.folder / CONFIG)
    self._wanted = Wanted.of(model, config, spec.model, max_model_tokens)
    servers = [Server(url, spec) for url in spec.urls]
    if not servers:
      raise UserError("engine.server.urls names no server")
    by_url = {server.url: server for server in servers}
    self._servers = list(by_url.values())
    for _ in in_thread(self._start):
      pass
    self._choose()
    # Where a completion ends must not depend on whose it is, so a server that
    # comes later needs as much room as these have.
    context = min(server.context for server in self._servers if server.model)
    self._wanted = dataclasses.replace(self._wanted, context=context)

  def generate(
    self, requests: Sequence[Request], sampling: Sampling
  ) -> Iterator[Completion]:
    """See `Engine.generate`.

    Closing the iterator gives up what is in flight.

    Raises:
      UserError: besides, at once where a server can't be asked for such
        sampling; while it runs where a server refuses a request, a request
        has failed too often, or no server is left.
    """
    requests = list(requests)
    for request in requests:
      check_request(
        request,
        vocab_size=self._wanted.head_rows,
        max_positions=self._wanted.context,
      )
    check_sampling(sampling, self._wanted.head_rows)
    return self._stream(requests, sampling)

  def close(self) -> None:
    """Nothing is held between two calls; the servers go on."""

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
      servers = [s for s in self._servers if s.model or not s.serves]
      run = _Run(servers, self._spec, self._wanted, asked, sampling)
      yield from in_thread(run.run)

  async def _start(self, found: queue.SimpleQueue) -> None:
    """Waits for every server and finds the model there."""
    async with contextlib.AsyncExitStack() as stack:
      for server in self._servers:
        await stack.enter_async_context(server)
      async with asyncio.TaskGroup() as group:
        for server in self._servers:
          group.create_task(self._await(server))

  async def _await(self, server: Server) -> None:
    begun = time.monotonic()
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
        tell = now + _TELL_SECONDS
      await asyncio.sleep(min(1.0, self._spec.start_seconds - waited))

  def _choose(self) -> None:
    """Says which servers can't be used, and fails where none can."""
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


class _Job:
  """A request, its failed tries, and the server of the last one."""

  def __init__(self, request: Request):
    self.request = request
    self.tries = 0
    self.last: Server | None = None


class _Run:
  """One call of `generate`; everything but `__init__` in the loop's thread."""

  def __init__(
    self,
    servers: list[Server],
    spec: Spec,
    wanted: Wanted,
    requests: list[Request],
    sampling: Sampling,
  ):
    self._servers = servers
    self._spec = spec
    self._wanted = wanted
    self._sampling = sampling
    # The longest first: they take longest, and none is left for the end.
    # Equal prompts stay together.
    ordered = sorted(requests, key=lambda r: -len(r.prompt_ids))
    self._todo = collections.deque(_Job(request) for request in ordered)
    # Jobs to be tried again: when, a number against ties, which.
    self._later: list[tuple[float, int, _Job]] = []
    self._unfinished = len(requests)
    self._failures = 0
    self._tasks: dict[asyncio.Task, Server] = {}
    self._lost_since: float | None = None

  async def run(self, found: queue.SimpleQueue) -> None:
    """Puts one completion a request into `found`."""
    self._found = found
    self._wake = asyncio.Event()
    self._aside = {server: asyncio.Event() for server in self._servers}
    async with contextlib.AsyncExitStack() as stack:
      for server in self._servers:
        await stack.enter_async_context(server)
      async with asyncio.TaskGroup() as group:
        watchers = [
          group.create_task(self._watch(server)) for server in self._servers
        ]
        await self._dispatch(group)
        for watcher in watchers:
          watcher.cancel()

  async def _dispatch(self, group: asyncio.TaskGroup) -> None:
    """Hands out requests until every one has its completion."""
    # A slow reader isn't buried under what it hasn't read.
    unread = 2 * self._spec.concurrency * len(self._servers)
    while self._unfinished:
      now = time.monotonic()
      while self._later and self._later[0][0] <= now:
        self._todo.appendleft(heapq.heappop(self._later)[2])
      pause = _TELL_SECONDS
      if self._found.qsize() >= unread:
        pause = 0.05
      elif self._todo and (server := self._freest(self._todo[0].last, now)):
        job = self._todo.popleft()
        server.in_flight += 1
        task = group.create_task(self._try(job, server))
        self._tasks[task] = server
        task.add_done_callback(self._tasks.pop)
        continue
      self._check_lost(now)
      moments = [self._later[0][0]] if self._later else []
      moments += [s.rests_until for s in self._servers if s.rests_until > now]
      if self._lost_since is not None:
        moments.append(self._lost_since + self._spec.start_seconds)
      self._wake.clear()
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(min([now + pause, *moments]) - now):
          await self._wake.wait()

  def _freest(self, last: Server | None, now: float) -> Server | None:
    """The ready server with most free slots, if there is one with any.

    Preferably none that has just failed at the request.
    """
    free = [
      server
      for server in self._servers
      if server.ready
      and server.rests_until <= now
      and server.in_flight < self._spec.concurrency
    ]
    return max(free, key=lambda s: (s is not last, -s.in_flight), default=None)

  async def _try(self, job: _Job, server: Server) -> None:
    """Has a server complete a request, or has it tried again."""
    try:
      done = await server.complete(job.request, self._sampling, self._wanted)
      server.strikes = server.setbacks = 0
      self._unfinished -= 1
      self._found.put(done)
    except Failed as failed:
      self._again(job, server, failed)
      await self._suspect(server, failed)
    except asyncio.CancelledError:
      if server.ready:  # the whole run ends
        raise
      self._again(job, server, Failed(server.problem))
    finally:
      server.in_flight -= 1
      self._wake.set()

  def _again(self, job: _Job, server: Server, failed: Failed) -> None:
    """Puts a request off."""
    job.tries += 1
    job.last = server
    if job.tries > self._spec.retries:
      raise UserError(
        f"request {job.request.key} failed {job.tries} times"
        f" (engine.server.retries={self._spec.retries}), the last time at"
        f" {server.url}: {failed}; what is finished is kept, and the same"
        " command goes on from there"
      )
    now = time.monotonic()
    pause = min(_FIRST_PAUSE * 2 ** (job.tries - 1), _LONGEST_PAUSE)
    pause *= random.uniform(0.5, 1.0)
    if failed.pause is not None:  # Another server may be asked before.
      server.rests_until = max(server.rests_until, now + failed.pause)
    self._failures += 1
    heapq.heappush(self._later, (now + pause, self._failures, job))

  async def _suspect(self, server: Server, failed: Failed) -> None:
    """Sets a server aside if the failure isn't the request's alone."""
    if failed.busy:
      return
    server.strikes += 1
    problem = None
    if failed.forgot:
      problem = str(failed)
    elif server.strikes >= _STRIKES:
      problem = f"{server.strikes} failures in a row, the last: {failed}"
    elif server.ready:
      problem = await server.health()
    if problem is not None:
      self._set_aside(server, problem)

  def _set_aside(self, server: Server, problem: str) -> None:
    if not server.ready:
      return
    server.ready = False
    self._aside[server].set()
    server.problem = problem
    server.setbacks += 1
    server.strikes = 0
    others = sum(other.ready for other in self._servers)
    _LOG.warning(
      "%s is set aside (%s); its requests go to %s",
      server.url,
      problem,
      f"{others} other{'s' * (others > 1)}"
      if others
      else "it again if it comes back within"
      f" {self._spec.start_seconds:g} s (engine.server.start_seconds): no other"
      " is left",
    )

  async def _watch(self, server: Server) -> None:
    """Takes a server back when it is well, and notices one that is silent."""
    silences = 0
    while True:
      if server.ready:
        with contextlib.suppress(TimeoutError):
          async with asyncio.timeout(_WATCH_SECONDS):
            await self._aside[server].wait()
        if not (server.ready and server.in_flight):
          continue
        problem = await server.health()
        silences = silences + 1 if problem else 0
        if silences >= _SILENCES:
          self._set_aside(server, f"no sign of life: {problem}")
          for task, its in list(self._tasks.items()):
            if its is server:
              task.cancel()
        continue
      silences = 0
      await asyncio.sleep(
        min(_FIRST_PROBE * 2 ** max(server.setbacks - 1, 0), _LONGEST_PROBE)
      )
      if await self._is_back(server):
        server.ready = True
        server.strikes = 0
        self._aside[server].clear()
        _LOG.warning("%s is taken back", server.url)
        self._wake.set()

  async def _is_back(self, server: Server) -> bool:
    """Whether a server is well and serves the model, its adapter included."""
    try:
      problem = await server.health()
      if problem is None and await server.find(self._wanted):
        return True
    except (Failed, UserError) as error:
      problem = str(error)
    server.problem = problem or f"it serves {', '.join(server.serves)} now"
    return False

  def _check_lost(self, now: float) -> None:
    """Fails where no server has been ready for as long as a start may take."""
    if any(server.ready for server in self._servers):
      self._lost_since = None
      return
    if self._lost_since is None:
      self._lost_since = now
    if now - self._lost_since >= self._spec.start_seconds:
      told = ", ".join(f"{s.url} ({s.problem})" for s in self._servers)
      raise UserError(
        f"no server has been ready for {self._spec.start_seconds:g} s: {told};"
        " start them again, and the same command goes on where it stopped"
      )
