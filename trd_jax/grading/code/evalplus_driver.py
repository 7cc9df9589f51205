"""Runs inside EvalPlus's environment; see `grading.evalplus`.

    driver.py check DATASET SAMPLES SECONDS ALONE OFFICIAL
    driver.py prompts DATASET

`check`: Programs are checked one after another, each in a process of its own,
and all that it has started or written is gone before the next. The kernel
refuses this process's memory and descriptors to them, and what they inherit
leads to their own answer alone.

Frames go out on descriptor 1, a length of four bytes and JSON. For each program
there are two: `"ready"` before it starts, and `[base, plus]`, what the base and
the plus tests said, or whatever the program made of that; nothing where it
ended its check. Where OFFICIAL is 1 the samples are responses to EvalPlus's own
prompts, and a frame before these two has the program that EvalPlus takes out of
one: a text, or null where it didn't end; where that is null or empty no other
frame follows. This ends early where it can't get rid of what a program left.

`prompts` writes one frame: the version of EvalPlus, and for each task what its
prompt says and how it begins the answer.
"""

import contextlib
import ctypes
import importlib.metadata
import json
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import types
import typing
from pathlib import Path

_SET_DUMPABLE = 4  # of prctl
_FOLDERS = ("/tmp", "/dev/shm")  # that a program may write to
_SANITIZE_SECONDS = 30  # of processor time; it parses each range of lines


class _Tokenizer:
  """Stands in for the model's tokenizer: keeps EvalPlus's conversation."""

  chat_template = "there is one, so that EvalPlus makes a conversation"

  @classmethod
  def from_pretrained(cls, *_, **__):
    return cls

  @staticmethod
  def apply_chat_template(messages, **_):
    # EvalPlus cuts what this returns at a mark of its own, in its answer: what
    # the engine is given is then how the answer begins.
    _Engine.messages = messages
    return messages[-1]["content"]


class _Engine:
  """Stands in for the model: answers what it is told to."""

  messages: typing.ClassVar[list] = []
  asked: typing.ClassVar[list] = []
  response = ""

  def __init__(self, **_):
    pass

  @classmethod
  def generate(cls, prompts, sampling, **_):
    user = [each for each in cls.messages if each["role"] == "user"]
    cls.asked.append({"user": user[-1]["content"], "begun": prompts[0]})
    # A model ends where the first of EvalPlus's stop strings is complete.
    ends = []
    for stop in sampling.stop:
      at = cls.response.find(stop)
      if at >= 0:
        ends.append((at + len(stop), at))
    text = cls.response[: min(ends)[1]] if ends else cls.response
    return [types.SimpleNamespace(outputs=[types.SimpleNamespace(text=text)])]


def _codegen(dataset, number=None):
  """Runs EvalPlus's own generation around `_Engine`: what it keeps of it.

  Args:
    dataset: humaneval or mbpp.
    number: of the task; None: all of them.
  """
  from evalplus import codegen  # type: ignore[import-not-found]

  _stand_in()
  with tempfile.TemporaryDirectory() as root:
    # Sampling is not what is wanted: any temperature that EvalPlus takes.
    path = codegen.run_codegen(
      model="model",
      dataset=dataset,
      root=root,
      temperature=1.0,
      backend="vllm",
      resume=False,
      id_range=None if number is None else [number, number + 1],
    )
    lines = Path(path).read_text(encoding="utf-8").splitlines()
  return [json.loads(line)["solution"] for line in lines if line.strip()]


def _stand_in():
  """Puts stand-ins where EvalPlus imports a tokenizer and an engine from.

  In a process that runs no program: one that imports these gets its own.
  """
  modules = {
    "transformers": {"AutoTokenizer": _Tokenizer},
    "vllm": {"LLM": _Engine, "SamplingParams": types.SimpleNamespace},
  }
  for name, members in modules.items():
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(members)


def _taken_out(dataset, task, response, report):
  """Returns the program that EvalPlus takes out of a response; None: none.

  In a process of its own, as a parser may take forever, or crash, over what a
  model wrote.
  """
  answer, write = os.pipe()
  pid = os.fork()
  if pid == 0:
    with contextlib.suppress(BaseException):
      os.close(report)
      limit = (_SANITIZE_SECONDS, _SANITIZE_SECONDS)
      resource.setrlimit(resource.RLIMIT_CPU, limit)
      _Engine.response = response
      (program,) = _codegen(dataset, int(task.split("/")[1]))
      with os.fdopen(write, "wb") as file:
        file.write(json.dumps(program).encode())
    os._exit(0)
  os.close(write)
  with os.fdopen(answer, "rb") as file:
    data = file.read()
  os.waitpid(pid, 0)
  try:
    return json.loads(data)
  except ValueError:
    return None


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


def _prompts(report: int, dataset: str) -> None:
  """Sends what EvalPlus asks of each task in the file."""
  from evalplus import data  # type: ignore[import-not-found]

  read = {"humaneval": data.get_human_eval_plus, "mbpp": data.get_mbpp_plus}
  tasks = list(read[dataset]())
  _codegen(dataset)
  asked = dict(zip(tasks, _Engine.asked, strict=True))
  version = importlib.metadata.version("evalplus")
  answer = {"version": version, "asked": asked}
  _send(report, json.dumps(answer).encode())


def _check(
  report: int,
  dataset: str,
  samples: str,
  seconds: str,
  alone: str,
  official: str,
) -> None:
  """Checks programs.

  `alone` is 1 where all other processes that there are were started here.
  """
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
  for line in Path(samples).read_text(encoding="utf-8").splitlines():
    sample = json.loads(line)
    task, program = sample["task_id"], sample["solution"]
    if official == "1":
      program = _taken_out(dataset, task, program, report)
      _send(report, json.dumps(program).encode())
      if not program:
        continue

    def check(task=task, solution=program):
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


def main() -> None:
  """Does what the module's head says."""
  mode, *arguments = sys.argv[1:]
  report = os.dup(1)
  os.dup2(2, 1)  # what EvalPlus prints is not an answer
  {"check": _check, "prompts": _prompts}[mode](report, *arguments)


if __name__ == "__main__":
  main()
