"""Paths as users write them: their `~`, and empty ones."""

import argparse
import dataclasses
import json
import pickle

import pytest

from trd_jax import convert, evaluate, sweep
from trd_jax.experiment import cli, experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import KEYS
from trd_jax.experiment.files import paths
from trd_jax.experiment.run_dir import RunDir
from trd_jax.lab import pretrain

PATHS = [name for name, key in KEYS.items() if key.is_path]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  (tmp_path / "home").mkdir()
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  return tmp_path / "home"


def of(name, value):
  """The value that a config gives a key, and the experiment."""
  chosen = experiment.from_config({name: value, **_needs(name)})
  return experiment.flat(chosen)[name], chosen


def _needs(name):
  # Problems that are made have no local copy.
  return {"data.source": "jsonl"} if name == "data.root" else {}


def test_every_key_that_is_a_path_is_declared_as_one():
  models = {
    f"{side}.{key}"
    for side in ("student", "teacher")
    for key in ("path", "tokenizer", "chat_template")
  }
  others = {"student.adapter", "data.root", "evaluate.root", "sandbox.python"}
  others |= {"evaluate.buckets_from", "train.cache_dir", "prompts.set"}
  interpreters = {name for name in KEYS if name.startswith("python.")}
  assert set(PATHS) == models | others | interpreters


@pytest.mark.parametrize("name", PATHS)
def test_a_home_is_expanded_and_an_empty_path_refused(name, home):
  found, chosen = of(name, "~/a b/c")
  assert found == f"{home}/a b/c"
  assert KEYS[name].parse("~/a b/c") == found
  assert of(name, "~")[0] == str(home)
  for same in ("/a/~/b", "a/~", "./~/x", "$HOME/x", "Qwen/Qwen3-8B"):
    assert of(name, same)[0] == same
  for bad in ("", "  ", "a\0b", "~nobody-here/x"):
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
      of(name, bad)
    assert "\n" not in str(error.value)
  # It survives what is done to experiments.
  again = pickle.loads(pickle.dumps(dataclasses.replace(chosen, seed=3)))
  assert experiment.flat(again)[name] == found
  assert experiment.from_config(experiment.flat(chosen)) == chosen


def test_models_that_are_no_paths_stay():
  for path in ("lab:student", "random:nano", "Qwen/Qwen3-8B"):
    assert of("student.path", path)[0] == path


def test_a_workdir_keeps_paths_as_they_were_written(
  home, tmp_path, monkeypatch
):
  run_dir = RunDir(tmp_path / "run")
  written = experiment.to_json(of("student.path", "~/m")[1])
  run_dir.claim(written)
  run_dir.mark_done("rollout", {})  # which depends on the student
  fields = json.loads(run_dir.config.read_text())
  assert fields["student"]["path"] == "~/m"
  # The same place, told otherwise; and the same words, in another home.
  assert not run_dir.claim(
    experiment.to_json(of("student.path", f"{home}/m")[1])
  )
  monkeypatch.setenv("HOME", str(tmp_path / "elsewhere"))
  assert not run_dir.claim(experiment.to_json(of("student.path", "~/m")[1]))
  with pytest.raises(UserError, match=r'student\.path is "~/m" there'):
    run_dir.claim(experiment.to_json(of("student.path", f"{home}/m")[1]))


def _main(*argv, flags=(), **options):
  given = []
  cli.main(
    "rollout",
    lambda *arguments: given.append(arguments),
    "does it",
    flags,
    argv=argv,
    **options,
  )
  return given[0]


def test_a_workdir_and_a_config_may_be_in_the_home(home):
  (home / "mine.py").write_text(
    "from trd_jax.experiment import experiment\n"
    "def get_config():\n"
    "  config = experiment.default_config()\n"
    "  config.student.path = '~/model'\n"
    "  return config\n"
  )
  argv = ["--config=~/mine.py", "--workdir=~/x/run"]
  chosen, run_dir, flags = _main(*argv, "--config.train.cache_dir=~/cache")
  assert run_dir.root == home / "x/run"
  assert (home / "x/run/config.json").is_file()
  assert chosen.student.path == str(home / "model")
  assert chosen.train.cache_dir == str(home / "cache")
  assert _main(*flags.config_argv)[0] == chosen
  assert _main("--workdir=~/x/run")[0].student.path == str(home / "model")
  assert not any((home.parent / "here").iterdir())


@pytest.mark.parametrize(
  ("stage", "names"),
  [
    (convert, ["source", "target"]),
    (pretrain, ["out"]),
    (evaluate, ["compare"]),
    (sweep, ["sweep"]),
    (None, ["config", "workdir"]),
  ],
)
def test_flags_that_are_paths(stage, names, home, capsys):
  flags = stage.FLAGS if stage else ()
  declared = [flag.name for flag in flags if flag.is_path]
  assert declared == (names if stage else [])
  for name in names:
    with pytest.raises(SystemExit) as end:
      _main(f"--{name}=", flags=flags, standalone=True)
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert f"{name} must be a non-empty path" in told
    assert told.count("\n") == 1
    if stage:
      _, _, own = _main(f"--{name}=~/x", flags=flags, standalone=True)
      assert getattr(own, name) == str(home / "x")


def test_caches_are_in_the_home_unless_told_otherwise(home, monkeypatch):
  for named, folder in (
    (None, home / ".cache"),
    ("", home / ".cache"),
    ("relative", home / ".cache"),
    ("~/mine", home / "mine"),
    ("/else", "/else"),
  ):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if named is not None:
      monkeypatch.setenv("XDG_CACHE_HOME", named)
    assert str(paths.cache()) == f"{folder}/trd-jax"


def test_an_argument_is_read_alike(home):
  assert paths.argument("~/x") == home / "x"
  with pytest.raises(argparse.ArgumentTypeError, match="non-empty path"):
    paths.argument("")
