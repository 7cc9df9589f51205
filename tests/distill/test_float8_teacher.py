"""A training whose teacher multiplies in eight bits."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from tests.distill.test_mesh import paper_lengths, sizes
from tests.distill.test_teacher_cache import cached, experiment, hold_equal
from tests.distill.test_teacher_cache import trained as trained_in
from tests.support import training_runs
from trd_jax.distill import mesh_choice
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import from_config

pytestmark = pytest.mark.slow

SHARED = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
  return training_runs.model_folder(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  return training_runs.teacher_folder(tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize(
  ("regime", "dtype", "mesh"),
  [
    ("opsd", "float32", {"data": 1}),
    ("opsd", "bfloat16", SHARED),
    ("opd", "float32", SHARED),
  ],
)
def test_it_trains_alike_from_its_own_states(
  tmp_path, student, teacher, regime, dtype, mesh
):
  run = experiment(student, teacher if regime == "opd" else None, mesh)
  run = dataclasses.replace(
    run, student=dataclasses.replace(run.student, dtype=dtype)
  )
  exact = trained_in(cached(run), tmp_path / "exact")
  changed = dataclasses.replace(run.train, teacher_dtype="float8")
  run = dataclasses.replace(run, train=changed)
  whole = trained_in(run, tmp_path / "recompute")
  again = trained_in(cached(run), tmp_path / "cached")
  # The states that are kept are those that are computed along.
  hold_equal(whole, again)
  # They are others than without, and kept apart from them.
  off = [
    abs(row["D"] / other["D"] - 1)
    for row, other in zip(whole[1], exact[1], strict=True)
  ]
  assert 0 < max(off) < 0.2, off
  (folder,) = again[0].teacher_cache.iterdir()
  (other,) = exact[0].teacher_cache.iterdir()
  revision, computed, _ = other.name.rsplit("-", 2)
  wide = run.teacher_model.dtype
  assert computed == wide
  assert folder.name == f"{revision}-{wide}_float8-{wide}"


def test_on_one_device_and_on_eight_it_learns_the_same(tmp_path, student):
  def losses(mesh, name):
    run = experiment(student, None, mesh)
    run = dataclasses.replace(
      run,
      train=dataclasses.replace(run.train, teacher_dtype="float8"),
      # Each device drops channels of its own.
      lora=dataclasses.replace(run.lora, dropout=0.0),
    )
    _, rows, _ = trained_in(run, tmp_path / name)
    return [row["loss"] for row in rows]

  one, eight = losses({"data": 1}, "one"), losses({"data": 8}, "eight")
  np.testing.assert_allclose(one, eight, rtol=1e-4)


def test_gpus_that_cannot_are_refused_before_anything_is_read(
  tmp_path, student, monkeypatch
):
  run = experiment(student, teacher_dtype="float8")
  old = types.SimpleNamespace(
    platform="gpu", compute_capability="8.0", device_kind="NVIDIA A100"
  )
  monkeypatch.setattr(jax, "local_devices", lambda: [old])
  with pytest.raises(UserError, match=r"NVIDIA A100 has 8\.0") as caught:
    trained_in(run, tmp_path / "run")
  assert "train.teacher_dtype=float8 needs NVIDIA GPUs" in str(caught.value)


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"method": "sft"}, "with method=sft (cross_entropy) no teacher is run"),
    (
      {
        "train": {"teacher": "topk_from_rollout"},
        "refine": {"teacher_top_k": 8},
      },
      "with train.teacher=topk_from_rollout no teacher is run",
    ),
    ({"train": {"teacher_dtype": "float16"}}, "must be one of float8, or None"),
  ],
)
def test_what_runs_no_teacher_refuses_the_key(changes, told):
  train = {"teacher_dtype": "float8"} | changes.get("train", {})
  with pytest.raises(UserError) as caught:
    from_config(changes | {"train": train})
  assert told in str(caught.value)
  assert "train.teacher_dtype" in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_the_estimate_counts_half_a_copy_more_or_less(shape):
  """A copy in bfloat16 has two bytes a weight, one in eight bits has one."""

  def parts(*models, weights="model", **changes):
    made = sizes(*models, weights=weights, layout=paper_lengths, **changes)
    return mesh_choice.estimate(made, shape).parts

  config = sizes("8b").student.config
  linear = config.num_layers * config.linear_parameters()
  split = shape[1] * shape[2]
  # In OPSD the kernels alone; all else is the student's.
  own = parts("8b")
  assert "teacher" not in own
  more = parts("8b", in_float8=True)
  # With the scales, of which fsdp splits some.
  assert more["teacher"] * split == pytest.approx(linear, rel=1e-2)
  assert more["student"] == own["student"]
  # In OPD the kernels in bfloat16 are not there.
  wide = parts("1.7b", "8b")["teacher"]
  narrow = parts("1.7b", "8b", in_float8=True)["teacher"]
  assert (wide - narrow) * split == pytest.approx(linear, rel=1e-2)
  # While the student learns from a cache there is a head, as without.
  cached = parts("8b", weights="head", in_float8=True, remat="none")
  assert "teacher" not in cached
