"""Writes metrics by step and the seconds of stages, and reads them again."""

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import json_files
from trd_jax.experiment.files.atomic_files import atomic_file
from trd_jax.experiment.files.disk_faults import naming
from trd_jax.experiment.metric_sinks import Sink


class MetricWriter:
  """Writes scalars by step: JSON lines always, more where asked.

  Resuming is exact: rows at steps from `start_step` on are dropped first, so
  that a run which was killed and went on from a checkpoint leaves the file of
  one that was not (a line that the kill tore apart is dropped too).

  Args:
    path: the JSON lines file, a row a step.
    start_step: the first step that this process will write.
    sinks: further places, of `metric_sinks.open_sinks`; they are closed with
      this one.

  Raises:
    UserError: the file is there and holds something else.
  """

  def __init__(
    self, path: Path, start_step: int = 0, sinks: Sequence[Sink] = ()
  ):
    self._sinks = sinks
    for sink in sinks:
      sink.begin(start_step)
    # Rows after the checkpoint that a run goes on from are made again; kept,
    # they would stand there twice.
    kept = [row for row in _with_steps(path) if row["step"] < start_step]
    with atomic_file(path) as file:
      file.writelines(_json_line(row) for row in kept)
    self._path = path
    # Without a buffer: what a full disk has refused is not tried again when the
    # file is closed.
    self._file = path.open("ab", buffering=0)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes one step's row.

    Args:
      step: counts from 0; rows come in its order.
      metrics: scalars by name (anything with `item()`, such as a device
        array of one element, is one). None, a NaN or an infinity is written
        as null: a mean over nothing has no value.

    Raises:
      UserError: a metric has the name that is the step's.
      OSError: the disk refuses it.
    """
    if "step" in metrics:
      raise UserError(
        "a metric is named step, which in its row is the number of the update;"
        " give the metric another name"
      )
    row = {name: _scalar(value) for name, value in metrics.items()}
    # Written row by row: who watches the file sees the update, and a kill
    # costs one line at most.
    _append(self._path, self._file, {"step": int(step), **row})
    numbers = {
      f"train/{name}": value
      for name, value in row.items()
      if isinstance(value, (int, float))
    }
    self.write_figures(step, numbers)

  def write_figures(self, step: int, figures: Mapping[str, float]) -> None:
    """Writes figures that are no row of this file into the sinks alone.

    Args:
      step: where they stand among the updates.
      figures: by grouped name, such as `rollout/accuracy`.
    """
    for sink in self._sinks:
      sink.write(step, figures)

  def close(self) -> None:
    """Ends all files."""
    self._file.close()
    for sink in self._sinks:
      sink.close()


def check(path: Path) -> None:
  """Checks that a `MetricWriter` can go on with a file, if it is there.

  It opens the file when the first row is about to come, which may be long after
  a command has begun.

  Raises:
    UserError: as `MetricWriter`.
  """
  _with_steps(path)


def _with_steps(path: Path) -> list[dict[str, Any]]:
  """Reads the rows of a `MetricWriter`, each of which has a step."""
  rows = read_metrics(path)
  if any("step" not in row for row in rows):
    raise UserError(f"{path} has rows without a step; move the file away")
  return rows


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """Returns the rows that `MetricWriter` wrote; a torn last line is no row.

  Raises:
    UserError: a line is none of its rows, or its step is no number, or none
      above the row's before it: the file is somebody else's, or was edited.
  """
  if not path.exists():
    return []
  try:
    lines = path.read_bytes().splitlines(keepends=True)
  except OSError as error:
    raise UserError(
      f"{path} can't be read ({error.strerror}); move it away"
    ) from error
  rows = []
  last = -1
  for number, line in enumerate(lines, 1):
    # Torn by a kill: the update is made again from the checkpoint.
    if not line.endswith(b"\n"):
      continue
    try:
      row = json_files.own_loads(line)
    except ValueError:
      row = None
    if not isinstance(row, dict):
      raise UserError(
        f"{path}, line {number}, is no row of trd-jax's; move the file away"
      )
    step = row.get("step", last + 1)
    # True and False are numbers to Python.
    if isinstance(step, bool) or not isinstance(step, int) or step <= last:
      raise UserError(
        f"{path}, line {number}: its step is {_shown(step)}, and has to be a"
        f" whole number above {last}, as updates are counted; mend the line, or"
        " move the file away"
      )
    last = step
    rows.append(row)
  return rows


def _shown(value: Any, most: int = 40) -> str:
  """Returns a value of JSON as a file has it, cut to `most` characters."""
  text = json.dumps(value)
  return text if len(text) <= most else f"{text[:most]}…"


def _append(path: Path, file: IO[bytes], row: Mapping[str, Any]) -> None:
  """Adds a row to an unbuffered file, whole or not at all.

  Raises:
    OSError: the disk refuses it; the error names the file.
  """
  line = _json_line(row)
  with naming(path):
    size = os.fstat(file.fileno()).st_size
    written = file.write(line)
    if written != len(line):
      # The disk became full in the midst of the line. The rest is tried for
      # the error's sake, and the part goes: a later row would be glued to it.
      try:
        file.write(line[written:])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      finally:
        file.truncate(size)


def _json_line(row: Mapping[str, Any]) -> bytes:
  return json.dumps(row, allow_nan=False).encode() + b"\n"


def _scalar(value: Any) -> bool | int | float | str | None:
  if hasattr(value, "item"):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


@contextlib.contextmanager
def timed(path: Path, stage: str) -> Iterator[None]:
  """Adds the seconds of a block to a stage's account, however it ends.

  A block that raises counts as an attempt that didn't finish. The account only
  informs: where it can't be written a note says so, and the run goes on.

  Args:
    path: JSON lines, such as `RunDir.timings`; several processes may append.
    stage: the account.
  """
  start, finished = time.monotonic(), False
  try:
    yield
    finished = True
  finally:
    seconds = round(time.monotonic() - start, 3)
    row = {"stage": stage, "seconds": seconds, "finished": finished}
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      with path.open("ab", buffering=0) as file:
        _append(path, file, row)
    except OSError as error:
      # Where the block raises, that error is the one to be told of.
      if finished:
        print(
          f"note: {path} can't be written ({error.strerror}): the {seconds} s"
          f" of {stage} are missing there",
          flush=True,
        )


def seconds_by_stage(path: Path) -> dict[str, float]:
  """Adds up each stage's seconds, over all processes that worked on it.

  Attempts that didn't finish have an account of their own, `STAGE, stopped`:
  a later one may have gone on from what they did, or have begun again.

  The file only informs, and no finished stage is lost for it: lines that are
  none of its rows are passed over, and a note says how many.
  """
  try:
    lines = path.read_bytes().split(b"\n") if path.exists() else []
  except OSError as error:
    print(f"note: {path} can't be read ({error.strerror}); move it away")
    return {}
  del lines[-1:]  # torn by a kill, or empty
  sums: dict[str, float] = {}
  damaged = []
  for number, line in enumerate(lines, 1):
    found = _account(line)
    if found is None:
      damaged.append(number)
    else:
      sums[found[0]] = sums.get(found[0], 0.0) + found[1]
  if damaged:
    print(
      f"note: {path}: {len(damaged):,} of {len(lines):,} lines, the first of"
      f" them line {damaged[0]}, are no rows of trd-jax's: the seconds in them"
      " are not counted; move the file away to count anew",
      flush=True,
    )
  return sums


def _account(line: bytes) -> tuple[str, float] | None:
  """Returns the account and the seconds of a line; None: it is no row."""
  try:
    row = json_files.own_loads(line)
    stage, seconds = row["stage"], float(row["seconds"])
    finished = row.get("finished", True)
  except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
    return None
  # Not `seconds < 0`, which lets NaN pass.
  if not isinstance(stage, str) or not 0 <= seconds < math.inf:
    return None
  return stage if finished else f"{stage}, stopped", seconds
