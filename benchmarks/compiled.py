"""What a compiled program takes of a device: FLOPs of products, and memory.

The module that is read is one device's part of the work.
"""

from typing import NamedTuple

import hlo_cost


class Cost(NamedTuple):
  """Of one device.

  Attributes:
    flops: multiplications and additions of matrix products.
    temp_bytes: memory for what is made by the way, results not among it.
    argument_bytes: memory for the arguments.
  """

  flops: float
  temp_bytes: int
  argument_bytes: int


def cost(program, turns: float | None = None) -> Cost:
  """Returns the cost of a `jax.stages.Compiled`.

  Args:
    program: what is read.
    turns: see `hlo_cost.cost`, also for what is raised.
  """
  memory = program.memory_analysis()
  return Cost(
    hlo_cost.cost(program.as_text(), turns=turns).flops(),
    memory.temp_size_in_bytes,
    memory.argument_size_in_bytes,
  )
