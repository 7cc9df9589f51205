"""The math grader: what counts as the answer, on real data too, and alone.

What equals what is in test_grading_equal.py.
"""

import collections
import json
import os
import select
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.places import ROOT
from trd_jax.data import final_answer
from trd_jax.grading.math import grade_answer
from trd_jax.grading.math import verifier as grading

SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def _stop_the_workers():
  yield
  grading.close()


# --- what counts as the answer -----------------------------------------------

_content = st.recursive(
  st.text("ab1+ ^", min_size=1, max_size=4)
  | st.sampled_from(["\\{", "\\}", "\\\\", "\\frac12"]),
  lambda inner: st.builds(lambda x, y: f"{x}{{{y}}}", inner, inner),
  max_leaves=6,
)


@given(
  _content, st.sampled_from(["boxed", "fbox"]), st.text("a{}1 ", max_size=9)
)
def test_the_last_box_is_read_to_its_own_brace(content, command, before):
  text = f"{before}\\boxed{{9}}{before}\\{command}{{{content}}}"
  assert final_answer.last_box(text + " } and so on").content == content
  # Cut anywhere inside, it is no answer, and the earlier box is none either.
  start = text.rfind("\\" + command) + len(command) + 2
  for end in range(start, len(text)):
    assert grade_answer.prepare(text[:end], "9").reason == "no_box"


@pytest.mark.parametrize(
  ("text", "gold", "reason", "extracted"),
  [
    ("\\boxed{41} no, \\boxed{42}", "42", "match", "42"),
    ("\\boxed{42}. Then \\boxed{}", "42", "no_box", None),
    ("\\boxed{42}. Then \\boxed{ }", "42", "no_box", None),
    ("\\boxed{42} and \\boxed{4", "42", "no_box", None),
    ("\\boxed{42} ends in \\boxed", "42", "no_box", None),
    ("just 42", "42", "no_box", None),
    ("", "42", "no_box", None),
    ("\\boxed 7", "7", "match", "7"),
    ("\\boxed{\\boxed{42}}", "42", "match", "42"),
    ("<think>\\boxed{1}</think> \\boxed{2}", "2", "match", "2"),
    ("<think>\\boxed{1}</think> \\boxed{2}", "1", "mismatch", "2"),
    ("<think>a \\boxed{1}</think> so it goes", "1", "no_box", None),
    ("<think> maybe \\boxed{5}? no, wait...", "5", "no_box", None),
    ("<think>a</think> so <think> \\boxed{5}", "5", "no_box", None),
    ("<think> The answer is 5.", "5", "no_box", None),
    ("</think> \\boxed{1} </think> \\boxed{2}", "2", "match", "2"),
    ("</think> \\boxed{1} </think> so", "1", "no_box", None),
    ("\\boxed{1} and \\boxed{2}", "1, 2", "match", "1, 2"),
    ("\\boxed{1} and \\boxed{2}", "2", "match", "2"),
    ("\\boxed{1}. It is not that. So now \\boxed{2}", "1,2", "mismatch", "2"),
    ("The final answer is $(7, 6)$.", "(7,6)", "match", "(7, 6)"),
    ("The final answer is $(7, 6)$.", "(7,5)", "no_box", "(7, 6)"),
    ("The answer is 7. Wait, let me check that", "7", "no_box", None),
    ("<|begin_of_box|>B<|end_of_box|>", "B", "match", "B"),
    ("<|begin_of_box|>B", "B", "no_box", None),
    ("\\boxed{5}", "\\boxed{5}", "match", "5"),
    ("\\boxed{5}", "Since $x=\\boxed{5}$, done.", "match", "5"),
    ("\\boxed{7,5}", "\\boxed{5} ++++ \\boxed{7}", "match", "7,5"),
    ("\\boxed{\\cancel{12}}", "12", "no_box", "\\cancel{12}"),
    ("\\boxed{12}", "\\boxed{5} + \\boxed{7}", "mismatch", "12"),
  ],
)
def test_which_text_is_the_answer(text, gold, reason, extracted):
  verdict = grading.verify(text, gold)
  assert (verdict.reason, verdict.extracted) == (reason, extracted)
  assert verdict.correct == (reason == "match")


@pytest.mark.parametrize(
  ("text", "stated"),
  [
    ("So the answer is 5.", "5"),
    ("So the answer is **$5$**.", "5"),
    ("7 is not prime, so the answer is 5.", "5"),
    ("The most that it could be is 5.", "5"),
    ("Hence 2+3 = 5", "5"),
    ("Final answer: \\(x=5\\)", "x=5"),
    ("Hence $x < 5$ is the solution.", "x < 5"),
    ("The answer is 5 million.", "5 million"),
    # in bold, as code, or after GSM8K's mark,
    ("Therefore, the answer is: **5**", "5"),
    ("The answer is **1/2**.", "1/2"),
    ("The answer is `5`.", "5"),
    ("**Answer: 5**", "5"),
    ("**Answer:** 5", "5"),
    ("It is **5**.\n\n---\n\n\u2705 Final Answer: **5**", "5"),
    ("2 + 3 = <<2+3=5>>5\n#### 5", "5"),
    ("2 + 3 = <<2+3=5>>5\n#### $5", "5"),
    ("**Answer: B**", "B"),
    ("The answer is (B).", "B"),
    ("The correct option is **B**.", "B"),
    ("**Answer: Yes**", "Yes"),
    ("So she pays #### 5", "5"),
    # A choice is kept with the value that it stands for.
    ("The correct answer is (D) 17.", "(D) 17"),
    ("The correct answer is **(D) 17**.", "(D) 17"),
    ("The answer is (D) $17$.", "(D) 17"),
    ("The answer is (A) 16 or (D) 17.", None),
    ("The answer is not (D) 17.", None),
    # Some prompts ask for it between these.
    ("So it is.\n<answer> 5 </answer>\n", "5"),
    ("<answer>4</answer> or <answer>5</answer>, I think", None),
    ("So it is option 5.", None),
    ("The answer is not B.", None),
    ("The answer is B or C.", None),
    ("The answer is 5 cm.", "5 cm"),
    ("Answer: 5x", None),
    ("The answer is 5\u00b2", None),
    ("Answer: unknown. Step 5", None),
    ("#### Thoughts\nThere are 5 of them", None),
    ("The answer is **not 5**.", "not 5"),
    ("The answer is **4** or **5**.", None),
    ("Therefore **n** = 5.", "5"),
    # Denied,
    ("So the answer is not 5.", None),
    ("The answer isn't $5$.", None),
    ("Therefore 5 is not it.", None),
    ("It is wrong to say that the answer is 5.", None),
    # one of several,
    ("Therefore the solution is either 4 or 5.", None),
    ("The answer is $x = 5$ or $x = 7$.", None),
    ("Either x is 4 or x is $5$.", None),
    ("The answer is 3 and 5.", None),
    # bounded,
    ("The answer is between 3 and 5.", None),
    ("The answer is certainly less than 5.", None),
    ("Hence 2+3 < 5", None),
    ("Thus it is at most 5.", None),
    # left open,
    ("Hence the answer could be $5$.", None),
    ("Is the answer $5$?", None),
    ("I doubt that the answer is 5.", None),
    ("The answer is $5$. Wait, is it?", None),
    # or part of another value.
    ("The answer is the square root of 5.", None),
    ("Thus x = ln 5", None),
    ("The answer is \u2212 5", None),
    ("The answer is 3 1/2.", None),
    ("The answer is $5$ million.", None),
  ],
)
def test_what_an_unboxed_text_states(text, stated):
  assert final_answer.stated_answer(text) == stated


@pytest.mark.parametrize(
  ("text", "inside"),
  [
    ("$\\boxed{6}$", "6"),
    ("\\boxed{ \\frac{1}{2} }", "\\frac{1}{2}"),
    ("\\fbox{\\boxed{6}}", "6"),
    ("\\boxed{1},\\boxed{2}", "\\boxed{1},\\boxed{2}"),
    ("So it is \\boxed{6}", "So it is \\boxed{6}"),
    ("\\boxed{6", "\\boxed{6"),
    ("6", "6"),
  ],
)
def test_only_a_box_around_everything_is_taken_off(text, inside):
  assert final_answer.unboxed(text) == inside


@given(
  st.text("\\{}[]()|$^_=<>,.1aπ√½ \n", max_size=40),
  st.sampled_from(
    ["5", "1,2", "[0,1)", "(1,2)", "x=3", "\\frac{1}{2}", "C", "x>2"]
  ),
)
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_the_grader(text, gold):
  for completion in (text, f"\\boxed{{{text}}}", f"The answer is ${text}$"):
    found = grade_answer.prepare(completion, gold)
    assert (found.question is None) == (found.correct is not None)
    grade_answer.prepare("\\boxed{1}", text)


# --- real data ---------------------------------------------------------------


def _rows(path):
  if not path.exists():
    pytest.skip(f"{path} is not on this machine")
  with path.open() as lines:
    return [json.loads(line) for line in lines]


# math-verify as its own README uses it: parse both, verify, gold first.
_LIBRARY = """
import json, math_verify, sys
for line in sys.stdin:
  completion, gold = json.loads(line)
  try:
    said = math_verify.verify(
      math_verify.parse(gold), math_verify.parse(completion)
    )
  except Exception:
    said = False
  print(json.dumps(bool(said)), flush=True)
"""


def _library_alone(pairs, seconds=60):
  """What math-verify says of each pair; False where it says nothing in time.

  It runs in a process of its own, which is killed then: its own limit is an
  exception in a signal's handler, which sympy may swallow and a long product
  of integers holds off, and it would be at work for ever.
  """
  said = []
  while len(said) < len(pairs):
    with subprocess.Popen(
      [sys.executable, "-c", _LIBRARY],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
    ) as library:
      for pair in pairs[len(said) :]:
        library.stdin.write(json.dumps(pair).encode() + b"\n")
        library.stdin.flush()
        ready, _, _ = select.select([library.stdout], [], [], seconds)
        answer = library.stdout.readline() if ready else b""
        said.append(answer == b"true\n")
        if not answer:
          library.kill()
          break
      library.stdin.close()
  return said


def _parsed_gold(gold):
  """The gold as math-verify wants it: in dollars, or a box of its own."""
  return gold if "\\boxed" in gold or "$" in gold else f"${gold}$"


@pytest.mark.slow
def test_the_collected_cases_beside_math_verify_alone():
  rows = _rows(SHARED / "grading" / "cases.jsonl")
  rows = [row for row in rows if not row["disputed"]]
  verdicts = grading.verify_batch(
    [(row["completion"], row["gold"]) for row in rows]
  )
  libraries = _library_alone(
    [(row["completion"], _parsed_gold(row["gold"])) for row in rows]
  )
  table = collections.defaultdict(collections.Counter)
  for row, verdict, library in zip(rows, verdicts, libraries, strict=True):
    for where in (row["category"], f"all, boxed: {row['has_box']}", "all"):
      table[where]["cases"] += 1
      for name, said in (("ours", verdict.correct is True), ("mv", library)):
        table[where][f"{name} +"] += said and not row["expected"]
        table[where][f"{name} -"] += row["expected"] and not said
  columns = ("cases", "ours +", "ours -", "mv +", "mv -")
  print(f"\n{'false positives (+), negatives (-)':36}", *columns, sep="  ")
  for where, counts in sorted(table.items()):
    cells = (f"{counts[name]:{len(name)}}" for name in columns)
    print(f"{where:36}", *cells, sep="  ")
  boxed, every = table["all, boxed: True"], table["all"]
  assert every["ours +"] == 0
  assert 1 - boxed["ours -"] / boxed["cases"] >= 0.99
  assert 1 - every["ours -"] / every["cases"] >= 0.97
  # Better than the library on its own, in both ways of being wrong.
  assert every["ours +"] < every["mv +"]
  assert every["ours -"] < every["mv -"]


def test_every_gold_of_the_benchmarks_equals_itself():
  pairs = []
  for path in sorted((SHARED / "math_eval").glob("*.jsonl")):
    for row in _rows(path):
      if "answer" in row:
        gold = row["answer"].rpartition("####")[2].strip()
        pairs.append((f"Hence $\\boxed{{ {gold} }}$.", gold))
  if not pairs:
    pytest.skip(f"{SHARED} is not on this machine")
  verdicts = grading.verify_batch(pairs)
  assert [
    p for p, v in zip(pairs, verdicts, strict=True) if not v.correct
  ] == []


# --- alone -------------------------------------------------------------------


def _grade(tmp_path, text, *flags):
  source = tmp_path / "answers.jsonl"
  source.write_text(text)
  return subprocess.run(
    [sys.executable, "-m", "trd_jax.grading.math", str(source), *flags],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )


def test_a_file_is_graded_by_the_command(tmp_path):
  rows = [
    {"id": 1, "output": "\\boxed{x+x}", "answer": "2x"},
    {"id": 2, "output": "\\boxed{4}\u2028", "answer": 5},
    {"id": 3, "output": "none", "answer": "5"},
  ]
  target = tmp_path / "graded.jsonl"
  flags = ("--completion=output", "--gold=answer", f"--out={target}")
  text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
  run = _grade(tmp_path, text, *flags)
  assert run.returncode == 0, run.stderr
  assert run.stdout.startswith("3 answers, 33.3% right: ")
  graded = [json.loads(line) for line in target.read_text().split("\n")[:-1]]
  assert [row["reason"] for row in graded] == ["match", "mismatch", "no_box"]
  assert [row["correct"] for row in graded] == [True, False, False]
  assert [row["id"] for row in graded] == [1, 2, 3]


@pytest.mark.parametrize(
  ("text", "told"),
  [
    ("", "no rows"),
    ('{"completion": "a", "gold": "1"}\n{"completion": "a"}', "line 2"),
    ("[1, 2]", "line 1"),
    ("nonsense", "line 1: not JSON"),
    ('{"completion": "a", "gold": "1"}\n\n{"gold": ', "line 3: not JSON"),
    ('\n{"completion": "a"}', "line 2: no JSON object with"),
  ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, told):
  target = tmp_path / "graded.jsonl"
  run = _grade(tmp_path, text, f"--out={target}")
  assert run.returncode == 2
  assert told in run.stderr
  assert len(run.stderr.strip().splitlines()) == 1
  assert not target.exists()


@pytest.mark.parametrize(
  ("flags", "told"),
  [
    (["--workers=-1"], "workers is -1"),
    (["--workers=0"], "workers is 0"),
    (["--timeout=0"], "timeout is 0.0"),
    (["--out=/dev/null/graded.jsonl"], "can't be written"),
    (["--out=."], "can't be written (it is a folder)"),
  ],
)
def test_what_cannot_work_is_said_before_any_grading(tmp_path, flags, told):
  row = json.dumps({"completion": "\\boxed{x+x}", "gold": "2x"})
  run = _grade(tmp_path, row, *flags)
  assert run.returncode == 2
  assert told in run.stderr
  assert len(run.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_an_interrupt_ends_the_command_and_leaves_nothing(tmp_path):
  source, target = tmp_path / "answers.jsonl", tmp_path / "graded.jsonl"
  os.mkfifo(source)  # the command waits for rows that don't come
  command = [sys.executable, "-m", "trd_jax.grading.math", str(source)]
  process = subprocess.Popen(
    [*command, f"--out={target}"], stderr=subprocess.PIPE, cwd=ROOT
  )
  with process, source.open("wb"):  # opens when the command does
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1].decode()
  assert process.returncode == 130
  assert told == "trd-jax grading: interrupted; nothing written\n"
  assert list(tmp_path.iterdir()) == [source]
