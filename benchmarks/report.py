"""BENCHMARKS.md as a pure function of the parts' documents and the notes."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import engines
import loss
import packing
import results
import rollout_overhead
import scaling
import step
from targets import TARGETS, Documents

# In the order of the report.
PARTS: dict[str, ModuleType] = {
  "loss": loss,
  "packing": packing,
  "step": step,
  "scaling": scaling,
  "engines": engines,
  "rollout_overhead": rollout_overhead,
}
_HEAD = """# Benchmarks

Written by `make bench` from `benchmarks/results/`; whatever is changed here by
hand is lost. [benchmarks/README.md](benchmarks/README.md) says how each part
measures. Reasons for a miss are kept in `benchmarks/notes.toml`."""


def read(folder: Path) -> dict[str, dict]:
  """The documents of a folder, by part, known parts first."""
  found = {}
  for path in sorted(folder.glob("*.json")):
    document = json.loads(path.read_text())
    found[document["part"]] = document
  order = [*PARTS, *sorted(found.keys() - PARTS.keys())]
  return {part: found[part] for part in order if part in found}


def read_notes(path: Path) -> dict[str, str]:
  """The hand-kept reasons, by a target's key.

  Raises:
    ValueError: a key that no target has.
  """
  notes = tomllib.loads(path.read_text())
  if unknown := notes.keys() - {target.key for target in TARGETS}:
    raise ValueError(f"{path}: no target is called {min(unknown)}")
  return notes


def render(documents: Documents, notes: Mapping[str, str]) -> str:
  """The whole report as Markdown."""
  parts = [_HEAD]
  if any(document.get("quick") for document in documents.values()):
    parts.append(
      "**A smoke test at reduced sizes: these numbers say nothing.**"
    )
  parts += ["## Targets", str(_targets(documents, notes))]
  for part, document in documents.items():
    parts += [f"## {part.replace('_', ' ').capitalize()}", _origin(document)]
    for table in _tables(part, document):
      parts += [f"### {table.title}", str(table)]
  return "\n\n".join(parts) + "\n"


def _tables(part: str, document: dict) -> list[results.Table]:
  if part in PARTS:
    return PARTS[part].tables(document)
  # A part of another machine brings its tables ready.
  return [results.Table(**fields) for fields in document.get("tables", ())]


def _origin(document: dict) -> str:
  versions = document.get("versions", {})
  lines = [
    f"- command: `{document['command']}`",
    f"- date: {document['date']}, commit {document['commit']}, took"
    f" {document['seconds']:,.0f} s",
    f"- machine: {document['machine']}",
    "- versions: " + ", ".join(f"{n} {v}" for n, v in versions.items()),
  ]
  if "load_before" in document:
    lines[2] += f"; load before it began: {document['load_before']:.2f}"
  return "\n".join(lines)


def _targets(documents: Documents, notes: Mapping[str, str]) -> results.Table:
  rows = []
  for target in TARGETS:
    figure = target.measured(documents)
    sign = "≤" if target.at_most else "≥"
    measured, verdict, why = "-", "not measured", ""
    if figure is not None:
      measured = target.number(figure)
      verdict = "met" if target.met(figure) else "**missed**"
    if verdict == "**missed**":
      why = " ".join(notes.get(target.key, "no reason found yet").split())
    limit = f"{sign} {target.number(target.limit)}"
    rows.append((target.what, limit, measured, verdict, why))
  columns = ("what", "target", "measured", "verdict", "why it was missed")
  return results.Table("Targets", "", columns, rows)
