"""A model with its tokenizer and chat template, opened without its weights."""

import dataclasses
from pathlib import Path

from trd_jax.data import vocabulary
from trd_jax.data.chat import Chat
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.files.json_files import read_object
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Model
from trd_jax.model.config import read_size
from trd_jax.model.weights import hub
from trd_jax.model.weights.model_files import ModelFiles
from trd_jax.model.weights.model_folder import CONFIG


@dataclasses.dataclass(frozen=True)
class ChatModel(ModelFiles):
  """A model on disk with its tokenizer and chat template.

  Attributes:
    chat: tokenizer and template.
  """

  chat: Chat = dataclasses.field(kw_only=True)

  @property
  def files(self) -> ModelFiles:
    """Returns the part that an engine needs and another process can be sent."""
    names = [field.name for field in dataclasses.fields(ModelFiles)]
    return ModelFiles(**{name: getattr(self, name) for name in names})


def open_model(
  model: Model,
  run_dir: RunDir | None,
  folder: Path | None = None,
  adapter: Path | None = None,
) -> ChatModel:
  """Finds a model and its tokenizer, and checks that they fit.

  Args:
    model: the experiment's section.
    run_dir: for models that live in the run directory.
    folder: other weights of the same architecture and tokenizer (the merged
      student), in place of the section's.
    adapter: a PEFT folder to apply to the weights.

  Raises:
    UserError: something is missing, the tokenizer has ids that the model's
      head has no row for, or the weights have changed since a stage read them.
  """
  base = hub.model_folder(model.path, run_dir, model.revision)
  tokenizer = base
  if model.tokenizer is not None:
    tokenizer = hub.tokenizer_folder(model.tokenizer, run_dir)
  chat = Chat.load(tokenizer, model.chat_template)
  weights = folder or base
  rows = read_size(read_object(weights / CONFIG), "vocab_size")
  vocabulary.check_head(chat, rows, tokenizer, weights)
  name = model.path if folder is None else str(folder)
  fingerprint = hub.fingerprint(weights, adapter)
  # Part of every sample's key: other weights or adapters, other samples.
  revision = fingerprint.partition(":")[0]
  if adapter is not None:
    name = f"{name} with {adapter}"
  # What a merge has left may be a further round's student.
  for where in (run_dir, _merged_in(adapter or weights)):
    if where is not None:
      where.check_weights(name, fingerprint)
  files = (name, weights, revision, model.dtype, adapter, fingerprint)
  return ChatModel(*files, chat=chat)


def _merged_in(folder: Path) -> RunDir | None:
  """Returns the run directory whose merge has left a folder, if one has."""
  if folder.parent.name != "merge":
    return None
  return RunDir(folder.parents[1])


def open_chat(model: Model, run_dir: RunDir | None) -> Chat:
  """Opens a model's tokenizer and template alone.

  Raises:
    UserError: they are missing or broken.
  """
  revision = None if model.tokenizer else model.revision
  folder = hub.tokenizer_folder(model.tokenizer_path, run_dir, revision)
  return Chat.load(folder, model.chat_template)


def open_trained(experiment: Experiment, run_dir: RunDir) -> ChatModel:
  """Opens the student that has been trained in a workdir, as it is served.

  Its base, tokenizer and template are the experiment's; the weights are the
  merged ones, or the base's with the adapter (`engine.weights`).

  Raises:
    UserError: it isn't there, or only in the other form.
  """
  merged = run_dir.done("merge")
  if merged is None:
    raise UserError(
      f"{run_dir.root}: there are no merged weights yet; run trd_jax.train and"
      " trd_jax.merge first, or evaluate --model=base"
    )
  if experiment.engine.weights == "adapter":
    return open_model(experiment.student, run_dir, adapter=run_dir.adapter)
  if not merged["merged"]:
    raise UserError(
      f"{run_dir.root}: trd_jax.merge wrote the adapter alone; go on with"
      " --config.engine.weights=adapter, or remove merge/done.json and merge"
      " again"
    )
  return open_model(experiment.student, run_dir, folder=run_dir.merged)


def open_learner(experiment: Experiment, run_dir: RunDir) -> ChatModel:
  """Opens the student that a round starts from, which answers the problems.

  In a split round after the first it is the one that the round before trained.

  Raises:
    UserError: it isn't there, or as `open_student`.
  """
  number = experiment.pipeline.round
  if number == 1:
    return open_student(experiment, run_dir)
  return open_trained(experiment, run_dir.round_before(number))


def open_student(experiment: Experiment, run_dir: RunDir | None) -> ChatModel:
  """Opens the student before training, with `student.adapter` if it has one.

  Raises:
    UserError: the adapter isn't there, or as `open_model`.
  """
  student = experiment.student
  adapter = Path(student.adapter) if student.adapter else None
  if adapter is not None and not adapter.is_dir():
    raise UserError(
      f"student.adapter={adapter}: there is no such folder; name one that PEFT"
      " or trd_jax.merge wrote"
    )
  return open_model(student, run_dir, adapter=adapter)
