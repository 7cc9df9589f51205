"""Rollouts that are killed, and what they leave on disk."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq

from trd_jax.experiment.run_dir import RunDir

ROWS_PER_SHARD = 4

# Shards of few rows land often, so that a kill finds some on disk; and every
# row is noted as it is made, on disk or not.
_PROGRAM = f"""
import os, sys
from trd_jax import rollout
from trd_jax.experiment import cli, records, run_dir, shards
write, add = run_dir.RunDir.shard_writer, shards.ShardWriter.add
def noted(self, row):
  if isinstance(row, records.Trajectory):
    os.write(note, (row.key + '\\n').encode())
  add(self, row)
def small(self, stage, kind, **sizes):
  return write(self, stage, kind, {ROWS_PER_SHARD})
# What vLLM starts imports this file too.
if __name__ == '__main__':
  note = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
  shards.ShardWriter.add = noted
  run_dir.RunDir.shard_writer = small
  cli.main('rollout', rollout.run, '')
"""


class Rollout:
  """A rollout in processes of its own, in one run directory.

  Args:
    folder: where all of it goes.
    python: the interpreter.
    flags: of the stage.
  """

  def __init__(self, folder: Path, python: Path | str, *flags: str):
    self.run_dir = RunDir(folder / "run")
    self.log, self._note = folder / "log", folder / "made"
    program = folder / "rollout_in_small_shards.py"
    program.write_text(_PROGRAM)
    self.command = [python, program, self._note]
    self.command += [f"--workdir={self.run_dir.root}", *flags]

  def keys_on_disk(self) -> list[str]:
    """The key of every row of every shard, as often as it is there."""
    shards = self.run_dir.stage("rollout").glob("shard-*.parquet")
    return [
      key
      for path in sorted(shards)
      for key in pq.read_table(path, columns=["key"])["key"].to_pylist()
    ]

  def keys_made(self) -> list[str]:
    """The key of every row that was made, by the order of making."""
    if not self._note.exists():
      return []
    return self._note.read_text().split()

  def start(self) -> subprocess.Popen:
    with self.log.open("ab") as log:
      return subprocess.Popen(self.command, stdout=log, stderr=log)

  def kill_at(self, rows: int) -> bool:
    """Starts it, and kills it once so many rows are on disk.

    Returns:
      Whether it was killed: not where it ended before.
    """
    with self.start() as process:
      try:
        self.wait_for(process, rows)
      finally:
        alive = process.poll() is None
        if alive:
          os.kill(process.pid, signal.SIGKILL)
    return alive

  def wait_for(self, process: subprocess.Popen, rows: int) -> None:
    """Waits until it has claimed its place and has so many rows on disk."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
      holder = self.run_dir.root / "locks" / "rollout.lock"
      held = holder.exists() and str(process.pid) in holder.read_text()
      if held and len(self.run_dir.keys("rollout")) >= rows:
        return
      time.sleep(0.01)

  def finish(self) -> None:
    """Runs it to its end."""
    done = subprocess.run(
      self.command, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

  def killed_and_restarted(self, moments, samples: int) -> None:
    """Kills it at some moments and sees that only what was lost is made again.

    Args:
      moments: rows on disk at each kill, ascending.
      samples: how many rows there are to be in the end.
    """
    killed, before = 0, []
    for rows in [*moments, None]:
      made = len(self.keys_made())
      if rows is None:
        self.finish()
      else:
        killed += self.kill_at(rows)
      after, anew = self.keys_on_disk(), self.keys_made()[made:]
      assert len(set(after)) == len(after)
      # What is on disk stays there, and is not made again.
      assert set(before) <= set(after)
      assert not set(before) & set(anew)
      # What a process made is on disk, but for one unfinished shard.
      assert len(set(anew)) == len(anew)
      assert len(set(anew) - set(after)) <= ROWS_PER_SHARD
      before = after
    assert killed == len(moments)
    assert len(before) == samples
