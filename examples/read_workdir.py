"""Reads a workdir with pandas: what refinement mended, and what that taught.

    python -m pip install pandas
    python examples/read_workdir.py runs/demo

docs/workdir.md explains every column and says how the rows of stages join.
"""

import sys

import trd_jax


def main(workdir: str) -> None:
  run = trd_jax.open_run(workdir)
  drafts = run.frame("rollout", ["key", "problem_id", "correct"])
  refined = run.frame("refine", ["draft_key", "correct", "response_ids"])

  # A refined trajectory names its draft, a draft its problem.
  pairs = drafts.merge(
    refined, left_on="key", right_on="draft_key", suffixes=("_o", "_r")
  )
  print("verdicts of y_o (rows) and y_r (columns)")
  # NaN are rows without an answer to judge by.
  counts = pairs.groupby(["correct_o", "correct_r"], dropna=False).size()
  print(counts.unstack(fill_value=0))
  lengths = pairs["response_ids"].map(len)
  print(f"median tokens of y_r: {lengths.median():.0f}")

  metrics = run.metrics_frame().set_index("step")
  print("the divergence, on trajectories whose draft was right and wrong")
  # A row leaves out what no token of its update counts for.
  wanted = ["D_correct", "D_incorrect", "ppl_gap"]
  print(metrics.reindex(columns=wanted).iloc[[0, -1]])

  # One row a sample: the share of right samples of each question, by side.
  shares = {
    side: run.frame(f"evaluate/{side}", ["benchmark", "problem_id", "correct"])
    .groupby(["benchmark", "problem_id"])["correct"]
    .mean()
    for side in ("base", "trained")
  }
  gained = shares["trained"] - shares["base"]
  print("questions that gained most")
  print(gained.sort_values(ascending=False).head(5))


if __name__ == "__main__":
  if len(sys.argv) != 2:
    sys.exit(__doc__)
  main(sys.argv[1])
