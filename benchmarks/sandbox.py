"""What the sandbox costs: launches and verdicts a second, over workers.

    python benchmarks/sandbox.py

Launches: `/usr/bin/true`, and the interpreter with an empty program, in the
sandbox and as bare subprocesses, alternately, one after another. Verdicts: a
right program against a problem of ten tests, with N workers, by the grader
(one sandbox and one interpreter a program, forked for each test) and, as the
obvious other way, with one sandbox and one interpreter for each test. Every
number is the median of the repeats, in seconds or a second.
"""

import argparse
import concurrent.futures
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

from trd_jax.experiment.schema import Sandbox
from trd_jax.grading.code import code_tests
from trd_jax.grading.code import programs as code
from trd_jax.grading.code.compare import same_output
from trd_jax.grading.sandbox import sandbox

PROGRAM = "print(sum(map(int, input().split())))"
TESTS = {
  "inputs": [f"{i} {i + 1}\n" for i in range(10)],
  "outputs": [f"{2 * i + 1}\n" for i in range(10)],
}


def median_seconds(
  works: dict[str, Callable[[], object]], repeats: int
) -> dict[str, float]:
  """The median time of each piece of work; they take turns."""
  times: dict[str, list[float]] = {name: [] for name in works}
  for work in works.values():
    work()  # a first run warms up
  for _ in range(repeats):
    for name, work in works.items():
      start = time.perf_counter()
      work()
      times[name].append(time.perf_counter() - start)
  return {name: statistics.median(each) for name, each in times.items()}


def launches(box: sandbox.Box, repeats: int) -> None:
  """One launch after another, in the sandbox and without."""
  true, empty = ["/usr/bin/true"], [box.python, "-I", "-S", "-c", ""]

  def bare(argv):
    return lambda: subprocess.run(argv, capture_output=True, check=True)

  found = median_seconds(
    {
      "true, bare": bare(true),
      "true, sandboxed": lambda: box.run(true),
      "python, bare": bare(empty),
      "python, sandboxed": lambda: box.run(empty),
    },
    repeats,
  )
  print(f"{'launch':20} {'ms':>8} {'a second':>10}")
  for name, seconds in found.items():
    print(f"{name:20} {1000 * seconds:8.1f} {1 / seconds:10.1f}")


def by_grader(workers: int, programs: int) -> Callable[[], None]:
  """Grades so many programs by the project's grader."""
  grader = code.Grader(Sandbox(workers=workers))

  def work():
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
      jobs = [
        pool.submit(grader.grade_program, PROGRAM, TESTS)
        for _ in range(programs)
      ]
      assert all(job.result().correct for job in jobs)

  return work


def a_box_a_test(
  box: sandbox.Box, workers: int, programs: int
) -> Callable[[], None]:
  """Grades as many programs with a sandbox for each test."""
  tests = code_tests.parse(TESTS)

  def grade() -> bool:
    argv = [box.python, "-I", "-S", "-B", "-X", "utf8", "main.py"]
    files = {"main.py": PROGRAM.encode()}
    return all(
      same_output(
        str(case.expected),
        box.run(argv, case.given.encode(), files).stdout,
        True,
      )
      for case in tests.cases
    )

  def work():
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
      jobs = [pool.submit(grade) for _ in range(programs)]
      assert all(job.result() for job in jobs)

  return work


def verdicts(box: sandbox.Box, args) -> None:
  """Verdicts a second for each number of workers."""
  print(
    f"\n{'workers':>7} {'verdicts/s':>11} {'tests/s':>8}"
    f" {'a box a test':>13} {'ratio':>6}"
  )
  for workers in args.workers:
    count = args.programs * workers
    found = median_seconds(
      {
        "grader": by_grader(workers, count),
        "boxes": a_box_a_test(box, workers, count),
      },
      args.repeats,
    )
    ours, other = count / found["grader"], count / found["boxes"]
    print(
      f"{workers:7} {ours:11.1f} {10 * ours:8.0f} {other:13.1f}"
      f" {ours / other:6.2f}"
    )


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--launches", type=int, default=50)
  parser.add_argument("--programs", type=int, default=8, help="for each worker")
  parser.add_argument("--workers", type=int, nargs="*")
  args = parser.parse_args()
  cores = os.cpu_count() or 1
  args.workers = args.workers or sorted({1, 2, cores, 2 * cores})
  print(f"{cores} cores, Python {platform.python_version()}")
  box = sandbox.open()
  launches(box, args.launches)
  verdicts(box, args)


if __name__ == "__main__":
  main()
