"""Programs are graded by what they do, on the formats' own terms."""

import dataclasses
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from tests.support import processes, sandboxes
from tests.support.places import ROOT
from trd_jax.experiment import experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import Problem
from trd_jax.experiment.schema import Sandbox
from trd_jax.generation import generate
from trd_jax.generation import samples as samples_of
from trd_jax.generation.engines.engine import Completion
from trd_jax.grading.code import programs
from trd_jax.grading.math import verifier

pytestmark = sandboxes.NEEDED

DATA = ROOT.parent / "shared" / "data" / "code_eval"
needs_data = pytest.mark.skipif(
  not DATA.is_dir(), reason=f"there is no real data in {DATA}"
)
SUM = "print(sum(map(int, input().split())))"
SUMS = {"inputs": ["1 2\n", "3 4\n", "5 6\n"], "outputs": ["3\n", "7\n", "11"]}
ADD = {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [[3], 7]}


def problem(tests, **changes) -> Problem:
  made = Problem(
    problem_id="p",
    text="Add.",
    answer="",
    solution=None,
    domain="code",
    source="test",
    tests=json.dumps(tests),
    meta="{}",
  )
  return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def grader():
  with programs.Grader(Sandbox(workers=2, test_seconds=2)) as made:
    yield made
  assert sandboxes.processes() == []


@pytest.mark.parametrize(
  "program",
  [
    SUM,
    f"def main():\n  {SUM}\nif __name__ == '__main__':\n  main()",
    "import sys\nprint(sum(map(int, sys.stdin.read().split())))\nexit()",
    "import sys\nprint(sum(map(int, sys.stdin.buffer.readline().split())))",
    "print(sum(map(int, open(0).read().split())))\nquit()",
    f"import threading\nthreading.Thread(target=lambda: {SUM}).start()",
    f"import atexit\natexit.register(lambda: {SUM})",
    f"{SUM}\nraise SystemExit",
    f"import sys\nsys.setrecursionlimit(9**6)\n{SUM}",
    "import numpy\nprint(numpy.array(input().split(), int).sum())",
    # Recursion through C takes the stack that the memory allows,
    "import sys, functools\nsys.setrecursionlimit(10**6)\n"
    "f = functools.cache(lambda n: n and 1 + f(n - 1))\nf(100_000)\n" + SUM,
    "import sys, threading\nsys.setrecursionlimit(10**6)\n"
    "threading.stack_size(2**28)\n"
    "f = functools.cache(lambda n: n and 1 + f(n - 1))\n"
    f"t = threading.Thread(target=lambda: (f(20_000), {SUM}))\n"
    "t.start()\nt.join()",
    # which leaves threads theirs.
    "import threading\nts = [threading.Thread(target=int) for _ in range(40)]\n"
    "[t.start() for t in ts]\n[t.join() for t in ts]\n" + SUM,
    f"open('t.txt', 'x').write('1')\n{SUM}",
    "print(reduce(operator.add, map(int, input().split())))",
    "import os\nos.write(1, b'%d' % sum(map(int, os.read(0, 99).split())))",
    "from dataclasses import dataclass\n@dataclass\nclass A:\n  x: 'int'\n"
    + SUM,
  ],
)
def test_programs_as_people_write_them_pass(grader, program):
  verdict = grader.grade_program(program, SUMS)
  assert (verdict.correct, verdict.reason) == (True, "match"), verdict.detail


@pytest.mark.parametrize(
  "program",
  [
    "def add(a, b): return a + b",
    "class Solution:\n  def add(self, a: List[int], b): return a + b",
    "class Solution:\n  def add(self, a, b):\n    print('x')\n    return a + b",
    "def add(a, b): return (a + b, )[0]\nif __name__ == '__main__': 1 / 0",
    "import numpy\ndef add(a, b): return numpy.int64(a + b)",
  ],
)
def test_functions_as_people_write_them_pass(grader, program):
  verdict = grader.grade_program(program, ADD)
  assert (verdict.correct, verdict.reason) == (True, "match"), verdict.detail


@pytest.mark.parametrize(
  ("program", "reason", "failed", "words"),
  [
    ("print(sum(map(int, input().split())) % 7)", "mismatch", 1, "got 0"),
    ("print(3)", "mismatch", 1, "expected 7; got 3"),
    ("print()", "mismatch", 0, "got nothing"),
    (f"{SUM}\nexit(1)", "error", 0, "exit 1"),
    (f"{SUM}\n1 / 0", "error", 0, "ZeroDivisionError"),
    ("prin(1)", "error", 0, "NameError"),
    ("if", "error", 0, "SyntaxError"),
    ("import nothing_of_this_name", "error", 0, "ModuleNotFoundError"),
    (f"s = {SUM[6:-1]}\nwhile s > 3: pass\nprint(s)", "timeout", 1, ""),
    (f"s = {SUM[6:-1]}\nx = [0] * 10**(s * 3)\nprint(s)", "memory", 0, ""),
    (f"s = {SUM[6:-1]}\nprint(s, 'x' * (s > 7) * 2**25)", "output", 2, ""),
  ],
)
def test_the_first_failing_test_and_how_far_it_got(
  grader, program, reason, failed, words
):
  verdict = grader.grade_program(program, SUMS)
  detail = json.loads(verdict.detail)
  assert (verdict.correct, verdict.reason) == (False, reason), detail
  assert detail["passed"] == detail["failed"] == failed
  assert detail["tests"] == 3
  assert words in detail["excerpt"]
  assert "/box/runner.py" not in detail["excerpt"]


def test_integers_of_thousands_of_digits_are_compared_wherever_they_stand(
  grader,
):
  # As text, since Python itself refuses to read that many digits.
  one = "1" + "0" * 5000
  tests = f'{{"fn_name": "f", "inputs": [[[[{one}]]]], "outputs": [[[{one}]]]}}'
  right = grader.grade_program("def f(a): return [[a[0][0]]]", tests)
  assert right.correct, right.detail
  wrong = grader.grade_program("def f(a): return [[a[0][0] + 1]]", tests)
  assert (wrong.correct, wrong.reason) == (False, "mismatch")


def test_a_function_that_is_not_there(grader):
  verdict = grader.grade_program("def sub(a, b): return a", ADD)
  assert verdict.reason == "error"
  assert "no function add" in verdict.detail


def test_tests_share_no_state(grader):
  program = (
    "seen = []\n"
    "def add(a, b):\n"
    "  seen.append(a)\n"
    "  list.__len__\n"
    "  import json\n"
    "  first = not hasattr(json, 'been')\n"
    "  json.been = True\n"
    "  return a + b if len(seen) == 1 and first else None\n"
  )
  assert grader.grade_program(program, ADD).correct is True


@pytest.mark.slow
def test_processor_time_is_counted_for_each_test(grader):
  """The kernel tells each test that its own two seconds are over."""
  program = (
    "import os, signal\n"
    "said = lambda *_: (os.write(1, b'over'), os._exit(0))\n"
    "signal.signal(signal.SIGXCPU, said)\n"
    "while True: pass"
  )
  tests = {"inputs": ["1", "2"], "outputs": ["over", "over"]}
  assert grader.grade_program(program, tests).correct is True


def test_the_time_of_all_tests_is_limited():
  tests = {"inputs": ["1 2"] * 50, "outputs": ["3"] * 50}
  section = Sandbox(test_seconds=2, total_seconds=2.0)
  with programs.Grader(section) as grader:
    verdict = grader.grade_program(f"import time; time.sleep(.2); {SUM}", tests)
  assert verdict.reason == "timeout"
  detail = json.loads(verdict.detail)
  assert 0 < detail["passed"] < 50


@pytest.mark.slow
def test_told_by_name_it_does_without_a_sandbox(monkeypatch, tmp_path):
  prlimit = shutil.which("prlimit")
  assert prlimit
  (tmp_path / "prlimit").symlink_to(prlimit)
  monkeypatch.setenv("PATH", str(tmp_path))  # there is no bubblewrap
  before = processes.below(os.getpid())
  with programs.Grader(Sandbox(unsafe=True, test_seconds=1)) as grader:
    assert grader.grade_program(SUM, SUMS).reason == "match"
    assert grader.grade_program("while 1: pass", SUMS).reason == "timeout"
    fork = "import os, time\nos.fork()\ntime.sleep(60)"
    assert grader.grade_program(fork, SUMS).reason == "timeout"
  assert processes.below(os.getpid()) == before


def test_integer_keys_of_an_argument_come_back(grader):
  tests = {"fn_name": "f", "inputs": [[{"1": 2}]], "outputs": [[{"3": 2}]]}
  program = "def f(d): return {k + 2: v for k, v in d.items()}"
  assert grader.grade_program(program, tests).correct is True


def forger(frames: list[bytes]) -> bytes:
  """A runner that answers any test with these frames."""
  data = b"".join(struct.pack(">I", len(one)) + one for one in frames)
  return (
    "import os, sys\n"
    "size = int.from_bytes(os.read(0, 4))\n"
    "while size: size -= len(os.read(0, size))\n"
    f"data = {data!r}\n"
    "while data: data = data[os.write(1, data):]\n"
  ).encode()


VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
  max_leaves=6,
)
HEADS = st.binary(max_size=64) | st.builds(
  lambda value: json.dumps(value).encode(),
  VALUES
  | st.fixed_dictionaries(
    {"how": st.sampled_from(["exit", "signal", "x"]) | VALUES},
    optional={"code": st.just(0) | VALUES},
  ),
)


@pytest.mark.slow
@hypothesis.settings(
  max_examples=100,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(head=HEADS, written=st.binary(max_size=64))
@hypothesis.example(b'{"how": "exit", "code": Infinity}', b"3")
@hypothesis.example(b'{"how": "exit", "code": NaN}', b"3")
@hypothesis.example(b'{"how": "exit", "code": true}', b"3")
@hypothesis.example(b'{"how": "exit", "code": 0.0}', b"3")
@hypothesis.example(b'{"how": "exit", "code": "0"}', b"3")
@hypothesis.example(b'{"how": ["exit"], "code": 0}', b"3")
@hypothesis.example(b'{"how": "timeout"}', b"3")
@hypothesis.example(b"[" * 500_000, b"3")
@hypothesis.example(b"1" * 10_000, b"3")
def test_a_forged_report_is_a_failure(monkeypatch, grader, head, written):
  """Whatever comes out of the sandbox, it ends a program and nothing else."""
  one = {"inputs": ["1"], "outputs": ["nothing is like this"]}
  with monkeypatch.context() as patch:
    patch.setattr(grader, "_runner", forger([head, written, written]))
    verdict = grader.grade_program("", one)
  assert verdict.correct is False
  assert verdict.reason in ("mismatch", "error", "timeout", "output", "memory")
  assert json.loads(verdict.detail)["failed"] == 0
  if verdict.reason == "mismatch":
    assert type(json.loads(head)["code"]) is int


def test_a_report_that_is_too_long_or_cut_off(monkeypatch, grader):
  one = {"inputs": ["1"], "outputs": ["nothing is like this"]}
  runner = forger([b"{}"])
  for cut, reason in ((b"\\xff\\xff\\xff\\xff", "output"), (b"", "error")):
    forged = runner.replace(b"\\x00\\x00\\x00\\x02{}", cut)
    assert forged != runner
    monkeypatch.setattr(grader, "_runner", forged)
    assert grader.grade_program("", one).reason == reason


def test_nothing_that_a_test_has_started_is_there_in_the_next(grader):
  program = (
    "import os, time\n"
    "others = [p for p in os.listdir('/proc') if p.isdigit()]\n"
    "print(len(others))\n"
    "if os.fork() == 0:\n"
    "  os.setsid()\n"
    "  if os.fork() == 0: time.sleep(60)\n"
    "  os._exit(0)\n"
  )
  # Bubblewrap's, the runner's, and the program's own.
  tests = {"inputs": ["1", "2", "3"], "outputs": ["3", "3", "3"]}
  verdict = grader.grade_program(program, tests)
  assert verdict.correct is True, verdict.detail


def test_a_program_may_open_its_own_files_in_proc(grader):
  program = "print(sum(map(int, open('/proc/self/fd/0').read().split())))"
  assert grader.grade_program(program, SUMS).correct is True


def test_what_can_not_be_graded_is_neither_right_nor_wrong(grader):
  for tests, about in (
    (SUMS, {"special_judge": True}),
    ({"inputs": [], "outputs": []}, {}),
    (None, {}),
    ("nonsense", {}),
  ):
    verdict = grader.grade_program(SUM, tests, about)
    assert (verdict.correct, verdict.reason) == (None, "ungradable")
    assert verdict.detail


def test_a_completion_without_a_program(grader):
  verdict = grader.grade("It is 3.", problem(SUMS))
  assert (verdict.correct, verdict.reason) == (False, "no_code")
  right = grader.grade(
    f"<think>…</think>\n```python\n{SUM}\n```", problem(SUMS)
  )
  assert right.correct is True
  assert right.extracted == f"{SUM}\n"


def test_closing_ends_what_is_running():
  # Other tests' workers live on: they are not this grader's to end.
  before = set(processes.below(os.getpid()))
  grader = programs.Grader(Sandbox(workers=2))
  text = "```python\nimport time\ntime.sleep(600)\n```"
  for tag in range(6):
    grader.submit(tag, text, problem(SUMS))
  deadline = time.monotonic() + 60
  while len(inside := _started_since(before)) < 8:  # of two programs
    assert time.monotonic() < deadline
    time.sleep(0.05)
  closer = threading.Thread(target=grader.close)
  closer.start()
  closer.join(15)
  assert not closer.is_alive()
  assert processes.still_there(inside, 5) == []
  assert sandboxes.processes() == []


def _started_since(before):
  return [pid for pid in processes.below(os.getpid()) if pid not in before]


@pytest.mark.slow
def test_generation_grades_programs_and_mathematics_together():
  """As they come, each with its grader's name, whatever is slow."""
  texts = {
    "right": f"```python\n{SUM}\n```",
    "wrong": "```python\nprint(3)\n```",
    "slow": f"```python\nimport time\ntime.sleep(1)\n{SUM}\n```",
    "none": "3",
  }
  answers, wanted = [], {}
  for name, text in texts.items():
    one = problem(SUMS, problem_id=name)
    answers.append((one, text))
    wanted[name] = (name in ("right", "slow"), programs.VERSION)
  for name, text in (("math", "\\boxed{3}"), ("bad math", "\\boxed{4}")):
    one = problem(None, problem_id=name, domain="math", answer="3")
    answers.insert(2, (one, text))
    wanted[name] = (name == "math", verifier.VERSION)
  with (
    programs.Grader(Sandbox(workers=2)) as grader,
    verifier.Grader() as math,
  ):
    samples = list(
      samples_of.graded(
        iter(
          (
            generate.Prompt(one.problem_id, one, [1], 0),
            Completion(one.problem_id, [1], "stop"),
            text,
          )
          for one, text in answers
        ),
        {"code": grader, "math": math},
      )
    )
  found = {
    sample.prompt.key: (sample.verdict.correct, sample.grader)
    for sample in samples
  }
  assert found == wanted
  assert len(samples) == len(wanted)


def test_a_stage_says_at_once_that_there_is_no_sandbox(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  config = experiment.default_config()
  config.sandbox.python = sys.executable
  chosen = experiment.from_config(config)
  one = generate.Prompt("p", problem(SUMS), [1], 0)
  programs.sandbox._probe.cache_clear()
  with pytest.raises(UserError, match="there is no bwrap"):
    # No model is needed to find out: there is none here.
    next(generate.generate(chosen, _Nobody(), chosen.rollout, [one], desc=""))
  programs.sandbox._probe.cache_clear()


class _Nobody:
  """A chat model without weights."""

  class chat:
    stop_ids = (0,)
    vocab_size = 2

  @property
  def files(self):
    raise AssertionError("the model was asked for before the sandbox")


def test_the_command_line(tmp_path):
  rows = [
    {"code": SUM, "tests": SUMS},
    {"completion": "```python\nprint(3)\n```", "tests": SUMS},
    {"completion": "none", "tests": json.dumps(SUMS)},
  ]
  path = tmp_path / "rows.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  command = [sys.executable, "-m", "trd_jax.grading.code"]
  ran = subprocess.run(
    [*command, str(path)], capture_output=True, text=True, cwd=ROOT, check=True
  )
  found = [json.loads(line) for line in ran.stdout.splitlines()]
  assert [(row["row"], row["correct"], row["reason"]) for row in found] == [
    (1, True, "match"),
    (2, False, "mismatch"),
    (3, False, "no_code"),
  ]


@pytest.mark.parametrize(
  ("text", "told", "remedy"),
  [
    ("{", ", line 1: not JSON (", "give an object a line"),
    ('{"code": ""}', ", line 1: no JSON object with 'tests'", "give the tests"),
    ("\n", ": no rows", "give a file of JSON lines"),
    (None, ": can't be read", "give a file of JSON lines"),
  ],
)
def test_a_file_that_can_not_be_graded_is_one_line_with_a_remedy(
  text, told, remedy, tmp_path, capsys
):
  path = tmp_path / "rows.jsonl"
  if text is not None:
    path.write_text(text)
  assert programs.main([str(path)]) == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith(f"trd-jax grading: {path}{told}")
  assert f"; {remedy}" in err
  assert err.count("\n") == 1


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--workers=-1"], "--workers must be an integer, at least 1"),
    (["--workers=0"], "--workers must be an integer, at least 1"),
    (["--seconds=-3"], "--seconds must be an integer, at least 1, not -3"),
  ],
)
def test_the_command_line_refuses_what_can_not_be(
  flags, words, tmp_path, capsys
):
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps({"code": SUM, "tests": SUMS}))
  assert programs.main([*flags, str(path)]) == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith(f"trd-jax grading: {words}")
  assert err.count("\n") == 1


@pytest.mark.slow
def test_an_interrupted_command_says_so(tmp_path):
  path = tmp_path / "rows.jsonl"
  rows = [
    {"code": SUM, "tests": SUMS},
    {"code": "import time\ntime.sleep(600)", "tests": SUMS},
  ]
  path.write_text("\n".join(map(json.dumps, rows)))
  with subprocess.Popen(
    [sys.executable, "-m", "trd_jax.grading.code", str(path)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  ) as command:
    assert command.stdout
    assert json.loads(command.stdout.readline())["correct"] is True
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=60)
  assert command.returncode == 130
  assert err == "trd-jax grading: interrupted\n"


@needs_data
def test_real_livecodebench_problems(grader):
  lines = (DATA / "sandboxfusion_lcb_sample.jsonl").read_text().splitlines()
  swap, seniors, games = (json.loads(line)["test"] for line in lines)
  right = [
    "for _ in range(int(input())):\n"
    "  wrong = sum(a != b for a, b in zip(input(), 'abc'))\n"
    "  print('YES' if wrong <= 2 else 'NO')",
    "class Solution:\n"
    "  def countSeniors(self, details: List[str]) -> int:\n"
    "    return sum(int(d[11:13]) > 60 for d in details)",
    "n, s = int(input()), input()\n"
    "t, a = s.count('T'), s.count('A')\n"
    "if t == a: print('A' if s[-1] == 'T' else 'T')\n"
    "else: print('T' if t > a else 'A')",
  ]
  for program, tests in zip(right, (swap, seniors, games), strict=True):
    verdict = grader.grade_program(program, tests)
    assert verdict.correct is True, verdict.detail
  wrong = [
    right[0].replace("2", "3"),
    right[1].replace("60", "61"),
    right[2][:-8],
  ]
  for program, tests in zip(wrong, (swap, seniors, games), strict=True):
    assert grader.grade_program(program, tests).correct is False


@needs_data
def test_real_taco_problems(grader):
  lines = (DATA / "taco_real_rows.jsonl").read_text().splitlines()
  _, benches, factorial = (json.loads(x)["input_output"] for x in lines)
  program = (
    "n = int(input())\n"
    "ways = 1\n"
    "for i in range(5): ways *= (n - i) ** 2\n"
    "print(ways // 120)"
  )
  verdict = grader.grade_program(program, benches)
  assert verdict.correct is True, verdict.detail
  off = program.replace("120)", "120 + (n == 100))")
  detail = json.loads(grader.grade_program(off, benches).detail)
  assert (detail["passed"], detail["tests"]) == (9, 209)
  program = "def factorial(n):\n  return None if n < 0 else math.factorial(n)"
  assert grader.grade_program(program, factorial).correct is True
  off = program + " + (n == 15000)"
  detail = json.loads(grader.grade_program(off, factorial).detail)
  assert (detail["passed"], detail["tests"]) == (8, 9)


@pytest.mark.slow
@needs_data
def test_every_real_contest_problem_grades():
  """No program is right for all; what looks its output up in turn is."""
  rows = json.loads((DATA / "rllm_code_contests_test.json").read_text())
  lines = (DATA / "taco_real_rows.jsonl").read_text().splitlines()
  interactive = json.loads(json.loads(lines[0])["input_output"])
  every = [*(row["tests"] for row in rows), interactive]
  assert len(every) == 166
  with programs.Grader(Sandbox(workers=2)) as grader:
    for number, tests in enumerate(every):
      known = dict(zip(tests["inputs"], tests["outputs"], strict=True))
      right = f"import sys\nprint({known!r}[sys.stdin.read()])"
      for name, text in (("right", right), ("wrong", "print('never this')")):
        block = f"```python\n{text}\n```"
        grader.submit((number, name), block, problem(tests))
    found = dict(grader.finished(wait=True))
  assert len(found) == 2 * len(every)
  for (number, name), verdict in found.items():
    assert verdict.correct is (name == "right"), (number, verdict)
