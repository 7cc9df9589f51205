"""Who learns and who teaches: the two models on disk, and what they share."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax

from trd_jax.data import vocabulary
from trd_jax.data.chat import Chat
from trd_jax.distill import processes
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.schema import Model
from trd_jax.model import backend, float8
from trd_jax.model.attention import choice
from trd_jax.model.attention.choice import Choice
from trd_jax.model.config import ModelConfig
from trd_jax.model.weights import hf
from trd_jax.model.weights.model_files import ModelFiles


class ChatModel(Protocol):
  """What is read of a model that was found; `generation.ChatModel` has it."""

  @property
  def files(self) -> ModelFiles:
    """Returns the weights on disk."""
    ...

  @property
  def chat(self) -> Chat:
    """Returns tokenizer and template."""
    ...


@dataclasses.dataclass(frozen=True)
class Pair:
  """A student and a teacher that speak in the same ids.

  Attributes:
    student: the student on disk.
    teacher: the teacher on disk; in OPSD the student's base.
    chats: tokenizer and template of the student and of the teacher.
    configs: their shapes.
    attention: what computes it in both, and whether rows are shared.
  """

  student: ModelFiles
  teacher: ModelFiles
  chats: tuple[Chat, Chat]
  configs: tuple[ModelConfig, ModelConfig]
  attention: Choice


def find(
  experiment: Experiment,
  open_model: Callable[[Model], ChatModel],
  stage: str = "train",
) -> Pair:
  """Finds both models, sees that they fit, and settles their attention.

  Args:
    experiment: its models, and `train.attention`, `train.packing` and
      `train.teacher_dtype`.
    open_model: finds the model of a section, with its chat template.
    stage: that asks, for what is printed.

  Raises:
    UserError: a model is missing or damaged, they don't fit each other, or the
      attention or the teacher's dtype can't be used here.
  """
  train = experiment.train
  teacher_section = experiment.teacher_model
  if experiment.regime == "opd" and not experiment.reads_own_teacher:
    # Nobody reads it, so it need not be there.
    teacher_section = experiment.student
  sections = experiment.student, teacher_section
  platform = jax.default_backend()
  idle = processes.idle_gpus(jax.local_device_count())
  if platform == "gpu" and idle:
    print(f"{stage}: note: {idle}", flush=True)
  dtypes = [section.dtype for section in sections]
  if train.teacher_dtype == "float8":
    setting = f"train.teacher_dtype={train.teacher_dtype}"
    float8.check_devices(jax.local_devices(), setting)
  backend.exact_products(platform, dtypes)
  chosen = choice.choose(
    train.attention, train.packing, platform=platform, dtypes=dtypes
  )

  student, teacher = (open_model(section) for section in sections)
  chats = student.chat, teacher.chat
  # A teacher that only writes may have other ids and another shape: then the
  # student's own stands in its place.
  scores = experiment.context_of_teacher is not None
  scorer = teacher if scores else student
  configs = (
    hf.read_config(student.files.folder),
    hf.read_config(scorer.files.folder),
  )
  if scores:
    vocabulary.check_same([section.path for section in sections], list(chats))
  _, note = vocabulary.shared_rows([config.vocab_size for config in configs])
  if note:
    print(f"{stage}: {note}", flush=True)

  # Tried on the devices with the models' own shapes: a kernel may not do here.
  attention = choice.settle(
    chosen, train.attention, train.packing, configs, processes.all_agree
  )
  rows = "several samples" if attention.packing else "one sample"
  print(
    f"{stage}: attention {attention.implementation}, {rows} a row"
    f" ({attention.why})",
    flush=True,
  )
  return Pair(student.files, scorer.files, chats, configs, attention)
