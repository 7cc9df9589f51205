"""The inspector's texts: what a run's problems, y*, y_o and y_r say.

They are read a shard at a time and go straight into pieces, so that a report
of 40,000 problems needs the memory of a shard. Each kind of text is a family of
pieces; `Where` says which row of it an entry's text is.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from trd_jax.analyze.report.catalogue import Catalogue
from trd_jax.analyze.report.pieces import Family
from trd_jax.analyze.runs import Run
from trd_jax.data.chat import Chat
from trd_jax.data.leakage import mentions_reference
from trd_jax.data.problems.arithmetic_steps import first_wrong_step
from trd_jax.experiment.records import Problem

_TEXTS = ("problem_id", "text", "correct", "reason", "extracted", "detail")
_SAID = ("model", "model_revision", "sampling", "seed", "thinking")


@dataclasses.dataclass
class Where:
  """Rows of families by entry, and what was seen on the way.

  Attributes:
    draft: an entry's row among the texts y_o.
    refined: its row among the texts y_r.
    reference: a problem's row among the texts y*.
    leaks: entries whose y_r speaks of a draft or a reference.
  """

  draft: dict[int, int]
  refined: dict[int, int]
  reference: dict[int, int]
  leaks: set[int]


def units(text: str) -> int:
  """Returns how many UTF-16 units a text has: what JavaScript counts."""
  return len(text) + sum(character > "\uffff" for character in text)


def write(
  run: Run,
  found: Catalogue,
  chosen: Collection[int],
  family: Callable[[str], Family],
  chat: Chat | None,
) -> Where:
  """Writes the texts of the chosen entries, and all problems.

  Args:
    run: where they lie.
    found: its list.
    chosen: numbers of entries.
    family: makes a family of pieces by its name.
    chat: the student's tokenizer, which knows where a draft was cut.

  Raises:
    UserError: a shard is damaged, or the folder can't be written.
  """
  where = Where({}, {}, {}, set())
  problems = family("x")
  for text, answer in zip(found.texts, found.answers, strict=True):
    problems.add([text, answer])
  _write_references(run, found, chosen, family("s"), where)
  _write_drafts(run, found, chosen, family("o"), where, chat)
  _write_refined(run, found, chosen, family("r"), where)
  return where


def _write_references(
  run: Run,
  found: Catalogue,
  chosen: Collection[int],
  family: Family,
  where: Where,
) -> None:
  """Writes y* of the problems of the chosen entries."""
  number = {
    found.ids[found.entries[n].problem]: found.entries[n].problem
    for n in chosen
  }
  columns = ("problem_id", "solution", "answer")
  for row in run.rows("problems", columns, frozenset(number)):
    text = row["solution"] or row["answer"]
    if text:
      problem = number[row["problem_id"]]
      wrong = wrong_step(_problem(run, found, problem), text)
      where.reference[problem] = family.add([text, wrong])


def _write_drafts(
  run: Run,
  found: Catalogue,
  chosen: Collection[int],
  family: Family,
  where: Where,
  chat: Chat | None,
) -> None:
  keys = {k: n for k, n in found.by_draft.items() if n in chosen}
  for row in run.rows("rollout", (*_TEXTS, *_SAID), frozenset(keys)):
    n = keys[row["key"]]
    refined = found.entries[n].refined
    lost = refined["draft_elided_tokens"] if refined else 0
    cut = _cut(row["text"], lost, chat) if lost else None
    where.draft[n] = family.add([*_graded(run, found, n, row), cut])


def _write_refined(
  run: Run,
  found: Catalogue,
  chosen: Collection[int],
  family: Family,
  where: Where,
) -> None:
  columns = (*_TEXTS, *_SAID, "draft_elided_tokens")
  # All of them are read: that one speaks of its draft is in the list.
  for row in run.rows("refine", columns, frozenset(found.by_refined)):
    n = found.by_refined[row["key"]]
    leak = mentions_reference(row["text"])
    if leak:
      where.leaks.add(n)
    if n in chosen:
      where.refined[n] = family.add(
        [*_graded(run, found, n, row), row["draft_elided_tokens"], leak]
      )


def _graded(
  run: Run, found: Catalogue, n: int, row: Mapping[str, Any]
) -> list[Any]:
  """Returns what both kinds of trajectories have, in the page's order."""
  problem = _problem(run, found, found.entries[n].problem)
  return [
    row["text"],
    row["correct"],
    row["reason"],
    row["extracted"],
    row["detail"],
    wrong_step(problem, row["text"]),
    {name: row[name] for name in _SAID} | {"key": row["key"]},
  ]


def wrong_step(problem: Problem, text: str) -> list[Any] | None:
  """Returns the first wrong step: its start, its end, and what is right.

  Both are counted as JavaScript counts. None: there is none, or nobody knows.
  """
  wrong = first_wrong_step(problem, text)
  if wrong is None:
    return None
  start = units(text[: wrong.offset])
  end = start + units(text[wrong.offset : wrong.end])
  return [start, end, wrong.right]


def _problem(run: Run, found: Catalogue, number: int) -> Problem:
  return Problem(
    problem_id=found.ids[number],
    text=found.texts[number],
    answer=found.answers[number],
    solution=None,
    domain=run.config.domain,  # type: ignore[arg-type]  # its rule says so
    source="",
    tests=None,
    meta="{}",
  )


def _cut(text: str, lost: int, chat: Chat | None) -> list[int] | None:
  """Returns which characters of a draft its refinement prompt left out.

  The middle, as `prompts.PromptSet` cuts it, to a few tokens.
  """
  if chat is None:
    return None
  ids = chat.encode(text)
  start = max((len(ids) - lost + 1) // 2, 0)
  texts = chat.token_texts(ids)
  before = units("".join(texts[:start]))
  return [before, before + units("".join(texts[start : start + lost]))]
