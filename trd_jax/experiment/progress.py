"""Progress bars with the time that is left, on a terminal and in a log."""

import contextlib
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Self, TextIO

from tqdm import tqdm

from trd_jax.experiment import printing

_LINE_SECONDS = 10.0  # between lines where stderr is no terminal
_FRAME_SECONDS = 0.1  # between pictures where it is one
_BAR_CELLS = 20


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
    out: Any = stream or sys.stderr
    self._live = out.isatty()
    self._out = out
    if isinstance(out, printing.CleanStream) and self._live:
      # Of the pictures that it draws over, a log gets a line now and then.
      out = out.unlogged()
    self._logged = clock()
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

  def say(self, line: str) -> None:
    """Prints a line of its own; on a terminal the bar goes on below it."""
    if self._live:
      with contextlib.suppress(OSError):
        self.clear()
    print(line, flush=True)
    if self._live:
      self.refresh()

  def display(self, msg: str | None = None, pos: int | None = None) -> None:
    """Draws the line as it is now, if the stream takes it.

    A stream that can't be written, as a file on a full disk, costs the lines in
    it and not the work.
    """
    with contextlib.suppress(OSError):
      if self._live:
        super().display(msg, pos)
        if (now := self._time()) - self._logged >= _LINE_SECONDS:
          self._log(now)
      elif msg is None and (line := str(self)) != self._line:
        self._line = line
        self.fp.write(line + "\n")
        self.fp.flush()

  def close(self) -> None:
    """Draws the last line."""
    if not self._live and not self.disable:
      self.display()
      self.leave = False  # tqdm would end a line that it thinks is open
    elif self._live and not self.disable:
      self._log(self._time())
    with contextlib.suppress(OSError):
      super().close()

  def _log(self, now: float) -> None:
    """Keeps the line in the command's log."""
    printing.log_line(self.line(now, bar=False))
    self._logged = now

  def __str__(self) -> str:
    # Of data and models only their words, in one line.
    now = self._time()
    line = printing.clean(" ".join(self.line(now, self._live).split()))
    # Not to the last column: a terminal may go on to the next line there.
    most = printing.width(self._out)
    if most is not None and len(line) >= most:
      # The bar goes before a word does: the numbers say as much.
      line = printing.clean(" ".join(self.line(now).split()))
    return line if most is None else line[: most - 1]

  def line(self, now: float, bar: bool = False) -> str:
    """Returns the line at a moment of the clock, with or without a bar."""
    elapsed = now - self.start_t
    here = self.n - self.initial
    rate = here / elapsed if elapsed > 0 else 0.0
    parts = [f"{self.n:,} {self.unit}"]
    if self.total is not None:
      share = self.n / self.total if self.total else 1.0
      parts = [f"{self.n:,}/{self.total:,} {self.unit} ({share:.0%})"]
      if bar:
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


class Parsed(NamedTuple):
  """What a line of `Progress` says of how far something is."""

  desc: str
  done: int
  total: int
  unit: str


_LINE = re.compile(r"(.+): ([\d,]+)/([\d,]+) (\S+) \(\d+%\)")


def parse(line: str) -> Parsed | None:
  """Reads a line of a bar with a total; None: it is none."""
  found = _LINE.match(line)
  if found is None:
    return None
  done, total = (int(found[i].replace(",", "")) for i in (2, 3))
  return Parsed(found[1], done, total, found[4])


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
