"""The model against transformers', on random weights of many shapes."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.small_models import forward, tree
from trd_jax.model.qwen3 import logits
from trd_jax.model.weights.hf import load, read_config, save_hf

pytestmark = pytest.mark.slow

PLAIN = {
  "vocab_size": 96,
  "hidden_size": 64,
  "intermediate_size": 80,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "max_position_embeddings": 64,
  "rope_theta": 10_000.0,
  "tie_word_embeddings": False,
}
YARN = {
  "rope_type": "yarn",
  "factor": 4.0,
  "original_max_position_embeddings": 16,
}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 256,
}
SHAPES = {
  "untied": {},
  "tied": {"tie_word_embeddings": True},
  "one key head": {"num_key_value_heads": 1},
  "as many key heads": {"num_key_value_heads": 4},
  "wide heads": {"head_dim": 32, "num_attention_heads": 6},
  "narrow heads": {"head_dim": 8},
  # Ids reach 79: rows from 80 on stand for no token, and count all the same.
  "left-over rows": {"vocab_size": 131, "tie_word_embeddings": True},
  "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
  "yarn": {"rope_scaling": YARN},
  "yarn, all fields": {
    "max_position_embeddings": 4096,
    "rope_scaling": {
      "rope_type": "yarn",
      "factor": 4.0,
      "original_max_position_embeddings": 1024,
      "beta_fast": 8.0,
      "beta_slow": 2.0,
      "attention_factor": 1.3,
      "truncate": False,
    },
  },
  # Qwen2.5: biases on queries, keys and values, no norm of the heads.
  "qwen2": {"family": "Qwen2"},
  "qwen2, tied": {"family": "Qwen2", "tie_word_embeddings": True},
  "llama": {"family": "Llama"},
  "llama 3": {"family": "Llama", "rope_scaling": LLAMA3},
}
TOKENS = np.random.default_rng(0).integers(0, 80, (2, 40))


@pytest.fixture(autouse=True)
def _peers():
  """Skips where they are not; they are imported where they are used.

  Every process of the tests reads this file, and few run its tests.
  """
  pytest.importorskip("torch")
  pytest.importorskip("transformers")


def _reference(shape):
  """A transformers model with weights large enough to tell logits apart."""
  import torch
  import transformers

  shape = PLAIN | shape
  family = shape.pop("family", "Qwen3")
  config = getattr(transformers, f"{family}Config")(
    **shape, attn_implementation="eager"
  )
  made = getattr(transformers, f"{family}ForCausalLM")(config).eval()
  generator = torch.Generator().manual_seed(1)
  for name, parameter in made.named_parameters():
    noise = torch.randn(parameter.shape, generator=generator)
    if name.endswith("bias"):
      parameter.data = 0.5 * noise
    elif parameter.ndim == 1:  # a norm's scale
      parameter.data = 1 + 0.3 * noise
    else:
      parameter.data = noise / parameter.shape[1] ** 0.5
  return made


def _theirs(made):
  import torch

  with torch.no_grad():
    return made(torch.from_numpy(TOKENS)).logits.float().numpy()


def _from(folder, dtype):
  import transformers

  # Not `made.to(dtype)`: that rounds the rotary frequencies too.
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=dtype, attn_implementation="eager"
  )


def _ours(folder, dtype):
  made = load(folder, dtype=dtype)
  T = TOKENS.shape[1]
  position = np.broadcast_to(np.arange(T), TOKENS.shape)
  hidden = forward(made, TOKENS, position, np.ones_like(TOKENS))
  return np.asarray(logits(hidden, made.head_VD))


@pytest.mark.parametrize("name", SHAPES)
def test_float32_logits_are_those_of_transformers(name, tmp_path):
  made = _reference(SHAPES[name])
  made.save_pretrained(tmp_path)
  expected = _theirs(made)
  assert expected.std() > 0.5
  got = _ours(tmp_path, jnp.float32)
  assert got.shape == expected.shape
  np.testing.assert_allclose(got, expected, atol=2e-5, rtol=0)


# Measured over all of SHAPES against float32 on the same rounded weights, as
# the root mean square error over the logits' deviation: 0.011 to 0.021, where
# transformers' own bfloat16 has 0.013 to 0.025.
BFLOAT16_BOUND = 0.025


@pytest.mark.parametrize("name", ["untied", "yarn, all fields"])
def test_bfloat16_logits_stay_within_the_stated_bound(name, tmp_path):
  import torch

  _reference(SHAPES[name]).to(torch.bfloat16).save_pretrained(tmp_path)
  exact = _theirs(_from(tmp_path, "float32"))
  error, their_error = (
    np.sqrt(np.mean((logits - exact) ** 2)) / exact.std()
    for logits in (
      _ours(tmp_path, jnp.bfloat16),
      _theirs(_from(tmp_path, "bfloat16")),
    )
  )
  assert error < BFLOAT16_BOUND
  assert error < 1.1 * their_error


@pytest.mark.parametrize(
  ("name", "dtype"),
  [
    ("untied", "float32"),
    ("left-over rows", "bfloat16"),
    ("yarn", "bfloat16"),
    ("qwen2", "bfloat16"),
    ("llama 3", "float32"),
  ],
)
def test_there_and_back_again_is_byte_identical(name, dtype, tmp_path):
  import torch

  made = _reference(SHAPES[name]).to(getattr(torch, dtype))
  made.save_pretrained(tmp_path / "theirs")
  ours = load(tmp_path / "theirs", dtype=dtype)
  config = read_config(tmp_path / "theirs")
  save_hf(config, tree(ours), tmp_path / "ours", dtype=dtype)
  first, second = (
    (tmp_path / side / "model.safetensors").read_bytes()
    for side in ("theirs", "ours")
  )
  assert first == second
  # transformers reads the folder, config.json included, as the same model.
  first, second = (
    _theirs(_from(tmp_path / side, dtype)) for side in ("theirs", "ours")
  )
  np.testing.assert_array_equal(second, first)
