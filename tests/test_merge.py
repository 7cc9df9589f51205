"""The stages merge and convert on a small model on disk."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from tests.support.small_models import SMALL, model, tree
from trd_jax import convert, evaluate, merge
from trd_jax.data.chat import Chat
from trd_jax.distill.checkpoint import Checkpoints
from trd_jax.experiment import experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.metric_log import MetricWriter
from trd_jax.experiment.records import GradedSample, Trajectory
from trd_jax.experiment.run_dir import RunDir
from trd_jax.lab import tokenizer
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.weights import adapters, hub
from trd_jax.model.weights.adapters import load_peft, logit_difference
from trd_jax.model.weights.hf import load, save_hf
from trd_jax.pipeline import pipeline

pytestmark = pytest.mark.slow

LORA = LoraConfig(rank=4, alpha=6.0, dropout=0.0)
CONFIG = dataclasses.replace(SMALL, vocab_size=416, tie_embeddings=True)


def _run(stage, chosen, run_dir, **flags):
  if stage is convert:
    known = {"source": None, "target": None, "to": None}
    flags = {**known, "config_argv": ["--config=x"]} | flags
  elif stage is evaluate:
    flags = {flag.name: flag.key.default for flag in evaluate.FLAGS} | flags
  stage.run(chosen, run_dir, types.SimpleNamespace(**flags))


def _rollout(number, prompt, response):
  return Trajectory(
    key=f"{number}",
    problem_id=f"{number}",
    stage="rollout",
    prompt_ids=prompt,
    response_ids=response,
    text="",
    finish_reason="length",
    truncated=True,
    seed=0,
    thinking=None,
    sampling="{}",
    model="m",
    model_revision="r",
    prompt_version="1",
    draft_key=None,
    draft_elided_tokens=0,
    correct=False,
    reason="no_box",
    extracted=None,
    grader_version="1",
  )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A finished training run on a small student: all that merge reads."""
  root = tmp_path_factory.mktemp("merge")
  tokenizer_files = root / "tokenizer"
  tokenizer_files.mkdir()
  tokenizer.write(tokenizer_files)
  adapted = model(CONFIG, lora=LORA)
  base = tree(adapted, nnx.Not(nnx.LoRAParam))
  adapter = tree(adapted, nnx.LoRAParam)
  save_hf(
    CONFIG,
    base,
    root / "student",
    tokenizer_from=tokenizer_files,
    special_ids={"eos_token_id": 5},
    dtype="float32",
  )
  config = experiment.default_config()
  config.student.path = str(root / "student")
  config.lora.update(dataclasses.asdict(LORA))
  chosen = experiment.from_config(config)
  run_dir = RunDir(root / "run")
  checkpoints = Checkpoints(run_dir.checkpoints, 2)
  more = {"opt_state": {"mu": jax.tree.map(np.zeros_like, adapter)}, "step": 9}
  stale = jax.tree.map(lambda x: 0 * x, adapter)
  checkpoints.save(6, {"lora": stale, **more})
  checkpoints.save(9, {"lora": adapter, **more})
  checkpoints.wait()
  generator = np.random.default_rng(0)
  with run_dir.shard_writer("rollout", Trajectory) as writer:
    for number in range(6):
      ids = generator.integers(0, CONFIG.vocab_size, 30 + number).tolist()
      writer.add(_rollout(number, ids[:10], ids[10:]))
  return chosen, run_dir, adapted


def test_an_unfinished_training_is_not_merged(trained):
  chosen, run_dir, _ = trained
  assert run_dir.done("train") is None
  with pytest.raises(UserError, match="training is not finished"):
    _run(merge, chosen, run_dir)
  assert not run_dir.merged.exists()


@pytest.mark.parametrize("name", ["merged", "adapter"])
def test_what_lies_where_it_would_write_is_refused_and_stays(
  trained, tmp_path, name
):
  chosen, run_dir, _ = trained
  other = RunDir(tmp_path)
  shutil.copytree(run_dir.checkpoints, other.checkpoints)
  other.mark_done("train", {})
  mine = getattr(other, name) / "thesis.tex"
  mine.parent.mkdir(parents=True)
  mine.write_text("mine")
  with pytest.raises(
    UserError, match=r"holds thesis\.tex, which would be lost"
  ):
    _run(merge, chosen, other)
  assert [path for path in other.stage("merge").rglob("*.*")] == [mine]
  assert mine.read_text() == "mine"


@pytest.fixture(scope="module")
def merged(trained):
  chosen, run_dir, adapted = trained
  run_dir.mark_done("train", {"updates": 9})
  _run(merge, chosen, run_dir)
  return chosen, run_dir, adapted


def test_the_merged_folder_is_the_adapter_on_of_the_newest_checkpoint(merged):
  _, run_dir, adapted = merged
  loaded = load(run_dir.merged, dtype="float32")
  tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 40))
  assert logit_difference(adapted, loaded, tokens, np.full(2, 40)) < 5e-5
  plain = load(run_dir.merged.parents[2] / "student", dtype="float32")
  assert logit_difference(adapted, plain, tokens, np.full(2, 40)) > 1


def test_the_summary_states_the_difference_on_real_contexts(merged):
  _, run_dir, adapted = merged
  summary = run_dir.done("merge")
  assert summary["step"] == 9
  assert summary["compared_on"] == "the student's rollouts"
  assert summary["positions"] == 30 + 31 + 32 + 33
  rows = run_dir.read("rollout", Trajectory)[:4]
  tokens = np.zeros((4, 33), np.int32)
  for row, trajectory in zip(tokens, rows, strict=True):
    ids = [*trajectory.prompt_ids, *trajectory.response_ids]
    row[: len(ids)] = ids
  loaded = load(run_dir.merged, dtype="float32")
  again = logit_difference(adapted, loaded, tokens, np.arange(30, 34))
  stated = summary["largest_logit_difference"]
  assert 0 < stated < 5e-5
  np.testing.assert_allclose(stated, again, rtol=0.5)


def test_the_summary_states_the_distance_to_base(merged):
  chosen, run_dir, _ = merged
  summary = run_dir.done("merge")
  plain = load(chosen.student.path, dtype="float32")
  loaded = load(run_dir.merged, dtype="float32")
  source, tokens, length = merge._contexts(run_dir, CONFIG.vocab_size)
  assert source == summary["compared_on"]
  again = logit_difference(plain, loaded, tokens, length)
  stated = summary["largest_logit_distance_to_base"]
  assert stated > 1
  np.testing.assert_allclose(stated, again, rtol=1e-3)
  told = merge.describe(summary)
  assert f"and from base by up to {stated:.2g} over" in told
  assert not summary["without_update"]


def _trained(where, adapted, change, rows=()):
  """A finished training whose adapter's B is what `change` makes of it."""
  run_dir = RunDir(where)
  adapter = tree(adapted, nnx.LoRAParam)
  changed = jax.tree_util.tree_map_with_path(
    lambda path, x: change(x) if "lora_b" in str(path[-1]) else x, adapter
  )
  checkpoints = Checkpoints(run_dir.checkpoints, 1)
  checkpoints.save(9, {"lora": changed})
  checkpoints.wait()
  run_dir.mark_done("train", {"updates": 9})
  with MetricWriter(run_dir.metrics_file("train"), 0, []) as writer:
    for step, (grad_norm, rate) in enumerate(rows):
      writer.write(step, {"grad_norm": grad_norm, "learning_rate": rate})
  return run_dir


def _with(chosen, weights="merged", dtype="float32"):
  return dataclasses.replace(
    chosen,
    engine=dataclasses.replace(chosen.engine, weights=weights),
    student=dataclasses.replace(chosen.student, dtype=dtype),
  )


@pytest.mark.parametrize("weights", ["merged", "adapter"])
def test_an_adapter_of_zeros_is_merged_only_if_training_said_so(
  trained, tmp_path, weights
):
  chosen, _, adapted = trained
  chosen = _with(chosen, weights)
  updates = [(0.5, 0.0), (0.5, 1e-3)]
  run_dir = _trained(tmp_path / "lost", adapted, np.zeros_like, updates)
  with pytest.raises(UserError, match=r"update 9 is zero.*not what was"):
    _run(merge, chosen, run_dir)
  assert run_dir.done("merge") is None
  assert not run_dir.merged.exists()
  # No row of metrics: nothing has been said.
  run_dir = _trained(tmp_path / "silent", adapted, np.zeros_like)
  with pytest.raises(UserError, match="update 9 is zero"):
    _run(merge, chosen, run_dir)
  idle = [(0.5, 0.0), (0.0, 1e-3)]
  run_dir = _trained(tmp_path / "idle", adapted, np.zeros_like, idle)
  _run(merge, chosen, run_dir)
  summary = run_dir.done("merge")
  assert summary["largest_logit_distance_to_base"] == 0
  assert "no update of the training had" in merge.describe(summary)


def test_an_adapter_that_the_cast_swallows_is_reported(trained, tmp_path):
  chosen, _, adapted = trained

  def small(x):
    return x * np.float32(2e-6)

  run_dir = _trained(tmp_path, adapted, small, [(0.5, 1e-3)])
  with pytest.raises(UserError, match=r"lost in the sum.*weights=adapter"):
    _run(merge, _with(chosen, "merged", "bfloat16"), run_dir)
  assert not run_dir.merged.exists()
  lost = {"merged": True, "step": 9, "dtype": "bfloat16", "positions": 4}
  lost |= {"compared_on": "ids", "largest_logit_difference": 0.03}
  for far, warned in ((0.04, True), (0.4, False)):
    lost["largest_logit_distance_to_base"] = far
    assert ("WARNING" in merge.describe(lost)) == warned
  # It is there in float32.
  _run(merge, _with(chosen, "merged", "float32"), run_dir)
  summary = run_dir.done("merge")
  assert 0 < summary["largest_logit_distance_to_base"] < 0.1


MERGE = """
import pathlib, sys, types
from trd_jax import merge
from trd_jax.experiment import experiment
from trd_jax.experiment.run_dir import RunDir
config = pathlib.Path(sys.argv[1])
chosen = experiment.from_json(config)
merge.run(chosen, RunDir(sys.argv[2]), types.SimpleNamespace())
"""


def test_an_unmerged_adapter_is_proved_by_what_is_on_disk(
  trained, tmp_path, monkeypatch
):
  chosen, _, adapted = trained
  chosen = _with(chosen, "adapter")
  run_dir = _trained(tmp_path / "whole", adapted, lambda x: x, [(0.5, 1e-3)])
  # Both sides are to have the same bits: compiled as for a user, since the
  # tests' quicker compilation rounds two programs differently.
  config = tmp_path / "config.json"
  config.write_text(experiment.to_json(chosen))
  subprocess.run(
    [sys.executable, "-c", MERGE, config, run_dir.root],
    env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    check=True,
  )
  summary = run_dir.done("merge")
  assert summary["largest_logit_difference"] == 0
  assert summary["largest_logit_distance_to_base"] > 1
  # A folder that lost the adapter on its way is seen.
  save = adapters.save_peft

  def loses(adapter, *args, **more):
    save(jax.tree.map(np.zeros_like, adapter), *args, **more)

  monkeypatch.setattr(adapters, "save_peft", loses)
  run_dir = _trained(tmp_path / "lost", adapted, lambda x: x, [(0.5, 1e-3)])
  with pytest.raises(UserError, match="hold what was trained"):
    _run(merge, chosen, run_dir)
  assert run_dir.done("merge") is None


def test_logits_that_are_no_numbers_are_not_merged(trained, tmp_path):
  chosen, _, adapted = trained

  def huge(x):
    return x * np.float32(1e37)

  run_dir = _trained(tmp_path, adapted, huge, [(0.5, 1e-3)])
  with pytest.raises(UserError, match="NaN or infinite"):
    _run(merge, _with(chosen), run_dir)
  assert not run_dir.merged.exists()


def test_the_merged_folder_is_whole_and_speaks(merged):
  chosen, run_dir, _ = merged
  student = Chat.load(chosen.student.path)
  assert Chat.load(run_dir.merged).same_ids(student)
  fields = json.loads((run_dir.merged / "config.json").read_text())
  assert fields["eos_token_id"] == 5
  assert fields["tie_word_embeddings"]
  assert hub.model_folder(str(run_dir.merged)) == run_dir.merged


def test_the_adapter_folder_holds_the_trained_adapter(merged):
  chosen, run_dir, adapted = merged
  lora, adapter = load_peft(run_dir.adapter, CONFIG)
  assert lora == LORA
  _same(adapter, tree(adapted, nnx.LoRAParam))
  about = json.loads((run_dir.adapter / "adapter_config.json").read_text())
  assert about["base_model_name_or_path"] == chosen.student.path


def test_a_merge_that_is_done_is_left_alone(merged, capsys):
  chosen, run_dir, _ = merged
  file = run_dir.merged / "model.safetensors"
  before = file.stat().st_mtime_ns
  _run(merge, chosen, run_dir)
  assert "done before" in capsys.readouterr().out
  assert file.stat().st_mtime_ns == before


def test_a_checkpoint_of_another_rank_is_not_merged(trained, tmp_path):
  chosen, run_dir, _ = trained
  wider = dataclasses.replace(
    chosen, lora=dataclasses.replace(chosen.lora, rank=8)
  )
  other = RunDir(tmp_path / "run")
  other.stage("train").mkdir(parents=True)
  other.checkpoints.symlink_to(run_dir.checkpoints)
  other.mark_done("train", {})
  with pytest.raises(UserError, match=r"lora_a is .*4\).*8\)"):
    _run(merge, wider, other)
  assert not other.merged.exists()


def _same(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(a, b)


def test_weights_survive_the_way_to_orbax_and_back(merged, tmp_path):
  chosen, run_dir, _ = merged
  there, back = str(tmp_path / "orbax"), str(tmp_path / "hf")
  source = str(run_dir.merged)
  _run(convert, chosen, None, source=source, target=there, to="orbax")
  _run(convert, chosen, None, source=there, target=back, to="hf")
  for path in run_dir.merged.iterdir():
    assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()
  # To read it has changed nothing, so that it is still known as ours.
  _run(convert, chosen, None, source=source, target=there, to="orbax")


def test_an_adapter_survives_the_way_to_orbax_and_back(merged, tmp_path):
  chosen, run_dir, adapted = merged
  there, back, direct = (str(tmp_path / name) for name in "abc")
  adapter = str(run_dir.adapter)
  _run(convert, chosen, run_dir, source=adapter, target=there, to="orbax")
  _run(convert, chosen, run_dir, source=there, target=back, to="peft")
  checkpoints = str(run_dir.checkpoints)
  _run(convert, chosen, run_dir, source=checkpoints, target=direct, to="peft")
  for folder in (back, direct):
    for path in run_dir.adapter.iterdir():
      same = (tmp_path / folder / path.name).read_bytes()
      assert same == path.read_bytes()
  _same(load_peft(back, CONFIG)[1], tree(adapted, nnx.LoRAParam))


def test_a_model_of_the_laboratory_is_written_out(tmp_path):
  default = experiment.from_config({})
  shipped, out = hub.model_folder("lab:student"), str(tmp_path / "out")
  _run(convert, default, None, source="lab:student", target=out, to="hf")
  for path in shipped.iterdir():
    assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
  there, back = str(tmp_path / "there"), str(tmp_path / "back")
  _run(convert, default, None, source="lab:student", target=there, to="orbax")
  _run(convert, default, None, source=there, target=back, to="hf")
  assert hub.model_folder(back)
  with pytest.raises(UserError, match='has no model "lab:nobody"'):
    _run(convert, default, None, source="lab:nobody", target=back, to="hf")
  with pytest.raises(UserError, match="it can become orbax, hf"):
    _run(convert, default, None, source="lab:student", target=back, to="peft")


@pytest.mark.parametrize(
  ("flags", "named"),
  [
    ({"source": "{merged}", "target": "{out}"}, "--to"),
    ({"source": "{out}", "target": "{out}", "to": "hf"}, "no folder"),
    ({"source": "{merged}", "target": "{out}", "to": "peft"}, "orbax"),
    ({"source": "{adapter}", "target": "{out}", "to": "hf"}, "orbax"),
    ({"source": "{merged}", "target": "{merged}", "to": "orbax"}, "replace"),
    ({"source": "{empty}", "target": "{out}", "to": "peft"}, "no checkpoint"),
    ({"source": "{merged}", "target": "{other}", "to": "orbax"}, "be lost"),
    ({}, "names no random"),
  ],
)
def test_conversions_that_make_no_sense_are_refused(
  merged, tmp_path, flags, named
):
  chosen, run_dir, _ = merged
  (tmp_path / "empty").mkdir()
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "thesis.tex").touch()
  places = {
    "merged": run_dir.merged,
    "adapter": run_dir.adapter,
    "out": tmp_path / "out",
    "empty": tmp_path / "empty",
    "other": tmp_path / "other",
  }
  flags = {name: text.format(**places) for name, text in flags.items()}
  with pytest.raises(UserError, match=named) as caught:
    _run(convert, chosen, run_dir, **flags)
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "out").exists()
  assert (tmp_path / "other" / "thesis.tex").exists()


@pytest.mark.parametrize("to", ["hf", "orbax", "peft"])
@pytest.mark.parametrize("source", ["rollout", "problems", "empty", "begun"])
def test_a_folder_without_weights_is_told_to_be_one(
  merged, tmp_path, source, to
):
  _, run_dir, _ = merged
  folder = tmp_path / source
  folder.mkdir()
  if source == "begun":  # a run, before its training
    (folder / "config.json").write_text("{}")
  elif source == "problems":
    (folder / "done.json").touch()
  elif source == "rollout":
    folder = run_dir.root / source
  out = str(tmp_path / "out")
  default = experiment.from_config({})
  flags = {"source": folder, "to": to, "config_argv": []}
  with pytest.raises(UserError, match="no checkpoint and no weights; name"):
    _run(convert, default, None, target=out, **flags)


@pytest.mark.parametrize(
  ("source", "to", "meant"),
  [
    ("train", "peft", ["train/checkpoints"]),
    ("train/checkpoints/9", "peft", ["train/checkpoints"]),
    ("merge", "orbax", ["merge/model", "merge/adapter"]),
    ("", "orbax", ["merge/model", "merge/adapter"]),
    ("", "peft", ["train/checkpoints"]),
  ],
)
def test_a_folder_around_or_in_the_weights_gets_a_suggestion(
  merged, tmp_path, source, to, meant
):
  chosen, run_dir, _ = merged
  out = str(tmp_path / "out")
  with pytest.raises(UserError) as caught:
    _run(convert, chosen, None, source=run_dir.root / source, target=out, to=to)
  told = " or ".join(str(run_dir.root / one) for one in meant)
  assert str(caught.value).endswith(f"; did you mean --source={told}?")


@pytest.mark.parametrize("to", ["hf", "peft"])
def test_where_nothing_fits_it_is_told_what_can_be_made(merged, tmp_path, to):
  chosen, run_dir, _ = merged
  source, out = run_dir.root / "merge", str(tmp_path / "out")
  with pytest.raises(UserError, match=f"none there can become --to={to}") as it:
    _run(convert, chosen, None, source=source, target=out, to=to)
  assert "did you mean" not in str(it.value)
  assert str(it.value).endswith(
    f"; give --source={run_dir.merged} with --to=orbax or"
    f" --source={run_dir.adapter} with --to=orbax"
  )


def test_checkpoints_are_scaled_by_the_config_of_their_run(
  merged, tmp_path, monkeypatch
):
  chosen, run_dir, _ = merged
  default = experiment.from_config({})
  assert default.lora != chosen.lora
  (config := run_dir.config).write_text(experiment.to_json(chosen))
  monkeypatch.chdir(run_dir.root)
  flags = {"source": "train/checkpoints", "to": "peft", "config_argv": []}
  made = tmp_path / "made"
  _run(convert, default, None, target=str(made), **flags)
  for path in run_dir.adapter.iterdir():
    assert (made / path.name).read_bytes() == path.read_bytes()
  del flags["config_argv"]  # another config is given
  with pytest.raises(UserError, match="was trained with"):
    _run(convert, default, None, target=str(tmp_path / "no"), **flags)
  flags["config_argv"] = ["--config.lora.alpha=64"]  # of no config
  with pytest.raises(UserError, match=r"^--config\.lora\.alpha=64 changes no"):
    _run(convert, default, None, target=str(tmp_path / "no"), **flags)
  flags["config_argv"] = []
  config.unlink()
  with pytest.raises(UserError, match="or give --config"):
    _run(convert, default, None, target=str(tmp_path / "no"), **flags)


def test_checkpoints_under_another_config_become_no_adapter(merged, tmp_path):
  chosen, run_dir, _ = merged
  wider = dataclasses.replace(
    chosen, lora=dataclasses.replace(chosen.lora, rank=8)
  )
  source, target = str(run_dir.checkpoints), str(tmp_path / "out")
  with pytest.raises(UserError, match="rank 8"):
    _run(convert, wider, run_dir, source=source, target=target, to="peft")
  assert not (tmp_path / "out").exists()


def _asked(chosen):
  """The experiment with few questions, answered greedily."""
  asked = dataclasses.replace(
    chosen.evaluate,
    temperature=0.0,
    num_problems=16,
    k=1,
    max_prompt_tokens=128,
    max_response_tokens=24,
  )
  return dataclasses.replace(chosen, evaluate=asked)


def test_a_trained_model_that_samples_as_base_does_is_reported(
  merged, tmp_path, capsys
):
  chosen, run_dir, _ = merged
  chosen = _asked(chosen)
  here = RunDir(tmp_path)
  # Nothing is said where base has not been evaluated.
  shutil.copytree(chosen.student.path, here.merged)
  here.mark_done("merge", {"merged": True})
  _run(evaluate, chosen, here, model="trained")
  assert "identical" not in capsys.readouterr().out
  (here.stage("evaluate/trained") / "done.json").unlink()
  _run(evaluate, chosen, here, model="base")
  # What was to be the trained model is base: a server that wasn't told.
  _run(evaluate, chosen, here, model="trained")
  out = capsys.readouterr().out
  assert "token for token: arithmetic 100.0%" in out
  assert "warning: every sample of arithmetic is base's" in out
  assert here.done("evaluate/trained")["arithmetic"]["identical_to_base"] == 1
  # The real one says otherwise.
  (here.stage("evaluate/trained") / "done.json").unlink()
  shutil.rmtree(here.merged)
  shutil.copytree(run_dir.merged, here.merged)
  _run(evaluate, chosen, here, model="trained")
  out = capsys.readouterr().out
  summary = json.loads(here.stage_summary("evaluate/trained").read_text())
  share = summary["arithmetic"]["identical_to_base"]
  assert 0 <= share < 1
  assert f"token for token: arithmetic {100 * share:.1f}%" in out
  assert "every sample of arithmetic is base" not in out


def test_an_engine_applies_the_adapter_unmerged(merged, tmp_path):
  chosen, run_dir, _ = merged
  chosen = _asked(chosen)
  unmerged = dataclasses.replace(
    chosen, engine=dataclasses.replace(chosen.engine, weights="adapter")
  )
  alone = RunDir(tmp_path)
  shutil.copytree(run_dir.checkpoints, alone.checkpoints)
  alone.mark_done("train", {"updates": 9})
  _run(merge, unmerged, alone)
  assert not alone.merged.exists()
  assert alone.adapter.is_dir()
  with pytest.raises(UserError, match="wrote the adapter alone"):
    _run(evaluate, chosen, alone, model="trained")

  _run(evaluate, unmerged, alone, model="trained")
  _run(evaluate, chosen, run_dir, model="trained")
  _run(evaluate, chosen, run_dir, model="base")
  found = [
    {row.problem_id: row for row in where.read(stage, GradedSample)}
    for where, stage in (
      (alone, "evaluate/trained"),
      (run_dir, "evaluate/trained"),
      (run_dir, "evaluate/base"),
    )
  ]
  unmerged_rows, merged_rows, base_rows = found
  ids = {problem: row.response_ids for problem, row in unmerged_rows.items()}
  assert len(ids) == 16
  assert {p: row.response_ids for p, row in merged_rows.items()} == ids
  assert {p: row.response_ids for p, row in base_rows.items()} != ids
  # What wrote a row can be told from it.
  revisions = {next(iter(rows.values())).model_revision for rows in found}
  assert len(revisions) == 3


@pytest.fixture
def copied(merged, tmp_path):
  """A merged run that may be spoilt, and its config with few questions."""
  chosen, run_dir, _ = merged
  here = RunDir(tmp_path / "run")
  for stage in ("train", "merge", "rollout"):
    shutil.copytree(run_dir.stage(stage), here.stage(stage))
  student = tmp_path / "student"
  shutil.copytree(chosen.student.path, student)
  model = dataclasses.replace(chosen.student, path=str(student))
  (here.stage("merge") / "done.json").unlink()
  chosen = dataclasses.replace(_asked(chosen), student=model)
  _run(merge, chosen, here)
  return chosen, here


def _changed(folder):
  """Adds one to one weight of a folder."""
  path = next(folder.glob("*.safetensors"))
  content = bytearray(path.read_bytes())
  content[-3] ^= 1  # of a float32: its second byte
  path.write_bytes(content)


def test_a_merge_of_an_earlier_update_is_named_and_made_again(copied, capsys):
  chosen, run_dir = copied
  before = run_dir.done("merge")
  record = run_dir.record("merge")
  weights = record.pop("weights")
  for name in ("left", "made_by"):
    record.pop(name, None)
  run_dir.mark_done("merge", record | {"step": 6}, weights=weights)
  message = "after update 6, and the training has come to update 9: remove"
  for stage, flags in ((merge, {}), (evaluate, {"model": "trained"})):
    with pytest.raises(UserError, match=message):
      _run(stage, chosen, run_dir, **flags)
  with pytest.raises(UserError, match=message):
    pipeline.is_done(run_dir, "merge")
  (run_dir.stage("merge") / "done.json").unlink()
  _run(merge, chosen, run_dir)
  assert run_dir.done("merge") == before


def test_weights_that_changed_after_a_stage_are_named(copied):
  chosen, run_dir = copied
  folder = Path(chosen.student.path)
  former = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
  _changed(folder)
  (run_dir.stage("merge") / "done.json").rename(run_dir.root / "aside.json")
  run_dir.mark_done("rollout", {}, weights={str(folder): "0123"})
  with pytest.raises(UserError, match="has changed since rollout read it in"):
    _run(merge, chosen, run_dir)
  for path, content in former.items():
    path.write_bytes(content)
  run_dir.mark_done(
    "rollout", {}, weights={str(folder): hub.model_revision(folder)}
  )
  _run(merge, chosen, run_dir)


def test_a_bit_that_no_revision_sees_is_named(copied, monkeypatch):
  # As of a file over 32 MiB, of which a revision reads blocks.
  monkeypatch.setattr(hub, "_WHOLE_BYTES", 2**10)
  monkeypatch.setattr(hub, "_BLOCKS", 2)
  monkeypatch.setattr(hub, "_BLOCK_BYTES", 64)
  chosen, run_dir = copied
  (run_dir.stage("merge") / "done.json").unlink()
  _run(merge, chosen, run_dir)
  (weights,) = run_dir.merged.glob("*.safetensors")
  revision = hub.model_revision(run_dir.merged)
  content = bytearray(weights.read_bytes())
  content[len(content) // 2] ^= 1
  weights.write_bytes(content)
  assert hub.model_revision(run_dir.merged) == revision
  with pytest.raises(UserError, match=r"has changed since trd_jax\.merge"):
    _run(evaluate, chosen, run_dir, model="trained")
  # And of the student, which the merge has read.
  (weights,) = Path(chosen.student.path).glob("*.safetensors")
  content = bytearray(weights.read_bytes())
  content[len(content) // 2] ^= 1
  weights.write_bytes(content)
  with pytest.raises(UserError, match="has changed since merge read it in"):
    _run(evaluate, chosen, run_dir, model="base")


def test_what_an_earlier_version_knew_of_weights_is_compared(copied):
  _, run_dir = copied
  own = str(run_dir.merged)
  revision = hub.model_revision(run_dir.merged)
  run_dir.check_weights(own, f"{revision}:0123")
  with pytest.raises(UserError, match="has changed since"):
    run_dir.check_weights(own, "0123:0123")


def test_a_merged_model_that_changed_is_named_and_made_again(copied, tmp_path):
  chosen, run_dir = copied
  revision = hub.model_revision(run_dir.merged)
  _changed(run_dir.merged)
  as_student = dataclasses.replace(chosen.student, path=str(run_dir.merged))
  following = dataclasses.replace(chosen, student=as_student)
  for one, where, which in (
    (chosen, run_dir, "trained"),
    (following, RunDir(tmp_path / "next"), "base"),
  ):
    with pytest.raises(UserError) as caught:
      _run(evaluate, one, where, model=which)
    done = run_dir.stage("merge") / "done.json"
    assert f"{run_dir.merged} has changed since trd_jax.merge" in str(
      caught.value
    )
    assert f"move it and {done} away and run trd_jax.merge" in str(caught.value)
  run_dir.merged.rename(tmp_path / "aside")
  done.rename(tmp_path / "done.json")
  _run(merge, chosen, run_dir)
  assert hub.model_revision(run_dir.merged) == revision
  _run(evaluate, chosen, run_dir, model="trained")
  # An evaluation of other weights than the merge has left is stale.
  _changed(run_dir.merged)
  record = run_dir.record("merge")
  names = ("left", "made_by", "weights")
  summary = {key: v for key, v in record.items() if key not in names}
  weights = {str(run_dir.merged): hub.model_revision(run_dir.merged)}
  run_dir.mark_done("merge", summary, weights=weights)
  stale = run_dir.stage("evaluate/trained") / "done.json"
  for use in (
    lambda: pipeline.is_done(run_dir, "evaluate/trained"),
    lambda: _run(evaluate, chosen, run_dir, model="trained"),
  ):
    with pytest.raises(UserError, match="is of other weights than") as caught:
      use()
    assert f"remove {stale} and run trd_jax.evaluate --model=trained" in str(
      caught.value
    )
  stale.unlink()
  _run(evaluate, chosen, run_dir, model="trained")
  assert pipeline.is_done(run_dir, "evaluate/trained")


def test_an_adapter_that_changed_is_named(copied):
  chosen, run_dir = copied
  unmerged = dataclasses.replace(
    chosen, engine=dataclasses.replace(chosen.engine, weights="adapter")
  )
  _changed(run_dir.adapter)
  with pytest.raises(UserError, match=f"{run_dir.adapter} has changed since"):
    _run(evaluate, unmerged, run_dir, model="trained")


def test_a_checkpoint_that_is_gone_is_missed_until_it_is_merged(copied):
  chosen, run_dir = copied
  run_dir.mark_done("train", {"updates": 9}, folders=["checkpoints/9"])
  shutil.rmtree(run_dir.checkpoints / "9")
  # Whoever wants room may remove checkpoints that are merged.
  assert run_dir.done("train") == {"updates": 9}
  (run_dir.stage("merge") / "done.json").unlink()
  with pytest.raises(UserError, match=r"9, which train had left, .* run trd_j"):
    _run(merge, chosen, run_dir)
  assert run_dir.complete("train") is None
