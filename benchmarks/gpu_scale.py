"""The sizes that `gpu.py` measures at, and its clock."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import shapes

REPEATS = 5
# A case's figures by name, or why there are none.
Measures = dict[str, float] | str
Case = tuple[str, Callable[[], Measures]]


class Clock:
  """How long a section may still take.

  Args:
    seconds: from now.
  """

  def __init__(self, seconds: float):
    self._end = time.monotonic() + seconds

  def left(self) -> float:
    """Seconds; below 0 when they are over."""
    return self._end - time.monotonic()

  def median(self, run: Callable[[], Any]) -> tuple[float, int]:
    """Seconds that `run` takes, waited for: the median, and of how many.

    The first run, which compiles, doesn't count. Of the others there are
    `REPEATS`, or fewer, but one at least, where the time ends before.
    """
    jax.block_until_ready(run())
    taken = []
    while len(taken) < REPEATS and (not taken or self.left() > taken[-1]):
      start = time.perf_counter()
      jax.block_until_ready(run())
      taken.append(time.perf_counter() - start)
    return statistics.median(taken), len(taken)


@dataclasses.dataclass(frozen=True)
class Scale:
  """Sizes of everything.

  Attributes:
    copied: bytes of the array that is copied.
    products: M, K, N of the matrix products.
    heads: pairs of a model's name and chunk sizes.
    head_rows: response tokens of the head (R).
    attention: name of the model whose heads attend.
    forward_and_back: lengths T of attention with its gradient.
    forward: lengths T of attention without.
    steps: names of student and of OPD's teacher, or None.
    medians: lengths of the typical trajectory.
    longest: lengths of the longest.
    samples: trajectories of an update at the medians.
    pack: tokens of the large student pack.
  """

  copied: int
  products: tuple[tuple[int, int, int], ...]
  heads: tuple[tuple[str, tuple[int, ...]], ...]
  head_rows: int
  attention: str
  forward_and_back: tuple[int, ...]
  forward: tuple[int, ...]
  opsd: str
  opd: tuple[str, str]
  medians: shapes.Lengths
  longest: shapes.Lengths
  samples: int
  pack: int


SCALES = {
  "full": Scale(
    copied=4 * 2**30,
    products=((8192, 8192, 8192), (8192, 4096, 12_288), (2048, 4096, 151_936)),
    heads=(
      ("8b", (1024, 512, 2048, 4096, 256)),
      ("1.7b", (2048, 512, 1024, 4096, 256)),
    ),
    head_rows=8192,
    attention="8b",
    forward_and_back=(4096, 16_384, 1024),
    forward=(38_912,),
    opsd="8b",
    opd=("1.7b", "8b"),
    medians=shapes.MEDIANS,
    longest=shapes.LONGEST,
    samples=16,
    pack=16_384,
  ),
  "small": Scale(
    copied=2**20,
    products=((128, 128, 128),),
    heads=(("tiny", (16, 32)),),
    head_rows=64,
    attention="tiny",
    forward_and_back=(128,),
    forward=(256,),
    opsd="tiny",
    opd=("tiny", "tiny"),
    medians=shapes.Lengths(student=40, teacher=80, response=24),
    longest=shapes.Lengths(student=96, teacher=160, response=64),
    samples=4,
    pack=128,
  ),
}
