"""A few inputs through each door; `make fuzz` sends thousands."""

import pytest

from tests.fuzz.doors import DOORS
from tests.fuzz.run import Hang, enter, send
from trd_jax.experiment.errors import UserError


@pytest.mark.parametrize("name", DOORS)
def test_a_door_refuses_or_reads(name):
  """With an error of the user's, or what was meant; and in seconds."""
  send(DOORS[name], round(30 * DOORS[name].share), stop=True)


def _refuses(value, folder):
  raise UserError(value)


def _fails(value, folder):
  raise KeyError(value)


def _hangs(value, folder):
  while True:
    pass


def test_faults_are_seen(monkeypatch):
  """Of a door that fails, hangs, or refuses without a word."""
  from hypothesis import strategies as st

  from tests.fuzz import run
  from tests.fuzz.doors import Door

  monkeypatch.setattr(run, "SECONDS", 0.05)
  good = Door(st.just("why"), _refuses)
  assert not enter(good, "why")
  with pytest.raises(AssertionError, match="without a word"):
    enter(good, " ")
  with pytest.raises(Hang):
    enter(Door(st.just(1), _hangs), 1)
  count = send(Door(st.integers(0, 3), _fails, found=(9,)), 4, seed=1)
  assert count.failed == count.inputs >= 2
  (where,) = count.faults
  assert where.startswith("KeyError at ")
