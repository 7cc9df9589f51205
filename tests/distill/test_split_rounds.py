"""Split rounds are one training: bit for bit, and however they are stopped."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.support import training_runs
from tests.test_train import experiment, rows, saved
from trd_jax import train
from trd_jax.data.problems import parts
from trd_jax.distill import split_rounds
from trd_jax.distill.training_set import TrainingSet
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import to_json
from trd_jax.experiment.run_dir import RunDir
from trd_jax.pipeline import rounds

pytestmark = pytest.mark.slow

ROUNDS, COUNT = 3, 13  # 4 + 4 + 5 problems: 2 + 2 + 3 updates of 2


@pytest.fixture(scope="module")
def student(tmp_path_factory):
  return training_runs.model_folder(tmp_path_factory.mktemp("student"))


def chosen(student, **fields):
  """A training along y*, which depends on no student; with dropout."""
  train = {"batch_size": 2, "checkpoint_every": 50} | fields.pop("train", {})
  pipeline = {"rounds": ROUNDS, "split": True}
  return experiment(
    student,
    method="forward_kl",
    trajectory="y_star",
    lora={"rank": 4, "alpha": 8.0, "dropout": 0.1},
    train=train,
    pipeline=pipeline,
    **fields,
  )


def begin(root, student) -> RunDir:
  """Problems, and the same in the workdirs of the further rounds."""
  run_dir = RunDir(root)
  made = [training_runs.problem(n) for n in range(COUNT)]
  training_runs.write(run_dir, "problems", made)
  for number in range(2, ROUNDS + 1):
    run_dir.round(number).adopt("problems", run_dir)
  return run_dir


def train_round(e, root, number):
  train.run(rounds.at(e, number), root.round(number), None)


@pytest.fixture(scope="module")
def split(student, tmp_path_factory):
  """Three rounds, one after the other, and the order of their trajectories."""
  e = chosen(student)
  root = begin(tmp_path_factory.mktemp("split") / "run", student)
  order, batches = [], TrainingSet.batches
  with pytest.MonkeyPatch.context() as patch:

    def noted(self, *arguments):
      made = batches(self, *arguments)
      order.extend([s.key for s in batch] for batch in made)
      return made

    patch.setattr(TrainingSet, "batches", noted)
    for number in range(1, ROUNDS + 1):
      train_round(e, root, number)
  return e, root, order


def test_rounds_end_with_the_bits_of_one_run_over_the_same_order(
  split, student, tmp_path, monkeypatch
):
  e, root, order = split
  assert [len(batch) for batch in order] == [2] * 6 + [1]
  assert len({key for batch in order for key in batch}) == COUNT

  def one_after_the_other(self, train, seed):
    by_key = {sample.key: sample for sample in self.samples}
    return [[by_key[key] for key in batch] for batch in order]

  monkeypatch.setattr(TrainingSet, "batches", one_after_the_other)
  whole = begin(tmp_path / "whole", student)
  alone = dataclasses.replace(
    e, pipeline=dataclasses.replace(e.pipeline, rounds=1)
  )
  train.run(alone, whole, None)

  logged = [row for n in range(1, 4) for row in rows(root.round(n))]
  numbers = [row.pop("round") for row in logged]
  assert numbers == [1, 1, 2, 2, 3, 3, 3]
  assert [row["step"] for row in logged] == list(range(7))
  # Losses, norms and learning rates: one warm-up, one cosine.
  assert logged == rows(whole)
  (step, ours), (_, theirs) = saved(root.round(3)), saved(whole)
  assert step == 7
  # The adapter, both moments, and every counter.
  assert ours.keys() == theirs.keys()
  assert sum("mu" in name for name in ours) == 14
  assert sum("nu" in name for name in ours) == 14
  for name, array in theirs.items():
    np.testing.assert_array_equal(ours[name], array, err_msg=name)
  done = root.round(3).done("train")
  assert (done["round"], done["first_update"], done["updates"]) == (3, 4, 3)
  assert done["schedule"] == 7


def test_a_round_takes_the_trajectories_of_its_part(split):
  e, root, _ = split
  cut = parts.all_of(e, list(root.keys("problems")))
  assert [len(part) for part in cut] == [4, 4, 5]
  for number, part in enumerate(cut, 1):
    done = root.round(number).done("train")
    assert done["trajectories"] == len(part)


# Killed as it is given the update after so many of its own.
KILLED = """
import os, signal, sys
from trd_jax import train
from trd_jax.distill import distiller
from trd_jax.experiment import cli
update, made, after = distiller.Distiller.update, 0, int(sys.argv.pop(1))
def noted(self, *arguments):
  global made
  if made == after:
    os.kill(os.getpid(), signal.SIGKILL)
  made += 1
  return update(self, *arguments)
distiller.Distiller.update = noted
cli.main("train", train.run, "", exclusive=False)
"""


@pytest.mark.parametrize("every", [1, 50])
def test_killed_inside_a_round_it_ends_with_the_bits_of_one_that_was_not(
  split, student, tmp_path, every
):
  """With a checkpoint of the round's own, or with the last round's alone."""
  e, root, _ = split
  broken = RunDir(tmp_path / "run")
  shutil.copytree(root.root, broken.root)
  last = broken.round(3)
  shutil.rmtree(last.stage("train"))
  own = rounds.at(e, 3)
  own = dataclasses.replace(
    own, train=dataclasses.replace(own.train, checkpoint_every=every)
  )
  last.claim(to_json(own))
  command = [sys.executable, "-c", KILLED, "2", f"--workdir={last.root}"]
  ended = subprocess.run(command, capture_output=True, text=True, check=False)
  assert ended.returncode == -9, ended.stderr
  assert 0 < len(rows(last)) < 3
  assert (saved(last)[0] if every == 1 else None) in (None, 5, 6)
  train.run(own, last, None)

  whole = root.round(3)
  assert rows(last) == rows(whole)
  (step, ours), (_, theirs) = saved(last), saved(whole)
  assert step == 7
  for name, array in theirs.items():
    np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_a_run_that_was_moved_goes_on(split, tmp_path):
  e, root, _ = split
  moved = RunDir(tmp_path / "moved")
  shutil.copytree(root.root, moved.root)
  shutil.rmtree(moved.round(3).stage("train"))
  train_round(e, moved, 3)
  assert rows(moved.round(3)) == rows(root.round(3))


def test_a_round_without_the_end_of_the_one_before_is_refused(
  split, student, tmp_path
):
  e, root, _ = split
  broken = RunDir(tmp_path / "run")
  shutil.copytree(root.root, broken.root)
  for number in (2, 3):
    shutil.rmtree(broken.round(number).stage("train"))
  with pytest.raises(UserError, match="round 2 isn't trained, and round 3"):
    train_round(e, broken, 3)
  shutil.rmtree(broken.checkpoints / "2")
  with pytest.raises(UserError, match=r"checkpoints/2, which train had left"):
    train_round(e, broken, 2)
  # A record of an earlier version doesn't say what was left.
  done = broken.stage("train") / "done.json"
  record = json.loads(done.read_text())
  del record["left"], record["digest"]
  done.write_text(json.dumps(record))
  with pytest.raises(UserError, match=r"after update 2, the last of round 1"):
    train_round(e, broken, 2)
  assert not rows(broken.round(2))


@pytest.mark.parametrize(
  ("updates", "schedules"),
  [
    # As many as there are batches: known from the first round on.
    ([2, 2, 3], [7, 7, 7]),
    # Half of all trajectories fall out, and of the last part none.
    ([1, 1, 3], [4, 4, 5]),
    ([2, 1, 1], [7, 6, 4]),
  ],
)
def test_the_schedule_is_as_long_as_rounds_with_such_losses_will_be(
  student, tmp_path, updates, schedules
):
  e, root = chosen(student), begin(tmp_path / "run", student)
  first = 0
  for number, (count, total) in enumerate(
    zip(updates, schedules, strict=True), 1
  ):
    here = root.round(number)
    place = split_rounds.place(rounds.at(e, number), here, count)
    assert (place.first, place.total, place.round) == (first, total, number)
    here.mark_done("train", {"first_update": first, "updates": count})
    first += count
  # The cosine comes to its end with the last update.
  assert schedules[-1] == first


def test_without_split_rounds_updates_begin_at_zero(student, tmp_path):
  e, root = chosen(student), begin(tmp_path / "run", student)
  e = dataclasses.replace(
    e, pipeline=dataclasses.replace(e.pipeline, split=False)
  )
  assert split_rounds.place(e, root, 5) == split_rounds.Place(0, 5)
