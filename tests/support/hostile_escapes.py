"""What would reach out of the sandbox."""

from tests.support.hostile import add

add("read /etc/shadow", "error", "print(open('/etc/shadow').read())")
add("read /etc/passwd", "error", "print(open('/etc/passwd').read())")
add("read a file of the host", "error", "print(open('@canary@').read())")
add("write to a file of the host", "error", "open('@canary@', 'w').write('x')")
add("new file on the host", "error", "open('@folder@/@marker@', 'w')")
add("new file in /usr", "error", "open('/usr/@marker@', 'w')")
add("new file in /", "error", "open('/@marker@', 'w')")
add("new file beside what runs it", "error", "open('/box/@marker@', 'w')")
add("new file in /dev", "error", "open('/dev/@marker@', 'w')")
add(
  "remove everything",
  "mismatch error timeout",
  "import shutil; shutil.rmtree('/', ignore_errors=True)",
)
add(
  "the host through /proc/1/root",
  "error",
  "print(open('/proc/1/root@canary@').read())",
)
add(
  "the host through a link",
  "error",
  """
  import os
  os.symlink('@canary@', '/tmp/link')
  print(open('/tmp/link').read())
  """,
)
add(
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
add(
  "network to the host",
  "error",
  """
  import socket
  print(socket.create_connection(('127.0.0.1', @port@), 2).recv(100))
  """,
)
add(
  "network to the world",
  "error",
  "import socket; socket.create_connection(('192.0.2.1', 80), 2)",
)
add("names", "error", "import socket; socket.getaddrinfo('example.org', 80)")
add(
  "datagrams",
  "error",
  """
  import socket
  socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(
    b'x', ('192.0.2.1', 53)
  )
  """,
)
add(
  "an abstract socket of the host",
  "error",
  """
  import socket
  s = socket.socket(socket.AF_UNIX)
  s.connect('\\0@abstract@')
  """,
)
add(
  "the virtual machine's host", "error", "import socket; socket.socket(40, 1)"
)
add("raw sockets", "error", "import socket; socket.socket(2, 3, 1)")
add("become root", "error", "import os; os.setuid(0)")
add(
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
  add(
    f"system call {_call}",
    "error",
    f"""
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.{_call}({_arguments}) != 0:
      raise OSError(ctypes.get_errno(), 'refused')
    """,
  )
add(
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
add(
  "more than the limits",
  "error",
  """
  import resource
  resource.setrlimit(resource.RLIMIT_NPROC, (10**6, 10**6))
  """,
)
add(
  "real-time priority",
  "error",
  "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))",
)
