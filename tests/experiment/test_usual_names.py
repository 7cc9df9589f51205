"""Who uses others' names for keys, flags and columns is told ours."""

import json

import pytest

from trd_jax.data.problems import jsonl, rows
from trd_jax.experiment import cli, experiment, usual_names
from trd_jax.experiment.experiment import KEYS
from trd_jax.experiment.schema import Data
from trd_jax.pipeline import pipeline

_NAMES = {
  "lr": "train.learning_rate",
  "learning_rate": "train.learning_rate",
  "bs": "train.batch_size",
  "batch_size": "train.batch_size",
  "wd": "train.weight_decay",
  "epoch": "train.epochs",
  "epochs": "train.epochs",
  "num_train_epochs": "train.epochs",
  "seeds": "seed",
  "max_len": "rollout.max_response_tokens",
  "max-new-tokens": "rollout.max_response_tokens",
  "temp": "rollout.temperature",
  "top_p": "rollout.top_p",
  "lora_rank": "lora.rank",
  "r": "lora.rank",
  "alpha": "lora.alpha",
  "gpus": "engine.vllm.data_parallel",
  "tp": "engine.vllm.tensor_parallel",
  "model": "student.path",
  "student": "student.path",
  "teacher": "teacher.path",
  "dataset": "data.root",
  "gpu_memory_utilization": "engine.vllm.memory_share",
  "gradient_checkpointing": "train.remat",
  "evaluate.temp": "evaluate.temperature",
  "refine.max_len": "refine.max_response_tokens",
  "train.lr": "train.learning_rate",
  "TRAIN.LR": "train.learning_rate",
}


def _said(capsys, *argv):
  with pytest.raises(SystemExit) as end:
    cli.main("pipeline", pipeline.run, "runs", pipeline.FLAGS, argv=argv)
  assert end.value.code == 2
  return capsys.readouterr().err


@pytest.mark.parametrize("name", _NAMES)
def test_a_key_s_usual_name_is_answered_with_ours(name, capsys, tmp_path):
  wanted = f'"--config.{_NAMES[name]}"'
  assert wanted in _said(capsys, f"--config.{name}=1")
  if "." not in name:
    assert wanted in _said(capsys, f"--{name}=1")
    path = tmp_path / "mine.py"
    attribute = name.replace("-", "_")
    path.write_text(
      "from trd_jax.experiment import experiment\n"
      "def get_config():\n"
      "  config = experiment.default_config()\n"
      f"  config.{attribute} = 1\n"
      "  return config\n"
    )
    # Sections that others give a value to are told of otherwise.
    if attribute not in ("student", "teacher"):
      said = _said(capsys, f"--config={path}", f"--workdir={tmp_path / 'run'}")
      assert f'"{_NAMES[name]}"' in said


@pytest.mark.parametrize("name", ["output_dir", "out", "run_dir", "save-dir"])
def test_a_workdir_s_usual_name_is_answered_with_ours(name, capsys):
  assert 'did you mean "--workdir"?' in _said(capsys, f"--{name}=x")
  plain = name.replace("-", "_")
  assert "--workdir=DIR" in _said(capsys, f"--config.{plain}=x")


def test_what_names_another_section_still_finds_its_key(capsys):
  assert '"--config.lora.rank"?' in _said(capsys, "--config.train.rank=3")
  said = _said(capsys, "--config.engine.servr.model=x")
  assert '"--config.engine.server.model"?' in said


def test_the_table_holds_our_names_alone_and_hides_none():
  for ours, others in usual_names._KEYS.items():
    assert set(ours) <= KEYS.keys()
    assert not set(others.split()) & KEYS.keys()
  every = " ".join(usual_names._KEYS.values()).split()
  assert len(every) == len(set(every))
  flags = {flag.name for flag in (*pipeline.FLAGS, *cli._SHARED)}
  assert set(usual_names._FLAGS) <= flags
  assert set(usual_names.PIPELINE_FLAGS) == {f.name for f in pipeline.FLAGS}


def test_a_flag_of_the_pipeline_s_is_shown_where_it_belongs(capsys):
  for given in ("--status", "--status=json", "--dry_run", "--dry-run"):
    name = given.partition("=")[0]
    with pytest.raises(SystemExit):
      cli.main("train", lambda *_: None, "trains", argv=[given])
    assert f"trd_jax.pipeline --workdir=DIR {name};" in capsys.readouterr().err


def _load(tmp_path, *found):
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in found))
  return jsonl.load(Data(source="jsonl", root=str(path)))


@pytest.mark.parametrize(
  "column", ["porblem", "prompt", "instruction", "Query"]
)
def test_a_misspelt_problem_names_its_column(column, tmp_path):
  _, (rejected,) = _load(tmp_path, {column: "1 + 1?", "answer": "2"})
  hint = f'no problem; did you mean "problem" by its column "{column}"?'
  assert hint in rejected.reason


@pytest.mark.parametrize(
  "column", ["anwser", "Anser", "answers", "ground_truth"]
)
def test_a_misspelt_answer_is_told_where_no_row_has_one(column, tmp_path):
  found, _ = _load(
    tmp_path, {"problem": "a?", column: "2"}, {"problem": "b?", "level": 3}
  )
  (line,) = rows.misspelt(found)
  assert f'1 of 2 have "{column}": did you mean "answer"?' in line
  found, _ = _load(
    tmp_path, {"problem": "a?", column: "2"}, {"problem": "b?", "answer": "3"}
  )
  assert list(rows.misspelt(found)) == []


def test_columns_that_mean_something_else_are_left_alone(tmp_path):
  found, _ = _load(tmp_path, {"problem": "a?", "level": 3, "subject": "x"})
  assert list(rows.misspelt(found)) == []


def test_a_misspelt_column_is_told_when_the_problems_are_read(tmp_path, capsys):
  path = tmp_path / "rows.jsonl"
  path.write_text(
    json.dumps({"problem": "a?", "anwser": "2", "solution": "s"}) + "\n"
  )
  argv = [
    *("--config.data.source=jsonl", f"--config.data.root={path}"),
    *("--config.domain=math", f"--workdir={tmp_path / 'run'}"),
  ]

  def run(chosen, run_dir, flags):
    from trd_jax.data.problems import store

    store.load_all(chosen, run_dir)

  cli.main("rollout", run, "does it", argv=[*argv, _config(tmp_path)])
  assert 'did you mean "answer"?' in capsys.readouterr().out


def _config(tmp_path):
  path = tmp_path / "config.json"
  path.write_text(experiment.to_json(experiment.from_config({})))
  return f"--config={path}"
