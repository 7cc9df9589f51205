"""Shows trajectories in a terminal: a problem, y*, y_o and y_r, and verdicts.

    python -m trd_jax.show --workdir=DIR [--only=fail_to_succ] [--n=3]
    python -m trd_jax.show --workdir=DIR --problem=ID [--full]
    python -m trd_jax.show --workdir=DIR --benchmark=NAME [--model=base]

Reads, and makes, locks and waits for nothing; so it shows what an unfinished
run has so far. The first line in which y_o and y_r differ carries a `>`, and
on the laboratory, where each right line is known, the first wrong step a `!`.
"""

import collections
import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trd_jax.experiment import cli, excerpts, printing, shards, tables
from trd_jax.experiment.errors import UserError, did_you_mean
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.records import (
  NO_VERDICT,
  GradedSample,
  Problem,
  Trajectory,
)
from trd_jax.experiment.run_dir import RunDir

ONLY = {
  "all": "whatever their verdicts",
  "fail": "y_o is wrong",
  "succ": "y_o is right",
  "fail_to_succ": "y_o is wrong and y_r is right",
  "succ_to_fail": "y_o is right and y_r is wrong",
  "fail_to_fail": "both are wrong",
  "succ_to_succ": "both are right",
  "truncated": "y_o or y_r ended at its budget",
  "leak": "y_r speaks of a draft or a reference",
}
"""What --only takes, and which trajectories that are."""

FLAGS = (
  cli.Flag("only", "all", f"which: {', '.join(ONLY)}"),
  cli.Flag("problem", None, "the id of one problem, or how it begins"),
  cli.Flag("n", 3, "how many to show, drawn at random"),
  cli.Flag("seed", 0, "another one draws others"),
  cli.Flag("full", False, "show texts whole that fill more than their share"),
  cli.Flag("benchmark", None, "show questions and samples of this benchmark"),
  cli.Flag("model", None, "whose samples: base or trained; default: trained"),
  cli.Flag("json", False, "print the same as JSON, texts whole"),
)

_STAGES = ("problems", "rollout", "refine")
_SMALL = ("key", "problem_id", "draft_key", "correct", "reason", "truncated")
_TEXTS = ("text", "response_ids", "extracted", "finish_reason", "thinking")
_MOST_ANSWERS = 5  # of a question, unless all are asked for


class Pair(NamedTuple):
  """A y_o and what became of it.

  Attributes:
    problem_id: what both answer.
    draft: the row of y_o; None where there is none.
    refined: the row of y_r, or of the teacher's own answer; None likewise.
  """

  problem_id: str
  draft: Mapping[str, Any] | None
  refined: Mapping[str, Any] | None


def run(experiment: Experiment, run_dir: RunDir | None, flags) -> None:
  """Prints what the flags choose.

  Raises:
    UserError: there is no run, or nothing to show in it yet; a flag's value or
      combination means nothing; a file is damaged.
  """
  _check(run_dir, flags)
  assert run_dir is not None
  if flags.benchmark is None:
    _show_trajectories(experiment, run_dir, flags)
  else:
    _show_benchmark(experiment, run_dir, flags)


def _check(run_dir: RunDir | None, flags) -> None:
  """Refuses what can't be shown, before anything is read.

  Raises:
    UserError: see `run`.
  """
  if run_dir is None:
    raise UserError("--workdir=DIR is missing: name the folder of a run")
  root = run_dir.root
  if not run_dir.config.is_file():
    why = "it holds no config.json" if root.is_dir() else "it is not there"
    raise UserError(f"--workdir={root}: no run ({why}); name a run's workdir")
  points = sorted(path.name for path in run_dir.stage("points").glob("*/"))
  if points and not run_dir.problems_dir.is_dir():
    raise UserError(
      f"--workdir={root} is a sweep's: name one of its points, as"
      f" --workdir={run_dir.stage('points') / points[0]}"
    )
  if flags.only not in ONLY:
    hint = did_you_mean(flags.only, ONLY, "--only=")
    raise UserError(f"--only={flags.only}: there is no such choice; {hint}")
  if flags.n < 1:
    raise UserError(f"--n={flags.n}: has to be at least 1")
  if flags.model not in (None, "base", "trained"):
    raise UserError(f"--model={flags.model}: choose base or trained")
  if flags.model is not None and flags.benchmark is None:
    raise UserError(
      "--model is of the samples of a benchmark: name one with --benchmark=NAME"
    )
  if flags.only == "leak" and flags.benchmark is not None:
    raise UserError(
      "--only=leak is of refined trajectories; leave --benchmark out"
    )


# -- trajectories ------------------------------------------------------------


def _show_trajectories(experiment: Experiment, run_dir: RunDir, flags) -> None:
  """Prints problems with their trajectories."""
  states = {stage: _state(run_dir, stage) for stage in _STAGES}
  problems = {
    row["problem_id"]: row
    for row in run_dir.table(
      "problems", Problem, ["problem_id", "domain"]
    ).to_pylist()
  }
  pairs = _pairs(run_dir, problems)
  if not pairs:
    raise UserError(
      f"{run_dir.root}: there is nothing to show yet; run trd_jax.pipeline or"
      " trd_jax.rollout with this --workdir first"
    )
  if flags.only.partition("_to_")[1] or flags.only == "leak":
    rewrites = experiment.teacher_writes is not None
    _needs(pairs, "refined", flags.only, "y_r", "refine" if rewrites else None)
  elif flags.only != "all":
    _needs(pairs, "draft", flags.only, "y_o", "rollout")
  chosen = pairs
  if flags.problem is not None:
    wanted = _problem(flags.problem, {pair.problem_id for pair in pairs})
    chosen = [pair for pair in pairs if pair.problem_id == wanted]
  leaking = _leaking(run_dir) if flags.only == "leak" else frozenset()
  chosen = [pair for pair in chosen if _is(pair, flags.only, leaking)]
  matching = len(chosen)
  if flags.problem is None and matching > flags.n:
    places = random.Random(flags.seed).sample(range(matching), flags.n)
    chosen = [chosen[place] for place in sorted(places)]
  shown = [_about(experiment, *whole) for whole in _whole(run_dir, chosen)]
  if flags.json:
    found = {
      "workdir": str(run_dir.root),
      "stages": states,
      "outcomes": _counts(pairs),
      "only": flags.only,
      "matching": matching,
      "shown": shown,
    }
    print(json.dumps(found, indent=2))
    return
  for pieces in _head(experiment, run_dir, states, pairs):
    printing.print_styled(pieces)
  of = "" if flags.only == "all" else f" where {ONLY[flags.only]}"
  if not chosen:
    printing.print_styled([(f"There is none{of}.", "")])
  for number, one in enumerate(shown, 1):
    place = f"{number} of {len(shown)}"
    if matching > len(shown):
      place += f" drawn from {matching:,}{of}"
    for pieces in _lines(one, place, flags.full):
      printing.print_styled(pieces)


def _state(run_dir: RunDir, stage: str) -> str:
  """Returns `done`, `partial` (rows, and not finished) or `missing`.

  Raises:
    UserError: it was finished, and what it left isn't there any more.
  """
  if run_dir.done(stage) is not None:
    return "done"
  return "partial" if shards.names(run_dir.stage(stage)) else "missing"


def _pairs(run_dir: RunDir, problems: Iterable[str]) -> list[Pair]:
  """Returns all trajectories of a run, each y_o with its y_r.

  Where there is none, as in a run along y*, the problems alone.
  """
  drafts, refined = (
    run_dir.table(stage, Trajectory, _SMALL).to_pylist()
    for stage in ("rollout", "refine")
  )
  by_draft = {row["draft_key"]: row for row in refined if row["draft_key"]}
  # The teacher's own answer to a problem has no draft.
  own = {row["problem_id"]: row for row in refined if not row["draft_key"]}
  pairs = [
    Pair(
      row["problem_id"],
      row,
      by_draft.pop(row["key"], None) or own.pop(row["problem_id"], None),
    )
    for row in drafts
  ]
  left = [*by_draft.values(), *own.values()]
  pairs += [Pair(row["problem_id"], None, row) for row in left]
  if not pairs:
    pairs = [Pair(problem_id, None, None) for problem_id in problems]
  return sorted(
    pairs, key=lambda p: (p.problem_id, (p.draft or {}).get("key", ""))
  )


def _needs(
  pairs: Sequence[Pair], side: str, only: str, name: str, stage: str | None
) -> None:
  """Refuses a choice by what no trajectory has.

  Args:
    pairs: what is there.
    side: of a pair.
    only: the choice.
    name: of that side.
    stage: which writes it; None where the run's method has no such stage.

  Raises:
    UserError: there is none.
  """
  if not any(getattr(pair, side) for pair in pairs):
    why = (
      f"as trd_jax.{stage} wrote none so far"
      if stage
      else "as this run's method makes none"
    )
    raise UserError(
      f"--only={only}: there is no {name} here, {why}; leave --only out to see"
      " what there is"
    )


def _problem(wanted: str, ids: set[str]) -> str:
  """Returns the id that is meant, whole or by how it begins.

  Raises:
    UserError: there is none, or several begin so.
  """
  if wanted in ids:
    return wanted
  found = sorted(one for one in ids if one.startswith(wanted)) if wanted else []
  if len(found) == 1:
    return found[0]
  if found:
    raise UserError(
      f"--problem={wanted}: {len(found):,} ids begin so, as {found[0]} and"
      f" {found[1]}; give more of it"
    )
  hint = did_you_mean(wanted, ids, "--problem=")
  hint = hint or f"an id here is {min(ids)}"
  raise UserError(f"--problem={wanted}: there is no such problem here; {hint}")


def _verdict(row: Mapping[str, Any] | None) -> str | None:
  """Returns `succ` or `fail`; None without a verdict, as in Figure 7."""
  if row is None or row["reason"] in NO_VERDICT:
    return None
  return "succ" if row["correct"] else "fail"


def _is(pair: Pair, only: str, leaking: frozenset[str]) -> bool:
  """Returns whether a pair is one of a choice of `ONLY`."""
  rows = [row for row in (pair.draft, pair.refined) if row is not None]
  if only == "all":
    return True
  if only == "truncated":
    return any(row["truncated"] for row in rows)
  if only == "leak":
    return pair.refined is not None and pair.refined["key"] in leaking
  before, _, after = only.partition("_to_")
  if _verdict(pair.draft) != before:
    return False
  return not after or _verdict(pair.refined) == after


def _leaking(run_dir: RunDir) -> frozenset[str]:
  """Returns the keys of the refined texts that speak of what isn't there."""
  from trd_jax.data import leakage

  folder = run_dir.stage("refine")
  return frozenset(
    key
    for name in shards.names(folder)
    for key, text in zip(
      *shards.read_table(folder / name, Trajectory, ["key", "text"])
      .to_pydict()
      .values(),
      strict=True,
    )
    if leakage.mentions_reference(text) is not None
  )


def _counts(pairs: Sequence[Pair]) -> dict[str, int]:
  """Counts the pairs of each choice that rows alone decide."""
  return {
    only: sum(_is(pair, only, frozenset()) for pair in pairs)
    for only in ONLY
    if only != "leak"
  }


def _whole(
  run_dir: RunDir, chosen: Sequence[Pair]
) -> Iterator[tuple[Problem | None, Pair]]:
  """Yields the problem and the whole rows of some pairs."""
  ids = {pair.problem_id for pair in chosen}
  problems = _rows(run_dir, "problems", Problem, None, ids)
  columns = (*_SMALL, *_TEXTS)
  sides = []
  for stage, side in (("rollout", "draft"), ("refine", "refined")):
    rows = [getattr(pair, side) for pair in chosen]
    keys = {row["key"] for row in rows if row is not None}
    sides.append(_rows(run_dir, stage, Trajectory, columns, keys))
  drafts, refined = sides
  for pair in chosen:
    row = problems.get(pair.problem_id)
    yield (
      None if row is None else Problem(**row),
      Pair(
        pair.problem_id,
        pair.draft and drafts.get(pair.draft["key"]),
        pair.refined and refined.get(pair.refined["key"]),
      ),
    )


def _rows(
  run_dir: RunDir,
  stage: str,
  record: type,
  columns: Sequence[str] | None,
  wanted: set[str],
) -> dict[str, dict[str, Any]]:
  """Reads rows of wanted keys, a shard at a time: all may be gigabytes."""
  found: dict[str, dict[str, Any]] = {}
  folder = run_dir.stage(stage)
  for name in shards.names(folder):
    if len(found) == len(wanted):
      break
    # Keys first: most shards hold none of the few rows.
    keys = shards.read_table(folder / name, record, [record.KEY])[0].to_pylist()
    mine = {key: at for at, key in enumerate(keys) if key in wanted}
    if not mine:
      continue
    part = shards.read_table(folder / name, record, columns)
    for key, at in mine.items():
      # Arrow makes a mask only after it has looked whether it is of pandas,
      # which takes half a second to import.
      found.setdefault(key, *part.slice(at, 1).to_pylist())
  return found


# -- what is said of a text --------------------------------------------------


def _about(
  experiment: Experiment, problem: Problem | None, pair: Pair
) -> dict[str, Any]:
  """Returns what is shown of a problem and its trajectories, as JSON has it."""
  y_o = _about_text(problem, pair.draft)
  y_r = _about_text(problem, pair.refined)
  if y_o and y_r and experiment.teacher_writes != "teacher":
    line = _first_difference(y_o["text"], y_r["text"])
    y_o["first_difference"] = y_r["first_difference"] = line
  return {
    "problem_id": pair.problem_id,
    "source": problem and problem.source,
    "domain": problem and problem.domain,
    "x": problem and problem.text,
    "answer": problem and problem.answer,
    "y_star": problem and problem.solution,
    "y_o": y_o,
    "teacher" if experiment.teacher_writes == "teacher" else "y_r": y_r,
  }


def _about_text(
  problem: Problem | None, row: Mapping[str, Any] | None
) -> dict[str, Any] | None:
  """Returns what is shown of one text; None without a text."""
  if row is None:
    return None
  from trd_jax.data import leakage
  from trd_jax.data.problems import arithmetic_steps

  text = row["text"]
  wrong = None
  if problem is not None:
    wrong = arithmetic_steps.first_wrong_step(problem, text)
  return {
    "key": row["key"],
    "correct": row["correct"],
    "reason": row["reason"],
    "extracted": row["extracted"],
    "tokens": len(row["response_ids"]),
    "truncated": row["truncated"],
    "finish_reason": row["finish_reason"],
    "thinking": row["thinking"],
    # Of what the student wrote itself nobody asks that.
    "leak": leakage.mentions_reference(text) if row.get("draft_key") else None,
    "first_wrong_step": wrong
    and {
      "line": text.count("\n", 0, wrong.offset) + 1,
      "offset": wrong.offset,
      "text": text[wrong.offset : wrong.end],
      "right": wrong.right,
    },
    "first_difference": None,
    "text": text,
  }


def _first_difference(one: str, other: str) -> int | None:
  """Returns the number, from 1, of the first line in which texts differ."""
  lines = one.split("\n"), other.split("\n")
  for number, (a, b) in enumerate(zip(*lines, strict=False), 1):
    if a != b:
      return number
  shorter, longer = sorted(map(len, lines))
  return None if shorter == longer else shorter + 1


# -- on a terminal -----------------------------------------------------------


def _head(
  experiment: Experiment,
  run_dir: RunDir,
  states: Mapping[str, str],
  pairs: Sequence[Pair],
) -> Iterator[excerpts.Pieces]:
  """Yields lines about the run: what it is, how far, how many of each kind."""
  said = f"{run_dir.root}: {experiment.method}, {experiment.regime}"
  yield [(_wrapped(said), "bold")]
  needed = {
    "rollout": experiment.needs_rollouts,
    "refine": experiment.teacher_writes is not None,
  }
  unfinished = []
  for stage, count in (
    ("rollout", sum(pair.draft is not None for pair in pairs)),
    ("refine", sum(pair.refined is not None for pair in pairs)),
  ):
    if needed[stage] and states[stage] != "done":
      so_far = f"has {count:,} rows so far" if count else "has no rows yet"
      unfinished.append(f"{stage} {so_far}")
  if unfinished:
    yield [(_wrapped(f"partial: {', '.join(unfinished)}"), "yellow")]
  counts = _counts(pairs)
  kinds = [f"{only} {counts[only]:,}" for only in counts if counts[only]]
  yield [(_wrapped(f"--only: {', '.join(kinds)}"), "dim")]


def _lines(
  one: Mapping[str, Any], place: str, full: bool
) -> Iterator[excerpts.Pieces]:
  """Yields the lines about a problem and its trajectories."""
  names = [name for name in ("y_o", "y_r", "teacher") if one.get(name)]
  share = None if full else excerpts.share(2 + len(names))
  yield []
  source = f" ({one['source']})" if one["source"] else ""
  title = f"== {place}: problem {one['problem_id']}{source} "
  yield [(_wrapped(title + "=" * 4), "bold")]
  if one["x"] is None:
    yield [("its problem is not in problems/", "yellow")]
  else:
    yield [("x", "bold"), (_gold(one["answer"]), "")]
    yield from excerpts.block(one["x"], {}, share)
    if one["y_star"] is None:
      yield [("y*", "bold"), ("  none", "")]
    else:
      yield [("y*", "bold"), (f"  {len(one['y_star']):,} characters", "")]
      yield from excerpts.block(one["y_star"], {}, share)
  for name in names:
    yield from _text_lines(name, one[name], share)
  if one["y_o"] and one.get("y_r") and one["y_o"]["text"] == one["y_r"]["text"]:
    yield [("y_r is y_o, letter for letter", "yellow")]
  if not names:
    yield [("no trajectory of it yet", "yellow")]


def _gold(answer: str) -> str:
  return f"  right answer: {answer}" if answer else "  no answer to judge by"


def _text_lines(
  name: str, one: Mapping[str, Any], share: int | None
) -> Iterator[excerpts.Pieces]:
  """Yields a text's verdict and its rows, with what is marked in it."""
  word, style = _verdict_word(one)
  said = [f"{one['tokens']:,} tokens"]
  if one["extracted"] is not None:
    said.insert(0, f"answered {_short(one['extracted'])}")
  if one["truncated"]:
    said.append("truncated")
  if one["leak"]:
    said.append(f'speaks of "{_short(one["leak"])}"')
  begin = f"{name}  {word}"
  line = _wrapped(f"{begin} ({one['reason']}), {', '.join(said)}")
  head, *more = line.removeprefix(begin).split("\n")
  yield [(f"{name}  ", "bold"), (word, style), (head, "")]
  for rest in more:
    yield [(rest, "")]
  marks: dict[int, list[tuple[str, str]]] = {}
  other = {"y_o": "y_r", "y_r": "y_o"}.get(name)
  if (line := one["first_difference"]) is not None:
    note = f"first line that differs from {other}"
    if line > one["text"].count("\n") + 1:
      line, note = line - 1, f"ends here; {other} goes on"
    marks[line] = [(">", note)]
  if wrong := one["first_wrong_step"]:
    right = wrong["right"]
    note = "first wrong step" + (f": {right} is right" if right else "")
    marks.setdefault(wrong["line"], []).append(("!", note))
  yield from excerpts.block(one["text"], marks, share)


def _verdict_word(one: Mapping[str, Any]) -> tuple[str, str]:
  """Returns a verdict in a word, and its style."""
  if one["reason"] in NO_VERDICT:
    return "no verdict", ""
  if one["correct"] is None:
    return "not judged", "yellow"
  return ("right", "green") if one["correct"] else ("wrong", "red")


def _short(text: str, most: int = 60) -> str:
  text = " ".join(text.split())
  return text if len(text) <= most else f"{text[: most - 1]}…"


def _wrapped(line: str) -> str:
  return printing.wrapped(printing.clean(line), sys.stdout)


# -- samples of a benchmark --------------------------------------------------


def _show_benchmark(experiment: Experiment, run_dir: RunDir, flags) -> None:
  """Prints questions of a benchmark with what was answered.

  Raises:
    UserError: there are no samples of it.
  """
  from trd_jax.data.problems import questions

  samples = _samples(run_dir)
  _check_benchmark(run_dir, samples, flags)
  by_model = {
    model: rows[flags.benchmark]
    for model, rows in samples.items()
    if flags.benchmark in rows
  }
  model = flags.model or ("trained" if "trained" in by_model else "base")
  mine = by_model[model]
  chosen = sorted(mine)
  if flags.problem is not None:
    chosen = [_problem(flags.problem, set(mine))]
  chosen = [
    one for one in chosen if _is_question(one, flags.only, model, by_model)
  ]
  matching = len(chosen)
  if matching > flags.n:
    places = random.Random(flags.seed).sample(range(matching), flags.n)
    chosen = [chosen[place] for place in sorted(places)]
  texts = _rows(
    run_dir,
    f"evaluate/{model}",
    GradedSample,
    None,
    {row["key"] for one in chosen for row in mine[one]},
  )
  asked = questions.load_local(experiment, flags.benchmark)
  problems = {one.problem_id: one for one in asked or ()}
  shown = [
    _about_question(
      one,
      problems.get(one),
      [texts[row["key"]] for row in mine[one] if row["key"] in texts],
      {name: _right_of(rows.get(one, ())) for name, rows in by_model.items()},
    )
    for one in chosen
  ]
  state = _state(run_dir, f"evaluate/{model}")
  if flags.json:
    found = {
      "workdir": str(run_dir.root),
      "benchmark": flags.benchmark,
      "model": model,
      "state": state,
      "only": flags.only,
      "matching": matching,
      "shown": shown,
    }
    print(json.dumps(found, indent=2))
    return
  rows = [row for one in mine.values() for row in one]
  right = sum(row["correct"] is True for row in rows)
  said = f"{run_dir.root}: {flags.benchmark}, {model}: {len(mine):,} questions,"
  said += f" {len(rows):,} samples, {right / len(rows):.1%} right"
  printing.print_styled([(_wrapped(said), "bold")])
  if state == "partial":
    printing.print_styled(
      [(f"partial: evaluate/{model} is not finished", "yellow")]
    )
  if not shown:
    printing.print_styled([("There is no such question.", "")])
  for number, one in enumerate(shown, 1):
    place = f"{number} of {len(shown)}"
    if matching > len(shown):
      place += f" drawn from {matching:,}"
    for pieces in _question_lines(one, place, flags.full):
      printing.print_styled(pieces)


def _samples(
  run_dir: RunDir,
) -> dict[str, dict[str, dict[str, list[dict[str, Any]]]]]:
  """Returns small rows by model, benchmark and question, where there are."""
  columns = ("key", "benchmark", "problem_id", "sample", "correct", "reason")
  found: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {}
  for model in ("base", "trained"):
    stage = f"evaluate/{model}"
    run_dir.done(stage)
    table = run_dir.table(stage, GradedSample, (*columns, "truncated"))
    for row in table.to_pylist():
      of_model = found.setdefault(model, {})
      of_benchmark = of_model.setdefault(row["benchmark"], {})
      of_benchmark.setdefault(row["problem_id"], []).append(row)
  return found


def _check_benchmark(
  run_dir: RunDir, samples: Mapping[str, Mapping[str, Any]], flags
) -> None:
  """Refuses a benchmark that has no samples.

  Raises:
    UserError: it hasn't.
  """
  if not samples:
    raise UserError(
      f"{run_dir.root}: no benchmark has samples here yet; run"
      " trd_jax.evaluate with this --workdir first"
    )
  model = flags.model
  if model is not None and model not in samples:
    raise UserError(
      f"--model={model}: it has no samples here yet; run trd_jax.evaluate"
      f" --model={model} first, or give --model={next(iter(samples))}"
    )
  there = samples[model] if model else {k for s in samples.values() for k in s}
  if flags.benchmark not in there:
    hint = did_you_mean(flags.benchmark, there, "--benchmark=")
    raise UserError(
      f"--benchmark={flags.benchmark}: it has no samples here; {hint}"
    )


def _right_of(rows: Sequence[Mapping[str, Any]]) -> str:
  right = sum(row["correct"] is True for row in rows)
  return f"{right} of {len(rows)}"


def _is_question(
  problem_id: str,
  only: str,
  model: str,
  by_model: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
) -> bool:
  """Returns whether a question is one of a choice of `ONLY`.

  It succeeds where at least half of its samples are right; `_to_` is from base
  to trained.
  """
  rows = by_model[model][problem_id]
  if only == "all":
    return True
  if only == "truncated":
    return any(row["truncated"] for row in rows)

  def verdict(of: Sequence[Mapping[str, Any]]) -> str | None:
    right = sum(row["correct"] is True for row in of)
    return ("succ" if 2 * right >= len(of) else "fail") if of else None

  before, _, after = only.partition("_to_")
  if not after:
    return verdict(rows) == before
  of = {
    name: by_model.get(name, {}).get(problem_id, ())
    for name in ("base", "trained")
  }
  return (verdict(of["base"]), verdict(of["trained"])) == (before, after)


def _about_question(
  problem_id: str,
  problem: Problem | None,
  rows: Sequence[Mapping[str, Any]],
  right: Mapping[str, str],
) -> dict[str, Any]:
  """Returns what is shown of a question, as JSON has it."""
  answers = collections.Counter(
    (row["extracted"], row["correct"] is True) for row in rows
  )
  return {
    "problem_id": problem_id,
    "question": problem and problem.text,
    "answer": problem and problem.answer,
    "right": dict(right),
    "answers": [
      {"extracted": extracted, "correct": correct, "samples": count}
      for (extracted, correct), count in answers.most_common()
    ],
    "samples": [
      {"sample": row["sample"], **(_about_text(problem, row) or {})}
      for row in sorted(rows, key=lambda row: row["sample"])
    ],
  }


def _question_lines(
  one: Mapping[str, Any], place: str, full: bool
) -> Iterator[excerpts.Pieces]:
  """Yields the lines about a question: asked, answered, some samples' texts."""
  samples = one["samples"]
  # One that is right and one that is wrong say most; --full shows all.
  first = {row["correct"] is True: row for row in reversed(samples)}
  texts = (
    samples if full else [first[key] for key in (True, False) if key in first]
  )
  share = None if full else excerpts.share(2 + len(texts))
  yield []
  title = f"== {place}: question {one['problem_id']} "
  yield [(_wrapped(title + "=" * 4), "bold")]
  if one["question"] is None:
    yield [("its text is not on this machine (evaluate.root names it)", "dim")]
  else:
    yield [("question", "bold"), (_gold(one["answer"]), "")]
    yield from excerpts.block(one["question"], {}, share)
  right = ", ".join(f"{name} {count}" for name, count in one["right"].items())
  yield [("right", "bold"), (f"  {right}", "")]
  answers = [
    (
      "none" if row["extracted"] is None else _short(row["extracted"]),
      f"{row['samples']:,}",
      "right" if row["correct"] else "",
    )
    for row in one["answers"]
  ]
  most = len(answers) if full else _MOST_ANSWERS
  yield [("answers", "bold"), ("  and how many samples gave them", "")]
  for line in tables.columns(answers[:most], "<>", indent="     ").split("\n"):
    yield [(line, "")]
  if (more := len(answers) - most) > 0:
    yield [(f"     … {more:,} other answers; --full shows all", "dim")]
  for row in texts:
    yield from _text_lines(f"sample {row['sample']}", row, share)


if __name__ == "__main__":
  cli.main(
    "show",
    run,
    "shows problems with y_o, y_r and verdicts in a terminal",
    FLAGS,
    standalone=True,
    looks_only=True,
    examples=(
      "--workdir=runs/demo --only=fail_to_succ --n=3",
      "--workdir=runs/demo --benchmark=arithmetic --model=base",
    ),
  )
