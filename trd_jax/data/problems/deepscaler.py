"""DeepScaleR: some forty thousand competition problems, few with solutions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trd_jax.data import final_answer
from trd_jax.data.problems import rows, sources
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import Problem, Rejected
from trd_jax.experiment.schema import Data

HUB = sources.Hub("agentica-org/DeepScaleR-Preview-Dataset", "deepscaler.json")
_STEMS = ("deepscaler", "deepscaler_merged", "train")


def load(data: Data) -> tuple[list[Problem], list[Rejected]]:
  """Reads the corpus from `data.root` (a file or a folder) or from the hub.

  A row's `solution` is kept where it says more than the answer does: these
  rows are the subset `with_cot`, the others `answer_only` (Appendix B.1).

  Raises:
    UserError: the file is missing, unreadable or empty.
  """
  if data.root is None:
    found = sources.fetch(HUB, "data.source=deepscaler")[1]
  else:
    found = files(data.root)
  return rows.collect("deepscaler", found, _problem)


def files(root: str | None) -> list[Path]:
  """Lists the local files that the corpus is read from.

  Raises:
    UserError: none is there, or there are several and none has its name.
  """
  assert root is not None
  path = sources.local_root(root)
  if path.is_file():
    return [path]
  for stem in _STEMS:
    if found := sources.in_folder(path, stem):
      return [found]
  every = sources.data_files(path)
  if len(every) != 1:
    raise UserError(
      f"data.root={root}: {len(every)} data files and none is called "
      f"{' or '.join(_STEMS)}; give the file itself"
    )
  return every


def _problem(row: Mapping[str, Any]) -> Problem:
  """Makes a problem of a row; a solution that only repeats the answer goes."""
  problem = rows.to_problem(row, "deepscaler")
  # Many rows have the answer again as their solution: nothing to show a
  # teacher.
  if problem.solution and not _says_more(problem.solution, problem.answer):
    return rows.to_problem({**row, "solution": None}, "deepscaler")
  return problem


def _says_more(solution: str, answer: str) -> bool:
  """Returns whether a solution is more than the answer, in a box or not."""
  return rows.comparable(final_answer.unboxed(solution)) != rows.comparable(
    answer
  )


SOURCE = sources.Source(load, files, hub=(HUB,), in_paper="40,245")
