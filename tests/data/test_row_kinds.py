"""Rows in the forms that people's files have: read, or set aside with why."""

import datetime
import decimal
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trd_jax.data.problems import jsonl, rows
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.schema import Data

_TESTS = {"inputs": ["1 2\n"], "outputs": ["3\n"]}


def load(path):
  return jsonl.load(Data(source="jsonl", root=str(path)))


def written(tmp_path, *rows):
  path = tmp_path / "rows.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  return path


@pytest.mark.parametrize(
  "tests",
  [
    _TESTS,
    json.dumps(_TESTS),
    json.dumps(json.dumps(_TESTS)),
    [{"input": "1 2", "output": "3"}],
    {"input_output": json.dumps(_TESTS)},
    '{"inputs": [[1]], "outputs": [1' + "0" * 6000 + '], "fn_name": "f"}',
  ],
)
def test_tests_in_every_known_form_are_kept(tmp_path, tests):
  (problem,), rejected = load(
    written(tmp_path, {"problem": "p", "tests": tests})
  )
  assert not rejected
  assert problem.domain == "code"
  assert problem.tests.startswith(("{", "["))


@pytest.mark.parametrize(
  ("tests", "why"),
  [
    ({}, "no lists of inputs and outputs"),
    ([], "hold no test"),
    ({"inputs": [], "outputs": []}, "hold no test"),
    ({"inputs": ["1"], "outputs": []}, "1 inputs but 0 outputs"),
    (["assert f(1) == 2"], "assertions can't be run"),
    ("{not json", "not JSON"),
    (7, "tests are a int"),
    ({"inputs": [[1.0]], "outputs": [float("nan")]}, "NaN"),
  ],
)
def test_tests_that_nothing_can_be_graded_by_are_set_aside(
  tmp_path, tests, why
):
  rows = {"problem": "p", "tests": tests}, {"problem": "q", "answer": "1"}
  (problem,), (rejected,) = load(written(tmp_path, *rows))
  assert problem.text == "q"
  assert why in rejected.reason
  assert "line 1" in rejected.reason


@pytest.mark.parametrize(
  ("given", "answer", "solution"),
  [
    ("1+1=<<1+1=2>>2\n#### 2", "2", "1+1=2"),
    ("so\n#### 1,234", "1234", "so"),
    ("#### 3,4", "3,4", None),
  ],
)
def test_an_answer_as_gsm8k_has_it(tmp_path, given, answer, solution):
  (problem,), _ = load(written(tmp_path, {"question": "q", "answer": given}))
  assert (problem.answer, problem.solution) == (answer, solution)


def test_a_row_as_verl_has_it(tmp_path):
  row = {
    "prompt": [{"role": "user", "content": "1+1?"}],
    "reward_model": {"ground_truth": "2", "style": "rule"},
  }
  (problem,), _ = load(written(tmp_path, row))
  assert (problem.text, problem.answer) == ("1+1?", "2")


_KINDS = {
  "bytes": pa.array([b"3\n"]),
  "decimal": pa.array([decimal.Decimal("1.50")]),
  "timestamp": pa.array([datetime.datetime(2024, 1, 2)]),
  "date": pa.array([datetime.date(2024, 1, 2)]),
  "time": pa.array([datetime.time(1, 2)]),
  "duration": pa.array([datetime.timedelta(seconds=3)]),
  "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
  "list of bytes": pa.array([[b"1", b"2"]]),
  "struct": pa.array([{"at": datetime.datetime(2024, 1, 2), "b": b"x"}]),
}


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("inside", [False, True])
def test_what_columnar_files_hold_besides_is_read(tmp_path, kind, inside):
  """As a column of its own, and within tests, which become JSON."""
  columns = {"problem": pa.array(["p"]), "answer": pa.array(["1"])}
  if inside:
    lists = pa.ListArray.from_arrays(pa.array([0, 1]), _KINDS[kind])
    columns["tests"] = pa.StructArray.from_arrays(
      [lists, lists], ["inputs", "outputs"]
    )
  else:
    columns["extra"] = _KINDS[kind]
  path = tmp_path / "rows.parquet"
  pq.write_table(pa.table(columns), path)
  (problem,), rejected = load(path)
  assert not rejected
  if inside:
    json.loads(problem.tests)


def test_bytes_that_are_no_text_set_their_row_aside(tmp_path):
  path = tmp_path / "rows.parquet"
  pq.write_table(
    pa.table({"problem": [b"p", b"\xff"], "answer": ["1", "2"]}), path
  )
  (problem,), (rejected,) = load(path)
  assert problem.text == "p"
  assert "no UTF-8" in rejected.reason


_FAR = 2**52  # parquet has milliseconds for seconds


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
  "kind",
  [
    pa.timestamp("s"),
    pa.timestamp("ms", "Europe/Berlin"),
    pa.duration("s"),
    pa.map_(pa.string(), pa.duration("s")),
    pa.list_(pa.timestamp("ms")),
  ],
  ids=str,
)
def test_a_moment_that_python_has_none_of_sets_its_row_aside(
  tmp_path, kind, suffix
):
  """And no other row."""
  far, near = _FAR, 7
  if pa.types.is_list(kind):
    far, near = [far], [near]
  elif pa.types.is_map(kind):
    far, near = [("a", far)], [("a", near)]
  table = pa.table(
    {
      "problem": ["p", "q", "r"],
      "answer": ["1", "2", "3"],
      "at": pa.array([near, far, None], kind),
    }
  )
  path = tmp_path / f"rows.{suffix}"
  if suffix == "parquet":
    pq.write_table(table, path)
  else:
    with pa.ipc.new_stream(path, table.schema) as writer:
      writer.write_table(table)
  problems, (rejected,) = load(path)
  assert [problem.text for problem in problems] == ["p", "r"]
  assert f"rows.{suffix} row 2: a value that can't be read" in rejected.reason


def test_nanoseconds_need_no_pandas(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pandas", None)
  path = tmp_path / "rows.parquet"
  at = pa.array([1_700_000_000_123_456_789], pa.timestamp("ns"))
  pq.write_table(pa.table({"problem": ["p"], "answer": ["1"], "at": at}), path)
  (problem,), rejected = load(path)
  assert not rejected
  assert json.loads(problem.meta) == {"at": "2023-11-14T22:13:20.123456"}


def test_rows_of_many_batches_are_numbered_through(tmp_path, monkeypatch):
  monkeypatch.setattr(rows, "_BATCH", 2)
  path = tmp_path / "rows.parquet"
  texts = [*map(str, range(5))]
  pq.write_table(pa.table({"problem": texts, "answer": texts}), path)
  where = [where for where, _ in rows.read(path)]
  assert where == [f"rows.parquet row {n}" for n in range(1, 6)]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_named(tmp_path, encoding):
  path = tmp_path / "rows.jsonl"
  path.write_bytes('{"problem": "é", "answer": "1"}'.encode(encoding))
  with pytest.raises(UserError, match=r"is not UTF-8 .* write it in UTF-8"):
    load(path)
