"""Puts the report together and writes it."""

import base64
import hashlib
import html
import string
import uuid
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from trd_jax.analyze import look
from trd_jax.analyze.analysis import Result
from trd_jax.analyze.report import (
  card,
  catalogue,
  details,
  evaluations,
  pieces,
  sections,
  token_scores,
)
from trd_jax.analyze.report.escaping import json_text, text
from trd_jax.analyze.report.pieces import Family
from trd_jax.analyze.runs import Run
from trd_jax.data.chat import Chat
from trd_jax.experiment import printing
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files.atomic_files import atomic_file
from trd_jax.generation import chat_model

_GENERATOR = '<meta name="generator" content="trd-jax report">'
# In this order: a script knows the ones before it.
_SCRIPTS = (
  *("visible", "differences", "pieces", "text_pane", "shading"),
  *("list", "trajectory", "samples", "main"),
)


def write(
  runs: Sequence[Run],
  results: Mapping[str, Result],
  folder: Path,
  inspect: int | None = 2000,
) -> None:
  """Writes the report: `folder/index.html` and `folder/pieces/*.js`.

  The pieces of an earlier report are removed once the new page is there.

  Args:
    runs: the run, and those that it is compared with.
    results: what each analysis made of them, by its name.
    folder: of the report; figures and tables lie beside it.
    inspect: how many trajectories of each run have their texts in the report,
      None for all.

  Raises:
    UserError: a run is damaged, the folder can't be written, or it holds an
      index.html that is no report of ours.
  """
  index = folder / "index.html"
  _check_ours(index)
  build = uuid.uuid4().hex[:8]
  families: list[Family] = []
  lists: list[dict[str, Any]] = []
  first: set[str] = set()
  for number, run in enumerate(runs):
    made = _Inspected(run, number, build, folder / "pieces", inspect, first)
    families += made.families
    lists.append(made.list)
    first = first or made.problems
  data = {"build": build, "runs": lists, "head": catalogue.HEAD}
  made = _page(runs, results, folder.parent, data)
  try:
    with atomic_file(index) as file:
      file.write(made.encode("utf-8", "backslashreplace"))
  except OSError as error:
    raise UserError(
      f"{index} cannot be written ({error.strerror or error}): make room or"
      " correct it, and give the same command again"
    ) from error
  kept = [path for family in families for path in family.files]
  pieces.remove_others(folder / "pieces", kept)


class _Inspected:
  """Writes the pieces of one run.

  Args:
    run: the run.
    number: its number among all.
    build: see `Family`.
    folder: of the pieces.
    most: how many entries get their texts.
    first: ids of problems whose entries come before others.

  Attributes:
    families: what was written.
    list: the run's part of the page's data.
    problems: ids of the problems of the chosen entries.
  """

  def __init__(
    self,
    run: Run,
    number: int,
    build: str,
    folder: Path,
    most: int | None,
    first: set[str],
  ):
    self.families: list[Family] = []

    def family(name: str) -> Family:
      made = Family(folder, build, f"r{number}-{name}")
      self.families.append(made)
      return made

    found = catalogue.read(run)
    scores = token_scores.read(run, found)
    notes = []
    chat = _chat(run, notes)
    scored = {one.of for one in scores.rows.values()}
    same = {
      n for n, e in enumerate(found.entries) if found.ids[e.problem] in first
    }
    chosen = catalogue.choose(found, most, sorted(scored) + sorted(same))
    self.problems = {found.ids[found.entries[n].problem] for n in chosen}
    where = details.write(run, found, chosen, family, chat)
    if chat is not None:
      token_scores.write(run, scores, chat, family)
    elif scores.rows:
      notes.append("Token scores are left out: the tokenizer isn't here.")
    asked = evaluations.write(run, most, family)
    for one in self.families:
      one.flush()
    reasons = sorted(
      {
        row["reason"]
        for entry in found.entries
        for row in (entry.draft, entry.refined)
        if row is not None
      }
    )
    along = run.config.trains_on
    means = token_scores.divergences(scores, along)
    self.list = {
      "label": run.label,
      "refined": "teacher" if along == "teacher" else "y_r",
      "reasons": reasons,
      "columns": catalogue.columns(
        found,
        reasons,
        where.leaks,
        {n: mean for n, (_, mean) in means.items()},
      ),
      "texts": {
        "draft": where.draft,
        "refined": where.refined,
        "reference": where.reference,
      },
      "scores": {
        "divergence": scores.divergence,
        "along": {str(n): name for n, (name, _) in means.items()},
        "scales": scores.scales,
        "part": token_scores.PART,
        "rows": [one.row() for one in scores.rows.values() if one.first >= 0],
      },
      "samples": asked,
      "starts": {one.name: one.starts for one in self.families},
      "notes": notes,
    }


def _chat(run: Run, notes: list[str]) -> Chat | None:
  """Returns the student's tokenizer, None where it isn't on this machine."""
  folders = [run.run_dir.merged, run.run_dir.adapter]
  for folder in folders:
    if (folder / "tokenizer.json").is_file():
      try:
        return Chat.load(folder)
      except UserError:
        continue
  try:
    return chat_model.open_chat(run.config.student, run.run_dir)
  except UserError as error:
    notes.append(str(error))
    return None


def _check_ours(index: Path) -> None:
  """Refuses to write over a page that is none of ours."""
  try:
    with index.open("rb") as file:
      head = file.read(4096)
  except FileNotFoundError:
    return
  except OSError as error:
    raise UserError(f"{index} can't be read ({error.strerror})") from error
  if _GENERATOR.encode() not in head:
    raise UserError(
      f"{index} is no report of trd-jax, and would be written over: move it"
      " away"
    )


def _page(
  runs: Sequence[Run],
  results: Mapping[str, Result],
  outputs: Path,
  data: dict[str, Any],
) -> str:
  script = _script()
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  policy = (
    "default-src 'none'; "
    # Pieces lie beside the page, on the disk or on the same server.
    f"script-src 'sha256-{digest}' 'self' file:; "
    "style-src 'unsafe-inline'; img-src data:; base-uri 'none';"
    " form-action 'none'"
  )
  run = runs[0]
  others = "".join(
    f'<details class="card other"><summary>{text(one.label)}</summary>'
    f"{card.html(one, {})}</details>"
    for one in runs[1:]
  )
  return string.Template(_file("page.html")).substitute(
    generator=_GENERATOR,
    policy=policy,
    style=_style(),
    title=html.escape(printing.clean(run.label)),
    heading=f"<bdi>{text(run.label)}</bdi>",
    state=text(card.state(run)),
    card=card.html(run, results),
    others=others,
    contents=sections.contents(results),
    sections=sections.html(results, outputs),
    data=json_text(data),
    script=script,
  )


def _script() -> str:
  parts = [_file(f"{name}.js") for name in _SCRIPTS]
  return '(() => {\n"use strict";\n' + "\n".join(parts) + "\n})();"


def _style() -> str:
  colors = (
    f":root {{ {look.variables(dark=False)} }}\n"
    # On paper it is always light.
    "@media screen and (prefers-color-scheme: dark) {"
    f' :root:not([data-theme="light"]) {{ {look.variables(dark=True)} }} }}\n'
    "@media screen {"
    f' :root[data-theme="dark"] {{ {look.variables(dark=True)} }} }}\n'
  )
  return colors + _file("page.css")


def _file(name: str) -> str:
  where = resources.files("trd_jax.analyze.report") / "page_files" / name
  return where.read_text("utf-8")
