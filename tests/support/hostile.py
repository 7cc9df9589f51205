"""Programs that mean harm, or a good mark that they did not earn.

They stand in `hostile_machine`, `hostile_escapes` and `hostile_cheats`.

Each has the reasons that its verdict may have. `@canary@`, `@folder@`,
`@port@`, `@abstract@` and `@marker@` stand for things of this machine that a
test makes; the right answer is a secret that no program is told.
"""

import textwrap
from typing import NamedTuple


class Hostile(NamedTuple):
  reasons: frozenset[str]
  source: str
  function: bool = False


ALL: dict[str, Hostile] = {}


def add(name: str, reasons: str, source: str, function: bool = False) -> None:
  assert name not in ALL
  source = textwrap.dedent(source).strip() + "\n"
  ALL[name] = Hostile(frozenset(reasons.split()), source, function)


def programs(**of_this_machine: object) -> dict[str, Hostile]:
  """All of them by name, with what stands for things of this machine."""
  found = {}
  for name, one in ALL.items():
    source = one.source
    for each, value in of_this_machine.items():
      source = source.replace(f"@{each}@", str(value))
    found[name] = one._replace(source=source)
  return found
