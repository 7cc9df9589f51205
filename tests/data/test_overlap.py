"""Contamination: what a benchmark holds, too, and what only sounds like it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.places import SHARED_DATA
from trd_jax.data.problems import overlap, store
from trd_jax.experiment.experiment import from_config
from trd_jax.experiment.records import Problem
from trd_jax.experiment.run_dir import RunDir


def _problem(name, text):
  return Problem(name, text, "1", None, "math", "test", None, "{}")


def _kinds(train, held_out):
  mine = [_problem(f"t{n}", text) for n, text in enumerate(train)]
  theirs = [_problem(f"b{n}", text) for n, text in enumerate(held_out)]
  return {
    found.problem_id: (found.other_id, found.kind)
    for found in overlap.find(mine, {"bench": theirs})
  }


_LONG = "alpha beta gamma delta eps zeta eta theta iota kappa lam mu nu xi"


def test_each_kind_is_told_apart():
  found = _kinds(
    [
      "Find $x$  if\n$x = 2$.",
      "find x if x = 2",
      f"Now {_LONG} and more",
      f"Now {_LONG.replace('eta theta', 'eta, not theta')} and more",
      "Find x if x = 3.",
    ],
    ["Find $x$ if $x=2$.", f"Once {_LONG} or less"],
  )
  assert found == {
    "t0": ("b0", "same text"),
    "t1": ("b0", "same words"),
    "t2": ("b1", "13 words in a row"),
  }


def test_thirteen_words_are_needed_and_enough():
  run = [f"w{n}" for n in range(13)]
  other = " ".join(["before", *run, "after"])
  enough, short = " ".join([*run, "x"]), " ".join([*run[:12], "x", "y"])
  assert _kinds([enough, short], [other]) == {"t0": ("b0", "13 words in a row")}


def test_a_run_that_many_problems_share_identifies_none():
  shared = " ".join(f"w{n}" for n in range(13))
  some = [f"{shared} number {n}" for n in range(overlap.COMMON)]
  assert len(_kinds(some, [f"else {shared}"])) == overlap.COMMON
  assert _kinds([*some, f"{shared} again"], [f"else {shared}"]) == {}


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30))
def test_a_problem_overlaps_with_itself_however_it_is_spaced(letters):
  text = " ".join(letters)
  respaced = "\n ".join(letters) + " "
  assert _kinds([respaced], [text]) == {"t0": ("b0", "same text")}


def test_the_first_benchmark_is_named():
  one = _problem("t", "some text")
  benchmarks = {
    "first": [_problem("a", "some text")],
    "second": [_problem("b", "some text")],
  }
  (found,) = overlap.find([one], benchmarks)
  assert (found.benchmark, found.other_id) == ("first", "a")


def _store(tmp_path, capsys, **values):
  """What `store.load` keeps and prints of DeepScaleR's rows."""
  if not SHARED_DATA.is_dir():
    pytest.skip(f"{SHARED_DATA} is not on this machine")
  e = from_config(
    {
      "domain": "math",
      "data.source": "deepscaler",
      "data.root": str(
        SHARED_DATA / "deepscaler" / "deepscaler_merged.parquet"
      ),
      "evaluate.benchmarks": ("math500", "aime24"),
      "evaluate.root": str(SHARED_DATA / "math_eval"),
      **values,
    }
  )
  run_dir = RunDir(tmp_path / "run")
  found = store.load(e, run_dir)
  return found, run_dir.read_rejected("problems"), capsys.readouterr().out


@pytest.mark.slow
def test_deepscaler_is_counted_and_rid_of_what_math500_holds(tmp_path, capsys):
  found, rejected, told = _store(
    tmp_path,
    capsys,
    # However few questions the run is going to ask.
    **{"data.decontaminate": "exact", "evaluate.num_problems": 4},
  )
  assert "40,308 rows, 39,380 distinct prompts, 38,922 problems" in told
  assert "4 of math500 (same text)" in told
  assert "of aime24" not in told
  mine = [row for row in rejected if "as math500's" in row.reason]
  assert len(found) == 38_922 - len(mine)
  assert (
    f"{len(found):,} can be trained on, and the paper trained on 40,245 rows:"
    " there repeats, contradictions and questions of benchmarks stay in"
  ) in told
  assert sum(row.reason.startswith("same text") for row in mine) == 4
  assert {row.problem_id for row in mine}.isdisjoint(
    problem.problem_id for problem in found
  )


@pytest.mark.slow
def test_a_limit_is_of_what_is_left_and_nothing_is_taken_out_unasked(
  tmp_path, capsys
):
  changes = {"data.decontaminate": "ngram", "data.limit": 30_000}
  found, _, told = _store(tmp_path, capsys, **changes)
  assert len(found) == 30_000
  assert "13 words in a row" in told
  whole, _, told = _store(tmp_path / "whole", capsys)
  assert len(whole) == 38_922
  assert "taken out" not in told
