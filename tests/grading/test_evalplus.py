"""HumanEval+ and MBPP+ by the real EvalPlus, in the sandbox, offline.

The interpreter is that of .venv-evalplus, or TRD_EVALPLUS_PYTHON; without one
these tests skip, or fail where TRD_REQUIRE_EVALPLUS is set.
TRD_EVALPLUS_FULL=1 runs every canonical solution.
"""

import gzip
import json
import os

import pytest

from tests.support import judging, sandboxes
from tests.support.places import ROOT
from trd_jax.data import problems
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.schema import Data
from trd_jax.grading.code import evalplus

CODE = ROOT.parent / "shared/data/code_eval"
PYTHON = os.environ.get("TRD_EVALPLUS_PYTHON") or str(ROOT / evalplus.PYTHON)
FULL = bool(os.environ.get("TRD_EVALPLUS_FULL"))
FILES = {
  "humanevalplus": CODE / "HumanEvalPlus.jsonl.gz",
  "mbppplus": CODE / "MbppPlus.jsonl.gz",
}

needs_data = pytest.mark.skipif(
  not CODE.exists(), reason=f"no real data at {CODE}"
)
if os.environ.get("TRD_REQUIRE_EVALPLUS") and not os.access(PYTHON, os.X_OK):
  raise RuntimeError(f"TRD_REQUIRE_EVALPLUS is set and there is no {PYTHON}")
_without = pytest.mark.skipif(
  not os.access(PYTHON, os.X_OK),
  reason=f"no {PYTHON}: third_party/evalplus/install.sh makes it",
)


def needs_evalplus(test):
  """Marks a test that needs EvalPlus's environment."""
  return pytest.mark.evalplus(_without(test))


def grade(name, answers, workers=None):
  # A machine that is busy with other tests is no reason to fail a program.
  grader = evalplus.Grader(
    FILES[name], python=PYTHON, least_seconds=30.0, workers=workers
  )
  return judging.verdicts(grader, tasks(name, answers))


def tasks(name, answers):
  return [(judging.task(name, task), text) for task, text in answers]


def fenced(program):
  return f"<think>So.</think>Here:\n```python\n{program}\n```\n"


@pytest.mark.slow
@needs_data
@needs_evalplus
@sandboxes.needed
@pytest.mark.parametrize(
  ("name", "step"), [("humanevalplus", 20), ("mbppplus", 60)]
)
def test_canonical_solutions_pass_and_mutants_fail(name, step):
  found, _ = problems.read(Data(source=name, root=str(FILES[name])))
  chosen = found if FULL else found[3::step]
  canonical = [(p.problem_id, p.solution) for p in chosen]
  known = [task for task, _ in canonical if task in evalplus.DEFECTS]
  # It takes 20 s of a free processor, and EvalPlus gives no program over 60.
  slow = {"Mbpp/599": "timeout"}
  # Mutants: a result of another type; none at all; no such function.
  mutants = []
  for p in found[3 :: 4 * step]:
    entry = json.loads(p.meta)["entry_point"]
    program = p.solution.removeprefix("```python\n").removesuffix("\n```")
    for body in ("class X: pass\n  return X()", "raise SystemExit(0)"):
      mutant = f"{program}\ndef {entry}(*arguments):\n  {body}\n"
      mutants.append((p.problem_id, fenced(mutant)))
    mutants.append((p.problem_id, fenced("print('pass')")))
  silent = [(chosen[0].problem_id, "I don't know.")]
  verdicts = grade(name, [*canonical, *mutants, *silent])
  right, wrong = verdicts[: len(canonical)], verdicts[len(canonical) : -1]
  assert [
    (task, one.reason)
    for (task, _), one in zip(canonical, right, strict=True)
    if one.correct is not True and slow.get(task) != one.reason
  ] == [(task, "ungradable") for task in known]
  assert {(one.correct, one.reason) for one in wrong} == {(False, "mismatch")}
  assert (verdicts[-1].correct, verdicts[-1].reason) == (False, "no_code")


@pytest.mark.slow
@needs_data
@needs_evalplus
@sandboxes.needed
def test_a_program_that_ends_evalplus_costs_the_others_nothing():
  found, _ = problems.read(
    Data(source="humanevalplus", root=str(FILES["humanevalplus"]))
  )
  killer = (
    "import ctypes, os\nctypes.CDLL(None).kill(os.getppid(), 9)\n"
    "while True: pass\n"
  )
  answers = [
    (found[2].problem_id, found[2].solution),
    (found[3].problem_id, fenced(killer)),
    (found[4].problem_id, fenced("def mean_absolute_deviation(x): return 0")),
  ]
  verdicts = grade("humanevalplus", answers)
  assert [one.correct for one in verdicts] == [True, None, False]
  assert verdicts[1].reason == "ungradable"


# It answers for all programs that come after it, wherever it may: to whoever
# asks for answers in its own process, and on every descriptor there is.
VANDAL = """
import ctypes, glob, io, json, os, sys
frame, asked = sys._getframe(), False
while frame:
  queue = frame.f_locals.get('result_queue')
  if queue is not None:
    asked = True
    from concurrent.futures.process import _ResultItem
    path = next(word for word in sys.argv if word.endswith('samples.jsonl'))
    for number, line in enumerate(io.open(path)):
      row = json.loads(line)
      row['completion_id'] = number
      row['_identifier'] = f"{row['task_id']} (line {number + 1} in {path})"
      row['base'] = row['plus'] = ('pass', [])
      queue.put(_ResultItem(number, result=row))
  frame = frame.f_back
if not asked and ctypes.CDLL(None).fork() == 0:
  answer = bytes([0, 0, 0, 16]) + b'["pass", "pass"]'
  while True:
    for fd in range(3, 256):
      try:
        os.write(fd, answer)
      except OSError:
        pass
    for path in glob.glob('/proc/[0-9]*/fd/[0-9]*'):
      try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        os.write(fd, answer)
        os.close(fd)
      except OSError:
        pass
"""


@pytest.mark.slow
@needs_data
@needs_evalplus
@sandboxes.needed
def test_a_program_has_no_say_in_what_is_said_of_others():
  found, _ = problems.read(
    Data(source="humanevalplus", root=str(FILES["humanevalplus"]))
  )
  wrong = "def {}(*arguments): return 'wrong'"
  answers = [(found[2].problem_id, fenced(VANDAL))]
  for p in found[3:6]:
    entry = json.loads(p.meta)["entry_point"]
    answers.append((p.problem_id, fenced(wrong.format(entry))))
    answers.append((p.problem_id, p.solution))
  verdicts = grade("humanevalplus", answers, workers=1)
  assert verdicts[0].correct is not True
  assert [one.correct for one in verdicts[1:]] == [False, True] * 3


@needs_data
@pytest.mark.parametrize(
  ("name", "task"),
  [("humanevalplus", "HumanEval/32"), ("mbppplus", "Mbpp/255")],
)
def test_what_evalplus_cannot_judge_is_not_judged(name, task):
  # Nothing is left to run, so that this needs no EvalPlus.
  answers = [(task, fenced("print(1)")), (task, "no program")]
  grader = evalplus.Grader(FILES[name])
  first, second = judging.verdicts(grader, tasks(name, answers))
  assert (first.correct, first.reason) == (None, "ungradable")
  assert first.detail == evalplus.DEFECTS[task]
  assert (second.correct, second.reason) == (False, "no_code")


# It leaves no room for others, in folders that can't just be removed.
HOARDER = """
import io, os
os.mkdir('/tmp/locked')
try:
  for number in range(10**6):
    with io.open(f'/tmp/locked/{number}', 'wb') as file:
      file.write(bytes(2**24))
except OSError:
  pass
__import__('posix').chmod('/tmp/locked', 0)
"""


@pytest.mark.slow
@needs_data
@needs_evalplus
@sandboxes.needed
def test_what_a_program_leaves_on_disk_costs_the_others_nothing():
  found, _ = problems.read(
    Data(source="humanevalplus", root=str(FILES["humanevalplus"]))
  )
  answers = [(found[2].problem_id, fenced(HOARDER))]
  for p in found[3:6]:
    program = p.solution.removeprefix("```python\n").removesuffix("\n```")
    program += "\n\nimport io, os\nassert not os.path.exists('/tmp/locked')\n"
    program += "with io.open('/tmp/x', 'wb') as file: file.write(bytes(9**6))\n"
    answers.append((p.problem_id, fenced(program)))
  verdicts = grade("humanevalplus", answers, workers=1)
  assert [one.correct for one in verdicts] == [False, True, True, True]


@pytest.mark.slow
@needs_data
@needs_evalplus
@sandboxes.needed
def test_an_evalplus_that_does_not_start_is_not_the_programs_fault(tmp_path):
  with gzip.open(FILES["humanevalplus"]) as file:
    row = json.loads(file.readline())
  row["canonical_solution"] = "    return 1 / 0\n"
  path = tmp_path / "tasks.jsonl"
  path.write_text(json.dumps(row))
  answers = tasks("humanevalplus", [(row["task_id"], fenced("print(1)"))])
  with pytest.raises(UserError, match=r"does not run.*ZeroDivisionError"):
    judging.verdicts(evalplus.Grader(path, python=PYTHON), answers)


@pytest.mark.slow
@needs_data
def test_a_task_that_is_not_in_the_file_is_named():
  with pytest.raises(UserError, match="has no task HumanEval/999"):
    grade("humanevalplus", [("HumanEval/999", "x")])


def test_without_evalplus_the_script_is_named(tmp_path):
  with pytest.raises(UserError, match=r"run third_party/evalplus/install\.sh"):
    evalplus.check(str(tmp_path / "python"))


@sandboxes.needed
def test_a_python_without_evalplus_is_refused():
  import sys

  with pytest.raises(UserError, match="has no evalplus"):
    evalplus.check(sys.executable)


@pytest.mark.parametrize(
  ("base", "plus", "expected"),
  [
    ("pass", "pass", (True, "match")),
    ("pass", "fail", (False, "mismatch")),
    ("fail", "pass", (False, "mismatch")),
    ("pass", "timeout", (False, "timeout")),
    ("timeout", "fail", (False, "timeout")),
  ],
)
def test_a_program_has_to_pass_base_and_plus_tests(base, plus, expected):
  found = evalplus._verdict("x", (base, plus))
  assert (found.correct, found.reason) == expected
  assert json.loads(found.detail) == {"base": base, "plus": plus}


@pytest.mark.parametrize(
  ("answer", "found"),
  [
    (b'["pass", "fail"]', ("pass", "fail")),
    (b'["timeout", "pass"]', ("timeout", "pass")),
    (b"", None),
    (b"null", None),
    (b"[]", None),
    (b'["pass"]', None),
    (b'["pass", "pass", "pass"]', None),
    (b'["pass", "passed"]', None),
    (b'["pass", ["pass"]]', None),
    (b'{"pass": 1, "fail": 2}', ("pass", "fail")),
    (b"\xff", None),
    (b"[" * 1000, None),
  ],
)
def test_what_is_no_status_is_none(answer, found):
  assert evalplus._statuses(answer) == found


def test_a_task_is_in_one_run_and_runs_are_no_larger_than_they_must():
  tasks = [[(f"T/{i}", str(j)) for j in range(16)] for i in range(13)]
  batches = evalplus._batches(tasks, 64)
  assert [len(batch) for batch in batches] == [64, 64, 64, 16]
  assert [one for batch in batches for one in batch] == [
    one for task in tasks for one in task
  ]
  large = [("T/0", str(j)) for j in range(200)]
  assert [len(b) for b in evalplus._batches([large, tasks[1]], 64)] == [200, 16]
