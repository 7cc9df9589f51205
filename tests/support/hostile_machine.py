"""What would take the machine, or end those who watch."""

from tests.support.hostile import add

add(
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
add(
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
add(
  "thread bomb",
  "error timeout",
  """
  import threading, time
  while True:
    threading.Thread(target=time.sleep, args=(100,)).start()
  """,
)
add(
  "shell fork bomb",
  "timeout error mismatch",
  "import os; os.system('f() { f | f & }; f; sleep 100')",
)
add(
  "memory bomb", "memory", "hoard = []\nwhile True: hoard.append('x' * 2**20)"
)
add("one huge allocation", "memory", "x = bytearray(2**40)")
add(
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
add(
  "memory in /dev/shm",
  "error",
  """
  for i in range(1000):
    with open(f'/dev/shm/@marker@-{i}', 'wb') as file:
      file.write(bytes(2**20))
  """,
)
add(
  "memory in a memfd",
  "error",
  """
  import os
  for i in range(100):
    os.write(os.memfd_create('x'), bytes(2**20))
  """,
)
add(
  "System V shared memory",
  "error",
  """
  import ctypes
  libc = ctypes.CDLL(None, use_errno=True)
  assert libc.shmget(0, ctypes.c_size_t(2**30), 0o1666) >= 0
  """,
)
add(
  "shared memory of many processes",
  "error memory",
  """
  import mmap, os, time
  for _ in range(4):
    if os.fork() == 0:
      break
  shared = mmap.mmap(-1, 200 << 20)
  for _ in range(200):
    shared.write(bytes(1 << 20))
  time.sleep(1)
  """,
)
add(
  "shared memory of /dev/zero",
  "error memory",
  """
  import mmap, os
  hoard = []
  for _ in range(3):
    hoard.append(mmap.mmap(os.open('/dev/zero', os.O_RDWR), 64 << 20))
  """,
)
add(
  "shared memory that is hardly mapped",
  "error memory",
  """
  import ctypes
  libc = ctypes.CDLL(None, use_errno=True)
  libc.mmap.restype = ctypes.c_void_p
  libc.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t
  size = 64 << 20
  for _ in range(12):
    start = libc.mmap(None, ctypes.c_size_t(size), 3, 0x21, -1, 0)
    if start == ctypes.c_void_p(-1).value:
      raise OSError(ctypes.get_errno(), 'refused')
    ctypes.memset(start, 1, size)
    libc.munmap(start + 4096, size - 4096)
  """,
)
add(
  "memory in sockets",
  "memory",
  """
  import os, socket, time
  for _ in range(8):
    if os.fork() == 0:
      break
  hoard = []
  try:
    while True:
      hoard.append(socket.socketpair())
      for end in hoard[-1]:
        end.setblocking(False)
        try:
          while True:
            end.send(bytes(2**16))
        except BlockingIOError:
          pass
  except OSError:
    pass
  time.sleep(1)
  """,
)
add(
  "fill /tmp",
  "error",
  """
  for i in range(1000):
    with open(f'/tmp/@marker@-{i}', 'wb') as file:
      file.write(bytes(2**20))
  """,
)
add(
  "a file of a terabyte",
  "error",
  "open('/tmp/@marker@', 'wb').truncate(2**40)",
)
add(
  "files without end",
  "timeout error",
  """
  i = 0
  while True:
    open(f'/tmp/@marker@-{i}', 'w').close()
    i += 1
  """,
)
add("endless loop", "timeout", "while True: pass")
add("sleep", "timeout", "import time; time.sleep(10**6)")
add("a product that no signal interrupts", "timeout", "x = 9**9**9")
add(
  "catastrophic backtracking",
  "timeout",
  "import re; re.match('(a*)*b', 'a' * 64)",
)
add("output without end", "output", "while True: print('x' * 10**6)")
add("output of 1 GB", "output memory", "print('x' * 10**9)")
add(
  "standard error of 1 GB",
  "output",
  "import sys\nfor _ in range(1000): sys.stderr.write('x' * 10**6)",
)
add(
  "output in drops",
  "timeout output",
  "import os, time\nwhile True: os.write(1, b'.'); time.sleep(0.01)",
)

add(
  "kill the parent",
  "error",
  "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
)
add(
  "stop the parent",
  "timeout",
  "import os, signal; os.kill(os.getppid(), signal.SIGSTOP)",
)
add("kill everybody", "error", "import os; os.kill(-1, 9)")
add("kill the first process", "error mismatch", "import os; os.kill(1, 9)")
add("kill itself", "error", "import os; os.kill(os.getpid(), 9)")
add("stop itself", "timeout", "import os, signal; os.kill(os.getpid(), 19)")
add(
  "ptrace the parent",
  "error",
  """
  import ctypes, os
  libc = ctypes.CDLL(None, use_errno=True)
  if libc.ptrace(16, os.getppid(), 0, 0) != 0:
    raise OSError(ctypes.get_errno(), 'refused')
  """,
)
add(
  "write into the parent's memory",
  "error",
  """
  import os, re
  parent = os.getppid()
  maps = open(f'/proc/{parent}/maps').read()
  begin, _ = re.search('([0-9a-f]+)-([0-9a-f]+) rw.*heap', maps).groups()
  with open(f'/proc/{parent}/mem', 'r+b', buffering=0) as memory:
    memory.seek(int(begin, 16))
    one = memory.read(1)
    memory.seek(int(begin, 16))
    memory.write(one)
  """,
)
add(
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
add(
  "threads that never end",
  "timeout",
  """
  import threading, time
  threading.Thread(target=time.sleep, args=(99,)).start()
  """,
)
add(
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
add(
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
add("crash", "error", "import ctypes; ctypes.string_at(0)")
add(
  "recursion without end",
  "error memory timeout",
  """
  import sys
  sys.setrecursionlimit(10**9)
  def f(x): return [f(x)] + sorted([x], key=f)
  f(0)
  """,
)
add(
  "close all descriptors", "error mismatch", "import os; os.closerange(0, 999)"
)
add(
  "exit handler that never ends",
  "timeout",
  "import atexit, time; atexit.register(time.sleep, 99)",
)
