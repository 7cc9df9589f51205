"""Which keys of a config decide what a stage leaves on disk.

Each key is declared with its scopes (`schema.Scope`). What a sweep's points may
share, what may still be changed in a workdir and what tells two configs apart
all follow from `of`.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from trd_jax.experiment import methods
from trd_jax.experiment.experiment import KEYS, LAB_BENCHMARKS
from trd_jax.experiment.files import paths


class Stage(NamedTuple):
  """What a stage's artifacts are made of.

  Attributes:
    scope: of the keys that the stage reads itself; None where it reads none.
    after: the stages whose artifacts it reads, and so their keys, too.
  """

  scope: str | None
  after: tuple[str, ...] = ()


# Of what is made at random, by values: see `_reads_besides`.
_RANDOM = Stage("models")
# By the folder of a stage, in the pipeline's order. (A cache of the teacher's
# hidden states isn't here: it is named after its content.)
STAGES = {
  "problems": Stage("problems"),
  "models": _RANDOM,
  "convert": _RANDOM,
  "evaluate/base": Stage("evaluate"),
  "rollout": Stage("rollout", ("problems",)),
  "refine": Stage("refine", ("rollout",)),
  "train": Stage("train", ("refine",)),
  "merge": Stage(None, ("train",)),
  "evaluate/trained": Stage(None, ("merge", "evaluate/base")),
}
_ALL = frozenset(stage.scope for stage in STAGES.values() if stage.scope)
# What says which questions a benchmark has, as keys of the section evaluate.
_OF_A_BENCHMARK = ("benchmarks", "root", "livecodebench", "unchecked")
_OF_A_RANDOM_MODEL = ("path", "tokenizer", "chat_template")
# Keys of earlier versions that decide nothing any more: the workdirs that name
# them stay whose they are.
_DROPPED = frozenset({"evaluate.bootstrap"})


def of(name: str) -> frozenset[str]:
  """Returns the scopes of a key.

  A name that is no key, as another version's, has those of its section: what
  the section's other keys decide may depend on it, too. One of no section that
  we know may decide anything.
  """
  if name in KEYS:
    return frozenset(KEYS[name].scopes)
  if name in _DROPPED:
    return frozenset({"runtime"})
  section = name.partition(".")[0] + "."
  beside = [key for key in KEYS.values() if key.name.startswith(section)]
  scopes = {scope for key in beside for scope in key.scopes}
  return frozenset(scopes - {"runtime"} or scopes or _ALL)


def is_runtime(name: str) -> bool:
  """Tells whether a key decides no artifact, only how a run is carried out."""
  return of(name) == {"runtime"}


def identity(values: Mapping[str, Any], stage: str) -> dict[str, str]:
  """Returns the keys that decide a stage's artifacts, with values as JSON.

  Args:
    values: every key's value by its dotted name (`experiment.flat`).
    stage: a name of `STAGES`.
  """
  # A stage's artifacts are made of those before it: their keys decide, too.
  own = set(_scopes(stage))
  besides = {n for s in with_before(stage) for n in _reads_besides(values, s)}
  # Compared as what they amount to, so that a preset and the keys that spell
  # it out share their artifacts.
  values = {**values, **_coordinates(values, stage), **_part(values)}
  return {
    name: json.dumps(value)
    for name, value in values.items()
    if (name in besides or not own.isdisjoint(of(name)))
    and not _is_unread(values, name)
  }


def with_before(stage: str) -> Iterator[str]:
  """Yields a stage and those whose artifacts it is made of."""
  yield stage
  for before in STAGES[stage].after:
    yield from with_before(before)


def _scopes(stage: str) -> Iterator[str]:
  """Yields the scopes of the keys that a stage and those before it read."""
  for name in with_before(stage):
    if scope := STAGES[name].scope:
      yield scope


def _reads_besides(values: Mapping[str, Any], stage: str) -> Iterator[str]:
  """Yields keys that a stage reads, beside its scope's, for these values."""
  if stage == "problems" and values["data.decontaminate"] != "none":
    # The problems that a benchmark asks are left out: which ones is said here.
    yield from (f"evaluate.{name}" for name in _OF_A_BENCHMARK)
    if not LAB_BENCHMARKS.keys().isdisjoint(values["evaluate.benchmarks"]):
      yield "evaluate.seed"  # it makes their questions
  if stage == "rollout" and _is_split(values):
    # Parts are cut at whole updates (`data.problems.parts`).
    yield "train.batch_size"
    if values["rollout.samples"] > 1:
      yield "trajectory"  # which may be one a problem
  if STAGES[stage] is _RANDOM:
    yield "seed"
    for side in ("student", "teacher"):
      if str(values[f"{side}.path"]).startswith("random:"):
        yield from (f"{side}.{name}" for name in _OF_A_RANDOM_MODEL)


def _coordinates(values: Mapping[str, Any], stage: str) -> dict[str, Any]:
  """Returns a method's keys as what they amount to: None means the method's.

  So two configs that name one point in two ways have the same artifacts.
  """
  chosen = methods.resolve(values)
  # The second stage writes the same y_r, whether or not they are trained on.
  trajectory = chosen.trajectory
  if stage == "refine":
    trajectory = "teacher" if trajectory == "teacher" else "y_r"
  return {
    "method": chosen._asdict(),
    "trajectory": trajectory,
    "divergence": chosen.divergence,
    "teacher_context": chosen.teacher_context,
    "loss.token_weights": chosen.token_weights,
    "loss.clip": chosen.clip,
  }


def _part(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the keys of a round's part of the problems as what they amount to.

  Rounds over all problems don't depend on their number: each has a workdir.
  """
  if _is_split(values):
    return {}
  return {"pipeline.rounds": 1, "pipeline.split": False, "pipeline.round": 1}


def _is_split(values: Mapping[str, Any]) -> bool:
  return values["pipeline.split"] and values["pipeline.rounds"] > 1


def _is_unread(values: Mapping[str, Any], name: str) -> bool:
  """Tells whether a key is the teacher's and not read (see `Experiment`)."""
  return (
    name.startswith("teacher.")
    and values["regime"] == "opsd"
    and name != "teacher.thinking"
  )


def differences(
  there: Mapping[str, Any], here: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
  """Returns each key that tells two configs apart, with both values as JSON.

  Runtime keys are left out. A key that one config doesn't have,
  because a version of this program in between introduced or dropped it, counts
  as being at its default. A path is the same with its `~` or without.
  """
  different = {}
  for name in sorted(there.keys() | here.keys()):
    default = KEYS[name].default if name in KEYS else None
    values = [flat.get(name, default) for flat in (there, here)]
    was, now = map(json.dumps, values)
    if name in KEYS and KEYS[name].is_path:
      values = [_expanded(value) for value in values]
    if was == now or values[0] == values[1]:
      continue
    if not is_runtime(name):
      different[name] = was, now
  return different


def _expanded(value: Any) -> Any:
  """Expands the `~` of a path; what is no path stays as it is."""
  try:
    return paths.expanded(value) if isinstance(value, str) else value
  except ValueError:
    return value


def obstacles(
  there: Mapping[str, Any], here: Mapping[str, Any], made: Collection[str]
) -> dict[str, list[str]]:
  """Returns the keys that may not differ, with the stages in the way.

  Args:
    there: values by dotted name under which artifacts were made.
    here: values under which more are to be made.
    made: the stages of which there are artifacts.
  """
  defaults = {name: key.default for name, key in KEYS.items()}
  sides = [defaults | dict(values) for values in (there, here)]
  in_the_way: dict[str, list[str]] = {}
  for stage in [stage for stage in STAGES if stage in made]:
    was, now = (identity(values, stage) for values in sides)
    for name in differences(there, here):
      # Read by one of them alone it tells them apart, too.
      if was.get(name) != now.get(name):
        in_the_way.setdefault(name, []).append(stage)
  return in_the_way
