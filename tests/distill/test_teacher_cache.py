"""A run on cached hidden states is the run that recomputes them."""

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.support import training_runs
from tests.test_train import LORA, saved
from trd_jax import train
from trd_jax.data.chat import Chat
from trd_jax.distill.packing.layout import Sample
from trd_jax.distill.teacher.cache import Identity, TeacherCache, entry_key
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import to_json
from trd_jax.experiment.metric_log import read_metrics
from trd_jax.model.sharding import make_mesh
from trd_jax.model.weights import hf

pytestmark = pytest.mark.slow

# Facts about the teacher's work, which differs; and what a clock says.
OF_THE_WORK = {"elapsed_seconds", "tokens_teacher", "fill_teacher"}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
  return training_runs.model_folder(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  return training_runs.teacher_folder(tmp_path_factory.mktemp("teacher"))


def experiment(folder, teacher=None, mesh=None, **changes):
  """A small run, in OPD where there is a teacher."""
  small = {
    "batch_size": 8,
    "learning_rate": 1e-2,
    "pack_tokens": 64,
    "teacher_pack_tokens": 512,
  }
  return training_runs.experiment(
    folder,
    lora=LORA,
    mesh=mesh or {"data": 1},
    refine={"thinking": None},
    train=small | changes,
    **({"regime": "opd", "teacher": {"path": str(teacher)}} if teacher else {}),
  )


def trained(run, root, count=24):
  """Metrics, adapter and optimizer after a run in a workdir of its own."""
  chat = Chat.load(run.student.path)
  run_dir = training_runs.workdir(root, chat, count=count)
  train.run(run, run_dir, None)
  rows = read_metrics(run_dir.metrics_file("train"))
  for row in rows:
    for name in OF_THE_WORK:
      row.pop(name, None)
  return run_dir, rows, saved(run_dir)[1]


def cached(run, **changes):
  """The same experiment on cached hidden states."""
  section = dataclasses.replace(run.train, teacher="hidden_cache", **changes)
  return dataclasses.replace(run, train=section)


def hold_equal(one, other):
  _, rows, arrays = one
  _, same_rows, same_arrays = other
  assert rows == same_rows
  for name, array in arrays.items():
    np.testing.assert_array_equal(array, same_arrays[name], err_msg=name)


PLACES = {
  "one device": ("opsd", "float32", {"data": 1}),
  "bfloat16": ("opsd", "bfloat16", {"data": 1}),
  "data 8": ("opd", "float32", {"data": 8}),
  "all axes": ("opd", "float32", {"data": 2, "fsdp": 2, "tensor": 2}),
}


@pytest.mark.parametrize("place", PLACES)
def test_cached_updates_are_recomputed_ones_bit_for_bit(
  tmp_path, student, teacher, place
):
  regime, dtype, mesh = PLACES[place]
  run = experiment(student, teacher if regime == "opd" else None, mesh)
  run = dataclasses.replace(
    run, student=dataclasses.replace(run.student, dtype=dtype)
  )
  whole = trained(run, tmp_path / "recompute")
  again = trained(cached(run), tmp_path / "cached")
  assert len(whole[1]) == 3
  assert len({row["loss"] for row in whole[1]}) == 3
  hold_equal(whole, again)
  done = again[0].done("train")["teacher"]
  assert (done["source"], done["computed"]) == ("hidden_cache", 24)


def test_every_epoch_has_the_same_bits_where_rows_are_not_shared(
  tmp_path, student
):
  # Long enough for one trajectory, too short for two.
  run = experiment(student, teacher_pack_tokens=96, rows_per_device=3, epochs=2)
  whole = trained(run, tmp_path / "recompute")
  hold_equal(whole, trained(cached(run), tmp_path / "cached"))
  assert len(whole[1]) == 6


def test_beside_others_a_later_epoch_differs_by_rounding(tmp_path, student):
  run = experiment(student, epochs=2)
  _, rows, _ = trained(run, tmp_path / "recompute")
  _, same, _ = trained(cached(run), tmp_path / "cached")
  assert rows[:3] == same[:3]
  for row, other in zip(rows, same, strict=True):
    np.testing.assert_allclose(row["loss"], other["loss"], rtol=2e-5)


def test_float32_stored_as_bfloat16_moves_the_loss_by_its_rounding(
  tmp_path, student
):
  run = experiment(student)
  _, rows, _ = trained(run, tmp_path / "recompute")
  run = cached(run, cache_dtype="bfloat16")
  run_dir, halved, _ = trained(run, tmp_path / "cached")
  apart = [
    abs(row["loss"] - other["loss"]) / row["loss"]
    for row, other in zip(rows, halved, strict=True)
  ]
  assert 0 < max(apart) < 2e-3
  done = run_dir.done("train")["teacher"]
  (folder,) = run_dir.teacher_cache.iterdir()
  assert done["folder"] == str(folder)
  responses = [
    training_runs.trajectory(
      Chat.load(student), training_runs.problem(n), "refine", n
    ).response_ids
    for n in range(24)
  ]
  tokens = sum(map(len, responses))
  assert done["bytes"] == tokens * training_runs.MODEL.hidden_size * 2


def compiled(caplog, run, root):
  """Names of the programs that a run compiles."""
  caplog.clear()
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    trained(run, root)
  return caplog.text


def test_other_divergences_and_epochs_reuse_it_and_other_teachers_do_not(
  tmp_path, student, teacher, caplog
):
  run = cached(experiment(student, teacher), cache_dir=str(tmp_path / "cache"))
  first = compiled(caplog, run, tmp_path / "first")
  assert "jit(teach)" in first

  loss = dataclasses.replace(run.loss, clip=0.5)
  sweep = dataclasses.replace(run, loss=loss)
  sweep = cached(sweep, epochs=2, learning_rate=3e-3)
  second = compiled(caplog, sweep, tmp_path / "second")
  assert "jit(add_pack)" in second
  assert "jit(teach)" not in second

  (folder,) = (tmp_path / "cache").iterdir()
  other = training_runs.model_folder(
    tmp_path / "other", seed=2, hidden_size=24, tie_embeddings=False
  )
  run = cached(experiment(student, other), cache_dir=str(tmp_path / "cache"))
  run_dir, _, _ = trained(run, tmp_path / "third")
  assert run_dir.done("train")["teacher"]["computed"] == 24
  assert len(list((tmp_path / "cache").iterdir())) == 2
  assert folder.exists()


_IN_SMALL_SHARDS = """
import sys, time
from trd_jax import train
from trd_jax.distill.teacher import cache as teacher_cache
from trd_jax.experiment import cli
teacher_cache.SHARD_BYTES = int(sys.argv.pop(1))
land, pause = teacher_cache.TeacherCache.land, float(sys.argv.pop(1))
def slowly(self, tensors):
  land(self, tensors)
  time.sleep(pause)
teacher_cache.TeacherCache.land = slowly
cli.main('train', train.run, '')
"""


def test_killed_while_it_fills_it_goes_on_with_what_is_there(tmp_path, student):
  run = experiment(student)
  whole = trained(run, tmp_path / "recompute")
  run = cached(run)
  run_dir = training_runs.workdir(tmp_path / "cached", Chat.load(student), 24)
  run_dir.claim(to_json(run))
  program = tmp_path / "small_shards.py"
  program.write_text(_IN_SMALL_SHARDS)
  flags = [str(2 * 12 * 32 * 4), "0.3", f"--workdir={run_dir.root}"]
  command = [sys.executable, program, *flags]
  with subprocess.Popen(command, env=os.environ) as process:
    cache = run_dir.teacher_cache
    while process.poll() is None and len(list(cache.glob("*/hidden*s"))) < 3:
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
  assert process.returncode == -signal.SIGKILL
  (index,) = cache.glob("*/index.json")
  before = json.loads(index.read_text())["shards"]
  there = sum(len(shard["tokens"]) for shard in before.values())
  assert 0 < there < 24
  # As a kill between a shard and its line in the index leaves it.
  (index.parent / "hidden-000099.safetensors").write_bytes(b"half")

  train.run(run, run_dir, None)
  assert run_dir.done("train")["teacher"]["computed"] == 24 - there
  after = json.loads(index.read_text())["shards"]
  assert before.items() <= after.items()
  names = {path.name for path in index.parent.glob("hidden*")}
  assert names == after.keys()
  rows = read_metrics(run_dir.metrics_file("train"))
  assert [row["loss"] for row in rows] == [row["loss"] for row in whole[1]]


def test_what_another_process_has_done_is_not_in_the_rate(
  tmp_path, student, monkeypatch, capsys
):
  run = experiment(student)
  mine, theirs = str(tmp_path / "mine"), str(tmp_path / "theirs")
  first = trained(cached(run, cache_dir=theirs), tmp_path / "first")
  check_room = TeacherCache.check_room

  def fill_meanwhile(self, tokens):
    """Between looking what is missing and being let in to compute it."""
    shutil.copytree(theirs, mine, dirs_exist_ok=True)
    return check_room(self, tokens)

  monkeypatch.setattr(TeacherCache, "check_room", fill_meanwhile)
  capsys.readouterr()
  hold_equal(first, trained(cached(run, cache_dir=mine), tmp_path / "second"))
  told = capsys.readouterr().err
  assert "teacher cache: 24/24 trajectories (100%) · 0.0 traj" in told


def flipped(path, at=-100):
  """Changes a bit of a file."""
  data = bytearray(path.read_bytes())
  data[at] ^= 1
  path.write_bytes(data)


def torn(path):
  path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
  path.write_bytes(b"")


DAMAGES = {
  "flipped": (flipped, "has another checksum than"),
  "torn": (torn, r"has \d+ bytes of \d+"),
  "empty": (emptied, r"has 0 bytes of \d+"),
  "removed": (lambda path: path.unlink(), None),
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory, student):
  """A cache of one shard, and the run that has filled it."""
  root = tmp_path_factory.mktemp("filled")
  run = cached(experiment(student), cache_dir=str(root / "cache"))
  return root / "cache", trained(run, root / "first")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_and_computed_anew(
  tmp_path, student, filled, damage, capsys
):
  whole, first = filled
  there = tmp_path / "cache"
  shutil.copytree(whole, there)
  (shard,) = there.glob("*/hidden*")
  good = shard.read_bytes()
  do, told = DAMAGES[damage]
  do(shard)
  capsys.readouterr()
  run = cached(experiment(student), cache_dir=str(there))
  again = trained(run, tmp_path / "again")
  hold_equal(first, again)
  assert again[0].done("train")["teacher"]["computed"] == 24
  lines = [x for x in capsys.readouterr().out.splitlines() if "anew" in x]
  assert len(lines) == (told is not None)
  if told is not None:
    assert re.search(f"{re.escape(str(shard))} {told}", lines[0])
  assert [path.read_bytes() for path in there.glob("*/hidden*")] == [good]
  # What it wrote is whole: nothing is computed for the next.
  third = trained(run, tmp_path / "third")
  assert third[0].done("train")["teacher"]["computed"] == 0


def small_cache(root, keys="ab"):
  """A cache with a shard a key, of two tokens each."""
  cache = TeacherCache(root, Identity("0123", "float32", "float32", 4))
  for number, key in enumerate(keys):
    with cache.filling() as filler:
      filler.add(key, np.full((2, 4), number, np.float32))
  return cache


def test_of_several_shards_the_damaged_one_alone_is_lost(tmp_path, capsys):
  cache = small_cache(tmp_path, "abc")
  flipped(sorted(cache.folder.glob("hidden*"))[1], 90)
  again = TeacherCache(tmp_path, cache.identity)
  again.check_bytes(["a", "b", "c", "of nobody"])
  assert [key in again for key in "abc"] == [True, False, True]
  assert capsys.readouterr().out.count("\n") == 1
  with again.filling() as filler:
    assert "b" not in filler
    filler.add("b", np.full((2, 4), 1, np.float32))
  for number, key in enumerate("abc"):
    found = TeacherCache(tmp_path, cache.identity).read(key, 2)
    np.testing.assert_array_equal(found, np.full((2, 4), number))


def test_what_another_process_has_mended_meanwhile_stays(tmp_path):
  cache = small_cache(tmp_path, "a")
  (shard,) = cache.folder.glob("hidden*")
  good = shard.read_bytes()
  flipped(shard, 90)
  again = TeacherCache(tmp_path, cache.identity)
  again.check_bytes("a")
  assert "a" not in again
  shard.write_bytes(good)
  with again.filling() as filler:
    assert "a" in filler
  assert shard.read_bytes() == good


def test_what_is_damaged_after_it_was_written_is_refused_by_name(tmp_path):
  cache = small_cache(tmp_path, "a")
  (shard,) = cache.folder.glob("hidden*")
  flipped(shard, 90)
  with pytest.raises(UserError, match="another checksum than") as told:
    cache.read("a", 2)
  assert f"{shard} " in str(told.value)
  assert "remove it" in str(told.value)


def test_what_cannot_hold_it_is_refused_before_anything_runs(tmp_path, student):
  run = experiment(student)
  # A file system without a free byte.
  with pytest.raises(UserError, match=r"need [\d,]+ bytes and 0 are free"):
    trained(cached(run, cache_dir="/proc/cache"), tmp_path / "full")
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot be written"):
    trained(cached(run, cache_dir=str(tmp_path / "file")), tmp_path / "file_")
  assert not (tmp_path / "full" / "train" / "metrics.jsonl").exists()


def test_a_cache_of_another_version_or_a_broken_index_is_refused(tmp_path):
  identity = Identity("0123", "float32", "float32", 4)
  cache = TeacherCache(tmp_path, identity)
  with cache.filling() as filler:
    filler.add("a", np.arange(8, dtype=np.float32).reshape(2, 4))
  again = TeacherCache(tmp_path, identity)
  np.testing.assert_array_equal(again.read("a", 2), np.arange(8).reshape(2, 4))
  with pytest.raises(UserError, match=r"holds \(2, 4\) for 3 tokens"):
    again.read("a", 3)
  index = cache.folder / "index.json"
  text = index.read_text()
  for wrong in (
    text.replace('"version": 1', '"version": 2'),
    text.replace('"width": 4', '"width": 5'),
    text.replace('"bytes"', '"byte"'),
    re.sub('"sha256": ".*"', '"sha256": []', text),
    "[]",
    "{",
  ):
    index.write_text(wrong)
    with pytest.raises(UserError, match=r"index\.json"):
      TeacherCache(tmp_path, identity)


def test_the_key_is_that_of_context_and_response_together():
  def key(prompt, response):
    prompt, response = (np.array(x, np.int32) for x in (prompt, response))
    sample = Sample("k", np.array([1], np.int32), prompt, response, None)
    return entry_key(sample)

  keys = {key([1, 2], [3]), key([1], [2, 3]), key([1, 2], [4]), key([2], [3])}
  assert len(keys) == 4
  assert key([1, 2], [3]) in keys


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_alone_is_the_models_head(tmp_path, tied):
  folder = training_runs.model_folder(tmp_path, seed=3, tie_embeddings=tied)
  mesh = make_mesh(2, 2, 2)
  head = hf.load_head(folder, dtype="float32", mesh=mesh)
  whole = hf.load(folder, dtype="float32", mesh=mesh)
  np.testing.assert_array_equal(head.head_VD, whole.head_VD)
  assert head.head_VD.sharding == whole.head_VD.sharding
