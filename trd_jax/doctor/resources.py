"""Room for a run: disk, shared memory, open files."""

import os
import resource
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from trd_jax.doctor import diagnosis
from trd_jax.doctor.diagnosis import Diagnosis
from trd_jax.doctor.machine import Machine
from trd_jax.experiment.experiment import Experiment

_GIB = 1 << 30
_SHARED = Path("/dev/shm")
# What a container gets unless it is given more; NCCL is known to fail in it.
_CONTAINER_DEFAULT = 64 << 20
# vLLM 0.32's queue between an engine and its workers: ten chunks of 16 MiB.
_QUEUE = 160 << 20
# Descriptors of a process of ours at rest, and of a program in its sandbox.
_FILES_AT_REST, _FILES_A_PROGRAM = 256, 16


def disk(machine: Machine) -> Diagnosis:
  """Checks that there is room for what the stages write."""
  from trd_jax.pipeline import dry_run

  e, workdir = machine.experiment, machine.workdir
  disks: dict[Path, dict[str, int | None]] = {workdir.root: {}}
  if machine.has_config:
    disks = dry_run.by_disk(e, workdir, [])
  judged = [
    judge_disk(
      where,
      dry_run.free_bytes(where),
      needed,
      dry_run.elsewhere(where, e, workdir),
    )
    for where, needed in disks.items()
  ]
  # The workdir's comes first.
  return next((one for one in judged if one.status == "failed"), judged[0])


def judge_disk(
  where: Path,
  free: int,
  needed: Mapping[str, int | None],
  elsewhere: str = "name a --workdir elsewhere",
) -> Diagnosis:
  """Judges the free bytes of a disk that stages write on.

  Args:
    where: a folder on it, as the workdir, which need not be there.
    free: bytes.
    needed: by stage, the most that it writes; None where nobody knows. Empty
      without a config: then only a full disk is wrong.
    elsewhere: what has it written on another disk.
  """
  message = f"{free / _GIB:.1f} GiB are free where {where.absolute()} is"
  known = {stage: size for stage, size in needed.items() if size is not None}
  total = sum(known.values())
  # Without a config nothing is known of what is needed: only a disk with less
  # than a MiB is surely too full.
  if not needed and not free >> 20:
    return diagnosis.failed(message, f"make room, or {elsewhere}")
  if total > free:
    most = max(known, key=lambda stage: known[stage])
    return diagnosis.failed(
      f"{message}, and all stages write up to {total / _GIB:.2f} GiB, most of"
      f" it {most} ({known[most] / _GIB:.2f})",
      f"make room, or {elsewhere}",
    )
  if needed:
    message += f"; all stages write at most {total / _GIB:.2f} GiB"
    if rest := [stage for stage, size in needed.items() if size is None]:
      message += f", but for {', '.join(rest)}, of which nothing is known here"
  return diagnosis.ok(message)


def shared_memory(machine: Machine) -> Diagnosis:
  """Checks the size of /dev/shm."""
  try:
    usage = shutil.disk_usage(_SHARED)
  except OSError as error:
    return diagnosis.failed(
      f"{_SHARED}: {error.strerror}",
      "mount it (a container: docker run --ipc=host)",
    )
  needed = shared_memory_needed(
    machine.experiment, len(machine.gpus.visible) > 1
  )
  return judge_shared_memory(usage.total, usage.free, needed)


def without_shared_memory(machine: Machine) -> str:
  """Says that this system has no /dev/shm, or ''."""
  del machine
  return "" if sys.platform == "linux" else f"no {_SHARED} on {sys.platform}"


def shared_memory_needed(e: Experiment, several: bool) -> int:
  """Returns how many bytes of shared memory are needed.

  An engine with GPUs of its own has workers, and a queue to those of each copy,
  where it takes more than one GPU.

  Args:
    e: the experiment.
    several: whether there is more than one GPU.
  """
  gpus = e.engine.chosen.gpus
  needed = _CONTAINER_DEFAULT + 1 if several else 0
  if gpus is not None and gpus.count > 1:
    needed = max(needed, _QUEUE * gpus.copies)
  return needed


def judge_shared_memory(total: int, free: int, needed: int) -> Diagnosis:
  """Judges the bytes of /dev/shm."""
  message = f"{_SHARED} has {total / _GIB:.2f} GiB, {free / _GIB:.2f} free"
  remedy = "give the container more: docker run --ipc=host, or --shm-size=16g"
  if free < needed or not free:
    return diagnosis.failed(
      f"{message}, and NCCL and vLLM's processes need {needed / _GIB:.2f}",
      remedy,
    )
  if free <= _CONTAINER_DEFAULT:
    return diagnosis.warning(f"{message}: too little for several GPUs", remedy)
  return diagnosis.ok(message)


def open_files(machine: Machine) -> Diagnosis:
  """Checks the limit on open files."""
  limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  return judge_open_files(limit, most, machine.experiment)


def judge_open_files(
  limit: int, most: int, experiment: Experiment
) -> Diagnosis:
  """Judges the soft limit on open files; `most` is the hard one."""
  programs = experiment.sandbox.workers or os.cpu_count() or 1
  needed = _FILES_AT_REST + _FILES_A_PROGRAM * programs
  needed += experiment.engine.chosen.connections
  if limit in (resource.RLIM_INFINITY, -1) or limit >= needed:
    return diagnosis.ok(f"{limit} at once, {needed} are enough here")
  advice = f"ulimit -n {max(needed, 4096)}"
  if most not in (resource.RLIM_INFINITY, -1) and most < needed:
    advice += f", which root has to allow first (at most {most} now)"
  return diagnosis.failed(
    f"{limit} at once, and {needed} may be needed", advice
  )
