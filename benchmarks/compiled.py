"""What a compiled program costs a device, read from the program itself.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs.
Here the matrix products of the optimised HLO are counted, each as often as its
loops turn. The module that is read is one device's part of the work.
"""

import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_SHAPE = re.compile(r"^\w+\[([\d,]*)\]")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|true_computation|false_computation)"
  r"=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


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
  """Of a `jax.stages.Compiled`; see `product_flops`."""
  memory = program.memory_analysis()
  return Cost(
    product_flops(program.as_text(), turns),
    memory.temp_size_in_bytes,
    memory.argument_size_in_bytes,
  )


def product_flops(hlo: str, turns: float | None = None) -> float:
  """FLOPs of all matrix products of an HLO module's text.

  Args:
    hlo: the text.
    turns: how often loops turn, in the mean, of which the compiler doesn't
      know it, since the data decides; None if there are to be none.

  Raises:
    ValueError: a loop whose number of turns nobody knows, or a product that is
      hidden in a call of a library.
  """
  entry, bodies = _computations(hlo)
  done: dict[str, float] = {}

  def total(name: str) -> float:
    if name not in done:
      done[name] = sum(
        _flops(line, bodies[name], total, turns) for line in lines(name)
      )
    return done[name]

  def lines(name: str):
    return bodies[name].values()

  return total(entry)


def _computations(hlo: str) -> tuple[str, dict[str, dict[str, str]]]:
  """The entry's name, and of each computation: instruction -> its text."""
  entry, bodies, current = "", {}, {}
  for line in hlo.splitlines():
    if found := _COMPUTATION.match(line):
      current = bodies[found[1]] = {}
      if line.startswith("ENTRY"):
        entry = found[1]
    elif found := _INSTRUCTION.match(line):
      current[found[1]] = found[2]
  return entry, bodies


def _dims(text: str) -> list[int]:
  found = _SHAPE.match(text)
  if found is None:
    raise ValueError(f"no array: {text[:80]}")
  return [int(size) for size in found[1].split(",") if size]


def _flops(line: str, body: dict[str, str], total, turns) -> float:
  if " custom-call(" in line and "matmul" in line:
    raise ValueError(f"a product that can't be read: {line[:160]}")
  if found := re.search(r"\bdot\(([^)]*)\)", line):
    left = re.findall(r"%([\w.-]+)", found[1])[0]
    contracted = _CONTRACTED.search(line)
    assert contracted is not None
    sizes = _dims(body[left])
    inner = [sizes[int(i)] for i in contracted[1].split(",") if i]
    return 2.0 * math.prod(_dims(line)) * math.prod(inner)
  called = _CALLED.findall(line)
  if branches := _BRANCHES.search(line):
    called += re.findall(r"%?([\w.-]+)", branches[1])
  inside = sum(total(name) for name in called)
  if inside and " while(" in line:
    trips = _TRIPS.search(line)
    if trips is None and turns is None:
      raise ValueError(f"a loop of unknown length: {line[:160]}")
    inside *= int(trips[1]) if trips else turns
  return inside
