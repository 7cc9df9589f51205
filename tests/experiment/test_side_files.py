"""A damaged side file is a line that names it, and costs no finished result."""

import dataclasses
import json
import types

import pytest

from trd_jax import merge, sweep
from trd_jax.experiment import experiment, metric_log
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files.json_files import read_json
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.sweep_points import Point
from trd_jax.pipeline import pipeline, rounds

DAMAGES = {
  "empty": b"",
  "torn": b'{"benchmarks": {"a": {"ba',
  "blank": b"\n\n",
  "zeros": bytes(512),
  "binary": bytes(range(256)) * 4,
  "no text": b'{"stage": "\xff\xfe", "seconds": 1}\n',
  "a list": b"[1, 2]\n",
  "null": b"null\n",
  "a number": b"7\n",
  "a text": b'"method student"\n',
  "deep": 100_000 * b"[" + b"\n",
  "deep objects": 50_000 * b'{"a":' + b"\n",
  "huge": b'{"stage": "a", "seconds": ' + 5000 * b"9" + b"}\n",
  "large": b'{"stage": "a", "seconds": ' + 400 * b"9" + b"}\n",
  "not a number": b'{"stage": "a", "seconds": NaN, "step": 0}\n',
  "infinite": b'{"stage": "a", "seconds": -Infinity}\n',
  "twice": b'{"stage": "a", "stage": "b", "seconds": 1, "step": 0}\n',
  "wrong types": b'{"stage": [], "seconds": {}, "finished": [], "step": "0"}\n',
  "other keys": b'{"benchmarks": [{}], "best": "1", "rounds": 3}\n',
  "more of it": b'{"method": 3, "student": [], "benchmarks": {"a": 3}}\n',
  "two": b'{"stage": "a", "seconds": 1}{"stage": "a", "seconds": 1}\n',
}


def each_damage(function):
  return pytest.mark.parametrize(
    "damage", DAMAGES.values(), ids=DAMAGES.keys()
  )(function)


def refused(read, path):
  """Calls a reader, which may find sense in the file or says one line."""
  said = None
  try:
    read()
  except UserError as error:
    said = str(error)
  if said is not None:
    assert str(path) in said
    assert "\n" not in said
    remedies = ("move", "remove", "put a copy", "name ", "run its stage")
    assert any(remedy in said for remedy in remedies), said


@each_damage
def test_seconds_that_can_t_be_read_stop_nothing(tmp_path, capsys, damage):
  path = tmp_path / "timings.jsonl"
  with metric_log.timed(path, "rollout"):
    pass
  good = metric_log.seconds_by_stage(path)
  path.write_bytes(path.read_bytes() + damage)
  found = metric_log.seconds_by_stage(path)
  assert found.items() >= good.items()
  note = capsys.readouterr().out
  assert note.count("\n") <= 1
  if damage.endswith(b"\n"):
    assert note.startswith(f"note: {path}: ")
    assert "move the file away" in note
  # What is written after it counts.
  with metric_log.timed(path, "merge"):
    pass
  if damage.endswith(b"\n") or not damage:
    assert "merge" in metric_log.seconds_by_stage(path)


@each_damage
def test_metrics_of_steps_are_refused_by_name(tmp_path, capsys, damage):
  path = tmp_path / "train" / "metrics.jsonl"
  path.parent.mkdir()
  path.write_bytes(damage)

  def read():
    metric_log.MetricWriter(path, 0).close()

  refused(read, path)
  # A merge needs them only for what it says of a training that never moved.
  path.write_bytes(damage)
  assert merge._without_update(merge._metrics(RunDir(tmp_path))) is False
  assert capsys.readouterr().out.count("\n") <= 1


@each_damage
def test_what_a_round_or_a_point_found_is_refused_by_name(tmp_path, damage):
  chosen = experiment.Experiment()
  run_dir = RunDir(tmp_path)
  run_dir.summary.write_bytes(damage)
  refused(lambda: list(rounds.figures(run_dir, 1)), run_dir.summary)
  own = RunDir(tmp_path / "points" / "a")
  own.summary.parent.mkdir(parents=True)
  own.summary.write_bytes(damage)
  point = Point("a", {})
  plan = types.SimpleNamespace(point=point, experiment=chosen)
  refused(lambda: sweep.collect([plan], run_dir), own.summary)


@each_damage
def test_the_config_of_a_run_is_refused_by_name(tmp_path, damage):
  text = experiment.to_json(experiment.Experiment())
  run_dir = RunDir(tmp_path, text)
  run_dir.mark_done("rollout", {"samples": 0})
  copy = tmp_path / "locks" / "config.json"
  for said in ("was edited: remove it", "put a copy of it back"):
    run_dir.config.write_bytes(damage)
    with pytest.raises(UserError, match=r"config\.json") as told:
      RunDir(tmp_path).claim(text)
    assert "\n" not in str(told.value)
    assert said in str(told.value)
    # As of an earlier version, which kept none.
    copy.unlink(missing_ok=True)
  run_dir.config.write_text(text)
  assert RunDir(tmp_path).claim(text) is False
  assert RunDir(tmp_path).done("rollout") == {"samples": 0}


@each_damage
def test_a_lock_of_a_run_is_refused_by_name_or_taken(tmp_path, damage):
  run_dir = RunDir(tmp_path)
  path = tmp_path / "locks" / "rollout.lock"
  path.parent.mkdir()
  path.write_bytes(damage)

  def lock():
    with run_dir.lock("rollout"):
      pass

  refused(lock, path)


@each_damage
def test_json_that_a_stage_wrote_is_an_object_or_refused(tmp_path, damage):
  path = tmp_path / "index.json"
  path.write_bytes(damage)
  refused(lambda: read_json(path), path)


def test_a_folder_in_the_place_of_a_file_is_refused_by_name(tmp_path, capsys):
  for name in ("summary.json", "metrics.jsonl", "timings.jsonl"):
    (tmp_path / name).mkdir()
  path = tmp_path / "summary.json"
  refused(lambda: read_json(path), path)
  path = tmp_path / "metrics.jsonl"
  refused(lambda: metric_log.read_metrics(path), path)
  assert metric_log.seconds_by_stage(tmp_path / "timings.jsonl") == {}
  assert capsys.readouterr().out.startswith("note: ")


def test_a_finished_pipeline_is_summed_up_beside_damaged_timings(
  tmp_path, capsys
):
  chosen = experiment.Experiment()
  run_dir = RunDir(tmp_path)
  for stage in chosen.stages:
    run_dir.mark_done(stage, {"samples": 0})
  for side in ("evaluate/base", "evaluate/trained"):
    run_dir.mark_done(side, {})
  run_dir.timings.write_bytes(bytes(100) + b"\n")
  evaluate = dataclasses.replace(chosen.evaluate, benchmarks=())
  nothing = dataclasses.replace(chosen, evaluate=evaluate)
  summary = pipeline.summarise(nothing, run_dir)
  assert summary["seconds"] == {}
  assert "note: " in capsys.readouterr().out
  assert json.dumps(summary)
