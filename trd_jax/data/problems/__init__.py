"""Problems from every source, through one door."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trd_jax.data.problems import (
  arithmetic,
  benchmarks,
  deepscaler,
  jsonl,
  taco,
)
from trd_jax.experiment.errors import UserError, did_you_mean
from trd_jax.experiment.records import Problem, Rejected, content_key
from trd_jax.experiment.sections import Data

SUBSETS = ("all", "with_cot", "answer_only")


def read(data: Data) -> tuple[list[Problem], list[Rejected]]:
  """Reads all problems of a source, and its rows that were set aside.

  Args:
    data: `source` is 'arithmetic', 'deepscaler', 'taco', 'jsonl' or a key of
      `benchmarks.BENCHMARKS`; `root` its local copy.

  Returns:
    Problems in the order of their source, with distinct ids, and the rows
    that were set aside, each with its reason.

  Raises:
    UserError: an unknown name, a missing or empty file, or no usable problem.
  """
  loaders = {
    "arithmetic": arithmetic.load,
    "deepscaler": deepscaler.load,
    "jsonl": jsonl.load,
    "taco": taco.load,
    **dict.fromkeys(benchmarks.BENCHMARKS, benchmarks.load),
  }
  name = benchmarks.canonical(data.source)
  if name not in loaders:
    raise UserError(
      f"data.source={data.source}: no such source; "
      f"{did_you_mean(name, loaders)}"
    )
  problems, rejected = loaders[name](data)
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
    UserError: they aren't there, or the source can't do without a root.
  """
  name = benchmarks.canonical(data.source)
  if name == "jsonl":
    return jsonl.files(data.root)
  if data.root is None:
    return []
  if name in benchmarks.BENCHMARKS:
    return [file.path for file in benchmarks.find(name, data.root)]
  files = {"deepscaler": deepscaler.files, "taco": taco.files}
  return files[name](data.root) if name in files else []


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
