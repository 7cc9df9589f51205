"""Rows of files: every kind, every damage, repeats and contradictions."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trd_jax.data import problems
from trd_jax.data.problems import rows
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.schema import Data


def load(source, root=None, **changes):
  root = None if root is None else str(root)
  data = Data(source=source, root=root, **changes)
  every, rejected = problems.read(data)
  return problems.select(every, data), rejected


def write(path, found):
  text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in found)
  path.write_text(text, encoding="utf-8")
  return path


def row(i=0, **changes):
  return {"problem": f"What is {i} + 1?", "answer": str(i + 1), **changes}


@pytest.mark.parametrize(
  "kind", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "lines.json"]
)
def test_every_kind_of_file_gives_the_same_problems(tmp_path, kind):
  data = [row(i, solution=f"{i} + 1 = {i + 1}", level=3) for i in range(5)]
  data[1]["problem"] = "Line one\u2028line two\x85 still one row"
  path = tmp_path / kind
  lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in data) + "\n\n"
  if kind == "a.parquet":
    pq.write_table(pa.Table.from_pylist(data), path)
  elif kind == "a.json":
    path.write_text(json.dumps(data))
  elif kind.endswith(".gz"):
    path.write_bytes(gzip.compress(lines.encode()))
  else:
    path.write_text("\ufeff" + lines, encoding="utf-8")
  found, rejected = load("jsonl", path)
  assert rejected == []
  assert [p.text for p in found] == [r["problem"] for r in data]
  assert [p.answer for p in found] == [r["answer"] for r in data]
  assert found[2].solution == "2 + 1 = 3"
  assert json.loads(found[2].meta) == {"level": 3}
  reference = tmp_path / "reference.jsonl"
  reference.write_text(lines, encoding="utf-8")
  assert load("jsonl", reference) == (found, [])


def test_ids_depend_on_source_and_statement_alone(tmp_path):
  a = load("jsonl", write(tmp_path / "a.jsonl", [row(1), row(2)]))[0]
  moved = [row(2, answer="9", level=1), row(1, problem=" What  is 1 + 1?\n")]
  b = load("jsonl", write(tmp_path / "b.jsonl", moved))[0]
  assert [p.problem_id for p in a] == [p.problem_id for p in b][::-1]
  other = load("deepscaler", tmp_path / "a.jsonl")[0]
  assert not {p.problem_id for p in a} & {p.problem_id for p in other}
  assert (
    a[0].problem_id
    == "jsonl-" + rows.content_key("jsonl", "What is 1 + 1?")[:16]
  )


def nested(depth, column):
  """A line whose column is a list in a list in a list …"""
  line = json.dumps(row(**{column: "HERE"}))
  return line.replace('"HERE"', depth * "[" + '"1"' + depth * "]")


BAD_ROWS = [
  ("{not json", "not JSON"),
  (nested(100_000, "answer"), "not JSON (nested too deeply)"),
  ("[1, 2]", "a list, not an object"),
  (row(answer=True), "answer is a bool"),
  (row(answer={"a": 1}), "answer is a dict"),
  (row(answer=["3", "4"]), "2 different answers (3, 4)"),
  (row(problem=" \n"), "no problem"),
  (row(problem=None), "no problem"),
  (row(problem=["x"]), "problem is a list"),
  (row(solution=7), "solution is a int"),
  (row(problem="\ud800 x"), "problem is not valid Unicode"),
  (row(domain="chemistry"), "domain 'chemistry'"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS)
def test_a_bad_row_is_set_aside_with_its_place_and_reason(
  tmp_path, bad, reason
):
  path = write(tmp_path / "x.jsonl", [row(7), bad, row(8)])
  found, rejected = load("jsonl", path)
  assert [p.answer for p in found] == ["8", "9"]
  assert len(rejected) == 1
  assert rejected[0].reason.startswith("x.jsonl line 2: ")
  assert reason in rejected[0].reason
  assert "\n" not in rejected[0].reason
  assert rejected[0].stage == "problems"


NO_ANSWERS = [
  row(answer=None),
  row(answer="  "),
  row(answer=[]),
  row(answer=float("nan")),
  {"problem": "No gold?"},
]


@pytest.mark.parametrize("bare", NO_ANSWERS)
def test_own_rows_may_do_without_an_answer_and_others_may_not(tmp_path, bare):
  path = write(tmp_path / "x.jsonl", [row(7), bare, row(8)])
  found, rejected = load("jsonl", path)
  assert [p.answer for p in found] == ["8", "", "9"]
  assert [p.has_gold for p in found] == [True, False, True]
  assert rejected == []
  assert rows.count(found, rejected) == (
    "3 rows, 3 distinct prompts, 3 problems, 1 of them without an answer"
  )
  found, rejected = load("deepscaler", path)
  assert [p.answer for p in found] == ["8", "9"]
  assert [r.reason for r in rejected] == ["x.jsonl line 2: no answer"]


def test_a_row_with_an_answer_stands_for_its_repeats_without(tmp_path):
  data = [
    row(1, answer=None, solution="1 + 1 = 2"),
    row(1),
    row(2, answer=None),
    row(2, answer=None, solution="2 + 1 = 3"),
  ]
  found, rejected = load("jsonl", write(tmp_path / "x.jsonl", data))
  assert [(p.answer, p.solution) for p in found] == [
    ("2", None),
    ("", "2 + 1 = 3"),
  ]
  assert [r.reason.partition(",")[0] for r in rejected] == [
    "x.jsonl line 1: repeats x.jsonl line 2",
    "x.jsonl line 3: repeats x.jsonl line 4",
  ]


def test_a_row_too_deep_to_be_looked_through_is_set_aside(tmp_path):
  """Later Pythons parse what their own functions can't descend into."""

  def descend(row):
    return descend(row)

  path = write(tmp_path / "x.jsonl", [row(1)])
  found, rejected = rows.collect("jsonl", [path], descend)
  assert found == []
  assert [r.reason for r in rejected] == ["x.jsonl line 1: nested too deeply"]


@pytest.mark.parametrize(
  ("value", "expected"),
  [
    (7, "7"),
    (142.0, "142"),
    (0.5, "0.5"),
    (" 073 ", "073"),
    (["12"], "12"),
    (["\\dfrac{1}{2}", "\\frac 12", "\\frac{1}{2}"], None),
    (["\\dfrac{1}{2}", "$\\frac{1}{2}$"], "\\dfrac{1}{2}"),
    (["073", 73], "073"),
  ],
)
def test_answers_as_text(value, expected):
  if expected is None:
    with pytest.raises(rows.BadRow, match="2 different answers"):
      rows.answer_text(value)
  else:
    assert rows.answer_text(value) == expected


def test_repeats_are_counted_and_the_worked_one_is_kept(tmp_path):
  data = [
    row(1),
    row(2),
    row(1, solution="1 + 1 = 2"),
    row(1, problem="What  is\n1 + 1?", answer="$2$"),
  ]
  found, rejected = load("jsonl", write(tmp_path / "x.jsonl", data))
  assert [(p.answer, p.solution) for p in found] == [
    ("2", "1 + 1 = 2"),
    ("3", None),
  ]
  assert [r.reason for r in rejected] == [
    "x.jsonl line 1: repeats x.jsonl line 3, word for word",
    "x.jsonl line 4: repeats x.jsonl line 3",
  ]
  assert rows.count(found, rejected) == (
    "4 rows, 3 distinct prompts, 2 problems,"
    " 2 repeat another but for white space"
  )
  assert {r.problem_id for r in rejected} == {found[0].problem_id}


def test_rows_that_disagree_are_all_set_aside(tmp_path):
  data = [row(1), row(2), row(1, answer="3"), row(1)]
  found, rejected = load("jsonl", write(tmp_path / "x.jsonl", data))
  assert [p.answer for p in found] == ["3"]
  assert len(rejected) == 3
  assert all("3 rows of this problem disagree" in r.reason for r in rejected)


def test_code_rows_may_do_without_an_answer(tmp_path):
  data = [
    {"question": "Sum?", "tests": {"inputs": ["1 2"], "outputs": ["3"]}},
    {"question": "Max?", "tests": "assert f(1, 2) == 2", "answer": "2"},
    row(1, domain="arithmetic"),
    row(2, tests="", answer=""),
  ]
  found, rejected = load("jsonl", write(tmp_path / "x.jsonl", data))
  assert [p.domain for p in found] == ["code", "code", "arithmetic", "math"]
  assert json.loads(found[0].tests) == data[0]["tests"]
  assert [p.answer for p in found] == ["", "2", "2", ""]
  assert found[1].tests == data[1]["tests"]
  assert [p.has_gold for p in found] == [True, True, True, False]
  assert rejected == []


def test_answers_that_the_laboratory_never_gives_are_set_aside(tmp_path):
  kept = ["0", 19, "07", 3.0, "$14$", "4."]
  aside = ["20", -1, "0.5", "nan", "inf", "\\frac{1}{2}", "six"]
  data = [
    row(i, answer=answer, domain="arithmetic")
    for i, answer in enumerate([*kept, *aside])
  ]
  data.append(row(99))  # another domain has other answers
  data.append(row(100, answer=None, domain="arithmetic"))
  found, rejected = load("jsonl", write(tmp_path / "x.jsonl", data))
  assert len(found) == len(kept) + 2
  assert len(rejected) == len(aside)
  assert rejected[0].reason == (
    "x.jsonl line 7: answer 20 is none of the laboratory's arithmetic, which"
    " is modulo 20; give an integer from 0 to 19"
  )


def nothing(folder):
  return folder / "gone.jsonl"


def empty(folder):
  return write(folder / "e.jsonl", ["", "  "])


def empty_list(folder):
  return write(folder / "e.json", ["[]"])


def empty_parquet(folder):
  path = folder / "e.parquet"
  pq.write_table(pa.table({"problem": pa.array([], pa.string())}), path)
  return path


def broken_parquet(folder):
  return write(folder / "b.parquet", ["PAR1 no more"])


def broken_json(folder):
  return write(folder / "b.json", ['[{"problem": '])


def deep_json(folder):
  return write(folder / "d.json", [100_000 * "["])


def one_object(folder):
  return write(folder / "o.json", [row()])


def broken_gzip(folder):
  return write(folder / "b.jsonl.gz", ["no gzip"])


def other_kind(folder):
  return write(folder / "a.csv", ["problem,answer"])


def all_bad(folder):
  return write(folder / "x.jsonl", [row(answer=True), row(problem="")])


def no_files(folder):
  return folder


@pytest.mark.parametrize("source", ["jsonl", "deepscaler", "taco", "gsm8k"])
def test_only_what_can_be_downloaded_is_offered_to_be(tmp_path, source):
  with pytest.raises(UserError, match="give the local copy's path") as caught:
    load(source, nothing(tmp_path))
  assert ("to download it" in str(caught.value)) == (source != "jsonl")


@pytest.mark.parametrize(
  ("source", "make", "message"),
  [
    ("jsonl", nothing, "no such file or folder"),
    ("jsonl", empty, "no rows"),
    ("jsonl", empty_list, "no rows"),
    ("jsonl", empty_parquet, "no rows"),
    ("gsm8k", empty, "no rows"),
    ("deepscaler", empty, "no rows"),
    ("jsonl", broken_parquet, "can't be read as parquet"),
    ("jsonl", broken_json, "not JSON"),
    ("jsonl", deep_json, "not JSON (nested too deeply)"),
    ("jsonl", one_object, "one JSON dict"),
    ("jsonl", broken_gzip, "can't be read"),
    ("jsonl", other_kind, "not a data file"),
    ("jsonl", all_bad, "no usable problem; 2 rows were set aside"),
    ("jsonl", no_files, "no data file in this folder"),
    ("deepscaler", no_files, "0 data files"),
    ("hmmt25", no_files, "lacks matharena_hmmt_feb_2025"),
  ],
)
def test_an_unusable_file_is_one_clear_line(tmp_path, source, make, message):
  path = make(tmp_path)
  with pytest.raises(UserError) as caught:
    load(source, path)
  line = str(caught.value)
  assert message in line
  assert path.name in line or source in line
  assert "\n" not in line
