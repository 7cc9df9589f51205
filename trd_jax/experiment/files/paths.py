"""Reads paths as a user writes them, and finds the user's own places."""

import argparse
import hashlib
import os
import platform
from pathlib import Path

from trd_jax.experiment.errors import UserError


class GivenPath(str):
  """A path whose `~` is expanded and that remembers how it was written.

  Attributes:
    given: the text as it was written. A run directory keeps this text, so that
      a run can go on on a machine where the user's home is elsewhere.
  """

  given: str


def expanded(text: str) -> str:
  """Returns a path with its leading `~` or `~user` expanded, nothing else.

  A hub id, `lab:NAME` and `random:SIZE` begin with no `~` and stay.

  Raises:
    ValueError: the text is empty or holds a NUL, or there is no such user.
  """
  if not text.strip() or "\0" in text:
    raise ValueError(f"must be a non-empty path, not {text!r}")
  if not text.startswith("~"):
    return text
  path = os.path.expanduser(text)
  # `expanduser` leaves a `~name` that it doesn't know as it is, which would
  # become a folder of that name.
  if path == text:
    user = text[1:].partition("/")[0]
    whose = f"user {user}" if user else "home of yours"
    raise ValueError(
      f"is {text}, and there is no {whose} here; write ./{text} for a file of"
      " that name"
    )
  # HOME may hold a relative path: it would lead elsewhere in each folder.
  if not os.path.isabs(path):
    raise ValueError(f"is {text}, and that is {path}, which is no whole path")
  made = GivenPath(path)
  made.given = text
  return made


def argument(text: str) -> Path:
  """Reads a path from a command line of `argparse`.

  Raises:
    argparse.ArgumentTypeError: as `expanded`.
  """
  try:
    return Path(expanded(text))
  except ValueError as error:
    raise argparse.ArgumentTypeError(str(error)) from None


def as_given(value: object) -> object:
  """Returns a value as its user wrote it."""
  return value.given if isinstance(value, GivenPath) else value


def cache() -> Path:
  """Returns the folder of the user's caches, in which ours has its own.

  `XDG_CACHE_HOME`, which has to be a whole path, else `~/.cache`.
  """
  named = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", ""))
  home = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
  return home / "trd-jax"


def kind_of_cpu() -> str:
  """Returns a name for this machine's kind of CPU."""
  about = Path("/proc/cpuinfo")
  text = about.read_text("utf-8", "replace") if about.exists() else ""
  # Of all lines those that say what it can do; others are clocks and numbers.
  kinds = {
    line
    for line in text.splitlines()
    if line.startswith(("model name", "flags", "Features", "CPU part"))
  }
  names = [platform.machine(), platform.processor(), *sorted(kinds)]
  return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def behind_links(path: Path | str) -> Path:
  """Returns where a path that may be a symbolic link leads.

  To write there leaves the link as it is.

  Raises:
    UserError: the path, or a folder on the way to it, is a link that leads
      nowhere.
  """
  path = Path(path)
  # `realpath` follows a broken link without an error, and to write there would
  # make a file that nobody looks for.
  for link in (path, *path.absolute().parents):
    if os.path.islink(link) and not os.path.exists(link):
      raise UserError(
        f"{path}: {link} is a link that leads nowhere ({os.readlink(link)});"
        " remove it, or name another path"
      )
  return Path(os.path.realpath(path))
