"""The scoring pass: per-token numbers of some problems' trajectories.

Training averages over tokens, so that what it saw of a single one is gone. Here
some trajectories pass through its programs once more, and each token's numbers
are kept (`distill.token_scores`), for the student before training and for the
one that has been trained:

    y_o       under the context that the baseline methods read: x in OPD, x and
              y* in OPSD
    y_r       under the refinement prompt
    y_star    under x and y*
    teacher   as y_o

What the run trains along is scored under the context that it trains with,
whatever its keys say.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from trd_jax.analyze import chosen_trajectories
from trd_jax.analyze.chosen_trajectories import InContext
from trd_jax.experiment import methods
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.progress import Progress
from trd_jax.experiment.records import TokenScores, content_key
from trd_jax.experiment.run_dir import RunDir

if TYPE_CHECKING:
  from jax.sharding import Mesh

  from trd_jax.distill.model_pair import Pair
  from trd_jax.distill.packing.layout import Layout
  from trd_jax.distill.step import Tree
  from trd_jax.distill.token_scores import Scorer, Scores

STAGE = "analyze/scores"
STUDENTS = ("base", "trained")
TOP_K = 5
"""How many of each side's likeliest tokens are kept."""

_SHOWN = "analyze"  # before what is printed
# Half of a key: one half is of models and loss, one of the trajectory.
_HALF = 16
_REMEDY = (
  "lower train.pack_tokens, train.teacher_pack_tokens or loss.chunk_tokens, or"
  " split the weights (mesh.fsdp=-1): these are runtime keys, and the same"
  " command goes on from the rows that are there"
)


class Scored(NamedTuple):
  """What a scoring pass has found and made.

  Attributes:
    problems: whose trajectories were chosen.
    students: whose numbers there are, of `STUDENTS`.
    rows: that there are of these.
    new: of them, made by this call.
    rejected: how many trajectories were set aside, by reason.
  """

  problems: int
  students: tuple[str, ...]
  rows: int
  new: int
  rejected: Mapping[str, int]


def score(
  experiment: Experiment,
  run_dir: RunDir,
  number: int,
  students: Sequence[str] = STUDENTS,
) -> Scored:
  """Scores the trajectories of some problems, those that aren't scored yet.

  Problems are chosen by a digest of their ids, evenly over what y_o and y_r
  turned out to be, so that those of a smaller number are among those of a
  larger one. The rows are `TokenScores`. What is on disk already is not
  computed again; a row of other weights, or of another loss, is removed.

  Args:
    experiment: the run's.
    run_dir: its directory, with finished rollouts where the method needs them.
    number: of problems; all are scored where there are fewer.
    students: of `STUDENTS`. The trained one is passed over, with a line, as
      long as training isn't finished.

  Raises:
    UserError: another process is at it; there is nothing to score; a model is
      missing, or isn't the one that the run's stages read; the trained adapter
      is gone; a shard is damaged; or the devices can't take it.
  """
  from trd_jax.model import backend

  if number < 1:
    raise UserError(f"--score={number}: name a number of problems, 64 say")
  backend.reserve_memory()
  backend.start()
  with run_dir.lock(STAGE), backend.enough_memory(_REMEDY):
    return _score(experiment, run_dir, number, students)


def _score(
  experiment: Experiment,
  run_dir: RunDir,
  number: int,
  students: Sequence[str],
) -> Scored:
  """Scores as `score` does, which holds the lock: the pass's chapters."""
  from trd_jax.distill import mesh_and_packs, model_pair
  from trd_jax.generation import chat_model

  # 1. Which trajectories: some problems', each in the contexts of both sides.
  chosen = chosen_trajectories.choose(experiment, run_dir, number)
  pair = model_pair.find(
    chosen_trajectories.along(experiment, chosen.kinds[0]),
    functools.partial(chat_model.open_model, run_dir=run_dir),
    _SHOWN,
  )
  samples, rejected = chosen_trajectories.in_contexts(
    experiment, run_dir, chosen, pair.chats, STAGE
  )
  run_dir.write_rejected(STAGE, rejected)
  counts = collections.Counter(row.reason for row in rejected)
  for reason, count in counts.items():
    print(f"{_SHOWN}: set aside: {count:,} {reason}", flush=True)
  if not samples:
    raise UserError(
      f"{run_dir.stage(STAGE)}: no trajectory is left to score (set aside:"
      f" {', '.join(f'{n} {why}' for why, n in counts.items()) or 'none'});"
      " change the bounds, or score more problems"
    )

  # 2. Who scores them, and what of that is on disk.
  states = [
    state
    for name in students
    if (state := _state(experiment, run_dir, pair, name)) is not None
  ]
  wanted = {
    (state.name, at): state.key + one.key[:_HALF]
    for state in states
    for at, one in enumerate(samples)
  }
  there = _without_stale(run_dir, states) & set(wanted.values())
  missing = {at: key for at, key in wanted.items() if key not in there}
  found = Scored(
    len(chosen.problems),
    tuple(state.name for state in states),
    len(wanted),
    len(missing),
    dict(counts),
  )
  if missing:
    # 3. The mesh and the shapes of packs, as a training along them would have.
    mesh, layout, told = mesh_and_packs.choose(
      experiment, pair, [one.sample for one in samples], "model"
    )
    if told:
      print(f"{_SHOWN}: {told}", flush=True)

    # 4. Models and programs, and then rows, as packs come back.
    scoring = _Pass(experiment, pair, states, samples)
    scorer, adapters = scoring.prepare(mesh, layout, missing)
    with (
      run_dir.shard_writer(STAGE, TokenScores) as writer,
      Progress(
        len(wanted), "analyze scores", "rows", initial=len(there)
      ) as progress,
    ):
      for row in scoring.rows(scorer, adapters, missing):
        writer.add(row)
        progress.update(1)
  print(f"{_SHOWN}: {describe(found)}", flush=True)
  return found


def describe(found: Scored) -> str:
  """Returns one line about a scoring pass."""
  return (
    f"per-token scores of {found.problems:,} problems under"
    f" {' and '.join(found.students) or 'no student'}: {found.rows:,} rows,"
    f" {found.new:,} of them new"
  )


# -- who scores them ---------------------------------------------------------


class _State(NamedTuple):
  """A student at some point of its training.

  Attributes:
    name: of `STUDENTS`.
    revision: of its weights and its adapter.
    key: of it and of the loss: the first half of its rows' keys.
    adapter: makes its adapter, given a new one that is placed.
  """

  name: str
  revision: str
  key: str
  adapter: "Callable[[Tree], Tree]"


def _state(
  experiment: Experiment, run_dir: RunDir, pair: "Pair", name: str
) -> _State | None:
  """Returns one of `STUDENTS`; None where it isn't trained yet.

  Raises:
    UserError: its weights have changed since the run's stages read them, or
      what it began with is gone.
  """
  from trd_jax.generation import chat_model

  if name not in STUDENTS:
    raise ValueError(f"{name!r} is none of {STUDENTS}")
  trained = run_dir.done("train") if name == "trained" else None
  if name == "trained" and trained is None:
    print(
      f"{_SHOWN}: training isn't finished, so that the trained student scores"
      " nothing",
      flush=True,
    )
    return None
  before = experiment.pipeline.round
  if trained is not None:
    revision = _after(pair.student.revision, run_dir)
    adapter = functools.partial(_adapter_of, experiment, run_dir, pair)
  elif experiment.pipeline.parts > 1 and before > 1:
    # A part of one long training begins with what the part before has come to.
    former = run_dir.round_before(before)
    if former.done("train") is None:
      raise UserError(
        f"{former.stage('train')}: round {before - 1} isn't trained, and round"
        f" {before} goes on from it"
      )
    revision = _after(pair.student.revision, former)
    adapter = functools.partial(_adapter_of, experiment, former, pair)
  else:
    revision = chat_model.open_student(experiment, run_dir).revision
    adapter = _as_it_is
  key = content_key(*_identity(experiment, pair, revision))[:_HALF]
  return _State(name, revision, key, adapter)


def _as_it_is(lora: "Tree") -> "Tree":
  """Returns the adapter that `models.load` has made or read."""
  return lora


def _after(revision: str, run_dir: RunDir) -> str:
  """Returns the revision of a student after a directory's training.

  Not of the checkpoint's bytes: checkpoints may be removed when they were
  merged, and the rows of a student stay its rows.
  """
  record = run_dir.record("train")
  updates = record.get("first_update", 0) + record["updates"]
  return f"{revision}-{updates}-{content_key(record)[:12]}"


def _adapter_of(
  experiment: Experiment, run_dir: RunDir, pair: "Pair", lora: "Tree"
) -> "Tree":
  """Reads the adapter that a directory's training has come to.

  From its last checkpoint, or where that was removed from what merge wrote.

  Args:
    experiment: its adapter's shape.
    run_dir: with a finished training.
    pair: the student that it adapts.
    lora: an adapter of the same shapes, where it is to be placed.

  Raises:
    UserError: both are gone, or one is damaged.
  """
  from trd_jax.distill.checkpoint import Checkpoints
  from trd_jax.model.lora_config import LoraConfig
  from trd_jax.model.weights import adapters, hf

  record = run_dir.record("train")
  last = record.get("first_update", 0) + record["updates"]
  checkpoints = Checkpoints(
    run_dir.checkpoints, experiment.train.keep_checkpoints
  )
  if checkpoints.latest() == last:
    _, found = checkpoints.restore({"lora": lora}, partial=True)
    return found["lora"]
  if not run_dir.finished("merge") or not run_dir.adapter.is_dir():
    raise UserError(
      f"{run_dir.checkpoints}: the checkpoint after update {last}, the last, is"
      f" not there, nor is {run_dir.adapter}, which trd_jax.merge makes of it:"
      " put one of them back, or train again in a new --workdir"
    )
  config = hf.read_config(pair.student.folder)
  size = LoraConfig(**vars(experiment.lora))
  return adapters.begin_with(run_dir.adapter, config, size, lora)


def _identity(
  experiment: Experiment, pair: "Pair", revision: str
) -> Iterator[Any]:
  """Yields what decides every number of a student's rows.

  Args:
    experiment: its loss, and how models are computed.
    pair: the models.
    revision: of the student, with its adapter.
  """
  chosen, loss = experiment.coordinates, experiment.loss
  yield "token_scores", TokenScores.VERSION, TOP_K
  yield revision, pair.teacher.revision
  yield pair.student.dtype, pair.teacher.dtype, experiment.train.teacher_dtype
  yield experiment.lora.alpha, experiment.lora.rank
  terms = [methods.DIVERGENCES[chosen.divergence]]
  if chosen.token_weights is not None:
    terms.append(methods.TOKEN_WEIGHTS[chosen.token_weights])
  yield chosen.divergence, chosen.token_weights, chosen.clip, loss.temperature
  yield [term.read(loss) for term in terms]
  yield pair.chats[0].onset_ids()


# -- the pass ----------------------------------------------------------------


def _without_stale(run_dir: RunDir, states: Sequence[_State]) -> set[str]:
  """Removes rows of other weights or another loss; returns the others' keys.

  Such a row would stand beside the new one of its trajectory and student, and
  nobody could tell which of them counts.

  Raises:
    UserError: a shard is damaged.
  """
  table = run_dir.table(STAGE, TokenScores, ["key", "student"])
  keys = dict(zip(*(column.to_pylist() for column in table), strict=True))
  now = {state.name: state.key for state in states}
  kept = {
    key
    for key, student in keys.items()
    if student not in now or key.startswith(now[student])
  }
  if stale := len(keys) - len(kept):
    run_dir.keep(STAGE, TokenScores, kept)
    print(
      f"{_SHOWN}: {stale:,} scores of other weights or another loss were"
      " removed",
      flush=True,
    )
  return kept


class _Pass:
  """Makes the rows that are missing.

  Args:
    experiment: the run's.
    pair: the models on disk.
    states: the students.
    samples: the trajectories.
  """

  def __init__(
    self,
    experiment: Experiment,
    pair: "Pair",
    states: Sequence[_State],
    samples: Sequence[InContext],
  ):
    self._experiment, self._pair = experiment, pair
    self._states, self._samples = states, samples

  def prepare(
    self,
    mesh: "Mesh",
    layout: "Layout",
    missing: Mapping[tuple[str, int], str],
  ) -> "tuple[Scorer, dict[str, Tree]]":
    """Loads the models and compiles the programs.

    Args:
      mesh: where the models are placed.
      layout: the shapes of packs.
      missing: the keys of rows, by student and number of the trajectory.

    Returns:
      What scores trajectories, and by name the adapters of the students of
      which something is missing.

    Raises:
      UserError: a file is missing or damaged.
    """
    from trd_jax.distill import models
    from trd_jax.distill.loss.objective import Objective
    from trd_jax.distill.teacher.source import hidden_slot
    from trd_jax.distill.token_scores import Scorer, ScoreSetup

    pair, experiment = self._pair, self._experiment
    loaded = models.load(experiment, pair, "model", mesh)
    setup = ScoreSetup(
      teacher=loaded.teacher,
      mesh=mesh,
      attention=pair.attention.implementation,
      deterministic=experiment.train.deterministic,
      student=loaded.student,
      objective=Objective.of(experiment),
      onset_ids=pair.chats[0].onset_ids(),
      top_k=TOP_K,
    )
    slot = hidden_slot(pair.configs[1].hidden_size, pair.teacher.dtype)
    scorer = Scorer(setup, loaded, layout, slot)
    names = {name for name, _ in missing}
    adapters = {
      state.name: state.adapter(loaded.lora)
      for state in self._states
      if state.name in names
    }
    scorer.compile(loaded.lora)
    return scorer, adapters

  def rows(
    self,
    scorer: "Scorer",
    adapters: "Mapping[str, Tree]",
    missing: Mapping[tuple[str, int], str],
  ) -> Iterator[TokenScores]:
    """Yields the missing rows, as soon as they are there.

    Batches are of the same trajectories however many are missing: what stands
    beside a trajectory in its pack moves the order in which sums are rounded,
    and a pass that was killed is to end with the same bits.

    Args:
      scorer: as `prepare` returns it.
      adapters: likewise.
      missing: the keys of rows, by student and number of the trajectory.
    """
    size = self._experiment.train.batch_size
    for start in range(0, len(self._samples), size):
      part = self._samples[start : start + size]
      numbers = range(start, start + len(part))
      states = [
        state
        for state in self._states
        if any((state.name, number) in missing for number in numbers)
      ]
      if not states:
        continue
      for at, scores in scorer.score(
        [one.sample for one in part],
        [adapters[state.name] for state in states],
      ):
        for state, one in zip(states, scores, strict=True):
          key = missing.get((state.name, start + at))
          if key is not None:
            yield self._row(key, state, part[at], one)

  def _row(
    self, key: str, state: _State, one: InContext, scores: "Scores"
  ) -> TokenScores:
    """Returns a row of one trajectory under one student."""
    chosen, pair = self._experiment.coordinates, self._pair
    reads = methods.DIVERGENCES[chosen.divergence].reads_teacher
    # Names that the record checks.
    names: Any = (one.kind, state.name, one.context)
    return TokenScores(
      key,
      one.sample.key,
      one.sample.problem_id,
      *names,
      divergence_name=chosen.divergence if reads else "forward_kl",
      student_model=pair.student.name,
      student_revision=state.revision,
      teacher_model=pair.teacher.name,
      teacher_revision=pair.teacher.revision,
      response_ids=one.sample.response.tolist(),
      top_k=scores.student_top_ids.shape[1],
      **{name: x.ravel().tolist() for name, x in scores._asdict().items()},
    )
