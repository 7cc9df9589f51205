"""Packed against padded training: tokens a second of whole updates.

    python benchmarks/packing.py [--quick] [--json FILE]

The update of training (teacher's forward, student's forward and backward, loss,
AdamW) on a random Qwen3 and trajectories with the paper's mix of lengths,
divided by a scale (`training.py`), as many as the paper's update has: the
fewer, the shorter their longest, to which rows are padded. Tokens are those of
both sides without padding.

Variants, the same trajectories and weights, which take turns (`turns.py`):
  packed          as `trd_jax.train` packs them
  padded          a row a trajectory, every row as long as the longest
  padded, sorted  a row a trajectory; they are sorted by length and each
                  micro-batch is as long as its longest, rounded up to 64
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import results
import training
import turns

PACKED = "packed"
PADDED = "padded"
SORTED = "padded, sorted"
SIZES = {
  "vocab_size": 8192,
  "hidden_size": 256,
  "intermediate_size": 768,
  "num_layers": 4,
  "num_heads": 4,
  "num_kv_heads": 2,
  "head_dim": 64,
  "tie_embeddings": True,
}
TINY = SIZES | {
  "vocab_size": 256,
  "hidden_size": 32,
  "intermediate_size": 64,
  "num_layers": 1,
  "head_dim": 16,
}
# Trajectories of a padded micro-batch.
ROWS = 4
_ROUND = 64


def padded(samples, by_length: bool):
  """One update's micro-batches with a row a trajectory, and its buffer.

  Each trajectory is packed alone, in shapes that fit the longest, and the rows
  are laid one upon another.

  Returns:
    The micro-batches and the slots of the teacher's buffer.
  """
  from trd_jax.distill.packing import packing

  if by_length:
    samples = sorted(samples, key=lambda s: s.teacher_length)
  buffer = ROWS * _round_up(max(len(s.response) for s in samples))
  made = []
  for first in range(0, len(samples), ROWS):
    hand = samples[first : first + ROWS]
    shapes = _shapes(hand if by_length else samples, buffer)
    teacher, student, start = [], [], 0
    for sample in hand:
      (alone,) = packing.pack([sample], shapes)
      teacher.append(_shift_teacher(alone.teacher[0], start, buffer))
      student.append(_shift_student(alone.student[0], start, len(samples)))
      start += len(sample.response)
    made.append(packing.MicroBatch([_stack(teacher)], [_stack(student)]))
  return made, buffer


def _round_up(length: int) -> int:
  return -(-length // _ROUND) * _ROUND


def _shapes(samples, slots):
  from trd_jax.distill.packing.layout import Layout, PackShape

  student = _round_up(max(s.student_length for s in samples))
  teacher = _round_up(max(s.teacher_length for s in samples))
  responses = _round_up(max(len(s.response) for s in samples))
  return Layout(
    groups=1,
    student=(PackShape(student, 1, min(student, responses)),),
    teacher=(PackShape(teacher, 1, teacher),),
    buffer_slots=slots,
  )


def _shift_teacher(pack, start, slots):
  import numpy as np

  return pack._replace(
    slot=np.where(pack.slot < slots, pack.slot + start, slots).astype(np.int32)
  )


def _shift_student(pack, start, batch_size):
  slots = pack.slots
  return pack._replace(
    slots=slots._replace(
      teacher_slot=slots.teacher_slot + start,
      weight=slots.weight / batch_size,
    )
  )


def _stack(packs):
  """Packs of one row each as one pack: axis 1 holds the rows."""
  import jax
  import numpy as np

  return jax.tree.map(lambda *rows: np.concatenate(rows, axis=1), *packs)


def prepare(variant: str, folder: Path):
  """A variant's process: see `turns.serve`."""
  sys.path.insert(0, str(results.ROOT))
  from trd_jax.distill.packing import layout, packing

  samples = training.load_samples(folder / "samples.npz")
  if variant == PACKED:
    shapes = layout.choose_layout(samples, groups=1, batch_size=len(samples))
    batches, slots = packing.pack(samples, shapes), shapes.buffer_slots
  else:
    batches, slots = padded(samples, variant == SORTED)
  work = training.Run(folder, slots)
  tokens = training.tokens(samples)
  computed = sum(packing.padded_tokens(batches))
  about = {"loss": work.update(batches), "fill": tokens / computed}

  def run() -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    work.update(batches)
    seconds = time.perf_counter() - wall
    return {
      "wall_s": seconds,
      "cpu_s": time.process_time() - cpu,
      "rate": tokens / seconds,
    }

  return run, about


def tables(document: dict) -> list[results.Table]:
  """One table: tokens a second and how full the rows are."""
  made = []
  for found in document["groups"].values():
    settings, cases = found["settings"], found["cases"]
    rows = [
      (
        name,
        results.spread(results.values(case, "rate"), ",.0f"),
        results.spread(results.ratios(cases, PACKED, name, "rate"), ".2f"),
        results.spread(results.ratios(cases, name, PACKED, "cpu_s"), ".2f"),
        f"{case['about']['fill']:.0%}",
        f"{case['about']['loss']:.6f}",
      )
      for name, case in cases.items()
      if "failed" not in case
    ]
    sides = ", ".join(
      f"{side} {x[0]:,} / {x[1]:,} / {x[2]:,}"
      for side, x in settings["lengths"].items()
    )
    text = (
      f"{settings['samples']} trajectories at 1/{settings['scale']} of the"
      f" paper's lengths; shortest / median / longest: {sides} tokens."
      f" {settings['repeats']} alternating updates; median (lowest-highest),"
      f" ratios by round. {results.failures(cases)}"
    )
    columns = (
      "rows",
      "tokens/s",
      "packed / it",
      "CPU-s / packed",
      "fill",
      "first loss",
    )
    title = "Training: packed and padded"
    made.append(results.Table(title, text.strip(), columns, rows))
  return made


def main() -> None:
  """Measures and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--samples", type=int, default=128)
  parser.add_argument("--scale", type=int, default=16)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--quick", action="store_true", help="a smoke test")
  parser.add_argument(
    "--json", type=results.output, help="write the results here"
  )
  parser.add_argument("--work", help=argparse.SUPPRESS)
  parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.work:
    turns.serve(lambda: prepare(args.work, args.task))
    return
  sizes = SIZES
  if args.quick:
    sizes, args.samples, args.scale, args.repeats = TINY, 8, 128, 2
  sys.path.insert(0, str(results.ROOT))
  document = results.Document("packing", args.json, args.quick)
  samples = training.make_samples(args.samples, args.scale, sizes["vocab_size"])
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    training.save_model(folder, sizes)
    training.save_samples(samples, folder / "samples.npz")
    command = [sys.executable, __file__, f"--task={folder}"]
    cases = turns.take_turns(
      {v: [*command, f"--work={v}"] for v in (PACKED, PADDED, SORTED)},
      args.repeats,
    )
  results.agree(cases, "loss", 1e-4)
  settings = {
    "samples": args.samples,
    "scale": args.scale,
    "repeats": args.repeats,
    "model": sizes,
    "lengths": training.lengths(samples),
  }
  document.add("packing", settings, cases)
  results.show(tables(document.fields))


if __name__ == "__main__":
  main()
