"""The command line that every stage shares.

    python -m trd_jax.<stage> --config=FILE.py[:ARG] --workdir=DIR
        [--config.<key>=<value> ...]

absl splits the arguments; the config's flags are made from the declarations
of its keys, which also check the values. Nothing heavy is imported here, and
a stage imports jax inside its `run`: `--help` answers at once.
"""

import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import sys
import textwrap
import types
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, TextIO

from absl import flags as absl_flags

import trd_jax
from trd_jax.experiment import (
  config_file,
  experiment,
  printing,
  stage_log,
  tables,
  usual_names,
)
from trd_jax.experiment.declarations import Key
from trd_jax.experiment.errors import Terminated, UserError, did_you_mean
from trd_jax.experiment.experiment import KEYS, Experiment
from trd_jax.experiment.files import disk_faults, paths
from trd_jax.experiment.processes import supervise
from trd_jax.experiment.run_dir import RunDir

_READS_AND_WRITES = {
  "rollout": (
    "the problems of config.data; the student",
    "WORKDIR/problems; WORKDIR/rollout: y_o with verdicts",
  ),
  "refine": (
    "WORKDIR/problems; WORKDIR/rollout; the teacher",
    "WORKDIR/refine: y_r with verdicts",
  ),
  "train": (
    "WORKDIR/problems; WORKDIR/rollout or WORKDIR/refine; the models",
    "WORKDIR/train: checkpoints of the adapter, metrics.jsonl",
  ),
  "merge": (
    "WORKDIR/train; the student",
    "WORKDIR/merge/adapter (PEFT); WORKDIR/merge/model (safetensors), unless"
    " engine.weights=adapter",
  ),
  "evaluate": (
    "the benchmarks; the student; WORKDIR/merge/model or merge/adapter",
    "WORKDIR/evaluate/base and WORKDIR/evaluate/trained: graded samples",
  ),
  "doctor": ("the machine; what the config names", "nothing"),
  "show": ("WORKDIR, finished or not", "nothing"),
  "convert": ("weights in one form", "the same weights in another"),
  "lab.pretrain": ("nothing", "the laboratory's student and teacher"),
  "sweep": (
    "a sweep's points; whatever the stages read",
    "WORKDIR/points/NAME: a pipeline's WORKDIR each; WORKDIR/sweep.json, .svg",
  ),
  "analyze": (
    "whatever is in WORKDIR, and in others, finished or not",
    "WORKDIR/analyze: figures, tables, report/index.html, scores",
  ),
  "pipeline": ("whatever its stages read", "WORKDIR with summary.json"),
}


@dataclasses.dataclass(frozen=True)
class Flag:
  """A flag of a stage's own.

  Attributes:
    name: as in --name=value.
    default: its type is the flag's: bool, int, float, str, or a tuple of str;
      None stands for a str that may be absent.
    doc: one line.
    looks_only: whether with it nothing is made, not even the workdir, and
      nobody who is at work there is waited for.
    is_path: whether it is a path, or may be one: its `~` is expanded.
    without_config: whether with it no config is read; the experiment that the
      stage gets is then the default one.
    bare: what the flag alone, without a value, stands for.
  """

  name: str
  default: bool | int | float | str | tuple[str, ...] | None
  doc: str
  looks_only: bool = False
  is_path: bool = False
  without_config: bool = False
  bare: str | None = None

  @property
  def key(self) -> Key:
    """Returns the flag as a key, which knows how to read its value."""
    kind = str if self.default is None else type(self.default)
    return Key(
      self.name,
      kind,
      self.default is None,
      self.default,
      self.doc,
      None,
      is_path=self.is_path,
    )


_SHARED = (
  Flag(
    "config",
    None,
    "FILE.py[:ARG] or a config.json; default: the workdir's",
    is_path=True,
  ),
  Flag(
    "workdir",
    None,
    "the run's directory; made if it is not there",
    is_path=True,
  ),
  Flag("help", False, "this text"),
  Flag(
    "help_config",
    None,
    "every --config.<key>, its value and meaning; --help_config=train. some",
    bare="",
  ),
)

_EXAMPLES = ("--config=configs/demo.py --workdir=runs/seed1 --config.seed=1",)

Run = Callable[[Experiment, Any, types.SimpleNamespace], object]


def main(
  stage_name: str,
  run: Run,
  summary_line: str,
  flags: Iterable[Flag] | None = None,
  *,
  standalone: bool = False,
  exclusive: bool = True,
  looks_only: bool = False,
  account: Callable[[types.SimpleNamespace], str] | None = None,
  examples: Sequence[str] = _EXAMPLES,
  argv: Sequence[str] | None = None,
) -> None:
  """Reads the command line, checks the config, claims the workdir, runs.

  Args:
    stage_name: the module's name, as in `python -m trd_jax.<stage_name>`.
    run: called with the experiment, the `RunDir`, and the stage's own flags
      as attributes. Besides these it finds there `config_argv`, the arguments
      that give another stage the same config and workdir.
    summary_line: what the stage does, for --help.
    flags: the stage's own flags.
    standalone: --config and --workdir may be left out; without them the
      experiment is the default one and the run directory None.
    exclusive: hold the stage's lock while it runs. A stage that runs as
      several processes says False and has one of them take it.
    looks_only: the stage makes nothing, not even the workdir, and sees for
      itself whether that is the config's.
    account: returns, from the stage's own flags, the stage whose log the
      command's is, as `evaluate/base`; default its name.
    examples: arguments that do something sensible, for --help.
    argv: the arguments; default `sys.argv[1:]`.

  Raises:
    SystemExit: 2 after a user's mistake or a fault of a disk (one line on
      stderr), 130 after an interrupt, 143 after SIGTERM, 141 where nobody reads
      the output any more.
  """
  argv = sys.argv[1:] if argv is None else argv
  line = None
  with printing.opened() as door:
    try:
      line = _CommandLine(flags or (), argv)
      if line.own["help"]:
        print(_help(stage_name, summary_line, line.flags, examples))
      elif line.own["help_config"] is not None:
        print(_help_config(line))
      else:
        supervise.end_with_pipeline()
        with supervise.terminable():
          log = _Log(door, account or (lambda own: stage_name), argv)
          _run(stage_name, run, line, standalone, exclusive, looks_only, log)
      sys.stdout.flush()
    except BrokenPipeError:
      # Who read the output, as `head`, has seen enough.
      _drop(sys.stdout)
      sys.exit(128 + signal.SIGPIPE)
    except UserError as error:
      for number, message in enumerate(error.messages):
        _complain(stage_name, f"{'also: ' * bool(number)}{message}")
      sys.exit(2)
    except KeyboardInterrupt as error:
      # Both signals end a command alike; its code and one word tell which.
      word, number = "interrupted", signal.SIGINT
      if isinstance(error, Terminated):
        word, number = "terminated", signal.SIGTERM
      after = f" {error}" if str(error) else ""
      goes_on = (
        "" if looks_only else "; the same command goes on where it stopped"
      )
      _complain(stage_name, f"{word}{after}{goes_on}")
      sys.exit(128 + number)
    except Exception as error:
      fault = _disk_fault(error, None if line is None else line.workdir)
      if fault is None:
        raise
      _complain(stage_name, fault)
      sys.exit(2)


def _disk_fault(error: BaseException, workdir: str | None) -> str | None:
  """Returns one line about an error that a disk is the cause of, else None."""
  fault = disk_faults.described(error, workdir)
  if fault is None or not isinstance(error, OSError) or error.filename:
    return fault
  # What has no name may be the output, as a log on a full disk: a line more
  # tells.
  try:
    print(flush=True)
  except OSError as refused:
    refused.filename = "the output"
    _drop(sys.stdout)
    return disk_faults.described(refused, workdir)
  return fault


def _complain(stage_name: str, message: str) -> None:
  """Prints why a command ends, in one line unless a terminal is narrower."""
  line = f"trd-jax {stage_name}: {message}"
  try:
    print(printing.wrapped(line, sys.stderr), file=sys.stderr, flush=True)
  except OSError:  # a log on a full disk: the exit code has to say it
    _drop(sys.stderr)


def _drop(stream: TextIO) -> None:
  """Sends what is left in a stream nowhere: Python flushes it once more."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@dataclasses.dataclass(frozen=True)
class _Log:
  """How a command's log is begun.

  Attributes:
    door: prints into it.
    account: returns the name of the stage that the flags choose.
    argv: the command's arguments.
  """

  door: printing.Door
  account: Callable[[types.SimpleNamespace], str]
  argv: Sequence[str]

  def begin(
    self, stage_name: str, run_dir: RunDir, own: types.SimpleNamespace
  ) -> None:
    """Has what is printed from now on kept in the workdir, too."""
    command = shlex.join(["python", "-m", f"trd_jax.{stage_name}", *self.argv])
    path = run_dir.log(self.account(own))
    command = printing.clean(command).replace("\n", "\\n")
    self.door.log = stage_log.StageLog(path, command, trd_jax.__version__)

  def close(self) -> None:
    """Keeps nothing from now on."""
    if self.door.log is not None:
      self.door.log.close()


def _run(
  stage_name: str,
  run: Run,
  line: "_CommandLine",
  standalone: bool,
  exclusive: bool,
  looks_only: bool,
  log: _Log,
) -> None:
  """Runs a stage, from its parsed command line on."""
  if line.workdir is None and not standalone:
    raise UserError("--workdir=DIR is missing: name the run's directory")
  run_dir = None if line.workdir is None else RunDir(line.workdir)
  if any(
    flag.without_config and line.own[flag.name] is not None
    for flag in line.flags
  ):
    run(_experiment(line, None), run_dir, types.SimpleNamespace(**line.own))
    return
  spec = _spec(line)
  if spec is None and run_dir is not None and not looks_only:
    run_dir.restore_config()
    spec = _spec(line)
  if spec is None and not standalone:
    raise UserError(
      "--config=FILE.py is missing: name one of configs/*.py (a workdir that "
      "has been run before needs none)"
    )
  chosen = _experiment(line, spec)
  own = types.SimpleNamespace(**line.own)
  own.config_argv = line.config_argv(spec)
  _keep_compilations()
  if run_dir is None or looks_only:
    run(chosen, run_dir, own)
    return
  # What is kept has to be a run's: without --config it is what is run.
  kept = experiment.to_json(dataclasses.replace(chosen, preflight_only=False))
  if any(line.own[flag.name] for flag in line.flags if flag.looks_only):
    run_dir.check(kept)
    run(chosen, run_dir, own)
    return
  is_new = run_dir.claim(kept)
  try:
    with run_dir.lock(stage_name) if exclusive else contextlib.nullcontext():
      log.begin(stage_name, run_dir, own)
      run(chosen, run_dir, own)
  except (UserError, SystemExit, BrokenPipeError) as error:
    # What a command was refused for needs no log. What went wrong later does.
    refused = not isinstance(error, SystemExit) or error.code == 2
    if is_new and run_dir.abandon(logs=refused) and refused:
      log.close()
    raise
  except Exception as error:
    # A disk that is full or gone may refuse this as well.
    if is_new and disk_faults.described(error, run_dir.root):
      with contextlib.suppress(OSError, UserError):
        if run_dir.abandon(logs=True):
          log.close()
    raise
  if is_new and chosen.preflight_only and run_dir.abandon():
    log.close()


def _spec(line: "_CommandLine") -> str | None:
  """Returns what --config names, else the workdir's own config, if any."""
  if line.config is not None or line.workdir is None:
    return line.config
  own = RunDir(line.workdir).config
  return str(own) if own.is_file() else None


def _experiment(line: "_CommandLine", spec: str | None) -> Experiment:
  """Returns the experiment that a config and the flags of its keys give.

  Raises:
    UserError: see `config_file.load` and `experiment.from_config`.
  """
  config, source = config_file.load(spec) if spec else ({}, "--config")
  return experiment.from_config(config | line.overrides, source)


def _keep_compilations() -> None:
  """Lets JAX find what an earlier process has compiled.

  The stages are processes of their own and compile much the same programs.
  Set JAX_COMPILATION_CACHE_DIR to keep them elsewhere, and
  JAX_ENABLE_COMPILATION_CACHE=false to keep none. What is compiled for a CPU
  may not run on another, and a home may be shared: each kind of CPU has a
  folder of its own.
  """
  folder = paths.cache() / "xla" / paths.kind_of_cpu()
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
  # A program that calls cuDNN on split weights holds a pointer of this process,
  # and would never be found again.
  os.environ.setdefault(
    "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY", "true"
  )


class _CommandLine:
  """The arguments, taken apart.

  Attributes:
    flags: the shared flags and the stage's own.
    own: their values by name.
    overrides: values given to config keys, by dotted name.
    config, workdir: values of these two flags.

  Raises:
    UserError: an unknown flag or key, a value of another type, or an argument
      that is no flag.
  """

  def __init__(self, flags: Iterable[Flag], argv: Sequence[str]):
    self.flags = (*_SHARED, *flags)
    of_stage = {flag.name: flag.key for flag in self.flags}
    of_config = {f"config.{name}": key for name, key in KEYS.items()}
    values = absl_flags.FlagValues()
    values.set_gnu_getopt(True)
    all_keys = of_stage | of_config
    for name, key in all_keys.items():
      absl_flags.DEFINE(
        absl_flags.ArgumentParser(),  # leaves the text to the key
        name,
        None,
        key.doc,
        flag_values=values,
        boolean=key.type is bool,
        short_name="h" if name == "help" else None,
      )
    try:
      # Of absl's flags only booleans can do without a value.
      bare = {
        f"{dashes}{name}": f"--{flag.name}={flag.bare}"
        for flag in self.flags
        if flag.bare is not None
        for name in (flag.name, flag.name.replace("_", "-"))
        for dashes in ("-", "--")
      }
      argv = [bare.get(argument, argument) for argument in argv]
      argv = [_underscored(argument, all_keys) for argument in argv]
      _, *strangers = values(["", *argv], known_only=True)
    except (absl_flags.Error, ValueError) as error:
      raise UserError(f"{error}; see --help") from None
    self._texts: dict[str, str] = {
      name: str(values[name].value) for name in all_keys if values[name].present
    }
    source = self._texts.get("config", "--config")
    for stranger in strangers:
      raise _stranger(stranger, of_stage, source)
    self.own = {name: key.default for name, key in of_stage.items()}
    self.overrides: dict[str, Any] = {}
    for name, text in self._texts.items():
      try:
        if name in of_stage:
          self.own[name] = of_stage[name].parse(text)
        else:
          key = of_config[name]
          self.overrides[key.name] = key.parse(text)
      except ValueError as error:
        raise UserError(f"{source} with --{name}={text}: {error}") from None
    self.config: str | None = self.own.pop("config")
    self.workdir: str | None = self.own.pop("workdir")

  def config_argv(self, spec: str | None) -> list[str]:
    """Arguments that give another stage the same config and workdir."""
    return [
      *([f"--config={spec}"] if spec else []),
      *([f"--workdir={self.workdir}"] if self.workdir else []),
      *(
        f"--config.{name}={self._texts[f'config.{name}']}"
        for name in self.overrides
      ),
    ]


def _underscored(argument: str, names: Container[str]) -> str:
  """Returns `--dry_run` for `--dry-run`, and so for every known flag."""
  name, equals, value = argument.partition("=")
  spelt = name.removeprefix("--").replace("-", "_")
  known = spelt in names or spelt.removeprefix("no") in names
  if not name.startswith("--") or not known:
    return argument
  return f"--{spelt}{equals}{value}"


def _stranger(argument: str, names: Iterable[str], source: str) -> UserError:
  """Returns the complaint about an argument that no flag takes."""
  if not argument.startswith("-"):
    return UserError(f'"{argument}" is no flag: write --name=value')
  name = argument.lstrip("-").partition("=")[0]
  if name.startswith(("config.", "noconfig.")):
    key = name.partition(".")[2]
    return experiment.unknown_key(key, source, "--config.")
  every = [*names, *(f"config.{key}" for key in KEYS)]
  plain = name.replace("-", "_")
  if plain in usual_names.PIPELINE_FLAGS:
    return UserError(
      f"there is no flag --{name} here; it is the pipeline's: python -m"
      f" trd_jax.pipeline --workdir=DIR --{name}; see --help"
    )
  usual = usual_names.flags(plain, [*names])
  usual = usual or [f"config.{key}" for key in usual_names.keys(plain, KEYS)]
  hint = did_you_mean(name, every, "--", usual) or "see --help"
  return UserError(f"there is no flag --{name}; {hint}")


def _help(
  stage: str, summary_line: str, flags: Iterable[Flag], examples: Sequence[str]
) -> str:
  """Returns the text of --help."""
  command = f"python -m trd_jax.{stage}"
  reads, writes = _READS_AND_WRITES.get(stage, ("", ""))
  rows = [(f"--{flag.name}", _described(flag.key)) for flag in flags]
  rows.insert(2, ("--config.<key>=<value>", "changes a key of the config"))
  return "\n".join(
    [
      f"{command}: {summary_line}",
      "",
      f"usage:    {command} --config=FILE.py[:ARG] --workdir=DIR "
      "[--config.<key>=<value> ...]",
      *(f"example:  {command} {arguments}" for arguments in examples),
      *([f"reads:    {reads}", f"writes:   {writes}"] if reads else []),
      "",
      _two_columns(rows),
    ]
  )


def _help_config(line: "_CommandLine") -> str:
  """Returns a line for each key that --help_config asks for.

  A line has the key, its value in the config that the arguments give, what it
  may be, its scopes and its meaning, for people and for `grep`.

  Raises:
    UserError: no key begins so, or as `_experiment`.
  """
  prefix = line.own["help_config"].removeprefix("config.")
  values = experiment.flat(_experiment(line, _spec(line)))
  rows = []
  for key in KEYS.values():
    if key.name.startswith(prefix):
      changed = values[key.name] != key.default
      rows.append(
        (
          f"{'*' if changed else ' '} --config.{key.name}",
          _shown(values[key.name]) or "()",
          key.takes(),
          ", ".join(key.scopes),
          key.doc,
        )
      )
  if not rows:
    raise experiment.unknown_key(prefix, "--help_config")
  head = ("* not the default", "value", "takes", "scope", "meaning")
  return tables.columns([head, *rows])


def _described(key: Key) -> str:
  """Returns a key's meaning, what it takes, and its default."""
  takes = f"; {key.rule.says}" if key.rule else ""
  if key.default is None or key.default is False:
    return f"{key.doc}{takes}"
  return f"{key.doc}{takes} [{_shown(key.default)}]"


def _shown(value: Any) -> str:
  """Returns a value as it is typed on the command line."""
  return ",".join(value) if isinstance(value, tuple) else str(value)


def _two_columns(rows: Sequence[tuple[str, str]]) -> str:
  left = max(len(name) for name, _ in rows) + 2
  width = max(shutil.get_terminal_size().columns, left + 40)
  return "\n".join(
    textwrap.fill(
      text,
      width,
      initial_indent=name.ljust(left),
      subsequent_indent=" " * left,
    )
    for name, text in rows
  )
