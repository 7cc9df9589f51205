"""What a model writes can't harm the machine or mark itself right."""

import json
import os
import secrets
import shutil
import socket
import threading
from pathlib import Path

import pytest

from tests.support import (
  hostile,
  hostile_cheats,  # noqa: F401
  hostile_escapes,  # noqa: F401
  hostile_machine,  # noqa: F401
  sandboxes,
)
from trd_jax.experiment.schema import Sandbox
from trd_jax.grading.code import programs
from trd_jax.grading.sandbox import sandbox

pytestmark = sandboxes.NEEDED

LIMITS = Sandbox(
  workers=4,
  test_seconds=1,
  total_seconds=20.0,
  memory_gib=0.25,
  processes=16,
  output_mib=4,
  file_mib=8,
)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
  """Things of this machine that the programs go after."""
  folder = tmp_path_factory.mktemp("host")
  folder.chmod(0o777)
  canary = folder / "canary"
  canary.write_text("untouched")
  canary.chmod(0o666)
  called = []
  listener = socket.create_server(("127.0.0.1", 0))
  abstract = f"trd-{secrets.token_hex(8)}"
  local = socket.socket(socket.AF_UNIX)
  local.bind(f"\0{abstract}")
  local.listen()

  def answer(server):
    try:
      while True:
        connection, _ = server.accept()
        called.append(server)
        connection.close()
    except OSError:
      pass

  for server in (listener, local):
    threading.Thread(target=answer, args=(server,), daemon=True).start()
  names = {
    "canary": canary,
    "folder": folder,
    "marker": f"hostile-{secrets.token_hex(8)}",
    "port": listener.getsockname()[1],
    "abstract": abstract,
    "called": called,
  }
  yield names
  for server in (listener, local):
    server.shutdown(socket.SHUT_RDWR)
    server.close()


@pytest.fixture(scope="module")
def capped():
  """The cap on processes, shown with a program that stops by itself."""
  program = (
    "import os, time\n"
    "forked = 0\n"
    "for _ in range(300):\n"
    "  try:\n"
    "    if os.fork() == 0:\n"
    "      time.sleep(2)\n"
    "      os._exit(0)\n"
    "    forked += 1\n"
    "  except OSError:\n"
    "    pass\n"
    "print(forked)\n"
  )
  box = sandbox.open()
  result = box.run(
    [box.python, "-c", program], limits=sandbox.Limits(processes=16)
  )
  assert 0 < int(result.stdout) < 16, result
  return True


@pytest.fixture(scope="module")
def verdicts(host, capped, tmp_path_factory):
  """The verdict of each program, all graded, some at a time."""
  secret = f"SECRET-{secrets.token_hex(16)}"
  os.environ["TRD_TEST_SECRET"] = secret
  found = {}
  program_tests = {"inputs": ["1\n", "2\n"], "outputs": [secret, secret]}
  function_tests = {
    "inputs": [[1], [2]],
    "outputs": [[secret], [secret]],
    "fn_name": "f",
  }
  try:
    with programs.Grader(LIMITS) as grader:
      threads = grader._pool
      jobs = {
        name: threads.submit(
          grader.grade_program,
          one.source,
          function_tests if one.function else program_tests,
        )
        for name, one in hostile.programs(**host).items()
      }
      found = {name: job.result() for name, job in jobs.items()}
  finally:
    del os.environ["TRD_TEST_SECRET"]
  return found


def test_the_cap_on_processes_binds(capped):
  assert capped


def test_there_are_many():
  assert len(hostile.ALL) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("name", hostile.ALL)
def test_it_fails_and_says_why(name, verdicts, host):
  verdict = verdicts[name]
  wanted = hostile.programs(**host)[name].reasons
  assert verdict.correct is False
  assert verdict.reason in wanted, verdict
  assert json.loads(verdict.detail)["failed"] == 0


def test_the_machine_is_untouched(verdicts, host):
  assert host["canary"].read_text() == "untouched"
  assert [path.name for path in host["folder"].iterdir()] == ["canary"]
  assert host["called"] == []
  places = ["/", "/tmp", "/dev/shm", "/usr", "/dev", os.getcwd(), Path.home()]
  left = [
    path
    for place in places
    for path in Path(place).iterdir()
    if host["marker"] in path.name
  ]
  assert left == []


def test_no_process_is_left(verdicts):
  assert sandboxes.processes() == []


def test_the_right_answer_passes_under_the_same_limits(capped):
  """Else all of the above could fail for another reason."""
  tests = {"inputs": ["1\n", "2\n"], "outputs": ["1", "2"]}
  with programs.Grader(LIMITS) as grader:
    assert grader.grade_program("print(input())", tests).correct is True


def test_the_listeners_would_have_heard(host):
  """Else a closed port would pass for a closed sandbox."""
  with socket.create_connection(("127.0.0.1", host["port"])) as connection:
    assert connection.recv(1) == b""
  assert len(host["called"]) == 1
  host["called"].clear()


def test_the_disk_is_as_full_as_before(capped, tmp_path):
  """A gigabyte that a program writes is not on any disk of ours."""
  free = shutil.disk_usage(tmp_path).free
  box = sandbox.open()
  source = (
    "import os\n"
    "for i in range(1024):\n"
    "  try:\n"
    "    open(f'/tmp/{i}', 'wb').write(bytes(2**20))\n"
    "  except OSError:\n"
    "    print(i)\n"
    "    break\n"
  )
  limits = sandbox.Limits(file_bytes=32 << 20)
  result = box.run([box.python, "-c", source], limits=limits)
  assert 16 < int(result.stdout) <= 32, result
  assert free - shutil.disk_usage(tmp_path).free < 512 << 20
