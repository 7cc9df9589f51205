"""A split vocabulary gives what a whole one gives, by all-reduces alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.distill.test_divergence import COTANGENT, make_inputs
from tests.support.divergence_reference import (
  KINDS,
  error,
  made,
  reference,
  scoring,
)
from trd_jax.distill.loss.token_stats import TokenStats, token_stats

# Rows divide by every number of token shards, ids by 8: parts of 150, 75 and,
# with a lane and a rest, 300 of 600; no two axes have one size.
ROWS, VOCAB, WIDTHS = 28, 600, (24, 16)
SPECS = {
  kind: scoring(kind, temperature=0.7, beta=0.3, top_k=5) for kind in KINDS
}
# Data and tensor.
MESHES = ((1, 2), (1, 4), (1, 8), (2, 2), (4, 2), (2, 4))


def mesh_of(data, tensor):
  return jax.make_mesh(
    (data, tensor),
    ("data", "tensor"),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[: data * tensor],
  )


def split_program(spec, mesh):
  """`f(inputs) -> (stats, gradient)`, slots over data, ids over tensor."""
  rows, heads = P("data"), P("tensor")

  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(rows, rows, heads, heads, rows, P()),
    out_specs=rows,
  )
  def stats(*inputs):
    return token_stats(*inputs, spec, vocab_axis="tensor")

  def gradient(inputs):
    def loss(hidden):
      made = stats(hidden, *inputs[1:])
      return COTANGENT * made.divergence.sum(), made

    slope, made = jax.grad(loss, has_aux=True)(inputs[0])
    return made, slope

  return jax.jit(gradient)


@functools.cache
def whole(kind):
  inputs = make_inputs(ROWS, VOCAB, WIDTHS)
  spec = SPECS[kind]

  @jax.jit
  def run(inputs):
    def loss(hidden):
      made = token_stats(hidden, *inputs[1:], spec)
      return COTANGENT * made.divergence.sum(), made

    slope, made = jax.grad(loss, has_aux=True)(inputs[0])
    return made, slope

  return inputs, *jax.device_get(run(inputs))


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_split_vocabulary_changes_rounding_only(kind, shape):
  inputs, stats, slope = whole(kind)
  made, gradient = split_program(SPECS[kind], mesh_of(*shape))(inputs)
  # A log-probability is a difference of logits, and so rounded in units of
  # their last place, however small it is; a divergence has two in each term.
  student_RV, teacher_RV = inputs[0] @ inputs[2].T, inputs[1] @ inputs[3].T
  largest = max(np.abs(student_RV).max(), np.abs(teacher_RV).max())
  unit = np.spacing(np.float32(largest / SPECS[kind].temperature))
  units = {"divergence": 4, "student_nll": 2, "teacher_nll": 2}
  for name in TokenStats._fields:
    np.testing.assert_allclose(
      getattr(made, name),
      getattr(stats, name),
      rtol=3e-6,
      atol=units.get(name, 0.5) * unit,
    )
  # What the whole one is held to against float64.
  assert error(gradient, slope) < 3e-6


@pytest.mark.parametrize("shape", [(1, 4), (2, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_meet_in_all_reduces_and_no_head_is_whole(kind, shape):
  inputs = whole(kind)[0]
  mesh = mesh_of(*shape)

  def place(x, spec):
    return jax.device_put(x, jax.NamedSharding(mesh, spec))

  rows, heads = P("data"), P("tensor")
  specs = rows, rows, heads, heads, rows, P()
  inputs = tuple(map(place, inputs, specs))
  text = split_program(SPECS[kind], mesh).lower(inputs).compile().as_text()
  found = re.findall(
    r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)"
    r"(?:-start)?\(",
    text,
  )
  assert set(found) == {"all-reduce"}
  # Shapes of the compiled program are those of one device.
  assert re.search(rf"\[{VOCAB // shape[1]},\d", text)
  assert not re.search(rf"[\[,]{VOCAB}[,\]]", text)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_a_device_holds_two_blocks_of_its_own_ids(kind):
  rows, chunk, here = 64, 32, 32 * 167
  inputs = make_inputs(rows, 4 * here)
  # Top-16 candidates are narrow beside a real vocabulary, not beside this one.
  spec = scoring(kind, chunk_tokens=chunk, diagnostics=False)
  compiled = split_program(spec, mesh_of(1, 4)).lower(inputs).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < 2.2 * 4 * chunk * here


def test_each_device_has_the_whole_gradient_of_its_own_loss():
  """Differentiated on the devices, by nobody who knows what is replicated."""
  inputs, _, slope = whole("jsd")
  heads = P("tensor")

  @jax.jit
  @functools.partial(
    jax.shard_map,
    mesh=mesh_of(1, 4),
    in_specs=(P(), P(), heads, heads, P(), P()),
    out_specs=heads,
    check_vma=False,
  )
  def gradients(hidden, *rest):
    def loss(hidden):
      stats = token_stats(hidden, *rest, SPECS["jsd"], vocab_axis="tensor")
      return COTANGENT * stats.divergence.sum()

    return jax.grad(loss)(hidden)[None]

  for gradient in gradients(*inputs):
    assert error(gradient, slope) < 3e-6


def test_a_bfloat16_gradient_is_rounded_once():
  """After the sum over parts: as near to float64 as that of one device."""
  inputs = make_inputs(ROWS, VOCAB, WIDTHS, dtype=jnp.bfloat16)
  spec = scoring("reverse_kl")
  _, gradient = split_program(spec, mesh_of(1, 8))(inputs)
  assert gradient.dtype == jnp.bfloat16
  wanted = reference(inputs, made("reverse_kl"))["gradient"]
  assert error(gradient, COTANGENT * wanted) < 5e-3
