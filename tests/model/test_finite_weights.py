"""One value that is no number, in whatever is loaded, is named and refused."""

import dataclasses
import json
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.support import engine_env
from tests.support.small_models import LORA, SMALL, model, tree
from trd_jax import evaluate, rollout
from trd_jax.distill.checkpoint import Checkpoints
from trd_jax.experiment import experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.run_dir import RunDir
from trd_jax.generation.engines.engine import Request, Sampling
from trd_jax.generation.engines.jax_engine import JaxEngine
from trd_jax.model.weights import adapters, finite_weights, hf
from trd_jax.model.weights.tensor_files import TensorFiles

FILE = "model.safetensors"
DTYPES = {
  "float16": np.float16,
  "bfloat16": ml_dtypes.bfloat16,
  "float32": np.float32,
  "float64": np.float64,
}
BAD = [np.nan, np.inf, -np.inf]


_ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
  "entry",
  [
    7,
    {},
    _ENTRY | {"dtype": ["F32"]},
    _ENTRY | {"data_offsets": [0, 5]},
    _ENTRY | {"data_offsets": [0, 6]},
    _ENTRY | {"data_offsets": [-4, 4]},
    _ENTRY | {"data_offsets": [4, 0]},
    _ENTRY | {"data_offsets": [0, 4.0]},
    _ENTRY | {"data_offsets": 4},
  ],
  ids=str,
)
def test_a_file_whose_header_is_none_is_left_to_its_reader(tmp_path, entry):
  header = json.dumps({"whole": _ENTRY, "broken": entry}).encode()
  content = len(header).to_bytes(8, "little") + header + b"\xff" * 5
  (tmp_path / "model.safetensors").write_bytes(content)
  finite_weights.check_folder(tmp_path)
  with pytest.raises(UserError, match="can't be read"):
    TensorFiles(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", BAD)
def test_every_value_that_is_no_number_is_counted(dtype, value):
  largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
  values = np.array([[0.0, -0.0, 1e-8, -1.5, largest, -largest]], DTYPES[dtype])
  values = np.repeat(values, 3, 0)
  assert finite_weights.count(values) == finite_weights.count(values.T) == 0
  values[1, 2] = values[2, 0] = value
  assert finite_weights.count(values) == finite_weights.count(values.T) == 2
  assert finite_weights.count(values[:, 1::2]) == 0
  assert finite_weights.count(values[1, 2]) == 1  # of no dimension
  assert finite_weights.count(-values) == 2


def test_what_has_no_such_values_is_passed_over():
  assert finite_weights.count(np.full(3, -1)) == 0
  assert finite_weights.count(np.full(3, -1, np.int32)) == 0
  assert finite_weights.count(np.zeros((0, 4), np.float32)) == 0
  ours = np.arange(256, dtype=np.uint8)
  fp8 = ours.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
  wrong = np.count_nonzero(~np.isfinite(fp8))
  assert finite_weights.count(ours, "F8_E4M3") == wrong == 2
  fp8 = ours.view(ml_dtypes.float8_e5m2).astype(np.float32)
  wrong = np.count_nonzero(~np.isfinite(fp8))
  assert finite_weights.count(ours, "F8_E5M2") == wrong == 8


def patched(file, name, value=np.nan, many=1):
  """Puts a value into a tensor of a file, all else as it was."""
  tensors = {key: np.array(x) for key, x in load_file(file).items()}
  tensors[name].reshape(-1)[-many:] = value
  save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole") / "model"
  hf.save_hf(SMALL, tree(model()), folder, dtype="bfloat16")
  return folder


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
  "name",
  [
    "model.embed_tokens.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.0.self_attn.q_norm.weight",
    "model.norm.weight",
    "lm_head.weight",
  ],
)
def test_a_model_with_one_is_refused_by_file_and_tensor(
  whole, tmp_path, name, value
):
  folder = shutil.copytree(whole, tmp_path / "model")
  patched(folder / FILE, name, value, many=2)
  told = rf"^{folder / FILE}: tensor {name} has 2 of [\d,]+ values that are NaN"
  for read in (
    lambda: hf.load(folder, dtype="float32"),
    lambda: finite_weights.check_folder(folder),
  ):
    with pytest.raises(UserError, match=told) as caught:
      read()
    assert "\n" not in str(caught.value)
  finite_weights.check_folder(whole)


def test_a_head_and_an_adapter_with_one_are_refused(whole, tmp_path):
  folder = shutil.copytree(whole, tmp_path / "model")
  patched(folder / FILE, "lm_head.weight")
  mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
  with pytest.raises(UserError, match=r"lm_head\.weight has 1 of"):
    hf.load_head(folder, dtype="float32", mesh=mesh)
  lora = tree(model(lora=LORA), nnx.LoRAParam)
  adapters.save_peft(lora, LORA, tmp_path / "adapter", base="b")
  file = tmp_path / "adapter" / "adapter_model.safetensors"
  name = sorted(load_file(file))[3]
  patched(file, name)
  with pytest.raises(UserError, match=rf"{file}: tensor {name} has 1 of"):
    adapters.load_peft(file.parent, SMALL)
  with pytest.raises(UserError, match=rf"{file}: tensor {name} has 1 of"):
    finite_weights.check_folder(file.parent)


def test_a_checkpoint_with_one_is_refused(tmp_path):
  checkpoints = Checkpoints(tmp_path, 2)
  made = {"lora": {"a": np.ones((8, 3), np.float32)}, "step": 4}
  made["moment"] = jnp.ones((8, 4), jnp.bfloat16)
  checkpoints.save(4, made)
  checkpoints.wait()
  assert checkpoints.restore(made)[0] == 4
  made["moment"] = made["moment"].at[7, 1].set(jnp.nan)
  checkpoints.save(5, made)
  checkpoints.wait()
  mesh = jax.make_mesh((8,), ("data",))
  split = jax.sharding.NamedSharding(mesh, jax.P("data"))
  for place in (None, split):
    like = jax.ShapeDtypeStruct((8, 4), jnp.bfloat16, sharding=place)
    with pytest.raises(UserError, match=r"/5: array moment has 1 of"):
      checkpoints.restore(made | {"moment": like})


def chosen(folder, **engine):
  config = experiment.default_config()
  config.data.arithmetic.num_problems = 4
  config.rollout.max_prompt_tokens = 448
  config.rollout.max_response_tokens = 16
  config.student.path = str(folder)
  config.evaluate.num_problems = 2
  config.evaluate.max_prompt_tokens = 448
  config.engine.update_from_flattened_dict(engine)
  return experiment.from_config(config)


ENGINES = {
  "jax": {"name": "jax"},
  "server": {"name": "server", "server.urls": ("http://127.0.0.1:9",)},
}


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_a_stage_ends_before_a_sample_is_drawn(tmp_path, engine):
  folder = shutil.copytree("trd_jax/lab/student", tmp_path / "student")
  patched(folder / FILE, "model.norm.weight")
  run_dir = RunDir(tmp_path / "run")
  told = rf"{folder / FILE}: tensor model\.norm\.weight has 1 of"
  with pytest.raises(UserError, match=told):
    rollout.run(chosen(folder, **engine), run_dir, types.SimpleNamespace())
  assert not run_dir.keys("rollout")
  # The same of the merged student, whose base is whole.
  shutil.copytree(folder, run_dir.merged)
  run_dir.mark_done("merge", {"merged": True})
  flags = {flag.name: flag.key.default for flag in evaluate.FLAGS}
  told = rf"{run_dir.merged / FILE}: tensor model\.norm\.weight has 1 of"
  with pytest.raises(UserError, match=told):
    evaluate.run(
      chosen("lab:student", **engine), run_dir, types.SimpleNamespace(**flags)
    )
  assert not run_dir.keys("evaluate/trained")


@pytest.mark.vllm
def test_vllms_interpreter_refuses_it_without_jax_and_before_vllm_starts(
  tmp_path,
):
  python = engine_env.vllm_python()
  folder = shutil.copytree("trd_jax/lab/student", tmp_path / "student")
  patched(folder / FILE, "model.layers.0.mlp.up_proj.weight")
  command = [python, "-m", "trd_jax.rollout", f"--workdir={tmp_path / 'run'}"]
  command += ["--config=configs/demo.py", f"--config.student.path={folder}"]
  command += ["--config.engine.name=vllm"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 2, done.stderr
  (line,) = [x for x in done.stderr.splitlines() if x.startswith("trd-jax")]
  assert "up_proj.weight has 1 of" in line
  assert "vllm: loading" not in done.stderr
  code = (
    "import sys, trd_jax.model.weights.finite_weights;"
    " print('jax' in sys.modules)"
  )
  for each in (python, sys.executable):
    said = subprocess.run([each, "-c", code], capture_output=True, text=True)
    assert said.stdout == "False\n"


@pytest.mark.slow
@pytest.mark.parametrize("top", [0, 3])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("value", [np.nan, 3e38])
def test_logits_that_are_no_numbers_stop_the_engine(value, devices, top):
  made = model(dataclasses.replace(SMALL, tie_embeddings=False))
  made.norm.scale[...] = made.norm.scale[...].at[0].set(value)
  made.head.weight[...] = 10 * made.head.weight[...]
  engine = JaxEngine(
    made, slots=4, decode_steps=5, devices=jax.devices()[:devices], name="it"
  )
  asked = [Request(f"r{n}", [1, 2, 3 + n], n, 9) for n in range(6)]
  sampling = Sampling(temperature=1.0, top_logprobs=top)
  with pytest.raises(UserError, match=r"^it: the logits of token 1 of request"):
    list(engine.generate(asked, sampling))


def test_infinity_that_a_head_gives_for_some_tokens_is_none(tmp_path):
  # Ids that a mask takes out are no sign of a broken model.
  made = model()
  engine = JaxEngine(made, slots=2, decode_steps=4, devices=jax.devices()[:1])
  asked = [Request("r", [1, 2], 0, 5)]
  sampling = Sampling(temperature=1.0, top_k=2, vocab_size=50)
  (found,) = engine.generate(asked, sampling)
  assert len(found.ids) == 5
  assert min(found.ids) >= 0
