"""Three functions for notebooks and scripts: load a config, run it, read it.

    import trd_jax

    config = trd_jax.load_config("demo", seed=1, train__learning_rate=1e-3)
    run = trd_jax.run(config, "runs/mine")
    run.frame("refine")

A run is the same as from the command line: every stage is a process of its own,
and a workdir that one of the two began the other goes on with. Nothing here
imports JAX.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from trd_jax.experiment import config_file, experiment, records
from trd_jax.experiment.errors import UserError, did_you_mean, one_line
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.files.json_files import read_json
from trd_jax.experiment.metric_log import read_metrics
from trd_jax.experiment.processes import supervise
from trd_jax.experiment.records import Rejected, to_table
from trd_jax.experiment.run_dir import RunDir
from trd_jax.pipeline import pipeline

CONFIGS = Path(__file__).parents[2] / "configs"
"""Where a config's bare name is looked for, after the folder one is in."""


def load_config(path_or_name: str | Path, **overrides: Any) -> Experiment:
  """Returns a checked config.

  Args:
    path_or_name: FILE.py, FILE.py:key=value,… or a config.json, as for
      --config; or the bare name of a file of `configs/`, as "demo" or
      "opsd:model=8b".
    **overrides: values of keys. A dot is written as two underscores,
      `train__learning_rate=1e-3`, or the name is given whole,
      `**{"train.learning_rate": 1e-3}`.

  Raises:
    UserError: there is no such config, a key doesn't exist, a value is of the
      wrong type or out of its range, or two keys contradict each other.
  """
  values, source = config_file.load(_spec(str(path_or_name)))
  given = {key.replace("__", "."): value for key, value in overrides.items()}
  return experiment.from_config(values | given, source)


def run(
  config: Experiment | str | Path,
  workdir: str | Path,
  stages: Sequence[str] | None = None,
) -> "OpenRun":
  """Runs a config in a workdir, as `python -m trd_jax.pipeline` does.

  What the stages print is printed here, line by line. What is done is skipped,
  so the same call goes on where an earlier one was stopped. An interrupt is
  passed on, and the stage under way tidies up.

  Args:
    config: of `load_config`, or what that takes.
    workdir: the run's folder; it is made where it isn't there.
    stages: which to run, in this order, by their folders, as "rollout" or
      "evaluate/base"; None: all that aren't done, and the summary.

  Returns:
    The workdir, to be read.

  Raises:
    UserError: the config or the workdir can't be used; the message is the
      command's.
    subprocess.CalledProcessError: a stage failed otherwise, with its exit code
      and the end of what it printed.
  """
  chosen = config if isinstance(config, Experiment) else load_config(config)
  with tempfile.TemporaryDirectory() as folder:
    # The stages read it while they run, and the workdir keeps it.
    spec = Path(folder) / "config.json"
    spec.write_text(experiment.to_json(chosen), "utf-8")
    arguments = [f"--config={spec}", f"--workdir={workdir}"]
    if stages is None:
      _start([sys.executable, "-m", "trd_jax.pipeline", *arguments])
    else:
      known = {
        account: (module, own)
        for account, module, own in pipeline.commands(chosen)
      }
      # All names before the first stage: a typo in the last one would be
      # seen only hours later.
      for stage in stages:
        if stage not in known:
          raise UserError(
            f'stages: this config has no stage "{stage}";'
            f" {did_you_mean(stage, known)}"
          )
      for stage in stages:
        module, own = known[stage]
        python = chosen.python.of(module) or sys.executable
        _start([python, "-m", f"trd_jax.{module}", *arguments, *own])
  return open_run(workdir)


def open_run(workdir: str | Path) -> "OpenRun":
  """Returns a workdir to be read.

  Raises:
    UserError: it is no run's: it holds no config.json.
  """
  return OpenRun(workdir)


class OpenRun:
  """A workdir's rows, metrics, config and summary; nothing is changed.

  Files are read when they are asked for, so a run that is under way shows what
  it has by then.

  Args:
    workdir: the folder of a run, of one of its rounds, or of a sweep's point.

  Attributes:
    workdir: the same, as a path.
  """

  def __init__(self, workdir: str | Path):
    self.workdir = Path(workdir).expanduser()
    self._run_dir = RunDir(self.workdir)
    if not self._run_dir.config.is_file():
      raise UserError(
        f"{self.workdir} is no run's: it holds no config.json; name the folder"
        " that --workdir named"
      )

  def __repr__(self) -> str:
    done = [name for name in self.stages if self._run_dir.finished(name)]
    return f"OpenRun({str(self.workdir)!r}, done: {', '.join(done) or '-'})"

  @property
  def config(self) -> Experiment:
    """Returns the config that the workdir belongs to."""
    path = self._run_dir.config
    return experiment.from_json(path)

  @property
  def summary(self) -> dict[str, Any]:
    """Returns what the pipeline found: summary.json.

    Raises:
      UserError: the pipeline hasn't come to its end here.
    """
    return read_json(self._run_dir.summary)

  @property
  def rounds(self) -> list["OpenRun"]:
    """Returns the workdir of each round that has begun; the first is this one.

    Of split rounds the metrics, one after the other, are those of one training.
    """
    begun = [OpenRun(self.workdir)]
    while (here := self._run_dir.round(len(begun) + 1)).config.is_file():
      begun.append(OpenRun(here.root))
    return begun

  @property
  def stages(self) -> tuple[str, ...]:
    """Returns the stages that have a folder here."""
    names = (*records.BY_STAGE, "train", "merge")
    return tuple(name for name in names if self._run_dir.stage(name).is_dir())

  def done(self, stage: str) -> dict[str, Any] | None:
    """Returns what a finished stage said of itself; None for an unfinished one.

    Args:
      stage: its folder, as "train" or "evaluate/base".
    """
    return self._run_dir.done(stage)

  def table(self, stage: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Returns a stage's rows by ascending key, each key once.

    Args:
      stage: a key of `records.BY_STAGE`.
      columns: the columns to read; None: all. docs/workdir.md explains them.

    Raises:
      UserError: the stage has no rows, or a file of it is damaged or gone.
    """
    record = records.BY_STAGE.get(stage)
    if record is None:
      raise UserError(
        f'"{stage}" is no stage with rows;'
        f" {did_you_mean(stage, records.BY_STAGE)}"
      )
    self._run_dir.done(stage)  # refuses rows of which some are gone
    rows = self._run_dir.table(stage, record, columns)
    if not rows.num_rows and not self._run_dir.finished(stage):
      last = len(self.rounds)
      elsewhere = f"; of {last} rounds the last is .rounds[-1]" * (last > 1)
      raise UserError(
        f"{self._run_dir.stage(stage)}: this stage has no rows here{elsewhere}"
      )
    return rows

  def frame(self, stage: str, columns: Sequence[str] | None = None) -> Any:
    """Returns the rows of `table` as a pandas.DataFrame.

    Raises:
      UserError: as `table`, or pandas isn't installed.
    """
    return _frame(self.table(stage, columns))

  def rejected(self, stage: str) -> pa.Table:
    """Returns the rows that a stage set aside, with a reason each."""
    return to_table(self._run_dir.read_rejected(stage), Rejected)

  def metrics(self, stage: str = "train") -> list[Mapping[str, Any]]:
    """Returns the rows of a stage's metrics.jsonl, a logged update each.

    There are none before the first update. A row leaves out a metric that no
    token of its update counts for. docs/workdir.md explains the names.

    Raises:
      UserError: the file was damaged or edited.
    """
    return list(read_metrics(self._run_dir.metrics_file(stage)))

  def metrics_frame(self, stage: str = "train") -> Any:
    """Returns the rows of `metrics` as a pandas.DataFrame.

    What a row leaves out is NaN there.

    Raises:
      UserError: pandas isn't installed, the file was damaged or edited, or the
        values of one name are of several kinds.
    """
    rows = self.metrics(stage)
    # Every row's names: pyarrow by itself takes those of the first row only,
    # which may lack a metric that later ones have.
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
      try:
        columns[name] = pa.array([row.get(name) for row in rows])
      except pa.ArrowException as error:
        raise UserError(
          f"{self._run_dir.metrics_file(stage)}: the values of {name} make"
          f" no column ({one_line(error)}); mend the file, or move it away"
        ) from error
    return _frame(pa.table(columns))


def _spec(given: str) -> str:
  """Returns what --config takes; a bare name of `configs/` may stand for it."""
  name, colon, arg = given.partition(":")
  # What looks like a path is one: mistyped, it is reported as a file that is
  # missing and not as a name of `configs/`.
  if Path(name).suffix or "/" in name or os.sep in name:
    return given
  for folder in (Path("configs"), CONFIGS):
    path = folder / f"{name}.py"
    if path.is_file():
      return f"{path}{colon}{arg}"
  known = sorted({path.stem for path in CONFIGS.glob("*.py")})
  raise UserError(
    f'there is no config "{name}" in configs/;'
    f" {did_you_mean(name, known) or 'name a file, as mine.py'}"
  )


def _frame(table: pa.Table) -> Any:
  try:
    return table.to_pandas()
  except ModuleNotFoundError as error:
    raise UserError(
      "a data frame needs pandas: pip install pandas, or take the pyarrow table"
    ) from error


def _start(command: Sequence[str]) -> None:
  """Runs a command to its end and prints what it says.

  A notebook doesn't show what a child writes to its own standard output, so
  the lines are read and printed here.

  Raises:
    UserError: it refuses what it was given (exit code 2).
    subprocess.CalledProcessError: it failed otherwise.
  """
  # The children watch this process and end with it, should it be killed;
  # unbuffered, so that lines come when they are printed.
  mine = {supervise.VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
  process = subprocess.Popen(
    command,
    env=os.environ | mine,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    # One stream, so that lines stay in the order in which they came.
    stderr=subprocess.STDOUT,
    text=True,
    errors="replace",
  )
  assert process.stdout is not None
  said: list[str] = []
  try:
    for line in process.stdout:
      print(line, end="", flush=True)
      said = [*said[-19:], line]
    code = process.wait()
  except KeyboardInterrupt:
    # From a terminal it came to both, from a notebook to this process alone.
    process.send_signal(signal.SIGINT)
    # Read to the end: a full pipe would keep it from ending.
    rest, _ = process.communicate()
    print(rest, end="", flush=True)
    raise
  finally:
    # Whatever else was raised here: nobody would read its output any more, and
    # it would stand still at a full pipe.
    process.kill()
    process.stdout.close()
  if code == 2:
    raise UserError(_mistake(said))
  if code:
    raise subprocess.CalledProcessError(code, list(command), "".join(said))


def _mistake(said: Sequence[str]) -> str:
  """Returns the line that a command ended with; of several mistakes all.

  A pipeline adds a line about its stage, which says less than the stage's.
  """
  lines = [line.strip() for line in said if line.startswith("trd-jax ")]
  own = [line for line in lines if "ended with exit code" not in line]
  joined = ""
  for line in own or lines or ["the command ended with exit code 2"]:
    _, also, more = line.partition(": also: ")
    joined = f"{joined}; also: {more}" if also else line
  return joined
