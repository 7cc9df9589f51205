"""Runs the benchmarks part by part and writes BENCHMARKS.md.

    make bench [ONLY="loss step"] [QUICK=1]
    python benchmarks/run.py [--only loss step] [--quick] [--report]

Each part is a process that leaves a document in benchmarks/results/ after every
group that it has measured. A part that fails or is stopped leaves those of the
others, and its own last one, as they were; the report is written in any case.
With --quick everything is small, and goes to build/bench/ instead.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import report
import results

HERE = Path(__file__).resolve().parent
NOTES = HERE / "notes.toml"


def command(part: str, args, folder: Path) -> list[str] | None:
  """A part's command line, or None where its interpreter is missing."""
  python = sys.executable
  more = []
  if part == "rollout_overhead":
    if args.vllm_python is None:
      return None
    python = args.vllm_python
  if part == "engines" and args.vllm_python:
    more.append(f"--vllm-python={args.vllm_python}")
  if part == "step" and args.tunix_python:
    more.append(f"--tunix-python={args.tunix_python}")
  if part == "scaling":
    more.append(f"--docs={args.docs}")
  if args.quick:
    more.append("--quick")
  script = HERE / f"{part}.py"
  return [python, str(script), *more, f"--json={folder / f'{part}.json'}"]


def main() -> int:
  """Runs the parts; the exit code is 1 if one of them failed."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    "--only", nargs="+", choices=report.PARTS, default=list(report.PARTS)
  )
  parser.add_argument("--quick", action="store_true", help="a smoke test")
  parser.add_argument("--report", action="store_true", help="measure nothing")
  parser.add_argument(
    "--out",
    type=results.output,
    help="a folder for results, report and pictures",
  )
  parser.add_argument(
    "--vllm-python",
    default=os.environ.get("TRD_VLLM_PYTHON")
    or _existing(".venv-vllm/bin/python"),
  )
  parser.add_argument(
    "--tunix-python", default=_existing(".venv-tunix/bin/python")
  )
  args = parser.parse_args()
  if args.quick:
    # Threads that wait for each other make the tiniest work slow.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.out = args.out or results.ROOT / "build" / "bench"
  args.docs = args.out or results.ROOT / "docs"
  folder = args.out or HERE / "results"
  target = (args.out or results.ROOT) / "BENCHMARKS.md"
  folder.mkdir(parents=True, exist_ok=True)
  failed = []
  try:
    for part in () if args.report else args.only:
      words = command(part, args, folder)
      if words is None:
        print(f"{part}: left out, there is no vLLM (make vllm)", flush=True)
        continue
      print(f"{part}:", flush=True)
      start = time.monotonic()
      if subprocess.run(words, check=False).returncode:
        failed.append(part)
      print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)
  finally:
    notes = report.read_notes(NOTES)
    target.write_text(report.render(report.read(folder), notes))
    print(f"wrote {target}", flush=True)
  if failed:
    print(f"failed: {', '.join(failed)}", file=sys.stderr)
  return 1 if failed else 0


def _existing(path: str) -> str | None:
  python = results.ROOT / path
  return str(python) if python.exists() else None


if __name__ == "__main__":
  sys.exit(main())
