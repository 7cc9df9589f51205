"""What a config asks of a machine: devices, memory, interpreters, a workdir."""

import dataclasses
import math
import os
import shutil
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Mapping

from trd_jax import experiment
from trd_jax.devices import Mesh
from trd_jax.doctor import finding
from trd_jax.doctor.finding import Finding
from trd_jax.doctor.machine import Machine
from trd_jax.experiment import Experiment

_GIB = 1 << 30
_WIDTHS = {"float32": 4, "bfloat16": 2}
# As in `mesh_choice`: activations and what allocators lose need the rest.
_SHARE = 0.9
_SECONDS = 60
_ANSWER_SECONDS = 5.0
_FIND = (
  "import importlib.util as u, sys; sys.exit(u.find_spec('trd_jax') is None)"
)


def without_config(machine: Machine) -> str:
  """Says that there is no config to look into, or ''."""
  return "" if machine.has_config else "no --config"


def engine_devices(machine: Machine) -> Finding:
  """Checks that there are as many GPUs as the engine wants."""
  return judge_engine_devices(
    machine.experiment, len(machine.gpus.visible) or machine.vllm_gpus
  )


def judge_engine_devices(e: Experiment, gpus: int) -> Finding:
  """Judges the engine's number of devices against that of GPUs here."""
  if e.engine.name != "vllm":
    return finding.ok(f"engine.name={e.engine.name} takes what there is")
  vllm, actors = e.engine.vllm, e.engine.ray.actors
  wanted = vllm.tensor_parallel * vllm.data_parallel * max(actors, 1)
  told = (
    f"vLLM wants {wanted} (engine.vllm.tensor_parallel={vllm.tensor_parallel},"
    f" data_parallel={vllm.data_parallel}, engine.ray.actors={actors})"
  )
  if actors and e.engine.ray.address is not None:
    return finding.ok(f"{told}, of the Ray cluster's")
  here = "and one GPU is here" if gpus == 1 else f"and {gpus} GPUs are here"
  if wanted > max(gpus, 1):
    return finding.failed(
      f"{told}, {here}",
      "lower them (configs/opd.py and opsd.py: :gpus=N), or show it more GPUs",
    )
  if wanted < gpus:
    return finding.warning(
      f"{told}, {here}: the others stay idle",
      f"raise engine.vllm.data_parallel to {gpus // vllm.tensor_parallel}",
    )
  return finding.ok(f"{told}, {here}" if gpus else f"{told}: this computer")


def mesh(machine: Machine) -> Finding:
  """Checks that the mesh fits JAX's devices.

  Raises:
    UserError: it doesn't.
  """
  devices = len(machine.jax.get("kinds", ()))
  section = machine.experiment
  processes = section.distributed.processes or 1
  return judge_mesh(section.mesh, devices, processes)


def judge_mesh(section: Mesh, devices: int, processes: int) -> Finding:
  """Judges the mesh's sizes.

  Args:
    section: the config's.
    devices: of this process.
    processes: how many processes train together, with as many devices each.
  """
  if not devices:
    return finding.failed(
      "JAX sees no device, so that there is none to train on",
      "mend what the check gpus says",
    )
  total = devices * processes
  sizes = section.sizes
  if sizes is None:
    return finding.ok(f"{total} devices; the sizes of the models choose")
  axes = zip(("data", "fsdp", "tensor"), sizes, strict=True)
  told = ", ".join(f"mesh.{name}={size}" for name, size in axes)
  fixed = math.prod(size for size in sizes if size != -1)
  fits = total % fixed == 0 if -1 in sizes else fixed <= total
  told = f"{told}: {'a multiple of ' if -1 in sizes else ''}{fixed} devices"
  told += f" of {total} here"
  if not fits:
    return finding.failed(told, "choose smaller sizes, or -1 for the rest")
  if -1 not in sizes and fixed < total:
    return finding.warning(
      f"{told}; the others stay idle", "set one of them to -1, the rest"
    )
  return finding.ok(told)


def memory(machine: Machine) -> Finding:
  """Checks that the weights fit into the devices."""
  from trd_jax import dry_run

  e = machine.experiment
  sizes = {}
  for side, model in (("student", e.student), ("teacher", e.teacher_model)):
    shape = dry_run.shape_of(model, machine.workdir)
    sizes[side] = (
      None if shape is None else shape.num_parameters() * _WIDTHS[model.dtype]
    )
  if e.regime == "opsd":
    del sizes["teacher"]
  on_gpus = machine.on_gpus or machine.vllm_gpus > 0
  totals = [gpu.total for gpu in machine.gpus.visible if gpu.total]
  totals = totals or [size for size in machine.jax.get("bytes", ()) if size]
  if on_gpus and totals:
    return judge_memory(e, sizes, min(totals), len(totals), "a GPU")
  if on_gpus:
    return finding.warning(
      "nvidia-smi doesn't say how much memory a GPU has",
      "see nvidia-smi itself",
    )
  pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return judge_memory(e, sizes, pages, 1, "this computer")


def judge_memory(
  e: Experiment,
  sizes: Mapping[str, int | None],
  each: int,
  devices: int,
  where: str,
) -> Finding:
  """Judges the bytes of weights against those of devices.

  It is what can't do with less: activations, caches and the adapter come on
  top, and are counted when training starts.

  Args:
    e: the experiment.
    sizes: by side, bytes of its weights; None where nobody knows. The student
      alone where it teaches itself.
    each: bytes of the smallest device.
    devices: how many train together.
    where: what one device is.
  """
  known = {side: size for side, size in sizes.items() if size is not None}
  told = ", ".join(f"{side} {size / _GIB:.2f}" for side, size in known.items())
  told = f"weights in GiB: {told or 'not known here'}; {where} has"
  told = f"{told} {each / _GIB:.1f}"
  vllm = e.engine.vllm
  if e.engine.name == "vllm":
    for side, size in known.items():
      if size > vllm.tensor_parallel * vllm.memory_share * each:
        return finding.failed(
          f"{told}, of which vLLM takes {vllm.memory_share:.0%} for the {side}",
          f"raise engine.vllm.tensor_parallel, or set {side}.dtype=bfloat16",
        )
  # However split, all devices hold all of it. A teacher whose states are kept
  # or recorded isn't there beside the student.
  together = sum(known.values())
  if e.train.teacher != "recompute":
    together = max(known.values(), default=0)
  if together > _SHARE * each * devices:
    return finding.failed(
      f"{told}; {devices} of it hold less than {together / _GIB:.1f}",
      "use bfloat16, smaller models, train.teacher=hidden_cache, or more"
      " devices",
    )
  if len(known) < len(sizes):
    return finding.ok(f"{told}; the rest is not known before it is fetched")
  return finding.ok(told)


def servers(machine: Machine) -> Finding:
  """Checks that somebody listens at every server's address."""
  urls = machine.experiment.engine.server.urls
  for url in urls:
    parts = urllib.parse.urlsplit(url)
    port = parts.port or {"https": 443}.get(parts.scheme, 80)
    try:
      socket.create_connection((parts.hostname, port), _ANSWER_SECONDS).close()
    except OSError as error:
      return finding.failed(
        f"engine.server.urls: nobody listens at {url} ({error})",
        "start it (launch/serve.sh), or name another",
      )
  return finding.ok(f"somebody listens at {', '.join(urls)}")


def without_servers(machine: Machine) -> str:
  """Says why no server is looked at, or ''."""
  if machine.experiment.engine.name == "server":
    return ""
  return "the config generates here"


def interpreters(machine: Machine) -> Finding:
  """Checks that every stage's interpreter is there and has the package."""
  e = machine.experiment
  stages = ("evaluate", *e.stages)
  if any(
    model.path.startswith("random:") for model in (e.student, e.teacher_model)
  ):
    stages = ("convert", *stages)
  by_python: dict[str, list[str]] = {}
  for stage in stages:
    if python := e.python.of(stage):
      by_python.setdefault(python, []).append(stage)
  if not by_python:
    return finding.ok(f"all stages run with {sys.executable}")
  for python, of in by_python.items():
    if wrong := _unusable(python):
      return finding.failed(
        f"the interpreter of {', '.join(of)}: {python} {wrong}",
        "make it (for vLLM: third_party/vllm/install.sh), or name another with"
        f" --config.python.{'generation' if 'rollout' in of else of[0]}",
      )
  return finding.ok(
    ", ".join(f"{' '.join(of)}: {python}" for python, of in by_python.items())
  )


def _unusable(python: str) -> str:
  """Says what an interpreter lacks, or ''."""
  path = shutil.which(os.path.expanduser(python))
  if path is None:
    return "is not there"
  try:
    done = subprocess.run(
      [path, "-c", _FIND],
      capture_output=True,
      timeout=_SECONDS,
      check=False,
    )
  except (OSError, subprocess.TimeoutExpired) as error:
    return f"can't be run ({error})"
  return "has no trd-jax" if done.returncode else ""


def workdir(machine: Machine) -> Finding:
  """Checks that the workdir is this config's, or can be made.

  Raises:
    UserError: it isn't, or can't be written.
  """
  run_dir = machine.workdir
  kept = dataclasses.replace(machine.experiment, preflight_only=False)
  run_dir.check(experiment.to_json(kept))
  there = "goes on there" if run_dir.config.exists() else "can be made"
  return finding.ok(f"{run_dir.root}: {there}")
