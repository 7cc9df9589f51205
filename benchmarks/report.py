"""BENCHMARKS.md as a pure function of the parts' documents and the notes."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import engines
import gpu_table
import loss
import packing
import results
import rollout_overhead
import roofline
import scaling
import step
from targets import TARGETS, Documents

# What runs on CPUs, in the order of the report.
PARTS: dict[str, ModuleType] = {
  "loss": loss,
  "packing": packing,
  "step": step,
  "scaling": scaling,
  "engines": engines,
  "rollout_overhead": rollout_overhead,
}
# What runs elsewhere, or needs another environment, is shown with them.
_SHOWN = {**PARTS, "roofline": roofline, "gpu": gpu_table}
_HEAD = """# Benchmarks

Written by `make bench` from `benchmarks/results/`; whatever is changed here by
hand is lost. [benchmarks/README.md](benchmarks/README.md) says how each part
measures. Reasons for a miss are kept in `benchmarks/notes.toml`."""


def read(folder: Path) -> dict[str, dict]:
  """The documents of a folder, by part, in the order of the report.

  Raises:
    ValueError: a file that no part leaves.
  """
  paths = {path.stem: path for path in folder.glob("*.json")}
  if unknown := paths.keys() - _SHOWN.keys():
    raise ValueError(f"{paths[min(unknown)]}: no part leaves that")
  return {
    part: json.loads(paths[part].read_text())
    for part in _SHOWN
    if part in paths
  }


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
  judged = {
    part: document
    for part, document in documents.items()
    if not document.get("quick") and document.get("scale") != "small"
  }
  if judged.keys() != documents.keys():
    parts.append("**A smoke test at reduced sizes: its numbers say nothing.**")
  parts += ["## Targets", str(_targets(judged, notes))]
  for part, document in documents.items():
    parts += [f"## {part.replace('_', ' ').capitalize()}", _origin(document)]
    for table in _SHOWN[part].tables(document):
      parts += [f"### {table.title}", str(table)]
  return "\n\n".join(part for part in parts if part) + "\n"


def _origin(document: dict) -> str:
  """How a part came about; one of another machine may say less."""
  if "command" not in document:
    return ""
  versions = document["versions"].items()
  return "\n".join(
    (
      f"- command: `{document['command']}`",
      f"- date: {document['date']}, commit {document['commit']}, took"
      f" {document['seconds']:,.0f} s",
      f"- machine: {document['machine']}; load before it began:"
      f" {document['load_before']:.2f}",
      "- versions: " + ", ".join(f"{name} {text}" for name, text in versions),
    )
  )


def _targets(documents: Documents, notes: Mapping[str, str]) -> results.Table:
  rows = []
  for target in TARGETS:
    figure = target.figure(documents)
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
