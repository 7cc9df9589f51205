"""`python -m trd_jax`: lists what can be run, with a line each."""

import ast
from collections.abc import Iterator
from pathlib import Path

from trd_jax.experiment import tables

_PACKAGE = Path(__file__).parent
# The pipeline's order; what isn't here comes after, by name.
_ORDER = ("pipeline", "rollout", "refine", "train", "merge", "evaluate")


def stages() -> Iterator[tuple[str, str]]:
  """Yields each module that calls `cli.main`, with its line for --help.

  The modules are read and not imported: a list should answer at once.
  """
  for path in sorted(_PACKAGE.rglob("*.py")):
    text = path.read_text("utf-8")
    if "cli.main" not in text or path.parent.name == "experiment":
      continue
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.Call) and ast.unparse(node.func) == "cli.main":
        parts = path.relative_to(_PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__main__")
        yield name, ast.literal_eval(node.args[2])


def main() -> None:
  """Prints the list."""
  found = dict(stages())
  names = [*_ORDER, *(name for name in found if name not in _ORDER)]
  print("python -m trd_jax.<stage> --help says more of each:\n")
  print(tables.columns([(name, found[name]) for name in names], indent="  "))


if __name__ == "__main__":
  main()
