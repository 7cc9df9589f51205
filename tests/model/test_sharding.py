import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.support.small_models import LORA, SMALL, forward, model, packed
from trd_jax.experiment.errors import UserError
from trd_jax.model import sharding
from trd_jax.model.qwen3 import Qwen3

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (host) devices"),
]


@pytest.mark.parametrize(
  ("asked", "got"),
  [
    ((-1, 1, 1), (8, 1, 1)),
    ((-1, 2, 2), (2, 2, 2)),
    ((1, -1, 2), (1, 4, 2)),
    ((2, 2, -1), (2, 2, 2)),
    ((2, 1, 2), (2, 1, 2)),
    ((1, 1, 1), (1, 1, 1)),
  ],
)
def test_a_mesh_has_the_sizes_asked_for(asked, got):
  mesh = sharding.make_mesh(*asked, devices=jax.devices()[:8])
  assert mesh.axis_names == ("data", "fsdp", "tensor")
  assert mesh.devices.shape == got
  assert mesh.axis_types == (AxisType.Auto,) * 3
  devices = list(mesh.devices.flat)
  assert devices == jax.devices()[: len(devices)]


@pytest.mark.parametrize(
  "asked",
  [(-1, 3, 1), (16, 1, 1), (3, 3, 1), (-1, -1, 1), (0, 1, 1), (-2, 1, 1)],
)
def test_a_mesh_that_does_not_fit_is_refused(asked):
  with pytest.raises(UserError, match=r"mesh\.data=.*mesh\.tensor=") as caught:
    sharding.make_mesh(*asked, devices=jax.devices()[:8])
  assert "\n" not in str(caught.value)


EXPECTED = {
  ("embed", "embedding"): P("tensor", "fsdp"),
  ("head", "weight"): P("tensor", "fsdp"),
  ("norm", "scale"): P("fsdp"),
  ("layers", "input_norm", "scale"): P(None, "fsdp"),
  ("layers", "post_norm", "scale"): P(None, "fsdp"),
  ("layers", "attention", "q_norm", "scale"): P(None, None),
  ("layers", "attention", "k_norm", "scale"): P(None, None),
  **{
    ("layers", *path, leaf): spec
    for paths, ins, outs in (
      ("attention.q attention.k attention.v mlp.gate mlp.up", "fsdp", "tensor"),
      ("attention.o mlp.down", "tensor", "fsdp"),
    )
    for path in (name.split(".") for name in paths.split())
    for leaf, spec in (
      ("kernel", P(None, ins, outs)),
      ("lora_a", P(None, ins, None)),
      ("lora_b", P(None, None, outs)),
    )
  },
}


def test_every_parameter_of_a_model_has_the_spec_of_its_axes():
  mesh = sharding.make_mesh(2, 2, 2)
  abstract = jax.eval_shape(lambda: Qwen3(SMALL, lora=LORA, rngs=nnx.Rngs(0)))
  placed = sharding.shardings(nnx.state(abstract), mesh)
  specs = {
    path: leaf.get_value().spec for path, leaf in nnx.to_flat_state(placed)
  }
  assert specs == EXPECTED


def test_arrays_made_with_the_shardings_are_split_that_way():
  mesh = sharding.make_mesh(2, 2, 2)
  graph, state = nnx.split(model())
  placed = jax.device_put(state, sharding.shardings(state, mesh))
  kernel = placed.layers.mlp.gate.kernel.get_value()
  assert kernel.sharding.spec == P(None, "fsdp", "tensor")
  L, D, F = SMALL.num_layers, SMALL.hidden_size, SMALL.intermediate_size
  assert {s.data.shape for s in kernel.addressable_shards} == {
    (L, D // 2, F // 2)
  }
  shapes = sharding.abstract(state, mesh)
  for array, shape in zip(
    jax.tree.leaves(placed), jax.tree.leaves(shapes), strict=True
  ):
    assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
    assert array.sharding == shape.sharding
  del graph


def test_an_axis_that_does_not_divide_stays_whole():
  mesh = sharding.make_mesh(1, 4, 2)
  assert sharding.partition((30, 48), ("embed", "mlp"), mesh) == P(
    None, "tensor"
  )
  assert sharding.partition((32, 47), ("embed", "mlp"), mesh) == P("fsdp", None)
  # Half of `batch` would divide; an axis is split whole or not at all.
  mesh = sharding.make_mesh(2, 2, 2)
  assert sharding.partition((6,), ("batch",), mesh) == P(None)


def test_a_collision_is_refused_and_so_is_an_unknown_name():
  mesh = sharding.make_mesh(2, 2, 2)
  with pytest.raises(ValueError, match=r"'heads' and 'mlp'.*'tensor'"):
    sharding.partition((8, 8), ("heads", "mlp"), mesh)
  with pytest.raises(ValueError, match=r"'batch' and 'embed'.*'fsdp'"):
    sharding.partition((8, 8), ("batch", "embed"), mesh)
  # Also where one of them isn't split in the end.
  with pytest.raises(ValueError, match="'tensor'"):
    sharding.partition((8, 7), ("heads", "mlp"), mesh)
  with pytest.raises(ValueError, match="'head'"):
    sharding.partition((8,), ("head",), mesh)
  with pytest.raises(ValueError, match="2 dimensions"):
    sharding.partition((8, 8), ("heads",), mesh)


def test_a_batch_is_split_by_groups_over_data_and_fsdp():
  mesh = sharding.make_mesh(2, 2, 2)
  assert sharding.num_groups(mesh) == 4
  batch = {"tokens": np.arange(24).reshape(4, 2, 3), "weight": np.ones(4)}
  placed = sharding.shard_batch(batch, mesh)
  assert placed["tokens"].sharding.spec == P(("data", "fsdp"))
  np.testing.assert_array_equal(placed["tokens"], batch["tokens"])
  for shard in placed["tokens"].addressable_shards:
    assert shard.data.shape == (1, 2, 3)
  with pytest.raises(ValueError, match="4 groups"):
    sharding.shard_batch(np.ones((6, 2)), mesh)


def test_constrain_pins_what_the_compiler_would_place_elsewhere():
  mesh = sharding.make_mesh(2, 2, 2)

  @jax.jit
  def pinned(x):
    return sharding.constrain(2 * x, "batch", None, "mlp")

  x = jnp.ones((8, 3, 4))
  with jax.set_mesh(mesh):
    assert pinned(x).sharding.spec == P(("data", "fsdp"), None, "tensor")
  np.testing.assert_array_equal(pinned(x), 2 * x)

  def inside(x):
    # `data` is this function's own here; the rest is the compiler's.
    assert x.shape == (4, 3, 4)
    return sharding.constrain(2 * x, "batch", None, "mlp")

  manual = jax.shard_map(
    inside,
    mesh=mesh,
    in_specs=P("data"),
    out_specs=P("data"),
    axis_names={"data"},
  )
  got = jax.jit(manual)(x)
  assert got.sharding.spec == P(("data", "fsdp"), None, "tensor")
  np.testing.assert_array_equal(got, 2 * x)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_the_model_gives_the_same_on_one_device_and_on_eight(sizes):
  config = dataclasses.replace(SMALL, num_kv_heads=4)
  made = model(config, lora=LORA)
  position, segment = packed((7, 3), 12)
  tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (8, 12))
  batch = (tokens, *np.broadcast_to([[position], [segment]], (2, 8, 12)))
  expected = forward(made, *batch)
  mesh = sharding.make_mesh(*sizes)
  graph, state = nnx.split(made)
  state = jax.device_put(state, sharding.shardings(state, mesh))
  with jax.set_mesh(mesh):
    placed = sharding.shard_batch(batch, mesh)
    program = forward.lower(nnx.merge(graph, state), *placed).compile()
    got = program(nnx.merge(graph, state), *placed)
  np.testing.assert_allclose(got, expected, atol=2e-5)
  if sizes == (1, 8, 1):
    # FSDP gathers weights; rows never leave their device.
    rows = f"[8,12,{SMALL.hidden_size}]"
    assert rows not in program.as_text()
    assert got.sharding.spec[0] in ("fsdp", ("data", "fsdp"))
