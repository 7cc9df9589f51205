"""The GPUs: who sees them, and whether somebody is on them."""

from collections.abc import Mapping

from trd_jax.doctor import diagnosis
from trd_jax.doctor.diagnosis import Diagnosis
from trd_jax.doctor.machine import Machine
from trd_jax.doctor.probe import Facts
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.processes import nvidia
from trd_jax.experiment.schema import MEMORY_SHARE

_GIB = 1 << 30
_JAX_REMEDY = (
  "install JAX for the driver's CUDA (pip install -e '.[cuda12]'), see that"
  " LD_LIBRARY_PATH and JAX_PLATFORMS are empty"
)
_VLLM_REMEDY = (
  "make the environment: third_party/vllm/install.sh cuda; a driver that"
  " is older than its CUDA has to be updated"
)


def driver(machine: Machine) -> Diagnosis:
  """Checks that nvidia-smi answers."""
  return judge_driver(machine.gpus)


def judge_driver(report: nvidia.Report) -> Diagnosis:
  """Judges what nvidia-smi says."""
  if report.failure:
    return diagnosis.failed(
      f"nvidia-smi: {report.failure}",
      "mend the driver (a container needs --gpus all), or, on a machine"
      " without GPUs, take nvidia-smi away",
    )
  kinds = ", ".join(sorted({gpu.kind for gpu in report.gpus}))
  version = f"driver {report.driver or '?'}, CUDA {report.cuda or '?'}"
  message = f"{version}: {len(report.gpus)} GPUs ({kinds})"
  if len(report.visible) < len(report.gpus):
    message += f", of which CUDA_VISIBLE_DEVICES shows {len(report.visible)}"
  return diagnosis.ok(message)


def without_driver(machine: Machine) -> str:
  """Says why no GPU is looked at, or ''."""
  if machine.gpus.there:
    return ""
  count = len(machine.gpus.gpus)
  return f"no nvidia-smi, and {count or 'no'} GPUs in /dev"


def memory(machine: Machine) -> Diagnosis:
  """Checks that the GPUs' memory is free."""
  return judge_memory(machine.gpus, machine.experiment)


def judge_memory(report: nvidia.Report, experiment: Experiment) -> Diagnosis:
  """Judges how much memory is free on each GPU.

  An engine such as vLLM refuses to start where less than its share is free;
  training takes `MEMORY_SHARE` of each GPU at once.
  """
  share = MEMORY_SHARE
  who = "training"
  engine = experiment.engine
  gpus = engine.chosen.gpus
  if gpus is not None and gpus.share > share:
    share, who = gpus.share, f"engine.{engine.name}.{gpus.share_key}"
  known = [
    (gpu, gpu.free, gpu.total)
    for gpu in report.visible
    if gpu.total and gpu.free is not None
  ]
  if not known:
    return diagnosis.warning(
      "nvidia-smi doesn't say how much memory is free", "see nvidia-smi itself"
    )
  for gpu, free, total in known:
    if free < share * total:
      holders = ", ".join(report.holders.get(gpu.uuid, ()))
      return diagnosis.failed(
        f"GPU {gpu.index}: {free / _GIB:.1f} of {total / _GIB:.1f} GiB are"
        f" free, and {who} takes {share:.0%}; held by"
        f" {holders or 'a process that nvidia-smi does not show'}",
        "end that process, or leave the GPU out with CUDA_VISIBLE_DEVICES",
      )
  # The fullest GPU stands for all: what runs takes the same of each.
  _, free, total = min(known, key=lambda one: one[1])
  return diagnosis.ok(
    f"{free / _GIB:.1f} GiB and more are free of {total / _GIB:.1f}, on each of"
    f" {len(known)}"
  )


def agree(machine: Machine) -> Diagnosis:
  """Checks that nvidia-smi, JAX and vLLM's environment see the same GPUs."""
  torch = None if machine.vllm is None else machine.torch
  return judge_agreement(machine.gpus, machine.jax, torch)


def judge_agreement(
  report: nvidia.Report, jax: Facts, torch: Mapping | None
) -> Diagnosis:
  """Judges who sees how many.

  Args:
    report: nvidia-smi's, or what is in /dev.
    jax: `environment_probe`'s devices of JAX.
    torch: those of vLLM's environment; None where there is none.
  """
  if "failure" in jax:
    return diagnosis.failed(f"JAX can't start: {jax['failure']}", _JAX_REMEDY)
  if torch is not None and "failure" in torch:
    return diagnosis.failed(
      f"vLLM's environment can't start torch: {torch['failure']}", _VLLM_REMEDY
    )
  on_gpu = jax["platform"] == "gpu"
  there = len(report.visible)
  # Without a GPU that it can use JAX takes the CPU and says nothing.
  by_jax = len(jax["kinds"]) if on_gpu else 0
  by_torch = None if torch is None else len(torch["kinds"])
  message = f"nvidia-smi {there}" if report.there else f"/dev {there}"
  message += f", JAX {by_jax}"
  if not on_gpu:
    message += f" ({len(jax['kinds'])} {jax['platform']} devices)"
  if by_torch is not None:
    message += f", vLLM's environment {by_torch}"
  message = f"GPUs seen: {message}"
  # Without nvidia-smi nobody is sure to be right, but one that sees fewer than
  # another has a fault.
  expected = there if report.there else max(there, by_jax, by_torch or 0)
  if by_jax != expected:
    return diagnosis.failed(message, _JAX_REMEDY)
  if by_torch is not None and by_torch != expected:
    assert torch is not None
    build = torch.get("cuda") or "a build for CPUs"
    return diagnosis.failed(f"{message} (torch's CUDA: {build})", _VLLM_REMEDY)
  if on_gpu:
    message += f": {', '.join(sorted(set(jax['kinds'])))}"
  return diagnosis.ok(message)
