"""A run that the disk has no room for is refused before it generates."""

import dataclasses

import pytest

from tests.support import stage_runs
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.run_dir import RunDir
from trd_jax.pipeline import dry_run, pipeline


def looked_at(monkeypatch, run_dir, free, done=(), **changes):
  e = stage_runs.chosen(**changes)
  monkeypatch.setattr(dry_run, "free_bytes", lambda path: free)
  planned = [
    (account, [module], "done before" if account in done else None)
    for account, module, _ in pipeline.commands(e)
  ]
  return next(iter(dry_run.check_room(e, run_dir, planned)), None)


def most(run_dir, **changes):
  e = stage_runs.chosen(**changes)
  return sum(size or 0 for _, size, _ in dry_run.disk(e, run_dir))


def test_there_is_room(monkeypatch, tmp_path):
  run_dir = RunDir(tmp_path)
  assert looked_at(monkeypatch, run_dir, most(run_dir)) is None


def test_a_little_less_than_the_most_is_a_note(monkeypatch, tmp_path):
  run_dir = RunDir(tmp_path)
  note = looked_at(monkeypatch, run_dir, int(0.9 * most(run_dir)))
  assert note.startswith(f"{tmp_path}: ")
  assert "may write up to" in note
  assert "make room, name a --workdir elsewhere" in note


def test_less_than_the_least_is_refused_with_figures_and_keys(
  monkeypatch, tmp_path
):
  run_dir = RunDir(tmp_path)
  with pytest.raises(UserError, match="are free there, and this") as told:
    looked_at(monkeypatch, run_dir, 2**20, **{"train.keep_checkpoints": 9})
  message = str(told.value)
  assert "1.0 MiB are free there" in message
  assert "needs at least" in message
  assert "engine.weights=adapter" in message
  assert "\n" not in message
  # The keys that it names help.
  assert "train.keep_checkpoints" in message or "evaluate.k" in message


def test_what_is_there_or_done_needs_no_room(monkeypatch, tmp_path):
  run_dir = RunDir(tmp_path)
  accounts = [account for account, *_ in pipeline.commands(stage_runs.chosen())]
  assert looked_at(monkeypatch, run_dir, 0, done=accounts) is None
  with pytest.raises(UserError):
    looked_at(monkeypatch, run_dir, 0, done=accounts[:-2])
  # A stage that was stopped has a part of what it will write.
  rest = [account for account in accounts if account != "train"]
  size = most(run_dir)
  (run_dir.stage("train")).mkdir()
  (run_dir.stage("train") / "part").write_bytes(bytes(size))
  assert looked_at(monkeypatch, run_dir, 0, done=rest) is None


def test_what_is_not_known_is_no_obstacle(monkeypatch, tmp_path):
  e = stage_runs.chosen()
  student = dataclasses.replace(e.student, path="somebody/model")
  e = dataclasses.replace(e, student=student)
  monkeypatch.setattr(dry_run, "free_bytes", lambda path: 2**40)
  planned = [("train", ["train"], None), ("merge", ["merge"], None)]
  assert dry_run.check_room(e, RunDir(tmp_path), planned) == []


def two_disks(monkeypatch, free, *elsewhere):
  """Has folders, and what is in them, be on another disk than all else."""

  def name(path):
    path = path.absolute()
    return any(path.is_relative_to(folder) for folder in elsewhere)

  monkeypatch.setattr(dry_run, "_device", name)
  monkeypatch.setattr(dry_run, "free_bytes", lambda path: free[name(path)])


@pytest.mark.parametrize("stage", ["train", "teacher_cache"])
def test_a_stages_own_disk_is_looked_at(monkeypatch, tmp_path, stage):
  cache = tmp_path / "big" / "cache"
  run_dir = RunDir(tmp_path / "run")
  run_dir.root.mkdir()
  e = stage_runs.chosen(
    **{"train.teacher": "hidden_cache", "train.cache_dir": str(cache)}
  )
  place = cache if stage == "teacher_cache" else run_dir.stage(stage)
  planned = [(name, [m], None) for name, m, _ in pipeline.commands(e)]
  sizes = {name: size for name, size, _ in dry_run.disk(e, run_dir)}
  rest = sum(sizes.values()) - sizes[stage]

  def told(here, there):
    two_disks(monkeypatch, {False: here, True: there}, place)
    return dry_run.check_room(e, run_dir, planned)

  assert told(rest, sizes[stage]) == []
  (note,) = told(rest, sizes[stage] - 1)
  assert note.startswith(f"{place}: ")
  (note,) = told(rest - 1, sizes[stage])
  assert note.startswith(f"{run_dir.root}: ")
  assert len(told(rest - 1, sizes[stage] - 1)) == 2
  with pytest.raises(UserError) as refused:
    told(rest, 0)
  message = str(refused.value)
  assert message.startswith(
    f"{place}: 0.0 MiB are free there, and this run needs"
  )
  remedy = "name a train.cache_dir elsewhere"
  if stage != "teacher_cache":
    remedy = f"have {place} lead elsewhere"
  assert f"make room, {remedy}, or lower what takes most: {stage} " in message
  # The dry run says it of each disk, too.
  text = dry_run.describe(e, run_dir, planned)
  assert text.count("where ") == 2
  assert f"where {place} is\n  WARNING: " in text
  # What lies there already is no more to be written.
  place.mkdir(parents=True)
  (place / "part").write_bytes(bytes(sizes[stage]))
  assert told(rest, 0) == []


def test_a_cache_on_the_workdirs_disk_counts_there(monkeypatch, tmp_path):
  here = {"train.teacher": "hidden_cache"}
  there = {**here, "train.cache_dir": str(tmp_path / "cache")}
  run_dir = RunDir(tmp_path / "run")
  size = most(run_dir, **here)
  for keys in (here, there):
    assert looked_at(monkeypatch, run_dir, size, **keys) is None
    note = looked_at(monkeypatch, run_dir, size - 1, **keys)
    assert note.startswith(f"{run_dir.root}: ")


def test_what_a_link_leads_to_has_its_own_disk(tmp_path):
  run_dir = RunDir(tmp_path / "run")
  run_dir.root.mkdir()
  e = stage_runs.chosen()
  assert list(dry_run.by_disk(e, run_dir, [])) == [run_dir.root]
  run_dir.stage("train").symlink_to("/dev/shm")  # a file system of its own
  disks = dry_run.by_disk(e, run_dir, [])
  assert list(disks) == [run_dir.root, run_dir.stage("train")]
  assert disks[run_dir.stage("train")].keys() == {"train"}


def test_a_pipeline_is_refused_before_its_first_stage(monkeypatch, tmp_path):
  started = []
  monkeypatch.setattr(dry_run, "free_bytes", lambda path: 0)
  monkeypatch.setattr(pipeline, "_start", lambda *_: started.append(1))
  from trd_jax.experiment import cli

  with pytest.raises(SystemExit) as ended:
    cli.main(
      "pipeline",
      pipeline.run,
      "",
      pipeline.FLAGS,
      argv=[
        "--config=configs/demo.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.data.arithmetic.num_problems=16",
      ],
    )
  assert ended.value.code == 2
  assert not started
  assert not (tmp_path / "run" / "config.json").exists()
