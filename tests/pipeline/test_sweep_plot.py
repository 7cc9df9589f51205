"""What a sweep found: collected, as a table and as a figure."""

import pytest
from matplotlib import figure

from tests.support.places import ROOT
from trd_jax import sweep
from trd_jax.experiment import config_file, experiment
from trd_jax.experiment.files.json_files import write_json
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.sweep_points import point, product
from trd_jax.pipeline import sweep_plot


@pytest.fixture
def base():
  return experiment.from_config(config_file.load(f"{ROOT}/configs/demo.py")[0])


def _figures(avg, k=2):
  metrics = {
    metric: {metric: avg, f"{metric}_interval": [avg - 0.1, avg + 0.1]}
    for metric in ("avg_at_k", "pass_at_k")
  }
  return {"k": k, "n": 4, **metrics["avg_at_k"], **metrics["pass_at_k"]}


def _summarised(where, avg, **more):
  sides = {"base": 0.2, "trained": avg, "paired_difference": avg - 0.2}
  pair = {side: _figures(share) for side, share in sides.items()} | more
  write_json(where.summary, {"benchmarks": {"arithmetic": pair}})


@pytest.fixture
def three(base, tmp_path):
  """Points of one, two and three rounds, the last in its third round."""
  run_dir = RunDir(tmp_path / "sweep")
  points = product({"pipeline.rounds": [1, 2, 3]})
  for one, best in zip(points, [1, 2, None], strict=True):
    where = sweep._folder(run_dir, one)
    for number, avg in ((1, 0.3), (2, 0.5)):
      _summarised(where.round(number), avg)
    if best:
      rows = [{"round": number} for number in range(1, best + 1)]
      write_json(where.rounds, {"rounds": rows, "best": best})
  return sweep.plan(base, points, "s.py"), run_dir


def test_split_rounds_show_their_end(base, tmp_path):
  run_dir = RunDir(tmp_path / "sweep")
  points = [point("split", {"pipeline.rounds": 3, "pipeline.split": True})]
  plans = sweep.plan(base, points, "s.py")
  where = sweep._folder(run_dir, points[0])
  write_json(where.rounds, {"rounds": [{}, {}, {}], "best": 1})
  assert not sweep.collect(plans, run_dir)  # its later rounds are to come
  _summarised(where, 0.5)
  (row,) = sweep.collect(plans, run_dir)
  assert row["trained"]["avg_at_k"] == 0.5


def test_a_point_shows_its_best_round_once_all_are_done(three):
  rows = sweep.collect(*three)
  assert [(r["point"], r["round"], r["rounds"]) for r in rows] == [
    ("rounds=1", 1, 1),
    ("rounds=2", 2, 2),
  ]
  assert [row["trained"]["avg_at_k"] for row in rows] == [0.3, 0.5]
  assert rows[1]["paired_difference"]["avg_at_k"] == pytest.approx(0.3)
  assert sweep_plot.table(rows).splitlines()[3:] == [
    "arithmetic (n=4)           Avg@2               Pass@2",
    "  rounds=1                  30.0 [20.0, 40.0]   30.0 [20.0, 40.0]",
    "* rounds=2 (round 2 of 2)   50.0 [40.0, 60.0]   50.0 [40.0, 60.0]",
    "  (base)                    20.0 [10.0, 30.0]   20.0 [10.0, 30.0]",
  ]


def test_two_thinking_modes_stand_apart(base, tmp_path):
  run_dir = RunDir(tmp_path / "sweep")
  points = product({"evaluate.thinking": [True, False, None], "seed": [0, 1]})
  for one, avg in zip(points, (0.3, 0.4, 0.5, 0.6, 0.7, 0.8), strict=True):
    where = sweep._folder(run_dir, one)
    mode = one.values["evaluate.thinking"]
    _summarised(where, avg, **({} if mode is None else {"thinking": mode}))
  rows = sweep.collect(sweep.plan(base, points, "s.py"), run_dir)
  blocks = sweep_plot.table(rows).split("\n\n")[1:]
  assert [block.split("  ")[0].strip() for block in blocks] == [
    "arithmetic (n=4), thinking on",
    "arithmetic (n=4), thinking off",
    "arithmetic (n=4)",
  ]
  for block in blocks:
    assert block.count("*") == block.count("(base)") == 1
    assert block.count("seed=") == 2
  path = tmp_path / "sweep.svg"
  sweep_plot.plot(rows, path)
  assert "thinking on, Avg@2" in path.read_text()


def test_a_figure_is_whole_at_any_moment(three, tmp_path, monkeypatch):
  rows, path = sweep.collect(*three), tmp_path / "sweep.svg"
  sweep_plot.plot(rows, path)
  before = path.read_text()
  assert "rounds=2 (round 2 of 2)" in before

  def killed(self, file, **_):
    file.write(b"<svg") if hasattr(file, "write") else file.write_text("<svg")
    raise KeyboardInterrupt

  monkeypatch.setattr(figure.Figure, "savefig", killed)
  with pytest.raises(KeyboardInterrupt):
    sweep_plot.plot(rows, path)
  assert path.read_text() == before
