"""What all tests run under, and in which order."""

import os

import pytest

from tests.support.devices import xla_flags

# Before the first import of JAX.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags()}"

# Files with these come first, in this order: what takes longest may not be
# what all other cores wait for in the end.
_LONGEST_FIRST = ("vllm", "multiprocess", "slow")


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
