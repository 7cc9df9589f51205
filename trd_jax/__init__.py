"""Trajectory-Refined Distillation in JAX.

`load_config`, `run` and `open_run` are for notebooks and scripts
(docs/python.md); they are imported when they are first used, so that
`import trd_jax` stays light.
"""

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from trd_jax.pipeline.notebook import load_config, open_run, run

__all__ = ["load_config", "open_run", "run"]
__version__ = "0.1.0"


_LEAST = (3, 11)
_PACKAGES = (
  "absl",
  "ml_collections",
  "numpy",
  "pyarrow",
  "tokenizers",
  "jinja2",
)


def _refuse_bare_python() -> None:
  """Ends in one line, not a traceback, where packages aren't installed.

  Written so that older Pythons can read it, too.
  """
  told = ""
  if sys.version_info >= _LEAST:
    from importlib.util import find_spec

    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if not missing:
      return
    told = " without " + ", ".join(missing)
  sys.stderr.write(
    "trd-jax: {} is Python {}.{}{}: make an environment with Python {}.{} or"
    " newer (python3 -m venv .venv && .venv/bin/python -m pip install -e .) and"
    " use its Python\n".format(
      sys.executable, *sys.version_info[:2], told, *_LEAST
    )
  )
  sys.exit(2)


def _tell_interrupts() -> None:
  """Ends an interrupt in one line while packages are still imported.

  That takes a second, in which nothing else could catch it.
  """
  others = sys.excepthook

  def told(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
      sys.stderr.write("trd-jax: interrupted\n")
    else:
      others(kind, error, trace)

  sys.excepthook = told

  # Where exceptions are lost, as in the callbacks of imports, Python would say
  # so in four lines, and go on. Once a stage runs it minds its own signals.
  lost = sys.unraisablehook

  def told_of_lost(unraisable):
    mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not (mine and issubclass(unraisable.exc_type, KeyboardInterrupt)):
      lost(unraisable)
      return
    sys.stderr.write("trd-jax: interrupted\n")
    sys.stderr.flush()
    os._exit(130)

  sys.unraisablehook = told_of_lost


# A module is run as a program (python -m trd_jax.…), and this is its package.
if getattr(sys, "argv", None) and sys.argv[0] == "-m":
  _refuse_bare_python()
  _tell_interrupts()


def __getattr__(name):
  """Imports one of `__all__` at its first use."""
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  _refuse_bare_python()
  from trd_jax.pipeline import notebook

  return getattr(notebook, name)


def __dir__():
  """Names what can be used, what is imported later too."""
  return sorted([*globals(), *__all__])
