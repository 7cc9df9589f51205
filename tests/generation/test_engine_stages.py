"""The stages on vLLM, alone and under Ray, as a user starts them."""

import dataclasses
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.support.devices import xla_flags
from tests.support.engine_env import ROOT, vllm_python
from tests.support.killed_stage import Rollout
from tests.support.processes import (
  SHOWS_STACKS,
  below,
  still_there,
  stuck,
  title,
)
from trd_jax import rollout
from trd_jax.experiment import experiment
from trd_jax.experiment.records import GradedSample, Trajectory
from trd_jax.experiment.run_dir import RunDir

pytestmark = [pytest.mark.vllm, pytest.mark.ray]

PROBLEMS, TOP = 48, 4
SMALL = (
  "--config=configs/demo.py",
  f"--config.data.arithmetic.num_problems={PROBLEMS}",
  "--config.train.batch_size=16",
  "--config.evaluate.benchmarks=arithmetic",
  "--config.evaluate.num_problems=8",
  "--config.evaluate.k=2",
  f"--config.refine.teacher_top_k={TOP}",
  "--config.engine.name=vllm",
  "--config.engine.vllm.eager=True",
  "--config.engine.vllm.kv_cache_gib=0.5",
)
RAY = (
  "--config.engine.ray.actors=2",
  "--config.engine.ray.batch=16",
  # Few at once: an actor is at work for a while.
  "--config.engine.vllm.max_num_seqs=2",
)
# Its log-probabilities may differ in the last bits.
NO_TOP = dict.fromkeys(
  ("teacher_top_ids", "teacher_top_logprobs", "teacher_top_mass")
)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
  """vLLM's interpreter, to which JAX is not there, and what it was given."""
  folder = tmp_path_factory.mktemp("python")
  without = "import sys\nsys.modules |= dict.fromkeys(['jax', 'jaxlib'])\n"
  (folder / "sitecustomize.py").write_text(without + SHOWS_STACKS)
  script = folder / "python"
  script.write_text(
    "#!/bin/sh\n"
    f'echo "$@" >> {folder}/called\n'
    f'PYTHONPATH={folder} exec {vllm_python()} "$@"\n'
  )
  script.chmod(script.stat().st_mode | stat.S_IXUSR)
  jax = subprocess.run([script, "-c", "import jax"], capture_output=True)
  assert b"ModuleNotFoundError" in jax.stderr
  return script


def environment() -> dict[str, str]:
  """As a user's shell has it, but for quick compilations in JAX's stages."""
  mine = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
  return mine | {"XLA_FLAGS": xla_flags(1)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, python):
  """A pipeline whose samples vLLM made, and what it said."""
  run_dir = RunDir(tmp_path_factory.mktemp("pipeline") / "run")
  command = [sys.executable, "-m", "trd_jax.pipeline", *SMALL]
  command += [f"--workdir={run_dir.root}"]
  command += [f"--config.python.generation={python}"]
  done = subprocess.run(
    command, cwd=ROOT, env=environment(), capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return run_dir, done.stdout


def keys(run_dir: RunDir, stage: str) -> list[str]:
  """The keys of all rows, each as often as it is in a shard."""
  return sorted(
    key
    for path in run_dir.stage(stage).glob("shard-*.parquet")
    for key in pq.read_table(path, columns=["key"])["key"].to_pylist()
  )


def test_a_pipeline_on_vllm_is_whole(finished, python):
  run_dir, _ = finished
  for stage in ("rollout", "refine"):
    found = keys(run_dir, stage)
    assert len(found) == len(set(found)) == PROBLEMS
    assert run_dir.done(stage)["samples"] == PROBLEMS
  for side in ("base", "trained"):
    found = keys(run_dir, f"evaluate/{side}")
    assert len(found) == len(set(found)) == 8 * 2
  summary = json.loads(run_dir.summary.read_text())
  figures = summary["benchmarks"]["arithmetic"]
  for side in ("base", "trained"):
    rows = run_dir.read(f"evaluate/{side}", GradedSample)
    right = sum(row.correct is True for row in rows)
    assert figures[side]["avg_at_k"] == pytest.approx(right / 16)
  assert set(summary["stages"]) == {"rollout", "refine", "train", "merge"}
  assert min(summary["seconds"].values()) > 0
  # The stages that generate ran where JAX is not, and those alone.
  called = (python.parent / "called").read_text()
  ran = re.findall(r"^-m trd_jax\.(\w+)", called, re.MULTILINE)
  assert ran == ["evaluate", "rollout", "refine", "evaluate"]


def test_the_samples_are_those_that_the_embedded_engine_would_be_asked_for(
  finished, tmp_path
):
  run_dir, _ = finished
  chosen = experiment.from_json(run_dir.config)
  engine = dataclasses.replace(chosen.engine, name="jax")
  embedded = RunDir(tmp_path)
  chosen = dataclasses.replace(chosen, engine=engine)
  rollout.run(chosen, embedded, types.SimpleNamespace())
  rows = [r.read("rollout", Trajectory) for r in (run_dir, embedded)]
  for one, other in zip(*rows, strict=True):
    # The same sample, drawn by other random numbers.
    same = ("key", "problem_id", "prompt_ids", "seed", "model_revision")
    for name in (*same, "sampling", "prompt_version", "grader_version"):
      assert getattr(one, name) == getattr(other, name)
  # And by the same model: about as many of them are right.
  right = [sum(row.correct for row in side) for side in rows]
  assert abs(right[0] - right[1]) < PROBLEMS / 3


def check_top_tokens(rows: list[Trajectory]) -> None:
  """The teacher's likeliest tokens are columns that fit the response."""
  greedy = total = 0
  for row in rows:
    T = len(row.response_ids)
    ids_TK = np.array(row.teacher_top_ids).reshape(T, TOP)
    logprobs_TK = np.array(row.teacher_top_logprobs).reshape(T, TOP)
    mass_T = np.array(row.teacher_top_mass)
    assert mass_T.shape == (T,)
    assert np.all((mass_T > 0) & (mass_T <= 1))
    np.testing.assert_allclose(
      mass_T, np.minimum(np.exp(logprobs_TK).sum(1), 1), rtol=1e-6
    )
    assert np.all(np.diff(logprobs_TK, axis=1) <= 0)
    assert np.all(logprobs_TK <= 0)
    assert all(len(set(each)) == TOP for each in ids_TK.tolist())
    greedy += int((ids_TK[:, 0] == row.response_ids).sum())
    total += T
    # A drawn token that was almost sure is the likeliest.
    sure = logprobs_TK[:, 0] > np.log(0.99)
    assert np.mean(ids_TK[sure, 0] == np.array(row.response_ids)[sure]) > 0.9
  assert greedy > 0.8 * total


def test_the_teacher_s_likeliest_tokens_are_kept_beside_its_own(finished):
  run_dir, said = finished
  check_top_tokens(run_dir.read("refine", Trajectory))
  for row in run_dir.read("rollout", Trajectory):
    assert row.teacher_top_ids is None
    assert row.teacher_top_mass is None
  # What that cost is said once.
  found = re.findall(
    rf"refine: keeping the teacher's {TOP} likeliest tokens: [\d,]+ tokens/s,"
    rf" [\d,]+ without \([\d.]+ times the time, on {PROBLEMS} requests",
    said,
  )
  assert len(found) == 1


def test_a_rollout_on_vllm_that_is_killed_goes_on(finished, python, tmp_path):
  run_dir, _ = finished
  # Few at once, so that some are on disk while others wait.
  made = Rollout(
    tmp_path, python, *SMALL, "--config.engine.vllm.max_num_seqs=4"
  )
  made.killed_and_restarted([9], PROBLEMS)
  rows = made.run_dir.read("rollout", Trajectory)
  assert rows == run_dir.read("rollout", Trajectory)


def test_a_terminal_s_interrupt_ends_vllm_in_order(finished, python, tmp_path):
  whole, _ = finished
  # One at a time: it is at work for a while.
  made = Rollout(
    tmp_path, python, *SMALL, "--config.engine.vllm.max_num_seqs=1"
  )
  with made.log.open("wb") as log:
    # A child would inherit that it is ignored, as it is in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
      made.command, stdout=log, stderr=log, start_new_session=True
    )
    signal.signal(signal.SIGINT, before)
  with process:
    try:
      made.wait_for(process, 8)
      started = below(process.pid)
      assert any("EngineCore" in title(pid) for pid in started)
      os.killpg(process.pid, signal.SIGINT)
      assert process.wait(60) == 130
    finally:
      process.kill()
  assert not still_there(started, seconds=15)
  said = made.log.read_text()
  assert "interrupted; the same command goes on" in said.splitlines()[-1]
  assert not re.search("Traceback|ERROR", said), said[-3000:]
  kept = made.keys_on_disk()
  assert len(kept) >= 8
  # What goes on has nothing to complain of either.
  with made.start() as process:
    assert process.wait(200) == 0
  said = made.log.read_text()
  assert not re.search("Traceback|ERROR", said), said[-3000:]
  assert set(kept) <= set(keys(whole, "rollout"))
  assert keys(made.run_dir, "rollout") == keys(whole, "rollout")


def an_actor_at_work(log: Path, stage: subprocess.Popen) -> int:
  """The process of a stage's first actor whose engine is ready."""
  deadline = time.monotonic() + 500
  while time.monotonic() < deadline:
    said = log.read_text(errors="replace")
    assert stage.poll() is None, said[-3000:]
    if found := re.search(r"MapWorker\S+ pid=(\d+)\)\S* vllm: ready", said):
      return int(found[1])
    time.sleep(0.05)
  at = stuck(stage.pid)
  said = log.read_text(errors="replace")
  raise AssertionError(f"no actor is ready: {said[-20000:]}\n{at}")


def test_under_ray_a_killed_actor_loses_nothing(finished, python, tmp_path):
  whole, _ = finished
  run_dir, log = RunDir(tmp_path / "run"), tmp_path / "log"
  for name in ("problems", "rollout"):
    shutil.copytree(whole.stage(name), run_dir.stage(name))
  command = [python, "-m", "trd_jax.refine", *SMALL, *RAY]
  command += [f"--workdir={run_dir.root}"]
  with (
    log.open("wb") as said,
    subprocess.Popen(
      command, cwd=ROOT, env=environment(), stdout=said, stderr=said
    ) as process,
  ):
    try:
      actor = an_actor_at_work(log, process)
      started = below(process.pid)
      assert actor in started
      assert title(actor).startswith("ray::MapWorker")
      # As important as the stage is, or it starves beside other processes.
      priority = os.getpriority(os.PRIO_PROCESS, process.pid)
      assert os.getpriority(os.PRIO_PROCESS, actor) == priority
      of_actor = below(actor)
      assert any("EngineCore" in title(pid) for pid in of_actor)
      os.kill(actor, signal.SIGKILL)
      # Its engine goes with it.
      assert not still_there(of_actor, seconds=15)
      started += below(process.pid)
      assert process.wait(400) == 0, log.read_text(errors="replace")[-3000:]
    finally:
      process.kill()
  # It had a batch when it was killed; and Ray is over when the stage is.
  assert "died or was killed while executing a task" in log.read_text()
  assert not still_there(started, seconds=15)
  assert keys(run_dir, "refine") == keys(whole, "refine")
  rows = run_dir.read("refine", Trajectory)
  check_top_tokens(rows)
  # The same rows besides: which actor makes one is no matter.
  bare = [dataclasses.replace(row, **NO_TOP) for row in rows]
  assert bare == [
    dataclasses.replace(row, **NO_TOP)
    for row in whole.read("refine", Trajectory)
  ]
