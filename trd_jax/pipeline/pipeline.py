"""All stages in order, each a process of its own, then one table.

    evaluate base → rollout → refine → train → merge → evaluate trained

With `pipeline.rounds` above 1 all of it again, from the trained student; with
`pipeline.split` each round on its own part of the problems (see `rounds`).

A stage that is done is skipped by itself, so the same command goes on where an
earlier one was stopped. What comes out stands in `summary.json`. With
`preflight_only` the stages that generate check and count their prompts as far
as these can be made, and nothing else is done.
"""

import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trd_jax.experiment import cli, tables
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.processes import supervise
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Pipeline

_RANDOM = "random:"
FLAGS = (
  cli.Flag(
    "dry_run",
    False,
    "look at models, data and interpreters, print commands, budgets, devices,"
    " hours and disk, run nothing",
    looks_only=True,
  ),
  cli.Flag(
    "status",
    None,
    "say how far the run in --workdir is, and nothing else; --status=json for"
    " programs. It needs no --config",
    looks_only=True,
    without_config=True,
    bare="text",
  ),
  cli.Flag(
    "from",
    None,
    "another run's workdir: its finished stages are taken over where all keys"
    " agree that they depend on",
    is_path=True,
  ),
)


def run(experiment: Experiment, run_dir: RunDir, flags) -> None:
  """Runs what isn't done yet and sums up.

  Raises:
    UserError: a model, the problems, a benchmark, an interpreter or the run
      that `evaluate.buckets_from` names can't be used (see `early_checks`),
      the problems' file has changed since they were read, there is too
      little room on the disk, or two flags contradict each other.
    SystemExit: a stage failed; with its own exit code, its message having
      gone to stderr.
  """
  donor = getattr(flags, "from")  # no name that Python lets one write
  if flags.status is not None:
    from trd_jax.pipeline import status

    for name, is_given in (("dry_run", flags.dry_run), ("from", donor)):
      if is_given:
        raise UserError(
          f"--status and --{name}: --status only looks at what is there; give"
          " one of the two"
        )
    status.show(
      run_dir, flags.status, lambda e: [account for account, *_ in commands(e)]
    )
    return
  from trd_jax.data.problems import parts, store
  from trd_jax.data.problems.questions import load_all
  from trd_jax.experiment.metric_log import timed
  from trd_jax.generation import preflight
  from trd_jax.grading import benchmark_prompts, scores
  from trd_jax.pipeline import dry_run, early_checks, takeover

  steps = list(commands(experiment))
  section = experiment.pipeline
  if flags.dry_run:
    _dry_run(experiment, run_dir, flags)
    return

  # What a run can be refused for is seen before a stage spends anything.
  if donor is not None:
    list(takeover.plan(experiment, run_dir, RunDir(donor)))  # for its errors
  early_checks.enter(experiment, run_dir)
  if donor is not None and not experiment.preflight_only:
    takeover.take_over(experiment, run_dir, donor)
  sides = () if _only_trains(section) else ("evaluate/base", "evaluate/trained")
  questions = None
  if unfinished := [one for one in sides if run_dir.complete(one) is None]:
    questions = load_all(experiment)
    # Base's samples of which some are gone are made again before they are read.
    own = experiment.evaluate.buckets_from is None
    if not own or run_dir.lost("evaluate/base") is None:
      # For its errors alone: buckets that can't be had are refused now and not
      # after training.
      scores.base_verdicts(
        experiment.evaluate,
        run_dir,
        unfinished[-1],
        questions,
        benchmark_prompts.modes(experiment, experiment.evaluation_thinking),
      )
  # Read here, before any stage starts. Once y_o is there, all that matters is
  # that the source is still the same.
  whole = run_dir.complete(store.STAGE) is not None
  if not whole or run_dir.complete("rollout") is None:
    loaded = store.load_all(experiment, run_dir, questions)
    # Rows may bring system turns, which no model has been tried with yet.
    preflight.check_systems(experiment, run_dir, loaded)
  else:
    store.check_source(experiment, run_dir)
    run_dir.check_bytes(store.STAGE)

  if experiment.preflight_only:
    _preflight(steps, experiment, run_dir, flags)
    return
  # A further round's part is in what the first has looked at.
  if section.round == 1:
    planned = _planned(experiment, run_dir, flags, {})
    for note in dry_run.check_room(experiment, run_dir, planned):
      print(f"note: {note}", flush=True)
  if section.parts > 1:
    ids = [one.problem_id for one in store.load_all(experiment, run_dir)]
    mine = len(parts.of_round(experiment, ids))
    print(
      f"round {section.round} of {section.rounds}: {mine:,} of {len(ids):,}"
      f" problems, {parts.num_updates(experiment, mine):,} updates an epoch",
      flush=True,
    )
    if section.round == 1:
      parts.record(experiment, run_dir, ids)
  for number, (account, module, own) in enumerate(steps, 1):
    if is_done(run_dir, account):
      print(f"[{number}/{len(steps)}] {account}: done before", flush=True)
      continue
    print(f"[{number}/{len(steps)}] {account}", flush=True)
    with timed(run_dir.timings, account):
      code = _start(module, own, experiment, flags)
      if code:
        print(
          f"trd-jax pipeline: {account} ended with exit code {code}; mend what"
          " it says above and give the same command again",
          file=sys.stderr,
        )
        sys.exit(code)

  if section.parts > 1 and section.round == 1:
    # One training over all rounds has one summary, at its end.
    _go_on_split(experiment, run_dir, flags)
    return
  summary = summarise(experiment, run_dir)
  from trd_jax.experiment.files.json_files import write_json

  write_json(run_dir.summary, summary)
  # The last split round's is the whole run's table, which is printed there.
  last_part = section.parts > 1 and section.round == section.rounds
  if section.evaluates and not last_part:
    print(table(summary))
  print(f"written: {run_dir.summary}")
  if list(_further(section)):
    _go_on(experiment, run_dir, flags)
  if section.round == 1:
    print(look_at_it(run_dir))


def _dry_run(experiment: Experiment, run_dir: RunDir, flags) -> None:
  """Says what `run` would do, and what it would take over; starts nothing.

  Raises:
    UserError: as `run`, before its stages.
  """
  from trd_jax.experiment import config_file, findings, printing
  from trd_jax.pipeline import (
    choices,
    dry_run,
    early_checks,
    example_prompts,
    takeover,
  )

  donor = getattr(flags, "from")

  results = early_checks.look(experiment, run_dir)
  print(f"looked at:\n{findings.table(results)}\n" if results else "", end="")
  findings.refuse(results, "wrong")
  taken: dict[str, str] = {}
  if donor is not None:
    for stage, obstacle in takeover.plan(experiment, run_dir, RunDir(donor)):
      told = takeover.described(obstacle, donor, would=True)
      print(f"{stage}: {told}")
      if obstacle is None:
        taken[stage] = told
    further = takeover.of_further_rounds(experiment)
    print(f"{further}\n" if further else "")
  planned = _planned(experiment, run_dir, flags, taken)
  shared = dict(argument.split("=", 1) for argument in flags.config_argv)
  spec = shared["--config"]
  # Not to the last column: a terminal may go on to the next line there.
  room = (printing.width(sys.stdout) or dry_run.WRAP + 1) - 1
  lines = ["models:", *choices.models(experiment, flags.config_argv), ""]
  if told := list(choices.settings(experiment, spec)):
    lines += [*told, ""]
  lines.append("a prompt of each stage:")
  lines += [*example_prompts.describe(experiment, run_dir, room), ""]
  for line in lines:
    print(printing.wrapped(line, sys.stdout, 6))
  card = config_file.expected(spec)
  print(dry_run.describe(experiment, run_dir, planned, card))


def _planned(
  experiment: Experiment, run_dir: RunDir, flags, taken: Mapping[str, str]
) -> list[tuple[str, list[str], str | None]]:
  """Returns each stage and further round, as `dry_run.describe` takes them.

  Args:
    experiment: what is to be run.
    run_dir: where.
    flags: the pipeline's.
    taken: what is told of stages that are taken over, by account.
  """
  before, section = "done before", experiment.pipeline
  planned = [
    (
      account,
      _command(module, own, experiment, flags),
      before if is_done(run_dir, account) else taken.get(account),
    )
    for account, module, own in commands(experiment)
  ]
  planned += [
    (
      _round_name(section, number),
      _round(experiment, run_dir, number, flags),
      before if run_dir.round(number).summary.exists() else None,
    )
    for number in _further(section)
  ]
  return planned


def _further(section: Pipeline) -> Iterable[int]:
  """Returns the numbers of the rounds that this process starts."""
  return range(2, section.rounds + 1) if section.round == 1 else ()


def _round_name(section: Pipeline, number: int) -> str:
  """Returns what a further round is called beforehand."""
  judged = section.parts == 1 or section.evaluate_every is not None
  return f"round {number}{', unless the student has collapsed' * judged}"


def _only_trains(section: Pipeline) -> bool:
  """Returns whether a round evaluates nothing, base neither."""
  return section.round > 1 and not section.evaluates


def _go_on(experiment: Experiment, run_dir: RunDir, flags) -> None:
  """Runs the further rounds (see `rounds`), each a pipeline of its own.

  Raises:
    SystemExit: a round failed; with its exit code.
  """
  from trd_jax.experiment.files.json_files import write_json
  from trd_jax.experiment.metric_log import timed
  from trd_jax.pipeline import rounds

  section = experiment.pipeline
  stopped = None
  for number in range(2, section.rounds + 1):
    here = run_dir.round(number)
    stopped = rounds.collapsed(
      list(rounds.figures(run_dir, number - 1))[-1], section
    )
    if stopped:
      break
    print(f"[round {number}/{section.rounds}] {here.root}", flush=True)
    # The same problems, and one base that every round is compared with.
    for stage in ("problems", "evaluate/base"):
      here.adopt(stage, run_dir)
    here.forget_keys("evaluate/base")
    with timed(run_dir.timings, f"{rounds.ACCOUNT}{number}"):
      command = _round(experiment, run_dir, number, flags)
      code = supervise.run(command, patient=True)
      if code:
        sys.exit(code)
  rows = list(rounds.figures(run_dir, section.rounds))
  write_json(
    run_dir.rounds,
    {"rounds": rows, "best": rounds.best(rows)["round"], "stopped": stopped},
  )
  print(rounds.table(rows, stopped))
  print(f"written: {run_dir.rounds}")


def _go_on_split(experiment: Experiment, run_dir: RunDir, flags) -> None:
  """Runs the further split rounds, and sums up the training over all of them.

  Raises:
    SystemExit: a round failed; with its exit code.
    UserError: a round's directory belongs to another config.
  """
  from trd_jax.experiment.experiment import to_json
  from trd_jax.experiment.files.json_files import write_json
  from trd_jax.experiment.metric_log import timed
  from trd_jax.pipeline import rounds

  section = experiment.pipeline
  rows: list[dict[str, Any]] = []
  stopped, summary = None, {}
  for number in range(1, section.rounds + 1):
    here, own = run_dir.round(number), rounds.at(experiment, number)
    if number > 1:
      here.check(to_json(own))
      accounts = [account for account, _, _ in commands(own)]
      name = f"[round {number}/{section.rounds}]"
      if here.summary.exists() and all(is_done(here, a) for a in accounts):
        print(f"{name} done before", flush=True)
      else:
        print(f"{name} {here.root}", flush=True)
        for stage in ("problems", "evaluate/base"):
          if stage == "problems" or own.pipeline.evaluates:
            here.adopt(stage, run_dir)
        with timed(run_dir.timings, f"{rounds.ACCOUNT}{number}"):
          command = _round(experiment, run_dir, number, flags)
          if code := supervise.run(command, patient=True):
            sys.exit(code)
    summary = summarise(own, here)
    rows.append(rounds.of_split(summary, here, number))
    # Only figures can show a collapse: a round that isn't evaluated goes by.
    if own.pipeline.evaluates and number < section.rounds:
      stopped = rounds.collapsed(rows[-1], section)
      if stopped:
        break
  summary["rounds"] = len(rows)
  summary["seconds"] = rounds.seconds(run_dir, len(rows))
  evaluated = [row for row in rows if "avg_at_k" in row]
  best = rounds.best(evaluated)["round"]
  write_json(run_dir.rounds, {"rounds": rows, "best": best, "stopped": stopped})
  write_json(run_dir.summary, summary)
  print(table(summary))
  print(rounds.table_of_split(rows, stopped))
  print(f"written: {run_dir.summary}, {run_dir.rounds}")
  print(look_at_it(run_dir))


def _round(
  experiment: Experiment, run_dir: RunDir, number: int, flags
) -> list[str]:
  """Returns the command of a round after the first."""
  from trd_jax.pipeline import rounds

  # The round's own workdir is named instead, after the overrides.
  shared = [a for a in flags.config_argv if not a.startswith("--workdir=")]
  return [
    *(sys.executable, "-m", "trd_jax.pipeline", *shared),
    *rounds.overrides(experiment, run_dir.round(number - 1), number),
    f"--workdir={run_dir.round(number).root}",
  ]


def _command(
  module: str, own: list[str], experiment: Experiment, flags
) -> list[str]:
  """Returns the command of a stage, with the interpreter that is its own."""
  # Engine and trainer need other versions of the same libraries, so each stage
  # has the interpreter that its config names.
  python = experiment.python.of(module) or sys.executable
  return [python, "-m", f"trd_jax.{module}", *flags.config_argv, *own]


def _start(module: str, own: list[str], experiment: Experiment, flags) -> int:
  """Runs one stage to its end and returns its exit code."""
  command = _command(module, own, experiment, flags)
  return supervise.run(command, patient=module == "train")


def _preflight(steps, experiment: Experiment, run_dir: RunDir, flags) -> None:
  """Starts the stages that generate, to check their prompts where known.

  Random models are made first: without them there is nothing to check. What
  one stage is refused for doesn't keep the others from being looked at.
  """
  # What a stage's prompts or weights are made by: without it there is nothing
  # to look at yet.
  after = {"refine": "rollout", "evaluate/trained": "merge"}
  checked, failed, waiting = [], {}, []
  for account, module, own in steps:
    if account in ("train", "merge") or is_done(run_dir, account):
      continue
    if account in after and run_dir.complete(after[account]) is None:
      waiting.append(f"{account} (needs {after[account]})")
      continue
    print(f"[preflight] {account}", flush=True)
    if code := _start(module, own, experiment, flags):
      failed[account] = code
      # Every stage after it needs the models that it makes.
      if account == "convert":
        break
    elif account != "convert":
      checked.append(account)
  if failed:
    print(
      f"trd-jax pipeline: the preflight of {', '.join(failed)} failed; mend"
      " what it says above and give the same command again",
      file=sys.stderr,
    )
    sys.exit(next(iter(failed.values())))
  print(
    f"preflight only: {', '.join(checked) or 'nothing was left to be'} checked"
    + (f", not yet {', '.join(waiting)}" if waiting else "")
    + "; nothing was generated",
    flush=True,
  )


def commands(experiment: Experiment) -> Iterator[tuple[str, str, list[str]]]:
  """Yields the stages of an experiment: (account, module, its own flags)."""
  models = [experiment.student.path]
  if experiment.regime == "opd":
    models.append(experiment.teacher.path)
  if any(path.startswith(_RANDOM) for path in models):
    yield "convert", "convert", []
  if not _only_trains(experiment.pipeline):
    yield "evaluate/base", "evaluate", ["--model=base"]
  for stage in experiment.stages:
    yield stage, stage, []
  if experiment.pipeline.evaluates:
    yield "evaluate/trained", "evaluate", ["--model=trained"]


def is_done(run_dir: RunDir, account: str) -> bool:
  """Returns whether a stage has nothing left to do.

  Raises:
    UserError: a shard of it is damaged, or see `RunDir.done`.
  """
  if run_dir.complete(account) is None:
    return False
  run_dir.check_bytes(account)
  return True


def summarise(experiment: Experiment, run_dir: RunDir) -> dict[str, Any]:
  """Sums up what the run found: figures by benchmark, trajectories, seconds.

  Returns:
    `benchmarks`: by name (none where the student isn't evaluated) `base`,
    `trained` and `paired_difference`, each with `avg_at_k`, `pass_at_k`, `k`,
    `n` and 95% intervals over questions, `data`, the files that the questions
    were read from, and `thinking`, whether the prompts let a response think;
    `trajectories`, `training`, `merge`: what the stages said of themselves;
    `seconds`: wall-clock by stage, over all the processes that worked on it,
    those that were stopped apart; `alarms`, those that fired.
  """
  from trd_jax import __version__
  from trd_jax.experiment import alarms
  from trd_jax.experiment.metric_log import seconds_by_stage
  from trd_jax.grading import estimators, scores

  base = run_dir.done("evaluate/base") or {}
  trained = run_dir.done("evaluate/trained") or {}
  section = experiment.evaluate
  figures = {}
  # Of a split round that isn't evaluated there are no figures.
  for name in section.benchmarks if experiment.pipeline.evaluates else ():
    # The two may come from different days: another grader or mode in between,
    # and the difference would not be the training's.
    scores.check_alike(name, base[name], trained[name])
    pair = estimators.compare(base[name]["verdicts"], trained[name]["verdicts"])
    for side, row in (("base", base[name]), ("trained", trained[name])):
      kept = (*scores.SHARES, "median_tokens", "graders", "buckets")
      kept += ("identical_to_base",)
      pair[side] |= {key: row[key] for key in kept if key in row}
    for key in ("data", "thinking"):
      pair[key] = trained[name].get(key)
    figures[name] = pair
  return {
    "version": __version__,
    "regime": experiment.regime,
    "method": experiment.method,
    "coordinates": experiment.coordinates._asdict(),
    "student": experiment.student.path,
    "teacher": experiment.teacher_model.path,
    "benchmarks": figures,
    "stages": {s: run_dir.done(s) for s in experiment.stages},
    "seconds": seconds_by_stage(run_dir.timings),
    "alarms": [fired._asdict() for fired in alarms.of_run(run_dir)],
  }


def look_at_it(run_dir: RunDir) -> str:
  """Returns the commands that show what happened, to be copied."""
  workdir = shlex.quote(f"--workdir={run_dir.root}")
  return (
    "\nlook at it:"
    f"\n  python -m trd_jax.analyze {workdir}    figures, tables and a report"
    f"\n  python -m trd_jax.show {workdir}       problems, y_o and y_r"
  )


def table(summary: dict[str, Any]) -> str:
  """Writes the summary as a person reads it."""
  from trd_jax.experiment import alarms
  from trd_jax.grading import scores

  head = ("benchmark", "", "base", "trained", "difference (paired)")
  rows: list[tuple[str, ...]] = [head]
  for name, pair in summary["benchmarks"].items():
    k, n = pair["base"]["k"], pair["base"]["n"]
    for title, metric in ((f"Avg@{k}", "avg_at_k"), (f"Pass@{k}", "pass_at_k")):
      cells = [
        scores.cell(pair[side], metric)
        for side in ("base", "trained", "paired_difference")
      ]
      rows.append((f"{name} (n={n})", title, *cells))
  lines = [
    "",
    f"{summary['method']}, {summary['regime']}: {summary['student']} taught by"
    f" {summary['teacher']}; percent, 95% intervals over questions;"
    f" {scores.describe_modes(summary['benchmarks'])}",
    "",
  ]
  lines.append(tables.columns(rows))
  trained = {n: pair["trained"] for n, pair in summary["benchmarks"].items()}
  for line in (scores.describe_identical(trained), scores.served_base(trained)):
    if line is not None:
      lines += ["", line]
  if summary["student"].startswith(_RANDOM):
    lines += [
      "",
      "The student is randomly initialised: an accuracy of 0 is what it should"
      " have, and what the run shows is the path.",
    ]
  # A summary of an earlier version has none.
  fired = [alarms.Fired(**one) for one in summary.get("alarms", ())]
  if fired:
    lines += ["", *(f"{one.stage}: {one.line}" for one in fired)]
  seconds = summary["seconds"]
  total = sum(seconds.values())
  lines += ["", "where the time went"]
  spans = []
  for stage, spent in [*seconds.items(), ("all", total)]:
    share = f"{100 * spent / total:4.0f}%" if total else ""
    spans.append((f"{stage:<16}", f"{spent:8.1f} s {share}"))
  lines.append(tables.columns(spans))
  return "\n".join([*lines, ""])
