"""Split rounds take each problem once, and as many updates as one run."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trd_jax.data.problems import parts, store
from trd_jax.experiment import experiment, scopes
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files.json_files import read_json
from trd_jax.experiment.run_dir import RunDir


def config(**changes):
  return experiment.from_config(
    {
      "pipeline.split": True,
      **{k.replace("__", "."): v for k, v in changes.items()},
    }
  )


@given(
  problems=st.integers(1, 300),
  rounds=st.integers(1, 12),
  batch_size=st.integers(1, 24),
  samples=st.integers(1, 5),
)
def test_each_problem_is_in_one_part_and_no_update_is_lost(
  problems, rounds, batch_size, samples
):
  e = config(
    pipeline__rounds=rounds,
    train__batch_size=batch_size,
    rollout__samples=samples,
  )
  ids = [f"p{n}" for n in range(problems)]
  whole = -(-problems * samples // batch_size)
  # The fewest problems whose trajectories are whole updates.
  unit = next(n for n in range(1, 25) if n * samples % batch_size == 0)
  if rounds > -(-problems // unit):
    with pytest.raises(UserError, match=f"pipeline.rounds={rounds}: "):
      parts.all_of(e, ids)
    return
  cut = parts.all_of(e, ids)
  assert len(cut) == rounds
  assert sorted(one for part in cut for one in part) == sorted(ids)
  assert all(cut)
  # Whole updates in all rounds but the last, so that none is added.
  assert all(len(part) * samples % batch_size == 0 for part in cut[:-1])
  assert sum(parts.num_updates(e, len(part)) for part in cut) == whole
  sizes = [-(-len(part) // unit) for part in cut]
  assert max(sizes) - min(sizes) <= 1
  # Neither the order of the source nor what was set aside decides.
  assert parts.all_of(e, ids[::-1]) == cut
  if problems > 20 and rounds > 1:
    data = dataclasses.replace(e.data, seed=1)
    assert parts.all_of(dataclasses.replace(e, data=data), ids) != cut


def test_along_the_reference_a_problem_is_one_trajectory_however_many_samples():
  e = config(
    pipeline__rounds=2,
    train__batch_size=4,
    rollout__samples=4,
    trajectory="y_star",
    method="sft",
  )
  assert [len(part) for part in parts.all_of(e, list("abcdefgh"))] == [4, 4]


def test_more_rounds_than_updates_are_refused():
  e = config(pipeline__rounds=4, train__batch_size=8)
  with pytest.raises(UserError) as refused:
    parts.cuts(e, 24)
  assert str(refused.value) == (
    "pipeline.rounds=4: 24 problems make 3 updates of train.batch_size=8, which"
    " can be split over at most 3 rounds; set pipeline.rounds=3, or a smaller"
    " train.batch_size"
  )
  assert parts.cuts(e, 25) == [0, 8, 16, 24, 25]


def test_a_round_reads_its_part_and_all_parts_are_written_down(tmp_path):
  changes = {"data.arithmetic.num_problems": 24, "train.batch_size": 8}
  e = config(pipeline__rounds=2, **changes)
  run_dir = RunDir(tmp_path / "run")
  every = store.load_all(e, run_dir)
  second = dataclasses.replace(
    e, pipeline=dataclasses.replace(e.pipeline, round=2)
  )
  found = [store.load(one, run_dir) for one in (e, second)]
  assert [len(part) for part in found] == [8, 16]
  both = sorted(one.problem_id for part in found for one in part)
  assert both == [one.problem_id for one in every]
  for part in found:
    assert part == sorted(part, key=lambda one: one.problem_id)
  parts.record(e, run_dir, both)
  recorded = read_json(run_dir.parts)
  assert [set(part) for part in recorded["parts"]] == [
    {one.problem_id for one in part} for part in found
  ]
  # Once a later round has begun, another cut is another experiment.
  other = config(pipeline__rounds=3, **changes)
  parts.record(other, run_dir, both)
  run_dir.round(2).claim(experiment.to_json(second))
  with pytest.raises(UserError, match="cut in another way"):
    parts.record(e, run_dir, both)
  parts.record(other, run_dir, both)


def test_what_cuts_the_parts_locks_a_workdir_and_nothing_does_without(tmp_path):
  def names(stage, there, here):
    sides = [experiment.flat(experiment.from_config(v)) for v in (there, here)]
    return set(scopes.obstacles(*sides, [stage]))

  plain = {"pipeline.rounds": 2}
  split = {"pipeline.split": True, "pipeline.rounds": 4}
  keys = {"pipeline.rounds": 8, "pipeline.round": 2, "train.batch_size": 4}
  for name, value in keys.items():
    assert names("rollout", split, split | {name: value}) == {name}
  assert names("rollout", split, split | {"pipeline.split": False}) >= {
    "pipeline.split"
  }
  for stage in ("problems", "evaluate/base"):
    assert not names(stage, split, plain)
  assert not names("rollout", plain, {"pipeline.rounds": 3})
  # One part of one is all.
  one = {"pipeline.split": True, "pipeline.rounds": 1}
  assert not names("rollout", {}, one)
  assert not names("rollout", {}, {"train.batch_size": 4})
  # How often a student is evaluated changes nothing that is made.
  assert not names("train", split, split | {"pipeline.evaluate_every": 1})


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"pipeline.round": 2}, "pipeline.round=2 of 1: "),
    ({"pipeline.evaluate_every": 2}, "set pipeline.split=True"),
    (
      {
        "pipeline.split": True,
        "pipeline.rounds": 2,
        "train.max_steps": 3,
        "train.batch_size": 8,
        "rollout.samples": 2,
      },
      "set data.limit=12 in its place",
    ),
    (
      {
        "pipeline.split": True,
        "pipeline.rounds": 2,
        "engine.name": "server",
        "engine.server.urls": ("http://a",),
        "engine.server.model": "one",
      },
      "engine.server.model=one names one model",
    ),
  ],
)
def test_keys_that_contradict_split_rounds_are_named(changes, told):
  with pytest.raises(UserError) as refused:
    experiment.from_config(changes)
  assert told in str(refused.value)
