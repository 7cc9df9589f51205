"""Takes over from another run what this one would make in the same way.

    python -m trd_jax.pipeline --config=… --workdir=NEW --from=OLD

A stage's artifacts are the same where all keys agree that they depend on
(`scopes.identity`). So a run with another learning rate starts from the
rollouts and refined trajectories of the first, whose files are linked.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trd_jax.data import prompts
from trd_jax.data.problems import store
from trd_jax.data.templates import DOMAINS
from trd_jax.experiment import experiment, scopes
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.files import ownership
from trd_jax.experiment.run_dir import RunDir

# In the pipeline's order. What merge and the trained student's evaluation make
# takes minutes, and depends on how a run is carried out, too.
_STAGES = ("problems", "evaluate/base", "rollout", "refine", "train")
_MOST_KEYS = 3
_BEFORE = "taken over before"
# How versions of words begin that no prompt set has.
_PUBLISHED = ("question", "card", "evalplus-", "lcb_runner-")


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
  # What keys don't show: a file that they name may hold something else now.
  changed: dict[str, str] = {}
  for stage in [stage for stage in _STAGES if stage in wanted]:
    obstacle = _obstacle(stage, here, run_dir, donor)
    if obstacle is None:
      former = [s for s in scopes.with_before(stage) if s in changed]
      obstacle = _content(stage, chosen, donor)
      if obstacle is None and former:
        obstacle = f"{former[-1]} isn't either"  # the first of them
      if obstacle is not None:
        changed[stage] = obstacle
    yield Choice(stage, obstacle)


def _obstacle(
  stage: str, here: dict, run_dir: RunDir, donor: RunDir
) -> str | None:
  """Returns why a stage is not taken over, or None."""
  if run_dir.complete(stage) is not None:
    return _BEFORE if _is_linked(stage, run_dir, donor) else "done here"
  if not donor.finished(stage):
    return "not finished there"
  if lost := donor.lost(stage):
    return lost
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


def _is_linked(stage: str, run_dir: RunDir, donor: RunDir) -> bool:
  """Returns whether a stage's record here is the other run's, or its copy."""
  records = [where.stage(stage) / "done.json" for where in (run_dir, donor)]
  try:
    mine, other = (path.stat() for path in records)
  except OSError:
    return False
  # A link is the file itself; a copy keeps its time.
  same_time = mine.st_mtime_ns == other.st_mtime_ns
  return same_time and records[0].read_bytes() == records[1].read_bytes()


def _content(stage: str, chosen: Experiment, donor: RunDir) -> str | None:
  """Returns what has changed in the files that a stage was made of, or None.

  Raises:
    UserError: the prompt set can't be read.
  """
  if stage == "problems":
    clause = store.changed_file(chosen.data, donor.record(stage))
    return clause and f"data.root={chosen.data.root}: {clause} since"
  wording = prompts.load(chosen.prompts.set)
  if stage in ("rollout", "refine"):
    others = prompts.other_wordings(donor, stage, wording)
  elif stage == "evaluate/base":
    figures = donor.record(stage).values()
    asked = {f.get("prompt_version") for f in figures if isinstance(f, dict)}
    own = {wording.initial_version(domain) for domain in DOMAINS}
    others = {
      version
      for version in asked - own
      if version and not version.startswith(_PUBLISHED)
    }
  else:
    return None
  if not others:
    return None
  return (
    f"its prompts are of another wording ({', '.join(sorted(others))}) than"
    f" prompts.set={chosen.prompts.set} has now ({wording.version})"
  )


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
  if line := of_further_rounds(chosen):
    print(line, flush=True)


def of_further_rounds(chosen: Experiment) -> str:
  """Says that nothing is taken over in further rounds; '' if there are none."""
  section = chosen.pipeline
  if section.rounds == 1 or section.round > 1:
    return ""
  return f"--from is for round 1; those up to {section.rounds} are made here"


def described(
  obstacle: str | None, source: Path, *, would: bool = False
) -> str:
  """Returns what becomes of a stage, or would, for a person."""
  if obstacle == _BEFORE:
    return f"taken over from {source} before"
  if obstacle is None:
    return f"{'would be ' * would}taken over from {source}"
  return f"not taken over from {source}: {obstacle}"
