"""What is compiled ahead, and what crosses the mesh in it."""

import dataclasses
import functools
import math
import os
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tests.support import distilling
from trd_jax.distill import optimizer
from trd_jax.distill.compilation import Program, compile_all
from trd_jax.distill.distiller import Distiller
from trd_jax.distill.packing import packing
from trd_jax.distill.step import Setup
from trd_jax.distill.teacher.source import hidden_slot
from trd_jax.experiment.schema import Train
from trd_jax.model import sharding

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (host) devices"),
]

ADAMW = optimizer.make_optimizer(Train(), 10)
_COLLECTIVE = re.compile(
  r" = (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter"
  r"|collective-permute|collective-broadcast)(?:-start)?\("
)
_ARRAY = re.compile(r"f32\[([\d,]*)\]")
DATA = distilling.samples(13)
# A longer sample, so that each side has two programs.
LONGER = [*DATA, *distilling.samples(1, seed=3, longest=30)]


def collectives(executable) -> list[tuple[str, int]]:
  """Each collective of a program: what it is and the bytes that it takes."""
  found = []
  for shapes, name in _COLLECTIVE.findall(executable.as_text()):
    sizes = [
      math.prod(map(int, filter(None, shape.split(","))))
      for shape in _ARRAY.findall(shapes)
    ]
    found.append((name, 4 * sum(sizes)))
  return found


def run(data, shape, **options):
  return distilling.Run(
    distilling.models(), data, shape, optimizer=ADAMW, **options
  )


@functools.cache
def replicas():
  """A run of two programs a side on eight devices, and its programs."""
  made = run(
    LONGER, (8, 1, 1), dropout=True, pack_tokens=32, teacher_pack_tokens=32
  )
  assert len(made.layout.student) == len(made.layout.teacher) == 2
  return made, made.distiller.compile(made.layout, made.state)


def test_only_the_adapters_gradient_crosses_a_mesh_of_replicas():
  made, programs = replicas()
  assert len(programs) == 5
  for name, executable in programs.items():
    if name != "update":
      assert collectives(executable) == [], name
  crossing = collectives(programs["update"])
  assert {name for name, _ in crossing} == {"all-reduce"}
  gradient = sum(4 * x.size for x in jax.tree.leaves(made.state.lora))
  totals = made.distiller.abstract_sums()[1]
  # Of each copy's sums one crosses.
  metrics = sum(
    4 * x.size // x.shape[0] for x in jax.tree.leaves(totals.metrics)
  )
  # Once, in float32, and nothing else.
  assert sum(size for _, size in crossing) == gradient + metrics


def test_what_xla_is_told_reaches_every_program_of_an_update():
  """As `train.deterministic` does, whatever has been compiled before."""
  made = run(DATA, (1, 1, 1))
  assert made.setup.compiler_options == {}

  class Told(Setup):
    @property
    def compiler_options(self):
      return {"xla_no_such_option": True}

  fields = {
    f.name: getattr(made.setup, f.name) for f in dataclasses.fields(Setup)
  }
  distiller = Distiller(
    Told(**fields),
    made.state.lora,
    *made.distiller._bases,
    made.layout.buffer_slots,
    hidden_slot(distilling.STUDENT.hidden_size, "float32"),
  )
  packs = packing.blank(made.layout)
  lowered = distiller.lower(made.state.lora, packs.teacher[0], packs.student[0])
  assert set(lowered) == {"teach", "learn", "update"}
  for program in lowered.values():
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
      program.compile()
  told = dataclasses.replace(made.setup, deterministic=True).compiler_options
  assert set(told) == {"xla_gpu_exclude_nondeterministic_ops"}
  jax.jit(lambda x: x + 1, compiler_options=told)(1)  # XLA knows it


def test_a_collective_would_be_seen():
  mesh = sharding.make_mesh()
  split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  x = jax.ShapeDtypeStruct((8, 5), np.float32, sharding=split)
  total = jax.jit(lambda x: x.sum(0), out_shardings=whole).lower(x).compile()
  assert collectives(total) == [("all-reduce", 20)]
  copy = jax.jit(lambda x: x + 1, out_shardings=whole).lower(x).compile()
  assert collectives(copy) == [("all-gather", 160)]


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_state_and_sums_are_split_as_the_rules_say(shape):
  made = run(DATA, shape)
  mesh = made.setup.mesh

  def specs(tree):
    return {
      jax.tree_util.keystr(path, simple=True, separator="/"): x.sharding.spec
      for path, x in jax.tree.leaves_with_path(tree)
    }

  axes = {"fsdp": "embed", "tensor": "mlp"}
  lora = specs(made.state.lora)
  down, up = lora["layers/mlp/gate/lora_a"], lora["layers/mlp/gate/lora_b"]
  expected = P(None, "fsdp", None), P(None, None, "tensor")
  assert (down, up) == expected, axes
  base = specs(made.distiller._bases[0])
  assert base["layers/mlp/gate/kernel"] == P(None, "fsdp", "tensor")
  assert base["layers/mlp/down/kernel"] == P(None, "tensor", "fsdp")
  assert base["embed/embedding"] == P("tensor", "fsdp")

  # One update later, too: the compiler has had its say then.
  made.update(DATA)
  state = made.state
  assert specs(state.lora) == lora
  for moments in (
    optax.tree.get(state.opt_state, "mu"),
    optax.tree.get(state.opt_state, "nu"),
  ):
    assert specs(moments) == lora
  grads = specs(made.distiller._totals.grads)
  row = "data" if shape == (8, 1, 1) else None
  assert grads == {name: P(row, *spec) for name, spec in lora.items()}
  # What a device holds of them is its share and no more.
  gate = state.lora["layers"]["mlp"]["gate"]["lora_a"]
  shard = gate.addressable_shards[0].data
  assert gate.size == shard.size * mesh.shape["fsdp"]


def test_updates_compile_nothing_after_everything_has_been():
  made, _ = replicas()
  other = run(DATA, (1, 1, 1))
  events = []

  def listen(event, seconds, **_):
    if "backend_compile" in event:
      events.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  packs = packing.pack(LONGER, made.layout)
  lengths = {p.rows.tokens.shape for m in packs for p in m.student}
  assert len(lengths) == 2
  made.update(LONGER)
  made.update(LONGER)
  assert events == []
  # Left to the updates, three programs are compiled there, and the one that
  # makes the first sums.
  other.update(DATA)
  assert len(events) == 4
  jax.monitoring.unregister_event_duration_listener(listen)


def test_a_program_keeps_an_executable_a_shape(capfd):
  traced = []

  def double(x, y):
    traced.append(x.shape)
    return 2 * x + y

  program = Program(double, varies=0)
  short, long = np.arange(3.0), np.arange(5.0)
  done = compile_all(
    {"a": (program, (short, 1.0)), "b": (program, (long, 1.0))}
  )
  assert sorted(done) == ["a", "b"]
  assert "2/2 programs" in capfd.readouterr().err
  np.testing.assert_array_equal(program(long, 3.0), 2 * long + 3)
  np.testing.assert_array_equal(program(short, 3.0), 2 * short + 3)
  assert traced == [(3,), (5,)]
  # A shape that nobody foresaw is compiled when it comes.
  assert program(np.ones(2), 1.0).shape == (2,)
  assert traced == [(3,), (5,), (2,)]


KEPT = """
from trd_jax.experiment import cli

cli._keep_compilations()
import jax
import numpy as np

heard = []
jax.monitoring.register_event_listener(lambda event, **_: heard.append(event))
slow = jax.jit(lambda x: jax.lax.scan(lambda c, y: (jax.numpy.sin(c @ y), None),
                                      x, x[None] * np.ones((3, 1, 1)))[0])
got = slow(np.eye(40, dtype=np.float32))
print(float(got[0, 0]), sum(e.endswith("/cache_hits") for e in heard))
"""


def test_the_next_process_finds_what_was_compiled(tmp_path):
  shown = {"XDG_CACHE_HOME": str(tmp_path)}
  shown["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

  def start(**more):
    hidden = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(
      [sys.executable, "-c", KEPT],
      env=environment | shown | more,
      capture_output=True,
      text=True,
      check=True,
    )
    value, hits = done.stdout.split()
    return float(value), int(hits)

  def entries(folder):
    return sorted(folder.rglob("*-cache"))

  value, hits = start(JAX_ENABLE_COMPILATION_CACHE="false")
  assert (hits, entries(tmp_path)) == (0, [])
  assert start() == (value, 0)
  kept = entries(tmp_path / "trd-jax" / "xla")
  assert len(kept) > 0
  again, hits = start()
  assert again == value
  assert hits == len(kept)
  # A process that was killed as it wrote leaves a torn entry: no harm.
  for path in kept:
    path.write_bytes(path.read_bytes()[:100])
  assert start() == (value, 0)
  # Elsewhere is elsewhere.
  other = tmp_path / "other"
  assert start(JAX_COMPILATION_CACHE_DIR=str(other)) == (value, 0)
  assert len(entries(other)) == len(kept)


def test_what_cannot_be_compiled_is_told():
  def wrong(x):
    return x @ x

  with pytest.raises(TypeError, match="dot_general"):
    compile_all({"wrong": (Program(wrong, varies=0), (np.ones((2, 3)),))})
