import hashlib
import types

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.places import SHARED
from trd_jax import convert
from trd_jax.data.chat import Chat
from trd_jax.experiment import experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.run_dir import RunDir
from trd_jax.lab import random_model, tokenizer
from trd_jax.lab.random_model import QWEN3_VOCABULARY, random_folder
from trd_jax.model.weights import hub
from trd_jax.model.weights.hf import load, read_config

pytestmark = pytest.mark.slow

REAL = SHARED / "data" / "qwen_tokenizer"
NONE = types.SimpleNamespace(source=None, target=None, to=None)


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  tokenizer.write(folder)
  return folder


def _digest(folder):
  weights = (folder / "model.safetensors").read_bytes()
  return hashlib.sha256(weights).hexdigest()


def test_a_random_model_depends_on_its_seed_alone(tmp_path, small_tokenizer):
  for name, seed in (("a", 1), ("b", 1), ("c", 2)):
    random_folder(
      "nano", tmp_path / name, small_tokenizer, seed=seed, vocab_size=416
    )
  a, b, c = (_digest(tmp_path / name) for name in "abc")
  assert a == b != c
  made = load(tmp_path / "a", dtype=jnp.bfloat16)
  assert made.head is None
  table = np.asarray(made.embed.embedding[...], np.float32)
  assert table.shape == (416, 64)
  assert 0.015 < table.std() < 0.025


def test_what_cannot_be_made_is_named(tmp_path, small_tokenizer):
  out = tmp_path / "out"
  with pytest.raises(UserError, match="nano"):
    random_folder("nanno", out, small_tokenizer)
  with pytest.raises(UserError, match="more rows"):
    random_folder("nano", out, small_tokenizer, vocab_size=8)
  with pytest.raises(UserError, match=r"tokenizer\.json"):
    random_folder("nano", out, tmp_path)
  assert not out.exists()


def test_convert_makes_the_models_that_the_config_names(
  tmp_path, small_tokenizer
):
  config = experiment.default_config()
  config.student.path = "random:nano"
  run_dir = RunDir(tmp_path)
  with pytest.raises(UserError, match=r"set student\.tokenizer"):
    convert.run(experiment.from_config(config), run_dir, NONE)
  with pytest.raises(UserError, match=r"trd_jax\.convert"):
    hub.model_folder("random:nano", run_dir)
  config.student.tokenizer = str(small_tokenizer)
  chosen = experiment.from_config(config)
  with pytest.raises(UserError, match="--workdir"):
    convert.run(chosen, None, NONE)
  convert.run(chosen, run_dir, NONE)
  folder = hub.model_folder("random:nano", run_dir)
  revision = hub.model_revision(folder)
  assert run_dir.done("convert") == {"random": {"random:nano": revision}}
  before = (folder / "model.safetensors").stat().st_mtime_ns
  convert.run(chosen, run_dir, NONE)
  assert (folder / "model.safetensors").stat().st_mtime_ns == before
  assert read_config(folder).vocab_size == QWEN3_VOCABULARY


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not there")
def test_the_nano_model_has_the_real_tokenizer_and_template(tmp_path):
  template = REAL / "chat_template_qwen3.jinja"
  random_folder("nano", tmp_path / "out", REAL, template)
  config = read_config(tmp_path / "out")
  assert (config.vocab_size, config.hidden_size) == (151_936, 64)
  chat = Chat.load(tmp_path / "out")
  assert chat.same_ids(Chat.load(REAL, template))
  assert chat.supports_thinking
  assert chat.render("1 + 1?", True) == Chat.load(REAL, template).render(
    "1 + 1?", True
  )


def test_a_device_that_is_full_is_told_in_one_line(
  tmp_path, small_tokenizer, monkeypatch
):
  # More than any address space holds.
  def model(*_, **__):
    return jnp.zeros((1 << 47,), jnp.int8)

  monkeypatch.setattr(random_model, "Qwen3", model)
  config = experiment.default_config()
  config.student.path = "random:nano"
  config.student.tokenizer = str(small_tokenizer)
  run_dir = RunDir(tmp_path)
  with pytest.raises(
    UserError, match=r"^a device is out of memory .*PLATFORMS"
  ):
    convert.run(experiment.from_config(config), run_dir, NONE)
  assert not (tmp_path / "models").exists()
