"""What nvidia-smi tells of the GPUs."""

import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Sequence

_SECONDS = 30
_FIELDS = "index,uuid,name,driver_version,memory.total,memory.free"
_APPS = "gpu_uuid,pid,process_name,used_memory"
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
  """What there is.

  Attributes:
    there: whether there is an nvidia-smi.
    failure: why it gave no answer; '' where it did.
    gpus: all of the machine.
    visible: those that `CUDA_VISIBLE_DEVICES` leaves.
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
  """Returns what nvidia-smi says now."""
  if shutil.which("nvidia-smi") is None:
    return Report(False)
  said, failure = _run(
    f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"
  )
  gpus, driver = read_query(said)
  if not gpus:
    said, other = _run("-L")
    gpus, failure = read_list(said), "" if not other else failure or other
  if not gpus:
    return Report(True, failure or "it lists no GPU")
  head, _ = _run()
  found = re.search(r"CUDA Version: *([\d.]+)", head)
  apps, _ = _run(f"--query-compute-apps={_APPS}", "--format=csv,noheader")
  return Report(
    True,
    gpus=gpus,
    visible=visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES")),
    driver=driver,
    cuda=found[1] if found else "",
    holders=read_apps(apps),
  )


def read_query(text: str) -> tuple[tuple[Gpu, ...], str]:
  """Returns the GPUs and the driver's version of a --query-gpu."""
  gpus, driver = [], ""
  for line in text.splitlines():
    cells = [cell.strip() for cell in line.split(",")]
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


def visible(gpus: Sequence[Gpu], variable: str | None) -> tuple[Gpu, ...]:
  """Returns the GPUs that CUDA shows, in its order.

  Args:
    gpus: all of them.
    variable: the value of CUDA_VISIBLE_DEVICES: numbers or beginnings of
      uuids, up to the first that isn't there; None for no limit.
  """
  if variable is None:
    return tuple(gpus)
  seen: list[Gpu] = []
  for word in filter(None, map(str.strip, variable.split(","))):
    found = [
      gpu
      for gpu in gpus
      if (word == str(gpu.index) if word.isdecimal() else _named(gpu, word))
    ]
    if not found:
      break
    seen.append(found[0])
  return tuple(seen)


def _named(gpu: Gpu, word: str) -> bool:
  return bool(gpu.uuid) and gpu.uuid.startswith(word)


def _mebibytes(text: str) -> int | None:
  return int(text) << 20 if text.isdecimal() else None


def _run(*arguments: str) -> tuple[str, str]:
  """Returns what nvidia-smi printed, and how it failed, if it did."""
  try:
    done = subprocess.run(
      ["nvidia-smi", *arguments],
      capture_output=True,
      text=True,
      timeout=_SECONDS,
      check=False,
    )
  except subprocess.TimeoutExpired:
    return "", f"no answer in {_SECONDS} s"
  except OSError as error:
    return "", str(error.strerror)
  if done.returncode:
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return "", f"exit code {done.returncode}: {(said or ['no word'])[0][:200]}"
  return done.stdout, ""
