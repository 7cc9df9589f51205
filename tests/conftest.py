"""What all tests run under, and in which order."""

import gc
import os
import signal

import pytest

from tests.support.devices import xla_flags
from trd_jax.experiment.files import paths

# Before the first import of JAX.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Once: pytest-xdist's workers inherit them, and find what was compiled under
# the same flags alone.
if xla_flags() not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags()}"

# Tracing makes objects by the hundred thousand, nearly all of which live on:
# looking through them for garbage at Python's own rate is a tenth of the time.
gc.set_threshold(200_000, 50, 100)

# Who starts the tests with `&` in a script, or under nohup, has interrupts
# ignored in them and in all that they start, and many tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

# Files with these come first, in this order: what takes longest may not be
# what all other cores wait for in the end.
_LONGEST_FIRST = ("vllm", "multiprocess", "slow")


def pytest_configure(config: pytest.Config) -> None:
  """Keeps what JAX compiles, for all processes of this run and of later ones.

  Most of the tests' time is compilation, much of it of the same programs. A
  process that is killed as it writes leaves a torn entry: JAX warns, and
  compiles anew (pyproject.toml takes that warning for no error).
  """
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = config.rootpath / ".pytest_cache" / "xla" / paths.kind_of_cpu()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
  # By default only what takes a second, and no test's program does.
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Puts the files of long tests first; a file's tests stay together."""
  marks: dict[str, set[str]] = {}
  for item in items:
    marks.setdefault(item.location[0], set()).update(
      mark.name for mark in item.iter_markers()
    )

  def place(item: pytest.Item) -> int:
    of_file = marks[item.location[0]]
    found = (n for n, name in enumerate(_LONGEST_FIRST) if name in of_file)
    return next(found, len(_LONGEST_FIRST))

  items.sort(key=place)
