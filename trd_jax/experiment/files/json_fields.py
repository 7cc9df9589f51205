"""What the fields of others' JSON files may hold, declared in tables."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trd_jax.experiment.errors import UserError


class Kind(NamedTuple):
  """What a field may hold.

  Attributes:
    says: completes the sentence "it is …, not …".
    holds: tells whether a value is of the kind.
  """

  says: str
  holds: Callable[[Any], bool]


def either(first: Kind, second: Kind) -> Kind:
  """Returns the kind of what is of one kind or of the other."""
  return Kind(
    f"{first.says} or {second.says}",
    lambda value: first.holds(value) or second.holds(value),
  )


def list_of(kind: Kind, says: str) -> Kind:
  """Returns the kind of lists whose entries are all of a kind."""
  return Kind(
    says, lambda value: isinstance(value, list) and all(map(kind.holds, value))
  )


def object_of(*names: str) -> Kind:
  """Returns the kind of objects that have a text under each of the names."""
  return Kind(
    f"an object with {' and '.join(names)}",
    lambda value: (
      isinstance(value, dict)
      and all(isinstance(value.get(name), str) for name in names)
    ),
  )


# By `type`: JSON's true is an int to Python. Positions and ids are int32, and
# what is counted in them is smaller.
SIZE = Kind("a size", lambda x: type(x) is int and 1 <= x < 2**31)
ID = Kind("an id", lambda x: type(x) is int and 0 <= x < 2**31)
# So that no product of a few of them is infinite.
POSITIVE = Kind(
  "a number above 0",
  lambda x: type(x) in (int, float) and 1e-60 <= x <= 1e60,
)
SWITCH = Kind("true or false", lambda x: type(x) is bool)
TEXT = Kind("a text", lambda x: isinstance(x, str))
OBJECT = Kind("an object", lambda x: isinstance(x, dict))
NAMES = list_of(TEXT, "a list of names")


def check(
  fields: Mapping[str, Any],
  kinds: Mapping[str, Kind],
  where: str,
  remedy: str = "fetch the file again",
) -> None:
  """Checks the fields that a table names; absent or null ones pass.

  Args:
    fields: of the file.
    kinds: what they may hold, by name.
    where: the file, for the error.
    remedy: what to do about it.

  Raises:
    UserError: a field holds something else.
  """
  for name, kind in kinds.items():
    value = fields.get(name)
    if value is not None and not kind.holds(value):
      raise wrong(name, f"{shown(value)}, not {kind.says}", where, remedy)


def wrong(name: str, problem: str, where: str, remedy: str) -> UserError:
  """Returns the complaint about a field."""
  return UserError(f"{where}: the field {name!r} is {problem}; {remedy}")


def shown(value: Any) -> str:
  """Returns a value for a line, cut at 60 characters."""
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:60]}…"
