"""What is examined: a machine, seen with the eyes of an experiment."""

import contextlib
import dataclasses
import functools
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trd_jax.doctor.probe import Facts, Probe
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.processes import interpreters, nvidia
from trd_jax.experiment.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds the package: the project's, where it is a checkout."""

PROBE_SECONDS = 600.0
"""The limit of a child that loads or compiles: what is well takes a tenth."""

_VLLM_VARIABLE = "TRD_VLLM_PYTHON"
_HERE = Path(__file__).parent
# JAX as a neighbour: it takes memory as it needs it, so that vLLM's children,
# which look at the same GPUs meanwhile, find theirs.
_MODEST = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
# vLLM leaves its sockets where temporary files go. A socket's path has at most
# 107 characters, and vLLM's names have 36.
_LONGEST_FOLDER = 60


@dataclasses.dataclass
class Machine:
  """This machine and the experiment that it is to carry out.

  Attributes:
    experiment: the config's, or the default one.
    has_config: whether there is a config at all.
    run_dir: the workdir, which may not be there; None where none is named.
    folder: for what checks write; it is gone afterwards, but for logs.
  """

  experiment: Experiment
  has_config: bool
  run_dir: RunDir | None
  folder: Path
  _probes: dict[str, Probe] = dataclasses.field(default_factory=dict)
  _facts: dict[str, Facts] = dataclasses.field(default_factory=dict)
  _read: list[str] = dataclasses.field(default_factory=list)

  @property
  def workdir(self) -> RunDir:
    """Returns the workdir, or where one would be made."""
    return self.run_dir or RunDir(Path("runs"))

  @property
  def trainer(self) -> str:
    """Returns the interpreter that trains."""
    return self.experiment.python.train or sys.executable

  @functools.cached_property
  def vllm(self) -> str | None:
    """Returns the interpreter that has vLLM, or should.

    None where there is none.
    """
    if self.experiment.engine.name == "vllm":
      return self.experiment.python.of("rollout") or sys.executable
    if named := os.environ.get(_VLLM_VARIABLE):
      return named
    for folder in (Path.cwd(), ROOT):
      if (path := folder / interpreters.VLLM).is_file():
        return str(path)
    return None

  @functools.cached_property
  def gpus(self) -> nvidia.Report:
    """Returns what nvidia-smi says, before anything was started."""
    return nvidia.ask()

  @functools.cached_property
  def jax(self) -> Facts:
    """Returns the devices that JAX sees, or `failure`."""
    self._look()
    return self.result("jax-devices")

  @functools.cached_property
  def torch(self) -> Facts:
    """Returns the GPUs that vLLM's environment sees; {} without one."""
    if self.vllm is None:
      return {}
    self._look()
    return self.result("torch-devices")

  def _look(self) -> None:
    """Starts the search for devices in both environments, side by side."""
    script = _HERE / "environment_probe.py"
    self.start("jax-devices", self.trainer, script, {"kind": "jax"})
    if self.vllm is not None:
      self.start("torch-devices", self.vllm, script, {"kind": "torch"})

  @property
  def on_gpus(self) -> bool:
    """Returns whether JAX runs on GPUs."""
    return self.jax.get("platform") == "gpu"

  @property
  def vllm_gpus(self) -> int:
    """Returns how many GPUs vLLM runs on; 0 for its CPU build."""
    return len(self.torch.get("kinds", ()))

  def start(
    self,
    name: str,
    python: str,
    what: str | Path,
    requested: Mapping[str, Any],
    *,
    environment: Mapping[str, str] | None = None,
    seconds: float = PROBE_SECONDS,
  ) -> None:
    """Starts a child, unless one of this name has been started."""
    if name not in self._probes:
      default = dict(_MODEST)
      if len(str(self.folder)) <= _LONGEST_FOLDER:
        default["TMPDIR"] = str(self.folder)
      self._probes[name] = Probe(
        name,
        self.folder,
        python,
        what,
        requested,
        environment=default | dict(environment or {}),
        seconds=seconds,
      )

  def result(self, name: str) -> Facts:
    """Returns a started child's facts (see `Probe.result`)."""
    # At every reading: several checks read one child, and its log is each
    # one's.
    self._read.append(name)
    if name not in self._facts:
      self._facts[name] = self._probes[name].result()
    return self._facts[name]

  def logs(self) -> list[Path]:
    """Returns the logs of the children that were read since the last call.

    Those that failed alone, where there are any; none that is empty.
    """
    names, self._read = list(dict.fromkeys(self._read)), []
    broken = [name for name in names if "failure" in self._facts.get(name, {})]
    logs = [self._probes[name].log for name in broken or names]
    return [log for log in logs if log.stat().st_size]

  def environment(
    self, name: str, python: str, requested: Mapping[str, Any]
  ) -> Facts:
    """Returns what `environment_probe` finds in an interpreter."""
    self.start(name, python, _HERE / "environment_probe.py", requested)
    return self.result(name)

  def close(self, keep_logs: bool) -> None:
    """Ends the children and removes what was written.

    Args:
      keep_logs: leave what the children printed.
    """
    for probe in self._probes.values():
      probe.close()
    for path in list(self.folder.iterdir()):
      if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
      elif not keep_logs or path.suffix != ".log" or not path.stat().st_size:
        path.unlink()
    with contextlib.suppress(OSError):  # there are logs
      self.folder.rmdir()
