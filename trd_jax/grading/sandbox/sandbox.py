"""Where text that a model wrote may run: bubblewrap, with limits on all of it.

    box = sandbox.open()
    result = box.run([box.python, "main.py"], b"input", {"main.py": b"…"})

Inside there is a read-only /usr, the interpreter, the files that were given,
an empty /tmp, and nothing else: no network, no other process, no /etc, no
environment. Limits are `boxed_process.Limits`; the whole process namespace is
killed when one is reached, and with the process that opened it.

A limit on processes does not bind root, so the program never is: started by
root, bubblewrap makes the mounts and the program then becomes a user without
a name or capabilities, a different one for each box that is open at a time;
started by anybody else it runs in a user namespace of its own. Besides, the
kernel refuses it the system calls of `seccomp`.
"""

import contextlib
import functools
import itertools
import math
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trd_jax.experiment.errors import UserError, last_words
from trd_jax.grading.sandbox import seccomp
from trd_jax.grading.sandbox.boxed_process import BoxedProcess, Limits, Result

__all__ = ["Box", "Limits", "Result", "open"]

FILES = "/box"
_OPEN_FILES = 256
_MEMORY_FOLDERS = ("/tmp", "/dev/shm")
# Dynamic users' range: nobody has files there, and containers map it.
_FIRST_USER, _USERS = 61184, 4336
_ENVIRONMENT = {
  "HOME": "/tmp",
  "LANG": "C.UTF-8",
  "OMP_NUM_THREADS": "1",
  "OPENBLAS_NUM_THREADS": "1",
  "PATH": "/usr/local/bin:/usr/bin:/bin",
  "TMPDIR": "/tmp",
}
_REFUSAL = (
  "the sandbox can't be used on this machine ({why}); install bubblewrap"
  " (Debian: apt-get install bubblewrap) and allow user namespaces, or, where"
  " nothing is at stake, let programs run without one:"
  " --config.sandbox.unsafe=True"
)

# Processes begin at different ids, so that two of them, started together, don't
# count against one user's limit of processes.
_users = itertools.count(os.getpid() * 64)
_free_users: list[int] = []
_users_lock = threading.Lock()


@contextlib.contextmanager
def _user() -> Iterator[int]:
  """Lends the id of a user who has no process."""
  with _users_lock:
    user = (
      _free_users.pop() if _free_users else _FIRST_USER + next(_users) % _USERS
    )
  try:
    yield user
  finally:
    with _users_lock:
      _free_users.append(user)


def _tool(name: str) -> str:
  found = shutil.which(name)
  if found is None:
    raise UserError(_REFUSAL.format(why=f"there is no {name}"))
  return found


def _memory_file(content: bytes) -> int:
  """Opens a descriptor to read `content` from."""
  # In memory: no file of it is left on disk, whatever ends this process.
  fd = os.memfd_create("trd-jax")
  with os.fdopen(os.dup(fd), "wb") as file:
    file.write(content)
  os.lseek(fd, 0, os.SEEK_SET)
  return fd


def _limited(limits: Limits) -> list[str]:
  """Returns the front of a command line, which sets its limits."""
  seconds = max(1, math.ceil(limits.cpu_seconds))
  return [
    _tool("prlimit"),
    "--core=0",
    f"--as={limits.memory_bytes}",
    f"--cpu={seconds}:{seconds + 1}",
    f"--fsize={limits.file_bytes}",
    f"--nofile={_OPEN_FILES}",
    f"--nproc={limits.processes}",
    *([] if limits.stack_bytes is None else [f"--stack={limits.stack_bytes}"]),
    "--",
  ]


@functools.cache
def _system_mounts() -> list[str]:
  """Returns the mounts that every program needs, read-only."""
  words = ["--ro-bind", "/usr", "/usr"]
  for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
    path = Path("/", name)
    if path.is_symlink():
      words += ["--symlink", os.readlink(path), str(path)]
    elif path.is_dir():
      words += ["--ro-bind", str(path), str(path)]
  for name in ("/etc/ld.so.cache", "/etc/alternatives"):
    words += ["--ro-bind-try", name, name]
  return words


def _mounts(paths: Sequence[str], flag: str) -> list[str]:
  """Returns mounts of paths at their own place, in folders all may pass."""
  words = []
  for path in paths:
    if flag == "--ro-bind" and Path(path).is_relative_to("/usr"):
      continue
    for parent in reversed(Path(path).parents[:-1]):
      words += ["--perms", "0755", "--dir", str(parent)]
    words += [flag, path, path]
  return words


def interpreter(python: str) -> tuple[str, ...]:
  """Finds the folders an interpreter lives in, its environment's first."""
  path = Path(python)
  folders = []
  if (path.parent.parent / "pyvenv.cfg").is_file():
    folders.append(path.parent.parent)
  base = path.resolve().parent.parent
  if base not in folders:
    folders.append(base)
  return tuple(str(folder) for folder in folders)


class Box:
  """Runs programs; any number at a time, from any threads.

  Attributes:
    python: the interpreter that programs in Python are run with.
    unsafe: whether they run without the sandbox, with limits alone.
  """

  def __init__(self, python: str, unsafe: bool):
    self.python, self.unsafe = python, unsafe
    self._root = os.geteuid() == 0

  def run(
    self,
    argv: Sequence[str],
    stdin: bytes = b"",
    files: Mapping[str, bytes] | None = None,
    read_only: Sequence[Path] = (),
    writable: Path | None = None,
    env: Mapping[str, str] | None = None,
    limits: Limits | None = None,
  ) -> Result:
    """Runs a command to its end.

    Args:
      argv: the command and its arguments.
      stdin: its standard input.
      files: by name, what its working directory holds; read-only.
      read_only: files and folders of this machine that it may read, besides
        /usr and the interpreter; they keep their paths.
      writable: a folder of this machine that it may write to, at its own
        path; started by root, it changes owner.
      env: environment variables, besides PATH, HOME, TMPDIR and LANG.
      limits: None: all defaults.

    Raises:
      UserError: bubblewrap did not get as far as the command.
    """
    with self.start(argv, files, read_only, writable, env, limits) as process:
      process.send(stdin)
      process.end_input()
      result = process.finish()
    self.check(process, result)
    return result

  @contextlib.contextmanager
  def start(
    self,
    argv: Sequence[str],
    files: Mapping[str, bytes] | None = None,
    read_only: Sequence[Path] = (),
    writable: Path | None = None,
    env: Mapping[str, str] | None = None,
    limits: Limits | None = None,
  ) -> Iterator[BoxedProcess]:
    """Starts a command to talk to; its namespace ends with the context."""
    limits = limits or Limits()
    variables = _ENVIRONMENT | dict(env or {})
    if self.unsafe:
      with self._unsafe(argv, files or {}, variables, limits) as process:
        yield process
      return
    with _user() if self._root else contextlib.nullcontext(0) as user:
      if self._root and writable:
        os.chown(writable, user, user)
      filter_fd = _memory_file(seccomp.program())
      fds = {name: _memory_file(data) for name, data in (files or {}).items()}
      status = os.pipe()
      words = [
        *self._namespaces(),
        *_system_mounts(),
        *("--proc", "/proc", "--dev", "/dev"),
        # A shared mapping of /dev/zero is memory that no limit counts; what is
        # read from /dev/full is the same.
        *("--dev-bind", "/dev/full", "/dev/zero"),
        # Bubblewrap's own process: without root it is the program's user's,
        # and holds the pipes.
        *("--tmpfs", "/proc/1", "--remount-ro", "/proc/1"),
      ]
      space = str(limits.file_bytes)
      for folder in _MEMORY_FOLDERS:
        words += ["--perms", "1777", "--size", space, "--tmpfs", folder]
      paths = [*interpreter(self.python), *map(str, read_only)]
      words += _mounts(paths, "--ro-bind")
      words += _mounts([str(writable)] if writable else [], "--bind")
      words += ["--perms", "0755", "--dir", FILES]
      for name, fd in fds.items():
        words += ["--perms", "0444", "--file", str(fd), f"{FILES}/{name}"]
      # Last of the mounts: after this, nothing can be put in place.
      words += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", FILES]
      for name, value in variables.items():
        words += ["--setenv", name, value]
      words += ["--seccomp", str(filter_fd), "--json-status-fd", str(status[1])]
      process = BoxedProcess(
        # The limits are set inside, after the mounts, for which bubblewrap may
        # take more; then the user, who could not raise them.
        [*words, *_limited(limits), *self._become(user), *argv],
        limits,
        pass_fds=[filter_fd, *fds.values()],
        status=status,
        memory_folders=_MEMORY_FOLDERS,
      )
      with process:
        yield process

  def _namespaces(self) -> list[str]:
    words = [_tool("bwrap"), "--die-with-parent", "--new-session"]
    words += ["--unshare-ipc", "--unshare-pid", "--unshare-net"]
    words += ["--unshare-uts", "--unshare-cgroup-try", "--clearenv"]
    words += ["--cap-drop", "ALL"]
    if self._root:
      # For setpriv, which drops them as it becomes the user.
      return [*words, "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    return [*words, "--unshare-user", "--uid", "65534", "--gid", "65534"]

  def _become(self, user: int) -> list[str]:
    """Returns the front of a command line, which gives it its own user."""
    if not self._root:
      return []
    who = [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    return [_tool("setpriv"), *who, "--inh-caps=-all", "--"]

  @contextlib.contextmanager
  def _unsafe(
    self,
    argv: Sequence[str],
    files: Mapping[str, bytes],
    variables: dict[str, str],
    limits: Limits,
  ) -> Iterator[BoxedProcess]:
    with tempfile.TemporaryDirectory() as folder:
      for name, data in files.items():
        Path(folder, name).write_bytes(data)
      command = [*_limited(limits), *argv]
      with BoxedProcess(command, limits, cwd=folder, env=variables) as process:
        yield process

  def check(self, process: BoxedProcess, result: Result) -> None:
    """Raises where the sandbox failed, and not the program in it.

    Raises:
      UserError: bubblewrap did not get as far as the command.
    """
    if result.reason == "killed" and not process.began:
      lines = result.stderr.decode(errors="replace").strip().splitlines()
      raise UserError(f"the sandbox did not start: {(lines or ['?'])[0][:200]}")


@functools.cache
def _probe(python: str) -> None:
  """Starts the interpreter in a sandbox once.

  Raises:
    UserError: that is not possible here.
  """
  if not seccomp.known():
    why = (
      f"{os.uname().machine} is a machine whose system calls it can't filter"
    )
    raise UserError(_REFUSAL.format(why=why))
  # It forks under a limit that only its own processes may count against:
  # before Linux 5.14 all of a user's did, and every program would fail.
  # Python's library may come without ctypes, which `code_runner` needs.
  code = "import ctypes, os; print(os.getuid(), flush=True); os.fork()"
  limits = Limits(processes=4)
  try:
    box = Box(python, unsafe=False)
    result = box.run([python, "-I", "-S", "-c", code], limits=limits)
  except (UserError, OSError) as error:
    if "can't be used" in str(error):
      raise
    raise UserError(_REFUSAL.format(why=error)) from None
  if result.exit_code != 0 or result.stdout.split()[:1] == [b"0"]:
    why = f"{result.reason}: {last_words(result.stderr)}"
    raise UserError(_REFUSAL.format(why=why))


def open(unsafe: bool = False, python: str | None = None) -> Box:
  """Returns a sandbox that is known to work.

  Args:
    unsafe: do without one: programs then run as this user, with limits and
      nothing else between them and the machine.
    python: the interpreter for programs in Python; None: this one.

  Raises:
    UserError: it does not work here, and `unsafe` isn't set.
  """
  python = os.path.abspath(python or sys.executable)
  if not unsafe:
    _probe(python)
  return Box(python, unsafe)
