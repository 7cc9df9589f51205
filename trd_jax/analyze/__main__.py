"""Figures, tables and one page about finished runs, or runs under way.

    python -m trd_jax.analyze --workdir=A [--compare=B,C] [--score=N] …

Reads workdirs and writes into `A/analyze` only: `figures/`, `tables/` and
`report/index.html`, made anew by each call. It holds no stage, so it answers
while a run is under way, and says of each part that isn't whole that it isn't.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trd_jax.experiment import cli
from trd_jax.experiment.errors import UserError, did_you_mean
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.files import paths
from trd_jax.experiment.run_dir import RunDir

if TYPE_CHECKING:
  from trd_jax.analyze.analysis import Analysis, Result
  from trd_jax.analyze.runs import Run

FLAGS = (
  cli.Flag("compare", (), "workdirs of other runs, to stand beside"),
  cli.Flag(
    "score", 0, "problems whose trajectories are scored token by token first"
  ),
  cli.Flag(
    "prefix_failure", 0, "failed drafts to measure gradients along first"
  ),
  cli.Flag(
    "inspect",
    "2000",
    "trajectories of each run whose texts the page has; all for all",
  ),
  cli.Flag("only", (), "the analyses to make; default all"),
  cli.Flag("list", False, "name all analyses and make none"),
  cli.Flag("format", ("svg",), "of figures: svg, png or both"),
  cli.Flag(
    "inspect", "2000", "trajectories whose texts the report holds, or all"
  ),
)

_MOST_SENTENCES = 8  # of an analysis, on the terminal


def run(experiment: Experiment, run_dir: RunDir | None, flags) -> None:
  """Makes what is asked for and prints what was found.

  Raises:
    UserError: a flag has a value that it can't have, a workdir is none, or
      what is in it is damaged: then the rest is written all the same.
  """
  from trd_jax.analyze import analysis, files, report

  if flags.list:
    print(_table(analysis.registry()))
    return
  if run_dir is None:
    raise UserError("--workdir=DIR is missing: name the run's directory")
  chosen = _chosen(flags, analysis.registry())
  for kind in flags.format:
    if kind not in files.FORMATS:
      raise UserError(
        f"--format={kind}: there is no such format; choose from"
        f" {', '.join(files.FORMATS)}"
      )
  inspect = _inspect(flags.inspect)
  inspect = None if flags.inspect == "all" else _whole(flags.inspect)
  runs = _open(run_dir, flags)
  folder = run_dir.root / "analyze"
  files.check(folder)
  if flags.score:
    from trd_jax.analyze import scoring

    for one in runs:
      scoring.score(one.config, one.run_dir, flags.score)
  if flags.prefix_failure:
    measuring: Any = importlib.import_module("trd_jax.analyze.prefix_failure")
    measuring.measure(experiment, run_dir, flags.prefix_failure)
  results, broken = _make(chosen, runs)
  _print(chosen, results)
  figures, tables = files.write(folder, results, flags.format)
  print(
    f"\nwritten: {folder / 'figures'}: {figures} ({', '.join(flags.format)})\n"
    f"         {folder / 'tables'}: {tables} (csv, tex)",
    flush=True,
  )
  report.write(runs, results, folder / "report", inspect)
  print(f"         {folder / 'report' / 'index.html'}", flush=True)
  if broken:
    raise UserError(*broken)


def _whole(text: str) -> int:
  """Returns the number that --inspect names.

  Raises:
    UserError: it is none.
  """
  if not text.isascii() or not text.isdigit() or len(text) > 9:
    raise UserError(f"--inspect={text}: name a number from 0 on, or all")
  return int(text)


def _chosen(flags, registry: Mapping[str, "Analysis"]) -> list["Analysis"]:
  """Returns the analyses that --only names, else all.

  Raises:
    UserError: there is none of a name.
  """
  for name in flags.only:
    if name not in registry:
      hint = did_you_mean(name, registry)
      raise UserError(
        f"--only={name}: there is no such analysis; {hint or 'see --list'}"
      )
  return [
    one
    for name, one in registry.items()
    if not flags.only or name in flags.only
  ]


def _inspect(text: str) -> int | None:
  """Reads --inspect: a number, or None for all.

  Raises:
    UserError: it is neither.
  """
  if text == "all":
    return None
  if not (text.isascii() and text.isdecimal()):
    raise UserError(
      f"--inspect={text}: give the number of trajectories whose texts the"
      " report holds, or all"
    )
  return int(text[:12])


def _open(run_dir: RunDir, flags) -> list["Run"]:
  """Opens the workdirs; of a sweep's the points stand for it.

  Raises:
    UserError: one is no run's, stands there twice, or a config was given.
  """
  from trd_jax.analyze import runs

  own = f"--config={run_dir.config}"
  if any(
    argument.startswith("--config") and argument != own
    for argument in flags.config_argv
  ):
    raise UserError(
      "--config: what is analyzed is what was run, by the workdir's own config;"
      " leave it out"
    )
  for name in ("score", "prefix_failure"):
    if (number := getattr(flags, name)) < 0:
      raise UserError(f"--{name}={number}: it can't be below 0")
  others = []
  for name in flags.compare:
    try:
      others.append(paths.expanded(name))
    except ValueError as error:
      raise UserError(f"--compare={name}: {error}") from None
  return runs.open_runs([run_dir.root, *others])


def _make(
  chosen: Sequence["Analysis"], runs: Sequence["Run"]
) -> tuple[dict[str, "Result"], list[str]]:
  """Makes analyses, each of which may fail on what is damaged.

  Returns:
    Results by analysis, those left out that have nothing to be made of; and a
    line for each that failed.
  """
  from trd_jax.analyze.analysis import Result
  from trd_jax.experiment.progress import Progress

  results: dict[str, Result] = {}
  broken: list[str] = []
  with Progress(len(chosen), "analyze", "analyses") as progress:
    for one in chosen:
      try:
        result = one.make(runs)
      except UserError as error:
        # One damaged shard is no reason to show nothing; it is one to be told.
        broken += [m for m in error.messages if m not in broken]
        result = Result(partial=f"can't be made: {error}")
      if result is not None:
        results[one.name] = result
      progress.update(1, one.name)
  return results, broken


def _print(
  chosen: Sequence["Analysis"], results: Mapping[str, "Result"]
) -> None:
  """Prints what was found, a heading an analysis."""
  for one in chosen:
    result = results.get(one.name)
    if result is None or not (result.findings or result.partial):
      continue
    print(f"\n{one.title}")
    if result.partial:
      print(f"  (partial: {result.partial})")
    for sentence in result.findings[:_MOST_SENTENCES]:
      print(f"  {sentence}")
    if more := len(result.findings[_MOST_SENTENCES:]):
      print(f"  and {more} more in the report")


def _table(registry: Mapping[str, "Analysis"]) -> str:
  """Lists all analyses with their question and the paper's figures."""
  from trd_jax.experiment import tables

  rows = [("name", "question", "of the paper")]
  rows += [(one.name, one.question, one.paper) for one in registry.values()]
  return tables.columns(rows)


if __name__ == "__main__":
  cli.main(
    "analyze",
    run,
    "makes figures, tables and a page of what happened in runs",
    FLAGS,
    standalone=True,
    looks_only=True,
    examples=(
      "--workdir=runs/demo",
      "--workdir=runs/demo --compare=runs/demo-opd,runs/demo-forward_kl",
      "--workdir=runs/demo --score=64",
    ),
  )
