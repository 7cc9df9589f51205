"""Trajectory-Refined Distillation in JAX."""

import sys

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


# A module is run as a program (python -m trd_jax.…), and this is its package.
if getattr(sys, "argv", None) and sys.argv[0] == "-m":
  _refuse_bare_python()
