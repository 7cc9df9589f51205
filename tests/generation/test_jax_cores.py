"""How the embedded engine chooses devices and slots by itself."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.support.devices import xla_flags
from tests.support.small_models import SMALL, model
from trd_jax.generation.engines.engine import Request, Sampling
from trd_jax.generation.engines.jax_engine import JaxEngine
from trd_jax.model.qwen3 import Qwen3

pytestmark = pytest.mark.slow

QUICK = xla_flags(None)
LONG = dataclasses.replace(SMALL, max_positions=1024)

_LOAD = """
import json, jax
from trd_jax.model.weights import hub
from trd_jax.generation.engines.engine import Request, Sampling
from trd_jax.generation.engines.jax_engine import JaxEngine
{before}
made = JaxEngine.load(hub.model_folder("lab:student", None), dtype="float32")
asked = [Request(str(n), [n + 1, 5], n, 6) for n in range(5)]
found = made.generate(asked, Sampling(temperature=0.0))
ids = sorted((c.key, list(c.ids)) for c in found)
print(json.dumps([jax.device_count(), made.slots, ids]))
"""


def loaded(before="", flags=QUICK, caches=True):
  """Devices, slots and completions of an engine in a fresh process.

  Args:
    before: what the process does first.
    flags: of XLA; None: the variable isn't set.
    caches: whether what an earlier process has compiled may be used.
  """
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  environment["JAX_ENABLE_COMPILATION_CACHE"] = str(caches)
  environment.pop("JAX_NUM_CPU_DEVICES", None)
  environment.pop("XLA_FLAGS", None)
  if flags is not None:
    environment["XLA_FLAGS"] = flags
  done = subprocess.run(
    [sys.executable, "-c", _LOAD.format(before=before)],
    env=environment,
    stdout=subprocess.PIPE,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def test_each_core_is_a_device_unless_something_else_sets_their_number():
  cores = min(len(os.sched_getaffinity(0)), 8)
  devices, slots, ids = loaded()
  assert (devices, slots) == (cores, 128 * cores)
  assert loaded(flags=xla_flags(3)) == [3, 384, ids]
  set_before = "jax.config.update('jax_num_cpu_devices', 3)"
  assert loaded(before=set_before) == [3, 384, ids]
  assert loaded(before="jax.devices()") == [1, 128, ids]


@pytest.mark.parametrize(
  ("before", "alone"), [("", True), ("jax.devices()", False)]
)
def test_a_core_that_is_a_device_computes_its_products_alone(
  before, alone, tmp_path
):
  # What is found compiled is not dumped.
  flags = f"{QUICK} --xla_dump_to={tmp_path}"
  loaded(before=before, flags=flags, caches=False)
  (options,) = tmp_path.glob("*jit_decode*debug_options")
  # What is not as by default is named there.
  assert alone == ("multi_thread_eigen: false" in options.read_text())


def test_cores_have_one_copy_of_the_weights_together():
  made = JaxEngine(model(), devices=jax.devices()[:3])
  for array in jax.tree.leaves((made.model, made.decoder)):
    shards = array.addressable_shards
    assert [shard.data.shape for shard in shards] == [array.shape] * 3
    assert len({shard.data.unsafe_buffer_pointer() for shard in shards}) == 1


@pytest.mark.parametrize("flags", [QUICK, None])
def test_the_environment_stays_as_it_was(flags):
  check = "lambda: os.environ == before or os._exit(3)"
  before = "import atexit, os; before = dict(os.environ)\n"
  loaded(before=f"{before}atexit.register({check})", flags=flags)


@pytest.mark.parametrize(
  ("count", "devices", "slots"), [(1, 1, 1), (5, 1, 8), (5, 2, 8), (70, 1, 64)]
)
def test_automatic_slots_are_no_more_than_the_requests_need(
  count, devices, slots
):
  made = JaxEngine(model(), devices=jax.devices()[:devices])
  asked = [Request(str(n), [1, n % 60], n, 3) for n in range(count)]
  assert made.slots == 128 * devices
  assert len(list(made.generate(asked, Sampling(temperature=0.0)))) == count
  (size,) = {p[1] for p in made.programs if p[0] == "decode"}
  assert size == slots


def test_the_cache_alone_is_that_of_the_whole_prefill():
  made, generator = model(), np.random.default_rng(0)
  tokens = generator.integers(0, SMALL.vocab_size, (3, 12), np.int32)
  length = np.array([12, 7, 1], np.int32)
  _, whole = jax.jit(Qwen3.prefill)(made, tokens, length)
  alone = jax.jit(Qwen3.prefill_cache)(made, tokens, length)
  for one, other in zip(
    jax.tree.leaves(whole), jax.tree.leaves(alone), strict=True
  ):
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("common", [5, 600])
def test_a_row_after_a_prefix_is_that_of_the_whole_prompt(common):
  made, generator = model(LONG), np.random.default_rng(0)
  tokens = generator.integers(0, LONG.vocab_size, (3, common + 12), np.int32)
  tokens[:, :common] = tokens[0, :common]
  length = np.array([12, 7, 1], np.int32)
  compute = jax.jit(Qwen3.prefill_cache)
  whole = compute(made, tokens, length + common)
  prefix = compute(made, tokens[:1, :common], np.array([common], np.int32))
  rows = compute(made, tokens[:, common:], length, prefix)
  for one, other in zip(whole.keys, rows.keys, strict=True):
    for row, count in enumerate(length + common):
      np.testing.assert_allclose(
        one[row, ..., :count], other[row, ..., :count], atol=2e-5
      )
  for one, other in zip(whole.values, rows.values, strict=True):
    for row, count in enumerate(length + common):
      np.testing.assert_allclose(
        one[row, :, :count], other[row, :, :count], atol=2e-5
      )
