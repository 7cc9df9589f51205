"""The benchmarks: what they are called, where they are, and what is in them.

A benchmark is whole or it isn't used: its number of questions is declared
here and, for the files whose SHA-256 is known, that too. Where no revision is
given the hub's newest is taken; the commit that this came to is recorded.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trd_jax.data.problems import amo, evalplus, livecodebench, rows, sources
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import Problem, Rejected
from trd_jax.experiment.schema import Data

Build = Callable[[Mapping[str, Any], str], Problem | None]

# Some copies carry a prompt's instruction at the end of each statement.
_INSTRUCTION = re.compile(
  r"\s*Please reason step by step,? and put your final answer within "
  r"\\boxed\{\}\.?\s*$"
)


def _problem(row: Mapping[str, Any], name: str) -> Problem:
  text = _INSTRUCTION.sub("", rows.statement(row)).strip()
  if not text:
    raise rows.BadRow("no problem")
  return rows.to_problem(row, name, text=text)


def _gsm8k(row: Mapping[str, Any], name: str) -> Problem:
  """Reads a row of GSM8K.

  Its `answer` holds the worked solution and, after `####`, the answer.
  """
  text = rows.answer_text(row.get("answer"))
  if "####" not in text:
    raise rows.BadRow("no #### before the answer")
  answer, solution = rows.worked_answer(text)
  return rows.to_problem(
    row, name, answer=rows.answer_text(answer), solution=solution
  )


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """All that is known of a benchmark: an entry of `BENCHMARKS`.

  Attributes:
    rows: how many questions it has.
    stems: local files without their suffix; the benchmark is all of them.
    hub: where to download them, all of them again; or else
    urls: where to download them, with a known SHA-256 each.
    sha256: of local files whose content is known, by name.
    build: makes a problem of a row.
    grader: the name of what judges its answers, in `grading.graders`.
    part_of: the benchmark whose questions these are some of.
    whole_message: whether a question says in which form the answer is to be
      given, so that nothing is to be added to it.
    has_tool: whether its grader has prompts of its own (`Grader.official`).
  """

  rows: int
  stems: tuple[str, ...]
  hub: tuple[sources.Hub, ...] = ()
  urls: tuple[str, ...] = ()
  sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)
  build: Build = _problem
  grader: str = "math"
  part_of: str | None = None
  whole_message: bool = False
  has_tool: bool = False


@dataclasses.dataclass(frozen=True)
class File:
  """One file of a benchmark on this machine.

  Attributes:
    path: where it is.
    origin: the hub's data set or the address that it comes from; None for a
      local copy.
    revision: the commit of the hub's data set.
  """

  path: Path
  origin: str | None = None
  revision: str | None = None


_PARQUET = "data/*.parquet"
_LCB = "livecodebench/code_generation_lite"
_LCB_FILES = ("test", "test2", "test3", "test4", "test5", "test6")
_RELEASES = "https://github.com/evalplus"
BENCHMARKS: Mapping[str, Benchmark] = {
  "aime24": Benchmark(
    30,
    ("matharena_aime_2024_I", "matharena_aime_2024_II"),
    (
      sources.Hub("MathArena/aime_2024_I", _PARQUET),
      sources.Hub("MathArena/aime_2024_II", _PARQUET),
    ),
    sha256={
      "matharena_aime_2024_I.jsonl": (
        "40fdf6d5ec1dce04cddd1decae3fb7e02ce6bcb511880d02f98132e14ad1520e"
      ),
      "matharena_aime_2024_II.jsonl": (
        "9f866e814370e44668a6f7fa5b193370b72abc0d4927aa4aeea6aba7a45f1a66"
      ),
    },
  ),
  "aime25": Benchmark(
    30,
    ("matharena_aime_2025_I", "matharena_aime_2025_II"),
    (sources.Hub("MathArena/aime_2025", _PARQUET),),
    sha256={
      "matharena_aime_2025_I.jsonl": (
        "035d35e2c39e655552b09932f7032d0a1954f72b79d5e63f5396addfe9b8ce4d"
      ),
      "matharena_aime_2025_II.jsonl": (
        "cba2de9372128232223ce5e260a718ea0529d7788c29cd48acf66924013dfa3b"
      ),
    },
  ),
  "hmmt25": Benchmark(
    30,
    ("matharena_hmmt_feb_2025",),
    (sources.Hub("MathArena/hmmt_feb_2025", _PARQUET),),
    sha256={
      "matharena_hmmt_feb_2025.jsonl": (
        "4909c00ff08b46cc38add3ee5ba158123b19a5ac16adf51a4cc85faa528454fa"
      )
    },
  ),
  "beyondaime": Benchmark(
    100,
    ("beyondaime",),
    (sources.Hub("ByteDance-Seed/BeyondAIME", "*.parquet"),),
    sha256={
      "beyondaime.jsonl": (
        "13155e68ca9c9896126cfa649f4c175ece1866562172f5e8aecda01df9dd4b62"
      )
    },
  ),
  "amobench": Benchmark(
    len(amo.PARSED),
    ("amobench",),
    (sources.Hub("meituan-longcat/AMO-Bench", "*.parquet"),),
    build=amo.problem,
    grader="formulas",
    whole_message=True,
  ),
  "math500": Benchmark(
    500,
    ("math500",),
    (sources.Hub("HuggingFaceH4/MATH-500", "test.jsonl"),),
    sha256={
      "math500.jsonl": (
        "5b126695a919f8fb40edffaf2e748ae08f7fb6ce0721211671c760b4f0b7c5de"
      )
    },
  ),
  "gsm8k": Benchmark(
    1319,
    ("gsm8k_test",),
    (sources.Hub("openai/gsm8k", "main/test-*.parquet"),),
    sha256={
      "gsm8k_test.jsonl": (
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"
      )
    },
    build=_gsm8k,
  ),
  "humanevalplus": Benchmark(
    164,
    ("HumanEvalPlus",),
    urls=(
      f"{_RELEASES}/humanevalplus_release/releases/download/v0.1.10/"
      "HumanEvalPlus.jsonl.gz",
    ),
    sha256={
      "HumanEvalPlus.jsonl.gz": (
        "272720b90ac375502c8ed23cd791c2a93dfb22a911641a494da74a426c09f101"
      )
    },
    build=evalplus.problem,
    grader="evalplus",
    has_tool=True,
  ),
  "mbppplus": Benchmark(
    378,
    ("MbppPlus",),
    urls=(
      f"{_RELEASES}/mbppplus_release/releases/download/v0.2.0/"
      "MbppPlus.jsonl.gz",
    ),
    sha256={
      "MbppPlus.jsonl.gz": (
        "af43697e8791c4c149bdfd6b489d8b5412507551ac20e28a439f650b8225db63"
      )
    },
    build=evalplus.problem,
    grader="evalplus",
    has_tool=True,
  ),
  # A release holds all files before it too; see `evaluate.livecodebench`.
  "livecodebench": Benchmark(
    1055,
    tuple(f"livecodebench/{stem}" for stem in _LCB_FILES),
    tuple(sources.Hub(_LCB, f"{stem}.jsonl") for stem in _LCB_FILES),
    build=livecodebench.problem,
    grader="lcb_runner",
    has_tool=True,
  ),
  "livecodebenchv6": Benchmark(
    175,
    (f"livecodebench/{_LCB_FILES[-1]}",),
    (sources.Hub(_LCB, f"{_LCB_FILES[-1]}.jsonl"),),
    build=livecodebench.problem,
    grader="lcb_runner",
    has_tool=True,
    part_of="livecodebench",
  ),
}


def canonical(name: str) -> str:
  """Spells a name one way: `MATH-500` is `math500`, and `+` is `plus`."""
  return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "plus"))


def published(name: str) -> str:
  """Returns the canonical name of the benchmark that questions come from."""
  name = canonical(name)
  entry = BENCHMARKS.get(name)
  return (entry and entry.part_of) or name


def load(data: Data) -> tuple[list[Problem], list[Rejected]]:
  """Reads the benchmark `data.source`, a key of `BENCHMARKS`, whole.

  `data.root` is one file, or a folder that holds the benchmark's files (by
  the names in `BENCHMARKS`, or one called after the benchmark).

  Raises:
    UserError: a file is missing, unreadable or empty.
  """
  name = canonical(data.source)
  return read(name, find(name, data.root))


def read(
  name: str, files: Sequence[File]
) -> tuple[list[Problem], list[Rejected]]:
  """Reads the questions of a benchmark, and the rows that can't be used.

  Args:
    name: a key of `BENCHMARKS`.
    files: what `find` gave.

  Raises:
    UserError: a file is unreadable or empty.
  """
  build = BENCHMARKS[name].build
  paths = [file.path for file in files]
  return rows.collect(name, paths, lambda row: build(row, name))


def source(name: str) -> sources.Source:
  """Returns a benchmark, a key of `BENCHMARKS`, as a source of problems."""
  return sources.Source(
    load,
    lambda root: [file.path for file in find(name, root)],
    hub=BENCHMARKS[name].hub,
    urls=_digests(BENCHMARKS[name]),
  )


def _digests(benchmark: Benchmark) -> dict[str, str]:
  """Returns the known SHA-256 of what is at each address."""
  return {
    url: benchmark.sha256[url.rpartition("/")[2]] for url in benchmark.urls
  }


def find(name: str, root: str | None, key: str = sources.ROOT) -> list[File]:
  """Finds the files of a benchmark, in a local copy or downloaded.

  Args:
    name: a key of `BENCHMARKS`.
    root: see `load`; None downloads them.
    key: what gave the root, in an error.

  Raises:
    UserError: one is missing.
  """
  benchmark = BENCHMARKS[name]
  if root is None:
    return _downloaded(name, benchmark, key)
  path = sources.local_root(root, key=key)
  if path.is_file():
    return [File(path)]
  found = {stem: sources.in_folder(path, stem) for stem in benchmark.stems}
  files = [File(file) for file in found.values() if file]
  if len(files) == len(found):
    return files
  # A single file called after the benchmark counts only where none of its own
  # is there: half of the files is a mistake, not another format.
  if not files and (own := sources.in_folder(path, name)):
    return [File(own)]
  missing = " and ".join(stem for stem, file in found.items() if not file)
  raise UserError(
    f"benchmark {name}: {path} lacks {missing} ({', '.join(sources.SUFFIXES)});"
    f" put it there, or leave {key} out to download it"
  )


def would_fetch(name: str) -> bool:
  """Returns whether `find` would fetch from addresses what isn't here yet.

  Args:
    name: a key of `BENCHMARKS`.
  """
  return not all(
    sources.cached(url, digest).is_file()
    for url, digest in _digests(BENCHMARKS[name]).items()
  )


def _downloaded(name: str, benchmark: Benchmark, key: str) -> list[File]:
  what = f"benchmark {name}"
  files = []
  for hub in benchmark.hub:
    commit, paths = sources.fetch(hub, what, key)
    files += [File(path, hub.repo_id, commit) for path in paths]
  for url, digest in _digests(benchmark).items():
    files.append(File(sources.download(url, digest, what, key), url))
  return files


def record(
  name: str, files: Sequence[File], count: int, unchecked: bool = False
) -> dict[str, Any]:
  """Checks what was read for a benchmark and returns what to record of it.

  Args:
    name: a key of `BENCHMARKS`.
    files: what `find` gave.
    count: how many questions were in them.
    unchecked: let another number and other files pass.

  Returns:
    `rows`, and `files` with `name`, `sha256`, `origin` and `revision` each.

  Raises:
    UserError: a file isn't the one of its name, or the count differs.
  """
  benchmark = BENCHMARKS[name]
  found = []
  for file in files:
    digest = sources.sha256(file.path)
    # A file of another name or kind has no digest here: its number of questions
    # must do.
    known = benchmark.sha256.get(file.path.name, digest)
    if digest != known and not unchecked:
      raise UserError(
        f"benchmark {name}: {file.path} has SHA-256 {digest}, not {known}: it"
        " is another version or damaged; fetch it again, or set"
        " --config.evaluate.unchecked=True"
      )
    found.append(
      {
        "name": file.path.name,
        "sha256": digest,
        "origin": file.origin,
        "revision": file.revision,
      }
    )
  if count != benchmark.rows and not unchecked:
    where = ", ".join(str(file.path) for file in files)
    raise UserError(
      f"benchmark {name}: {count} questions in {where}, and it has"
      f" {benchmark.rows}; fetch it again, or set"
      " --config.evaluate.unchecked=True"
    )
  return {"rows": count, "files": found}
