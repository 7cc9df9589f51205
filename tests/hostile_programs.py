"""Programs that mean harm, or a good mark that they did not earn.

Each has the reasons that its verdict may have. `@canary@`, `@folder@`,
`@port@`, `@abstract@` and `@marker@` stand for things of this machine that a
test makes; the right answer is a secret that no program is told.
"""

import textwrap
from typing import NamedTuple


class Hostile(NamedTuple):
  reasons: frozenset[str]
  source: str
  function: bool = False


_ALL: dict[str, Hostile] = {}


def _add(name: str, reasons: str, source: str, function: bool = False) -> None:
  assert name not in _ALL
  source = textwrap.dedent(source).strip() + "\n"
  _ALL[name] = Hostile(frozenset(reasons.split()), source, function)


# --- what would take the machine ---------------------------------------------
_add(
  "fork bomb",
  "timeout",
  """
  import os
  while True:
    try:
      os.fork()
    except OSError:
      pass
  """,
)
_add(
  "fork bomb of processes that leave their session",
  "timeout",
  """
  import os
  while True:
    try:
      if os.fork() == 0:
        os.setsid()
    except OSError:
      pass
  """,
)
_add(
  "thread bomb",
  "error timeout",
  """
  import threading, time
  while True:
    threading.Thread(target=time.sleep, args=(100,)).start()
  """,
)
_add(
  "shell fork bomb",
  "timeout error mismatch",
  "import os; os.system('f() { f | f & }; f; sleep 100')",
)
_add(
  "memory bomb", "memory", "hoard = []\nwhile True: hoard.append('x' * 2**20)"
)
_add("one huge allocation", "memory", "x = bytearray(2**40)")
_add(
  "memory of many processes",
  "memory",
  """
  import os, time
  for _ in range(8):
    if os.fork() == 0:
      break
  hoard = []
  for _ in range(200):
    hoard.append(bytearray(b'x') * 2**20)
  time.sleep(100)
  """,
)
_add(
  "memory in /dev/shm",
  "error",
  """
  for i in range(1000):
    with open(f'/dev/shm/@marker@-{i}', 'wb') as file:
      file.write(bytes(2**20))
  """,
)
_add(
  "memory in a memfd",
  "error",
  "import os\nfor i in range(100): os.write(os.memfd_create('x'), bytes(2**20))",
)
_add(
  "System V shared memory",
  "error",
  """
  import ctypes
  libc = ctypes.CDLL(None, use_errno=True)
  assert libc.shmget(0, ctypes.c_size_t(2**30), 0o1666) >= 0
  """,
)
_add(
  "fill /tmp",
  "error",
  """
  for i in range(1000):
    with open(f'/tmp/@marker@-{i}', 'wb') as file:
      file.write(bytes(2**20))
  """,
)
_add(
  "a file of a terabyte",
  "error",
  "open('/tmp/@marker@', 'wb').truncate(2**40)",
)
_add(
  "files without end",
  "timeout error",
  """
  i = 0
  while True:
    open(f'/tmp/@marker@-{i}', 'w').close()
    i += 1
  """,
)
_add("endless loop", "timeout", "while True: pass")
_add("sleep", "timeout", "import time; time.sleep(10**6)")
_add("a product that no signal interrupts", "timeout", "x = 9**9**9")
_add(
  "catastrophic backtracking",
  "timeout",
  "import re; re.match('(a*)*b', 'a' * 64)",
)
_add("output without end", "output", "while True: print('x' * 10**6)")
_add("output of 1 GB", "output memory", "print('x' * 10**9)")
_add(
  "standard error of 1 GB",
  "output",
  "import sys\nfor _ in range(1000): sys.stderr.write('x' * 10**6)",
)
_add(
  "output in drops",
  "timeout output",
  "import os, time\nwhile True: os.write(1, b'.'); time.sleep(0.01)",
)

# --- what would reach out of the sandbox -------------------------------------
_add("read /etc/shadow", "error", "print(open('/etc/shadow').read())")
_add("read /etc/passwd", "error", "print(open('/etc/passwd').read())")
_add("read a file of the host", "error", "print(open('@canary@').read())")
_add("write to a file of the host", "error", "open('@canary@', 'w').write('x')")
_add("new file on the host", "error", "open('@folder@/@marker@', 'w')")
_add("new file in /usr", "error", "open('/usr/@marker@', 'w')")
_add("new file in /", "error", "open('/@marker@', 'w')")
_add("new file in the working directory", "error", "open('@marker@', 'w')")
_add("new file in /dev", "error", "open('/dev/@marker@', 'w')")
_add(
  "remove everything",
  "mismatch error timeout",
  "import shutil; shutil.rmtree('/', ignore_errors=True)",
)
_add(
  "the host through /proc/1/root",
  "error",
  "print(open('/proc/1/root@canary@').read())",
)
_add(
  "the host through a link",
  "error",
  """
  import os
  os.symlink('@canary@', '/tmp/link')
  print(open('/tmp/link').read())
  """,
)
_add(
  "environments",
  "mismatch",
  r"""
  import glob, re
  for path in ['/proc/self/environ', *glob.glob('/proc/[0-9]*/environ')]:
    try:
      print(*re.findall('SECRET-[0-9a-f]+', open(path).read()))
    except OSError:
      pass
  """,
)
_add(
  "network to the host",
  "error",
  """
  import socket
  print(socket.create_connection(('127.0.0.1', @port@), 2).recv(100))
  """,
)
_add(
  "network to the world",
  "error",
  "import socket; socket.create_connection(('192.0.2.1', 80), 2)",
)
_add("names", "error", "import socket; socket.getaddrinfo('example.org', 80)")
_add(
  "datagrams",
  "error",
  """
  import socket
  socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(
    b'x', ('192.0.2.1', 53)
  )
  """,
)
_add(
  "an abstract socket of the host",
  "error",
  """
  import socket
  s = socket.socket(socket.AF_UNIX)
  s.connect('\\0@abstract@')
  """,
)
_add(
  "the virtual machine's host", "error", "import socket; socket.socket(40, 1)"
)
_add("raw sockets", "error", "import socket; socket.socket(2, 3, 1)")
_add("become root", "error", "import os; os.setuid(0)")
_add(
  "become root by su",
  "mismatch error",
  "import os; os.system('su -c \"touch @folder@/@marker@\" < /dev/null')",
)
for _call, _arguments in {
  "mount": "b'none', b'/tmp', b'tmpfs', 0, 0",
  "chroot": "b'/tmp'",
  "unshare": "0x10000000",
  "setns": "0, 0",
  "reboot": "0x1234567",
}.items():
  _add(
    f"system call {_call}",
    "error",
    f"""
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.{_call}({_arguments}) != 0:
      raise OSError(ctypes.get_errno(), 'refused')
    """,
  )
_add(
  "a user namespace by clone",
  "error",
  """
  import ctypes, signal
  libc = ctypes.CDLL(None, use_errno=True)
  pid = libc.syscall(56, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)
  if pid < 0:
    raise OSError(ctypes.get_errno(), 'refused')
  """,
)
_add(
  "more than the limits",
  "error",
  """
  import resource
  resource.setrlimit(resource.RLIMIT_NPROC, (10**6, 10**6))
  """,
)
_add(
  "real-time priority",
  "error",
  "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))",
)

# --- what would end or take over those who watch ------------------------------
_add(
  "kill the parent",
  "error",
  "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
)
_add(
  "stop the parent",
  "timeout",
  "import os, signal; os.kill(os.getppid(), signal.SIGSTOP)",
)
_add("kill everybody", "error", "import os; os.kill(-1, 9)")
_add("kill the first process", "error mismatch", "import os; os.kill(1, 9)")
_add("kill itself", "error", "import os; os.kill(os.getpid(), 9)")
_add("stop itself", "timeout", "import os, signal; os.kill(os.getpid(), 19)")
_add(
  "ptrace the parent",
  "error",
  """
  import ctypes, os
  libc = ctypes.CDLL(None, use_errno=True)
  if libc.ptrace(16, os.getppid(), 0, 0) != 0:
    raise OSError(ctypes.get_errno(), 'refused')
  """,
)
_add(
  "write into the parent's memory",
  "error mismatch",
  """
  import os, re
  parent = os.getppid()
  maps = open(f'/proc/{parent}/maps').read()
  begin, end = re.search('([0-9a-f]+)-([0-9a-f]+) rw.*heap', maps).groups()
  with open(f'/proc/{parent}/mem', 'r+b', buffering=0) as memory:
    memory.seek(int(begin, 16))
    memory.write(bytes(int(end, 16) - int(begin, 16)))
  """,
)
_add(
  "ignore every signal",
  "timeout",
  """
  import signal
  for number in signal.valid_signals():
    try:
      signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
      pass
  while True:
    pass
  """,
)
_add(
  "threads that never end",
  "timeout",
  "import threading, time; threading.Thread(target=time.sleep, args=(99,)).start()",
)
_add(
  "a daemon that keeps the output open",
  "mismatch",
  """
  import os, time
  if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
      time.sleep(100)
    os._exit(0)
  """,
)
_add(
  "daemons that write on",
  "mismatch error",
  """
  import os, time
  for _ in range(5):
    if os.fork() == 0:
      os.setsid()
      while True:
        time.sleep(0.01)
        os.write(1, b'x')
  """,
)
_add("crash", "error", "import ctypes; ctypes.string_at(0)")
_add(
  "recursion without end",
  "error memory timeout",
  """
  import sys
  sys.setrecursionlimit(10**9)
  def f(x): return [f(x)] + sorted([x], key=f)
  f(0)
  """,
)
_add(
  "close all descriptors", "error mismatch", "import os; os.closerange(0, 999)"
)
_add(
  "exit handler that never ends",
  "timeout",
  "import atexit, time; atexit.register(time.sleep, 99)",
)

# --- what would pass without being right --------------------------------------
_add("leave with success", "mismatch", "import os; os._exit(0)")
_add("leave with success, politely", "mismatch", "raise SystemExit(0)")
_add(
  "search the sandbox for the answer",
  "mismatch timeout",
  r"""
  import os, re
  found = set()
  for top in ('/box', '/tmp', '/dev/shm', '/proc/self', '/proc/1', '/proc/2'):
    for folder, _, files in os.walk(top):
      for name in files:
        path = os.path.join(folder, name)
        if name in ('kmsg', 'clear_refs') or '/task/' in path:
          continue
        try:
          fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
          data = os.read(fd, 10**6)
          os.close(fd)
        except OSError:
          continue
        found |= set(re.findall(rb'SECRET-[0-9a-f]+', data))
  print(*found)
  """,
)
_add(
  "search memory for the answer",
  "mismatch",
  r"""
  import os, re
  for pid in ('self', os.getppid()):
    with open(f'/proc/{pid}/mem', 'rb', buffering=0) as memory:
      for line in open(f'/proc/{pid}/maps'):
        begin, end, kind = re.match(r'(\w+)-(\w+) (\S+)', line).groups()
        if kind[0] == 'r' and 'rw' in kind:
          try:
            memory.seek(int(begin, 16))
            data = memory.read(min(2**24, int(end, 16) - int(begin, 16)))
            print(*re.findall(rb'SECRET-[0-9a-f]{32}', data))
          except (OSError, ValueError):
            pass
  """,
)
_add(
  "walk the frames",
  "mismatch",
  """
  import sys
  frame = sys._getframe()
  while frame:
    for space in (frame.f_locals, frame.f_globals):
      for name in ('expected', 'outputs', 'output', 'answer', 'tests', 'case'):
        if name in space:
          print(space[name])
    frame = frame.f_back
  """,
)
_add(
  "walk all objects",
  "mismatch",
  """
  import gc
  for thing in gc.get_objects():
    if isinstance(thing, (dict, list, tuple)):
      for text in (thing.values() if isinstance(thing, dict) else thing):
        if isinstance(text, str) and text.startswith('SECRET-'):
          print(text)
  """,
)
_add(
  "patch the runner",
  "mismatch error",
  """
  import os, sys
  frame = sys._getframe()
  while frame:
    space = frame.f_globals
    if 'write_frame' in space:
      space['test'] = lambda *args: ('exit', 0, b'', b'')
      space['write_frame'] = lambda *args: None
    frame = frame.f_back
  os._exit = lambda code: None
  """,
)
_add(
  "patch the library",
  "mismatch error",
  """
  import builtins, json, os, sys
  json.dumps = lambda *args, **kwargs: '{"how": "exit", "code": 0}'
  json.loads = lambda *args, **kwargs: {}
  builtins.print = lambda *args, **kwargs: None
  os.write = lambda fd, data: len(data)
  sys.exit = lambda code=0: None
  """,
)
_add(
  "forge the runner's report",
  "mismatch error",
  """
  import json, os, struct
  report = b''.join(
    struct.pack('>I', len(part)) + part
    for part in (b'{"how": "exit", "code": 0, "passed": true}', b'all', b'')
  )
  fd = os.open(f'/proc/{os.getppid()}/fd/1', os.O_WRONLY)
  os.write(fd, report * 3)
  """,
)
_add(
  "flood the runner's report",
  "output error mismatch",
  """
  import os
  fd = os.open(f'/proc/{os.getppid()}/fd/1', os.O_WRONLY)
  while True:
    os.write(fd, b'\\xff' * 65536)
  """,
)
_add(
  "a report nested too deeply",
  "error mismatch",
  """
  import os, struct
  fd = os.open(f'/proc/{os.getppid()}/fd/1', os.O_WRONLY)
  data = b'[' * 500_000
  data = struct.pack('>I', len(data)) + data
  while data:
    data = data[os.write(fd, data):]
  """,
)
_add(
  "binary junk", "mismatch", "import os; os.write(1, bytes(range(256)) * 99)"
)
_add("lone surrogates", "error", "print('\\ud800')")
_add(
  "odd Unicode",
  "mismatch",
  "print('\\u202e\\u0000\\ufeff\\U000e0001' * 99 + '\\x1b]0;title\\x07')",
)
_add("a source that does not parse", "error", "def (:")
_add("a source with a null byte", "error", "print(1)\x00")
_add("a source nested too deeply", "error memory", "x = " + "(" * 10**5)
_add(
  "always equal",
  "error",
  """
  class Equal:
    def __eq__(self, other): return True
    def __hash__(self): return 0
  def f(x): return Equal()
  """,
  function=True,
)
_add(
  "an always equal text",
  "mismatch",
  """
  class Equal(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
  def f(x): return Equal('x')
  """,
  function=True,
)
_add(
  "an always equal list",
  "mismatch",
  """
  class Equal(list):
    def __eq__(self, other): return True
  def f(x): return Equal([Equal()])
  """,
  function=True,
)
_add(
  "a value that pretends to be NumPy's",
  "mismatch error",
  """
  class Equal:
    def tolist(self): return [Equal()] if x else self
    def __eq__(self, other): return True
  x = 0
  def f(x): return Equal()
  """,
  function=True,
)
_add(
  "a value that runs when it is read",
  "error",
  """
  import os
  class Trap:
    def __reduce__(self): return os.system, ('touch @canary@',)
  def f(x): return Trap()
  """,
  function=True,
)
_add("not a number", "mismatch", "def f(x): return float('nan')", function=True)
_add(
  "a value nested too deeply",
  "error mismatch",
  """
  def f(x):
    value = []
    for _ in range(10**5): value = [value]
    return value
  """,
  function=True,
)
_add(
  "a huge value",
  "output memory timeout",
  "def f(x): return [0] * 10**7",
  function=True,
)
_add(
  "an endless integer",
  "mismatch timeout",
  "def f(x): return 7 ** 10**5",
  function=True,
)
_add(
  "the caller's expected value",
  "mismatch error",
  """
  import sys
  def f(x):
    frame = sys._getframe(1)
    while frame:
      for name in ('expected', 'outputs', 'case', 'tests'):
        if name in frame.f_locals:
          return frame.f_locals[name]
      frame = frame.f_back
  """,
  function=True,
)
_add(
  "a value written past the caller",
  "mismatch error",
  """
  import os
  def f(x):
    os.write(3, b'true')
    os._exit(0)
  """,
  function=True,
)


def programs(**of_this_machine: object) -> dict[str, Hostile]:
  """All of them by name, with what stands for things of this machine."""
  found = {}
  for name, hostile in _ALL.items():
    source = hostile.source
    for each, value in of_this_machine.items():
      source = source.replace(f"@{each}@", str(value))
    found[name] = hostile._replace(source=source)
  return found


NAMES = tuple(_ALL)
