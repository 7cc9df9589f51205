"""Student and teacher, opened before anything starts: config, tokenizer, files.

A folder is opened whole but for the tensors themselves. Of a hub id nothing is
fetched to look at it: what is cached is read, and of the rest the hub is asked
by one small request. Only `fetch` brings config and tokenizer, not the weights.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from trd_jax.data import prompts, vocabulary
from trd_jax.data.chat import Chat
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.files.json_files import read_object
from trd_jax.experiment.findings import Finding
from trd_jax.experiment.methods import DIVERGENCES
from trd_jax.experiment.processes import nvidia
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Model
from trd_jax.model.config import ARCHITECTURES, ModelConfig
from trd_jax.model.known import KNOWN_MODELS, SIZES
from trd_jax.model.weights import hub, hub_look, peft
from trd_jax.model.weights.model_folder import CONFIG, read_config
from trd_jax.model.weights.tensor_files import INDEX, TensorFiles
from trd_jax.model.weights.tensor_table import entries

_RANDOM, _LAB = "random:", "lab:"


@dataclasses.dataclass
class Opened:
  """What is known of a model.

  Attributes:
    side: student or teacher.
    path: as the config says it.
    config: its shape, if known.
    chat: its tokenizer and template, if at hand.
    missing: what can't be seen because the hub can't be asked.
    unchecked: what can't be seen without fetching it.
  """

  side: str
  path: str
  config: ModelConfig | None = None
  chat: Chat | None = None
  missing: list[str] = dataclasses.field(default_factory=list)
  unchecked: list[str] = dataclasses.field(default_factory=list)

  def findings(self) -> Iterator[Finding]:
    """Yields what there is to say of a model."""
    parts = [self.path]
    if self.config is not None:
      parts.append(self.config.architecture)
      parts.append(f"{self.config.max_positions:,} positions")
    if self.chat is not None:
      parts.append(f"{self.chat.vocab_size:,} ids")
    if self.missing:
      yield from (Finding(self.side, "missing", why) for why in self.missing)
    else:
      yield Finding(self.side, "ok", ", ".join(parts))
    yield from (Finding(self.side, "unchecked", why) for why in self.unchecked)


def open_model(side: str, model: Model, run_dir: RunDir, fetch: bool) -> Opened:
  """Finds a model and opens its config, its files and its tokenizer.

  Args:
    side: the section that names it, student or teacher.
    model: that section.
    run_dir: for models that live there.
    fetch: whether to download the small files of a hub id.

  Raises:
    UserError: there is none, it isn't whole, its architecture is none of ours,
      or its tokenizer doesn't fit it.
  """
  opened = Opened(side, model.path)
  if model.path.startswith(_RANDOM):
    folder = _random(opened, model, run_dir)
  elif hub.is_hub_id(model.path):
    folder = _of_hub(opened, model, fetch)
  else:
    folder = hub.model_folder(model.path, run_dir)
    opened.config = _whole(folder)
    if model.revision is not None and not model.path.startswith(_LAB):
      opened.unchecked.append(
        f"{side}.revision={model.revision} is not read, as {model.path} is a"
        " folder"
      )
  tokenizer = folder
  if model.tokenizer is not None:
    tokenizer = _tokenizer(opened, model.tokenizer, run_dir, fetch)
  if tokenizer is not None and (tokenizer / "tokenizer.json").is_file():
    opened.chat = Chat.load(tokenizer, model.chat_template)
  elif folder is not None and model.tokenizer is None and not opened.missing:
    hub.tokenizer_folder(str(folder))  # which says what it lacks
  if opened.chat is None and not opened.missing:
    opened.unchecked.append(
      f"the ids of {model.tokenizer_path}, whose tokenizer is to be fetched"
    )
  if opened.chat is not None and opened.config is not None:
    rows = opened.config.vocab_size
    vocabulary.check_head(opened.chat, rows, tokenizer or "", model.path)
  return opened


def compare(
  experiment: Experiment, student: Opened, teacher: Opened
) -> Iterator[Finding]:
  """Checks that two models speak in the same ids, and each in its mode.

  Args:
    experiment: its thinking keys.
    student: the student.
    teacher: the same in OPSD.

  Raises:
    UserError: ids differ, or a template hasn't the mode that a key asks for.
  """
  e = experiment
  writes = e.teacher_writes is not None
  teaches = e.refine.thinking if writes else e.teacher_model.thinking
  for opened, mode in ((student, e.student.thinking), (teacher, teaches)):
    if opened.chat is not None:
      opened.chat.thinks(mode)
  if student is teacher:
    return
  sides = (student, teacher)
  chats = [one.chat for one in sides if one.chat is not None]
  configs = [one.config for one in sides if one.config is not None]
  if len(chats) == len(configs) == len(sides):
    rows = [config.vocab_size for config in configs]
    if e.context_of_teacher is None and not chats[0].same_ids(chats[1]):
      message = (
        f"{teacher.path} gives other ids than {student.path}, and only writes:"
        " its text is made into the student's"
      )
      yield Finding("vocabulary", "ok", message)
      return
    vocabulary.check_same([one.path for one in sides], chats)
    message = "student and teacher give the same ids"
    _, note = vocabulary.shared_rows(rows)
    yield Finding("vocabulary", "ok", f"{message}; {note}" if note else message)
  else:
    message = "whether student and teacher give the same ids"
    yield Finding("vocabulary", "unchecked", message)


def system_turn(experiment: Experiment, opened: Opened) -> list[Finding]:
  """Checks that a model's template has the system turn of the prompt set.

  Raises:
    UserError: it has none.
  """
  try:
    said = prompts.load(experiment.prompts.set)
  except UserError:
    return []  # which is another finding
  if opened.chat is not None and said.system_of(experiment.domain) is not None:
    opened.chat.check_system()
  return []


def budgets(
  experiment: Experiment, student: Opened, teacher: Opened
) -> Iterator[Finding]:
  """Says which budgets exceed a model's positions."""
  e = experiment
  generating = [
    ("rollout", e.rollout, student),
    ("evaluate", e.evaluate, student),
  ]
  if e.teacher_writes is not None:
    generating.insert(1, ("refine", e.refine, teacher))
  # Notes and no refusals: what is too long is cut or set aside row by row, and
  # most rows may be short.
  for stage, section, opened in generating:
    if opened.config is None:
      continue
    room = opened.config.max_positions
    prompt, response = section.max_prompt_tokens, section.max_response_tokens
    if prompt >= room:
      message = (
        f"{stage}.max_prompt_tokens={prompt:,} lets prompts fill the {room:,}"
        f" positions of {opened.path}, and one that does is refused"
      )
      yield Finding("budgets", "note", message)
    elif prompt + response > room:
      message = (
        f"{stage}: after prompts of {room - response:,} tokens or more a"
        f" response of {response:,} passes the {room:,} positions of"
        f" {opened.path} and is cut there"
        if response < room
        else f"{stage}.max_response_tokens={response:,} is more than the"
        f" {room:,} positions of {opened.path} hold, where responses are cut"
      )
      yield Finding("budgets", "note", message)
  for side, bound in (
    (student, e.train.max_student_tokens),
    (teacher, e.train.max_teacher_tokens),
  ):
    if side.config is not None and bound > side.config.max_positions:
      message = (
        f"train.max_{side.side}_tokens={bound:,} lets samples pass the"
        f" {side.config.max_positions:,} positions of {side.path}"
      )
      yield Finding("budgets", "note", message)


def adapter(experiment: Experiment, student: Opened) -> Iterator[Finding]:
  """Opens the adapter that the student has from the start.

  Raises:
    UserError: there is none, or it fits neither base nor training.
  """
  path = experiment.student.adapter
  if path is None:
    return
  folder = Path(path)
  if not folder.is_dir():
    raise UserError(
      f"student.adapter={path}: there is no such folder; name one that PEFT"
      " or trd_jax.merge wrote"
    )
  # Without the base's shape only the adapter's own config can be looked at.
  if student.config is None:
    lora, _ = peft.read_peft_config(folder)
  else:
    lora, _ = peft.open_adapter(folder, student.config)
  peft.check_size(path, lora, experiment.lora)
  yield Finding("adapter", "ok", path)


def sizes(experiment: Experiment, student: Opened) -> Iterator[Finding]:
  """Compares numbers of the config with the size of the student.

  Raises:
    UserError: as many of the likeliest tokens are asked for as there are ids.
  """
  e, config = experiment, student.config
  if config is None:
    return
  ids = config.vocab_size if student.chat is None else student.chat.vocab_size
  asked = {"refine.teacher_top_k": e.refine.teacher_top_k}
  parameters = DIVERGENCES[e.coordinates.divergence].read(e.loss)
  if "top_k" in parameters:
    asked["loss.top_k"] = parameters["top_k"]
  for name, k in asked.items():
    if k >= ids:
      raise UserError(
        f"{name}={k:,} and {student.path} has {ids:,} ids: the likeliest would"
        f" be all of them; ask for less than {ids:,}"
      )
  if e.lora.rank > config.hidden_size:
    message = (
      f"lora.rank={e.lora.rank:,} is more than {student.path} is wide"
      f" ({config.hidden_size:,}): the adapter has more numbers than what it"
      " changes"
    )
    yield Finding("adapter", "note", message)


def unmerged(experiment: Experiment, dev: Path = Path("/dev")) -> list[Finding]:
  """Notes what the engine refuses on GPUs, hours later, as vLLM an adapter.

  A note and no mistake: vLLM's CPU build, which may run on a machine with GPUs,
  takes such an adapter.

  Args:
    experiment: how the trained student is evaluated.
    dev: where the system's device files are.
  """
  refused = list(experiment.engine.chosen.contradictions_on_gpus(experiment))
  if not refused or not nvidia.names(dev):
    return []
  return [Finding("adapter", "note", one) for one in refused]


def float8() -> list[Finding]:
  """Notes GPUs of this machine that can't multiply in eight bits.

  A note, because the training may use others, or none.
  """
  return [
    Finding(
      "teacher",
      "note",
      f"train.teacher_dtype=float8 needs {nvidia.FLOAT8_GPUS}, and {kind} has"
      f" {capability}: training will refuse it here",
    )
    for kind, capability in nvidia.capabilities().items()
    if not nvidia.has_float8(capability)
  ]


def _whole(folder: Path) -> ModelConfig:
  """Reads the shape of a model whose files are all there.

  Raises:
    UserError: a tensor is missing.
  """
  config = read_config(folder)
  # By the names in the headers: no tensor is read.
  files = TensorFiles(folder)
  for entry in entries(config):
    if entry.name not in files:
      raise UserError(
        f"{folder}: tensor {entry.name} is missing; fetch the checkpoint again"
      )
  return config


def _random(opened: Opened, model: Model, run_dir: RunDir) -> Path | None:
  """Finds the folder of a model that `convert` makes, if it has made it."""
  size = model.path.removeprefix(_RANDOM)
  if size not in SIZES:
    raise UserError(
      f"{opened.side}.path={model.path}: there is no random model of that size;"
      f" sizes: {', '.join(SIZES)}"
    )
  folder = run_dir.model_folder_for_random(size)
  if (folder / CONFIG).is_file():
    opened.config = _whole(folder)
    return folder
  if model.tokenizer is None:
    raise UserError(
      f"{opened.side}.path={model.path} has no tokenizer of its own; set"
      f" {opened.side}.tokenizer to a folder or a hub id"
    )
  opened.config = SIZES[size]
  return None


def _of_hub(opened: Opened, model: Model, fetch: bool) -> Path | None:
  """Finds what of a hub id is on this machine, in the end."""
  key, path = f"{opened.side}.path={model.path}", model.path
  folder = hub_look.cached(path, model.revision)
  # What is cached and whole is used as it is: no network is needed for a run
  # that was prepared.
  if folder is not None and _is_whole(folder, model.tokenizer is None):
    opened.config = read_config(folder)
    return folder
  listing = _listing(opened, path, model.revision, key)
  if listing is not None:
    wanted = [CONFIG, "*.safetensors"]
    wanted += ["tokenizer.json"] if model.tokenizer is None else []
    for pattern in wanted:
      if not listing.has(pattern):
        raise UserError(
          f"{key} on the hub has no {pattern} (pickled .bin files are never"
          " read); name another checkpoint"
        )
    names = listing.architectures
    if names and not set(names) & ARCHITECTURES.keys():
      raise UserError(
        f"{key} is a {', '.join(names)}, which is not supported; use a dense"
        f" checkpoint of {', '.join(ARCHITECTURES)}"
      )
    if fetch:
      files = hub.TOKENIZER_FILES
      folder = hub.model_folder(path, None, model.revision, files)
      _check_index(folder, listing, key)
  if folder is not None and (folder / CONFIG).is_file():
    opened.config = read_config(folder)
  else:
    # Nothing of it is here yet: what is known of the public models is enough
    # for budgets and sizes.
    opened.config = KNOWN_MODELS.get(path)
  return folder


def _is_whole(folder: Path, with_tokenizer: bool) -> bool:
  """Returns whether all files of a model have been downloaded."""
  try:
    _whole(folder)
  except UserError:
    return False
  return not with_tokenizer or (folder / "tokenizer.json").is_file()


def _listing(
  opened: Opened, path: str, revision: str | None, key: str
) -> hub_look.Listing | None:
  """Asks the hub what a repository holds; None where it can't be asked.

  Raises:
    UserError: it has none of that name; a name that is near is added.
  """
  names = [*KNOWN_MODELS, *hub_look.known()]
  hint = hub.near_folder(path) or hub.nearest(path, names)
  try:
    return hub_look.look(path, revision, "model", key)
  except hub_look.Unreachable as error:
    # A folder's name mistyped looks like a hub id: offline, that is the
    # likelier mistake.
    if hub.near_folder(path):
      raise UserError(f'{key} is no folder; did you mean "{hint}"?') from None
    opened.missing.append(
      f"{key} is not on this machine, and the hub can't be asked ({error})"
    )
    return None
  except UserError as error:
    if hint and hint != path:
      raise UserError(f'{error}; did you mean "{hint}"?') from None
    raise


def _check_index(folder: Path, listing: hub_look.Listing, key: str) -> None:
  """Checks that the hub has all files that the index of weights names."""
  # An upload that isn't complete shows here, before its gigabytes are fetched.
  if not (folder / INDEX).is_file():
    return
  names = read_object(folder / INDEX).get("weight_map")
  for name in sorted(set(names.values())) if isinstance(names, dict) else ():
    if name not in listing.files:
      raise UserError(
        f"{key} on the hub lacks {name}, which its index names; name another"
        " revision or checkpoint"
      )


def _tokenizer(
  opened: Opened, path: str, run_dir: RunDir, fetch: bool
) -> Path | None:
  """Finds the folder of a tokenizer named beside the model, if at hand."""
  if not hub.is_hub_id(path):
    return hub.tokenizer_folder(path, run_dir)
  folder = hub_look.cached(path, None)
  if folder is not None and (folder / "tokenizer.json").is_file():
    return folder
  key = f"{opened.side}.tokenizer={path}"
  listing = _listing(opened, path, None, key)
  if listing is None:
    return None
  if not listing.has("tokenizer.json"):
    raise UserError(f"{key} on the hub has no tokenizer.json; name another")
  return hub.tokenizer_folder(path, run_dir) if fetch else None
