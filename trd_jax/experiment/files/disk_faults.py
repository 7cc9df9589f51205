"""Says in one line what a disk refuses: it is full, read-only, or gone.

Such a fault may come up in any write of any library and in any thread. So it is
recognised in one place, at the command line, and not at each write: what writes
only sees to it that the error names its file (`naming`) and that an error of a
thread reaches the main one.
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

_AGAIN = "and give the same command again"
_ROOM = f"make room there {_AGAIN}"
_MOUNT = f"see that the disk is well and mounted {_AGAIN}"
_RIGHTS = f"correct the permissions {_AGAIN}, or name another place"
_IN_THE_WAY = "move away what is in the way, or name another place"
# By error code: what is wrong, and what to do. These are faults wherever they
# come from.
_OF_DISKS = {
  errno.ENOSPC: ("the disk is full", _ROOM),
  errno.EDQUOT: ("the quota of this user is used up", _ROOM),
  errno.EROFS: (
    "the disk is read-only",
    f"have it mounted for writing {_AGAIN}, or name another place",
  ),
  errno.EFBIG: (
    "the file may not become larger",
    f"raise the limit (ulimit -f), or name another disk, {_AGAIN}",
  ),
  errno.EIO: ("the disk has an error", _MOUNT),
  errno.ESTALE: ("the disk is gone", _MOUNT),
  errno.ENODEV: ("the disk is gone", _MOUNT),
  errno.ENXIO: ("the disk is gone", _MOUNT),
  errno.ENOTCONN: ("the disk is gone", _MOUNT),
}
# And these where a file is named: without one they speak of something else, as
# of a socket.
_OF_FILES = {
  errno.EACCES: ("this user has no access", _RIGHTS),
  errno.EPERM: ("the system does not allow it", _RIGHTS),
  errno.ENOTDIR: ("a file is where a folder has to be", _IN_THE_WAY),
  errno.EISDIR: ("a folder is where a file has to be", _IN_THE_WAY),
  errno.ENAMETOOLONG: ("the name is too long", "name a shorter place"),
  errno.ELOOP: ("links lead in a circle", "correct them"),
}
_GONE = (
  "it is not there any more",
  f"it was removed meanwhile, or its disk unmounted: put it back {_AGAIN}",
)
# Libraries that are not written in Python tell of a fault in a text.
_TEXTS = {
  code: re.compile(
    rf"\b{errno.errorcode[code]}\b|{re.escape(os.strerror(code))}"
    rf"|os error {code}\b",
    re.IGNORECASE,
  )
  for code in (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EFBIG,
    errno.EIO,
    errno.ESTALE,
  )
}


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
  """Names what the block writes in an error that a disk is the cause of.

  The error of a write has no file's name, and one of a library may be a text.

  Args:
    path: what the block writes.

  Raises:
    OSError: the disk refuses it; the error has its code and a file's name.
  """
  try:
    yield
  except OSError as error:
    if error.errno in _OF_DISKS and error.filename is None:
      error.filename = str(path)
    raise
  except Exception as error:
    if (code := _code(error)) is None:
      raise
    raise OSError(code, os.strerror(code), str(path)) from error


def check_folder(path: Path | str) -> None:
  """Checks that a folder that this process has made is still there.

  What writes files makes their folders first. So where a run directory was
  removed, or its disk unmounted, a stage would go on into a new one that lacks
  what it has written before.

  Raises:
    FileNotFoundError: it isn't there.
  """
  if not os.path.isdir(path):
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def remedy(code: int | None) -> str:
  """Returns what to do about an error code, '' where nothing is known."""
  return (_OF_DISKS | _OF_FILES).get(code or 0, ("", ""))[1]


def described(
  error: BaseException, workdir: Path | str | None = None
) -> str | None:
  """Returns one line about an error that a disk is the cause of.

  Args:
    error: what a stage ended with; what caused it is looked at, too.
    workdir: where the stage wrote, if anywhere.

  Returns:
    What is wrong, where, and what to do. None for an error of another kind.
  """
  for one in _chain(error):
    found = _fault(one, workdir)
    if found is not None:
      path, (what, remedy) = found
      return f"{path or _place(one, workdir)}: {what}; {remedy}"
  # Any error may follow from it, as one of a library that finds no file.
  is_gone = workdir is not None and not os.path.lexists(workdir)
  if is_gone and isinstance(error, OSError):
    what, remedy = _GONE
    return f"{workdir}: {what}; {remedy}"
  return None


def _fault(
  error: BaseException, workdir: Path | str | None
) -> tuple[str | None, tuple[str, str]] | None:
  """Returns the file, if known, and the fault that an error tells of."""
  if not isinstance(error, OSError) or error.errno is None:
    code = _code(error)
    return None if code is None else (None, _OF_DISKS[code])
  # Of a rename or a link the second is the one that is made.
  name = error.filename2 or error.filename
  path = None if name is None or isinstance(name, int) else os.fsdecode(name)
  if error.errno in _OF_DISKS:
    return path, _OF_DISKS[error.errno]
  if path is None:
    return None
  if error.errno in _OF_FILES:
    return path, _OF_FILES[error.errno]
  # Elsewhere a file that is missing is no fault of a disk.
  if error.errno != errno.ENOENT or workdir is None:
    return None
  if Path(path).absolute().is_relative_to(Path(workdir).absolute()):
    return path if os.path.lexists(workdir) else str(workdir), _GONE
  return None


def _code(error: BaseException) -> int | None:
  """Returns the code that an error's text tells of, if any."""
  text = str(error)
  return next(
    (c for c, pattern in _TEXTS.items() if pattern.search(text)), None
  )


def _chain(error: BaseException) -> Iterator[BaseException]:
  """Yields an error, the errors in it, and what it was raised from."""
  seen: set[int] = set()
  left: list[BaseException | None] = [error]
  while left:
    one = left.pop(0)
    if one is None or id(one) in seen:
      continue
    seen.add(id(one))
    yield one
    if isinstance(one, BaseExceptionGroup):
      left += one.exceptions
    left.append(one.__cause__)


def _place(error: BaseException, workdir: Path | str | None) -> str:
  """Returns a guess at what was written, for an error that names no file.

  Of a full disk it is the place with the least room.
  """
  places: Sequence[str] = [tempfile.gettempdir()]
  if workdir is not None:
    places = [str(workdir), *places]
  if isinstance(error, OSError) and error.errno == errno.ENOSPC:
    there = [one for one in places if os.path.isdir(one)]
    return min(there, key=lambda one: shutil.disk_usage(one).free)
  return places[0]
