"""What all tests run under, and in which order."""

import os
from collections.abc import Iterator

import pytest

from tests.support.devices import xla_flags

# Before the first import of JAX.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags()}"

# Files with these come first, in this order: what takes longest may not be
# what all other cores wait for in the end.
_LONGEST_FIRST = ("vllm", "multiprocess", "slow")


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
  """Compiles a program once, in however many of a file's tests it is made.

  A file whose tests begin the same run again and again asks for it. JAX's
  cache in a folder of this process's own: it writes its files in place, so
  processes that are killed could leave halves of them to others.
  """
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  changes = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
  }
  before = {name: getattr(jax.config, name) for name in changes}
  for values in (changes, before):
    for name, value in values.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()  # it remembers whether there is a folder
    if values is changes:
      yield


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
