"""A workdir keeps the problems that it read, and knows what of."""

import contextlib
import dataclasses
import json
import types

import pyarrow.parquet as pq
import pytest

from trd_jax import refine, rollout
from trd_jax.data.problems import sources, store
from trd_jax.experiment import experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.run_dir import RunDir
from trd_jax.pipeline import pipeline

NO_FLAGS = types.SimpleNamespace(
  dry_run=False, status=None, config_argv=[], **{"from": None}
)


def rows(*names):
  tests = {"inputs": ["1\n"], "outputs": ["1\n"]}
  return "\n".join(
    json.dumps(
      {
        "problem": f"Find {name}.",
        "answer": "1",
        "input_output": json.dumps(tests),
      }
    )
    for name in names
  )


def chosen(source, root):
  return experiment.from_config(
    {
      "domain": "code" if source == "taco" else "math",
      "data.source": source,
      "data.root": str(root),
      "evaluate.benchmarks": ("arithmetic",),
    }
  )


def done(stage, run_dir):
  """The stage's own last write, in a directory of no samples."""
  keys = ("samples", "correct", "truncated", "unjudged", "median_tokens")
  run_dir.mark_done(stage, dict.fromkeys(keys, 0))


@pytest.fixture(params=["jsonl", "deepscaler", "taco"])
def read(request, tmp_path):
  """An experiment whose problems have been read from a file."""
  file = tmp_path / "mine.jsonl"
  file.write_text(rows("x", "y"))
  made = chosen(request.param, file)
  run_dir = RunDir(tmp_path / "run")
  assert len(store.load(made, run_dir)) == 2
  return made, run_dir, file


def test_a_file_that_has_changed_is_named_by_every_stage(read):
  made, run_dir, file = read
  before = file.read_text()
  file.write_text(rows("x", "z"))
  # A finished stage run again, one that follows it, and both in the pipeline.
  done("rollout", run_dir)
  for stage in (rollout, refine, pipeline):
    with pytest.raises(UserError, match=r"mine\.jsonl has changed since") as it:
      stage.run(made, run_dir, NO_FLAGS)
    assert f"data.root={file}" in str(it.value)
    assert "name another --workdir" in str(it.value)
  with pytest.raises(UserError, match="has changed since"):
    store.load(made, run_dir)
  file.write_text(before)
  rollout.run(made, run_dir, NO_FLAGS)
  assert len(store.load(made, run_dir)) == 2


@pytest.mark.parametrize("only", [True, False])
def test_reasons_are_told_where_no_file_keeps_them(only, tmp_path, capsys):
  file = tmp_path / "mine.jsonl"
  bad = [{"problem": "Find a.", "answer": True}, {"answer": "1"}]
  file.write_text("\n".join([rows("x"), *map(json.dumps, bad)]))
  made = dataclasses.replace(chosen("jsonl", file), preflight_only=only)
  run_dir = RunDir(tmp_path / "run")
  assert len(store.load(made, run_dir)) == 1
  told = capsys.readouterr().out
  assert told.count("set aside: ") == (2 if only else 1)
  assert (str(run_dir.rejected("problems")) in told) != only


@pytest.mark.parametrize("stage", [rollout, refine])
def test_files_are_looked_at_once_a_stage(read, stage, monkeypatch):
  made, run_dir, file = read
  looked_at, sha256 = [], sources.sha256
  monkeypatch.setattr(
    sources, "sha256", lambda path: looked_at.append(path) or sha256(path)
  )
  made = dataclasses.replace(made, preflight_only=True)
  if stage is refine:
    done("rollout", run_dir)
  with contextlib.suppress(UserError):  # there is no draft to refine
    stage.run(made, run_dir, NO_FLAGS)
  assert looked_at == [file]
  done(stage.STAGE, run_dir)
  stage.run(made, run_dir, NO_FLAGS)
  assert looked_at == [file, file]


def test_a_file_that_is_gone_is_not_missed(read):
  made, run_dir, file = read
  file.unlink()
  assert len(store.load(made, run_dir)) == 2


def test_a_file_that_can_not_be_read_is_told_in_one_line(tmp_path):
  file = tmp_path / "mine.jsonl"
  file.symlink_to("/proc/self/mem")  # of which the first byte is nobody's
  run_dir = RunDir(tmp_path / "run")
  with pytest.raises(UserError, match=r"mine\.jsonl can't be read \(") as it:
    store.load(chosen("jsonl", file), run_dir)
  assert "\n" not in str(it.value)
  assert run_dir.done("problems") is None


def test_a_file_that_can_not_be_read_any_more_is_not_missed(tmp_path):
  folder = tmp_path / "mine"
  folder.mkdir()
  for name in "ab":
    (folder / f"{name}.jsonl").write_text(rows(name))
  made = chosen("jsonl", folder)
  run_dir = RunDir(tmp_path / "run")
  store.load(made, run_dir)
  (folder / "a.jsonl").unlink()
  (folder / "a.jsonl").symlink_to("/proc/self/mem")
  assert len(store.load(made, run_dir)) == 2
  # The others are looked at nevertheless.
  (folder / "b.jsonl").write_text(rows("c"))
  with pytest.raises(UserError, match=r"b\.jsonl has changed since"):
    store.load(made, run_dir)


@pytest.mark.parametrize("source", ["jsonl", "deepscaler", "taco"])
def test_one_more_file_in_the_folder_is_named(tmp_path, source):
  folder = tmp_path / "mine"
  folder.mkdir()
  (folder / "a.jsonl").write_text(rows("x"))
  made = chosen(source, folder)
  run_dir = RunDir(tmp_path / "run")
  store.load(made, run_dir)
  (folder / "b.jsonl").write_text(rows("y"))
  with pytest.raises(UserError, match=r"b\.jsonl was not there"):
    store.load(made, run_dir)
  for name in "ba":  # what has come is gone, and then what was read
    (folder / f"{name}.jsonl").unlink()
    assert len(store.load(made, run_dir)) == 1


def test_flags_of_special_judges_belong_to_the_source(tmp_path):
  file = tmp_path / "taco.jsonl"
  file.write_text(rows("x"))
  flags = tmp_path / "taco_special_judge_flags.jsonl"
  flags.write_text(json.dumps({"idx": 0, "special_judge": False}))
  made = chosen("taco", file)
  run_dir = RunDir(tmp_path / "run")
  store.load(made, run_dir)
  flags.write_text(json.dumps({"idx": 0, "special_judge": True}))
  with pytest.raises(UserError, match=r"flags\.jsonl has changed"):
    store.load(made, run_dir)


def test_rows_without_a_domain_may_be_meant_for_the_laboratory(tmp_path):
  file = tmp_path / "mine.jsonl"
  file.write_text(rows("x"))
  made = dataclasses.replace(chosen("jsonl", file), domain="arithmetic")
  with pytest.raises(UserError) as it:
    store.load(made, RunDir(tmp_path / "run"))
  assert str(it.value).endswith(
    '; write "domain": "arithmetic" into the rows, or set --config.domain=math'
  )
  made = dataclasses.replace(chosen("jsonl", file), domain="code")
  with pytest.raises(
    UserError, match=r"domain=code; set --config\.domain=math"
  ):
    store.load(made, RunDir(tmp_path / "run"))


def test_a_dry_run_looks_whether_the_files_are_there(read, tmp_path):
  made, run_dir, file = read
  dry = types.SimpleNamespace(
    dry_run=True,
    status=None,
    config_argv=["--config=demo.py"],
    **{"from": None},
  )
  before = file.read_text()
  file.write_text(rows("z"))
  with pytest.raises(UserError, match=r"mine\.jsonl has changed since"):
    pipeline.run(made, run_dir, dry)
  file.write_text(before)
  fresh = RunDir(tmp_path / "fresh")
  store.check_files(made, fresh)
  file.unlink()
  store.check_files(made, run_dir)  # which has its own copy
  with pytest.raises(UserError, match="no such file or folder"):
    pipeline.run(made, fresh, dry)
  assert not fresh.root.exists()
  none = dataclasses.replace(made.data, root=None)
  made = dataclasses.replace(made, data=none)
  if none.source == "jsonl":
    with pytest.raises(UserError, match=r"set data\.root"):
      store.check_files(made, fresh)
  else:
    store.check_files(made, fresh)  # it will be downloaded


def test_problems_without_a_record_are_read_anew_and_none_twice(read):
  made, run_dir, file = read
  done = run_dir.stage("problems") / "done.json"
  done.unlink()
  assert len(store.load(made, run_dir)) == 2
  shards = list(run_dir.stage("problems").glob("shard-*.parquet"))
  assert sum(pq.read_metadata(path).num_rows for path in shards) == 2
  # What an attempt that was killed has left of another file is none of it.
  done.unlink()
  file.write_text(rows("x", "z"))
  assert len(store.load(made, run_dir)) == 2
  texts = " ".join(problem.text for problem in store.load(made, run_dir))
  assert "Find z." in texts
  assert "Find y." not in texts
