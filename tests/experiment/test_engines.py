"""What engines declare is whole, and choices and documents follow from it."""

import ast
import dataclasses

import pytest

from tests.support.places import ROOT
from trd_jax.experiment import experiment
from trd_jax.experiment.engines import ENGINES, EngineSection, JaxEngine
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import KEYS
from trd_jax.experiment.run_dir import RunDir
from trd_jax.generation.engines import factory
from trd_jax.pipeline import dry_run

# Where the doctor tries an engine itself, and not what a config demands.
BY_NAME = {"doctor/engines.py", "doctor/machine.py", "doctor/software.py"}


def of(name: str, **changes):
  """The experiment that names an engine, as a machine could carry it out."""
  keys = {"engine.name": name, "preflight_only": True, **changes}
  return experiment.from_config(keys)


def test_the_choices_are_the_registry_s():
  key = KEYS["engine.name"]
  assert key.takes() == f"one of {', '.join(ENGINES)}"
  for section in ENGINES.values():
    assert section.summary in key.doc
  with pytest.raises(UserError, match=f"one of {', '.join(ENGINES)}, not"):
    of("gpt")


def test_the_documents_table_has_the_registry_s_engines():
  lines = (ROOT / "docs/generation.md").read_text().splitlines()
  begin = lines.index("| engine | for | what it needs |") + 2
  rows = lines[begin : lines.index("", begin)]
  # The last one is Ray's, which runs engines.
  named = [row.split("|")[1].strip() for row in rows[:-1]]
  assert named == [f"`{name}`" for name in ENGINES]


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_has_a_file_that_makes_it(name):
  assert callable(factory.constructor(name))


@pytest.mark.parametrize("name", ENGINES)
def test_what_an_engine_declares_fits_together(name):
  section = of(name).engine.chosen
  assert type(section) is ENGINES[name]
  keys = {field.name for field in dataclasses.fields(ENGINES[name])}
  assert (section.gpus is not None) == (section.devices == "gpus")
  if (gpus := section.gpus) is not None:
    by_key = {gpus.copies_key: 3, gpus.split_key: 2, gpus.share_key: 0.5}
    named = {f"engine.{name}.{key}": value for key, value in by_key.items()}
    other = of(name, **named).engine.chosen.gpus
    assert other is not None
    assert (other.copies, other.split, other.share) == (3, 2, 0.5)
    assert other.count == 6
  assert section.devices == "remote" or not section.addresses
  assert set(section.asks_for_it) <= keys
  # A key of the name of what is declared would take its place.
  assert keys.isdisjoint(set(vars(EngineSection)))


def compared_by_name(tree: ast.AST) -> list[str]:
  """Comparisons of `….engine.name` or `spec.name` with an engine's name."""
  return [
    ast.unparse(node)
    for node in ast.walk(tree)
    if isinstance(node, ast.Compare)
    and isinstance(node.left, ast.Attribute)
    and node.left.attr == "name"
    and {
      leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)
    }
    & set(ENGINES)
  ]


def test_nothing_but_the_doctor_s_trials_asks_for_an_engine_by_its_name():
  package = ROOT / "trd_jax"
  found = {
    path.relative_to(package).as_posix()
    for path in package.rglob("*.py")
    if compared_by_name(ast.parse(path.read_text()))
  }
  assert found == BY_NAME
  assert compared_by_name(ast.parse('e.engine.name in ("vllm", "server")'))


def test_an_engine_without_adapters_refuses_them(monkeypatch):
  monkeypatch.setattr(JaxEngine, "applies_adapters", False)
  of("jax")
  with pytest.raises(
    UserError, match=r"no adapter; set engine\.weights=merged"
  ):
    of("jax", **{"engine.weights": "adapter"})
  refused = r"applies no adapter; set engine\.name=vllm or server"
  with pytest.raises(UserError, match=refused):
    of("jax", **{"student.adapter": "runs/first/adapter"})


def test_a_package_that_is_missing_is_told_before_anything_starts(monkeypatch):
  monkeypatch.setattr(JaxEngine, "packages", {"nowhere": "build it"})
  with pytest.raises(UserError, match=r"engine\.name=jax: .* nowhere .* build"):
    factory.check_installed(of("jax").engine)


@pytest.mark.parametrize(
  ("keys", "shown"),
  [
    ({"engine.name": "jax"}, "all that JAX finds"),
    (
      {"engine.name": "vllm", "engine.vllm.tensor_parallel": 2},
      "2: vllm, 1 copy on 2 each",
    ),
    (
      {
        "engine.name": "vllm",
        "engine.vllm.data_parallel": 4,
        "engine.ray.actors": 2,
      },
      "8: vllm, 4 copies on 1 each, in each of 2 Ray actors",
    ),
    (
      {"engine.name": "server", "engine.server.urls": ("http://a", "http://b")},
      "none here: 2 servers",
    ),
  ],
)
def test_the_dry_run_says_what_an_engine_runs_on(keys, shown, tmp_path):
  text = dry_run.describe(experiment.from_config(keys), RunDir(tmp_path), [])
  assert f"  generate    {shown}\n" in text


def test_an_engine_may_run_on_no_device(monkeypatch, tmp_path):
  monkeypatch.setattr(JaxEngine, "devices", "none")
  text = dry_run.describe(of("jax"), RunDir(tmp_path), [])
  assert "  generate    none\n" in text
