"""Pretraining of the laboratory's models, a few steps of it."""

import dataclasses
import itertools
import tempfile
import types

import numpy as np
import pytest

from trd_jax.data.chat import Chat
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import ownership
from trd_jax.lab import corpus, pretrain
from trd_jax.model.weights import hub
from trd_jax.model.weights.hf import read_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chat():
  return Chat.load(hub.model_folder("lab:student"))


def documents_of(chat, seed):
  def encode(user, response):
    return chat.render(user, None), [*chat.encode(response), chat.stop_ids[0]]

  return pretrain.packed_rows(encode, corpus.RECIPES["student"], seed)


def test_rows_hold_whole_documents_and_labels_are_responses(chat):
  for tokens, position, segment, label in itertools.islice(
    documents_of(chat, 0), 3
  ):
    assert tokens.shape == (pretrain.ROWS, pretrain.ROW_TOKENS)
    assert (segment > 0).mean() > 0.85
    for row in range(pretrain.ROWS):
      for number in range(1, segment[row].max() + 1):
        here = np.flatnonzero(segment[row] == number)
        assert (np.diff(here) == 1).all()
        assert (position[row, here] == np.arange(len(here))).all()
        ids, labels = tokens[row, here], label[row, here]
        predicting = np.flatnonzero(labels >= 0)
        # Labels are the next token, from the end of the prompt to the stop.
        assert (labels[predicting[:-1]] == ids[predicting[:-1] + 1]).all()
        assert labels[predicting[-1]] == chat.stop_ids[0]
        assert predicting[-1] == len(here) - 2
        prompt = chat.decode(ids[: predicting[0] + 1])
        assert prompt.endswith("<|im_start|>assistant\n")
      assert (label[row][segment[row] == 0] == -1).all()


def test_the_same_seed_makes_the_same_model(tmp_path, monkeypatch):
  # Of a batch's size nothing depends here, and eleven rows take long.
  monkeypatch.setattr(pretrain, "ROWS", 2)
  made = []
  for name, seed in (("one", 0), ("again", 0), ("other", 1)):
    out = tmp_path / name
    flags = types.SimpleNamespace(
      model="student", out=str(out), steps=3, peak=0.02, seed=seed
    )
    pretrain.run(None, None, flags)
    made.append((out / "model.safetensors").read_bytes())
  assert made[0] == made[1] != made[2]
  shipped = hub.model_folder("lab:student")
  for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
    assert (out / file).read_bytes() == (shipped / file).read_bytes()


def test_a_device_that_is_full_is_told_in_one_line(tmp_path, monkeypatch):
  # Kernels that no address space holds.
  huge = dataclasses.replace(
    pretrain.SIZES["student"], intermediate_size=1 << 28
  )
  monkeypatch.setitem(pretrain.SIZES, "student", huge)
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  flags = types.SimpleNamespace(
    model="student", out=str(tmp_path / "out"), steps=3, peak=0.02, seed=0
  )
  with pytest.raises(
    UserError, match=r"^a device is out of memory .*PLATFORMS"
  ):
    pretrain.run(None, None, flags)
  assert not list(tmp_path.iterdir()), "files were left behind"


def test_an_unknown_model_is_refused():
  flags = types.SimpleNamespace(model="studnet", out=None)
  with pytest.raises(UserError, match='did you mean "student"'):
    pretrain.run(None, None, flags)


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_the_shipped_models_have_the_declared_shape(name):
  folder = hub.model_folder(f"lab:{name}")
  assert ownership.ours_in(folder), "they could not be made again"
  config = read_config(folder)
  chat = Chat.load(folder)
  assert dataclasses.replace(config, vocab_size=0) == pretrain.SIZES[name]
  assert chat.vocab_size <= config.vocab_size < chat.vocab_size + 32
  size = {"student": (0.9e6, 1.1e6), "teacher": (2.6e6, 3.2e6)}[name]
  assert size[0] < config.num_parameters() < size[1]


def test_the_shipped_models_share_their_ids():
  student, teacher = (
    Chat.load(hub.model_folder(f"lab:{name}"))
    for name in ("student", "teacher")
  )
  assert student.same_ids(teacher)
