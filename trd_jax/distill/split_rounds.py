"""Where a round's updates stand in the one training of all split rounds.

Updates are numbered over all rounds. A round starts with the adapter, Adam's
moments and the number of the last update of the one before.
"""

import dataclasses

from trd_jax.data.problems import parts, store
from trd_jax.distill.checkpoint import Checkpoints
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.run_dir import RunDir


@dataclasses.dataclass(frozen=True)
class Place:
  """The updates of a round among those of the whole training.

  Attributes:
    first: number of the round's first update: how many there were before.
    total: updates of all rounds, as far as can be told: the schedule's length.
    round: its number; None where rounds aren't split.
    before: the checkpoints of the round before; None where there is none.
  """

  first: int
  total: int
  round: int | None = None
  before: Checkpoints | None = None

  def summary(self) -> dict[str, int]:
    """Returns what `done.json` says of the place, nothing without rounds."""
    if self.round is None:
      return {}
    return {
      "round": self.round,
      "first_update": self.first,
      "schedule": self.total,
    }


def place(experiment: Experiment, run_dir: RunDir, num_updates: int) -> Place:
  """Finds where a round's updates begin, and how many all rounds will take.

  Of the rounds to come only the problems are known. They are taken to lose as
  many trajectories as those so far (to `train.subset`, say): with u updates on
  the b batches of problems up to this round and r batches after it there are
  u + ceil(r u / b) in all. That is the number of batches where nothing falls
  out, and the exact number in the last round, so that the cosine always comes
  to its end.

  Args:
    experiment: which round it is.
    run_dir: of that round.
    num_updates: of the round, on the trajectories that are left.

  Raises:
    UserError: the round before hasn't been trained to its end, or see
      `parts.cuts`.
  """
  pipeline = experiment.pipeline
  if pipeline.parts == 1:
    return Place(0, num_updates)
  first, before = 0, None
  if pipeline.round > 1:
    former = run_dir.round_before(pipeline.round)
    done = former.done("train")
    if done is None:
      raise UserError(
        f"{former.stage('train')}: round {pipeline.round - 1} isn't trained,"
        f" and round {pipeline.round} goes on from it; give the command of the"
        " whole run, trd_jax.pipeline with its --workdir"
      )
    first = done["first_update"] + done["updates"]
    before = Checkpoints(former.checkpoints, experiment.train.keep_checkpoints)
  bounds = parts.cuts(experiment, len(run_dir.keys(store.STAGE)))
  begun, all_batches = (
    parts.num_updates(experiment, bounds[number])
    for number in (pipeline.round, -1)
  )
  so_far = first + num_updates
  ahead = -(-(all_batches - begun) * so_far // begun)
  return Place(first, so_far + ahead, pipeline.round, before)
