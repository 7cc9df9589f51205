import json
import shutil
from pathlib import Path

import pytest

import trd_jax
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.run_dir import RunDir
from trd_jax.model.weights import hub


def _model(folder, weights=b"weights", **config):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "model.safetensors").write_bytes(weights)
  return folder


def test_a_folder_is_itself(tmp_path):
  folder = _model(tmp_path / "model")
  assert hub.model_folder(str(folder)) == folder


def test_a_random_model_is_the_run_directorys(tmp_path):
  run_dir = RunDir(tmp_path)
  with pytest.raises(UserError, match=r"trd_jax\.convert"):
    hub.model_folder("random:nano", run_dir)
  _model(run_dir.model_folder_for_random("nano"))
  found = hub.model_folder("random:nano", run_dir)
  assert found == run_dir.model_folder_for_random("nano")
  with pytest.raises(UserError, match="--workdir"):
    hub.model_folder("random:nano")
  with pytest.raises(UserError, match="a size is"):
    hub.model_folder("random:../../etc", run_dir)


@pytest.mark.parametrize(
  "path", ["/no/such/folder", "./no/folder", "nowhere", "a/b/c"]
)
def test_what_is_no_model_is_told(path):
  with pytest.raises(UserError, match="there is no model"):
    hub.model_folder(path)


def test_a_misspelt_folder_is_told_with_the_one_that_is_there(tmp_path):
  there = _model(tmp_path / "models" / "Qwen3-8B")
  near = f'did you mean "{there}"'
  for wrong in ("models/Qwen3-8b", "model/Qwen3-8B", "modles/Qwen-8B"):
    with pytest.raises(UserError) as error:
      hub.model_folder(str(tmp_path / wrong))
    assert near in str(error.value)
  with pytest.raises(UserError, match="it is a file; name the folder"):
    hub.model_folder(str(there / "config.json"))


def test_a_folder_without_a_config_is_told(tmp_path):
  with pytest.raises(UserError, match=r"has no config\.json"):
    hub.model_folder(str(tmp_path))


def test_a_lab_model_comes_with_the_package():
  with pytest.raises(UserError, match=r'this installation has no .*studnet"'):
    hub.model_folder("lab:studnet")
  with pytest.raises(UserError, match="this installation has no"):
    hub.model_folder("lab:")
  folder = hub.model_folder("lab:student")
  assert folder.parent == Path(trd_jax.__file__).parent / "lab"
  assert hub.model_revision(folder)


def test_a_tokenizer_is_had_without_the_weights_beside_it(
  tmp_path, monkeypatch
):
  asked = []

  def download(path, *, revision, allow_patterns):
    asked.append((path, revision, set(allow_patterns)))
    (tmp_path / "tokenizer.json").touch()
    return str(tmp_path)

  monkeypatch.setattr("huggingface_hub.snapshot_download", download)
  assert hub.tokenizer_folder("some/model", None, "v1") == tmp_path
  assert hub.model_folder("some/model", None, "v1") == tmp_path
  assert {each[:2] for each in asked} == {("some/model", "v1")}
  assert asked[1][2] - asked[0][2] == {"*.safetensors"}


def test_a_hub_id_that_cannot_be_had_is_told(tmp_path, monkeypatch):
  # The environment that a machine without a network sets for itself.
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
  with pytest.raises(UserError, match='"some/model" is no folder') as error:
    hub.model_folder("some/model", revision="v1")
  assert "\n" not in str(error.value)


def test_a_revision_follows_the_content_and_nothing_else(tmp_path):
  one = _model(tmp_path / "one", b"weights", layers=2)
  copy = tmp_path / "copy"
  shutil.copytree(one, copy)
  (copy / "notes.txt").write_text("not the model")
  revision = hub.model_revision(one)
  assert hub.model_revision(copy) == revision
  others = [
    _model(tmp_path / "weights", b"Weights", layers=2),
    _model(tmp_path / "longer", b"weights ", layers=2),
    _model(tmp_path / "config", b"weights", layers=3),
  ]
  renamed = _model(tmp_path / "renamed", b"weights", layers=2)
  (renamed / "model.safetensors").rename(renamed / "other.safetensors")
  revisions = {hub.model_revision(folder) for folder in (*others, renamed)}
  assert len(revisions | {revision}) == 5


def test_a_large_files_revision_sees_both_ends_and_a_fine_tune(tmp_path):
  size = 33 * 2**20
  folder = _model(tmp_path / "model", bytes(size))
  revision = hub.model_revision(folder)
  weights = folder / "model.safetensors"
  for place in (0, size - 1):
    content = bytearray(size)
    content[place] = 1
    weights.write_bytes(content)
    assert hub.model_revision(folder) != revision
  # A fine-tune touches most weights, and so some block that is read.
  weights.write_bytes(bytes(2**20) + bytes([1]) * (size - 2**20))
  assert hub.model_revision(folder) != revision


def test_a_large_files_fingerprint_sees_every_bit(tmp_path, monkeypatch):
  monkeypatch.setattr(hub, "_PIECE_BYTES", 5 * 2**20)
  size = 33 * 2**20
  folder = _model(tmp_path / "model", bytes(size))
  weights = folder / "model.safetensors"
  revision = hub.model_revision(folder)
  whole = hub.fingerprint(folder)
  assert whole.startswith(f"{revision}:")
  # Between the blocks of a revision, which doesn't see it; in the first piece,
  # in one in the midst, and in the last, which is shorter.
  for place in (100_000, 20 * 2**20 + 70_000, size - 100_000):
    content = bytearray(size)
    content[place] = 1
    weights.write_bytes(content)
    assert hub.model_revision(folder) == revision
    assert hub.fingerprint(folder) not in (whole, revision)
  weights.write_bytes(bytes(size))
  assert hub.fingerprint(folder) == whole


def test_a_small_files_fingerprint_is_its_revision(tmp_path):
  folder = _model(tmp_path / "model")
  assert hub.fingerprint(folder) == hub.model_revision(folder)
  adapter = tmp_path / "adapter"
  adapter.mkdir()
  (adapter / "adapter_config.json").write_text("{}")
  (adapter / "adapter_model.safetensors").write_bytes(bytes(33 * 2**20))
  both = f"{hub.model_revision(folder)}+{hub.adapter_revision(adapter)}"
  assert hub.fingerprint(folder, adapter).startswith(f"{both}:")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_revision_needs_a_whole_model(missing, tmp_path):
  folder = _model(tmp_path / "model")
  (folder / missing).unlink()
  with pytest.raises(UserError, match="is no model folder"):
    hub.model_revision(folder)
