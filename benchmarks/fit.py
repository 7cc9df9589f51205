"""Whether an update at the paper's longest lengths fits a device; no GPU.

    python benchmarks/fit.py                    eight host devices
    python benchmarks/fit.py --target h100      XLA's compiler for eight H100s

Takes the trainer's own programs for Qwen3's true shapes, made of abstract
arrays, compiles them for eight devices, and prints what one device holds, in
GB of 1e9 bytes. Exit code 1 where that exceeds `--limit-gb`: by default what a
training takes of an H100 at its start (`schema.MEMORY_SHARE`).

What stays on a device between programs is arithmetic: the bytes of each
array's shard. What a program needs while it runs is read from what XLA
compiled (`memory_analysis`). With host devices it is the CPU backend's need: it
multiplies bfloat16 through float32 copies that a GPU doesn't make, and fuses
more of the loss. `--target h100` asks the GPU compiler itself, which needs the
package (`pip install 'jax[cuda12]'`) and neither a GPU nor a driver.
"""

import argparse
import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trd_jax.experiment.schema import MEMORY_SHARE  # noqa: E402

DEVICES = 8
BATCH = 128

# Left alone, the CPU compiler moves the float32 copies of all layers' weights
# out of the loop over layers, where they are in memory at once.
_HOST_FLAGS = (
  f"--xla_force_host_platform_device_count={DEVICES}",
  "--xla_disable_hlo_passes=while-loop-invariant-code-motion,"
  "while-loop-expensive-invariant-code-motion",
)

# What a compiler has to know of a GPU that isn't there (NVIDIA's H100 SXM5
# 80 GB and compute capability 9.0, as published).
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 3352000000000
  device_memory_size: 84942979072
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# What a training's JAX has of it, in GB.
_MEMORY = int(_H100.partition("device_memory_size: ")[2].split()[0])
LIMIT_GB = int(MEMORY_SHARE * _MEMORY / 1e8) / 10


@dataclasses.dataclass(frozen=True)
class Case:
  """A regime, its models and the longest lengths that it trains at.

  Attributes:
    student: a name of `shapes.MODELS`.
    teacher: another, or None in OPSD.
    student_tokens: longest prompt and response of the student.
    teacher_tokens: of the teacher; TRD's bound, and so more than on y_o.
    response: the longest response.
  """

  student: str
  teacher: str | None
  student_tokens: int
  teacher_tokens: int
  response: int = 16_384


CASES = {
  "opd-1.7b": Case("1.7b", "8b", 18_432, 34_816),
  "opd-4b": Case("4b", "8b", 18_432, 34_816),
  "opsd-4b": Case("4b", None, 22_528, 38_912),
  "opsd-8b": Case("8b", None, 22_528, 38_912),
  "tiny": Case("tiny", None, 96, 160, 64),
}
MESHES = {"data=8": (DEVICES, 1, 1), "fsdp=8": (1, DEVICES, 1)}


def shard_bytes(tree: Any) -> int:
  """Bytes that one device holds of a tree of placed or abstract arrays.

  An object that stands in the tree more than once is held once.
  """
  import jax

  leaves = {id(x): x for x in jax.tree.leaves(tree)}
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in leaves.values()
  )


def scratch_bytes(program) -> int:
  """Returns what a compiled program needs on a device beyond its arguments.

  Intermediates, and those results that don't take an argument's place.
  """
  memory = program.memory_analysis()
  fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return memory.temp_size_in_bytes + fresh


def stays(sides, distiller, packs: Any) -> dict[str, int]:
  """Bytes a device holds all the time, by what they are; arithmetic.

  Args:
    sides: both models, see `models.Models`.
    distiller: their programs.
    packs: the packs of an update that are on the way, as host arrays.
  """
  state = distiller.abstract_state(sides.lora)
  buffer, totals = distiller.abstract_sums()
  return {
    "parameters": shard_bytes((sides.base, sides.teacher_base, state.lora)),
    "optimizer": shard_bytes((state.opt_state, state.step, state.rng)),
    "sums": shard_bytes(totals),
    "buffer": shard_bytes(buffer) + _pack_bytes(packs),
  }


def _pack_bytes(packs: Any) -> int:
  import jax

  # Groups come first and are split over the devices.
  return sum(x.nbytes // x.shape[0] for x in jax.tree.leaves(packs))


def loss_alone(experiment, sides, slots: int, mesh):
  """The loss and its gradient on one device's slots, lowered."""
  import jax
  import jax.numpy as jnp
  import steps
  from flax import nnx

  from trd_jax.distill.packing.packing import Slots
  from trd_jax.model import sharding

  heads = jax.eval_shape(
    lambda lora, base, teacher_base: (
      nnx.merge(sides.student, lora, base).head_VD,
      nnx.merge(sides.teacher, teacher_base).head_VD,
    ),
    sides.lora,
    sides.base,
    sides.teacher_base,
  )
  loss = steps.slot_loss(experiment, sides, mesh)
  ints = jax.ShapeDtypeStruct((slots,), jnp.int32)
  floats = jax.ShapeDtypeStruct((slots,), jnp.float32)
  rows = Slots(*(ints,) * len(Slots._fields))._replace(weight=floats)
  hidden = [
    jax.ShapeDtypeStruct((slots, head.shape[1]), head.dtype) for head in heads
  ]
  return jax.jit(
    jax.grad(loss, has_aux=True), in_shardings=sharding.replicated(mesh)
  ).lower(*hidden, *heads, rows)


def rows_of(name: str, args, devices) -> Iterator[dict[str, Any]]:
  """Compiles one case on every mesh and under every remat policy."""
  import jax
  import shapes
  import steps

  from trd_jax.distill.packing import packing
  from trd_jax.model import sharding

  case = CASES[name]
  student = shapes.MODELS[case.student]
  teacher = shapes.MODELS[case.teacher] if case.teacher else None
  lengths = shapes.Lengths(
    args.student_tokens or case.student_tokens,
    case.teacher_tokens,
    case.response,
  )
  lengths = dataclasses.replace(
    lengths, response=min(lengths.response, lengths.student - 1)
  )
  data = steps.samples(lengths, BATCH, student.vocab_size)
  layout = steps.one_row_packs(data, DEVICES, lengths)
  batch = packing.pack(data, layout)[0]
  packs = batch.teacher[0], batch.student[0]
  for mesh_name in args.meshes:
    mesh = sharding.make_mesh(*MESHES[mesh_name], devices=devices)
    scratch: dict[str, int] = {}
    for remat in args.remat:
      start = time.monotonic()
      experiment = steps.experiment_with(train__remat=remat)
      sides = steps.abstract(student, teacher, experiment, mesh)
      distiller = steps.make(sides, experiment, mesh, layout)
      lowered = distiller.lower(sides.lora, *map(steps.shape_of, packs))
      lowered["loss"] = loss_alone(
        experiment, sides, layout.student[-1].slots, mesh
      )
      for program, low in lowered.items():
        # What a student keeps for its backward pass is none of the others'.
        if program == "learn" or program not in scratch:
          scratch[program] = scratch_bytes(low.compile())
      held = stays(sides, distiller, packs)
      yield {
        "case": name,
        "mesh": mesh_name,
        "remat": remat,
        "tokens": f"{lengths.student:,} / {lengths.teacher:,}",
        **held,
        **scratch,
        "peak": sum(held.values()) + max(scratch.values()),
        "seconds": time.monotonic() - start,
      }
      jax.clear_caches()


COLUMNS = (
  "parameters",
  "optimizer",
  "sums",
  "buffer",
  "teach",
  "learn",
  "loss",
  "update",
  "peak",
)

LEGEND = """
arithmetic, stays on the device: `parameters` (frozen base, OPD's teacher,
  adapter), `optimizer` (both moments), `sums` (gradient and metrics), `buffer`
  (the teacher's hidden states, and packs on their way)
compiled, while a program runs: `teach` (teacher's activations), `learn`
  (student's activations, with the loss), `loss` (of that, the loss compiled by
  itself), `update`
`peak`: what stays and the largest program. tokens: student / teacher."""

HOST_NOTE = """
Compiled for host devices, whose bfloat16 products go through float32 copies
  (teach, learn: too high) and whose compiler keeps less of the loss in memory
  (loss: too low); --target h100 has a GPU's."""


def devices_of(target: str) -> list[Any]:
  """Eight devices to compile for; sets JAX up, so it comes first."""
  if target == "host":
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", ""), *_HOST_FLAGS
    os.environ["XLA_FLAGS"] = " ".join(flags)
    import jax

    return jax.devices()[:DEVICES]
  try:
    return h100s()
  except (NotImplementedError, RuntimeError) as error:
    told = (
      "fit.py: --target=h100 needs XLA's GPU compiler; install"
      f" 'jax[cuda12]' beside JAX, or leave the flag out ({error})"
    )
    print(" ".join(told.split()), file=sys.stderr)
    sys.exit(2)  # 1 says that something doesn't fit


def h100s() -> list[Any]:
  """Returns eight H100s to compile for, none of which has to be there.

  Sets JAX up, so it comes first.

  Raises:
    NotImplementedError: JAX has no compiler for GPUs.
    RuntimeError: it can't be started.
  """
  # The plugin looks for a driver where nothing tells it not to.
  os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
  os.environ.pop("JAX_PLATFORMS", None)
  from jax.experimental import topologies

  topology = topologies.get_topology_desc(
    platform="cuda", topology=f"1x1x{DEVICES}", target_config=_H100
  )
  return list(topology.devices)


def main() -> None:
  """Prints a row a case, mesh and policy; exits with 1 where one is too big."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  real = [name for name in CASES if name != "tiny"]
  parser.add_argument("--target", choices=("host", "h100"), default="host")
  parser.add_argument("--cases", nargs="+", choices=CASES, default=real)
  parser.add_argument(
    "--meshes", nargs="+", choices=MESHES, default=list(MESHES)
  )
  parser.add_argument("--remat", nargs="+", default=["full", "attention"])
  parser.add_argument("--limit-gb", type=float, default=LIMIT_GB)
  parser.add_argument(
    "--student-tokens", type=int, help="a student row of another length"
  )
  args = parser.parse_args()
  devices = devices_of(args.target)
  print(f"GB (1e9 bytes) a device of {DEVICES}, compiled for {args.target}\n")
  head = ("case", "mesh", "remat", "tokens", *COLUMNS)
  print(f"| {' | '.join(head)} |")
  print(f"|{'---|' * len(head)}", flush=True)
  too_big = []
  for name in args.cases:
    for row in rows_of(name, args, devices):
      cells = [row[key] for key in head[:4]]
      cells += [f"{row[key] / 1e9:.2f}" for key in COLUMNS]
      print(f"| {' | '.join(cells)} |", flush=True)
      if row["peak"] > args.limit_gb * 1e9:
        too_big.append(" ".join(cells[:3]))
  print(LEGEND + (HOST_NOTE if args.target == "host" else ""))
  if too_big:
    sys.exit(f"\nabove {args.limit_gb:g} GB: {'; '.join(too_big)}")
  print(f"\nall within {args.limit_gb:g} GB")


if __name__ == "__main__":
  main()
