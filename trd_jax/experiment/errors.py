"""A user's mistake: the one exception that it becomes, and its one line."""

import argparse
import difflib
from collections.abc import Iterable
from typing import NoReturn

_MOST_SECTIONS = 4


class UserError(Exception):
  """Bad input: one line that says what is wrong, where, and what to do.

  `trd_jax.experiment.cli` prints it to stderr and exits with code 2; raise it
  before anything is half-written. Several mistakes that were found at once are
  several arguments, and are printed a line each.
  """

  def __str__(self) -> str:
    return "; also: ".join(map(str, self.args))

  @property
  def messages(self) -> list[str]:
    """Returns the mistakes, a line each."""
    each = self.args if len(self.args) > 1 else (str(self),)
    return [" ".join(str(one).split()) for one in each]


class Interrupted(KeyboardInterrupt):
  """Ends a command at a place that it has chosen, some time after Ctrl-C.

  `trd_jax.experiment.cli` says so in one line and exits with code 130, as it
  does after Python's own `KeyboardInterrupt`.

  Attributes:
    agreed: whether all processes of the run end here together.
  """

  def __init__(self, after: str = "", agreed: bool = False):
    """Says after what, for the line: 'after update 7, which is saved'."""
    super().__init__(after)
    self.agreed = agreed


class Terminated(Interrupted):
  """SIGTERM, as Slurm and `kill` send it: what tidies up does so as ever.

  `trd_jax.experiment.cli` says so in one line and exits with code 143.
  """


class ArgumentParser(argparse.ArgumentParser):
  """argparse's, whose errors are one line and exit code 2."""

  def error(self, message: str) -> NoReturn:
    """Says it without the usage, which `--help` has."""
    self.exit(2, f"{self.prog}: {message}; see --help\n")


def one_line(error: BaseException) -> str:
  """Returns the first line of an exception's text, cut at 200 characters."""
  text = str(error).strip()
  return text.splitlines()[0][:200] if text else type(error).__name__


def last_words(stderr: bytes, most: int = 200) -> str:
  """Returns what a program said last, cut to `most` characters.

  Args:
    stderr: what it wrote there. A traceback's last line names the error.
    most: characters.
  """
  lines = stderr.decode(errors="replace").strip().splitlines()
  return lines[-1][:most] if lines else "no word"


def did_you_mean(
  name: str,
  names: Iterable[str],
  prefix: str = "",
  usual: Iterable[str] = (),
) -> str:
  """Returns the nearest of `names`, as a clause to end an error with.

  A dotted name that is in the wrong section is found by its last part:
  `train.rank` finds `lora.rank`.

  Args:
    name: what there is none of.
    names: what there is.
    prefix: what is written before each of them.
    usual: those that others call `name` (`usual_names`), which come first.

  Returns:
    `did you mean "…"?`, or the choice where it is short and none is near, or
    '' where nothing helpful can be said.
  """
  names = list(names)
  if spelt := either(prefix + each for each in usual):
    return f"did you mean {spelt}?"
  last = _last_part(name)
  by_last = {_last_part(candidate): candidate for candidate in reversed(names)}
  elsewhere = [each for each in names if _last_part(each) == last]
  # Nobody can say which of few sections is meant.
  if "." not in name and 1 < len(elsewhere) <= _MOST_SECTIONS:
    return f"did you mean {either(prefix + each for each in elsewhere)}?"
  if near := (
    difflib.get_close_matches(name, elsewhere, n=1, cutoff=0)
    or difflib.get_close_matches(name, names, n=1)
  ):
    return f'did you mean "{prefix}{near[0]}"?'
  if near := difflib.get_close_matches(last, by_last, n=1):
    return f'did you mean "{prefix}{by_last[near[0]]}"?'
  if not 0 < len(names) <= 12:
    return ""
  return f"choose from {', '.join(prefix + each for each in names)}"


def either(names: Iterable[str]) -> str:
  """Returns names in quotes, for a sentence: `"a"`, or `"a" or "b"`."""
  return " or ".join(f'"{name}"' for name in names)


def _last_part(dotted: str) -> str:
  return dotted.rpartition(".")[2]
