"""What the loss costs: CPU-seconds, memory and error, one process a variant.

    python benchmarks/loss.py --rows 512 1024 --dtype float32

Forward KL and its gradient with respect to the student's hidden states, head
frozen and shared, at a real vocabulary. CPU-seconds rather than wall time, so
that a busy machine moves the ratios little; memory is what the process holds
at its fullest beyond its inputs. Linux, since it reads /proc.

Variants:
  products  the three matrix products alone, chunked: the floor
  value     ours, undifferentiated
  lean      ours with gradient, without the top-16 masses
  ours      ours with gradient and every diagnostic
  full      plain JAX on whole logits under jax.grad
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("products", "value", "lean", "ours", "full")
CHECKED_ROWS = 16


def resident_mb() -> float:
  """Memory that this process holds now."""
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return pages * 4096 / 2**20


class Peak:
  """The largest `resident_mb` while the block runs, minus that before."""

  def __enter__(self):
    """Starts to sample every 5 ms."""
    self._before = self.mb = resident_mb()
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()
    return self

  def _watch(self):
    while not self._done.wait(0.005):
      self.mb = max(self.mb, resident_mb())

  def __exit__(self, *error):
    """Stops sampling; `mb` holds the result."""
    self._done.set()
    self._thread.join()
    self.mb -= self._before


def program(variant: str, chunk: int):
  """`f(student_hidden, teacher_hidden, head) -> (value, gradient)`."""
  import jax
  import jax.numpy as jnp

  from trd_jax import row_statistics
  from trd_jax.divergence import Divergence, token_stats

  def products(hidden, teacher, head):
    def body(carry, x):
      blocks = [row_statistics.logits(h, head) for h in x]
      # Both products must be made, though only one is read whole.
      first, second = jax.lax.optimization_barrier(tuple(blocks))
      return carry, (second[:, 0], row_statistics.pull_back(first, head))

    chunks = [x.reshape(-1, chunk, x.shape[1]) for x in (hidden, teacher)]
    return jax.lax.scan(body, None, chunks)[1]

  def full(hidden, teacher, head):
    def loss(hidden):
      q, p = (
        jax.nn.log_softmax(row_statistics.logits(h, head))
        for h in (hidden, teacher)
      )
      return (jnp.exp(p) * (p - q)).sum()

    return jax.value_and_grad(loss)(hidden)

  def ours(hidden, teacher, head):
    spec = Divergence(chunk_tokens=chunk, diagnostics=variant != "lean")
    labels = jnp.zeros(len(hidden), jnp.int32)
    onset_ids = jnp.arange(40)

    def stats(hidden):
      return token_stats(hidden, teacher, head, head, labels, onset_ids, spec)

    if variant == "value":
      return stats(hidden), None

    def loss(hidden):
      made = stats(hidden)
      return made.divergence.sum(), made

    gradient, made = jax.grad(loss, has_aux=True)(hidden)
    return made, gradient

  return {"products": products, "full": full}.get(variant, ours)


def gradient_error(gradient, hidden, teacher, head) -> float:
  """Relative error of the first rows' gradient against float64."""
  import numpy as np

  hidden, teacher, head, gradient = (
    np.asarray(x, np.float64) for x in (hidden, teacher, head, gradient)
  )
  softmaxes = []
  for x in hidden, teacher:
    logits = x @ head.T
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    softmaxes.append(weights / weights.sum(-1, keepdims=True))
  wanted = (softmaxes[0] - softmaxes[1]) @ head
  return float(np.linalg.norm(gradient - wanted) / np.linalg.norm(wanted))


def measure(args, variant: str, rows: int) -> dict:
  """Runs one variant in this process."""
  import jax

  @jax.jit
  def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = 2 * jax.random.normal(keys[0], (rows, args.width))
    teacher = hidden + 0.6 * jax.random.normal(keys[1], hidden.shape)
    # A head in its own dtype from the start, for a small footprint.
    head = jax.random.normal(keys[2], (args.vocab, args.width), args.dtype)
    return hidden.astype(args.dtype), teacher.astype(args.dtype), head * 0.04

  operands = jax.block_until_ready(inputs())
  f = jax.jit(program(variant, args.chunk)).lower(*operands).compile()
  seconds = []
  with Peak() as peak:
    for _ in range(args.repeats + 1):
      start = time.process_time()
      out = jax.block_until_ready(f(*operands))
      seconds.append(time.process_time() - start)
  result = {
    "variant": variant,
    "rows": rows,
    # The first run also pays for fresh memory.
    "cpu_s": sorted(seconds[1:])[(len(seconds) - 1) // 2],
    "extra_mb": peak.mb,
  }
  if variant in ("lean", "ours", "full"):
    hidden, teacher, head = operands
    few = (x[:CHECKED_ROWS] for x in (out[1], hidden, teacher))
    gradient, hidden, teacher = few
    result["error"] = gradient_error(gradient, hidden, teacher, head)
  return result


def main() -> None:
  """Starts a process a variant and prints a table; `--json` keeps the rows."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--rows", type=int, nargs="+", default=[512, 1024])
  parser.add_argument("--vocab", type=int, default=151_936)
  parser.add_argument("--width", type=int, default=1024)
  parser.add_argument("--chunk", type=int, default=512)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--variants", nargs="+", default=VARIANTS)
  parser.add_argument("--json", type=Path, help="append results here")
  parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  sys.path.insert(0, str(ROOT))
  if args.one:
    print(json.dumps(measure(args, args.one, args.rows[0])))
    return

  print(f"{args.dtype}, D={args.width}, V={args.vocab}, chunk {args.chunk}\n")
  print("| rows | variant | CPU-s | / products | extra MB | gradient error |")
  print("|---|---|---|---|---|---|")
  shape = [
    f"--{name}={getattr(args, name)}"
    for name in ("vocab", "width", "chunk", "dtype", "repeats")
  ]
  for rows in args.rows:
    floor = None
    for variant in args.variants:
      command = [sys.executable, __file__, *shape]
      command += [f"--rows={rows}", f"--one={variant}"]
      done = subprocess.run(command, capture_output=True, text=True, check=True)
      result = json.loads(done.stdout)
      if variant == "products":
        floor = result["cpu_s"]
      ratio = f"{result['cpu_s'] / floor:.2f}" if floor else ""
      error = f"{result['error']:.1e}" if "error" in result else ""
      print(
        f"| {rows} | {variant} | {result['cpu_s']:.2f} | {ratio} | "
        f"{result['extra_mb']:.0f} | {error} |",
        flush=True,
      )
      if args.json:
        with args.json.open("a") as file:
          file.write(json.dumps({**vars(args), **result}, default=str) + "\n")


if __name__ == "__main__":
  main()
