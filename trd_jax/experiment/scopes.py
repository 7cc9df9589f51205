"""Which keys of a config decide what a stage leaves on disk.

What a sweep's points may share and what may still be changed in a workdir both
follow from the one table here: a key that no artifact depends on is free.
"""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from trd_jax.experiment.experiment import KEYS, LABORATORY
from trd_jax.experiment.files import paths
from trd_jax.experiment.sections import Model

# Keys that say how a run is carried out, not what it computes: they may
# differ between the runs that share a workdir. (Rounding follows the devices
# and the packs, and so do the masks of the adapters' dropout.)
RUNTIME_KEYS = (
  "engine.",
  "metrics.",
  "pipeline.",
  "python.",
  "mesh.",
  "distributed.",
  "sandbox.unsafe",
  "sandbox.workers",
  "preflight_only",
  "train.attention",
  "train.deterministic",
  "train.log_every",
  "train.packing",
  "evaluate.buckets_from",
  "train.cache_dir",
)


class Scope(NamedTuple):
  """What a stage's artifacts are made of.

  Attributes:
    reads: keys that the stage reads itself, as the beginnings of their names.
    after: the stages whose artifacts it reads, and so their keys, too.
  """

  reads: tuple[str, ...]
  after: tuple[str, ...] = ()


# The teacher as it refines, in a mode that is the refinement's own.
_SPEAKS = tuple(
  f"teacher.{field.name}"
  for field in dataclasses.fields(Model)
  if field.name != "thinking"
)
_RANDOM = Scope(("seed",))  # and more, see `_reads`
# By the folder of a stage, in the pipeline's order. (A cache of the teacher's
# hidden states isn't here: it is named after its content.)
STAGES = {
  "problems": Scope(("data.", "domain")),
  "models": _RANDOM,
  "convert": _RANDOM,
  "evaluate/base": Scope(("student.", "evaluate.", "sandbox.", "seed")),
  "rollout": Scope(("student.", "rollout.", "sandbox.", "seed"), ("problems",)),
  "refine": Scope((*_SPEAKS, "regime", "refine."), ("rollout",)),
  "train": Scope(
    ("method", "teacher.", "train.", "loss.", "lora."), ("refine",)
  ),
  "merge": Scope((), ("train",)),
  "evaluate/trained": Scope((), ("merge", "evaluate/base")),
}
_EVERY = tuple(name for scope in STAGES.values() for name in scope.reads)
# What says which questions a benchmark has, as keys of the section evaluate.
_OF_A_BENCHMARK = ("benchmarks", "root", "livecodebench", "unchecked")
_OF_A_RANDOM_MODEL = ("path", "tokenizer", "chat_template")


def identity(values: Mapping[str, Any], stage: str) -> dict[str, str]:
  """Returns the keys that decide a stage's artifacts, with values as JSON.

  Args:
    values: every key's value by its dotted name (`experiment.flat`). A name
      that is no key, as another version's, and a key that is no stage's count
      as read by all.
    stage: a name of `STAGES`.
  """
  reads = tuple(_reads(values, stage))
  return {
    name: json.dumps(value)
    for name, value in values.items()
    if (name.startswith(reads) or not name.startswith(_EVERY))
    and not (name in KEYS and name.startswith(RUNTIME_KEYS))
    and not _is_unread(values, name)
  }


def _reads(values: Mapping[str, Any], stage: str) -> Iterator[str]:
  """The beginnings of the keys that a stage and those before it read."""
  scope = STAGES[stage]
  yield from scope.reads
  for before in scope.after:
    yield from _reads(values, before)
  if stage == "problems" and values["data.decontaminate"] != "none":
    yield from (f"evaluate.{name}" for name in _OF_A_BENCHMARK)
    if not LABORATORY.keys().isdisjoint(values["evaluate.benchmarks"]):
      yield "evaluate.seed"  # it makes their questions
  if scope is _RANDOM:
    for side in ("student", "teacher"):
      if str(values[f"{side}.path"]).startswith("random:"):
        yield from (f"{side}.{name}" for name in _OF_A_RANDOM_MODEL)


def _is_unread(values: Mapping[str, Any], name: str) -> bool:
  """Whether a key of the teacher is none of this run's (see `Experiment`)."""
  return (
    name.startswith("teacher.")
    and values["regime"] == "opsd"
    and name != "teacher.thinking"
  )


def differences(
  there: Mapping[str, Any], here: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
  """Returns each key that tells two configs apart, with both values as JSON.

  Keys of `RUNTIME_KEYS` are left out. A key that one config doesn't have,
  because a version of this program in between introduced or dropped it, counts
  as being at its default. A path is the same with its `~` or without.
  """
  found = {}
  for name in sorted(there.keys() | here.keys()):
    default = KEYS[name].default if name in KEYS else None
    values = [flat.get(name, default) for flat in (there, here)]
    was, now = map(json.dumps, values)
    if name in KEYS and KEYS[name].is_path:
      values = [_expanded(value) for value in values]
    if was == now or values[0] == values[1]:
      continue
    if not name.startswith(RUNTIME_KEYS):
      found[name] = was, now
  return found


def _expanded(value: Any) -> Any:
  """A path with its `~` expanded; whatever is none, as it is."""
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
  found: dict[str, list[str]] = {}
  for stage in [stage for stage in STAGES if stage in made]:
    was, now = (identity(values, stage) for values in sides)
    for name in differences(there, here):
      # Read by one of them alone it tells them apart, too.
      if was.get(name) != now.get(name):
        found.setdefault(name, []).append(stage)
  return found
