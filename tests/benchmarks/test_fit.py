"""`benchmarks/fit.py`: its arithmetic against real arrays, its verdict."""

import collections
import gc
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from tests.support.places import ROOT

BENCHMARKS = ROOT / "benchmarks"
CONFIGS = BENCHMARKS.parent / "configs"
sys.path.insert(0, str(BENCHMARKS))

import fit  # noqa: E402
import shapes  # noqa: E402
import steps  # noqa: E402

from trd_jax.distill.packing import packing  # noqa: E402
from trd_jax.experiment import config_file  # noqa: E402
from trd_jax.experiment.experiment import from_config  # noqa: E402
from trd_jax.model import sharding  # noqa: E402

pytestmark = pytest.mark.slow

needs_devices = pytest.mark.skipif(
  jax.device_count() < 8, reason="needs 8 (host) devices"
)
LENGTHS = shapes.Lengths(student=40, teacher=56, response=24)


def tiny(mesh_name, teacher=None):
  """Packs, abstract sides and programs of the tiny case."""
  mesh = sharding.make_mesh(*fit.MESHES[mesh_name], devices=jax.devices()[:8])
  experiment = steps.experiment_with()
  model = shapes.MODELS["tiny"]
  data = steps.samples(LENGTHS, 16, model.vocab_size)
  layout = steps.one_row_packs(data, 8, LENGTHS)
  batches = packing.pack(data, layout)
  sides = steps.abstract(model, teacher, experiment, mesh)
  return (
    batches,
    sides,
    lambda sides: steps.make(sides, experiment, mesh, layout),
  )


def test_an_automatic_chunk_is_that_of_the_devices_compiled_for():
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  experiment = steps.experiment_with(loss__chunk_tokens=None)
  sides = steps.abstract(shapes.MODELS["8b"], None, experiment, mesh)
  assert steps.chunk_tokens(experiment, sides, mesh) == 512
  # One of XLA's GPUs that aren't there.
  absent = types.SimpleNamespace(platform="gpu")
  other = types.SimpleNamespace(
    devices=np.array([absent], object), shape=mesh.shape
  )
  assert steps.chunk_tokens(experiment, sides, other) == 1024
  given = steps.experiment_with(loss__chunk_tokens=256)
  assert steps.chunk_tokens(given, sides, other) == 256


def live_bytes(but):
  """Bytes by device of the arrays that are alive and weren't in `but`."""
  held = collections.Counter()
  # A look at a shard makes an array of it, so the list comes first.
  for array in [x for x in jax.live_arrays() if id(x) not in but]:
    for shard in array.addressable_shards:
      held[shard.device] += shard.data.nbytes
  return held


@needs_devices
@pytest.mark.parametrize(
  ("mesh_name", "teacher"),
  [("data=8", None), ("fsdp=8", shapes.MODELS["tiny"])],
)
def test_what_stays_is_what_an_update_leaves_on_each_device(mesh_name, teacher):
  batches, sides, make = tiny(mesh_name, teacher)
  held = fit.stays(sides, make(sides), ())
  gc.collect()
  before = jax.live_arrays()
  ids = {id(array) for array in before}
  real = steps.random_arrays(sides)
  distiller = make(real)
  state = distiller.init(real.lora, 0)
  del real
  state, metrics = distiller.update(state, batches)
  jax.block_until_ready((state, metrics))
  del metrics
  gc.collect()
  everywhere = dict.fromkeys(jax.devices()[:8], sum(held.values()))
  assert live_bytes(ids) == everywhere
  assert min(held.values()) > 0


@needs_devices
def test_a_pack_on_its_way_counts_with_one_devices_part():
  batches, sides, make = tiny("data=8")
  pack = batches[0].student[0]
  distiller = make(sides)
  placed = sharding.shard_batch(
    pack, sharding.make_mesh(8, devices=jax.devices()[:8])
  )
  part = sum(
    x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed)
  )
  without, with_pack = (
    fit.stays(sides, distiller, packs)["buffer"] for packs in ((), (pack,))
  )
  assert with_pack - without == part > 0


@pytest.mark.parametrize("name", [n for n in fit.CASES if n != "tiny"])
def test_the_cases_are_as_long_as_the_configs_allow(name):
  regime, model = name.split("-")
  values, _ = config_file.load(f"{CONFIGS}/{regime}.py:model={model}")
  case, experiment = fit.CASES[name], from_config(values)
  assert case.student_tokens == experiment.train.max_student_tokens
  assert case.teacher_tokens == experiment.train.max_teacher_tokens
  assert case.response == experiment.refine.max_response_tokens
  assert (case.teacher is None) == (experiment.regime == "opsd")


@pytest.mark.parametrize(
  ("name", "parameters"),
  [("1.7b", 1_720_574_976), ("4b", 4_022_468_096), ("8b", 8_190_735_360)],
)
def test_the_models_have_as_many_parameters_as_the_published_ones(
  name, parameters
):
  assert shapes.MODELS[name].num_parameters() == parameters


def run(*flags):
  return subprocess.run(
    [sys.executable, BENCHMARKS / "fit.py", "--cases=tiny", *flags],
    capture_output=True,
    text=True,
    check=False,
  )


def test_it_fails_above_its_limit_and_names_what_is_too_big():
  flags = "--meshes=data=8", "--remat=full"
  fits = run(*flags)
  assert (fits.returncode, fits.stderr) == (0, "")
  too_big = run(*flags, "--limit-gb=1e-4")
  assert too_big.returncode == 1
  assert "above 0.0001 GB: tiny data=8 full" in too_big.stderr
