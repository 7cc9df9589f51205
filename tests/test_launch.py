"""The scripts that start a training on several machines."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import test_distributed as distributed
import training_runs

from trd_jax.metrics import read_metrics

LAUNCH = Path(__file__).parent.parent / "launch"
NODE = LAUNCH / "node.sh"
# A Python that makes environments with itself, and notes what it is asked.
PYTHON = """#!/usr/bin/env bash
here=$(dirname "$0")
printf '%s %s\\n' "$(basename "$(dirname "$here")")" "$*" >> "$ASKED"
case "$*" in
  "-m venv "*)
    mkdir -p "$3/bin"
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
  for option in ("--nodes 2", "--ntasks-per-node 1", "--gpus-per-node 4"):
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
    flags = "--xla_force_host_platform_device_count=4"
    environment = os.environ | {
      "TRD_SSH": str(remote),
      "TRD_PYTHON": sys.executable,
      "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0",
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
    run_dir = distributed.workdir(tmp_path / end, student, epochs=2000)
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
