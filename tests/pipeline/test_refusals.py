"""A command that is refused leaves no file and no folder behind."""

import importlib
import os

import pytest

from tests.support.places import ROOT
from trd_jax.experiment import cli

_DEMO = f"--config={ROOT / 'configs' / 'demo.py'}"
_STAGES = ("rollout", "refine", "train", "merge", "evaluate")
_WITH_WORKDIR = (*_STAGES, "pipeline", "sweep")

# Of every command that has a workdir.
_FLAGS = {
  "no config": [],
  "a config that isn't there": ["--config=nowhere.py"],
  "a config with a mistake": ["--config=bad.py"],
  "a config that is none": ["--config=torn.json"],
  "no such key": [_DEMO, "--config.train.epoch=1"],
  "no such flag": [_DEMO, "--output_dir=x"],
  "a wrong value": [_DEMO, "--config.train.epochs=0"],
  "no value": [_DEMO, "--config.seed"],
  "no flag at all": [_DEMO, "rollout"],
  "contradicting keys": [_DEMO, "--config.engine.name=server"],
}

# What a command can say only after it has looked at what the config names.
_LATER = {
  "student": ["--config.student.path=nowhere/at-all"],
  "student's adapter": ["--config.student.adapter=nowhere"],
  "prompts": ["--config.prompts.set=nowhere"],
  "data": [
    *("--config.data.source=jsonl", "--config.data.root=nowhere.jsonl"),
    "--config.domain=math",
  ],
  "rows": [
    *("--config.data.source=jsonl", "--config.data.root=bad.jsonl"),
    "--config.domain=math",
  ],
}

_OWN = [
  ("refine", [], "rollout"),
  ("train", [], ""),
  ("train", ["--config.distributed.processes=2"], "coordinator"),
  ("train", ["--config.preflight_only=True"], "preflight_only"),
  ("merge", [], "train"),
  ("evaluate", [], ""),
  ("evaluate", ["--model=x"], "--model=x"),
  ("evaluate", ["--model=../../x"], "--model"),
  ("evaluate", ["--model=base", "--regrade"], "evaluat"),
  ("evaluate", ["--model=base", "--compare=nowhere"], "evaluat"),
  (
    "evaluate",
    ["--model=base", "--config.evaluate.benchmarks=nothing"],
    "nothing",
  ),
  ("pipeline", ["--config.evaluate.benchmarks=nothing"], "nothing"),
  ("pipeline", ["--config.python.train=nowhere/python"], "python.train"),
  ("pipeline", ["--from=nowhere"], "--from=nowhere"),
  ("pipeline", ["--from=nowhere", "--dry_run"], "--from=nowhere"),
  ("pipeline", ["--status"], "not there"),
  ("pipeline", ["--status=xml"], "xml"),
  ("sweep", [], "--sweep"),
  ("sweep", ["--sweep=nowhere.py"], "nowhere.py"),
  ("sweep", ["--sweep=bad.py"], "bad.py"),
  ("sweep", [f"--sweep={ROOT}/configs/sweeps/methods.py", "--point=x"], "x"),
  ("convert", [], "--to"),
  ("convert", ["--to=nothing"], "--to"),
  ("convert", ["--to=hf", "--source=nowhere", "--target=out"], "nowhere"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
  """An empty folder to be in, beside files with mistakes in them."""
  files = tmp_path / "files"
  files.mkdir()
  (files / "bad.py").write_text("def get_config():\n  return 1 / 0\n")
  (files / "torn.json").write_text("{")
  (files / "bad.jsonl").write_text('{"problem": 3}\n')
  monkeypatch.chdir(files)
  # As on a machine that is offline: nothing is fetched in a test.
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  return tmp_path


def _refused(here, capsys, stage, argv):
  """Runs a command that is refused, in a folder that isn't there and in one.

  Returns:
    What it said, without the progress of what it could do.
  """
  package = "pipeline.pipeline" if stage == "pipeline" else stage
  module = importlib.import_module(f"trd_jax.{package}")
  flags = getattr(module, "FLAGS", ())
  exclusive = stage not in ("train", "sweep")
  (here / "empty").mkdir()
  for root in (here / "not" / "there", here / "empty"):
    before = sorted(here.rglob("*"))
    with pytest.raises(SystemExit) as end:
      cli.main(
        stage,
        module.run,
        "does it",
        flags,
        argv=[*argv, f"--workdir={root}"],
        exclusive=exclusive,
        standalone=stage == "convert",
        account=getattr(module, "_account", None),
      )
    assert end.value.code == 2
    assert sorted(here.rglob("*")) == before
  err = capsys.readouterr().err
  assert err.splitlines()[-1].startswith(f"trd-jax {stage}: ")
  return err


@pytest.mark.parametrize("name", _FLAGS)
@pytest.mark.parametrize("stage", _WITH_WORKDIR)
def test_wrong_flags_leave_nothing(stage, name, here, capsys):
  _refused(here, capsys, stage, _FLAGS[name])


@pytest.mark.parametrize("name", _LATER)
@pytest.mark.parametrize("stage", ["rollout", "pipeline"])
def test_what_a_config_names_and_is_not_there_leaves_nothing(
  stage, name, here, capsys
):
  said = _refused(here, capsys, stage, [_DEMO, *_LATER[name]])
  assert "nowhere" in said or "bad.jsonl" in said


@pytest.mark.parametrize(
  ("stage", "argv", "told"),
  _OWN,
  ids=lambda value: value if isinstance(value, str) else " ".join(value)[-40:],
)
def test_what_a_command_of_its_own_refuses_leaves_nothing(
  stage, argv, told, here, capsys
):
  assert told in _refused(here, capsys, stage, [_DEMO, *argv])


def test_a_refused_stage_of_a_pipeline_leaves_nothing(here, capsys):
  # It gets through the pipeline's own checks, and fails at its first stage.
  script = here / "files" / "python"
  script.write_text(
    '#!/bin/sh\ncase "$*" in *trd_jax.evaluate*) exit 2;; esac\n'
    f'exec {os.fspath(ROOT / ".venv/bin/python")} "$@"\n'
  )
  script.chmod(0o755)
  said = _refused(
    here, capsys, "pipeline", [_DEMO, f"--config.python.evaluate={script}"]
  )
  assert "evaluate/base ended with exit code 2" in said
