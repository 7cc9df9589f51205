"""From trajectories on disk to what training packs: contexts and filters."""

import collections
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
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
from trd_jax.data.leakage import mentions_reference
from trd_jax.data.problems import store
from trd_jax.data.prompts import PromptSet, of_run, privileged_text, reference
from trd_jax.distill import processes
from trd_jax.distill.packing.layout import Sample
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import BY_Y_R, Experiment
from trd_jax.experiment.methods import TRAJECTORIES
from trd_jax.experiment.records import (
  NO_GOLD,
  Problem,
  Rejected,
  Trajectory,
  content_key,
)
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
      many `trajectories` they are. A side is None where it reads plain text.
    notes: lines about these modes.
  """

  samples: list[Sample]
  rejected: list[Rejected]
  dropped: Mapping[str, int]
  thinking: list[dict[str, int | None]]
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

  def less_than_a_batch(self, train: Train, num_updates: int) -> str | None:
    """Notes that all trajectories together are less than one batch.

    Args:
      train: batch_size.
      num_updates: how many `batches` there are.

    Returns:
      A line; None where they are a batch or more.
    """
    count = len(self.samples)
    if count >= train.batch_size:
      return None
    updates = "1 update" if num_updates == 1 else f"{num_updates:,} updates"
    return (
      f"note: there are {count:,} trajectories to train on, less than one"
      f" batch (train.batch_size={train.batch_size:,}): it is {updates}; lower"
      " train.batch_size, or give it more problems"
    )


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

  The student's context is the initial prompt. The teacher's is what
  `methods.Coordinates` says; a refinement prompt is the one that y_r was made
  from, id for id. Both are in the thinking mode in which the trajectory was
  written, or plain text (`train.context`, see `contexts`). Trajectories fall
  out, and are counted, that `train.subset` leaves out, that are empty, that a
  budget ended (`train.truncated`), that speak of what the student can't see
  (`train.leaks`), whose problem has no reference where the teacher needs
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
  rollouts, refined = _finished_rows(experiment, run_dir)
  prompts = of_run(experiment, run_dir)
  problems = {p.problem_id: p for p in store.load(experiment, run_dir)}
  data = of_rows(
    experiment,
    run_dir,
    prompts,
    problems,
    rollouts,
    refined,
    student,
    teacher,
  )
  if not data.samples:
    told = ", ".join(f"{n} {why}" for why, n in data.dropped.items())
    stage = experiment.trajectory_stage
    where = run_dir.stage(stage) if stage else run_dir.problems_dir
    raise UserError(
      f"{where}: no trajectory is left to train on ({told or 'none there'});"
      " change train.subset, train.truncated or the bounds"
    )
  return data


def of_rows(
  experiment: Experiment,
  run_dir: RunDir,
  prompts: PromptSet,
  problems: Mapping[str, Problem],
  rollouts: list[Trajectory],
  refined: list[Trajectory],
  student: Chat,
  teacher: Chat,
) -> TrainingSet:
  """Builds both sides' contexts of some trajectories, as `build` does of all.

  Args:
    experiment: see `build`.
    run_dir: that the rows are of.
    prompts: the wording of its prompts.
    problems: by their id; of a reference as trajectory those that count.
    rollouts: those of `refined` among them.
    refined: the rows of the refine stage.
    student: see `build`.
    teacher: see `build`.

  Returns:
    The set, which may be empty.

  Raises:
    UserError: a stored prompt or draft doesn't fit the config or the rest of
      the directory, or a thinking key asks for a mode that a template hasn't.
  """
  stage = experiment.trajectory_stage
  if stage is None:
    candidates = _references(problems.values(), rollouts, refined, student)
  else:
    candidates = _pairs(experiment, rollouts, refined)
  notes: list[str] = []
  if (
    experiment.context_of_teacher is None
    and TRAJECTORIES[experiment.trains_on].writer == "teacher"
    and not student.same_ids(teacher)
  ):
    candidates = _in_ids_of(student, candidates)
    notes.append(
      "the teacher's tokenizer has other ids: what it wrote is made into"
      " tokens of the student's"
    )
  # Where the trajectories are, for messages.
  where = run_dir.stage(stage) if stage else run_dir.problems_dir
  samples: list[Sample] = []
  rejected: list[Rejected] = []
  dropped: collections.Counter[str] = collections.Counter()
  counts: collections.Counter[Modes] = collections.Counter()
  # Modes are settled once for each recorded one, not once a row: to ask a
  # template renders it, and there may be 40,000 rows.
  modes_of: dict[bool | None, Modes] = {}
  for trajectory, rollout, repaired in candidates:
    problem = problems.get(trajectory.problem_id)
    if problem is None:
      raise UserError(
        f"{where}: trajectory {trajectory.key} answers problem"
        f" {trajectory.problem_id}, which is not in {run_dir.problems_dir};"
        " start in a new --workdir"
      )
    # From the cheap to the dear: rendering contexts is what takes the time.
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
        prompts,
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
      source = stage or store.STAGE
      rejected.append(Rejected(trajectory.problem_id, source, "train", reason))
  if stage is None:
    notes += _answers_alone(problems.values())
  thinking, told_of_modes = _told(experiment, student, teacher, counts)
  notes += told_of_modes
  return TrainingSet(samples, rejected, dict(dropped), thinking, notes)


@dataclasses.dataclass(frozen=True)
class _Response:
  """What is trained on of a trajectory, whoever wrote it.

  Attributes:
    key: content key of the trajectory, as it was written.
    problem_id: of the problem that it answers.
    prompt_ids: the prompt that it was written after; empty for a reference.
    response_ids: its tokens, the end of turn included where it ended itself.
    finish_reason: 'stop', or why it ended otherwise.
    truncated: whether a budget ended it.
    thinking: whether it was written with thinking on.
    text: the same as text.
  """

  key: str
  problem_id: str
  prompt_ids: list[int]
  response_ids: list[int]
  finish_reason: str
  truncated: bool
  thinking: bool | None
  text: str

  @classmethod
  def of(cls, row: Trajectory) -> "_Response":
    """Returns that part of a stage's row."""
    return cls(*(getattr(row, f.name) for f in dataclasses.fields(cls)))


# A trajectory to train on, the y_o of its problem (None where the run has
# none), and the verdict of the y_r made of that.
_Candidate = tuple[_Response, Trajectory | None, bool | None]


def _finished_rows(
  experiment: Experiment, run_dir: RunDir
) -> tuple[list[Trajectory], list[Trajectory]]:
  """Reads the rollouts and the refined trajectories that training looks at.

  Returns:
    Each, empty where it isn't looked at.

  Raises:
    UserError: one of these stages hasn't finished.
  """
  # What else is read than the trajectories themselves: the student's verdict
  # for a subset and for the metrics, y_r's for a subset that goes by it.
  stage = experiment.trajectory_stage
  needs = {stage} - {None}
  if experiment.needs_rollouts:
    needs.add("rollout")
  if experiment.train.subset in BY_Y_R:
    needs.add("refine")
  for name in sorted(filter(None, needs)):
    if run_dir.done(name) is None:
      raise UserError(
        f"{run_dir.stage(name)}: this stage has not finished here; run"
        f" trd_jax.{name} with the same --config and --workdir first"
      )
  rollouts, refined = (
    run_dir.read(name, Trajectory) if name in needs else []
    for name in ("rollout", "refine")
  )
  return rollouts, refined


def _told(
  experiment: Experiment,
  student: Chat,
  teacher: Chat,
  counts: Mapping[Modes, int],
) -> tuple[list[dict[str, int | None]], list[str]]:
  """Tells the thinking modes of a training set.

  Args:
    experiment: its `train.context`, and keys that modes contradict.
    student: the student's tokenizer and template.
    teacher: the teacher's.
    counts: trajectories by mode.

  Returns:
    For the record, an entry a mode; and for a person, lines.
  """
  thinking: list[dict[str, int | None]] = []
  notes: list[str] = []
  form = experiment.train.context
  for modes, count in counts.items():
    in_chat = form == "chat"
    thinking.append(
      {
        "written": modes.written,
        "student": student.thinks(modes.student) if in_chat else None,
        "teacher": teacher.thinks(modes.teacher) if in_chat else None,
        "trajectories": count,
      }
    )
    notes.append(f"{count:,} {describe_modes(student, teacher, modes, form)}")
    warnings = mode_warnings(experiment, student, teacher, modes)
    notes += [f"note: {warning}" for warning in warnings]
  return thinking, notes


def _pairs(
  experiment: Experiment,
  rollouts: list[Trajectory],
  refined: list[Trajectory],
) -> Iterator[_Candidate]:
  """Yields the trajectories of a stage, each with its y_o."""
  if experiment.trains_on == "y_r":
    by_key = {t.key: t for t in rollouts}
    for row in refined:
      draft = by_key.get(row.draft_key or "")
      if draft is None:
        raise UserError(
          f"refined trajectory {row.key}: its draft {row.draft_key} is not"
          " among the rollouts; run trd_jax.rollout and trd_jax.refine in a new"
          " --workdir"
        )
      yield _Response.of(row), draft, row.correct
  elif experiment.trains_on == "teacher":
    by_problem = _first_of_each(rollouts)
    for row in refined:
      yield _Response.of(row), by_problem.get(row.problem_id), row.correct
  else:
    verdict = {t.draft_key: t.correct for t in refined}
    for row in rollouts:
      yield _Response.of(row), row, verdict.get(row.key)


def _first_of_each(rollouts: list[Trajectory]) -> dict[str, Trajectory]:
  """Returns the first rollout of each problem."""
  return {t.problem_id: t for t in reversed(rollouts)}


def _references(
  problems: Iterable[Problem],
  rollouts: list[Trajectory],
  refined: list[Trajectory],
  student: Chat,
) -> Iterator[_Candidate]:
  """Yields the reference of each problem as a trajectory; none where none is.

  It was never sampled, so this is the one place where a response is made into
  tokens: the student's, with the end of its turn.
  """
  by_problem = _first_of_each(rollouts)
  verdict = {t.draft_key: t.correct for t in refined}
  for problem in problems:
    text = reference(problem)
    if text is None:
      ids = []
    else:
      ids = [*student.encode(text.strip()), student.stop_ids[0]]
    response = _Response(
      key=content_key("y_star", problem.problem_id, ids),
      problem_id=problem.problem_id,
      prompt_ids=[],
      response_ids=ids,
      finish_reason="stop",
      truncated=False,
      thinking=False,
      text=text or "",
    )
    rollout = by_problem.get(problem.problem_id)
    repaired = verdict.get(rollout.key) if rollout is not None else None
    yield response, rollout, repaired


def _answers_alone(problems: Collection[Problem]) -> Iterator[str]:
  """Yields a note where references are answers without a solution."""
  bare = sum(problem.solution is None for problem in problems)
  if bare:
    yield (
      f"note: {bare:,} of {len(problems):,} references are answers alone,"
      " without a solution"
    )


def _in_ids_of(
  student: Chat, candidates: Iterable[_Candidate]
) -> Iterator[_Candidate]:
  """Yields trajectories of a teacher of other ids as the student's tokens.

  For cross-entropy alone, which asks no teacher about its tokens. The end of
  the turn follows where the teacher ended it, and nowhere else.
  """
  for response, rollout, repaired in candidates:
    end = [student.stop_ids[0]] if response.finish_reason == "stop" else []
    ids = [*student.encode(response.text), *end]
    yield dataclasses.replace(response, response_ids=ids), rollout, repaired


def _left_out(
  experiment: Experiment,
  trajectory: _Response,
  rollout: Trajectory | None,
  repaired: bool | None,
) -> str | None:
  """Returns why a trajectory is not trained on; None: it may be."""
  subset = experiment.train.subset
  verdict = rollout.correct if rollout is not None else None
  inside = {
    "all": True,
    "fail": verdict is False,
    "succ": verdict is True,
    "fail_to_succ": verdict is False and repaired is True,
    "refined_succ": repaired is True,
  }
  if not inside[subset]:
    if rollout is not None and rollout.reason == NO_GOLD:
      return f"without an answer for train.subset={subset}"
    return f"outside train.subset={subset}"
  # A stop id alone says nothing.
  if len(trajectory.response_ids) <= (trajectory.finish_reason == "stop"):
    return "empty"
  if trajectory.truncated and experiment.train.truncated == "drop":
    return "truncated"
  if (
    experiment.train.leaks == "drop"
    and TRAJECTORIES[experiment.trains_on].writer == "teacher"
    and mentions_reference(trajectory.text) is not None
  ):
    return "speaks of a draft or a reference"
  return None


def _lacks_reference(experiment: Experiment, problem: Problem) -> bool:
  # A refinement prompt was stored with what it shows.
  shown = experiment.context_of_teacher == "x_reference"
  return shown and privileged_text(problem) is None


def _sample(
  experiment: Experiment,
  prompts: PromptSet,
  chats: tuple[Chat, Chat],
  modes: Modes,
  problem: Problem,
  trajectory: _Response,
  rollout: Trajectory | None,
) -> Sample:
  """Returns a trajectory with the two contexts that score it.

  Raises:
    UserError: the stored prompt of the rollout is another than this program's.
  """
  student, teacher = chats
  # A template that was exchanged after the rollouts would score them after a
  # prompt that nobody answered. It shows here, as ids are compared.
  if rollout is not None:
    answered = student_context(prompts, student, problem, rollout.thinking)
    if answered != list(rollout.prompt_ids):
      raise UserError(
        f"rollout {rollout.key}: its stored prompt is not the one that this"
        " program makes (another template, thinking mode or version?); run"
        " trd_jax.rollout again in a new --workdir"
      )
  form = experiment.train.context
  student_ids = student_context(prompts, student, problem, modes.student, form)
  # Without a teacher nothing is read in its place: the student's own will do.
  teacher_ids = student_ids
  context = experiment.context_of_teacher
  if context is not None:
    # A stored prompt is in the mode that its row says.
    stored = context == "refine"
    teacher_ids = teacher_context(
      prompts,
      teacher,
      problem,
      context,
      trajectory.thinking if stored else modes.teacher,
      list(trajectory.prompt_ids),
      form,
    )
  response_ids = list(trajectory.response_ids)
  # The end of a turn belongs to the template: plain text has no turns.
  if form == "plain" and trajectory.finish_reason == "stop":
    response_ids.pop()
  return Sample(
    key=trajectory.key,
    student_prompt=np.asarray(student_ids, np.int32),
    teacher_prompt=np.asarray(teacher_ids, np.int32),
    response=np.asarray(response_ids, np.int32),
    correct=rollout.correct if rollout is not None else None,
    truncated=trajectory.truncated,
    problem_id=trajectory.problem_id,
  )


def _too_long(experiment: Experiment, sample: Sample) -> str | None:
  train, response = experiment.train, len(sample.response)
  sides = [("student", sample.student_prompt, train.max_student_tokens)]
  if experiment.context_of_teacher is not None:
    sides.append(("teacher", sample.teacher_prompt, train.max_teacher_tokens))
  for side, prompt, bound in sides:
    if len(prompt) + response > bound:
      return f"over train.max_{side}_tokens={bound}"
  return None
