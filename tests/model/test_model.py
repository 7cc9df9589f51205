import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.support.small_models import LORA, SMALL, forward, model, packed
from trd_jax.model.attention import kernels
from trd_jax.model.config import ARCHITECTURES
from trd_jax.model.decoding import Decoder
from trd_jax.model.lora import Linear, kept
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.qwen3 import KVCache, Qwen3, logits

KINDS = [
  *(("layers", "attention", name) for name in "qkvo"),
  *(("layers", "mlp", name) for name in ("gate", "up", "down")),
]


def _row(lengths, width, seed=0):
  """One row of documents, each token id at most once in it."""
  position, segment = packed(lengths, width)
  tokens = np.random.default_rng(seed).permutation(SMALL.vocab_size)[:width]
  return jnp.asarray(tokens)[None], position[None], segment[None]


@pytest.mark.slow
def test_a_token_is_seen_by_itself_and_later_ones_of_its_segment_only():
  made = model()
  tokens, position, segment = _row((5, 1, 4), 12)
  graph, embedding, rest = nnx.split(made, nnx.PathContains("embedding"), ...)

  @jax.jit
  @jax.jacrev
  def hidden(embedding):
    return nnx.merge(graph, embedding, rest)(tokens, position, segment)[0]

  # All ids differ and the head is untied: the gradient with respect to an
  # id's embedding is that with respect to the one position that has it.
  (gradient_TDVD,) = jax.tree.leaves(hidden(embedding))
  flow_TV = np.abs(np.asarray(gradient_TDVD)).max(axis=(1, 3))
  flow_TT = flow_TV[:, np.asarray(tokens[0])]
  later = position[0][None, :] > position[0][:, None]
  other = segment[0][None, :] != segment[0][:, None]
  documents = (segment[0] > 0)[:, None]
  assert np.all(flow_TT[(later | other) & documents] == 0)
  assert np.all(flow_TT[~(later | other) & documents] > 0)


@pytest.mark.slow
def test_packed_documents_equal_the_same_documents_alone():
  made = model()
  tokens, position, segment = _row((7, 7, 7), 24)
  hidden = forward(made, tokens, position, segment)
  for start in (0, 7, 14):
    part = slice(start, start + 7)
    alone = forward(
      made, tokens[:, part], np.arange(7)[None], np.ones((1, 7), int)
    )
    np.testing.assert_allclose(hidden[:, part], alone, atol=2e-5)


REMAT = ("none", "full", "dots", "attention")


@functools.cache
def trained(remat, config=SMALL):
  """Loss, adapter gradient and bytes of memory by a policy, with dropout."""
  made = model(config, lora=LORA)
  batch = _row((9, 6), 16)
  graph, adapter, base = nnx.split(made, nnx.LoRAParam, ...)

  def loss(adapter, base):
    whole = nnx.merge(graph, adapter, base)
    # What is computed again must drop the same channels again.
    key = jax.random.key(3)
    hidden = whole(*batch, remat=remat, dropout_key=key)
    return jnp.sum(logits(hidden, whole.head_VD) ** 2) / 1e3

  program = jax.jit(jax.value_and_grad(loss))
  compiled = program.lower(adapter, base).compile()
  memory = compiled.memory_analysis().temp_size_in_bytes
  return *compiled(adapter, base), memory


@pytest.mark.slow
@pytest.mark.parametrize("remat", REMAT[1:])
def test_remat_policies_equal_none_in_value_and_gradient(remat):
  value, gradient, _ = trained("none")
  value_remat, gradient_remat, _ = trained(remat)
  np.testing.assert_allclose(value_remat, value, rtol=1e-6)
  for one, other in zip(
    jax.tree.leaves(gradient_remat), jax.tree.leaves(gradient), strict=True
  ):
    scale = np.abs(other).max()
    assert scale > 0
    np.testing.assert_allclose(one, other, atol=1e-5 * scale)


@pytest.mark.slow
def test_remat_policies_keep_less_than_none_and_full_keeps_least():
  # What is kept grows with the layers. The memory that one block's passes work
  # in doesn't, and is the compiler's choice: of two layers' whole memory it can
  # be the larger part, and what little grows beside it lies in its gaps.
  some, more = (
    dataclasses.replace(SMALL, num_layers=layers) for layers in (4, 6)
  )
  bytes_of = {
    remat: (trained(remat, more)[2] - trained(remat, some)[2]) / 2
    for remat in REMAT
  }
  assert bytes_of["full"] == 16 * SMALL.hidden_size * 4  # the block's input
  assert bytes_of["full"] < bytes_of["attention"] < bytes_of["none"]
  assert bytes_of["full"] < bytes_of["dots"] < bytes_of["none"]


def _exponentials(remat):
  """Exponentials of whole blocks of scores that a gradient runs, a layer."""
  made = model(lora=LORA)
  batch = _row((9, 6), 16)
  graph, adapter, base = nnx.split(made, nnx.LoRAParam, ...)

  def loss(adapter):
    whole = nnx.merge(graph, adapter, base)
    return jnp.sum(whole(*batch, remat=remat) ** 2)

  def count(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
      if equation.primitive.name == "exp":
        total += equation.outvars[0].aval.size == 4 * 16 * 16
      for inner in jax.tree.leaves(
        equation.params, is_leaf=lambda x: hasattr(x, "eqns")
      ):
        if hasattr(inner, "eqns"):
          total += count(inner)
        elif hasattr(inner, "jaxpr"):
          total += count(inner.jaxpr)
    return total

  return count(jax.make_jaxpr(jax.grad(loss))(adapter).jaxpr)


@pytest.mark.slow
def test_saved_attention_is_not_run_again():
  # Forward and backward each have one; running forward again makes a third.
  assert {remat: _exponentials(remat) for remat in REMAT} == {
    "none": 2,
    "full": 3,
    "dots": 3,
    "attention": 2,
  }


@pytest.mark.parametrize("remat", REMAT[1:])
def test_no_mask_is_written_before_the_loop_over_layers(remat, monkeypatch):
  """Nor a 0 that stands for what isn't kept: layers make them as they read."""
  monkeypatch.setattr(
    kernels, "cudnn_packed", lambda q, k, v, *_: q * k.sum() + v.sum()
  )
  whole = model(lora=LORA)
  graph, adapter, base = nnx.split(whole, nnx.LoRAParam, ...)
  batch = _row((9, 6), 16)

  def loss(adapter):
    made = nnx.merge(graph, adapter, base)
    key = jax.random.key(3)
    return made(
      *batch, remat=remat, dropout_key=key, attention="cudnn_packed"
    ).sum()

  scans = [
    eqn
    for eqn in jax.make_jaxpr(jax.grad(loss))(adapter).eqns
    if eqn.primitive.name == "scan"
  ]
  assert len(scans) == 2  # forward and back
  for scan in scans:
    fixed = [x.aval for x in scan.invars[: scan.params["num_consts"]]]
    assert fixed
    # Angles, of a head's channels, are the largest that all layers share.
    assert max(x.size for x in fixed) <= 16 * SMALL.head_dim, fixed


def test_an_unknown_remat_policy_is_refused():
  with pytest.raises(ValueError, match="some"):
    model()(*_row((4,), 4), remat="some")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LORA, None])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefill_then_decode_equals_the_full_forward(architecture, lora):
  config = dataclasses.replace(SMALL, architecture=architecture)
  made = model(config, lora=lora)
  generator = np.random.default_rng(0)
  tokens = jnp.asarray(generator.integers(0, SMALL.vocab_size, (3, 12)))
  position = np.broadcast_to(np.arange(12), (3, 12))
  full = forward(made, tokens, position, np.ones((3, 12), int))
  length = np.array([3, 8, 1])
  prompt = jnp.where(position[:, :8] < length[:, None], tokens[:, :8], 63)
  hidden, cache = jax.jit(Qwen3.prefill)(made, prompt, length)
  for row, count in enumerate(length):
    np.testing.assert_allclose(
      hidden[row, :count], full[row, :count], atol=2e-5
    )
  cache = _widened(cache, 8)
  for step in range(4):
    at = length + step
    new, cache = _decode(made, tokens[np.arange(3), at], at, cache)
    np.testing.assert_allclose(new.T, full[np.arange(3), at], atol=5e-5)


@jax.jit
def _decode(made, tokens, position, cache):
  return Decoder.of(made).step(tokens, position, cache, made.config)


def _widened(cache, more):
  """The cache with room for more positions."""
  keys = ((0, 0), (0, 0), (0, 0), (0, more))
  values = ((0, 0), (0, 0), (0, more), (0, 0))
  return KVCache(
    tuple(jnp.pad(x, keys) for x in cache.keys),
    tuple(jnp.pad(x, values) for x in cache.values),
  )


@pytest.mark.slow
def test_decode_past_the_cache_writes_nothing():
  made = model()
  prompt = jnp.ones((2, 4), int)
  _, cache = jax.jit(Qwen3.prefill)(made, prompt, np.array([4, 4]))
  _, after = _decode(made, jnp.array([5, 5]), jnp.array([3, 4]), cache)
  for new, old in zip(
    jax.tree.leaves(after), jax.tree.leaves(cache), strict=True
  ):
    assert not np.array_equal(new[0], old[0])
    np.testing.assert_array_equal(new[1], old[1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_new_adapter_changes_no_bit_of_the_base(dtype):
  make = {"dtype": dtype, "rngs": nnx.Rngs(0)}
  adapted = Qwen3(SMALL, lora=LORA, **make)
  base = nnx.state(adapted, nnx.Not(nnx.LoRAParam))
  plain = nnx.merge(nnx.graphdef(Qwen3(SMALL, **make)), base)
  batch = _row((7, 3, 6), 20)
  expected = forward(plain, *batch)
  np.testing.assert_array_equal(forward(adapted, *batch), expected)
  key = jax.random.key(0)
  np.testing.assert_array_equal(forward(adapted, *batch, key), expected)


def test_the_adapter_is_all_that_has_a_gradient():
  made = model(lora=LORA)
  assert {path[:-1] for path in _paths(made, nnx.LoRAParam)} == set(KINDS)
  flat = nnx.to_flat_state(trained("none")[1])
  assert {path for path, _ in flat} == _paths(made, nnx.LoRAParam)
  for path, leaf in flat:
    # Every layer's adapter of every kind takes part.
    per_layer = np.abs(leaf.get_value()).max(axis=(1, 2))
    assert np.all(per_layer > 0), path
    assert leaf.get_value().dtype == jnp.float32


def test_the_base_of_an_adapted_model_is_a_model_without_adapters():
  adapted, plain = model(lora=LORA), model()
  assert _paths(adapted, nnx.Not(nnx.LoRAParam)) == _paths(plain, ...)


def _paths(made, only):
  return {path for path, _ in nnx.to_flat_state(nnx.state(made, only))}


@pytest.mark.slow
def test_dropout_acts_only_with_a_key_and_on_the_adapter_alone():
  made = model(lora=LoraConfig(rank=4, alpha=8.0, dropout=0.5))
  never = model(lora=LoraConfig(rank=4, alpha=8.0, dropout=0.0))
  batch = _row((9,), 10)
  key, other = jax.random.split(jax.random.key(0))
  still = forward(made, *batch)
  np.testing.assert_array_equal(still, forward(never, *batch))
  np.testing.assert_array_equal(still, forward(never, *batch, key))
  dropped = forward(made, *batch, key)
  np.testing.assert_array_equal(dropped, forward(made, *batch, key))
  assert not np.allclose(dropped, still, atol=1e-3)
  assert not np.allclose(dropped, forward(made, *batch, other), atol=1e-3)
  plain = model()
  np.testing.assert_array_equal(
    forward(plain, *batch, key), forward(plain, *batch)
  )


@pytest.mark.slow
def test_dropout_drops_its_share_and_keeps_the_mean():
  rate, width = 0.25, 400
  lora = LoraConfig(rank=width, alpha=2.0 * width, dropout=rate)
  layer = Linear(
    width,
    width,
    ("embed", "mlp"),
    lora=lora,
    dtype=jnp.float32,
    rngs=nnx.Rngs(0),
  )
  layer.kernel.set_value(jnp.zeros((width, width)))
  layer.lora_a.set_value(jnp.eye(width))
  layer.lora_b.set_value(jnp.eye(width))
  out = np.asarray(layer(jnp.ones((100, width)), jax.random.key(0)))
  # alpha / rank = 2, of channels that are scaled up for the lost ones.
  np.testing.assert_allclose(np.unique(out), [0, 2 / (1 - rate)], rtol=1e-6)
  assert abs(np.mean(out == 0) - rate) < 0.01


def test_adapters_add_alpha_over_rank_times_their_product():
  made = model(lora=LORA)
  layer = jax.tree.map(lambda x: x[0], made.layers.attention.q)
  x = np.random.default_rng(0).standard_normal((5, SMALL.hidden_size))
  a, b, w = (
    np.asarray(p[...], np.float64)
    for p in (layer.lora_a, layer.lora_b, layer.kernel)
  )
  np.testing.assert_allclose(
    layer(jnp.asarray(x, jnp.float32)), x @ w + 2.0 * x @ a @ b, atol=1e-4
  )


def test_logits_of_bfloat16_are_accumulated_in_float32():
  hidden, head = (
    jax.random.normal(jax.random.key(i), (8, 512), jnp.bfloat16)
    for i in range(2)
  )
  got = logits(hidden, head)
  assert got.dtype == jnp.float32
  exact = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
  np.testing.assert_allclose(got, exact, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_number_of_parameters_is_that_of_the_tree(tied, architecture):
  config = dataclasses.replace(
    SMALL, tie_embeddings=tied, architecture=architecture
  )
  made = jax.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0)))
  sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(made))]
  assert config.num_parameters() == sum(sizes)


def _masks(rate, shape=(64, 48, 80)):
  """Masks of three keys that a training would make of one, as float64."""
  keys = jax.random.split(jax.random.key(7, impl="rbg"), 3)
  return [np.asarray(kept(key, shape, rate), float) for key in keys]


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_dropouts_hash_drops_its_rate_of_every_row_and_column(rate):
  for mask in _masks(rate):
    spread = np.sqrt(rate * (1 - rate))
    assert abs(mask.mean() - (1 - rate)) < 4 * spread / np.sqrt(mask.size)
    # Means along each axis scatter as those of independent draws do.
    for axis in range(mask.ndim):
      means = mask.mean(tuple(i for i in range(mask.ndim) if i != axis))
      expected = spread / np.sqrt(mask.size / len(means))
      assert 0.6 * expected < means.std() < 1.5 * expected


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_dropouts_hash_is_independent_of_its_neighbours_and_keys(rate):
  first, *others = [
    (mask - (1 - rate)) / np.sqrt(rate * (1 - rate)) for mask in _masks(rate)
  ]
  limit = 4.5 / np.sqrt(first.size)
  for other in others:  # another layer, or step
    assert abs((first * other).mean()) < limit
  for axis in range(first.ndim):
    for shift in (1, 2, 3, 7, 16, 32):
      moved = np.roll(first, shift, axis)
      assert abs((first * moved).mean()) < limit
      for other in others:
        assert abs((moved * other).mean()) < limit


def test_dropouts_hash_is_by_place_and_key_alone():
  key = jax.random.key(3)
  whole = np.asarray(kept(key, (6, 16), 0.3))
  np.testing.assert_array_equal(
    whole, kept(key, (2, 3, 16), 0.3).reshape(6, 16)
  )
  np.testing.assert_array_equal(whole[:4, :8], kept(key, (4, 8), 0.3))
  assert np.any(whole != kept(jax.random.key(4), (6, 16), 0.3))
  assert np.all(kept(key, (6, 16), 0.0))
