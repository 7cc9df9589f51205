"""From trajectories on disk to what training packs: contexts and filters."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from trd_jax.data.chat import Chat
from trd_jax.data.contexts import (
  Modes,
  describe_modes,
  mode_warnings,
  scoring_modes,
  student_context,
  teacher_context,
)
from trd_jax.data.problems import store
from trd_jax.data.prompts import reference
from trd_jax.distill import processes
from trd_jax.distill.packing.layout import Sample
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.records import Problem, Rejected, Trajectory
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Train


@dataclasses.dataclass(frozen=True)
class TrainingSet:
  """What is trained on, and what isn't.

  Attributes:
    samples: by ascending key of their trajectory.
    rejected: a row for each trajectory that fell out, with the reason.
    dropped: how many fell out, by reason.
    thinking: of those with the same modes a row: whether they were `written`
      with thinking on, and are scored so by `student` and `teacher`, and how
      many `trajectories` they are.
    notes: lines about these modes.
  """

  samples: list[Sample]
  rejected: list[Rejected]
  dropped: Mapping[str, int]
  thinking: list[dict[str, int]]
  notes: list[str]

  @property
  def truncated(self) -> int:
    """Returns how many that are trained on a budget has ended."""
    return sum(sample.truncated for sample in self.samples)

  def describe(self) -> Iterator[str]:
    """Yields lines for a person: how many, what fell out, thinking modes."""
    out = ", ".join(f"{n:,} {why}" for why, n in self.dropped.items())
    yield (
      f"{len(self.samples):,} trajectories, {self.truncated:,} of them"
      f" truncated{out and f'; left out: {out}'}"
    )
    yield from self.notes

  def batches(self, train: Train, seed: int) -> list[list[Sample]]:
    """Returns the trajectories of each update, in the order of updates.

    They are shuffled anew each epoch and cut into batches. The last batch is
    what is left; its loss is the mean over the trajectories it has.

    Args:
      train: batch_size, epochs, max_steps.
      seed: of the shuffling.
    """
    order = (
      grain.MapDataset.source(range(len(self.samples)))
      .shuffle(seed=seed)
      .repeat(train.epochs)
      .batch(train.batch_size, batch_fn=list)
    )
    num_steps = min(len(order), train.max_steps or len(order))
    numbers: list[Any] = [order[step] for step in range(num_steps)]
    return [[self.samples[i] for i in chosen] for chosen in numbers]


def read(
  experiment: Experiment, run_dir: RunDir, student: Chat, teacher: Chat
) -> TrainingSet:
  """Builds the set in each of the run's processes, and says what is in it.

  The first process writes down which trajectories fell out, and why.

  Args:
    experiment: see `build`, also for the rest.
    run_dir: holds problems and trajectories.
    student: the student's tokenizer and template.
    teacher: the teacher's.

  Raises:
    UserError: see `build`; or the processes find different trajectories.
  """
  data = build(experiment, run_dir, student, teacher)
  if processes.first():
    run_dir.write_rejected("train", data.rejected)
  processes.check_same(len(data.samples), "how many trajectories they find")
  for line in data.describe():
    print(f"train: {line}", flush=True)
  return data


def build(
  experiment: Experiment, run_dir: RunDir, student: Chat, teacher: Chat
) -> TrainingSet:
  """Builds both sides' contexts of every trajectory that is trained on.

  The student's context is the initial prompt. The teacher's is, for trd, the
  refinement prompt that y_r was made from, id for id; otherwise the initial
  (OPD) or the privileged prompt (OPSD). Both are in the thinking mode in which
  the trajectory was written (`contexts`). Trajectories fall out, and are
  counted, that `train.subset` leaves out, that are empty, that a budget ended
  (`train.truncated`), whose problem has no reference where the teacher needs
  one, or that exceed `train.max_student_tokens` or `train.max_teacher_tokens`
  with their prompt: none is ever cut.

  Args:
    experiment: method, regime, subset, bounds, overrides of thinking modes.
    run_dir: holds problems and trajectories.
    student: the student's tokenizer and template.
    teacher: the teacher's.

  Raises:
    UserError: the stage before hasn't finished, a stored prompt or draft
      doesn't fit the config or the rest of the directory, a thinking key asks
      for a mode that a template hasn't, or nothing is left to train on.
  """
  stage = experiment.trajectory_stage
  needs = {"rollout", stage}
  if experiment.train.subset == "fail_to_succ":
    needs.add("refine")
  for name in sorted(needs):
    if run_dir.done(name) is None:
      raise UserError(
        f"{run_dir.stage(name)}: this stage has not finished here; run"
        f" trd_jax.{name} with the same --config and --workdir first"
      )
  problems = {p.problem_id: p for p in store.load(experiment, run_dir)}
  rollouts = {t.key: t for t in run_dir.read("rollout", Trajectory)}
  refined = run_dir.read("refine", Trajectory) if "refine" in needs else []
  samples: list[Sample] = []
  rejected: list[Rejected] = []
  dropped: collections.Counter[str] = collections.Counter()
  counts: collections.Counter[Modes] = collections.Counter()
  modes_of: dict[bool | None, Modes] = {}
  for trajectory, rollout, repaired in _pairs(experiment, rollouts, refined):
    problem = problems.get(trajectory.problem_id)
    if problem is None:
      raise UserError(
        f"{run_dir.stage(stage)}: trajectory {trajectory.key} answers problem"
        f" {trajectory.problem_id}, which is not in {run_dir.problems_dir};"
        " start in a new --workdir"
      )
    sample, reason = None, _left_out(experiment, trajectory, rollout, repaired)
    if reason is None and _lacks_reference(experiment, problem):
      reason = "no reference for the teacher"
    if reason is None:
      recorded = trajectory.thinking
      if recorded not in modes_of:
        modes_of[recorded] = scoring_modes(
          experiment, student, teacher, recorded
        )
      sample = _sample(
        experiment,
        (student, teacher),
        modes_of[recorded],
        problem,
        trajectory,
        rollout,
      )
      reason = _too_long(experiment, sample)
    if sample is not None and reason is None:
      samples.append(sample)
      counts[modes_of[trajectory.thinking]] += 1
    elif reason is not None:
      dropped[reason] += 1
      rejected.append(Rejected(trajectory.problem_id, stage, "train", reason))
  if not samples:
    told = ", ".join(f"{n} {why}" for why, n in dropped.items()) or "none there"
    raise UserError(
      f"{run_dir.stage(stage)}: no trajectory is left to train on ({told});"
      " change train.subset, train.truncated or the bounds"
    )
  thinking: list[dict[str, int]] = []
  notes: list[str] = []
  for modes, count in counts.items():
    thinking.append(
      {
        "written": modes.written,
        "student": student.thinks(modes.student),
        "teacher": teacher.thinks(modes.teacher),
        "trajectories": count,
      }
    )
    notes.append(f"{count:,} {describe_modes(student, teacher, modes)}")
    warnings = mode_warnings(experiment, student, teacher, modes)
    notes += [f"note: {warning}" for warning in warnings]
  return TrainingSet(samples, rejected, dict(dropped), thinking, notes)


def _pairs(
  experiment: Experiment,
  rollouts: Mapping[str, Trajectory],
  refined: list[Trajectory],
) -> Iterator[tuple[Trajectory, Trajectory, bool | None]]:
  """Yields each trajectory to train on, its y_o, and its y_r's verdict."""
  if experiment.refines:
    for trajectory in refined:
      draft = rollouts.get(trajectory.draft_key or "")
      if draft is None:
        raise UserError(
          f"refined trajectory {trajectory.key}: its draft"
          f" {trajectory.draft_key} is not among the rollouts; run"
          " trd_jax.rollout and trd_jax.refine in a new --workdir"
        )
      yield trajectory, draft, trajectory.correct
  else:
    verdict = {t.draft_key: t.correct for t in refined}
    for trajectory in rollouts.values():
      yield trajectory, trajectory, verdict.get(trajectory.key)


def _left_out(
  experiment: Experiment,
  trajectory: Trajectory,
  rollout: Trajectory,
  repaired: bool | None,
) -> str | None:
  subset = experiment.train.subset
  inside = {
    "all": True,
    "fail": rollout.correct is False,
    "succ": rollout.correct is True,
    "fail_to_succ": rollout.correct is False and repaired is True,
  }
  if not inside[subset]:
    return f"outside train.subset={subset}"
  # A stop id alone says nothing.
  if len(trajectory.response_ids) <= (trajectory.finish_reason == "stop"):
    return "empty"
  if trajectory.truncated and experiment.train.truncated == "drop":
    return "truncated"
  return None


def _lacks_reference(experiment: Experiment, problem: Problem) -> bool:
  shown = experiment.teacher_context == "x_reference"
  return shown and reference(problem) is None


def _sample(
  experiment: Experiment,
  chats: tuple[Chat, Chat],
  modes: Modes,
  problem: Problem,
  trajectory: Trajectory,
  rollout: Trajectory,
) -> Sample:
  student, teacher = chats
  student_ids = student_context(student, problem, rollout.thinking)
  if student_ids != list(rollout.prompt_ids):
    raise UserError(
      f"rollout {rollout.key}: its stored prompt is not the one that this"
      " program makes (another template, thinking mode or version?); run"
      " trd_jax.rollout again in a new --workdir"
    )
  if modes.student != rollout.thinking:
    student_ids = student_context(student, problem, modes.student)
  teacher_ids = teacher_context(
    teacher,
    problem,
    experiment.method,
    experiment.regime,
    modes.teacher,
    list(trajectory.prompt_ids) if experiment.refines else None,
  )
  return Sample(
    key=trajectory.key,
    student_prompt=np.asarray(student_ids, np.int32),
    teacher_prompt=np.asarray(teacher_ids, np.int32),
    response=np.asarray(trajectory.response_ids, np.int32),
    correct=rollout.correct,
    truncated=trajectory.truncated,
  )


def _too_long(experiment: Experiment, sample: Sample) -> str | None:
  train, response = experiment.train, len(sample.response)
  for side, prompt, bound in (
    ("student", sample.student_prompt, train.max_student_tokens),
    ("teacher", sample.teacher_prompt, train.max_teacher_tokens),
  ):
    if len(prompt) + response > bound:
      return f"over train.max_{side}_tokens={bound}"
  return None
