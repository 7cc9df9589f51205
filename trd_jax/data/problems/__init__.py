"""Reads problems from every source, in one way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from trd_jax.data.problems import (
  arithmetic,
  benchmarks,
  deepscaler,
  jsonl,
  taco,
)
from trd_jax.data.problems.sources import Source
from trd_jax.experiment.errors import UserError, did_you_mean
from trd_jax.experiment.records import Problem, Rejected, content_key
from trd_jax.experiment.schema import Data

SUBSETS = ("all", "with_cot", "answer_only")

SOURCES: Mapping[str, Source] = {
  "arithmetic": arithmetic.SOURCE,
  "deepscaler": deepscaler.SOURCE,
  "jsonl": jsonl.SOURCE,
  "taco": taco.SOURCE,
}
"""By the name that `data.source` gives; a benchmark is a source, too."""


def source(data: Data) -> Source:
  """Returns the source that `data.source` names.

  Raises:
    UserError: there is none.
  """
  name = benchmarks.canonical(data.source)
  if name in SOURCES:
    return SOURCES[name]
  if name in benchmarks.BENCHMARKS:
    return benchmarks.source(name)
  known = (*SOURCES, *benchmarks.BENCHMARKS)
  raise UserError(
    f"data.source={data.source}: no such source; {did_you_mean(name, known)}"
  )


def read(
  data: Data, graded: bool = True
) -> tuple[list[Problem], list[Rejected]]:
  """Reads all problems of a source, and its rows that were set aside.

  Args:
    data: `source` is a key of `SOURCES` or of `benchmarks.BENCHMARKS`; `root`
      its local copy.
    graded: whether answers are graded; if not, a source whose rows have to have
      tests takes others, too.

  Returns:
    Problems in the order of their source, with distinct ids, and the rows
    that were set aside, each with its reason.

  Raises:
    UserError: an unknown name, a missing or empty file, or no usable problem.
  """
  one = source(data)
  load = one.load if graded else one.load_ungraded or one.load
  problems, rejected = load(data)
  if not problems:
    first = f", the first because: {rejected[0].reason}" if rejected else ""
    raise UserError(
      f"data.source={data.source}: no usable problem; {len(rejected)} rows "
      f"were set aside{first}"
    )
  return problems, rejected


def local_files(data: Data) -> list[Path]:
  """Lists the files under `data.root` that `read` reads; none without root.

  Raises:
    UserError: there is no such source, they aren't there, or the source can't
      do without a root.
  """
  one = source(data)
  if one.files is None or (data.root is None and not one.needs_root):
    return []
  return one.files(data.root)


def check(data: Data) -> Source:
  """Sees, without reading anything, that `data` names what there is.

  Returns:
    The source.

  Raises:
    UserError: an unknown source or subset, or what the source's own keys name.
  """
  one = source(data)
  if data.subset not in SUBSETS:
    raise UserError(
      f"data.subset={data.subset}: choose from {', '.join(SUBSETS)}"
    )
  one.check(data)
  return one


def select(problems: Sequence[Problem], data: Data) -> list[Problem]:
  """Selects the part of a source that `data` asks for.

  Args:
    problems: all of it.
    data: `subset` is 'all', 'with_cot' (with a worked solution) or
      'answer_only' (without); `limit` how many to keep, chosen by `seed`: a
      larger limit keeps what a smaller one kept.

  Raises:
    UserError: an unknown subset, or one without a problem.
  """
  if data.subset not in SUBSETS:
    raise UserError(
      f"data.subset={data.subset}: choose from {', '.join(SUBSETS)}"
    )
  chosen = list(problems)
  if data.subset != "all":
    worked = data.subset == "with_cot"
    chosen = [p for p in problems if (p.solution is not None) == worked]
    if not chosen:
      raise UserError(
        f"data.subset={data.subset}: no such problem in "
        f"data.source={data.source}; use data.subset=all"
      )
  return choose(chosen, data.limit, data.seed)


def choose(
  problems: Sequence[Problem], limit: int | None, seed: int
) -> list[Problem]:
  """Chooses at most `limit` problems, by seed, and keeps their order.

  Each problem draws a number from the seed and its own id and the smallest
  are kept, so that neither the order nor other problems matter.
  """
  if limit is None or limit >= len(problems):
    return list(problems)
  draws = {p.problem_id: content_key(seed, p.problem_id) for p in problems}
  kept = set(sorted(draws, key=lambda i: draws[i])[:limit])
  return [p for p in problems if p.problem_id in kept]
