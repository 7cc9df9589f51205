"""Sweeps: the points, what they share, and a real one of two by two."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.support import processes
from tests.support.devices import xla_flags
from tests.support.places import ROOT
from trd_jax import sweep
from trd_jax.experiment import config_file, experiment, sweep_points
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.sweep_points import point, product, zipped

pytestmark = pytest.mark.multiprocess

SMALL = (
  "--config.data.arithmetic.num_problems=16",
  "--config.train.batch_size=8",
  "--config.evaluate.benchmarks=arithmetic",
  "--config.evaluate.num_problems=4",
  "--config.evaluate.k=2",
)


def _run(workdir, *flags, points="configs/sweeps/demo.py"):
  """Runs a sweep; on one device, whose programs compile in half the time."""
  return subprocess.run(
    [
      *(sys.executable, "-m", "tests.support.one_process", "sweep"),
      "--config=configs/demo.py",
      *(f"--sweep={points}", f"--workdir={workdir}", *SMALL, *flags),
    ],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": xla_flags(1)},
    capture_output=True,
    text=True,
  )


@pytest.fixture
def base():
  return experiment.from_config(config_file.load(f"{ROOT}/configs/demo.py")[0])


def _donors(base, points):
  return [dict(one.donors) for one in sweep.plan(base, points, "s.py")]


# --- points ------------------------------------------------------------------


def test_points_are_products_and_zips_with_names_of_their_own():
  found = product({"method": ["trd", "jsd"], "lora.rank": [8, 16]})
  assert [one.name for one in found] == [
    "method=trd,rank=8",
    "method=trd,rank=16",
    "method=jsd,rank=8",
    "method=jsd,rank=16",
  ]
  assert found[2].values == {"method": "jsd", "lora.rank": 8}
  pairs = zipped({"lora.rank": [8, 16], "lora.alpha": [16.0, 32.0]})
  assert [one.values["lora.alpha"] for one in pairs] == [16.0, 32.0]
  # Two keys with one last part are named in full.
  (twins,) = product({"rollout.top_p": [0.9], "refine.top_p": [1.0]})
  assert twins.name == "rollout.top_p=0.9,refine.top_p=1"
  assert point("a b/c").name == "a-b-c"
  with pytest.raises(UserError, match="equally long"):
    zipped({"lora.rank": [8, 16], "lora.alpha": [16.0]})


def test_names_tell_the_keys_of_a_sweep_apart(tmp_path):
  path = tmp_path / "twins.py"
  path.write_text(
    "from trd_jax.experiment.sweep_points import point, product, zipped\n"
    "def get_sweep():\n"
    "  return [\n"
    "    point('mine', {'evaluate.seed': 1}),\n"
    "    *product({'data.seed': [1], 'train.epochs': [2]}),\n"
    "    *zipped({'seed': [1]}),\n"
    "  ]\n"
  )
  found = sweep_points.load(path)
  assert [one.name for one in found] == [
    "mine",
    "data.seed=1,epochs=2",
    "seed=1",
  ]
  assert found[1].values == {"data.seed": 1, "train.epochs": 2}


def test_a_point_stays_where_a_sweep_with_fewer_keys_has_put_it(base, tmp_path):
  def folder(number, *points):
    found = sweep_points.checked(points, "s.py")
    plans = sweep.plan(base, found, "s.py")
    command = sweep._command(plans[number], RunDir(tmp_path), [])
    return command[-1].rpartition("/")[2]

  (mine,) = product({"data.seed": [1], "train.epochs": [2]})
  (other,) = product({"evaluate.seed": [3]})
  assert folder(0, mine) == "seed=1,epochs=2"
  assert folder(0, mine, other) == "data.seed=1,epochs=2"
  (tmp_path / "points" / "seed=1,epochs=2").mkdir(parents=True)
  assert folder(0, mine, other) == "seed=1,epochs=2"
  assert folder(1, mine, other) == "evaluate.seed=3"
  # A name that another point has, or has had, says nothing.
  (tmp_path / "points" / "seed=1").mkdir()
  for twin in ("evaluate.seed", "seed"):
    points = [product({key: [1]})[0] for key in ("data.seed", twin)]
    assert folder(0, *points) == "data.seed=1"
    assert folder(1, *points) == f"{twin}=1"


@pytest.mark.parametrize(
  ("text", "told"),
  [
    ("x = 1", "no get_sweep"),
    ("def get_sweep(): return []", "no points"),
    ("def get_sweep(): return [{'method': 'trd'}]", "a dict is no point"),
    ("def get_sweep(): return 1 / 0", "ZeroDivisionError"),
    (
      "from trd_jax.experiment.sweep_points import point\n"
      "def get_sweep(): return [point('a'), point('a')]",
      "two points are called a",
    ),
  ],
)
def test_a_bad_sweep_file_is_refused(tmp_path, text, told):
  path = tmp_path / "bad.py"
  path.write_text(text)
  with pytest.raises(UserError, match=told):
    sweep_points.load(path)
  with pytest.raises(UserError, match="no such file"):
    sweep_points.load(tmp_path / "none.py")


def test_a_point_with_an_unknown_key_is_refused_by_name(base):
  points = [point("odd", {"train.epoch": 2})]
  with pytest.raises(UserError, match=r"s.py, point odd: .*train.epochs"):
    sweep.plan(base, points, "s.py")


# --- what is shared ----------------------------------------------------------


def test_stages_are_shared_exactly_where_their_keys_agree(base):
  shared = {"rollout": 0, "refine": 0, "evaluate/base": 0}
  assert _donors(
    base,
    [
      point("first"),
      point("trains otherwise", {"train.learning_rate": 1.0, "loss.beta": 0.2}),
      point("another method", {"method": "jsd"}),
      point("other drafts", {"rollout.temperature": 1.0}),
      point("other rewriting", {"refine.top_p": 1.0}),
      point("other questions", {"evaluate.num_problems": 2}),
      point("another seed", {"seed": 3}),
      point("as the seventh", {"seed": 3, "train.epochs": 2}),
      # In OPSD nobody reads which model the teacher is.
      point("unread", {"teacher.path": "lab:student"}),
      point("read", {"regime": "opd"}),
    ],
  ) == [
    {},
    shared,
    {"rollout": 0, "evaluate/base": 0},
    {"evaluate/base": 0},
    {"rollout": 0, "evaluate/base": 0},
    {"rollout": 0, "refine": 0},
    {},
    {"rollout": 6, "refine": 6, "evaluate/base": 6},
    shared,
    {"rollout": 0, "evaluate/base": 0},
  ]


def test_split_rounds_share_the_first_part_s_rows_where_it_is_cut_alike(base):
  split = {"pipeline.rounds": 4, "pipeline.split": True}
  shared = {"rollout": 0, "refine": 0, "evaluate/base": 0}
  assert _donors(
    base,
    [
      point("four", split),
      point("another rate", split | {"train.learning_rate": 1.0}),
      point("each evaluated", split | {"pipeline.evaluate_every": 1}),
      point("eight", split | {"pipeline.rounds": 8}),
      point("cut elsewhere", split | {"train.batch_size": 16}),
      point("whole"),
      point("whole, twice", {"pipeline.rounds": 2}),
    ],
  ) == [
    {},
    shared,
    shared,
    {"evaluate/base": 0},
    {"evaluate/base": 0},
    {"evaluate/base": 0},
    {"rollout": 5, "refine": 5, "evaluate/base": 0},
  ]


@pytest.mark.parametrize("how", ["exact", "ngram"])
def test_problems_without_a_benchmarks_are_shared_under_its_keys_alone(
  base, how
):
  """Whichever questions are taken out, the problems that are left differ."""
  clean = {"data.decontaminate": how, "evaluate.benchmarks": ("aime24",)}
  changes = [
    {},
    {"evaluate.benchmarks": ("aime25",)},
    {"evaluate.root": "elsewhere"},
    {"evaluate.livecodebench": "v6"},
    {"evaluate.unchecked": True},
    # Whole benchmarks are looked in, whatever is asked and however.
    {"evaluate.num_problems": 2},
    {"evaluate.k": 3, "evaluate.seed": 5},
    # The laboratory's are made from the seed.
    {"evaluate.benchmarks": ("arithmetic",)},
    {"evaluate.benchmarks": ("arithmetic",), "evaluate.seed": 5},
  ]

  def shared(clean):
    points = [point(str(i), clean | c) for i, c in enumerate(changes)]
    return [one.get("rollout") for one in _donors(base, points)]

  assert shared(clean) == [None] * 5 + [0, 0, None, None]
  uncleaned = clean | {"data.decontaminate": "none"}
  assert shared(uncleaned) == [None] + [0] * 8


def test_array_jobs_wait_for_what_they_take_over(base):
  points = [
    point("a"),
    point("b", {"refine.top_p": 1.0}),
    point("c", {"refine.top_p": 1.0, "train.epochs": 2}),
    point("d", {"seed": 1}),
  ]
  plans = sweep.plan(base, points, "s.py")
  assert [one.level for one in plans] == [0, 1, 2, 0]
  lines = sweep.slurm(plans, ["python", "-m", "trd_jax.sweep"]).splitlines()
  assert len(lines) == 3
  arrays = [line.partition("--array=")[2].split()[0] for line in lines]
  assert arrays == ["0,3", "1", "2"]
  waits = [line.partition("--dependency=")[2].split(" ")[0] for line in lines]
  assert waits == ["", "afterok:$level_0", "afterok:$level_1"]
  assert all("--point=$SLURM_ARRAY_TASK_ID" in line for line in lines)
  # The shell that submits them says how many GPUs, or takes the default.
  for env, count in ({}, "8"), ({"GPUS": "4"}, "4"):
    script = 'sbatch() { echo "$@"; }\n' + lines[0] + "\necho $level_0"
    out = subprocess.run(
      ["bash", "-c", script],
      env={"PATH": os.environ["PATH"], **env},
      capture_output=True,
      text=True,
      check=True,
    )
    assert f"--gpus-per-node={count} " in out.stdout
    # The process itself hears of the end, and not a shell around it.
    assert "--signal=B:TERM@" in out.stdout
    assert "--requeue" in out.stdout
    assert "--wrap=exec python" in out.stdout


def test_a_stage_is_adopted_whole_or_not_at_all(tmp_path):
  donor, mine = RunDir(tmp_path / "donor"), RunDir(tmp_path / "mine")
  folder = donor.stage("rollout")
  folder.mkdir(parents=True)
  (folder / "a.parquet").write_text("rows")
  assert not mine.adopt("rollout", donor)  # it isn't done
  donor.mark_done("rollout", {"samples": 1})
  assert mine.adopt("rollout", donor)
  assert mine.done("rollout") == {"samples": 1}
  assert (mine.stage("rollout") / "a.parquet").read_text() == "rows"
  assert not mine.adopt("rollout", donor)
  begun = RunDir(tmp_path / "begun")
  begun.stage("rollout").mkdir(parents=True)
  (begun.stage("rollout") / "own.parquet").write_text("own")
  assert not begun.adopt("rollout", donor)
  assert begun.done("rollout") is None


def test_points_share_one_cache_of_the_teacher(base, tmp_path):
  points = [
    point("a", {"train.teacher": "hidden_cache"}),
    point("b", {"train.teacher": "hidden_cache", "train.epochs": 2}),
    point("own", {"train.teacher": "hidden_cache", "train.cache_dir": "mine"}),
    point("none"),
  ]
  root = RunDir(tmp_path)
  flags = [
    [word for word in sweep._command(one, root, []) if "cache_dir" in word]
    for one in sweep.plan(base, points, "s.py")
  ]
  shared = [f"--config.train.cache_dir={root.teacher_cache}"]
  assert flags == [shared, shared, ["--config.train.cache_dir=mine"], []]


def test_modes_are_shared_by_the_stages_that_they_say_nothing_to(base):
  def donors(**values):
    points = [point("first"), point("second", values)]
    return set(sweep.plan(base, points, "s.py")[1].donors)

  every = {"rollout", "refine", "evaluate/base"}
  assert donors(**{"teacher.thinking": False}) == every
  assert donors(**{"train.student_thinking": False}) == every
  assert donors(**{"evaluate.thinking": False}) == every - {"evaluate/base"}
  assert donors(**{"refine.thinking": None}) == every - {"refine"}
  assert donors(**{"student.thinking": False}) == set()


# --- for real ----------------------------------------------------------------


def test_four_points_generate_once_and_a_second_run_does_nothing(tmp_path):
  workdir = tmp_path / "sweep"
  first = _run(workdir)
  assert first.returncode == 0, first.stderr[-3000:]
  names = [
    one.name for one in sweep_points.load(f"{ROOT}/configs/sweeps/demo.py")
  ]
  dirs = [RunDir(workdir / "points" / name) for name in names]
  stages = [
    {json.loads(line)["stage"] for line in run.timings.read_text().splitlines()}
    for run in dirs
  ]
  own = {"train", "merge", "evaluate/trained"}
  assert stages[0] == own | {"rollout", "refine", "evaluate/base"}
  assert stages[1:] == [own] * 3
  rows = json.loads((workdir / "sweep.json").read_text())
  assert [row["point"] for row in rows] == names
  # They were trained apart, from the same rows.
  losses = {(run.done("train") or {})["last_loss"] for run in dirs}
  assert len(losses) == 4
  for run in dirs:
    assert run.keys("refine") == dirs[0].keys("refine")
  assert (workdir / "sweep.svg").read_text().count("<svg") == 1
  again = _run(workdir, "--point=3")
  assert again.returncode == 0, again.stderr[-3000:]
  assert again.stdout.count("done before") == 6


def test_what_only_looks_leaves_nothing_and_knows_whose_a_workdir_is(tmp_path):
  workdir = tmp_path / "sweep"
  shown = _run(workdir, "--slurm", "--config.seed=1")
  assert shown.returncode == 0, shown.stderr
  assert "sbatch" in shown.stdout
  again = _run(workdir, "--dry_run")
  assert again.returncode == 0, again.stderr
  assert not workdir.exists()
  other = experiment.from_config({"seed": 2})
  RunDir(workdir).claim(experiment.to_json(other))
  RunDir(workdir).mark_done("rollout", {})
  refused = _run(workdir, "--dry_run")
  assert refused.returncode == 2
  assert "was made by another config" in refused.stderr


def test_a_dry_run_and_mistakes_start_nothing(tmp_path):
  dry = _run(tmp_path / "dry", "--dry_run")
  assert dry.returncode == 0, dry.stderr
  commands = [line for line in dry.stdout.splitlines() if "pipeline" in line]
  assert len(commands) == 4
  assert "--config.train.learning_rate=0.001" in commands[0]
  assert not (tmp_path / "dry" / "points").exists()
  one = _run(tmp_path / "dry", "--dry_run", "--point=2")
  assert one.returncode == 0, one.stderr
  assert [s for s in one.stdout.splitlines() if "pipeline" in s] == commands[
    2:3
  ]
  for looks in ([], ["--dry_run"], ["--slurm"]):
    wrong = _run(tmp_path / "wrong", "--point=9", *looks)
    assert wrong.returncode == 2
    assert "--point=9" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1
  none = _run(tmp_path / "none", points="none.py")
  assert none.returncode == 2


def test_what_a_killed_sweep_has_started_ends(tmp_path):
  with subprocess.Popen(
    [
      *(sys.executable, "-m", "trd_jax.sweep", "--config=configs/demo.py"),
      *("--sweep=configs/sweeps/demo.py", f"--workdir={tmp_path / 'sweep'}"),
    ],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  ) as started:
    deadline = time.monotonic() + 300
    # The pipeline of a point, and a stage of that.
    while len(below := processes.below(started.pid)) < 2:
      assert time.monotonic() < deadline
      time.sleep(0.1)
    started.kill()
  assert processes.still_there(below, 30) == []
