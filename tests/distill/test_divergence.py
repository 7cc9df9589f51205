"""The chunked loss is the formula, in value, gradient and cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.support.divergence_reference import (
  FORMS,
  KINDS,
  error,
  made,
  reference,
  scoring,
)
from trd_jax.distill.loss.divergences import DIVERGENCES, Divergence
from trd_jax.distill.loss.token_stats import (
  Scoring,
  TokenStats,
  automatic_chunk,
  token_stats,
)
from trd_jax.experiment import methods

FULL_VOCABULARY = 151_936
# No power of two, so that weighing a bfloat16 gradient rounds it.
COTANGENT = 0.7


def make_inputs(
  rows, vocab, widths=(24, 16), dtype=jnp.float32, scale=1.0, seed=0
):
  """Inputs of `token_stats`; the two sides agree in part."""
  rng = np.random.default_rng(seed)
  student, teacher = widths

  def normal(*shape):
    return rng.standard_normal(shape)

  hidden, head = normal(rows, student), normal(vocab, student)
  near = min(widths)
  teacher_hidden, teacher_head = normal(rows, teacher), normal(vocab, teacher)
  teacher_hidden[:, :near] += hidden[:, :near]
  teacher_head[:, :near] = head[:, :near]
  size = 3 * scale / np.sqrt(student)
  arrays = hidden * size, teacher_hidden * size, head, teacher_head
  onset = rng.choice(vocab, min(vocab, 21), replace=False).astype(np.int32)
  labels = rng.integers(0, vocab, rows).astype(np.int32)
  return (*(jnp.asarray(x, dtype) for x in arrays), labels, onset)


@functools.partial(jax.jit, static_argnums=1)
def scored(inputs, spec):
  """(stats, COTANGENT · d sum of divergences / d student hidden)."""

  def total(hidden):
    stats = token_stats(hidden, *inputs[1:], spec)
    return COTANGENT * stats.divergence.sum(), stats

  gradient, stats = jax.grad(total, has_aux=True)(inputs[0])
  return stats, gradient


def hold(inputs, spec, *, value, gradient):
  """The spec's every number against float64; bounds are relative errors."""
  wanted = reference(inputs, spec.divergence, spec.temperature)
  stats, slope = scored(inputs, spec)
  for name, x in stats._asdict().items():
    assert x.dtype == jnp.float32, name
    assert error(x, wanted[name]) < value, name
  assert slope.dtype == inputs[0].dtype
  assert error(slope, COTANGENT * wanted["gradient"]) < gradient


def small(kind, **settings):
  """Inputs and spec with rests everywhere: 300 = 2 · 128 + 44, 37 = 4 · 8 + 5.

  Tests share them so that each kind is compiled once.
  """
  settings = {"beta": 0.3, "top_k": 5, "chunk_tokens": 8, **settings}
  return make_inputs(37, 300), scoring(kind, **settings)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64_reference(kind, temperature):
  inputs, spec = small(kind, temperature=temperature)
  hold(inputs, spec, value=3e-6, gradient=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64_reference_at_full_vocabulary(kind):
  # Flat enough for a normaliser to be a sum of 152K terms that all matter.
  inputs = make_inputs(6, FULL_VOCABULARY, scale=0.3)
  hold(inputs, scoring(kind, chunk_tokens=4), value=5e-6, gradient=1e-5)
  stats, _ = scored(inputs, scoring(kind, chunk_tokens=4))
  wanted = reference(inputs, made(kind))
  for name in "student_nll", "teacher_nll", "student_entropy":
    np.testing.assert_allclose(
      getattr(stats, name), wanted[name], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_inputs_cost_only_their_own_rounding(kind):
  spec = scoring(kind, chunk_tokens=16)
  inputs = make_inputs(32, 1000, dtype=jnp.bfloat16)
  hold(inputs, spec, value=1e-5, gradient=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_slope_is_that_of_its_value(kind):
  inputs = make_inputs(3, 50)
  direction = np.random.default_rng(1).standard_normal(inputs[0].shape)

  def at(step):
    moved = np.asarray(inputs[0], np.float64) + step * direction
    out = reference((moved, *inputs[1:]), made(kind, beta=0.3), 2)
    return out["divergence"], (out["gradient"] * direction).sum(-1)

  (high, _), (low, _), (_, slope) = at(1e-5), at(-1e-5), at(0)
  np.testing.assert_allclose((high - low) / 2e-5, slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("chunk_tokens", [1, 12, 512])
def test_chunk_size_does_not_matter(chunk_tokens):
  inputs = make_inputs(13, 260)
  whole, gradient = scored(inputs, Scoring(chunk_tokens=13))
  parts, same = scored(inputs, Scoring(chunk_tokens=chunk_tokens))
  for a, b in zip(whole, parts, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(gradient, same, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("width", "vocab", "dtype", "rows"),
  [
    (4096, 151_936, jnp.bfloat16, 1024),
    (5120, 151_936, jnp.bfloat16, 768),
    # Narrower: the blocks of logits would be too large.
    (1024, 151_936, jnp.bfloat16, 1408),
    (1024, 151_936, jnp.float32, 1664),
    # Split over 8.
    (1024, 18_992, jnp.bfloat16, 4096),
    (2**20, 2**30, jnp.float32, 128),
  ],
)
def test_an_automatic_chunk_fills_the_device(width, vocab, dtype, rows):
  for platform in "gpu", "tpu":
    assert automatic_chunk(width, vocab, dtype, platform) == rows
  assert automatic_chunk(width, vocab, dtype, "cpu") == 512


def test_without_a_chunk_size_the_automatic_one_is_walked():
  inputs = make_inputs(520, 3, widths=(2, 2))

  def heights(chunk_tokens):
    spec = Scoring(chunk_tokens=chunk_tokens, diagnostics=False)
    jaxpr = jax.make_jaxpr(lambda h: token_stats(h, *inputs[1:], spec))
    scans = [
      e for e in equations(jaxpr(inputs[0]).jaxpr) if e.primitive.name == "scan"
    ]
    return [e.params["length"] for e in scans]

  # The tests run on CPUs.
  assert heights(None) == heights(512) == [2]
  assert heights(520) == [1]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl_topk"])
def test_only_the_divergence_and_only_the_student_carry_gradient(kind):
  inputs, spec = small(kind)
  *arrays, labels, onset = inputs

  @jax.jit
  def gradients(arrays):
    stats, pull = jax.vjp(
      lambda *x: token_stats(*x, labels, onset, spec), *arrays
    )
    none = jax.tree.map(jnp.zeros_like, stats)
    return {
      name: pull(none._replace(**{name: jnp.ones_like(stats.divergence)}))
      for name in TokenStats._fields
    }

  for name, of_arrays in gradients(arrays).items():
    moved = [bool(jnp.any(g != 0)) for g in of_arrays]
    assert moved == [name == "divergence", False, False, False], name


def test_gradient_rows_scale_with_the_cotangent():
  inputs, spec = small("forward_kl")
  weights = jnp.asarray(np.random.default_rng(2).integers(-2, 3, 37), float)

  @jax.jit
  def weighted(hidden):
    return token_stats(hidden, *inputs[1:], spec).divergence @ weights

  plain = weights[:, None] * scored(inputs, spec)[1] / COTANGENT
  np.testing.assert_allclose(jax.grad(weighted)(inputs[0]), plain, rtol=1e-6)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_equal_sides_have_no_divergence_and_no_slope(kind):
  hidden, _, head, _, *rest = make_inputs(9, 5000)
  stats, gradient = scored(
    (hidden, hidden, head, head, *rest), scoring(kind, chunk_tokens=4)
  )
  assert (stats.divergence == 0).all()
  assert (gradient == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite_and_right(kind):
  (hidden, teacher_hidden, *rest), spec = small(kind)
  inputs = 2e3 * hidden, 2e3 * teacher_hidden, *rest
  assert abs(inputs[0] @ inputs[2].T).max() > 1e4
  stats, gradient = scored(inputs, spec)
  wanted = reference(inputs, spec.divergence)
  assert all(np.isfinite(x).all() for x in (*stats, gradient))
  np.testing.assert_allclose(
    stats.divergence, wanted["divergence"], rtol=1e-4, atol=1e-4
  )
  np.testing.assert_allclose(
    gradient, COTANGENT * wanted["gradient"], rtol=1e-3, atol=1e-2
  )
  if kind == "jsd":
    entropy = -0.3 * np.log(0.3) - 0.7 * np.log(0.7)
    assert stats.divergence.max() < entropy + 1e-6


def test_top_k_support_takes_the_lower_id_of_equal_teacher_logits():
  inputs, spec = small("reverse_kl_topk")
  hidden, teacher_hidden, head, teacher_head, *rest = inputs
  teacher_head = teacher_head.at[150:].set(teacher_head[:150])
  inputs = hidden, teacher_hidden, head, teacher_head, *rest
  hold(inputs, spec, value=3e-6, gradient=3e-6)


def test_without_diagnostics_only_what_is_paid_for_is_there():
  inputs = make_inputs(4, 300)

  def absent(kind):
    stats, _ = scored(inputs, scoring(kind, diagnostics=False))
    return {name for name, x in stats._asdict().items() if x is None}

  top = {"student_top16_mass", "teacher_top16_mass"}
  assert absent("forward_kl") == top
  assert absent("reverse_kl_topk") == top | {
    "student_nll",
    "student_entropy",
    "student_onset_mass",
  }


def equations(jaxpr):
  """Every equation, those of inner programs included."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for part in value if isinstance(value, tuple) else (value,):
        inner = getattr(part, "jaxpr", part)
        if hasattr(inner, "eqns"):
          yield from equations(inner)


def programs(kind, diagnostics, rows=24, vocab=300):
  """Jaxprs of the value alone and of the gradient, in chunks of 8 rows."""
  inputs = make_inputs(rows, vocab)
  spec = scoring(kind, chunk_tokens=8, top_k=4, diagnostics=diagnostics)

  def value(hidden):
    return token_stats(hidden, *inputs[1:], spec)

  def gradient(hidden):
    return jax.grad(lambda h: value(h).divergence.sum())(hidden)

  return [jax.make_jaxpr(f)(inputs[0]).jaxpr for f in (value, gradient)]


@pytest.mark.parametrize("diagnostics", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_products_with_the_head_are_two_or_three_a_chunk(kind, diagnostics):
  counts = []
  for jaxpr in programs(kind, diagnostics):
    heads = [
      e
      for e in equations(jaxpr)
      if e.primitive.name == "dot_general"
      and any(300 in v.aval.shape for v in e.invars)
    ]
    assert all(e.params["preferred_element_type"] == jnp.float32 for e in heads)
    counts.append(len(heads))
  # On top-K rows both products with the student's head are small ones.
  small = kind == "reverse_kl_topk"
  assert counts == ([1 + diagnostics] * 2 if small else [2, 3])


def test_top_k_makes_the_students_logits_for_diagnostics_only():
  def widths(diagnostics):
    """Of the hidden states that meet all ids, in value and gradient."""
    return [
      {
        e.invars[0].aval.shape[1]
        for e in equations(jaxpr)
        if e.primitive.name == "dot_general"
        and e.outvars[0].aval.shape[-1] == 300
      }
      for jaxpr in programs("reverse_kl_topk", diagnostics)
    ]

  assert widths(True) == [{24, 16}] * 2
  assert widths(False) == [{16}] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_as_large_as_all_logits_or_a_head_is_made(kind):
  for jaxpr in programs(kind, True):
    for equation in equations(jaxpr):
      for out in equation.outvars:
        shape = out.aval.shape
        # A chunk has 8 rows of the 300 ids, a head 24 or 16 numbers an id.
        assert 300 not in shape or out.aval.size <= 8 * 300, equation


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_compiled_memory_is_two_blocks_of_logits_at_any_length(kind):
  vocab, chunk = 5120, 32
  block = vocab * chunk * 4

  def temporary(rows):
    inputs = make_inputs(rows, vocab)
    # Top-16 candidates are narrow beside a real vocabulary, not beside 5120.
    spec = scoring(kind, chunk_tokens=chunk, diagnostics=False)
    compiled = scored.lower(inputs, spec).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = temporary(64), temporary(256)
  assert short < 2.2 * block
  assert long < 1.05 * short


def mesh_of(devices):
  return jax.make_mesh(
    (devices,),
    ("data",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:devices],
  )


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "reverse_kl_topk"])
def test_eight_devices_equal_one(kind):
  hidden, teacher, *heads, labels, onset = make_inputs(48, 300)
  spec = scoring(kind, chunk_tokens=4, top_k=4)
  weights = jnp.linspace(0, 1, 48)

  def gradient_on(devices):
    rows, all_ = P("data"), P()

    @functools.partial(
      jax.shard_map,
      mesh=mesh_of(devices),
      in_specs=(rows, rows, all_, all_, rows, all_, rows),
      out_specs=(all_, rows),
    )
    def loss(hidden, teacher, head, teacher_head, labels, onset, weights):
      stats = token_stats(
        hidden, teacher, head, teacher_head, labels, onset, spec
      )
      return jax.lax.psum(stats.divergence @ weights, "data"), stats

    def of(hidden):
      return loss(hidden, teacher, *heads, labels, onset, weights)

    return jax.jit(jax.value_and_grad(of, has_aux=True))(hidden)

  one, eight = gradient_on(1), gradient_on(8)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["reverse_kl", "reverse_kl_topk"])
def test_vmap_over_groups_of_slots(kind):
  hidden, teacher, *heads, labels, onset = make_inputs(12, 150)
  spec = scoring(kind, chunk_tokens=4, top_k=4)

  def run(hidden, teacher, labels):
    return scored((hidden, teacher, *heads, labels, onset), spec)

  whole = run(hidden, teacher, labels)
  split = [x.reshape(2, 6, *x.shape[1:]) for x in (hidden, teacher, labels)]
  for a, b in zip(
    jax.tree.leaves(whole), jax.tree.leaves(jax.vmap(run)(*split)), strict=True
  ):
    np.testing.assert_allclose(a, b.reshape(a.shape), rtol=2e-5, atol=1e-6)


def test_no_slots_and_no_onsets():
  inputs = make_inputs(0, 300)
  stats, gradient = scored((*inputs[:5], inputs[5][:0]), Scoring())
  assert gradient.shape == (0, 24)
  assert all(x.shape == (0,) for x in stats)
  stats, _ = scored((*make_inputs(3, 300)[:5], inputs[5][:0]), Scoring())
  assert (stats.teacher_onset_mass == 0).all()


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"kind": "forward_kl", "temperature": 0.0}, "temperature"),
    ({"kind": "jsd", "beta": 1.0}, "beta"),
    ({"kind": "forward_kl", "chunk_tokens": 0}, "chunk_tokens"),
    ({"kind": "reverse_kl_topk", "top_k": 0}, "top_k"),
    ({"kind": "reverse_kl_topk", "top_k": -1}, "top_k must be at least 0"),
  ],
)
def test_settings_out_of_range_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    scoring(**settings)


def test_what_a_config_can_name_is_what_there_is():
  assert DIVERGENCES.keys() | FORMS.keys() == set(KINDS)
  for kind, divergence in DIVERGENCES.items():
    fields = {field.name for field in dataclasses.fields(divergence)}
    assert fields == methods.DIVERGENCES[kind].parameters.keys()
  with pytest.raises(KeyError, match="undeclared"):

    class _(Divergence, name="undeclared"):
      pass


def test_inputs_that_do_not_fit_are_refused():
  student, teacher, head, teacher_head, labels, onset = make_inputs(4, 30)

  def refused(kind, message, *inputs):
    with pytest.raises(kind, match=message):
      token_stats(*inputs, onset, Scoring())

  refused(ValueError, "teacher: hidden", student, teacher, head, head, labels)
  refused(
    ValueError,
    "student: 4 hidden",
    student,
    teacher,
    head,
    teacher_head,
    labels[:3],
  )
  refused(
    ValueError,
    "vocabularies differ: 30",
    student,
    teacher,
    head,
    teacher_head[:29],
    labels,
  )
  refused(
    TypeError,
    "student: hidden states are bfloat16",
    student.astype(jnp.bfloat16),
    teacher,
    head,
    teacher_head,
    labels,
  )
