"""Sends requests to several servers, and collects their completions.

A server that dies is set aside, and its requests go elsewhere. It is asked now
and then how it is, and taken back when it is well. A request keeps its seed
through all its tries and ends in exactly one completion.

                   failures, silence, a lost model
        ready ────────────────────────────────────────▶ set aside
          ▲                                                 │
          └──────────── well, and serves the model ◀────────┘ asked now and then
"""

import asyncio
import collections
import contextlib
import heapq
import logging
import queue
import random
import time

from trd_jax.experiment.engines import ServerEngine as Spec
from trd_jax.experiment.errors import UserError
from trd_jax.generation.engines.engine import Request, Sampling, longest_first
from trd_jax.generation.engines.server_client import Server, Wanted
from trd_jax.generation.engines.server_protocol import Failed

_LOG = logging.getLogger(__name__)

# Seconds before a second try; doubles each time. The jitter that comes on top
# keeps requests that failed together from coming back together.
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 60.0
_MOST_DOUBLINGS = 10  # of the pause, which is at its longest by then
_STRIKES = 8  # failures in a row that set a server aside, even if it is well
# Seconds between questions to a server that is set aside; doubles each time it
# is, until it completes something.
_FIRST_PROBE = 1.0
_LONGEST_PROBE = 30.0
_WATCH_SECONDS = 30.0  # between looks at a server that is at work
_SILENCES = 3  # looks without an answer after which it is taken for dead
TELL_SECONDS = 10.0  # between lines about a server that is waited for


class _Job:
  """A request: its failed and refused tries, and the server of the last one."""

  def __init__(self, request: Request):
    self.request = request
    self.tries = 0
    self.refusals = 0
    self.last: Server | None = None


class Run:
  """A call of `generate`; all but `__init__` runs in the loop's thread."""

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
    self._todo = collections.deque(map(_Job, longest_first(requests)))
    # A heap of jobs to be tried again: when, a number that breaks ties, which.
    self._later: list[tuple[float, int, _Job]] = []
    self._unfinished = len(requests)
    self._failures = 0
    self._tasks: dict[asyncio.Task, Server] = {}
    self._lost_since: float | None = None
    # Since when servers refuse work and nothing has been completed.
    self._busy_since: float | None = None

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
          # Watchers never end by themselves, and the group waits for all its
          # tasks.
          watcher.cancel()

  async def _dispatch(self, group: asyncio.TaskGroup) -> None:
    """Hands out requests until every one has its completion."""
    # Completions that the reader hasn't taken, at most: with more no request is
    # begun, so that a slow reader doesn't fill the memory.
    unread = 2 * self._spec.concurrency * len(self._servers)
    while self._unfinished:
      now = time.monotonic()
      while self._later and self._later[0][0] <= now:
        # To the front: they have waited already, and the longest prompts are
        # first.
        self._todo.appendleft(heapq.heappop(self._later)[2])
      pause = TELL_SECONDS
      if self._found.qsize() >= unread:
        pause = 0.05
      elif self._todo and (server := self._freest(self._todo[0].last, now)):
        job = self._todo.popleft()
        server.in_flight += 1
        group.create_task(self._try(job, server))
        continue
      self._check_lost(now)
      # Sleeps until a task ends (`_wake`), or the next moment at which
      # something changes by itself: a retry is due, a server's rest or the
      # patience with lost servers is over.
      moments = [self._later[0][0]] if self._later else []
      moments += [s.rests_until for s in self._servers if s.rests_until > now]
      if self._lost_since is not None:
        moments.append(self._lost_since + self._spec.start_seconds)
      self._wake.clear()
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(min([now + pause, *moments]) - now):
          await self._wake.wait()

  def _freest(self, last: Server | None, now: float) -> Server | None:
    """Returns the ready server with most free slots, None where there is none.

    One that has just failed at the request comes last.
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
    """Lets a server complete a request; on failure puts the request off."""
    task = asyncio.current_task()
    assert task is not None
    # Cancelled tasks are looked for in `_tasks`, so a task enters it here, not
    # where it is made: cancelled before its first step it would never run, and
    # its request would be lost.
    self._tasks[task] = server
    try:
      if not server.ready:
        # It was set aside between the choice and this task's first step.
        raise Failed(server.problem)
      done = await server.complete(job.request, self._sampling, self._wanted)
      server.strikes = server.setbacks = 0
      self._busy_since = None
      self._unfinished -= 1
      self._found.put(done)
    except Failed as failed:
      # First the request is put off, then the server is questioned, which may
      # take half a minute: meanwhile others can take the request.
      self._again(job, server, failed)
      await self._suspect(server, failed)
    except asyncio.CancelledError:
      if server.ready:  # the whole run ends
        raise
      self._again(job, server, Failed(server.problem))
    finally:
      del self._tasks[task]
      server.in_flight -= 1
      self._wake.set()

  def _again(self, job: _Job, server: Server, failed: Failed) -> None:
    """Puts a request off to a later try.

    Raises:
      UserError: the request has failed too often, or servers refuse for too
        long.
    """
    job.last = server
    now = time.monotonic()
    # A refusal is no failure: a busy server would use up the tries of all
    # requests in a minute.
    if failed.busy:
      job.refusals += 1
      self._check_busy(now, server, failed)
    else:
      job.tries += 1
    if job.tries > self._spec.retries:
      raise UserError(
        f"request {job.request.key} failed {job.tries} times"
        f" (engine.server.retries={self._spec.retries}), the last time at"
        f" {server.url}: {failed}; what is finished is kept, and the same"
        " command goes on from there"
      )
    doublings = min(job.tries + job.refusals - 1, _MOST_DOUBLINGS)
    pause = min(_FIRST_PAUSE * 2**doublings, _LONGEST_PAUSE)
    pause *= random.uniform(0.5, 1.0)
    if failed.pause is not None:  # Another server may be asked before.
      server.rests_until = max(server.rests_until, now + failed.pause)
    self._failures += 1
    heapq.heappush(self._later, (now + pause, self._failures, job))

  def _check_busy(self, now: float, server: Server, failed: Failed) -> None:
    """Checks that servers complete something between their refusals.

    Raises:
      UserError: they have only refused for as long as a request may take, in
        which all that they had accepted before would have been completed.
    """
    if self._busy_since is None:
      self._busy_since = now
    seconds = self._spec.request_seconds
    if now - self._busy_since >= seconds:
      raise UserError(
        f"no request has been completed for {seconds:g} s"
        f" (engine.server.request_seconds), and {server.url} is busy"
        f" ({failed}); end what else it works on, or start more servers: what"
        " is finished is kept, and the same command goes on from there"
      )

  async def _suspect(self, server: Server, failed: Failed) -> None:
    """Sets a server aside if its failure isn't only about the request."""
    if failed.busy:
      return
    server.strikes += 1
    problem = None
    if failed.forgot:
      problem = str(failed)
    # A server may call itself well and fail at every request.
    elif server.strikes >= _STRIKES:
      problem = f"{server.strikes} failures in a row, the last: {failed}"
    elif server.ready:
      problem = await server.health()
    if problem is not None:
      self._set_aside(server, problem)

  def _set_aside(self, server: Server, problem: str) -> None:
    """Gives a server no more requests until `_watch` takes it back."""
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

  def _give_up(self, server: Server, problem: str) -> None:
    """Sets a server aside and gives up the requests that it has."""
    self._set_aside(server, problem)
    for task, its in self._tasks.items():
      if its is server:
        task.cancel()

  async def _watch(self, server: Server) -> None:
    """Watches a server: gives up a silent one, takes back one that is well."""
    silences = 0
    while True:
      if server.ready:
        with contextlib.suppress(TimeoutError):
          async with asyncio.timeout(_WATCH_SECONDS):
            await self._aside[server].wait()
        if not (server.ready and server.in_flight):
          continue
        # A completion may take an hour, so its silence says nothing; a machine
        # that is gone doesn't close its connections. Hence the question.
        problem = await server.health()
        silences = silences + 1 if problem else 0
        if silences >= _SILENCES:
          self._give_up(server, f"no sign of life: {problem}")
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
    """Returns whether a server is well and serves model and adapter."""
    try:
      problem = await server.health()
      # Looked for anew: started again it may serve something else, and it has
      # forgotten the adapter.
      if problem is None and await server.find(self._wanted):
        return True
    except (Failed, UserError) as error:
      problem = str(error)
    server.problem = problem or f"it serves {', '.join(server.serves)} now"
    return False

  def _check_lost(self, now: float) -> None:
    """Checks that some server is ready now and then.

    Raises:
      UserError: none has been for as long as a start may take.
    """
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
