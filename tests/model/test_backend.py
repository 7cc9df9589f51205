"""How JAX is started: what is seen, what is refused, what is promised."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jaxlib import xla_client

from tests.support.small_models import SMALL, forward
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.processes import nvidia
from trd_jax.model import backend
from trd_jax.model.qwen3 import Qwen3


@pytest.fixture
def dev(tmp_path):
  """Device files of a machine with two GPUs."""
  for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
    (tmp_path / name).touch()
  return tmp_path


@pytest.mark.parametrize(
  ("visible", "names"),
  [
    (None, ["0", "1"]),
    ("1", ["1"]),
    ("1, 0", ["1", "0"]),
    ("GPU-8ab", ["GPU-8ab"]),
    # CUDA reads up to what is no device's, and these hide all.
    ("0,-1,1", ["0"]),
    ("", []),
    ("NoDevFiles", []),
  ],
)
def test_gpus_are_those_that_cuda_would_show(dev, monkeypatch, visible, names):
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  if visible is not None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
  assert nvidia.names(dev) == names
  assert nvidia.names(dev / "none") == []


def started(dev, platforms, modules="") -> subprocess.CompletedProcess:
  """A fresh process that prints what `start` returns, or its refusal."""
  code = f"""
from pathlib import Path
from trd_jax.model import backend
from trd_jax.experiment.errors import UserError
try:
  print(backend.start(Path({str(dev)!r})))
except UserError as error:
  print("refused:", error)
"""
  environment = os.environ | {"JAX_PLATFORMS": platforms}
  environment.pop("CUDA_VISIBLE_DEVICES", None)
  paths = (str(modules), environment.get("PYTHONPATH"))
  environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
  return subprocess.run(
    [sys.executable, "-c", code],
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )


# Where it sees no GPU, JAX takes CPUs even though a list begins with cuda.
# And where it is installed for GPUs, it does so though nobody asks for CPUs.
@pytest.mark.parametrize("platforms", ["", "cuda,cpu", "cuda"])
def test_gpus_are_not_left_idle_without_a_word(dev, tmp_path, platforms):
  plugin = tmp_path / "modules" / "jax_cuda12_plugin"
  plugin.mkdir(parents=True)
  (plugin / "__init__.py").touch()  # it is there, and of no use
  told = started(dev, platforms, plugin.parent).stdout.rstrip("\n")
  assert "\n" not in told
  assert told.startswith("refused: JAX ")
  assert "pip install 'jax[cuda12]'" in told
  assert "JAX_PLATFORMS=cpu" in told


def test_jax_for_cpus_beside_a_gpu_goes_on_and_says_so(dev):
  done = started(dev, "")
  assert done.stdout == "cpu\n"
  (line,) = [x for x in done.stderr.splitlines() if x.startswith("note:")]
  assert "NVIDIA GPUs are here (2)" in line
  assert "pip install 'jax[cuda12]'" in line


def test_cpus_are_taken_where_they_are_all_or_asked_for(dev):
  assert started(dev / "none", "").stdout == "cpu\n"
  assert backend.start(dev) == "cpu"  # as conftest asks


@pytest.mark.parametrize("given", [None, *backend._SHARE_VARIABLES])
def test_training_takes_most_of_a_gpu_unless_it_is_told(given, monkeypatch):
  for name in backend._SHARE_VARIABLES:
    monkeypatch.delenv(name, raising=False)
  if given:
    monkeypatch.setenv(given, "0.5")
  backend.reserve_memory()
  # As JAX's plugin for GPUs reads it.
  options = xla_client.generate_pjrt_gpu_plugin_options()
  assert options["memory_fraction"] == (0.5 if given else backend.MEMORY_SHARE)


@pytest.fixture
def precision():
  """Takes back what a test sets."""
  yield
  jax.config.update("jax_default_matmul_precision", None)


@pytest.mark.parametrize(
  ("platform", "dtypes", "exact"),
  [
    ("gpu", ["float32"], True),
    ("gpu", ["bfloat16", "float32"], True),
    ("gpu", ["bfloat16", "bfloat16"], False),
    ("cpu", ["float32"], False),
  ],
)
def test_products_of_float32_are_exact_on_gpus(
  precision, platform, dtypes, exact
):
  backend.exact_products(platform, dtypes)
  ids = jnp.zeros((1, 8), jnp.int32)
  made = jax.eval_shape(lambda: Qwen3(SMALL, rngs=nnx.Rngs(0)))
  text = forward.lower(made, ids, ids, ids + 1).as_text()
  products = [line for line in text.splitlines() if "dot_general" in line]
  assert len(products) > 7
  told = [line for line in products if "precision = [HIGHEST, HIGHEST]" in line]
  assert len(told) == (len(products) if exact else 0)


def test_out_of_memory_becomes_one_line_and_other_errors_stay():
  with (
    pytest.raises(UserError, match=r"out of memory \(RES.*bytes.*\): less$"),
    backend.enough_memory("less"),
  ):
    jnp.zeros((1 << 47,), jnp.int8).block_until_ready()
  # As one comes of a program that was under way.
  late = "INTERNAL: Error dispatching computation: Out of memory allocating 9"
  with pytest.raises(UserError), backend.enough_memory("less"):
    raise jax.errors.JaxRuntimeError(late)
  with pytest.raises(jax.errors.JaxRuntimeError), backend.enough_memory("less"):
    raise jax.errors.JaxRuntimeError("INTERNAL: something else")
