"""What would pass without being right."""

from tests.support.hostile import add

add("leave with success", "mismatch", "import os; os._exit(0)")
add("leave with success, politely", "mismatch", "raise SystemExit(0)")
add(
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
        found |= set(re.findall(rb'SECRET-[0-9a-f]{32}', data))
  print(*(text.decode() for text in found))
  """,
)
add(
  "search memory for the answer",
  "mismatch",
  r"""
  import os, re
  found = set()
  for pid in ('self', os.getppid(), 1):
    try:
      memory = open(f'/proc/{pid}/mem', 'rb', buffering=0)
    except OSError:
      continue
    with memory:
      for line in open(f'/proc/{pid}/maps'):
        begin, end, kind = re.match(r'(\w+)-(\w+) (\S+)', line).groups()
        if kind[0] == 'r' and 'rw' in kind:
          try:
            memory.seek(int(begin, 16))
            data = memory.read(min(2**24, int(end, 16) - int(begin, 16)))
            found |= set(re.findall(rb'SECRET-[0-9a-f]{32}', data))
          except (OSError, ValueError):
            pass
  print(*(text.decode() for text in found))
  """,
)
add(
  "walk the frames",
  "mismatch",
  """
  import sys
  found = set()
  def look(value, depth=0):
    if isinstance(value, str) and value[:6] == 'SECRET' and len(value) == 39:
      found.add(value)
    elif isinstance(value, dict) and depth < 4:
      for each in list(value.values()):
        look(each, depth + 1)
    elif isinstance(value, (list, tuple, set)) and depth < 4:
      for each in list(value):
        look(each, depth + 1)
  frame = sys._getframe()
  while frame:
    look(frame.f_locals)
    look(frame.f_globals)
    frame = frame.f_back
  print(*found)
  """,
)
add(
  "walk all objects",
  "mismatch",
  """
  import gc
  found = set()
  for thing in gc.get_objects():
    if isinstance(thing, (dict, list, tuple)):
      for text in (thing.values() if isinstance(thing, dict) else thing):
        if type(text) is str and text[:6] == 'SECRET' and len(text) == 39:
          found.add(text)
  print(*found)
  """,
)
add(
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
add(
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
add(
  "forge the runner's report",
  "error",
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
add(
  "flood the runner's report",
  "error",
  """
  import os
  fd = os.open(f'/proc/{os.getppid()}/fd/1', os.O_WRONLY)
  while True:
    os.write(fd, b'\\xff' * 65536)
  """,
)
add(
  "a report nested too deeply",
  "error",
  """
  import os, struct
  fd = os.open(f'/proc/{os.getppid()}/fd/1', os.O_WRONLY)
  data = b'[' * 500_000
  data = struct.pack('>I', len(data)) + data
  while data:
    data = data[os.write(fd, data):]
  """,
)
add(
  "forge a report on every descriptor",
  "mismatch error output",
  """
  import os, struct
  report = b''.join(
    struct.pack('>I', len(part)) + part
    for part in (b'{"how": "exit", "code": Infinity}', b'all', b'')
  )
  for fd in range(256):
    try:
      os.write(fd, report)
    except OSError:
      pass
  """,
)
add(
  "the runner's environment and descriptors",
  "error",
  """
  import os
  names = ('environ', 'fd/0', 'fd/1', 'fd/2', 'mem', 'root/box/runner.py')
  opened = []
  for name in names:
    try:
      opened.append(open(f'/proc/{os.getppid()}/{name}', 'rb', buffering=0))
    except OSError:
      pass
  if not opened:
    raise OSError('refused')
  """,
)
add(
  "bubblewrap's descriptors",
  "error",
  """
  import os
  for fd in os.listdir('/proc/1/fd'):
    os.open(f'/proc/1/fd/{fd}', os.O_WRONLY)
  """,
)
add(
  "answer the next test from the last one",
  "mismatch timeout",
  """
  import os, time
  if os.fork() == 0:
    os.setsid()
    while True:
      for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
          fd = os.open(f'/proc/{pid}/fd/1', os.O_WRONLY | os.O_NONBLOCK)
          os.write(fd, b'3')
        except OSError:
          pass
  """,
)
add(
  "modules in /tmp for whoever starts next",
  "mismatch",
  """
  import os
  for folder in ('/tmp', '/tmp/.local/lib/python3.11/site-packages'):
    os.makedirs(folder, exist_ok=True)
    for name in ('sitecustomize', 'usercustomize', 'json', 'ctypes'):
      with open(f'{folder}/{name}.py', 'w') as file:
        file.write("import os; os.write(1, b'all'); os._exit(0)")
  os.environ['PYTHONPATH'] = '/tmp'
  """,
)
add("binary junk", "mismatch", "import os; os.write(1, bytes(range(256)) * 99)")
add("lone surrogates", "error", "print('\\ud800')")
add(
  "odd Unicode",
  "mismatch",
  "print('\\u202e\\u0000\\ufeff\\U000e0001' * 99 + '\\x1b]0;title\\x07')",
)
add("a source that does not parse", "error", "def (:")
add("a source with a null byte", "error", "print(1)\x00")
add("a source nested too deeply", "error memory", "x = " + "(" * 10**5)
add(
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
add(
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
add(
  "an always equal list",
  "mismatch",
  """
  class Equal(list):
    def __eq__(self, other): return True
  def f(x): return Equal([Equal()])
  """,
  function=True,
)
add(
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
add(
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
add("not a number", "mismatch", "def f(x): return float('nan')", function=True)
add(
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
add(
  "a huge value",
  "output memory timeout",
  "def f(x): return [0] * 10**7",
  function=True,
)
add(
  "an endless integer",
  "mismatch timeout",
  "def f(x): return 7 ** 10**5",
  function=True,
)
add(
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
add(
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
