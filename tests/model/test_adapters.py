import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.support.small_models import LORA, SMALL, forward, model, tree
from trd_jax.experiment.errors import UserError
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.qwen3 import logits
from trd_jax.model.weights.adapters import (
  load_peft,
  logit_difference,
  merge,
  plain_model,
  save_peft,
)
from trd_jax.model.weights.hf import load, save_hf

FILE = "adapter_model.safetensors"
TOKENS = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 20))
LENGTH = np.array([20, 11])


def _adapted(dtype=jnp.float32, scale=1.0):
  """A model, its base's tree and its adapter's."""
  made = model(lora=LORA, dtype=dtype)
  graph, adapter, base = nnx.split(made, nnx.LoRAParam, ...)
  adapter = jax.tree.map(lambda x: scale * x, adapter)
  made = nnx.merge(graph, adapter, base)
  return made, nnx.to_pure_dict(base), nnx.to_pure_dict(adapter)


def _logits(made):
  position = np.broadcast_to(np.arange(20), TOKENS.shape)
  segment = (position < LENGTH[:, None]).astype(int)
  hidden = forward(made, TOKENS, position, segment)
  return np.asarray(logits(hidden, made.head_VD))[segment > 0]


def test_merged_equals_adapter_on_in_float32():
  made, base, adapter = _adapted()
  merged = plain_model(SMALL, merge(base, adapter, LORA))
  on, off = _logits(made), _logits(plain_model(SMALL, base))
  assert np.abs(on - off).max() > 1  # the adapter does something
  np.testing.assert_allclose(_logits(merged), on, atol=5e-5)


def test_merged_kernels_are_the_float64_sum_rounded_once():
  # An adapter of the size that training leaves: near a step of bfloat16.
  made, base, adapter = _adapted(jnp.bfloat16, scale=0.1)
  merged = merge(base, adapter, LORA)
  del made
  for kind, name in (("attention", "o"), ("mlp", "down")):
    before = np.asarray(base["layers"][kind][name]["kernel"], np.float64)
    pair = adapter["layers"][kind][name]
    a, b = (np.asarray(pair[x], np.float64) for x in ("lora_a", "lora_b"))
    exact = before + LORA.alpha / LORA.rank * np.einsum("lir,lro->lio", a, b)
    got = merged["layers"][kind][name]["kernel"]
    assert got.dtype == jnp.bfloat16
    rounded = exact.astype(jnp.bfloat16)
    # Ties apart (float32 against float64), each is the nearest bfloat16.
    assert np.mean(np.asarray(got) == rounded) > 0.999
    assert np.mean(np.asarray(got) == before.astype(jnp.bfloat16)) < 0.9
  for path in (("embed", "embedding"), ("norm", "scale")):
    assert merged[path[0]][path[1]] is base[path[0]][path[1]]


# Measured: root mean square error over the logits' deviation, 0.018.
BFLOAT16_BOUND = 0.025


def test_merged_in_bfloat16_stays_within_the_stated_bound():
  made, base, adapter = _adapted(jnp.bfloat16)
  on = _logits(made)
  merged = _logits(plain_model(SMALL, merge(base, adapter, LORA)))
  error = np.sqrt(np.mean((merged - on) ** 2)) / on.std()
  assert error < BFLOAT16_BOUND


def test_the_largest_logit_difference_is_over_all_counted_positions():
  made, base, adapter = _adapted()
  other = plain_model(SMALL, base)
  expected = np.abs(_logits(made) - _logits(other)).max()
  got = logit_difference(made, other, TOKENS, LENGTH)
  np.testing.assert_allclose(got, expected, rtol=1e-4)
  merged = plain_model(SMALL, merge(base, adapter, LORA))
  assert logit_difference(made, merged, TOKENS, LENGTH) < 5e-5
  # More positions than are compared at a time; padding is never among them.
  long = np.tile(TOKENS, (10, 1))
  np.testing.assert_allclose(
    logit_difference(made, other, long, np.tile(LENGTH, 10)),
    expected,
    rtol=1e-4,
  )


def test_an_adapter_comes_back_from_peft_format(tmp_path):
  _, _, adapter = _adapted()
  save_peft(adapter, LORA, tmp_path / "a", base="some/model")
  lora, again = load_peft(tmp_path / "a", SMALL)
  assert lora == LORA
  assert jax.tree.structure(again) == jax.tree.structure(adapter)
  for one, other in zip(
    jax.tree.leaves(again), jax.tree.leaves(adapter), strict=True
  ):
    np.testing.assert_array_equal(one, other)


@pytest.mark.filterwarnings("ignore:.is_gradient_check:FutureWarning")
@pytest.mark.slow
def test_peft_itself_loads_the_adapter_to_the_same_logits(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  peft = pytest.importorskip("peft")
  made, base, adapter = _adapted()
  save_hf(SMALL, base, tmp_path / "base", dtype="float32")
  save_peft(adapter, LORA, tmp_path / "adapter", base=str(tmp_path / "base"))
  theirs = transformers.Qwen3ForCausalLM.from_pretrained(
    tmp_path / "base", dtype="float32", attn_implementation="eager"
  )
  theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
  with torch.no_grad():
    expected = theirs(torch.from_numpy(TOKENS[:1])).logits.numpy()[0]
  np.testing.assert_allclose(_logits(made)[:20], expected, atol=2e-4)
  # And what peft writes is what this project reads.
  theirs.save_pretrained(tmp_path / "again")
  lora, again = load_peft(tmp_path / "again", SMALL)
  assert lora == LORA
  for one, other in zip(
    jax.tree.leaves(again), jax.tree.leaves(adapter), strict=True
  ):
    np.testing.assert_array_equal(one, other)


def _key(layer, name, part):
  return f"base_model.model.model.layers.{layer}.{name}.{part}.weight"


@pytest.mark.parametrize(
  ("fields", "change", "named"),
  [
    ({"peft_type": "IA3"}, None, ["peft_type", "IA3"]),
    ({"use_dora": True}, None, ["use_dora"]),
    ({"use_rslora": True}, None, ["use_rslora"]),
    ({"init_lora_weights": "pissa_niter_4"}, None, ["pissa_niter_4"]),
    ({"init_lora_weights": "olora"}, None, ["olora"]),
    ({"r": None}, None, ["r or lora_alpha"]),
    (
      {"r": 8},
      None,
      [_key(0, "self_attn.q_proj", "lora_A"), "(4, 32)", "(8, 32)"],
    ),
    (
      {},
      lambda t: t.pop(_key(1, "mlp.down_proj", "lora_B")),
      [_key(1, "mlp.down_proj", "lora_B"), "(32, 4)", "missing"],
    ),
    (
      {},
      lambda t: t.update({"lm_head.lora_A.weight": np.zeros((4, 32))}),
      ["lm_head.lora_A.weight", "(4, 32)"],
    ),
  ],
)
def test_an_adapter_of_another_kind_is_refused(tmp_path, fields, change, named):
  _, _, adapter = _adapted()
  folder = tmp_path / "a"
  save_peft(adapter, LORA, folder, base="some/model")
  config = folder / "adapter_config.json"
  config.write_text(json.dumps(json.loads(config.read_text()) | fields))
  if change is not None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)
  with pytest.raises(UserError) as caught:
    load_peft(folder, SMALL)
  message = str(caught.value)
  assert str(folder) in message
  assert "\n" not in message
  for part in named:
    assert part in message, message


def test_a_tree_of_another_rank_is_not_written(tmp_path):
  _, _, adapter = _adapted()
  with pytest.raises(ValueError, match="rank 8"):
    save_peft(adapter, LoraConfig(rank=8), tmp_path / "a", base="x")
  del adapter["layers"]["mlp"]["up"]
  with pytest.raises(ValueError, match="up"):
    save_peft(adapter, LORA, tmp_path / "a", base="x")
  assert not (tmp_path / "a").exists()


def test_a_merged_model_survives_the_way_to_disk(tmp_path):
  made, base, adapter = _adapted()
  merged = merge(base, adapter, LORA)
  save_hf(SMALL, merged, tmp_path / "merged", dtype="float32")
  loaded = load(tmp_path / "merged", dtype=jnp.float32)
  for one, other in zip(
    jax.tree.leaves(tree(loaded)), jax.tree.leaves(merged), strict=True
  ):
    np.testing.assert_array_equal(one, other)
  assert logit_difference(made, loaded, TOKENS, LENGTH) < 5e-5
