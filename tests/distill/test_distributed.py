"""One training in several processes, on the CPUs of this machine."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.support import training_runs
from tests.support.devices import xla_flags
from trd_jax.data.chat import Chat
from trd_jax.distill import processes
from trd_jax.distill.checkpoint import Checkpoints
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import to_json
from trd_jax.experiment.metric_log import read_metrics
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Distributed

pytestmark = pytest.mark.multiprocess

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0}
UPDATES = 6

# Gloo prints a line from each of its threads in pieces, which come between each
# other.
GLOO = re.compile(
  r"\[Gloo\] Rank | is connected to | peer ranks\. "
  r"|Expected number of connected peer ranks is : |\d+"
)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
  return training_runs.model_folder(tmp_path_factory.mktemp("student"))


def workdir(root, student, **train):
  """A run on eight devices that is ready to be trained."""
  small = {
    "batch_size": 12,
    "epochs": UPDATES,
    "learning_rate": 1e-3,
    "pack_tokens": 128,
    "teacher_pack_tokens": 256,
    "checkpoint_every": 2,
  }
  run = training_runs.experiment(
    student,
    train=small | train,
    lora=LORA,
    refine={"thinking": None},
    mesh={"data": 8},
  )
  run_dir = training_runs.workdir(root, Chat.load(student), count=12)
  run_dir.claim(to_json(run))
  return run_dir


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


class Together:
  """The stage in so many processes, with eight devices between them."""

  def __init__(self, run_dir, count, *arguments, coordinator=None):
    address = coordinator or f"127.0.0.1:{free_port()}"
    self.started = []
    for process in range(count):
      environment = os.environ | {"XLA_FLAGS": xla_flags(8 // count)}
      if count > 1:
        environment |= {
          "TRD_COORDINATOR": address,
          "TRD_PROCESSES": str(count),
          "TRD_PROCESS": str(process),
        }
      command = [sys.executable, "-m", "trd_jax.train"]
      command += [f"--workdir={run_dir.root}", *arguments]
      self.started.append(
        subprocess.Popen(
          command,
          env=environment,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
      )

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    for process in self.started:
      process.kill()
      process.communicate()

  def wait(self, seconds=240):
    """The exit codes, and what each has printed on both streams."""
    told = [process.communicate(timeout=seconds) for process in self.started]
    return [process.returncode for process in self.started], told


def train(run_dir, count, *arguments):
  """Trains to the end; what each process printed."""
  with Together(run_dir, count, *arguments) as all_of_them:
    codes, told = all_of_them.wait()
  assert codes == [0] * count, told
  return told


def rows(run_dir):
  return read_metrics(run_dir.metrics_file("train"))


def lora(run_dir):
  """The adapter of the newest checkpoint."""
  from tests.test_train import saved

  step, arrays = saved(run_dir)
  assert step == UPDATES
  found = {name: x for name, x in arrays.items() if "['lora']" in name}
  assert len(found) == 14
  return found


def test_two_processes_of_four_devices_train_as_one_of_eight(tmp_path, student):
  whole = workdir(tmp_path / "whole", student)
  train(whole, 1)
  halves = workdir(tmp_path / "halves", student)
  told = train(halves, 2)
  # The first speaks and writes, once; the other is silent.
  spoken, other = (out for out, _ in told)
  assert spoken.count("updates on 12 trajectories") == 1
  assert not GLOO.sub("", other).strip()
  assert "train" not in told[1][1]
  assert [row["step"] for row in rows(halves)] == list(range(UPDATES))
  assert halves.done("train")["updates"] == UPDATES
  assert_same(whole, halves)

  # Two go on with what one process has begun.
  began = RunDir(shutil.copytree(whole.root, tmp_path / "began"))
  shutil.rmtree(began.checkpoints / str(UPDATES))
  (began.stage("train") / "done.json").unlink()
  told = train(began, 2)
  assert f"goes on after update 4; {UPDATES} in all" in told[0][0]
  assert began.done("train")["restarted_after"] == 4
  assert_same(whole, began)


@pytest.mark.parametrize(
  ("told", "by"),
  [([1], signal.SIGTERM), ([0, 1], signal.SIGTERM), ([1], signal.SIGINT)],
)
def test_processes_that_are_told_to_end_stop_at_the_same_update(
  tmp_path, student, told, by
):
  run_dir = workdir(tmp_path, student, epochs=200, checkpoint_every=150)
  with Together(run_dir, 2) as both:
    deadline = time.monotonic() + 600
    while len(rows(run_dir)) < 3 and time.monotonic() < deadline:
      assert all(process.poll() is None for process in both.started)
      time.sleep(0.05)
    for number in told:
      both.started[number].send_signal(by)
      time.sleep(0.3)
    codes, said = both.wait()
  # By the same signal, also what had none itself.
  assert codes == [128 + by, 128 + by], said
  # One line, of the one that speaks.
  word = "terminated" if by == signal.SIGTERM else "interrupted"
  (line,) = [x for _, err in said for x in err.splitlines() if word in x]
  step = Checkpoints(run_dir.checkpoints, 1).latest()
  assert f"after update {step}, which is saved" in line
  assert len(rows(run_dir)) == step < 200


def assert_same(one, other):
  """The same numbers, but for the order that eight addends are summed in."""
  names = rows(one)[0].keys() - {"elapsed_seconds"}
  for name in names:
    a, b = ([row[name] for row in rows(run)] for run in (one, other))
    # The gap is the difference of two perplexities of some hundreds. The
    # divergence of a single token is a sum of signed terms ten times as large
    # together: float32 rounds it by up to 6e-7 nats, however small it is.
    atol = {"ppl_gap": 1e-3, "D_max": 1e-6}.get(name, 0)
    np.testing.assert_allclose(
      np.array(b, float), np.array(a, float), 2e-5, atol, err_msg=name
    )
  a, b = lora(one), lora(other)
  assert a.keys() == b.keys()
  for name, array in a.items():
    np.testing.assert_allclose(b[name], array, 1e-6, 1e-6, err_msg=name)


def test_a_process_that_is_killed_ends_the_others(tmp_path, student):
  run_dir = workdir(tmp_path, student, epochs=200)
  beat = "--config.distributed.heartbeat_seconds=5"
  with Together(run_dir, 2, beat) as both:
    while len(rows(run_dir)) < 3:
      assert [p.poll() for p in both.started] == [None, None]
      time.sleep(0.05)
    both.started[1].send_signal(signal.SIGKILL)
    codes, told = both.wait(60)
  assert codes[1] == -signal.SIGKILL
  assert codes[0] not in (0, None), told
  assert run_dir.done("train") is None


def test_a_mistake_in_one_process_ends_all_with_its_line(tmp_path, student):
  run_dir = workdir(tmp_path, student)
  beat = "--config.distributed.heartbeat_seconds=5"
  with run_dir.lock("train"), Together(run_dir, 2, beat) as both:
    codes, told = both.wait(60)
  assert codes[0] == 2
  assert codes[1] != 0
  assert told[0][1].strip().splitlines()[-1].startswith("trd-jax train: ")
  assert "is at work on train" in told[0][1]
  assert not run_dir.checkpoints.exists()


def test_a_process_that_meets_nobody_says_so(tmp_path, student):
  run_dir = workdir(tmp_path, student)
  wait = "--config.distributed.timeout_seconds=3"
  with Together(run_dir, 2, wait) as both:
    both.started[0].kill()
    codes, told = both.wait(60)
  assert codes[1] == 2
  (line,) = told[1][1].splitlines()
  assert line.startswith("trd-jax train: process 1 of 2 (coordinator 127.0.0.1")
  assert "has not met the others in 3 s" in line
  assert not run_dir.stage("train").exists()


@pytest.mark.parametrize(
  ("keys", "told"),
  [
    (("host:1", None, 0), "distributed.processes is missing"),
    ((None, 2, 0), "distributed.coordinator is missing"),
    (("host:1", 2, 2), "numbered from 0 to 1"),
    (("host", 2, 0), "must be HOST:PORT"),
    ((":80", 2, 0), "must be HOST:PORT"),
  ],
)
def test_coordinates_that_make_no_sense_are_refused(keys, told):
  with pytest.raises(UserError, match=told) as caught:
    processes.coordinates(Distributed(*keys))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tasks", ["", "two", "-1", "1.0", "2(x2)", "\u00b2"])
def test_tasks_of_slurm_that_are_no_number_are_named(monkeypatch, tasks):
  monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
  with (
    pytest.raises(UserError, match="variable SLURM_STEP_NUM_TASKS is"),
    processes.joined(Distributed(), "train"),
  ):
    pass


def test_one_process_is_alone_whatever_slurm_says(monkeypatch):
  for variable in processes.VARIABLES.values():
    monkeypatch.delenv(variable, raising=False)
  monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
  joins = []
  monkeypatch.setattr(processes, "_initialize", lambda *a: joins.append(a))
  with processes.joined(Distributed(processes=1), "train"):
    assert not joins
  with processes.joined(Distributed(), "train"):
    assert len(joins) == 1


@pytest.fixture
def dev(tmp_path, monkeypatch):
  """Device files of a machine with two GPUs, and a JAX that may take them."""
  for name in ("nvidia0", "nvidia1", "nvidiactl"):
    (tmp_path / name).touch()
  for name in ("CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS", "XLA_FLAGS"):
    monkeypatch.delenv(name, raising=False)
  asked = jax.config.jax_platforms
  jax.config.update("jax_platforms", "cuda,cpu")
  yield tmp_path
  jax.config.update("jax_platforms", asked)


def test_two_processes_never_take_the_same_gpus(dev, monkeypatch):
  run = Distributed("127.0.0.1:1", 2, 1)
  joins = []
  monkeypatch.setattr(processes, "_initialize", lambda *a: joins.append(a))

  def join():
    with processes.joined(run, "train", dev):
      return len(joins)

  with processes.claim_gpus("127.0.0.1:1", dev):
    with pytest.raises(UserError, match="GPU 0 of this machine") as caught:
      join()
    assert "JAX_LOCAL_DEVICE_IDS" in str(caught.value)
    assert not joins
    # Where each has been given its own, and in another run.
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "1")
    assert join() == 1
    with processes.claim_gpus("127.0.0.1:2", dev):
      pass
  monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS")
  assert join() == 2
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
  with processes.claim_gpus("127.0.0.1:1", dev):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert join() == 3


@pytest.mark.parametrize("flags", ["", "--xla_gpu_shard_autotuning=true"])
def test_no_process_waits_for_what_another_has_found_compiled(
  dev, monkeypatch, flags
):
  monkeypatch.setenv("XLA_FLAGS", flags)
  monkeypatch.setattr(processes, "_initialize", lambda *a: None)
  with processes.joined(Distributed("127.0.0.1:1", 2, 1), "train", dev):
    found = os.environ["XLA_FLAGS"]
  assert found == (flags or "--xla_gpu_shard_autotuning=false")


def test_gpus_that_srun_leaves_idle_are_told(dev):
  slurm = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
  told = processes.idle_gpus(1, slurm, dev)
  assert told.startswith("1 of the 2 GPUs of this machine are used: srun with")
  assert "--ntasks-per-node=2" in told
  assert not processes.idle_gpus(2, slurm, dev)
  assert not processes.idle_gpus(1, {"SLURM_STEP_TASKS_PER_NODE": "2"}, dev)
  assert not processes.idle_gpus(1, {}, dev)
  by_hand = slurm | {"TRD_COORDINATOR": "host:1"}
  assert not processes.idle_gpus(1, by_hand, dev)


def test_coordinates_come_from_the_keys_or_the_environment(monkeypatch):
  for variable in processes.VARIABLES.values():
    monkeypatch.delenv(variable, raising=False)
  assert processes.coordinates(Distributed()) is None
  assert processes.coordinates(Distributed("host:1", 1, 0)) is None
  monkeypatch.setenv("TRD_COORDINATOR", "[::1]:8471")
  monkeypatch.setenv("TRD_PROCESSES", "3")
  monkeypatch.setenv("TRD_PROCESS", "1")
  assert processes.coordinates(Distributed()) == ("[::1]:8471", 3, 1)
  assert processes.coordinates(Distributed(process=2))[2] == 2
  monkeypatch.setenv("TRD_PROCESSES", "many")
  with pytest.raises(UserError, match="must be numbers"):
    processes.coordinates(Distributed())
