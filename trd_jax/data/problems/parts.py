"""The problems of split rounds: one seeded order, cut into a part a round.

    order of all problems   ├── round 1 ──┼── round 2 ──┼── round 3 ─┤
    updates of batch_size   │ 1 │ 2 │ 3 │ │ 4 │ 5 │ 6 │ │ 7 │ 8 │ (9)│

Cuts stand between whole updates, so that all rounds together take as many
updates as one run over all problems; only the last one may be partial.
"""

import itertools
import math
from collections.abc import Collection, Sequence

from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.files.json_files import read_json, write_json
from trd_jax.experiment.records import content_key
from trd_jax.experiment.run_dir import RunDir


def num_updates(experiment: Experiment, num_problems: int) -> int:
  """Returns how many batches the trajectories of problems fill, at most."""
  samples = num_problems * experiment.trajectories_per_problem
  return -(-samples // experiment.train.batch_size)


def cuts(experiment: Experiment, num_problems: int) -> list[int]:
  """Returns where each round's part begins in the order, and the last's end.

  Parts differ by one update, or by the fewest updates whose trajectories are of
  whole problems.

  Args:
    experiment: how many rounds, trajectories a problem and a batch there are.
    num_problems: problems of the whole run.

  Raises:
    UserError: there are more rounds than parts that hold an update.
  """
  rounds, batch_size = experiment.pipeline.parts, experiment.train.batch_size
  samples = experiment.trajectories_per_problem
  unit = batch_size // math.gcd(batch_size, samples)
  units = -(-num_problems // unit)
  if rounds > units:
    raise UserError(
      f"pipeline.rounds={rounds}: {num_problems:,} problems make"
      f" {num_updates(experiment, num_problems):,} updates of"
      f" train.batch_size={batch_size}, which can be split over at most"
      f" {units:,} rounds; set pipeline.rounds={max(units, 1)}, or a smaller"
      " train.batch_size"
    )
  return [
    min(unit * (units * number // rounds), num_problems)
    for number in range(rounds + 1)
  ]


def all_of(experiment: Experiment, ids: Collection[str]) -> list[list[str]]:
  """Returns the ids of each round's problems: each id once over all rounds.

  Args:
    experiment: as `cuts`; its `data.seed` is the order's.
    ids: of all problems that are kept, in any order.

  Raises:
    UserError: see `cuts`.
  """
  seed = experiment.data.seed
  # Drawn by id, as `data.limit` chooses, but by numbers of its own: the order
  # depends neither on that of the source nor on who was chosen.
  order = sorted(ids, key=lambda one: content_key(seed, "part", one))
  bounds = cuts(experiment, len(order))
  return [order[a:b] for a, b in itertools.pairwise(bounds)]


def of_round(experiment: Experiment, ids: Sequence[str]) -> set[str]:
  """Returns the ids of the problems of `pipeline.round`.

  Raises:
    UserError: see `cuts`.
  """
  return set(all_of(experiment, ids)[experiment.pipeline.round - 1])


def record(experiment: Experiment, run_dir: RunDir, ids: Sequence[str]) -> None:
  """Writes into a run's directory which problems each round takes.

  Raises:
    UserError: a run whose later rounds have begun was cut in another way, as
      another version of this program might; or see `cuts`.
  """
  parts = {
    "seed": experiment.data.seed,
    "rounds": experiment.pipeline.rounds,
    "parts": all_of(experiment, ids),
  }
  path = run_dir.parts
  begun = path.exists() and run_dir.round(2).config.exists()
  if begun and read_json(path) != parts:
    raise UserError(
      f"{path}: the rounds there were cut in another way than this program"
      " cuts them; go back to the version and the config that began the run,"
      " or name another --workdir"
    )
  write_json(path, parts)
