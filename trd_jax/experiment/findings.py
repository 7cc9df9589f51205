"""Findings about a config and a machine before anything starts."""

import sys
from collections.abc import Sequence
from typing import Literal, NamedTuple

from trd_jax.experiment import printing, tables
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
  """The result of one check.

  Attributes:
    what: what was checked, such as `student`.
    state: `ok`; `note`, something to know; `unchecked`, what a quick look can't
      tell; `missing`, what this machine lacks, which is a mistake only where
      the run is to happen; `wrong`, a mistake everywhere.
    message: the finding in one line.
  """

  what: str
  state: State
  message: str


def table(findings: Sequence[Finding]) -> str:
  """Returns the findings as a table for people, a line each."""
  rows = [(one.what, _HEADS[one.state] + one.message) for one in findings]
  # On a terminal a long finding goes on where it began, below its first line.
  widths = [len(printing.clean(one.what)) for one in findings]
  indent = 4 + max(widths, default=0)
  return "\n".join(
    printing.wrapped(line, sys.stdout, indent)
    for line in tables.columns(rows, indent="  ").splitlines()
  )


def refuse(findings: Sequence[Finding], *states: State) -> None:
  """Refuses to go on if a finding has one of the states.

  Raises:
    UserError: one has; the error names all that have.
  """
  messages = dict.fromkeys(
    one.message for one in findings if one.state in states
  )
  if messages:
    raise UserError(*messages)
