"""What a check is, and what it finds."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from trd_jax.errors import UserError
from trd_jax.experiment import Experiment

if TYPE_CHECKING:
  from trd_jax.doctor.machine import Machine

Status = Literal["ok", "warning", "failed", "skipped"]
_GRAVEST: tuple[Status, ...] = ("failed", "warning", "ok", "skipped")


@dataclasses.dataclass(frozen=True)
class Finding:
  """What a check found.

  Attributes:
    status: 'failed' is what would stop or spoil a run, 'warning' what may,
      'skipped' a check that doesn't apply here.
    what: one line: what was seen.
    remedy: what to do about it; '' where there is nothing to do.
  """

  status: Status
  what: str
  remedy: str = ""

  @property
  def text(self) -> str:
    """Returns both as one line."""
    both = f"{self.what}; {self.remedy}" if self.remedy else self.what
    return " ".join(both.split())


def ok(what: str) -> Finding:
  """Returns that all is well."""
  return Finding("ok", what)


def warning(what: str, remedy: str) -> Finding:
  """Returns that something may be wrong."""
  return Finding("warning", what, remedy)


def failed(what: str, remedy: str) -> Finding:
  """Returns that something is wrong."""
  return Finding("failed", what, remedy)


def skipped(why: str) -> Finding:
  """Returns that there was nothing to check."""
  return Finding("skipped", why)


def refused(error: UserError) -> Finding:
  """Returns a user's error, which ends in what to do, as a failure."""
  what, _, remedy = str(error).rpartition("; ")
  return failed(what or remedy, remedy if what else "")


def gravest(findings: Sequence[Finding]) -> Finding:
  """Returns the first of the gravest; there has to be one."""
  return min(findings, key=lambda finding: _GRAVEST.index(finding.status))


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
  run: Callable[["Machine"], Finding]
  left_out: Callable[["Machine"], str] = _always
  needed: Callable[[Experiment], bool] = _by_all
  begin: Callable[["Machine"], object] | None = None
  quick: bool = False
