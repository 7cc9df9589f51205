"""The lock files against setup.py and the requirements that they lock."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCKS = ROOT / "third_party/locks"
RUNTIME = LOCKS / "py311.txt"
VLLM = ROOT / "third_party/vllm"
ALL = [*sorted(LOCKS.glob("*.txt")), *sorted(VLLM.glob("lock-*.txt"))]


def pins(path: Path) -> dict[str, str]:
  """Versions by package."""
  lines = [line for line in path.read_text().splitlines() if line[0] != "#"]
  found = [Requirement(line) for line in lines]
  assert all(re.fullmatch(r"==[^*,+]+", str(r.specifier)) for r in found), path
  named = {canonicalize_name(r.name): str(r.specifier)[2:] for r in found}
  assert len(named) == len(found)
  return named


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_lock_names_each_package_once_and_exactly(path):
  assert len(pins(path)) >= 10


def test_the_runtime_s_lock_is_what_setup_asks_for():
  locked = pins(RUNTIME)
  wanted = [Requirement(line) for line in metadata.requires("trd-jax") or ()]
  extras = ("", "test", "docs", "dev")
  wanted = [
    requirement
    for requirement in wanted
    if requirement.marker is None
    or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
  ]
  assert len(wanted) > 20
  for requirement in wanted:
    version = locked[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), requirement


def test_cuda_s_lock_is_of_the_locked_jax():
  version = pins(RUNTIME)["jax"]
  cuda = pins(LOCKS / "cuda12.txt")
  assert cuda["jax-cuda12-plugin"] == cuda["jax-cuda12-pjrt"] == version
  assert not cuda.keys() & pins(RUNTIME).keys()


def test_vllm_s_lock_is_what_its_environment_asks_for():
  locked = pins(VLLM / "lock-cpu.txt")
  for line in (VLLM / "cpu.txt").read_text().splitlines():
    if not line.startswith("#"):
      requirement = Requirement(line)
      version = locked[canonicalize_name(requirement.name)]
      assert requirement.specifier.contains(version), requirement
