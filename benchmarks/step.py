"""The whole TRD update beside peers: tokens a second from identical weights.

    python benchmarks/step.py [--tunix-python VENV/bin/python] [--quick]

Teacher's forward, student's forward and backward with gradient checkpointing,
the full-vocabulary forward KL, clipping and AdamW on a LoRA adapter, on CPUs,
in float32 and without dropout: a random Qwen3, an adapter and trajectories that
every variant reads from the same files, the paper's mix of lengths divided by a
scale (`training.py`). The teacher is the base with the adapter off. The loss is
the mean over the response tokens of the batch, which all of them can compute;
ours has it by its token weights.

Before the clock starts each variant makes three updates and the losses of all
must agree. Then they take turns (`turns.py`). Tokens are those of both sides
without padding.

Variants:
  ours                  packed rows, as `trd_jax.train` makes them
  peft                  transformers + peft: micro-batches padded to their
                        longest, sdpa, whole logits of the response tokens
  peft + liger          the same with `LigerFusedLinearJSDLoss(beta=0)`
  tunix                 `DistillationTrainer` with `LogitStrategy` and `qwix`;
                        every micro-batch as long as the longest trajectory,
                        logits of whole rows, as its model returns them

peft's variants get the head on response tokens only, which is in their favour:
by default they make logits for prompts as well.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import results
import training
import turns

OURS = "ours"
TUNIX = "tunix"
PEFT, LIGER = "peft", "peft + liger"
VARIANTS = (OURS, PEFT, LIGER, TUNIX)
# 42M parameters, 25M of them in linear layers.
SIZES = {
  "vocab_size": 32_768,
  "hidden_size": 512,
  "intermediate_size": 1536,
  "num_layers": 8,
  "num_heads": 8,
  "num_kv_heads": 4,
  "head_dim": 64,
  "tie_embeddings": True,
}
TINY = SIZES | {
  "vocab_size": 256,
  "hidden_size": 32,
  "intermediate_size": 64,
  "num_layers": 2,
  "head_dim": 16,
}
# Trajectories of a peer's micro-batch.
ROWS = 4
_COMPARED = 3
_AGREE = 2e-4


def of_ours(folder: Path, samples):
  """Our distiller with token weights 1 / (tokens of the batch)."""
  import numpy as np

  from trd_jax.distill.packing import layout, packing

  shapes = layout.choose_layout(samples, groups=1, batch_size=len(samples))
  total = sum(len(s.response) for s in samples)

  def evenly(pack):
    weight = np.where(pack.slots.weight > 0, np.float32(1 / total), 0)
    return pack._replace(slots=pack.slots._replace(weight=weight))

  batches = [
    batch._replace(student=[evenly(pack) for pack in batch.student])
    for batch in packing.pack(samples, shapes)
  ]
  run = training.Run(folder, shapes.buffer_slots)
  return lambda: run.update(batches)


def prepare(variant: str, folder: Path):
  """A variant's process: see `turns.serve`."""
  sys.path.insert(0, str(results.ROOT))
  samples = training.load_samples(folder / "samples.npz")
  if variant == OURS:
    update = of_ours(folder, samples)
  elif variant == TUNIX:
    import step_tunix

    update = step_tunix.prepare(folder, samples, ROWS)
  else:
    import step_torch

    update = step_torch.prepare(folder, samples, ROWS, variant == LIGER)
  losses = [update() for _ in range(_COMPARED)]
  tokens = training.tokens(samples)

  def run() -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    loss = update()
    seconds = time.perf_counter() - wall
    return {
      "wall_s": seconds,
      "cpu_s": time.process_time() - cpu,
      "rate": tokens / seconds,
      "loss": loss,
    }

  return run, {"losses": losses}


def tables(document: dict) -> list[results.Table]:
  """One table: tokens a second, and the losses that were compared."""
  made = []
  for found in document["groups"].values():
    settings, cases = found["settings"], found["cases"]
    rows = [
      (
        name,
        results.spread(results.values(case, "rate"), ",.0f"),
        results.spread(results.ratios(cases, OURS, name, "rate"), ".2f"),
        results.spread(results.ratios(cases, name, OURS, "cpu_s"), ".2f"),
        ", ".join(f"{loss:.6f}" for loss in case["about"]["losses"]),
      )
      for name, case in cases.items()
      if "failed" not in case
    ]
    model = settings["model"]
    text = (
      f"Random Qwen3, D={model['hidden_size']}, {model['num_layers']} layers,"
      f" V={model['vocab_size']:,}, LoRA r={training.RANK};"
      f" {settings['samples']} trajectories at 1/{settings['scale']} of the"
      f" paper's lengths an update; {settings['repeats']} alternating updates;"
      " median (lowest-highest), ratios by round. The first three losses agree"
      f" within {_AGREE:g}. {results.failures(cases)}"
    )
    columns = (
      "variant",
      "tokens/s",
      "ours / it",
      "CPU-s / ours",
      "first losses",
    )
    title = "Training: the whole step"
    made.append(results.Table(title, text.strip(), columns, rows))
  return made


def main() -> None:
  """Measures and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--samples", type=int, default=8)
  parser.add_argument("--scale", type=int, default=16)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--variants", nargs="+", default=VARIANTS)
  parser.add_argument("--tunix-python", help="an interpreter that has Tunix")
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
  document = results.Document("step", args.json, args.quick)
  samples = training.make_samples(args.samples, args.scale, sizes["vocab_size"])
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    training.save_model(folder, sizes)
    training.save_samples(samples, folder / "samples.npz")
    commands = {}
    for variant in args.variants:
      python = args.tunix_python if variant == TUNIX else sys.executable
      if python:
        command = [python, __file__, f"--work={variant}", f"--task={folder}"]
        commands[variant] = command
    cases = turns.take_turns(commands, args.repeats)
  if TUNIX in set(args.variants) - commands.keys():
    cases[TUNIX] = {"failed": "no --tunix-python"}
  results.agree(cases, "losses", _AGREE)
  settings = {
    "samples": args.samples,
    "scale": args.scale,
    "repeats": args.repeats,
    "rows": ROWS,
    "model": sizes,
    "lengths": training.lengths(samples),
  }
  document.add("step", settings, cases)
  results.show(tables(document.fields))


if __name__ == "__main__":
  main()
