"""The one door to the terminal: all that a command prints goes through it.

What models, data, servers and file names bring along may hold characters that
command a terminal: to clear it, to retitle its window, to write into the
clipboard, to show text backwards. They are shown and never sent. What the
stream's encoding lacks is spelt with characters that it has, so that a locale
without them ends no stage. Where a run has a log (`stage_log`), it gets the
same lines.
"""

import codecs
import contextlib
import os
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TextIO

from trd_jax.experiment.stage_log import StageLog

# All control characters but tab and newline; what ends a line elsewhere; what
# turns the direction of the text around it; tags that nobody sees; halves of
# surrogate pairs, which stand for bytes that are no text.
_COMMANDS = re.compile(
  "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e"
  "\u2066-\u2069\ufff9-\ufffb"
  "\U000e0000-\U000e007f\ud800-\udfff]"
)
# How progress bars move on a terminal, those of other packages too.
_MOVES = re.compile("(?:[\r\n]|\x1b\\[A)*")

_SPELT = {
  **{"→": "->", "←": "<-", "≥": ">=", "≤": "<=", "…": "...", "×": "x"},
  **{"·": "|", "█": "#", "−": "-", "–": "-", "—": "-", "±": "+-"},
  **{"“": '"', "”": '"', "‘": "'", "’": "'", "⏎": "\\n"},
}
STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
"""What a piece of a line may look like, and how a terminal is told."""

_SPELL = "trd_jax.spell"
"""How codecs know `_spelt`."""


def clean(text: str) -> str:
  r"""Returns text with what would command a terminal shown, as `\x1b`."""
  return _COMMANDS.sub(_shown, text)


def _shown(match: re.Match[str]) -> str:
  return match[0].encode("unicode_escape").decode()


def _spelt(error: UnicodeError) -> tuple[str, int]:
  """Spells the characters that an encoding lacks; a handler of `codecs`."""
  if not isinstance(error, UnicodeEncodeError):
    raise error
  lacking = error.object[error.start : error.end]
  return "".join(
    _SPELT.get(each) or each.encode("unicode_escape").decode()
    for each in lacking
  ), error.end


codecs.register_error(_SPELL, _spelt)


class CleanStream:
  """A text stream that sends what is written to another one, cleaned.

  Everything else, such as `isatty`, is the other's own.

  Args:
    stream: the other one.
    door: has the log, if any; None: what is written isn't logged.
  """

  def __init__(self, stream: TextIO, door: "Door | None"):
    self._stream, self._door = stream, door

  def write(self, text: str) -> int:
    """Writes text; returns its length, as streams do."""
    # A bar's picture begins with a return to the start of its line.
    moves = text[: text.startswith("\r")]
    if self._stream.isatty() and _MOVES.fullmatch(text):
      moves = text
    shown = moves + clean(text[len(moves) :])
    # The log is in UTF-8, which has all characters.
    if self._door is not None and self._door.log is not None:
      self._door.log.write(shown, id(self))
    encoding = getattr(self._stream, "encoding", None) or "utf-8"
    if not shown.isascii():
      shown = shown.encode(encoding, _SPELL).decode(encoding)
    self._stream.write(shown)
    return len(text)

  def writelines(self, lines: Any) -> None:
    """Writes each of some lines."""
    for line in lines:
      self.write(line)

  def write_styled(self, text: str, style: str) -> None:
    """Writes text, cleaned, in one of `STYLES`; `""` is none of them.

    Only where the other stream takes colours is it told of any.
    """
    below: Any = self._stream
    while isinstance(below, CleanStream):
      below = below._stream
    code = STYLES[style] if style and has_colours(below) else None
    # Past the cleaning goes what this program writes, and no text.
    if code:
      below.write(f"\x1b[{code}m")
    self.write(text)
    if code:
      below.write("\x1b[0m")

  def unlogged(self) -> "CleanStream":
    """Returns a stream to the same place whose text isn't logged."""
    return CleanStream(self._stream, None)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


class Door:
  """The state of a command's door.

  Attributes:
    log: where what is printed is kept besides; None before there is a run, and
      in commands that only look.
  """

  log: StageLog | None = None


_doors: list[Door] = []
"""Those that are open, the outermost first."""


@contextlib.contextmanager
def opened() -> Iterator[Door]:
  """Cleans all that is printed in the block, by whichever package."""
  door, former = Door(), (sys.stdout, sys.stderr)
  _doors.append(door)
  sys.stdout, sys.stderr = (CleanStream(each, door) for each in former)  # type: ignore[assignment]
  # Python prints an error that nobody expected after the block has ended.
  if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _print_traceback
  code = 0
  try:
    yield door
  except SystemExit as end:
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
    raise
  except BaseException as error:
    code = 1
    if door.log is not None:
      door.log.write(clean("".join(traceback.format_exception(error))))
    raise
  finally:
    if door.log is not None:
      door.log.end(code)
    _doors.remove(door)
    sys.stdout, sys.stderr = former


def log_line(line: str) -> None:
  """Keeps a line in the command's log that isn't printed as such."""
  if _doors and _doors[-1].log is not None:
    _doors[-1].log.write(clean(line) + "\n")


def _print_traceback(
  kind: type[BaseException],
  error: BaseException,
  trace: TracebackType | None,
) -> None:
  lines = traceback.format_exception(kind, error, trace)
  CleanStream(sys.stderr, None).write("".join(lines))


def width(stream: TextIO) -> int | None:
  """Returns how many characters fit a stream's line; None: it has no end.

  Only a terminal's has one. COLUMNS, where it is set, counts.
  """
  if not stream.isatty():
    return None
  try:
    own = os.get_terminal_size(stream.fileno()).columns
  except (OSError, ValueError):  # it says that it is one, and has no size
    own = 0
  return shutil.get_terminal_size((own or 80, 24)).columns


def height(stream: TextIO) -> int | None:
  """Returns how many lines a terminal has; None: the stream is none.

  LINES, where it is set, counts.
  """
  if not stream.isatty():
    return None
  try:
    own = os.get_terminal_size(stream.fileno()).lines
  except (OSError, ValueError):  # as in `width`
    own = 0
  return shutil.get_terminal_size((80, own or 24)).lines


def has_colours(stream: TextIO) -> bool:
  """Returns whether a stream takes colours.

  A terminal does, unless NO_COLOR is set or it calls itself dumb.
  """
  told_not_to = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
  return stream.isatty() and not told_not_to


def print_styled(pieces: Iterable[tuple[str, str]]) -> None:
  """Prints a line of pieces, each with one of `STYLES` or `""`."""
  for text, style in pieces:
    if isinstance(sys.stdout, CleanStream):
      sys.stdout.write_styled(text, style)
    else:  # called as a function
      sys.stdout.write(clean(text))
  sys.stdout.write("\n")


def wrapped(text: str, stream: TextIO, indent: int = 2) -> str:
  """Returns a line broken at words where a terminal's would be too long.

  Args:
    text: one line.
    stream: where it is to be printed.
    indent: spaces before all lines but the first.
  """
  most = width(stream)
  if most is None or len(text) <= most:
    return text
  return "\n".join(
    textwrap.wrap(
      text,
      max(most, indent + 20),
      subsequent_indent=" " * indent,
      # A path or a flag stays whole, to be copied.
      break_long_words=False,
      break_on_hyphens=False,
    )
  )
