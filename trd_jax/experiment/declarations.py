"""How a tree of frozen dataclasses declares, documents and checks its keys.

`key` declares one: its default, one line of documentation, a rule that its
value must obey, and the scopes that say what depends on it. From the same
declaration come the `ConfigDict` that a config file fills in, the command
line's flags, the help, the checks, and what may still change in a workdir.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from ml_collections import config_dict

from trd_jax.experiment.files import paths

SectionT = TypeVar("SectionT")

Scope = Literal["problems", "rollout", "refine", "train", "evaluate", "runtime"]
"""What depends on a key: the artifacts of a stage, or, for `runtime`, none.

A runtime key says how a run is carried out, not what it computes. (Rounding
follows the devices and the packs, and so do the masks of the adapters'
dropout.)
"""


class Rule(NamedTuple):
  """What a value must be.

  Attributes:
    says: completes the sentence "must be …".
    holds: tells whether a value obeys.
  """

  says: str
  holds: Callable[[Any], bool]


def one_of(*choices: str) -> Rule:
  """Requires one of a closed set of names."""
  return Rule("one of " + ", ".join(choices), lambda value: value in choices)


# What a key without a bound of its own may hold: integers become int32, and
# numbers float32, where a larger one is infinite and a smaller one 0.
_LARGEST_INT = 2**31 - 1
_LARGEST, _SMALLEST = 1e30, 1e-30
_MOST_NAMES = 10_000  # in a list


def _in_range(value: float) -> bool:
  """Returns whether a number is none that is too large, or too near to 0."""
  if isinstance(value, int):
    return abs(value) <= _LARGEST_INT
  return value == 0 or _SMALLEST <= abs(value) <= _LARGEST


def at_least(low: float, most: int | None = None) -> Rule:
  """Requires a number from `low` up.

  Args:
    low: the least that it may be.
    most: for what something loops over, or makes arrays of: a bound beyond
      which no run would end.
  """
  if most is not None:
    return Rule(
      f"at least {low}, at most {most:,}", lambda value: low <= value <= most
    )
  return Rule(
    f"at least {low}", lambda value: value >= low and _in_range(value)
  )


def above(low: float) -> Rule:
  """Requires a number greater than `low`."""
  return Rule(
    f"greater than {low}", lambda value: value > low and _in_range(value)
  )


def within(low: float, high: float) -> Rule:
  """Requires a number in the closed interval [low, high]."""
  return Rule(
    f"from {low} to {high}",
    lambda value: low <= value <= high and _in_range(value),
  )


def seed() -> Rule:
  """Requires an integer that is a seed: any that an int64 holds, from 0 up."""
  return Rule("from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)


def seconds() -> Rule:
  """Requires a time that clocks can wait for."""
  return Rule(
    "greater than 0 and at most a year, in seconds",
    lambda value: _SMALLEST <= value <= 365 * 24 * 3600,
  )


def fraction_below_one() -> Rule:
  """Requires a number in the half-open interval [0, 1)."""
  return Rule(
    "at least 0 and below 1", lambda value: 0 <= value < 1 and _in_range(value)
  )


def positive_share() -> Rule:
  """Requires a number in the half-open interval (0, 1]."""
  return Rule(
    "above 0 and at most 1", lambda value: 0 < value <= 1 and _in_range(value)
  )


def minus_one_or_positive() -> Rule:
  """Requires -1, which has a meaning of its own, or an integer from 1 up."""
  return Rule(
    "-1 or at least 1",
    lambda value: value == -1 or (value >= 1 and _in_range(value)),
  )


def filled() -> Rule:
  """Requires a string or tuple with something in it."""
  return Rule("non-empty", bool)


def key(
  default: Any,
  doc: str,
  rule: Rule | None = None,
  *,
  scope: Scope | tuple[Scope, ...] = (),
  is_path: bool = False,
) -> Any:
  """Declares a config key, as the default of a dataclass field.

  Args:
    default: the value where a config says nothing.
    doc: one line.
    rule: what a value must be; a None that the type allows always passes.
    scope: what depends on it; left out, what depends on its section.
    is_path: whether it is a path, or may be one: its `~` is expanded.
  """
  metadata = {
    "doc": doc,
    "rule": rule,
    "scopes": (scope,) if isinstance(scope, str) else scope,
    "is_path": is_path,
  }
  return dataclasses.field(default=default, metadata=metadata)


def path(
  default: str | None, doc: str, scope: Scope | tuple[Scope, ...] = ()
) -> Any:
  """Declares a config key that is a path, or may be one, as `key`."""
  return key(default, doc, scope=scope, is_path=True)


def section(cls: Callable[[], SectionT], *scopes: Scope) -> SectionT:
  """Declares a section of keys, as the default of a dataclass field.

  Args:
    cls: the section's dataclass.
    *scopes: what depends on those of its keys that have no scope of their own;
      left out, what depends on the section around it.
  """
  return dataclasses.field(default_factory=cls, metadata={"scopes": scopes})


def with_keys(
  declared: Mapping[str, Any],
) -> Callable[[type[SectionT]], type[SectionT]]:
  """Returns a decorator that gives a class more keys before it is a dataclass.

  Args:
    declared: keys made by `key`, by name; each has the type of its default.
  """

  def extend(cls: type[SectionT]) -> type[SectionT]:
    types_ = {name: type(field.default) for name, field in declared.items()}
    cls.__annotations__ = {**cls.__annotations__, **types_}
    for name, field in declared.items():
      setattr(cls, name, field)
    return cls

  return extend


_TYPE_NAMES = {
  int: "an integer",
  float: "a number",
  bool: "true or false",
  str: "a string",
  tuple: "a comma-separated list of names",
}
_TRUTHS = {"true": True, "1": True, "yes": True}
_TRUTHS |= {"false": False, "0": False, "no": False}


@dataclasses.dataclass(frozen=True)
class Key:
  """One key of a tree.

  Attributes:
    name: dotted from the tree's root.
    type: int, float, bool, str, or tuple (of strings).
    optional: whether None is a value.
    default: the declared default.
    doc: the declared documentation.
    rule: the declared rule.
    scopes: what depends on it; empty for what is no key of a config.
    is_path: whether it is a path, or may be one.
  """

  name: str
  type: type
  optional: bool
  default: Any
  doc: str
  rule: Rule | None
  scopes: tuple[Scope, ...] = ()
  is_path: bool = False

  def parse(self, text: str) -> Any:
    """Reads the value that a person typed on the command line.

    Raises:
      ValueError: it is not of the key's type, or breaks its rule.
    """
    if self.optional and text.lower() == "none":
      return None
    try:
      value = self._convert(text)
    except (KeyError, ValueError):
      raise ValueError(f"{self.must_be()}, not {text!r}") from None
    return self.check(value)

  def check(self, value: Any) -> Any:
    """Returns a value in the key's exact type (int → float, list → tuple).

    A path's `~` is expanded.

    Raises:
      ValueError: it is not of the key's type, or breaks its rule.
    """
    if value is None and self.optional:
      return None
    # A config file writes 1 for 1.0 and a JSON file has lists alone; nothing
    # else is converted, as what is typed wrong is likely meant otherwise.
    if self.type is float and type(value) is int and abs(value) < 2**63:
      value = float(value)
    if self.type is tuple and type(value) is list:
      value = tuple(value)
    if not self._types(value) or (self.rule and not self.rule.holds(value)):
      raise ValueError(f"{self.must_be()}, not {_shown(value)}")
    if type(value) is float:
      value += 0.0  # there is one zero: -0.0 would be another config
    if self.is_path and isinstance(value, str):
      try:
        return paths.expanded(value)
      except ValueError as error:
        raise ValueError(f"{self.name} {error}") from None
    return value

  def takes(self) -> str:
    """Returns what the key's value must be: its type and its rule."""
    says = [] if self.type is str and self.rule else [_TYPE_NAMES[self.type]]
    if self.rule:
      says.append(self.rule.says)
    if self.optional:
      says.append("or None")
    return ", ".join(says)

  def must_be(self) -> str:
    """Returns what the key's value must be, as a sentence."""
    return f"{self.name} must be {self.takes()}"

  def _types(self, value: Any) -> bool:
    """Tells whether a value is of the key's type; a bool is no int."""
    if type(value) is float and not math.isfinite(value):
      return False
    if type(value) is tuple and (
      len(value) > _MOST_NAMES or not all(type(item) is str for item in value)
    ):
      return False
    if self.type is str:
      return isinstance(value, str)
    return type(value) is self.type

  def _convert(self, text: str) -> Any:
    if self.type is bool:
      return _TRUTHS[text.lower()]
    if self.type is tuple:
      bare = text.strip().removeprefix("(").removesuffix(")")
      names = (part.strip().strip("'\"") for part in bare.split(","))
      return tuple(name for name in names if name)
    return self.type(text)


def _shown(value: Any) -> str:
  """Returns a value for a line, cut at 200 characters."""
  text = repr(value)
  if type(value) in (int, float) and not _in_range(value):
    return f"{text[:60]}, which is too {'small' if -1 < value < 1 else 'large'}"
  return text if len(text) <= 200 else f"{text[:200]}…"


# Evaluating a class's annotations takes longer than all else that is done with
# its fields, and every config asks for them.
@functools.cache
def _fields(cls: type) -> tuple[tuple[dataclasses.Field, Any], ...]:
  """Returns a dataclass's fields, each with its evaluated annotation."""
  hints = typing.get_type_hints(cls)
  return tuple((each, hints[each.name]) for each in dataclasses.fields(cls))


@functools.cache
def keys_of(
  cls: type, prefix: str = "", scopes: tuple[Scope, ...] = ()
) -> Mapping[str, Key]:
  """Returns every key of a tree by its dotted name, as they are declared.

  Args:
    cls: the tree's dataclass.
    prefix: what stands before the names.
    scopes: what depends on keys that say nothing of it, nor their sections.
  """
  keys: dict[str, Key] = {}
  for field, hint in _fields(cls):
    name = prefix + field.name
    own = field.metadata["scopes"] or scopes
    if dataclasses.is_dataclass(hint):
      keys |= keys_of(typing.cast(type, hint), name + ".", own)
      continue
    optional = isinstance(hint, types.UnionType)
    if optional:
      (hint,) = (arg for arg in hint.__args__ if arg is not types.NoneType)
    keys[name] = Key(
      name=name,
      type=typing.get_origin(hint) or hint,
      optional=optional,
      default=field.default,
      doc=field.metadata["doc"],
      rule=field.metadata["rule"],
      scopes=own,
      is_path=field.metadata["is_path"],
    )
  return types.MappingProxyType(keys)


def config_of(cls: type) -> config_dict.ConfigDict:
  """Builds a locked ConfigDict of the defaults that keeps each key's type."""
  config = config_dict.ConfigDict()
  for field, hint in _fields(cls):
    if dataclasses.is_dataclass(hint):
      config[field.name] = config_of(typing.cast(type, hint))
    elif isinstance(hint, types.UnionType):
      declared = keys_of(cls)[field.name]
      config[field.name] = config_dict.FieldReference(
        declared.default, field_type=declared.type
      )
    else:
      config[field.name] = field.default
  return config.lock()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns a nested mapping's leaves by dotted name."""
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    if isinstance(value, Mapping) and value:
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[f"{prefix}{name}"] = value
  return flat


def unflatten(
  cls: type[SectionT], flat: Mapping[str, Any], prefix: str = ""
) -> SectionT:
  """Builds a tree from its values by dotted name; the rest are defaults."""
  values: dict[str, Any] = {}
  for field, hint in _fields(cls):
    name = prefix + field.name
    if dataclasses.is_dataclass(hint):
      values[field.name] = unflatten(typing.cast(type, hint), flat, name + ".")
    elif name in flat:
      values[field.name] = flat[name]
  return cls(**values)
