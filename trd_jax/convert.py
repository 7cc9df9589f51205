"""Converts weights between forms, and makes the models called random:<size>.

Without flags of its own it makes the random models that the config names, as
a stage of the pipeline. With --source and --target it converts:

    Hugging Face folder        -> orbax   (--to=orbax)
    such an orbax folder       -> Hugging Face   (--to=hf)
    checkpoints of a training  -> PEFT adapter   (--to=peft)
    PEFT adapter               -> orbax   (--to=orbax)
    such an orbax folder       -> PEFT adapter   (--to=peft)
    a model of the laboratory  -> Hugging Face or orbax
"""

import os
from pathlib import Path

from trd_jax.experiment import cli
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Model

STAGE = "convert"
FLAGS = (
  cli.Flag(
    "source",
    None,
    "folder to convert, or lab:NAME; absent: make random models",
    is_path=True,
  ),
  cli.Flag(
    "target",
    None,
    "folder to write; one that trd-jax has written is replaced",
    is_path=True,
  ),
  cli.Flag("to", None, "form to write: hf, orbax or peft"),
)

_RANDOM = "random:"
_LAB = "lab:"
_ADAPTER_CONFIG = "adapter_config.json"
_ORBAX = "orbax"
# What helps where a device is full: no form depends on where it is made.
_REMEDY = "give the same command with JAX_PLATFORMS=cpu in front"
# Where weights are in a run, from the run's folder or one of its stages.
_OF_A_RUN = (
  *("train/checkpoints", "merge/model", "merge/adapter"),
  *("checkpoints", "model", "adapter"),
)
_EXAMPLES = (
  "--source=runs/demo/train/checkpoints --target=runs/adapter --to=peft",
  "--source=runs/demo/merge/model --target=runs/model --to=orbax",
  "--source=runs/model --target=runs/again --to=hf",
  "--config=configs/opsd.py:model=nano,tokenizer=DIR --workdir=runs/nano",
)


def run(experiment: Experiment, run_dir: RunDir | None, flags) -> None:
  """Converts weights, or makes the random models that the config names.

  Raises:
    UserError: the flags don't belong together; the source is missing, damaged
      or of a kind that can't become that form; or the target can't be written
      or holds what would be lost.
  """
  own = (flags.source, flags.target, flags.to)
  if not any(own):
    _random_models(experiment, run_dir)
    return
  if not all(own):
    raise UserError("--source, --target and --to belong together: give all")
  source, target = map(Path, own[:2])
  is_shipped = str(source).startswith(_LAB)
  if is_shipped:
    from trd_jax.model.weights import hub

    source = hub.model_folder(str(source))
  if not source.is_dir():
    raise UserError(f"--source={source} is no folder; name one to convert")
  from trd_jax.model.weights.model_folder import check_replaceable

  # The target is replaced whole, so neither folder may lie in the other. Links
  # are followed first: two names may lead to one folder.
  here, there = source.resolve(), Path(os.path.realpath(target))
  if there in (here, *here.parents):
    raise UserError(
      f"--target={target} would replace --source={source}; name another folder"
    )
  if here in there.parents:
    raise UserError(
      f"--target={target} lies in --source={source}; name another folder"
    )
  check_replaceable(target, f"--target={target}")
  # What can become what, by kind and form: all advice below is derived from it.
  writers = {
    ("hf", "orbax"): _hf_to_orbax,
    ("orbax model", "hf"): _orbax_to_hf,
    ("peft", "orbax"): _peft_to_orbax,
    ("orbax adapter", "peft"): _orbax_to_peft,
    ("checkpoints", "peft"): _checkpoints_to_peft,
  }
  if is_shipped:  # nobody knows its folder, so a copy is worth something
    writers["hf", "hf"] = _copy
  # Whoever names a run's folder means the weights in it. Only those are
  # suggested that can become the form that is asked for.
  if meant := _meant(source):
    fit = [str(one) for one in meant if (_kind(one), flags.to) in writers]
    told = f"--source={source} holds no weights itself"
    if fit:
      raise UserError(f"{told}; did you mean --source={' or '.join(fit)}?")
    forms = [
      f"--source={one} with --to={form}"
      for one in meant
      for kind, form in writers
      if kind == _kind(one)
    ]
    raise UserError(
      f"{told}, and none there can become --to={flags.to}; give"
      f" {' or '.join(forms)}"
    )
  kind = _kind(source)
  empty = {
    "checkpoints": not _holds_checkpoints(source),
    "hf": not any(source.glob("*.safetensors")),
  }
  if empty.get(kind):
    raise UserError(
      f"--source={source} holds no checkpoint and no weights; name"
      " RUN/train/checkpoints, RUN/merge/model, RUN/merge/adapter or a model's"
      " folder with safetensors (pickled .bin files are never read)"
    )
  if (kind, flags.to) not in writers:
    raise UserError(
      f"--source={source} ({kind}) can't become --to={flags.to}; it can become"
      f" {', '.join(form for k, form in writers if k == kind)}"
    )
  if kind == "checkpoints":
    # The parsed config is always there, if only with its defaults: what counts
    # is whether the command line has named one.
    given = run_dir is not None or _is_given(flags)
    if flags.config_argv and not given:
      raise UserError(
        f"{flags.config_argv[0]} changes no config without --config; leave it"
        f" out, or give the --config that --source={source} belongs to"
      )
    experiment = _trained_by(source, experiment if given else None)
  from trd_jax.model import backend

  try:
    with backend.enough_memory(_REMEDY):
      writers[kind, flags.to](source, target, experiment, run_dir)
  except ValueError as error:
    raise UserError(
      f"{source}: {error}; give the --config that it belongs to"
    ) from error
  print(f"{STAGE}: {kind} {source} is now {flags.to} {target}", flush=True)


def _kind(source: Path) -> str:
  """Returns the kind of what a folder holds, by its files."""
  # Orbax first: such a folder has a config.json of the model or the adapter
  # beside the arrays, too.
  if (source / _ORBAX).is_dir():
    model = (source / "config.json").exists()
    return "orbax model" if model else "orbax adapter"
  if (source / _ADAPTER_CONFIG).exists():
    return "peft"
  if (source / "config.json").exists():
    return "hf"
  return "checkpoints"


def _meant(source: Path) -> list[Path]:
  """Returns the folders of weights around or below a source that holds none."""
  if _holds_weights(source):
    return []
  # Inside: the folder of arrays itself, or a checkpoint's step in it.
  if source.name == _ORBAX or (
    source.name.isdecimal() and source.parent.name in ("checkpoints", _ORBAX)
  ):
    above = source.parent
    return [above.parent if above.name == _ORBAX else above]
  return [there for name in _OF_A_RUN if (there := source / name).is_dir()]


def _holds_weights(folder: Path) -> bool:
  """Returns whether a folder is empty or like one that a conversion writes."""
  made = (_ORBAX, _ADAPTER_CONFIG, "model.safetensors")
  made += ("model.safetensors.index.json",)
  return any((folder / name).exists() for name in made) or not any(
    folder.iterdir()
  )


def _holds_checkpoints(folder: Path) -> bool:
  """Returns whether a folder has the folder of a step, as a training writes."""
  return any(one.name.isdecimal() and one.is_dir() for one in folder.iterdir())


def _is_given(flags) -> bool:
  """Returns whether the command line names a config."""
  return any(text.startswith("--config=") for text in flags.config_argv)


def _trained_by(checkpoints: Path, given: Experiment | None) -> Experiment:
  """Returns the config of the run that checkpoints lie in, else the one given.

  Raises:
    UserError: there is neither, or both and they differ in the adapter.
  """
  from trd_jax.experiment import experiment

  # Alpha is in no array of a checkpoint, and scaled by another one it would be
  # another adapter: so the run's own config comes first.
  run_dir = RunDir(checkpoints.resolve().parent.parent)
  inside = run_dir.checkpoints == checkpoints.resolve()
  if not inside or not run_dir.config.is_file():
    if given is None:
      raise UserError(
        f"--source={checkpoints}: what its adapter is scaled by stands in the"
        " config of its run; name RUN/train/checkpoints, or give --config"
      )
    return given
  found = experiment.from_json(run_dir.config)
  if given is not None and given.lora != found.lora:
    raise UserError(
      f"--source={checkpoints} was trained with {found.lora}, and the config"
      f" given says {given.lora}; leave --config out"
    )
  return found


def _random_models(experiment: Experiment, run_dir: RunDir | None) -> None:
  """Makes each model random:<size> of the config that isn't there yet."""
  sections: list[tuple[str, Model]] = [("student", experiment.student)]
  if experiment.regime == "opd":
    sections.append(("teacher", experiment.teacher))
  sections = [(n, s) for n, s in sections if s.path.startswith(_RANDOM)]
  if not sections:
    raise UserError(
      "nothing to do: the config names no random:<size> model; to convert"
      " weights give --source, --target and --to"
    )
  if run_dir is None:
    raise UserError("--workdir=DIR is missing: random models live in it")
  from trd_jax.lab.random_model import random_folder
  from trd_jax.model import backend
  from trd_jax.model.weights import hub
  from trd_jax.model.weights.model_folder import check_replaceable

  made = {}
  for number, (name, section) in enumerate(sections):
    if section.tokenizer is None:
      raise UserError(
        f"{name}.path={section.path} has no tokenizer of its own; set"
        f" {name}.tokenizer to a folder or a hub id"
      )
    size = section.path.removeprefix(_RANDOM)
    folder = run_dir.model_folder_for_random(size)
    if not (folder / "config.json").exists():
      check_replaceable(folder)
      tokenizer = hub.tokenizer_folder(section.tokenizer, run_dir)
      with backend.enough_memory(_REMEDY):
        random_folder(
          size,
          folder,
          tokenizer,
          section.chat_template,
          # Student and teacher of one size must not be the same model.
          seed=experiment.seed + number,
        )
    made[section.path] = hub.model_revision(folder)
    print(f"{STAGE}: {section.path} is in {folder}", flush=True)
  run_dir.mark_done(STAGE, {"random": made})


def _hf_to_orbax(source: Path, target: Path, *_) -> None:
  """Converts a Hugging Face folder to orbax, config and tokenizer beside it."""
  import shutil

  from flax import nnx

  from trd_jax.model.weights import hf
  from trd_jax.model.weights.model_folder import (
    CONFIG,
    atomic_folder,
    copy_companions,
  )

  model = hf.load(source, dtype=hf.stored_dtype(source))
  with atomic_folder(target) as out:
    copy_companions(source, out)
    shutil.copyfile(source / CONFIG, out / CONFIG)
    _save(out / _ORBAX, {"base": nnx.to_pure_dict(nnx.state(model))})


def _copy(source: Path, target: Path, *_) -> None:
  """Copies a model's folder, but for its mark: the copy gets one of its own."""
  import shutil

  from trd_jax.experiment.files import ownership
  from trd_jax.model.weights.model_folder import atomic_folder

  with atomic_folder(target) as out:
    others = shutil.ignore_patterns(ownership.MARKER)
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=others)


def _orbax_to_hf(source: Path, target: Path, *_) -> None:
  """Converts an orbax folder of a model back, in the dtype of its arrays."""
  from trd_jax.model.weights import hf

  base = _restore(source / _ORBAX, "base")
  hf.save_hf(
    hf.read_config(source),
    base,
    target,
    tokenizer_from=source,
    dtype=base["embed"]["embedding"].dtype.name,
  )


def _peft_to_orbax(
  source: Path, target: Path, experiment: Experiment, run_dir: RunDir | None
) -> None:
  import shutil

  from trd_jax.model.weights import adapters, hf, hub
  from trd_jax.model.weights.model_folder import atomic_folder

  student = experiment.student
  folder = hub.model_folder(student.path, run_dir, student.revision)
  # The adapter's folder doesn't hold the model's shape, by which its tensors
  # are checked: that is the student's of the config.
  _, adapter = adapters.load_peft(source, hf.read_config(folder))
  with atomic_folder(target) as out:
    # Alpha and the base's name stand in this file only.
    shutil.copyfile(source / _ADAPTER_CONFIG, out / _ADAPTER_CONFIG)
    _save(out / _ORBAX, {"lora": adapter})


def _orbax_to_peft(
  source: Path, target: Path, experiment: Experiment, run_dir: RunDir | None
) -> None:
  del experiment, run_dir
  from trd_jax.model.weights import adapters, peft

  lora, base = peft.read_peft_config(source)
  tree = _restore(source / _ORBAX, "lora")
  adapters.save_peft(tree, lora, target, base=base)


def _checkpoints_to_peft(
  source: Path, target: Path, experiment: Experiment, run_dir: RunDir | None
) -> None:
  del run_dir
  from trd_jax.model.lora_config import LoraConfig
  from trd_jax.model.weights import adapters

  lora = LoraConfig(**vars(experiment.lora))
  tree = _restore(source, "lora")
  adapters.save_peft(tree, lora, target, base=experiment.student.path)


def _save(folder: Path, tree: dict) -> None:
  from trd_jax.distill.checkpoint import Checkpoints

  checkpoints = Checkpoints(folder, keep=1)
  checkpoints.save(0, tree)
  checkpoints.wait()


def _restore(folder: Path, name: str) -> dict:
  """Reads one subtree of the newest checkpoint in a folder."""
  from flax.traverse_util import unflatten_dict

  from trd_jax.distill.checkpoint import Checkpoints

  checkpoints = Checkpoints(folder, keep=1)
  # The shapes come from the checkpoint itself: no model has to be built, and
  # the optimizer's state, which is larger, isn't read.
  like = {
    key: shape
    for key, shape in checkpoints.arrays().items()
    if key.startswith(name + "/")
  }
  if not like:
    raise UserError(f"{folder} holds no {name}; name another --source")
  _, tree = checkpoints.restore(unflatten_dict(like, sep="/"), partial=True)
  return tree[name]


if __name__ == "__main__":
  cli.main(
    STAGE,
    run,
    "converts weights, or makes the config's random models",
    FLAGS,
    standalone=True,
    examples=_EXAMPLES,
  )
