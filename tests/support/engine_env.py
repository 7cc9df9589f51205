"""Where the tests find an interpreter that has vLLM."""

import os
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support.places import ROOT


def vllm_python() -> Path:
  """The interpreter of TRD_VLLM_PYTHON, else of .venv-vllm.

  Skips the test with the reason where there is none, or fails it where
  TRD_REQUIRE_VLLM=1 says that there must be one.
  """
  named = os.environ.get("TRD_VLLM_PYTHON")
  path = Path(named) if named else ROOT / ".venv-vllm" / "bin" / "python"
  problem = None
  if not path.is_file():
    problem = f"{path} is not there (TRD_VLLM_PYTHON names an interpreter)"
  else:
    find = (
      "import importlib.util as u; raise SystemExit(not u.find_spec('vllm'))"
    )
    if subprocess.run([path, "-c", find], check=False).returncode:
      problem = f"{path} has no vllm"
  if problem is None:
    return path
  missing(problem)


def triton_folder() -> Path:
  """Triton for the interpreter of `vllm_python`, which has none of its own.

  Skips the test, or fails it, as `vllm_python` does.
  """
  folder = vllm_python().parent.parent / "triton"
  if not (folder / "triton").is_dir():
    missing(f"{folder} is not there (make vllm VLLM=triton)")
  return folder


def missing(problem: str) -> NoReturn:
  """Skips the test, or fails it where TRD_REQUIRE_VLLM=1 is set."""
  if os.environ.get("TRD_REQUIRE_VLLM") == "1":
    pytest.fail(problem)
  pytest.skip(problem)
