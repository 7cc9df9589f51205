"""What a stage says of its rows, with and without answers to judge by."""

import pytest

from tests.support import chat_folders, training_runs
from trd_jax.data.chat import Chat
from trd_jax.generation import summaries

BARE = {"correct": None, "reason": "no_gold"}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
  return Chat.load(chat_folders.write_folder(tmp_path_factory.mktemp("chat")))


def rows(chat, stage, count, bare):
  return [
    training_runs.trajectory(
      chat,
      training_runs.problem(n),
      stage,
      n,
      **(BARE if n in bare else {}),
    )
    for n in range(count)
  ]


@pytest.mark.parametrize(
  ("bare", "said"),
  [
    ((), "5 samples, 60.0% correct, 0.0% truncated"),
    ((0, 1), "5 samples, 66.7% correct, 0.0% truncated"),
    (range(5), "5 samples, 0.0% truncated"),
  ],
)
def test_shares_are_of_what_can_be_judged(chat, tmp_path, bare, said):
  run_dir = training_runs.RunDir(tmp_path)
  training_runs.write(run_dir, "rollout", rows(chat, "rollout", 5, bare))
  wanted = run_dir.keys("rollout")
  found = summaries.summarize(run_dir, "rollout", wanted)
  assert (found["no_gold"], found["unjudged"]) == (len(bare), 0)
  line = summaries.describe(found)
  assert line.startswith(said)
  told = f"no verdict: {len(bare)} rows without an answer"
  assert line.endswith(told) == bool(bare)
  assert "not judged" not in line


def test_a_draft_without_a_verdict_is_not_a_wrong_one(chat):
  drafts, refined = (
    rows(chat, stage, 6, (1, 2)) for stage in ("rollout", "refine")
  )
  counts = summaries.compare_with_drafts(drafts, refined)["by_draft"]
  assert counts == {
    "fail_to_fail": 2,
    "fail_to_succ": 0,
    "succ_to_fail": 0,
    "succ_to_succ": 2,
  }


def test_what_became_of_drafts_is_a_table():
  counts = {"succ_to_succ": 1200, "succ_to_fail": 3}
  counts |= {"fail_to_succ": 40, "fail_to_fail": 5}
  assert summaries.draft_table(counts).splitlines() == [
    "             y_r right  y_r wrong",
    "  y_o right      1,200          3",
    "  y_o wrong         40          5",
  ]
