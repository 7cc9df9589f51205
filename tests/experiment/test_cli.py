import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT
from trd_jax import convert, sweep
from trd_jax.experiment import cli
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import KEYS
from trd_jax.experiment.run_dir import RunDir
from trd_jax.lab import pretrain

_PACKAGE = ROOT / "trd_jax"
_STAGES = sorted(
  path.parent.name if path.stem == "__main__" else path.stem
  for path in (*_PACKAGE.glob("*.py"), *_PACKAGE.glob("*/__main__.py"))
  if "cli.main(" in path.read_text() and path.stem != "cli"
)
_HEAVY = ("jax", "flax", "optax", "orbax", "transformers", "torch", "sympy")

_CONFIG = """
from trd_jax.experiment import experiment

def get_config(arg=None):
  variant = experiment.parse_arg(arg, method="trd")
  config = experiment.default_config()
  config.method = variant.method
  config.train.epochs = 2
  return config
"""


@pytest.fixture
def config(tmp_path):
  """Path of a config file."""
  path = tmp_path / "mine.py"
  path.write_text(_CONFIG)
  return path


def _main(*argv, flags=(), run=None, **options):
  """Runs a stage in this process; what its `run` was given."""
  given = []
  run = run or (lambda *arguments: given.append(arguments))
  argv = [str(argument) for argument in argv]
  cli.main("rollout", run, "does it", flags, argv=argv, **options)
  return given[0] if given else None


def _complaint(capsys, *argv, **options):
  """The one line on stderr of a command line that is refused."""
  with pytest.raises(SystemExit) as end:
    _main(*argv, **options)
  assert end.value.code == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith("trd-jax rollout: ")
  assert err.endswith("\n")
  assert err.count("\n") == 1
  return err


def test_a_stage_gets_its_experiment_directory_and_flags(config, tmp_path):
  experiment, run_dir, flags = _main(
    f"--config={config}:method=jsd",
    "--workdir",
    tmp_path / "run",
    "--config.seed=3",
    "--config.rollout.top_k",
    "-1",
    "--noconfig.loss.diagnostics",
    "--config.metrics.tensorboard",
    "--which=trained",
    flags=[cli.Flag("which", "base", "what"), cli.Flag("n", 4, "how many")],
  )
  assert (experiment.method, experiment.seed) == ("jsd", 3)
  assert experiment.train.epochs == 2
  assert experiment.rollout.top_k == -1
  assert experiment.loss.diagnostics is False
  assert experiment.metrics.tensorboard is True
  assert run_dir.root == tmp_path / "run"
  assert (flags.which, flags.n) == ("trained", 4)
  assert json.loads(run_dir.config.read_text())["seed"] == 3


def test_a_flag_may_be_spelt_with_dashes(config, tmp_path, capsys):
  experiment, _, flags = _main(
    f"--config={config}",
    f"--workdir={tmp_path / 'a-b'}",
    "--config.data.arithmetic.num-problems=7",
    "--noconfig.loss.diagnostics",
    "--look-only=x-y",
    flags=[cli.Flag("look_only", "", "what")],
  )
  assert experiment.data.arithmetic.num_problems == 7
  # Values keep their dashes.
  assert flags.look_only == "x-y"
  assert (tmp_path / "a-b").exists()
  said = _complaint(capsys, f"--config={config}", "--no-such-flag=1")
  assert "--no-such-flag" in said


def test_the_config_travels_to_another_stage(config, tmp_path):
  argv = [
    f"--config={config}:method=jsd",
    f"--workdir={tmp_path / 'run'}",
    "--config.loss.clip=None",
    "--config.evaluate.benchmarks=a,b",
    "--noconfig.loss.diagnostics",
    "--config.engine.jax.slots=3",
  ]
  experiment, _, flags = _main(*argv)
  again, _, _ = _main(*flags.config_argv)
  assert again == experiment
  # The workdir alone is enough too, but for keys of the run only.
  alone, _, _ = _main(f"--workdir={tmp_path / 'run'}")
  assert alone == experiment


def test_a_standalone_stage_needs_neither_config_nor_workdir():
  experiment, run_dir, _ = _main("--config.seed=3", standalone=True)
  assert experiment.seed == 3
  assert run_dir is None


@pytest.mark.parametrize(
  ("argument", "told"),
  [
    (
      "--config.train.epoch=1",
      ['"train.epoch"', '"--config.train.epochs"?', "mine.py"],
    ),
    (
      "--config.learning_rate=1",
      ['"--config.train.learning_rate"?', "mine.py"],
    ),
    (
      "--config.train=1",
      ["it is a section", ", as --config.train.", "mine.py"],
    ),
    ("--config.train.epochs=x", ["train.epochs", "an integer", "mine.py"]),
    ("--config.method=tdr", ["one of trd", "'tdr'", "mine.py"]),
    ("--config.engine.name=server", ["engine.server.urls", "mine.py"]),
    ("--wich=base", ["--wich", '"--which"?']),
    ("--n=many", ["n must be an integer"]),
    ("rollout", ['"rollout" is no flag']),
    ("--config.seed", ["Missing value", "--config.seed"]),
  ],
)
def test_a_wrong_argument_is_one_line_and_nothing_is_written(
  argument, told, config, tmp_path, capsys
):
  workdir = tmp_path / "run"
  line = _complaint(
    capsys,
    f"--config={config}",
    f"--workdir={workdir}",
    argument,
    flags=[cli.Flag("which", "base", "what"), cli.Flag("n", 4, "how many")],
  )
  for part in told:
    assert part in line
  assert not workdir.exists()


@pytest.mark.parametrize(
  ("body", "told"),
  [
    ("config.train.epochs = 'x'", [":6:", "train.epochs must be an integer"]),
    ("config.train.epoch = 1", [":6:", '"train.epoch"', '"train.epochs"']),
    ("config.trian.epochs = 1", [":6:", '"trian"']),
    ("config['train']['epochz'] = 1", [":6:", '"epochz"', "train.epochs"]),
    ("t = config.lora; t.rnk = 1", [":6:", '"rnk"', "lora.rank"]),
    ("t = config.lora; t.rank = 'x'", [":6:", "lora.rank must be an int"]),
    ("config.train.epochs = 0", ["train.epochs must be", "at least 1"]),
    ("config = {'method': 'trd', 'x': 1}", ['no key "x"']),
    ("config = 3", ["must give a ConfigDict, not a int"]),
    ("1 / 0", [":6:", "ZeroDivisionError"]),
    ("{}['nano']", [":6:", "KeyError", "nano"]),
    ("import nothing_there", [":6:", "nothing_there"]),
    ("if", [":6", "SyntaxError"]),
    ("raise TypeError('many\\nlines')", [":6:", "many lines"]),
  ],
)
def test_a_mistake_in_a_config_file_is_told_with_its_line(
  body, told, tmp_path, capsys
):
  path = tmp_path / "bad.py"
  path.write_text(
    "from trd_jax.experiment import experiment\n\n"
    "def get_config():\n"
    "  config = experiment.default_config()\n"
    "  # the mistake:\n"
    f"  {body}\n"
    "  return config\n"
  )
  workdir = tmp_path / "run"
  line = _complaint(capsys, f"--config={path}", f"--workdir={workdir}")
  for part in ["bad.py", *told]:
    assert part in line
  assert not workdir.exists()


@pytest.mark.parametrize(
  ("spec", "told"),
  [
    ("nowhere.py", "there is no file nowhere.py"),
    ("mine.py:methd=jsd", 'no variant "methd"'),
    ("empty.py", "defines no get_config"),
    ("plain.py:method=jsd", "takes no argument"),
    ("list.json", "holds no JSON object"),
    ("torn.json", "can't be read as JSON"),
    ("deep.json", "can't be read as JSON (nested too deeply)"),
  ],
)
def test_a_config_that_is_none_is_reported(
  spec, told, config, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  Path("empty.py").write_text("")
  Path("plain.py").write_text("def get_config(): return {}")
  Path("list.json").write_text("[1]")
  Path("torn.json").write_text('{"method": ')
  Path("deep.json").write_text(100_000 * "[")
  assert told in _complaint(capsys, f"--config={spec}", "--workdir=run")


def test_what_is_missing_is_asked_for(config, tmp_path, capsys):
  assert "--workdir=DIR is missing" in _complaint(capsys, f"--config={config}")
  fresh = f"--workdir={tmp_path / 'run'}"
  assert "--config=FILE.py is missing" in _complaint(capsys, fresh)


def test_another_config_is_refused_and_the_workdir_stays(
  config, tmp_path, capsys
):
  argv = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
  _main(*argv)
  RunDir(tmp_path / "run").mark_done("train", {})
  before = (tmp_path / "run" / "config.json").read_bytes()
  line = _complaint(capsys, *argv, "--config.method=jsd")
  assert 'method is "trd" there and "jsd" here; train there' in line
  assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_key_that_nothing_was_made_with_changes_once_it_is_accepted(
  config, tmp_path, capsys
):
  def refuse(experiment, run_dir, flags):
    raise UserError("not like this")

  run_dir = RunDir(tmp_path / "run")
  argv = [f"--config={config}", f"--workdir={run_dir.root}"]
  _main(*argv)
  run_dir.mark_done("rollout", {})
  before = run_dir.config.read_bytes()
  _complaint(capsys, *argv, "--config.method=jsd", run=refuse)
  _main(*argv, "--config.method=jsd", "--config.preflight_only=True")
  assert run_dir.config.read_bytes() == before
  _main(*argv, "--config.method=jsd")
  assert json.loads(run_dir.config.read_text())["method"] == "jsd"


def test_a_look_at_a_workdir_that_cannot_be_one_is_refused(
  config, tmp_path, capsys
):
  (tmp_path / "file").write_text("")
  argv = [f"--config={config}", f"--workdir={tmp_path / 'file' / 'run'}"]
  flags = [cli.Flag("dry_run", False, "looks", looks_only=True)]
  line = _complaint(capsys, *argv, "--dry_run", flags=flags)
  assert "cannot be written: Not a directory" in line


def test_a_stage_is_held_while_it_runs_unless_it_says_otherwise(
  config, tmp_path
):
  argv = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
  other = (
    "import sys; from trd_jax.experiment.run_dir import RunDir\n"
    "with RunDir(sys.argv[1]).lock('rollout'): pass"
  )

  def run(experiment, run_dir, flags):
    command = [sys.executable, "-c", other, str(run_dir.root)]
    ended.append(subprocess.run(command, capture_output=True))

  ended = []
  _main(*argv, run=run)
  _main(*argv, run=run, exclusive=False)
  assert b"is at work on rollout" in ended[0].stderr
  assert ended[1].returncode == 0


def test_mistakes_found_at_once_are_a_line_each(config, tmp_path, capsys):
  def run(experiment, run_dir, flags):
    raise UserError("the one is\nwrong", "the other, too")

  with pytest.raises(SystemExit):
    _main(f"--config={config}", f"--workdir={tmp_path / 'run'}", run=run)
  assert capsys.readouterr().err.splitlines() == [
    "trd-jax rollout: the one is wrong",
    "trd-jax rollout: also: the other, too",
  ]


def test_an_interrupt_is_one_line_and_130(config, tmp_path, capsys):
  def run(experiment, run_dir, flags):
    raise KeyboardInterrupt

  with pytest.raises(SystemExit) as end:
    _main(f"--config={config}", f"--workdir={tmp_path / 'run'}", run=run)
  assert end.value.code == 130
  err = capsys.readouterr().err
  assert err.count("\n") == 1
  assert "interrupted" in err


def test_a_bug_is_no_users_mistake(config, tmp_path):
  def run(experiment, run_dir, flags):
    raise ValueError("a bug")

  with pytest.raises(ValueError, match="a bug"):
    _main(f"--config={config}", f"--workdir={tmp_path / 'run'}", run=run)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_a_stage_and_not_every_key(flag, capsys):
  assert _main(flag, flags=[cli.Flag("which", "base", "what to do")]) is None
  out = capsys.readouterr().out
  for part in (
    "does it",
    "python -m trd_jax.rollout --config=",
    "y_o with verdicts",
    "--which",
    "what to do [base]",
    "--help_config",
  ):
    assert part in out
  assert len(out.splitlines()) < 30


def test_the_examples_of_the_help_are_command_lines(monkeypatch, capsys):
  """Of the stages that have flags without which they do nothing sensible."""
  for stage, flag in ((convert, "to"), (sweep, "sweep"), (pretrain, "model")):
    shown = subprocess.run(
      [sys.executable, "-m", stage.__name__, "--help"],
      capture_output=True,
      text=True,
    )
    start = f"example:  python -m {stage.__name__} "
    examples = [
      line.removeprefix(start).split()
      for line in shown.stdout.splitlines()
      if line.startswith(start)
    ]
    assert any(a.startswith(f"--{flag}=") for e in examples for a in e)
    monkeypatch.chdir(_PACKAGE.parent)
    for argv in examples:
      argv = [a for a in argv if not a.startswith("--workdir=")]
      assert _main(*argv, flags=stage.FLAGS, standalone=True) is not None


def test_help_config_shows_every_key_on_a_line_of_its_own(capsys):
  _main("--help_config")
  _, *lines = capsys.readouterr().out.splitlines()
  assert len(lines) == len(KEYS)
  for line, (name, key) in zip(lines, KEYS.items(), strict=True):
    shown, value, takes, scopes, doc = re.split(" {2,}", line.strip())
    assert shown == f"--config.{name}"
    assert key.takes() == takes
    assert ", ".join(key.scopes) == scopes
    assert doc == key.doc
    assert key.parse(value) == key.default


def test_help_config_shows_what_a_config_changes(config, tmp_path, capsys):
  argv = [f"--config={config}", "--config.train.batch_size=7"]
  _main(*argv, "--help_config=train.")
  _, *lines = capsys.readouterr().out.splitlines()
  assert all("--config.train." in line for line in lines)
  changed = [line.split()[:3] for line in lines if line.startswith("*")]
  assert changed == [
    ["*", "--config.train.batch_size", "7"],
    ["*", "--config.train.epochs", "2"],
  ]
  # A workdir's own config does as well.
  _main(*argv, f"--workdir={tmp_path / 'run'}")
  _main(f"--workdir={tmp_path / 'run'}", "--help_config=train.batch_size")
  assert "* --config.train.batch_size  7 " in capsys.readouterr().out
  told = _complaint(capsys, "--help_config=train.batch_sise")
  assert 'did you mean "train.batch_size"?' in told


def test_the_package_lists_its_stages():
  shown = subprocess.run(
    [sys.executable, "-m", "trd_jax"], capture_output=True, text=True
  )
  lines = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines()[2:])
  assert set(lines) == {*_STAGES, "lab.pretrain"}
  assert list(lines)[:2] == ["pipeline", "rollout"]
  assert lines["merge"] == "adds the trained adapter to the student's weights"


@pytest.mark.parametrize("stage", _STAGES)
def test_the_help_of_every_stage_imports_nothing_heavy(stage):
  program = (
    "import runpy, sys\n"
    "sys.argv = [sys.argv[1], '--help']\n"
    "runpy.run_module('trd_jax.' + sys.argv[0], run_name='__main__')\n"
    f"heavy = [name for name in {_HEAVY} if name in sys.modules]\n"
    "assert not heavy, heavy\n"
  )
  ended = subprocess.run(
    [sys.executable, "-c", program, stage], capture_output=True, text=True
  )
  assert ended.returncode == 0, ended.stderr
  assert f"python -m trd_jax.{stage} --config=" in ended.stdout


@pytest.mark.parametrize("module", ["math", "code"])
@pytest.mark.parametrize("argv", [[], ["rows.jsonl", "--bogus"]])
def test_a_grader_s_mistaken_flags_are_one_line(module, argv):
  name = f"trd_jax.grading.{module}"
  out = subprocess.run(
    [sys.executable, "-m", name, *argv],
    capture_output=True,
    text=True,
    check=False,
  )
  assert out.returncode == 2
  (line,) = out.stderr.splitlines()
  assert line.startswith(f"python -m {name}: ")
  assert ("--bogus" if argv else "file") in line


_HEAD = """
from trd_jax.experiment import cli

def run(experiment, run_dir, flags):
  print("nobody reads that", flush=True)

cli.main("rollout", run, "does it", argv={argv})
"""


@pytest.mark.parametrize("wants", ["--help", "--help_config", "a run"])
def test_who_stops_reading_ends_it_without_a_word(wants, config, tmp_path):
  where = tmp_path / "run"
  argv = [f"--config={config}", f"--workdir={where}"]
  reading, writing = os.pipe()
  os.close(reading)
  ended = subprocess.run(
    [
      *(sys.executable, "-c"),
      _HEAD.format(argv=argv if wants == "a run" else [wants]),
    ],
    stdout=writing,
    stderr=subprocess.PIPE,
    text=True,
    check=False,
  )
  os.close(writing)
  assert (ended.returncode, ended.stderr) == (141, "")
  assert not (where / "config.json").exists()
