"""What a check is, and what it says of a machine."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment

if TYPE_CHECKING:
  from trd_jax.doctor.machine import Machine

Status = Literal["ok", "warning", "failed", "skipped"]
_GRAVEST: tuple[Status, ...] = ("failed", "warning", "ok", "skipped")


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """What a check says.

  Attributes:
    status: 'failed' is what would stop or spoil a run, 'warning' what may,
      'skipped' a check that doesn't apply here.
    message: one line: what was seen.
    remedy: what to do about it; '' where there is nothing to do.
  """

  status: Status
  message: str
  remedy: str = ""

  @property
  def text(self) -> str:
    """Returns what was seen and the remedy as one line."""
    both = f"{self.message}; {self.remedy}" if self.remedy else self.message
    return " ".join(both.split())


def ok(message: str) -> Diagnosis:
  """Returns that all is well."""
  return Diagnosis("ok", message)


def warning(message: str, remedy: str) -> Diagnosis:
  """Returns that something may be wrong."""
  return Diagnosis("warning", message, remedy)


def failed(message: str, remedy: str) -> Diagnosis:
  """Returns that something is wrong."""
  return Diagnosis("failed", message, remedy)


def skipped(why: str) -> Diagnosis:
  """Returns that there was nothing to check."""
  return Diagnosis("skipped", why)


def refused(error: UserError) -> Diagnosis:
  """Returns a user's error, which ends in what to do, as a failure."""
  # Every user's error ends in what to do, after its last semicolon.
  message, _, remedy = str(error).rpartition("; ")
  return failed(message or remedy, remedy if message else "")


def gravest(diagnoses: Sequence[Diagnosis]) -> Diagnosis:
  """Returns the first of the gravest diagnoses; there has to be one."""
  return min(diagnoses, key=lambda one: _GRAVEST.index(one.status))


def _always(machine: "Machine") -> str:
  del machine
  return ""


def _by_all(experiment: Experiment) -> bool:
  del experiment
  return True


@dataclasses.dataclass(frozen=True)
class Check:
  """An entry of the registry `checks.CHECKS`.

  Attributes:
    name: lower-case words joined by dashes; --only takes it or its beginning.
    doc: one line: what is looked at.
    run: looks and judges; raises `UserError` where that is a failure.
    left_out: says why the check doesn't apply to a machine, or ''.
    needed: whether an experiment can't do without what is checked.
    begin: starts what takes long, before the first check that isn't `quick`.
    quick: over in a moment, and has to come before anything is started.
  """

  name: str
  doc: str
  run: Callable[["Machine"], Diagnosis]
  left_out: Callable[["Machine"], str] = _always
  needed: Callable[[Experiment], bool] = _by_all
  begin: Callable[["Machine"], object] | None = None
  quick: bool = False
