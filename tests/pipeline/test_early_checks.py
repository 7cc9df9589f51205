"""What is wrong shows before anything is generated."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import types

import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from tests.support import hub_server
from tests.support.places import ROOT
from trd_jax.experiment import experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.processes import interpreters
from trd_jax.experiment.records import Problem, Trajectory
from trd_jax.experiment.run_dir import RunDir
from trd_jax.model.weights import hub
from trd_jax.pipeline import early_checks, model_checks, pipeline

LAB = {name: hub.model_folder(f"lab:{name}") for name in ("student", "teacher")}
SMALL = (
  "--config.data.arithmetic.num_problems=6",
  "--config.rollout.max_response_tokens=48",
  "--config.refine.max_response_tokens=48",
  "--config.evaluate.num_problems=2",
  "--config.evaluate.k=1",
)
# The pipeline, without a JAX in its process.
PIPELINE = """
import sys, trd_jax.experiment.cli as cli, trd_jax.pipeline.pipeline as m
try:
  cli.main("pipeline", m.run, "", m.FLAGS)
finally:
  assert not {"jax", "flax"} & sys.modules.keys()
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
  """No hub is asked, and none has been."""
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


@pytest.fixture
def hub_here(monkeypatch, tmp_path):
  """A hub that has own/student and nothing else."""
  shutil.copytree(LAB["student"], tmp_path / "hub" / "own" / "student")
  with hub_server.serving(tmp_path / "hub") as server:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    yield server


@pytest.fixture
def teacher(tmp_path):
  return shutil.copytree(LAB["teacher"], tmp_path / "teacher")


def chosen(**keys):
  small = {"regime": "opd", "evaluate.benchmarks": ("arithmetic",)}
  for stage in ("rollout", "refine", "evaluate"):
    small |= {f"{stage}.max_prompt_tokens": 448}
    small |= {f"{stage}.max_response_tokens": 160}
  small |= {"train.max_student_tokens": 608, "train.max_teacher_tokens": 608}
  return experiment.from_config(small | keys)


def look(tmp_path, **keys):
  return early_checks.look(chosen(**keys), RunDir(tmp_path / "run"))


def messages(found, state):
  return [one.message for one in found if one.state == state]


def wrong(tmp_path, **keys):
  """The one thing that is wrong, found while nothing was made."""
  (one,) = messages(look(tmp_path, **keys), "wrong")
  assert "\n" not in one
  assert not (tmp_path / "run").exists()
  return one


def edit(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_nothing_is_wrong_with_what_is_right(tmp_path, teacher):
  found = look(tmp_path, **{"teacher.path": str(teacher)})
  assert {one.state for one in found} == {"ok"}
  assert [one.what for one in found] == [
    *("student", "teacher", "vocabulary", "benchmarks", "problems"),
    "interpreters",
  ]
  assert not (tmp_path / "run").exists()


# --- the teacher


def no_config(folder):
  (folder / "config.json").unlink()


def no_weights(folder):
  (folder / "model.safetensors").unlink()


def no_tokenizer(folder):
  (folder / "tokenizer.json").unlink()


def no_template(folder):
  edit(folder / "tokenizer_config.json", chat_template=None)
  (folder / "chat_template.jinja").unlink(missing_ok=True)


def no_shard(folder):
  tensors = load_file(folder / "model.safetensors")
  names = {name: "model-00001-of-00002.safetensors" for name in tensors}
  names["model.norm.weight"] = "model-00002-of-00002.safetensors"
  (folder / "model.safetensors").rename(folder / names[min(names)])
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": names}))


def no_norm(folder):
  tensors = load_file(folder / "model.safetensors")
  del tensors["model.norm.weight"]
  save_file(tensors, folder / "model.safetensors")


def half_a_file(folder):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-9])


def other_architecture(folder):
  edit(folder / "config.json", architectures=["MixtralForCausalLM"])


def other_ids(folder):
  path = folder / "tokenizer.json"
  tokenizers.Tokenizer.from_file(str(path)).to_str()
  value = json.loads(path.read_text())
  vocabulary = value["model"]["vocab"]
  one, other = list(vocabulary)[-2:]
  vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
  path.write_text(json.dumps(value))


def other_rows(folder):
  rows = json.loads((folder / "config.json").read_text())["vocab_size"]
  edit(folder / "config.json", vocab_size=rows + 16)


def too_few_rows(folder):
  edit(folder / "config.json", vocab_size=100)


@pytest.mark.parametrize(
  ("spoil", "says"),
  [
    (no_config, "has no config.json"),
    (no_weights, "holds no safetensors"),
    (no_tokenizer, "has no tokenizer.json"),
    (no_template, "no chat template"),
    (no_shard, "model-00002-of-00002.safetensors is missing"),
    (no_norm, "tensor model.norm.weight is missing"),
    (half_a_file, "can't be read"),
    (other_architecture, "architecture MixtralForCausalLM is not supported"),
    (other_ids, "its tokenizer gives other ids"),
    (too_few_rows, "has a head of 100 rows"),
  ],
)
def test_a_teacher_that_is_no_teacher_is_reported(
  tmp_path, teacher, spoil, says
):
  spoil(teacher)
  one = wrong(tmp_path, **{"teacher.path": str(teacher)})
  assert one.startswith(("teacher: ", "teacher.path=", str(teacher)))
  assert says in one


def test_a_teacher_of_other_ids_may_write_where_none_is_asked(
  tmp_path, teacher
):
  other_ids(teacher)
  path = {"teacher.path": str(teacher)}
  assert "method=sft" in wrong(tmp_path, **path)
  found = look(tmp_path, method="sft", **path)
  assert messages(found, "wrong") == []
  assert any("gives other ids" in one for one in messages(found, "ok"))
  # Mixed with a divergence the teacher's logits are needed after all.
  mixed = {"loss.cross_entropy": 0.5, **path}
  assert "gives other ids" in wrong(tmp_path, **mixed)


def test_heads_of_other_lengths_are_told_and_are_no_mistake(tmp_path, teacher):
  other_rows(teacher)
  found = look(tmp_path, **{"teacher.path": str(teacher)})
  assert messages(found, "wrong") == []
  (one,) = [m for m in messages(found, "ok") if "the same ids" in m]
  assert re.search(r"are scored over the [\d,]+ ids that both have", one)


@pytest.mark.parametrize(
  ("path", "says"),
  [
    ("{}/teachr", 'did you mean "{}/teacher"?'),
    ("{}/nowhere/teacher", "there is no model"),
    ("{}/teacher/config.json", "it is a file"),
    ("lab:techer", "this installation has no model"),
    ("random:nanno", "there is no random model of that size"),
    ("random:nano", "has no tokenizer of its own"),
  ],
)
def test_a_teacher_that_is_not_there_is_reported(tmp_path, teacher, path, says):
  one = wrong(tmp_path, **{"teacher.path": path.format(tmp_path)})
  assert says.format(tmp_path) in one


def test_a_teacher_is_needed_as_long_as_something_asks_it(tmp_path):
  keys = {"teacher.path": "lab:techer"}
  run_dir = RunDir(tmp_path)
  for stage in ("refine", "train"):
    assert messages(early_checks.look(chosen(**keys), run_dir), "wrong")
    run_dir.mark_done(stage, {})
  assert not messages(early_checks.look(chosen(**keys), run_dir), "wrong")
  assert not messages(look(tmp_path / "opsd", regime="opsd", **keys), "wrong")


def test_a_hub_id_is_one_small_request(tmp_path, hub_here):
  keys = {"teacher.path": "own/student"}
  found = look(tmp_path, **keys)
  assert not messages(found, "wrong") + messages(found, "missing")
  assert messages(found, "unchecked")[-1].startswith(
    "whether student and teacher"
  )
  asked = [line for line in hub_here.asked if "own" in line]
  assert asked == ["GET /api/models/own/student"]
  no_such = wrong(tmp_path, **{"teacher.path": "own/stdnt"})
  assert no_such.startswith("teacher.path=own/stdnt: the hub has no model")
  near = wrong(tmp_path, **{"teacher.path": "Qwen/Qwen3-8b"})
  assert near.endswith('did you mean "Qwen/Qwen3-8B"?')
  revision = wrong(tmp_path, **keys, **{"teacher.revision": "v9"})
  assert "own/student on the hub has no revision v9" in revision
  folder = hub_here.root / "own" / "student"
  other_architecture(folder)
  assert "MixtralForCausalLM, which is not" in wrong(tmp_path, **keys)
  no_weights(folder)
  assert r"has no *.safetensors" in wrong(tmp_path, **keys)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["hub"]


def test_without_a_hub_that_is_said(tmp_path, monkeypatch):
  (one,) = messages(
    look(tmp_path, **{"teacher.path": "own/student"}), "missing"
  )
  assert one.startswith("teacher.path=own/student is not on this machine")
  with pytest.raises(UserError, match="the hub can't be asked"):
    early_checks.enter(
      chosen(**{"teacher.path": "own/student"}), RunDir(tmp_path / "run")
    )
  # What only looks like a hub id, beside a folder that is spelt nearly so.
  (tmp_path / "models" / "Qwen3-8B").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  one = wrong(tmp_path, **{"teacher.path": "models/Qwen3-8b"})
  assert one.endswith('did you mean "models/Qwen3-8B"?')


# --- everything else


@pytest.mark.parametrize(
  ("keys", "says"),
  [
    ({"evaluate.benchmarks": ("aime42",)}, 'did you mean "aime25"?'),
    (
      {"evaluate.benchmarks": ("aime24",), "evaluate.root": "/no/such"},
      "evaluate.root=/no/such: no such file",
    ),
    ({"data.source": "deepscalr"}, 'did you mean "deepscaler"?'),
    ({"data.subset": "some"}, "choose from all, with_cot"),
    ({"data.arithmetic.split": "tran"}, "there is no such split"),
    ({"data.source": "jsonl", "data.root": "/no/such"}, "data.root=/no/such"),
    ({"student.path": "lab:studnet"}, "student: this installation"),
    ({"student.thinking": True}, "thinking"),
    ({"student.adapter": "/no/such"}, "student.adapter=/no/such: there is no"),
    ({"student.tokenizer": "lab:x"}, "this installation has no model"),
    ({"student.chat_template": "/no/such"}, "the chat template can't be read"),
    ({"python.train": "/no/such"}, "python.train=/no/such is not there"),
    ({"python.generation": "/tmp"}, "is a folder, no interpreter"),
    ({"python.rollout": __file__}, "is no program that may be run"),
    ({"python.merge": "/bin/false"}, "can't be run as Python"),
    ({"metrics.wandb": True}, "can't import wandb: pip install"),
    ({"engine.name": "vllm"}, "can't import vllm: make an environment"),
    (
      {"train.teacher": "hidden_cache", "train.cache_dir": __file__},
      "is no folder; name another folder",
    ),
  ],
)
def test_what_would_end_a_run_hours_later_is_reported(tmp_path, keys, says):
  assert says in wrong(tmp_path, **keys)


def test_an_adapter_that_does_not_fit_is_reported(tmp_path):
  adapter = tmp_path / "adapter"
  adapter.mkdir()
  fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
  (adapter / "adapter_config.json").write_text(json.dumps(fields))
  key = {"student.adapter": str(adapter)}
  assert "adapter holds no safetensors" in wrong(tmp_path, **key)
  save_file({}, adapter / "adapter_model.safetensors")
  assert "q_proj.lora_A.weight (4, 128) is missing" in wrong(tmp_path, **key)


def test_every_mistake_is_told_at_once(tmp_path):
  keys = {"teacher.path": "lab:techer", "data.source": "tako"}
  with pytest.raises(UserError, match=r"lab:techer.*; also: .*tako") as error:
    early_checks.enter(chosen(**keys), RunDir(tmp_path))
  assert "\n" not in str(error.value)
  teacher, source = error.value.messages
  assert "lab:techer" in teacher
  assert "tako" in source


def test_budgets_beyond_a_models_positions_are_noted(tmp_path):
  keys = {"refine.max_response_tokens": 900, "rollout.max_prompt_tokens": 2000}
  keys |= {"train.max_teacher_tokens": 1500}
  notes = messages(look(tmp_path, **keys), "note")
  assert [note.partition(" ")[0] for note in notes] == [
    "rollout.max_prompt_tokens=2,000",
    "refine:",
    "train.max_teacher_tokens=1,500",
  ]
  assert "prompts of 124 tokens or more" in notes[1]


def test_a_server_that_is_not_up_yet_is_noted(tmp_path):
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    keys = {"engine.name": "server", "engine.server.urls": (url,)}
    (note,) = messages(look(tmp_path, **keys), "note")
  assert note.startswith(f"{url} doesn't answer yet")


def test_an_interpreter_is_tried(tmp_path):
  old = tmp_path / "python"
  old.write_text("#!/bin/sh\necho '[[3, 9, 2], []]'\n")
  old.chmod(0o755)
  keys = {"python.train": str(old)}
  assert f"python.train={old} is Python 3.9.2; name" in wrong(tmp_path, **keys)
  (tmp_path / ".venv-vllm").mkdir()
  absent = tmp_path / ".venv-vllm" / "bin" / "python"
  keys = {"python.generation": str(absent)}
  (one,) = messages(look(tmp_path, **keys), "missing")
  assert one.endswith("is not there: third_party/vllm/install.sh makes it")
  with pytest.raises(UserError, match="can't import no_such: get it"):
    interpreters.check("python.train", None, {"no_such": "get it", "os": ""})


def test_what_is_done_needs_nothing(tmp_path):
  run_dir = RunDir(tmp_path)
  keys = {"student.path": "lab:x", "teacher.path": "lab:y"}
  keys |= {"evaluate.benchmarks": ("none",), "data.source": "nothing"}
  done = chosen(**keys)
  for stage in ("evaluate/base", *done.stages, "evaluate/trained"):
    run_dir.mark_done(stage, {})
  assert early_checks.look(done, run_dir) == []


# --- as a user has it


def run(workdir, *flags, module="pipeline", **variables):
  command = [sys.executable, "-c", PIPELINE]
  if module != "pipeline":
    command = [sys.executable, "-m", f"trd_jax.{module}"]
  command += ["--config=configs/demo.py:regime=opd", f"--workdir={workdir}"]
  return subprocess.run(
    [*command, *SMALL, *flags],
    cwd=ROOT,
    env=os.environ | variables,
    capture_output=True,
    text=True,
  )


def content(run_dir):
  return {
    path.relative_to(run_dir.root): path.read_bytes()
    for stage in ("problems", "rollout")
    for path in run_dir.stage(stage).rglob("*")
    if path.is_file()
  }


WAYS: dict[str, tuple[str, ...]] = {
  "dry": ("--dry_run",),
  "look": ("--config.preflight_only=True",),
  "run": (),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_wrong_teacher_ends_a_fresh_run_before_it_begins(tmp_path, way):
  flags = *WAYS[way], "--config.teacher.path=lab:techer"
  ended = run(tmp_path / "run", *flags)
  assert ended.returncode == 2
  (line,) = ended.stderr.splitlines()
  assert line.startswith("trd-jax pipeline: teacher: this installation has no")
  assert "evaluate/base" not in ended.stdout
  assert not list(tmp_path.rglob("*.parquet"))
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_teacher_is_corrected_where_the_rollouts_are(tmp_path):
  run_dir = RunDir(tmp_path / "run")
  misspelt = f"--config.teacher.path={tmp_path / 'teachr'}"
  # Alone, the rollout can do without the teacher, and says so.
  alone = run(run_dir.root, misspelt, module="rollout")
  assert alone.returncode == 0, alone.stderr
  assert "is not checked: there is no model" in alone.stdout
  before = content(run_dir)
  assert len(run_dir.read("rollout", Trajectory)) == 6
  assert len(run_dir.read("problems", Problem)) == 6
  config = run_dir.config.read_bytes()
  for flags in WAYS.values():
    ended = run(run_dir.root, misspelt, *flags)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    other = "--config.teacher.path=lab:techer"
    assert run(run_dir.root, other, *flags).returncode == 2
    # A mistake doesn't become the workdir's own.
    assert run_dir.config.read_bytes() == config
  right = "--config.teacher.path=lab:teacher"
  refined = run(run_dir.root, right, module="refine")
  assert refined.returncode == 0, refined.stderr
  assert {row.model for row in run_dir.read("refine", Trajectory)} == {
    "lab:teacher"
  }
  assert content(run_dir) == before
  looked = run(run_dir.root, right, *WAYS["look"])
  assert looked.returncode == 0, looked.stderr
  assert "checked: student lab:student, teacher lab:teacher" in looked.stdout
  # From here on the teacher has made something.
  ended = run(run_dir.root, misspelt, *WAYS["dry"])
  assert ended.returncode == 2
  assert "refine there depends on that" in ended.stderr


@pytest.mark.slow
def test_config_and_tokenizer_of_a_hub_id_are_had_for_a_run(tmp_path):
  folder = shutil.copytree(LAB["teacher"], tmp_path / "hub" / "own" / "teacher")
  with hub_server.serving(tmp_path / "hub") as server:
    home = tmp_path / "home"
    there = {"HF_ENDPOINT": server.url, "HF_HOME": str(home)}
    there |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    key = "--config.teacher.path=own/teacher"
    dry = run(tmp_path / "run", key, *WAYS["dry"], **there)
    assert dry.returncode == 0, dry.stderr
    assert "not checked: whether student and teacher give the s" in dry.stdout
    assert not list(home.rglob("*.json"))
    assert not (tmp_path / "run").exists()
    other_ids(folder)
    ended = run(tmp_path / "run", key, **there)
  assert ended.returncode == 2
  assert "its tokenizer gives other ids" in ended.stderr.splitlines()[-1]
  assert list(home.rglob("tokenizer.json"))
  assert not list(home.rglob("*.safetensors"))


def test_an_adapter_that_vllm_would_refuse_on_gpus_is_noted(tmp_path):
  (tmp_path / "nvidia0").touch()
  on_vllm = {"name": "vllm", "weights": "adapter"}
  for engine, dtype, notes in (
    (on_vllm, "float32", 1),
    (on_vllm, "bfloat16", 0),
    (on_vllm | {"weights": "merged"}, "float32", 0),
    (on_vllm | {"name": "jax"}, "float32", 0),
  ):
    e = experiment.from_config({"engine": engine, "student": {"dtype": dtype}})
    found = model_checks.unmerged(e, tmp_path)
    assert [one.state for one in found] == ["note"] * notes
    assert not model_checks.unmerged(e, tmp_path / "none")


def test_gpus_without_eight_bits_are_noted_before_all(tmp_path, monkeypatch):
  script = tmp_path / "nvidia-smi"
  monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
  run_dir = RunDir(tmp_path / "run")

  def notes(dtype):
    e = experiment.from_config({"train": {"teacher_dtype": dtype}})
    found = early_checks.look(e, run_dir)
    return [x.message for x in found if "teacher_dtype" in x.message]

  def gpus(*lines):
    script.write_text("#!/bin/sh\n" + "".join(f"echo '{x}'\n" for x in lines))
    script.chmod(0o755)

  gpus("0, GPU-a, NVIDIA A100, 8.0", "1, GPU-b, NVIDIA H100, 9.0")
  (note,) = notes("float8")
  assert "NVIDIA A100 has 8.0: training will refuse it here" in note
  assert not notes(None)
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
  assert not notes("float8")
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
  gpus("Field compute_cap is not a valid field to query.")
  assert not notes("float8")


@pytest.mark.parametrize("name", ["merge/model", "merge/adapter"])
def test_what_the_merge_would_replace_is_refused_before_all(tmp_path, name):
  run_dir = RunDir(tmp_path / "run")
  mine = run_dir.root / name / "thesis.tex"
  mine.parent.mkdir(parents=True)
  mine.write_text("mine")
  e = experiment.from_config({})
  wrong = [
    x.message for x in early_checks.look(e, run_dir) if x.state == "wrong"
  ]
  assert [told for told in wrong if "thesis.tex, which would be lost" in told]
  assert mine.read_text() == "mine"


def without_system_turn(folder):
  """Puts a template in a model's folder that refuses system prompts."""
  template = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}"
    "{% endif %}{{ messages[0].content }}\n"
  )
  edit(folder / "tokenizer_config.json", chat_template=template)
  return str(folder)


def test_a_template_without_a_system_turn_is_seen_first(tmp_path, teacher):
  mine = tmp_path / "mine"
  mine.mkdir()
  (mine / "system_arithmetic.jinja").write_text("Be brief.")
  path = {"teacher.path": without_system_turn(teacher)}
  assert not messages(look(tmp_path, **path), "wrong")
  line = wrong(tmp_path, **path, **{"prompts.set": str(mine)})
  assert "has no system turn (No system.)" in line
  assert "teacher" in line
  # In OPSD the teacher isn't asked.
  same = {"regime": "opsd", "prompts.set": str(mine)}
  assert not messages(look(tmp_path, **path, **same), "wrong")


def test_a_rows_system_turn_is_tried_before_the_first_stage(tmp_path, teacher):
  file = tmp_path / "rows.jsonl"
  turns = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Start at 1, add 2."},
  ]
  row = {"messages": turns, "answer": "3", "domain": "arithmetic"}
  file.write_text(json.dumps(row))
  source = {"data.source": "jsonl", "data.root": str(file)}
  e = chosen(**source, **{"teacher.path": without_system_turn(teacher)})
  flags = types.SimpleNamespace(
    dry_run=False, status=None, config_argv=[], **{"from": None}
  )
  with pytest.raises(UserError, match="has no system turn"):
    pipeline.run(e, RunDir(tmp_path / "run"), flags)
  assert not (tmp_path / "run" / "evaluate").exists()


@pytest.mark.parametrize(
  "keys",
  [
    {"refine.teacher_top_k": 1024},
    {"divergence": "reverse_kl_topk", "loss.top_k": 5000},
  ],
  ids=str,
)
def test_as_many_likeliest_tokens_as_there_are_ids_is_refused(
  tmp_path, teacher, keys
):
  keys = {"teacher.path": str(teacher), **keys}
  name = list(keys)[-1]
  assert re.match(rf"{name}=[\d,]+ and lab:student", wrong(tmp_path, **keys))
  # A divergence that takes no likeliest tokens doesn't mind.
  other = keys | {"divergence": "forward_kl", "refine.teacher_top_k": 0}
  assert not messages(look(tmp_path, **other), "wrong")


def test_an_adapter_wider_than_the_model_is_noted(tmp_path, teacher):
  path = {"teacher.path": str(teacher)}
  assert not messages(look(tmp_path, **path, **{"lora.rank": 8}), "note")
  (note,) = messages(look(tmp_path, **path, **{"lora.rank": 4096}), "note")
  assert "lora.rank=4,096" in note
