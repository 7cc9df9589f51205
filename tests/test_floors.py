"""The house: who may import whom, read from the imports themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "trd_jax"
MAX_LINES = 450

# Rooms from the ground up. A module imports from its own room where that is
# allowed, and from rooms below; `text` and `device` don't know each other.
NOUNS = {
  "",
  "claim",
  "cli",
  "commands",
  "config_file",
  "devices",
  "engine_sections",
  "errors",
  "experiment",
  "file_locks",
  "findings",
  "finite_weights",
  "guard",
  "hub",
  "hub_look",
  "interpreters",
  "json_files",
  "json_text",
  "keys",
  "metrics",
  "nvidia",
  "ownership",
  "parent",
  "paths",
  "recipe",
  "records",
  "run_dir",
  "run_sections",
  "scopes",
  "sections",
  "shards",
  "sweep_points",
}
TEXT = {
  "benchmark_grading",
  "chat",
  "chat_files",
  "contexts",
  "forecasts",
  "grading",
  "leaks",
  "problems",
  "prompts",
  "scores",
  "vocabulary",
}
DEVICE = {"backend", "model", "processes", "sharding"}
LEARNING = {
  "adapters",
  "checkpoint",
  "distill_step",
  "distiller",
  "divergence",
  "door",
  "door_data",
  "door_models",
  "dry_run",
  "engines",
  "generation",
  "layout",
  "mesh_choice",
  "model_folder",
  "objective",
  "optimizer",
  "outcomes",
  "packing",
  "peft_files",
  "preflight",
  "programs",
  "random_model",
  "rounds",
  "row_divergence",
  "row_statistics",
  "samples",
  "tail_divergence",
  "teacher_cache",
  "teacher_source",
  "tensor_files",
  "tensor_table",
  "top_tokens",
  "training_set",
  "weights",
  "work",
}
STAGES = {
  "convert",
  "doctor",
  "evaluate",
  "merge",
  "pipeline",
  "pretrain",
  "refine",
  "rollout",
  "sweep",
  "train",
}
ROOMS = {
  "nouns": NOUNS,
  "text": TEXT,
  "device": DEVICE,
  "learning": LEARNING,
  "stages": STAGES,
}
MAY_IMPORT = {
  "nouns": {"nouns"},
  "text": {"nouns", "text"},
  "device": {"nouns", "device"},
  "learning": {"nouns", "text", "device", "learning"},
  # Not one another, only their own files: stages meet on disk only.
  "stages": {"nouns", "text", "device", "learning"},
}
WITHOUT_JAX = {"nouns", "text"}
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
FILES = sorted(ROOT.rglob("*.py"))


def dotted(path: Path) -> str:
  """A file's module name below the package."""
  parts = list(path.relative_to(ROOT).with_suffix("").parts)
  return ".".join(part for part in parts if part != "__init__")


MODULES = {dotted(path) for path in FILES}


def room_of(module: str) -> str:
  top = module.split(".")[0]
  found = [room for room, modules in ROOMS.items() if top in modules]
  assert len(found) == 1, f"trd_jax.{module} stands in no room: give it one"
  return found[0]


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
  room = room_of(module)
  wrong = []
  for name in imports(tree):
    package, _, inner = name.partition(".")
    if package == "trd_jax":
      target = room_of(inner)
      own = inner.split(".")[0] == module.split(".")[0]
      if target not in MAY_IMPORT[room] and not own:
        wrong.append(f"{module} ({room}) imports {inner} ({target})")
    elif package in DEVICE_LIBRARIES and room in WITHOUT_JAX:
      wrong.append(f"{module} ({room}) imports {name}")
  return wrong


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_point_down(path):
  assert violations(dotted(path), ast.parse(path.read_text())) == []


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_a_file_holds_one_thing(path):
  assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("prompts", "from trd_jax.model import lora"),
    ("model.lora", "from trd_jax import chat"),
    ("records", "import jax.numpy as jnp"),
    ("train", "from trd_jax import rollout"),
    ("divergence", "def f():\n  from trd_jax.train import run"),
  ],
)
def test_a_wrong_arrow_is_seen(module, source):
  assert len(violations(module, ast.parse(source))) == 1


def test_a_module_without_a_room_is_seen():
  with pytest.raises(AssertionError, match="stands in no room"):
    room_of("utils")
