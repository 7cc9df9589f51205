"""How far a run is, from its workdir alone.

    python -m trd_jax.pipeline --workdir=DIR --status

Reads, and makes, locks and waits for nothing; so it answers while others write,
and of a damaged file it says so in one line. No config and no JAX are needed.
"""

import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from trd_jax.experiment import (
  alarms,
  experiment,
  metric_log,
  printing,
  stage_log,
  tables,
)
from trd_jax.experiment import progress as progress_lines
from trd_jax.experiment.errors import UserError, one_line
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.files import file_locks, json_files, ownership
from trd_jax.experiment.progress import duration
from trd_jax.experiment.run_dir import RunDir

FORMS = ("text", "json")

State = Literal["done", "running", "waiting", "stopped", "failed", "damaged"]
# How a stage ends that was asked to: it goes on when it is started again.
_STOPPED = {130, 141, 143}
# Of a training's row what is printed beside its step; the JSON has all of it.
_METRICS = {"loss": "loss", "D": "D", "learning_rate": "learning rate"}
_METRICS |= {"grad_norm": "gradient norm", "response_length": "response length"}
_TAIL_BYTES = 1 << 16
_SHARDS = "shard-*.parquet"


@dataclasses.dataclass
class Stage:
  """How far a stage is.

  Attributes:
    name: the stage.
    state: `done`; `running`, a process holds its lock; `failed` or `stopped`,
      as its log says or because nobody is at work on what has been begun;
      `damaged`, its record can't be read; else `waiting`.
    rows: how many are there: updates of `train`, else rows on disk. A stage
      that was killed may have some twice.
    expected: how many there will be; None where nobody has counted yet.
    unit: what is counted, in whatever state: `updates` of train, else `rows`.
    per_second: rows lately, of a stage that is running.
    seconds_left: at that rate.
    metrics: the last row of a training's metrics.
    holder: the process that is at work on it.
    exit_code: of the last attempt; None where it goes on, or was killed.
    last_line: what its last attempt printed last, where it isn't done.
    seconds_since: since that line.
    bytes: of its folder.
  """

  name: str
  state: State = "waiting"
  rows: int | None = None
  expected: int | None = None
  unit: str = "rows"
  per_second: float | None = None
  seconds_left: float | None = None
  metrics: dict[str, Any] | None = None
  holder: dict[str, Any] | None = None
  exit_code: int | None = None
  last_line: str | None = None
  seconds_since: float | None = None
  bytes: int = 0


@dataclasses.dataclass
class Status:
  """How far a run is.

  Attributes:
    workdir: its path.
    about: what it is, from its config; None where that can't be read.
    state: `done`, `running`, `failed`, `damaged` or `waiting`: of its stages
      and rounds the first that is the case.
    bytes: of the whole workdir, each file once.
    stages: in their order.
    locks: the locks that are held, by name.
    rounds: further rounds, each as a workdir of its own.
    points: a sweep's points that have been begun, as workdirs of their own.
    damaged: a line a file that can't be read.
    alarms: those that fired so far (`alarms.Fired`).
  """

  workdir: str
  about: str | None = None
  state: State = "waiting"
  bytes: int = 0
  stages: list[Stage] = dataclasses.field(default_factory=list)
  locks: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  rounds: list["Status"] = dataclasses.field(default_factory=list)
  points: list["Status"] = dataclasses.field(default_factory=list)
  damaged: list[str] = dataclasses.field(default_factory=list)
  alarms: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def show(
  run_dir: RunDir, form: str, stages: Callable[[Experiment], list[str]]
) -> None:
  """Prints how far a run is.

  Args:
    run_dir: its directory.
    form: one of `FORMS`.
    stages: returns the stages of an experiment.

  Raises:
    UserError: there is no run, or the form is none.
  """
  if form not in FORMS:
    raise UserError(
      f"--status={form}: there is no such form; choose from {', '.join(FORMS)}"
    )
  status = look(run_dir, stages)
  if form == "json":
    print(json.dumps(dataclasses.asdict(status), indent=2))
  else:
    print("\n".join(_lines(status)))


def look(run_dir: RunDir, stages: Callable[[Experiment], list[str]]) -> Status:
  """Looks how far a run is; see `show`.

  Raises:
    UserError: there is no run.
  """
  root = run_dir.root
  try:
    names = os.listdir(root)
  except OSError as error:
    why = "it is not there" if not root.exists() else error.strerror
    raise UserError(
      f"--workdir={root}: no status ({why}); name the workdir of a run"
    ) from error
  ours = {"config.json", "points", "rounds"}
  ours |= {stage.partition("/")[0] for stage in ownership.STAGES}
  if not ours & set(names):
    raise UserError(
      f"--workdir={root} is no run of trd-jax: it has no config.json; name the"
      " workdir of a run"
    )
  status = Status(str(root))
  sizes = _sizes(root, status.damaged)
  status.bytes = sum(sizes.values())
  status.locks = dict(_locks(root, status.damaged))
  chosen, is_damaged = None, False
  try:
    run_dir.check_config()
    chosen = experiment.from_json(run_dir.config)
    status.about = _about(chosen)
  except UserError as error:
    is_damaged = True
    status.damaged.append(" ".join(str(error).split()))
  wanted = [] if chosen is None else ["problems", *stages(chosen)]
  # Without a config those that have left something.
  wanted = wanted or [s for s in ownership.STAGES if run_dir.stage(s).is_dir()]
  points = sorted(_folders(run_dir.stage("points")), key=lambda path: path.name)
  # The folder of a sweep has a config, whose stages run in its points alone.
  if not points or any(run_dir.stage(name).is_dir() for name in wanted):
    status.stages = _stages(run_dir, wanted, sizes, status)
  status.alarms = _alarms(run_dir, status)
  for place in sorted(
    (one for one in _folders(run_dir.stage("rounds")) if one.name.isdecimal()),
    key=lambda path: int(path.name),
  ):
    status.rounds += _inner(place, stages, status)
  for place in points:
    status.points += _inner(place, stages, status)
  if chosen is not None and chosen.pipeline.round == 1:
    there = {int(Path(one.workdir).name) for one in status.rounds}
    for number in range(2, chosen.pipeline.rounds + 1):
      if number not in there:
        status.rounds.append(Status(str(run_dir.round(number).root)))
  parts = [*status.stages, *status.rounds, *status.points]
  # A pipeline is at work between two stages, too.
  states: list[State] = [one.state for one in parts]
  if status.locks:
    states.append("running")
  if is_damaged:
    states.append("damaged")
  status.state = _overall(states)
  return status


def _inner(
  root: Path, stages: Callable[[Experiment], list[str]], outer: Status
) -> Iterator[Status]:
  """Yields the status of a round or a point; a damaged one is a line."""
  try:
    inner = look(RunDir(root), stages)
  except UserError as error:
    outer.damaged.append(" ".join(str(error).split()))
    return
  yield inner


def _overall(states: Sequence[State]) -> State:
  """Returns the state of a whole, from those of its parts."""
  order: tuple[State, ...] = ("running", "damaged", "failed", "stopped")
  for state in order:
    if state in states:
      return state
  if states and all(state == "done" for state in states):
    return "done"
  return "waiting" if "done" not in states else "stopped"


def _about(chosen: Experiment) -> str:
  return (
    f"{chosen.method}, {chosen.regime}: {chosen.student.path} taught by"
    f" {chosen.teacher_model.path}"
  )


def _folders(folder: Path) -> Iterator[Path]:
  """Yields the folders in a folder; none where it can't be read."""
  try:
    with os.scandir(folder) as entries:
      yield from (Path(one.path) for one in entries if one.is_dir())
  except OSError:
    return


def _sizes(root: Path, damaged: list[str]) -> dict[str, int]:
  """Returns bytes by stage's folder, or by name in the workdir.

  A file with several names, as of a stage that was taken over, counts once.
  """
  sizes: dict[str, int] = {}
  seen: set[tuple[int, int]] = set()

  def complain(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
      damaged.append(f"{error.filename}: can't be read ({error.strerror})")

  for top, _, files in os.walk(root, onerror=complain):
    parts = Path(top).relative_to(root).parts
    name = "/".join(parts[: 2 if parts[:1] == ("evaluate",) else 1])
    for file in files:
      try:
        about = os.lstat(os.path.join(top, file))
      except OSError:  # gone since the folder was read
        continue
      if (about.st_dev, about.st_ino) not in seen:
        seen.add((about.st_dev, about.st_ino))
        sizes[name] = sizes.get(name, 0) + about.st_size
  return sizes


def _locks(
  root: Path, damaged: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields the locks that a process holds, by name, with who holds them."""
  for path in sorted((root / "locks").glob("*.lock")):
    try:
      holder = file_locks.look(path)
    except OSError as error:
      if path.exists():
        damaged.append(f"{path}: can't be read ({error.strerror})")
      continue
    if holder is not None and holder.alive:
      since = datetime.datetime.fromtimestamp(holder.since).astimezone()
      about = holder._asdict() | {"since": since.isoformat(" ", "seconds")}
      yield path.stem, about | {"seconds": time.time() - holder.since}


def _stages(
  run_dir: RunDir, names: list[str], sizes: dict[str, int], status: Status
) -> list[Stage]:
  """Returns how far each stage is."""
  found = []
  for name in names:
    one = Stage(name, bytes=sizes.get(name, 0))
    _count(run_dir, one, status.damaged)
    done = run_dir.stage(name) / "done.json"
    record = _json(done, status.damaged)
    lock = status.locks.get(name.replace("/", "-"))
    attempt = _attempt(run_dir, name, status.damaged)
    evaluates = status.locks.get("evaluate")
    # Of the two evaluations one is at work; its log says which.
    if lock is None and name.startswith("evaluate/") and evaluates:
      by = attempt.process if attempt and attempt.code is None else None
      lock = evaluates if by == evaluates["process"] else None
    if isinstance(record, dict):
      one.state = "done"
      # A damaged config is met again here, and is no fault of the stage's.
      if (lost := _lost(run_dir, name)) and lost not in status.damaged:
        one.state = "damaged"
        status.damaged.append(lost)
      if name == "train" and isinstance(record.get("updates"), int):
        one.rows = one.expected = record["updates"]
      elif one.rows is not None:
        one.expected = one.rows
    elif os.path.lexists(done):
      one.state = "damaged"
    elif lock is not None:
      one.state, one.holder = "running", lock
    elif attempt is not None and attempt.code != 0:
      stopped = attempt.code is None or attempt.code in _STOPPED
      one.state = "stopped" if stopped else "failed"
    elif one.rows:
      one.state = "stopped"
    if attempt is not None and one.state not in ("done", "waiting"):
      one.exit_code = attempt.code
      _from_log(one, attempt)
    found.append(one)
  return found


def _alarms(run_dir: RunDir, status: Status) -> list[dict[str, Any]]:
  """Returns the alarms of what is there; of what is damaged none."""
  fired = []
  try:
    rows = metric_log.read_metrics(run_dir.metrics_file("train"))
    fired = alarms.of_rows(rows)
  except UserError as error:
    line = " ".join(str(error).split())
    # Its last row may have been read all the same, or been complained of.
    if not any(str(run_dir.metrics_file("train")) in d for d in status.damaged):
      status.damaged.append(line)
  summaries: dict[str, Any] = {}
  for one in status.stages:
    if one.state == "done":
      # Nothing is said twice: what is damaged in it has been found already.
      record = _json(run_dir.stage(one.name) / "done.json", [])
      if isinstance(record, dict):
        summaries[one.name] = record
  return [one._asdict() for one in (*alarms.of_stages(summaries), *fired)]


def _lost(run_dir: RunDir, name: str) -> str | None:
  """Says what a finished stage had left and is gone, or isn't its."""
  try:
    run_dir.done(name)
  except UserError as error:
    return str(error)
  return None


def _count(run_dir: RunDir, one: Stage, damaged: list[str]) -> None:
  """Counts what a stage has on disk, and what it will have."""
  folder = run_dir.stage(one.name)
  if one.name in ("merge", "convert"):
    return
  if one.name == "train":
    one.unit = "updates"
    row = _last_row(run_dir.metrics_file(one.name), damaged)
    if row is not None:
      one.metrics, step = row, row.get("step")
      one.rows = step + 1 if isinstance(step, int) else None
    return
  for path in sorted(folder.glob(_SHARDS)):
    try:
      one.rows = (one.rows or 0) + pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError, IndexError, ValueError) as error:
      if path.exists():  # else it has been replaced since
        damaged.append(f"{path}: can't be read ({_why(error)})")
  report = _json(run_dir.preflight(one.name), damaged)
  if isinstance(report, dict) and isinstance(report.get("prompts"), int):
    one.expected = report["prompts"]


def _last_row(path: Path, damaged: list[str]) -> dict[str, Any] | None:
  """Returns the last whole row of JSON lines; None where there is none."""
  try:
    with path.open("rb") as file:
      file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
      lines = file.read().split(b"\n")[:-1]  # the last is torn, or empty
    row = json_files.loads(lines[-1]) if lines else None
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    damaged.append(f"{path}: can't be read ({_why(error)})")
    return None
  return row if isinstance(row, dict) else None


def _json(path: Path, damaged: list[str]) -> Any:
  """Reads a JSON file; None where it isn't there, or is damaged."""
  try:
    return json_files.loads(path.read_bytes())
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    damaged.append(f"{path}: can't be read as JSON ({_why(error)})")
    return None


def _why(error: Exception) -> str:
  # An error of the system names the file once more.
  return getattr(error, "strerror", None) or one_line(error)


def _attempt(
  run_dir: RunDir, name: str, damaged: list[str]
) -> stage_log.LastAttempt | None:
  """Reads what a stage's log says of its last attempt."""
  path = run_dir.log(name)
  try:
    return stage_log.last_attempt(path)
  except OSError as error:
    damaged.append(f"{path}: can't be read ({error.strerror})")
    return None


def _from_log(one: Stage, attempt: stage_log.LastAttempt) -> None:
  """Adds what the last lines of a stage's log say: the last one, and a rate."""
  desc = one.name.replace("/", " ")
  # An attempt that failed before its first update hasn't said of how many; the
  # keys that this depends on can't have changed since an earlier one said it.
  for line in attempt.earlier:
    if (parsed := progress_lines.parse(line)) and parsed.desc == desc:
      one.expected = parsed.total
  if not attempt.lines:
    return
  when, one.last_line = attempt.lines[-1]
  one.seconds_since = (datetime.datetime.now() - when).total_seconds()
  steps = [
    (when, parsed)
    for when, line in attempt.lines
    if (parsed := progress_lines.parse(line)) and parsed.desc == desc
  ]
  if not steps:
    return
  (began, first), (now, last) = steps[0], steps[-1]
  one.expected = last.total
  # A training's metrics may have a row less often, and a stage's rows come to
  # the disk in shards.
  one.rows = max(one.rows or 0, last.done)
  seconds = (now - began).total_seconds()
  if one.state == "running" and seconds > 0 and last.done > first.done:
    one.per_second = (last.done - first.done) / seconds
    one.seconds_left = (last.total - last.done) / one.per_second


# -- as text -----------------------------------------------------------------


def _lines(status: Status) -> Iterator[str]:
  """Yields the lines that a person reads."""
  yield _wrapped(f"{status.workdir}: {_headline(status)}")
  if status.about:
    yield _wrapped(f"{status.about}")
  yield from _held(status)
  if status.stages:
    yield ""
    yield from _table(status)
  for one in status.rounds:
    yield ""
    number = Path(one.workdir).name
    yield _wrapped(f"round {number}: {_headline(one)}")
    yield from _held(one)
    if one.stages:
      yield from _table(one)
  yield from _alarm_lines(status)
  if status.points:
    yield ""
    yield "points of the sweep that have been begun:"
    rows = [
      (Path(one.workdir).name, _headline(one), *_of_running(one))
      for one in status.points
    ]
    yield tables.columns(rows, indent="  ")
  damaged = [*status.damaged]
  for one in (*status.rounds, *status.points):
    damaged += one.damaged
  if damaged:
    yield ""
    yield "damaged:"
    yield from (_wrapped(f"  {line}", 4) for line in damaged)


def _alarm_lines(status: Status) -> Iterator[str]:
  """Yields a line for each alarm, those of rounds and points among them."""
  named = [("", status)]
  named += [(f"round {Path(one.workdir).name}, ", one) for one in status.rounds]
  named += [(f"{Path(one.workdir).name}, ", one) for one in status.points]
  lines = [
    f"{prefix}{one['stage']}: {alarms.Fired(**one).line}"
    for prefix, part in named
    for one in part.alarms
  ]
  if lines:
    yield ""
  for line in lines:
    yield _wrapped(line)


def _held(status: Status) -> Iterator[str]:
  """Yields a line for each lock that is held: by whom, and for how long."""
  for name, lock in status.locks.items():
    who = "a process"
    if lock["process"] is not None:
      who = f"process {lock['process']} on {lock['host']}"
    spent = duration(max(lock["seconds"], 0.0))
    yield _wrapped(f"at work on {name}: {who}, for {spent}")


def _headline(status: Status) -> str:
  """Returns a run's state, how many stages are done, and its size."""
  if not status.stages and not status.rounds and not status.points:
    return status.state
  stages = [one for one in status.stages if one.name != "problems"]
  done = sum(one.state == "done" for one in stages)
  parts = [status.state]
  for one in stages:
    if one.state in ("running", "failed", "stopped", "damaged"):
      parts[0] = f"{one.name} {one.state}"
      break
  if stages:
    parts.append(f"{done} of {len(stages)} stages done")
  if status.points:
    done = sum(one.state == "done" for one in status.points)
    parts.append(f"{done} of {len(status.points)} points done")
  parts.append(tables.size(status.bytes))
  return ", ".join(parts)


def _of_running(status: Status) -> tuple[str, str]:
  """Returns rows and time left of the stage of a point that is running."""
  for one in status.stages:
    if one.state == "running":
      return _rows(one), _left(one)
  return "", ""


def _table(status: Status) -> Iterator[str]:
  """Yields the stages, and what there is to know of those that aren't done."""
  rows = [("stage", "state", "rows", "rate", "time left", "on disk")]
  for one in status.stages:
    rate = f"{one.per_second:,.2g}/s" if one.per_second else ""
    disk = tables.size(one.bytes) if one.bytes else ""
    rows.append((one.name, one.state, _rows(one), rate, _left(one), disk))
  yield tables.columns(rows)
  for one in status.stages:
    if one.metrics and one.state != "done":
      shown = ", ".join(
        f"{label} {_number(one.metrics[key])}"
        for key, label in _METRICS.items()
        if one.metrics.get(key) is not None
      )
      # Steps count from 0, and updates, wherever they are printed, from 1.
      number = one.metrics.get("step")
      last = f" {number + 1:,}" if isinstance(number, int) else ""
      yield _wrapped(f"{one.name}, last logged update{last}: {shown}")
    if one.state in ("failed", "stopped"):
      how = "killed, or its machine is gone"
      if one.exit_code is not None:
        how = f"exit code {one.exit_code}"
      yield _wrapped(f"{one.name} {one.state}: {how}")
    if one.last_line and one.seconds_since is not None:
      ago = duration(max(one.seconds_since, 0.0))
      yield _wrapped(f"{one.name}, {ago} ago: {one.last_line}")


def _rows(one: Stage) -> str:
  if one.rows is None and one.expected is None:
    return ""
  if one.expected is None or one.state == "done":
    return f"{one.rows or 0:,} {one.unit}"
  return f"{one.rows or 0:,} of {one.expected:,} {one.unit}"


def _left(one: Stage) -> str:
  return "" if one.seconds_left is None else duration(one.seconds_left)


def _number(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def _wrapped(line: str, indent: int = 2) -> str:
  return printing.wrapped(line, sys.stdout, indent)
