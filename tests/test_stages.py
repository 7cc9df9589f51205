"""Rollout, refine and evaluate on the shipped student, for real."""

import dataclasses
import json
import shutil
import types
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support import sandboxes
from trd_jax import evaluate, refine, rollout
from trd_jax.experiment import experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import (
  GradedSample,
  Problem,
  Rejected,
  Trajectory,
)
from trd_jax.experiment.run_dir import RunDir
from trd_jax.grading.code import programs
from trd_jax.pipeline import pipeline

pytestmark = pytest.mark.slow


def small(**changes):
  """The demo's experiment on few problems and few tokens."""
  config = experiment.default_config()
  config.data.arithmetic.num_problems = 24
  for stage in (config.rollout, config.refine, config.evaluate):
    stage.max_prompt_tokens = 448
    stage.max_response_tokens = 160
  config.evaluate.num_problems = 8
  config.evaluate.k = 4
  config.engine.jax.slots = 16
  config.update_from_flattened_dict(changes)
  return experiment.from_config(config)


def go(stage, chosen, run_dir, **flags):
  own = {flag.name: flag.default for flag in getattr(stage, "FLAGS", ())}
  stage.run(chosen, run_dir, types.SimpleNamespace(**own | flags))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  """A run directory with both kinds of trajectories."""
  run_dir = RunDir(tmp_path_factory.mktemp("run"))
  chosen = small()
  go(rollout, chosen, run_dir)
  go(refine, chosen, run_dir)
  return chosen, run_dir


def test_every_problem_has_one_graded_rollout(done):
  _, run_dir = done
  problems = {p.problem_id: p for p in run_dir.read("problems", Problem)}
  rows = run_dir.read("rollout", Trajectory)
  assert {row.problem_id for row in rows} == set(problems)
  assert len(rows) == len(problems) == 24
  for row in rows:
    # The verdict can be had from the text and the problem alone.
    answer = rf"\boxed{{{problems[row.problem_id].answer}}}"
    assert row.correct == row.text.endswith(answer)
    assert row.truncated == (row.finish_reason == "length")
  assert {row.correct for row in rows} == {True, False}


@sandboxes.needed
def test_rollouts_of_code_problems_are_graded(tmp_path):
  """The student writes no programs, which is what their verdicts say."""
  path = tmp_path / "problems.jsonl"
  tests = {"inputs": ["1 2\n"], "outputs": ["3\n"]}
  rows = [{"problem": f"Add {n} numbers.", "tests": tests} for n in range(3)]
  path.write_text("\n".join(map(json.dumps, rows)))
  source = {"data.source": "jsonl", "data.root": str(path)}
  chosen = small(domain="code", **source)
  run_dir = RunDir(tmp_path / "run")
  go(rollout, chosen, run_dir)
  found = run_dir.read("rollout", Trajectory)
  assert [(row.correct, row.reason) for row in found] == 3 * [
    (False, "no_code")
  ]
  assert {row.grader_version for row in found} == {programs.VERSION}
  assert run_dir.done("rollout")["no_box"] == 3


def test_a_refinement_prompt_holds_its_draft_and_the_reference(done):
  from trd_jax.data.chat import Chat
  from trd_jax.model.weights import hub

  _, run_dir = done
  chat = Chat.load(hub.model_folder("lab:student"))
  problems = {p.problem_id: p for p in run_dir.read("problems", Problem)}
  drafts = {row.key: row for row in run_dir.read("rollout", Trajectory)}
  refined = run_dir.read("refine", Trajectory)
  assert len(refined) == len(drafts)
  for row in refined:
    draft, problem = drafts[row.draft_key], problems[row.problem_id]
    prompt = chat.decode(row.prompt_ids)
    for part in (problem.text, draft.text, problem.solution):
      assert part in prompt
  assert sum(r.correct for r in refined) > sum(
    d.correct for d in drafts.values()
  )


def test_the_teacher_of_opd_never_sees_the_reference(done, tmp_path):
  _, from_opsd = done
  chosen = small(regime="opd", **{"teacher.path": "lab:student"})
  run_dir = RunDir(tmp_path)
  go(rollout, chosen, run_dir)
  go(refine, chosen, run_dir)
  from trd_jax.data.chat import Chat
  from trd_jax.model.weights import hub

  chat = Chat.load(hub.model_folder("lab:student"))
  for row in run_dir.read("refine", Trajectory):
    assert "Reference" not in chat.decode(row.prompt_ids)
  # The student's own answers are the same in both regimes.
  rows = [r.read("rollout", Trajectory) for r in (run_dir, from_opsd)]
  assert rows[0] == rows[1]


def test_a_finished_stage_does_nothing(done, capsys):
  chosen, run_dir = done
  before = sorted(run_dir.stage("rollout").iterdir())
  go(rollout, chosen, run_dir)
  assert "done before" in capsys.readouterr().out
  assert sorted(run_dir.stage("rollout").iterdir()) == before


def test_samples_on_disk_are_not_drawn_again(done, tmp_path, capsys):
  chosen, whole = done
  rows = whole.read("rollout", Trajectory)
  run_dir = RunDir(tmp_path)
  marked = [dataclasses.replace(row, text="kept") for row in rows[::2]]
  with run_dir.shard_writer("rollout", Trajectory) as writer:
    for row in marked:
      writer.add(row)
  go(rollout, chosen, run_dir)
  kept = f"rollout: goes on: {len(marked)} of {len(rows)} samples are kept\n"
  assert kept in capsys.readouterr().out
  on_disk = sum(
    pq.read_metadata(path).num_rows
    for path in run_dir.stage("rollout").glob("shard-*.parquet")
  )
  assert on_disk == len(rows)
  found = run_dir.read("rollout", Trajectory)
  assert [row.key for row in found] == [row.key for row in rows]
  assert [row for row in found if row.text == "kept"] == marked
  assert [r for r in found if r.text != "kept"] == rows[1::2]


def test_rows_of_a_model_that_was_replaced_are_removed(done, tmp_path, capsys):
  """A stage was stopped halfway, and then its model's files were changed."""
  chosen, whole = done
  run_dir = RunDir(tmp_path)
  for name, stage in (("rollout", rollout), ("refine", refine)):
    rows = whole.read(name, Trajectory)
    former = [dataclasses.replace(r, key=f"{r.key}~") for r in rows[:5]]
    # In shards of their own, and beside rows that stay.
    with run_dir.shard_writer(name, Trajectory, rows_per_shard=4) as writer:
      for row in [*former, *rows[:5]]:
        writer.add(row)
    go(stage, chosen, run_dir)
    assert f"{name}: 5 rows removed" in capsys.readouterr().out
    assert run_dir.read(name, Trajectory) == rows
    assert run_dir.keys(name) == {row.key for row in rows}
    assert run_dir.done(name) == whole.done(name)


@pytest.mark.parametrize("stage", ["problems", "rollout", "refine"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "other"])
def test_what_the_line_about_a_damaged_shard_says_mends_it(
  done, tmp_path, capsys, stage, damage
):
  chosen, whole = done
  run_dir = RunDir(tmp_path / "run")
  for name in ("problems", "rollout", "refine"):
    shutil.copytree(whole.stage(name), run_dir.stage(name))
  (path, *_) = sorted(run_dir.stage(stage).glob("shard-*"))
  content = path.read_bytes()
  middle = len(content) // 2
  if damage == "flip":
    changed = content[:middle] + bytes([content[middle] ^ 4])
    path.write_bytes(changed + content[middle + 1 :])
  elif damage == "cut":
    path.write_bytes(content[:-7])
  elif damage == "other":
    (run_dir.stage(stage) / f"shard-1{path.name[7:]}").write_bytes(content)
  else:
    path.unlink()
  # The pipeline starts a stage where something is gone, and says else what is
  # wrong before any starts.
  if damage == "gone":
    assert not pipeline.is_done(run_dir, stage)
  else:
    with pytest.raises(UserError) as caught:
      pipeline.is_done(run_dir, stage)
    message = str(caught.value)
    assert ("move it away" if damage == "other" else "remove it") in message
    Path(message.partition(".parquet")[0] + ".parquet").unlink()
    assert pipeline.is_done(run_dir, stage) == (damage == "other")
  capsys.readouterr()
  if stage != "refine":
    (run_dir.stage("refine") / "done.json").unlink()
  if stage == "rollout" and damage != "other":
    # The next stage names it, and what to run.
    with pytest.raises(UserError, match=f"{path.name}, which rollout had left"):
      go(refine, chosen, run_dir)
  go(rollout, chosen, run_dir)
  go(refine, chosen, run_dir)
  out = capsys.readouterr().out
  again = {"problems": "they are read again", "rollout": "it is made again"}
  if damage != "other":
    assert f"which {stage} had left, is not there: " in out
    assert again.get(stage, "it is made again") in out
  for name, kind in (
    ("problems", Problem),
    ("rollout", Trajectory),
    ("refine", Trajectory),
  ):
    assert run_dir.read(name, kind) == whole.read(name, kind)
    assert run_dir.done(name) == whole.done(name)
    assert run_dir.rows_left(name) == whole.rows_left(name)
    assert pipeline.is_done(run_dir, name)


def test_problems_that_can_not_be_read_as_they_were_are_refused(done, tmp_path):
  _, whole = done
  run_dir = RunDir(tmp_path / "run")
  for name in ("problems", "rollout"):
    shutil.copytree(whole.stage(name), run_dir.stage(name))
  for path in run_dir.problems_dir.glob("shard-*"):
    path.unlink()
  other = small(**{"data.seed": 5, "data.arithmetic.num_problems": 25})
  with pytest.raises(UserError, match="are not the problems that this workdir"):
    go(refine, other, run_dir)


def test_prompts_over_the_budget_are_set_aside_and_counted(tmp_path):
  run_dir = RunDir(tmp_path)
  chosen = small(**{"rollout.max_prompt_tokens": 34})
  go(rollout, chosen, run_dir)
  rejected = run_dir.read_rejected("rollout")
  rows = run_dir.read("rollout", Trajectory)
  assert rejected
  assert rows
  assert len(rejected) + len(rows) == 24
  assert all("over max_prompt_tokens=34" in row.reason for row in rejected)
  assert max(len(row.prompt_ids) for row in rows) <= 34
  assert run_dir.done("rollout")["rejected"] == len(rejected)


def test_over_long_drafts_lose_their_middle_or_their_sample(done, tmp_path):
  _, whole = done
  lengths = sorted(
    len(row.prompt_ids) for row in whole.read("refine", Trajectory)
  )
  budget = lengths[len(lengths) // 2]
  for overflow in ("trim_middle", "drop"):
    run_dir = RunDir(tmp_path / overflow)
    chosen = small(
      **{"refine.max_prompt_tokens": budget, "refine.overflow": overflow}
    )
    go(rollout, chosen, run_dir)
    go(refine, chosen, run_dir)
    rows = run_dir.read("refine", Trajectory)
    over = sum(length > budget for length in lengths)
    assert over > 0
    assert max(len(row.prompt_ids) for row in rows) <= budget
    trimmed = sum(row.draft_elided_tokens > 0 for row in rows)
    aside = run_dir.read_rejected("refine")
    assert (trimmed, len(aside)) == (
      (over, 0) if overflow == "trim_middle" else (0, over)
    )


def test_stages_out_of_order_say_which_comes_first(tmp_path):
  run_dir = RunDir(tmp_path)
  with pytest.raises(UserError, match=r"run trd_jax\.rollout"):
    go(refine, small(), run_dir)
  with pytest.raises(UserError, match="no refine stage writes"):
    go(refine, small(method="forward_kl"), run_dir)
  with pytest.raises(UserError, match=r"trd_jax\.merge first"):
    go(evaluate, small(), run_dir, model="trained")
  with pytest.raises(UserError, match="choose base or trained"):
    go(evaluate, small(), run_dir, model="tuned")
  assert not run_dir.keys("refine")


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
  run_dir = RunDir(tmp_path)
  with pytest.raises(UserError, match=r"--config\.domain=arithmetic"):
    go(rollout, small(domain="math"), run_dir)
  chosen = small(**{"evaluate.benchmarks": ("arithmetics",)})
  with pytest.raises(UserError, match="no benchmark arithmetics"):
    go(evaluate, chosen, run_dir, model="base")
  assert not run_dir.root.exists() or not list(run_dir.root.rglob("*.parquet"))


def test_a_tokenizer_larger_than_the_head_is_refused(tmp_path):
  from trd_jax.lab import random_model
  from trd_jax.model.weights import hub

  small_head = tmp_path / "model"
  lab = hub.model_folder("lab:student")
  with pytest.raises(UserError, match="ask for more rows"):
    random_model.random_folder("nano", small_head, lab, vocab_size=300)
  random_model.random_folder("nano", small_head, lab, vocab_size=512)
  import json

  fields = json.loads((small_head / "config.json").read_text())
  fields["vocab_size"] = 300
  (small_head / "config.json").write_text(json.dumps(fields))
  chosen = small(**{"student.path": str(small_head)})
  with pytest.raises(UserError, match="has a head of 300 rows"):
    go(rollout, chosen, RunDir(tmp_path / "run"))


def test_a_damaged_config_is_named_in_one_line(tmp_path):
  from trd_jax.model.weights import hub

  model = tmp_path / "model"
  shutil.copytree(hub.model_folder("lab:student"), model)
  chosen = small(**{"student.path": str(model)})
  for text, says in (("{", "can't be read"), ("{}", "'vocab_size' is missing")):
    (model / "config.json").write_text(text)
    with pytest.raises(UserError, match=says) as error:
      go(rollout, chosen, RunDir(tmp_path / "run"))
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_evaluation_counts_every_sample_and_resumes(tmp_path, done):
  chosen = small(**{"evaluate.benchmarks": ("arithmetic", "arithmetic_hard")})
  run_dir = RunDir(tmp_path)
  go(evaluate, chosen, run_dir, model="base")
  rows = run_dir.read("evaluate/base", GradedSample)
  assert len(rows) == 2 * 8 * 4
  summary = run_dir.done("evaluate/base")
  for name in ("arithmetic", "arithmetic_hard"):
    here = [row for row in rows if row.benchmark == name]
    right = sum(row.correct is True for row in here)
    assert summary[name]["avg_at_k"] == pytest.approx(right / 32)
    solved = {row.problem_id for row in here if row.correct}
    assert summary[name]["pass_at_k"] == pytest.approx(len(solved) / 8)
    assert (summary[name]["k"], summary[name]["n"]) == (4, 8)
  # Half of the samples gone: the rest is drawn again, the same as before.
  again = RunDir(tmp_path / "again")
  with again.shard_writer("evaluate/base", GradedSample) as writer:
    for row in rows[::2]:
      writer.add(row)
  go(evaluate, chosen, again, model="base")
  assert again.read("evaluate/base", GradedSample) == rows


def test_rejected_rows_have_one_reason_each(done):
  _, run_dir = done
  assert all(
    isinstance(row, Rejected) and row.reason
    for stage in ("problems", "rollout", "refine")
    for row in run_dir.read_rejected(stage)
  )
