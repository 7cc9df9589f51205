"""What a config has chosen, said before a run: models, variants of its file."""

from collections.abc import Iterator, Sequence
from typing import Any

from trd_jax.experiment import config_file, experiment, tables
from trd_jax.experiment.experiment import KEYS, Experiment

_VARIANT = "settings"
"""The variant of the paper's configs that sets many keys at once."""
_MOST_CHARACTERS = 32  # of a value in the table


def models(chosen: Experiment, argv: Sequence[str]) -> Iterator[str]:
  """Yields a line for each of the two roles: its model, and who named it.

  Args:
    chosen: the experiment.
    argv: the arguments that gave it, `--config.<key>=<value>` among them.
  """
  sides = ["student"]
  if chosen.regime == "opd":
    sides.append("teacher")
  for side in sides:
    path = getattr(chosen, side).path
    yield f"  {side:<9} {path} ({_named_by(f'{side}.path', path, argv)})"
  if chosen.regime == "opsd":
    yield "  teacher   the student's own base, its adapter off (regime=opsd)"


def _named_by(key: str, value: Any, argv: Sequence[str]) -> str:
  """Says whether the command, the config or nobody has given a key."""
  if any(argument.startswith(f"--config.{key}=") for argument in argv):
    return f"{key} of the command"
  return "the default" if value == KEYS[key].default else f"{key} of the config"


def settings(chosen: Experiment, spec: str) -> Iterator[str]:
  """Yields the keys that the variant `settings` of a config file has set.

  Each with its value, and the one that the file gives it without this variant;
  nothing where --config names none.

  Args:
    chosen: the experiment, in which the command may have changed a key again.
    spec: what --config is.

  Raises:
    UserError: the file can't be loaded without the variant.
  """
  name, _, argument = spec.partition(":")
  parts = argument.split(",")
  given = [part for part in parts if part.startswith(f"{_VARIANT}=")]
  if not given:
    return
  rest = ",".join(part for part in parts if part not in given)
  with_it, _ = config_file.load(spec)
  without, _ = config_file.load(f"{name}:{rest}" if rest else name)
  here = experiment.flat(chosen)
  rows = []
  for key, value in with_it.items():
    if key in without and value != without[key]:
      # What the command says comes last.
      other = f"; the command says {_shown(here[key])}"
      changed = here[key] != value
      before = f"(without: {_shown(without[key])}{other * changed})"
      rows.append((key, _shown(value), before))
  if not rows:
    yield f"{given[-1]} changes nothing that {name} sets without it"
    return
  yield f"{given[-1]} has set, of what {name} says without it:"
  yield from tables.columns(rows, indent="  ").split("\n")


def _shown(value: Any) -> str:
  """Returns a key's value as a person reads it, cut where it is long."""
  text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
  if len(text) <= _MOST_CHARACTERS:
    return text
  return f"{text[: _MOST_CHARACTERS - 1]}…"
