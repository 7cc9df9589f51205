"""Takes over from another run what this one would make in the same way.

    python -m trd_jax.pipeline --config=… --workdir=NEW --from=OLD

A stage's artifacts are the same where all keys agree that they depend on
(`scopes.identity`). So a run with another learning rate starts from the
rollouts and refined trajectories of the first, whose files are linked.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trd_jax.experiment import experiment, scopes
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.files import ownership
from trd_jax.experiment.run_dir import RunDir

# In the pipeline's order. What merge and the trained student's evaluation make
# takes minutes, and depends on how a run is carried out, too.
_STAGES = ("problems", "evaluate/base", "rollout", "refine", "train")
_MOST_KEYS = 3


class Choice(NamedTuple):
  """Whether a stage is taken over.

  Attributes:
    stage: its name.
    obstacle: why it isn't; None where it is.
  """

  stage: str
  obstacle: str | None


def plan(
  chosen: Experiment, run_dir: RunDir, donor: RunDir
) -> Iterator[Choice]:
  """Yields for each stage of the run whether it can be taken over.

  Args:
    chosen: what is to be run.
    run_dir: where.
    donor: another run.

  Raises:
    UserError: the donor is no run's directory, or this very one.
  """
  if donor.root.resolve() == run_dir.root.resolve():
    raise UserError(
      f"--from={donor.root} is the workdir itself; name another run, or leave"
      " the flag out"
    )
  if not ownership.is_config(donor.config):
    raise UserError(
      f"--from={donor.root} is no run of trd-jax: it has no config.json; name"
      " the workdir of a run"
    )
  here = experiment.flat(chosen)
  wanted = {"problems", "evaluate/base", *chosen.stages}
  for stage in [stage for stage in _STAGES if stage in wanted]:
    yield Choice(stage, _obstacle(stage, here, run_dir, donor))


def _obstacle(
  stage: str, here: dict, run_dir: RunDir, donor: RunDir
) -> str | None:
  """Returns why a stage is not taken over, or None."""
  if run_dir.done(stage) is not None:
    return "done here"
  if not donor.finished(stage):
    return "not finished there"
  # The other run may be of a version with fewer keys. What it lacks was at its
  # default then.
  defaults = {name: key.default for name, key in experiment.KEYS.items()}
  there = defaults | donor.made_by(stage)
  was, now = (scopes.identity(values, stage) for values in (there, here))
  names = [n for n in sorted({*was, *now}) if was.get(n) != now.get(n)]
  # A preset's coordinates differ with each of its keys: one name will do.
  if len(names) > 1 and "method" in names:
    names.remove("method")
  if names:
    shown = [
      f"{n} is {was.get(n, 'not read')} there and {now.get(n, 'not read')} here"
      for n in names[:_MOST_KEYS]
    ]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more keys" if more else "")
  # Rows that this run has made itself are never mixed with another's.
  folder = run_dir.stage(stage)
  if folder.exists() and any(folder.iterdir()):
    return "begun here"
  return None


def take_over(chosen: Experiment, run_dir: RunDir, source: Path) -> None:
  """Takes over all stages that can be, and prints which, and why not others.

  Args:
    chosen: what is to be run; the workdir is claimed for it.
    run_dir: where.
    source: the other run's directory.

  Raises:
    UserError: as `plan`.
  """
  donor = RunDir(source)
  for stage, obstacle in plan(chosen, run_dir, donor):
    if obstacle is None and not run_dir.adopt(stage, donor):
      obstacle = "another process has begun it here, or removed it there"
    print(f"{stage}: {described(obstacle, source)}", flush=True)


def described(obstacle: str | None, source: Path) -> str:
  """Returns what becomes of a stage, for a person."""
  if obstacle is None:
    return f"taken over from {source}"
  return f"not taken over from {source}: {obstacle}"
