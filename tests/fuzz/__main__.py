"""Sends ten thousand inputs through all doors: python -m tests.fuzz.

Prints a row a door, and after the table each fault with its input. Exits with 1
where there is one.
"""

import argparse
import logging
import sys
import warnings

from tests.fuzz.doors import DOORS
from tests.fuzz.run import send

_TABLE = "{:<28}{:>9}{:>9}{:>10}{:>8}{:>10}"


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
  parser.add_argument("--inputs", type=int, default=12_000, help="in all")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", default="", help="doors whose names hold this")
  asked = parser.parse_args()
  warnings.simplefilter("error")
  logging.disable()  # what orbax says of a damaged checkpoint besides
  chosen = {name: door for name, door in DOORS.items() if asked.only in name}
  shares = sum(door.share for door in DOORS.values())
  print(f"seed {asked.seed}")
  print(
    _TABLE.format("door", "inputs", "refused", "accepted", "faults", "slowest")
  )
  counts = {}
  for name, door in chosen.items():
    examples = round(asked.inputs * door.share / shares)
    counts[name] = c = send(door, examples, seed=asked.seed)
    print(
      _TABLE.format(
        name, c.inputs, c.refused, c.accepted, c.failed, f"{c.slowest:.2f} s"
      ),
      flush=True,
    )
  every = counts.values()
  print(
    _TABLE.format(
      "all",
      sum(c.inputs for c in every),
      sum(c.refused for c in every),
      sum(c.accepted for c in every),
      sum(c.failed for c in every),
      f"{max(c.slowest for c in every):.2f} s",
    )
  )
  for name, c in counts.items():
    for where, (value, text) in c.faults.items():
      print(f"\n{name}: {where}\n{value}\n{text}")
  sys.exit(any(c.faults for c in every))


if __name__ == "__main__":
  main()
