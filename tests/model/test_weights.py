import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from tests.support.small_models import LORA, SMALL, model, tree
from trd_jax.experiment.errors import UserError
from trd_jax.model import sharding
from trd_jax.model.qwen3 import Qwen3
from trd_jax.model.weights import hf, tensor_table
from trd_jax.model.weights.model_folder import atomic_folder

TIED = dataclasses.replace(SMALL, tie_embeddings=True)
FILE = "model.safetensors"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def _written(folder, config=SMALL, **more):
  hf.save_hf(config, tree(model(config)), folder, dtype="float32", **more)
  return folder


def _equal(one, other):
  for (path, a), (other_path, b) in zip(
    nnx.to_flat_state(nnx.state(one)),
    nnx.to_flat_state(nnx.state(other)),
    strict=True,
  ):
    assert path == other_path
    np.testing.assert_array_equal(a.get_value(), b.get_value(), str(path))


@pytest.mark.parametrize("config", [SMALL, TIED])
def test_the_table_covers_the_tree_and_each_tensor_once(config):
  table = tensor_table.entries(config)
  names = [entry.name for entry in table]
  places = [(entry.path, entry.layer) for entry in table]
  assert len(set(names)) == len(names) == len(set(places))
  shapes = nnx.to_flat_state(
    nnx.state(jax.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0))))
  )
  expected = {
    (path, layer)
    for path, _ in shapes
    for layer in (range(config.num_layers) if path[0] == "layers" else [None])
  }
  assert set(places) == expected


def test_what_was_saved_is_loaded_whether_sharded_or_not(tmp_path):
  made = model()
  one = hf.load(_written(tmp_path / "one"), dtype=jnp.float32)
  several = _written(tmp_path / "several", shard_bytes=20_000)
  files = sorted(several.glob("*.safetensors"))
  assert len(files) > 3
  assert all(file.stat().st_size < 25_000 for file in files)
  index = json.loads((several / f"{FILE}.index.json").read_text())
  assert set(index["weight_map"].values()) == {file.name for file in files}
  _equal(one, made)
  _equal(hf.load(several, dtype=jnp.float32), made)
  # Without the index too, as some folders come.
  (several / f"{FILE}.index.json").unlink()
  _equal(hf.load(several, dtype=jnp.float32), made)


def test_weights_go_into_their_shards(tmp_path):
  folder = _written(tmp_path / "hf")
  mesh = sharding.make_mesh(2, 2, 2)
  placed = hf.load(folder, dtype=jnp.float32, mesh=mesh, lora=LORA, seed=5)
  state = nnx.state(placed)
  expected = dict(nnx.to_flat_state(sharding.shardings(state, mesh)))
  for path, leaf in nnx.to_flat_state(state):
    assert leaf.get_value().sharding == expected[path].get_value(), path
  kernel = placed.layers.attention.o.kernel.get_value()
  assert kernel.sharding.spec == P(None, "tensor", "fsdp")
  plain = hf.load(folder, dtype=jnp.float32, lora=LORA, seed=5)
  _equal(placed, plain)
  # Without a mesh they may be combined with arrays of any placement.
  assert not any(leaf.committed for leaf in jax.tree.leaves(plain))


@pytest.mark.slow
def test_the_adapter_depends_on_the_seed_alone(tmp_path):
  first, second = (
    _written(tmp_path / "a"),
    _written(tmp_path / "b", TIED),
  )
  make = {"dtype": jnp.float32, "lora": LORA}
  one = tree(hf.load(first, seed=1, **make), nnx.LoRAParam)
  again = tree(hf.load(first, seed=1, **make), nnx.LoRAParam)
  other = tree(hf.load(first, seed=2, **make), nnx.LoRAParam)
  q = one["layers"]["attention"]["q"]
  np.testing.assert_array_equal(
    q["lora_a"], again["layers"]["attention"]["q"]["lora_a"]
  )
  assert not np.array_equal(
    q["lora_a"], other["layers"]["attention"]["q"]["lora_a"]
  )
  assert np.all(q["lora_b"] == 0)
  bound = SMALL.hidden_size**-0.5
  assert 0.9 * bound < np.abs(q["lora_a"]).max() <= bound
  # No two layers start alike.
  assert not np.array_equal(q["lora_a"][0], q["lora_a"][1])
  assert hf.load(second, **make).head is None


def test_loading_casts_once_and_saving_rounds_to_nearest(tmp_path):
  folder = _written(tmp_path / "hf")
  exact = tree(hf.load(folder, dtype=jnp.float32))
  rounded = hf.load(folder, dtype=jnp.bfloat16)
  hf.save_hf(SMALL, exact, tmp_path / "bf16", dtype="bfloat16")
  _equal(rounded, hf.load(tmp_path / "bf16", dtype=jnp.bfloat16))
  for one, other in zip(
    jax.tree.leaves(exact), jax.tree.leaves(tree(rounded)), strict=True
  ):
    assert other.dtype == jnp.bfloat16
    np.testing.assert_array_equal(one.astype(jnp.bfloat16), other)


def _broken(folder, change, file=FILE):
  tensors = load_file(folder / file)
  change(tensors)
  save_file(tensors, folder / file)


def _drop(tensors):
  del tensors[K_PROJ]


def _widen(tensors):
  tensors[K_PROJ] = np.zeros((24, 33), np.float32)


def _transpose(tensors):
  tensors[K_PROJ] = np.ascontiguousarray(tensors[K_PROJ].T)


def _add(tensors):
  tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)


def _bias(tensors):
  tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(48, np.float32)


def _integers(tensors):
  tensors[K_PROJ] = tensors[K_PROJ].astype(np.int8)


def _no_head(tensors):
  del tensors["lm_head.weight"]


@pytest.mark.parametrize(
  ("change", "named"),
  [
    (_drop, [K_PROJ, "(24, 32)", "missing"]),
    (_widen, [K_PROJ, "(24, 33)", "(24, 32)", FILE]),
    (_transpose, [K_PROJ, "(32, 24)", "(24, 32)", FILE]),
    (_add, ["model.layers.2.mlp.up_proj.weight", "(2, 2)", FILE]),
    (_bias, ["self_attn.q_proj.bias", "(48,)", FILE]),
    (_integers, [K_PROJ, "I8", FILE]),
    (_no_head, ["lm_head.weight", "(64, 32)", "missing"]),
  ],
)
def test_wrong_tensors_are_named_in_one_line(tmp_path, change, named):
  folder = _written(tmp_path / "hf")
  _broken(folder, change)
  _refused(folder, named)


def _refused(folder, named):
  with pytest.raises(UserError) as caught:
    hf.load(folder, dtype=jnp.float32)
  message = str(caught.value)
  assert str(folder) in message
  assert "\n" not in message
  for part in named:
    assert part in message, message


def test_damaged_and_absent_files_are_named(tmp_path):
  folder = _written(tmp_path / "hf", shard_bytes=20_000)
  file = sorted(folder.glob("*.safetensors"))[1]
  whole = file.read_bytes()
  file.write_bytes(whole[:-5])
  _refused(folder, [file.name])
  file.write_bytes(whole[:100])
  _refused(folder, [file.name])
  file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid 1")
  _refused(folder, [file.name])
  file.unlink()
  _refused(folder, [file.name, "missing"])
  # An index that places a tensor in a file that doesn't hold it.
  other = sorted(folder.glob("*.safetensors"))[0]
  (folder / file.name).write_bytes(other.read_bytes())
  _refused(folder, ["twice", other.name, file.name])
  index = folder / f"{FILE}.index.json"
  index.write_text('{"weight_map": {"a": "../x.safetensors"}}')
  _refused(folder, [index.name])
  # A name that JSON has and no folder can have.
  index.write_text(r'{"weight_map": {"a": "x\ud800.safetensors"}}')
  _refused(folder, [index.name])
  for left in [index, *folder.glob("*.safetensors")]:
    left.unlink()
  _refused(folder, ["no safetensors"])
  (folder / "config.json").write_text("{")
  _refused(folder, ["config.json"])
  (folder / "config.json").unlink()
  _refused(folder, ["config.json", "missing"])


def test_a_tensor_in_two_files_is_refused(tmp_path):
  folder = _written(tmp_path / "hf")
  os.rename(folder / FILE, folder / "a.safetensors")
  twice = {K_PROJ: np.zeros((24, 32), np.float32)}
  save_file(twice, folder / "b.safetensors")
  _refused(folder, [K_PROJ, "twice", "a.safetensors", "b.safetensors"])


def test_a_tied_checkpoint_may_carry_the_same_head_and_no_other(tmp_path):
  folder = _written(tmp_path / "hf", TIED)
  embedding = "model.embed_tokens.weight"
  _broken(folder, lambda t: t.update({"lm_head.weight": t[embedding]}))
  _equal(hf.load(folder, dtype=jnp.float32), model(TIED))

  def differ(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].copy()
    tensors["lm_head.weight"][-1, -1] += 1

  _broken(folder, differ)
  _refused(folder, ["lm_head.weight", "(64, 32)", "tie_word_embeddings"])


def test_rotary_buffers_are_no_weights(tmp_path):
  folder = _written(tmp_path / "hf")
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  _broken(folder, lambda t: t.update({name: np.ones(6, np.float32)}))
  _equal(hf.load(folder, dtype=jnp.float32), model())


def test_a_head_is_neither_invented_nor_dropped(tmp_path):
  for config, expected in ((SMALL, True), (TIED, False)):
    folder = _written(tmp_path / str(expected), config)
    assert ("lm_head.weight" in load_file(folder / FILE)) == expected
  with pytest.raises(ValueError, match="head"):
    hf.save_hf(TIED, tree(model(SMALL)), tmp_path / "no")
  with pytest.raises(ValueError, match="head"):
    hf.save_hf(SMALL, tree(model(TIED)), tmp_path / "no")
  assert not (tmp_path / "no").exists()


def test_the_tokenizer_and_its_ids_come_along(tmp_path):
  source = tmp_path / "source"
  source.mkdir()
  for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt"):
    (source / name).write_text(name)
  (source / "chat_template.jinja").write_text("theirs")
  (source / "training_args.bin").write_text("not ours to copy")
  (source / "config.json").write_text('{"eos_token_id": 7, "vocab_size": 9}')
  template = tmp_path / "my.jinja"
  template.write_text("mine")
  _written(tmp_path / "a", tokenizer_from=source)
  folder = _written(
    tmp_path / "b",
    tokenizer_from=source,
    chat_template=template,
    special_ids={"pad_token_id": 3},
  )
  assert (tmp_path / "a" / "chat_template.jinja").read_text() == "theirs"
  assert (folder / "chat_template.jinja").read_text() == "mine"
  assert (folder / "merges.txt").read_text() == "merges.txt"
  assert not (folder / "training_args.bin").exists()
  fields = json.loads((folder / "config.json").read_text())
  assert (fields["eos_token_id"], fields["pad_token_id"]) == (7, 3)
  assert fields["vocab_size"] == SMALL.vocab_size


def test_who_may_read_the_folder_may_read_its_files(tmp_path):
  folder = _written(tmp_path / "hf")
  readers = folder.stat().st_mode & 0o444
  for path in folder.iterdir():
    assert path.stat().st_mode & 0o444 == readers, path


def test_a_killed_save_leaves_the_folder_that_was_there(tmp_path):
  folder = _written(tmp_path / "hf")
  before = (folder / FILE).read_bytes()
  # Killed by the system while the new weights are being written.
  script = f"""
    import os, signal, sys
    from trd_jax.model.weights.model_folder import atomic_folder
    with atomic_folder({str(folder)!r}) as out:
      (out / {FILE!r}).write_bytes(b"half")
      os.kill(os.getpid(), signal.SIGKILL)
  """
  killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)])
  assert killed.returncode == -signal.SIGKILL
  assert (folder / FILE).read_bytes() == before
  hf.save_hf(SMALL, tree(model(seed=1)), folder, dtype="float32")
  _equal(hf.load(folder, dtype=jnp.float32), model(seed=1))
  assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_save_killed_between_its_renames_loses_nothing(tmp_path):
  folder = _written(tmp_path / "hf")
  before = (folder / FILE).read_bytes()
  script = f"""
    import os, signal
    from pathlib import Path
    from trd_jax.model.weights.model_folder import atomic_folder
    rename = Path.rename
    def killed(path, target):
      rename(path, target)
      os.kill(os.getpid(), signal.SIGKILL)
    Path.rename = killed
    with atomic_folder({str(folder)!r}) as out:
      (out / {FILE!r}).write_bytes(b"new")
  """
  killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)])
  assert killed.returncode == -signal.SIGKILL
  assert not folder.exists()
  # The next one puts back what was there, and fails for a reason of its own.
  with pytest.raises(FileNotFoundError), atomic_folder(folder) as out:
    (out / FILE).read_bytes()
  assert (folder / FILE).read_bytes() == before
  assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_save_that_can_not_be_renamed_puts_back_what_was_there(
  tmp_path, monkeypatch
):
  folder = _written(tmp_path / "hf")
  before = (folder / FILE).read_bytes()
  rename = Path.rename

  def refused(path, target):
    if path.suffix == ".tmp":
      raise OSError("no")
    return rename(path, target)

  monkeypatch.setattr(Path, "rename", refused)
  with pytest.raises(OSError, match="no"), atomic_folder(folder) as out:
    (out / FILE).write_bytes(b"new")
  assert (folder / FILE).read_bytes() == before
  assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_new_folders_name_is_on_the_disk_before_the_old_one_is_gone(
  tmp_path, monkeypatch
):
  folder = _written(tmp_path / "hf")
  flushed = []
  fsync = os.fsync

  def told(descriptor):
    flushed.append(
      (os.readlink(f"/proc/self/fd/{descriptor}"), len(os.listdir(tmp_path)))
    )
    fsync(descriptor)

  monkeypatch.setattr(os, "fsync", told)
  with atomic_folder(folder) as out:
    (out / FILE).write_bytes(b"new")
  assert flushed[-1] == (str(tmp_path.resolve()), 2)
