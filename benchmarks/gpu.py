"""One H100, nine minutes: ceilings, the head, attention, the step, its peer.

    python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --scale small        on any machine, for a look

Needs JAX for the GPU and nothing to download: shapes are Qwen3's, weights and
tokens random. Every section runs in a process of its own, one after the other,
so that the device's memory is its own. Medians of five after a run that
compiles. What the time doesn't allow, what this machine can't do and what
fails is a row that says "not measured" and why.

Sections:
  copy       memory bandwidth
  matmul     matrix products of bfloat16
  head       the loss and its gradient, against its three products alone
  attention  each path, forward and backward, and how wrong it is
  step       a whole update by the trainer's programs, at the paper's medians
  step-pack  the same in large student packs: peak memory
  step-long  one trajectory at the paper's bounds
  step-opd   1.7B taught by 8B
  peer       the same update in transformers and peft, with Liger where it is
             installed; `--peer-python` may have torch of another environment

FLOPs are those of `shapes.py`: of the tokens, not of padding, with the forward
pass that full rematerialisation repeats. With `--scale small` figures say
nothing about a GPU.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import results

ROOT = Path(__file__).resolve().parent.parent
# Seconds of nine minutes that each section is kept, whatever those before it
# take; what they leave goes to those after.
SHARES = {
  "copy": 15,
  "matmul": 20,
  "head": 65,
  "attention": 60,
  "step": 130,
  "step-pack": 60,
  "step-long": 60,
  "step-opd": 40,
  "peer": 90,
}
# What the project holds itself to on one H100, of the cases it is about.
TARGETS = (
  ("head", "/ products", "<=", 1.35),
  ("head", "TFLOP/s", ">=", 550.0),
  ("step", "of 989", ">=", 0.45),
  ("step", "s a sample", "<=", 0.6),
  ("step-pack", "peak GB so far", "<=", 40.0),
)
_CASES, _ROW = "CASES ", "ROW "


def work(section: str, scale_name: str, seconds: float) -> None:
  """A section's process: says what it is going to measure, then measures."""
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  sys.path.insert(0, str(ROOT))
  end = time.monotonic() + seconds
  if section == "peer":
    cases = list(_peer_cases(scale_name, end))
  else:
    import gpu_scale
    import gpu_sections

    clock = gpu_scale.Clock(seconds)
    scale = gpu_scale.SCALES[scale_name]
    cases = list(gpu_sections.SECTIONS[section](scale, clock))
  names = [name for name, _ in cases]
  print(_CASES + json.dumps([_device(section), names]), flush=True)
  for name, run in cases:
    if time.monotonic() > end:
      break
    try:
      measures = run()
    except Exception as error:  # A kernel that isn't there, too little memory.
      text = str(error).strip().partition("\n")[0]
      measures = f"{type(error).__name__}: {text[:200]}"
    print(_ROW + json.dumps([name, measures]), flush=True)


def _device(section: str) -> str:
  if section == "peer":
    import torch

    if torch.cuda.is_available():
      return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, torch {torch.__version__}"
  import jax

  return f"{jax.devices()[0].device_kind}, jax {jax.__version__}"


def _peer_cases(scale_name: str, end: float):
  import importlib.util

  for module in ("torch", "transformers", "peft"):
    if importlib.util.find_spec(module) is None:
      raise SystemExit(f"{module} is not installed")
  import torch

  if scale_name == "full" and not torch.cuda.is_available():
    raise SystemExit("torch sees no CUDA device")
  # The trainer's own modules are asked for shapes alone.
  os.environ["JAX_PLATFORMS"] = "cpu"
  import gpu_peer
  import gpu_scale

  scale = gpu_scale.SCALES[scale_name]
  return gpu_peer.cases(scale.opsd, scale.medians, scale.samples, end)


def run_section(
  section: str, python: str, scale: str, seconds: float
) -> tuple[str | None, list[dict[str, Any]]]:
  """Runs a section's process for at most so long.

  Returns:
    The device, and a row a case: `section`, `case` and either `measures` or
    `not_measured`, the reason.
  """
  command = [python, __file__, f"--work={section}", f"--scale={scale}"]
  process = subprocess.Popen(
    [*command, f"--seconds={seconds}"],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  ended = threading.Event()

  def end() -> None:
    ended.set()
    process.kill()

  # The process minds its clock, but a compilation can't be left in between.
  timer = threading.Timer(seconds, end)
  timer.start()
  out, err = process.communicate()
  timer.cancel()
  device, names, results = None, [section], {}
  for line in out.splitlines():
    if line.startswith(_CASES):
      device, names = json.loads(line.removeprefix(_CASES))
    elif line.startswith(_ROW):
      name, measures = json.loads(line.removeprefix(_ROW))
      results[name] = measures
  reason = "no time was left"
  if process.returncode and not ended.is_set():
    last = (err.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    reason = last[:200]
  rows = []
  for name in names:
    result = results.get(name, reason)
    kind = "not_measured" if isinstance(result, str) else "measures"
    rows.append({"section": section, "case": name, kind: result})
  return device, rows


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Our step against each peer, from rows that both measured."""
  per_sample = "s a sample"
  ours = [r for r in rows if r["section"] == "step" and "measures" in r]
  made = []
  for row in rows:
    if row["section"] == "peer" and "measures" in row and ours:
      ratio = row["measures"][per_sample] / ours[0]["measures"][per_sample]
      case = f"{ours[0]['case']}, against {row['case']}"
      measures = {"times as fast": ratio}
      made.append({"section": "ratio", "case": case, "measures": measures})
  return made


def show(row: dict[str, Any]) -> None:
  """Prints a row of the table."""
  if "measures" in row:
    cells = [f"{name} {value:.4g}" for name, value in row["measures"].items()]
    text = ", ".join(cells)
  else:
    text = f"not measured: {row['not_measured']}"
  print(f"| {row['section']} | {row['case']} | {text} |", flush=True)


def judge(rows: list[dict[str, Any]]) -> list[str]:
  """A line a target: the first case of its section that was measured."""
  lines = []
  for section, name, sign, bound in TARGETS:
    found = [
      row
      for row in rows
      if row["section"] == section and name in row.get("measures", {})
    ]
    text = "not measured"
    if found:
      value = found[0]["measures"][name]
      met = value <= bound if sign == "<=" else value >= bound
      text = f"{value:.4g} ({'met' if met else 'not met'})"
    lines.append(f"{section}, {name} {sign} {bound:g}: {text}")
  return lines


def main() -> None:
  """Prints the table as it grows; `--out` or $OUT keeps it as JSON."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--scale", choices=("full", "small"), default="full")
  parser.add_argument("--minutes", type=float, default=9.0)
  parser.add_argument(
    "--sections", default=",".join(SHARES), help="separated by commas"
  )
  parser.add_argument("--peer-python", default=sys.executable)
  parser.add_argument(
    "--out",
    type=results.output,
    help="JSON; default gpu.json in $OUT where that is set",
  )
  parser.add_argument("--work", help=argparse.SUPPRESS)
  parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.work:
    work(args.work, args.scale, args.seconds)
    return
  chosen = args.sections.split(",")
  if unknown := set(chosen) - SHARES.keys():
    parser.error(
      f"no section {', '.join(sorted(unknown))}; there are {', '.join(SHARES)}"
    )
  if args.out is None and "OUT" in os.environ:
    args.out = Path(os.environ["OUT"]) / "gpu.json"
  end = time.monotonic() + 60 * args.minutes
  unit = 60 * args.minutes / sum(SHARES[section] for section in chosen)
  print(f"scale {args.scale}, {args.minutes:g} minutes\n")
  print("| section | case | measured |\n|---|---|---|", flush=True)
  rows: list[dict[str, Any]] = []
  devices: list[str] = []
  for number, section in enumerate(chosen):
    kept = unit * sum(SHARES[later] for later in chosen[number + 1 :])
    python = args.peer_python if section == "peer" else sys.executable
    device, more = run_section(
      section, python, args.scale, end - time.monotonic() - kept
    )
    rows += more
    if device and device not in devices:
      devices.append(device)
    for row in more:
      show(row)
  for row in compare(rows):
    rows.append(row)
    show(row)
  print(f"\ndevices: {'; '.join(devices)}")
  if args.scale == "full":
    print("\ntargets on one H100\n" + "\n".join(judge(rows)))
  if args.out:
    document = {
      "scale": args.scale,
      "minutes": args.minutes,
      "devices": devices,
      "rows": rows,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
  main()
