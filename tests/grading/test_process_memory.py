"""What counts as a program's memory, and what does not."""

import os
import subprocess

import pytest

from trd_jax.grading.sandbox import process_memory

LIMIT = 1 << 50


@pytest.fixture
def quiet():
  """A process that sees this machine's folders and holds no more with time."""
  pipe = subprocess.PIPE
  with subprocess.Popen(["cat"], stdin=pipe, stdout=pipe) as process:
    assert process.stdin
    assert process.stdout
    process.stdin.write(b"started\n")
    process.stdin.flush()
    process.stdout.readline()
    yield process.pid
    process.kill()


def test_this_machine_s_files_are_not_a_program_s(quiet, tmp_path):
  about = os.statvfs("/tmp")
  if about.f_files == about.f_ffree:
    pytest.skip("/tmp is on a file system that does not count its files")
  # As a sandbox does before its own folders are mounted: charged for them, an
  # innocent program would end for its memory on a machine with many files.
  (tmp_path / "file").touch()
  with_files = process_memory.held(quiet, LIMIT, [str(tmp_path), "/tmp"])
  assert with_files == process_memory.held(quiet, LIMIT)
