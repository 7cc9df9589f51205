"""Bounds what a Jinja template may take: steps, time, memory and text.

A template is a program that somebody else wrote. Jinja's sandbox keeps it from
files and Python objects, and lets it loop for days or ask for a text of ten
gigabytes, some of that while it is compiled. No list of what it may call would
be complete, so each template is first compiled and rendered in a process that
the kernel ends (`objection`). What holds for the texts of that trial need not
hold for longer ones: wherever templates run, loops and macros count their
steps (`Environment`).
"""

import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox

_STEPS = 250_000  # of loops and macros in one rendering: part of a second
_SECONDS = 2  # of processor time, for all renderings of a trial
_MEMORY = 1 << 30  # bytes of address space
_CHARACTERS = 1_000_000  # of one message
_WALL = 60.0  # seconds, on a machine that is busy
_ROOT = str(Path(__file__).resolve().parents[2])


class TooMuch(jinja2.TemplateError):
  """A rendering that takes too many steps, or writes too much."""


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """Jinja's sandbox, in which loops and macros end."""

  _left = 0

  def count_step(self) -> str:
    """Counts one turn of a loop or one call of a macro.

    Raises:
      TooMuch: there have been too many since `render` began.
    """
    self._left -= 1
    if self._left < 0:
      raise TooMuch(f"takes more than {_STEPS:,} turns of loops and macros")
    return ""

  def _parse(
    self, source: str, name: str | None, filename: str | None
  ) -> jinja2.nodes.Template:
    tree = super()._parse(source, name, filename)
    # A macro that calls itself twice takes 2^1000 calls to reach the end of
    # Python's stack, and a recursive loop turns by calling itself.
    kinds = jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock
    for node in list(tree.find_all(kinds)):
      count = jinja2.nodes.EnvironmentAttribute(
        "count_step", lineno=node.lineno
      )
      call = jinja2.nodes.Call(count, [], [], None, None, lineno=node.lineno)
      node.body.insert(0, jinja2.nodes.ExprStmt(call, lineno=node.lineno))
    return tree


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
  """Renders a template of an `Environment`.

  Raises:
    TooMuch: it takes too many steps, or writes much more than it was given.
    Exception: of any kind, as a template is a program.
  """
  template.environment._left = _STEPS  # type: ignore[attr-defined]
  text = template.render(**variables)
  given = sum(len(v) for v in variables.values() if isinstance(v, str))
  if len(text) > _CHARACTERS + 10 * given:
    raise TooMuch(f"writes {len(text):,} characters")
  try:
    # A literal of Jinja's may hold half a surrogate pair, and no tokenizer
    # takes that.
    text.encode()
  except UnicodeEncodeError:
    raise jinja2.TemplateError("writes what is not valid Unicode") from None
  return text


def objection(
  language: str, trials: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
) -> tuple[int, str] | None:
  """Compiles and renders templates in a process that may not take much.

  What a template raises there is no objection: it raises the same here.

  Args:
    language: where a function that makes the `Environment` is, as
      "module:name".
    trials: the source of each template, and variables of JSON's kinds for each
      of its renderings.

  Returns:
    The first template that takes too much, and what of; None: there is none.
  """
  return _objection(language, json.dumps(trials))


@functools.cache
def _objection(language: str, trials: str) -> tuple[int, str] | None:
  path = os.environ.get("PYTHONPATH")
  environment = os.environ | {
    "PYTHONPATH": _ROOT + (os.pathsep + path if path else ""),
    "PYTHONIOENCODING": "utf-8",
  }
  # Without -P, a `json.py` in the working directory would be imported instead
  # of the library's.
  code = f"import sys, {__name__} as trial; trial.run(sys.argv[1])"
  command = [sys.executable, "-P", "-c", code, language]
  try:
    done = subprocess.run(
      command,
      input=trials.encode(),
      capture_output=True,
      env=environment,
      timeout=_WALL,
      start_new_session=True,  # an interrupt is the parent's to handle
    )
    code, out = done.returncode, done.stdout
    said = done.stderr.decode(errors="replace").strip().splitlines()
  except subprocess.TimeoutExpired as error:
    code, out, said = -signal.SIGXCPU, error.stdout or b"", []
  *passed, last = out.decode().split("\n")
  if code == 0:
    return (len(passed), json.loads(last)) if last else None
  why = f"ends the interpreter ({said[-1][:80] if said else code})"
  if code in (-signal.SIGXCPU, -signal.SIGKILL):
    why = f"doesn't end within {_SECONDS} s"
  return len(passed), why


def run(language: str) -> None:
  """Tries templates in a process of their own (see `objection`).

  Writes an empty line for each template that passes, and what the first takes
  that doesn't.
  """
  trials = json.loads(sys.stdin.buffer.read())
  module, _, name = language.partition(":")
  environment = getattr(importlib.import_module(module), name)()
  _limit()
  for source, renderings in trials:
    try:
      template = environment.from_string(source)
      for variables in renderings:
        render(template, variables)
    except TooMuch as error:
      print(end=json.dumps(str(error)))
      return
    except MemoryError:
      print(end=json.dumps(f"takes more than {_MEMORY >> 30} GiB of memory"))
      return
    except Exception:
      pass
    print(flush=True)


def _limit() -> None:
  """Bounds processor time and address space, where the system knows such."""
  with contextlib.suppress(ImportError, ValueError, OSError):
    import resource

    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    seconds = int(used) + _SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
