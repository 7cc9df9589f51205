"""Makes and reads a sweep: the points at which an experiment is run.

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

import collections
import dataclasses
import itertools
import math
import re
import runpy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trd_jax.experiment.errors import UserError

_MOST_NAME = 120
_MOST_POINTS = 10_000
_UNFIT = re.compile(r"[^A-Za-z0-9._=,+-]+")


@dataclasses.dataclass(frozen=True)
class Point:
  """One run of a sweep.

  Attributes:
    name: names its folder; unique in the sweep.
    values: the values that it sets, by dotted key.
    is_own: whether the name was given rather than made of the values.
    alone: the name that its values would make without the sweep's other keys,
      where those change it. A sweep that had fewer keys, or was begun by a
      version that named each point by itself, has the folder under this name.
  """

  name: str
  values: Mapping[str, Any]
  is_own: bool = True
  alone: str | None = None


def point(name: str, values: Mapping[str, Any] | None = None) -> Point:
  """Makes a point with a given name; without values it is the config itself."""
  return Point(_fit(name), dict(values or {}))


def product(axes: Mapping[str, Sequence[Any]]) -> list[Point]:
  """Makes a point of each combination of the axes' values, the last fastest.

  Raises:
    UserError: there are more than a sweep can have.
  """
  count = math.prod(map(len, axes.values()))
  if count > _MOST_POINTS:
    raise UserError(_too_many(f"{count:,}"))
  combinations = itertools.product(*axes.values())
  return [_named(dict(zip(axes, c, strict=True))) for c in combinations]


def zipped(axes: Mapping[str, Sequence[Any]]) -> list[Point]:
  """Makes a point of the axes' first values, one of their second, and so on.

  Raises:
    UserError: the axes are not equally long.
  """
  lengths = {key: len(values) for key, values in axes.items()}
  if len(set(lengths.values())) > 1:
    shown = ", ".join(f"{key} {length}" for key, length in lengths.items())
    raise UserError(f"zipped: the axes must be equally long, not {shown}")
  columns = zip(*axes.values(), strict=True)
  return [_named(dict(zip(axes, c, strict=True))) for c in columns]


def load(path: Path | str) -> list[Point]:
  """Loads the points of a sweep file.

  Raises:
    UserError: there is no such file, it defines no `get_sweep`, it fails, or
      its result is no list of points with different names.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(
      f"--sweep={path}: there is no such file; name one of configs/sweeps/*.py"
    )
  try:
    get_sweep = runpy.run_path(str(path)).get("get_sweep")
    points = None
    if get_sweep is not None:
      # It may be a generator that never ends.
      points = list(itertools.islice(get_sweep(), _MOST_POINTS + 1))
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  # `sys.exit` in it would end the sweep without a word.
  except (Exception, SystemExit) as error:
    what = " ".join(str(error).split())
    raise UserError(f"{path}: {type(error).__name__}: {what}") from error
  if points is None:
    raise UserError(f"{path}: it defines no get_sweep")
  return checked(points, str(path))


def checked(points: Iterable[Any], source: str) -> list[Point]:
  """Checks a sweep's points, and renames those named by their values.

  Such a name holds the last part of each key, or all of it where another key of
  the sweep ends alike.

  Args:
    points: the points, as a sweep file gives them.
    source: the file, for errors.

  Raises:
    UserError: there are no points, something is no point, or two points have
      the same name.
  """
  result = list(points)
  if not result:
    raise UserError(f"{source}: the sweep has no points")
  if len(result) > _MOST_POINTS:
    raise UserError(f"{source}: {_too_many('more')}")
  for one in result:
    if not isinstance(one, Point):
      raise UserError(
        f"{source}: a {type(one).__name__} is no point; make points with"
        " point, product and zipped of trd_jax.experiment.sweep_points"
      )
  keys = {key for one in result for key in one.values}
  alone = [one.name for one in result]
  result = [
    one if one.is_own else _named(dict(one.values), keys) for one in result
  ]
  names = [one.name for one in result]
  counts = collections.Counter([*alone, *names])
  result = [
    # Where no other point has or had that name, or one point could take the
    # folder of another for its own.
    dataclasses.replace(one, alone=name) if counts[name] == 1 else one
    for one, name in zip(result, alone, strict=True)
  ]
  for name, count in collections.Counter(names).items():
    if count > 1:
      raise UserError(
        f"{source}: two points are called {name}; leave one out, or name it"
        " with point(…)"
      )
  return result


def _named(values: dict[str, Any], keys: Iterable[str] = ()) -> Point:
  """Makes a point that is named by its values.

  Args:
    values: the values that it sets, by dotted key. The name holds a key's last
      part, or all of the key where another one ends alike.
    keys: the keys of the other points.
  """
  last = [key.rpartition(".")[2] for key in {*values, *keys}]
  parts = []
  for key, value in values.items():
    short = key.rpartition(".")[2]
    label = short if last.count(short) == 1 else key
    parts.append(f"{label}={_shown(value)}")
  return Point(_fit(",".join(parts)), values, is_own=False)


def _too_many(count: str) -> str:
  return (
    f"{count} points, and a sweep has at most {_MOST_POINTS:,}, each a whole"
    " run: leave values out"
  )


def _shown(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:g}"
  if isinstance(value, tuple | list):
    return "+".join(map(str, value))
  return str(value)


def _fit(name: str) -> str:
  """Returns a name as a folder can have it.

  Raises:
    UserError: nothing is left of the name.
  """
  fit = _UNFIT.sub("-", name).strip("-.")[:_MOST_NAME]
  if not fit:
    raise UserError(f"a point of the sweep is called {name!r}: name it")
  return fit
