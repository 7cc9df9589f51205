"""How long training takes until its first update, compiled anew or found.

    python benchmarks/startup.py --repeats 3

Runs the train stage on the demo's trajectories up to its first update, each
time in a process and a workdir of its own: with an empty compilation cache
(`cold`), and then with what that has left there (`warm`). Seconds and
CPU-seconds are those of the whole process: imports, weights, compilation, one
update and its checkpoint. Needs os.wait4.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from teacher import RECORDED, share, stage


def main() -> None:
  """Measures and prints a table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--regime", default="opd", choices=("opd", "opsd"))
  parser.add_argument("--workdir", type=Path, default=Path("runs/startup"))
  args = parser.parse_args()

  shared = args.workdir / f"trajectories-{args.regime}"
  for name in ("rollout", "refine"):
    stage(name, args.regime, shared)
  spent = {"cold": [], "warm": []}
  for repeat in range(args.repeats):
    with tempfile.TemporaryDirectory() as cache:
      for start, runs in spent.items():
        workdir = args.workdir / f"{args.regime}-{os.getpid()}-{repeat}-{start}"
        share(shared, workdir, RECORDED)
        begun = time.perf_counter()
        cpu = stage(
          "train",
          args.regime,
          workdir,
          "train.max_steps=1",
          JAX_COMPILATION_CACHE_DIR=cache,
        )
        runs.append((time.perf_counter() - begun, cpu))
        shutil.rmtree(workdir)
  cold, warm = (
    [statistics.median(column) for column in zip(*runs, strict=True)]
    for runs in spent.values()
  )
  print(f"{args.regime}, median of {args.repeats}\n\nstart  seconds   CPU-s")
  for name, (seconds, cpu) in (("cold", cold), ("warm", warm)):
    print(f"{name:<7}{seconds:>7.1f}{cpu:>8.1f}")
  print(f"ratio  {warm[0] / cold[0]:>7.2f}{warm[1] / cold[1]:>8.2f}")


if __name__ == "__main__":
  main()
