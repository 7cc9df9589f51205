"""What judges answers: the sandbox, and graders in their own environments."""

import functools
import shutil

from trd_jax.doctor import diagnosis
from trd_jax.doctor.diagnosis import Check, Diagnosis
from trd_jax.doctor.machine import Machine
from trd_jax.experiment.experiment import Experiment
from trd_jax.grading import graders
from trd_jax.grading.graders import GRADERS
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
  trains = experiment.domain == "code" and experiment.grades
  return trains or any(
    GRADERS[name].runs_programs for name in _judging(experiment)
  )


def _judging(experiment: Experiment) -> list[str]:
  return graders.of_benchmarks(experiment.evaluate.benchmarks, experiment)


def of_environments() -> list[Check]:
  """Returns a check of each grader that has a Python environment to itself."""
  return [
    Check(
      name.replace("_", "-"),
      f"{grader.environment.title} answers",
      functools.partial(_answers, name),
      functools.partial(_left_out, name),
      functools.partial(_judges, name),
    )
    for name, grader in GRADERS.items()
    if grader.environment is not None
  ]


def _answers(name: str, machine: Machine) -> Diagnosis:
  """Checks that a grader answers from the sandbox.

  Raises:
    UserError: it doesn't.
  """
  GRADERS[name].check(machine.experiment)
  return diagnosis.ok(f"{GRADERS[name].version} answers from the sandbox")


def _judges(name: str, experiment: Experiment) -> bool:
  """Returns whether a grader judges a benchmark of an experiment."""
  return name in _judging(experiment)


def _left_out(name: str, machine: Machine) -> str:
  """Returns why a grader isn't looked at, or ''."""
  environment, e = GRADERS[name].environment, machine.experiment
  assert environment is not None
  if environment.wanted(e) or _judges(name, e):
    return ""
  return environment.without
