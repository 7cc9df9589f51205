"""The stage: what it reads, writes, refuses and prints."""

import json
import shutil
import sys

import pytest

from tests.support import made_runs
from trd_jax.analyze import __main__ as stage
from trd_jax.analyze import analysis, runs
from trd_jax.analyze.analysis import Analysis, Result
from trd_jax.experiment import cli
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files.json_files import write_json


def analyze(*argv: str) -> int:
  try:
    cli.main(
      "analyze",
      stage.run,
      "",
      stage.FLAGS,
      standalone=True,
      looks_only=True,
      argv=argv,
    )
  except SystemExit as end:
    return int(end.code or 0)
  return 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  return made_runs.workdir(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def own(made, tmp_path):
  """A copy of the workdir that a test may change."""
  return shutil.copytree(made.root, tmp_path / "run")


def everything(root) -> dict[str, bytes]:
  return {
    path.relative_to(root).as_posix(): path.read_bytes()
    for path in sorted(root.rglob("*"))
    if path.is_file()
  }


def test_it_writes_into_its_own_folder_only(own, capsys):
  before = everything(own)
  assert analyze(f"--workdir={own}", "--format=svg,png") == 0
  after = everything(own)
  assert {name: after[name] for name in before} == before
  new = after.keys() - before.keys()
  assert {name.split("/")[0] for name in new} == {"analyze"}
  for name in ("figures/results_changes.svg", "figures/results_changes.png"):
    assert f"analyze/{name}" in new
  for name in ("tables/results_avg.csv", "tables/results_avg.tex"):
    assert f"analyze/{name}" in new
  assert "Did it learn?" in capsys.readouterr().out


def test_a_second_call_writes_the_same_bytes_and_leaves_nothing_old(own):
  assert analyze(f"--workdir={own}", "--only=results") == 0
  # The page has a name of its own in each of its pieces.
  folders = [own / "analyze" / name for name in ("figures", "tables")]
  first = [everything(folder) for folder in folders]
  assert analyze(f"--workdir={own}", "--only=results") == 0
  assert [everything(folder) for folder in folders] == first
  assert analyze(f"--workdir={own}", "--only=training_curves") == 0
  tables = {path.name for path in (own / "analyze/tables").glob("*.csv")}
  assert tables == {"training_metrics.csv"}


def test_what_is_somebody_s_is_neither_replaced_nor_removed(own, capsys):
  assert analyze(f"--workdir={own}", "--only=results") == 0
  mine = own / "analyze" / "figures" / "thesis.svg"
  mine.write_text("the only copy")
  assert analyze(f"--workdir={own}") == 2
  assert "thesis.svg, which would be lost" in capsys.readouterr().err
  assert mine.read_text() == "the only copy"


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ([], "--workdir=DIR is missing"),
    (["--workdir={}/none"], "no run's"),
    (["--workdir={}", "--only=result"], 'did you mean "results"'),
    (["--workdir={}", "--format=pdf"], "--format=pdf: there is no such format"),
    (["--workdir={}", "--compare={}/."], "is named twice"),
    (["--workdir={}", "--compare=~nobody-here/x"], "no user nobody-here"),
    (["--workdir={}", "--config.seed=3"], "leave it out"),
    (["--workdir={}", "--score=-1"], "--score=-1"),
    (["--workdir={}", "--inspect=few"], "--inspect=few"),
    (["--workdir={}", "--inspect=-1"], "--inspect=-1"),
  ],
)
def test_a_mistake_is_one_line(argv, message, own, capsys):
  before = everything(own)
  assert analyze(*(one.format(own) for one in argv)) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("trd-jax analyze: ")
  assert message in line
  assert everything(own) == before


def test_a_damaged_shard_is_told_and_the_rest_is_made(own, capsys):
  shard = next((own / "evaluate" / "base").glob("shard-*"))
  shard.write_bytes(shard.read_bytes()[:-9] + b"123456789")
  assert analyze(f"--workdir={own}") == 2
  said = capsys.readouterr()
  assert "its bytes are not those that were written" in said.err
  assert "Traceback" not in said.err
  assert (own / "analyze/figures/training_signal.svg").exists()
  assert not (own / "analyze/tables/results_avg.csv").exists()


def test_runs_of_one_name_are_told_apart_and_a_sweep_is_its_points(tmp_path):
  for name in ("a/run", "b/run", "sweep/points/x", "sweep/points/y"):
    made_runs.workdir(tmp_path / name, stages=("problems",))
  made_runs.workdir(tmp_path / "sweep", stages=())
  folders = [tmp_path / "a/run", tmp_path / "b/run"]
  assert [r.label for r in runs.open_runs(folders)] == ["a/run", "b/run"]
  assert [r.label for r in runs.open_runs([tmp_path / "sweep"])] == ["x", "y"]
  with pytest.raises(UserError, match="named twice"):
    runs.open_runs([tmp_path / "sweep", tmp_path / "sweep/points/x"])


def test_long_names_that_begin_alike_stay_apart(tmp_path):
  names = ["x" * 80 + end for end in "abc"]
  for name in names:
    made_runs.workdir(tmp_path / name, stages=())
  labels = [r.label for r in runs.open_runs([tmp_path / n for n in names])]
  assert len(set(labels)) == 3
  assert max(map(len, labels)) < 70


def test_a_workdir_under_way_is_shown_as_far_as_it_is(tmp_path, capsys):
  root = tmp_path / "run"
  made_runs.workdir(
    root,
    unfinished=("rollout", "train", "evaluate/trained"),
  )
  with made_runs.RunDir(root).lock("train"):  # as a training holds it
    assert analyze(f"--workdir={root}") == 0
  said = capsys.readouterr().out
  assert "train of run isn't finished" in said
  assert "evaluate/trained of run isn't finished" in said


def test_shards_may_be_replaced_while_they_are_read(tmp_path):
  run_dir = made_runs.workdir(tmp_path / "run", unfinished=("refine",))
  opened = runs.Run(run_dir.root)
  whole = {row["key"] for row in opened.rows("refine", ())}
  parts = opened.parts("refine", ("problem_id",))
  first = next(parts)["key"].to_pylist()
  gone = sorted(whole - set(first))[0]
  run_dir.keep("refine", made_runs.Trajectory, whole - {gone})
  rest = [key for part in parts for key in part["key"].to_pylist()]
  assert sorted(first + rest) == sorted(whole - {gone})


def test_a_workdir_that_has_nothing_yet_is_no_mistake(tmp_path):
  root = tmp_path / "run"
  made_runs.workdir(root, stages=())
  assert analyze(f"--workdir={root}") == 0
  assert not list((root / "analyze").rglob("*.svg"))


def test_an_analysis_is_found_by_its_file_alone(made, tmp_path, monkeypatch):
  folder = tmp_path / "extra"
  folder.mkdir()
  (folder / "trial_of_one.py").write_text(
    "from trd_jax.analyze.analysis import Analysis, Result\n"
    "def make(runs):\n"
    "  return Result([f'{len(runs)} run'])\n"
    "name = 'trial_of_one'\n"
    "ANALYSIS = Analysis(name, 'Trial', 'Is it found?', '', 1, make)\n"
  )
  paths = [*analysis.analyses.__path__, str(folder)]
  analysis.registry.cache_clear()
  try:
    with monkeypatch.context() as patch:
      patch.setattr(analysis.analyses, "__path__", paths)
      registry = analysis.registry()
    assert next(iter(registry)) == "trial_of_one"  # its order says so
    result = registry["trial_of_one"].make([runs.Run(made.root)])
    assert result == Result(["1 run"])
  finally:
    analysis.registry.cache_clear()
    sys.modules.pop("trd_jax.analyze.analyses.trial_of_one", None)
  assert "trial_of_one" not in analysis.registry()


def test_every_analysis_says_what_it_answers():
  for name, one in analysis.registry().items():
    assert isinstance(one, Analysis)
    assert name == one.name
    assert one.question.endswith("?")


def test_names_of_folders_command_no_terminal(tmp_path, capsys):
  root = tmp_path / "a\x1b[2Jb $x_y$"
  made_runs.workdir(root)
  assert analyze(f"--workdir={root}", "--only=results") == 0
  assert "\x1b" not in capsys.readouterr().out
  assert json.dumps(runs.Run(root).label) == json.dumps("a\\x1b[2Jb $x_y$")


def test_whatever_is_damaged_is_a_line(tmp_path):
  """Each file of a workdir in turn: an analysis may refuse it, and no more."""
  root = tmp_path / "run"
  run_dir = made_runs.workdir(root)
  made_runs.write_scores(run_dir)
  write_json(run_dir.rounds, {"rounds": [], "best": 1})
  write_json(run_dir.summary, {"benchmarks": {}})
  files = [path for path in sorted(root.rglob("*")) if path.is_file()]
  assert len(files) > 20
  refused = set()
  for number, path in enumerate(files):
    content = path.read_bytes()
    damaged = (
      content[: len(content) // 2],
      b"",
      bytes(255 - byte for byte in content),
    )
    path.write_bytes(damaged[number % 3])
    try:
      opened = runs.open_runs([root])
    except UserError:
      opened = []
    for one in analysis.registry().values() if opened else ():
      try:
        one.make(opened)
      except UserError as error:
        refused.add(str(error))
    path.write_bytes(content)
  assert len(refused) > 10
  assert max(map(len, refused)) < 400
