"""What a compiled program costs a device, read from its optimised HLO text.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs.
Here every instruction that becomes work for the device is a `Kernel`, with how
often it runs: a fusion, a product, a call of cuDNN, a copy, a collective. The
module that is read is one device's part of a program.

A kernel's bytes are its operands and results, each counted once. Where a
fusion reads a slice of an operand, or writes one into it in place, the bytes
are the slice's:

    stacked weights bf16[36,4096,4096] --dynamic-slice--> bf16[1,4096,4096]
                    1.2 GB, not read                      34 MB: these count

What a card is given for FLOPs, bytes and traffic is `Card`; a kernel takes as
long as the longest of the three, and a moment to start.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([\d,<=]*)\]")
_REFERENCE = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(
  r"\b(calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_CONTRACTED_BY_LIBRARY = re.compile(
  r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]'
)
_INDEX = re.compile(r"\bindex=(\d+)")
_GROUPS = re.compile(
  r"replica_groups=(?:\[\d+,(?P<flat>\d+)\]|\{\{(?P<listed>[\d,]+)\}"
  r"|mesh\[(?P<mesh>[^\]]*)\]\s*\{(?P<axes>[^}]*)\})"
)

# Bytes of an element; of what is smaller than a byte, as it lies in memory.
_BYTES = {
  "pred": 1,
  "s2": 0.25,
  "u2": 0.25,
  "s4": 0.5,
  "u4": 0.5,
  "token": 0,
  "opaque": 0,
  "c64": 8,
  "c128": 16,
}

# Names for what is there already: nothing runs.
_FREE = frozenset(
  (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "domain",
  )
)
# Results that are another order or type of the operand's elements: whoever
# takes a slice of the result has read that slice of the operand.
_VIEWS = frozenset(
  ("bitcast", "reshape", "copy", "convert", "transpose", "bitcast-convert")
)
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_COLLECTIVES = frozenset(
  (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
  )
)
# Opcodes of a fusion that moves arrays and computes nothing with them.
_MOVES = (
  _VIEWS | _SLICES | _FREE | {"concatenate", "pad", "broadcast", "fusion"}
)

# What a kernel is for, in the order in which it is shown.
KINDS = (
  "products",
  "attention",
  "head",
  "weight copies",
  "dropout",
  "norms and gates",
  "collectives",
  "rest",
)
_RANDOM = re.compile(r"bernoulli|rng_bit|random_bits|threefry|_uniform")


@dataclasses.dataclass(frozen=True)
class Card:
  """What of a device a kernel is given.

  Attributes:
    flops: of matrix products, a second, as published.
    flops8: of those whose operands have eight bits.
    reached: share of either that a product reaches.
    bytes: of memory, a second.
    link_bytes: that a device sends to the others, a second.
    start: seconds that a kernel takes to start.
  """

  flops: float
  flops8: float
  reached: float
  bytes: float
  link_bytes: float
  start: float


H100 = Card(989e12, 1979e12, 0.8, 3.0e12, 0.4e12, 2e-6)


class Array(NamedTuple):
  """A shape: the element's dtype as HLO writes it, and the sizes."""

  dtype: str
  dims: tuple[int, ...]

  @property
  def elements(self) -> int:
    """Counts the elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> float:
    """Returns the bytes in memory."""
    return self.elements * _itemsize(self.dtype)


def _itemsize(dtype: str) -> float:
  if dtype in _BYTES:
    return _BYTES[dtype]
  # f32, bf16, s8, f8e4m3fn: the first number is the bits.
  bits = re.search(r"\d+", dtype)
  if bits is None:
    raise ValueError(f"an element of unknown size: {dtype}")
  return int(bits[0]) / 8


class Instruction(NamedTuple):
  """A line of a computation.

  Attributes:
    name: without the percent sign.
    arrays: of the result; several where it is a tuple, nested ones flattened.
    opcode: as `dynamic-slice`.
    operands: names in the same computation; of a parameter none.
    text: the line from the opcode on, with its attributes.
    number: of a parameter.
  """

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  text: str
  number: int | None = None

  @property
  def bytes(self) -> float:
    """Returns the bytes of the result."""
    return sum(array.bytes for array in self.arrays)

  @property
  def elements(self) -> int:
    """Counts the elements of the result."""
    return sum(array.elements for array in self.arrays)

  @property
  def op_name(self) -> str:
    """Returns the name of JAX's operation that the instruction comes from."""
    found = _OP_NAME.search(self.text)
    return found[1] if found else ""

  @property
  def target(self) -> str:
    """Returns the library function that a custom call runs."""
    found = _TARGET.search(self.text)
    return found[1] if found else ""


class Computation(NamedTuple):
  """Instructions by name, in their order, and the name of the result."""

  instructions: dict[str, Instruction]
  root: str

  def parameters(self) -> list[Instruction]:
    """Returns the parameters by their number."""
    found = [i for i in self.instructions.values() if i.number is not None]
    return sorted(found, key=lambda i: i.number or 0)


class Kernel(NamedTuple):
  """Work of the device.

  Attributes:
    name: of the instruction.
    kind: one of `KINDS`.
    flops: of matrix products, a run.
    bytes: read and written in the device's memory, a run.
    link_bytes: sent to other devices, a run.
    runs: how often it runs.
    flops8: those of `flops` whose operands have eight bits.
  """

  name: str
  kind: str
  flops: float
  bytes: float
  link_bytes: float
  runs: float
  flops8: float = 0.0

  def seconds(self, card: Card = H100) -> float:
    """Returns the modelled time of all runs."""
    products = (self.flops - self.flops8) / card.flops
    products += self.flops8 / card.flops8
    one = max(
      products / card.reached,
      self.bytes / card.bytes,
      self.link_bytes / card.link_bytes,
    )
    return self.runs * (one + card.start)


class Cost(NamedTuple):
  """What a program costs.

  Attributes:
    kernels: in the order of the text, loops' bodies where the loop stands.
    notes: what had to be guessed, in words; usually none.
  """

  kernels: list[Kernel]
  notes: list[str]

  def flops(self) -> float:
    """Returns the FLOPs of matrix products, attention's among them."""
    return sum(k.flops * k.runs for k in self.kernels)

  def bytes(self) -> float:
    """Returns the bytes of memory, read and written."""
    return sum(k.bytes * k.runs for k in self.kernels)

  def seconds(self, card: Card = H100) -> float:
    """Returns the modelled time: one kernel after the other."""
    return sum(k.seconds(card) for k in self.kernels)

  def by_kind(self, card: Card = H100) -> dict[str, float]:
    """Returns the modelled seconds of each of `KINDS`."""
    found = dict.fromkeys(KINDS, 0.0)
    for kernel in self.kernels:
      found[kernel.kind] += kernel.seconds(card)
    return found


def cost(
  hlo: str,
  *,
  turns: float | None = None,
  seen: float = 1.0,
  vocab: int | None = None,
) -> Cost:
  """Reads what a program costs.

  Args:
    hlo: text of an optimised module, one device's part.
    turns: how often loops turn, in the mean, of which the compiler doesn't
      know it, since the data decides; None if there are to be none.
    seen: share of the causal half of a row's pairs that attention looks at:
      1 where a row is one segment, less where it holds several.
    vocab: rows of the head. A loop with a product that has as many is the
      loss's, and so are logits outside of one; None where that is not to be
      told apart.

  Raises:
    ValueError: a loop with products whose number of turns nobody knows, or a
      product that is hidden in a call of a library.
  """
  return _Reader(hlo, turns, seen, vocab).cost()


def parse(hlo: str) -> tuple[str, dict[str, Computation]]:
  """Returns the entry's name, and the computations of a module by name.

  Raises:
    ValueError: there is no entry.
  """
  entry, found = "", {}
  instructions: dict[str, Instruction] = {}
  for line in hlo.splitlines():
    if match := _COMPUTATION.match(line):
      instructions = {}
      found[match[1]] = Computation(instructions, "")
      name = match[1]
      if line.startswith("ENTRY"):
        entry = name
    elif found and (match := _NAMED.match(line)):
      made = _instruction(match[2], match[3])
      instructions[made.name] = made
      if match[1]:
        found[name] = Computation(instructions, made.name)
  if not entry:
    raise ValueError("no HLO module: it has no ENTRY")
  return entry, found


def _instruction(name: str, text: str) -> Instruction:
  """Reads what stands behind the equals sign: type, opcode, operands."""
  # A tuple's type has parentheses of its own, and spaces.
  end = _close(text, 0) + 1 if text.startswith("(") else text.index(" ")
  arrays = tuple(
    Array(dtype, tuple(int(n.strip("<=")) for n in dims.split(",") if n))
    for dtype, dims in _ARRAY.findall(text[:end])
  )
  rest = text[end:].lstrip()
  start = rest.index("(")
  inside = rest[start + 1 : _close(rest, start)]
  opcode = rest[:start]
  number = int(inside) if opcode == "parameter" else None
  operands = () if opcode == "constant" else _REFERENCE.findall(inside)
  return Instruction(name, arrays, opcode, tuple(operands), rest, number)


def _close(text: str, start: int) -> int:
  """Returns where the parenthesis that opens at `start` is closed."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if not depth:
      return i
  raise ValueError(f"no closing parenthesis: {text[:80]}")


class _Reader:
  """Walks a module's text; see `cost` for the arguments."""

  def __init__(self, hlo, turns, seen, vocab):
    self._entry, self._computations = parse(hlo)
    self._turns, self._seen, self._vocab = turns, seen, vocab
    self._notes: list[str] = []
    # The loop that runs a computation, to follow a value out of it.
    self._loops = {
      self._attribute(i, "body"): (name, i)
      for name, computation in self._computations.items()
      for i in computation.instructions.values()
      if i.opcode == "while"
    }
    self._users: dict[str, dict[str, list[Instruction]]] = {}

  def cost(self) -> Cost:
    """Returns the kernels of the entry and of all that it runs."""
    return Cost(list(self._walk(self._entry, 1.0, None)), self._notes)

  def _walk(self, name: str, runs: float, part: str | None) -> Iterator[Kernel]:
    """Yields the kernels of a computation that runs so many times.

    Args:
      name: the computation.
      runs: how often it runs.
      part: of what loop it is: None outside of loops, else 'head' or 'layers'.
    """
    computation = self._computations[name]
    for one in computation.instructions.values():
      if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
        continue
      if one.opcode == "while":
        body = self._attribute(one, "body")
        yield from self._walk(
          body, runs * self._trips(one, body), part or self._part(body)
        )
      elif one.opcode == "conditional":
        tried = [list(self._walk(c, runs, part)) for c in self._called(one)]
        # Which one runs, the data decides: the dearest counts.
        yield from max(tried, key=lambda ks: sum(k.seconds() for k in ks))
      elif one.opcode in ("call", "async-start"):
        for inner in self._called(one):
          yield from self._walk(inner, runs, part)
      else:
        yield self._kernel(one, computation, name, runs, part)

  def _trips(self, loop: Instruction, body: str) -> float:
    """Returns how often a loop turns.

    Raises:
      ValueError: nobody knows, and there are products in it.
    """
    if found := _TRIPS.search(loop.text):
      return int(found[1])
    if self._turns is not None:
      return self._turns
    if self._products(body):
      raise ValueError(f"a loop of unknown length: {loop.text[:160]}")
    self._notes.append(f"{loop.name}: a loop of unknown length, counted once")
    return 1

  def _part(self, body: str) -> str:
    """Tells the loop over the loss's chunks from that over the layers."""
    vocab = self._vocab
    for product, computation in self._products(body):
      arrays = product.arrays + tuple(
        array
        for operand in product.operands
        for array in computation.instructions[operand].arrays
      )
      if vocab and any(vocab in array.dims for array in arrays):
        return "head"
    return "layers"

  def _products(self, name: str) -> list[tuple[Instruction, Computation]]:
    """Returns the products of a computation and of all that it calls."""
    found = []
    computation = self._computations[name]
    for one in computation.instructions.values():
      if one.opcode == "dot" or (
        one.opcode == "custom-call" and _multiplies(one.target)
      ):
        found.append((one, computation))
      for inner in self._called(one):
        found += self._products(inner)
    return found

  def _called(self, one: Instruction) -> list[str]:
    called = [c for _, c in _CALLED.findall(one.text)]
    if branches := _BRANCHES.search(one.text):
      called += re.findall(r"%?([\w.-]+)", branches[1])
    return called

  def _kernel(self, one, computation, where, runs, part) -> Kernel:
    operands = {name: computation.instructions[name] for name in one.operands}
    flops, flops8, link_bytes = 0.0, 0.0, 0.0
    opcode = one.opcode.removesuffix("-start")
    if one.opcode == "fusion":
      inner = self._fused(one)
      for product in self._products(inner):
        more = _dot_flops(*product)
        flops += more
        flops8 += more * _eight_bits(*product)
      bytes_ = self._fusion_bytes(one, inner, operands)
    elif one.opcode == "dot":
      flops = _dot_flops(one, computation)
      flops8 = flops * _eight_bits(one, computation)
      bytes_ = one.bytes + sum(i.bytes for i in operands.values())
    elif one.opcode in _SLICES:
      # What isn't taken isn't read; a gather's indices are.
      more = [operands[n].bytes for n in one.operands[1:]]
      bytes_ = 2 * one.bytes + sum(more)
    elif one.opcode == "dynamic-update-slice":
      bytes_ = 2 * operands[one.operands[1]].bytes
    elif one.opcode == "scatter":
      bytes_ = self._scatter_bytes(one, operands)
    elif one.opcode == "custom-call":
      flops = self._library_flops(one, operands)
      flops8 = flops * _eight_bits(one, computation) if flops else 0.0
      bytes_ = one.bytes + sum(i.bytes for i in operands.values())
    elif opcode == "copy":
      bytes_ = 2 * sum(i.bytes for i in operands.values())
    elif opcode in _COLLECTIVES:
      bytes_ = 2 * sum(i.bytes for i in operands.values())
      link_bytes = _sent(opcode, one, operands)
    else:
      bytes_ = one.bytes + sum(i.bytes for i in operands.values())
    kind = self._kind(one, operands, where, flops, part)
    return Kernel(one.name, kind, flops, bytes_, link_bytes, runs, flops8)

  def _fused(self, one: Instruction) -> str:
    return self._attribute(one, "calls")

  def _attribute(self, one: Instruction, name: str) -> str:
    """Returns the computation that an instruction runs under that name."""
    return dict(_CALLED.findall(one.text))[name]

  def _fusion_bytes(self, one, inner, operands) -> float:
    """Returns what a fusion reads of its operands and writes."""
    computation = self._computations[inner]
    read: dict[str, float] = {}
    for parameter, name in zip(
      computation.parameters(), one.operands, strict=True
    ):
      # An operand that is given twice lies in memory once.
      bytes_ = self._read(inner, parameter, parameter.bytes)
      read[name] = max(read.get(name, 0.0), bytes_)
    return sum(read.values()) + self._written(inner, computation.root)

  def _read(self, where: str, value: Instruction, whole: float) -> float:
    """Returns the bytes that a computation reads of a value.

    Args:
      where: the computation.
      value: a parameter, or a view of one.
      whole: the parameter's bytes, the most that can be read.
    """
    # A view has the parameter's elements, in a dtype that is not in memory.
    per = whole / max(1, value.elements)
    total = 0.0
    for user in self._uses(where, value.name):
      first = user.operands[0] == value.name
      alone = first and user.operands.count(value.name) == 1
      if user.opcode in _VIEWS:
        total += self._read(where, user, whole)
      elif user.opcode in _SLICES and alone:
        total += per * user.elements
      elif user.opcode in ("dynamic-update-slice", "scatter") and alone:
        # Written in place: what is left alone is not read. A scatter may add.
        total += self._written(where, user.name) if _adds(user) else 0.0
      elif user.opcode == "tuple":
        continue
      elif user.opcode == "fusion":
        inner = self._fused(user)
        parameters = self._computations[inner].parameters()
        for parameter, name in zip(parameters, user.operands, strict=True):
          if name == value.name:
            total += self._read(inner, parameter, whole)
      else:
        return whole
    return min(total, whole)

  def _uses(self, where: str, name: str) -> list[Instruction]:
    if where not in self._users:
      found = self._users[where] = {}
      for user in self._computations[where].instructions.values():
        for operand in dict.fromkeys(user.operands):
          found.setdefault(operand, []).append(user)
    return self._users[where].get(name, [])

  def _written(self, where: str, name: str) -> float:
    """Returns the bytes that a computation writes for a result."""
    instructions = self._computations[where].instructions
    one = instructions[name]
    if one.opcode == "tuple":
      return sum(self._written(where, n) for n in dict.fromkeys(one.operands))
    if one.opcode in _VIEWS:
      inside = self._written(where, one.operands[0])
      # In another dtype than it was made in: as it is written.
      return inside * one.bytes / max(1, instructions[one.operands[0]].bytes)
    if one.opcode == "dynamic-update-slice" and self._given(where, one):
      return instructions[one.operands[1]].bytes
    if one.opcode == "scatter" and self._given(where, one):
      count = (len(one.operands) - 1) // 2
      return sum(instructions[n].bytes for n in one.operands[-count:])
    return one.bytes

  def _given(self, where: str, one: Instruction) -> bool:
    """Returns whether what is updated was there before, as a parameter."""
    instructions = self._computations[where].instructions
    base = instructions[one.operands[0]]
    while base.opcode in _VIEWS:
      base = instructions[base.operands[0]]
    return base.opcode in ("parameter", "get-tuple-element")

  def _scatter_bytes(self, one, operands) -> float:
    count = (len(one.operands) - 1) // 2
    updates = sum(operands[n].bytes for n in one.operands[-count:])
    return (3 if _adds(one) else 2) * updates + operands[
      one.operands[count]
    ].bytes

  def _library_flops(self, one, operands) -> float:
    """Returns the FLOPs of a library's function.

    Raises:
      ValueError: it multiplies, and how much can't be read.
    """
    if "fmha" in one.target:
      return self._attention_flops(one, operands)
    if not _multiplies(one.target):
      return 0.0
    found = _CONTRACTED_BY_LIBRARY.search(one.text)
    if found is None:
      raise ValueError(f"a product that can't be read: {one.text[:160]}")
    left = operands[one.operands[0]].arrays[0]
    inner = [left.dims[int(n.strip(' "'))] for n in found[1].split(",") if n]
    return 2.0 * one.arrays[0].elements * math.prod(inner)

  def _attention_flops(self, one, operands) -> float:
    """Counts the products of all pairs that are looked at.

    Queries are `[B, T, N, H]`, keys `[B, S, K, H]`: a forward pass has two
    products of `2 H` FLOPs a pair, a backward pass five.
    """
    query, key = (operands[n].arrays[0].dims for n in one.operands[:2])
    pairs = math.prod(query[:3]) * key[1]
    products = 5 if "Backward" in one.target else 2
    half = 0.5 if "CAUSAL" in one.text else 1.0
    return products * 2.0 * query[3] * pairs * half * self._seen

  def _kind(self, one, operands, where, flops, part) -> str:
    """Returns what a kernel is for, one of `KINDS`."""
    if one.opcode.removesuffix("-start") in _COLLECTIVES:
      return "collectives"
    if "fmha" in one.target:
      return "attention"
    if part == "head" or self._of_the_head(one, operands, flops):
      return "head"
    if flops:
      return "products"
    if self._copies_weights(one, where):
      return "weight copies"
    names = [one.op_name]
    if one.opcode == "fusion":
      inner = self._computations[self._fused(one)].instructions
      names += [i.op_name for i in inner.values()]
    if any(map(_RANDOM.search, names)) or one.opcode == "rng-bit-generator":
      return "dropout"
    return "norms and gates" if part else "rest"

  def _of_the_head(self, one, operands, flops) -> bool:
    """Returns whether a kernel reads or makes logits, in no loop of theirs.

    Of few slots there is one chunk, and the compiler takes the loop away. An
    embedding has as many rows, too: that one is only read.
    """
    arrays = [a for i in (one, *operands.values()) for a in i.arrays]
    return self._vocab is not None and any(
      self._vocab in (array.dims if flops else array.dims[1:])
      for array in arrays
    )

  def _copies_weights(self, one: Instruction, where: str) -> bool:
    """Returns whether a kernel does no more than move a loop's weights."""
    opcodes = {one.opcode}
    if one.opcode == "fusion":
      inner = self._computations[self._fused(one)].instructions.values()
      # Arithmetic on single numbers is that of an index.
      opcodes = {i.opcode for i in inner if i.elements > 1}
    if where not in self._loops or not opcodes <= _MOVES | {"fusion", "copy"}:
      return False
    large = max(
      (self._computations[where].instructions[n] for n in one.operands),
      key=lambda i: i.bytes,
      default=None,
    )
    return large is not None and self._argument(where, large.name)

  def _argument(self, where: str, name: str) -> bool:
    """Returns whether a value is one of the program's arguments.

    It is followed through views and out of the loops that only hand it on.
    """
    instructions = self._computations[where].instructions
    one = instructions[name]
    while one.opcode in _VIEWS:
      one = instructions[one.operands[0]]
    if one.opcode == "parameter":
      return where == self._entry
    if one.opcode == "fusion" and self._views_only(one):
      return self._argument(where, one.operands[0])
    if one.opcode != "get-tuple-element" or where not in self._loops:
      return False
    source = instructions[one.operands[0]]
    if source.opcode != "parameter":
      return False
    index = int(_INDEX.findall(one.text)[0])
    outside, loop = self._loops[where]
    around = self._computations[outside].instructions
    given = around[loop.operands[0]]
    if given.opcode != "tuple":
      return False
    return self._argument(outside, given.operands[index])

  def _views_only(self, one: Instruction) -> bool:
    """Returns whether a fusion is its one operand in another order or dtype."""
    inner = self._computations[self._fused(one)].instructions.values()
    return len(one.operands) == 1 and all(
      i.opcode in _VIEWS or i.opcode == "parameter" for i in inner
    )


def _multiplies(target: str) -> bool:
  return any(word in target for word in ("matmul", "gemm", "$dot", "$conv"))


def _adds(one: Instruction) -> bool:
  """Returns whether a scatter reads what it writes over."""
  return one.opcode == "scatter" and "add" in one.op_name


def _dot_flops(one: Instruction, computation: Computation) -> float:
  """Counts a product's multiplications and additions.

  Raises:
    ValueError: a library's product inside of a fusion.
  """
  contracted = _CONTRACTED.search(one.text)
  if one.opcode != "dot" or contracted is None:
    raise ValueError(f"a product that can't be read: {one.text[:160]}")
  left = computation.instructions[one.operands[0]].arrays[0]
  inner = [left.dims[int(i)] for i in contracted[1].split(",") if i]
  return 2.0 * one.arrays[0].elements * math.prod(inner)


def _eight_bits(one: Instruction, computation: Computation) -> bool:
  """Returns whether both operands of a product have eight bits.

  What is made wider before it is multiplied is multiplied as what it is then.
  """
  read = [computation.instructions[name] for name in one.operands[:2]]
  return len(read) > 1 and all(
    array.dtype.startswith("f8") for i in read for array in i.arrays
  )


def _sent(opcode: str, one: Instruction, operands) -> float:
  """Returns the bytes that a device sends, around a ring of the group."""
  size = _group_size(one.text)
  given = sum(i.bytes for i in operands.values())
  share = (size - 1) / size if size else 1.0
  if opcode == "all-reduce":
    return 2 * share * given
  if opcode == "all-gather":
    return share * size * given
  if opcode.startswith("collective"):
    return given
  return share * given


@functools.cache
def _group_size(text: str) -> int:
  """Returns how many devices a collective is among; 0 where it isn't said."""
  found = _GROUPS.search(text)
  if found is None:
    return 0
  if found["flat"]:
    return int(found["flat"])
  if found["listed"]:
    return len(found["listed"].split(","))
  sizes = dict(re.findall(r"'(\w+)'=(\d+)", found["mesh"]))
  return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", found["axes"]))
