"""What the teacher's side costs by its source, and what it leaves out.

    python benchmarks/teacher.py --epochs 3 --repeats 3

Trains the laboratory's student on the demo's trajectories once a source and
repeat, each time in a process and a workdir of its own, by turns. CPU-seconds
are those of the whole train stage, start and compilation included; seconds
those of the updates and, where there is one, of filling the cache. The sources
`top-K` keep the first K of the recorded tokens. D, its distance to the full
divergence and the bound on that are of the first update, where all sources
have the same student. Needs os.wait4.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.py"
RECORDED = 20


def stage(
  name: str, regime: str, workdir: Path, *overrides: str, **variables: str
) -> float:
  """Runs a stage to its end; its CPU-seconds."""
  command = [sys.executable, "-m", f"trd_jax.{name}", f"--workdir={workdir}"]
  command.append(f"--config={CONFIG}:regime={regime}")
  command += [f"--config.{override}" for override in overrides]
  log = workdir.with_suffix(f".{name}.log")
  log.parent.mkdir(parents=True, exist_ok=True)
  with log.open("wb") as file:
    process = subprocess.Popen(
      command, stdout=file, stderr=file, env=os.environ | variables
    )
    _, status, used = os.wait4(process.pid, 0)
  if code := os.waitstatus_to_exitcode(status):
    sys.exit(f"trd_jax.{name} ended with exit code {code}: see {log}")
  return used.ru_utime + used.ru_stime


def share(source: Path, workdir: Path, k: int) -> None:
  """A workdir with another's trajectories and the first k recorded tokens."""
  from trd_jax.experiment.records import Trajectory
  from trd_jax.experiment.run_dir import RunDir

  made, run_dir = RunDir(source), RunDir(workdir)
  workdir.mkdir(parents=True)
  for name in ("problems", "rollout"):
    (workdir / name).symlink_to((source / name).resolve())
  with run_dir.shard_writer("refine", Trajectory) as writer:
    for row in made.read("refine", Trajectory):
      kept = {
        name: [
          x
          for start in range(0, len(values), RECORDED)
          for x in values[start : start + k]
        ]
        for name in ("teacher_top_ids", "teacher_top_logprobs")
        for values in (getattr(row, name) or [],)
      }
      writer.add(dataclasses.replace(row, **kept))
  run_dir.mark_done("refine", made.done("refine") or {})


def main() -> None:
  """Measures and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--epochs", type=int, default=3)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--regime", default="opd", choices=("opd", "opsd"))
  parser.add_argument("--top", type=int, nargs="*", default=[4, 8, 20])
  parser.add_argument("--workdir", type=Path, default=Path("runs/teacher"))
  args = parser.parse_args()

  from trd_jax.experiment.metric_log import read_metrics
  from trd_jax.experiment.run_dir import RunDir

  shared = args.workdir / f"trajectories-{args.regime}"
  for name in ("rollout", "refine"):
    if RunDir(shared).done(name) is None:
      stage(
        name,
        args.regime,
        shared,
        f"refine.teacher_top_k={RECORDED}",
        # One device writes the trajectories: that is not what is measured.
        XLA_FLAGS="--xla_force_host_platform_device_count=1",
      )
  sources = ["recompute", "hidden_cache", *(f"top-{k}" for k in args.top)]
  cpu = {source: [] for source in sources}
  seconds = {source: [] for source in sources}
  first = {}
  for repeat in range(args.repeats):
    for source in sources:
      workdir = args.workdir / f"{args.regime}-{source}-{os.getpid()}-{repeat}"
      k = int(source[4:]) if source.startswith("top-") else RECORDED
      share(shared, workdir, k)
      name = "topk_from_rollout" if source.startswith("top-") else source
      used = stage(
        "train",
        args.regime,
        workdir,
        f"refine.teacher_top_k={k}",
        f"train.teacher={name}",
        f"train.epochs={args.epochs}",
        "train.teacher_tail_limit=1",
      )
      run_dir = RunDir(workdir)
      done = run_dir.done("train") or {}
      cpu[source].append(used)
      seconds[source].append(
        done["seconds"] + done["teacher"].get("seconds", 0)
      )
      first[source] = read_metrics(run_dir.metrics_file("train"))[0]
  whole = first["recompute"]["D"]
  print(
    f"{args.regime}, {args.epochs} epochs, median of {args.repeats}\n\n"
    "source         CPU-s  ratio  seconds      D, first  full - D     bound"
    "  mass outside"
  )
  for source in sources:
    row = first[source]
    spent = statistics.median(cpu[source])
    line = f"{source:<13}{spent:>7.1f}"
    line += f"{spent / statistics.median(cpu['recompute']):>7.2f}"
    line += f"{statistics.median(seconds[source]):>9.1f}{row['D']:>14.6f}"
    line += f"{whole - row['D']:>10.2e}"
    if "D_gap_bound" in row:
      line += f"{row['D_gap_bound']:>10.2e}{row['tail_mass_teacher']:>14.2e}"
    print(line)


if __name__ == "__main__":
  main()
