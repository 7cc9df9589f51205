"""The stage from workdir to checkpoint, on random models and hand-made rows."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from tests.support import training_runs
from trd_jax import train
from trd_jax.data.chat import Chat
from trd_jax.distill import model_pair
from trd_jax.distill.checkpoint import Checkpoints
from trd_jax.experiment import alarms
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import to_json
from trd_jax.experiment.metric_log import read_metrics
from trd_jax.experiment.records import Trajectory
from trd_jax.model.weights import hf, hub

pytestmark = pytest.mark.slow

LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
  return training_runs.model_folder(tmp_path_factory.mktemp("student"))


def experiment(folder, **fields):
  """A run on one device, small in everything."""
  small = {
    "batch_size": 4,
    "learning_rate": 1e-2,
    "pack_tokens": 128,
    "teacher_pack_tokens": 256,
  }
  fields["train"] = small | fields.get("train", {})
  rest = {"lora": LORA, "mesh": {"data": 1}, "refine": {"thinking": None}}
  return training_runs.experiment(folder, **(rest | fields))


def rows(run_dir):
  """Metrics without what a clock says."""
  found = read_metrics(run_dir.metrics_file("train"))
  return [
    {k: v for k, v in row.items() if k != "elapsed_seconds"} for row in found
  ]


def saved(run_dir):
  """The newest checkpoint's arrays, by name."""
  step = Checkpoints(run_dir.checkpoints, 1).latest()
  folder = run_dir.checkpoints / str(step) / "arrays"
  with ocp.PyTreeCheckpointer() as reader:
    about = reader.metadata(folder).item_metadata.tree
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    how = jax.tree.map(lambda _: as_numpy, about)
    tree = reader.restore(folder, restore_args=how)
  return step, {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


@pytest.mark.parametrize("along", ["y_o", "y_star"])
def test_fine_tuning_needs_no_teacher_on_the_disk(tmp_path, student, along):
  chat = Chat.load(student)
  run_dir = training_runs.workdir(tmp_path, chat)
  chosen = experiment(
    student,
    method="sft",
    trajectory=along,
    regime="opd",
    teacher={"path": str(tmp_path / "nowhere")},
    train={"epochs": 2},
  )
  train.run(chosen, run_dir, None)
  logged = read_metrics(run_dir.metrics_file("train"))
  assert logged[-1]["D"] < logged[0]["D"]
  for row in logged:
    # At T = 1 without any weights the loss's tokens are the NLL's.
    assert row["D"] == pytest.approx(row["nll_student"], rel=1e-5)
    assert row["tokens_teacher"] == 0
    assert "nll_teacher" not in row
  summary = run_dir.done("train")
  assert summary["teacher"] == {"source": "none"}
  assert summary["coordinates"]["teacher_context"] is None


def test_fine_tuning_reads_the_text_of_a_teacher_of_another_family(
  tmp_path, student, capsys
):
  chat = Chat.load(student)
  other = training_runs.model_folder(
    tmp_path / "other", merges=0, vocab_size=272, tie_embeddings=False
  )
  run_dir = training_runs.workdir(tmp_path / "run", chat)
  chosen = experiment(
    student,
    method="sft",
    regime="opd",
    teacher={"path": str(other)},
    train={"max_steps": 1, "batch_size": 7},
  )
  train.run(chosen, run_dir, None)
  told = capsys.readouterr().out
  assert "the teacher's tokenizer has other ids" in told
  assert "less than one batch (train.batch_size=7): it is 1 update;" in told
  # Nothing of the student's head is lost to the teacher's shorter one.
  assert "both are scored" not in told
  (row,) = read_metrics(run_dir.metrics_file("train"))
  texts = [r.text for r in run_dir.read("refine", Trajectory)]
  assert row["tokens"] == sum(len(chat.encode(t)) + 1 for t in texts)
  with pytest.raises(UserError, match="method=sft, which reads only its text"):
    train.run(
      dataclasses.replace(chosen, method="trd"),
      training_runs.workdir(tmp_path / "trd", chat),
      None,
    )


def test_a_mean_over_tokens_counts_long_trajectories_more(tmp_path, student):
  chat = Chat.load(student)
  run_dir = training_runs.workdir(tmp_path, chat)
  chosen = experiment(
    student,
    method="forward_kl",
    loss={"mean": "token"},
    train={"batch_size": 6, "max_steps": 1},
  )
  train.run(chosen, run_dir, None)
  (row,) = read_metrics(run_dir.metrics_file("train"))
  assert row["loss"] == pytest.approx(row["D"], rel=1e-6)


@pytest.mark.parametrize(
  ("regime", "context"), [("opsd", "refine"), ("opd", "refine"), ("opsd", "x")]
)
def test_the_laboratory_learns_in_plain_text(tmp_path, regime, context):
  chat = Chat.load(hub.model_folder("lab:student"))
  run_dir = training_runs.workdir(tmp_path, chat)
  chosen = experiment(
    "lab:student",
    regime=regime,
    teacher_context=context,
    train={"context": "plain", "batch_size": 6, "epochs": 2},
  )
  train.run(chosen, run_dir, None)
  logged = read_metrics(run_dir.metrics_file("train"))
  assert len(logged) == 2
  assert all(np.isfinite(row["loss"]) for row in logged)
  if context == "x":
    # Both sides read the same and are the same, before the first update.
    assert logged[0]["D"] == pytest.approx(0, abs=1e-6)
  else:
    assert logged[0]["D"] > 0.01
  (kind,) = run_dir.done("train")["thinking"]
  assert kind == {
    "written": False,
    "student": None,
    "teacher": None,
    "trajectories": 6,
  }


def test_killed_and_started_again_is_uninterrupted_bit_for_bit(
  tmp_path, student
):
  chat = Chat.load(student)
  run = experiment(student, train={"epochs": 20, "checkpoint_every": 5})
  whole = training_runs.workdir(tmp_path / "whole", chat, count=6)
  train.run(run, whole, None)

  broken = training_runs.workdir(tmp_path / "broken", chat, count=6)
  broken.claim(to_json(run))
  command = [sys.executable, "-m", "trd_jax.train", f"--workdir={broken.root}"]
  with subprocess.Popen(command, env=os.environ) as process:
    file = broken.metrics_file("train")
    while process.poll() is None and len(read_metrics(file)) < 12:
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
  assert process.returncode == -signal.SIGKILL
  assert broken.done("train") is None
  # It was killed between two checkpoints, rows after the last one written.
  assert 5 <= saved(broken)[0] < len(read_metrics(file)) < 30
  train.run(run, broken, None)

  assert len(rows(whole)) == 30
  assert rows(whole) == rows(broken)
  assert whole.done("train")["updates"] == 30
  assert broken.done("train")["restarted_after"] >= 5
  (step, ours), (_, theirs) = saved(broken), saved(whole)
  assert step == 30
  assert ours.keys() == theirs.keys()
  assert sum("lora_a" in name for name in ours) == 21  # and two moments
  for name, array in ours.items():
    np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_a_device_that_is_full_is_told_in_one_line(tmp_path, student):
  # An adapter that no address space holds.
  run = experiment(student, lora={"rank": 2**40, "alpha": 8.0})
  run_dir = training_runs.workdir(tmp_path, Chat.load(student), count=4)
  with pytest.raises(UserError, match=r"^a device is out of memory") as caught:
    train.run(run, run_dir, None)
  told = str(caught.value)
  assert "\n" not in told
  for key in ("mesh.fsdp", "train.rows_per_device", "loss.chunk_tokens"):
    assert key in told
  assert run_dir.done("train") is None


# Sends itself what it is told to, in the midst of the update after so many.
STOPPED = """
import os, signal, sys
from trd_jax import train
from trd_jax.distill import distiller
from trd_jax.experiment import cli
update, made, after = distiller.Distiller.update, 0, int(sys.argv.pop(1))
number = int(sys.argv.pop(1))
def noted(self, *arguments):
  global made
  made += 1
  if made == after:
    os.kill(os.getpid(), number)
  return update(self, *arguments)
distiller.Distiller.update = noted
cli.main("train", train.run, "", exclusive=False)
"""


@pytest.mark.parametrize(
  ("number", "word"),
  [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")],
)
def test_stopped_after_seven_updates_it_goes_on_at_seven(
  tmp_path, student, number, word
):
  chat = Chat.load(student)
  run = experiment(student, train={"epochs": 8, "checkpoint_every": 5})
  whole = training_runs.workdir(tmp_path / "whole", chat, count=6)
  train.run(run, whole, None)

  broken = training_runs.workdir(tmp_path / "broken", chat, count=6)
  broken.claim(to_json(run))
  command = [sys.executable, "-c", STOPPED, "7", str(int(number))]
  command.append(f"--workdir={broken.root}")
  ended = subprocess.run(command, capture_output=True, text=True, check=False)
  assert ended.returncode == 128 + number, ended.stderr
  *_, last = lines = ended.stderr.splitlines()
  assert last == (
    f"trd-jax train: {word} after update 7, which is saved; the same command"
    " goes on where it stopped"
  )
  assert sum(word in line for line in lines) == 1
  assert any("asked to stop, finishing this update" in x for x in lines)
  assert "Traceback" not in ended.stderr
  assert saved(broken)[0] == len(rows(broken)) == 7
  assert "less than one batch" not in ended.stdout
  assert broken.done("train") is None
  train.run(run, broken, None)
  assert broken.done("train")["restarted_after"] == 7
  assert rows(broken) == rows(whole)
  (step, ours), (_, theirs) = saved(broken), saved(whole)
  assert step == 12
  for name, array in theirs.items():
    np.testing.assert_array_equal(array, ours[name], err_msg=name)


def test_terminated_before_the_first_update_it_ends_with_a_line(
  tmp_path, student
):
  run = experiment(student, train={"epochs": 8})
  run_dir = training_runs.workdir(tmp_path, Chat.load(student), count=6)
  run_dir.claim(to_json(run))
  command = [sys.executable, "-m", "trd_jax.train", f"--workdir={run_dir.root}"]
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout is not None
    process.stdout.readline()  # it has begun to read
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate()
  assert process.returncode == 143
  assert told.splitlines()[-1] == (
    "trd-jax train: terminated; the same command goes on where it stopped"
  )
  assert not rows(run_dir)


def test_an_epoch_takes_every_trajectory_once(tmp_path, student):
  chat = Chat.load(student)
  run_dir = training_runs.workdir(
    tmp_path, chat, count=10, refine={7: {"truncated": True}}
  )
  other = training_runs.teacher_folder(tmp_path / "teacher")
  run = experiment(
    student,
    regime="opd",
    method="jsd",
    teacher={"path": str(other)},
    mesh={"data": 2},
  )
  train.run(run, run_dir, None)
  found = rows(run_dir)
  responses = [
    training_runs.trajectory(
      chat, training_runs.problem(n), "rollout", n
    ).response_ids
    for n in range(10)
  ]
  # 4 + 4 + 2 trajectories: the last batch is what is left.
  assert [row["trajectories"] for row in found] == [4, 4, 2]
  assert sum(row["tokens"] for row in found) == sum(map(len, responses))
  assert all(row["loss"] > 0 for row in found)
  done = run_dir.done("train")
  assert (done["updates"], done["trajectories"]) == (3, 10)
  assert done["dropped"] == {}
  # A finished stage is left alone.
  train.run(run, run_dir, None)
  assert rows(run_dir) == found


def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_written(
  tmp_path, student
):
  run_dir = training_runs.workdir(tmp_path / "run", Chat.load(student))
  foreign = training_runs.model_folder(tmp_path / "foreign", merges=40)
  run = experiment(student, regime="opd", teacher={"path": str(foreign)})
  with pytest.raises(UserError, match="gives other ids"):
    train.run(run, run_dir, None)
  assert not run_dir.stage("train").exists()


@pytest.mark.parametrize("source", ["recompute", "hidden_cache"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_heads_of_other_lengths_are_scored_over_the_ids_of_both(
  tmp_path, capsys, longer, tied, source
):
  """As if the longer head's further rows were not there, bit for bit."""
  long = training_runs.model_folder(
    tmp_path / "long", vocab_size=416, tie_embeddings=tied
  )
  cut = tmp_path / "cut"
  shutil.copytree(long, cut)
  (file,) = cut.glob("*.safetensors")
  tensors = {
    name: x[:384] if len(x) == 416 else x
    for name, x in safetensors.numpy.load_file(file).items()
  }
  safetensors.numpy.save_file(tensors, file)
  config = json.loads((cut / "config.json").read_text())
  (cut / "config.json").write_text(json.dumps(config | {"vocab_size": 384}))
  other = training_runs.model_folder(tmp_path / "other", seed=1)
  chat = Chat.load(other)

  def trained(name, odd):
    sides = {"student": odd, "teacher": other}
    if longer == "teacher":
      sides = {"student": other, "teacher": odd}
    run_dir = training_runs.workdir(tmp_path / name, chat)
    run = experiment(
      sides["student"],
      regime="opd",
      method="reverse_kl",
      teacher={"path": str(sides["teacher"])},
      train={"max_steps": 2, "teacher": source},
    )
    train.run(run, run_dir, None)
    return rows(run_dir), saved(run_dir)[1], capsys.readouterr().out

  found, state, told = trained("unequal", long)
  wanted, other_state, quiet = trained("equal", cut)
  assert "both are scored over the 384 ids that both have" in told
  assert "both are scored" not in quiet
  assert found == wanted
  assert found[0]["D"] > 0
  for name, x in state.items():
    np.testing.assert_array_equal(x, other_state[name], err_msg=name)


def test_a_writer_that_refuses_the_run_is_told_before_models_are_loaded(
  tmp_path, student, monkeypatch
):
  def init(**asked):
    raise RuntimeError("no key")

  def load(*args, **more):
    raise AssertionError("loaded before")

  chosen = experiment(student, metrics={"wandb": True})
  run_dir = training_runs.workdir(tmp_path / "run", Chat.load(student))
  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  monkeypatch.setattr(hf, "load", load)
  with pytest.raises(UserError, match=r"metrics.wandb: .*\(no key\)"):
    train.run(chosen, run_dir, None)


@pytest.mark.parametrize(
  ("content", "told"),
  [
    (b"not a row\n", "line 1, is no row of trd-jax's"),
    (b'{"loss": 1.0}\n', "has rows without a step"),
    (b'{"step": 3}\n{"step": 3}\n', "line 2: its step is 3"),
    (None, "can't be read"),
  ],
)
def test_metrics_that_are_refused_are_named_before_a_model_is_opened(
  tmp_path, student, monkeypatch, content, told
):
  def open_model(*_):
    raise AssertionError("a model was opened")

  run_dir = training_runs.workdir(tmp_path, Chat.load(student))
  monkeypatch.setattr(model_pair, "find", open_model)
  path = run_dir.metrics_file("train")
  path.parent.mkdir(parents=True)
  path.mkdir() if content is None else path.write_bytes(content)
  with pytest.raises(UserError, match=told) as refused:
    train.run(experiment(student), run_dir, None)
  assert str(path) in str(refused.value)


def test_an_alarm_is_said_once_and_kept(tmp_path, student, capsys):
  """Of a control: teacher and student read the same under one model."""
  chosen = experiment(
    student, teacher_context="x", trajectory="y_o", train={"epochs": 8}
  )
  run_dir = training_runs.workdir(tmp_path, Chat.load(student), count=6)
  train.run(chosen, run_dir, None)
  out, err = capsys.readouterr()
  fired = run_dir.done("train")["alarms"]
  # AdamW makes steps of what rounding leaves: the adapter isn't idle.
  assert [(one["name"], one["update"]) for one in fired] == [
    ("teacher_equals_student", 1)
  ]
  assert [line for line in out.splitlines() if "alarm" in line] == [
    f"train: {alarms.Fired(**one).line}" for one in fired
  ]
  # The line of progress ends with what the last row has.
  row = rows(run_dir)[-1]
  assert err.splitlines()[-1].endswith(
    f"loss {row['loss']:.4f}, D {row['D']:.4f}, grad"
    f" {row['grad_norm']:.3g}, lr {row['learning_rate']:.2g}"
  )
  # Nothing new comes when the stage is finished again.
  (run_dir.stage("train") / "done.json").unlink()
  train.run(chosen, run_dir, None)
  assert "alarm" not in capsys.readouterr().out
  assert run_dir.done("train")["alarms"] == fired


def test_training_again_from_the_checkpoint_before_ends_with_the_same_bits(
  tmp_path, student, capsys
):
  """Each line is followed to the letter: a damaged checkpoint, lost rows."""
  chat = Chat.load(student)
  run_dir = training_runs.workdir(tmp_path, chat, count=8)
  chosen = experiment(
    student, train={"max_steps": 4, "checkpoint_every": 1, "batch_size": 2}
  )
  train.run(chosen, run_dir, None)
  whole, logged, summary = saved(run_dir), rows(run_dir), run_dir.done("train")
  last = run_dir.checkpoints / "4"
  # Whoever merges reads it first, and says what is damaged and what to do.
  path = next((last / "arrays" / "ocdbt.process_0" / "d").iterdir())
  path.write_bytes(path.read_bytes()[:-1])
  like = {"lora": {"none": np.zeros(1)}}
  with pytest.raises(UserError) as caught:
    Checkpoints(run_dir.checkpoints, 2).restore(like, partial=True)
  assert str(caught.value).startswith(f"{last} can't be read (")
  assert str(caught.value).endswith("remove it to go on from the one before")
  shutil.rmtree(last)
  with pytest.raises(UserError, match=r"is not there; run trd_jax\.train with"):
    run_dir.done("train")
  capsys.readouterr()
  train.run(chosen, run_dir, None)
  out = capsys.readouterr().out
  assert f"{last}, which train had left, is not there: it is made again" in out
  assert "goes on after update 3" in out
  step, again = saved(run_dir)
  assert step == whole[0]
  for name, array in again.items():
    assert array.tobytes() == whole[1][name].tobytes(), name
  assert rows(run_dir) == logged
  for name in ("updates", "first_loss", "last_loss", "trajectories"):
    assert run_dir.done("train")[name] == summary[name]
  # Rows that are gone are named before a model is loaded.
  gone = next(run_dir.stage("refine").glob("shard-*"))
  gone.rename(tmp_path / gone.name)
  (run_dir.stage("train") / "done.json").unlink()
  with pytest.raises(UserError, match=f"{gone.name}, which refine had left"):
    train.run(chosen, run_dir, None)


def test_a_model_that_changed_after_training_is_named(tmp_path, student):
  folder = tmp_path / "model"
  shutil.copytree(student, folder)
  chat = Chat.load(folder)
  run_dir = training_runs.workdir(tmp_path / "run", chat)
  chosen = experiment(folder, train={"max_steps": 1})
  train.run(chosen, run_dir, None)
  (run_dir.stage("rollout") / "done.json").unlink()
  run_dir.mark_done("rollout", {}, weights={str(folder): "as it was"})
  (run_dir.stage("train") / "done.json").unlink()
  with pytest.raises(UserError, match="has changed since rollout read it in"):
    train.run(chosen, run_dir, None)
