import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from tests.support.small_models import LORA, SMALL, forward, model, tree
from trd_jax.experiment.errors import UserError
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.qwen3 import logits
from trd_jax.model.weights.adapters import (
  begin_with,
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
    ({"init_lora_weights": "loftq"}, None, ["loftq"]),
    ({"init_lora_weights": "lora_ga"}, None, ["lora_ga"]),
    ({"init_lora_weights": "of next year"}, None, ["of next year"]),
    ({"alora_invocation_tokens": [1]}, None, ["alora_invocation_tokens"]),
    ({"layer_replication": [[0, 2]]}, None, ["layer_replication"]),
    ({"a_field_of_next_year": 0}, None, ["a_field_of_next_year=0"]),
    ({"r": None}, None, ["r is None"]),
    ({"r": 4.5}, None, ["4.5"]),
    ({"r": True}, None, ["r is True"]),
    ({"lora_dropout": "0.1"}, None, ["'lora_dropout' is '0.1'"]),
    ({"lora_dropout": 1.0}, None, ["'lora_dropout' is 1.0"]),
    ({"lora_dropout": float("nan")}, None, ["'lora_dropout' is nan"]),
    ({"base_model_name_or_path": 7}, None, ["base_model_name_or_path"]),
    ({"lora_alpha": 0}, None, ["lora_alpha is 0"]),
    ({"lora_alpha": -8}, None, ["lora_alpha is -8"]),
    ({"lora_alpha": "8"}, None, ["lora_alpha is '8'"]),
    ({"target_modules": ["c_attn"]}, None, ["c_attn", "q_proj"]),
    ({"target_modules": 3}, None, ["target_modules=3"]),
    ({"target_modules": "(q_proj"}, None, ["(q_proj"]),
    # It names two kinds, and the file holds seven.
    ({"target_modules": ["q_proj", "v_proj"]}, None, ["not part"]),
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


@pytest.mark.parametrize(
  "targets",
  [
    ["q_proj", "v_proj"],
    ["self_attn.q_proj", "v_proj"],
    r".*\.(q|v)_proj",
    ["model.layers.0.self_attn.q_proj", "v_proj"],
  ],
)
def test_layers_that_an_adapter_leaves_alone_are_zero(tmp_path, targets):
  _, base, adapter = _adapted()
  folder = tmp_path / "a"
  save_peft(adapter, LORA, folder, base="some/model")
  config = folder / "adapter_config.json"
  fields = json.loads(config.read_text()) | {"target_modules": targets}
  config.write_text(json.dumps(fields))
  tensors = load_file(folder / FILE)
  one_layer = "model.layers.0.self_attn.q_proj" in targets
  for name in list(tensors):
    kept = ".v_proj." in name or ".q_proj." in name
    if not kept or (one_layer and "layers.1.self_attn.q_proj" in name):
      del tensors[name]
  save_file(tensors, folder / FILE)
  lora, again = load_peft(folder, SMALL)
  assert lora == LORA
  merged = flatten_dict(merge(base, again, LORA))
  for path, kernel in flatten_dict(base).items():
    changed = {
      layer
      for layer in range(SMALL.num_layers)
      if path[0] == "layers" and np.any(merged[path][layer] != kernel[layer])
    }
    wanted = set(range(SMALL.num_layers)) if "v" in path else set()
    if "q" in path and "kernel" in path:
      wanted = {0} if one_layer else set(range(SMALL.num_layers))
    assert changed == wanted, path
  # Trained further, all layers can learn: none has both factors at zero.
  begun = flatten_dict(begin_with(folder, SMALL, LORA, adapter))
  for path, leaf in begun.items():
    if path[-1] == "lora_a":
      assert np.all(np.any(leaf, axis=(1, 2))), path


@pytest.mark.slow
def test_what_peft_can_express_is_read_right_or_refused(tmp_path):
  """Every field that PEFT's own class has, set to what turns it on."""
  peft = pytest.importorskip("peft")
  _, _, adapter = _adapted()
  save_peft(adapter, LORA, tmp_path / "a", base="some/model")
  path = tmp_path / "a" / "adapter_config.json"
  plain = json.loads(path.read_text())
  harmless = {"inference_mode", "revision", "task_type", "auto_mapping"}
  harmless |= {"base_model_name_or_path", "peft_version", "megatron_core"}
  # Read, or of no meaning but beside another field that is refused.
  harmless |= {"r", "lora_alpha", "lora_dropout", "qalora_group_size"}
  harmless |= {"eva_config", "ensure_weight_tying"}
  fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
  assert len(fields) > 30
  for name in sorted(fields - harmless):
    path.write_text(json.dumps(plain | {name: {"on": True}}))
    with pytest.raises(UserError, match=name):
      load_peft(tmp_path / "a", SMALL)


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
