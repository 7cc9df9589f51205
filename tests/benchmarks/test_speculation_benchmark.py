"""What looking up a prompt would have given, without an engine."""

import argparse
import sys

import numpy as np
import pytest

from tests.support.places import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import speculation  # noqa: E402
from speculation import WITH, WITHOUT, Counts, looked_up  # noqa: E402


def slowly(text: list[int], tokens: int, shortest: int, longest: int):
  """The draft after a text, by comparing everything with everything."""
  for length in range(longest, shortest - 1, -1):
    end = text[-length:]
    for begin in range(len(text) - length):
      if len(end) == length and text[begin : begin + length] == end:
        return text[begin + length : begin + length + tokens]
  return []


@pytest.mark.parametrize("bounds", [(1, 3), (2, 4), (5, 5)])
def test_the_longest_end_is_found_where_it_stood_first(bounds):
  rng = np.random.default_rng(0)
  found = 0
  for _ in range(40):
    text = rng.integers(0, 3, 60).tolist()
    lookup = speculation.Lookup(*bounds)
    for end, token in enumerate(text):
      draft = lookup.draft(6)
      assert draft == slowly(text[:end], 6, *bounds)
      found += bool(draft)
      lookup.add([token])
  assert found > 100


def test_a_copy_is_accepted_and_a_change_costs_a_pass():
  prompt = list(range(100, 120))
  # The first token comes of the prompt, the second is looked up for the first
  # time at the end of a run of two.
  copy = looked_up(prompt, prompt[4:16], 4, 1, 2)
  assert copy == Counts(tokens=12, passes=4, drafts=3, drafted=12, accepted=9)
  # Behind a token that isn't in the prompt nothing can be looked up.
  changed = [*prompt[4:8], 7, *prompt[9:12]]
  assert looked_up(prompt, changed, 4, 1, 2) == Counts(
    tokens=8, passes=4, drafts=2, drafted=8, accepted=5
  )


def test_nothing_in_common_costs_nothing_but_its_passes():
  counts = looked_up([1, 2, 3], [7, 8, 9], 8, 1, 3)
  assert counts == Counts(tokens=3, passes=3)
  assert looked_up([1, 2, 3], [], 8, 1, 3) == Counts()
  assert counts + counts == Counts(tokens=6, passes=6)


def test_a_draft_is_cut_where_the_response_ends():
  prompt = list(range(20))
  counts = looked_up(prompt, prompt[3:6], 16, 1, 3)
  assert (counts.tokens, counts.passes, counts.accepted) == (3, 2, 2)


def run(speed: float, **more) -> dict:
  case = {"tokens_s": speed, "tokens": 90, "requests": 4, "equal": 4, **more}
  return {"8": case}


def test_the_table_has_ratios_by_round_and_says_what_is_not_measured():
  args = argparse.Namespace(at_once=[8], tokens=8, repeats=2)
  counts = {"drafts": 10, "drafted": 80, "accepted": 60}
  cases = {
    WITHOUT: {"runs": [run(100.0), run(200.0)]},
    WITH: {"runs": [run(50.0, **counts), run(300.0, **counts)]},
  }
  table = speculation.vllm_table(cases, args)
  (row, h100) = table.rows
  assert row[-2:] == ("1.00 (0.50-1.50)", "75.0%, 6.00 a draft")
  assert set(h100[1:]) == {"not measured"}

  cases[WITH]["runs"][0]["8"]["equal"] = 3
  with pytest.raises(ValueError, match="3 of 4 refinements"):
    speculation.vllm_table(cases, args)
