"""The children that try engines: vLLM's on every GPU, the embedded one on all.

They begin before anything else that takes long. What they say is judged by
`engine_checks`.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

from trd_jax.doctor import diagnosis, tiny
from trd_jax.doctor.diagnosis import Diagnosis
from trd_jax.doctor.engine_checks import Judge, of_all, starts
from trd_jax.doctor.machine import PROBE_SECONDS, Machine
from trd_jax.doctor.probe import Facts
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.processes import nvidia

_CHILD = "trd_jax.doctor.engine_probe"
_TINY = "tiny"
_LAYOUT = "vllm-layout"
# Keys of vLLM on a GPU that others try as well.
_SPEC = {"kv_cache_gib": 0.25, "eager": True}


def _model(machine: Machine) -> tuple[str, str]:
  """Returns the folders of the tiny model and its adapter, made once.

  Raises:
    UserError: they can't be made.
  """
  folder = machine.folder / _TINY
  machine.start(
    _TINY, sys.executable, "trd_jax.doctor.tiny", {"folder": str(folder)}
  )
  facts = machine.result(_TINY)
  if "failure" in facts:
    raise UserError(
      f"a tiny model to try it with can't be made: {facts['failure']}; install"
      f" JAX anew for {sys.executable}"
    )
  return str(folder / tiny.MODEL), str(folder / tiny.ADAPTER)


def _start(
  machine: Machine,
  name: str,
  python: str,
  engine: str,
  *,
  gpu: bool,
  spec: Mapping[str, Any],
  adapter: bool = True,
  environment: dict[str, str] | None = None,
) -> None:
  model, adapter_folder = _model(machine)
  requested = {
    "engine": engine,
    "model": model,
    "adapter": adapter_folder if adapter else None,
    # vLLM's adapters on GPUs know no float32.
    "dtype": "bfloat16" if gpu else "float32",
    "spec": spec,
  }
  machine.start(
    name,
    python,
    _CHILD,
    requested,
    environment=environment,
    seconds=PROBE_SECONDS,
  )


def places(machine: Machine) -> list[tuple[str, str | None]]:
  """Returns names of vLLM's children and the GPU that each is shown.

  Without a GPU there is one, which is shown what there is.
  """
  count = machine.vllm_gpus
  if not count:
    return [("vllm", None)]
  # By the variable's own words, numbers or UUIDs: each child is given one, and
  # plain counts from 0 might be GPUs that are not shown to us.
  words = nvidia.shown(os.environ.get("CUDA_VISIBLE_DEVICES"))
  if words is None:
    words = [str(number) for number in range(count)]
  return [(f"GPU {word}", word) for word in words[:count]]


def begin_vllm(machine: Machine) -> None:
  """Starts a child on each GPU, or one on the computer's cores."""
  assert machine.vllm is not None
  for name, gpu in places(machine):
    environment = {}
    if gpu is not None:
      # nvidia-smi's order, which isn't CUDA's own.
      environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
      environment["CUDA_VISIBLE_DEVICES"] = gpu
    _start(
      machine,
      _log(name),
      machine.vllm,
      "vllm",
      gpu=gpu is not None,
      spec=_SPEC,
      environment=environment,
    )


def _log(place: str) -> str:
  return place if place == "vllm" else f"vllm-{place.lower().replace(' ', '-')}"


def of_vllm(machine: Machine, judge: Judge) -> Diagnosis:
  """Judges vLLM, on every GPU."""
  # Nothing is started twice: where the child is at work this only waits.
  begin_vllm(machine)
  facts = [(place, machine.result(_log(place))) for place, _ in places(machine)]
  return of_all(judge, facts)


def begin_jax(machine: Machine) -> None:
  """Starts the embedded engine's child, on all devices together."""
  _start(
    machine, "engine", machine.trainer, "jax", gpu=machine.on_gpus, spec={}
  )


def of_jax(machine: Machine, judge: Judge) -> Diagnosis:
  """Judges the embedded engine."""
  begin_jax(machine)
  return judge(machine.result("engine"))


def by_jax(experiment: Experiment) -> bool:
  """Returns whether an experiment generates with the embedded engine."""
  return experiment.engine.name == "jax"


def by_adapter(experiment: Experiment) -> bool:
  """Returns whether an experiment's engine is given adapters."""
  kept = experiment.student.adapter is not None
  return kept or experiment.engine.weights == "adapter"


def by_recording(experiment: Experiment) -> bool:
  """Returns whether an experiment records the teacher's likeliest tokens."""
  writes = experiment.teacher_writes is not None
  return writes and experiment.refine.teacher_top_k > 0


def without_layout(machine: Machine) -> str:
  """Says why there is no layout over several GPUs to try, or ''."""
  vllm = machine.experiment.engine.vllm
  wanted = vllm.tensor_parallel * vllm.data_parallel
  if machine.vllm is None or machine.experiment.engine.name != "vllm":
    return "the config generates without vLLM in its process"
  if wanted < 2:
    return "the config's engine takes one device"
  if wanted > machine.vllm_gpus:
    return f"it takes {wanted} GPUs, and {machine.vllm_gpus} are here"
  return ""


def begin_layout(machine: Machine) -> None:
  """Starts an engine over as many GPUs as the config says."""
  vllm = machine.experiment.engine.vllm
  assert machine.vllm is not None
  spec = {
    **_SPEC,
    "tensor_parallel": vllm.tensor_parallel,
    "data_parallel": vllm.data_parallel,
  }
  _start(
    machine,
    _LAYOUT,
    machine.vllm,
    "vllm",
    gpu=True,
    spec=spec,
    adapter=False,
  )


def layout(machine: Machine) -> Diagnosis:
  """Checks that vLLM starts over as many GPUs as the config says."""
  begin_layout(machine)
  vllm = machine.experiment.engine.vllm
  facts = machine.result(_LAYOUT)
  return judge_layout(facts, vllm.tensor_parallel, vllm.data_parallel)


def judge_layout(facts: Facts, tensor: int, data: int) -> Diagnosis:
  """Judges an engine over several GPUs: it starts and generates."""
  message = f"tensor_parallel={tensor}, data_parallel={data}"
  if "failure" in facts:
    return diagnosis.failed(
      f"{message}: {facts['failure']}",
      "see that /dev/shm is large enough, and try NCCL_P2P_DISABLE=1 and"
      " NCCL_DEBUG=INFO",
    )
  return diagnosis.ok(f"{message}: {starts(facts).message}")
