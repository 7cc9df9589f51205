"""Whether JAX's devices train right: attention, an update, sums over all."""

import math
from collections.abc import Mapping
from typing import Any

from trd_jax.doctor import diagnosis
from trd_jax.doctor.diagnosis import Diagnosis
from trd_jax.doctor.machine import Machine
from trd_jax.doctor.probe import Facts
from trd_jax.experiment.experiment import Experiment

_CHILD = "trd_jax.doctor.jax_probe"
# Computers with one CPU device divide it: what is on trial is how work is split
# and put together again.
_HOST_DEVICES = 2
_ON_HOST = f"--xla_force_host_platform_device_count={_HOST_DEVICES}"
# It takes longer to compile these few programs than to run them.
_QUICKLY = "--xla_backend_optimization_level=0"
# Of float32, summed in another order.
_TOLERANCE = 1e-4
_QWEN3_8B_HEADS = (32, 8, 128)
_QWEN3_8B_WIDTHS = (4096, 12_288)
# Results are rounded to bfloat16, twice.
_FLOAT8_TOLERANCE = 2**-7
_LOG = "look into the log; all that trains goes this way"


def _start(machine: Machine, kind: str, requested: Mapping[str, Any]) -> Facts:
  environment = {}
  if not machine.on_gpus:
    environment["XLA_FLAGS"] = f"{_ON_HOST} {_QUICKLY}"
  machine.start(
    kind,
    machine.trainer,
    _CHILD,
    {"kind": kind, **requested},
    environment=environment,
  )
  return machine.result(kind)


def without_kernel(machine: Machine) -> str:
  """Says why there is no fused attention to check, or ''."""
  if not machine.on_gpus:
    return "attention is XLA's where there are no GPUs"
  return ""


def attention(machine: Machine) -> Diagnosis:
  """Checks fused attention on the heads of the config's models."""
  from trd_jax.pipeline import dry_run

  e = machine.experiment
  name = "cudnn" if e.train.packing is False else "cudnn_packed"
  if e.train.attention == "tokamax":
    name = "tokamax"
  shapes = [
    dry_run.shape_of(model, machine.workdir)
    for model in (e.student, e.teacher_model)
  ]
  heads = [
    (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    for shape in shapes
    if shape is not None and machine.has_config
  ]
  heads = list(dict.fromkeys(heads or [_QWEN3_8B_HEADS]))
  facts = _start(machine, "attention", {"implementation": name, "heads": heads})
  return judge_attention(facts, name)


def judge_attention(facts: Facts, name: str) -> Diagnosis:
  """Judges an attention's distance from the XLA path."""
  # `choice.check` has held it against what rounding explains.
  if "failure" in facts or not facts.get("errors"):
    why = facts.get("failure", "it told nothing")
    return diagnosis.failed(f"{name}: {why}", "set train.attention=xla")
  # Each: the largest of them isn't NaN where only a later one is.
  worst = max(facts["errors"])
  if not all(map(math.isfinite, facts["errors"])):
    return diagnosis.failed(f"{name}: not a number", "set train.attention=xla")
  return diagnosis.ok(
    f"{name}: outputs and gradients within {worst:.1g} of XLA's"
  )


def by_kernel(experiment: Experiment) -> bool:
  """Returns whether an experiment would train with fused attention on GPUs."""
  train = experiment.train
  if train.attention == "auto":
    half = {experiment.student.dtype, experiment.teacher_model.dtype}
    return half == {"bfloat16"}
  return train.attention != "xla"


def float8(machine: Machine) -> Diagnosis:
  """Checks products in eight bits at the widths of the config's teacher."""
  from trd_jax.pipeline import dry_run

  e = machine.experiment
  shape = dry_run.shape_of(e.teacher_model, machine.workdir)
  sizes = [_QWEN3_8B_WIDTHS]
  if shape is not None:
    sizes = list(dict.fromkeys(shape.linear_layers().values()))
  setting = f"train.teacher_dtype={e.train.teacher_dtype}"
  facts = _start(machine, "float8", {"sizes": sizes, "setting": setting})
  return judge_float8(facts)


def judge_float8(facts: Facts) -> Diagnosis:
  """Judges the distance of products in eight bits from float32's."""
  remedy = "leave train.teacher_dtype at None"
  if "failure" in facts or not facts.get("errors"):
    return diagnosis.failed(facts.get("failure", "it told nothing"), remedy)
  # All of them: the largest isn't NaN where only a later one is.
  if not all(error <= _FLOAT8_TOLERANCE for error in facts["errors"]):
    return diagnosis.failed(
      f"products are up to {max(facts['errors']):.1g} from float32's, where"
      f" rounding explains {_FLOAT8_TOLERANCE:.1g}",
      remedy,
    )
  return diagnosis.ok(
    f"products of the same numbers within {max(facts['errors']):.1g} of"
    " float32's"
  )


def by_float8(experiment: Experiment) -> bool:
  """Returns whether an experiment's teacher multiplies in eight bits."""
  return experiment.train.teacher_dtype == "float8"


def without_float8(machine: Machine) -> str:
  """Says why products in eight bits aren't looked at, or ''."""
  if by_float8(machine.experiment):
    return ""
  return "train.teacher_dtype is None"


def update(machine: Machine) -> Diagnosis:
  """Checks that an update on all devices equals one on a single device."""
  devices = len(machine.jax.get("kinds", ()))
  if not machine.on_gpus:
    devices = _HOST_DEVICES
  shape = mesh_of(machine.experiment.mesh.sizes, devices)
  facts = _start(machine, "update", {"mesh": shape})
  return judge_update(facts, shape)


def mesh_of(
  sizes: tuple[int, int, int] | None, devices: int
) -> tuple[int, int, int]:
  """Returns the config's mesh, as far as these devices can have it.

  Else all of them along `data`.
  """
  if sizes is None:
    return (devices, 1, 1)
  fixed = math.prod(size for size in sizes if size != -1)
  if devices % fixed or (-1 not in sizes and fixed != devices):
    return (devices, 1, 1)
  data, fsdp, tensor = (
    devices // fixed if size == -1 else size for size in sizes
  )
  return (data, fsdp, tensor)


def judge_update(facts: Facts, shape: tuple[int, int, int]) -> Diagnosis:
  """Judges the distance of one update made on two meshes."""
  if "failure" in facts:
    return diagnosis.failed(facts["failure"], _LOG)
  one, every = facts["one"], facts["all"]
  loss = abs(one["loss"] - every["loss"]) / abs(one["loss"] or 1.0)
  distances = {
    "loss": loss,
    "gradient": facts["gradient_distance"],
    "adapter": facts["adapter_distance"],
  }
  axes = zip(("data", "fsdp", "tensor"), shape, strict=True)
  where = ", ".join(f"{name}={size}" for name, size in axes if size > 1)
  where = f"{facts['devices']} devices ({where or 'alone'}) against one"
  message = ", ".join(
    f"{name} {value:.0e}" for name, value in distances.items()
  )
  # Not a number is no number below the tolerance.
  if not all(value <= _TOLERANCE for value in distances.values()):
    return diagnosis.failed(
      f"an update on {where}: relative distances {message}, more than"
      f" {_TOLERANCE:.0e}",
      "devices don't compute or don't exchange the same: try each alone"
      " (CUDA_VISIBLE_DEVICES), and NCCL_P2P_DISABLE=1 for all",
    )
  if not one["grad_norm"] > 0:
    return diagnosis.failed(f"an update on {where}: the gradient is 0", _LOG)
  return diagnosis.ok(f"{where}: relative distances {message}")


def without_several(machine: Machine) -> str:
  """Says why there is nothing to sum over, or ''."""
  if machine.on_gpus and len(machine.jax["kinds"]) < 2:
    return "one device: nothing crosses"
  return ""


def reduce(machine: Machine) -> Diagnosis:
  """Checks that sums over all devices are right, and tells how fast."""
  return judge_reduce(_start(machine, "reduce", {}))


def judge_reduce(facts: Facts) -> Diagnosis:
  """Judges a sum over devices."""
  advice = (
    "see that /dev/shm is large enough, and try NCCL_P2P_DISABLE=1 and"
    " NCCL_DEBUG=INFO"
  )
  if "failure" in facts:
    return diagnosis.failed(facts["failure"], advice)
  devices, size, seconds = (
    facts[name] for name in ("devices", "bytes", "seconds")
  )
  message = f"{size >> 20} MiB over {devices} devices"
  if facts["error"] != 0:  # which holds for not a number, too
    return diagnosis.failed(
      f"{message}: the sum is wrong by {facts['error']:g}", advice
    )
  # What each device sends and receives in a ring.
  moved = 2 * (devices - 1) / devices * size
  return diagnosis.ok(
    f"{message} in {1000 * seconds:.1f} ms: {moved / seconds / 1e9:.1f} GB/s in"
    " and out of each"
  )
