"""Where numbers go: metrics by step, progress bars, seconds by stage."""

import contextlib
import importlib
import json
import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TextIO

from tqdm import tqdm

from trd_jax.experiment.errors import UserError, one_line
from trd_jax.experiment.files import json_files
from trd_jax.experiment.files.atomic_files import atomic_file
from trd_jax.experiment.records import content_key

_LINE_SECONDS = 10.0  # between lines where stderr is no terminal
_FRAME_SECONDS = 0.1  # between pictures where it is one
_BAR_CELLS = 20


class Sink(Protocol):
  """A further place for metrics."""

  def begin(self, start_step: int) -> None:
    """Is called once, with the step of the first row to come."""
    ...

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Takes the row of a step, without what has no value."""
    ...

  def close(self) -> None:
    """Ends it."""
    ...


def open_sinks(
  path: Path,
  *,
  tensorboard: bool = False,
  wandb: bool = False,
  wandb_project: str = "trd-jax",
  config: Mapping[str, Any] | None = None,
) -> list[Sink]:
  """Opens the further places that are requested, seen to be usable.

  Args:
    path: the `MetricWriter`'s.
    tensorboard: also write event files into the folder `tensorboard` beside.
    wandb: also log to Weights & Biases.
    wandb_project: its project.
    config: what the run is shown with there.

  Raises:
    UserError: one that was asked for is not installed, or refuses the run.
  """
  sinks: list[Sink] = []
  if tensorboard:
    sinks.append(_TensorBoard(path.parent / "tensorboard"))
  if wandb:
    sinks.append(_Wandb(path, wandb_project, config or {}))
  return sinks


class MetricWriter:
  """Writes scalars by step: JSON lines always, more where asked.

  Resuming is exact: rows at steps from `start_step` on are dropped first, so
  that a run which was killed and went on from a checkpoint leaves the file of
  one that was not (a line that the kill tore apart is dropped too).

  Args:
    path: the JSON lines file, a row a step.
    start_step: the first step that this process will write.
    sinks: further places, of `open_sinks`; they are closed with this one.

  Raises:
    UserError: the file is there and holds something else.
  """

  def __init__(
    self, path: Path, start_step: int = 0, sinks: Sequence[Sink] = ()
  ):
    self._sinks = sinks
    for sink in sinks:
      sink.begin(start_step)
    kept = []
    for row in read_metrics(path):
      if not isinstance(row.get("step"), int):
        raise UserError(f"{path} has rows without a step; move the file away")
      if row["step"] < start_step:
        kept.append(row)
    with atomic_file(path) as file:
      file.writelines(_json_line(row) for row in kept)
    self._file = path.open("ab")

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
    """
    row = {name: _scalar(value) for name, value in metrics.items()}
    self._file.write(_json_line({"step": int(step), **row}))
    self._file.flush()
    numbers = {name: value for name, value in row.items() if value is not None}
    for sink in self._sinks:
      sink.write(step, numbers)

  def close(self) -> None:
    """Ends all files."""
    self._file.close()
    for sink in self._sinks:
      sink.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """Returns the rows that `MetricWriter` wrote; a torn last line is no row.

  Raises:
    UserError: a line is none of its rows: the file is somebody else's.
  """
  if not path.exists():
    return []
  lines = path.read_bytes().splitlines(keepends=True)
  rows = []
  for number, line in enumerate(lines, 1):
    if not line.endswith(b"\n"):
      continue
    try:
      row = json_files.loads(line)
    except ValueError:
      row = None
    if not isinstance(row, dict):
      raise UserError(
        f"{path}, line {number}, is no row of trd-jax's; move the file away"
      )
    rows.append(row)
  return rows


def _json_line(row: Mapping[str, Any]) -> bytes:
  return json.dumps(row, allow_nan=False).encode() + b"\n"


def _scalar(value: Any) -> bool | int | float | str | None:
  if hasattr(value, "item"):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


class _TensorBoard:
  """Event files; steps from `start_step` on replace older ones."""

  def __init__(self, folder: Path):
    self._folder = folder
    self._writer: Any = None
    try:
      self._module = importlib.import_module("tensorboardX")
    except ImportError:
      raise UserError(
        "metrics.tensorboard needs tensorboardX: pip install tensorboardX, or "
        "set it to False"
      ) from None

  def begin(self, start_step: int) -> None:
    self._writer = self._module.SummaryWriter(
      str(self._folder), purge_step=start_step
    )

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    for name, value in metrics.items():
      if not isinstance(value, str):
        self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    self._writer.close()


class _Wandb:
  """A run of Weights & Biases, found again by its run directory."""

  def __init__(self, path: Path, project: str, config: Mapping[str, Any]):
    try:
      wandb = importlib.import_module("wandb")
    except ImportError:
      raise UserError(
        "metrics.wandb needs wandb: pip install 'trd-jax[wandb]', or set it "
        "to False"
      ) from None
    run_dir = path.resolve().parent.parent
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      self._run = wandb.init(
        dir=str(path.parent),
        project=project,
        id=content_key(str(run_dir))[:8],
        name=run_dir.name,
        resume="allow",
        config=dict(config),
      )
    except Exception as error:
      reason = one_line(error)
      raise UserError(
        f"metrics.wandb: Weights & Biases refuses the run ({reason}); set"
        " WANDB_API_KEY or call wandb login, set WANDB_MODE=offline, or set"
        " the key to False"
      ) from error

  def begin(self, start_step: int) -> None:
    """Does nothing: the run itself knows up to which step it has rows."""

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    self._run.log(dict(metrics), step=step)

  def close(self) -> None:
    self._run.finish()


class Progress(tqdm):
  """How far a piece of work is, how fast it goes, how long it will take.

  tqdm draws on a terminal, one line that redraws itself; elsewhere, as for a
  log, there is a line every ten seconds or so. A context manager; the last
  line stays.

  How long it will take is said once as much time has passed after the first
  unit as before it: that one may have waited for a compiler, or for others
  that go on beside it.

  Args:
    total: how many units there are in all; None where nobody knows.
    desc: what is being done.
    unit: what is counted, in the plural.
    initial: units that an earlier process did; they count as done and not
      into the rate.
    stream: where to draw; default stderr.
    clock: seconds, ever growing.
  """

  # tqdm's thread would redraw in between, and live on in what is forked.
  monitor_interval = 0

  def __init__(
    self,
    total: int | None,
    desc: str,
    unit: str = "rows",
    *,
    initial: int = 0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    out: TextIO = stream or sys.stderr
    self._live = out.isatty()
    self._note = ""
    self._first: float | None = None  # seconds until the first unit
    self._line = ""
    super().__init__(
      total=total,
      desc=desc,
      unit=unit,
      initial=initial,
      file=out,
      mininterval=_FRAME_SECONDS if self._live else _LINE_SECONDS,
      miniters=0,  # the time alone says when to draw
      delay=1.0,  # nothing is drawn before the block is entered
      leave=True,
      disable=False,
    )
    self.delay = 0.0
    self._time = clock
    self.start_t = self.last_print_t = clock()

  def __enter__(self) -> Self:
    if self._live:
      self.refresh()
    return self

  def update(self, n: float | None = 1, note: str = "") -> bool | None:
    """Counts `n` more units; `note` stands at the line's end from now on."""
    self._note = note or self._note
    if self._first is None and n:
      self._first = self._time() - self.start_t
    return super().update(n)

  def display(self, msg: str | None = None, pos: int | None = None) -> None:
    """Draws the line as it is now."""
    if self._live:
      super().display(msg, pos)
    elif msg is None and (line := str(self)) != self._line:
      self.fp.write(line + "\n")
      self.fp.flush()
      self._line = line

  def close(self) -> None:
    """Draws the last line."""
    if not self._live and not self.disable:
      self.display()
      self.leave = False  # tqdm would end a line that it thinks is open
    super().close()

  def __str__(self) -> str:
    line = self.line(self._time())
    if self._live:
      line = line[: shutil.get_terminal_size().columns - 1]
    return line

  def line(self, now: float) -> str:
    """Returns the line at a moment of the clock."""
    elapsed = now - self.start_t
    here = self.n - self.initial
    rate = here / elapsed if elapsed > 0 else 0.0
    parts = [f"{self.n:,} {self.unit}"]
    if self.total is not None:
      share = self.n / self.total if self.total else 1.0
      parts = [f"{self.n:,}/{self.total:,} {self.unit} ({share:.0%})"]
      if self._live:
        cells = round(min(share, 1.0) * _BAR_CELLS)
        parts.insert(0, "█" * cells + "·" * (_BAR_CELLS - cells))
    parts.append(_rate(rate, self.unit))
    left = None if self.total is None else self.total - self.n
    if left is not None and left > 0:
      if self._first is not None and rate and elapsed >= 2 * self._first:
        parts.append(f"{duration(left / rate)} left")
    else:
      parts.append(f"took {duration(elapsed)}")
    if self._note:
      parts.append(self._note)
    return f"{self.desc}: " + " · ".join(parts)


# tqdm's own lock takes a semaphore of the machine, for bars of many processes.
Progress.set_lock(threading.RLock())


def _rate(rate: float, unit: str) -> str:
  if 0 < rate < 1:
    return f"{duration(1 / rate)} each"
  return f"{rate:,.{1 if rate < 100 else 0}f} {unit}/s"


def duration(seconds: float) -> str:
  """Seconds for a person: 4.2 s, 3:07 min, 2:05 h."""
  if seconds < 59.95:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes}:{rest:02d} min"
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d} h"


@contextlib.contextmanager
def timed(path: Path, stage: str) -> Iterator[None]:
  """Adds the seconds of a block to a stage's account, however it ends.

  A block that raises counts as an attempt that didn't finish.

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
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
      file.write(_json_line(row))


def seconds_by_stage(path: Path) -> dict[str, float]:
  """Adds up each stage's seconds, over all processes that worked on it.

  Attempts that didn't finish have an account of their own, `STAGE, stopped`:
  a later one may have gone on from what they did, or have begun again.
  """
  sums: dict[str, float] = {}
  for row in read_metrics(path):
    account = row["stage"]
    if not row.get("finished", True):
      account += ", stopped"
    sums[account] = sums.get(account, 0.0) + row["seconds"]
  return sums
