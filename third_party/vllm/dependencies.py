"""Prints what an installed package asks for, but for what is named.

    python dependencies.py DISTRIBUTION [NAME ...]

One requirement a line, for `pip install -r`. So a package can be installed
with --no-deps and get all its dependencies except those that don't belong here.
"""

import importlib.metadata
import re
import sys

from packaging.requirements import Requirement


def canonical(name: str) -> str:
  """A distribution's name as PEP 503 compares it."""
  return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
  """Prints them."""
  distribution, *without = sys.argv[1:]
  excluded = {canonical(name) for name in without}
  for text in importlib.metadata.requires(distribution) or ():
    requirement = Requirement(text)
    if canonical(requirement.name) in excluded:
      continue
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
      continue
    requirement.marker = None
    print(requirement)


main()
