"""The program inside the sandbox: runs a solution once for each test.

It is given to the sandbox as a file and imports nothing but Python's library.
Frames come in on descriptor 0 and go out on descriptor 1: a length of four
bytes, then so many bytes. The first one is a JSON object (`source`,
`function`, `seconds`, `cpu_seconds`, `output_bytes`, `path`, `alone`); each
further one is a test's input, raw for a program, a JSON list of arguments for a
function.
The answer to each is a frame of three: a JSON object (`how`, `code`), what was
written (a program's standard output, a function's value as JSON), and the end
of standard error.

Python starts once and is forked for each test, so that no test sees what
another one left in memory, and in the sandbox none that another one left
running. A test can't reach into this program either: the kernel refuses its
memory and descriptors to processes of the same user. Expected outputs are never
in here: whatever a solution does, it can only give answers.
"""

import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import types

# What solutions may use without importing it, as judges have it.
_MODULES = (
  *("string", "re", "datetime", "collections", "heapq", "bisect", "copy"),
  *("math", "random", "itertools", "functools", "operator", "io", "sys"),
  *("json", "builtins", "typing"),
)
_SET_DUMPABLE = 4  # of prctl
_RECURSION = 50_000
_THREAD_STACK = 8 << 20
_STDERR = 4096
_CHUNK = 1 << 16
_REAP_SECONDS = 1.0


def guard(on):
  """Refuses this process's files in /proc to others of its user.

  Or allows them, where `on` is false.

  Raises:
    OSError: the kernel did not do so.
  """
  if ctypes.CDLL(None, use_errno=True).prctl(_SET_DUMPABLE, int(not on)):
    raise OSError(ctypes.get_errno(), "prctl")


def keep_threads_small():
  """Gives threads stacks of the usual size, and not of the first thread's.

  A library that starts some would else reserve all memory for the first one.
  """
  library = ctypes.CDLL(None)
  attributes = ctypes.create_string_buffer(256)
  library.pthread_attr_init(attributes)
  size = ctypes.c_size_t(_THREAD_STACK)
  library.pthread_attr_setstacksize(attributes, size)
  library.pthread_setattr_default_np(attributes)


def read_exactly(fd, size):
  """Reads so many bytes; None where the stream ends before."""
  parts = []
  while size:
    data = os.read(fd, min(size, 1 << 20))
    if not data:
      return None
    parts.append(data)
    size -= len(data)
  return b"".join(parts)


def read_frame(fd):
  """Reads the next frame's bytes; None at the end."""
  head = read_exactly(fd, 4)
  return None if head is None else read_exactly(fd, *struct.unpack(">I", head))


def write_frame(fd, data):
  """Writes one frame."""
  view = memoryview(struct.pack(">I", len(data)) + data)
  while view:
    view = view[os.write(fd, view[: 1 << 20]) :]


def namespace(name):
  """Makes a fresh module with the usual names, as `sys.modules` knows it."""
  module = types.ModuleType(name)
  for each in _MODULES:
    public = vars(importlib.import_module(each))
    names = public.get("__all__") or [n for n in public if n[0] != "_"]
    vars(module).update({n: public[n] for n in names if n in public})
  for each in _MODULES:
    setattr(module, each, sys.modules[each])
  return module


def plain(value):
  """Converts what JSON does not know: NumPy's numbers and arrays.

  Raises:
    TypeError: it is nothing of the kind.
  """
  if hasattr(value, "tolist"):
    return value.tolist()
  raise TypeError(f"a value of type {type(value).__name__}, not a JSON one")


def call(module, usual, function, arguments):
  """Calls the function, or method of `class Solution`; its value as JSON."""
  found = vars(module).get(function)
  # `gcd` and the like are in the namespace already: what a solution forgot to
  # write must not be answered by Python's own.
  if found is usual.get(function):
    found = None  # a function of the library, not the solution's
  if "Solution" in vars(module):
    found = getattr(module.Solution(), function, found)
  if found is None:
    raise NameError(f"there is no function {function}")
  values = json.loads(arguments)
  if values and isinstance(values[0], dict):
    # JSON made texts of an object's keys; APPS turns a first argument's back.
    with contextlib.suppress(ValueError):
      values[0] = {int(name): each for name, each in values[0].items()}
  value = found(*values)
  return json.dumps(value, default=plain).encode()


def solve(module, code, function, arguments, limit):
  """Runs the solution, then ends this child process with its exit code."""
  # Bound before the solution runs: it can put another in its place.
  leave = os._exit
  status = 1
  try:
    # One second between the two: SIGXCPU at the soft limit says "timeout",
    # SIGKILL at the hard one ends what catches it.
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    sys.modules[module.__name__] = module
    usual = dict(vars(module))
    exec(code, vars(module))
    if function is not None:
      value = memoryview(call(module, usual, function, arguments))
      while value:
        value = value[os.write(3, value) :]
    status = 0
  except SystemExit as stop:
    status = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
  except BaseException as error:
    frames = error.__traceback__ and error.__traceback__.tb_next  # not ours
    traceback.print_exception(type(error), error, frames)
  try:
    # What an interpreter does at its end and _exit does not: threads that still
    # print, registered functions, buffers.
    for thread in threading.enumerate():
      if thread is not threading.current_thread() and not thread.daemon:
        thread.join()
    __import__("atexit")._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
  except BaseException:
    status = status or 1
  finally:
    leave(status & 0xFF)


def child(setup, module, code, data, folder):
  """Forks the process that runs one test; (pid, stdin, output, stderr).

  A program may write files, so it starts in a folder of its own.
  """
  stdin, feed = os.pipe()
  output, write = os.pipe()
  stderr, complain = os.pipe()
  pid = os.fork()
  if pid:
    for fd in (stdin, write, complain):
      os.close(fd)
    return pid, feed, output, stderr
  guard(False)  # a program may open its own
  # Its own session and group: one kill ends what it has started.
  os.setsid()
  os.chdir(folder)
  function = setup["function"]
  if function is not None:
    os.close(stdin)
    os.close(feed)
    stdin = os.open(os.devnull, os.O_RDONLY)
  os.dup2(stdin, 0)
  # A function's value goes out on 3: what it prints is not its value.
  os.dup2(write if function is None else os.open(os.devnull, os.O_WRONLY), 1)
  os.dup2(complain, 2)
  if function is not None:
    os.dup2(write, 3)
  # Above all the frames' descriptors and the pipes of this test.
  os.closerange(3 if function is None else 4, 256)
  solve(module, code, function, data, setup["cpu_seconds"])
  raise AssertionError  # it has left


def test(setup, module, code, data):
  """Runs one test: (how, exit code, output, end of standard error).

  `how` is 'exit', 'signal', 'timeout' or 'output'.
  """
  folder = tempfile.mkdtemp()
  try:
    return watch(setup, *child(setup, module, code, data, folder), data)
  finally:
    # The next test has the same space for its files.
    shutil.rmtree(folder, ignore_errors=True)


def watch(setup, pid, feed, output, stderr, data):
  """Feeds a started test and waits for its end; see `test`."""
  # Poll hears of its end by this one; the pipes may be held open by what it has
  # started.
  pidfd = os.pidfd_open(pid)
  poll = select.poll()
  waiting = memoryview(b"" if setup["function"] is not None else data)
  os.set_blocking(feed, False)
  poll.register(feed, select.POLLOUT)
  for fd in (output, stderr, pidfd):
    poll.register(fd, select.POLLIN)
  parts = {output: [], stderr: [b""]}
  left = setup["output_bytes"]
  deadline = time.monotonic() + setup["seconds"]
  how, ended = None, False
  feeding = True
  while not ended:
    events = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
    if time.monotonic() >= deadline:
      how, ended = "timeout", True
    for fd, _ in events:
      if fd == pidfd:
        ended = True
      elif fd == feed:
        try:
          # In pieces as it reads them: written at once, a long input would
          # block here while the program blocks on its own output.
          waiting = waiting[os.write(feed, waiting[:_CHUNK]) :]
        except BlockingIOError:
          continue
        except OSError:
          waiting = memoryview(b"")
        if not waiting:
          poll.unregister(feed)
          os.close(feed)
          feeding = False
      else:
        some = os.read(fd, _CHUNK)
        if not some:
          poll.unregister(fd)
        left -= len(some)
        if fd == stderr:
          # Only the end is kept, but all of it counts against the cap.
          parts[stderr] = [(parts[stderr][0] + some)[-_STDERR:]]
        else:
          parts[fd].append(some)
        if left < 0:
          how, ended = "output", True
  for kill in (os.killpg, os.kill):  # it may not have its own group yet
    with contextlib.suppress(OSError):
      kill(pid, signal.SIGKILL)
  if setup["alone"]:  # in the sandbox these are the test's alone
    with contextlib.suppress(OSError):
      os.kill(-1, signal.SIGKILL)
  _, status, used = os.wait4(pid, 0)
  # Killed, they are there until the sandbox's first process has reaped them:
  # the next test would see them.
  end = time.monotonic() + _REAP_SECONDS
  while setup["alone"] and time.monotonic() < end:
    try:
      os.kill(-1, signal.SIGKILL)
    except OSError:  # nobody is left
      break
    time.sleep(0.001)
  # What it wrote before it ended; what it left running may hold the pipes.
  for fd in (output, stderr):
    os.set_blocking(fd, False)
    try:
      while left >= 0 and (some := os.read(fd, _CHUNK)):
        left -= len(some)
        parts[fd].append(some)
    except BlockingIOError:
      pass
  if left < 0:
    how = "output"
  for fd in (output, stderr, pidfd, *([feed] if feeding else [])):
    os.close(fd)
  code = os.waitstatus_to_exitcode(status)
  if how is None:
    how = "exit" if code >= 0 else "signal"
    # The hard limit of time and a kernel out of memory both send SIGKILL: the
    # time used tells them apart.
    spent = used.ru_utime + used.ru_stime >= setup["cpu_seconds"]
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and spent):
      how = "timeout"
  return how, code, b"".join(parts[output]), b"".join(parts[stderr])[-_STDERR:]


def main():
  """Answers tests until there are no more."""
  guard(True)
  keep_threads_small()
  setup = json.loads(read_frame(0) or b"")
  sys.path += setup["path"]
  sys.setrecursionlimit(_RECURSION)
  if hasattr(sys, "set_int_max_str_digits"):
    # Contest problems do print integers of over 4,300 digits.
    sys.set_int_max_str_digits(0)
  __builtins__.exit = __builtins__.quit = sys.exit
  program = setup["function"] is None
  module = namespace("__main__" if program else "solution")
  try:
    code, error = compile(setup["source"], "main.py", "exec"), b""
  except BaseException as wrong:
    code, error = None, f"{type(wrong).__name__}: {wrong}".encode()[-_STDERR:]
  while (data := read_frame(0)) is not None:
    if code is None:
      how, status, output = "exit", 1, b""
    else:
      how, status, output, error = test(setup, module, code, data)
    write_frame(1, json.dumps({"how": how, "code": status}).encode())
    write_frame(1, output)
    write_frame(1, error)


if __name__ == "__main__":
  main()
