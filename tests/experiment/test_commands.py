"""Commands are given up on, with all that they have started."""

import subprocess
import sys
import time

import pytest

from tests.support import processes
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.processes import commands, interpreters, nvidia

# Its child holds the same output, which a reader of a pipe would wait for.
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(60)
"""


def test_what_a_command_says():
  code = "import sys; print(1); print(2, file=sys.stderr); sys.exit(3)"
  answer = commands.ask([sys.executable, "-c", code], 30)
  assert answer == (3, "1\n", "2\n")
  with pytest.raises(FileNotFoundError):
    commands.ask(["/nowhere/program"], 30)


def test_a_command_that_hangs_ends_with_what_it_started(tmp_path):
  noted = tmp_path / "child"
  began = time.monotonic()
  with pytest.raises(subprocess.TimeoutExpired):
    commands.ask([sys.executable, "-c", HANGS, str(noted)], 2)
  assert time.monotonic() - began < 30
  assert processes.still_there([int(noted.read_text())], 10) == []


def test_an_interpreter_and_a_driver_that_hang(tmp_path, monkeypatch):
  script = tmp_path / "nvidia-smi"
  script.write_text("#!/bin/sh\nsleep 60\n")
  script.chmod(0o755)
  monkeypatch.setattr(interpreters, "_SECONDS", 0.5)
  with pytest.raises(UserError, match="TimeoutExpired"):
    interpreters.check("python.train", str(script), {})
  monkeypatch.setattr(nvidia, "_SECONDS", 0.5)
  monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
  report = nvidia.ask()
  assert report.there
  assert report.failure == "no answer in 0.5 s"
