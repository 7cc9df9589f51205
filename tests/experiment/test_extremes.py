"""Numbers, lists and sweeps with which no run would end: refused at once."""

import itertools
import math
import time

import pytest

from trd_jax.experiment import cli, experiment, sweep_points
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import KEYS
from trd_jax.experiment.sweep_points import product, zipped

NUMERIC = sorted(name for name, key in KEYS.items() if key.type in (int, float))
EXTREMES = [
  *("0", "-1", "1", "2147483647", "2147483648", "1000000000"),
  *("9223372036854775807", "9223372036854775808", "1" + "0" * 400),
  *("1e308", "1e999", "5e-324", "-0.0", "-1e308", "nan", "inf", "-inf"),
  *("1e9", "1_000", "٣", "0x10", "", " 1 ", "1" * 5000),
]


@pytest.mark.parametrize("name", NUMERIC)
def test_an_extreme_number_is_refused_or_stays_what_it_is(name):
  """On the command line, which reads texts, and in a config."""
  began = time.monotonic()
  for text in EXTREMES:
    try:
      line = cli._CommandLine((), [f"--config.{name}={text}"])
      chosen = experiment.from_config(line.overrides)
    except UserError as error:
      if name not in str(error):
        raise
      continue
    value = experiment.flat(chosen)[name]
    assert value == KEYS[name].type(text)
    assert math.isfinite(value)
    assert str(value) != "-0.0"
    assert experiment.flat(experiment.from_config({name: value}))[name] == value
    if KEYS[name].type is float:
      assert value == 0 or 1e-30 <= abs(value) <= 1e30
    elif not name.endswith("seed"):
      assert abs(value) < 2**31
  assert time.monotonic() - began < 5


@pytest.mark.parametrize(
  ("flag", "told"),
  [
    ("evaluate.k=1000000000", "at most 10,000, not 1000000000"),
    ("evaluate.k=2147483648", "not 2147483648, which is too large"),
    ("rollout.samples=100000", "at most 10,000"),
    ("evaluate.num_problems=100000000", "at most 1,000,000"),
    ("data.arithmetic.max_steps=100000", "at most 1,000"),
    (
      "train.max_steps=2147483648",
      "at least 1, or None, not 2147483648, which",
    ),
    ("train.learning_rate=1e308", r"not 1e\+308, which is too large"),
    ("loss.temperature=1e-320", "which is too small"),
    ("engine.server.request_seconds=1e20", "at most a year"),
    ("seed=9223372036854775808", r"from 0 to 2\^63 - 1"),
  ],
)
def test_what_is_too_much_is_said(flag, told):
  with pytest.raises(UserError, match=told):
    cli._CommandLine((), [f"--config.{flag}"])


def test_zero_has_one_sign():
  (same,) = {
    experiment.to_json(experiment.from_config({"rollout.temperature": zero}))
    for zero in (0, 0.0, -0.0)
  }
  assert "-0.0" not in same


def test_a_list_of_a_million_names_is_refused_in_a_short_line():
  names = [f"name{n}" for n in range(1_000_000)]
  with pytest.raises(UserError, match="benchmarks must be") as caught:
    experiment.from_config({"evaluate.benchmarks": names})
  assert len(str(caught.value)) < 500


def test_a_sweep_of_a_billion_points_is_refused(tmp_path):
  axes = {f"key{n}": range(10) for n in range(9)}
  with pytest.raises(UserError, match="1,000,000,000 points, and a sweep"):
    product(axes)
  path = tmp_path / "sweep.py"
  path.write_text(
    "import itertools\nfrom trd_jax.experiment.sweep_points import point\n"
    "def get_sweep():\n"
    "  return (point(f'p{n}', {}) for n in itertools.count())\n"
  )
  with pytest.raises(UserError, match="more points, and a sweep has at most"):
    sweep_points.load(path)


def test_a_sweep_of_thousands_of_points_is_named_at_once():
  began = time.process_time()
  axes = {"seed": range(100), "train.seed": range(100)}
  assert len(sweep_points.checked(product(axes), "x")) == 10_000
  assert time.process_time() - began < 5
  pairs = list(itertools.islice(itertools.count(), 5))
  assert len(zipped({"seed": pairs, "lora.rank": pairs})) == 5
