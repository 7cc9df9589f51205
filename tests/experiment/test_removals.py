"""Every call of the package that removes or replaces files, with its licence.

Only what this program wrote is ever removed. Whoever adds such a call says
here how it knows that; the tests of that place try it on files of somebody's.
"""

import ast
from pathlib import Path

import pytest

from tests.support.places import ROOT

# A name that no user's file has, a lock that says that nobody else is at work,
# a signature, or a folder that was made for this purpose.
LICENCES = {
  # Folders that a temporary-file function has made, or a marker is in.
  "doctor/machine.py close": "its own temporary folder",
  "doctor/probe.py tell": "its own temporary folder",
  "generation/engines/vllm_engine.py close": "its own temporary folder",
  "grading/code/evalplus_driver.py _cleared": "the sandbox's own file system",
  "grading/code/lcb_driver.py _answer": "its own temporary folder",
  "grading/code/runner.py test": "its own temporary folder",
  "model/weights/model_folder.py _clear": "a folder with our marker",
  # Names with 32 digits that this process has just drawn.
  "experiment/files/atomic_files.py atomic_file": "drawn, and the one target",
  "experiment/files/atomic_files.py copy_folder": "drawn; the target is empty",
  "experiment/workdir_config.py make": "drawn",
  # By signature, record or marker, under a lock.
  "analyze/report/pieces.py remove_others": "begins with our signature",
  "distill/teacher/cache.py filling": "a shard's name, in a signed cache",
  "experiment/files/file_locks.py sign": "a lock that is held",
  "experiment/files/ownership.py _write": "a marker that is locked",
  "experiment/files/ownership.py remove": "listed as ours, and unchanged",
  "experiment/files/ownership.py _remove_empty": "empty",
  "experiment/run_dir.py abandon": "by record and signature; empty folders",
  "experiment/shards.py __enter__": "unfinished, by its name; the lock is held",
  "experiment/shards.py keep_rows": "read as rows of ours before",
  "experiment/shards.py replace_rows": "read as rows of ours before",
  "experiment/workdir_config.py forget": "by its keys; a lock that is held",
  "model/weights/model_folder.py _settle": "looked through by ownership",
  "model/weights/model_folder.py _replaced": "looked through by ownership",
  # Of a file that this process appends to, what it has just added.
  "experiment/metric_log.py _append": "its own half of a line",
  # By the names of all that is in it, which Orbax alone gives.
  "distill/checkpoint.py _remove_unfinished": "Orbax's, down to each file",
}
_REMOVES = {
  *("unlink", "rmtree", "rmdir", "removedirs", "rename", "renames", "move"),
  *("truncate", "replace", "remove"),
}


def _is_of_files(call: ast.Call) -> bool:
  """Whether a call of such a name is one of files, not of texts or lists."""
  if not isinstance(call.func, ast.Attribute):
    return False
  name, owner = call.func.attr, ast.unparse(call.func.value)
  if name == "remove":
    return owner == "os"
  if name == "replace":
    # Of a text it has two arguments, of a record fields; `variable` is flax's.
    one = len(call.args) == 1 and not call.keywords
    return owner == "os" or (one and owner != "variable")
  return name in _REMOVES


def _removals(path: Path):
  """Yields the functions of a module that remove or replace."""
  tree = ast.parse(path.read_text())
  functions = [
    node
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
  ]
  for call in ast.walk(tree):
    if not isinstance(call, ast.Call) or not _is_of_files(call):
      continue
    around = [f for f in functions if call in set(ast.walk(f))]
    # The innermost one.
    inner = max(around, key=lambda f: f.lineno).name if around else "(module)"
    yield f"{path.relative_to(ROOT / 'trd_jax').as_posix()} {inner}"


def test_every_call_that_removes_or_replaces_says_why_it_may():
  found = {
    where
    for path in sorted((ROOT / "trd_jax").rglob("*.py"))
    for where in _removals(path)
  }
  assert found - LICENCES.keys() == set()
  assert LICENCES.keys() - found == set(), "licences of what is gone"


@pytest.mark.parametrize(
  ("text", "removes"),
  [
    *(("path.unlink()", True), ("shutil.rmtree(folder)", True)),
    *(("os.remove(x)", True), ("a.rename(b)", True)),
    *(("os.replace(a, b)", True), ("new.replace(old)", True)),
    *(("shutil.move(a, b)", True), ("text.replace('a', 'b')", False)),
    *(("items.remove(x)", False), ("dataclasses.replace(a, b=1)", False)),
  ],
)
def test_which_calls_remove_or_replace_files(text, removes):
  assert _is_of_files(ast.parse(text, mode="eval").body) == removes
