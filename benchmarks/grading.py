"""How fast answers are graded, beside math-verify alone.

    python benchmarks/grading.py [--cases FILE.jsonl]

Integers: responses of about 2,000 characters that end in a box with an
integer, in the ways that models write them, a third of them wrong and some
without a box. Expressions: boxes that take algebra. Both graders get the same
texts, by turns; ours in a batch with its worker processes, math-verify in this
process with the time limits that it has by default. With --cases (JSON lines
with `completion` and `gold`) the time of a single verdict, one by one, is
measured too.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

_SPELLINGS = (
  "{n}",
  "{n:,}",
  "{n}.",
  "0{n}",
  "x = {n}",
  "{n}^\\circ",
  "\\text{{{n}}}",
  "{n}\\text{{ ways}}",
)
_EXPRESSIONS = (
  ("\\sqrt{{{n}}}", "\\sqrt{{{n}}}"),
  ("\\frac{{{n}+1}}{{2}}x", "\\frac{{x({n}+1)}}{{2}}"),
  ("{n}\\pi", "\\pi\\cdot{n}"),
  ("(x+{n})^2", "x^2+2\\cdot{n}x+{n}^2"),
)


def integers(count: int, rng: random.Random) -> list[tuple[str, str]]:
  """Pairs of a completion and its gold, the gold an integer."""
  pairs = []
  for _ in range(count):
    gold = rng.randrange(1000)
    said = gold if rng.random() < 2 / 3 else rng.randrange(1000)
    box = rng.choice(_SPELLINGS).format(n=said)
    thought = "We add both sides and get $x^2 = y$, so it goes on. " * 40
    end = f"\\boxed{{{box}}}" if rng.random() < 0.95 else "I don't know."
    pairs.append((f"<think>\n{thought}</think>\nHence {end}", str(gold)))
  return pairs


def expressions(count: int, rng: random.Random) -> list[tuple[str, str]]:
  """Pairs whose comparison takes algebra, no two alike."""
  pairs = []
  for n in range(count):
    gold, answer = rng.choice(_EXPRESSIONS)
    said = n if rng.random() < 2 / 3 else n + 1
    pairs.append((f"\\boxed{{{answer.format(n=said)}}}", gold.format(n=n)))
  return pairs


def library(completion: str, gold: str) -> bool:
  """math-verify alone."""
  import math_verify

  return math_verify.verify(
    math_verify.parse(f"${gold}$"), math_verify.parse(completion)
  )


def seconds(call) -> float:
  """Wall-clock seconds of a call."""
  began = time.perf_counter()
  call()
  return time.perf_counter() - began


def main() -> None:
  """Prints two tables."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--integers", type=int, default=20_000)
  parser.add_argument("--expressions", type=int, default=2_000)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--cases", type=Path)
  arguments = parser.parse_args()
  from trd_jax.grading.math import verifier as grading

  rng = random.Random(0)
  # The first verdicts start the workers and import sympy on both sides.
  grading.verify_batch([("\\boxed{x+x}", "2x"), ("\\boxed{y+y}", "2y")])
  library("\\boxed{x+x}", "2x")
  print("| answers | ours, verdicts/s | math-verify, verdicts/s | ratio |")
  print("|---|---|---|---|")
  for name, make, count in (
    ("integers", integers, arguments.integers),
    ("expressions", expressions, arguments.expressions),
  ):
    ours, theirs = [], []
    for _ in range(arguments.repeats):
      pairs = make(count, rng)
      few = pairs[: max(1, count // 10)]
      grading._known.clear()  # or a second turn would only remember
      ours.append(count / seconds(lambda p=pairs: grading.verify_batch(p)))
      theirs.append(
        len(few) / seconds(lambda p=few: [library(*pair) for pair in p])
      )
    one, other = statistics.median(ours), statistics.median(theirs)
    print(f"| {name} | {one:,.0f} | {other:,.0f} | {one / other:.1f} |")
  if arguments.cases:
    with arguments.cases.open() as lines:
      rows = [json.loads(line) for line in lines]
    times = sorted(
      1e3 * seconds(lambda r=row: grading.verify(r["completion"], r["gold"]))
      for row in rows
    )
    p99 = times[int(0.99 * (len(times) - 1))]
    print(
      f"\n{len(times)} cases one by one: median"
      f" {statistics.median(times):.2f} ms, p99 {p99:.1f} ms, longest"
      f" {times[-1]:,.0f} ms"
    )
  grading.close()


if __name__ == "__main__":
  main()
