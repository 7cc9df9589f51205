"""A small disk of a test's own, which it can fill or make read-only."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Self

import pytest

from tests.support.devices import xla_flags
from tests.support.places import ROOT

_SIZE = 48 * 2**20
_MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2" && echo mounted && exec cat'


class SmallDisk:
  """A tmpfs that only processes of one mount namespace see, until the end.

  A namespace of its own needs root, or a user namespace, which not all systems
  and containers give; without either the test is skipped. Nothing has to be
  unmounted: the disk ends with the process that holds it.

  Args:
    folder: an empty folder, where the disk is mounted.

  Attributes:
    path: the disk's path for what `run` starts.
    seen: the same for this process. To read only: it leads through a link that
      `realpath` doesn't resolve.
  """

  def __init__(self, folder: Path):
    self.path = folder
    self._enter: list[str] = []

  def __enter__(self) -> Self:
    own_users = [] if os.geteuid() == 0 else ["--map-root-user"]
    if not (shutil.which("unshare") and shutil.which("nsenter")):
      pytest.skip("unshare and nsenter are not here")
    self._holder = subprocess.Popen(
      [
        *("unshare", "--mount", *own_users, "sh", "-c", _MOUNT),
        *("sh", str(_SIZE), str(self.path)),
      ],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    assert self._holder.stdout is not None
    if not self._holder.stdout.readline():
      _, why = self._holder.communicate()
      pytest.skip(f"no disk can be mounted here: {why.strip()}")
    pid = self._holder.pid
    self._enter = ["nsenter", f"--target={pid}", "--mount"]
    if own_users:
      self._enter += ["--user", "--preserve-credentials"]
    self.seen = Path(f"/proc/{pid}/root{self.path}")
    return self

  def __exit__(self, *exception: object) -> None:
    self._holder.communicate()

  def run(self, *command: str) -> subprocess.CompletedProcess:
    """Runs a command that sees the disk, in the repository's root."""
    env = os.environ | {"XLA_FLAGS": xla_flags(1)}
    return subprocess.run(
      [*self._enter, f"--wd={ROOT}", *command],
      env=env,
      capture_output=True,
      text=True,
      check=False,
      timeout=280,
    )

  def fill(self, free: int = 0) -> None:
    """Fills the disk but for so many bytes."""
    self.empty()
    size = shutil.disk_usage(self.seen).free - free
    with (self.seen / "filler").open("wb") as file:
      os.posix_fallocate(file.fileno(), 0, size)

  def empty(self) -> None:
    """Takes what fills the disk away again."""
    (self.seen / "filler").unlink(missing_ok=True)

  def mount(self, *options: str) -> None:
    """Calls `mount` with some options."""
    done = self.run("mount", *options)
    assert done.returncode == 0, done.stderr
