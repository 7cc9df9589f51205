"""What graded samples add up to: a benchmark's figures, and two runs' beside.

`figures` makes of a benchmark's rows what `done.json` and, without the single
verdicts, `summary.json` of an evaluation hold; `table` is that for people.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trd_jax.data.problems.questions import Questions
from trd_jax.experiment import tables
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import (
  NO_ANSWER,
  GradedSample,
  because_of,
  unparsed_because,
)
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Evaluate
from trd_jax.grading import estimators

SHARES = {
  "truncated_share": "truncated",
  "no_box_share": "no answer",
  "unparsed_share": "unparsed",
  "timeout_share": "timeout",
  "unjudged_share": "unjudged",
}
"""By key of `figures`: what the table calls it."""

_IDENTICAL = "identical_to_base"
HARDLY_ANY = 0.9
"""Share of samples without an answer from which on that is told."""

_BASE = "evaluate/base"
_ADVICE = "evaluate both on the same questions, equally often"

Verdicts = dict[str, list[bool | None]]


def figures(
  rows: Sequence[GradedSample],
  data: Mapping[str, Any],
  base: Mapping[str, Sequence[bool | None]] | None = None,
) -> dict[str, Any]:
  """Computes one model's figures on one benchmark.

  Args:
    rows: its samples of that benchmark, each once.
    data: what the questions were read from (`Questions.data`).
    base: verdicts by question of the model that says how hard each is.

  Returns:
    What `estimators.summarize` gives; `verdicts` by question; the shares of
    samples that were truncated, have no answer (no box, no program), could
    not be parsed or ran out of time; `unparsed_because`, see `records`;
    `median_tokens`; `graders`, how many samples each version judged; `model`,
    `model_revision`; `prompt_version`, whose words asked; `thinking`, whether
    the prompts let a response think (None where the rows don't say); `data`;
    and with `base` the figures by difficulty as `buckets`.
  """
  verdicts: Verdicts = {}
  graders: dict[str, int] = {}
  # Rows come in the order in which they were finished; verdicts of a question
  # stand in the order of its samples.
  for row in sorted(rows, key=lambda row: (row.problem_id, row.sample)):
    verdicts.setdefault(row.problem_id, []).append(row.correct)
    graders[row.grader_version] = graders.get(row.grader_version, 0) + 1
  found: dict[str, Any] = {
    **estimators.summarize(verdicts),
    "verdicts": verdicts,
    "truncated_share": _share(row.truncated for row in rows),
    "no_box_share": _share(row.reason in NO_ANSWER for row in rows),
    "unparsed_share": _share(row.reason == "unparsed" for row in rows),
    "unparsed_because": unparsed_because((r.reason, r.detail) for r in rows),
    "timeout_share": _share(row.reason == "timeout" for row in rows),
    "median_tokens": statistics.median(row.num_tokens for row in rows),
    "graders": graders,
    "model": rows[0].model,
    "model_revision": rows[0].model_revision,
    "prompt_version": rows[0].prompt_version,
    # Rows of an earlier version don't say; one that does speaks for all.
    "thinking": max((row.thinking for row in rows), key=_is_said),
    "data": dict(data),
  }
  if base is not None:
    found["buckets"] = estimators.by_bucket(verdicts, base)
  return found


def base_verdicts(
  section: Evaluate,
  run_dir: RunDir,
  stage: str,
  questions: Mapping[str, Questions],
  thinking: Mapping[str, bool | None] | None = None,
) -> dict[str, Verdicts]:
  """Returns the base model's verdicts, which say how hard questions are.

  Args:
    section: names a run, or leaves it at this one, which may have none yet.
    run_dir: this run.
    stage: what is evaluated: 'evaluate/base' or 'evaluate/trained'.
    questions: what is asked.
    thinking: in which mode, by benchmark, where that is known.

  Returns:
    Verdicts by question, by benchmark; nothing without a base evaluation.

  Raises:
    UserError: the run that `evaluate.buckets_from` names has no base samples,
      or has them of other questions or in the other thinking mode.
  """
  named = section.buckets_from
  # Base's own buckets, by its own samples, would only say what they are made
  # of.
  if named is None and stage == _BASE:
    return {}
  where = run_dir if named is None else RunDir(named)
  done = where.done(_BASE)
  if done is None and named is None:
    return {}
  told = f"evaluate.buckets_from={named}" if named else str(where.stage(_BASE))
  if done is None:
    raise UserError(
      f"{told}: there is no finished evaluation of the base model; run"
      " trd_jax.evaluate --model=base there"
    )
  if named and (lacking := [name for name in questions if name not in done]):
    raise UserError(f"{told}: it has no {', '.join(lacking)}")
  found = {name: row["verdicts"] for name, row in done.items()}
  for name in questions.keys() & found.keys():
    here = (thinking or {}).get(name)
    if _differ(there := done[name].get("thinking"), here):
      raise UserError(
        f"{told}: its {name} was sampled with thinking {_mode(there)}, and here"
        f" it is with thinking {_mode(here)}, so that its buckets are"
        " another mode's; set evaluate.thinking to its mode, or name another"
        " run in evaluate.buckets_from"
      )
    ids = {problem.problem_id for problem in questions[name].problems}
    if missing := sorted(ids - found[name].keys()):
      raise UserError(
        f"{told}: of {name} it lacks {len(missing)} of {len(ids)} questions,"
        f" {missing[0]} for one; name a base run of the same questions in"
        " evaluate.buckets_from"
      )
  return found


def _is_said(thinking: bool | None) -> bool:
  return thinking is not None


def _differ(one: bool | None, two: bool | None) -> bool:
  """Returns whether two modes are known to differ; old rows don't say."""
  return _is_said(one) and _is_said(two) and one != two


def _mode(thinking: bool | None) -> str:
  return {True: "on", False: "off", None: "not recorded"}[thinking]


def describe_modes(summary: Mapping[str, Any]) -> str:
  """Says in which thinking mode a summary's benchmarks were sampled."""
  modes = (_mode(row.get("thinking")) for row in summary.values())
  return f"thinking {' or '.join(dict.fromkeys(modes))}"


def check_prompts(
  prompts: Mapping[tuple[str, str], str], run_dir: RunDir
) -> None:
  """Checks that base, once it is evaluated, was asked in the same words.

  Base and trained student are compared question by question. A template that
  was edited between the two would be taken for what training did.

  Args:
    prompts: SHA-256 of the prompt's ids, by benchmark and problem id.
    run_dir: where base's samples are, if they are.

  Raises:
    UserError: a question was put to base after another prompt alone.
  """
  # Nothing to compare with, too, where base is what is made again.
  if run_dir.complete(_BASE) is None:
    return
  columns = ["key", "benchmark", "problem_id", "prompt_sha256"]
  base: dict[tuple[str, str], set[str]] = {}
  for row in run_dir.table(_BASE, GradedSample, columns).to_pylist():
    question = row["benchmark"], row["problem_id"]
    base.setdefault(question, set()).add(row["prompt_sha256"])
  for (benchmark, problem_id), sha256 in prompts.items():
    if sha256 not in base.get((benchmark, problem_id), {sha256}):
      raise UserError(
        f"{run_dir.stage(_BASE)}: {benchmark}, problem {problem_id} was put to"
        " base after another prompt (another template or wording?), so that the"
        " two can't be compared: bring it back to what it was, or start in a"
        " new --workdir"
      )


def identical_to_base(
  rows: Sequence[GradedSample], run_dir: RunDir
) -> dict[str, float]:
  """Returns by benchmark the share of samples that are base's, id for id.

  A sample is compared with base's of the same question and number, where both
  drew with the same seed; engines that were to sample from another model and
  give all of base's samples had base's weights.

  Args:
    rows: the trained model's.
    run_dir: where base's are, if they are.
  """
  columns = ["key", "benchmark", "problem_id", "sample", "seed", "response_ids"]
  base = {
    (row["benchmark"], row["problem_id"], row["sample"], row["seed"]): row[
      "response_ids"
    ]
    for row in run_dir.table(_BASE, GradedSample, columns).to_pylist()
  }
  marks: dict[str, list[bool]] = {}
  for row in rows:
    name = (row.benchmark, row.problem_id, row.sample, row.seed)
    if name in base:
      same = list(row.response_ids) == base[name]
      marks.setdefault(row.benchmark, []).append(same)
  return {name: _share(same) for name, same in marks.items()}


def served_base(summary: Mapping[str, Any]) -> str | None:
  """Returns the warning about a trained model that samples as base does.

  One benchmark with other samples is enough to know that it isn't base.
  """
  shares = {n: r[_IDENTICAL] for n, r in summary.items() if _IDENTICAL in r}
  same = [name for name, share in shares.items() if share == 1.0]
  if not same or len(same) < len(shares):
    return None
  return (
    f"warning: every sample of {', '.join(same)} is base's, token for token:"
    " what was sampled from are base's weights, or an adapter too small to be"
    " seen; look at merge/done.json (largest_logit_distance_to_base), and on a"
    " server see that it has loaded the merged folder or the adapter anew"
  )


def without_answers(summary: Mapping[str, Any]) -> Iterator[str]:
  """Yields a warning about each benchmark that was hardly answered at all.

  Its figures then say how the model was asked, and not what it can do.
  """
  for name, row in summary.items():
    tokens = f"median {row['median_tokens']:,.0f} tokens"
    # Not `share >= …`, which lets NaN pass.
    if not row["truncated_share"] < HARDLY_ANY:
      yield (
        f"warning: {100 * row['truncated_share']:.0f}% of the samples of {name}"
        f" were cut off at their budget ({tokens}): raise"
        " evaluate.max_response_tokens, or look whether the model ends its"
        " turns (its chat template, its end token)"
      )
    elif not row["no_box_share"] < HARDLY_ANY:
      yield (
        f"warning: {100 * row['no_box_share']:.0f}% of the samples of {name}"
        f" hold no answer ({tokens}): look at some, at the words that asked"
        " (evaluate.math_prompt, evaluate.code_prompt) and at the model's"
        " weights and chat template"
      )


def describe_identical(summary: Mapping[str, Any]) -> str | None:
  """Returns the shares of samples that are base's as a line; None without."""
  shares = [
    f"{name} {100 * row[_IDENTICAL]:.1f}%"
    for name, row in summary.items()
    if _IDENTICAL in row
  ]
  if not shares:
    return None
  return f"identical to base's sample, token for token: {', '.join(shares)}"


def _share(marks) -> float:
  marks = list(marks)
  return sum(marks) / len(marks)


def without_verdicts(summary: Mapping[str, Any]) -> dict[str, Any]:
  """Drops each sample's verdict from a summary, for people."""
  return {
    name: {key: value for key, value in row.items() if key != "verdicts"}
    for name, row in summary.items()
  }


def describe(summary: Mapping[str, Any]) -> str:
  """Writes Avg@K and Pass@K of every benchmark on one line."""
  return "; ".join(
    f"{name} Avg@{row['k']} {100 * row['avg_at_k']:.1f}%,"
    f" Pass@{row['k']} {100 * row['pass_at_k']:.1f}% (n={row['n']})"
    for name, row in summary.items()
  )


def table(summary: Mapping[str, Any]) -> str:
  """Writes every benchmark's figures, pass@k curve and buckets, in percent."""
  rows: list[Sequence[str]] = [("benchmark", "", "percent, 95% interval")]
  for name, row in summary.items():
    k = row["k"]
    lines = [(f"Avg@{k}", cell(row, "avg_at_k"))]
    for point, value in row["pass_curve"].items():
      interval = row["pass_curve_intervals"][point]
      lines.append((f"Pass@{point}", _cell(value, interval)))
    for bucket, part in row.get("buckets", {}).items():
      shown = cell(part, "avg_at_k") if part["n"] else "no question"
      lines.append((f"Avg@{k} {bucket} (n={part['n']})", shown))
    shares = (f"{called} {100 * row[s]:.1f}" for s, called in SHARES.items())
    lines.append(("shares", ", ".join(shares)))
    lines.append(("thinking", _mode(row.get("thinking"))))
    if "prompt_version" in row:  # an earlier version's summary doesn't say
      lines.append(("asked as", row["prompt_version"]))
    if because := because_of(row.get("unparsed_because", {})):
      lines.append(("unparsed", because.strip()))
    title = f"{name} (n={row['n']})"
    rows += [(title if i == 0 else "", *line) for i, line in enumerate(lines)]
  return tables.columns(rows)


def cell(figures: Mapping[str, Any], metric: str) -> str:
  """Writes a metric with its interval, in percent."""
  return _cell(figures[metric], figures[f"{metric}_interval"])


def _cell(value: float, interval: Sequence[float]) -> str:
  low, high = interval
  return f"{100 * value:5.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def compare(
  mine: Mapping[str, Any],
  other: Mapping[str, Any],
  across_modes: bool = False,
) -> dict[str, Any]:
  """Compares two runs on the benchmarks both have, question by question.

  Args:
    mine: a run's figures by benchmark, verdicts included.
    other: another run's.
    across_modes: whether one may have been sampled with thinking on and the
      other with thinking off.

  Returns:
    By benchmark `other`, `mine` (see `estimators.summarize`, and their
    `thinking`) and `paired_difference`, mine minus other.

  Raises:
    UserError: they share no benchmark; or one was asked or graded in another
      way, so that the difference would not be the model's.
  """
  common = [name for name in mine if name in other]
  if not common:
    raise UserError(
      f"compare: one run has {', '.join(mine)}, the other {', '.join(other)}:"
      " no benchmark is in both"
    )
  found = {}
  for name in common:
    one, two = mine[name], other[name]
    check_alike(name, one, two, across_modes)
    pair = estimators.compare(two["verdicts"], one["verdicts"])
    found[name] = {
      "other": {**pair["base"], "thinking": two.get("thinking")},
      "mine": {**pair["trained"], "thinking": one.get("thinking")},
      "paired_difference": pair["paired_difference"],
    }
  return found


def check_alike(
  name: str,
  one: Mapping[str, Any],
  two: Mapping[str, Any],
  across_modes: bool = False,
) -> None:
  """Checks that two runs on a benchmark differ by their models alone.

  Raises:
    UserError: by their questions, samples a question, graders, the words of
      the prompts, or, unless `across_modes`, by the thinking modes that they
      say.
  """
  if one["verdicts"].keys() != two["verdicts"].keys() or one["k"] != two["k"]:
    raise UserError(
      f"compare: {name} has n={one['n']}, k={one['k']} in one run and"
      f" n={two['n']}, k={two['k']} in the other, or other questions;"
      f" {_ADVICE}"
    )
  modes = [run.get("thinking") for run in (one, two)]
  if _differ(*modes) and not across_modes:
    raise UserError(
      f"compare: {name} was sampled with thinking {_mode(modes[0])} in one run"
      f" and {_mode(modes[1])} in the other, so that the difference is not the"
      " models' alone; evaluate both in one mode (evaluate.thinking), or set"
      " them side by side all the same with trd_jax.evaluate --across_modes"
    )
  # What an earlier version wrote doesn't say.
  words = [run.get("prompt_version") for run in (one, two)]
  if None not in words and words[0] != words[1]:
    raise UserError(
      f"compare: {name} was asked in other words in one run"
      f" ({words[0]}) than in the other ({words[1]}), so that the difference is"
      " not the models' alone; evaluate both in the same (docs/evaluation.md,"
      ' "Whose words")'
    )
  graders = [", ".join(sorted(run.get("graders", ()))) for run in (one, two)]
  if graders[0] != graders[1]:
    shown = " and by ".join(each or "an earlier version" for each in graders)
    raise UserError(
      f"compare: {name} was graded by {shown}; judge both by the same graders:"
      " python -m trd_jax.evaluate --regrade"
    )


def comparison_table(
  comparison: Mapping[str, Any], mine: str, other: str
) -> str:
  """Writes what `compare` found, in percent."""
  rows: list[Sequence[str]] = [
    ("benchmark", "", other, mine, "difference (paired)")
  ]
  for name, pair in comparison.items():
    k, n = pair["mine"]["k"], pair["mine"]["n"]
    for title, metric in ((f"Avg@{k}", "avg_at_k"), (f"Pass@{k}", "pass_at_k")):
      sides = ("other", "mine", "paired_difference")
      cells = [cell(pair[side], metric) for side in sides]
      rows.append((f"{name} (n={n})", title, *cells))
  return tables.columns(rows)
