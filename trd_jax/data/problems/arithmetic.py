r"""The laboratory's world: chained modular arithmetic with worked solutions.

A problem is a start value and a chain of operations modulo 20:

    Start at 3, add 7, times 4, minus 9.

Its reference solution works one line a step and ends in a box:

    3+7=10
    10*4=0
    0-9=11
    \boxed{11}

`write` produces what a fallible writer would put on paper. A step *slips* with
a probability of its operation, and always to the same typical wrong value of
that step, so that a model trained on such text reproduces the mistake at any
sampling temperature. A slip is then either caught at once, on a line opened by
an onset word ("Wait, 3+7=10"), or never, and the chain goes on from the wrong
value: the place where a draft first fails is known exactly.

The operation `f` is a fixed table of 20 facts. A writer with `misremembers`
above zero hasn't mastered it and as often writes another table's value.
"""

import dataclasses
import hashlib
import json
import random

from trd_jax.data.problems import sources
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import Problem, Rejected
from trd_jax.experiment.schema import Data

MODULUS = 20
WORDS = {"+": "add", "-": "minus", "*": "times"}

# The facts behind `f`, and what somebody who hasn't mastered them remembers:
# permutations of 0..19 that agree nowhere, with each other or the identity.
F_TABLE = (13, 4, 17, 9, 0, 11, 2, 16, 5, 19, 7, 14, 3, 8, 18, 1, 12, 6, 10, 15)
F_MISREMEMBERED = (
  3,
  9,
  14,
  19,
  13,
  10,
  5,
  2,
  1,
  8,
  6,
  0,
  4,
  15,
  12,
  16,
  18,
  11,
  7,
  17,
)

# Words that open a correction, and how often each is used.
ONSETS = {"Wait": 10, "Hmm": 3, "Oops": 3, "Actually": 2, "Hold on": 2}


@dataclasses.dataclass(frozen=True)
class Chain:
  """A start value and `(operation, operand)` steps; `f` has operand 0."""

  start: int
  steps: tuple[tuple[str, int], ...]

  @property
  def text(self) -> str:
    """Returns the problem as it is put to a model."""
    parts = [f"Start at {self.start}"]
    for op, operand in self.steps:
      parts.append("apply f" if op == "f" else f"{WORDS[op]} {operand}")
    return ", ".join(parts) + "."

  @property
  def answer(self) -> int:
    """Returns the value at the end of the chain."""
    value = self.start
    for op, operand in self.steps:
      value = evaluate(op, value, operand)
    return value

  @property
  def solution(self) -> str:
    """Returns the reference y*: every step worked, the answer in a box."""
    return write(self, PERFECT, random.Random(0))


@dataclasses.dataclass(frozen=True)
class Writer:
  """How fallible a writer is.

  Attributes:
    slip: probability of the typical wrong value, by operation.
    caught: probability that a slip is corrected on the next line.
    misremembers: probability that an `f` line holds the wrong table's value.
  """

  slip: tuple[tuple[str, float], ...] = ()
  caught: float = 0.3
  misremembers: float = 0.0


PERFECT = Writer()


def evaluate(op: str, value: int, operand: int) -> int:
  """Works one step rightly, modulo 20."""
  if op == "+":
    return (value + operand) % MODULUS
  if op == "-":
    return (value - operand) % MODULUS
  if op == "*":
    return (value * operand) % MODULUS
  return F_TABLE[value]


def slip(op: str, value: int, operand: int) -> int:
  """Returns a step's typical wrong value: a lost carry, a sign, a row off.

  May equal the right value (`10 - 10` turned round is still 0); such a step
  cannot slip.
  """
  if op == "+":
    return (value + operand + 10) % MODULUS
  if op == "-":
    return (operand - value) % MODULUS
  return (value * (operand + 1)) % MODULUS


def write(chain: Chain, writer: Writer, rng: random.Random) -> str:
  """Writes a worked solution as a fallible writer would, drawn with `rng`."""
  rates = dict(writer.slip)
  lines = []
  value = chain.start
  for op, operand in chain.steps:
    left = f"f({value})" if op == "f" else f"{value}{op}{operand}"
    right = evaluate(op, value, operand)
    wrong = right if op == "f" else slip(op, value, operand)
    # The order and number of draws is part of what a seed means: another draw
    # here and every corpus made before is another one.
    if op == "f" and rng.random() < writer.misremembers:
      right = F_MISREMEMBERED[value]
    if wrong != right and rng.random() < rates.get(op, 0.0):
      lines.append(f"{left}={wrong}")
      if rng.random() < writer.caught:
        onset = rng.choices(list(ONSETS), list(ONSETS.values()))[0]
        lines.append(f"{onset}, {left}={right}")
        value = right
      else:
        value = wrong
    else:
      lines.append(f"{left}={right}")
      value = right
  lines.append(rf"\boxed{{{value}}}")
  return "\n".join(lines)


def draw(
  rng: random.Random, min_steps: int, max_steps: int, facts: float = 0.0
) -> Chain:
  """Draws a random chain; each step is an `f` with probability `facts`."""
  steps = []
  for _ in range(rng.randint(min_steps, max_steps)):
    if rng.random() < facts:
      steps.append(("f", 0))
    else:
      steps.append((rng.choice("+-*"), rng.randint(2, 9)))
  return Chain(rng.randrange(MODULUS), tuple(steps))


@dataclasses.dataclass(frozen=True)
class Split:
  """Which problems a split draws: chain lengths, share of `f`, held out."""

  min_steps: int
  max_steps: int
  facts: float
  held_out: bool


SPLITS = {
  "train": Split(4, 7, 0.0, held_out=False),
  "heldout": Split(4, 7, 0.0, held_out=True),
  "hard": Split(7, 10, 0.2, held_out=True),
  "train_hard": Split(7, 10, 0.2, held_out=False),
}


def is_held_out(text: str) -> bool:
  """Returns whether a problem is of the tenth that no corpus ever shows."""
  # By the text alone, 26 of 256 values of a byte: no seed and no split can
  # bring a held-out problem into training.
  return hashlib.sha256(text.encode()).digest()[0] < 26


def generate(
  split: str,
  num_problems: int,
  seed: int,
  min_steps: int | None = None,
  max_steps: int | None = None,
) -> list[Problem]:
  """Draws distinct problems of a split, the same for the same arguments.

  Args:
    split: `train`, `heldout`, `hard` or `train_hard`.
    num_problems: how many.
    seed: seed of the draw.
    min_steps: shortest chain, the split's own where None.
    max_steps: longest chain, the split's own where None.

  Raises:
    UserError: on an unknown split or an impossible length.
  """
  spec = _split(split)
  low = spec.min_steps if min_steps is None else min_steps
  high = spec.max_steps if max_steps is None else max_steps
  if not 1 <= low <= high:
    raise UserError(
      f"data.arithmetic.min_steps={low} and max_steps={high} leave no chain"
      " length; use 1 <= min_steps <= max_steps"
    )
  # The split is in the seed, so that each draws a stream of its own; a text is
  # hashed in the same way by every Python.
  rng = random.Random(f"{split}/{seed}")
  problems: dict[str, Problem] = {}
  misses = 0
  while len(problems) < num_problems:
    # Counts draws since the last new problem: short chains run out.
    misses += 1
    # So long without a new one: nearly all chains are taken. How many there are
    # can't be counted beforehand, as a hash decides which are held out.
    if misses > 20_000:
      raise UserError(
        f"data.arithmetic.num_problems={num_problems} is more than the distinct"
        f" chains of {low} to {high} steps; ask for fewer or for longer chains"
      )
    chain = draw(rng, low, high, spec.facts)
    if is_held_out(chain.text) != spec.held_out or chain.text in problems:
      continue
    problems[chain.text] = Problem(
      problem_id=hashlib.sha256(chain.text.encode()).hexdigest()[:16],
      text=chain.text,
      answer=str(chain.answer),
      solution=chain.solution,
      domain="arithmetic",
      source=f"arithmetic/{split}",
      tests=None,
      meta=json.dumps({"steps": len(chain.steps)}),
    )
    misses = 0
  return list(problems.values())


def _split(name: str) -> Split:
  if name not in SPLITS:
    raise UserError(
      f"data.arithmetic.split={name}: there is no such split; choose from"
      f" {', '.join(SPLITS)}"
    )
  return SPLITS[name]


def check(data: Data) -> None:
  """Sees that there is such a split.

  Raises:
    UserError: there isn't.
  """
  _split(data.arithmetic.split)


def load(data: Data) -> tuple[list[Problem], list[Rejected]]:
  """Draws an experiment's problems; none is ever rejected."""
  spec = data.arithmetic
  problems = generate(
    spec.split, spec.num_problems, data.seed, spec.min_steps, spec.max_steps
  )
  return problems, []


SOURCE = sources.Source(load, check=check)
