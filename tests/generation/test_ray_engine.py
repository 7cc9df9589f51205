"""What becomes of Ray's failures, with a stand-in for Ray."""

import json
import sys
import types
from unittest import mock

import pytest

from trd_jax.experiment.errors import UserError
from trd_jax.experiment.schema import Engine, Ray
from trd_jax.generation.engines import factory, ray_engine
from trd_jax.generation.engines.engine import Request, Sampling
from trd_jax.model.weights.model_files import ModelFiles


class RayError(Exception):
  """As `ray.exceptions` has it."""


class RayTaskError(RayError):
  """What code raised in an actor or a task."""

  def __init__(self, cause):
    super().__init__("a traceback")
    self.cause = cause


class ActorDiedError(RayError):
  """The end of an actor, by its own fault or by another."""

  def __init__(self, told, actor_init_failed=False):
    super().__init__(told)
    self.actor_init_failed = actor_init_failed


class UserCodeException(RayError):
  """Ray Data's, around what a mapped function raised."""


EXCEPTIONS = types.SimpleNamespace(
  RayError=RayError,
  RayTaskError=RayTaskError,
  UserCodeException=UserCodeException,
)
BUG = RayTaskError(ZeroDivisionError("a bug"))
FAILED_INIT = ActorDiedError("in its creation task", actor_init_failed=True)


@pytest.fixture
def failing(tmp_path, monkeypatch):
  """Generates with an engine whose cluster fails as it is told."""
  size = {"vocab_size": 8, "max_position_embeddings": 64}
  (tmp_path / "config.json").write_text(json.dumps(size))

  def generate(error, requests=None, batch=256):
    requests = requests or [Request("key", [1], 0, 4)]
    ray = mock.MagicMock(exceptions=EXCEPTIONS)
    ray.cluster_resources.return_value = {"CPU": 8}
    mapped = ray.data.from_arrow.return_value.map_batches.return_value
    mapped.iter_batches.side_effect = error
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", ray.data)
    made = ray_engine.RayEngine(
      Engine(ray=Ray(actors=1, batch=batch)),
      ModelFiles("model", tmp_path, "revision", "float32"),
      max_model_tokens=32,
      make=factory.make,
    )
    return list(made.generate(requests, Sampling()))

  return generate


@pytest.mark.parametrize(
  "error",
  [
    ActorDiedError("The actor died\n\tpid: 7\nout of memory " + 999 * "x "),
    RayTaskError(ActorDiedError("The actor died pid: 7 out of memory")),
  ],
)
def test_a_failure_of_rays_is_one_line_that_says_how_to_go_on(failing, error):
  with pytest.raises(UserError) as told:
    failing(error)
  said = str(told.value)
  assert said.startswith("Ray failed (The actor died pid: 7 out of memory")
  assert said.endswith("and the same command goes on from there")
  assert len(said) < 600
  assert "\n" not in said


def test_a_mistake_that_an_actor_finds_is_the_users(failing):
  with pytest.raises(UserError, match=r"^in a Ray actor: no model$"):
    failing(RayTaskError(UserError("no model")))


@pytest.mark.parametrize("error", [BUG, FAILED_INIT, ValueError("a bug")])
def test_what_code_raises_keeps_its_traceback(failing, error):
  with pytest.raises(type(error)) as raised:
    failing(error)
  assert raised.value is error


def test_actors_get_the_longest_prompts_first(failing):
  asked = [Request(f"{n}", n * [1], 0, 4) for n in (2, 5, 1, 4, 3)]
  with pytest.raises(UserError):
    failing(ActorDiedError("gone"), asked, batch=2)
  ((blocks,), _) = sys.modules["ray.data"].from_arrow.call_args
  keys = [block["key"].to_pylist() for block in blocks]
  assert keys == [["5", "4"], ["3", "2"], ["1"]]
