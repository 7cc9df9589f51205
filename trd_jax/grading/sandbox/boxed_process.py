"""One process that is not trusted: talked to, watched, and ended for good.

Its output is read up to a cap, its memory is added up over all processes that
it has started, its time is the wall clock's, and its end is the end of all of
them: killing bubblewrap's own process ends the process namespace.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Literal

from trd_jax.grading.sandbox import process_memory

End = Literal["exit", "signal", "timeout", "memory", "output", "killed"]

_LOOK_SECONDS = 0.05  # between two looks at the memory
_END_SECONDS = 20.0  # the kernel's, to clear a namespace that was killed
_CHUNK = 1 << 16
STDERR_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a program in the sandbox may use.

  Attributes:
    wall_seconds: from its start to its end.
    cpu_seconds: processor time of each process.
    memory_bytes: address space of each process, and the memory that all of
      them hold together; see `process_memory`.
    file_bytes: size of a file, and of each of the file systems in memory
      that can be written to.
    output_bytes: what it writes to standard output and standard error.
    processes: how many processes and threads live at a time.
    stack_bytes: of a process's first thread; None: as this machine has it.
  """

  wall_seconds: float = 10.0
  cpu_seconds: float = 10.0
  memory_bytes: int = 2 << 30
  file_bytes: int = 64 << 20
  output_bytes: int = 16 << 20
  processes: int = 64
  stack_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Result:
  """How a program ended and what it wrote.

  Attributes:
    reason: 'exit'; 'signal' where one that it did not catch ended it;
      'timeout', 'memory' and 'output' where a limit did; 'killed' where
      somebody else did.
    exit_code: its own, or None where it was ended.
    stdout: at most `Limits.output_bytes`.
    stderr: its last 64 KiB.
    seconds: by the wall clock.
  """

  reason: End
  exit_code: int | None
  stdout: bytes
  stderr: bytes
  seconds: float


class BoxedProcess:
  """A started command line; use it as a context manager.

  Args:
    argv: the whole command line, the sandbox's included.
    limits: see `Limits`; processor time, file size and processes are the
      command line's to set.
    pass_fds: descriptors that it inherits; closed here once it has them.
    status: (read end, write end) of the pipe that bubblewrap reports on; None
      where `argv` is not bubblewrap's.
    memory_folders: where it sees file systems in memory that are its alone.
    cwd: its working directory; None: this process's.
    env: its environment.
  """

  def __init__(
    self,
    argv: Sequence[str],
    limits: Limits,
    *,
    pass_fds: Sequence[int] = (),
    status: tuple[int, int] | None = None,
    memory_folders: Sequence[str] = (),
    cwd: str | None = None,
    env: dict[str, str] | None = None,
  ):
    self.limits = limits
    self.started = time.monotonic()
    self.stderr = b""
    self._reason: End | None = None
    self._boxed = status is not None
    self._memory_folders = memory_folders
    self._status = b""
    self._inside: int | None = None  # pidfd of the namespace's first process
    self._watched: int | None = None  # whose descendants' memory counts
    self._out = bytearray()
    self._in = memoryview(b"")
    self._written = 0
    self._ended = False
    self._cancelled = False
    self._closing = False
    self._next_look = self.started + _LOOK_SECONDS
    try:
      self._process = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        pass_fds=[*pass_fds, *([status[1]] if status else [])],
        cwd=cwd,
        env=env,
        start_new_session=True,
      )
    except BaseException:
      if status:
        os.close(status[0])
      raise
    finally:
      for fd in pass_fds:
        os.close(fd)
      if status:
        os.close(status[1])
    p = self._process
    assert p.stdin is not None
    assert p.stdout is not None
    assert p.stderr is not None
    self._stdin, self._stdout, self._stderr = p.stdin, p.stdout, p.stderr
    self._selector = selectors.DefaultSelector()
    # Readable once the process has ended: select() wakes for that as well.
    self._pidfd = os.pidfd_open(p.pid)
    self._status_fd = status[0] if status else None
    # One thread talks to it and watches it: whatever blocked here would stop
    # the clock and the look at the memory.
    for stream in (p.stdin, p.stdout, p.stderr):
      os.set_blocking(stream.fileno(), False)
    read = selectors.EVENT_READ
    self._selector.register(p.stdout, read, self._read_stdout)
    self._selector.register(p.stderr, read, self._read_stderr)
    self._selector.register(self._pidfd, read, self._note_end)
    if self._status_fd is None:
      self._watched = p.pid
    else:
      os.set_blocking(self._status_fd, False)
      self._selector.register(self._status_fd, read, self._read_status)

  def __enter__(self) -> "BoxedProcess":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  @property
  def ended(self) -> bool:
    """Returns whether nothing more will come from the process."""
    return self._ended

  def send(self, data: bytes) -> None:
    """Queues bytes for the process's standard input."""
    if not self._in:
      with contextlib.suppress(KeyError, ValueError):
        self._selector.register(
          self._stdin, selectors.EVENT_WRITE, self._write_stdin
        )
    self._in = memoryview(bytes(self._in) + data)

  def end_input(self) -> None:
    """Closes the standard input once what was queued is written."""
    self._closing = True
    if not self._in:
      self._close_stdin()

  def read(self, size: int, deadline: float) -> bytes | None:
    """Reads exactly `size` bytes of output; None where they did not come.

    Args:
      size: at most `Limits.output_bytes`.
      deadline: of `time.monotonic`; when it passes the process is ended.
    """
    while len(self._out) < size and not self._ended:
      self._turn(deadline)
    if len(self._out) < size:
      return None
    data = bytes(self._out[:size])
    del self._out[:size]
    # The cap is on what lies unread, so that a process which answers many
    # questions is not ended for all its answers together.
    self._written = len(self._out)
    return data

  def finish(self) -> Result:
    """Waits for the process's end, or brings it about at a limit."""
    while not self._ended:
      self._turn(self.started + self.limits.wall_seconds)
    return self.close()

  def cancel(self) -> None:
    """Asks whichever thread reads from the process to end it soon."""
    self._cancelled = True

  def end(self, reason: End) -> None:
    """Kills the process; the first reason stands."""
    self._reason = self._reason or reason
    if not self._ended:
      self._kill()

  def close(self) -> Result:
    """Ends whatever is left of the process and says how it ended."""
    if not self._ended:
      self.end("killed")
      self._drain()
    seconds = time.monotonic() - self.started
    self._release()
    code = self._exit_code()
    reason = self._reason
    if reason is None:
      reason = "exit" if code is not None else "killed"
      # As a shell, bubblewrap reports a signal as 128 plus its number.
      if code is not None and 128 < code <= 128 + 64:
        number = code - 128
        reason = "timeout" if number == signal.SIGXCPU else "signal"
        if number == signal.SIGKILL and seconds >= self.limits.cpu_seconds:
          reason = "timeout"
    return Result(
      reason,
      code if reason == "exit" else None,
      bytes(self._out[: self.limits.output_bytes]),
      self.stderr,
      seconds,
    )

  @property
  def began(self) -> bool:
    """Returns whether the command itself was reached, not bwrap alone."""
    reported = not self._boxed or b'"exit-code"' in self._status
    return reported or not self.stderr.startswith(b"bwrap: ")

  def _exit_code(self) -> int | None:
    if not self._boxed:
      code = self._process.returncode
      return code if code >= 0 else 128 - code
    for line in self._status.splitlines():
      with contextlib.suppress(ValueError):
        if "exit-code" in (report := json.loads(line)):
          return int(report["exit-code"])
    return None

  def _turn(self, deadline: float) -> None:
    """Moves what can be moved, then looks at the clock and the memory."""
    now = time.monotonic()
    # No limit of the kernel's counts the memory of all processes together: it
    # is looked at, 20 times a second.
    wait = min(deadline, self._next_look) - now
    for key, _ in self._selector.select(max(0.0, wait)):
      key.data()
    now = time.monotonic()
    if self._ended:
      return
    if self._cancelled or now >= deadline:
      self.end("killed" if self._cancelled else "timeout")
      self._drain()
    elif now >= self._next_look and self._watched is not None:
      limit = self.limits.memory_bytes
      if (
        process_memory.held(self._watched, limit, self._memory_folders) > limit
      ):
        self.end("memory")
        self._drain()
      self._next_look = time.monotonic() + _LOOK_SECONDS
    elif now >= self._next_look:
      self._next_look = now + _LOOK_SECONDS

  def _drop(self, stream) -> None:
    with contextlib.suppress(KeyError, ValueError):
      self._selector.unregister(stream)

  def _count(self, size: int) -> None:
    self._written += size
    if self._written > self.limits.output_bytes and not self._reason:
      self.end("output")

  def _read_stdout(self) -> int:
    data = self._take(self._stdout)
    if self._reason is None:
      self._out += data
      self._count(len(data))
    return len(data)

  def _read_stderr(self) -> int:
    data = self._take(self._stderr)
    # Only its end is kept, but all of it counts: many messages are output, too.
    self.stderr = (self.stderr + data)[-STDERR_BYTES:]
    self._count(len(data))
    return len(data)

  def _take(self, stream) -> bytes:
    """Reads what has come in; b"" where nothing has, or nothing more will."""
    try:
      data = os.read(stream.fileno(), _CHUNK)
    except BlockingIOError:
      return b""
    if not data:
      self._drop(stream)
    return data

  def _write_stdin(self) -> None:
    try:
      self._in = self._in[os.write(self._stdin.fileno(), self._in[:_CHUNK]) :]
    except BlockingIOError:
      return
    except OSError:  # it reads no more
      self._in = memoryview(b"")
      self._closing = True
    if not self._in:
      self._drop(self._stdin)
      if self._closing:
        self._close_stdin()

  def _close_stdin(self) -> None:
    self._drop(self._stdin)
    with contextlib.suppress(OSError):
      self._stdin.close()

  def _read_status(self) -> None:
    assert self._status_fd is not None
    try:
      data = os.read(self._status_fd, _CHUNK)
    except BlockingIOError:
      return
    if not data:
      self._drop(self._status_fd)
      return
    self._status += data
    # A pidfd at once, while bubblewrap still waits for this child: its number
    # can't yet be another's.
    if self._inside is None and b"\n" in self._status:
      pid = int(json.loads(self._status.split(b"\n", 1)[0])["child-pid"])
      with contextlib.suppress(ProcessLookupError):
        self._inside = os.pidfd_open(pid)
        self._watched = pid

  def _note_end(self) -> None:
    self._kill()  # without a namespace: what it left behind in its session
    self._drain()

  def _kill(self) -> None:
    """Ends the namespace's first process, and with it all others.

    Bubblewrap's own process is left alone, to reap that first one. If it were
    killed before it has said which process that is, the first one would be left
    waiting for ever. Without a namespace all descendants are ended, but for
    those that have detached from their parents.
    """
    if self._status_fd is not None and self._inside is None:
      said = selectors.DefaultSelector()
      said.register(self._status_fd, selectors.EVENT_READ)
      said.select(_END_SECONDS)
      said.close()
      self._read_status()
    with contextlib.suppress(OSError):
      if self._inside is not None:
        signal.pidfd_send_signal(self._inside, signal.SIGKILL)
        return
    for pid in list(process_memory.descendants(self._process.pid)):
      with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)

  def _drain(self) -> None:
    """Waits until all processes are gone; reads what was left in the pipes."""
    try:
      # Bubblewrap's own process ends when it has buried the first one inside;
      # then the end of the namespace itself is waited for, since what is killed
      # may hold memory and its user for a while.
      self._process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    if self._status_fd is not None:
      with contextlib.suppress(OSError):
        self._read_status()
    if self._inside is not None:
      gone = selectors.DefaultSelector()
      gone.register(self._inside, selectors.EVENT_READ)
      if not gone.select(_END_SECONDS):
        raise RuntimeError("sandbox: a killed namespace did not end")
      gone.close()
    while self._read_stdout():
      pass
    while self._read_stderr():
      pass
    self._ended = True

  def _release(self) -> None:
    self._selector.close()
    for stream in (self._stdin, self._stdout, self._stderr):
      with contextlib.suppress(OSError):
        stream.close()
    for name in ("_pidfd", "_inside", "_status_fd"):
      fd = getattr(self, name)
      if fd is not None:
        os.close(fd)
        setattr(self, name, None)
