"""Several processes of one run, on one machine or many.

`jax.distributed` joins them, and its heartbeats end all of them when one is
gone. All read what the run reads; the first alone speaks and writes down
what isn't an array.
"""

import atexit
import contextlib
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax._src import distributed  # its key-value store has no public name
from jax.experimental import multihost_utils

from trd_jax.experiment.errors import Interrupted, Terminated, UserError
from trd_jax.experiment.processes import nvidia
from trd_jax.experiment.schema import Distributed
from trd_jax.model import backend

# Where a key says nothing, its variable is asked.
VARIABLES = {
  "coordinator": "TRD_COORDINATOR",
  "processes": "TRD_PROCESSES",
  "process": "TRD_PROCESS",
}
_TASKS = "SLURM_STEP_NUM_TASKS"
# What the processes agree on; see `stop_before`.
_STOP = "trd_jax/stop"
# How long a process that is through waits for the others.
_END_SECONDS = 300
# XLA shares the trials of GPU kernels out among the processes that compile, and
# each waits for all. One that finds the program in JAX's cache compiles
# nothing, and those that don't find it, on a disk of their own, wait for ever.
_TRY_ALONE = "--xla_gpu_shard_autotuning=false"


@contextlib.contextmanager
def joined(
  section: Distributed, stage: str, dev: Path = Path("/dev")
) -> Iterator[None]:
  """Makes this process one of the run's; nothing happens where it is alone.

  The keys say which it is, or the environment variables of `VARIABLES`, or
  Slurm where `srun` has started several. Has to come before any other use of
  JAX. Inside, all processes but the first print nothing.

  A process that fails ends at once, without waiting for the others: they end
  within `heartbeat_seconds`, with a message of JAX's own, or as soon as they
  exchange something with it.

  Args:
    section: the config's.
    stage: for messages.
    dev: where the system's device files are.

  Raises:
    UserError: the section is incomplete or contradicts itself, the
      coordinator's address can't be used, or another process of the run has
      this machine's GPUs. Where the others don't come in time the process ends
      with such a line and code 2.
  """
  about = coordinates(section)
  alone = _value(section, "processes", VARIABLES["processes"]) == "1"
  if alone or (about is None and tasks_of_slurm() < 2):
    yield
    return
  with contextlib.ExitStack() as stack:
    if backend.expects_gpus(dev):
      _set_flag(_TRY_ALONE)
      if about and not os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        stack.enter_context(claim_gpus(about[0], dev))
    _initialize(section, about, stage)
    try:
      if not first():
        quiet = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(quiet))
        stack.enter_context(contextlib.redirect_stderr(quiet))
      yield
    except BaseException as error:
      codes = {UserError: 2, KeyboardInterrupt: 130}
      codes |= {Interrupted: 130, Terminated: 143}
      code = codes.get(type(error), 1)
      if isinstance(error, Interrupted) and error.agreed:
        if not first():  # which speaks for all
          raise SystemExit(code) from None
        raise
      # JAX would have this process wait, at its end, for the others, which wait
      # for this one.
      atexit.register(_leave, code)
      raise


def tasks_of_slurm() -> int:
  """Returns how many processes `srun` has started; 1 without it.

  Raises:
    UserError: its variable holds no number.
  """
  text = os.environ.get(_TASKS, "1")
  if not text.isdecimal():
    raise UserError(
      f"the environment variable {_TASKS} is {text!r}, which is no number of"
      " processes; set it as srun does, or unset it"
    )
  return int(text[:9])


def first() -> bool:
  """Returns whether this process is the one that speaks and writes."""
  return jax.process_index() == 0


@contextlib.contextmanager
def claim_gpus(address: str, dev: Path = Path("/dev")) -> Iterator[None]:
  """Holds the GPUs that this process sees, each for one process of a run.

  Each would take all GPUs of the machine, and most of their memory, were there
  several on it that nobody has given GPUs of their own.

  Args:
    address: the coordinator's, which names the run.
    dev: where the system's device files are.

  Raises:
    UserError: another process of the run holds one of them.
  """
  with contextlib.ExitStack() as stack:
    for name in nvidia.names(dev):
      # A name of the kernel's, which is gone with the process.
      claim = stack.enter_context(socket.socket(socket.AF_UNIX))
      try:
        claim.bind(f"\0trd-jax {address} GPU {name}")
      except OSError as error:
        raise UserError(
          f"another process of this run has GPU {name} of this machine: start"
          " one process a machine, as launch/ does, or give each its own GPUs"
          " (CUDA_VISIBLE_DEVICES or JAX_LOCAL_DEVICE_IDS)"
        ) from error
    yield


def idle_gpus(
  used: int,
  environment: Mapping[str, str] = os.environ,
  dev: Path = Path("/dev"),
) -> str:
  """Says that `srun` has left GPUs of this machine without a process.

  With no coordinator given, JAX goes by Slurm, whose tasks get one GPU each.

  Args:
    used: GPUs that JAX uses in this process.
    environment: its variables.
    dev: where the system's device files are.

  Returns:
    A line, or '' where none is idle or Slurm has not started this.
  """
  tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
  if not tasks or environment.get(VARIABLES["coordinator"]):
    return ""
  here, there = used * int(tasks[0]), len(nvidia.names(dev))
  if here >= there:
    return ""
  return (
    f"{here} of the {there} GPUs of this machine are used: srun with"
    f" --ntasks-per-node={there}, or launch/train_slurm.sh, uses all"
  )


def all_agree(holds: bool) -> bool:
  """Returns whether something holds in all processes of the run."""
  if jax.process_count() == 1:
    return holds
  return bool(multihost_utils.process_allgather(np.int32(holds)).all())


def check_same(number: int, what: str) -> None:
  """Sees that all processes have the same of something.

  Raises:
    UserError: they haven't, so they don't see the same files.
  """
  if jax.process_count() == 1:
    return
  numbers = multihost_utils.process_allgather(np.int32(number)).tolist()
  if len(set(numbers)) > 1:
    raise UserError(
      f"the processes differ in {what} ({numbers}): give all of them the same"
      " --workdir, on a disk that they share"
    )


def stop_before(
  step: int, asked: signal.Signals | None
) -> signal.Signals | None:
  """Returns what stops the processes here, all before the same update.

  Slurm's SIGTERM comes to them at different moments, or to one alone, and so
  does a terminal's Ctrl-C; if one went on, it would wait for the others in its
  next update. Whoever is asked first writes the update after the next into the
  coordinator's store, and by what signal, so that all end with the same code.
  It is seen in time: to begin an update a process has waited for the one before
  the last, which takes all of them to have begun that, and so to have written.

  Args:
    step: of the update that would come next.
    asked: the signal that asks this process to end; None: none has come.

  Returns:
    The signal that all processes end by; None: they go on.
  """
  if jax.process_count() == 1:
    return asked
  store = distributed.global_state.client
  assert store is not None
  if asked is not None:
    # Somebody else's stands.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      store.key_value_set(_STOP, f"{step + 2} {int(asked)}")
  try:
    last, number = map(int, store.key_value_try_get(_STOP).split())
  except jax.errors.JaxRuntimeError:  # nobody has written
    return None
  return signal.Signals(number) if step >= last else None


def coordinates(section: Distributed) -> tuple[str, int, int] | None:
  """Returns the coordinator's address, how many there are, and which this is.

  Raises:
    UserError: some of the three are missing, or they contradict each other.
  """
  found = {
    name: _value(section, name, variable)
    for name, variable in VARIABLES.items()
  }
  if not found["coordinator"] and found["processes"] in ("", "1"):
    return None
  shown = ", ".join(
    f"distributed.{name}={value or None}" for name, value in found.items()
  )
  for name, value in found.items():
    if not value:
      raise UserError(
        f"{shown}: distributed.{name} is missing; give it, or"
        f" {VARIABLES[name]}, to each process"
      )
  address, *numbers = found.values()
  if not all(number.isdecimal() for number in numbers):
    raise UserError(f"{shown}: processes and process must be numbers")
  processes, process = map(int, numbers)
  if process >= processes:
    raise UserError(
      f"{shown}: the processes are numbered from 0 to {processes - 1}"
    )
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal():
    raise UserError(f"{shown}: the coordinator's address must be HOST:PORT")
  return None if processes == 1 else (address, processes, process)


def _value(section: Distributed, name: str, variable: str) -> str:
  value = getattr(section, name)
  return os.environ.get(variable, "") if value is None else str(value)


def _set_flag(flag: str) -> None:
  """Gives XLA a flag, unless its variable has it; before JAX starts."""
  flags = os.environ.get("XLA_FLAGS", "")
  if flag.partition("=")[0] not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def _initialize(
  section: Distributed, about: tuple[str, int, int] | None, stage: str
) -> None:
  """Joins the others, or ends the process."""
  address, processes, process = about or (None, None, None)
  who = "this process"
  if about:
    who = f"process {process} of {processes} (coordinator {address})"

  def give_up() -> None:
    # JAX would end it too, with a stack trace in the place of this.
    print(
      f"trd-jax {stage}: {who} has not met the others in"
      f" {section.timeout_seconds:g} s (distributed.timeout_seconds): see that"
      " the address can be reached and that all processes are running",
      file=sys.stderr,
      flush=True,
    )
    os._exit(2)

  timer = threading.Timer(section.timeout_seconds, give_up)
  timer.daemon = True
  timer.start()
  # It would have a process ignore SIGTERM, which is how Slurm and launch/ end
  # one; checkpoints are whole at any moment.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      address,
      processes,
      process,
      cluster_detection_method="deactivate" if about else "slurm",
      initialization_timeout=int(section.timeout_seconds) + 60,
      heartbeat_timeout_seconds=section.heartbeat_seconds,
      shutdown_timeout_seconds=_END_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{who} can't join the others: {reason}") from error
  finally:
    timer.cancel()


def _leave(code: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
