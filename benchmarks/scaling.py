"""How memory and work grow: over tokens, chunk and devices, from compiled code.

    python benchmarks/scaling.py [--docs DIR] [--quick] [--json FILE]

Programs are compiled for 1 to 8 host devices at a model's real sizes and never
run: the bytes are those that the compiler sets aside on a device besides
arguments and results, and the FLOPs are those of the matrix products in its
optimised program, each as often as its loops turn (`compiled.py`). float32,
since the compiler for CPUs makes float32 copies of bfloat16 weights.

  tokens   the loss's temporary bytes and FLOPs over N
  chunk    the same over loss.chunk_tokens
  devices  loss and update of one batch, split over 1 to 8 devices

The command also draws the curves into DIR and writes DIR/scaling.md.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import results

DEVICES = (1, 2, 4, 8)
# Qwen3-8B.
SIZES = {
  "vocab_size": 151_936,
  "hidden_size": 4096,
  "intermediate_size": 12_288,
  "num_layers": 36,
  "num_heads": 32,
  "num_kv_heads": 8,
  "head_dim": 128,
}
TINY = {
  "vocab_size": 512,
  "hidden_size": 32,
  "intermediate_size": 64,
  "num_layers": 2,
  "num_heads": 4,
  "num_kv_heads": 2,
  "head_dim": 16,
}
WAYS = ("ours", "jax, full logits", "jax, checkpointed scan")
_ONSETS = tuple(range(40))


def loss_cost(way: str, tokens: int, chunk: int, sizes: dict, devices: int = 1):
  """Compiles a loss and its gradient, the tokens split over the devices."""
  import compiled
  import jax
  import jax.numpy as jnp
  import loss_jax
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec as P

  mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
  split, whole = P("data"), P()

  def of(shape, spec):
    where = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

  width = sizes["hidden_size"]
  hidden = of((tokens, width), split)
  head = of((sizes["vocab_size"], width), whole)
  program = loss_jax.gradient(way, chunk)

  def one(*operands):
    # Without its value the loss would need no forward pass of its own.
    value, gradient, *_ = program(*operands)
    return value[None], gradient

  each = jax.shard_map(
    one,
    mesh=mesh,
    in_specs=(split, split, whole),
    out_specs=split,
    check_vma=False,
  )
  return compiled.cost(jax.jit(each).lower(hidden, hidden, head).compile())


def step_cost(axis: str, devices: int, sizes: dict, rows: int, length: int):
  """Compiles a teacher's and a student's pack of an update.

  Args:
    axis: `data`, where weights are replicated, or `fsdp`, where they are split.
    devices: how many along that axis.
    sizes: of `ModelConfig`.
    rows: rows of the batch, over all devices.
    length: tokens of a row, half of them response.

  Returns:
    The costs of `teach` and of `learn`.
  """
  import compiled
  import jax
  import jax.numpy as jnp
  import optax
  from flax import nnx

  from trd_jax.distill import step as distill_step
  from trd_jax.distill.loss import objective
  from trd_jax.distill.packing import packing
  from trd_jax.model import sharding
  from trd_jax.model.attention import blockwise
  from trd_jax.model.config import ModelConfig
  from trd_jax.model.lora_config import LoraConfig
  from trd_jax.model.qwen3 import Qwen3

  mesh = sharding.make_mesh(
    **{"data": 1, axis: devices}, devices=jax.devices()[:devices]
  )
  config, dtype = ModelConfig(**sizes), jnp.float32

  def model(lora):
    return jax.eval_shape(
      lambda: Qwen3(config, lora=lora, dtype=dtype, rngs=nnx.Rngs(0))
    )

  student, adapter, base = nnx.split(
    model(LoraConfig(64, 128.0, 0.0)), nnx.LoRAParam, ...
  )
  adapter, base = (
    nnx.to_pure_dict(sharding.abstract(x, mesh)) for x in (adapter, base)
  )
  setup = distill_step.Setup(
    student=student,
    teacher=nnx.graphdef(model(None)),
    loss=objective.slot_loss(objective.Objective(), _ONSETS),
    optimizer=optax.identity(),
    schedule=lambda step: step * 0.0,
    mesh=mesh,
    dropout=False,
  )
  per, slots = rows // devices, length // 2
  at = sharding.batch_sharding(mesh)

  def of(shape, kind=jnp.int32):
    return jax.ShapeDtypeStruct((devices, *shape), kind, sharding=at)

  ids = packing.Rows(*[of((per, length))] * 3)
  buffer = of((per * slots, config.hidden_size), dtype)
  response = packing.Slots(*[of((per, slots))] * 7)
  response = response._replace(weight=of((per, slots), jnp.float32))
  key = jax.eval_shape(lambda: jax.random.key(0))

  def teach(buffer, base, pack):
    return distill_step.teach(setup, buffer, base, pack)

  def learn(adapter, base, buffer, pack, key):
    return distill_step.learn(setup, adapter, base, base, buffer, pack, key)

  teacher = packing.TeacherPack(ids, of((per, length)))
  pack = packing.StudentPack(ids, response)
  # Attention walks as far as the rows' segments say. Here a row is one, so the
  # i-th of its blocks of queries sees i + 1 of keys.
  turns = (-(-length // blockwise.BLOCK) + 1) / 2
  with jax.set_mesh(mesh):
    return tuple(
      compiled.cost(program.compile(), turns)
      for program in (
        jax.jit(teach, donate_argnums=0).lower(buffer, base, teacher),
        jax.jit(learn).lower(adapter, base, buffer, pack, key),
      )
    )


def points(xs, cost: Callable) -> dict:
  """A curve as a case: one run with the numbers at each x."""
  made = []
  for x in xs:
    start = time.perf_counter()
    made.append({"x": x, **cost(x)._asdict()})
    seconds = time.perf_counter() - start
    print(f"  {x}: {seconds:.1f} s", file=sys.stderr, flush=True)
  return {"about": {}, "runs": made}


def measure(args, document: results.Document) -> None:
  """Compiles every point."""
  os.environ["XLA_FLAGS"] = " ".join(
    (
      os.environ.get("XLA_FLAGS", ""),
      f"--xla_force_host_platform_device_count={max(DEVICES)}",
    )
  )
  sys.path.insert(0, str(results.ROOT))
  import turns

  sizes, top = SIZES, 16_384
  if args.quick:
    sizes, top = TINY, 1024
  doublings = [top >> n for n in range(5, -1, -1)]
  chunk = top // 32
  cases = {
    way: points(doublings, lambda n, w=way: loss_cost(w, n, chunk, sizes))
    for way in WAYS
  }
  cases["ours"]["about"]["versions"] = turns.imported_versions()
  document.add("tokens", {"model": sizes, "chunk": chunk}, cases)

  # Beyond, a block of logits passes 2 GiB, and what the compiler reports of the
  # checkpointed scan is less than one of its blocks.
  chunks = [top >> n for n in range(8, 2, -1)]
  cases = {
    way: points(chunks, lambda c, w=way: loss_cost(w, top, c, sizes))
    for way in (WAYS[0], WAYS[2])
  }
  document.add("chunk", {"model": sizes, "tokens": top}, cases)

  rows, length = max(DEVICES), top // 8
  cases = {
    "loss": points(
      DEVICES, lambda n: loss_cost("ours", rows * length, chunk, sizes, n)
    )
  }
  for axis in ("data", "fsdp"):
    both = {n: step_cost(axis, n, sizes, rows, length) for n in DEVICES}
    for number, name in enumerate(("teacher", "student")):
      cases[f"{name}, {axis}"] = points(
        DEVICES, lambda n, i=number, b=both: b[n][i]
      )
  settings = {"model": sizes, "rows": rows, "length": length, "chunk": chunk}
  document.add("devices", settings, cases)


_TITLES = {
  "tokens": "Loss over tokens",
  "chunk": "Loss over the chunk",
  "devices": "One batch over devices",
}


def _text(group: str, settings: dict) -> str:
  model = settings["model"]
  shape = f"D={model['hidden_size']:,}, V={model['vocab_size']:,}, float32"
  if group == "tokens":
    return f"{shape}, chunks of {settings['chunk']} tokens, one device."
  if group == "chunk":
    return f"{shape}, {settings['tokens']:,} tokens, one device."
  return (
    f"{shape}, {model['num_layers']} layers, rematerialised; {settings['rows']}"
    f" rows of {settings['length']:,} tokens, one segment each, half of them"
    " response, split over the devices. `data` replicates the weights, `fsdp`"
    " splits them too. The"
    " loss's batch has as many response tokens as those rows have tokens."
  )


def tables(document: dict) -> list[results.Table]:
  """A table a group: GiB and TFLOP a device."""
  made = []
  for group, found in document["groups"].items():
    cases = found["cases"]
    rows = []
    for name, case in cases.items():
      for field, unit, form in (
        ("temp_bytes", 2**30, ".3g"),
        ("argument_bytes", 2**30, ".3g"),
        ("flops", 1e12, ".4g"),
      ):
        if field == "argument_bytes" and group != "devices":
          continue
        kind = {
          "temp_bytes": "GiB temporary",
          "argument_bytes": "GiB arguments",
          "flops": "TFLOP",
        }[field]
        values = [f"{run[field] / unit:{form}}" for run in case["runs"]]
        rows.append((name, kind, *values))
    xs = [f"{run['x']:,}" for run in next(iter(cases.values()))["runs"]]
    columns = ("a device", group, *xs)
    text = _text(group, found["settings"])
    made.append(results.Table(_TITLES[group], text, columns, rows))
  return made


def page(document: dict) -> str:
  """docs/scaling.md."""
  parts = [
    "# How memory and work grow",
    f"Written by `{document['command']}`, commit {document['commit']},"
    f" {document['date']}, jax {document['versions'].get('jax')}. Programs are"
    " compiled for host devices at the sizes of Qwen3-8B and never run. Bytes"
    " are those that the compiler sets aside on a device; FLOPs are those of"
    " the matrix products of its optimised program, each as often as its loops"
    " turn. Both axes are logarithmic.",
  ]
  for table, group in zip(tables(document), document["groups"], strict=True):
    picture = f"![{table.title}](scaling-{group}.svg)"
    parts += [f"## {table.title}", picture, str(table)]
  return "\n\n".join(parts) + "\n"


def draw(document: dict, folder: Path) -> None:
  """A picture a group, as SVG: bytes on the left, FLOPs on the right."""
  import matplotlib

  matplotlib.use("svg")
  matplotlib.rcParams["svg.hashsalt"] = "scaling"  # The same bytes each time.
  from matplotlib import pyplot

  for group, found in document["groups"].items():
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="tight")
    for axis, field, unit, label in (
      (axes[0], "temp_bytes", 2**30, "temporary GiB a device"),
      (axes[1], "flops", 1e12, "TFLOP a device"),
    ):
      for name, case in found["cases"].items():
        xs = [run["x"] for run in case["runs"]]
        ys = [run[field] / unit for run in case["runs"]]
        axis.plot(xs, ys, marker="o", markersize=3, label=name)
      axis.set_xscale("log", base=2)
      axis.set_yscale("log")
      axis.set_xlabel(group)
      axis.set_ylabel(label)
      axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(folder / f"scaling-{group}.svg", metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
  """Compiles, prints tables, draws and writes the page."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--docs", type=results.output, help="where pictures go")
  parser.add_argument("--quick", action="store_true", help="a smoke test")
  parser.add_argument(
    "--json", type=results.output, help="write the results here"
  )
  args = parser.parse_args()
  document = results.Document("scaling", args.json, args.quick)
  measure(args, document)
  results.show(tables(document.fields))
  if args.docs is not None:
    args.docs.mkdir(parents=True, exist_ok=True)
    draw(document.fields, args.docs)
    (args.docs / "scaling.md").write_text(page(document.fields))


if __name__ == "__main__":
  main()
