"""The problems of a run, kept in its run directory, and its benchmarks."""

import collections
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trd_jax.data import problems
from trd_jax.data.problems import arithmetic, benchmarks, overlap, rows, sources
from trd_jax.experiment.errors import UserError, did_you_mean
from trd_jax.experiment.experiment import LABORATORY, Experiment
from trd_jax.experiment.records import Problem, Rejected
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.sections import Data

STAGE = "problems"
_SHOWN = 10  # reasons for rows set aside, where no file keeps them


def load(experiment: Experiment, run_dir: RunDir) -> list[Problem]:
  """The problems that the run trains on, in the order of their ids.

  The first call reads them from their source and writes them, and the rows
  that were set aside, into the run directory; later calls, of any stage, read
  them there, so that a source that changes can't change a run.

  Raises:
    UserError: as `problems.load`; a problem's domain isn't the
      experiment's, so that prompts and grader would not fit; or as
      `check_source`.
  """
  check_source(experiment, run_dir)
  if run_dir.done(STAGE) is None:
    files = _digests(experiment.data)
    found, rejected = problems.read(experiment.data)
    print(f"problems: {rows.count(found, rejected)}", flush=True)
    for problem in found:
      if problem.domain != experiment.domain:
        own = experiment.data.source == "jsonl"
        other = 'write "domain": "arithmetic" into the rows, or '
        raise UserError(
          f"data.source={experiment.data.source} holds {problem.domain}"
          f" problems but domain={experiment.domain};"
          f" {other if own and experiment.domain == 'arithmetic' else ''}set"
          f" --config.domain={problem.domain}"
        )
    found, overlapping = _decontaminated(experiment, found)
    found = problems.select(found, experiment.data)
    rejected = [*rejected, *overlapping]
    with run_dir.shard_writer(STAGE, Problem, rows_per_shard=10_000) as writer:
      for problem in found:
        writer.add(problem)
    run_dir.write_rejected(STAGE, rejected)
    run_dir.mark_done(
      STAGE,
      {"problems": len(found), "rejected": len(rejected), "files": files},
    )
    print(
      f"problems: {len(found):,} from {experiment.data.source},"
      f" {len(rejected):,} set aside",
      flush=True,
    )
    if experiment.preflight_only:
      # The workdir is given back, and with it the file that has them all.
      for one in rejected[:_SHOWN]:
        print(f"problems: set aside: {one.reason}", flush=True)
    elif rejected:
      print(
        f"problems: the first one set aside: {rejected[0].reason}; all of them"
        f" with reasons in {run_dir.rejected(STAGE)}",
        flush=True,
      )
  return run_dir.read(STAGE, Problem)


def check_files(experiment: Experiment, run_dir: RunDir) -> None:
  """Sees that the problems' local files are there, without reading any.

  Raises:
    UserError: one that will be read isn't there, or as `check_source`.
  """
  data = experiment.data
  if run_dir.done(STAGE) is None:
    try:
      problems.local_files(data)
    except OSError as error:
      raise _unreadable(data, data.root, error) from error
  check_source(experiment, run_dir)


def check_source(experiment: Experiment, run_dir: RunDir) -> None:
  """Sees that the problems' local files are still those that were read.

  A file that is gone, or that can't be read any more, is no matter: the run
  has its own copy of the problems.

  Raises:
    UserError: one has another content now, or there is one more.
  """
  read = (run_dir.done(STAGE) or {}).get("files")
  if not read:  # no local files, or a version of this program kept no digests
    return
  data = experiment.data
  for path in _still_there(data, read):
    try:
      digest = sources.sha256(path)
    except OSError:
      continue
    name = path.name
    if read.get(name) != digest:
      what = "has changed" if name in read else "was not there"
      raise UserError(
        f"data.root={data.root}: {name} {what} since {run_dir.problems_dir} was"
        " read from it; restore what was there, or name another --workdir to"
        " use what is there now"
      )


def _still_there(data: Data, read: Iterable[str]) -> list[Path]:
  """The local files that a source would be read from now.

  Where it can't be said which these are, though all that were `read` are there,
  others have come: then all that there are.
  """
  try:
    try:
      return problems.local_files(data)
    except UserError:
      root = Path(data.root or "")
      if all((root / name).is_file() for name in read):
        return sources.data_files(root)
  except OSError:
    pass
  return []


def _digests(data: Data) -> dict[str, str]:
  """The SHA-256 of each local file of a source, by name.

  Raises:
    UserError: one isn't there, or can't be read.
  """
  path, digests = data.root, {}
  try:
    for path in problems.local_files(data):
      digests[path.name] = sources.sha256(path)
  except OSError as error:
    raise _unreadable(data, path, error) from error
  return digests


def _unreadable(
  data: Data, path: Path | str | None, error: OSError
) -> UserError:
  return UserError(
    f"data.root={data.root}: {path} can't be read ({error.strerror}); see to"
    " its permissions, or give another copy"
  )


def _decontaminated(
  experiment: Experiment, found: list[Problem]
) -> tuple[list[Problem], list[Rejected]]:
  """The problems that no benchmark holds, and the others with the reason."""
  how = experiment.data.decontaminate
  if how == "none":
    return found, []
  # All questions of them, however few this run asks.
  section = dataclasses.replace(experiment.evaluate, num_problems=None)
  whole = dataclasses.replace(experiment, evaluate=section)
  held_out = {
    name: benchmark(whole, name).problems for name in section.benchmarks
  }
  overlaps = [
    one
    for one in overlap.find(found, held_out)
    if how == "ngram" or one.kind != "13 words in a row"
  ]
  counts = collections.Counter((one.benchmark, one.kind) for one in overlaps)
  told = ", ".join(
    f"{count:,} of {name} ({kind})" for (name, kind), count in counts.items()
  )
  print(
    f"problems: {len(overlaps):,} are a benchmark's and taken out"
    f"{': ' if told else ''}{told}",
    flush=True,
  )
  gone = {one.problem_id for one in overlaps}
  rejected = [
    Rejected(
      one.problem_id,
      experiment.data.source,
      STAGE,
      f"{one.kind} as {one.benchmark}'s {one.other_id}: {one.shared[:120]}",
    )
    for one in overlaps
  ]
  return [p for p in found if p.problem_id not in gone], rejected


# What names the benchmarks' local copies.
BENCHMARK_ROOT = "evaluate.root"
_LABORATORY_PROBLEMS = 64


@dataclasses.dataclass(frozen=True)
class Questions:
  """The questions of a benchmark.

  Attributes:
    problems: what is asked.
    data: what they were read from: `rows`, the whole benchmark's, and `files`
      (see `benchmarks.record`), none for the laboratory's.
    paths: these files.
  """

  problems: list[Problem]
  data: dict[str, Any]
  paths: tuple[Path, ...] = ()


def benchmark_size(experiment: Experiment, name: str) -> int:
  """How many questions of a benchmark are asked, without reading it.

  Raises:
    UserError: an unknown name.
  """
  limit = experiment.evaluate.num_problems
  if name in LABORATORY:
    return limit or _LABORATORY_PROBLEMS
  rows = benchmarks.BENCHMARKS[called(experiment, name)].rows
  return min(rows, limit or rows)


def called(experiment: Experiment, name: str) -> str:
  """A benchmark's name in `benchmarks.BENCHMARKS`.

  Raises:
    UserError: there is none.
  """
  known_as = benchmarks.canonical(name)
  if known_as not in benchmarks.BENCHMARKS:
    known = (*LABORATORY, *benchmarks.BENCHMARKS)
    raise UserError(
      f"evaluate.benchmarks: there is no benchmark {name};"
      f" {did_you_mean(name, known)}"
    )
  if known_as == "livecodebench" and experiment.evaluate.livecodebench == "v6":
    return "livecodebenchv6"
  return known_as


def benchmark(experiment: Experiment, name: str) -> Questions:
  """The questions of one benchmark of `evaluate.benchmarks`.

  `arithmetic` and `arithmetic_hard` are the laboratory's held-out splits, 64
  problems unless `evaluate.num_problems` says otherwise; every other name is a
  benchmark of `problems.benchmarks`, read from `evaluate.root` or the hub.

  Raises:
    UserError: an unknown name, or files that are missing, unusable, or not
      what the benchmark's are.
  """
  section = experiment.evaluate
  if name in LABORATORY:
    count = section.num_problems or _LABORATORY_PROBLEMS
    made = arithmetic.generate(LABORATORY[name], count, section.seed)
    return Questions(made, {"rows": count, "files": []})
  source = called(experiment, name)
  data = dataclasses.replace(
    experiment.data,
    source=source,
    root=section.root,
    limit=None,
    seed=section.seed,
    subset="all",
  )
  files = benchmarks.find(source, section.root, BENCHMARK_ROOT)
  found, rejected = problems.load(data)
  if rejected:
    raise UserError(
      f"{name}: {len(rejected)} rows can't be used, the first because:"
      f" {rejected[0].reason}; a benchmark has to be whole"
    )
  record = benchmarks.record(source, files, len(found), section.unchecked)
  asked = problems.choose(found, section.num_problems, section.seed)
  return Questions(asked, record, tuple(file.path for file in files))
