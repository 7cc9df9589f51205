"""HumanEval+ and MBPP+, judged by EvalPlus itself, run whole in the sandbox.

EvalPlus has an environment of its own (`third_party/evalplus/install.sh`) and
is given a file with the tasks that are asked, so that it downloads nothing. A
program passes where it passes EvalPlus's base and plus tests.

EvalPlus compares in the candidate's own process, and all candidates of a run
are one user: a program that sets out to be taken for right can be, and can
change what is said of others. The sandbox keeps it from doing anything else.
"""

import collections
import gzip
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from trd_jax.errors import UserError
from trd_jax.grading import extract_code, sandbox
from trd_jax.records import Verdict

VERSION = "evalplus-0.3.1"
PYTHON = ".venv-evalplus/bin/python"
DATASETS = {"humanevalplus": "humaneval", "mbppplus": "mbpp"}
DEFECTS = {
  "HumanEval/32": "fails whatever is right: no test of it is ever counted",
  "Mbpp/255": "takes more memory than EvalPlus allows its own solution",
}
"""Tasks that EvalPlus 0.3.1 can't judge, and why; they count as not judged."""

_DRIVER = Path(__file__).with_name("evalplus_driver.py")
_PROGRAMS = 512  # of one run of EvalPlus
_SECONDS = 125  # EvalPlus's own most for a program's base and plus tests
_START_SECONDS = 900
_MOST_BROKEN = 8
_GIB = 1 << 30

# What one run is given: task id and program, in this order.
_Programs = Sequence[tuple[str, str]]
# By these: what the base and the plus tests said; None where nothing did.
_Found = dict[tuple[str, str], tuple[str, str] | None]


def check(python: str | None, unsafe: bool = False) -> None:
  """Sees that EvalPlus and a sandbox for it are there.

  Raises:
    UserError: they are not; it says how to get them.
  """
  path = _python(python)
  box = sandbox.open(unsafe, path)
  probe = "import importlib.metadata as m; print(m.version('evalplus'))"
  result = box.run([path, "-c", probe])
  if f"evalplus-{result.stdout.decode().strip()}" != VERSION:
    raise UserError(
      f"{path} has no {VERSION.replace('-', ' ')}; make the environment again:"
      " third_party/evalplus/install.sh"
    )


def _python(python: str | None) -> str:
  path = os.path.abspath(os.path.expanduser(python or PYTHON))
  if not os.access(path, os.X_OK):
    raise UserError(
      f"HumanEval+ and MBPP+ are graded by EvalPlus, and {path} is not there:"
      " run third_party/evalplus/install.sh, or name its interpreter with"
      " --config.python.evalplus"
    )
  return path


def grade(
  benchmark: str,
  tasks: Path,
  answers: Sequence[tuple[str, str]],
  *,
  python: str | None = None,
  unsafe: bool = False,
  workers: int | None = None,
  least_seconds: float = 1.0,
  progress: Callable[[int], object] | None = None,
) -> list[Verdict]:
  """Judges responses with EvalPlus.

  Args:
    benchmark: a key of `DATASETS`.
    tasks: EvalPlus's file of that benchmark (JSON lines, perhaps gzipped).
    answers: (task id, a model's whole response).
    python: EvalPlus's interpreter; None: `PYTHON`.
    unsafe: see `sandbox.open`.
    workers: programs that are tested at once; None: half of the cores.
    least_seconds: EvalPlus's time limit for an input whose reference solution
      is quick; published results have its default.
    progress: called with the number of programs judged so far.

  Returns:
    Verdicts in the order of the answers: `match`, `mismatch`, `timeout` (it
    did not end in time and isn't right), `no_box` (no program in the
    response), `ungradable` (see `DEFECTS`, or it ended EvalPlus itself).

  Raises:
    UserError: EvalPlus isn't there or doesn't run, or a task is unknown.
  """
  lines = _task_lines(tasks)
  programs = [extract_code.last_program(text) for _, text in answers]
  wanted = dict.fromkeys(
    (task, program)
    for (task, _), program in zip(answers, programs, strict=True)
    if program is not None and task not in DEFECTS
  )
  if unknown := {task for task, _ in answers} - lines.keys():
    raise UserError(f"{tasks} has no task {min(unknown)}")
  by_task: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
  for task, program in wanted:
    by_task[task].append((task, program))
  status: _Found = {}
  if by_task:
    path = _python(python)
    run = _Run(
      sandbox.open(unsafe, path),
      path,
      DATASETS[benchmark],
      lines,
      workers or max(1, (os.cpu_count() or 2) // 2),
      least_seconds,
    )
    for some in _batches(list(by_task.values())):
      status |= run.judge(some)
      if progress:
        progress(len(status))
  verdicts = []
  for (task, _), program in zip(answers, programs, strict=True):
    if program is None:
      verdicts.append(Verdict(False, "no_code", None))
    elif (found := status.get((task, program))) is None:
      why = DEFECTS.get(task, "it ended EvalPlus itself")
      verdicts.append(Verdict(None, "ungradable", program, why))
    else:
      verdicts.append(_verdict(program, *found))
  return verdicts


def _verdict(program: str, base: str, plus: str) -> Verdict:
  """Right where both pass; the reason is the first one's that does not."""
  worst = base if base != "pass" else plus
  detail = json.dumps({"base": base, "plus": plus})
  if worst == "pass":
    return Verdict(True, "match", program, detail)
  reason = "timeout" if worst == "timeout" else "mismatch"
  return Verdict(False, reason, program, detail)


def _task_lines(tasks: Path) -> dict[str, str]:
  """Each task's own line, unchanged: what is in it is EvalPlus's affair."""
  data = tasks.read_bytes()
  if tasks.name.endswith(".gz"):
    data = gzip.decompress(data)
  lines = [line for line in data.decode().split("\n") if line.strip()]
  return {json.loads(line)["task_id"]: line for line in lines}


def _batches(tasks: Sequence[_Programs]) -> list[_Programs]:
  """Whole tasks together, so that each one's outputs are computed once."""
  batches: list[list[tuple[str, str]]] = []
  for programs in tasks:
    if not batches or len(batches[-1]) + len(programs) > _PROGRAMS:
      batches.append([])
    batches[-1] += programs
  return list(batches)


class _Run:
  """EvalPlus, started as often as it takes."""

  def __init__(
    self,
    box: sandbox.Box,
    python: str,
    dataset: str,
    lines: Mapping[str, str],
    workers: int,
    least_seconds: float,
  ):
    self._box, self._python, self._dataset = box, python, dataset
    self._lines, self._workers = lines, workers
    self._least_seconds = least_seconds
    self._broken = 0

  def judge(self, programs: _Programs) -> _Found:
    """Each program's status; None for one that ended EvalPlus itself.

    Raises:
      UserError: that seems to be EvalPlus's own doing.
    """
    if not programs:
      return {}
    found, said = self._once(programs)
    if found is not None:
      return found
    if len(programs) > 1:
      half = len(programs) // 2
      return self.judge(programs[:half]) | self.judge(programs[half:])
    self._broken += 1
    if self._broken > _MOST_BROKEN:
      raise UserError(f"EvalPlus does not run in the sandbox: {said}")
    return {programs[0]: None}

  def _once(self, programs: _Programs) -> tuple[_Found | None, str]:
    """One run in a folder of its own: no earlier result can be taken for it."""
    with tempfile.TemporaryDirectory(prefix="trd-jax-evalplus-") as name:
      folder = Path(name)
      asked = dict.fromkeys(task for task, _ in programs)
      tasks = folder / "tasks.jsonl"
      tasks.write_text("\n".join(self._lines[task] for task in asked) + "\n")
      samples = folder / "samples.jsonl"
      samples.write_text(
        "".join(
          json.dumps({"task_id": task, "solution": program}) + "\n"
          for task, program in programs
        )
      )
      for path in (tasks, samples):
        path.chmod(0o444)
      result = self._box.run(
        [
          *(self._python, "driver.py", self._dataset, str(samples)),
          *(str(self._workers), str(self._least_seconds)),
        ],
        files={"driver.py": _DRIVER.read_bytes()},
        writable=folder,
        env={
          "HUMANEVAL_OVERRIDE_PATH": str(tasks),
          "MBPP_OVERRIDE_PATH": str(tasks),
          "HF_HUB_OFFLINE": "1",
          "PYTHONDONTWRITEBYTECODE": "1",
        },
        limits=sandbox.Limits(
          wall_seconds=_START_SECONDS
          + _SECONDS * math.ceil(len(programs) / self._workers),
          cpu_seconds=3600,
          memory_bytes=(4 + 4 * self._workers) * _GIB,
          file_bytes=2 * _GIB,
          output_bytes=64 << 20,
          processes=64 + 8 * self._workers,
        ),
      )
      lines = result.stderr.decode(errors="replace").strip().splitlines()
      said = f"{result.reason}, {(lines or ['no word'])[-1][:200]}"
      try:
        written = (folder / "samples_eval_results.json").read_bytes()
        return _statuses(json.loads(written), programs), said
      except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None, said


def _statuses(results: Mapping, programs: _Programs) -> _Found:
  """What EvalPlus wrote, by program.

  Raises:
    KeyError, IndexError, TypeError, ValueError: they aren't these programs'.
  """
  position: collections.Counter[str] = collections.Counter()
  found: _Found = {}
  for task, program in programs:
    row = results["eval"][task][position[task]]
    position[task] += 1
    if row["solution"] != program:
      raise ValueError(f"{task}: the results are of other programs")
    found[task, program] = (str(row["base_status"]), str(row["plus_status"]))
  return found
