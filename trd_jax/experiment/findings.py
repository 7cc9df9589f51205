"""What was found before anything starts, and how it is told."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from trd_jax.experiment import tables
from trd_jax.experiment.errors import UserError

State = Literal["ok", "note", "unchecked", "missing", "wrong"]
_HEADS = {
  "ok": "",
  "note": "note: ",
  "unchecked": "not checked: ",
  "missing": "not checked: ",
  "wrong": "WRONG: ",
}


class Finding(NamedTuple):
  """One thing that was looked at.

  Attributes:
    what: its name, as `student`.
    state: `ok`; `note`, something to know; `unchecked`, what can't be seen
      without more than a look; `missing`, what this machine lacks, which is
      wrong where the run is to happen; `wrong`, a mistake everywhere.
    told: one line.
  """

  what: str
  state: State
  told: str


def table(findings: Sequence[Finding]) -> str:
  """The findings as a person reads them, a line each."""
  rows = [(one.what, _HEADS[one.state] + one.told) for one in findings]
  return tables.columns(rows, indent="  ")


def refuse(findings: Sequence[Finding], *states: State) -> None:
  """Ends where something was found that can't stay so.

  Raises:
    UserError: a finding has one of the states; all that have are told.
  """
  told = dict.fromkeys(one.told for one in findings if one.state in states)
  if told:
    raise UserError("; also: ".join(told))
