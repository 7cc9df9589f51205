"""What judges answers: the sandbox, EvalPlus, lcb_runner."""

import os
import shutil

from trd_jax.data.problems import benchmarks
from trd_jax.doctor import diagnosis
from trd_jax.doctor.diagnosis import Diagnosis
from trd_jax.doctor.machine import Machine
from trd_jax.experiment.experiment import Experiment
from trd_jax.grading.code import evalplus, lcb_runner
from trd_jax.grading.sandbox import sandbox

_WORD = "it runs"


def bubblewrap(machine: Machine) -> Diagnosis:
  """Checks that a program runs in the sandbox.

  Raises:
    UserError: it doesn't.
  """
  section = machine.experiment.sandbox
  python = section.python or machine.experiment.python.of("rollout")
  if python is not None and shutil.which(python) is None:
    python = None  # which the check of the config says; this is the sandbox's
  box = sandbox.open(section.unsafe, python)
  result = box.run(
    [box.python, "-c", f"print({_WORD!r})"],
    limits=sandbox.Limits(wall_seconds=30),
  )
  said = result.stdout.decode(errors="replace").strip()
  if result.exit_code or said != _WORD:
    return diagnosis.failed(
      f"a program in the sandbox ended with {result.reason} and said"
      f" {said[:80]!r}",
      "install bubblewrap anew (Debian: apt-get install bubblewrap)",
    )
  if section.unsafe:
    return diagnosis.warning(
      "sandbox.unsafe=True: programs that a model wrote run as you",
      "leave that key out where there is something to lose",
    )
  return diagnosis.ok("a program ran in it, without network or your files")


def by_programs(experiment: Experiment) -> bool:
  """Returns whether an experiment runs programs that a model wrote."""
  return experiment.domain == "code" or bool(_code_benchmarks(experiment))


def _code_benchmarks(experiment: Experiment) -> set[str]:
  names = set(map(benchmarks.published, experiment.evaluate.benchmarks))
  return names & {*evalplus.DATASETS, "livecodebench"}


def with_evalplus(machine: Machine) -> Diagnosis:
  """Checks that EvalPlus answers from the sandbox.

  Raises:
    UserError: it doesn't.
  """
  e = machine.experiment
  evalplus.check(e.python.evalplus, e.sandbox.unsafe)
  return diagnosis.ok(f"{evalplus.VERSION} answers from the sandbox")


def by_evalplus(experiment: Experiment) -> bool:
  """Returns whether EvalPlus judges a benchmark of an experiment."""
  return bool(_code_benchmarks(experiment) & evalplus.DATASETS.keys())


def without_evalplus(machine: Machine) -> str:
  """Says why EvalPlus isn't looked at, or ''."""
  e = machine.experiment
  named = e.python.evalplus is not None or os.access(evalplus.PYTHON, os.X_OK)
  if named or by_evalplus(e):
    return ""
  return "no .venv-evalplus here, and no HumanEval+ or MBPP+ to judge"


def with_lcb_runner(machine: Machine) -> Diagnosis:
  """Checks that lcb_runner answers from the sandbox.

  Raises:
    UserError: it doesn't.
  """
  e = machine.experiment
  lcb_runner.check(e.python.lcb_runner, e.sandbox.unsafe)
  return diagnosis.ok("lcb_runner answers from the sandbox")


def by_lcb_runner(experiment: Experiment) -> bool:
  """Returns whether lcb_runner judges a benchmark of an experiment."""
  return "livecodebench" in _code_benchmarks(experiment) and lcb_runner.wanted(
    experiment.python.lcb_runner
  )


def without_lcb_runner(machine: Machine) -> str:
  """Says why lcb_runner isn't looked at, or ''."""
  if lcb_runner.wanted(machine.experiment.python.lcb_runner):
    return ""
  return "no .venv-lcb here: our own executor judges LiveCodeBench"
