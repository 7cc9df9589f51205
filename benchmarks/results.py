"""What a part of the benchmark leaves: one JSON document, and its tables.

A document has groups, a group has settings and cases, a case is what
`turns.take_turns` returned of a variant. Everything printed or written is made
from documents by pure functions, so a table can be made again without a run.
"""

import argparse
import dataclasses
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

Cases = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Table:
  """A table and the words above it.

  Attributes:
    title: a few words.
    text: what was compared, in sentences; may be empty.
    columns: their names.
    rows: cells as text, one for each column.
  """

  title: str
  text: str
  columns: Sequence[str]
  rows: Sequence[Sequence[str]]

  def __str__(self) -> str:
    """As Markdown, without the title."""
    lines = [self.columns, ["---"] * len(self.columns), *self.rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{self.text}\n\n{table}" if self.text else table


# One of these is near the beginning of whatever a benchmark writes.
_MARKS = ('"part"', '"scale"', "Written by", "matplotlib")
_WRITTEN = ("*.json", "BENCHMARKS.md", "scaling.md", "scaling-*.svg")


def output(text: str) -> Path:
  """Reads a file or folder to write from a command line.

  Raises:
    argparse.ArgumentTypeError: it is empty, or what is there and would be
      replaced is no benchmark's.
  """
  if not text.strip():
    raise argparse.ArgumentTypeError("the path is empty")
  path = Path(text).expanduser()
  there = [path]
  if path.is_dir():
    there = [file for like in _WRITTEN for file in path.glob(like)]
  for file in there:
    if not file.exists():
      continue
    beginning = (
      file.read_text(errors="replace")[:4000] if file.is_file() else ""
    )
    if not any(mark in beginning for mark in _MARKS):
      raise argparse.ArgumentTypeError(
        f"{file} was not written by a benchmark and would be lost; name another"
        " place"
      )
  return path


class Document:
  """Collects the groups of a part and is written whole, after each of them.

  Args:
    part: its name.
    path: the file to write, or None to keep nothing.
    quick: whether the sizes are a smoke test's.
  """

  def __init__(self, part: str, path: Path | None, quick: bool):
    self._path = path
    self._start = time.monotonic()
    self.fields: dict[str, Any] = {
      "part": part,
      "quick": quick,
      "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
      "command": _command(),
      "commit": _commit(),
      "machine": machine(),
      "load_before": os.getloadavg()[0],
      "seconds": 0.0,
      "versions": {"python": platform.python_version()},
      "groups": {},
    }

  def add(self, group: str, settings: dict, cases: Cases) -> None:
    """Adds a group and writes the document: an end by force loses no group."""
    for case in cases.values():
      # Those of the first variant that has a package: one may bring its own.
      for name, version in case.get("about", {}).get("versions", {}).items():
        self.fields["versions"].setdefault(name, version)
    self.fields["groups"][group] = {"settings": settings, "cases": cases}
    self.fields["seconds"] = time.monotonic() - self._start
    if self._path is not None:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      partial = self._path.with_suffix(f".{os.getpid()}.partial")
      partial.write_text(json.dumps(self.fields, indent=1) + "\n")
      partial.replace(self._path)


def _command() -> str:
  # Where the results go and which interpreter it is says nothing about them.
  words, skip = [], False
  for word in sys.argv[1:]:
    if skip or word.startswith("--json="):
      skip = False
    elif word == "--json":
      skip = True
    else:
      words.append(_portable(word))
  return shlex.join(
    ["python", _portable(str(Path(sys.argv[0]).resolve())), *words]
  )


def _portable(word: str) -> str:
  """A word of a command without the folders of the machine it ran on.

  Paths inside the repository are relative to it; of others the name is left.
  """
  flag, equals, value = word.rpartition("=")
  path = Path(value)
  if path.is_relative_to(ROOT):
    value = str(path.relative_to(ROOT))
  elif path.is_absolute():
    value = path.name
  return f"{flag}{equals}{value}"


def _commit() -> str:
  """The short commit id, with a + where files differ from it."""

  def git(*words: str) -> str:
    done = subprocess.run(
      ["git", "-C", str(ROOT), *words], capture_output=True, text=True
    )
    return done.stdout.strip()

  commit = git("rev-parse", "--short", "HEAD") or "unknown"
  # What a run writes itself is no change of what was measured.
  written = (":!BENCHMARKS.md", ":!benchmarks/results", ":!docs")
  changed = git("status", "--porcelain", "--", ".", *written)
  return f"{commit}+" if changed else commit


def machine() -> str:
  """The machine in a line: cores, processor, memory."""
  model = platform.processor() or platform.machine()
  cpuinfo = Path("/proc/cpuinfo")
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  for line in lines:
    if line.startswith("model name"):
      model = line.partition(":")[2].strip()
      break
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
  return f"{os.cpu_count()} cores, {model}, {memory:.0f} GiB"


def values(case: Mapping[str, Any], key: str) -> list[float]:
  """One number of each run of a case; empty where it failed."""
  return [run[key] for run in case.get("runs", ())]


def ratios(cases: Cases, above: str, below: str, key: str) -> list[float]:
  """Ratios of two variants' numbers, round by round; empty if either failed."""
  pair = (values(cases.get(name, {}), key) for name in (above, below))
  return [a / b for a, b in zip(*pair, strict=False)]


def spread(numbers: Iterable[float], form: str) -> str:
  """`median (lowest-highest)`, each in the format `form`; a dash for none."""
  numbers = sorted(numbers)
  if not numbers:
    return "-"
  middle = statistics.median(numbers)
  ends = f"{numbers[0]:{form}}-{numbers[-1]:{form}}"
  return f"{middle:{form}} ({ends})" if len(numbers) > 1 else f"{middle:{form}}"


def median(numbers: Iterable[float]) -> float | None:
  """The median, or None of nothing."""
  numbers = list(numbers)
  return statistics.median(numbers) if numbers else None


def failures(cases: Cases) -> str:
  """A sentence about the variants that failed, or nothing."""
  said = [f"{n}: {c['failed']}" for n, c in cases.items() if "failed" in c]
  return f"Not measured: {'; '.join(said)}." if said else ""


def show(tables: Iterable[Table]) -> None:
  """Prints tables."""
  for table in tables:
    print(f"\n{table.title}\n\n{table}", flush=True)


def agree(cases: Cases, key: str, tolerance: float) -> None:
  """Refuses variants that computed something else than the first one.

  Args:
    cases: their `about` holds a number or a list of numbers under `key`;
      those that have none are left out.
    key: what is compared.
    tolerance: relative.

  Raises:
    ValueError: two are further apart.
  """
  first: tuple[str, list[float]] | None = None
  for name, case in cases.items():
    found = case.get("about", {}).get(key)
    if found is None:
      continue
    numbers = found if isinstance(found, list) else [found]
    first = first or (name, numbers)
    for a, b in zip(first[1], numbers, strict=True):
      if not abs(a - b) <= tolerance * abs(a):
        raise ValueError(f"{key}: {first[0]} has {a}, {name} has {b}")
