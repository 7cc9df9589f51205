"""What a stage's rows add up to, and that in one line."""

import statistics
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from trd_jax.data import leakage
from trd_jax.experiment import tables
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.records import (
  NO_ANSWER,
  NO_GOLD,
  NO_VERDICT,
  NOT_GRADED,
  Trajectory,
  because_of,
  unparsed_because,
)
from trd_jax.experiment.run_dir import RunDir
from trd_jax.grading import scores


def summarize(run_dir: RunDir, stage: str, wanted: Set[str]) -> dict[str, Any]:
  """Returns the summary of a stage's rows, once only those wanted are left.

  Others are there where an earlier process was stopped and the model has
  been replaced since. Whoever reads the stage takes all rows that it finds,
  so they are removed, and how many is printed.

  Raises:
    UserError: rows that were asked for are missing, so the stage can't be
      called done.
  """
  columns = ["key", "correct", "reason", "detail", "truncated", "response_ids"]
  table = run_dir.table(stage, Trajectory, columns)
  rows = [row for row in table.to_pylist() if row["key"] in wanted]
  if missing := len(wanted) - len(rows):
    raise UserError(
      f"{run_dir.stage(stage)}: {missing} of {len(wanted)} samples are missing;"
      " run the stage again"
    )
  if stale := run_dir.keep(stage, Trajectory, wanted):
    print(
      f"{stage}: {stale:,} rows removed that an earlier run sampled with"
      " another model or prompt",
      flush=True,
    )
  lengths = [len(row["response_ids"]) for row in rows]
  return {
    "samples": len(rows),
    "correct": sum(row["correct"] is True for row in rows),
    "unjudged": sum(
      row["correct"] is None and row["reason"] not in NO_VERDICT for row in rows
    ),
    "not_graded": sum(row["reason"] == NOT_GRADED for row in rows),
    "no_gold": sum(row["reason"] == NO_GOLD for row in rows),
    "truncated": sum(row["truncated"] for row in rows),
    "no_box": sum(row["reason"] in NO_ANSWER for row in rows),
    "unparsed": sum(row["reason"] == "unparsed" for row in rows),
    "unparsed_because": unparsed_because(
      (row["reason"], row["detail"]) for row in rows
    ),
    "tokens": sum(lengths),
    "median_tokens": statistics.median(lengths) if lengths else 0,
  }


def compare_with_drafts(
  drafts: Sequence[Trajectory], refined: Sequence[Trajectory]
) -> dict[str, Any]:
  """Compares refinements with their drafts.

  Returns:
    `by_draft`: counts by (verdict of y_o, verdict of y_r), as in the paper's
    Figure 7, of those that were both graded; `leaks`,
    `leaks_in_thoughts` and `leaks_in_answer`: see `leakage.Leakage`.
  """
  verdict: dict[str | None, bool | None] = {
    draft.key: draft.correct for draft in drafts
  }
  counts = {
    f"{before}_to_{after}": 0
    for before in ("fail", "succ")
    for after in ("fail", "succ")
  }
  ungraded = {draft.key for draft in drafts if draft.reason == NOT_GRADED}
  for row in refined:
    if row.reason in NO_VERDICT or row.draft_key in ungraded:
      continue
    before = "succ" if verdict.get(row.draft_key) else "fail"
    counts[f"{before}_to_{'succ' if row.correct else 'fail'}"] += 1
  leaks = leakage.count_leakage(row.text for row in refined)
  return {
    "by_draft": counts,
    "leaks": leaks.anywhere,
    "leaks_in_thoughts": leaks.in_thoughts,
    "leaks_in_answer": leaks.in_answer,
  }


def draft_table(by_draft: Mapping[str, int]) -> str:
  """Returns counts by the verdicts of y_o and y_r, as a table for people."""
  rows: list[tuple[str, ...]] = [("", "y_r right", "y_r wrong")]
  for name, before in (("y_o right", "succ"), ("y_o wrong", "fail")):
    counts = (by_draft[f"{before}_to_{after}"] for after in ("succ", "fail"))
    rows.append((name, *(f"{count:,}" for count in counts)))
  return tables.columns(rows, "<>", indent="  ")


def describe(summary: Mapping[str, Any]) -> str:
  """Returns one line about a stage's rows, from its summary."""
  total = summary["samples"]
  no_gold = summary.get("no_gold", 0)  # earlier versions had none of these
  not_graded = summary.get("not_graded", 0)
  graded = total - no_gold - not_graded
  parts = [
    f"{total:,} samples",
    f"{_share(summary['truncated'], total)} truncated",
    f"median {summary['median_tokens']:,.0f} tokens",
  ]
  # A share of the graded ones: of the others nobody knows.
  if graded or not total:
    parts.insert(1, f"{_share(summary['correct'], graded)} correct")
  if summary["unjudged"]:
    parts.append(f"{_share(summary['unjudged'], graded)} not judged")
  if no_gold:
    parts.append(f"no verdict: {no_gold:,} rows without an answer")
  if not_graded:
    parts.append(f"no verdict: {not_graded:,} rows that weren't graded")
  if summary.get("unparsed"):  # an earlier version's summary has no count
    why = because_of(summary["unparsed_because"])
    parts.append(f"{summary['unparsed']:,} unparsed{why}")
  if summary.get("rejected"):
    parts.append(f"{summary['rejected']} problems set aside")
  if summary.get("shown_whole"):
    parts.append(
      f"{summary['shown_whole']:,} drafts without an answer shown whole"
    )
  if summary.get("leaks"):
    speak = f"{summary['leaks']:,} speak of a draft or a reference"
    if hidden := summary.get("leaks_in_thoughts"):
      speak += f" ({hidden:,} of them in their thoughts"
      # An earlier version's summary has no count of the answers.
      shown = summary.get("leaks_in_answer")
      speak += ")" if shown is None else f", {shown:,} in their answer)"
    parts.append(speak)
  return ", ".join(parts)


def without_answers(stage: str, summary: Mapping[str, Any]) -> str | None:
  """Returns a warning where hardly any of a stage's samples is an answer.

  Training would go on from them without a word.
  """
  total = summary["samples"]
  if not total:
    return None
  tokens = f"median {summary['median_tokens']:,.0f} tokens"
  cut, empty = (summary[name] / total for name in ("truncated", "no_box"))
  if not cut < scores.HARDLY_ANY:
    return (
      f"warning: {100 * cut:.0f}% of the samples were cut off at their budget"
      f" ({tokens}): raise {stage}.max_response_tokens in a new --workdir, or"
      " look whether the model ends its turns (its chat template, its end"
      " token)"
    )
  if not empty < scores.HARDLY_ANY:
    return (
      f"warning: {100 * empty:.0f}% of the samples hold no answer ({tokens}):"
      " look at some, at the words that asked and at the model's weights and"
      " chat template"
    )
  return None


def _share(count: int, total: int) -> str:
  return f"{100 * count / total:.1f}%" if total else "none"


def refuse_preflight(experiment: Experiment, stage: str) -> None:
  """Fails under `preflight_only` in a stage that has no prompts to check.

  Raises:
    UserError: it is on; going on would start what it is meant to hold back.
  """
  if experiment.preflight_only:
    raise UserError(
      f"preflight_only: {stage} has no prompts to check; run trd_jax.pipeline,"
      " rollout, refine or evaluate with it, or leave it out"
    )


def skip_if_done(
  run_dir: RunDir, stage: str, describe: Callable[[dict], str]
) -> bool:
  """Returns whether a stage has been finished before, and prints that.

  Where something is gone that it had left, it is to be finished again, and what
  is gone is printed.

  Raises:
    UserError: a shard of it is damaged, or see `RunDir.done`.
  """
  if lost := run_dir.lost(stage):
    print(f"{stage}: {lost}: it is made again", flush=True)
    return False
  done = run_dir.complete(stage)
  if done is None:
    return False
  run_dir.check_bytes(stage)
  print(f"{stage}: done before: {describe(done)}", flush=True)
  return True
