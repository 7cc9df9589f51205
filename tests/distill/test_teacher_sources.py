"""The sources of the teacher's side, as the config names them."""

import pytest

from trd_jax.distill.teacher.registry import SOURCES
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import from_config


def test_the_config_names_the_sources_that_there_are():
  with pytest.raises(UserError) as caught:
    from_config({"train": {"teacher": "nobody"}})
  assert f"one of {', '.join(SOURCES)}" in str(caught.value)
  for name in SOURCES:
    config = {"train": {"teacher": name}, "refine": {"teacher_top_k": 8}}
    assert from_config(config).train.teacher == name


def test_what_is_loaded_of_a_teacher_differs_by_source():
  held = {name: source.weights for name, source in SOURCES.items()}
  assert held == {
    "recompute": "model",
    "hidden_cache": "head",
    "topk_from_rollout": "none",
  }
