"""A run takes over from another what it would make in the same way."""

import dataclasses
import shutil

import pytest

from tests.support import chat_folders, training_runs
from trd_jax.data import prompts
from trd_jax.data.chat import Chat
from trd_jax.data.problems import store
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import from_config, to_json
from trd_jax.experiment.records import Trajectory
from trd_jax.experiment.run_dir import RunDir
from trd_jax.pipeline import takeover


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
  """A run that has rolled out and refined."""
  root = tmp_path_factory.mktemp("donor")
  chat = Chat.load(chat_folders.write_folder(tmp_path_factory.mktemp("chat")))
  run_dir = training_runs.workdir(root, chat)
  run_dir.config.write_text(to_json(from_config({})))
  return run_dir


def taken(donor, here, **values):
  """Takes over, and returns what was said of each stage."""
  chosen = from_config(values)
  return dict(takeover.plan(chosen, RunDir(here), donor))


def test_what_training_alone_depends_on_leaves_all_before_it(donor, tmp_path):
  found = taken(donor, tmp_path, train={"learning_rate": 1e-3})
  assert found.pop("problems") is found.pop("rollout") is None
  assert found.pop("refine") is None
  assert found == {
    "train": "not finished there",
    "evaluate/base": "not finished there",
  }


def test_the_keys_in_the_way_are_named_with_both_values(donor, tmp_path):
  found = taken(donor, tmp_path, rollout={"temperature": 0.7})
  assert found["problems"] is None
  said = "rollout.temperature is 0.6 there and 0.7 here"
  # What is made of the rollouts is another one, too.
  assert found["rollout"] == found["refine"] == said
  found = taken(donor, tmp_path, refine={"temperature": 0.7})
  assert found["rollout"] is None
  assert found["refine"] == "refine.temperature is 0.6 there and 0.7 here"
  found = taken(donor, tmp_path, data={"arithmetic": {"num_problems": 7}})
  assert "data.arithmetic.num_problems is " in found["problems"]
  assert found["problems"] == found["rollout"] == found["refine"]


def test_one_point_under_two_names_is_one(donor, tmp_path):
  found = taken(donor, tmp_path, method="forward_kl", trajectory="y_r")
  assert found["refine"] is None
  # A stage that this run hasn't is no matter.
  assert "refine" not in taken(donor, tmp_path, method="jsd")


def test_taken_over_rows_are_the_donors(donor, tmp_path, capsys):
  here = RunDir(tmp_path / "here")
  chosen = from_config({"loss": {"temperature": 2.0}})
  takeover.take_over(chosen, here, donor.root)
  said = capsys.readouterr().out
  for stage in ("rollout", "refine"):
    assert here.read(stage, Trajectory) == donor.read(stage, Trajectory)
    assert here.done(stage) == donor.done(stage)
    assert f"{stage}: taken over from {donor.root}" in said
  # Once more it is there already, and nothing is touched.
  takeover.take_over(chosen, here, donor.root)
  said = capsys.readouterr().out
  assert f"rollout: taken over from {donor.root} before" in said
  # What this run has made itself is its own.
  (here.stage("rollout") / "done.json").unlink()
  here.mark_done("rollout", {})
  takeover.take_over(chosen, here, donor.root)
  said = capsys.readouterr().out
  assert f"rollout: not taken over from {donor.root}: done here" in said


def test_of_several_rounds_it_says_that_the_first_alone_is_taken_over(
  donor, tmp_path, capsys
):
  chosen = from_config({"pipeline.rounds": 3})
  takeover.take_over(chosen, RunDir(tmp_path / "here"), donor.root)
  said = capsys.readouterr().out
  assert "--from is for round 1; those up to 3 are made here" in said
  assert takeover.of_further_rounds(from_config({})) == ""


def test_what_is_begun_here_stays(donor, tmp_path):
  here = RunDir(tmp_path)
  folder = here.stage("rollout")
  folder.mkdir()
  (folder / "rows-0.parquet").write_text("")
  assert taken(donor, tmp_path)["rollout"] == "begun here"


def test_what_is_no_other_run_is_refused(donor, tmp_path):
  with pytest.raises(UserError, match="is the workdir itself"):
    taken(donor, donor.root)
  with pytest.raises(UserError, match=r"it has no config\.json"):
    taken(RunDir(tmp_path / "nowhere"), tmp_path)


def test_what_was_copied_into_the_donor_counts_as_what_it_is(donor, tmp_path):
  """Its own record tells how a stage was made, and not the donor's config."""
  mixed = RunDir(tmp_path / "mixed", to_json(from_config({})))
  warmer = RunDir(
    tmp_path / "warmer", to_json(from_config({"rollout": {"temperature": 0.7}}))
  )
  warmer.mark_done("rollout", {"samples": 1})
  shutil.copytree(warmer.stage("rollout"), mixed.stage("rollout"))
  found = taken(mixed, tmp_path / "new")
  assert found["rollout"] == "rollout.temperature is 0.7 there and 0.6 here"
  found = taken(mixed, tmp_path / "new", rollout={"temperature": 0.7})
  assert found["rollout"] is None


def test_words_that_have_changed_in_their_folder_are_no_longer_the_donors(
  donor, tmp_path
):
  """The key is the same, and what it names isn't."""
  folder = tmp_path / "mine"
  folder.mkdir()
  template = folder / "refinement_math.jinja"
  template.write_text("{{ problem }} {{ draft }}")
  values = {"prompts": {"set": str(folder)}}
  copy = RunDir(tmp_path / "copy")
  shutil.copytree(donor.root, copy.root)
  copy.config.write_text(to_json(from_config(values)))
  version = prompts.load(str(folder)).version
  for stage in ("rollout", "refine"):
    rows = copy.read(stage, Trajectory)
    copy.replace(
      stage,
      Trajectory,
      [dataclasses.replace(row, prompt_version=version) for row in rows],
    )
  assert taken(copy, tmp_path / "new", **values)["refine"] is None
  template.write_text("{{ problem }} and {{ draft }}")
  prompts.load(str(folder))
  found = taken(copy, tmp_path / "new", **values)
  assert found["problems"] is None
  for stage in ("rollout", "refine"):
    assert "another wording" in found[stage]


def test_a_file_that_has_changed_takes_all_that_was_made_of_it_along(
  donor, tmp_path
):
  mine = tmp_path / "mine.jsonl"
  mine.write_text('{"problem": "1+1?", "answer": "2", "domain": "math"}')
  values = {
    "data": {"source": "jsonl", "root": str(mine)},
    "domain": "math",
    "evaluate": {"benchmarks": ("math500",)},
  }
  chosen = from_config(values)
  here = RunDir(tmp_path / "donor", to_json(chosen))
  store.load(chosen, here)
  for stage in ("rollout", "refine"):
    shutil.copytree(donor.stage(stage), here.stage(stage))
  assert set(taken(here, tmp_path / "new", **values).values()) == {
    None,
    "not finished there",
  }
  mine.write_text('{"problem": "1+2?", "answer": "3", "domain": "math"}')
  found = taken(here, tmp_path / "new", **values)
  assert f"data.root={mine}: mine.jsonl has changed since" in found["problems"]
  assert found["rollout"] == found["refine"] == "problems isn't either"
