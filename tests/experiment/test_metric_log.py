import io
import itertools
import json
import re

import numpy as np
import pytest

from trd_jax.experiment import metric_log, progress
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.metric_log import MetricWriter, read_metrics
from trd_jax.experiment.progress import Progress


def _write(path, steps, start_step=0, mark=""):
  with MetricWriter(path, start_step) as writer:
    for step in steps:
      writer.write(step, {"loss": 1 / (step + 1), "mark": mark})


def test_a_resumed_file_is_the_uninterrupted_one(tmp_path):
  whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
  _write(whole, range(10))
  # Killed in the middle of a line at step 7; the last checkpoint was step 4.
  _write(resumed, range(7), mark="")
  with resumed.open("ab") as file:
    file.write(b'{"step": 7, "lo')
  _write(resumed, range(4, 10), start_step=4)
  assert resumed.read_bytes() == whole.read_bytes()


def test_rows_from_the_restart_on_are_those_of_the_restart(tmp_path):
  path = tmp_path / "metrics.jsonl"
  _write(path, range(6), mark="old")
  _write(path, range(3, 5), start_step=3, mark="new")
  rows = [(row["step"], row["mark"]) for row in read_metrics(path)]
  assert rows == [(0, "old"), (1, "old"), (2, "old"), (3, "new"), (4, "new")]


def test_a_row_can_be_read_as_soon_as_it_is_written(tmp_path):
  path = tmp_path / "metrics.jsonl"
  writer = MetricWriter(path)
  writer.write(0, {"loss": 0.5})
  assert read_metrics(path) == [{"step": 0, "loss": 0.5}]
  writer.close()


def test_scalars_of_any_make_are_strict_json(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with MetricWriter(path) as writer:
    writer.write(
      np.int64(3),
      {
        "array": np.float32(0.5),
        "count": np.int64(2),
        "nan": float("nan"),
        "inf": np.array(np.inf),
        "none": None,
      },
    )
  (line,) = path.read_text().splitlines()

  def refuse(constant):
    raise AssertionError(constant)

  assert json.loads(line, parse_constant=refuse) == {
    "step": 3,
    "array": 0.5,
    "count": 2,
    "nan": None,
    "inf": None,
    "none": None,
  }


class _Terminal(io.StringIO):
  def isatty(self):
    return True


class _Clock:
  now = 0.0

  def __call__(self):
    return self.now


def test_progress_tells_rate_and_remaining_time_of_this_process():
  clock = _Clock()
  bar = Progress(
    100, "rollout", "rows", initial=40, stream=io.StringIO(), clock=clock
  )
  clock.now = 2.0
  bar.update(10)
  clock.now = 5.0
  bar.update(10)
  # 20 rows in 5 s; 40 are left. What was there before counts as done only.
  line = bar.line(clock.now)
  assert "60/100 rows (60%)" in line
  assert "4.0 rows/s" in line
  assert "10.0 s left" in line


def test_progress_guesses_no_time_from_the_first_unit_alone():
  clock = _Clock()
  bar = Progress(100, "train", "updates", stream=io.StringIO(), clock=clock)
  assert "left" not in bar.line(clock.now)
  clock.now = 30.0  # of which the compiler took 29
  bar.update()
  assert "1/100 updates (1%)" in bar.line(clock.now)
  assert "left" not in bar.line(clock.now)
  for _ in range(29):
    clock.now += 1.0
    bar.update()
    assert "left" not in bar.line(clock.now)
  clock.now += 1.0
  bar.update()
  assert "2:14 min left" in bar.line(clock.now)  # 69 at 31 in 60 s


def test_progress_takes_no_units_for_no_first_unit():
  clock = _Clock()
  bar = Progress(100, "grade", "samples", stream=io.StringIO(), clock=clock)
  clock.now = 1.0
  bar.update(0)
  clock.now = 30.0
  bar.update()
  assert "left" not in bar.line(clock.now)
  clock.now = 60.0
  bar.update()
  assert "49:00 min left" in bar.line(clock.now)  # 98 at 2 in 60 s


def test_progress_in_a_log_is_a_line_every_ten_seconds_and_at_the_end():
  clock, stream = _Clock(), io.StringIO()
  with Progress(240, "train", "steps", stream=stream, clock=clock) as bar:
    for _ in range(240):
      clock.now += 0.125
      bar.update(note="loss 0.5")
  lines = stream.getvalue().splitlines()
  assert "\r" not in stream.getvalue()
  counts = [line.split()[1] for line in lines]
  assert counts == ["80/240", "160/240", "240/240"]
  assert lines[0] == (
    "train: 80/240 steps (33%) · 8.0 steps/s · 20.0 s left · loss 0.5"
  )
  assert lines[-1].endswith(" · took 30.0 s · loss 0.5")


def test_progress_on_a_terminal_redraws_one_line(monkeypatch):
  monkeypatch.setenv("COLUMNS", "120")
  clock, stream = _Clock(), _Terminal()
  with Progress(4, "merge", "shards", stream=stream, clock=clock) as bar:
    for note in ("a long note", "a long note", "short", "short"):
      clock.now += 1.0
      bar.update(note=note)
  drawn = stream.getvalue()
  assert drawn.count("\n") == 1
  assert drawn.endswith("\n")
  pictures = drawn.strip().split("\r")
  assert len(pictures) == 6  # before, after each shard, at the end
  assert "····" in pictures[0]
  assert "·" * 2 not in pictures[-1]
  # A shorter picture leaves nothing of a longer one behind.
  for before, after in itertools.pairwise(pictures):
    assert len(after) >= len(before.rstrip())


def test_on_a_narrow_terminal_the_bar_goes_before_a_number(monkeypatch):
  drawn = {}
  for columns in (99, 120):
    monkeypatch.setenv("COLUMNS", str(columns))
    clock, stream = _Clock(), _Terminal()
    with Progress(4, "train", "updates", stream=stream, clock=clock) as bar:
      for _ in range(4):
        clock.now += 1.0
        bar.update(note="loss 0.0482, D 0.0486, lr 0.001")
    drawn[columns] = stream.getvalue().strip().split("\r")[-1]
  assert "█" in drawn[120]
  assert "█" not in drawn[99]
  assert all("lr 0.001" in line for line in drawn.values())


def test_a_line_between_two_pictures_of_a_bar_stands_alone(monkeypatch, capsys):
  monkeypatch.setenv("COLUMNS", "60")
  clock, stream = _Clock(), _Terminal()
  # Both go to one screen.
  monkeypatch.setattr("sys.stdout", stream)
  with Progress(2, "train", "updates", stream=stream, clock=clock) as bar:
    clock.now += 1.0
    bar.update()
    bar.say("train: alarm")
    clock.now += 1.0
    bar.update()
  screen = [""]
  for part in re.split(r"(\r|\n)", stream.getvalue()):
    if part == "\n":
      screen.append("")
    elif part != "\r":
      screen[-1] = part + screen[-1][len(part) :]
  assert [line.strip() for line in screen[:1]] == ["train: alarm"]
  assert "2/2 updates" in screen[1]
  # In a log it is a line among lines.
  monkeypatch.undo()
  log = io.StringIO()
  with Progress(1, "train", stream=log, clock=_Clock()) as bar:
    bar.say("train: alarm")
  assert capsys.readouterr().out == "train: alarm\n"


@pytest.mark.parametrize("total", [0, None])
def test_progress_over_nothing_or_over_nobody_knows_how_much(total):
  stream = io.StringIO()
  with Progress(total, "read", stream=stream, clock=_Clock()):
    pass
  assert re.match(r"read: 0(/0)? rows", stream.getvalue())


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0, "0.0 s"),
    (59.94, "59.9 s"),
    (59.96, "1:00 min"),
    (187, "3:07 min"),
    (3599.6, "1:00 h"),
    (7500, "2:05 h"),
    (90000, "25:00 h"),
  ],
)
def test_durations_are_for_a_person(seconds, text):
  assert progress.duration(seconds) == text


def test_seconds_add_up_over_processes_and_stopped_ones_apart(tmp_path):
  path = tmp_path / "timings.jsonl"
  with pytest.raises(ZeroDivisionError), metric_log.timed(path, "rollout"):
    raise ZeroDivisionError
  for stage in ("rollout", "train"):
    with metric_log.timed(path, stage):
      pass
  rows = read_metrics(path)
  assert [row["stage"] for row in rows] == ["rollout", "rollout", "train"]
  assert all(row["seconds"] >= 0 for row in rows)
  assert [row["finished"] for row in rows] == [False, True, True]
  with path.open("a") as file:
    file.write('{"stage": "train", "seconds": 2000.5}\n' * 2)
    stopped = {"stage": "rollout", "seconds": 70.5, "finished": False}
    file.write(json.dumps(stopped) + "\n")
  sums = metric_log.seconds_by_stage(path)
  assert list(sums) == ["rollout, stopped", "rollout", "train"]
  assert 4001 <= sums["train"] < 4002
  assert 70.5 <= sums["rollout, stopped"] < 71
  assert sums["rollout"] < 1


@pytest.mark.parametrize(
  ("rows", "told"),
  [
    ('{"step": "0"}\n', 'line 1: its step is "0", and has to be a whole'),
    ('{"step": 0}\n{"step": 1.0}\n', "line 2: its step is 1.0, and"),
    ('{"step": 0}\n{"step": true}\n', "line 2: its step is true, and"),
    ('{"step": null}\n', "line 1: its step is null, and"),
    ('{"step": -1}\n', "line 1: its step is -1, and"),
    (
      '{"step": 3}\n{"step": 3}\n',
      "step is 3, and has to be a whole number above 3,",
    ),
    ('{"step": 3}\n{"step": 2}\n', "step is 2, and has to be a whole number"),
    ('{"step": 3, "step": 4}\n', "line 1, is no row of trd-jax's"),
    (f'{{"step": {[0] * 99}}}\n', "line 1: its step is [0, 0, 0,"),
  ],
)
def test_a_step_that_is_none_is_refused_by_its_line(tmp_path, rows, told):
  path = tmp_path / "metrics.jsonl"
  path.write_text(rows)
  for read in (metric_log.read_metrics, MetricWriter):
    with pytest.raises(UserError) as caught:
      read(path)
    (line,) = caught.value.messages
    assert told in line
    assert len(line) < len(str(path)) + 200
  assert path.read_text() == rows


def test_a_metric_that_is_named_step_is_refused(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with MetricWriter(path) as writer:
    with pytest.raises(UserError, match="a metric is named step"):
      writer.write(0, {"step": 0.5, "loss": 1.0})
    writer.write(0, {"loss": 1.0})
  assert metric_log.read_metrics(path) == [{"step": 0, "loss": 1.0}]


@pytest.mark.parametrize(
  "content", [b"my notes\n", b"[1, 2]\n", b'{"note": "my own table"}\n']
)
def test_a_file_of_a_user_s_is_not_replaced(tmp_path, content):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(content)
  with pytest.raises(UserError, match="move the file away"):
    MetricWriter(path)
  assert path.read_bytes() == content
