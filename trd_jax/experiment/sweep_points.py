"""A sweep as data: the points at which an experiment is run.

A sweep file stands beside its config and defines `get_sweep`:

    from trd_jax.experiment.sweep_points import point, product, zipped

    def get_sweep():
      return [
        point("paper"),
        *product({"method": ["trd", "jsd"], "train.epochs": [1, 2]}),
        *zipped({"lora.rank": [8, 64], "lora.alpha": [16.0, 128.0]}),
      ]

A point is a name and the config keys that it sets, by their dotted names.
"""

import dataclasses
import itertools
import re
import runpy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trd_jax.experiment.errors import UserError

_MOST_NAME = 120
_UNFIT = re.compile(r"[^A-Za-z0-9._=,+-]+")


@dataclasses.dataclass(frozen=True)
class Point:
  """One run of a sweep.

  Attributes:
    name: names its folder; unique in the sweep.
    values: what it sets, by dotted key.
    is_own: whether the name was given, not made of the values.
    alone: the name that its values make alone, where the sweep's other keys
      make it another one. A sweep that had fewer keys, or was begun when names
      looked at no other point, has its folder under that.
  """

  name: str
  values: Mapping[str, Any]
  is_own: bool = True
  alone: str | None = None


def point(name: str, values: Mapping[str, Any] | None = None) -> Point:
  """A point with a name of its own; without values, the config as it is."""
  return Point(_fit(name), dict(values or {}))


def product(axes: Mapping[str, Sequence[Any]]) -> list[Point]:
  """Every combination of the axes' values, the last axis fastest."""
  combinations = itertools.product(*axes.values())
  return [_named(dict(zip(axes, c, strict=True))) for c in combinations]


def zipped(axes: Mapping[str, Sequence[Any]]) -> list[Point]:
  """The axes' first values, then their second ones, and so on.

  Raises:
    UserError: the axes are not equally long.
  """
  lengths = {key: len(values) for key, values in axes.items()}
  if len(set(lengths.values())) > 1:
    told = ", ".join(f"{key} {length}" for key, length in lengths.items())
    raise UserError(f"zipped: the axes must be equally long, not {told}")
  columns = zip(*axes.values(), strict=True)
  return [_named(dict(zip(axes, c, strict=True))) for c in columns]


def load(path: Path | str) -> list[Point]:
  """The points of a sweep file.

  Raises:
    UserError: there is no such file, it defines no `get_sweep`, it fails, or
      what it gives is no list of points with names of their own.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(
      f"--sweep={path}: there is no such file; name one of configs/sweeps/*.py"
    )
  try:
    get_sweep = runpy.run_path(str(path)).get("get_sweep")
    found = None if get_sweep is None else list(get_sweep())
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  except Exception as error:
    what = " ".join(str(error).split())
    raise UserError(f"{path}: {type(error).__name__}: {what}") from error
  if found is None:
    raise UserError(f"{path}: it defines no get_sweep")
  return checked(found, str(path))


def checked(points: Iterable[Any], source: str) -> list[Point]:
  """The points, if they are such and their names differ.

  Names made of values say the last part of a key where no other key of the
  sweep has it, else all of it.
  """
  found = list(points)
  if not found:
    raise UserError(f"{source}: the sweep has no points")
  for one in found:
    if not isinstance(one, Point):
      raise UserError(
        f"{source}: a {type(one).__name__} is no point; make points with"
        " point, product and zipped of trd_jax.experiment.sweep_points"
      )
  keys = {key for one in found for key in one.values}
  alone = [one.name for one in found]
  found = [
    one if one.is_own else _named(dict(one.values), keys) for one in found
  ]
  names = [one.name for one in found]
  found = [
    dataclasses.replace(one, alone=name)
    if [*alone, *names].count(name) == 1  # no other point has or had it
    else one
    for one, name in zip(found, alone, strict=True)
  ]
  for name in names:
    if names.count(name) > 1:
      raise UserError(
        f"{source}: two points are called {name}; leave one out, or name it"
        " with point(…)"
      )
  return found


def _named(values: dict[str, Any], keys: Iterable[str] = ()) -> Point:
  """A point that is called after its values.

  Args:
    values: what it sets, by dotted key. The name says a key's last part, or
      all of it where another key has that, too.
    keys: more keys that there are.
  """
  last = [key.rpartition(".")[2] for key in {*values, *keys}]
  parts = []
  for key, value in values.items():
    short = key.rpartition(".")[2]
    told = short if last.count(short) == 1 else key
    parts.append(f"{told}={_shown(value)}")
  return Point(_fit(",".join(parts)), values, is_own=False)


def _shown(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:g}"
  if isinstance(value, tuple | list):
    return "+".join(map(str, value))
  return str(value)


def _fit(name: str) -> str:
  """A name that a folder can have."""
  fit = _UNFIT.sub("-", name).strip("-.")[:_MOST_NAME]
  if not fit:
    raise UserError(f"a point of the sweep is called {name!r}: name it")
  return fit
