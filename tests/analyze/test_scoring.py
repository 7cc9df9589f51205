"""The scoring pass: which trajectories, which numbers, what stays on disk."""

import collections
import dataclasses
import random
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from tests.support import training_runs
from trd_jax import train
from trd_jax.analyze import chosen_trajectories, scoring
from trd_jax.analyze.chosen_trajectories import Unit
from trd_jax.data.chat import Chat
from trd_jax.data.problems import parts
from trd_jax.distill import training_set
from trd_jax.distill.checkpoint import Checkpoints
from trd_jax.experiment import shards
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import to_json
from trd_jax.experiment.metric_log import read_metrics
from trd_jax.experiment.records import Problem, TokenScores, Trajectory
from trd_jax.experiment.run_dir import RunDir
from trd_jax.model import sharding
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.weights import hf

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.3}
PROBLEMS = 6
# What an update logs, and the column that it is a mean of.
MEANS = {
  "D": "divergence",
  "nll_student": "student_nll",
  "nll_teacher": "teacher_nll",
  "entropy_student": "student_entropy",
  "epistemic_mass_student": "student_onset_mass",
  "epistemic_mass_teacher": "teacher_onset_mass",
}


def experiment(folder, **fields):
  """A run on one device, small in everything."""
  small = {
    "batch_size": 4,
    "learning_rate": 1e-2,
    "max_steps": 2,
    "pack_tokens": 128,
    "teacher_pack_tokens": 256,
  }
  fields["train"] = small | fields.get("train", {})
  rest = {"lora": LORA, "mesh": {"data": 1}, "refine": {"thinking": None}}
  return training_runs.experiment(folder, **(rest | fields))


def workdir(root, folder, chosen, **changes) -> RunDir:
  """A workdir of hand-made trajectories that belongs to an experiment."""
  RunDir(root, to_json(chosen))
  chat = Chat.load(folder)
  return training_runs.workdir(root, chat, PROBLEMS, **changes)


def read(run_dir) -> list[TokenScores]:
  """The rows, each of which has to be there once."""
  keys = [
    key
    for name in shards.names(run_dir.stage(scoring.STAGE))
    for key in shards.read_table(
      run_dir.stage(scoring.STAGE) / name, TokenScores, ["key"]
    )["key"].to_pylist()
  ]
  assert len(set(keys)) == len(keys)
  return run_dir.read(scoring.STAGE, TokenScores)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
  return training_runs.model_folder(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, student):
  """An OPSD run of two updates along y_r, scored: experiment, directory."""
  chosen = experiment(student)
  # Two of six were wrong before and after, and one only before.
  verdicts = {1: {"correct": False}, 2: {"correct": False}}
  run_dir = workdir(
    tmp_path_factory.mktemp("run") / "run", student, chosen, rollout=verdicts
  )
  train.run(chosen, run_dir, None)
  found = scoring.score(chosen, run_dir, 99)
  assert found.students == scoring.STUDENTS
  assert (found.problems, found.rows, found.new) == (6, 36, 36)
  return chosen, run_dir


@pytest.fixture
def copied(trained, tmp_path):
  """The same run once more, to change."""
  chosen, run_dir = trained
  shutil.copytree(run_dir.root, tmp_path / "run")
  return chosen, RunDir(tmp_path / "run")


def first_update(chosen, run_dir, student_chat, teacher_chat):
  """The trajectories of the first update, and what it logged."""
  data = training_set.build(chosen, run_dir, student_chat, teacher_chat)
  batch = data.batches(chosen.train, chosen.seed)[0]
  return batch, read_metrics(run_dir.metrics_file("train"))[0]


def check_means(rows, batch, logged):
  """Compares the base's token means over a batch with an update's metrics."""
  base = {r.trajectory_key: r for r in rows if r.student == "base"}

  def mean(column, verdicts=(True, False, None)):
    values = [
      np.float64(getattr(base[sample.key], column))
      for sample in batch
      if sample.correct in verdicts
    ]
    return np.concatenate(values).mean()

  found = {name: mean(column) for name, column in MEANS.items()}
  found["D_correct"] = mean("divergence", [True])
  found["D_incorrect"] = mean("divergence", [False])
  if "clipped_share" in logged:
    found["clipped_share"] = mean("clipped")
    assert 0 < found["clipped_share"] < 1
  for name, value in found.items():
    assert value == pytest.approx(logged[name], rel=1e-5), name


@pytest.mark.slow
def test_scores_of_the_first_updates_trajectories_are_what_it_logged(trained):
  chosen, run_dir = trained
  chat = Chat.load(chosen.student.path)
  batch, logged = first_update(chosen, run_dir, chat, chat)
  rows = [row for row in read(run_dir) if row.trajectory == "y_r"]
  assert {row.context for row in rows} == {"refine"}
  check_means(rows, batch, logged)
  # The contexts of the baselines in OPSD, and of the reference.
  contexts = {(row.trajectory, row.context) for row in read(run_dir)}
  assert contexts == {
    ("y_o", "x_reference"),
    ("y_r", "refine"),
    ("y_star", "x_reference"),
  }


@pytest.mark.slow
def test_a_teacher_of_another_width_and_head_scores_as_in_training(
  tmp_path, student
):
  """OPD along y_o, under a clip: the run's own keys say what is read."""
  folder = training_runs.model_folder(
    tmp_path / "teacher",
    seed=1,
    hidden_size=24,
    tie_embeddings=False,
    vocab_size=training_runs.VOCABULARY + 16,
  )
  chosen = experiment(
    student,
    regime="opd",
    method="forward_kl_clip",
    teacher={"path": str(folder)},
    teacher_context="x_reference",
    loss={"clip": 0.0113},
    train={"max_steps": 1},
  )
  run_dir = workdir(tmp_path / "run", student, chosen)
  train.run(chosen, run_dir, None)
  scoring.score(chosen, run_dir, PROBLEMS, ["base"])
  rows = [row for row in read(run_dir) if row.trajectory == "y_o"]
  assert {row.context for row in rows} == {"x_reference"}
  chats = Chat.load(student), Chat.load(folder)
  check_means(rows, *first_update(chosen, run_dir, *chats))
  assert all(row.teacher_revision != row.student_revision for row in rows)


@pytest.mark.slow
def test_the_trained_student_is_that_of_the_last_checkpoint(trained):
  """Each NLL from a whole row of logits, computed here without packs."""
  chosen, run_dir = trained
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  model = hf.load(
    chosen.student.path, dtype="float32", mesh=mesh, lora=LoraConfig(**LORA)
  )
  graph, new, base = nnx.split(model, nnx.LoRAParam, ...)
  checkpoints = Checkpoints(run_dir.checkpoints, 1)
  _, found = checkpoints.restore({"lora": nnx.to_pure_dict(new)}, partial=True)
  rows = read(run_dir)
  drafts = {row.key: row for row in run_dir.read("rollout", Trajectory)}
  for name, lora in (
    ("base", nnx.to_pure_dict(new)),
    ("trained", found["lora"]),
  ):
    row = next(r for r in rows if (r.trajectory, r.student) == ("y_o", name))
    prompt = drafts[row.trajectory_key].prompt_ids
    ids = np.array([*prompt, *row.response_ids], np.int32)[None]
    adapted = nnx.merge(graph, lora, base)
    hidden = adapted(ids, np.arange(ids.size)[None], np.ones_like(ids))
    logits = np.float64(hidden[0]) @ np.float64(adapted.head_VD).T
    logits = logits[len(prompt) - 1 : -1]
    nll = np.logaddexp.reduce(logits, axis=-1)
    nll -= logits[np.arange(len(nll)), row.response_ids]
    np.testing.assert_allclose(row.student_nll, nll, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_without_its_checkpoint_the_merged_adapter_scores_the_same(
  copied, capsys
):
  from trd_jax import merge

  chosen, run_dir = copied
  before = read(run_dir)
  merge.run(chosen, run_dir, None)
  shutil.rmtree(run_dir.checkpoints)
  # What is there is the same student's still: nothing is computed.
  assert scoring.score(chosen, run_dir, PROBLEMS).new == 0
  shutil.rmtree(run_dir.stage(scoring.STAGE))
  assert scoring.score(chosen, run_dir, PROBLEMS).new == 36
  assert read(run_dir) == before
  # Without either there is no trained student any more.
  shutil.rmtree(run_dir.stage(scoring.STAGE))
  shutil.rmtree(run_dir.adapter)
  with pytest.raises(UserError, match=r"after update 2.*put one of them back"):
    scoring.score(chosen, run_dir, PROBLEMS)


@pytest.mark.slow
def test_a_split_rounds_student_begins_as_the_round_before_ended(copied):
  chosen, first = copied
  scored = {(r.trajectory_key, r.student): r for r in read(first)}
  chosen = dataclasses.replace(
    chosen,
    pipeline=dataclasses.replace(
      chosen.pipeline, rounds=2, split=True, round=2
    ),
    train=dataclasses.replace(chosen.train, batch_size=3),
  )
  second = first.round(2)
  second.claim(to_json(chosen))
  every = first.read("problems", Problem)
  training_runs.write(second, "problems", every)
  mine = parts.of_round(chosen, [problem.problem_id for problem in every])
  assert 0 < len(mine) < len(every)
  for stage in ("rollout", "refine"):
    rows = first.read(stage, Trajectory)
    wanted = [row for row in rows if row.problem_id in mine]
    training_runs.write(second, stage, wanted)
  assert scoring.score(chosen, second, 1).rows == 3
  for row in read(second):
    assert row.student == "base"
    after, before = (scored[row.trajectory_key, s] for s in ("trained", "base"))
    np.testing.assert_allclose(row.divergence, after.divergence, atol=1e-6)
    assert np.abs(np.subtract(row.divergence, before.divergence)).max() > 1e-5


# Ends itself, as a kill does, once so many rows have been added.
_KILLED = f"""
import os, signal, sys
from trd_jax.analyze import scoring
from trd_jax.experiment import experiment, run_dir, shards
add, write = shards.ShardWriter.add, run_dir.RunDir.shard_writer
left = int(sys.argv[2])
def counted(self, row):
  global left
  if not left:
    os.kill(os.getpid(), signal.{signal.SIGKILL.name})
  left -= 1
  add(self, row)
shards.ShardWriter.add = counted
run_dir.RunDir.shard_writer = lambda self, *a: write(self, *a, rows_per_shard=4)
place = run_dir.RunDir(sys.argv[1])
scoring.score(experiment.from_json(place.config), place, {PROBLEMS})
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_between_shards_it_ends_with_the_same_rows(copied):
  chosen, run_dir = copied
  whole = read(run_dir)
  shutil.rmtree(run_dir.stage(scoring.STAGE))
  command = [sys.executable, "-c", _KILLED, str(run_dir.root), "15"]
  killed = subprocess.run(command, capture_output=True, check=False)
  assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
  kept = read(run_dir)
  assert len(kept) == 12  # three shards of the fifteen rows
  found = scoring.score(chosen, run_dir, PROBLEMS)
  assert (found.rows, found.new) == (36, 24)
  # To the last bit: a batch is made of the same trajectories again.
  assert read(run_dir) == whole


@pytest.mark.slow
def test_more_devices_give_the_same_numbers(copied):
  chosen, run_dir = copied
  wanted = {row.key: row for row in read(run_dir)}
  shutil.rmtree(run_dir.stage(scoring.STAGE))
  spread = dataclasses.replace(
    chosen, mesh=dataclasses.replace(chosen.mesh, data=2, fsdp=2, tensor=2)
  )
  scoring.score(spread, run_dir, PROBLEMS)
  rows = read(run_dir)
  assert {row.key for row in rows} == wanted.keys()
  for row in rows:
    other = wanted[row.key]
    for field in dataclasses.fields(row):
      ours, theirs = getattr(row, field.name), getattr(other, field.name)
      if field.name.endswith(("_ids", "clipped")) or isinstance(
        ours, str | int
      ):
        assert ours == theirs, field.name
      else:
        np.testing.assert_allclose(
          ours, theirs, rtol=1e-4, atol=2e-5, err_msg=field.name
        )


@pytest.mark.slow
def test_rows_of_another_loss_or_other_weights_are_replaced(
  tmp_path, student, capsys
):
  chosen = experiment(student, method="forward_kl")
  run_dir = workdir(tmp_path / "run", student, chosen)
  scoring.score(chosen, run_dir, 2, ["base"])
  told = capsys.readouterr().out
  assert "training isn't finished" not in told
  before = read(run_dir)
  # Nothing in the workdir was made with it: the key is free.
  other = dataclasses.replace(chosen, method="reverse_kl")
  run_dir.claim(to_json(other))
  found = scoring.score(other, run_dir, 3)
  assert found.students == ("base",)
  told = capsys.readouterr().out
  assert f"{len(before)} scores of other weights or another loss" in told
  assert "training isn't finished" in told
  rows = read(run_dir)
  assert {row.divergence_name for row in rows} == {"reverse_kl"}
  assert not {row.key for row in rows} & {row.key for row in before}
  # Another student, and a loss that reads no teacher: it is shown beside one.
  again = training_runs.model_folder(tmp_path / "again", seed=5)
  swapped = dataclasses.replace(
    other,
    method="sft",
    student=dataclasses.replace(other.student, path=str(again)),
  )
  scoring.score(swapped, run_dir, 3)
  third = read(run_dir)
  assert {row.divergence_name for row in third} == {"forward_kl"}
  assert all(min(row.divergence) >= 0 for row in third)
  assert {row.student_revision for row in third}.isdisjoint(
    {row.student_revision for row in rows}
  )


def test_what_cannot_be_scored_is_said_in_one_line(tmp_path, student, capsys):
  chosen = experiment(student)
  run_dir = RunDir(tmp_path / "none", to_json(chosen))
  with pytest.raises(UserError, match="no finished rollout"):
    scoring.score(chosen, run_dir, 4)
  with pytest.raises(UserError, match="--score=0"):
    scoring.score(chosen, run_dir, 0)
  bounds = {"max_student_tokens": 8}
  tight = experiment(student, train=bounds)
  run_dir = workdir(tmp_path / "tight", student, tight)
  with pytest.raises(UserError, match=r"18 over train.max_student_tokens=8"):
    scoring.score(tight, run_dir, PROBLEMS)
  assert "set aside: 18 over" in capsys.readouterr().out
  rejected = run_dir.read_rejected(scoring.STAGE)
  assert {(r.stage, r.reason) for r in rejected} == {
    (scoring.STAGE, "over train.max_student_tokens=8")
  }
  folder = run_dir.stage(scoring.STAGE)
  (folder / "shard-1-1-1.parquet").write_bytes(b"damaged")
  loose = experiment(student)
  with pytest.raises(UserError, match=r"shard-1-1-1\.parquet.*remove it"):
    scoring.score(loose, run_dir, PROBLEMS)


# -- which problems ----------------------------------------------------------


def units(counts) -> list[Unit]:
  """So many units of each pair of verdicts."""
  return [
    Unit(f"{verdicts}-{n}", f"o{n}", f"r{n}", verdicts)
    for verdicts, count in counts.items()
    for n in range(count)
  ]


def test_problems_are_spread_over_outcomes_and_more_hold_fewer():
  there = units(
    {
      (True, True): 100,
      (False, True): 40,
      (False, False): 20,
      (True, False): 3,
      (True, None): 9,
    }
  )
  chosen = {n: chosen_trajectories.spread(there, n) for n in (8, 32, 64, 999)}
  for number, picked in chosen.items():
    mixed = random.Random(number).sample(there, len(there))
    assert chosen_trajectories.spread(mixed, number) == picked
  assert chosen[8] == chosen[32][:8]
  assert chosen[32] == chosen[64][:32]
  assert len(chosen[999]) == len(there)
  cells = collections.Counter(unit.verdicts for unit in chosen[64])
  assert cells == {
    (True, True): 20,
    (False, True): 21,
    (False, False): 20,
    (True, False): 3,
  }
  # Not the first problems of a source, which may be the easy ones.
  firsts = [u for u in there if u.verdicts == (True, True)][:20]
  assert set(firsts) != {u for u in chosen[64] if u.verdicts == (True, True)}


@pytest.mark.parametrize(
  ("kind", "fields", "context"),
  [
    ("y_o", {"regime": "opd"}, "x"),
    ("y_o", {"regime": "opsd"}, "x_reference"),
    ("y_r", {"regime": "opd"}, "refine"),
    ("y_r", {"regime": "opsd", "teacher_context": "x"}, "x"),
    ("y_o", {"regime": "opsd", "teacher_context": "x"}, "x_reference"),
    ("y_star", {"regime": "opd"}, "x_reference"),
    ("y_r", {"regime": "opsd", "method": "sft"}, "refine"),
    ("teacher", {"regime": "opd", "trajectory": "teacher"}, "x"),
  ],
)
def test_contexts_are_the_methods_and_the_runs_own_key_wins(
  kind, fields, context
):
  along = chosen_trajectories.along(
    training_runs.experiment("x", **fields), kind
  )
  assert along.context_of_teacher == context
  assert along.trains_on == kind
