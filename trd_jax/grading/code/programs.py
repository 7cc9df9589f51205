"""Grades programs: the completion's last code block against a problem's tests.

The program runs in the sandbox, once for each test, and is told the test's
input; what it gives comes back over a pipe, and is compared here, with the
expected output that never went in. So nothing that it does to its own process
can make it right.

One sandbox and one interpreter serve all tests of a solution, forked for each,
which shares what is dear (the namespaces, Python's start) and nothing else.
Tests end at the first one that fails.

Reasons of a verdict:
  match     every test passed.
  mismatch  a test was answered, wrongly.
  error     a test ended with an exception, an exit code or a signal.
  timeout   a test took too long, or all of them did; False, as judges have it.
  memory    it took too much memory.
  output    it wrote too much.
  no_code   there is no code block, or the last one never closes.
  unparsed  the judge itself failed at this program; `detail` says how.
  ungradable  correct is None: the problem has no tests that can be used, or a
            checker of its own.

    python -m trd_jax.grading.code FILE.jsonl

grades rows with `completion` (or `code`) and `tests` and prints a verdict each.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from trd_jax.experiment import declarations
from trd_jax.experiment.errors import ArgumentParser, UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.files import paths
from trd_jax.experiment.records import Problem, Reason, Verdict
from trd_jax.experiment.schema import Sandbox
from trd_jax.grading import grader_protocol
from trd_jax.grading.code import code_tests, compare, extract_code
from trd_jax.grading.sandbox import frames, sandbox
from trd_jax.grading.sandbox.boxed_process import BoxedProcess

VERSION = "code-4"
_EXCERPT = 200
_WALL = 5.0  # times the seconds of processor time: a busy machine
_GRACE = 5.0  # seconds that the runner has to say that a test took too long
_ENDINGS = ("exit", "signal", "timeout", "output")  # of a test, by the runner
_RUNNER = Path(__file__).with_name("runner.py")


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What the tests said of one program.

  Attributes:
    reason: see the module.
    passed: how many tests passed before the first that did not.
    tests: how many there are.
    failed: the first failing test's number, from 0; None: there is none.
    excerpt: the beginning of what that test expected and got.
  """

  reason: Reason
  passed: int
  tests: int
  failed: int | None = None
  excerpt: str = ""

  @property
  def detail(self) -> str:
    """Returns JSON of everything but the reason."""
    fields = dataclasses.asdict(self)
    del fields["reason"]
    return json.dumps(fields, ensure_ascii=False)


class _Failure(Exception):
  """A test that did not pass: its reason and an excerpt."""

  def __init__(self, reason: Reason, excerpt: str):
    super().__init__(reason)
    self.reason: Reason = reason
    self.excerpt = excerpt


@functools.cache
def _library(python: str) -> tuple[str, ...]:
  """Finds where an interpreter has the packages installed for it."""
  prefixes = [Path(folder) for folder in sandbox.interpreter(python)]
  found = [
    p for folder in prefixes for p in folder.glob("lib/python3*/site-packages")
  ]
  return tuple(str(path) for path in found)


def _ending(head: bytes) -> tuple[str, int]:
  """Reads how a test ended and its exit code from the runner's frame.

  Raises:
    _Failure: no runner of ours would say so.
  """
  try:
    answer = json.loads(head)
    how, status = answer["how"], answer["code"]
  except (ValueError, KeyError, TypeError, RecursionError):
    how, status = None, None
  # The frame comes out of the sandbox, where a program may have taken the
  # runner's place: only what ours can say is believed.
  if how not in _ENDINGS or type(status) is not int:
    raise _Failure("error", "what runs the tests was tampered with")
  return how, status


def _short(text: str | bytes, last: bool = False) -> str:
  if isinstance(text, bytes):
    text = text.decode("utf-8", "replace")
  text = text.strip()
  if len(text) <= _EXCERPT:
    return text
  return f"…{text[-_EXCERPT:]}" if last else f"{text[:_EXCERPT]}…"


class Grader(grader_protocol.Grader):
  """Runs programs against tests, several at a time.

  Args:
    section: limits, and how many at a time.

  Attributes:
    workers: how many at a time.

  Raises:
    UserError: there is no sandbox here and `unsafe` isn't set.
  """

  version = VERSION
  domains = frozenset({"code"})
  runs_programs = True

  def __init__(self, section: Sandbox):
    self._section = section
    self._box = sandbox.open(section.unsafe, section.python)
    self._runner = _RUNNER.read_bytes()
    self.workers = section.workers or os.cpu_count() or 1
    self._pool = concurrent.futures.ThreadPoolExecutor(self.workers, "sandbox")
    self._busy: dict[concurrent.futures.Future[Verdict], Any] = {}
    self._running: set[BoxedProcess] = set()
    self._closed = False

  @classmethod
  def open(cls, experiment: Experiment, files: Sequence[Path] = ()) -> Self:
    """Opens `grader.Grader`, which reads no files."""
    del files
    return cls(experiment.sandbox)

  @classmethod
  def check(cls, experiment: Experiment) -> None:
    """Checks, as `grader.Grader`, that there is a sandbox."""
    section = experiment.sandbox
    sandbox.open(section.unsafe, section.python)

  def close(self) -> None:
    """Forgets what has no verdict yet, and ends what is running."""
    self._closed = True
    for process in list(self._running):
      process.cancel()
    self._pool.shutdown(cancel_futures=True)
    self._busy.clear()

  def submit(self, key: Any, text: str, problem: Problem) -> None:
    """Takes a response, as `grader.Grader`, and starts to run its program."""
    self._busy[self._pool.submit(self.grade, text, problem)] = key

  def finished(self, wait: bool = False) -> Iterator[tuple[Any, Verdict]]:
    """Yields verdicts, as `grader.Grader`.

    Raises:
      UserError: the sandbox failed.
    """
    done = [future for future in self._busy if future.done()]
    pending = list(self._busy) if wait else done
    ready = concurrent.futures.as_completed(pending) if wait else iter(done)
    for future in ready:
      yield self._busy.pop(future), future.result()

  def grade(self, completion: str, problem: Problem) -> Verdict:
    """Grades a model's whole output, thoughts included.

    Raises:
      UserError: the sandbox failed.
      OSError: the machine did.
    """
    try:
      program = extract_code.last_program(completion)
      if program is None:
        return Verdict(False, "no_code", None)
      about = json.loads(problem.meta)
      return self.grade_program(program, problem.tests, about)
    # The machine failed, not the program: a verdict would count against it.
    except (UserError, OSError):
      raise
    except Exception as error:
      return Verdict.unparsed(error)

  def grade_program(
    self, program: str, tests: Any, about: Mapping[str, Any] | None = None
  ) -> Verdict:
    """Grades a program; for the tests see `code_tests.parse`."""
    try:
      parsed = code_tests.parse(tests, about)
    except code_tests.BadTests as error:
      return Verdict(None, "ungradable", program, str(error))
    if parsed.ungradable:
      return Verdict(None, "ungradable", program, parsed.ungradable)
    outcome = self.run(program, parsed)
    correct = outcome.reason == "match"
    return Verdict(correct, outcome.reason, program, outcome.detail)

  def run(self, program: str, tests: code_tests.Tests) -> Outcome:
    """Runs a program against tests, up to the first that fails.

    Raises:
      UserError: the sandbox itself did not start.
    """
    section = self._section
    most = section.output_mib << 20
    memory = int(section.memory_gib * 2**30)
    limits = sandbox.Limits(
      wall_seconds=section.total_seconds + _GRACE,
      # The runner itself and its children have this limit; each test's own, a
      # shorter one, is the runner's to set.
      cpu_seconds=section.total_seconds + section.test_seconds + 1,
      memory_bytes=memory,
      # Recursion through C, as of what is cached, goes as deep as on a judge.
      stack_bytes=memory,
      file_bytes=section.file_mib << 20,
      output_bytes=most + (1 << 20),
      processes=section.processes,
    )
    setup = {
      "source": program,
      "function": tests.function,
      "seconds": _WALL * section.test_seconds,
      "cpu_seconds": section.test_seconds,
      "output_bytes": most,
      "path": _library(self._box.python),
      "alone": not self._box.unsafe,
    }
    # Isolated and without site: packages come by `path`, so that no .pth file
    # or variable of this machine runs code in there.
    python = [self._box.python, "-I", "-S", "-B", "-X", "utf8"]
    files = {"runner.py": self._runner}
    passed, total = 0, len(tests.cases)
    argv = [*python, "runner.py"]
    with self._box.start(argv, files=files, limits=limits) as process:
      self._running.add(process)
      if self._closed:
        process.cancel()
      try:
        process.send(frames.frame(json.dumps(setup).encode()))
        # Of all tests together: hundreds of them, each just within its own
        # limit, would take an hour.
        until = time.monotonic() + section.total_seconds
        for case in tests.cases:
          self._test(process, case, tests, until)
          passed += 1
      except _Failure as failure:
        return Outcome(failure.reason, passed, total, passed, failure.excerpt)
      finally:
        self._running.discard(process)
    return Outcome("match", total, total)

  def _test(
    self,
    process: BoxedProcess,
    case: code_tests.Case,
    tests: code_tests.Tests,
    until: float,
  ) -> None:
    """Runs one test.

    Raises:
      _Failure: it does not pass.
    """
    wall = _WALL * self._section.test_seconds + _GRACE
    deadline = min(until, time.monotonic() + wall)
    process.send(frames.frame(case.given.encode("utf-8", "surrogatepass")))
    parts = [frames.receive(process, deadline) for _ in range(3)]
    if any(part is None for part in parts):
      self._lost(process)
    head, written, complaint = parts
    assert head is not None
    assert written is not None
    assert complaint is not None
    how, status = _ending(head)
    if how in ("timeout", "output"):
      raise _Failure(how, _short(complaint, last=True))  # type: ignore[arg-type]
    if how != "exit" or status != 0:
      last = _short(complaint, last=True) or f"{how} {status}"
      # Python's own word is all there is: address space, of which a limit ran
      # out, ends in an exception and not in a signal.
      memory = last.rpartition("\n")[2].startswith("MemoryError")
      raise _Failure("memory" if memory else "error", last)
    if isinstance(case.expected, str):
      right = compare.same_output(case.expected, written, tests.tolerant)
      shown = case.expected
    else:
      right = compare.same_value(case.expected, written, tests.tolerant)
      shown = code_tests.dumps(case.expected[-1])
    if not right:
      got = _short(written) or "nothing"
      raise _Failure("mismatch", f"expected {_short(shown)}; got {got}")

  def _lost(self, process: BoxedProcess) -> None:
    """Says why a process answers no more.

    Raises:
      _Failure: always.
    """
    result = process.close()
    self._box.check(process, result)
    if result.reason in ("timeout", "memory", "output"):
      raise _Failure(result.reason, "")
    said = _short(result.stderr, last=True)
    raise _Failure("error", said or "the program ended what runs the tests")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
  try:
    lines = path.read_text(encoding="utf-8").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f"{path}: can't be read ({error}); give a file of JSON lines"
    ) from None
  if not any(map(str.strip, lines)):
    raise UserError(f"{path}: no rows; give a file of JSON lines")
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = code_tests.loads(line)
    except ValueError as error:
      raise UserError(
        f"{path}, line {number}: not JSON ({error}); give an object a line,"
        " with completion or code, and tests"
      ) from None
    if not isinstance(row, dict) or "tests" not in row:
      raise UserError(
        f"{path}, line {number}: no JSON object with 'tests'; give the tests"
        " that the program is graded by, as inputs and outputs"
      )
    yield row


def _obeying(value: Any, name: str, flag: str) -> Any:
  """Checks a flag's value by the rule of the key that it stands for.

  Raises:
    UserError: it breaks that.
  """
  key = declarations.keys_of(Sandbox)[name]
  try:
    return dataclasses.replace(key, name=flag).check(value)
  except ValueError as error:
    raise UserError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
  """Grades the rows of a file; returns the exit code."""
  parser = ArgumentParser(
    "python -m trd_jax.grading.code",
    description="Grades programs against tests, in the sandbox.",
  )
  parser.add_argument(
    "file",
    type=paths.argument,
    help="JSON lines with completion (text with a code block) or code (a"
    " program), and tests",
  )
  parser.add_argument("--seconds", type=int, default=6, help="CPU, of a test")
  parser.add_argument("--workers", type=int, help="programs at a time")
  parser.add_argument(
    "--unsafe", action="store_true", help="run programs without a sandbox"
  )
  args = parser.parse_args(argv)
  try:
    section = Sandbox(
      unsafe=args.unsafe,
      workers=_obeying(args.workers, "workers", "--workers"),
      test_seconds=_obeying(args.seconds, "test_seconds", "--seconds"),
    )
    rows = list(_rows(args.file))
    with Grader(section) as judging:
      for number, row in enumerate(rows, 1):
        program = row.get("code")
        if program is None:
          program = extract_code.last_program(str(row.get("completion", "")))
        verdict = Verdict(False, "no_code", None)
        if program is not None:
          verdict = judging.grade_program(program, row["tests"], row)
        shown = dataclasses.asdict(verdict) | {"row": number}
        del shown["extracted"]
        print(json.dumps(shown), flush=True)
  except UserError as error:
    print(f"trd-jax grading: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("trd-jax grading: interrupted", file=sys.stderr)
    return 130
  return 0
