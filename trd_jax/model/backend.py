"""Starts JAX on this machine, and tells of what JAX would pass over.

Left alone, JAX falls back to CPUs where its GPU plugin fails, computes float32
products on GPUs in TF32, and takes three quarters of a GPU's memory, all
without a word. So every stage that computes with JAX starts it here.
"""

import contextlib
import functools
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from trd_jax.experiment.errors import UserError, one_line
from trd_jax.experiment.processes import nvidia
from trd_jax.experiment.schema import MEMORY_SHARE

_SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

_SEE_GPUS = (
  "pip install 'jax[cuda12]' in this environment, and see with nvidia-smi that"
  " the driver works and no other process holds the GPUs' memory; or set"
  " JAX_PLATFORMS=cpu to do without GPUs"
)

# What JAX's errors say when a device has no memory left, whatever code is in
# front; the last two come where another process holds it and a library of
# NVIDIA's can't even start.
_EXHAUSTED = re.compile(
  r"RESOURCE_EXHAUSTED|out.of.memory"
  r"|DNN library initialization failed|failed to create cublas handle",
  re.IGNORECASE,
)


def reserve_memory() -> None:
  """Sets JAX's share of each GPU's memory, unless the environment sets it.

  The share is `MEMORY_SHARE`, for a process that has the GPUs to itself. JAX
  reads it when it starts, so this has to come before.
  """
  if not any(os.environ.get(name) for name in _SHARE_VARIABLES):
    os.environ[_SHARE_VARIABLES[0]] = str(MEMORY_SHARE)


def start(dev: Path = Path("/dev")) -> str:
  """Starts JAX and checks that it has found the GPUs of this machine.

  Args:
    dev: where the system's device files are.

  Returns:
    The platform of JAX's devices: 'cpu', 'gpu', …

  Raises:
    UserError: JAX can't start; or it runs on CPUs though `JAX_PLATFORMS` asks
      for others, or though its GPU plugin is installed and NVIDIA GPUs are
      here. A JAX that is installed for CPUs only, as on a laptop, leads to a
      note on stderr.
  """
  _shorten_cache_warnings()
  try:
    platform = jax.default_backend()
  except (RuntimeError, AssertionError) as error:
    raise UserError(
      f"JAX can't start its devices ({one_line(error)}): {_SEE_GPUS}"
    ) from error
  asked = _asked_platform()
  # Of JAX_PLATFORMS=cuda,cpu JAX silently drops cuda where it sees no GPU, so
  # that it has started says nothing: the platform is compared with the first.
  if platform != "cpu" or asked == "cpu":
    return platform
  if asked:
    raise UserError(
      f"JAX runs on CPUs though JAX_PLATFORMS asks for {asked}: {_SEE_GPUS}"
    )
  if count := len(nvidia.names(dev)):
    told = f"JAX runs on CPUs though NVIDIA GPUs are here ({count})"
    if _has_plugin():
      raise UserError(f"{told}: {_SEE_GPUS}")
    print(
      f"note: {told}: it is installed for CPUs alone; pip install"
      " 'jax[cuda12]' in this environment to use them",
      file=sys.stderr,
      flush=True,
    )
  return platform


@functools.cache
def _shorten_cache_warnings() -> None:
  """Makes one note of all that JAX warns of its cache of compiled programs.

  Where the cache's disk is full or read-only, JAX warns at each program, in two
  lines with a place in its source.
  """
  show, told = warnings.showwarning, False

  def show_shorter(message: Warning | str, *place: Any, **options: Any) -> None:
    nonlocal told
    if "persistent compilation cache entry" not in str(message):
      show(message, *place, **options)
    elif not told:
      told = True
      reason = str(message).partition("': ")[2] or str(message)
      folder = jax.config.values["jax_compilation_cache_dir"]
      print(
        f"note: JAX can't keep compiled programs in {folder} ({reason}), so"
        " each process compiles its own: make room there, or set"
        " JAX_COMPILATION_CACHE_DIR",
        file=sys.stderr,
        flush=True,
      )

  warnings.showwarning = show_shorter


def _has_plugin() -> bool:
  """Returns whether JAX's plugin for NVIDIA GPUs is installed, fit or not."""
  return any(
    importlib.util.find_spec(name)
    for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")
  )


def expects_gpus(dev: Path = Path("/dev")) -> bool:
  """Returns whether JAX is to run on NVIDIA GPUs of this machine.

  Doesn't start JAX, which would take GPUs before they are claimed.

  Args:
    dev: where the system's device files are.
  """
  return _asked_platform() in ("", "cuda", "gpu") and bool(nvidia.names(dev))


def _asked_platform() -> str:
  """Returns the first of `JAX_PLATFORMS`, '' where it is not set."""
  return (jax.config.values["jax_platforms"] or "").partition(",")[0]


def exact_products(platform: str, dtypes: Sequence[jax.typing.DTypeLike]):
  """Sets float32 products to full precision, for the rest of the process.

  On accelerators JAX computes them in fewer bits (TF32 on GPUs) by default.
  Nothing is set where no model is in float32: a product of bfloat16 operands
  has no more bits to keep.

  Args:
    platform: of the devices; on CPUs float32 products are exact by default.
    dtypes: of the models that run.
  """
  if platform != "cpu" and any(jax.numpy.dtype(d) == "float32" for d in dtypes):
    jax.config.update("jax_default_matmul_precision", "highest")


@contextlib.contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
  """Turns a device's out-of-memory into a `UserError` that says what to lower.

  Args:
    remedy: what the user can do, to end the line with.

  Raises:
    UserError: a device ran out of memory inside the block.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not _EXHAUSTED.search(str(error)):
      raise
    raise UserError(
      f"a device is out of memory ({one_line(error)}): {remedy}"
    ) from error
