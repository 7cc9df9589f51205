"""What a config asks of a machine: devices, memory, a workdir, all it names."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

from trd_jax.doctor import diagnosis
from trd_jax.doctor.diagnosis import Diagnosis
from trd_jax.doctor.machine import Machine
from trd_jax.experiment import experiment, findings
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.findings import Finding
from trd_jax.experiment.schema import PLANNED_SHARE, Mesh, Model
from trd_jax.model.weights import hub_look

_GIB = 1 << 30
# What is asked for to see whether the hub answers.
_PUBLIC_MODEL = "Qwen/Qwen3-8B"


def without_config(machine: Machine) -> str:
  """Says that there is no config to look into, or ''."""
  return "" if machine.has_config else "no --config"


def engine_devices(machine: Machine) -> Diagnosis:
  """Checks that there are as many GPUs as the engine wants."""
  return judge_engine_devices(
    machine.experiment, len(machine.gpus.visible) or machine.vllm_gpus
  )


def judge_engine_devices(e: Experiment, gpus: int) -> Diagnosis:
  """Compares the devices that the engine wants with the GPUs here."""
  name, own = e.engine.name, e.engine.chosen.gpus
  if own is None:
    return diagnosis.ok(f"engine.name={name} takes what there is")
  actors = e.engine.ray.actors
  wanted = own.count * max(actors, 1)
  message = (
    f"{own.who} wants {wanted} (engine.{name}.{own.split_key}={own.split},"
    f" {own.copies_key}={own.copies}, engine.ray.actors={actors})"
  )
  if actors and e.engine.ray.address is not None:
    return diagnosis.ok(f"{message}, of the Ray cluster's")
  here = "and one GPU is here" if gpus == 1 else f"and {gpus} GPUs are here"
  # Without GPUs a build for CPUs runs, for which this computer is one device.
  if wanted > max(gpus, 1):
    return diagnosis.failed(
      f"{message}, {here}",
      "lower them (configs/opd.py and opsd.py: :gpus=N), or show it more GPUs",
    )
  if wanted < gpus:
    return diagnosis.warning(
      f"{message}, {here}: the others stay idle",
      f"raise engine.{name}.{own.copies_key} to {gpus // own.split}",
    )
  return diagnosis.ok(
    f"{message}, {here}" if gpus else f"{message}: this computer"
  )


def mesh(machine: Machine) -> Diagnosis:
  """Checks that the mesh fits JAX's devices.

  Raises:
    UserError: it doesn't.
  """
  devices = len(machine.jax.get("kinds", ()))
  section = machine.experiment
  processes = section.distributed.processes or 1
  return judge_mesh(section.mesh, devices, processes)


def judge_mesh(section: Mesh, devices: int, processes: int) -> Diagnosis:
  """Judges the mesh's sizes.

  Args:
    section: the config's.
    devices: of this process.
    processes: how many processes train together, with as many devices each.
  """
  if not devices:
    return diagnosis.failed(
      "JAX sees no device, so that there is none to train on",
      "mend what the check gpus says",
    )
  total = devices * processes
  sizes = section.sizes
  if sizes is None:
    return diagnosis.ok(f"{total} devices; the sizes of the models choose")
  axes = zip(("data", "fsdp", "tensor"), sizes, strict=True)
  message = ", ".join(f"mesh.{name}={size}" for name, size in axes)
  fixed = math.prod(size for size in sizes if size != -1)
  fits = total % fixed == 0 if -1 in sizes else fixed <= total
  message = (
    f"{message}: {'a multiple of ' if -1 in sizes else ''}{fixed} devices"
  )
  message += f" of {total} here"
  if not fits:
    return diagnosis.failed(message, "choose smaller sizes, or -1 for the rest")
  if -1 not in sizes and fixed < total:
    return diagnosis.warning(
      f"{message}; the others stay idle", "set one of them to -1, the rest"
    )
  return diagnosis.ok(message)


def memory(machine: Machine) -> Diagnosis:
  """Checks that the models' weights fit into the devices."""
  from trd_jax.pipeline import dry_run

  e = machine.experiment
  models: dict[str, Model] = {"student": e.student}
  if e.regime == "opd":
    models["teacher"] = e.teacher
  sizes = {
    side: dry_run.weight_bytes(model, machine.workdir)
    for side, model in models.items()
  }
  # What is there of a teacher in eight bits, beside the student.
  rounded = None
  if e.train.teacher_dtype == "float8" and e.train.teacher == "recompute":
    rounded = dry_run.float8_bytes(e, machine.workdir)
  on_gpus = machine.on_gpus or machine.vllm_gpus > 0
  # The driver's word first: JAX's limit is what its own share leaves.
  totals = [gpu.total for gpu in machine.gpus.visible if gpu.total]
  totals = totals or [size for size in machine.jax.get("bytes", ()) if size]
  if on_gpus and totals:
    return judge_memory(e, sizes, min(totals), len(totals), "a GPU", rounded)
  if on_gpus:
    return diagnosis.warning(
      "nvidia-smi doesn't say how much memory a GPU has",
      "see nvidia-smi itself",
    )
  pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return judge_memory(e, sizes, pages, 1, "this computer", rounded)


def judge_memory(
  e: Experiment,
  sizes: Mapping[str, int | None],
  each: int,
  devices: int,
  where: str,
  rounded: int | None = None,
) -> Diagnosis:
  """Compares the bytes of the weights with those of the devices.

  Weights are the least that a run needs: activations, caches and the adapter
  come on top, and are counted when training starts.

  Args:
    e: the experiment.
    sizes: by side, bytes of its weights; None where nobody knows. The student
      alone where it teaches itself.
    each: bytes of the smallest device.
    devices: how many train together.
    where: what one device is.
    rounded: bytes of what teaches in eight bits beside the student; None where
      the teacher's own weights do.
  """
  known = {side: size for side, size in sizes.items() if size is not None}
  message = ", ".join(
    f"{side} {size / _GIB:.2f}" for side, size in known.items()
  )
  message = f"weights in GiB: {message or 'not known here'}; {where} has"
  message = f"{message} {each / _GIB:.1f}"
  if (gpus := e.engine.chosen.gpus) is not None:
    for side, size in known.items():
      if size > gpus.split * gpus.share * each:
        return diagnosis.failed(
          f"{message}, of which {gpus.who} takes {gpus.share:.0%} for the"
          f" {side}",
          f"raise engine.{e.engine.name}.{gpus.split_key}, or set"
          f" {side}.dtype=bfloat16",
        )
  # However split, all devices hold all of it. A teacher whose states are kept
  # or recorded isn't there beside the student.
  together = sum(known.values())
  if rounded is not None:
    together = known.get("student", 0) + rounded
    message += f"; the teacher in float8 {rounded / _GIB:.2f}"
  if e.train.teacher != "recompute":
    together = max(known.values(), default=0)
  if together > PLANNED_SHARE * each * devices:
    return diagnosis.failed(
      f"{message}; {devices} of it hold less than {together / _GIB:.1f}",
      "use bfloat16, smaller models, train.teacher=hidden_cache, or more"
      " devices",
    )
  if len(known) < len(sizes):
    return diagnosis.ok(
      f"{message}; the rest is not known before it is fetched"
    )
  return diagnosis.ok(message)


def config(machine: Machine) -> Diagnosis:
  """Looks at all that the pipeline looks at before it begins.

  Raises:
    UserError: something is wrong or not there; all of it is reported.
  """
  # Where a library is broken that it needs, the other checks run.
  from trd_jax.pipeline import early_checks

  e = machine.experiment
  results = early_checks.look(e, machine.workdir)
  return judge_config(results, list(early_checks.summary(e, results)))


def judge_config(
  results: Sequence[Finding], summary: Sequence[str]
) -> Diagnosis:
  """Judges what was found before anything starts.

  Args:
    results: by `early_checks.look`.
    summary: what is well, by `early_checks.summary`.

  Raises:
    UserError: something is wrong or not there; all of it is reported.
  """
  findings.refuse(results, "wrong", "missing")
  messages = [one.message for one in results if one.state == "note"]
  status = "warning" if messages else "ok"
  messages = messages or [", ".join(summary) or "all its stages are done"]
  messages += [
    f"not checked: {x.message}" for x in results if x.state == "unchecked"
  ]
  return Diagnosis(status, "; also: ".join(dict.fromkeys(messages)))


def hub(machine: Machine) -> Diagnosis:
  """Checks that the hub answers at all."""
  del machine
  try:
    hub_look.look(_PUBLIC_MODEL, None, "model", "hub")
  except (hub_look.Unreachable, UserError) as error:
    return diagnosis.warning(
      f"the hub doesn't answer ({error})",
      "name local copies in the config, or fill the cache beforehand",
    )
  return diagnosis.ok("it answers")


def with_config(machine: Machine) -> str:
  """Says that the config's own demands are looked at instead, or ''."""
  return "see config" if machine.has_config else ""


def workdir(machine: Machine) -> Diagnosis:
  """Checks that the workdir is this config's, or can be made.

  Raises:
    UserError: it isn't, or can't be written.
  """
  run_dir = machine.workdir
  # Whether a run only looks is no part of what its workdir belongs to.
  kept = dataclasses.replace(machine.experiment, preflight_only=False)
  run_dir.check(experiment.to_json(kept))
  there = "goes on there" if run_dir.config.exists() else "can be made"
  return diagnosis.ok(f"{run_dir.root}: {there}")
