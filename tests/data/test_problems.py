import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.places import SHARED_DATA
from trd_jax.data import problems
from trd_jax.data.problems import benchmarks, rows
from trd_jax.experiment import experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import Problem, to_table
from trd_jax.experiment.schema import Data

MATH = SHARED_DATA / "math_eval"
DEEPSCALER = SHARED_DATA / "deepscaler"

needs_data = pytest.mark.skipif(
  not MATH.exists(), reason=f"no real data at {SHARED_DATA}"
)


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


# Real data


@needs_data
@pytest.mark.parametrize(
  ("name", "count", "gold"),
  [
    ("aime24", 30, ("204", "315")),
    ("aime25", 30, ("70", "240")),
    ("hmmt25", 30, ("103", "\\sqrt{\\frac{95}{24}}")),
    ("beyondaime", 100, ("3", "33124147")),
    ("math500", 500, ("\\left( 3, \\frac{\\pi}{2} \\right)", "106^\\circ")),
    ("gsm8k", 1319, ("18", "14")),
  ],
)
def test_benchmarks_from_the_local_folder(name, count, gold):
  found, rejected = load(name, MATH)
  assert rejected == []
  assert len({p.problem_id for p in found}) == len(found) == count
  assert (found[0].answer, found[-1].answer) == gold
  assert {p.source for p in found} == {name}
  assert all(p.domain == "math" and p.text and p.answer for p in found)
  # The prompt asks for the box; the statement must not do so again.
  assert not any("put your final answer within" in p.text for p in found)
  assert to_table(found, Problem).num_rows == count
  assert set(benchmarks.BENCHMARKS) >= {name}


@needs_data
def test_gsm8k_solutions_and_answers_come_apart():
  found, _ = load("gsm8k", MATH)
  assert all(p.answer.lstrip("-").isdigit() for p in found)
  assert not any("####" in p.solution or "<<" in p.solution for p in found)
  assert found[0].solution.startswith("Janet sells 16 - 3 - 4 = 9 duck eggs")


@pytest.mark.slow
@needs_data
def test_deepscaler_keeps_every_row_as_problem_or_with_a_reason():
  path = DEEPSCALER / "deepscaler_merged.parquet"
  found, rejected = load("deepscaler", path)
  assert len(found) + len(rejected) == pq.read_metadata(path).num_rows == 40_308
  repeats = [r for r in rejected if "repeats" in r.reason]
  disagree = [r for r in rejected if "disagree" in r.reason]
  assert len(repeats) + len(disagree) == len(rejected)
  assert len(found) > 38_000
  ids = {p.problem_id for p in found}
  assert len(ids) == len(found)
  assert {r.problem_id for r in repeats} <= ids
  assert not {r.problem_id for r in disagree} & ids

  worked = [p for p in found if p.solution is not None]
  assert all(len(p.solution) > len(p.answer) for p in worked)
  table = pq.read_table(path, columns=["problem", "solution"]).to_pylist()
  texts = {
    " ".join(r["problem"].split())
    for r in table
    if (r["solution"] or "").strip()
  }
  # Rows with a solution stay or disagree; a repeat never costs the solution.
  lost = texts - {" ".join(p.text.split()) for p in worked}
  unsure = {r.problem_id for r in disagree}
  assert {rows.problem_id("deepscaler", t) for t in lost} <= unsure


@needs_data
def test_other_files_of_deepscaler():
  aime, rejected = load("deepscaler", DEEPSCALER / "agentica_train_aime.json")
  assert (len(aime), rejected) == (975, [])
  assert all(p.solution for p in aime)
  assert json.loads(aime[0].meta)["year"] == 1983
  amc, _ = load("deepscaler", DEEPSCALER / "agentica_test_amc.json")
  assert len(amc) == 83
  assert amc[0].answer == "142"  # 142.0 in the file


@needs_data
def test_an_aime_half_is_not_taken_for_the_whole(tmp_path):
  name = "matharena_aime_2024_I.jsonl"
  (tmp_path / name).write_bytes((MATH / name).read_bytes())
  with pytest.raises(UserError, match="lacks matharena_aime_2024_II"):
    load("aime24", tmp_path)
  assert len(load("aime24", tmp_path / name)[0]) == 15


# Small files


def test_the_deepscaler_folder_gives_its_corpus_file(tmp_path):
  write(tmp_path / "test_amc.jsonl", [row(1)])
  assert load("deepscaler", tmp_path)[0][0].answer == "2"
  write(tmp_path / "train_aime.jsonl", [row(2)])
  with pytest.raises(UserError, match="2 data files and none is called"):
    load("deepscaler", tmp_path)
  write(tmp_path / "deepscaler_merged.jsonl", [row(3)])
  assert load("deepscaler", tmp_path)[0][0].answer == "4"


def test_subsets_keep_worked_and_bare_rows_apart(tmp_path):
  data = [row(i, solution="so" if i % 3 == 0 else None) for i in range(9)]
  path = write(tmp_path / "train.jsonl", data)
  every, worked, bare = (
    load("deepscaler", path, subset=subset)[0] for subset in problems.SUBSETS
  )
  assert [p.answer for p in worked] == ["1", "4", "7"]
  assert sorted(map(hash, worked + bare)) == sorted(map(hash, every))


def test_a_solution_that_only_repeats_the_answer_is_none(tmp_path):
  data = [
    row(1, solution="$\\boxed{2}$"),
    row(2, solution=" 3 "),
    row(3, solution="3 + 1 = \\boxed{4}"),
    row(4, solution=""),
  ]
  found, _ = load("deepscaler", write(tmp_path / "train.jsonl", data))
  assert [p.solution for p in found] == [None, None, "3 + 1 = \\boxed{4}", None]


def test_a_benchmark_under_its_own_name(tmp_path):
  write(tmp_path / "math500.jsonl", [row(1, subject="Algebra")])
  found, _ = load("MATH-500", tmp_path)
  assert found[0].source == "math500"
  assert json.loads(found[0].meta) == {"subject": "Algebra"}
  write(tmp_path / "aime25.jsonl", [row(1), row(2)])
  assert len(load("aime25", tmp_path)[0]) == 2


def test_gsm8k_rows_without_the_mark_are_set_aside(tmp_path):
  data = [
    {"question": "A?", "answer": "1+1=<<1+1=2>>2\n#### 1,200"},
    {"question": "B?", "answer": "just 3"},
    {"question": "C?", "answer": "work ####  "},
  ]
  found, rejected = load("gsm8k", write(tmp_path / "gsm8k_test.jsonl", data))
  assert [(p.answer, p.solution) for p in found] == [("1200", "1+1=2")]
  assert [r.reason.split(": ")[1] for r in rejected] == [
    "no #### before the answer",
    "no answer",
  ]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 5), small=st.integers(1, 20), more=st.integers(0, 9))
def test_a_limit_is_seeded_nested_and_in_order(seed, small, more):
  every = [rows.to_problem(row(i), "jsonl", domain="math") for i in range(25)]
  few = problems.choose(every, small, seed)
  many = problems.choose(every, small + more, seed)
  assert len(few) == small
  assert [p for p in many if p in few] == few
  assert [p for p in every if p in many] == many
  # What else there is and in which order doesn't matter.
  assert set(problems.choose(every[::-1], small, seed)) == set(few)
  assert problems.choose(every, None, seed) == every


def test_limits_and_seeds_reach_the_choice(tmp_path):
  path = write(tmp_path / "x.jsonl", [row(i) for i in range(40)])
  a, b = (load("jsonl", path, limit=10, seed=s)[0] for s in (0, 1))
  assert len(a) == len(b) == 10
  assert a != b


def test_arithmetic_goes_through_the_same_door():
  found, rejected = load("arithmetic", limit=5)
  assert len(found) == 5
  assert rejected == []
  assert {p.domain for p in found} == {"arithmetic"}


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (Data(source="jsonl"), "set data.root"),
    (Data(source="aime42"), "did you mean"),
    (Data(subset="hardest"), "data.subset=hardest"),
    (Data(subset="answer_only"), "data.subset=answer_only: no such problem"),
  ],
)
def test_a_wrong_key_is_named(data, message):
  with pytest.raises(UserError, match=message):
    problems.select(problems.read(data)[0], data)


@pytest.mark.parametrize("source", ["deepscaler", "aime24"])
def test_without_the_hub_the_message_names_the_key(tmp_path, source):
  code = (
    "from trd_jax.data import problems\n"
    "from trd_jax.experiment import errors\n"
    "from trd_jax.experiment.schema import Data\n"
    "try:\n"
    f"  problems.read(Data(source={source!r}))\n"
    "except errors.UserError as error:\n"
    "  print(error)\n"
  )
  out = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
    env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
  )
  (line,) = out.stdout.splitlines()
  assert "can't be fetched from the Hugging Face hub" in line
  assert "give a local copy with data.root" in line


def test_the_help_names_every_source():
  said = experiment.KEYS["data.source"].doc
  assert all(name in said for name in problems.SOURCES)
  with pytest.raises(UserError, match='did you mean "deepscaler"'):
    load("deepscalr")


def test_what_makes_its_problems_reads_no_file():
  for name, source in problems.SOURCES.items():
    made = source.files is None
    assert made == (name == "arithmetic")
    assert made or source.needs_root or source.hub or source.urls
