"""HumanEval+ and MBPP+, judged by EvalPlus itself, run whole in the sandbox.

EvalPlus has an environment of its own (`third_party/evalplus/install.sh`) and
is given a file with the tasks that are asked, so that it downloads nothing. A
program passes where it passes EvalPlus's base and plus tests.

EvalPlus compares in the candidate's own process, so that a program which sets
out to be taken for right can be. That is all that it can do: each is checked in
a process of its own that others can't reach, and what it has started is ended
before the next (`evalplus_driver`); several sandboxes work side by side.

With `evaluate.code_prompt=official` the questions are EvalPlus's own, too, and
so is what counts as the program of a response: its stop strings and its
`sanitize`. Both come out of EvalPlus's own code as it is installed, run around
a model that isn't one.
"""

import concurrent.futures
import gzip
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

from trd_jax.experiment.errors import UserError, last_words
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.records import Problem, Verdict
from trd_jax.grading import grader_protocol
from trd_jax.grading.code import extract_code
from trd_jax.grading.sandbox import frames, sandbox
from trd_jax.grading.sandbox.boxed_process import BoxedProcess

VERSION = "evalplus-0.3.1"
PYTHON = ".venv-evalplus/bin/python"
DATASETS = {"humanevalplus": "humaneval", "mbppplus": "mbpp"}
DEFECTS = {
  "HumanEval/32": "fails whatever is right: no test of it is ever counted",
  "Mbpp/255": "takes more memory than EvalPlus allows its own solution",
}
"""Tasks that EvalPlus 0.3.1 can't judge, and why; they count as not judged."""

_DRIVER = Path(__file__).with_name("evalplus_driver.py")
_ENV = {
  "HUMANEVAL_OVERRIDE_PATH": "tasks.jsonl",
  "MBPP_OVERRIDE_PATH": "tasks.jsonl",
  "HF_HUB_OFFLINE": "1",
  "PYTHONDONTWRITEBYTECODE": "1",
}
_PROGRAMS = 64  # of one sandbox, but for those of one task
_SECONDS = 240.0  # twice EvalPlus's most for a program's base and plus tests
_START_SECONDS = 900.0
_SANITIZE_SECONDS = 90.0  # three times the driver's limit of processor time
_STATUSES = ("pass", "fail", "timeout")
_GIB = 1 << 30

# What one run is given: task id and program, or a whole response to EvalPlus's
# own prompt, in this order.
_Programs = Sequence[tuple[str, str]]


class _Judged(NamedTuple):
  """What a run says of one of its programs.

  Attributes:
    program: the program; None where none could be taken out of a response.
    statuses: what the base and the plus tests said; None where nothing did.
  """

  program: str | None
  statuses: tuple[str, str] | None


_Found = dict[tuple[str, str], _Judged]


_ENVIRONMENT = grader_protocol.Environment(
  title="EvalPlus",
  field="evalplus",
  python=PYTHON,
  package="evalplus",
  without="no .venv-evalplus here, and no HumanEval+ or MBPP+ to judge",
)


def check(python: str | None, unsafe: bool = False) -> None:
  """Checks that EvalPlus and a sandbox for it are there.

  Raises:
    UserError: they are not; it says how to get them.
  """
  path = _python(python)
  box = sandbox.open(unsafe, path)
  probe = "import importlib.metadata as m; print(m.version('evalplus'))"
  result = box.run([path, "-c", probe])
  _check_version(path, result.stdout.decode().strip())


def _check_version(path: str, version: str) -> None:
  """Raises a UserError where an environment has another EvalPlus, or none."""
  if f"evalplus-{version}" != VERSION:
    raise UserError(
      f"{path} has no {VERSION.replace('-', ' ')}; make the environment again:"
      " third_party/evalplus/install.sh"
    )


def _python(python: str | None) -> str:
  path = _ENVIRONMENT.path(python)
  if not os.access(path, os.X_OK):
    raise UserError(
      f"HumanEval+ and MBPP+ are graded by EvalPlus, and {path} is not there:"
      " run third_party/evalplus/install.sh, or name its interpreter with"
      " --config.python.evalplus"
    )
  return path


class Grader(grader_protocol.Grader):
  """Judges responses with EvalPlus, all together once it is waited for.

  Verdicts: `match`, `mismatch`, `timeout` (it did not end in time and isn't
  right), `no_code` (no program in the response), `ungradable` (see `DEFECTS`,
  or it ended EvalPlus itself).

  Args:
    tasks: EvalPlus's file of a benchmark (JSON lines, perhaps gzipped), a key
      of `DATASETS`, which the problems have as their source.
    python: EvalPlus's interpreter; None: `PYTHON`.
    unsafe: see `sandbox.open`.
    workers: programs that are tested at once; None: half of the cores.
    least_seconds: EvalPlus's time limit for an input whose reference solution
      is quick; published results have its default.
    official: whether the responses are to EvalPlus's own prompts, so that it
      says what of them is the program.
  """

  version = VERSION
  runs_programs = True
  environment = _ENVIRONMENT
  begins_answers = True

  def __init__(
    self,
    tasks: Path,
    *,
    python: str | None = None,
    unsafe: bool = False,
    workers: int | None = None,
    least_seconds: float = 1.0,
    official: bool = False,
  ):
    self._tasks, self._lines = tasks, _task_lines(tasks)
    self._interpreter, self._unsafe = python, unsafe
    self.workers = workers or max(1, (os.cpu_count() or 2) // 2)
    self._least_seconds, self._official = least_seconds, official
    self._ready: list[tuple[Any, Verdict]] = []
    # By task, then by program: the keys of the answers that are this program,
    # as samples that hold the same one are judged once.
    self._waiting: dict[str, dict[str, list[Any]]] = {}
    self._dataset = ""

  @classmethod
  def open(cls, experiment: Experiment, files: Sequence[Path] = ()) -> Self:
    """Opens `grader.Grader`; a benchmark of EvalPlus is one file."""
    if len(files) != 1:
      raise UserError(f"{len(files)} files of a benchmark; EvalPlus takes one")
    return cls(
      files[0],
      python=experiment.python.evalplus,
      unsafe=experiment.sandbox.unsafe,
      workers=experiment.sandbox.workers,
      least_seconds=experiment.evaluate.evalplus_seconds,
      official=experiment.evaluate.code_prompt == "official",
    )

  @classmethod
  def check(cls, experiment: Experiment) -> None:
    """Checks that EvalPlus and a sandbox for it are there."""
    check(experiment.python.evalplus, experiment.sandbox.unsafe)

  @classmethod
  def official(
    cls,
    experiment: Experiment,
    problems: Sequence[Problem],
    files: Sequence[Path],
  ) -> grader_protocol.Official:
    """Returns EvalPlus's own prompts, as `grader.Grader`.

    Raises:
      UserError: EvalPlus isn't there, or is another version.
    """
    path = _python(experiment.python.evalplus)
    box = sandbox.open(experiment.sandbox.unsafe, path)
    lines = _task_lines(files[0])
    tasks = "".join(f"{lines[one.problem_id]}\n" for one in problems)
    result = box.run(
      [path, "driver.py", "prompts", DATASETS[problems[0].source]],
      files={"driver.py": _DRIVER.read_bytes(), "tasks.jsonl": tasks.encode()},
      env=_ENV,
      limits=sandbox.Limits(
        wall_seconds=_START_SECONDS,
        cpu_seconds=600,
        memory_bytes=4 * _GIB,
        file_bytes=_GIB,
        output_bytes=64 << 20,
      ),
    )
    if result.exit_code != 0:
      raise UserError(
        f"{path} gives no prompt of EvalPlus ({last_words(result.stderr)});"
        " make the environment again: third_party/evalplus/install.sh, or set"
        " --config.evaluate.code_prompt=ours"
      )
    answer = json.loads(result.stdout[4:])  # behind the frame's length
    _check_version(path, answer["version"])
    asked = [answer["asked"][one.problem_id] for one in problems]
    (begun,) = {one["begun"] for one in asked}
    messages = [one["user"] for one in asked]
    return grader_protocol.Official(VERSION, messages, begun=begun)

  def submit(self, key: Any, text: str, problem: Problem) -> None:
    """Takes a response, as `grader.Grader`.

    Raises:
      UserError: the file has no such task.
    """
    task = problem.problem_id
    if task not in self._lines:
      raise UserError(f"{self._tasks} has no task {task}")
    self._dataset = DATASETS[problem.source]
    program = text if self._official else extract_code.last_program(text)
    if program is None:
      self._ready.append((key, Verdict(False, "no_code", None)))
    elif task in DEFECTS:
      shown = None if self._official else program
      verdict = Verdict(None, "ungradable", shown, DEFECTS[task])
      self._ready.append((key, verdict))
    else:
      programs = self._waiting.setdefault(task, {})
      programs.setdefault(program, []).append(key)

  def finished(self, wait: bool = False) -> Iterator[tuple[Any, Verdict]]:
    """Yields verdicts, as `grader.Grader`; judges where it is waited for.

    Raises:
      UserError: EvalPlus isn't there or doesn't run.
    """
    ready, self._ready = self._ready, []
    yield from ready
    if not wait or not self._waiting:
      return
    waiting, self._waiting = self._waiting, {}
    by_task = [[(task, one) for one in waiting[task]] for task in waiting]
    path = _python(self._interpreter)
    box = sandbox.open(self._unsafe, path)
    judge = _Judge(
      box,
      path,
      self._dataset,
      self._lines,
      self._least_seconds,
      self._official,
    )
    # Small enough that every worker has some, large enough to pay for a start
    # of EvalPlus.
    size = min(_PROGRAMS, math.ceil(sum(map(len, by_task)) / self.workers))
    with concurrent.futures.ThreadPoolExecutor(
      self.workers, "evalplus"
    ) as pool:
      jobs = [
        pool.submit(judge.judge, some) for some in _batches(by_task, size)
      ]
      try:
        for job in concurrent.futures.as_completed(jobs):
          for (task, program), judged in job.result().items():
            for key in waiting[task][program]:
              yield key, _verdict(*judged)
      finally:
        # Also where the caller leaves off: what is running is ended.
        judge.close()
        pool.shutdown(cancel_futures=True)

  def close(self) -> None:
    """Forgets the responses that have no verdict yet."""
    self._ready.clear()
    self._waiting.clear()


def _verdict(program: str | None, statuses: tuple[str, str] | None) -> Verdict:
  """Returns right where both pass, else the first one's reason that doesn't.

  The arguments are those of `_Judged`.
  """
  if program is None:
    why = "EvalPlus took too long to find the program in it, or broke down"
    return Verdict(None, "ungradable", None, why)
  if not program.strip():
    return Verdict(False, "no_code", None)
  if statuses is None:
    return Verdict(None, "ungradable", program, "it ended EvalPlus itself")
  base, plus = statuses
  worst = base if base != "pass" else plus
  detail = json.dumps({"base": base, "plus": plus})
  if worst == "pass":
    return Verdict(True, "match", program, detail)
  reason = "timeout" if worst == "timeout" else "mismatch"
  return Verdict(False, reason, program, detail)


def _task_lines(tasks: Path) -> dict[str, str]:
  """Reads each task's own line.

  It stays unchanged: what is in it is EvalPlus's affair.
  """
  data = tasks.read_bytes()
  if tasks.name.endswith(".gz"):
    data = gzip.decompress(data)
  lines = [line for line in data.decode().split("\n") if line.strip()]
  return {json.loads(line)["task_id"]: line for line in lines}


def _batches(tasks: Sequence[_Programs], size: int) -> list[_Programs]:
  """Groups programs by whole tasks, at most `size` in a batch.

  The expected outputs of a task are then computed once. A task with more
  programs is a batch of its own.
  """
  batches: list[list[tuple[str, str]]] = []
  for programs in tasks:
    if not batches or len(batches[-1]) + len(programs) > size:
      batches.append([])
    batches[-1] += programs
  return list(batches)


def _statuses(answer: bytes) -> tuple[str, str] | None:
  """Reads what the base and the plus tests said.

  None where that is no status of theirs: a program can put anything there.
  """
  try:
    base, plus = json.loads(answer)
  except (ValueError, TypeError, RecursionError):
    return None
  return (base, plus) if base in _STATUSES and plus in _STATUSES else None


def _text(answer: bytes) -> str | None:
  """Reads a program that EvalPlus took out of a response; None without."""
  found = json.loads(answer)
  return found if isinstance(found, str) else None


class _Judge:
  """EvalPlus, started as often as it takes; from any number of threads."""

  def __init__(
    self,
    box: sandbox.Box,
    python: str,
    dataset: str,
    lines: Mapping[str, str],
    least_seconds: float,
    official: bool,
  ):
    self._official = official
    self._box, self._python, self._dataset = box, python, dataset
    self._lines, self._least_seconds = lines, least_seconds
    self._running: set[BoxedProcess] = set()
    self._closed = False

  def close(self) -> None:
    """Ends what is running."""
    self._closed = True
    for process in list(self._running):
      process.cancel()

  def judge(self, programs: _Programs) -> _Found:
    """Judges programs; the status of one that ended EvalPlus itself is None.

    Raises:
      UserError: EvalPlus does not run.
    """
    found: _Found = {}
    while len(found) < len(programs) and not self._closed:
      # The program at which a run ended has its None; the next run begins with
      # the one after it.
      left = programs[len(found) :]
      found |= dict(zip(left, self._once(left), strict=False))
    return found

  def _once(self, programs: _Programs) -> list[_Judged]:
    """Returns what one run says, as far as it got: one or more.

    Raises:
      UserError: it did not get to the first.
    """
    samples = "".join(
      json.dumps({"task_id": task, "solution": program}) + "\n"
      for task, program in programs
    )
    asked = dict.fromkeys(task for task, _ in programs)
    tasks = "".join(self._lines[task] + "\n" for task in asked)
    argv = [self._python, "driver.py", "check", self._dataset, "samples.jsonl"]
    argv += [str(self._least_seconds), str(int(not self._box.unsafe))]
    argv.append(str(int(self._official)))
    answers: list[_Judged] = []
    with self._box.start(
      argv,
      files={
        "driver.py": _DRIVER.read_bytes(),
        "tasks.jsonl": tasks.encode(),
        "samples.jsonl": samples.encode(),
      },
      env=_ENV,
      limits=sandbox.Limits(
        cpu_seconds=3600,
        memory_bytes=8 * _GIB,  # EvalPlus allows a program four
        file_bytes=_GIB,
        output_bytes=64 << 20,
        processes=72,
      ),
    ) as process:
      self._running.add(process)
      # close() may have ended all of the set just before this was added.
      if self._closed:
        process.cancel()
      try:
        process.end_input()
        deadline = time.monotonic() + _START_SECONDS
        while len(answers) < len(programs):
          program: str | None = programs[len(answers)][1]
          if self._official:
            deadline += _SANITIZE_SECONDS
            found = frames.receive(process, deadline)
            program = None if found is None else _text(found)
            if found is not None and not program:
              answers.append(_Judged(program, None))
              deadline = time.monotonic() + _SECONDS
              continue
          if frames.receive(process, deadline) is None:  # it isn't ready
            if not answers and not self._closed:
              self._did_not_start(process)
            break
          # A program's own time begins when EvalPlus has taken it up.
          deadline = time.monotonic() + _SECONDS
          answer = frames.receive(process, deadline)
          statuses = None if answer is None else _statuses(answer)
          answers.append(_Judged(program, statuses))
      finally:
        self._running.discard(process)
    return answers

  def _did_not_start(self, process: BoxedProcess) -> NoReturn:
    """Says why, before any program has run, nothing has come.

    Raises:
      UserError: always.
    """
    result = process.close()
    self._box.check(process, result)
    said = f"{result.reason}, {last_words(result.stderr)}"
    raise UserError(f"EvalPlus does not run in the sandbox: {said}")
