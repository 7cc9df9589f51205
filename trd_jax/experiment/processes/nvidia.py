"""Finds the NVIDIA GPUs of this machine, without JAX and without CUDA."""

import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from trd_jax.experiment.processes import commands

_SMI = "nvidia-smi"
_SECONDS = 30
_FIELDS = "index,uuid,name,driver_version,memory.total,memory.free"
_APPS = "gpu_uuid,pid,process_name,used_memory"
_CAPABILITIES = "index,uuid,name,compute_cap"
_FLOAT8 = (8, 9)
FLOAT8_GPUS = (
  "NVIDIA GPUs of compute capability"
  f" {'.'.join(map(str, _FLOAT8))} or more (Ada, Hopper)"
)
"""Those that multiply in eight bits, in words."""
_GPU_LINE = re.compile(r"GPU (\d+): (.+?)(?: \(UUID: (.+)\))?$", re.M)


@dataclasses.dataclass(frozen=True)
class Gpu:
  """A GPU.

  Attributes:
    index: nvidia-smi's number.
    uuid: its name in the driver.
    kind: its product's name.
    total: bytes of its memory; None where nobody says.
    free: bytes of it that are free.
  """

  index: int
  uuid: str
  kind: str
  total: int | None = None
  free: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
  """The GPUs of this machine, and what nvidia-smi says of them.

  Attributes:
    there: whether there is an nvidia-smi.
    failure: why it gave no answer; '' where it did.
    gpus: all GPUs of the machine; without an nvidia-smi the same as `visible`.
    visible: the GPUs that `CUDA_VISIBLE_DEVICES` leaves; without an nvidia-smi
      they are counted by their device files.
    driver: its version; '' where nobody says.
    cuda: the newest CUDA that the driver runs.
    holders: by GPU's uuid, who holds memory of it: 'NAME (process 12)'.
  """

  there: bool
  failure: str = ""
  gpus: tuple[Gpu, ...] = ()
  visible: tuple[Gpu, ...] = ()
  driver: str = ""
  cuda: str = ""
  holders: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def ask() -> Report:
  """Asks nvidia-smi for the GPUs, their memory and who holds it."""
  if shutil.which(_SMI) is None:
    listed = tuple(Gpu(i, name, "") for i, name in enumerate(names()))
    return Report(False, gpus=listed, visible=listed)
  said, failure = _run(
    f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"
  )
  gpus, driver = read_query(said)
  if not gpus:
    # Where the query fails -L may still answer, though it tells no memory.
    said, other = _run("-L")
    gpus, failure = read_list(said), "" if not other else failure or other
  if not gpus:
    return Report(True, failure or "it lists no GPU")
  head, _ = _run()
  version = re.search(r"CUDA Version: *([\d.]+)", head)
  apps, _ = _run(f"--query-compute-apps={_APPS}", "--format=csv,noheader")
  return Report(
    True,
    gpus=gpus,
    visible=visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES")),
    driver=driver,
    cuda=version[1] if version else "",
    holders=read_apps(apps),
  )


def capabilities() -> dict[str, str]:
  """Asks nvidia-smi for the compute capability of each kind of GPU.

  Returns:
    By the product's name, as "9.0", of those that `CUDA_VISIBLE_DEVICES`
    leaves; nothing where nobody says.
  """
  if shutil.which(_SMI) is None:
    return {}
  said, _ = _run(f"--query-gpu={_CAPABILITIES}", "--format=csv,noheader")
  found = {}
  for line in said.splitlines():
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) == len(_CAPABILITIES.split(",")) and cells[0].isdecimal():
      index, uuid, kind, capability = cells
      found[Gpu(int(index), uuid, kind)] = capability
  shown = visible(tuple(found), os.environ.get("CUDA_VISIBLE_DEVICES"))
  return {gpu.kind: found[gpu] for gpu in shown}


def has_float8(capability: str) -> bool:
  """Returns whether GPUs of a compute capability multiply in eight bits.

  Args:
    capability: as "9.0"; what isn't NVIDIA's has another form.
  """
  try:
    return tuple(map(int, capability.split("."))) >= _FLOAT8
  except ValueError:
    return False


def read_query(text: str) -> tuple[tuple[Gpu, ...], str]:
  """Returns the GPUs and the driver's version of a --query-gpu."""
  gpus, driver = [], ""
  for line in text.splitlines():
    cells = [cell.strip() for cell in line.split(",")]
    # Other lines may come on the same output, such as warnings.
    if len(cells) != len(_FIELDS.split(",")) or not cells[0].isdecimal():
      continue
    index, uuid, kind, driver, total, free = cells
    gpus.append(
      Gpu(int(index), uuid, kind, _mebibytes(total), _mebibytes(free))
    )
  return tuple(gpus), driver


def read_list(text: str) -> tuple[Gpu, ...]:
  """Returns the GPUs of nvidia-smi -L, which tells no memory."""
  return tuple(
    Gpu(int(index), uuid, kind) for index, kind, uuid in _GPU_LINE.findall(text)
  )


def read_apps(text: str) -> dict[str, tuple[str, ...]]:
  """Returns who holds memory, by GPU, of a --query-compute-apps."""
  holders: dict[str, tuple[str, ...]] = {}
  for line in text.splitlines():
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) == len(_APPS.split(",")):
      uuid, pid, name, used = cells
      who = f"{os.path.basename(name)} (process {pid}, {used})"
      holders[uuid] = (*holders.get(uuid, ()), who)
  return holders


def shown(variable: str | None) -> list[str] | None:
  """Returns the GPUs' names in `CUDA_VISIBLE_DEVICES`; None for no limit.

  They are numbers or beginnings of uuids. CUDA reads up to the first word that
  is neither.
  """
  if variable is None:
    return None
  words = []
  # Read as CUDA reads it, or a GPU would be counted that no program sees.
  for word in map(str.strip, variable.split(",")):
    if not re.fullmatch(r"\d+|(GPU|MIG)-\S+", word):
      break
    words.append(word)
  return words


def visible(gpus: Sequence[Gpu], variable: str | None) -> tuple[Gpu, ...]:
  """Returns the GPUs that CUDA shows, in its order.

  Args:
    gpus: all of them.
    variable: the value of CUDA_VISIBLE_DEVICES.
  """
  words = shown(variable)
  if words is None:
    return tuple(gpus)
  seen: list[Gpu] = []
  for word in words:
    matches = [
      gpu
      for gpu in gpus
      if (word == str(gpu.index) if word.isdecimal() else _named(gpu, word))
    ]
    # As CUDA does: the first name that fits no GPU ends the list.
    if not matches:
      break
    seen.append(matches[0])
  return tuple(seen)


def names(dev: Path = Path("/dev")) -> list[str]:
  """Returns the GPUs that this process may use, without asking the driver.

  Args:
    dev: where the system's device files are.

  Returns:
    Their names in `CUDA_VISIBLE_DEVICES`, or else their numbers; none where
    the machine has no GPU, or an empty list hides them.
  """
  # Device files are /dev/nvidia0, …; nvidiactl and others are no GPUs.
  files = [x.name.removeprefix("nvidia") for x in dev.glob("nvidia*")]
  there = sorted(filter(str.isdecimal, files), key=int)
  chosen = shown(os.environ.get("CUDA_VISIBLE_DEVICES"))
  return there if chosen is None or not there else chosen


def _named(gpu: Gpu, word: str) -> bool:
  return bool(gpu.uuid) and gpu.uuid.startswith(word)


def _mebibytes(text: str) -> int | None:
  return int(text) << 20 if text.isdecimal() else None


def _run(*arguments: str) -> tuple[str, str]:
  """Returns what nvidia-smi printed, and how it failed, if it did."""
  try:
    answer = commands.ask([_SMI, *arguments], _SECONDS)
  except subprocess.TimeoutExpired:
    return "", f"no answer in {_SECONDS} s"
  except OSError as error:
    return "", str(error.strerror)
  if answer.code:
    said = (answer.err.strip() or answer.out.strip()).splitlines()
    return "", f"exit code {answer.code}: {(said or ['no word'])[0][:200]}"
  return answer.out, ""
