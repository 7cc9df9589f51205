"""LiveCodeBench, judged by its own runner, run whole in the sandbox.

lcb_runner is on no registry and asks for far more than its evaluation needs;
`third_party/lcb_runner/install.sh` puts it into an environment of its own.
Where there is none, `grading.code` runs the same tests.

The comparison is in the candidate's own process, and lcb_runner hands all
programs of a run to one pool of processes: a program that sets out to can be
taken for right and change what is said of the others of its run. Each in a
sandbox of its own would cost lcb_runner's start, seconds, for every sample.

With `evaluate.code_prompt=official` the questions are lcb_runner's own, too,
and so is what counts as the program of a response. Both go by the style of a
model in its list, which `evaluate.lcb_model` names.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from trd_jax.experiment.errors import UserError, last_words
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.files import json_files
from trd_jax.experiment.records import Problem, Verdict
from trd_jax.grading import grader_protocol
from trd_jax.grading.code import code_tests, extract_code
from trd_jax.grading.sandbox import sandbox

VERSION = "lcb_runner-1"
PYTHON = ".venv-lcb/bin/python"
_MODULE = "lcb_runner.evaluation.compute_code_generation_metrics"
_DRIVER = Path(__file__).with_name("lcb_driver.py")
_PROGRAMS = 256  # of one run
_TEST_SECONDS = 6  # lcb_runner's own limit
_START_SECONDS = 300
_GIB = 1 << 30
_ENV = {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
_ROLES = {"system", "user"}
# The runner's codes for the test at which it stopped.
_REASONS = {-3: "timeout", -1: "timeout", -4: "error", -5: "error"}


_ENVIRONMENT = grader_protocol.Environment(
  title="lcb_runner",
  field="lcb_runner",
  python=PYTHON,
  package="lcb_runner",
  without="no .venv-lcb here: our own executor judges LiveCodeBench",
)


def _python(python: str | None, official: bool = False) -> str:
  path = _ENVIRONMENT.path(python)
  if not os.access(path, os.X_OK):
    without = "leave the key out to grade LiveCodeBench with our own executor"
    if official:
      without = (
        "set --config.evaluate.code_prompt=ours to ask LiveCodeBench in our own"
        " words"
      )
    raise UserError(
      f"python.lcb_runner={path} is not there: run"
      f" third_party/lcb_runner/install.sh, or {without}"
    )
  return path


def check(
  python: str | None, unsafe: bool = False, official: bool = False
) -> None:
  """Checks that lcb_runner and a sandbox for it are there.

  Args:
    python: its interpreter; None: `PYTHON`.
    unsafe: see `sandbox.open`.
    official: whether it asks, too, which our own executor can't do for it.

  Raises:
    UserError: they are not; it says how to get them.
  """
  path = _python(python, official)
  result = sandbox.open(unsafe, path).run(
    [path, "-c", f"import {_MODULE}"],
    limits=sandbox.Limits(wall_seconds=120, cpu_seconds=60),
  )
  if result.exit_code != 0:
    raise UserError(
      f"{path} can't import lcb_runner ({last_words(result.stderr)}); make the"
      " environment again: third_party/lcb_runner/install.sh"
    )


class Grader(grader_protocol.Grader):
  """Judges responses with lcb_runner's `codegen_metrics`.

  It does so once it is waited for, in runs of many programs, as its start is
  dear. Verdicts have the reasons of `grading.code`.

  Args:
    python: lcb_runner's interpreter; None: `PYTHON`.
    unsafe: see `sandbox.open`.
    workers: programs that are tested at once; None: half of the cores.
    model: of lcb_runner's list; responses are to the prompts of its style.
      None: they are to ours.
  """

  version = VERSION
  runs_programs = True
  environment = _ENVIRONMENT

  def __init__(
    self,
    python: str | None = None,
    unsafe: bool = False,
    workers: int | None = None,
    model: str | None = None,
  ):
    self._model = model
    self._path = _python(python)
    self._box = sandbox.open(unsafe, self._path)
    self.workers = workers or max(1, (os.cpu_count() or 2) // 2)
    self._ready: list[tuple[Any, Verdict]] = []
    self._waiting: list[tuple[Any, str, Problem]] = []

  @classmethod
  def open(cls, experiment: Experiment, files: Sequence[Path] = ()) -> Self:
    """Opens `grader.Grader`, which reads no files."""
    del files
    section = experiment.sandbox
    return cls(
      experiment.python.lcb_runner,
      section.unsafe,
      section.workers,
      experiment.evaluate.lcb_model if _is_official(experiment) else None,
    )

  @classmethod
  def stand_in(
    cls, experiment: Experiment, problem: Problem | None
  ) -> str | None:
    """Names our own executor, for the same tests, without lcb_runner.

    It judges no answers to lcb_runner's own prompts.
    """
    del problem
    wanted = _is_official(experiment) or _ENVIRONMENT.wanted(experiment)
    return None if wanted else "code"

  @classmethod
  def check(cls, experiment: Experiment) -> None:
    """Checks that lcb_runner and a sandbox for it are there."""
    check(
      experiment.python.lcb_runner,
      experiment.sandbox.unsafe,
      _is_official(experiment),
    )

  @classmethod
  def official(
    cls,
    experiment: Experiment,
    problems: Sequence[Problem],
    files: Sequence[Path],
  ) -> grader_protocol.Official:
    """Returns lcb_runner's own prompts, as `grader.Grader`.

    Raises:
      UserError: lcb_runner isn't there, or lists no such model.
    """
    del files
    path = _python(experiment.python.lcb_runner, official=True)
    box = sandbox.open(experiment.sandbox.unsafe, path)
    rows = [json.loads(one.meta)["published"] for one in problems]
    model = experiment.evaluate.lcb_model
    with tempfile.TemporaryDirectory(prefix="trd-jax-lcb-") as name:
      folder = Path(name)
      (folder / "asked.json").write_text(json.dumps({"rows": rows}))
      result = box.run(
        [path, "driver.py", "prompts", str(folder), model],
        files={"driver.py": _DRIVER.read_bytes()},
        writable=folder,
        env=_ENV,
        limits=sandbox.Limits(
          wall_seconds=_START_SECONDS,
          cpu_seconds=_START_SECONDS,
          memory_bytes=4 * _GIB,
          file_bytes=_GIB,
        ),
      )
      if result.exit_code != 0:
        raise UserError(
          f"{path} gives no prompt of lcb_runner:"
          f" {last_words(result.stderr, 400)}; or set"
          " --config.evaluate.code_prompt=ours"
        )
      answer = json_files.loads((folder / "answered.json").read_bytes())
    commit = Path(path).parents[1] / "lcb_runner.txt"
    which = commit.read_text().strip()[:12] if commit.is_file() else "unknown"
    said = [_said(turns, path) for turns in answer["messages"]]
    (system,) = {turns.get("system") for turns in said}
    return grader_protocol.Official(
      f"lcb_runner-{which} {answer['style']}",
      [turns["user"] for turns in said],
      system,
    )

  def submit(self, key: Any, text: str, problem: Problem) -> None:
    """Takes a response, as `grader.Grader`."""
    program = text if self._model else extract_code.last_program(text)
    if program is None:
      self._ready.append((key, Verdict(False, "no_code", None)))
    else:
      self._waiting.append((key, program, problem))

  def finished(self, wait: bool = False) -> Iterator[tuple[Any, Verdict]]:
    """Yields verdicts, as `grader.Grader`; runs where it is waited for.

    Raises:
      UserError: lcb_runner doesn't run.
    """
    ready, self._ready = self._ready, []
    yield from ready
    while wait and self._waiting:
      # Tests are unpacked for one run at a time: all of them fill a memory.
      queue: list[tuple[int, str, str]] = []
      taken = 0
      for index, (key, program, problem) in enumerate(self._waiting):
        taken += 1
        try:
          queue.append((index, program, input_output(problem)))
        except code_tests.BadTests as error:
          yield key, Verdict(None, "ungradable", program, str(error))
        if len(queue) == _PROGRAMS:
          break
      keys = [key for key, *_ in self._waiting[:taken]]
      del self._waiting[:taken]
      for index, verdict in _run(
        self._box, self._path, queue, self.workers, self._model
      ).items():
        yield keys[index], verdict

  def close(self) -> None:
    """Forgets the responses that have no verdict yet."""
    self._ready.clear()
    self._waiting.clear()


def _is_official(experiment: Experiment) -> bool:
  return experiment.evaluate.code_prompt == "official"


def _said(turns: Sequence[Any], path: str) -> dict[str, str]:
  """Returns what is said in a conversation of lcb_runner's, by role.

  Raises:
    UserError: it is more than a user's turn, perhaps after a system's.
  """
  said = {turn["role"]: turn["content"] for turn in turns}
  if len(said) != len(turns) or "user" not in said or said.keys() - _ROLES:
    raise UserError(
      f"{path}: lcb_runner's prompt has the turns"
      f" {', '.join(turn['role'] for turn in turns)}, and here it can have one"
      " of the system and one of the user; name another model in"
      " evaluate.lcb_model, or set --config.evaluate.code_prompt=ours"
    )
  return said


def input_output(problem: Problem) -> str:
  """Writes a problem's tests as lcb_runner takes them.

  Raises:
    code_tests.BadTests: they can't be read.
  """
  tests = code_tests.parse(problem.tests, json.loads(problem.meta))
  inputs, outputs = [], []
  for case in tests.cases:
    if isinstance(case.expected, str):
      inputs.append(case.given)
      outputs.append(case.expected)
    else:
      arguments = code_tests.loads(case.given)
      inputs.append("\n".join(map(code_tests.dumps, arguments)))
      outputs.append(code_tests.dumps(case.expected[0]))
  return json.dumps(
    {"inputs": inputs, "outputs": outputs, "fn_name": tests.function}
  )


def _run(
  box: sandbox.Box,
  python: str,
  queue: Sequence[tuple[int, str, str]],
  workers: int,
  model: str | None = None,
) -> dict[int, Verdict]:
  """Judges programs in one run of lcb_runner.

  Where one of them ends the runner itself, each half is run alone.

  Raises:
    UserError: lcb_runner does not run.
  """
  if not queue:
    return {}
  tests = sum(len(json.loads(each)["inputs"]) for _, _, each in queue)
  with tempfile.TemporaryDirectory(prefix="trd-jax-lcb-") as name:
    folder = Path(name)
    given = folder / "asked.json"
    rows = [{"program": p, "input_output": t} for _, p, t in queue]
    given.write_text(
      json.dumps({"rows": rows, "seconds": _TEST_SECONDS, "model": model})
    )
    # Programs can write to this folder, and are not to change the tests.
    given.chmod(0o444)
    result = box.run(
      [python, "driver.py", "judge", str(folder), str(workers)],
      files={"driver.py": _DRIVER.read_bytes()},
      writable=folder,
      env=_ENV,
      limits=sandbox.Limits(
        # Enough for every test to take its whole time: a run that is merely
        # slow must not be taken for one that a program has ended.
        wall_seconds=_START_SECONDS
        + math.ceil(tests / workers) * (_TEST_SECONDS + 1)
        + 10 * len(queue),
        cpu_seconds=7200,
        memory_bytes=(4 + 4 * workers) * _GIB,
        file_bytes=2 * _GIB,
        output_bytes=64 << 20,
        processes=64 + 16 * workers,
      ),
    )
    try:
      answered = json_files.loads((folder / "answered.json").read_bytes())
      programs = [str(program) for program in answered["programs"]]
      judged = zip(answered["codes"], programs, queue, strict=True)
      return {
        index: _verdict(codes, program)
        for codes, program, (index, *_) in judged
      }
    # No file, or one that a program wrote: the halves below find whose.
    except (OSError, ValueError, TypeError, KeyError):
      pass
  if len(queue) > 1:
    half = len(queue) // 2
    first = _run(box, python, queue[:half], workers, model)
    return first | _run(box, python, queue[half:], workers, model)
  detail = f"{result.reason}, {last_words(result.stderr)}"
  # A whole response isn't what was taken out of it.
  program = None if model else queue[0][1]
  return {queue[0][0]: Verdict(None, "ungradable", program, detail)}


def _verdict(codes: list, program: str) -> Verdict:
  """Reads a program's codes: True a test passed, a number where it stopped."""
  if not program.strip():
    return Verdict(False, "no_code", None)
  passed = sum(one is True for one in codes)
  detail = json.dumps({"passed": passed, "ran": len(codes)})
  if codes and passed == len(codes):
    return Verdict(True, "match", program, detail)
  # No code at all: the program did not even load, an error.
  last = codes[-1] if codes else -4
  reason = "mismatch" if last is False else _REASONS.get(last, "mismatch")
  return Verdict(False, reason, program, detail)  # type: ignore[arg-type]
