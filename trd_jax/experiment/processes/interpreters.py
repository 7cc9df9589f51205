"""Tries the Python interpreters that stages will be started with."""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import json_files
from trd_jax.experiment.processes import commands

LEAST = (3, 11)
VLLM = ".venv-vllm/bin/python"
INSTALL = "pip install trd-jax there"
"""How to get what the package needs into an interpreter."""
# Interpreters that a script of ours makes; an absent one may still be made.
MADE_BY = {
  VLLM: "third_party/vllm/install.sh",
  ".venv-evalplus/bin/python": "third_party/evalplus/install.sh",
  ".venv-lcb/bin/python": "third_party/lcb_runner/install.sh",
}
_SECONDS = 30.0
# For every Python since 3.0; as with -m, the working directory is on the path.
_PROBE = """
import json, sys
missing = []
if sys.version_info >= (3, 4):
  from importlib.util import find_spec
  for name in sys.argv[1:]:
    try:
      found = find_spec(name) is not None
    except (ImportError, ValueError):
      found = False
    if not found:
      missing.append(name)
print(json.dumps([list(sys.version_info[:3]), missing]))
"""


class NotMade(Exception):
  """An interpreter is absent that one of our scripts makes; names both."""


def check(
  key: str, python: str | None, packages: Mapping[str, str], least=LEAST
) -> str:
  """Starts an interpreter and checks that it is fit for its stages.

  Args:
    key: the config's key that names it.
    python: its path or name; None: this process's own.
    packages: modules that it must be able to import, each with how to get it.
    least: its lowest version.

  Returns:
    Its version, as '3.11.4'.

  Raises:
    UserError: it is no Python, too old, or lacks a module.
    NotMade: one of our scripts makes it and hasn't yet.
  """
  named = f"{key}={python}" if python else f"{key} ({sys.executable})"
  path = shutil.which(python or sys.executable)
  if path is None:
    raise _absent(named, key, python or sys.executable)
  try:
    # Asked of the interpreter itself, in a process: what this one can import
    # says nothing about another.
    answer = commands.ask([path, "-c", _PROBE, *packages], _SECONDS)
    # The last line: an interpreter's site may print something of its own.
    version, missing = json_files.loads(answer.out.splitlines()[-1])
  except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
    raise UserError(
      f"{named} can't be run as Python ({type(error).__name__}); name another"
      f" interpreter with --config.{key}"
    ) from None
  shown = ".".join(map(str, version))
  if tuple(version) < least:
    raise UserError(
      f"{named} is Python {shown}; name one of version"
      f" {'.'.join(map(str, least))} or newer with --config.{key}"
    )
  if missing:
    # Several modules may come with one package: its advice is given once.
    advice = dict.fromkeys(packages[name] for name in missing)
    raise UserError(
      f"{named} can't import {', '.join(missing)}: {'; '.join(advice)}"
    )
  return shown


def _absent(named: str, key: str, python: str) -> Exception:
  """Returns the error about an interpreter that can't be found."""
  path = Path(python)
  for made, script in MADE_BY.items():
    if path.as_posix().endswith(made) and not path.exists():
      return NotMade(f"{named} is not there: {script} makes it")
  what = "is not there"
  if path.is_dir():
    what = "is a folder, no interpreter"
  elif path.exists():
    what = "is no program that may be run"
  return UserError(
    f"{named} {what}; make it (for vLLM: third_party/vllm/install.sh), or name"
    f" another interpreter with --config.{key}"
  )


def keys_of(
  modules: Sequence[str], python
) -> dict[str, tuple[str, str | None]]:
  """Returns, by stage, the key that names its interpreter, and its value.

  Args:
    modules: the stages.
    python: the experiment's section.
  """
  needed = {}
  for module in modules:
    own = getattr(python, module) is not None
    shared = module in ("rollout", "refine", "evaluate")
    name = "generation" if shared and not own else module
    needed[module] = f"python.{name}", python.of(module)
  return needed
