"""Runs the checks of the registry, one line each."""

import contextlib
import dataclasses
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trd_jax.doctor import checks, diagnosis
from trd_jax.doctor.diagnosis import Check, Diagnosis
from trd_jax.doctor.machine import Machine
from trd_jax.experiment import tables
from trd_jax.experiment.errors import UserError, did_you_mean, one_line
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.processes.guard import Guard
from trd_jax.experiment.run_dir import RunDir

_WORDS = {
  "ok": "ok",
  "warning": "WARNING",
  "failed": "FAILED",
  "skipped": "left out",
}
_STATUS_WIDTH = max(map(len, _WORDS.values())) + 2
_NAME_WIDTH = max(len(check.name) for check in checks.CHECKS) + 1


def examine(
  experiment: Experiment,
  has_config: bool,
  run_dir: RunDir | None,
  *,
  only: Sequence[str] = (),
  json_file: str | None = None,
) -> None:
  """Runs checks, prints a line for each, then one with the counts.

  Args:
    experiment: what the machine is to carry out.
    has_config: whether somebody asked for it; else it is the default one.
    run_dir: the workdir, if one is named.
    only: names of checks, or their beginnings; empty for all.
    json_file: where the diagnoses go as well.

  Raises:
    UserError: `only` names no check, or the file can't be made; or what the
      experiment needs failed, or, without a config, anything.
  """
  chosen = choose(checks.CHECKS, only)
  out = None if json_file is None else Path(json_file)
  if out is not None and (out.is_dir() or not out.parent.is_dir()):
    raise UserError(
      f"--json={json_file}: name a file in a folder that is there"
    )
  folder = Path(tempfile.mkdtemp(prefix="trd-doctor-"))
  machine = Machine(experiment, has_config, run_dir, folder)
  began = time.monotonic()
  results: dict[str, tuple[Diagnosis, float]] = {}
  begun = wrong = False
  # Not even a killed doctor leaves a child behind, with a GPU's memory.
  guard = Guard()
  try:
    for check in chosen:
      # The quick checks look at an empty machine; after them all that takes
      # long starts at once, and the checks in between take no time of their
      # own.
      if not (check.quick or begun):
        begun = True
        _begin(chosen, machine)
      start = time.monotonic()
      one = run_one(check, machine)
      if (logs := machine.logs()) and one.status == "failed":
        paths = ", ".join(map(str, logs))
        remedy = f"{one.remedy} (log: {paths})".strip()
        one = dataclasses.replace(one, remedy=remedy)
      results[check.name] = one, time.monotonic() - start
      print(
        _line(check, *results[check.name], experiment, has_config), flush=True
      )
    wrong = any(one.status == "failed" for one, _ in results.values())
  finally:
    machine.close(keep_logs=wrong)
    guard.close()
  counts = Counter(one.status for one, _ in results.values())
  message = ", ".join(f"{counts[name]} {word}" for name, word in _WORDS.items())
  seconds = time.monotonic() - began
  print(f"{len(results)} checks in {seconds:.0f} s: {message}", flush=True)
  if out is not None:
    rows = to_json(chosen, results, experiment)
    out.write_text(json.dumps(rows, indent=2) + "\n")
  _conclude(chosen, results, experiment, has_config)


def choose(every: Sequence[Check], only: Iterable[str]) -> list[Check]:
  """Returns the checks that are named, or that begin with a name and a dash.

  Raises:
    UserError: a name fits none.
  """
  names = list(only)
  for name in names:
    if not any(_fits(check, name) for check in every):
      hint = did_you_mean(name, [check.name for check in every])
      raise UserError(
        f"--only={name}: there is no such check; {hint or 'see --list'}"
      )
  return [
    check
    for check in every
    if not names or any(_fits(check, name) for name in names)
  ]


def _fits(check: Check, name: str) -> bool:
  return check.name == name or check.name.startswith(f"{name}-")


def _begin(chosen: Iterable[Check], machine: Machine) -> None:
  """Starts what takes long.

  What can't be started is reported by its own check, later.
  """
  for check in chosen:
    with contextlib.suppress(Exception):
      if check.begin is not None and not check.left_out(machine):
        check.begin(machine)


def run_one(check: Check, machine: Machine) -> Diagnosis:
  """Runs a check; whatever is raised in it counts as a failure."""
  try:
    if why := check.left_out(machine):
      return diagnosis.skipped(why)
    return check.run(machine)
  except UserError as error:
    return diagnosis.refused(error)
  except Exception as error:  # a check that breaks is a line like the others
    return diagnosis.failed(
      f"{type(error).__name__}: {one_line(error)}",
      "the check itself broke on this machine",
    )


def matters(check: Check, experiment: Experiment, has_config: bool) -> bool:
  """Returns whether a failure of a check is a failure of the whole."""
  return not has_config or check.needed(experiment)


def _line(
  check: Check,
  result: Diagnosis,
  seconds: float,
  experiment: Experiment,
  has_config: bool,
) -> str:
  text = result.text
  if result.status == "failed" and not matters(check, experiment, has_config):
    text = f"(this config does without) {text}"
  word = _WORDS[result.status].ljust(_STATUS_WIDTH)
  return f"{word}{check.name.ljust(_NAME_WIDTH)}{seconds:6.1f} s  {text}"


def to_json(
  chosen: Iterable[Check],
  results: dict[str, tuple[Diagnosis, float]],
  experiment: Experiment,
) -> list[dict[str, Any]]:
  """Returns the diagnoses as plain values."""
  rows = []
  for check in chosen:
    result, seconds = results[check.name]
    rows.append(
      {
        "name": check.name,
        "status": result.status,
        "told": result.message,
        "remedy": result.remedy,
        "needed": check.needed(experiment),
        "seconds": round(seconds, 3),
      }
    )
  return rows


def _conclude(
  chosen: Iterable[Check],
  results: dict[str, tuple[Diagnosis, float]],
  experiment: Experiment,
  has_config: bool,
) -> None:
  """Ends with an error where what matters failed."""
  wrong = [
    check.name
    for check in chosen
    if results[check.name][0].status == "failed"
    and matters(check, experiment, has_config)
  ]
  if wrong:
    failed = sum(results[check.name][0].status == "failed" for check in chosen)
    others = failed - len(wrong)
    rest = f", and {others} that this config does without" if others else ""
    raise UserError(
      f"{', '.join(wrong)} failed{rest}; mend what the lines above say and give"
      " the same command again"
    )


def table() -> str:
  """Lists all checks and what each of them looks at."""
  return tables.columns([(check.name, check.doc) for check in checks.CHECKS])
