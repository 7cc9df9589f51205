"""The scripts in examples/, each run as its docstring says, only smaller."""

import ast
import importlib.util
import os
import subprocess
import sys

import pytest

import trd_jax
from tests.support.devices import xla_flags
from tests.support.places import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, *arguments: str) -> str:
  """Returns what an example prints."""
  return subprocess.run(
    [sys.executable, f"examples/{name}.py", *arguments],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": xla_flags(1)},
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  ).stdout


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("examples") / "own"
  small = ("--questions=2", "--updates=2")
  return workdir, run("own_opd", str(workdir), *small)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_an_own_opd_run_ends_in_a_student(own_run):
  workdir, printed = own_run
  assert "trained  Avg@4" in printed
  assert (workdir / "merge" / "model" / "model.safetensors").is_file()
  opened = trd_jax.open_run(workdir)
  assert opened.summary["teacher"] == "lab:teacher"
  assert len(opened.metrics()) == 2
  assert opened.table("refine").num_rows == 32


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_workdir_is_read_with_pandas(own_run):
  if importlib.util.find_spec("pandas") is None:
    pytest.skip("pandas is not installed here: make test installs it")
  printed = run("read_workdir", str(own_run[0]))
  assert "verdicts of y_o (rows) and y_r (columns)" in printed
  for word in ("D_incorrect", "median tokens of y_r", "gained most"):
    assert word in printed


@pytest.mark.slow
def test_two_models_are_scored_token_by_token():
  lines = run("score_models").splitlines()
  rows = [line.split()[-3:] for line in lines[1:-1]]
  assert len(rows) == len("3+4=7\n7*2=14\n\\boxed{14}".replace("boxed", "b"))
  divergences = [float(row[0]) for row in rows]
  mean = float(lines[-1].split()[-2])
  assert mean == pytest.approx(sum(divergences) / len(rows), abs=1e-4)
  assert max(divergences) > 0.1
  same = run("score_models", "--teacher=lab:student").splitlines()
  assert float(same[-1].split()[-2]) == 0


def test_answers_are_graded():
  printed = run("grade_answers")
  assert "4 of 6 right" in printed
  assert "4 match, 1 mismatch, 1 no_box" in printed


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_how_to_run_it(path):
  text = path.read_text()
  docstring = ast.get_docstring(ast.parse(text)) or ""
  assert f"    python examples/{path.name}" in docstring
  assert len(text.splitlines()) <= 90
  assert f'run("{path.stem}"' in (ROOT / "tests/test_examples.py").read_text()
