"""The math benchmarks: from a local folder, a file, or the hub."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trd_jax.errors import UserError
from trd_jax.problems import rows
from trd_jax.records import Problem, Rejected
from trd_jax.sections import Data


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """Where a benchmark's files are.

  Attributes:
    stems: local files without their suffix; the benchmark is all of them.
    hub: data sets and the pattern of their files, all of them again.
  """

  stems: tuple[str, ...]
  hub: tuple[tuple[str, str], ...]


_PARQUET = "data/*.parquet"
BENCHMARKS = {
  "aime24": Benchmark(
    ("matharena_aime_2024_I", "matharena_aime_2024_II"),
    (
      ("MathArena/aime_2024_I", _PARQUET),
      ("MathArena/aime_2024_II", _PARQUET),
    ),
  ),
  "aime25": Benchmark(
    ("matharena_aime_2025_I", "matharena_aime_2025_II"),
    (("MathArena/aime_2025", _PARQUET),),
  ),
  "hmmt25": Benchmark(
    ("matharena_hmmt_feb_2025",), (("MathArena/hmmt_feb_2025", _PARQUET),)
  ),
  "beyondaime": Benchmark(
    ("beyondaime",), (("ByteDance-Seed/BeyondAIME", "**/*.parquet"),)
  ),
  "math500": Benchmark(
    ("math500",), (("HuggingFaceH4/MATH-500", "test.jsonl"),)
  ),
  "gsm8k": Benchmark(
    ("gsm8k_test",), (("openai/gsm8k", "main/test-*.parquet"),)
  ),
}

# Some copies carry a prompt's instruction at the end of each statement.
_INSTRUCTION = re.compile(
  r"\s*Please reason step by step,? and put your final answer within "
  r"\\boxed\{\}\.?\s*$"
)
_GSM8K_CALCULATOR = re.compile(r"<<[^<>]*>>")


def canonical(name: str) -> str:
  """`MATH-500`, `math_500` and `math500` are one name."""
  return re.sub(r"[^a-z0-9]", "", name.lower())


def load(data: Data) -> tuple[list[Problem], list[Rejected]]:
  """The benchmark `data.source`, a key of `BENCHMARKS`, whole.

  `data.root` is one file, or a folder that holds the benchmark's files (by
  the names in `BENCHMARKS`, or one called after the benchmark).

  Raises:
    UserError: a file is missing, unreadable or empty.
  """
  name = canonical(data.source)
  build = _gsm8k if name == "gsm8k" else _problem
  return rows.collect(
    name, _files(name, data.root), lambda row: build(row, name)
  )


def _files(name: str, root: str | None) -> list[Path]:
  benchmark = BENCHMARKS[name]
  if root is None:
    return [
      path
      for repo_id, pattern in benchmark.hub
      for path in rows.fetch(repo_id, pattern, f"benchmark {name}")
    ]
  path = rows.local_root(root)
  if path.is_file():
    return [path]
  found = {stem: rows.in_folder(path, stem) for stem in benchmark.stems}
  files = [file for file in found.values() if file]
  if len(files) == len(found):
    return files
  if not files and (own := rows.in_folder(path, name)):
    return [own]
  missing = " and ".join(stem for stem, file in found.items() if not file)
  raise UserError(
    f"benchmark {name}: {path} lacks {missing} ({', '.join(rows.SUFFIXES)}); "
    "put it there, or leave data.root out to download it"
  )


def _problem(row: Mapping[str, Any], name: str) -> Problem:
  text = _INSTRUCTION.sub("", rows.statement(row)).strip()
  if not text:
    raise rows.BadRow("no problem")
  return rows.to_problem(row, name, text=text)


def _gsm8k(row: Mapping[str, Any], name: str) -> Problem:
  """GSM8K keeps the worked solution and, after `####`, the answer together."""
  work, mark, answer = rows.answer_text(row.get("answer")).rpartition("####")
  if not mark:
    raise rows.BadRow("no #### before the answer")
  return rows.to_problem(
    row,
    name,
    answer=rows.answer_text(answer.replace(",", "")),
    solution=_GSM8K_CALCULATOR.sub("", work).strip() or None,
  )
