"""Rounds: the pipeline again, from the student that it has trained.

Round 1 is a run as any other. In each further one the updated student rolls
out, the teacher rewrites its fresh drafts, and training goes on, in
`WORKDIR/rounds/<number>`. What is updated depends on `engine.weights`:

- `merged`: the merged weights are the next round's student, with a new adapter.
  In OPSD, whose teacher is the student's own base, the teacher improves, too.
- `adapter`: base and teacher stay what they were, and the adapter, served
  unmerged, is trained further.

With `pipeline.split` the rounds are one training, each on its part of the
problems. Base and teacher stay what they were, and one adapter is trained
further with its optimizer and schedule; `engine.weights` only says in which
form the student rolls out.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trd_jax.experiment import tables
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.files.json_files import read_json
from trd_jax.experiment.metric_log import seconds_by_stage
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Pipeline

_AGAIN = "remove it and run that round's pipeline again"
ACCOUNT = "round "
"""What the time of a further round stands under begins so."""


def overrides(experiment: Experiment, before: RunDir, number: int) -> list[str]:
  """Returns the flags that turn a config into that of round `number`.

  Args:
    experiment: the whole run's.
    before: the directory of the round before.
    number: of the round, from 2.
  """
  if experiment.pipeline.parts > 1:
    # The round finds by its place what the one before has trained.
    return [f"--config.pipeline.round={number}"]
  student = {"student.adapter": str(before.adapter)}
  if experiment.engine.weights == "merged":
    student = {
      "student.path": str(before.merged),
      # The merged folder holds the tokenizer and the template, too.
      "student.revision": None,
      "student.tokenizer": None,
      "student.chat_template": None,
      "student.adapter": None,
    }
  # Each round is a pipeline of one round: the first one's alone goes on.
  student["pipeline.rounds"] = 1  # type: ignore[assignment]
  return [f"--config.{key}={value}" for key, value in student.items()]


def at(experiment: Experiment, number: int) -> Experiment:
  """Returns the config of a split round."""
  pipeline = dataclasses.replace(experiment.pipeline, round=number)
  return dataclasses.replace(experiment, pipeline=pipeline)


def figures(run_dir: RunDir, rounds: int) -> Iterator[dict[str, Any]]:
  """Yields the figures of each round that is done, up to `rounds`.

  Yields:
    `round`; `weights`, the folder of its student; `avg_at_k` and `pass_at_k`,
    means over the benchmarks, and the base's as `base_…`; `length_share`, the
    median length over the base's on the benchmark where it is smallest;
    `benchmarks`, the trained student's figures by name.
  """
  for number in range(1, rounds + 1):
    here = run_dir.round(number)
    if not here.summary.exists():
      return
    found = read_json(here.summary, _AGAIN)
    try:
      row = means(found["benchmarks"])
    except (LookupError, TypeError, AttributeError, ValueError) as error:
      raise UserError(f"{here.summary} is no summary; {_AGAIN}") from error
    yield {"round": number, "weights": _weights(here), **row}


def means(benchmarks: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the figures of a round over its benchmarks, see `figures`."""
  pairs = benchmarks.values()
  trained = [pair["trained"] for pair in pairs]
  base = [pair["base"] for pair in pairs]
  return {
    "avg_at_k": _mean(trained, "avg_at_k"),
    "pass_at_k": _mean(trained, "pass_at_k"),
    "base_avg_at_k": _mean(base, "avg_at_k"),
    "base_pass_at_k": _mean(base, "pass_at_k"),
    # The worst benchmark: a mean would hide one whose answers are down to a
    # line.
    "length_share": min(
      pair["trained"]["median_tokens"] / max(pair["base"]["median_tokens"], 1)
      for pair in pairs
    ),
    "benchmarks": {name: pair["trained"] for name, pair in benchmarks.items()},
  }


def of_split(
  summary: Mapping[str, Any], here: RunDir, number: int
) -> dict[str, Any]:
  """Returns the figures of a split round that is done.

  Args:
    summary: of the round (`pipeline.summarise`).
    here: its directory.
    number: which one it is.

  Returns:
    `round` and `weights`; `first_update` (from 0), `updates`, `trajectories`
    and `last_loss` of its training; and what `means` has, where its student was
    evaluated.
  """
  training = summary["stages"]["train"]
  kept = ("first_update", "updates", "trajectories", "last_loss")
  row = {"round": number, "weights": _weights(here)}
  row |= {name: training[name] for name in kept}
  return row | (means(summary["benchmarks"]) if summary["benchmarks"] else {})


def seconds(run_dir: RunDir, rounds: int) -> dict[str, float]:
  """Adds up each stage's seconds over split rounds."""
  sums: collections.Counter[str] = collections.Counter()
  for number in range(1, rounds + 1):
    for stage, spent in seconds_by_stage(run_dir.round(number).timings).items():
      # What the first round's directory has of a further one is the whole.
      if not stage.startswith(ACCOUNT):
        sums[stage] += spent  # type: ignore[assignment]
  return dict(sums)


def _weights(here: RunDir) -> str:
  return str(here.merged if here.merged.exists() else here.adapter)


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
  return sum(row[name] for row in rows) / len(rows)


def collapsed(row: Mapping[str, Any], section: Pipeline) -> str | None:
  """Says why no further round should follow a row; None if one may.

  Args:
    row: of `figures`.
    section: holds the limits.
  """
  # Pass@k and not Avg@k: a student that has lost the variety of its answers may
  # still get better on average, and has less to give to the next round.
  fallen = row["base_pass_at_k"] - row["pass_at_k"]
  # Not `fallen > …`, which lets NaN pass.
  if not fallen <= section.collapse_pass:
    return (
      f"mean Pass@k is {100 * fallen:.1f} points below the base's, more than"
      f" pipeline.collapse_pass={section.collapse_pass:g} allows"
    )
  if not row["length_share"] >= section.collapse_length:
    return (
      f"responses are down to {100 * row['length_share']:.0f}% of the base's"
      " median length on a benchmark, less than"
      f" pipeline.collapse_length={section.collapse_length:g} allows"
    )
  return None


def best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
  """Returns the round with the highest mean Avg@k, the earliest of equals."""
  return max(rows, key=lambda row: (row["avg_at_k"], -row["round"]))


def table(rows: Sequence[Mapping[str, Any]], stopped: str | None) -> str:
  """Writes the rounds as a person reads them."""
  first = rows[0]
  lines = [
    "",
    "round   mean Avg@k   mean Pass@k   shortest of the base's length",
    f"base       {100 * first['base_avg_at_k']:6.1f}"
    f"        {100 * first['base_pass_at_k']:6.1f}",
  ]
  chosen = best(rows)
  for row in rows:
    mark = "*" if row is chosen else " "
    lines.append(
      f"{row['round']:>4}{mark}      {100 * row['avg_at_k']:6.1f}"
      f"        {100 * row['pass_at_k']:6.1f}"
      f"        {100 * row['length_share']:6.0f}%"
    )
  if stopped:
    lines.append(f"stopped after round {rows[-1]['round']}: {stopped}")
  lines += [f"* the best: {chosen['weights']}", ""]
  return "\n".join(lines)


def table_of_split(
  rows: Sequence[Mapping[str, Any]], stopped: str | None
) -> str:
  """Writes split rounds as a person reads them.

  Args:
    rows: of `of_split`; the last one has figures.
    stopped: why no further round followed; None: it was the last.
  """
  head = (
    "round",
    "updates",
    "trajectories",
    "loss",
    "mean Avg@k",
    "mean Pass@k",
  )
  last = rows[-1]
  cells = [
    head,
    ("base", *("",) * 3, *_percent(last, "base_avg_at_k", "base_pass_at_k")),
  ]
  for row in rows:
    first = row["first_update"]
    cells.append(
      (
        f"{row['round']}",
        f"{first + 1}-{first + row['updates']}",
        f"{row['trajectories']:,}",
        "?" if row["last_loss"] is None else f"{row['last_loss']:.4f}",
        *_percent(row, "avg_at_k", "pass_at_k"),
      )
    )
  lines = ["", tables.columns(cells)]
  if stopped:
    lines.append(f"stopped after round {last['round']}: {stopped}")
  return "\n".join([*lines, ""])


def _percent(row: Mapping[str, Any], *names: str) -> Iterator[str]:
  """Yields figures in percent, a dash for one that there isn't."""
  for name in names:
    yield f"{100 * row[name]:.1f}" if name in row else "-"
