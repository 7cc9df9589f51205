"""Runs inside EvalPlus's environment; see `grading.evalplus`.

Programs are checked one after another, each in a process of its own, and all
that it has started or written is gone before the next. The kernel refuses this
process's memory and descriptors to them, and what they inherit leads to their
own answer alone.

Frames go out on descriptor 1, a length of four bytes and JSON. For each program
there are two: `"ready"` before it starts, and `[base, plus]`, what the base and
the plus tests said, or whatever the program made of that; nothing where it
ended its check. This ends early where it can't get rid of what a program left.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import struct
import sys
from pathlib import Path

_SET_DUMPABLE = 4  # of prctl
_FOLDERS = ("/tmp", "/dev/shm")  # that a program may write to


def _send(fd: int, data: bytes) -> None:
  view = memoryview(struct.pack(">I", len(data)) + data)
  while view:
    view = view[os.write(fd, view) :]


def _answer(check, report: int, alone: bool) -> bytes:
  """Runs a check in a process of its own: what it gives, a few bytes."""
  answer, write = os.pipe()
  pid = os.fork()
  if pid == 0:
    with contextlib.suppress(BaseException):
      # A program that wrote to it could speak for all others.
      os.close(report)
      result = check()
      statuses = [result["base"][0], result["plus"][0]]
      os.write(write, json.dumps(statuses).encode())
    os._exit(0)
  os.close(write)
  os.waitpid(pid, 0)
  if alone:
    with contextlib.suppress(OSError):  # nothing is running
      os.kill(-1, signal.SIGKILL)
  os.set_blocking(answer, False)  # what is left, without a sandbox, has it too
  try:
    return os.read(answer, 1 << 10)
  except BlockingIOError:
    return b""
  finally:
    os.close(answer)


def _cleared() -> bool:
  """Clears the folders a program may write to: whether nothing is left."""
  left = [Path(top, name) for top in _FOLDERS for name in os.listdir(top)]
  for path in left:
    with contextlib.suppress(OSError, RecursionError):
      if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
      else:
        path.unlink()
  return not any(map(os.listdir, _FOLDERS))


def main() -> None:
  """Checks programs; arguments: DATASET SAMPLES SECONDS ALONE.

  ALONE is 1 where all other processes that there are were started here.
  """
  dataset, samples, seconds, alone = sys.argv[1:]
  report = os.dup(1)
  os.dup2(2, 1)  # what EvalPlus prints is not an answer
  # Not dumpable: the kernel then refuses /proc/PID/mem and /proc/PID/fd to
  # programs of the same user.
  if ctypes.CDLL(None, use_errno=True).prctl(_SET_DUMPABLE, 0):
    raise OSError(ctypes.get_errno(), "prctl")
  multiprocessing.set_start_method("fork")  # another one starts Python anew
  from evalplus import data, evaluate  # type: ignore[import-not-found]

  if dataset == "humaneval":
    problems, digest = data.get_human_eval_plus(), data.get_human_eval_plus_hash
    not_none = []
  else:
    problems, digest = data.get_mbpp_plus(), data.get_mbpp_plus_hash
    not_none = evaluate.MBPP_OUTPUT_NOT_NONE_TASKS
  expected = evaluate.get_groundtruth(problems, digest(), not_none)
  for line in Path(samples).read_text().splitlines():
    sample = json.loads(line)
    task = sample["task_id"]

    def check(task=task, solution=sample["solution"]):
      return evaluate.check_correctness(
        dataset,
        0,
        problems[task],
        solution,
        expected[task],
        fast_check=True,
        min_time_limit=float(seconds),
      )

    if alone == "1" and not _cleared():
      break
    _send(report, b'"ready"')
    _send(report, _answer(check, report, alone == "1"))


if __name__ == "__main__":
  main()
