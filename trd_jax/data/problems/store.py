"""The problems of a run, kept in its run directory."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trd_jax.data import problems
from trd_jax.data.problems import overlap, parts, questions, rows, sources
from trd_jax.data.problems.questions import Questions
from trd_jax.data.prompts import lacks
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.records import Problem, Rejected, digest_of_rows
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Data

STAGE = "problems"
_SHOWN = 10  # reasons for rows set aside, where no file keeps them


def load(
  experiment: Experiment,
  run_dir: RunDir,
  benchmarks: Mapping[str, Questions] | None = None,
) -> list[Problem]:
  """Returns the problems that a round trains on, in the order of their ids.

  That is all that the run has, unless rounds are split (`parts`).

  Args:
    experiment: its `data`, and its round.
    run_dir: where they are kept.
    benchmarks: whose questions are taken out, where they are loaded already.

  Raises:
    UserError: as `load_all`, or there are more rounds than parts.
  """
  every = load_all(experiment, run_dir, benchmarks)
  if experiment.pipeline.parts == 1:
    return every
  mine = parts.of_round(experiment, [p.problem_id for p in every])
  return [problem for problem in every if problem.problem_id in mine]


def load_all(
  experiment: Experiment,
  run_dir: RunDir,
  benchmarks: Mapping[str, Questions] | None = None,
) -> list[Problem]:
  """Returns the problems of all rounds, in the order of their ids.

  The first call reads them from their source and writes them, and the rows
  that were set aside, into the run directory; later calls, of any stage, read
  them there, so that a source that changes can't change a run.

  Args:
    experiment: its `data`.
    run_dir: where they are kept.
    benchmarks: whose questions are taken out, where they are loaded already.

  Raises:
    UserError: as `problems.read`; a problem's domain isn't the
      experiment's, so that prompts and grader would not fit; the run can't do
      with problems without an answer (see `_check_golds`); or as
      `check_source`.
  """
  check_source(experiment, run_dir)
  lost = run_dir.lost(STAGE)
  if lost is not None:
    print(f"problems: {lost}: they are read again", flush=True)
  if run_dir.complete(STAGE) is None:
    # Digests before rows: a file that changes while it is read then differs
    # from its digest at the next stage.
    files = _digests(experiment.data)
    every, rejected = problems.read(
      experiment.data, graded=experiment.rollout.grade
    )
    print(f"problems: {rows.count(every, rejected)}", flush=True)
    own = experiment.data.source == "jsonl"
    for line in rows.misspelt(every) if own else ():
      print(f"problems: note: {line}", flush=True)
    for problem in every:
      if problem.domain != experiment.domain:
        other = 'write "domain": "arithmetic" into the rows, or '
        raise UserError(
          f"data.source={experiment.data.source} holds {problem.domain}"
          f" problems but domain={experiment.domain};"
          f" {other if own and experiment.domain == 'arithmetic' else ''}set"
          f" --config.domain={problem.domain}"
        )
    # Before the selection, so that `data.limit` problems are left after it.
    clean, overlapping = _decontaminated(experiment, every, benchmarks)
    if (paper := problems.source(experiment.data).in_paper) is not None:
      print(
        f"problems: {len(clean):,} can be trained on, and the paper trained on"
        f" {paper} rows: there repeats, contradictions and questions of"
        " benchmarks stay in",
        flush=True,
      )
    selected = problems.select(clean, experiment.data)
    # Before anything is kept, so that the rows can still be mended.
    _check_golds(experiment, selected, reading=True)
    rejected = [*rejected, *overlapping]
    there: set[str] = set()
    if lost is not None:
      # Later stages have rows of these problems: others are refused here.
      _check_as_before(experiment.data, run_dir, selected)
      there = run_dir.keys(STAGE)
    if lost is None and run_dir.keys(STAGE):
      # Of an attempt that was killed, or whose record was removed. The source
      # may have changed since, and of two rows with a key the older is read.
      run_dir.replace(STAGE, Problem, selected)
    else:
      shards = run_dir.shard_writer(STAGE, Problem, rows_per_shard=10_000)
      with shards as writer:
        for problem in selected:
          if problem.key not in there:
            writer.add(problem)
    run_dir.write_rejected(STAGE, rejected)
    run_dir.mark_done(
      STAGE,
      {"problems": len(selected), "rejected": len(rejected), "files": files},
    )
    print(
      f"problems: {len(selected):,} from {experiment.data.source},"
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
    subset, kept = experiment.train.subset, sum(p.has_gold for p in selected)
    if subset != "all" and kept < len(selected):
      print(
        f"problems: {len(selected) - kept:,} of {len(selected):,} have no"
        f" answer, so that nothing of them is in train.subset={subset}",
        flush=True,
      )
    return run_dir.read(STAGE, Problem)
  found = run_dir.read(STAGE, Problem)
  # Keys of later stages may have changed since they were read.
  _check_golds(experiment, found)
  return found


def _check_as_before(
  data: Data, run_dir: RunDir, chosen: Sequence[Problem]
) -> None:
  """Checks that problems that are read again are those that were there.

  Raises:
    UserError: they are others.
  """
  was = run_dir.rows_left(STAGE).get("digest")
  if was != digest_of_rows(chosen):
    raise UserError(
      f"{run_dir.problems_dir}: what data.source={data.source} gives now are"
      " not the problems that this workdir was begun with; restore their shard,"
      " or what they were read from, or name another --workdir"
    )


def _check_golds(
  experiment: Experiment, chosen: Sequence[Problem], reading: bool = False
) -> None:
  """Checks that the run can do with its problems without an answer.

  Args:
    experiment: what is shown of them, and whether it goes by verdicts.
    chosen: all problems of the run.
    reading: whether they are just read, so that their file can be mended.
      Later a single one of no use falls out at its stage, and is counted.

  Raises:
    UserError: one has nothing that the teacher could be shown either, where it
      has to be, or none has an answer and the run goes by verdicts.
  """
  bare = [problem for problem in chosen if not problem.has_gold]
  lacking = [p for p in bare if lacks(experiment, p) is not None]
  data = experiment.data
  if lacking and (reading or len(lacking) == len(chosen)):
    first = lacking[0]
    more = f" and {len(lacking) - 1:,} more" if lacking[1:] else ""
    star = experiment.trains_on == "y_star"
    raise UserError(
      f"data.source={data.source}: problem {first.problem_id}"
      f' ("{first.text.splitlines()[0][:40]}"){more} without answer, solution'
      f"{'' if star else ' and privileged text'}:"
      f" {lacks(experiment, first)}; give"
      f" {'it a solution' if star else 'it one'}, or use"
      f" {'another trajectory' if star else 'regime=opd'}"
    )
  subset = experiment.train.subset
  if subset != "all" and len(bare) == len(chosen):
    raise UserError(
      f"train.subset={subset} goes by verdicts, and none of the"
      f" {len(chosen):,} problems of data.source={data.source} has an answer to"
      " judge by; set train.subset=all"
    )


def check_files(experiment: Experiment, run_dir: RunDir) -> None:
  """Checks that the problems' local files are there, without reading any.

  Raises:
    UserError: one that will be read isn't there, or as `check_source`.
  """
  data = experiment.data
  if run_dir.complete(STAGE) is None:
    try:
      problems.local_files(data)
    except OSError as error:
      raise _unreadable(data, data.root, error) from error
  check_source(experiment, run_dir)


def check_source(experiment: Experiment, run_dir: RunDir) -> None:
  """Checks that the problems' local files are still those that were read.

  A file that is gone, or that can't be read any more, is no matter: the run
  has its own copy of the problems.

  Raises:
    UserError: one has another content now, or there is one more.
  """
  data = experiment.data
  run_dir.complete(STAGE)  # for its errors
  record = run_dir.record(STAGE) if run_dir.finished(STAGE) else {}
  if changed := changed_file(data, record):
    raise UserError(
      f"data.root={data.root}: {changed} since {run_dir.problems_dir} was"
      " read from it; restore what was there, or name another --workdir to"
      " use what is there now"
    )


def changed_file(data: Data, record: Mapping[str, Any]) -> str | None:
  """Returns which local file is another than was read, or None.

  Args:
    data: names the files.
    record: of the stage when it was finished.

  Returns:
    A clause such as "mine.jsonl has changed".
  """
  read = record.get("files")
  if not read:  # no local files, or a version of this program kept no digests
    return None
  for path in _still_there(data, read):
    try:
      digest = sources.sha256(path)
    except OSError:
      continue
    if read.get(path.name) != digest:
      what = "has changed" if path.name in read else "was not there"
      return f"{path.name} {what}"
  return None


def _still_there(data: Data, read: Iterable[str]) -> list[Path]:
  """Lists the local files that a source would be read from now.

  A source can't say which where files have been added, so that none or several
  could be meant. If all that were `read` are there still, all data files of the
  folder are listed then; else none.
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
  """Computes the SHA-256 of each local file of a source, by name.

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
  experiment: Experiment,
  every: list[Problem],
  benchmarks: Mapping[str, Questions] | None,
) -> tuple[list[Problem], list[Rejected]]:
  """Splits off the problems that a benchmark holds, with the reason."""
  how = experiment.data.decontaminate
  if how == "none":
    return every, []
  if benchmarks is None:
    benchmarks = questions.load_all(experiment)
  # All questions of them, however few this run asks.
  whole = {name: asked.whole for name, asked in benchmarks.items()}
  overlaps = [
    one
    for one in overlap.find(every, whole)
    if how == "ngram" or one.kind != "13 words in a row"
  ]
  counts = collections.Counter((one.benchmark, one.kind) for one in overlaps)
  shown = ", ".join(
    f"{count:,} of {name} ({kind})" for (name, kind), count in counts.items()
  )
  print(
    f"problems: {len(overlaps):,} are a benchmark's and taken out"
    f"{': ' if shown else ''}{shown}",
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
  return [p for p in every if p.problem_id not in gone], rejected
