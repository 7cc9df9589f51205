import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from trd_jax.experiment import experiment, records, shards
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import atomic_files
from trd_jax.experiment.files.json_files import write_json
from trd_jax.experiment.records import Problem, Rejected
from trd_jax.experiment.run_dir import RunDir


def _problem(name, text="1+1"):
  return Problem(str(name), text, "2", None, "arithmetic", "s", None, "{}")


def _config(**sections):
  return experiment.to_json(experiment.from_config(sections))


def _replace_config(run_dir, text):
  """Gives a run directory the config of another version, which kept no copy."""
  run_dir.config.write_text(text)
  (run_dir.root / "locks" / "config.json").unlink(missing_ok=True)


# Writes the rows 0 … 20 that are not there yet, ever larger ones. It dies at
# the n-th flush to the disk or renaming, or in the middle of the first file
# that outgrows a limit (the kernel's SIGXFSZ, which is sent at that byte).
_MORTAL = """
import os, pathlib, random, resource, signal, sys
root, fatal, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
from trd_jax.experiment.records import Problem
from trd_jax.experiment.run_dir import RunDir
count = 0
def mortal(function):
  def call(*args):
    global count
    count += 1
    if count == fatal:
      os.kill(os.getpid(), signal.SIGKILL)
    return function(*args)
  return call
os.fsync = mortal(os.fsync)
pathlib.Path.replace = mortal(pathlib.Path.replace)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
if limit:
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
run_dir = RunDir(root)
there = run_dir.keys('problems')
with run_dir.shard_writer('problems', Problem, rows_per_shard=3) as writer:
  for i in range(21):
    text = random.Random(i).randbytes(100 * i).hex()
    if str(i) not in there:
      writer.add(Problem(str(i), text, '', None, 'math', 's', None, '{}'))
run_dir.mark_done('problems', {'rows': 21})
"""


def _visible(run_dir):
  """The rows in all files that a reader sees, repeats included."""
  return [
    row
    for path in run_dir.problems_dir.glob("*.parquet")
    for row in records.from_table(Problem, shards.read_table(path, Problem))
  ]


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_rows_none_twice(tmp_path):
  run_dir = RunDir(tmp_path)
  deaths, most = [], 0
  for fatal, limit in (
    *((fatal, 0) for fatal in range(1, 6)),
    *((0, limit) for limit in (4000, 5000, 7000)),
    (0, 0),
  ):
    command = [sys.executable, "-c", _MORTAL, str(tmp_path)]
    command += [str(fatal), str(limit)]
    ended = subprocess.run(command, check=False, capture_output=True)
    deaths.append(-ended.returncode)
    rows = _visible(run_dir)
    assert len({row.key for row in rows}) == len(rows) >= most
    assert run_dir.keys("problems") == {row.key for row in rows}
    assert (run_dir.done("problems") is None) == bool(ended.returncode)
    most = len(rows)
  assert deaths == [signal.SIGKILL] * 5 + [signal.SIGXFSZ] * 3 + [0]
  rows = run_dir.read("problems", Problem)
  assert [row.key for row in rows] == sorted(str(i) for i in range(21))
  for row in rows:
    text = random.Random(int(row.key)).randbytes(100 * int(row.key)).hex()
    assert row.text == text
  assert run_dir.done("problems") == {"rows": 21}
  assert not list(tmp_path.rglob("*.tmp"))


def test_a_row_that_waits_lands_without_another_one(tmp_path):
  run_dir = RunDir(tmp_path)
  writer = run_dir.shard_writer("problems", Problem, flush_seconds=0.01)
  with writer as rows:
    rows.add(_problem("p"))
    for _ in range(1000):
      if run_dir.keys("problems"):
        break
      time.sleep(0.01)
    assert run_dir.keys("problems") == {"p"}


def _write_and_fail(run_dir, error):
  with run_dir.shard_writer("problems", Problem) as writer:
    writer.add(_problem("p"))
    raise error


def test_rows_added_before_an_error_land(tmp_path):
  run_dir = RunDir(tmp_path)
  with pytest.raises(ZeroDivisionError):
    _write_and_fail(run_dir, ZeroDivisionError())
  assert run_dir.keys("problems") == {"p"}


@pytest.mark.parametrize("flush_seconds", [0.01, 60.0])
def test_a_full_disk_is_told_with_what_is_kept(
  tmp_path, monkeypatch, flush_seconds
):
  run_dir = RunDir(tmp_path)
  with run_dir.shard_writer("problems", Problem) as writer:
    writer.add(_problem("kept"))

  def full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def write():
    sizes = {"rows_per_shard": 2, "flush_seconds": flush_seconds}
    with run_dir.shard_writer("problems", Problem, **sizes) as writer:
      for i in range(100):
        writer.add(_problem(i))
        time.sleep(0.01)

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(UserError, match="No space left on device") as error:
    write()
  assert str(run_dir.problems_dir) in str(error.value)
  assert "the same command goes on" in str(error.value)
  assert run_dir.keys("problems") == {"kept"}
  assert not list(tmp_path.rglob("*.tmp"))


def _write_a_bad_row_and_go_on(run_dir, added):
  bad = Problem("p", None, "2", None, "math", "s", None, "{}")  # type: ignore
  writer = run_dir.shard_writer("problems", Problem, flush_seconds=0.01)
  with writer as rows:
    rows.add(bad)
    for i in range(100):
      time.sleep(0.01)
      rows.add(_problem(i))
      added.append(i)


def test_a_failed_write_in_the_background_stops_who_adds_rows(tmp_path):
  added = []
  with pytest.raises(ValueError, match=r"Problem\.text is None"):
    _write_a_bad_row_and_go_on(RunDir(tmp_path), added)
  assert len(added) < 100


def test_repeated_keys_are_read_once_and_the_first_stays(tmp_path):
  run_dir = RunDir(tmp_path)
  for text in ("first", "second"):
    with run_dir.shard_writer("problems", Problem, rows_per_shard=1) as writer:
      writer.add(_problem("b", text))
      writer.add(_problem("a", text))
  rows = run_dir.read("problems", Problem)
  assert [(row.key, row.text) for row in rows] == [
    ("a", "first"),
    ("b", "first"),
  ]
  table = run_dir.table("problems", Problem, columns=["text"])
  assert table.to_pydict() == {"text": ["first", "first"]}


def test_more_text_than_one_array_holds_is_read(tmp_path, monkeypatch):
  # One buffer that every row shares: nothing of it is ever touched.
  size, data = (1 << 30) + 1, pa.py_buffer(bytes((1 << 30) + 1))
  offsets = pa.py_buffer(np.array([0, size], np.int32))
  text = pa.StringArray.from_buffers(1, offsets, data)

  def read_table(path, record_cls, columns):
    table = records.to_table([_problem(path.stem)], record_cls)
    column = table.schema.get_field_index("text")
    return table.set_column(column, table.field("text"), text).select(columns)

  run_dir = RunDir(tmp_path)
  run_dir.problems_dir.mkdir()
  for name in ("shard-c", "shard-a", "shard-b"):
    (run_dir.problems_dir / f"{name}.parquet").touch()
  monkeypatch.setattr(shards, "read_table", read_table)
  table = run_dir.table("problems", Problem)
  assert table["problem_id"].to_pylist() == ["shard-a", "shard-b", "shard-c"]
  assert table["text"].nbytes > 3 << 30
  assert table.schema.equals(records.schema(Problem), check_metadata=True)


def test_a_stage_without_rows_reads_as_empty(tmp_path):
  assert RunDir(tmp_path).read("rollout", records.Trajectory) == []
  assert RunDir(tmp_path).keys("rollout") == set()
  assert RunDir(tmp_path).read_rejected("rollout") == []
  assert RunDir(tmp_path).done("rollout") is None


def test_a_damaged_shard_and_a_foreign_one_are_named(tmp_path):
  run_dir = RunDir(tmp_path)
  with run_dir.shard_writer("problems", Problem) as writer:
    writer.add(_problem("p"))
  with pytest.raises(UserError, match="holds Problem version 1"):
    run_dir.read("problems", Rejected)
  (shard,) = run_dir.problems_dir.glob("*.parquet")
  shard.write_bytes(shard.read_bytes()[:-9])
  with pytest.raises(UserError, match=f"{shard.name} cannot be read"):
    run_dir.read("problems", Problem)


_HOLDER = """
import sys
from trd_jax.experiment.run_dir import RunDir
with RunDir(sys.argv[1]).lock('evaluate/base'):
  print('held', flush=True)
  sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
  run_dir = RunDir(tmp_path)
  command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
  pipe = subprocess.PIPE
  with subprocess.Popen(command, stdin=pipe, stdout=pipe) as holder:
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    writer = run_dir.shard_writer("evaluate/base", Problem)
    with pytest.raises(UserError, match=f"process {holder.pid} on .* is at"):
      writer.__enter__()
    with run_dir.lock("evaluate/trained"):
      pass
    holder.kill()
  # The kernel took the lock from the killed process.
  with run_dir.lock("evaluate/base"):
    second = subprocess.run(command, input=b"", capture_output=True)
  assert b"is at work on evaluate/base" in second.stderr
  third = subprocess.run(command, input=b"", capture_output=True)
  assert third.stdout == b"held\n"


def test_leaving_an_inner_lock_keeps_the_outer_one(tmp_path):
  with RunDir(tmp_path).lock("evaluate/base"):
    with RunDir(tmp_path).lock("evaluate/base"):
      pass
    command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    second = subprocess.run(command, input=b"", capture_output=True)
    assert b"is at work on evaluate/base" in second.stderr


def test_a_claim_holds_against_another_config_and_names_the_keys(tmp_path):
  run_dir = RunDir(tmp_path / "run")
  run_dir.claim(_config(method="trd"))
  run_dir.claim(_config(method="trd"))
  run_dir.mark_done("train", {})
  with pytest.raises(UserError) as error:
    run_dir.claim(_config(method="jsd", train={"epochs": 3}))
  told = str(error.value)
  assert 'method is "trd" there and "jsd" here' in told
  assert "train.epochs is 1 there and 3 here; train there depends on" in told
  assert str(run_dir.root) in told
  assert "\n" not in told
  assert json.loads(run_dir.config.read_text())["method"] == "trd"


# What a stage leaves, and a key of each kind with another value.
_LEFT = {
  "problems": "done.json",
  "models": "random-nano/model.safetensors",
  "evaluate/base": "shard-1.parquet",
  "rollout": "shard-1.parquet",
  "refine": "shard-1.parquet",
  "train": "checkpoints/50/_CHECKPOINT_METADATA",
  "merge": "adapter/adapter_model.safetensors",
  "evaluate/trained": "done.json",
}
_OTHER = {
  "data.limit": 7,
  "student.thinking": True,
  "rollout.temperature": 1.0,
  "teacher.path": "lab:student",
  "teacher.thinking": False,
  "refine.top_p": 0.5,
  "method": "jsd",
  "train.learning_rate": 1.0,
  "loss.beta": 0.3,
  "evaluate.root": "elsewhere",
  "evaluate.k": 3,
  "seed": 5,
}


@pytest.mark.parametrize(
  ("made", "free"),
  [
    ([], {*_OTHER}),
    (["problems"], {*_OTHER} - {"data.limit"}),
    (["models"], {*_OTHER} - {"seed"}),
    (
      ["problems", "rollout"],
      {"teacher.path", "teacher.thinking", "refine.top_p", "method"}
      | {"train.learning_rate", "loss.beta", "evaluate.root", "evaluate.k"},
    ),
    (
      ["evaluate/base"],
      {*_OTHER} - {"student.thinking", "evaluate.root", "evaluate.k", "seed"},
    ),
    (
      ["problems", "rollout", "refine"],
      {"teacher.thinking", "method", "train.learning_rate", "loss.beta"}
      | {"evaluate.root", "evaluate.k"},
    ),
    (["train"], {"evaluate.root", "evaluate.k"}),
    (["merge"], {"evaluate.root", "evaluate.k"}),
    (["evaluate/trained"], set()),
  ],
)
def test_a_key_is_free_until_something_was_made_with_it(tmp_path, made, free):
  for name, value in _OTHER.items():
    run_dir = RunDir(tmp_path / name)
    run_dir.claim(_config(regime="opd"))
    for stage in made:
      path = run_dir.stage(stage) / _LEFT[stage]
      path.parent.mkdir(parents=True)
      path.touch()
    before = run_dir.config.read_bytes()
    other = experiment.from_config({"regime": "opd", name: value})
    other = experiment.to_json(other)
    if name in free:
      assert run_dir.check(other)
      assert run_dir.config.read_bytes() == before
      assert run_dir.claim(other)
      assert run_dir.config.read_text() == other
      continue
    with pytest.raises(UserError, match=rf"{name} is .* there and") as error:
      run_dir.claim(other)
    assert any(f"{stage} there" in str(error.value) for stage in made)
    assert run_dir.config.read_bytes() == before


def test_reports_hold_no_key(tmp_path):
  run_dir = RunDir(tmp_path)
  run_dir.claim(_config())
  run_dir.write_rejected("train", [Rejected("p", "s", "train", "too long")])
  write_json(run_dir.preflight("rollout"), {})
  run_dir.metrics_file("train").write_text("{}\n")
  with run_dir.shard_writer("analyze/scores", Rejected) as writer:
    writer.add(Rejected("p", "s", "analyze/scores", "stands for a row"))
  assert run_dir.claim(_config(train={"epochs": 3}, rollout={"top_k": 1}))


def test_scores_hold_no_key_beside_the_rows_that_do(tmp_path):
  run_dir = RunDir(tmp_path)
  run_dir.claim(_config())
  for stage in ("rollout", "analyze/scores"):
    with run_dir.shard_writer(stage, Rejected) as writer:
      writer.add(Rejected("p", "s", stage, "stands for a row"))
  # What is in a report doesn't matter either.
  (shard,) = run_dir.stage("analyze/scores").glob("shard-*")
  shard.write_bytes(shard.read_bytes()[:-1])
  # A key of how a run is carried out, and one that nothing here depends on.
  assert not run_dir.claim(_config(mesh={"data": 1}))
  assert run_dir.claim(_config(train={"epochs": 3}))
  with pytest.raises(UserError, match="; rollout there depends on that"):
    run_dir.claim(_config(train={"epochs": 3}, rollout={"top_k": 1}))


def test_scores_alone_are_no_results_and_are_known_again(tmp_path):
  run_dir = RunDir(tmp_path)
  assert run_dir.claim(_config())
  with run_dir.shard_writer("analyze/scores", Rejected) as writer:
    writer.add(Rejected("p", "s", "analyze/scores", "stands for a row"))
  assert run_dir.abandon()
  assert not run_dir.config.exists()
  assert run_dir.keys("analyze/scores") == {"p"}
  assert run_dir.claim(_config(rollout={"top_k": 1}))


def test_problems_are_held_by_the_benchmarks_that_they_must_not_hold(tmp_path):
  for how, is_free in (("none", True), ("exact", False)):
    run_dir = RunDir(tmp_path / how)
    run_dir.claim(_config(data={"decontaminate": how}))
    run_dir.mark_done("problems", {})
    other = _config(data={"decontaminate": how}, evaluate={"root": "here"})
    if is_free:
      assert run_dir.claim(other)
      continue
    with pytest.raises(UserError, match=r"evaluate\.root .* problems there"):
      run_dir.claim(other)


def test_a_random_model_is_held_by_what_it_was_made_of(tmp_path):
  def config(student="random:nano", teacher="random:nano", tokenizer="t"):
    sides = {
      "student": {"path": student, "tokenizer": tokenizer},
      "teacher": {"path": teacher},
    }
    return _config(regime="opd", **sides)

  run_dir = RunDir(tmp_path, config(teacher="nowhere"))
  run_dir.mark_done("convert", {})
  assert run_dir.claim(config(teacher="elsewhere"))
  for other in (config(), config(student="mine"), config(tokenizer="u")):
    with pytest.raises(UserError, match="convert there depends"):
      run_dir.claim(other)


def test_an_unknown_key_holds_whatever_was_made(tmp_path):
  run_dir = RunDir(tmp_path, _config())
  newer = json.loads(run_dir.config.read_text()) | {"novel": {"key": 3}}
  _replace_config(run_dir, json.dumps(newer))
  assert run_dir.check(_config())
  run_dir.mark_done("evaluate/base", {})
  with pytest.raises(UserError, match=r"novel\.key is 3 there and null here"):
    run_dir.claim(_config())


def test_a_config_that_was_given_up_is_the_former_one_again(tmp_path):
  former = _config(train={"epochs": 2})
  RunDir(tmp_path, former).mark_done("rollout", {})
  run_dir = RunDir(tmp_path, _config(train={"epochs": 3}))
  run_dir.abandon()
  assert run_dir.config.read_text() == former
  run_dir = RunDir(tmp_path, _config(train={"epochs": 3}))
  run_dir.mark_done("train", {})
  run_dir.abandon()
  assert run_dir.config.read_text() == _config(train={"epochs": 3})


def test_nobodys_config_is_changed_while_he_is_at_work(tmp_path):
  RunDir(tmp_path, _config())
  command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
  pipe = subprocess.PIPE
  other = _config(train={"epochs": 3})
  with subprocess.Popen(command, stdin=pipe, stdout=pipe) as holder:
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=r"at work in .* train\.epochs is 1"):
      RunDir(tmp_path, other)
    RunDir(tmp_path, _config(mesh={"fsdp": 2}))
    holder.kill()
  # Who claimed it first and comes to a lock last finds another's config there.
  late = RunDir(tmp_path, _config())
  RunDir(tmp_path, other)
  with pytest.raises(UserError, match="by another config meanwhile"):
    late.lock("rollout").__enter__()
  with RunDir(tmp_path, other).lock("rollout"):
    pass


def test_keys_that_compute_nothing_may_differ(tmp_path):
  config = RunDir(tmp_path, _config()).config
  before = config.read_bytes()
  other = _config(
    engine={"jax": {"slots": 3}},
    mesh={"fsdp": 2},
    metrics={"tensorboard": True},
    python={"train": "python3.12"},
    train={"log_every": 5},
  )
  RunDir(tmp_path, other)
  assert config.read_bytes() == before


def test_a_config_from_before_a_key_existed_is_at_its_default(tmp_path):
  run_dir = RunDir(tmp_path, _config())
  older = json.loads(run_dir.config.read_text())
  del older["evaluate"]["root"]
  _replace_config(run_dir, json.dumps(older))
  run_dir.claim(_config())
  run_dir.mark_done("evaluate/base", {})
  with pytest.raises(UserError, match=r"evaluate\.root is null there"):
    run_dir.claim(_config(evaluate={"root": "elsewhere"}))


def test_a_workdir_that_cannot_be_one_is_reported(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="is a file, not a folder; name another"):
    RunDir(tmp_path / "file", _config())
  with pytest.raises(UserError, match="cannot be written"):
    RunDir(tmp_path / "file" / "below", _config())


def test_a_look_at_a_workdir_that_cannot_be_one_tells_it(tmp_path):
  (tmp_path / "file").write_text("")
  (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
  with pytest.raises(UserError, match="is a file, not a folder; name another"):
    RunDir(tmp_path / "file").check(_config())
  for name in ("file/below/it", "lost", "lost/below/it"):
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
      RunDir(tmp_path / name).check(_config())
  RunDir(tmp_path / "not" / "yet").check(_config())
  assert not (tmp_path / "not").exists()


_LOOK = """
import os, sys
from trd_jax.experiment import experiment
from trd_jax.experiment.run_dir import RunDir
if os.getuid() == 0:
  os.setuid(65534)  # root may write anywhere
RunDir(sys.argv[1]).check(experiment.to_json(experiment.from_config({})))
"""


def test_a_look_at_a_workdir_below_an_unwritable_folder_tells_it(tmp_path):
  locked = tmp_path / "locked"
  locked.mkdir(mode=0o555)
  for name in (".", "run", "below/it"):
    command = [sys.executable, "-c", _LOOK, str(locked / name)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert "cannot be written: Permission denied" in ended.stderr


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
  path = tmp_path / "summary.json"
  write_json(path, {"avg": 0.5, "name": "é"})
  with pytest.raises(ValueError, match="not JSON compliant"):
    write_json(path, {"avg": float("nan")})
  assert json.loads(path.read_text()) == {"avg": 0.5, "name": "é"}
  assert list(tmp_path.iterdir()) == [path]


def _write_half(path):
  with atomic_files.atomic_file(path) as file:
    file.write(b"half of the new")
    raise ZeroDivisionError


def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path):
  path = tmp_path / "file"
  path.write_bytes(b"old")
  with pytest.raises(ZeroDivisionError):
    _write_half(path)
  assert path.read_bytes() == b"old"
  assert list(tmp_path.iterdir()) == [path]


def test_writers_of_one_file_do_not_meet(tmp_path):
  """Also where they have one process id, as in two containers."""
  path = tmp_path / "file"
  with atomic_files.atomic_file(path) as slow:
    slow.write(b"slow, ")
    with atomic_files.atomic_file(path) as quick:
      quick.write(b"quick")
    assert path.read_bytes() == b"quick"
    slow.write(b"and whole")
  assert path.read_bytes() == b"slow, and whole"
  assert list(tmp_path.iterdir()) == [path]


def test_rejected_rows_are_kept_with_their_reasons(tmp_path):
  run_dir = RunDir(tmp_path)
  rows = [Rejected("p", "jsonl", "problems", "no answer")]
  run_dir.write_rejected("problems", rows)
  run_dir.write_rejected("problems", rows)
  assert run_dir.read_rejected("problems") == rows
  assert run_dir.keys("problems") == set()


def test_every_path_is_inside_the_directory(tmp_path):
  run_dir = RunDir(tmp_path)
  paths: list[Path] = [
    run_dir.problems_dir,
    run_dir.stage("evaluate/base"),
    run_dir.checkpoints,
    run_dir.adapter,
    run_dir.merged,
    run_dir.metrics_file("train"),
    run_dir.rejected("rollout"),
    run_dir.summary,
    run_dir.timings,
    run_dir.config,
    run_dir.model_folder_for_random("nano"),
  ]
  assert len(set(paths)) == len(paths)
  assert all(path.is_relative_to(tmp_path) for path in paths)
  for outside in ("../x", "/x", "a//b", "", "A"):
    with pytest.raises(ValueError, match="is no name"):
      run_dir.stage(outside)


def test_a_claim_under_which_nothing_was_made_can_be_given_up(tmp_path):
  run_dir = RunDir(tmp_path)
  assert run_dir.claim(_config(method="trd"))
  run_dir.mark_done("problems", {})
  with run_dir.lock("rollout"):
    run_dir.abandon()
  assert run_dir.done("problems") is None
  other = _config(rollout={"top_k": 1})
  assert run_dir.claim(other)
  assert not run_dir.claim(other)
  run_dir.mark_done("rollout", {})
  run_dir.abandon()
  with pytest.raises(UserError, match="made by another config"):
    run_dir.claim(_config(method="trd"))


def test_a_stage_copied_from_another_config_is_not_done_here(tmp_path):
  other = RunDir(tmp_path / "other", _config(rollout={"temperature": 0.7}))
  other.mark_done("rollout", {"samples": 3})
  other.mark_done("problems", {"problems": 3})
  here = RunDir(tmp_path / "here", _config())
  for stage in ("rollout", "problems"):
    shutil.copytree(other.stage(stage), here.stage(stage))
  # Problems don't depend on what differs.
  assert here.done("problems") == {"problems": 3}
  assert here.finished("rollout")
  with pytest.raises(UserError) as it:
    here.done("rollout")
  message = str(it.value)
  assert "here/rollout/done.json is not of this run" in message
  assert "rollout.temperature is 0.7 there and 0.6 here" in message
  assert "move" in message
  assert "name another --workdir" in message
  # Where it was made it stays what it was, without what it was made by.
  assert other.done("rollout") == {"samples": 3}


def test_a_stage_of_a_version_that_left_no_keys_is_the_directorys(tmp_path):
  run_dir = RunDir(tmp_path, _config(rollout={"temperature": 0.7}))
  write_json(run_dir.stage("rollout") / "done.json", {"samples": 3})
  assert run_dir.done("rollout") == {"samples": 3}
  assert run_dir.made_by("rollout")["rollout.temperature"] == 0.7


def test_how_a_stage_was_carried_out_may_differ(tmp_path):
  run_dir = RunDir(tmp_path, _config(method="forward_kl"))
  run_dir.mark_done("train", {"updates": 3})
  # One point by its other name, and a key that changes no number.
  same = {
    "method": "trd",
    "trajectory": "y_o",
    "teacher_context": "x_reference",
  }
  _replace_config(run_dir, _config(**same, train={"pack_tokens": 4096}))
  assert run_dir.done("train") == {"updates": 3}
  _replace_config(run_dir, _config(**same, train={"learning_rate": 1.0}))
  with pytest.raises(UserError, match=r"train\.learning_rate"):
    run_dir.done("train")


def test_what_a_round_takes_over_is_its_own_and_the_donor_s_stays(tmp_path):
  first, second = RunDir(tmp_path / "run"), RunDir(tmp_path / "run/rounds/2")
  config = experiment.default_config()
  first.claim(experiment.to_json(experiment.from_config(config)))
  first.mark_done("evaluate/base", {"b": 1})
  config.student.path = "another"
  second.claim(experiment.to_json(experiment.from_config(config)))
  assert second.adopt("evaluate/base", first)
  with pytest.raises(UserError, match="is not of this run"):
    second.done("evaluate/base")
  second.forget_keys("evaluate/base")
  assert second.done("evaluate/base") == {"b": 1}
  assert first.made_by("evaluate/base")["student.path"] == "lab:student"


def test_a_config_that_was_damaged_is_told_from_another_one(tmp_path):
  text = _config()
  here = RunDir(tmp_path / "run", text)
  here.mark_done("rollout", {"samples": 0})
  former = here.config.read_bytes()
  # One digit of a value: still a config, of nobody.
  here.config.write_bytes(former.replace(b"0.95", b"0.15", 1))
  assert here.config.read_bytes() != former
  with pytest.raises(UserError, match=r"config\.json is damaged or was edited"):
    RunDir(here.root, text)
  here.config.unlink()
  # Nothing is written where it is only looked at.
  RunDir(here.root).check(text)
  assert not here.config.exists()
  other = _config(rollout={"temperature": 0.1})
  with pytest.raises(UserError, match=r"temperature is 0.6 there and 0.1 here"):
    RunDir(here.root, other)
  RunDir(here.root, text)
  assert here.config.read_bytes() == former


def test_a_change_of_config_that_was_killed_midway_goes_on(tmp_path):
  first = _config()
  second = _config(evaluate={"k": 3})
  here = RunDir(tmp_path / "run", first)
  here.mark_done("rollout", {"samples": 0})
  before = here.config.read_bytes()
  RunDir(here.root, second)
  # The copy is written first, so that this is how a kill may leave it.
  here.config.write_bytes(before)
  for text in (first, second):
    assert RunDir(here.root, text).config.read_text() == text


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"config": 3}'])
def test_a_copy_that_says_nothing_is_no_hindrance(content, tmp_path):
  text = _config()
  here = RunDir(tmp_path / "run", text)
  copy = here.root / "locks" / "config.json"
  assert copy.exists()
  copy.write_bytes(content)
  RunDir(here.root, text)
  # It may be somebody's.
  assert copy.read_bytes() == content
