"""Children that look at something and say what they found as JSON.

What may hang or crash (a driver, a kernel, vLLM) runs in a process of its own
with a time limit, so that its end is a line of the report and not the end of
the report. A child is `python -m MODULE ASKED FACTS`, or a file in the place of
the module; it writes its facts after every phase, so that those from before a
crash are there. What it prints goes into a log.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trd_jax.experiment.errors import UserError

Facts = dict[str, Any]
Tell = Callable[..., None]

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST_LINE = 300
_END_SECONDS = 10.0


class Probe:
  """A child at work.

  Args:
    name: of its log, and for people.
    folder: where its log and its facts go.
    python: the interpreter that runs it.
    what: a module of this package, or the path of a script for interpreters
      that may not have the package.
    requested: its arguments, plain values.
    environment: variables to set.
    seconds: its time limit.
  """

  def __init__(
    self,
    name: str,
    folder: Path,
    python: str,
    what: str | Path,
    requested: Mapping[str, Any],
    *,
    environment: Mapping[str, str] | None = None,
    seconds: float,
  ):
    self.log = folder / f"{name}.log"
    self._facts = folder / f"{name}.facts.json"
    self._seconds = seconds
    # From its start and not from `result`: children work side by side, while
    # others are waited for.
    self._deadline = time.monotonic() + seconds
    questions = folder / f"{name}.requested.json"
    questions.write_text(json.dumps(dict(requested)))
    # -P: the folder of a script holds modules that would hide others.
    how = ["-P", str(what)] if isinstance(what, Path) else ["-m", what]
    self._process: subprocess.Popen | None = None
    self._failure, self._closed = "", False
    with self.log.open("wb") as log:
      try:
        self._process = subprocess.Popen(
          [python, *how, str(questions), str(self._facts)],
          env={**os.environ, **(environment or {})},
          stdin=subprocess.DEVNULL,
          stdout=log,
          stderr=subprocess.STDOUT,
          # A Ctrl-C is the doctor's to hear, and all that the child starts can
          # be ended with it.
          start_new_session=True,
        )
      except OSError as error:
        self._failure = f"{python} can't be started ({error.strerror})"

  def result(self) -> Facts:
    """Waits for the child and returns its facts.

    Returns:
      What it has told. `failure` is among it, one line, where it did not come
      to its end.
    """
    facts: Facts = {}
    if self._process is not None:
      left = max(self._deadline - time.monotonic(), 0)
      try:
        code = self._process.wait(left)
      except subprocess.TimeoutExpired:
        self._failure = f"it took longer than {self._seconds:g} s and was ended"
      else:
        if code:
          self._failure = self._last_words(code)
      finally:
        self.close()
      with contextlib.suppress(OSError, ValueError):
        facts = json.loads(self._facts.read_text())
    if self._failure:
      facts.setdefault("failure", self._failure)
    return facts

  def close(self) -> None:
    """Ends the child and all that it has started."""
    if self._process is None or self._closed:
      return
    self._closed = True  # its number may be another's later on
    # The group is there as long as one of it is.
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(self._process.pid, signal.SIGKILL)
    # One that a driver holds in the kernel doesn't even hear that.
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(_END_SECONDS)

  def _last_words(self, code: int) -> str:
    """Says how the child ended, with the last line of words in its log."""
    how = f"exit code {code}"
    if code < 0:
      how = f"killed by {signal.Signals(-code).name}"
    text = self.log.read_text("utf-8", "replace")
    lines = [_ANSI.sub("", line).strip() for line in text.splitlines()]
    said = [line for line in lines if re.search(r"\w", line)]
    return f"{how}: {(said or ['no word'])[-1][:_LONGEST_LINE]}"


def answer(examine: Callable[[Facts, Tell], None]) -> None:
  """Runs a child: `examine` gets what is requested and a way to tell facts.

  Raises:
    SystemExit: 2 after a `UserError`, which becomes the fact `failure`.
  """
  requested = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
  out = Path(sys.argv[2])
  facts: Facts = {}

  def tell(**more: Any) -> None:
    facts.update(more)
    # Whole at any moment: a child that is killed while it writes leaves the
    # facts from before.
    unfinished = out.with_suffix(".tmp")
    unfinished.write_text(json.dumps(facts))
    unfinished.replace(out)

  try:
    examine(requested, tell)
  except UserError as error:
    tell(failure=" ".join(str(error).split()))
    sys.exit(2)
