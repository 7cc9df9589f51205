"""The inspector's list: a run's problems and trajectories, as columns.

It lies in the page itself, so it holds numbers and no texts but the first
characters of each problem. An entry is a draft y_o with what was made of it;
a problem without a draft has one entry, too.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from trd_jax.analyze.runs import Run
from trd_jax.experiment.records import NO_VERDICT

HEAD = 56
"""Characters of a problem that the list shows."""

NONE, WRONG, RIGHT, NO_GRADE = range(4)
"""What a verdict is in the columns: no text, wrong, right, not judged."""

CUT_DRAFT, CUT_REFINED, LEAK = 1, 2, 4
"""Flags of an entry: a text was cut off, or speaks of the draft."""


@dataclasses.dataclass
class Entry:
  """A draft and what was made of it.

  Attributes:
    problem: its problem's number.
    sample: which of the problem's drafts it is, from 0.
    draft: its row among `Run.trajectories("rollout")`, None without one.
    refined: the row among `Run.trajectories("refine")` that was made of it.
  """

  problem: int
  sample: int = 0
  draft: Mapping[str, Any] | None = None
  refined: Mapping[str, Any] | None = None

  @property
  def cell(self) -> int:
    """Returns both verdicts as one number, the draft's times four."""
    return 4 * _verdict(self.draft) + _verdict(self.refined)


@dataclasses.dataclass
class Catalogue:
  """A run's problems and entries.

  Attributes:
    ids: the problems' ids.
    texts: the problems' texts; ids of rows whose problem isn't there have "".
    answers: their gold answers.
    entries: all of them, by problem.
    by_draft: an entry's number by the key of its y_o.
    by_refined: by the key of its y_r.
    by_problem: the number of a problem's first entry, by the problem's number.
  """

  ids: list[str]
  texts: list[str]
  answers: list[str]
  entries: list[Entry]
  by_draft: dict[str, int]
  by_refined: dict[str, int]
  by_problem: dict[int, int]


def read(run: Run) -> Catalogue:
  """Reads a run's list, however far the run is.

  Raises:
    UserError: a shard is damaged, or gone.
  """
  table = run.table("problems", ["problem_id", "text", "answer"])
  ids, texts, answers = (table[name].to_pylist() for name in table.column_names)
  number = {name: n for n, name in enumerate(ids)}

  def problem(row: Mapping[str, Any]) -> int:
    name = row["problem_id"]
    if name not in number:  # the problems' rows are gone, or another source's
      number[name] = len(ids)
      ids.append(name)
      texts.append("")
      answers.append("")
    return number[name]

  of_problem: dict[int, list[Entry]] = defaultdict(list)
  by_key: dict[str, Entry] = {}
  for row in _rows(run.trajectories("rollout")):
    entries = of_problem[problem(row)]
    entries.append(Entry(problem(row), len(entries), draft=row))
    by_key[row["key"]] = entries[-1]
  for row in _rows(run.trajectories("refine")):
    entry = by_key.get(row["draft_key"] or "")
    if entry is None or entry.refined is not None:
      entries = of_problem[problem(row)]
      entry = Entry(problem(row), len(entries))
      entries.append(entry)
    entry.refined = row
  found = Catalogue(ids, texts, answers, [], {}, {}, {})
  for n in range(len(ids)):
    found.by_problem[n] = len(found.entries)
    for entry in of_problem.get(n) or [Entry(n)]:
      if entry.draft is not None:
        found.by_draft[entry.draft["key"]] = len(found.entries)
      if entry.refined is not None:
        found.by_refined[entry.refined["key"]] = len(found.entries)
      found.entries.append(entry)
  return found


def choose(
  found: Catalogue, most: int | None, first: Collection[int]
) -> set[int]:
  """Chooses the entries whose texts the report holds.

  Args:
    found: the list.
    most: how many, None for all.
    first: entries that come before all others.

  Returns:
    Their numbers: those that come first, then as many of each outcome cell as
    there are, or as many as of the others, evenly over the list.
  """
  if most is None or most >= len(found.entries):
    return set(range(len(found.entries)))
  chosen = set(sorted(first)[:most])
  cells: dict[int, list[int]] = defaultdict(list)
  for n, entry in enumerate(found.entries):
    if n not in chosen:
      cells[entry.cell].append(n)
  # The smallest cell first: what it can't fill is left to the others.
  left = most - len(chosen)
  for place, cell in enumerate(sorted(cells, key=lambda c: len(cells[c]))):
    members = cells[cell]
    share = min(len(members), left // (len(cells) - place))
    chosen.update(
      members[i * len(members) // share] for i in range(share) if share
    )
    left -= share
  return chosen


def columns(
  found: Catalogue,
  reasons: Sequence[str],
  leaks: Collection[int],
  divergences: Mapping[int, float],
) -> dict[str, Any]:
  """Returns the columns of the list, as the page reads them.

  Args:
    found: the list.
    reasons: the names that the numbers of reasons stand for.
    leaks: entries whose y_r speaks of a draft or a reference.
    divergences: the mean divergence of those that were scored.
  """
  entries = found.entries
  code = {name: n for n, name in enumerate(reasons)}

  def of(side: str, name: str) -> Iterator[Any]:
    for entry in entries:
      row = getattr(entry, side)
      yield None if row is None else row[name]

  flags = []
  for n, entry in enumerate(entries):
    flag = LEAK if n in leaks else 0
    flag |= CUT_DRAFT if entry.draft and entry.draft["truncated"] else 0
    flag |= CUT_REFINED if entry.refined and entry.refined["truncated"] else 0
    flags.append(flag)
  return {
    "ids": found.ids,
    "heads": [" ".join(one[: 2 * HEAD].split())[:HEAD] for one in found.texts],
    "problem": [entry.problem for entry in entries],
    "sample": [entry.sample for entry in entries],
    "cell": [entry.cell for entry in entries],
    "draft": [-1 if n is None else n for n in of("draft", "tokens")],
    "refined": [-1 if n is None else n for n in of("refined", "tokens")],
    "flags": flags,
    "draft_reason": [code.get(one, -1) for one in of("draft", "reason")],
    "refined_reason": [code.get(one, -1) for one in of("refined", "reason")],
    "divergence": {str(n): _short(d) for n, d in sorted(divergences.items())},
  }


def _short(value: float) -> float:
  return float(f"{value:.4g}")


def _verdict(row: Mapping[str, Any] | None) -> int:
  if row is None:
    return NONE
  if row["correct"] is None or row["reason"] in NO_VERDICT:
    return NO_GRADE
  return RIGHT if row["correct"] else WRONG


def _rows(table: pa.Table) -> Iterator[Mapping[str, Any]]:
  """Yields the rows of a table, some at a time."""
  for batch in table.to_batches(max_chunksize=4096):
    yield from batch.to_pylist()
