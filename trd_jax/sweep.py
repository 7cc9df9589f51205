"""A config at the points of a sweep, each a pipeline in a folder of its own.

    python -m trd_jax.sweep --config=configs/demo.py \\
        --sweep=configs/sweeps/methods.py --workdir=runs/methods

What points have in common is made once: a point that rolls out, refines or
evaluates its base under the same keys as an earlier one takes that stage's
rows over from it. A point that is done is skipped, so the same command goes on
where an earlier one was stopped.
"""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trd_jax.experiment import cli, experiment, scopes, sweep_points, tables
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.files.json_files import read_json, write_json
from trd_jax.experiment.processes import supervise
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.sweep_points import Point
from trd_jax.pipeline import sweep_plot

FLAGS = (
  cli.Flag("sweep", None, "file of the sweep's points, required", is_path=True),
  cli.Flag("point", None, "run this one alone, by name or number from 0"),
  cli.Flag(
    "dry_run", False, "print what each point does and shares", looks_only=True
  ),
  cli.Flag(
    "slurm",
    False,
    "print the sbatch commands of array jobs (GPUS=8 a node)",
    looks_only=True,
  ),
)

# Stages that points may share, in the pipeline's order: y_r is made of its y_o.
_SHARED = ("rollout", "refine", "evaluate/base")
_AGAIN = "remove it and run that point's pipeline again"
_SIDES = ("base", "trained", "paired_difference")


class Plan(NamedTuple):
  """What a point does.

  Attributes:
    point: the point.
    experiment: the config at it.
    donors: for each stage that it need not do, the number of the point that
      does it.
    level: how many points have to be done before, one after the other.
  """

  point: Point
  experiment: Experiment
  donors: Mapping[str, int]
  level: int


def run(base: Experiment, run_dir: RunDir, flags) -> None:
  """Runs the points that aren't done and sums them up.

  Raises:
    UserError: the sweep file or one of its points can't be used, or a point's
      folder belongs to another sweep with a point of its name.
    SystemExit: a point failed; with its exit code.
  """
  if flags.sweep is None:
    raise UserError(
      "--sweep=FILE.py is missing: name the file of the sweep's points"
    )
  if flags.slurm and flags.point is not None:
    raise UserError(
      f"--point={flags.point}: --slurm submits all points; leave one flag out"
    )
  plans = plan(base, sweep_points.load(flags.sweep), flags.sweep)
  print(describe(plans), flush=True)
  again = ["-m", "trd_jax.sweep", *flags.config_argv, f"--sweep={flags.sweep}"]
  if flags.slurm:
    print(slurm(plans, [sys.executable, *again]))
    return
  chosen = range(len(plans))
  if flags.point is not None:
    chosen = [_number(flags.point, plans)]
  for number in chosen:  # what one is refused for, before any starts
    one = plans[number]
    _folder(run_dir, one.point).check(experiment.to_json(one.experiment))
  if flags.dry_run:
    for number in chosen:
      print(shlex.join(_command(plans[number], run_dir, flags.config_argv)))
    return
  for number in chosen:
    one = plans[number]
    print(f"[{number + 1}/{len(plans)}] {one.point.name}", flush=True)
    where = _folder(run_dir, one.point)
    # Claimed before rows are taken over: a folder of another config must not
    # get them.
    is_new = where.claim(experiment.to_json(one.experiment))
    for stage, donor in one.donors.items():
      # Just before it runs: a donor that stands earlier in the list has its
      # rows by now.
      _take_over(where, _whose(run_dir, plans[donor]), stage)
    command = _command(one, run_dir, flags.config_argv)
    code = supervise.run(command, patient=True)
    # Refused before it began: an empty folder with this config would hinder the
    # mended one.
    if code == 2 and is_new:
      where.abandon()
    if code:
      print(
        f"trd-jax sweep: point {one.point.name} ended with exit code {code};"
        " mend what it says above and give the same command again",
        file=sys.stderr,
      )
      sys.exit(code)
  rows = collect(plans, run_dir)
  write_json(run_dir.sweep, rows)
  print(sweep_plot.table(rows))
  if rows:
    sweep_plot.plot(rows, run_dir.sweep_plot)
    print(f"written: {run_dir.sweep}, {run_dir.sweep_plot}")


def plan(base: Experiment, points: Sequence[Point], source: str) -> list[Plan]:
  """Plans what each point does, and what it takes over from which other.

  Raises:
    UserError: a point sets a key that does not exist, or to a value that it
      can't have.
  """
  flat = experiment.flat(base)
  plans: list[Plan] = []
  makers: dict[tuple[str, str], int] = {}
  for number, one in enumerate(points):
    where = f"{source}, point {one.name}"
    chosen = experiment.from_config({**flat, **one.values}, where)
    stages = {"evaluate/base", *chosen.stages}
    donors = {}
    values = experiment.flat(chosen)
    for stage in [stage for stage in _SHARED if stage in stages]:
      # Two points share a stage where all keys agree that its rows depend on;
      # the first of them makes it.
      made_by = json.dumps(scopes.identity(values, stage), sort_keys=True)
      donor = makers.setdefault((stage, made_by), number)
      if donor != number:
        donors[stage] = donor
    level = max(
      (plans[donor].level + 1 for donor in donors.values()), default=0
    )
    plans.append(Plan(one, chosen, donors, level))
  return plans


def _folder(run_dir: RunDir, one: Point) -> RunDir:
  points = run_dir.stage("points")
  # Begun when the sweep set fewer keys: the folder keeps its shorter name.
  if one.alone and (points / one.alone).is_dir():
    return RunDir(points / one.alone)
  return RunDir(points / one.name)


def _whose(run_dir: RunDir, donor: Plan) -> RunDir:
  """Checks that a point's folder is its config's, and returns it.

  Raises:
    UserError: what is there was made by another sweep.
  """
  where = _folder(run_dir, donor.point)
  where.check(experiment.to_json(donor.experiment))
  return where


def _take_over(where: RunDir, donor: RunDir, stage: str) -> None:
  """Gives a point the rows of a stage that another point has made."""
  # The problems come with their y_o: read anew they could be others.
  stages = ("problems", stage) if stage == "rollout" else (stage,)
  for name in stages:
    if where.adopt(name, donor):
      print(f"{name}: taken over from {donor.root.name}", flush=True)


def _command(
  one: Plan, run_dir: RunDir, config_argv: Sequence[str]
) -> list[str]:
  """Returns the pipeline command of a point."""
  shared = [a for a in config_argv if not a.startswith("--workdir=")]
  train = one.experiment.train
  if train.teacher == "hidden_cache" and train.cache_dir is None:
    # One for all points: what the teacher said depends on none of their keys.
    cache = run_dir.teacher_cache
    shared.append(f"--config.train.cache_dir={cache}")
  return [
    *(sys.executable, "-m", "trd_jax.pipeline"),
    *shared,
    *(f"--config.{key}={_text(v)}" for key, v in one.point.values.items()),
    f"--workdir={_folder(run_dir, one.point).root}",
  ]


def _text(value: Any) -> str:
  return ",".join(value) if isinstance(value, tuple | list) else str(value)


def _number(name: str, plans: Sequence[Plan]) -> int:
  """Finds the point that --point names, by name or number."""
  names = [one.point.name for one in plans]
  if name in names:
    return names.index(name)
  if name.isdigit() and int(name) < len(plans):
    return int(name)
  raise UserError(
    f"--point={name}: there is none; give 0 to {len(plans) - 1}, or one of"
    f" {', '.join(names)}"
  )


def describe(plans: Sequence[Plan]) -> str:
  """Writes a line a point: its name, and what it takes over from which."""
  lines = [f"{len(plans)} points"]
  rows = []
  for number, one in enumerate(plans):
    shared = ", ".join(
      f"{stage} of {donor}" for stage, donor in one.donors.items()
    )
    rows.append(
      (f"{number:>4}", one.point.name, f"{shared and 'takes over '}{shared}")
    )
  return "\n".join([*lines, tables.columns(rows)])


# Of an array job: time to end in order, and another try where it was preempted.
_ENDS_IN_ORDER = "--signal=B:TERM@300 --requeue --open-mode=append"


def slurm(plans: Sequence[Plan], command: Sequence[str]) -> str:
  """Writes shell commands that submit the sweep: an array job for each level.

  A level waits for the one before, whose points make what it takes over. The
  shell's variable GPUS says how many a node has, where they aren't 8.
  """
  lines = []
  for level in range(1 + max(one.level for one in plans)):
    numbers = [n for n, one in enumerate(plans) if one.level == level]
    wait = f" --dependency=afterok:$level_{level - 1}" if level else ""
    array = ",".join(map(str, numbers))
    # In the shell's place: it is whom Slurm tells of the time's end, before it
    # kills the job, and it would not tell its children.
    inner = f"exec {shlex.join(command)} --point=$SLURM_ARRAY_TASK_ID"
    lines.append(
      f"level_{level}=$(sbatch --parsable --array={array}{wait}"
      f" --job-name=trd-sweep --gpus-per-node=${{GPUS:-8}} {_ENDS_IN_ORDER}"
      f" --wrap={shlex.quote(inner)})"
    )
  return "\n".join(lines)


def collect(plans: Sequence[Plan], run_dir: RunDir) -> list[dict[str, Any]]:
  """Collects the points that are done: what they set and what they found.

  Returns:
    A row a point and benchmark: `point`, `values`, `round`, the best of its
    `rounds`, `benchmark`, the mode `thinking` in which it was sampled (None
    where an earlier version doesn't say), and of base, trained and their paired
    difference `k`, `n`, `avg_at_k` and `pass_at_k` with 95% intervals.
  """
  rows = []
  for one in plans:
    where = _folder(run_dir, one.point)
    found = {"best": 1, "rounds": [1]}
    section = one.experiment.pipeline
    # Split rounds are one training, whose summary is that of its end.
    if section.rounds > 1 and section.parts == 1:
      if not where.rounds.exists():
        continue  # its later rounds are still to come
      found = read_json(where.rounds, _AGAIN)
      if not (
        type(found.get("best")) is int and isinstance(found.get("rounds"), list)
      ):
        raise UserError(f"{where.rounds} says of no round; {_AGAIN}")
    best = where.round(found["best"])
    if not best.summary.exists():
      continue
    about = {
      "point": one.point.name,
      "values": dict(one.point.values),
      "round": found["best"],
      "rounds": len(found["rounds"]),
    }
    summary = read_json(best.summary, _AGAIN)
    try:
      for name, pair in summary["benchmarks"].items():
        figures = {side: pair[side] for side in _SIDES}
        about |= {"benchmark": name, "thinking": pair.get("thinking")}
        rows.append({**about, **figures})
    except (LookupError, TypeError, AttributeError) as error:
      raise UserError(f"{best.summary} is no summary; {_AGAIN}") from error
  return rows


if __name__ == "__main__":
  cli.main(
    "sweep",
    run,
    "runs a config at the points of a sweep, sharing what they share",
    FLAGS,
    exclusive=False,
    examples=(
      "--config=configs/demo.py --sweep=configs/sweeps/methods.py"
      " --workdir=runs/methods",
    ),
  )
