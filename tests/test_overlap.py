"""Contamination: what a benchmark holds, too, and what only sounds like it."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trd_jax import problems
from trd_jax.problems import overlap
from trd_jax.records import Problem
from trd_jax.sections import Data

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


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


def test_deepscaler_holds_problems_of_math500():
  corpus = SHARED / "deepscaler" / "deepscaler_merged.parquet"
  if not corpus.exists():
    pytest.skip(f"{corpus} is not on this machine")
  data = Data(source="math500", root=str(SHARED / "math_eval"))
  held_out = problems.load(data)[0]
  data = dataclasses.replace(data, source="deepscaler", root=str(corpus))
  train, _ = problems.load(data)
  found = overlap.find(train, {"math500": held_out})
  assert [one.kind for one in found].count("same text") == 4
