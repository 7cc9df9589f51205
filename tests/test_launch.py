"""The scripts that start a training on several machines."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.distill import test_distributed as distributed
from tests.support import processes, training_runs
from tests.support.devices import xla_flags
from tests.support.places import ROOT
from trd_jax.experiment.metric_log import read_metrics
from trd_jax.generation.engines import vllm_engine

LAUNCH = ROOT / "launch"
NODE = LAUNCH / "node.sh"
# A Python that makes environments with itself, and notes what it is asked.
PYTHON = """#!/usr/bin/env bash
here=$(dirname "$0")
printf '%s %s\\n' "$(basename "$(dirname "$here")")" "$*" >> "$ASKED"
case "$*" in
  "-m venv "*)
    mkdir -p "$3/bin"
    touch "$3/pyvenv.cfg" # as venv writes it before all else
    cp "$0" "$3/bin/python"
    [[ $BREAKS != "$3" ]] || exit 1
    touch "$3/pip"
    ;;
  "-m pip "*) [[ -e $here/../pip ]] || exit 1 ;;
esac
[[ -z $BREAKS || $* != *"$BREAKS" ]] || exit 1
"""
SSH, SLURM = LAUNCH / "train_ssh.sh", LAUNCH / "train_slurm.sh"


def launch(script, *arguments, **variables):
  environment = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("JAX_", "XLA_", "SLURM_", "TRD_"))
  }
  return subprocess.run(
    [script, *arguments],
    env=environment | variables,
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize("script", [SSH, SLURM])
def test_help_is_the_head_of_the_script(script):
  told = launch(script, "--help")
  assert told.returncode == 0
  assert f"usage: launch/{script.name}" in told.stdout
  assert "--dry-run" in told.stdout
  assert "#" not in told.stdout


def test_a_dry_run_shows_what_each_host_would_run():
  arguments = ["--workdir=/s/it's here", "--config.seed=1"]
  told = launch(
    SSH,
    "me@one,two",
    "--port=99",
    "--dir=/s/trd",
    "--dry-run",
    "--",
    *arguments,
    JAX_LOG_COMPILES="1",
  )
  assert told.returncode == 0
  for process, line in enumerate(told.stdout.splitlines()):
    *ssh, host, command = shlex.split(line)
    assert ssh[0] == "ssh"
    assert host == ("me@one", "two")[process]
    assert shlex.split(command) == [
      *("cd", "/s/trd", "&&", "exec", "env", "TRD_JAX_PIPELINE=$PPID"),
      *("TRD_COORDINATOR=one:99", "TRD_PROCESSES=2", f"TRD_PROCESS={process}"),
      *("JAX_LOG_COMPILES=1", ".venv/bin/python", "-m", "trd_jax.train"),
      *arguments,
    ]
  assert len(told.stdout.splitlines()) == 2


def test_a_dry_run_shows_the_job_and_what_it_would_start(tmp_path):
  own = ["--nodes", "2", "--dry-run", "--gpus=4", "--partition", "p"]
  stage = ["--", "--workdir=/s/a b", "--dry-run"]
  told = launch(SLURM, *own, *stage)
  assert told.returncode == 0
  export, job = map(shlex.split, told.stdout.splitlines())
  assert export == ["export", f"TRD_ROOT={LAUNCH.parent}"]
  assert job[0] == "sbatch"
  # Given as it stands, it is submitted and runs.
  own.remove("--dry-run")
  assert job[-len(own + stage) - 1 :] == [str(SLURM), *own, *stage]
  own.append("--dry-run")
  stage.pop()
  options = ("--nodes 2", "--ntasks-per-node 1", "--gpus-per-node 4")
  # It hears of its end in time to save, and comes back if it was preempted.
  for option in (*options, "--signal TERM@300", "--requeue"):
    assert option in " ".join(job)
  # Within a job, which a cluster's own program tells the nodes of.
  scontrol = tmp_path / "scontrol"
  scontrol.write_text("#!/bin/sh\nprintf 'n07\\nn08\\n'\n")
  scontrol.chmod(0o755)
  inside = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[07-08]"}
  path = f"{tmp_path}:{os.environ['PATH']}"
  told = launch(SLURM, *own, *stage, **inside, PATH=path, TRD_PYTHON="/py")
  assert told.returncode == 0
  export, go, run = map(shlex.split, told.stdout.splitlines())
  assert export == ["export", "TRD_COORDINATOR=n07:23456"]
  assert go == ["cd", str(LAUNCH.parent)]
  assert run[:7] == shlex.split("srun --nodes 2 --ntasks 2 --ntasks-per-node 1")
  # What runs on a node: which process it is, from srun; the rest as given.
  shell = run[run.index("bash") :]
  shell[shell.index("/py") : -1] = ["env"]
  given = ["SLURM_NTASKS=2", "SLURM_PROCID=1"]

  def environment(*more):
    told = subprocess.run(
      ["env", "-u", "JAX_PLATFORMS", *given, *more, *shell[:-1]],
      capture_output=True,
      text=True,
    )
    return set(told.stdout.splitlines())

  told = environment()
  assert {"TRD_PROCESSES=2", "TRD_PROCESS=1", "JAX_PLATFORMS=cuda,cpu"} <= told
  assert "JAX_PLATFORMS=rocm" in environment("JAX_PLATFORMS=rocm")
  assert run[-4:] == ["/py", "-m", "trd_jax.train", "--workdir=/s/a b"]
  # Without GPUs JAX is left to itself.
  own = ["--gpus=0", *own]
  own.remove("--gpus=4")
  told = launch(SLURM, *own, *stage, **inside, PATH=path, TRD_PYTHON="/py")
  assert "JAX_PLATFORMS" not in told.stdout


@pytest.mark.parametrize(
  ("script", "arguments", "told"),
  [
    (SSH, ["a,b"], "behind --"),
    (SSH, ["--", "--workdir=x"], "name the hosts"),
    (SSH, ["a,,b", "--", "x"], '"" is no host'),
    (SSH, ["a", "--port=70000", "--", "x"], "no port"),
    (SSH, ["a", "--gpus", "--", "x"], "there is no option --gpus"),
    (SLURM, ["--nodes", "2"], "behind --"),
    (SLURM, ["--", "x"], "--nodes is missing"),
    (SLURM, ["--nodes=two", "--", "x"], '"two" is no number'),
    (SLURM, ["--time", "--", "x"], "--time wants a value"),
  ],
)
def test_mistakes_are_told_in_one_line(script, arguments, told):
  found = launch(script, *arguments)
  assert found.returncode == 2
  (line,) = found.stderr.splitlines()
  assert line.startswith(f"{script.name}: ")
  assert told in line
  assert found.stdout == ""


@pytest.fixture
def over_ssh(tmp_path):
  """Starts the ssh script with a program that reaches this machine alone."""
  # As sshd does, it stands between and doesn't pass signals on.
  remote = tmp_path / "here"
  remote.write_text('#!/usr/bin/env bash\nbash -c "$2"\nexit $?\n')
  remote.chmod(0o755)
  started = []

  def start(run_dir, *arguments):
    environment = os.environ | {
      "TRD_SSH": str(remote),
      "TRD_PYTHON": sys.executable,
      "XLA_FLAGS": xla_flags(4),
    }
    command = [SSH, "localhost,127.0.0.1", f"--port={distributed.free_port()}"]
    command += ["--", f"--workdir={run_dir.root}", *arguments]
    process = subprocess.Popen(
      command,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    started.append(process)
    return process

  yield start
  for process in started:
    for pid in [process.pid, *processes.below(process.pid)]:
      if processes.title(pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.multiprocess
def test_hosts_train_together_and_what_was_started_ends(tmp_path, over_ssh):
  student = training_runs.model_folder(tmp_path / "student")
  run_dir = distributed.workdir(tmp_path / "run", student, epochs=2)
  process = over_ssh(run_dir)
  out, err = process.communicate(timeout=240)
  assert process.returncode == 0, err
  assert run_dir.done("train")["updates"] == 2
  assert "localhost: train: 12 trajectories" in out
  assert "127.0.0.1: train" not in out

  # Interrupted, or one of its processes gone: nothing is left at work.
  for end, code in (("script", 143), ("process", 137)):
    run_dir = distributed.workdir(tmp_path / end, student, epochs=200)
    beat = "--config.distributed.heartbeat_seconds=5"
    process = over_ssh(run_dir, beat)
    file = run_dir.metrics_file("train")
    while len(read_metrics(file)) < 2:
      assert process.poll() is None, process.communicate()
      time.sleep(0.05)
    below = processes.below(process.pid)
    both = [p for p in below if processes.title(p).startswith(sys.executable)]
    assert len(both) == 2
    if end == "script":
      process.terminate()
    else:
      os.kill(both[1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert processes.still_there(below, 30) == []
    assert run_dir.done("train") is None


def serve_dry(*arguments, gpus=None):
  """What `serve.sh --dry-run` prints, or its refusal."""
  environment = {**os.environ, "TRD_VLLM_PYTHON": sys.executable}
  environment.pop("CUDA_VISIBLE_DEVICES", None)
  if gpus:
    environment["CUDA_VISIBLE_DEVICES"] = gpus
  return subprocess.run(
    [LAUNCH / "serve.sh", "lab:student", "--dry-run", *arguments],
    capture_output=True,
    text=True,
    env=environment,
    check=False,
  )


@pytest.mark.parametrize(("rank", "room"), [(8, 8), (9, 16), (300, 320)])
def test_servers_reserve_room_that_vllm_has_for_adapters(rank, room):
  done = serve_dry(f"--lora={rank}")
  words = done.stdout.split()
  assert words[words.index("--max-lora-rank") + 1] == str(room)


@pytest.mark.slow
def test_servers_take_the_dtype_of_the_folder_unless_another_is_given():
  words = serve_dry().stdout.split()
  assert words[words.index("--dtype") + 1] == "bfloat16"
  words = serve_dry("--", "--dtype=float32").stdout.split()
  assert "--dtype" not in words
  assert "--dtype=float32" in words


@pytest.mark.parametrize(
  ("arguments", "gpus", "says"),
  [
    (["--lora=513"], None, "up to rank 512"),
    (["--lora=8", "--", "--dtype", "float32"], "0,1", "add -- --dtype bfloat1"),
    (["--lora=8", "--", "--dtype=float32"], "0", "add -- --dtype bfloat16"),
    (["--speculative=8"], None, "CPU build checks drafts at temperature 0"),
    (["--speculative=many"], "0", '"many" is no number'),
  ],
)
def test_servers_that_vllm_would_not_start_are_refused(arguments, gpus, says):
  done = serve_dry(*arguments, gpus=gpus)
  assert (done.returncode, done.stdout) == (2, "")
  assert says in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_servers_that_draft_have_what_their_engine_counts_on():
  done = serve_dry("--speculative=6", gpus="0")
  words = shlex.split(done.stdout)
  config = json.loads(words[words.index("--speculative-config") + 1])
  assert config == {
    "method": "ngram",
    "num_speculative_tokens": 6,
    "prompt_lookup_min": vllm_engine.LOOKUP_MIN,
    "prompt_lookup_max": vllm_engine.LOOKUP_MAX,
  }
  module, name = words[words.index("--logits-processors") + 1].split(":")
  file = LAUNCH.parent / f"{module.replace('.', '/')}.py"
  assert f"class {name}(" in file.read_text()
  assert "--speculative-config" not in serve_dry(gpus="0").stdout


def test_servers_are_shown_and_not_started():
  told = launch(
    *(LAUNCH / "serve.sh", "lab:student", "--servers=2", "--port=8100"),
    *("--lora=16", "--dry-run", "--", "--dtype", "float32"),
    PYTHONPATH=str(LAUNCH.parent),
    TRD_VLLM_PYTHON=sys.executable,
  )
  assert told.returncode == 0, told.stderr
  lines = [shlex.split(line) for line in told.stdout.splitlines()]
  assert len(lines) == 2
  for number, line in enumerate(lines):
    serve = line[line.index("vllm") :]
    assert serve[:2] == ["vllm", "serve"]
    assert serve[2].endswith("lab/student")
    assert serve[serve.index("--port") + 1] == str(8100 + number)
    assert serve[serve.index("--max-lora-rank") + 1] == "16"
    assert serve[-2:] == ["--dtype", "float32"]


def test_an_interrupted_installation_is_taken_up_again(tmp_path):
  root = LAUNCH.parent
  for name in ("launch", "third_party/vllm", "third_party/evalplus", "configs"):
    shutil.copytree(root / name, tmp_path / name)
  # lcb_runner's is made already: what it fetches is on no registry.
  (tmp_path / ".venv-lcb").mkdir()
  (tmp_path / ".venv-lcb" / "lcb_runner.txt").write_text("commit")
  python = tmp_path / "python"
  python.write_text(PYTHON)
  python.chmod(0o755)
  log = tmp_path / "asked"

  def node(breaks=""):
    log.write_text("")
    told = launch(
      *(tmp_path / "launch" / NODE.name, "configs/opd.py:domain=code"),
      str(tmp_path / "run"),
      TRD_PYTHON=str(python),
      BREAKS=breaks,
      ASKED=str(log),
    )
    asked = log.read_text().splitlines()
    assert (told.returncode == 0) == (not breaks), told.stderr
    stages = [line for line in asked if "-m trd_jax.pipeline" in line]
    assert len(stages) == (0 if breaks else 3)
    return [line for line in asked if "pip " in line and "install" in line]

  for breaks in (
    *(".venv", "-e .[cuda12]"),
    *(".venv-vllm", "vllm/cuda.txt", "jax flax optax orbax-checkpoint grain"),
    *(".venv-evalplus", "evaluation.txt", "evalplus/requirements.txt"),
  ):
    node(breaks)
  assert any(".venv-evalplus" in line for line in node())
  # All is there: only trd-jax itself is looked at again.
  (line,) = node()
  assert line.endswith("-e .[cuda12]")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
  """What a clone has of the project; nothing has been made there."""
  root = tmp_path_factory.mktemp("bare") / "clone"
  made = shutil.ignore_patterns("__pycache__")
  for name in ("launch", "configs", "trd_jax", "third_party"):
    shutil.copytree(LAUNCH.parent / name, root / name, ignore=made)
  return root


def bare(clone, *command, **variables):
  """Runs a command as a shell without any settings would."""
  return subprocess.run(
    command,
    cwd=clone,
    env={"PATH": "/usr/bin:/bin", **variables},
    capture_output=True,
    text=True,
  )


PLAN = ("launch/node.sh", "configs/opsd.py:model=8b", "runs/x", "--dry-run")


@pytest.mark.parametrize(
  ("python", "says"),
  [
    ("none", "there is no {} here"),
    ("#!/bin/sh\nexit 1\n", "{} is no Python"),
    ("#!/bin/sh\necho '{} is Python 3.9'\n", "{} is Python 3.9"),
    (None, "python3"),
  ],
)
def test_a_plan_in_a_bare_clone_says_what_it_needs(
  clone, tmp_path, python, says
):
  variables, path = {}, tmp_path / "python"
  if python is not None:
    variables = {"TRD_PYTHON": str(path)}
  if python not in (None, "none"):
    path.write_text(python.format(path))
    path.chmod(0o755)
  found = bare(clone, *PLAN, **variables)
  if python is None and found.returncode == 0:
    pytest.skip("the system's Python has all packages")
  assert found.returncode == 2
  (line,) = found.stderr.splitlines()
  assert line.startswith(f"node.sh: {says.format(path)}")
  assert "TRD_PYTHON" in line
  assert ".venv/bin/python -m trd_jax.pipeline" in found.stdout
  assert not {"runs", ".venv", ".venv-vllm"} & {p.name for p in clone.iterdir()}


def test_a_plan_in_a_bare_clone_is_told_by_a_python_with_the_packages(clone):
  found = bare(clone, *PLAN, TRD_PYTHON=sys.executable, HF_HUB_OFFLINE="1")
  assert found.returncode == 0, found.stderr
  assert "third_party/vllm/install.sh makes it" in found.stdout
  assert "disk, at most" in found.stdout
  assert not {"runs", ".venv", ".venv-vllm"} & {p.name for p in clone.iterdir()}


def test_what_makes_environments_is_seen_to_be_fit(clone):
  found = bare(clone, *PLAN[:-1], TRD_PYTHON="/no/such/python")
  assert found.returncode == 2
  (line,) = found.stderr.splitlines()
  assert line.startswith("node.sh: there is no /no/such/python here")
  assert not (clone / ".venv").exists()


@pytest.mark.parametrize("stage", ["pipeline", "sweep", "rollout"])
def test_a_stage_under_a_bare_python_says_what_it_needs(clone, stage):
  # As the system's Python: without the packages of this environment.
  command = (sys.executable, "-S", "-m", f"trd_jax.{stage}", "--dry_run")
  found = bare(clone, *command)
  assert found.returncode == 2
  (line,) = found.stderr.splitlines()
  assert line.startswith(f"trd-jax: {sys.executable} is Python 3.")
  assert "without absl, ml_collections" in line


@pytest.mark.parametrize(
  "command",
  [
    ("launch/train_ssh.sh", "a,b", "--dry-run", "--", "--workdir=x"),
    ("launch/train_slurm.sh", "--nodes=2", "--dry-run", "--", "--workdir=x"),
  ],
)
def test_other_plans_need_nothing(clone, command):
  found = bare(clone, *command)
  assert found.returncode == 0, found.stderr
  assert "--workdir=x" in found.stdout


def test_a_plan_of_servers_in_a_bare_clone_says_what_it_needs(clone):
  found = bare(clone, "launch/serve.sh", "lab:student", "--dry-run")
  assert found.returncode == 2
  (line,) = found.stderr.splitlines()
  assert "TRD_VLLM_PYTHON" in line


def test_a_home_in_a_folders_name_is_the_hosts(tmp_path):
  (tmp_path / "a b").mkdir()
  for folder, goes_to in (("~/a b", tmp_path / "a b"), ("~", tmp_path)):
    shown = launch(
      SSH, "h1", "--dir", folder, "--dry-run", "--", "--workdir=runs/x"
    )
    goes, *_ = shlex.split(shown.stdout)[-1].split(" && ")
    there = subprocess.run(
      ["bash", "-c", f"{goes} && pwd"],
      env={**os.environ, "HOME": str(tmp_path)},
      capture_output=True,
      text=True,
    )
    assert there.stdout == f"{goes_to}\n"


def test_an_empty_workdir_is_refused_before_anything_is_installed():
  told = launch(NODE, "configs/demo.py", "")
  assert told.returncode == 2
  assert told.stdout == ""
  assert "WORKDIR is empty" in told.stderr


@pytest.mark.parametrize(
  "name", ["vllm cpu", "evalplus", "lcb_runner", "bench"]
)
def test_a_folder_with_something_else_becomes_no_environment(name, tmp_path):
  (tmp_path / "installed").write_text("mine")
  name, *kind = name.split()
  script = LAUNCH.parent / "third_party" / name / "install.sh"
  for folder in (str(tmp_path), "~"):
    if (name, folder) == ("bench", "~"):
      continue
    told = launch(script, *kind, folder, HOME=str(tmp_path))
    assert told.returncode == 2
    assert f"{tmp_path} is there and no environment" in told.stderr
    assert (tmp_path / "installed").read_text() == "mine"


def test_make_clean_removes_what_make_has_made(tmp_path):
  shutil.copy(LAUNCH.parent / "Makefile", tmp_path)
  (tmp_path / "else").mkdir()
  for name in ("made/.runtime", "mine/bin", "build/lib/x", "build/mine"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
  (tmp_path / "else" / ".cpu").write_text("")
  told = subprocess.run(
    [
      *("make", "clean", "VENV=made", "EVALPLUS_VENV=mine"),
      f"VLLM_VENV={tmp_path / 'else'}",
    ],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert told.returncode == 0, told.stderr
  assert "mine stays" in told.stderr
  left = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")}
  assert left == {
    *("Makefile", "mine", "mine/bin", "build", "build/mine"),
    *("else", "else/.cpu"),
  }
