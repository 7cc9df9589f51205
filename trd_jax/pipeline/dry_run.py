"""What a pipeline would run and how much it would write, before it does.

Nothing is fetched and no model is loaded: sizes come from the config, from
models and data that are on this machine, and else from what is known of the
public ones.
"""

import collections
import math
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from trd_jax.data.problems import questions
from trd_jax.experiment import printing, tables
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Engine, Generation, Model
from trd_jax.model.config import ModelConfig
from trd_jax.model.known import KNOWN_MODELS, SIZES
from trd_jax.model.weights import hub
from trd_jax.model.weights.model_folder import read_config
from trd_jax.pipeline.data_checks import num_problems

# Stages whose size goes by the number of problems.
_OF_PROBLEMS = ("rollout", "refine", "teacher_cache")
# The least share of the most that rows and hidden states can take: responses
# end before their budget, and rows are compressed.
_LEAST = 1 / 8
_REDUCED_BY = {
  "rollout": "data.limit, rollout.samples, rollout.max_response_tokens",
  "refine": "data.limit, refine.max_response_tokens, refine.teacher_top_k",
  "teacher_cache": "train.teacher=recompute, train.cache_dir elsewhere",
  "train": "train.keep_checkpoints, lora.rank",
  "merge": "engine.weights=adapter",
  "evaluate": "evaluate.k, evaluate.num_problems",
}
"""By stage: the keys by which it takes less."""

_FLOAT32 = _INT32 = 4
# Of a token in a row of parquet, before compression: its id and its text.
_TOKEN_BYTES = _INT32 + 4
WRAP = 76
_WIDTHS = {"float32": 4, "bfloat16": 2}


def shape_of(model: Model, run_dir: RunDir) -> ModelConfig | None:
  """Returns a model's shape where it is known without fetching anything."""
  if model.path in KNOWN_MODELS:
    return KNOWN_MODELS[model.path]
  size = model.path.removeprefix("random:")
  if size in SIZES:
    return SIZES[size]
  if model.path.startswith("lab:") or Path(model.path).is_dir():
    return read_config(hub.model_folder(model.path, run_dir))
  return None


def weight_bytes(model: Model, run_dir: RunDir) -> int | None:
  """Returns the bytes of a model's weights; None: its shape isn't known."""
  shape = shape_of(model, run_dir)
  if shape is None:
    return None
  return shape.num_parameters() * _WIDTHS[model.dtype]


def float8_bytes(experiment: Experiment, run_dir: RunDir) -> int | None:
  """Returns the bytes of a teacher in eight bits that it has for itself.

  In OPSD those are the kernels of its linear layers, all else being the
  student's. None where its shape isn't known.
  """
  shape = shape_of(experiment.teacher_model, run_dir)
  if shape is None:
    return None
  kernels = shape.num_layers * shape.linear_parameters()
  if experiment.regime == "opsd":
    return kernels
  others = shape.num_parameters() - kernels
  return kernels + others * _WIDTHS[experiment.teacher_model.dtype]


def disk(
  experiment: Experiment, run_dir: RunDir
) -> Iterator[tuple[str, int | None, str]]:
  """Yields the most bytes that each stage leaves behind in all rounds.

  Each stage has its name, its bytes and what they are of. Rows are counted as
  if every response used its whole budget, before compression. None where the
  model or the data is not known here.
  """
  section = experiment.pipeline
  rounds = section.rounds
  # Split, all rounds together have the rows of one.
  rows = 1 if section.parts > 1 else rounds
  for stage, size, what in _of_a_round(experiment, run_dir):
    times = rows if stage in _OF_PROBLEMS else rounds
    yield stage, None if size is None else times * size, what
  count = 0
  for name in experiment.evaluate.benchmarks:
    count += questions.number(experiment, name)
  # Every round that is evaluated is compared with the one base.
  evaluated = rounds
  if section.parts > 1:
    evaluated = -(-rounds // (section.evaluate_every or rounds))
  graded = (1 + evaluated) * count * experiment.evaluate.k
  yield "evaluate", _rows(graded, experiment.evaluate), "base and trained"


def _of_a_round(
  experiment: Experiment, run_dir: RunDir
) -> Iterator[tuple[str, int | None, str]]:
  """Yields the same as `disk`, of the stages that each round has for itself."""
  e = experiment
  problems = num_problems(e)
  shape = shape_of(e.student, run_dir)
  samples = None if problems is None else problems * e.rollout.samples
  if e.needs_rollouts:
    yield "rollout", _rows(samples, e.rollout), "y_o"
  if e.teacher_writes is not None:
    k = e.refine.teacher_top_k
    own = e.teacher_writes == "teacher"
    what = "the teacher's answers" if own else "y_r"
    what += f", the teacher's {k} likeliest at each token" if k else ""
    if own:
      samples = problems
    yield "refine", _rows(samples, e.refine, k), what
  if e.train.teacher == "hidden_cache":
    where = f", in {e.train.cache_dir}" if e.train.cache_dir else ""
    yield "teacher_cache", _cache(e, run_dir, samples), f"hidden states{where}"
  adapter = None if shape is None else shape.adapter_parameters(e.lora.rank)
  kept = e.train.keep_checkpoints
  yield (
    "train",
    # The adapter and Adam's two moments, all float32.
    None if adapter is None else 3 * _FLOAT32 * adapter * (kept + 1),
    f"{kept} checkpoints and one more while it is written: adapter, moments",
  )
  merged = None
  if shape is not None and adapter is not None:
    merged = _FLOAT32 * adapter
    if e.engine.weights == "merged":
      merged += weight_bytes(e.student, run_dir) or 0
  yield "merge", merged, "student and adapter"


def _rows(count: int | None, section: Generation, top_k: int = 0) -> int | None:
  """Returns bytes of rows with the teacher's `top_k` tokens at each token."""
  if count is None:
    return None
  prompt, response = section.max_prompt_tokens, section.max_response_tokens
  # Ids and log-probabilities, and the mass that they cover.
  recorded = top_k * (_INT32 + _FLOAT32) + _FLOAT32 if top_k else 0
  return count * ((prompt + response) * _TOKEN_BYTES + response * recorded)


def _cache(
  experiment: Experiment, run_dir: RunDir, samples: int | None
) -> int | None:
  """Returns the bytes of the teacher's hidden states of all responses."""
  e = experiment
  shape = shape_of(e.teacher_model, run_dir)
  if samples is None or shape is None:
    return None
  section = e.refine if e.trajectory_stage == "refine" else e.rollout
  # No sample that training takes is longer than `max_student_tokens`.
  tokens = min(section.max_response_tokens, e.train.max_student_tokens)
  width = _WIDTHS[e.train.cache_dtype or e.teacher_model.dtype]
  return samples * tokens * shape.hidden_size * width


def describe(
  experiment: Experiment,
  run_dir: RunDir,
  commands: Sequence[tuple[str, Sequence[str], str | None]],
  card: str | None = None,
) -> str:
  """Writes every command, budget and expected size, for a person.

  Args:
    experiment: what would be run.
    run_dir: where.
    commands: of each stage, and each further round, its name, its command and
      what makes that needless; None: it is to be run.
    card: what the config's file says to expect.
  """
  e = experiment
  lines = ["would run, in this order:"]
  for name, command, needless in commands:
    lines += [f"  {name}", f"    {needless or shlex.join(command)}"]
  lines += ["", "budgets, in tokens:"]
  sections: list[tuple[str, Generation]] = [("evaluate", e.evaluate)]
  if e.teacher_writes is not None:
    sections.insert(0, ("refine", e.refine))
  if e.needs_rollouts:
    sections.insert(0, ("rollout", e.rollout))
  for name, section in sections:
    lines.append(
      f"  {name:<10}{section.max_prompt_tokens:>8,} prompt"
      f" {section.max_response_tokens:>8,} response"
    )
  lines.append(
    f"  {'train':<10}{e.train.max_student_tokens:>8,} student"
    f" {e.train.max_teacher_tokens:>7,} teacher"
  )
  problems = num_problems(e)
  updates = ""
  if problems is not None:
    # Rounded up: an upper bound, as everything in this table.
    most = -(-problems * e.rollout.samples // e.train.batch_size)
    most *= e.train.epochs
    most = min(most, e.train.max_steps or most)
    updates = f", at most {most:,} update{'s' * (most != 1)}"
    updates += f" of {e.train.batch_size}"
  count = "not counted here" if problems is None else f"{problems:,}"
  rounds, scope = e.pipeline.rounds, ""
  if e.pipeline.parts > 1:
    updates += f", each problem in one of {rounds} rounds" if updates else ""
  elif rounds > 1:
    updates = f"{updates} a round"
  if rounds > 1:
    scope = f"in all {rounds} rounds, "
  lines.append(f"  problems  {count:>8}{updates}")
  lines += ["", "devices that the config asks for:", *_devices(e)]
  if card:
    lines += ["", "the config's file says, of its own rows:"]
    lines.append(textwrap.indent(textwrap.fill(card, WRAP), "  "))
  lines += ["", f"disk, at most ({scope}rows before compression):"]
  total, known = 0, True
  for name, size, what in disk(e, run_dir):
    shown = "not known here" if size is None else tables.size(size)
    line = f"  {name:<13}{shown:>14}  {what}"
    lines.append(printing.wrapped(line, sys.stdout, line.index(what)))
    total += size or 0
    known &= size is not None
  rest = "" if known else "  and what is not known here"
  lines.append(f"  {'all':<13}{tables.size(total):>14}{rest}")
  for where, sizes in by_disk(e, run_dir, commands).items():
    free, ahead = free_bytes(where), sum(size or 0 for size in sizes.values())
    lines.append(f"  {'free':<13}{tables.size(free):>14}  where {where} is")
    if free < ahead:
      lines.append(
        f"  WARNING: {tables.size(ahead)} may still be written there, and"
        f" {tables.size(free)} are free: make room, or"
        f" {elsewhere(where, e, run_dir)}"
      )
  for model in dict.fromkeys((e.student.path, e.teacher_model.path)):
    if model in KNOWN_MODELS:
      # The public checkpoints are bfloat16: two bytes a parameter.
      size = 2 * KNOWN_MODELS[model].num_parameters()
      lines.append(f"  and {tables.size(size)} to fetch once: {model}")
  return "\n".join(lines)


def check_room(
  experiment: Experiment,
  run_dir: RunDir,
  commands: Sequence[tuple[str, Sequence[str], str | None]],
) -> list[str]:
  """Compares what a run will write with what is free, before its first stage.

  What is not known here, as of a model that is still to be fetched, counts as
  nothing; so does what is there already of a stage that is still to end.

  Args:
    experiment: what is to be run.
    run_dir: where.
    commands: as of `describe`.

  Returns:
    A note for each disk where there may be too little room.

  Raises:
    UserError: on a disk there is too little even for the least that it gets.
  """
  there = {
    name.partition("/")[0]: _size_of(run_dir.stage(name))
    for name, _, needless in commands
    if needless is None and not name.startswith("round ")
  }
  there["teacher_cache"] = _size_of(
    _folder("teacher_cache", experiment, run_dir)
  )
  # Of a training at least one checkpoint, and all of a merged model.
  one = 1 / (experiment.train.keep_checkpoints + 1)
  share = {"train": one, "merge": 1.0}
  notes = []
  for where, sizes in by_disk(experiment, run_dir, commands).items():
    most = {}
    for name, size in sizes.items():
      folder = _folder(name, experiment, run_dir)
      done = there.get(name, 0) if _device(folder) == _device(where) else 0
      most[name] = max((size or 0) - done, 0)
    least = {
      name: int(size * share.get(name, _LEAST)) for name, size in most.items()
    }
    free = free_bytes(where)
    if free >= sum(most.values()):
      continue
    too_little = free < sum(least.values())
    shown = least if too_little else most
    largest = sorted(shown, key=shown.__getitem__, reverse=True)[:2]
    lower = ", ".join(
      f"{name} {tables.size(shown[name])} ({_REDUCED_BY[name]})"
      for name in largest
      if shown[name]
    )
    message = (
      f"{where}: {tables.size(free)} are free there, and this run"
      f" {'needs at least' if too_little else 'may write up to'}"
      f" {tables.size(sum(shown.values()))}: make room,"
      f" {elsewhere(where, experiment, run_dir)}, or lower what takes most:"
      f" {lower}"
    )
    if too_little:
      raise UserError(message)
    notes.append(message)
  return notes


def _size_of(folder: Path) -> int:
  """Returns the bytes of all files in a folder; 0 where it isn't there."""
  files = (path for path in folder.rglob("*") if path.is_file())
  return sum(path.stat().st_size for path in files)


def free_bytes(path: Path) -> int:
  """Returns the free bytes of the file system a path is on, or would be."""
  return shutil.disk_usage(_nearest(path)).free


def _nearest(path: Path) -> Path:
  """Returns a path, or the nearest folder above it that is there."""
  path = path.absolute()
  return next(one for one in (path, *path.parents) if one.exists())


def _device(path: Path) -> int:
  """Returns the number of the file system a path is on, or would be."""
  return _nearest(path).stat().st_dev


def by_disk(
  experiment: Experiment,
  run_dir: RunDir,
  commands: Sequence[tuple[str, Sequence[str], str | None]],
) -> dict[Path, dict[str, int | None]]:
  """Returns the most bytes that are still to be written on each disk.

  `train.cache_dir` may be on another disk than the workdir, and so may what a
  link there leads to.

  Args:
    experiment: what is to be run.
    run_dir: where.
    commands: as of `describe`; with none of them everything is to be written.

  Returns:
    By a folder on the disk, the workdir first, and by stage; None where a size
    is not known here.
  """
  folders = {_device(run_dir.root): run_dir.root}
  found: dict[Path, dict[str, int | None]] = {run_dir.root: {}}
  for stage, size, _ in disk(experiment, run_dir):
    own = _folder(stage, experiment, run_dir)
    rounds = run_dir.stage("rounds")
    if stage == "teacher_cache" and experiment.train.cache_dir:
      rounds = own
    account = "train" if stage == "teacher_cache" else stage
    # Its size in all is spread evenly over its commands and the further rounds.
    # A round that is begun counts as if nothing of it were there yet.
    parts = [
      (rounds if name.startswith("round ") else own, needless)
      for name, _, needless in commands
      if name.partition("/")[0] == account or name.startswith("round ")
    ] or [(own, None)]
    counts = collections.Counter(
      _device(folder) for folder, needless in parts if needless is None
    )
    for device, count in counts.items():
      where = folders.setdefault(
        device, rounds if device != _device(own) else own
      )
      part = None if size is None else size * count // len(parts)
      found.setdefault(where, {})[stage] = part
  return found


def _folder(stage: str, experiment: Experiment, run_dir: RunDir) -> Path:
  """Returns where a stage of `disk` writes in the first round."""
  if stage != "teacher_cache":
    return run_dir.stage(stage)
  return Path(experiment.train.cache_dir or run_dir.teacher_cache)


def elsewhere(where: Path, experiment: Experiment, run_dir: RunDir) -> str:
  """Says how what is written on a disk of `by_disk` goes to another one."""
  if where == run_dir.root:
    return "name a --workdir elsewhere"
  cache_dir = experiment.train.cache_dir
  if cache_dir and where == Path(cache_dir):
    return "name a train.cache_dir elsewhere"
  return f"have {where} lead elsewhere"


def _devices(experiment: Experiment) -> Iterator[str]:
  """Says what generates and what trains, and on how many devices."""
  yield f"  generate    {_generating_devices(experiment.engine)}"
  mesh = experiment.mesh
  sizes = mesh.sizes
  if sizes is None:
    shown = "all that JAX finds; data, fsdp and tensor are chosen from sizes"
  else:
    fixed = math.prod(size for size in sizes if size != -1)
    shown = f"{fixed}" if -1 not in sizes else f"a multiple of {fixed}"
    axes = zip(("data", "fsdp", "tensor"), sizes, strict=True)
    shown += f": {', '.join(f'mesh.{name}={size}' for name, size in axes)}"
  if processes := experiment.distributed.processes:
    shown += f", in {processes} processes"
  yield f"  train       {shown}"


def _generating_devices(engine: Engine) -> str:
  """Says on how many devices an engine generates, in its actors or without."""
  section, actors = engine.chosen, engine.ray.actors
  shown = "none"
  if section.devices == "remote":
    count = len(section.addresses)
    shown = f"none here: {count} server{'s' if count > 1 else ''}"
  elif section.devices == "jax":
    shown = "all that JAX finds"
  elif section.gpus is not None:
    copies, split = section.gpus.copies, section.gpus.split
    shown = f"{max(actors, 1) * section.gpus.count}: {engine.name}, "
    shown += f"{copies} {'copy' if copies == 1 else 'copies'} on {split} each"
  if actors:
    shown += f", in each of {actors} Ray actors"
  return shown
