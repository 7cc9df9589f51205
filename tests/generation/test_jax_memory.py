"""The embedded engine takes no more memory than its devices have."""

import bisect
import functools
import types

import jax
import numpy as np
import pytest
from flax import nnx

from tests.generation.test_jax_engine import engine, watched
from tests.support.small_models import SMALL, model
from trd_jax.experiment.errors import UserError
from trd_jax.generation.engines import jax_memory, jax_programs
from trd_jax.generation.engines.engine import Request, Sampling
from trd_jax.generation.engines.jax_engine import _SIZES, JaxEngine
from trd_jax.generation.engines.jax_memory import Call
from trd_jax.generation.engines.jax_prompts import Prompts
from trd_jax.model.config import ModelConfig
from trd_jax.model.qwen3 import KVCache, Qwen3
from trd_jax.model.sharding import make_mesh, replicated

MODELS = {
  "1.7b": ModelConfig(151_936, 2048, 6144, 28, 16, 8, 128, tie_embeddings=True),
  "8b": ModelConfig(151_936, 4096, 12_288, 36, 32, 8, 128),
}
# Bytes of a device, of which JAX has three quarters.
DEVICES = {"A100-40": 40e9, "H100": 80e9, "H200": 141e9}
GREEDY = Sampling(temperature=0.0)


def size(tree) -> int:
  leaves = jax.tree.leaves(tree)
  return sum(x.size * x.dtype.itemsize for x in leaves)


@functools.cache
def weights(name) -> int:
  """Bytes of both forms; embedding and head are in both the same arrays."""
  made = jax.eval_shape(
    lambda: Qwen3(MODELS[name], dtype="bfloat16", rngs=nnx.Rngs(0))
  )
  laid_out = jax.eval_shape(jax_programs.lay_out, made)
  return size(nnx.state(made)) + size(laid_out.layers)


def free(name, device) -> int:
  stats = {
    "bytes_limit": int(0.75 * DEVICES[device]),
    "bytes_in_use": weights(name),
  }
  told = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
  found = jax_memory.free_bytes([told])
  assert found is not None
  assert found == int(0.9 * stats["bytes_limit"]) - stats["bytes_in_use"]
  return found


def cache(name, slots, positions) -> int:
  """Bytes of the cache that the engine makes."""
  config = MODELS[name]
  shape = functools.partial(
    jax_programs.empty,
    config=config,
    dtype="bfloat16",
    slots=slots,
    length=positions,
    mesh=make_mesh(devices=jax.devices()[:1]),
  )
  return size(jax.eval_shape(shape))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("positions", [512, 2048, 20_480])
def test_what_is_chosen_fits_and_is_not_far_from_the_most(
  device, name, positions
):
  room = free(name, device)
  call = Call(positions, 16_384, 16_384)
  choose = functools.partial(
    jax_memory.slots_that_fit,
    *(MODELS[name], "bfloat16", room, call, _SIZES),
    shrinks_from=128,
  )
  if (name, device) == ("8b", "A100-40"):
    with pytest.raises(UserError, match="beside the weights: lower") as caught:
      choose()
    assert "\n" not in str(caught.value)
    return
  slots = choose()
  staged = cache(name, 1, 16_384)
  # A resize holds one layer twice, a batch that is halved its other half.
  spare = 0.5 if slots >= 128 else 2 / MODELS[name].num_layers
  assert cache(name, slots, positions) * (1 + spare) + staged < room
  if slots < 256:
    bigger = _SIZES[_SIZES.index(slots) + 1]
    assert cache(name, bigger, positions) > 0.6 * (room - staged)


def test_the_figures_of_the_default_on_an_h100():
  """What was 256 whatever came: 8B with short and with long answers."""
  found = [
    jax_memory.slots_that_fit(
      *(MODELS["8b"], "bfloat16", free("8b", "H100")),
      *(Call(positions, 16_384, 16_384), _SIZES, 128),
    )
    for positions in (512, 20_480)
  ]
  assert found == [128, 4]


@pytest.mark.parametrize("room", [0, -5, 10**6])
def test_a_tiny_device_is_refused_with_what_to_lower(room):
  with pytest.raises(UserError, match=r"max_response_tokens.*engine\.jax"):
    jax_memory.slots_that_fit(
      *(MODELS["1.7b"], "bfloat16", room, Call(64, 64, 64), _SIZES, 128)
    )


def test_devices_that_say_nothing_are_taken_to_have_some():
  silent = types.SimpleNamespace(platform="gpu", memory_stats=lambda: None)
  assert jax_memory.free_bytes([silent]) == 8 * 2**30
  assert jax_memory.free_bytes(jax.devices()) is None  # of CPUs


def requests(count):
  return [Request(str(n), [n + 1, 5, n % 3], n, 4) for n in range(count)]


def completed(made, asked):
  return {c.key: c.ids for c in made.generate(asked, GREEDY)}


@pytest.mark.slow
def test_an_engine_takes_as_many_slots_as_its_memory_holds():
  asked, device = requests(9), jax.devices()[:1]
  whole = JaxEngine(model(), devices=device)
  expected = completed(whole, asked)
  call = Prompts(whole, asked).call()
  assert call.positions == 64

  def holds_four(room):
    try:
      return (
        jax_memory.slots_that_fit(
          SMALL, "float32", room, call, _SIZES, shrinks_from=32
        )
        >= 4
      )
    except UserError:
      return False

  enough = bisect.bisect_left(range(2**30), True, key=holds_four)
  made = JaxEngine(model(), devices=device, free=enough)
  assert completed(made, asked) == expected
  assert {p[1] for p in made.programs if p[0] == "decode"} == {4}
  made = JaxEngine(model(), devices=device, free=0)
  with pytest.raises(UserError, match=r"engine\.name=vllm"):
    completed(made, asked)
  assert not made.programs
  # Slots that are asked for are taken as they are.
  made = JaxEngine(model(), devices=device, free=0, slots=16)
  assert completed(made, asked) == expected


@pytest.mark.slow
def test_a_device_that_is_full_is_told_in_one_line_and_nothing_is_lost():
  chunks = []

  def saw(name, arguments):
    del arguments
    if name == "decode":
      chunks.append(name)
      if len(chunks) == 3:
        jax.numpy.zeros((1 << 47,), np.int8)  # more than any device has

  made = watched(engine(decode_steps=4), saw)
  found = made.generate(requests(9), GREEDY)
  assert len([next(found) for _ in range(8)]) == 8
  with pytest.raises(UserError, match=r"lower engine\.jax\.slots, .* 4 here"):
    next(found)


@pytest.mark.parametrize("length", [3, 7])
def test_a_resize_keeps_what_fits_and_frees_each_layer(length):
  mesh = make_mesh(devices=jax.devices()[:2])
  rng = np.random.default_rng(0)
  shapes = ((2, 2, 12, 5), (2, 2, 5, 12))
  arrays = [
    tuple(rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    for shape in shapes
  ]
  split = jax.NamedSharding(mesh, jax.P("data"))
  old = jax.device_put(KVCache(*arrays), split)
  new = jax_programs.resize(old, length=length, mesh=mesh)
  assert all(x.is_deleted() for x in jax.tree.leaves(old))
  keep = min(length, 5)
  for before, after in zip(arrays[0], new.keys, strict=True):
    expected = np.zeros((2, 2, 12, length), np.float32)
    expected[..., :keep] = before[..., :keep]
    np.testing.assert_array_equal(after, expected)
  for before, after in zip(arrays[1], new.values, strict=True):
    expected = np.zeros((2, 2, length, 12), np.float32)
    expected[:, :, :keep] = before[:, :, :keep]
    np.testing.assert_array_equal(after, expected)


def test_weights_on_several_devices_are_laid_out_there_and_shared():
  """As they are on accelerators, where nothing goes through the host."""
  everywhere = replicated(make_mesh(devices=jax.devices()[:2]))
  made = jax.device_put(model(), everywhere)
  decoder = jax_programs.lay_out(made)
  for array in jax.tree.leaves(decoder):
    assert array.sharding.is_equivalent_to(everywhere, array.ndim)

  def places(array):
    return [x.data.unsafe_buffer_pointer() for x in array.addressable_shards]

  assert places(decoder.embedding_VD) == places(
    made.embed.embedding.get_value()
  )
  assert places(decoder.head_VD) == places(made.head_VD)
