"""Products in eight bits: their error, their scales, their places."""

import dataclasses
import types

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests.support.small_models import LORA, SMALL, forward, model, tree
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.processes import nvidia
from trd_jax.model import float8, sharding
from trd_jax.model.weights import hf

needs_devices = pytest.mark.skipif(
  jax.device_count() < 8, reason="needs 8 (host) devices"
)
LINEAR = [
  ("layers", part, name)
  for part, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down")))
  for name in names
]


def arrays(rows, columns):
  """Numbers of all sizes: rows and columns of zeros, outliers."""
  # Products of two such have float32's whole precision.
  return hnp.arrays(
    np.float32,
    (rows, columns),
    elements=st.builds(
      lambda sign, mantissa, e: float(np.float32(sign * np.ldexp(mantissa, e))),
      st.sampled_from([-1, 0, 1]),
      st.floats(0.5, 1, width=32),
      st.integers(-60, 60),
    ),
    fill=st.just(0.0),
  )


def by_product(x, kernel):
  """The product of rows and a kernel `[D, F]` as the model computes it."""
  kernel_FD, scale_F = float8.quantize(jnp.asarray(kernel))
  return np.asarray(float8.product(jnp.asarray(x), kernel_FD, scale_F))


def bound(x, kernel):
  """The most that rounding of both operands explains, in float64.

  A number that is rounded is off by half a unit of its last place: 2^-4 of
  itself, or 2^-10 of its scale where it is subnormal.
  """
  x, kernel = np.float64(x), np.float64(kernel)
  scale = np.abs(x).max(1, keepdims=True) / 448
  channel = np.abs(kernel).max(0, keepdims=True) / 448
  off_x = np.maximum(np.abs(x) / 16, scale / 1024)
  off_k = np.maximum(np.abs(kernel) / 16, channel / 1024)
  each = (np.abs(x) + off_x) @ off_k + off_x @ np.abs(kernel)
  # And float32's own, of scales and sums.
  sums = 1e-5 * np.abs(x) @ np.abs(kernel)
  return 1.001 * each + sums + np.finfo(np.float32).tiny


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(arrays(3, 7), arrays(7, 5))
def test_a_product_is_as_far_off_as_rounding_explains(x, kernel):
  exact = np.float64(x) @ np.float64(kernel)
  hypothesis.assume(np.abs(exact).max() < 1e37)
  got = by_product(x, kernel)
  assert got.dtype == np.float32
  assert (np.abs(got - exact) <= bound(x, kernel)).all()


def test_rows_and_channels_have_scales_of_their_own():
  rng = np.random.default_rng(0)
  x, kernel = rng.standard_normal((6, 64)), rng.standard_normal((64, 8))
  x, kernel = np.float32(x), np.float32(kernel)
  got = by_product(x, kernel)
  # By powers of two nothing is rounded otherwise, however far apart they are:
  # one scale for all would round the smaller ones to nothing.
  rows, channels = 2.0 ** np.arange(-25, 35, 10), 2.0 ** np.arange(-28, 28, 7)
  scaled = by_product(x * np.float32(rows)[:, None], kernel * channels[:8])
  np.testing.assert_array_equal(scaled, got * rows[:, None] * channels[:8])
  assert 0.01 < np.linalg.norm(got - x @ kernel) / np.linalg.norm(got) < 0.05


def test_what_eight_bits_hold_is_multiplied_exactly():
  rng = np.random.default_rng(0)
  x, kernel = rng.integers(-8, 9, (4, 32)), rng.integers(-8, 9, (32, 16))
  x[:, 0] = kernel[0] = 448
  x, kernel = np.float32(x), np.float32(kernel)
  np.testing.assert_array_equal(by_product(x, kernel), x @ kernel)
  nothing = by_product(np.zeros_like(x), kernel)
  np.testing.assert_array_equal(nothing, np.zeros((4, 16)))


def test_products_are_added_up_in_float32():
  # 2,048 times 448 x 448, and one more that bfloat16 has no bits for.
  x = np.full((1, 4096), 448, np.float32)
  x[0, 2048:] = 0
  x[0, -1] = 1
  kernel = np.full((4096, 1), 448, np.float32)
  exact = np.float64(x) @ np.float64(kernel)
  np.testing.assert_allclose(by_product(x, kernel), exact, rtol=1e-7)
  got = by_product(jnp.asarray(x, jnp.bfloat16), kernel)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(got), exact, rtol=2**-8)


def test_the_operands_of_a_compiled_product_have_eight_bits():
  kernel_FD, scale_F = float8.quantize(jnp.ones((32, 16)))
  lowered = jax.jit(float8.product).lower(
    jnp.ones((4, 32), jnp.bfloat16), kernel_FD, scale_F
  )
  (line,) = (x for x in lowered.as_text().splitlines() if "dot_general" in x)
  assert "(tensor<4x32xf8E4M3FN>, tensor<16x32xf8E4M3FN>)" in line
  # By default NVIDIA's library adds up in fewer bits than float32's.
  assert "precision = [HIGHEST, HIGHEST]" in line


def test_not_a_number_stays_none():
  x = np.ones((2, 8), np.float32)
  x[0, 3] = np.nan
  got = by_product(x, np.ones((8, 4), np.float32))
  assert np.isnan(got[0]).all()
  np.testing.assert_allclose(got[1], np.full(4, 8), rtol=1e-6)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2"])
def test_a_model_in_eight_bits_differs_in_its_linear_layers_alone(
  architecture, tmp_path
):
  config = SMALL
  if architecture == "qwen2":
    config = dataclasses.replace(SMALL, architecture="Qwen2ForCausalLM")
  made = model(config)
  base = tree(made)
  graph, state = nnx.split(float8.abstract(config, "float32"))
  rounded = float8.of_tree(base)
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), rounded)
  like = jax.tree.map(lambda x: (x.shape, x.dtype), nnx.to_pure_dict(state))
  assert shapes == like
  flat = nnx.traversals.flatten_mapping(rounded)
  for path, x in nnx.traversals.flatten_mapping(base).items():
    if path[:-1] in LINEAR and path[-1] == "kernel":
      assert flat.pop(path).dtype == jnp.float8_e4m3fn
      assert flat.pop((*path[:-1], "scale")).shape == x.shape[::2]
    else:
      assert flat.pop(path) is x
  assert not flat
  # It computes what the formula says, layer after layer.
  tokens = np.arange(24).reshape(2, 12) % 64
  position = np.tile(np.arange(12), (2, 1))
  where = tokens, position, np.ones_like(tokens)
  one, other = forward(made, *where), forward(nnx.merge(graph, rounded), *where)
  off = np.linalg.norm(other - one) / np.linalg.norm(one)
  assert 0.01 < off < 0.25
  # Read from its files it is the same, bit for bit.
  hf.save_hf(config, base, tmp_path / "model", dtype="float32")
  read = hf.load(tmp_path / "model", dtype="float32", in_float8=True)
  for path, x in nnx.traversals.flatten_mapping(tree(read)).items():
    np.testing.assert_array_equal(
      x, nnx.traversals.flatten_mapping(rounded)[path], err_msg=str(path)
    )


def test_nobody_takes_its_derivative():
  made = model()
  graph = nnx.graphdef(float8.abstract(SMALL, "float32"))
  rounded = float8.of_tree(tree(made))
  tokens = np.arange(12)[None]

  def total(embed):
    model = nnx.merge(graph, {**rounded, "embed": embed})
    return model(tokens, tokens, np.ones_like(tokens)).sum()

  with pytest.raises(TypeError, match="it has no derivative"):
    jax.grad(total)(rounded["embed"])
  with pytest.raises(ValueError, match="an adapter is trained"):
    float8.in_float8(model(lora=LORA))


@needs_devices
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_on_several_devices_it_is_the_same(tmp_path, shape):
  made = model()
  hf.save_hf(SMALL, tree(made), tmp_path / "model", dtype="float32")
  mesh = sharding.make_mesh(*shape)
  read = hf.load(tmp_path / "model", dtype="float32", mesh=mesh, in_float8=True)
  wanted = float8.of_tree(tree(made))
  found = nnx.traversals.flatten_mapping(tree(read))
  for path, x in nnx.traversals.flatten_mapping(wanted).items():
    np.testing.assert_array_equal(found[path], x, err_msg=str(path))
  # Where the rules put it, and not wherever the compiler would.
  abstract = nnx.state(float8.abstract(SMALL, "float32"))
  places = nnx.to_pure_dict(sharding.shardings(abstract, mesh))
  for path, place in nnx.traversals.flatten_mapping(places).items():
    assert found[path].sharding.is_equivalent_to(place, found[path].ndim), path
  if shape == (2, 2, 2):
    gate = ("layers", "mlp", "gate")
    assert found[*gate, "kernel"].sharding.spec == P(None, "tensor", "fsdp")
    assert found[*gate, "scale"].sharding.spec == P(None, "tensor")
  tokens = np.arange(96).reshape(8, 12) % 64
  position = np.tile(np.arange(12), (8, 1))
  where = tokens, position, np.ones_like(tokens)
  graph = nnx.graphdef(float8.abstract(SMALL, "float32"))
  one = forward(nnx.merge(graph, wanted), *where)
  with jax.set_mesh(mesh):
    every = forward(read, *sharding.shard_batch(where, mesh))
  # A number next to the middle of two may be rounded to the other one, where
  # sums that are made in another order end on another side of it.
  off = np.linalg.norm(every - one) / np.linalg.norm(one)
  assert off < 1e-2
  same = np.abs(every - one).max(-1) < 1e-4
  assert same.mean() > 0.9


def device(kind, capability, platform="gpu"):
  return types.SimpleNamespace(
    device_kind=kind, compute_capability=capability, platform=platform
  )


@pytest.mark.parametrize(
  ("capability", "able"),
  [
    ("8.0", False),
    ("8.6", False),
    ("8.9", True),
    ("9.0", True),
    ("10.0", True),
    ("12.1", True),
    ("gfx942", False),
    ("", False),
  ],
)
def test_gpus_that_cannot_are_refused_by_name(capability, able):
  assert nvidia.has_float8(capability) == able
  devices = [device("H100", "9.0"), device("A card", capability)]
  if able:
    float8.check_devices(devices, "train.teacher_dtype=float8")
    return
  with pytest.raises(UserError) as caught:
    float8.check_devices(devices, "train.teacher_dtype=float8")
  told = str(caught.value)
  assert told.startswith("train.teacher_dtype=float8 needs NVIDIA GPUs of ")
  assert f"A card has {capability}" in told
  assert "\n" not in told


def test_cpus_compute_it_all_the_same():
  float8.check_devices(jax.devices("cpu"), "train.teacher_dtype=float8")
