"""Which trajectories are scored, and in which contexts.

Problems are chosen by a digest of their ids, so that whoever asks for as many
gets the same ones, and evenly over what their trajectories turned out to be.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from trd_jax.analyze.runs import Run
from trd_jax.experiment import methods
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.records import (
  Problem,
  Rejected,
  Trajectory,
  content_key,
)
from trd_jax.experiment.run_dir import RunDir

if TYPE_CHECKING:
  from trd_jax.data.chat import Chat
  from trd_jax.distill.packing.layout import Sample

# What of a trajectory isn't read here, and is large.
_UNREAD = ("teacher_top_ids", "teacher_top_logprobs", "teacher_top_mass")
_COLUMNS = tuple(
  field.name
  for field in dataclasses.fields(Trajectory)
  if field.name not in _UNREAD
)


class Chosen(NamedTuple):
  """The problems whose trajectories are scored.

  Attributes:
    problems: by id, in the order in which they were chosen.
    rollouts: of each at most one.
    refined: the y_r of these rollouts, or the teacher's own answers.
    kinds: of `methods.TRAJECTORIES`, those that there are.
  """

  problems: dict[str, Problem]
  rollouts: list[Trajectory]
  refined: list[Trajectory]
  kinds: list[str]


class Unit(NamedTuple):
  """A problem with the keys of its trajectories, and what they turned out.

  Attributes:
    problem_id: the problem's.
    rollout: key of a y_o, None without one.
    refined: key of what the teacher wrote, None without it.
    verdicts: of those two that the run has.
  """

  problem_id: str
  rollout: str | None
  refined: str | None
  verdicts: tuple[bool | None, ...]


def choose(experiment: Experiment, run_dir: RunDir, number: int) -> Chosen:
  """Chooses problems and reads their trajectories.

  Args:
    experiment: the run's.
    run_dir: its directory.
    number: how many; all are chosen where there are fewer.

  Raises:
    UserError: there are none yet, or a shard is damaged.
  """
  from trd_jax.data.problems import store

  rollouts = run_dir.done("rollout") is not None
  if experiment.needs_rollouts and not rollouts:
    raise UserError(
      f"{run_dir.stage('rollout')}: there is no finished rollout to score; run"
      " trd_jax.rollout with the same --config and --workdir first"
    )
  writes = experiment.teacher_writes
  refined = writes is not None and run_dir.done("refine") is not None
  if writes is not None and not refined:
    print(
      f"analyze: the refine stage isn't finished, so that {writes} is not"
      " scored",
      flush=True,
    )
  run = Run(run_dir.root)
  units = _units(run, rollouts, writes if refined else None)
  problems = {p.problem_id: p for p in store.load(experiment, run_dir)}
  if not rollouts and not refined:
    units = [Unit(name, None, None, ()) for name in problems]
  picked = spread(units, number)
  for unit in picked:
    if unit.problem_id not in problems:
      raise UserError(
        f"{run_dir.problems_dir}: problem {unit.problem_id}, which a trajectory"
        " answers, is not there; start in a new --workdir"
      )
  kinds = ["y_star"]
  if refined:
    kinds.insert(0, str(writes))
  if rollouts:
    kinds.insert(0, "y_o")
  rows = {
    stage: [
      Trajectory(**row)
      for row in run.rows(stage, _COLUMNS, frozenset(filter(None, keys)))
    ]
    for stage, keys in (
      ("rollout", [unit.rollout for unit in picked]),
      ("refine", [unit.refined for unit in picked]),
    )
  }
  return Chosen(
    {u.problem_id: problems[u.problem_id] for u in picked},
    rows["rollout"],
    rows["refine"],
    kinds,
  )


def _units(run: Run, rollouts: bool, writes: str | None) -> list[Unit]:
  """Returns a unit a problem that has a trajectory.

  Args:
    run: the workdir.
    rollouts: whether it has finished rollouts.
    writes: what its finished refine stage holds, `y_r` or `teacher`, or None.
  """
  columns = ("key", "problem_id", "correct", "draft_key")

  def small(stage: str) -> list[dict[str, Any]]:
    return run.table(stage, columns).to_pylist()

  written = small("refine") if writes else []
  if not rollouts:
    return [
      Unit(row["problem_id"], None, row["key"], (row["correct"],))
      for row in written
    ]
  joined_by, found_by = "problem_id", "problem_id"
  if writes == "y_r":
    joined_by, found_by = "draft_key", "key"
  refined = {row[joined_by]: row for row in written}
  by_problem: dict[str, list[Unit]] = collections.defaultdict(list)
  for row in small("rollout"):
    other = refined.get(row[found_by])
    verdicts = [row["correct"]]
    if writes:
      verdicts.append(other["correct"] if other else None)
    unit = Unit(
      row["problem_id"],
      row["key"],
      other["key"] if other else None,
      tuple(verdicts),
    )
    by_problem[unit.problem_id].append(unit)
  return [min(units, key=_order_of_drafts) for units in by_problem.values()]


def _order_of_drafts(unit: Unit) -> tuple[bool, str]:
  # Of several drafts one that was refined, if any, and of these not the first:
  # samples may differ by their number.
  return unit.refined is None, content_key("scores", unit.rollout)


def spread(units: Iterable[Unit], number: int) -> list[Unit]:
  """Chooses units evenly over their verdicts, in an order of its own.

  They are dealt out cell by cell of verdicts, so that a rare outcome is seen as
  often as a common one as long as it lasts. The first of a larger choice are
  those of a smaller one. Units without a verdict come when the others are used
  up.
  """
  cells: dict[tuple, list[Unit]] = collections.defaultdict(list)
  for unit in units:
    cells[unit.verdicts].append(unit)
  places = [
    (None in verdicts, place, str(verdicts), unit)
    for verdicts, cell in cells.items()
    for place, unit in enumerate(
      sorted(cell, key=lambda unit: content_key("scores", unit.problem_id))
    )
  ]
  return [unit for *_, unit in sorted(places)[:number]]


def along(experiment: Experiment, kind: str) -> Experiment:
  """Returns the experiment that scores trajectories of a kind.

  It leaves none out for what became of it, and has a teacher also where the
  run's loss reads none.
  """
  own = experiment.coordinates
  context = own.teacher_context if own.trajectory == kind else None
  if context is None:
    context = methods.default_context(kind, experiment.regime)
    if kind == "y_star":
      context = "x_reference"
  reads = methods.DIVERGENCES[own.divergence].reads_teacher
  return dataclasses.replace(
    experiment,
    trajectory=kind,
    teacher_context=context,
    divergence=own.divergence if reads else "forward_kl",
    train=dataclasses.replace(
      experiment.train,
      subset="all",
      truncated="keep",
      leaks="keep",
      teacher="recompute",
    ),
  )


class InContext(NamedTuple):
  """A trajectory with the contexts that score it.

  Attributes:
    sample: as training packs it.
    kind: of `methods.TRAJECTORIES`.
    context: of `methods.TEACHER_CONTEXTS`.
    key: content key of all of that.
  """

  sample: "Sample"
  kind: str
  context: str
  key: str


def in_contexts(
  experiment: Experiment,
  run_dir: RunDir,
  chosen: Chosen,
  chats: "tuple[Chat, Chat]",
  stage: str,
) -> tuple[list[InContext], list[Rejected]]:
  """Returns the trajectories with their contexts, and what was set aside.

  Problem by problem, in the order of their choice.

  Args:
    experiment: the run's.
    run_dir: its directory.
    chosen: see `choose`.
    chats: tokenizer and template of the student and of the teacher.
    stage: that sets trajectories aside.

  Raises:
    UserError: see `prompts.of_run` and `training_set.of_rows`.
  """
  from trd_jax.data import prompts
  from trd_jax.distill import training_set

  made: list[InContext] = []
  rejected: list[Rejected] = []
  wording = prompts.of_run(experiment, run_dir)
  for kind in chosen.kinds:
    e = along(experiment, kind)
    problems: Mapping[str, Problem] = chosen.problems
    if kind == "y_star":  # of a problem without one nothing is amiss
      problems = {n: p for n, p in problems.items() if prompts.reference(p)}
    data = training_set.of_rows(
      e, run_dir, wording, problems, chosen.rollouts, chosen.refined, *chats
    )
    rejected += [dataclasses.replace(row, stage=stage) for row in data.rejected]
    context = str(e.context_of_teacher)
    for sample in data.samples:
      ids = (sample.student_prompt, sample.teacher_prompt, sample.response)
      key = content_key(kind, context, sample.key, *(x.tolist() for x in ids))
      made.append(InContext(sample, kind, context, key))
  place = {name: at for at, name in enumerate(chosen.problems)}
  made.sort(key=lambda one: place[one.sample.problem_id])
  return made, rejected
