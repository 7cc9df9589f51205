"""Texts that nobody thought of take their own sample along, and not the stage.

A model can write any bytes. Whatever its text does to a grader, there is a
verdict, a row that can be written, and a count in the stage's summary.
"""

import gzip
import json
import subprocess
import sys

import pytest

from tests.grading import test_evalplus
from tests.support import judging, sandboxes, training_runs
from trd_jax.experiment import records
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import (
  GradedSample,
  Problem,
  Trajectory,
  Verdict,
)
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Sandbox
from trd_jax.generation import samples, summaries
from trd_jax.generation.engines.engine import Completion
from trd_jax.generation.samples import Prompt
from trd_jax.grading import scores
from trd_jax.grading.code import evalplus, extract_code
from trd_jax.grading.code import programs as code
from trd_jax.grading.math import formulas, grade_answer, verifier

HALF = "\ud800"  # of a surrogate pair; JSON can spell it, UTF-8 can't
ANSWERS = {
  "nul": "1\x002",
  "nul in an inequality": "x<1\x002",
  "nul in an interval": "[1,\x00)",
  "nul alone": "\x00",
  "surrogate": f"x+{HALF}",
  "million digits": "7" * 10**6,
  "many digits with a letter": "7" * 1990 + "x",
  "nested": "{" * 10_000 + "1" + "}" * 10_000,
  "never closed": "\\boxed{" * 10_000,
  "right to left": "\u202e5\u202c",
  "line separator": "x\u2028+1",
  "terminal": "\x1b[31mx\x1b[0m",
  "empty": "",
  "five megabytes": "a+" * 2_500_000,
  "division by zero": "\\frac{1}{0}",
  "exponent": "1e999999999",
  "tab": "\t",
}
GOLDS = ("5", "2x+y", "x<2", "[1,2)", "\\{1,2\\}", "\\text{no}", "x=5", "0.5")


def answer(name, text, gold="2x", **fields):
  values = {"domain": "math", "tests": None} | fields
  problem = Problem(name, "?", gold, None, source="s", meta="{}", **values)
  return Prompt(name, problem, [1], 0), Completion(name, (1,), "stop"), text


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERS)
def test_every_answer_gets_a_verdict_that_can_be_kept(name):
  text = f"So \\boxed{{{ANSWERS[name]}}}"
  golds = GOLDS if len(text) < 10**5 else GOLDS[:1]
  found = verifier.verify_batch([(text, gold) for gold in golds])
  assert not any(verdict.correct for verdict in found)
  assert {v.reason for v in found} <= {"mismatch", "unparsed", "no_box"}
  assert all(verdict.detail is None for verdict in found)  # nothing was raised
  assert records.unparsed_because((v.reason, v.detail) for v in found) == {}
  for verdict in found:
    (verdict.extracted or "").encode()


def test_a_mark_that_we_use_ourselves_is_no_sign_of_an_inequality():
  found = verifier.verify("\\boxed{x<1\x002}", "x<2")
  assert (found.correct, found.reason, found.detail) == (
    False,
    "unparsed",
    None,
  )


@pytest.mark.parametrize(
  "error",
  [ValueError("too many values"), RecursionError(), MemoryError(), KeyError(1)],
)
def test_what_a_grader_raises_is_one_verdict_and_is_counted(error, monkeypatch):
  compare = grade_answer.compare_structure.compare

  def fails(gold, text, equal):
    if "unheard" in text:
      raise error
    return compare(gold, text, equal)

  monkeypatch.setattr(grade_answer.compare_structure, "compare", fails)
  answers = [
    answer("a", "\\boxed{2x}"),
    answer("b", "\\boxed{unheard}"),
    answer("c", "\\boxed{3}", "3"),
  ]
  with verifier.Grader() as grader:
    judged = list(samples.graded(iter(answers), {"math": grader}))
  found = {sample.prompt.key: sample.verdict for sample in judged}
  assert {k: v.reason for k, v in found.items()} == {
    "a": "match",
    "b": "unparsed",
    "c": "match",
  }
  verdicts = [(v.reason, v.detail) for v in found.values()]
  because = records.unparsed_because(verdicts)
  if not isinstance(error, RecursionError):  # which that module expects
    ((why, count),) = because.items()
    assert why.startswith(type(error).__name__)
    assert count == 1
    assert why in records.because_of(because)


def test_a_formula_that_breaks_its_grader_is_one_verdict(monkeypatch):
  right_side = formulas.right_side

  def fails(formula):
    if "unheard" in formula:
      raise ValueError("no")
    return right_side(formula)

  monkeypatch.setattr(formulas, "right_side", fails)
  problem = judging.formula("n", [{"n": 3}])
  texts = ("\\boxed{unheard}", "\\boxed{n}")
  found = judging.verdicts(
    formulas.Grader(), [(problem, text) for text in texts]
  )
  assert [verdict.reason for verdict in found] == ["unparsed", "match"]
  assert found[0].detail == "ValueError: no"


def test_few_reasons_are_told_in_a_line():
  counts = dict.fromkeys(["A: 1", "B: 2", "C: 3", "D: 4", "E: 5"], 2)
  told = records.because_of(counts)
  assert told.endswith("2 C: 3; 2 other errors)")
  assert "D" not in told


def rows_of(verdicts):
  fields = {"key": "k", "problem_id": "p"}
  return [
    training_runs.trajectory(
      training_runs.Chat.load("trd_jax/lab/student"),
      training_runs.problem(n),
      "rollout",
      n,
      **(fields | {"key": f"k{n}"}),
      correct=verdict.correct,
      reason=verdict.reason,
      extracted=verdict.extracted,
      detail=verdict.detail,
    )
    for n, verdict in enumerate(verdicts)
  ]


def test_a_stage_counts_and_tells_why(tmp_path):
  error = ValueError(f"no {HALF}\nsecond line")
  verdicts = [
    Verdict(True, "match", HALF),
    Verdict.unparsed(error),
    Verdict.unparsed(error),
    Verdict(False, "unparsed", "1"),
  ]
  run_dir = RunDir(tmp_path)
  rows = rows_of(verdicts)
  with run_dir.shard_writer("rollout", Trajectory) as writer:
    for row in rows:
      writer.add(row)
  summary = summaries.summarize(run_dir, "rollout", {row.key for row in rows})
  assert summary["unparsed"] == 3
  assert summary["unparsed_because"] == {"ValueError: no \\ud800": 2}
  assert "3 unparsed (its grader raised: 2 ValueError: no" in (
    summaries.describe(summary)
  )


def test_a_benchmark_counts_and_tells_why():
  verdicts = [Verdict(True, "match", None), Verdict.unparsed(ValueError("no"))]
  rows = [
    GradedSample(
      key=f"{n}",
      benchmark="b",
      problem_id="p",
      sample=n,
      prompt_sha256="",
      response_ids=[1],
      text="",
      num_tokens=1,
      finish_reason="stop",
      truncated=False,
      seed=0,
      thinking=None,
      sampling="{}",
      model="m",
      model_revision="r",
      prompt_version="1",
      correct=verdict.correct,
      reason=verdict.reason,
      extracted=verdict.extracted,
      grader_version="g",
      detail=verdict.detail,
    )
    for n, verdict in enumerate(verdicts)
  ]
  found = scores.figures(rows, {})
  assert found["unparsed_because"] == {"ValueError: no": 1}
  assert "its grader raised: 1 ValueError: no" in scores.table({"b": found})


PROGRAMS = {
  "nul": "print('1\x00')",
  "nul in the code": "x = 1\x00\nprint(x)",
  "surrogate": f"print('{HALF}')",
  "nested": "x = " + "(" * 5_000 + ")" * 5_000,
  "digits": "print(" + "7" * 10**4 + ")",
  "line separator": "print('a\u2028b')\nx\u2028= 1",
  "terminal": "print('\x1b[31m')",
  "half a megabyte": "x = '" + "a" * 500_000 + "'",
  "form feed": "\x0cprint(2)\x1c",
}


@sandboxes.needed
def test_every_program_gets_a_verdict_that_can_be_kept():
  tests = {"inputs": ["1\n", "2\n"], "outputs": [f"{HALF}é", "4"]}
  made = [
    answer(
      name,
      f"```python\n{program}\n```",
      domain="code",
      tests=json.dumps(tests),
    )
    for name, program in PROGRAMS.items()
  ]
  with code.Grader(Sandbox(workers=2)) as grader:
    found = list(samples.graded(iter(made), {"code": grader}))
  assert len(found) == len(PROGRAMS)
  for sample in found:
    assert sample.verdict.correct is False, sample.prompt.key
    assert sample.verdict.reason in ("mismatch", "error", "memory", "timeout")
    json.loads(sample.verdict.detail)
  assert records.to_table(rows_of([s.verdict for s in found])).num_rows


@sandboxes.needed
@pytest.mark.parametrize(
  ("error", "stops"),
  [(ValueError("no"), False), (UserError("gone"), True), (OSError(), True)],
)
def test_a_program_that_breaks_its_grader_is_told_from_a_broken_machine(
  error, stops, monkeypatch
):
  def run(self, program, tests):
    raise error

  monkeypatch.setattr(code.Grader, "run", run)
  tests = json.dumps({"inputs": ["1\n"], "outputs": ["1\n"]})
  one = answer("a", "```python\n1\n```", domain="code", tests=tests)
  with code.Grader(Sandbox(workers=1)) as grader:
    if stops:
      with pytest.raises(type(error)):
        list(samples.graded(iter([one]), {"code": grader}))
      return
    (found,) = samples.graded(iter([one]), {"code": grader})
  assert found.verdict == Verdict(False, "unparsed", None, "ValueError: no")


@pytest.mark.slow
@test_evalplus.needs_data
@test_evalplus.needs_evalplus
@sandboxes.needed
def test_evalplus_judges_every_program():
  programs = {name: text for name, text in PROGRAMS.items() if name != "nested"}
  with gzip.open(test_evalplus.FILES["humanevalplus"]) as file:
    task = json.loads(next(file))
  right = task["prompt"] + task["canonical_solution"]
  texts = [*programs.values(), right]
  grader = evalplus.Grader(
    test_evalplus.FILES["humanevalplus"], python=test_evalplus.PYTHON, workers=2
  )
  problem = judging.task("humanevalplus", task["task_id"])
  answers = [(problem, f"```python\n{text}\n```") for text in texts]
  found = judging.verdicts(grader, answers)
  assert found[-1].correct
  assert not any(verdict.correct for verdict in found[:-1])


DEGENERATE = """
from trd_jax.grading.code import extract_code
from trd_jax.grading.math import formulas, grade_answer
formula = formulas.Grader()
for unit in (" ", "\\t", "\\n", "~", "`", "~~~", "\\\\text{a}"):
  for before, after in (("", ""), ("```", "`"), ("~~~", "`"), ("\\n```", "x`")):
    text = before + unit * (200_000 // len(unit)) + after
    extract_code.last_program(text)
    grade_answer.prepare(text, "2x")
    formula.compare(0, "\\\\boxed{" + text + "}", "n", [{"n": 1}])
    assert len(list(formula.finished(wait=True))) == 1
print("read")
"""


@pytest.mark.slow
def test_a_model_that_repeats_itself_holds_nobody_up():
  # In a process of its own: a regular expression can't be interrupted.
  done = subprocess.run(
    [sys.executable, "-c", DEGENERATE],
    capture_output=True,
    text=True,
    timeout=300,
    check=True,
  )
  assert done.stdout == "read\n"


@pytest.mark.parametrize(
  ("line", "program"),
  [
    ("``` python \t", "x\n"),
    ("  ```python", "x\n"),
    ("~~~~py", "x\n"),
    ("``` python `", None),
  ],
)
def test_a_fence_is_read_as_before(line, program):
  marks = line.strip().split("p")[0].strip()
  assert extract_code.last_program(f"{line}\nx\n{marks}\n") == program


def test_a_graded_file_keeps_what_json_can_spell(tmp_path):
  source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  row = {"completion": f"\\boxed{{{HALF}}} é", "gold": "1"}
  source.write_text(json.dumps(row) + "\n")
  verifier.grade_file(source, target)
  (line,) = target.read_text("utf-8").splitlines()
  assert json.loads(line)["completion"] == row["completion"]
  assert "é" in line
