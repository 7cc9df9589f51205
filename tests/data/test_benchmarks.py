"""The benchmarks' files: counted, hashed, and read without running anything."""

import base64
import hashlib
import json
import os
import pickle
import subprocess
import sys
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.places import SHARED_DATA
from trd_jax.data import problems
from trd_jax.data.problems import (
  amo,
  benchmarks,
  livecodebench,
  questions,
  rows,
  sources,
  taco,
)
from trd_jax.experiment import experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.schema import Data
from trd_jax.grading.code import code_tests, lcb_runner
from trd_jax.pipeline import data_checks

MATH, CODE = SHARED_DATA / "math_eval", SHARED_DATA / "code_eval"

needs_data = pytest.mark.skipif(
  not CODE.exists(), reason=f"no real data at {SHARED_DATA}"
)


def chosen(root, **changes):
  flat = {"evaluate.root": str(root), **changes}
  config = experiment.default_config()
  for name, value in flat.items():
    section, key = name.split(".")
    setattr(config[section], key, value)
  return experiment.from_config(config)


def write(path, found):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("\n".join(map(json.dumps, found)))
  return path


def parsed(problem):
  return code_tests.parse(problem.tests, json.loads(problem.meta))


def packed(value):
  data = pickle.dumps(value, protocol=4)
  return base64.b64encode(zlib.compress(data)).decode()


# What was read


@needs_data
@pytest.mark.parametrize(
  ("name", "folder", "rows_"),
  [
    ("aime24", MATH, 30),
    ("AIME25", MATH, 30),
    ("hmmt25", MATH, 30),
    ("beyondaime", MATH, 100),
    ("MATH-500", MATH, 500),
    ("gsm8k", MATH, 1319),
    ("HumanEval+", CODE, 164),
    ("MBPP+", CODE, 378),
  ],
)
def test_count_and_hash_of_every_real_file_are_the_declared(
  name, folder, rows_
):
  asked = questions.load(chosen(folder, **{"evaluate.num_problems": 3}), name)
  declared = benchmarks.BENCHMARKS[benchmarks.canonical(name)]
  assert len(asked.problems) == 3
  assert asked.data["rows"] == rows_ == declared.rows
  for path, file in zip(asked.paths, asked.data["files"], strict=True):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert file == {
      "name": path.name,
      "sha256": digest,
      "origin": None,
      "revision": None,
    }
    assert declared.sha256[path.name] == digest


def test_a_benchmark_of_another_length_or_version_is_refused(tmp_path):
  row = {"problem": "What is 1 + 1?", "answer": "2"}
  write(tmp_path / "aime25.jsonl", [row])
  with pytest.raises(UserError, match=r"1 questions in .* and it has 30"):
    questions.load(chosen(tmp_path), "aime25")
  write(tmp_path / "hmmt25" / "matharena_hmmt_feb_2025.jsonl", [row])
  with pytest.raises(UserError, match=r"SHA-256 .* another version"):
    questions.load(chosen(tmp_path / "hmmt25"), "hmmt25")
  taken = chosen(tmp_path, **{"evaluate.unchecked": True})
  assert questions.load(taken, "aime25").data["rows"] == 1


@pytest.mark.parametrize(
  ("folder", "said"),
  [("", "lacks matharena_hmmt"), ("elsewhere", "evaluate.root=")],
)
def test_a_missing_local_copy_is_told_by_its_key(tmp_path, folder, said):
  names = {"evaluate.benchmarks": ("arithmetic", "hmmt25")}
  mine = chosen(tmp_path / folder, **names)
  with pytest.raises(UserError, match=said) as read:
    questions.load(mine, "hmmt25")
  # The early checks look at it too, and read none.
  with pytest.raises(UserError, match=said) as looked:
    list(data_checks.benchmark(mine, "hmmt25"))
  for error in read, looked:
    assert "leave evaluate.root out to download it" in str(error.value)
    assert "data.root" not in str(error.value)


def test_a_download_is_taken_for_its_hash_alone(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  there = write(tmp_path / "x.jsonl", [{"problem": "1?", "answer": "1"}])
  digest = sources.sha256(there)
  path = sources.download(there.as_uri(), digest, "x")
  assert path.read_bytes() == there.read_bytes()
  there.unlink()
  assert sources.download(there.as_uri(), digest, "x") == path
  path.write_text("damaged")
  with pytest.raises(UserError, match="can't be fetched"):
    sources.download(there.as_uri(), digest, "x")
  there.write_text("something else")
  with pytest.raises(UserError, match="another file now"):
    sources.download(there.as_uri(), digest, "x")
  assert path.read_text() == "damaged"


@pytest.mark.parametrize("where", ["data/test-0.parquet", "test.parquet"])
def test_the_hubs_commit_is_recorded(tmp_path, where):
  # The hub's own library, offline, with a data set that it has fetched before.
  commit = "c" * 40
  home = tmp_path / "datasets--meituan-longcat--AMO-Bench"
  file = home / "snapshots" / commit / where
  file.parent.mkdir(parents=True)
  table = pa.Table.from_pylist([amo_row(i) for i in range(1, 51)])
  pq.write_table(table, file)
  (home / "refs").mkdir()
  (home / "refs" / "main").write_text(commit)
  program = (
    "import json; from trd_jax.experiment import experiment as e;"
    " from trd_jax.data.problems import questions;"
    " print(json.dumps(questions.load(e.Experiment(), 'amobench').data))"
  )
  found = subprocess.run(
    [sys.executable, "-c", program],
    env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)},
    capture_output=True,
    text=True,
    check=True,
  )
  assert json.loads(found.stdout) == {
    "rows": 39,
    "files": [
      {
        "name": file.name,
        "sha256": sources.sha256(file),
        "origin": "meituan-longcat/AMO-Bench",
        "revision": commit,
      }
    ],
  }


# AMO-Bench


def amo_row(number, answer="\\boxed{6}", **changes):
  return {
    "question_id": number,
    "prompt": f"Problem {number}?",
    "answer": answer,
    "answer_type": "number",
    **changes,
  }


def test_amo_bench_is_the_39_that_a_parser_grades(tmp_path):
  write(tmp_path / "amobench.jsonl", [amo_row(i) for i in range(1, 51)])
  asked = questions.load(chosen(tmp_path), "AMO-Bench")
  assert len(asked.problems) == asked.data["rows"] == 39
  by_number = {json.loads(p.meta)["question_id"]: p for p in asked.problems}
  assert set(by_number) == amo.PARSED
  assert by_number[1].answer == "6"
  assert by_number[35].answer == "7657"  # whatever the file says
  values = {n: json.loads(p.meta).get("values") for n, p in by_number.items()}
  assert [n for n, v in values.items() if v] == [5, 37]
  assert values[5][0] == {"n": 1}
  assert len(values[5]) == 20
  assert values[37][-1] == {"a": 18, "b": 19, "c": 20}


@needs_data
def test_the_parsed_ids_are_amo_benchs_own():
  found = json.loads((MATH / "amo_bench_p_subset_ids.json").read_text())
  assert set(map(int, found["per_question_accuracy"])) == amo.PARSED


def test_an_amo_row_without_what_it_needs_is_named(tmp_path):
  found = [amo_row(1), amo_row(3, answer=""), amo_row(None)]
  path = write(tmp_path / "amobench.jsonl", found)
  kept, rejected = problems.read(Data(source="amobench", root=str(path)))
  assert [p.problem_id for p in kept] == ["amobench-1"]
  assert [r.reason.partition(": ")[2] for r in rejected] == [
    "no answer",
    "no question_id",
  ]


# LiveCodeBench


def lcb_row(i=0, **changes):
  private = [{"input": f"{i}\n", "output": f"{i + 1}\n", "testtype": "stdin"}]
  return {
    "question_title": "Next",
    "question_content": f"Add one to the number. ({i})",
    "platform": "atcoder",
    "question_id": f"abc{i}_a",
    "contest_id": "abc",
    "contest_date": "2025-01-01T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps(
      [{"input": "1\n", "output": "2\n", "testtype": "stdin"}]
    ),
    "private_test_cases": packed(json.dumps(private)),
    "metadata": "{}",
    **changes,
  }


def test_a_livecodebench_release_is_all_its_files(tmp_path):
  count = 0
  for stem in ("test", "test2", "test3", "test4", "test5", "test6"):
    # As many as there are: 880 in the first five files, 175 in the last.
    more = 176 if stem != "test6" else 175
    some = [lcb_row(i) for i in range(count, count + more)]
    write(tmp_path / "livecodebench" / f"{stem}.jsonl", some)
    count += more
  every = questions.load(chosen(tmp_path), "livecodebench")
  assert (every.data["rows"], len(every.data["files"])) == (1055, 6)
  v6 = chosen(tmp_path, **{"evaluate.livecodebench": "v6"})
  newest = questions.load(v6, "livecodebench")
  assert newest.data["rows"] == 175
  assert json.loads(newest.problems[0].meta)["question_id"] == "abc880_a"
  tests = parsed(newest.problems[0])
  assert tests.function is None
  assert [(case.given, case.expected) for case in tests.cases] == [
    ("1\n", "2\n"),
    ("880\n", "881\n"),
  ]


def test_a_function_keeps_its_name_and_code():
  starter = "class Solution:\n    def addOne(self, n: int) -> int:\n        "
  case = {"input": "1", "output": "2", "testtype": "functional"}
  row = lcb_row(
    starter_code=starter,
    public_test_cases=json.dumps([case]),
    private_test_cases=json.dumps([case]),
    metadata=json.dumps({"func_name": "addOne"}),
  )
  found = livecodebench.problem(row, "livecodebench")
  assert parsed(found).function == "addOne"
  assert starter.rstrip() in found.text
  copy = {"problem": "Add one.", "starter_code": starter, "tests": [case]}
  found = livecodebench.problem(copy, "livecodebench")
  assert parsed(found).function == "addOne"


class Hostile:
  def __reduce__(self):
    return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize("value", [Hostile(), {"a": Hostile()}, 7])
def test_a_pickle_of_more_than_texts_gives_no_tests_and_runs_nothing(value):
  row = lcb_row(private_test_cases=packed(value))
  found = livecodebench.problem(row, "livecodebench")
  with pytest.raises(code_tests.BadTests):
    code_tests.parse(found.tests, json.loads(found.meta))


@pytest.mark.parametrize("column", ["public_test_cases", "private_test_cases"])
def test_a_row_without_tests_is_set_aside(column):
  with pytest.raises(rows.BadRow, match=f"no {column}"):
    livecodebench.problem(lcb_row(**{column: None}), "livecodebench")


@needs_data
def test_the_full_livecodebench_samples_load():
  path = CODE / "sandboxfusion_lcb_sample.jsonl"
  found, rejected = problems.read(Data(source="livecodebench", root=str(path)))
  assert rejected == []
  tests = [parsed(p) for p in found]
  assert [t.function for t in tests] == [None, "countSeniors", None]
  assert [len(t.cases) for t in tests] == [5, 14, 15]
  assert not any("expert" in p.text or "###" in p.text for p in found)
  assert "def countSeniors(self" in found[1].text


@needs_data
def test_public_tests_of_livecodebench_load():
  path = CODE / "rllm_livecodebench_public_tests.json"
  found, rejected = problems.read(Data(source="livecodebench", root=str(path)))
  assert len(found) + len(rejected) == 879
  assert all("repeats" in r.reason for r in rejected)
  assert len(found) > 870
  assert all(parsed(p).cases for p in found)


@needs_data
def test_lcb_runner_is_given_the_tests_as_they_were_published():
  path = CODE / "rllm_livecodebench_public_tests.json"
  functions = 0
  for row in json.loads(path.read_text()):
    problem = livecodebench.problem(row, "livecodebench")
    asked = json.loads(lcb_runner.input_output(problem))
    inputs = [case["input"] for case in row["tests"]]
    outputs = [case["output"] for case in row["tests"]]
    if asked["fn_name"] is None:
      assert (asked["inputs"], asked["outputs"]) == (inputs, outputs)
      continue
    functions += 1
    assert asked["fn_name"] in row["starter_code"]
    assert arguments(asked["inputs"]) == arguments(inputs)
    assert arguments(asked["outputs"]) == arguments(outputs)
  assert functions > 300


def arguments(texts):
  return [[json.loads(line) for line in text.split("\n")] for text in texts]


# TACO and code_contests


@needs_data
def test_real_taco_rows_load_and_keep_their_tests():
  path = CODE / "taco_real_rows.jsonl"
  found, rejected = problems.read(Data(source="taco", root=str(path)))
  # The third row has tests and no statement.
  assert [r.reason.partition(": ")[2] for r in rejected] == ["no problem"]
  assert [len(json.loads(p.tests)["inputs"]) for p in found] == [134, 209]
  marks = [json.loads(p.meta).get("special_judge") for p in found]
  assert marks == [True, None]  # the first one is interactive
  lines = path.read_text().split("\n")
  long = json.loads(lines[2])["input_output"]
  assert taco.tests(long) == long  # an integer of 9,131 digits, and a null


def taco_row(i, **changes):
  tests = {"inputs": [f"{i}\n"], "outputs": [f"{i}\n"]}
  return {
    "question": f"Print {i}.",
    "input_output": json.dumps(tests),
    "solutions": json.dumps(["print 1", "print(input())"]),
    **changes,
  }


def test_special_judges_are_marked_by_the_file_beside(tmp_path):
  path = write(tmp_path / "taco_test.jsonl", [taco_row(i) for i in range(3)])
  flags = [{"idx": i, "special_judge": i == 1} for i in range(3)]
  write(tmp_path / "taco_test_special_judge_flags.jsonl", flags)
  for root in (path, tmp_path):
    found, rejected = problems.read(Data(source="taco", root=str(root)))
    assert rejected == []
    marks = [json.loads(p.meta).get("special_judge") for p in found]
    assert marks == [None, True, None]


def test_a_file_of_flags_that_has_none_is_refused(tmp_path):
  write(tmp_path / "taco_test.jsonl", [{"question": "q"}])
  write(tmp_path / "taco_test_special_judge_flags.jsonl", [{"index": 0}])
  with pytest.raises(UserError, match="flags has the fields idx and special"):
    taco.load(Data(source="taco", root=str(tmp_path)))


def test_a_taco_reference_is_python_3(tmp_path):
  found = [
    taco_row(0),
    taco_row(1, solutions=json.dumps(["print 1", "#include <x>"])),
    taco_row(2, solutions="[]"),
  ]
  path = write(tmp_path / "taco.jsonl", found)
  kept, _ = problems.read(Data(source="taco", root=str(path)))
  fenced = "```python\nprint(input())\n```"
  assert [p.solution for p in kept] == [fenced, None, None]


@pytest.mark.parametrize(
  ("tests", "message"),
  [
    (None, "no input_output"),
    ("{", "not JSON"),
    (100_000 * "[", "not JSON .nested too deeply"),
    ("[]", "no JSON object"),
    ('{"inputs": [], "outputs": []}', "no inputs and outputs"),
    ('{"inputs": ["1"], "outputs": []}', "1 inputs but 0 outputs"),
  ],
)
def test_taco_tests_that_are_none_set_the_row_aside(tests, message):
  with pytest.raises(rows.BadRow, match=message):
    taco.problem(taco_row(0, input_output=tests))


def test_columns_nested_too_deeply_set_the_row_aside():
  deep = 100_000 * "["
  with pytest.raises(rows.BadRow, match="solutions is not JSON"):
    taco.problem(taco_row(0, solutions=deep))
  copy = {"content": "Print 1.", "test": "[]", "labels": deep}
  with pytest.raises(rows.BadRow, match="labels are not JSON"):
    livecodebench.problem(copy, "livecodebench")


def test_an_arrow_file_is_read_as_a_jsonl_file_is(tmp_path):
  found = [taco_row(i) for i in range(5)]
  table = pa.Table.from_pylist(found)
  with pa.ipc.new_stream(tmp_path / "data-0.arrow", table.schema) as writer:
    writer.write_table(table, max_chunksize=2)
  lines = write(tmp_path / "lines" / "data-0.jsonl", found)
  kinds = [
    problems.read(Data(source="taco", root=str(root)))[0]
    for root in (tmp_path / "data-0.arrow", lines)
  ]
  assert kinds[0] == kinds[1]
  assert len(kinds[0]) == 5
  (tmp_path / "data-1.arrow").write_bytes(b"no arrow")
  with pytest.raises(UserError, match="as an arrow stream"):
    problems.read(Data(source="taco", root=str(tmp_path / "data-1.arrow")))


@needs_data
def test_code_contests_load_as_anybodys_problems():
  path = CODE / "rllm_code_contests_test.json"
  found, rejected = problems.read(Data(source="jsonl", root=str(path)))
  assert len(found) + len(rejected) == 165
  assert all("repeats" in r.reason for r in rejected)
  assert {p.domain for p in found} == {"code"}
  assert all(parsed(p).cases for p in found)
