"""Training problems that are also, or nearly, problems of a benchmark.

A training problem is contaminated where its words are those of a benchmark's
problem, or where thirteen of them in a row are. Runs of words that many
problems share say nothing ("where m and n are relatively prime positive
integers. Find m + n."): a run that stands in more than ten training problems
does not count. A statement of fewer words than thirteen counts whole.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from trd_jax.experiment.records import Problem

NGRAM = 13
COMMON = 10  # a run in more training problems than this identifies none

_WORD = re.compile(r"\w+")

Kind = Literal["same text", "same words", "13 words in a row"]


@dataclasses.dataclass(frozen=True)
class Overlap:
  """One training problem that a benchmark holds, too.

  Attributes:
    problem_id: the training problem.
    benchmark: the benchmark's name.
    other_id: the benchmark's problem.
    kind: how alike they are, the strongest that holds: the text but for white
      space, the words, or thirteen words in a row.
    shared: the words in a row that they share; the whole statement's if `kind`
      is not the last.
  """

  problem_id: str
  benchmark: str
  other_id: str
  kind: Kind
  shared: str


def words(text: str) -> list[str]:
  """Splits a statement into words (letters, digits, _), in lower case."""
  return _WORD.findall(text.lower())


def runs(sequence: Sequence[str], length: int = NGRAM) -> Iterable[str]:
  """Yields every run of so many words; the whole where there are fewer."""
  for start in range(max(1, len(sequence) - length + 1)):
    yield " ".join(sequence[start : start + length])


def _dense(text: str) -> str:
  """Drops white space, in which copies of a data set differ."""
  return "".join(text.split())


def find(
  problems: Sequence[Problem], benchmarks: Mapping[str, Sequence[Problem]]
) -> list[Overlap]:
  """Finds training problems that overlap with benchmarks, once each.

  Args:
    problems: to train on.
    benchmarks: problems by the name of their benchmark; one that comes first
      is reported first.

  Returns:
    In the order of `problems`; for each the first benchmark with the strongest
    kind of overlap.
  """
  # Indexed by the benchmarks' few thousand problems, not by the training
  # problems: these may be many, and only runs that both have are kept.
  texts: dict[str, tuple[str, str]] = {}
  statements: dict[str, tuple[str, str]] = {}
  owners: dict[str, tuple[str, str]] = {}
  for name, others in benchmarks.items():
    for other in others:
      found = words(other.text)
      if not found:
        continue
      where = name, other.problem_id
      texts.setdefault(_dense(other.text), where)
      statements.setdefault(" ".join(found), where)
      for run in runs(found):
        owners.setdefault(run, where)
  # Of every run that a benchmark has, the training problems that have it.
  holders: dict[str, int] = collections.Counter()
  shared: dict[str, list[str]] = {}
  for problem in problems:
    found = dict.fromkeys(
      run for run in runs(words(problem.text)) if run in owners
    )
    holders.update(found.keys())  # type: ignore[attr-defined]
    shared[problem.problem_id] = list(found)
  overlaps = []
  for problem in problems:
    said = " ".join(words(problem.text))
    # In two passes, as how common a run is shows only after all problems.
    telling = (
      run for run in shared[problem.problem_id] if holders[run] <= COMMON
    )
    kind: Kind
    if where := texts.get(_dense(problem.text)):
      kind, run = "same text", said
    elif where := statements.get(said):
      kind, run = "same words", said
    elif (run := next(telling, None)) is not None:
      kind, where = "13 words in a row", owners[run]
    else:
      continue
    overlaps.append(Overlap(problem.problem_id, *where, kind, run))
  return overlaps
