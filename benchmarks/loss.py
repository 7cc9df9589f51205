"""The loss beside its floor and its peers: CPU-seconds, memory, error.

    python benchmarks/loss.py [--quick] [--json FILE]

A divergence and its gradient with respect to the student's hidden states, head
frozen and shared by both sides, on identical saved inputs at a real vocabulary.
Each variant is a process of its own and they take turns (`turns.py`).
CPU-seconds rather than wall time, so that a busy machine moves the ratios
little. Memory is what a run needs at its fullest beyond what the process holds
before it, the inputs among that, after a first run; Linux keeps count of it.
The gradient of the first run is compared with one in float64 on every so many
rows.

Variants, all forward KL but where they say otherwise:
  products                the floor: three matrix products with the head
  ours                    `token_stats` without the top-16 masses
  ours, all diagnostics   with them, as training has it by default
  ours, top-32            reverse KL on the teacher's 32 likeliest tokens
  jax, full logits        `jax.grad` of the plain loss
  jax, checkpointed scan  the same over chunks, `jax.checkpoint` on each
  liger, compiled         `LigerFusedLinearJSDLoss(beta=0)`, no hard loss
  liger, eager            the same without torch.compile
  trl                     `GKDTrainer.generalized_jsd_loss(beta=0)` on logits
  torch, full logits      `kl_div` of two `log_softmax`

Liger makes a gradient of the head as well, whether or not one is wanted.
"""

import argparse
import ctypes
import gc
import re
import sys
import tempfile
import time
from pathlib import Path

import results
import turns

OURS = "ours"
ALL = "ours, all diagnostics"
FLOOR = "products"
LIGER = "liger, compiled"
TRL = "trl"
TORCH = (LIGER, "liger, eager", TRL, "torch, full logits")
JAX = (
  FLOOR,
  OURS,
  ALL,
  "ours, top-32",
  "jax, full logits",
  "jax, checkpointed scan",
)
CHECKED_ROWS = 256
# A group: dtype, tokens, variants, repeats; the second asks for memory only.
GROUPS = (
  ("float32", 1024, (*JAX, *TORCH), 5),
  ("float32", 2048, (OURS, ALL), 2),
  (
    "bfloat16",
    2048,
    (FLOOR, OURS, ALL, LIGER, TRL, "torch, full logits"),
    3,
  ),
)
# How far the losses of two variants may be apart, relatively: bfloat16 logits
# of torch are rounded to 8 bits.
AGREE = {"float32": 1e-4, "bfloat16": 0.05}


def make_inputs(folder: Path, dtype: str, tokens: int, args) -> None:
  """Saves hidden states, head and the float64 gradients of some rows."""
  import ml_dtypes
  import numpy as np

  rng = np.random.default_rng(0)
  shape = tokens, args.width
  hidden = 2 * rng.standard_normal(shape, np.float32)
  teacher = hidden + 0.6 * rng.standard_normal(shape, np.float32)
  head = rng.standard_normal((args.vocab, args.width), np.float32)
  head *= 0.08 / args.width**0.5 * 16
  arrays = [hidden, teacher, head]
  if dtype == "bfloat16":
    arrays = [x.astype(ml_dtypes.bfloat16) for x in arrays]
  for name, x in zip(("hidden", "teacher", "head"), arrays, strict=True):
    np.save(folder / name, x.view(np.uint16) if dtype == "bfloat16" else x)
  hidden, teacher, head = (x.astype(np.float64) for x in arrays)
  rows = slice(None, None, max(1, tokens // CHECKED_ROWS))
  full, top = reference(hidden[rows], teacher[rows], head)
  np.savez(folder / "reference", full=full, top=top)


def reference(hidden, teacher, head, chunk=64, k=32):
  """float64 gradients of the forward KL and of the top-k reverse KL."""
  import numpy as np

  def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)

  full, top = [], []
  for start in range(0, len(hidden), chunk):
    at = slice(start, start + chunk)
    student_logits, teacher_logits = hidden[at] @ head.T, teacher[at] @ head.T
    full.append((softmax(student_logits) - softmax(teacher_logits)) @ head)
    ids = np.argpartition(teacher_logits, -k, axis=-1)[:, -k:]
    q, p = (
      softmax(np.take_along_axis(x, ids, -1))
      for x in (student_logits, teacher_logits)
    )
    ratio = np.log(q / p)
    slope = q * (ratio - (q * ratio).sum(-1, keepdims=True))
    top.append(np.einsum("ck,ckd->cd", slope, head[ids]))
  return np.concatenate(full), np.concatenate(top)


def load_inputs(folder: Path, dtype: str):
  """What `make_inputs` saved, as arrays of `dtype`."""
  import ml_dtypes
  import numpy as np

  arrays = [np.load(folder / f"{x}.npy") for x in ("hidden", "teacher", "head")]
  if dtype == "bfloat16":
    arrays = [x.view(ml_dtypes.bfloat16) for x in arrays]
  return tuple(arrays)


def memory_mb(field: str) -> float:
  """VmRSS or VmHWM of this process."""
  status = Path("/proc/self/status").read_text()
  found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
  assert found is not None
  return int(found[1]) / 1024


def prepare(variant: str, folder: Path, dtype: str, chunk: int):
  """A variant's process: see `turns.serve`."""
  import numpy as np

  sys.path.insert(0, str(results.ROOT))
  if variant in TORCH:
    import loss_torch as programs
  else:
    import loss_jax as programs
  compute, read = programs.prepare(variant, load_inputs(folder, dtype), chunk)
  value, gradient = read(compute())
  about = {}
  if gradient is not None:
    with np.load(folder / "reference.npz") as file:
      wanted = file["top" if "top-32" in variant else "full"]
    made = gradient[:: max(1, len(gradient) // CHECKED_ROWS)]
    error = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
    about = {"error": float(error)}
    if "top-32" not in variant:  # Whose loss is another one.
      about["loss"] = value / len(gradient)
  del gradient
  libc = ctypes.CDLL(None)

  def run() -> dict:
    gc.collect()
    libc.malloc_trim(0)  # What earlier runs have freed is not held any more.
    Path("/proc/self/clear_refs").write_text("5")  # The peak is what is held.
    before = memory_mb("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    made = compute()
    seconds = time.process_time() - cpu, time.perf_counter() - wall
    extra = memory_mb("VmHWM") - before
    del made
    return {"cpu_s": seconds[0], "wall_s": seconds[1], "extra_mb": extra}

  return run, about


def measure(args, document: results.Document) -> None:
  """Runs the groups."""
  for number, (dtype, tokens, variants, repeats) in enumerate(GROUPS):
    if number not in args.groups:
      continue
    tokens //= args.shrink
    repeats = args.repeats or repeats
    with tempfile.TemporaryDirectory() as name:
      folder = Path(name)
      make_inputs(folder, dtype, tokens, args)
      commands = {}
      for variant in variants:
        if args.variants and variant not in args.variants:
          continue
        command = [sys.executable, __file__, f"--work={variant}"]
        command += [f"--inputs={folder}", f"--dtype={dtype}"]
        commands[variant] = [*command, f"--chunk={args.chunk // args.shrink}"]
      cases = turns.take_turns(commands, repeats)
    results.agree(cases, "loss", AGREE[dtype])
    settings = {
      "dtype": dtype,
      "tokens": tokens,
      "width": args.width,
      "vocab": args.vocab,
      "chunk": args.chunk // args.shrink,
      "repeats": repeats,
    }
    document.add(f"{dtype}, {tokens} tokens", settings, cases)


def tables(document: dict) -> list[results.Table]:
  """A table a group."""
  made = []
  for group, found in document["groups"].items():
    settings, cases = found["settings"], found["cases"]
    rows = []
    for name, case in cases.items():
      if "failed" in case:
        continue
      about = case["about"]
      ratios = results.ratios(cases, name, OURS, "cpu_s")
      floor = results.ratios(cases, name, FLOOR, "cpu_s")
      rows.append(
        (
          name,
          results.spread(results.values(case, "cpu_s"), ".2f"),
          results.spread(ratios, ".2f"),
          results.spread(floor, ".2f"),
          f"{max(results.values(case, 'extra_mb')):,.0f}",
          f"{about['error']:.1e}" if "error" in about else "-",
          f"{about['loss']:.5f}" if "loss" in about else "-",
        )
      )
    text = (
      f"Forward KL and its gradient, D={settings['width']:,},"
      f" V={settings['vocab']:,}, chunks of {settings['chunk']} tokens;"
      f" {settings['repeats']} alternating runs; median (lowest-highest),"
      f" ratios by round. {results.failures(cases)}"
    )
    columns = (
      "variant",
      "CPU-s",
      "CPU-s / ours",
      "CPU-s / products",
      "extra MB",
      "gradient error",
      "loss a token",
    )
    made.append(results.Table(f"Loss: {group}", text.strip(), columns, rows))
  return made


def main() -> None:
  """Measures every group and prints its table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--width", type=int, default=1024)
  parser.add_argument("--vocab", type=int, default=151_936)
  parser.add_argument("--chunk", type=int, default=512)
  parser.add_argument("--repeats", type=int, help="of every group")
  parser.add_argument("--shrink", type=int, default=1, help="fewer tokens")
  parser.add_argument("--variants", nargs="+", choices=(*JAX, *TORCH))
  parser.add_argument(
    "--groups",
    type=int,
    nargs="+",
    default=range(len(GROUPS)),
    help="0: float32, 1: float32 of twice the tokens, 2: bfloat16",
  )
  parser.add_argument("--quick", action="store_true", help="a smoke test")
  parser.add_argument(
    "--json", type=results.output, help="write the results here"
  )
  parser.add_argument("--work", help=argparse.SUPPRESS)
  parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
  parser.add_argument("--dtype", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.work:
    turns.serve(lambda: prepare(args.work, args.inputs, args.dtype, args.chunk))
    return
  if args.quick:
    args.width, args.vocab, args.shrink, args.repeats = 64, 4096, 8, 2
  document = results.Document("loss", args.json, args.quick)
  try:
    measure(args, document)
  finally:
    results.show(tables(document.fields))


if __name__ == "__main__":
  main()
