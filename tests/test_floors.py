"""The house: which room may import which, read from the imports themselves.

A room is a folder of the package, a stage a file or a folder with a
`__main__.py` beside them. A new module is in the room that its folder is:
nothing here has to be edited for it.
"""

import ast
from pathlib import Path

import pytest

from tests.support.places import ROOT

PACKAGE = ROOT / "trd_jax"
# Two of them look at a run that others have made: analyze/ as a page with
# figures and tables, show.py as text in the terminal where it was started.
MOST_ENTRIES = 18

# Which rooms a room may import from, itself aside. What stands above them all
# are the stages, which may import from every room and never from one another:
# they meet on disk.
MAY_IMPORT = {
  "experiment": set(),
  "data": {"experiment"},
  "grading": {"experiment", "data"},
  "model": {"experiment"},
  "generation": {"experiment", "data", "grading", "model"},
  "distill": {"experiment", "data", "model"},
  "lab": {"experiment", "data", "model"},
  "pipeline": {
    "experiment",
    "data",
    "grading",
    "model",
    "generation",
    "distill",
  },
}
WITHOUT_JAX = {"experiment", "data", "grading"}
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
FILES = sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
  """A file's module name below the package."""
  parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
  return ".".join(part for part in parts if part != "__init__")


MODULES = {dotted(path) for path in FILES}


def imports(tree: ast.AST):
  """Every imported module, nested imports too, as a dotted name."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are absolute here"
      assert node.module is not None
      for alias in node.names:
        inner = f"{node.module}.{alias.name}".removeprefix("trd_jax.")
        yield f"trd_jax.{inner}" if inner in MODULES else node.module


def violations(module: str, tree: ast.AST) -> list[str]:
  """What a module imports and may not."""
  room = module.split(".")[0]
  wrong = []
  for name in imports(tree):
    package, _, inner = name.partition(".")
    if package == "trd_jax":
      target = inner.split(".")[0]
      allowed = MAY_IMPORT.get(room, set(MAY_IMPORT)) | {room, ""}
      if target not in allowed:
        wrong.append(f"{module} imports {inner}: {room} may not use {target}")
    elif package in DEVICE_LIBRARIES and room in WITHOUT_JAX:
      wrong.append(f"{module} imports {name}: {room} has to do without JAX")
  return wrong


def circle(arrows: dict[str, set[str]]) -> list[str]:
  """Modules that import one another in a ring; empty if there is none."""
  done, way = set(), []

  def visit(module: str) -> list[str]:
    if module in way:
      return [*way[way.index(module) :], module]
    if module in done:
      return []
    way.append(module)
    for target in sorted(arrows.get(module, ())):
      if found := visit(target):
        return found
    done.add(way.pop())
    return []

  for module in sorted(arrows):
    if found := visit(module):
      return found
  return []


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_point_down(path):
  assert violations(dotted(path), ast.parse(path.read_text())) == []


def test_no_modules_import_one_another_in_a_ring():
  arrows = {
    dotted(path): {
      name.removeprefix("trd_jax.")
      for name in imports(ast.parse(path.read_text()))
      if name.startswith("trd_jax.")
    }
    for path in FILES
  }
  assert circle(arrows) == []
  assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_the_rooms_are_seen_at_a_glance():
  entries = {
    path.name
    for path in PACKAGE.iterdir()
    if not path.name.startswith("__") and not path.name.startswith(".")
  }
  assert set(MAY_IMPORT) <= entries
  assert len(entries) <= MOST_ENTRIES


def test_a_folder_says_what_it_is_for():
  for folder in {path.parent for path in FILES}:
    text = (folder / "__init__.py").read_text()
    assert ast.get_docstring(ast.parse(text)), folder


def test_tests_stand_in_the_rooms_of_what_they_test():
  folders = {path.parent.name for path in Path(__file__).parent.glob("*/*.py")}
  folders -= {"support", "benchmarks", "fuzz"}  # of all rooms
  assert folders <= {path.name for path in PACKAGE.iterdir()}


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("data.prompts", "from trd_jax.model import lora"),
    ("model.lora", "from trd_jax.data import chat"),
    ("experiment.records", "import jax.numpy as jnp"),
    ("experiment.records", "from trd_jax.data import chat"),
    ("train", "from trd_jax import rollout"),
    ("pipeline.early_checks", "from trd_jax import train"),
    ("distill.step", "from trd_jax.generation.engines import engine"),
    ("distill.loss.divergences", "def f():\n  from trd_jax.train import run"),
  ],
)
def test_a_wrong_arrow_is_seen(module, source):
  assert len(violations(module, ast.parse(source))) == 1
