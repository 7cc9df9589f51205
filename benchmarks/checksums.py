"""What the digests of shards and checkpoints cost.

    python benchmarks/checksums.py

Hashes: MiB a second of each of `hashlib`, over bytes in memory. A checkpoint of
an adapter with Adam's moments (at rank 64 an 8B model's has 2 GB, 1.9 times the
default here): its save until it is on the disk, its digests alone, which are in
it, and a restore with and without comparing them. A shard of 256 rows of 4,096
tokens: reading it with and without its digest. Every number is the median of
the repeats, in seconds; files are in the page cache, so that what is compared
is the computing.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

from trd_jax.distill.checkpoint import Checkpoints
from trd_jax.experiment import shards
from trd_jax.experiment.files import digests
from trd_jax.experiment.records import Trajectory

HASHES = ("sha256", "sha1", "blake2b", "blake2s", "md5")


def median(work: Callable[[], object], repeats: int) -> float:
  """The median seconds of a piece of work, after a first run."""
  work()
  seconds = []
  for _ in range(repeats):
    began = time.perf_counter()
    work()
    seconds.append(time.perf_counter() - began)
  return statistics.median(seconds)


def hashes(size: int, repeats: int) -> None:
  """One table of all hashes."""
  content = os.urandom(size << 20)
  for name in HASHES:
    seconds = median(lambda n=name: hashlib.new(n, content).digest(), repeats)
    print(f"{name:<28} {size / seconds:8.0f} MiB/s")


def checkpoint(folder: Path, size: int, repeats: int) -> None:
  """Save, digests and restore of a checkpoint of so many MiB."""
  count = (size << 20) // 12
  random = np.random.default_rng(0)
  tree = {
    name: random.standard_normal(count, np.float32)
    for name in ("lora", "mu", "nu")
  }
  checkpoints = Checkpoints(folder, keep=1)
  steps = iter(range(1, 100))

  def save():
    checkpoints.save(next(steps), tree)
    checkpoints.wait()

  def restore():
    Checkpoints(folder, keep=1).restore(tree)

  print(f"checkpoint of {size} MiB")
  print(f"{'  save, on disk':<28} {median(save, repeats):8.2f} s")
  newest = folder / str(checkpoints.latest())
  listed = median(lambda: digests.difference(newest), repeats)
  print(f"{'  of it the digests':<28} {listed:8.2f} s")
  print(f"{'  restore, compared':<28} {median(restore, repeats):8.2f} s")
  with mock.patch.object(digests, "difference", return_value=None):
    print(f"{'  restore, not compared':<28} {median(restore, repeats):8.2f} s")


def shard(folder: Path, repeats: int) -> None:
  """Reading a shard of 256 rows."""
  random = np.random.default_rng(0)
  with shards.ShardWriter(folder, Trajectory) as writer:
    for number in range(256):
      ids = random.integers(0, 150_000, 4096).tolist()
      writer.add(
        Trajectory(
          key=f"{number:032x}",
          problem_id=str(number),
          stage="rollout",
          prompt_ids=ids[:200],
          response_ids=ids,
          text=" ".join(map(str, ids[:2000])),
          finish_reason="stop",
          truncated=False,
          seed=number,
          thinking=None,
          sampling="{}",
          model="model",
          model_revision="0",
          prompt_version="0",
          draft_key=None,
          draft_elided_tokens=0,
          correct=True,
          reason="match",
          extracted=None,
          grader_version="0",
        )
      )
  (path,) = folder.glob("shard-*.parquet")

  def read():
    shards.read_table(path, Trajectory)

  print(f"shard of 256 rows, {path.stat().st_size / 2**20:.1f} MiB")
  print(f"{'  read, compared':<28} {median(read, repeats):8.4f} s")
  bare = folder / "shard-0.parquet"
  path.rename(bare)
  without = median(lambda: shards.read_table(bare, Trajectory), repeats)
  print(f"{'  read, not compared':<28} {without:8.4f} s")


def main() -> None:
  """Prints three tables."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--size", type=int, default=1024, help="MiB")
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    hashes(min(args.size, 256), args.repeats)
    shard(Path(folder) / "rows", args.repeats)
    checkpoint(Path(folder) / "checkpoints", args.size, args.repeats)


if __name__ == "__main__":
  main()
