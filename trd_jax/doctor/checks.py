"""The registry: every check, in the order in which they run.

Nothing here imports JAX: where that is what is broken, the other checks run.
"""

import functools
from collections.abc import Callable

from trd_jax.doctor import (
  config_checks,
  engine_checks,
  engines,
  gpus,
  grader_checks,
  resources,
  software,
  training_checks,
)
from trd_jax.doctor.diagnosis import Check
from trd_jax.doctor.engine_checks import Judge
from trd_jax.experiment.experiment import Experiment


def _both(
  *needed: Callable[[Experiment], bool],
) -> Callable[[Experiment], bool]:
  return lambda experiment: all(one(experiment) for one in needed)


# What is tried of each engine: name, what is looked at, who judges, and what
# of a config needs it besides the engine.
_OF_AN_ENGINE: tuple[
  tuple[str, str, Judge, Callable[[Experiment], bool] | None], ...
] = (
  ("start", "loads a tiny random Qwen3", engine_checks.starts, None),
  ("repeats", "same batch and seeds, same tokens", engine_checks.repeats, None),
  (
    "surplus",
    "draws no row of the head that no token belongs to",
    engine_checks.surplus,
    None,
  ),
  (
    "logprobs",
    "gives the likeliest tokens, in order, with their log-probabilities",
    engine_checks.logprobs,
    engines.by_recording,
  ),
  (
    "adapter",
    "takes an adapter by its path",
    engine_checks.adapter,
    engines.by_adapter,
  ),
)


def _of_vllm(name, doc, judge, needed) -> Check:
  return Check(
    f"vllm-{name}",
    f"vLLM, on every GPU: {doc}",
    functools.partial(engines.of_vllm, judge=judge),
    software.without_vllm,
    _both(software.by_vllm, *([needed] if needed else [])),
    begin=engines.begin_vllm,
  )


def _of_jax(name, doc, judge, needed) -> Check:
  return Check(
    f"engine-{name}",
    f"the embedded engine: {doc}",
    functools.partial(engines.of_jax, judge=judge),
    needed=_both(engines.by_jax, *([needed] if needed else [])),
    begin=engines.begin_jax,
  )


# Cheap before dear, and what explains a failure before what fails by it: a
# broken driver shows once as such, before every engine fails.
CHECKS: tuple[Check, ...] = (
  # Before anything holds memory or a file.
  Check(
    "driver",
    "nvidia-smi answers",
    gpus.driver,
    gpus.without_driver,
    quick=True,
  ),
  Check(
    "gpu-memory",
    "no other process is on the GPUs",
    gpus.memory,
    gpus.without_driver,
    quick=True,
  ),
  Check("disk", "what the stages write has room", resources.disk, quick=True),
  Check(
    "shared-memory",
    "/dev/shm is large enough for NCCL and vLLM",
    resources.shared_memory,
    resources.without_shared_memory,
    quick=True,
  ),
  Check(
    "open-files",
    "the limit on open files is high enough",
    resources.open_files,
    quick=True,
  ),
  Check(
    "workdir",
    "the workdir is this config's and can be written",
    config_checks.workdir,
    config_checks.without_config,
    quick=True,
  ),
  Check(
    "gpus",
    "nvidia-smi (or /dev), JAX and vLLM's environment see the same GPUs",
    gpus.agree,
    quick=True,
  ),
  Check("trainer", "versions of what trains", software.trainer, quick=True),
  Check(
    "generation",
    "versions of what generates",
    software.generation,
    software.without_vllm,
    software.by_vllm,
    quick=True,
  ),
  Check(
    "gpu-count",
    "there are as many GPUs as the engine wants",
    config_checks.engine_devices,
    config_checks.without_config,
  ),
  Check(
    "mesh",
    "the mesh fits the devices",
    config_checks.mesh,
    config_checks.without_config,
  ),
  Check(
    "weights",
    "the models' weights fit the devices",
    config_checks.memory,
    config_checks.without_config,
  ),
  Check(
    "config",
    "what the pipeline looks at first: models, data, interpreters, servers",
    config_checks.config,
    config_checks.without_config,
  ),
  Check(
    "hub",
    "the Hugging Face hub answers",
    config_checks.hub,
    config_checks.with_config,
  ),
  Check(
    "sandbox",
    "a program runs in bubblewrap",
    grader_checks.bubblewrap,
    needed=grader_checks.by_programs,
  ),
  *grader_checks.of_environments(),
  Check(
    "reduce",
    "sums over all devices are right, and how fast they are",
    training_checks.reduce,
    training_checks.without_several,
  ),
  Check(
    "attention",
    "fused attention gives what XLA's does, with its gradient",
    training_checks.attention,
    training_checks.without_kernel,
    training_checks.by_kernel,
  ),
  Check(
    "float8",
    "products in eight bits are float32's of the same numbers",
    training_checks.float8,
    training_checks.without_float8,
    training_checks.by_float8,
  ),
  Check(
    "update",
    "one update on all devices is the one of a single device",
    training_checks.update,
  ),
  *(_of_jax(*one) for one in _OF_AN_ENGINE),
  *(_of_vllm(*one) for one in _OF_AN_ENGINE),
  Check(
    "vllm-layout",
    "vLLM over as many GPUs as the config says",
    engines.layout,
    engines.without_layout,
    software.by_vllm,
    begin=engines.begin_layout,
  ),
)
