"""Processes that take turns: what every comparison here is made with.

Each variant is a process of its own, so that none holds memory, threads or
compiled code that slows another. It loads, compiles and runs once to warm up,
says that it is ready, and then waits on a pipe. The timed runs alternate,
forwards and backwards, so that a slow minute of the machine meets all alike,
and a ratio is of two runs of one round.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

# Does a timed run and returns what is to be kept of it.
Run = Callable[[], dict]
# Packages whose versions are told where a variant has imported them:
# distribution -> module.
PACKAGES = {
  "jax": "jax",
  "jaxlib": "jaxlib",
  "flax": "flax",
  "optax": "optax",
  "torch": "torch",
  "transformers": "transformers",
  "peft": "peft",
  "trl": "trl",
  "liger-kernel": "liger_kernel",
  "google-tunix": "tunix",
  "qwix": "qwix",
  "vllm": "vllm",
}
_LAST_WORDS = 2000


def serve(prepare: Callable[[], tuple[Run, dict]]) -> None:
  """A variant's side: gets ready, then does a run for each line on stdin.

  Args:
    prepare: loads, compiles and warms up; returns the run and what is to be
      known of the variant once.
  """
  replies = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # What libraries print is no reply.

  def reply(fields: dict) -> None:
    print(json.dumps(fields), file=replies, flush=True)

  start = time.perf_counter()
  run, about = prepare()
  seconds = time.perf_counter() - start
  reply({"start_s": seconds, "versions": imported_versions(), **about})
  for _ in sys.stdin:
    reply(run())


def imported_versions() -> dict[str, str]:
  """Versions of those `PACKAGES` that this process has imported."""
  versions = {}
  for name, module in PACKAGES.items():
    if module not in sys.modules:
      continue
    try:
      versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      # vLLM's CPU build is a distribution of another name.
      versions[name] = getattr(sys.modules[module], "__version__", "unknown")
  return versions


class Failed(Exception):
  """A variant's process ended before its time; the text is its last words."""


class Variant:
  """The other end of `serve`: starts a variant's process and waits for it.

  Raises:
    Failed: the process ended; also raised by `run`.
  """

  def __init__(self, command: Sequence[str], log: Path):
    """Starts the process; `log` takes what it and its libraries print."""
    self._log = log.open("w+")
    self._process = subprocess.Popen(
      list(command),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._log,
      text=True,
    )
    self.about = self._reply()

  def run(self) -> dict:
    """One timed run."""
    assert self._process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # `_reply` says more.
      self._process.stdin.write("\n")
      self._process.stdin.flush()
    return self._reply()

  def end(self) -> None:
    """Lets the process end and waits for it."""
    with contextlib.suppress(BrokenPipeError), self._process:
      pass  # Leaving closes the pipes, and the variant's loop with them.
    self._log.close()

  def _reply(self) -> dict:
    assert self._process.stdout is not None
    if line := self._process.stdout.readline():
      return json.loads(line)
    self._process.wait()
    self._log.seek(0)
    words = self._log.read()[-_LAST_WORDS:].strip()
    self.end()
    raise Failed(words or f"exit code {self._process.returncode}")


def take_turns(
  commands: Mapping[str, Sequence[str]], repeats: int
) -> dict[str, dict]:
  """Starts every variant, then lets them run by turns.

  Args:
    commands: name -> command line of a process that calls `serve`.
    repeats: timed runs of each.

  Returns:
    name -> `{"about": ..., "runs": [...]}`, with as many runs as `repeats`, or
    `{"failed": last words}` for a variant that couldn't start or go on; the
    others are measured all the same.
  """
  cases: dict[str, dict] = {}
  with _started(commands, cases) as variants:
    for repeat in range(repeats):
      names = list(variants)
      for name in names if repeat % 2 == 0 else names[::-1]:
        start = time.perf_counter()
        try:
          run = variants[name].run()
        except Failed as error:
          del variants[name]
          cases[name] = _failure(name, error)
          continue
        cases[name]["runs"].append(run)
        _say(f"{repeat + 1}/{repeats} {name}", start)
  return cases


@contextlib.contextmanager
def _started(commands, cases) -> Iterator[dict[str, Variant]]:
  variants: dict[str, Variant] = {}
  with tempfile.TemporaryDirectory() as folder:
    try:
      for number, (name, command) in enumerate(commands.items()):
        start = time.perf_counter()
        try:
          variant = Variant(command, Path(folder) / f"{number}.log")
        except Failed as error:
          cases[name] = _failure(name, error)
          continue
        variants[name] = variant
        cases[name] = {"about": variant.about, "runs": []}
        _say(f"ready {name}", start)
      yield variants
    finally:
      for variant in variants.values():
        variant.end()


def _failure(name: str, error: Failed) -> dict:
  print(f"{name} failed: {error}", file=sys.stderr, flush=True)
  return {"failed": str(error).splitlines()[-1]}


def _say(what: str, start: float) -> None:
  seconds = time.perf_counter() - start
  print(f"  {what}: {seconds:.1f} s", file=sys.stderr, flush=True)
