"""The sandbox: every limit ends a program, and nothing else gets in or out."""

import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest

from tests.support import processes, sandboxes
from tests.support.places import ROOT
from trd_jax.experiment.errors import UserError
from trd_jax.grading.sandbox import sandbox, seccomp
from trd_jax.grading.sandbox.sandbox import Limits

SYSTEM_PYTHON = "/usr/bin/python3"


@pytest.fixture(autouse=True)
def nothing_left():
  yield
  assert sandboxes.processes() == []


@pytest.fixture(scope="module")
def box():
  return sandbox.open()


def python(box, source, **arguments):
  arguments.setdefault("limits", Limits(wall_seconds=20))
  return box.run([box.python, "-I", "-S", "-c", source], **arguments)


@sandboxes.needed
def test_input_output_and_exit_code(box):
  result = python(
    box,
    "import sys; print(sys.stdin.read()[::-1]); print(9, file=sys.stderr);"
    "sys.exit(3)",
    stdin=b"abc",
  )
  assert (result.reason, result.exit_code) == ("exit", 3)
  assert (result.stdout, result.stderr) == (b"cba\n", b"9\n")


@sandboxes.needed
def test_large_input_and_output_pass_each_other(box):
  data = os.urandom(1 << 22)
  result = python(
    box,
    "import sys\n"
    "while d := sys.stdin.buffer.read1(1000): sys.stdout.buffer.write(d)",
    stdin=data,
  )
  assert result.stdout == data


@sandboxes.needed
def test_input_that_nobody_reads(box):
  result = python(box, "import os; os.close(0); print(1)", stdin=b"x" * 10**7)
  assert (result.reason, result.stdout) == ("exit", b"1\n")


@sandboxes.needed
@pytest.mark.parametrize(
  ("source", "limits", "reason"),
  [
    ("while 1: pass", Limits(wall_seconds=60, cpu_seconds=1), "timeout"),
    ("import time; time.sleep(60)", Limits(wall_seconds=1), "timeout"),
    (
      "import os, time\n"
      "for _ in range(6): os.fork()\n"
      "x = bytearray(b'x') * (64 << 20); time.sleep(60)",
      Limits(wall_seconds=50, memory_bytes=512 << 20),
      "memory",
    ),
    (
      "import os\nn = 0\nwhile 1: os.mknod(f'/tmp/{n}'); n += 1",
      Limits(wall_seconds=50, cpu_seconds=50, memory_bytes=64 << 20),
      "memory",
    ),
    ("while 1: print('x' * 9999)", Limits(output_bytes=10**6), "output"),
    ("import os; os.kill(os.getpid(), 11)", Limits(), "signal"),
  ],
)
def test_every_limit_ends_a_program(box, source, limits, reason):
  result = python(box, source, limits=limits)
  assert (result.reason, result.exit_code) == (reason, None)
  assert len(result.stdout) <= limits.output_bytes


@sandboxes.needed
def test_what_is_inside(box, monkeypatch):
  monkeypatch.setenv("TRD_SECRET", "known")
  result = python(
    box,
    "import os, sys\n"
    "print(sorted(os.listdir('.')), open('a b.txt').read(), os.environ['X'])\n"
    "print(os.getuid() and os.getgid() and not os.getgroups()[1:])\n"
    "print([p for p in os.listdir('/proc') if p.isdigit()])\n"
    "print(os.path.exists('/etc/passwd'), os.path.exists('/sys/kernel'))\n"
    "print('TRD_SECRET' in os.environ, os.listdir('/tmp'))\n"
    "print(*open('/proc/self/status'))",
    files={"a b.txt": b"content", "other": b""},
    env={"X": "y"},
  )
  lines = result.stdout.decode().splitlines()
  assert lines[0] == "['a b.txt', 'other'] content y"
  assert lines[1] == "True"
  assert lines[2] == "['1', '2']"
  assert lines[3] == "False False"
  assert lines[4] == "False []"
  status = dict(line.split(":", 1) for line in lines[5:] if ":" in line)
  assert int(status[" CapPrm"], 16) == int(status[" CapEff"], 16) == 0
  assert int(status[" CapAmb"], 16) == 0
  assert status[" NoNewPrivs"].strip() == "1"
  assert status[" Seccomp"].strip() == "2"


@sandboxes.needed
def test_folders_of_the_host_by_their_own_names(box, tmp_path):
  readable, writable = tmp_path / "in", tmp_path / "out"
  hidden = tmp_path / "hidden"
  for folder in (readable, writable, hidden):
    folder.mkdir()
  (readable / "x").write_text("7")
  result = python(
    box,
    f"import os\n"
    f"open('{writable}/y', 'w').write(open('{readable}/x').read())\n"
    f"print(os.path.exists('{hidden}'))\n"
    f"open('{readable}/x', 'w')",
    read_only=[readable],
    writable=writable,
  )
  assert result.stdout == b"False\n"
  assert b"Read-only file system" in result.stderr
  assert (writable / "y").read_text() == "7"


@sandboxes.needed
def test_a_folder_that_is_not_there_is_the_callers_mistake(box, tmp_path):
  with pytest.raises(UserError, match="did not start"):
    python(box, "print(1)", read_only=[tmp_path / "missing"])


@sandboxes.needed
def test_open_boxes_have_users_of_their_own(box):
  """Or one's processes would count against another's limit."""
  if os.geteuid() != 0:
    pytest.skip("each box has a user namespace of its own then")
  users, barrier = [], threading.Barrier(3)

  def look():
    with box.start(["/usr/bin/id", "-u"]) as process:
      users.append(process.finish().stdout)
      barrier.wait(60)

  threads = [threading.Thread(target=look) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(set(users)) == 3


@sandboxes.needed
def test_it_ends_with_the_process_that_opened_it():
  script = (
    "from trd_jax.grading.sandbox import sandbox\n"
    "box = sandbox.open()\n"
    "code = 'import os, time\\nfor _ in range(2): os.fork()\\nos.setsid()'\n"
    "code += '\\ntime.sleep(600)'\n"
    "limits = sandbox.Limits(wall_seconds=600)\n"
    "print('ready', flush=True)\n"
    "box.run([box.python, '-c', code], limits=limits)\n"
  )
  owner = subprocess.Popen(
    [sys.executable, "-c", script],
    stdout=subprocess.PIPE,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  assert owner.stdout
  assert owner.stdout.readline() == b"ready\n"
  deadline = time.monotonic() + 60
  while len(processes.below(owner.pid)) < 6 and time.monotonic() < deadline:
    time.sleep(0.05)
  inside = processes.below(owner.pid)
  assert len(inside) >= 6  # bubblewrap's two and four of the program's
  owner.send_signal(signal.SIGKILL)
  owner.wait()
  owner.stdout.close()
  assert processes.still_there(inside, 20) == []


def _refusal(environment, *words):
  script = (
    "import sys\n"
    "from trd_jax.experiment.errors import UserError\n"
    "from trd_jax.grading.sandbox import sandbox\n"
    "try:\n"
    "  sandbox.open()\n"
    "except UserError as error:\n"
    "  print(error)\n"
    "box = sandbox.open(unsafe=True)\n"
    "result = box.run([sys.executable, 'x.py'], files={'x.py': b'print(5)'})\n"
    "print(result.stdout, result.reason)\n"
  )
  return subprocess.run(
    [*words, sys.executable, "-c", script],
    capture_output=True,
    text=True,
    env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
    check=True,
  ).stdout.splitlines()


def test_without_bubblewrap_it_refuses_unless_told_by_name(tmp_path):
  prlimit = shutil.which("prlimit")
  assert prlimit
  (tmp_path / "prlimit").symlink_to(prlimit)
  refusal, unsafe = _refusal({"PATH": str(tmp_path)})
  assert "there is no bwrap" in refusal
  assert "apt-get install bubblewrap" in refusal
  assert "--config.sandbox.unsafe=True" in refusal
  assert unsafe == "b'5\\n' exit"


@sandboxes.needed
def test_where_namespaces_are_refused_it_refuses():
  words = ["bwrap", "--bind", "/", "/", "--dev-bind", "/dev", "/dev"]
  words += ["--unshare-user", "--disable-userns", "--uid", "1000", "--"]
  if subprocess.run([*words, "true"], check=False).returncode:
    pytest.skip("this bubblewrap is too old to forbid user namespaces")
  refusal, unsafe = _refusal({}, *words)
  assert "can't be used on this machine (the sandbox did not start" in refusal
  assert "amespace" in refusal
  assert "--config.sandbox.unsafe=True" in refusal
  assert unsafe == "b'5\\n' exit"


@sandboxes.needed
def test_inside_the_sandbox_there_is_no_second_one(box):
  result = box.run(
    [
      *(box.python, "-S", "-c"),
      "from trd_jax.experiment.errors import UserError\n"
      "from trd_jax.grading.sandbox import sandbox\n"
      "try:\n"
      "  sandbox.open()\n"
      "except UserError as error:\n"
      "  print(error)\n",
    ],
    read_only=[ROOT / "trd_jax"],
    env={"PYTHONPATH": str(ROOT)},
    limits=Limits(wall_seconds=60),
  )
  assert b"can't be used on this machine" in result.stdout, result


@sandboxes.needed
def test_it_works_for_a_user_who_is_not_root():
  if os.geteuid() != 0:
    pytest.skip("all other tests show it")
  source = (
    "import os, time\n"
    "forks = 0\n"
    "for _ in range(200):\n"
    "  try:\n"
    "    if os.fork() == 0: time.sleep(2); os._exit(0)\n"
    "    forks += 1\n"
    "  except OSError: pass\n"
    "print(forks)\n"
    "for path in ('/etc/passwd', '/x', '/dev/x', '/usr/x', '/box/x',\n"
    "             '/proc/1/mem', '/proc/1/fd/1', '/proc/1/fd/2'):\n"
    "  try: open(path, 'r' if 'etc' in path else 'w'); print(path)\n"
    "  except OSError: pass\n"
  )
  script = (
    "from trd_jax.grading.sandbox import sandbox\n"
    f"box = sandbox.open(python='{SYSTEM_PYTHON}')\n"
    f"command = [box.python, '-c', {source!r}]\n"
    "limits = sandbox.Limits(wall_seconds=30, processes=16)\n"
    "print(box.run(command, limits=limits))\n"
    "command = [box.python, '-c', 'while 1: pass']\n"
    "limits = sandbox.Limits(wall_seconds=1)\n"
    "print(box.run(command, limits=limits).reason)\n"
  )
  drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
  check = "import sys, trd_jax; assert sys.version_info >= (3, 11)"
  for code in (check, script):
    ran = subprocess.run(
      [*drop, SYSTEM_PYTHON, "-c", code],
      capture_output=True,
      text=True,
      env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
      check=False,
    )
    if code is check and ran.returncode:
      pytest.skip(f"nobody's Python can't read the package: {ran.stderr}")
  assert ran.returncode == 0, ran.stderr
  result, endless = ran.stdout.splitlines()
  assert "exit_code=0" in result
  forks = int(result.partition("stdout=b'")[2].partition("\\n")[0])
  assert 0 < forks < 16
  assert "/etc" not in result
  assert "/x" not in result
  assert "/proc" not in result
  assert endless == "timeout"


@sandboxes.needed
@pytest.mark.parametrize("kind", ["SHARED", "PRIVATE"])
def test_memory_of_all_processes_counts_shared_or_not(kind):
  """Without the sandbox, which forbids what is shared and has no name."""
  source = (
    "import mmap, os, time\n"
    "for _ in range(2): os.fork()\n"
    f"one = mmap.mmap(-1, 150 << 20, mmap.MAP_{kind} | mmap.MAP_ANONYMOUS)\n"
    "one.write(bytes(150 << 20))\n"
    "time.sleep(60)"
  )
  limits = Limits(wall_seconds=30, memory_bytes=512 << 20)
  box = sandbox.open(unsafe=True)
  assert python(box, source, limits=limits).reason == "memory"


@sandboxes.needed
def test_memory_that_is_shared_counts_once():
  source = (
    "import mmap, os, time\n"
    "one = mmap.mmap(-1, 150 << 20)\n"
    "one.write(bytes(150 << 20))\n"
    "for _ in range(2): os.fork()\n"
    "one[::4096]; time.sleep(.5)"
  )
  limits = Limits(wall_seconds=30, memory_bytes=512 << 20)
  box = sandbox.open(unsafe=True)
  assert python(box, source, limits=limits).exit_code == 0


def _verdict(
  program: bytes, architecture: int, number: int, first: int, fourth: int
):
  """What the kernel's machine would answer."""
  code = list(struct.iter_unpack("=HBBI", program))
  data = {0: number, 4: architecture, 16: first, 40: fourth}
  at, value = 0, 0
  while True:
    kind, true, false, operand = code[at]
    at += 1
    if kind == 0x20:
      value = data[operand]
    elif kind == 0x06:
      return operand
    else:
      holds = {
        0x15: value == operand,
        0x35: value >= operand,
        0x45: bool(value & operand),
      }[kind]
      at += true if holds else false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_refuses_what_it_says_and_nothing_else(machine):
  program = seccomp.program(machine)
  mine = seccomp._ARCHITECTURES[machine]
  column = list(seccomp._ARCHITECTURES).index(machine)
  allow, kill, refuse, absent = 0x7FFF0000, 0x80000000, 0x50001, 0x50000 + 38

  def answer(number, first=0, fourth=0, architecture=mine):
    return _verdict(program, architecture, number, first, fourth)

  special = {
    seccomp._CLONE[machine],
    seccomp._CLONE3[machine],
    seccomp._SOCKET[machine],
  }
  refused = {numbers[column] for numbers in seccomp._REFUSED.values()}
  assert len(refused) == len(seccomp._REFUSED)
  for number in set(range(600)) - special:
    assert answer(number) == (refuse if number in refused else allow), number
  assert answer(seccomp._CLONE3[machine]) == absent
  for flag in (0x10000000, 0x20000000, 0x00020000, 0x40000000):
    assert answer(seccomp._CLONE[machine], flag | 17) == refuse
  assert answer(seccomp._CLONE[machine], 0x3D0F00) == allow  # a thread
  memory = seccomp._MMAP[machine]
  for flags, verdict in (
    (0x21, refuse),  # shared, anonymous
    (0x23, refuse),
    (0x22, allow),  # private
    (0x01, allow),  # of a file
    (0x20022, allow),  # a thread's stack
  ):
    assert answer(memory, fourth=flags) == verdict
  families = {f: answer(seccomp._SOCKET[machine], f) for f in range(60)}
  assert {f for f, a in families.items() if a == allow} == {1, 2, 10}
  assert {a for a in families.values() if a != allow} == {refuse}
  assert answer(0x40000000 + 101) == kill
  other = set(seccomp._ARCHITECTURES.values()) - {mine}
  assert answer(0, architecture=other.pop()) == kill
