"""A user's own rows through all stages, on a random Qwen3 of the real ids."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest

from tests.support.chat_folders import HYBRID, QWEN, needs_qwen
from tests.support.devices import xla_flags
from tests.support.places import ROOT
from trd_jax.data.chat import Chat
from trd_jax.experiment import experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.metric_log import read_metrics
from trd_jax.experiment.records import Trajectory
from trd_jax.experiment.run_dir import RunDir
from trd_jax.lab.random_model import random_folder

pytestmark = [pytest.mark.slow, needs_qwen]


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
  """A random model with Qwen3's tokenizer and template."""
  folder = tmp_path_factory.mktemp("nano") / "model"
  random_folder("nano", folder, QWEN, HYBRID)
  return folder


def go(root, student, rows, **changes):
  """Runs all stages, on one device; returns the workdir.

  Raises:
    UserError: a stage has refused it; with what it said.
  """
  file = root / "rows.jsonl"
  file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
  config = experiment.default_config()
  config.domain = "math"
  config.data.source, config.data.root = "jsonl", str(file)
  config.student.path = str(student)
  # The tests' programs are compiled without optimisation, and a product of
  # bfloat16 with a whole vocabulary then takes seconds.
  config.student.dtype = "float32"
  for stage in (config.rollout, config.refine):
    stage.max_prompt_tokens = 400
    stage.max_response_tokens = 6
  config.engine.jax.slots = 4
  config.lora.rank = 2
  config.train.batch_size = 4
  config.train.learning_rate = 1e-3
  config.train.truncated = "keep"
  config.mesh.data = 1
  config.update_from_flattened_dict(changes)
  chosen = root / "config.json"
  chosen.write_text(experiment.to_json(experiment.from_config(config)))
  run_dir = RunDir(root / "run")
  process = subprocess.run(
    [
      *(sys.executable, "-m", "tests.support.one_process"),
      *("rollout,refine,train,merge", f"--config={chosen}"),
      f"--workdir={run_dir.root}",
    ],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": xla_flags(1)},
    capture_output=True,
    text=True,
  )
  if process.returncode == 2:
    raise UserError(process.stderr)
  assert process.returncode == 0, process.stderr[-3000:]
  print(process.stdout)
  assert (run_dir.merged / "config.json").is_file()
  return run_dir


def prompts_of(run_dir, stage, chat):
  """The prompts of a stage as texts, by ascending problem id."""
  rows = run_dir.read(stage, Trajectory)
  rows = sorted(rows, key=lambda row: row.problem_id)
  return [chat.decode(row.prompt_ids) for row in rows]


def test_rows_with_privileged_texts_and_no_answers(tmp_path, nano, capsys):
  rows = [
    {"problem": f"Prove claim {n}.", "privileged": f"Hint number {n}."}
    for n in range(4)
  ]
  run_dir = go(tmp_path, nano, rows)
  chat = Chat.load(nano)
  for stage in ("rollout", "refine"):
    found = run_dir.read(stage, Trajectory)
    assert [(r.correct, r.reason) for r in found] == 4 * [(None, "no_gold")]
    assert run_dir.done(stage)["no_gold"] == 4
  assert sum(run_dir.done("refine")["by_draft"].values()) == 0
  assert not any("Hint" in p for p in prompts_of(run_dir, "rollout", chat))
  assert sorted(
    n
    for n in range(4)
    for p in prompts_of(run_dir, "refine", chat)
    if f"claim {n}." in p and f"Hint number {n}." in p
  ) == [0, 1, 2, 3]
  metrics = read_metrics(run_dir.metrics_file("train"))
  assert len(metrics) == 1
  for step in metrics:
    assert not {"D_correct", "D_incorrect"} & step.keys()
    assert all(
      math.isfinite(value)
      for value in step.values()
      if isinstance(value, float)
    )
  assert "no verdict: 4 rows without an answer" in capsys.readouterr().out


def test_messages_with_a_system_turn(tmp_path, nano):
  rows = [
    {
      "messages": [
        {"role": "system", "content": f"You are helper {n % 2}."},
        {"role": "user", "content": f"What is {n // 2} + 1?"},
      ],
      "answer": str(n // 2 + 1),
      "solution": f"It is {n // 2 + 1}.",
    }
    for n in range(4)
  ]
  run_dir = go(tmp_path, nano, rows)
  chat = Chat.load(nano)
  for stage in ("rollout", "refine"):
    found = prompts_of(run_dir, stage, chat)
    assert len(found) == 4
    turns = [
      f"<|im_start|>system\nYou are helper {n % 2}.<|im_end|>\n"
      f"<|im_start|>user\n"
      for n in range(4)
    ]
    assert sorted(p.partition("user\n")[0] + "user\n" for p in found) == sorted(
      turns
    )
    assert sum("What is 1 + 1?" in p for p in found) == 2
  assert len(read_metrics(run_dir.metrics_file("train"))) == 1


def test_a_folder_of_prompts_with_one_changed_file(tmp_path, nano):
  mine = tmp_path / "mine"
  mine.mkdir()
  (mine / "refinement_math.jinja").write_text(
    "{{ problem }}\n{% if reference %}It is so:\n{{ reference }}\n{% endif %}"
    "Tried:\n{{ draft }}\nMend it, {{ problem | length }}."
  )
  rows = [
    {"problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(4)
  ]
  run_dir = go(tmp_path, nano, rows, **{"prompts.set": str(mine)})
  chat = Chat.load(nano)
  for stage, said in (("rollout", "step by step"), ("refine", "Mend it, 14.")):
    found = prompts_of(run_dir, stage, chat)
    assert len(found) == 4
    assert all(said in p for p in found)
    versions = {r.prompt_version for r in run_dir.read(stage, Trajectory)}
    assert len(versions) == 1
    assert versions != {"1"}


def test_a_base_model_without_a_chat_template(tmp_path, nano):
  base = shutil.copytree(nano, tmp_path / "base")
  (base / "chat_template.jinja").unlink()
  config = base / "tokenizer_config.json"
  fields = json.loads(config.read_text("utf-8"))
  config.write_text(json.dumps(fields | {"chat_template": None}), "utf-8")
  rows = [
    {"problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(4)
  ]
  with pytest.raises(UserError, match="no chat template; set the key chat_te"):
    go(tmp_path, base, rows)
  assert not (tmp_path / "run/rollout").exists()
  run_dir = go(tmp_path, base, rows, **{"student.chat_template": "plain"})
  chat = Chat.load(base, "plain")
  for stage in ("rollout", "refine"):
    for prompt in prompts_of(run_dir, stage, chat):
      assert prompt.endswith("\\boxed{}.\n")
      assert "<|im_" not in prompt
  # Whoever serves the merged student asks it in the same way.
  merged = Chat.load(run_dir.merged)
  assert merged.render("x", None) == chat.render("x", None)
  assert merged.stop_ids == Chat.load(nano).stop_ids
