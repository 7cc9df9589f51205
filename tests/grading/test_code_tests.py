"""Tests of code problems are read from every format, and never executed."""

import base64
import json
import pickle
import zlib
from pathlib import Path

import pytest

from tests.support.places import SHARED
from trd_jax.grading.code import code_tests
from trd_jax.grading.code.code_tests import BadTests, Case

DATA = SHARED / "data" / "code_eval"
needs_data = pytest.mark.skipif(
  not DATA.is_dir(), reason=f"there is no real data in {DATA}"
)


def packed(value) -> str:
  return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def test_programs_of_taco():
  tests = code_tests.parse('{"inputs": ["1\\n"], "outputs": ["2\\n"]}')
  assert tests.cases == (Case("1\n", "2\n"),)
  assert tests.function is None
  assert tests.tolerant


def test_lines_become_a_text():
  tests = code_tests.parse({"inputs": [["1", "2"]], "outputs": [["3", "4"]]})
  assert tests.cases == (Case("1\n2", "3\n4"),)


def test_functions_of_taco_have_values_bare_or_in_a_list():
  tests = code_tests.parse(
    {
      "fn_name": "f",
      "inputs": [[1, [2]], [3], [4]],
      "outputs": [[5], 6, [None]],
    }
  )
  assert tests.function == "f"
  assert tests.cases == (
    Case("[1, [2]]", ([5], 5)),
    Case("[3]", (6,)),
    Case("[4]", ([None], None)),
  )


def test_integers_of_any_length_survive():
  digits = "9" * 9131
  tests = code_tests.parse(
    f'{{"fn_name": "f", "inputs": [[{digits}]], "outputs": [[{digits}]]}}'
  )
  (case,) = tests.cases
  assert case.given == f"[{digits}]"
  assert case.expected[1] == code_tests.Digits(digits)
  assert code_tests.loads(digits) == case.expected[1]
  assert code_tests.loads(f'"{digits}"') != case.expected[1]


def test_livecodebench_has_texts_one_value_a_line():
  test = {"input": '[1, 2]\n"a"', "output": "[3]", "testtype": "functional"}
  tests = code_tests.parse([test], {"metadata": '{"func_name": "f"}'})
  assert tests.cases == (Case('[[1, 2], "a"]', ([3],)),)
  assert tests.function == "f"
  assert not tests.tolerant


def test_the_function_is_found_in_the_starter_code():
  starter = (
    "class Node:\n  def __init__(self): ...\n"
    "class Solution:\n    def f(self, x: int) -> int:\n        "
  )
  test = {"input": "1", "output": "2", "testtype": "functional"}
  assert code_tests.parse([test], {"starter_code": starter}).function == "f"


def test_a_row_has_public_and_private_tests():
  test = {"input": "1\n", "output": "2\n", "testtype": "stdin"}
  row = {
    "public_test_cases": json.dumps([test]),
    "private_test_cases": packed(json.dumps([test, test])),
  }
  assert code_tests.parse(row).cases == 3 * (Case("1\n", "2\n"),)


@pytest.mark.parametrize("protocol", range(1, pickle.HIGHEST_PROTOCOL + 1))
def test_packed_tests_of_every_protocol(protocol):
  inner = json.dumps({"inputs": ["é 1\n"], "outputs": ["2\n"]})
  for value in (inner, {"input_output": inner}):
    data = zlib.compress(pickle.dumps(value, protocol))
    if protocol < 2:
      continue  # these do not begin with a mark
    tests = code_tests.parse(base64.b64encode(data).decode())
    assert tests.cases == (Case("é 1\n", "2\n"),)
    assert not tests.tolerant


def test_a_pickle_is_never_executed(tmp_path):
  class Trap:
    def __reduce__(self):
      return (Path.touch, (tmp_path / "sprung",))

  with pytest.raises(BadTests, match="a pickle of more than texts"):
    code_tests.parse(packed({"input_output": Trap()}))
  assert not (tmp_path / "sprung").exists()


def test_special_judges_make_a_problem_ungradable():
  tests = {"inputs": ["1"], "outputs": ["2"]}
  assert code_tests.parse(tests).ungradable is None
  for about in ({"special_judge": True}, {"special_judge": 1}):
    assert "checker" in code_tests.parse(tests, about).ungradable
  assert code_tests.parse(tests, {"special_judge": False}).ungradable is None


@pytest.mark.parametrize(
  ("tests", "why"),
  [
    (None, "NoneType"),
    ("{", "not JSON"),
    ("nonsense", "neither JSON nor packed"),
    ("7", "neither JSON nor packed"),
    ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
    ({"inputs": [], "outputs": []}, "no test"),
    ({"inputs": "1", "outputs": "2"}, "no lists"),
    ({"inputs": [1], "outputs": ["2"]}, "an input is a int"),
    ({"inputs": ["1"], "outputs": [None]}, "an output is a NoneType"),
    ([{"input": "1"}], "without input and output"),
    (
      [{"input": "1", "output": "2", "testtype": "functional"}],
      "whose name nothing says",
    ),
    ("[" * 100_000, "nested too deeply"),
    (packed(["a", "b"]), "more than"),
    (packed("x" * 99)[:-8], "cut off"),
  ],
)
def test_what_can_not_be_read_says_why(tests, why):
  with pytest.raises(BadTests, match=why):
    code_tests.parse(tests)


@needs_data
def test_real_livecodebench_rows():
  lines = (DATA / "sandboxfusion_lcb_sample.jsonl").read_text().splitlines()
  found = [code_tests.parse(json.loads(line)["test"]) for line in lines]
  assert [one.function for one in found] == [None, "countSeniors", None]
  assert [len(one.cases) for one in found] == [5, 14, 15]
  assert not any(one.tolerant for one in found)


@needs_data
def test_real_taco_rows():
  lines = (DATA / "taco_real_rows.jsonl").read_text().splitlines()
  found = [code_tests.parse(json.loads(line)["input_output"]) for line in lines]
  assert [one.function for one in found] == [None, None, "factorial"]
  assert [len(one.cases) for one in found] == [134, 209, 9]
  values = [case.expected[1] for case in found[2].cases]
  assert values[5] is None
  lengths = [len(v.text) for v in values if isinstance(v, code_tests.Digits)]
  assert 9131 in lengths


@needs_data
def test_all_rows_of_the_public_collections():
  contests = json.loads((DATA / "rllm_code_contests_test.json").read_text())
  cases = [code_tests.parse(row["tests"]).cases for row in contests]
  assert len(cases) == 165
  assert sum(map(len, cases)) == 1837
  path = DATA / "rllm_livecodebench_public_tests.json"
  rows = json.loads(path.read_text())
  found = [code_tests.parse(row["tests"], row) for row in rows]
  assert len(found) == 879
  assert sum(len(f.cases) for f in found) == 2299
  functions = sum(len(one.cases) for one in found if one.function)
  assert functions == 934
