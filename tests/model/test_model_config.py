import pytest

from trd_jax.experiment.errors import UserError
from trd_jax.model.config import ModelConfig, read_positions

# The shape of Qwen3-8B, as its config.json has it.
QWEN3_8B = {
  "architectures": ["Qwen3ForCausalLM"],
  "attention_bias": False,
  "head_dim": 128,
  "hidden_act": "silu",
  "hidden_size": 4096,
  "intermediate_size": 12288,
  "max_position_embeddings": 40960,
  "model_type": "qwen3",
  "num_attention_heads": 32,
  "num_hidden_layers": 36,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 1000000,
  "sliding_window": None,
  "tie_word_embeddings": False,
  "use_sliding_window": False,
  "vocab_size": 151936,
}


def _without(*names, **more):
  kept = {name: x for name, x in QWEN3_8B.items() if name not in names}
  return kept | more


def test_the_shape_of_qwen3_8b():
  config = ModelConfig.from_hf(QWEN3_8B)
  # Published: 8.2B parameters, 6.95B of them not in embedding and head.
  assert config.num_parameters() == 8_190_735_360
  assert config.rope_scaling == ()
  assert not config.tie_embeddings
  assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_both_spellings_of_rotary_scaling_are_one_config(rope_type):
  scaling = {"factor": 4.0, "original_max_position_embeddings": 32768}
  old = _without(rope_scaling={"type": rope_type, **scaling})
  middle = _without(rope_scaling={"rope_type": rope_type, **scaling})
  new = _without(
    "rope_theta",
    "rope_scaling",
    rope_parameters={
      "rope_type": rope_type,
      "rope_theta": 1000000,
      **scaling,
    },
  )
  first, *others = map(ModelConfig.from_hf, (old, middle, new))
  assert dict(first.rope_scaling) == {"rope_type": rope_type, **scaling}
  assert others == [first, first]
  assert ModelConfig.from_hf(first.to_hf()) == first


@pytest.mark.parametrize(
  ("fields", "named"),
  [
    (_without(architectures=["GemmaForCausalLM"], model_type="gemma"), "Gemma"),
    (_without("architectures", model_type="mistral"), "mistral"),
    (
      _without(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe"),
      "Qwen3Moe",
    ),
    ({}, "architecture"),
    (_without("vocab_size"), "'vocab_size' is missing"),
    (_without(hidden_size="big"), "'hidden_size' is 'big'"),
    (_without(num_hidden_layers=0), "'num_hidden_layers' is 0"),
    (_without(num_key_value_heads=5), "num_key_value_heads=5"),
    (_without(head_dim=7), "head_dim=7"),
    (_without(attention_bias=True), "attention_bias"),
    (_without(use_sliding_window=True), "use_sliding_window"),
    (_without(hidden_act="gelu"), "gelu"),
    (_without(mlp_bias=True), "mlp_bias"),
    (_without(rope_scaling={"rope_type": "dynamic"}), "dynamic"),
    (
      _without(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
      "'high_freq_factor'",
    ),
    (_without(rope_scaling={"rope_type": "yarn"}), "factor"),
    (
      _without(rope_scaling={"rope_type": "yarn", "factor": 2, "mscale": 1}),
      "mscale",
    ),
  ],
)
def test_a_config_that_is_no_dense_qwen3_is_named(fields, named):
  with pytest.raises(UserError, match=r"^config\.json: ") as caught:
    ModelConfig.from_hf(fields)
  assert named in str(caught.value)
  assert "\n" not in str(caught.value)


_WRONG = {
  "vocab_size": [True, 1.5, "64", 0, -1, 2**31, [64], {}],
  "num_hidden_layers": [10_001, 2**31 - 1],  # a table has a row a layer
  "architectures": ["Qwen3ForCausalLM", [7], {}, True],
  "model_type": [7, ["qwen3"]],
  "use_sliding_window": ["false", 1],
  "tie_word_embeddings": ["false", 0, []],
  "hidden_act": [7, ["silu"]],
  "rms_norm_eps": ["1e-6", 0, -1e-6, float("nan"), float("inf"), True],
  "rope_theta": ["1e6", 1, -1.0, float("nan"), 1e300],
  "rope_scaling": ["linear", [], 2.0, {"type": 7}, {"type": []}]
  + [
    {"type": "yarn", "factor": factor}
    for factor in (True, "4", 0, -1, [4], float("nan"))
  ]
  + [
    {"type": "yarn", "factor": 4, name: value}
    for name, value in {
      "attention_factor": "1",
      "beta_fast": [32],
      "beta_slow": 0,
      "truncate": "no",
      "original_max_position_embeddings": 4096.5,
    }.items()
  ],
  "rope_parameters": [[], "x", {"rope_theta": "1e6"}],
}


@pytest.mark.parametrize(
  ("name", "value"),
  [(name, value) for name, values in _WRONG.items() for value in values],
)
def test_a_field_of_another_type_is_named(name, value):
  with pytest.raises(UserError, match=r"^config\.json: ") as caught:
    ModelConfig.from_hf(_without(**{name: value}))
  inner = [*value] if isinstance(value, dict) else []
  assert any(each in str(caught.value) for each in (name, *inner))


def test_a_null_field_is_an_absent_one():
  nulls = dict.fromkeys(
    ("rms_norm_eps", "hidden_act", "rope_theta", "tie_word_embeddings")
  )
  config = ModelConfig.from_hf(_without(**nulls))
  assert config == ModelConfig.from_hf(_without(*nulls))
  nulls = {"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2}}
  assert dict(ModelConfig.from_hf(_without(**nulls)).rope_scaling) == {
    "rope_type": "linear",
    "factor": 2,
  }


def test_a_band_of_llama_3_s_scaling_has_a_width():
  band = {"low_freq_factor": 4.0, "high_freq_factor": 4.0}
  scaling = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    **band,
  }
  with pytest.raises(UserError, match=r"low_freq_factor=4 .* not below"):
    ModelConfig.from_hf(_without(rope_scaling=scaling))


def test_an_absent_context_is_that_of_transformers():
  absent = _without("max_position_embeddings")
  assert read_positions(QWEN3_8B) == 40960
  assert read_positions(absent) == ModelConfig.from_hf(absent).max_positions
  assert read_positions(absent) == 32768
  llama = absent | {"architectures": ["LlamaForCausalLM"]}
  assert read_positions(llama) == 2048
  with pytest.raises(UserError, match="'max_position_embeddings' is '4k'"):
    read_positions(absent | {"max_position_embeddings": "4k"})


def test_an_absent_head_dim_is_that_of_transformers():
  absent = _without("head_dim", hidden_size=2048)
  assert ModelConfig.from_hf(absent).head_dim == 128
  null = _without(head_dim=None, hidden_size=2048)
  assert ModelConfig.from_hf(null).head_dim == 64
