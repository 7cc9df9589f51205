"""Each alarm fires on what it is for, and on nothing near it."""

import json

import pytest

from tests.support.places import ROOT
from trd_jax.experiment import alarms, experiment
from trd_jax.experiment.run_dir import RunDir


def row(step, **changes):
  """A row of an ordinary training."""
  usual = {
    "step": step,
    "loss": 0.05,
    "D": 0.05 - 0.001 * step,
    "D_first_5": 0.1,
    "D_p99": 0.5,
    "grad_norm": 0.03 + 0.01 * (step % 3),
    "adapter_norm": 12.0 + 0.1 * step,
    "learning_rate": 1e-3,
  }
  return usual | changes


def rows(count=20, **changes):
  return [row(step, **changes) for step in range(count)]


def changed(at, **changes):
  """Ordinary rows, of which one is another."""
  return [row(step, **(changes if step == at else {})) for step in range(20)]


NAN = float("nan")
FIRES = {
  # What fires, at which update, and what nearly does.
  "nan": (changed(7, D=NAN), 8, [changed(7, D_correct=NAN)]),
  "first_tokens": (
    changed(0, D=0.3, D_first_5=3.1),
    1,
    [changed(0, D=0.3, D_first_5=2.9), changed(9, D=1e-3, D_first_5=0.9)],
  ),
  "teacher_equals_student": (
    rows(D=0.0, D_p99=0.0),
    1,
    # The mean of a divergence that may be negative; what has been learnt.
    [rows(D=0.0), changed(19, D=1e-9, D_p99=1e-6)],
  ),
  "adapter_idle": (
    rows(adapter_norm=12.0),
    alarms.IDLE_UPDATES,
    [
      rows(alarms.IDLE_UPDATES - 1, adapter_norm=12.0),
      rows(adapter_norm=12.0, learning_rate=0.0),
      [row(step, adapter_norm=12.0 + step // 9) for step in range(30)],
    ],
  ),
  "gradient_spike": (
    changed(15, grad_norm=0.5),
    16,
    [changed(15, grad_norm=0.3), changed(alarms.SPIKE_AFTER - 1, grad_norm=9)],
  ),
}


def names(found):
  return [fired.name for fired in found]


def test_an_ordinary_training_fires_nothing():
  assert alarms.of_rows(rows(200)) == []
  # A null is in no file of ours but where something was no number.
  assert names(alarms.of_rows(rows(loss=None))) == ["nan"]


@pytest.mark.parametrize("name", FIRES)
def test_an_alarm_of_rows_fires_once_and_at_its_update(name):
  wrong, update, near = FIRES[name]
  (found,) = (one for one in alarms.of_rows(wrong) if one.name == name)
  assert (found.stage, found.update) == ("train", update)
  assert f"alarm {name} at update {update}: " in found.line
  assert found.line.endswith(alarms.ALARMS[name].remedy)
  for one in near:
    assert name not in names(alarms.of_rows(one))


def test_a_gradient_of_zero_is_an_idle_adapter_whatever_weight_decay_does():
  (found,) = alarms.of_rows(rows(grad_norm=0.0))
  assert (found.name, found.update) == ("adapter_idle", alarms.IDLE_UPDATES)


def test_a_training_that_goes_on_says_nothing_again():
  wrong = [*changed(3, D=NAN), row(20, D=NAN, grad_norm=9.0)]
  assert names(alarms.Watch(wrong[:20]).look(wrong[20])) == ["gradient_spike"]
  watch = alarms.Watch()
  each = [fired for one in wrong for fired in watch.look(one)]
  assert each == alarms.of_rows(wrong)


def figures(**changes):
  usual = {
    "avg_at_k": 0.4,
    "pass_at_k": 0.92,
    "pass_at_k_interval": [0.83, 0.97],
    "k": 16,
    "truncated_share": 0.0,
    "median_tokens": 100,
  }
  return usual | changes


SAMPLES = {"samples": 100, "truncated": 0, "leaks": 0}


def stages(base=None, trained=None, **summaries):
  return {
    "rollout": SAMPLES | summaries.get("rollout", {}),
    "refine": SAMPLES | summaries.get("refine", {}),
    "merge": {"largest_logit_distance_to_base": 1.0},
    "evaluate/base": {"b": figures(**(base or {})), "weights": {"m": "1"}},
    "evaluate/trained": {"b": figures(**(trained or {})), "made_by": {}},
  }


OF_STAGES = {
  "truncated_share": (
    stages(rollout={"truncated": 30}),
    "rollout",
    stages(rollout={"truncated": 29}, base={"truncated_share": 0.29}),
  ),
  "leak_share": (
    stages(refine={"leaks": 5}),
    "refine",
    stages(refine={"leaks": 4}),
  ),
  "length_collapse": (
    stages(trained={"median_tokens": 19}),
    "evaluate/trained",
    stages(trained={"median_tokens": 21}),
  ),
  "runaway_length": (
    stages(trained={"median_tokens": 201}),
    "evaluate/trained",
    stages(trained={"median_tokens": 199}),
  ),
  "pass_collapse": (
    stages(trained={"pass_at_k": 0.82}),
    "evaluate/trained",
    stages(trained={"pass_at_k": 0.84}),
  ),
  "samples_of_base": (
    stages(trained={"identical_to_base": 0.96}),
    "evaluate/trained",
    stages(trained={"identical_to_base": 0.94}),
  ),
}


@pytest.mark.parametrize("name", OF_STAGES)
def test_an_alarm_of_stages_fires_on_that_stage_alone(name):
  wrong, stage, near = OF_STAGES[name]
  (found,) = alarms.of_stages(wrong)
  assert (found.name, found.stage, found.update) == (name, stage, None)
  assert alarms.of_stages(near) == []


def test_truncation_is_seen_in_every_stage_that_samples():
  every = stages(
    rollout={"truncated": 90},
    refine={"truncated": 90},
    base={"truncated_share": 0.9},
    trained={"truncated_share": 0.9},
  )
  found = alarms.of_stages(every)
  assert {one.stage for one in found} == {*every} - {"merge"}


def test_what_cant_be_compared_is_no_alarm():
  other = stages(trained={"pass_at_k": 0.1, "k": 4})
  assert alarms.of_stages(other) == []
  del other["evaluate/base"]
  assert alarms.of_stages(other) == []
  assert alarms.of_stages({}) == []
  assert alarms.of_stages({"rollout": {"samples": 0, "truncated": 0}}) == []


def test_a_run_has_the_alarms_of_its_stages_and_its_rows(tmp_path):
  run_dir = RunDir(tmp_path, experiment.to_json(experiment.from_config({})))
  assert alarms.of_run(run_dir) == []
  run_dir.stage("train").mkdir()
  text = "\n".join(json.dumps(one) for one in rows(adapter_norm=1.0))
  run_dir.metrics_file("train").write_text(text + "\n")
  run_dir.stage("refine").mkdir()
  run_dir.mark_done("refine", SAMPLES | {"leaks": 50})
  found = alarms.of_run(run_dir)
  assert names(found) == ["leak_share", "adapter_idle"]
  # As files have them, and back.
  kept = json.loads(json.dumps([one._asdict() for one in found]))
  assert [alarms.Fired(**one) for one in kept] == found


def test_every_alarm_is_tried_here_and_documented():
  assert {*FIRES, *OF_STAGES} == {*alarms.ALARMS}
  assert alarms.documented() in (ROOT / "docs/training.md").read_text()
