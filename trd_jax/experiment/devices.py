"""The sections of an experiment about devices and processes.

They say how a training is carried out, not what it computes: their keys may
differ between the runs that share a workdir (see `scopes.RUNTIME_KEYS`).
"""

import dataclasses

from trd_jax.experiment import schema
from trd_jax.experiment.schema import above, at_least, key

# Share of a GPU's memory that a training takes at its start; JAX's own is 0.75.
# What is left is for CUDA, NCCL and cuDNN, which allocate beside it.
MEMORY_SHARE = 0.92
# Share of a device's memory that is planned with: what follows is an estimate,
# and allocators lose some to gaps.
PLANNED_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each axis; with none given, what the sizes ask for.

  One of them may be -1: all the rest, which `data` is where another is given.
  """

  data: int | None = key(
    None, "copies of the weights; -1: the rest", schema.minus_one_or_positive()
  )
  fsdp: int | None = key(
    None, "shards of each weight; -1: the rest", schema.minus_one_or_positive()
  )
  tensor: int | None = key(
    None, "shards of each layer; -1: the rest", schema.minus_one_or_positive()
  )
  memory_gib: float | None = key(
    None, "a device's memory; None: what the platform says", above(0)
  )

  @property
  def sizes(self) -> tuple[int, int, int] | None:
    """Devices along data, fsdp and tensor; None where all is left open."""
    given = self.data, self.fsdp, self.tensor
    if given == (None, None, None):
      return None
    data = self.data or (1 if -1 in given else -1)
    return data, self.fsdp or 1, self.tensor or 1


@dataclasses.dataclass(frozen=True)
class Distributed:
  """The processes of a training on several machines (see `processes`)."""

  coordinator: str | None = key(
    None, "HOST:PORT of process 0; None: TRD_COORDINATOR, or Slurm's"
  )
  processes: int | None = key(
    None, "how many there are; None: TRD_PROCESSES, or Slurm's", at_least(1)
  )
  process: int | None = key(
    None, "which of them this is; None: TRD_PROCESS, or Slurm's", at_least(0)
  )
  timeout_seconds: float = key(
    300.0, "how long to wait for the others to come", above(0)
  )
  heartbeat_seconds: int = key(
    60, "silence after which a process counts as dead and all end", at_least(5)
  )
