"""One experiment: what a config file says, checked before anything else.

A config file fills in the `ConfigDict` that `default_config` makes;
`from_config` checks it whole and unpacks it into the frozen dataclasses of
`schema.py`, and no other module ever sees a `ConfigDict`.
"""

import dataclasses
import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from trd_jax.experiment import declarations, engines, methods, usual_names
from trd_jax.experiment.declarations import key, one_of, section
from trd_jax.experiment.errors import UserError, did_you_mean
from trd_jax.experiment.files import json_files, paths
from trd_jax.experiment.methods import (
  DIVERGENCES,
  METHODS,
  REGIMES,
  TEACHER_CONTEXTS,
  TOKEN_WEIGHTS,
  TRAJECTORIES,
  Coordinates,
)
from trd_jax.experiment.schema import (
  Data,
  Distributed,
  Engine,
  Evaluate,
  Lora,
  Loss,
  Mesh,
  Metrics,
  Model,
  Pipeline,
  Prompts,
  Python,
  Refine,
  Rollout,
  Sandbox,
  Student,
  Teacher,
  Train,
)

# Held-out splits of the laboratory that serve as benchmarks, by their names.
LAB_BENCHMARKS = {"arithmetic": "heldout", "arithmetic_hard": "hard"}


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One experiment, checked.

  In OPD the teacher is a frozen model of its own. In OPSD it is the student's
  frozen base, so that of the section `teacher` only `thinking` is read:
  `teacher_model` is the model either way.
  """

  regime: str = key(
    "opsd",
    "whose teacher: opd a larger model, opsd itself",
    one_of(*REGIMES),
    scope="refine",
  )
  method: str = key(
    "trd",
    "what is distilled: a preset of the three keys that follow and of"
    " loss.token_weights and loss.clip",
    one_of(*METHODS),
    scope="train",
  )
  trajectory: str | None = key(
    None,
    "along what: the student's rollout y_o, the refined y_r, the reference"
    " y_star, or the teacher's own answer; None: the method's own",
    one_of(*TRAJECTORIES),
    scope=("refine", "train"),
  )
  divergence: str | None = key(
    None,
    "of student and teacher at each token; None: the method's own",
    one_of(*DIVERGENCES),
    scope="train",
  )
  teacher_context: str | None = key(
    None,
    "what the teacher reads before it scores: x, x and y*, or the refinement"
    " prompt; None: refine along y_r, else x in OPD and x_reference in OPSD",
    one_of(*TEACHER_CONTEXTS),
    scope="train",
  )
  domain: str = key(
    "arithmetic",
    "chooses prompts and grader",
    one_of("arithmetic", "math", "code"),
    scope="problems",
  )
  seed: int = key(
    0,
    "seed of everything without one of its own",
    declarations.seed(),
    scope=("rollout", "train", "evaluate"),
  )
  preflight_only: bool = key(
    False,
    "check and count the prompts, report, and generate nothing",
    scope="runtime",
  )
  student: Student = section(Student, "rollout", "evaluate")
  teacher: Teacher = section(Teacher, "refine", "train")
  data: Data = section(Data, "problems")
  prompts: Prompts = section(Prompts, "rollout", "refine", "train", "evaluate")
  rollout: Rollout = section(Rollout, "rollout")
  refine: Refine = section(Refine, "refine")
  engine: Engine = section(Engine, "runtime")
  train: Train = section(Train, "train")
  loss: Loss = section(Loss, "train")
  lora: Lora = section(Lora, "train")
  mesh: Mesh = section(Mesh, "runtime")
  distributed: Distributed = section(Distributed, "runtime")
  evaluate: Evaluate = section(Evaluate, "evaluate")
  sandbox: Sandbox = section(Sandbox, "rollout", "evaluate")
  metrics: Metrics = section(Metrics, "runtime")
  pipeline: Pipeline = section(Pipeline, "runtime")
  python: Python = section(Python, "runtime")

  @property
  def coordinates(self) -> Coordinates:
    """Returns the method with what keys replace of it."""
    return methods.resolve(
      {
        "loss.token_weights": self.loss.token_weights,
        "loss.clip": self.loss.clip,
        "loss.mean": self.loss.mean,
        **{name: getattr(self, name) for name in _COORDINATE_KEYS},
      }
    )

  @property
  def trains_on(self) -> str:
    """Returns the kind of trajectory, of `methods.TRAJECTORIES`."""
    return self.coordinates.trajectory

  @property
  def context_of_teacher(self) -> str | None:
    """Returns what the teacher reads: x, x_reference, refine; None: nothing."""
    return self.coordinates.teacher_context

  @property
  def trajectory_stage(self) -> str | None:
    """Returns the stage whose trajectories are trained on; None: no stage's."""
    return TRAJECTORIES[self.trains_on].stage

  @property
  def teacher_writes(self) -> str | None:
    """Returns what the refine stage makes: y_r, teacher, or None: nothing.

    A subset that goes by the verdict of y_r needs it, too.
    """
    if self.trains_on in ("y_r", "teacher"):
      return self.trains_on
    return "y_r" if self.train.subset in BY_Y_R else None

  @property
  def needs_rollouts(self) -> bool:
    """Whether the student's own answers are read at all."""
    by_rollout = self.train.subset in ("fail", "succ", "fail_to_succ")
    rewritten = self.teacher_writes == "y_r"
    return self.trains_on == "y_o" or rewritten or by_rollout

  @property
  def trajectories_per_problem(self) -> int:
    """Returns how many trajectories of a problem are trained on, at most."""
    return self.rollout.samples if self.trains_on in ("y_o", "y_r") else 1

  @property
  def grades(self) -> bool:
    """Whether any trajectory is graded."""
    return (self.needs_rollouts and self.rollout.grade) or (
      self.teacher_writes is not None and self.refine.grade
    )

  @property
  def reads_own_teacher(self) -> bool:
    """Whether a teacher that isn't the student's base writes or is read."""
    writes = self.teacher_writes is not None
    return self.regime == "opd" and (
      writes or self.context_of_teacher is not None
    )

  @property
  def stages(self) -> tuple[str, ...]:
    """Returns the stages that make the trained student, in order."""
    rollout = ("rollout",) if self.needs_rollouts else ()
    refine = ("refine",) if self.teacher_writes is not None else ()
    return (*rollout, *refine, "train", "merge")

  @property
  def teacher_model(self) -> Model:
    """Returns the model that refines and that is distilled from."""
    if self.regime == "opd":
      return self.teacher
    # Without the student's adapter: the base teaches. So the teacher stays what
    # it was while the student learns.
    own: dict[str, Any] = {
      f.name: getattr(self.student, f.name) for f in fields(Model)
    }
    own["thinking"] = self.teacher.thinking
    return Model(**own)

  @property
  def evaluation_thinking(self) -> bool | None:
    """Returns the thinking switch of benchmark prompts."""
    if self.evaluate.thinking is None:
      return self.student.thinking
    return self.evaluate.thinking


# Subsets that go by the verdict of what the refine stage wrote.
BY_Y_R = ("fail_to_succ", "refined_succ")

_COORDINATE_KEYS = (
  "regime",
  "method",
  "trajectory",
  "divergence",
  "teacher_context",
)

KEYS: Mapping[str, declarations.Key] = declarations.keys_of(Experiment)


def default_config() -> config_dict.ConfigDict:
  """Returns every key at its default: what a config file starts from.

  The ConfigDict is locked (a key that does not exist cannot be set) and keeps
  each key's type; keys that may be None are typed placeholders.
  """
  return declarations.config_of(Experiment)


def from_config(
  config: config_dict.ConfigDict | Mapping[str, Any], source: str = "config"
) -> Experiment:
  """Checks a config whole and unpacks it; an absent key has its default.

  Args:
    config: `default_config()` with changes, or any mapping of the same keys.
    source: where it comes from (the file), for errors.

  Raises:
    UserError: a key that does not exist, a value of the wrong type or out of
      its range, or keys that contradict one another. It names the key, the
      source, and the nearest right name.
  """
  if isinstance(config, config_dict.ConfigDict):
    config = config.to_dict()
  # Keys first and one by one, then what concerns several: a value of the wrong
  # type would make nonsense of the second look.
  checked = {}
  for name, value in declarations.flatten(config).items():
    if name not in KEYS:
      raise unknown_key(name, source)
    try:
      checked[name] = KEYS[name].check(value)
    except ValueError as error:
      raise UserError(f"{source}: {error}") from None
  experiment = declarations.unflatten(Experiment, checked)
  for contradiction in _contradictions(experiment):
    raise UserError(f"{source}: {contradiction}")
  return experiment


def unknown_key(name: str, source: str, prefix: str = "") -> UserError:
  """Returns the complaint about a key that does not exist, with `prefix`."""
  usual = usual_names.keys(name, KEYS)
  inside = [prefix + other for other in KEYS if other.startswith(name + ".")]
  hint = ""
  # Where others have a name for a section, as `student`, its path is meant.
  if inside and not usual:
    hint = f"it is a section: name a key in it, as {inside[0]}"
  elif name == "workdir" or usual_names.flags(name, ("workdir",)):
    hint = "where the run's files go is a flag, --workdir=DIR"
  hint = hint or did_you_mean(name, KEYS, prefix, usual) or "see --help_config"
  return UserError(f'{source}: there is no key "{name}"; {hint}')


def flat(experiment: Experiment) -> dict[str, Any]:
  """Returns every key's value by its dotted name."""
  return declarations.flatten(dataclasses.asdict(experiment))


def to_json(experiment: Experiment) -> str:
  """Returns canonical JSON: equal experiments give equal text.

  Paths stand there as they were written, with their `~`.
  """
  tree = dataclasses.asdict(
    experiment,
    dict_factory=lambda items: {k: paths.as_given(v) for k, v in items},
  )
  return json.dumps(tree, sort_keys=True, indent=2) + "\n"


def from_json(path: Path) -> Experiment:
  """Reads the experiment that `to_json` wrote.

  Raises:
    UserError: the file can't be read as JSON, or as `from_config`.
  """
  return from_config(
    json_files.read_object(path, "it is not a config"), str(path)
  )


def parse_arg(arg: str | None, **defaults: Any) -> types.SimpleNamespace:
  """Reads the `key=value,…` after the colon of --config=FILE.py:key=value,….

  Args:
    arg: what `get_config` was given; None or '' changes nothing.
    **defaults: the variants that the config file knows and their defaults,
      whose types the values take.

  Returns:
    The defaults, changed, as attributes.

  Raises:
    UserError: an unknown variant, or a value of another type.
  """
  variants = dict(defaults)
  for part in filter(None, (arg or "").split(",")):
    name, equals, text = part.partition("=")
    if name not in defaults:
      hint = did_you_mean(name, defaults) or "this config has no variants"
      raise UserError(f'there is no variant "{name}" in ":{arg}"; {hint}')
    kind = type(defaults[name])
    if not equals and kind is bool:
      text = "true"  # a bare name switches a boolean on
    rule = declarations.filled() if kind is str else None
    declared = declarations.Key(name, kind, False, defaults[name], "", rule)
    try:
      variants[name] = declared.parse(text)
    except ValueError as error:
      raise UserError(f'{error} (in ":{arg}")') from None
  return types.SimpleNamespace(**variants)


def _contradictions(experiment: Experiment) -> Iterator[str]:
  """Yields what is wrong and no single key is to blame for."""
  e = experiment
  yield from _loss_contradictions(e)
  for benchmark, split in LAB_BENCHMARKS.items():
    if e.data.source != "arithmetic" or split != e.data.arithmetic.split:
      continue
    if benchmark not in e.evaluate.benchmarks:
      continue
    yield (
      f"data.arithmetic.split={e.data.arithmetic.split} is what the benchmark "
      f"{benchmark} asks: train on train or train_hard"
    )
  yield from _teacher_contradictions(e)
  by = {"rollout": ("fail", "succ", "fail_to_succ"), "refine": BY_Y_R}
  for stage, subsets in by.items():
    if e.train.subset in subsets and not getattr(e, stage).grade:
      yield (
        f"train.subset={e.train.subset} goes by verdicts that"
        f" {stage}.grade=False doesn't give: set {stage}.grade=True, or"
        " train.subset=all"
      )
  yield from _context_contradictions(e)
  yield from _round_contradictions(e)
  if e.data.source == "arithmetic" and e.data.root is not None:
    yield (
      f"data.root={e.data.root} is read by no source, as"
      " data.source=arithmetic makes its problems: set data.source=jsonl, or"
      " leave the root out"
    )
  yield from engines.contradictions(e)
  if e.train.attention in ("cudnn", "tokamax"):
    setting = f"train.attention={e.train.attention}"
    if e.train.packing and e.train.attention == "tokamax":
      yield (
        f"{setting} is given no segments, and with train.packing=True a row"
        " holds several samples: set train.packing=False, or"
        " train.attention=cudnn"
      )
    sides: dict[str, Model] = {"student": e.student}
    if e.regime == "opd":
      sides["teacher"] = e.teacher
    for side, model in sides.items():
      if model.dtype != "bfloat16":
        yield (
          f"{setting} runs in bfloat16: set {side}.dtype=bfloat16, or "
          "train.attention=xla"
        )
  axes = ("data", "fsdp", "tensor")
  if len(rest := [axis for axis in axes if getattr(e.mesh, axis) == -1]) > 1:
    yield f"only one axis can be the rest (-1), not mesh.{', mesh.'.join(rest)}"
  steps = e.data.arithmetic
  if (
    steps.min_steps is not None
    and steps.max_steps is not None
    and steps.min_steps > steps.max_steps
  ):
    yield (
      f"data.arithmetic.min_steps={steps.min_steps} is more than "
      f"data.arithmetic.max_steps={steps.max_steps}"
    )
  if len(set(e.evaluate.benchmarks)) < len(e.evaluate.benchmarks):
    yield f"evaluate.benchmarks names one twice: {e.evaluate.benchmarks}"


def _loss_contradictions(e: Experiment) -> Iterator[str]:
  """Yields what of the method's coordinates and `loss` doesn't fit."""
  # As a mapping: what terms declare as their parameters are keys here, too.
  chosen, loss = e.coordinates, vars(e.loss)
  divergence = DIVERGENCES[chosen.divergence]
  terms = [divergence]
  if chosen.token_weights is not None:
    terms.append(TOKEN_WEIGHTS[chosen.token_weights])
  for term in terms:
    if problem := term.contradiction(**term.read(e.loss)):
      yield problem
  named = _named(e, "divergence")
  if chosen.teacher_context == "refine" and chosen.trajectory != "y_r":
    yield (
      f"teacher_context=refine is the prompt that y_r was written after, and"
      f" {_named(e, 'trajectory')} has none: set trajectory=y_r, or"
      " teacher_context=x or x_reference"
    )
  if e.teacher_context is not None and not divergence.reads_teacher:
    yield (
      f"{named} reads no teacher, so that teacher_context={e.teacher_context}"
      " says nothing: leave it at None"
    )
  able = [n for n, t in DIVERGENCES.items() if "clip_entries" in t.parameters]
  clips_entries = loss["clip_entries"] > 0 and chosen.divergence in able
  if loss["clip_entries"] and not clips_entries:
    yield (
      f"loss.clip_entries={loss['clip_entries']:g} clips the terms of"
      f" {' or '.join(able)}, and {named} has none: set it to 0"
    )
  # What may be negative, or is more than a divergence, nothing clips or weighs.
  unbounded = f"{named} gives a token a value that may be negative"
  if clips_entries:
    unbounded = (
      f"loss.clip_entries={loss['clip_entries']:g} lets a token's value be"
      " negative"
    )
  elif e.loss.cross_entropy:
    unbounded = f"loss.cross_entropy={e.loss.cross_entropy:g} adds to it"
  elif not divergence.signed:
    unbounded = ""
  if unbounded and chosen.clip is not None:
    yield (
      f"{_clipped_by(e)} bounds a token's divergence, and {unbounded}: set"
      " loss.clip=0"
    )
  if unbounded and chosen.token_weights is not None:
    key = "loss.token_weights"
    said = f"{key}={e.loss.token_weights}" if e.loss.token_weights else ""
    yield (
      f"{said or f'method={e.method}'} weighs tokens by their divergence, and"
      f" {unbounded}: set {key}=none"
    )
  if e.loss.cross_entropy and not divergence.reads_teacher:
    yield f"{named} is the cross-entropy already: set loss.cross_entropy=0"
  renormalised = (
    chosen.divergence == "reverse_kl_topk"
    and loss["top_k_tail"] == "renormalise"
  )
  if chosen.token_weights is not None and renormalised:
    yield (
      f"{chosen.token_weights} weighs tokens by the student's whole"
      f" distribution, and {named} makes only its top {loss['top_k']}: set"
      " loss.top_k_tail=bucket, or loss.token_weights=none"
    )


def _round_contradictions(e: Experiment) -> Iterator[str]:
  """Yields what of `pipeline` doesn't fit rounds that are split, or aren't."""
  section = e.pipeline
  if section.round > section.parts:
    yield (
      f"pipeline.round={section.round} of {section.parts}: the pipeline itself"
      " sets it, where pipeline.split cuts the problems: leave it out"
    )
  if section.evaluate_every is not None and not section.split:
    yield (
      f"pipeline.evaluate_every={section.evaluate_every} is for rounds that are"
      " split, and others are evaluated each: set pipeline.split=True, or leave"
      " it at None"
    )
  if section.parts > 1 and e.train.max_steps is not None:
    trajectories = e.train.max_steps * e.train.batch_size
    limit = -(-trajectories // e.trajectories_per_problem)
    yield (
      f"train.max_steps={e.train.max_steps} ends a training early, and"
      " pipeline.split gives each round its part of all problems: set"
      f" data.limit={limit} in its place"
    )


def _named(e: Experiment, coordinate: str) -> str:
  """Returns a coordinate's key with its value, or the method that set it."""
  if (value := getattr(e, coordinate)) is not None:
    return f"{coordinate}={value}"
  value = getattr(e.coordinates, coordinate)
  return f"method={e.method}" + (f" ({value})" if value != e.method else "")


def _clipped_by(e: Experiment) -> str:
  """Returns the key, or the method, that clips tokens."""
  if e.loss.clip is not None:
    return f"loss.clip={e.loss.clip:g}"
  return f"method={e.method} (clip {e.coordinates.clip:g})"


def _context_contradictions(e: Experiment) -> Iterator[str]:
  """Yields what a chat template alone could do, in contexts without one."""
  if e.train.context != "plain":
    return
  for name, value in (
    ("train.student_thinking", e.train.student_thinking),
    ("teacher.thinking", e.teacher.thinking),
  ):
    if value is not None:
      yield (
        f"{name}={value} sets a switch of the chat template, and contexts of"
        " train.context=plain have none: leave it at None"
      )
  if e.train.teacher == "topk_from_rollout":
    yield (
      "train.teacher=topk_from_rollout reads what the teacher recorded after a"
      " prompt in its chat template, and train.context=plain scores after none:"
      " use train.teacher=hidden_cache"
    )


def _teacher_contradictions(e: Experiment) -> Iterator[str]:
  """Yields what of `train.teacher` doesn't fit the rest."""
  if e.train.cache_dtype == "float32" != e.teacher_model.dtype:
    yield (
      "train.cache_dtype=float32 doubles a cache of bfloat16 hidden states and "
      "adds nothing to them: leave it at None"
    )
  chosen, loss = e.coordinates, vars(e.loss)
  runs = (
    chosen.teacher_context is not None
    and e.train.teacher != "topk_from_rollout"
  )
  if e.train.teacher_dtype is not None and not runs:
    why = f"train.teacher={e.train.teacher}"
    if chosen.teacher_context is None:
      why = _named(e, "divergence")
    yield (
      f"train.teacher_dtype={e.train.teacher_dtype} is of the teacher's"
      f" products, and with {why} no teacher is run: leave it at None"
    )
  if chosen.teacher_context is None and e.train.teacher != "recompute":
    yield (
      f"train.teacher={e.train.teacher} says where the teacher's distributions"
      f" come from, and {_named(e, 'divergence')} reads none: set"
      " train.teacher=recompute"
    )
    return
  if e.train.teacher != "topk_from_rollout":
    return
  if (chosen.trajectory, chosen.teacher_context) != ("y_r", "refine"):
    yield (
      "train.teacher=topk_from_rollout reads what the teacher recorded while "
      f"it wrote y_r after the refinement prompt, not along {chosen.trajectory}"
      f" after {chosen.teacher_context}: set trajectory=y_r and"
      " teacher_context=refine, or train.teacher=hidden_cache"
    )
  elif chosen.divergence != "forward_kl" or loss["clip_entries"]:
    yield (
      "train.teacher=topk_from_rollout gives a whole forward_kl, and this is"
      f" {_named(e, 'divergence')}"
      f"{', with loss.clip_entries' if loss['clip_entries'] else ''}: use"
      " train.teacher=hidden_cache"
    )
  elif e.loss.cross_entropy:
    yield (
      "train.teacher=topk_from_rollout adds no cross-entropy: set"
      " loss.cross_entropy=0, or train.teacher=hidden_cache"
    )
  elif not e.refine.teacher_top_k:
    yield (
      "train.teacher=topk_from_rollout needs refine.teacher_top_k above 0, 20 "
      "for instance: nothing is recorded otherwise"
    )
  if e.loss.temperature != 1:
    yield (
      "train.teacher=topk_from_rollout knows log-probabilities at temperature "
      f"1, not at loss.temperature={e.loss.temperature:g}: set that to 1, or "
      "use train.teacher=hidden_cache"
    )
