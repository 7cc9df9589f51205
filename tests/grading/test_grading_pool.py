"""The grader's processes: none without need, none left, none that hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.places import ROOT
from trd_jax.experiment.errors import UserError
from trd_jax.grading.math import verifier as grading
from trd_jax.grading.math import worker


@pytest.fixture(scope="module", autouse=True)
def no_workers_left():
  yield
  grading.close()
  assert _worker_pids(os.getpid()) == []


def _worker_pids(parent):
  """Living children of a process, from the kernel's own table."""
  children = []
  for entry in Path("/proc").iterdir() if Path("/proc/self").exists() else ():
    if not entry.name.isdigit():
      continue
    try:
      fields = (entry / "stat").read_text().rpartition(")")[2].split()
      command = (entry / "cmdline").read_bytes()
    except OSError:
      continue
    if fields[1] == str(parent) and b"trd_jax.grading.math.worker" in command:
      children.append(int(entry.name))
  return children


def _alive(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


def _gone(pids, seconds=20.0):
  until = time.monotonic() + seconds
  while any(map(_alive, pids)) and time.monotonic() < until:
    time.sleep(0.05)
  return not any(map(_alive, pids))


def test_what_the_laboratory_asks_needs_no_algebra_and_no_process():
  script = (
    "import sys; from trd_jax.grading.math import verifier\n"
    "pairs = [('\\\\boxed{17}', '17'), ('\\\\boxed{3}', '17')]\n"
    "out = verifier.verify_batch(pairs)\n"
    "print([v.reason for v in out], 'sympy' in sys.modules,"
    " 'math_verify' in sys.modules, len(verifier._pools and"
    " [p for q in verifier._pools.values() for p in q.pids()]))"
  )
  run = subprocess.run(
    [sys.executable, "-c", script],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=True,
  )
  assert run.stdout.split("\n")[0] == "['match', 'mismatch'] False False 0"


HANGS = [
  ("9^{9^{9^9}}", False),
  ("(10^{10})!", False),
  ("\\sum_{k=1}^{10^{12}} k!", False),
  ("\\binom{10^{12}}{10^{11}}", False),
  ("{" * 50_000 + "1" + "}" * 50_000, False),
  ("\\frac{" * 20_000 + "}" * 20_000, False),
  ("1" * 100_000, False),
  ("\\text{" * 300 + "}" * 300, False),
  # The parser itself multiplies this one out: only the clock ends it.
  ("\\binom{100000000}{50000000}", None),
]


@pytest.mark.slow
def test_what_would_hang_returns_in_time_and_is_never_silently_wrong():
  timeout = 2.0
  grading.verify("\\boxed{x+x}", "2x")  # start the worker outside the clock
  for answer, correct in HANGS:
    verdict = grading.verify(f"\\boxed{{{answer}}}", "5", timeout=timeout)
    assert verdict.correct is correct, answer[:40]
    assert (verdict.reason == "timeout") == (correct is None), answer[:40]
  # The worker that was killed has a successor.
  again = grading.verify("\\boxed{x+x+x}", "3x", timeout=timeout)
  assert again.correct


@pytest.mark.parametrize(
  ("gold", "answer"),
  [
    ("|x-1|=2", "x=3,-1"),
    ("x^2=4", "x=2,-2"),
    ("x^2=4", "x=\\pm2"),
    ("2x-y=0", "y=2x,3"),
    ("x+y=1", "x=\\int y dy"),
    ("x+1=y", "\\begin{pmatrix}1\\end{pmatrix}=x"),
  ],
)
def test_a_relation_without_a_value_is_unparsed_and_costs_no_worker(
  gold, answer
):
  grading.verify("\\boxed{x+x}", "2x")  # there is a worker
  (before,) = grading._shared_pool(1, grading.TIMEOUT).pids()
  verdict = grading.verify(f"\\boxed{{{answer}}}", gold)
  assert (verdict.correct, verdict.reason) == (False, "unparsed")
  assert grading._shared_pool(1, grading.TIMEOUT).pids() == [before]


def test_what_a_library_raises_is_no_end_of_the_worker():
  script = (
    "from trd_jax.grading.math import grade_answer, worker\n"
    "grade_answer.decide = lambda *_: 1 / 0\n"
    "worker.main(5.0, 2 << 30)"
  )
  question = json.dumps({"gold": "x", "answer": "y"})
  run = subprocess.run(
    [sys.executable, "-c", script],
    input=2 * (question + "\n"),
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=True,
  )
  ready, *replies = map(json.loads, run.stdout.splitlines())
  assert ready == {"ready": True}
  assert replies == 2 * [{"correct": False, "reason": "unparsed"}]


HUGE = ("\\boxed{\\binom{100000000}{50000000}}", "5")


def test_processor_time_is_limited_where_the_wall_clock_is_not(monkeypatch):
  monkeypatch.setattr(worker, "WALL", 1000.0)  # the parent's; not the worker's
  verdict = grading.verify(*HUGE, timeout=1.5)
  assert (verdict.correct, verdict.reason) == (None, "timeout")


@pytest.mark.slow
def test_the_wall_clock_ends_what_takes_no_processor_time():
  grading.verify("\\boxed{u+u}", "2u", timeout=1.0)
  (stopped,) = grading._shared_pool(1, 1.0).pids()
  os.kill(stopped, signal.SIGSTOP)
  verdict = grading.verify("\\boxed{x+x+u}", "2x+u", timeout=1.0)
  assert (verdict.correct, verdict.reason) == (None, "timeout")
  assert not _alive(stopped)
  # A timeout is not remembered: asked again, it is answered.
  assert grading.verify("\\boxed{x+x+u}", "2x+u", timeout=1.0).correct


def test_a_huge_integer_is_compared_exactly():
  digits = "1" * 100_000
  assert grading.verify(f"\\boxed{{{digits}}}", digits).correct
  assert not grading.verify(f"\\boxed{{{digits[:-1]}2}}", digits).correct


def test_a_batch_keeps_its_order_and_reports_each_verdict():
  pairs = [("\\boxed{x+x}", "2x"), ("\\boxed{1}", "1"), ("none", "1")] * 4
  seen = []
  verdicts = grading.verify_batch(pairs, workers=2, progress=seen.append)
  assert [v.reason for v in verdicts] == ["match", "match", "no_box"] * 4
  assert seen == list(range(1, 13))


def test_an_easy_verdict_does_not_wait_for_a_hard_one():
  pairs = [(f"\\boxed{{{n}+x}}", f"x+{n}+y") for n in range(2)]
  pairs.append(("\\boxed{1}", "1"))
  with grading.Grader(workers=1) as grader:
    for position, pair in enumerate(pairs):
      grader.compare(position, *pair)
    order = [position for position, _ in grader.finished(wait=True)]
  assert order.index(2) < order.index(1)


def test_a_stream_that_is_dropped_leaves_nothing_to_do():
  pairs = [(f"\\boxed{{{n}x+z}}", f"{n}x+y") for n in range(50, 60)]
  with grading.Grader(workers=1, timeout=7.0) as grader:
    for position, pair in enumerate(pairs):
      grader.compare(position, *pair)
    next(grader.finished(wait=True))
  assert all(shared.pending == 0 for shared in grading._pools.values())
  assert grading.verify("\\boxed{x+x+z}", "2x+z", timeout=7.0).correct


def test_a_timeout_has_to_be_positive():
  with pytest.raises(UserError, match="timeout is 0"):
    grading.verify_batch([("\\boxed{x+x}", "2x")], timeout=0)


SCRIPT = """
import sys
from trd_jax.grading.math import pool, verifier
print([v.reason for v in verifier.verify_batch([('\\\\boxed{a+a}', '2a')])])
pids = [pid for shared in verifier._pools.values() for pid in shared.pids()]
if sys.argv[1:] == ['hang']:
  busy = pool.Pool(1, 4.0)
  busy.submit(0, ('b', '\\\\binom{100000000}{50000000}'))
  while not busy._alive[0].busy:
    busy.poll(1.0)
  pids += busy.pids()
print(*pids, flush=True)
if sys.argv[1:] == ['hang']:
  sys.stdin.read()
"""


def test_a_script_without_a_main_guard_grades_and_leaves_no_process(tmp_path):
  script = tmp_path / "plain.py"
  script.write_text(SCRIPT)
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  run = subprocess.run(
    [sys.executable, script],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=environment,
    check=True,
  )
  reasons, pids, *rest = run.stdout.splitlines()
  assert (reasons, rest) == ("['match']", [])
  assert pids
  assert _gone([int(pid) for pid in pids.split()])


@pytest.mark.slow
def test_workers_end_with_a_parent_that_was_killed(tmp_path):
  script = tmp_path / "plain.py"
  script.write_text(SCRIPT)
  process = subprocess.Popen(
    [sys.executable, script, "hang"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  with process:
    assert process.stdout is not None
    assert process.stdout.readline() == "['match']\n"
    idle, busy = map(int, process.stdout.readline().split())
    assert sorted(_worker_pids(process.pid)) == sorted([idle, busy])
    process.send_signal(signal.SIGKILL)
  assert _gone([idle, busy], 60.0)
