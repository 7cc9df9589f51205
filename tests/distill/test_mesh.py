"""The choice of a mesh, from sizes alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from trd_jax.distill import mesh_choice, step
from trd_jax.distill.loss import objective
from trd_jax.distill.loss.objective import Objective
from trd_jax.distill.mesh_choice import GIB, ModelSize, Sizes
from trd_jax.distill.packing import packing
from trd_jax.distill.packing.layout import Layout, PackShape
from trd_jax.distill.step import Setup
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.schema import Mesh
from trd_jax.model import sharding
from trd_jax.model.config import ModelConfig
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.qwen3 import Qwen3

# Of 80 GiB, what JAX takes of a GPU by default.
H100 = int(0.75 * 80 * GIB)


def qwen3(D, F, L, N, tied=False) -> ModelConfig:
  return ModelConfig(151_936, D, F, L, N, 8, 128, tie_embeddings=tied)


MODELS = {
  "1.7b": qwen3(2048, 6144, 28, 16, tied=True),
  "4b": qwen3(2560, 9728, 36, 32, tied=True),
  "8b": qwen3(4096, 12_288, 36, 32),
  "32b": qwen3(5120, 25_600, 64, 64),
}


def paper_lengths(groups) -> Layout:
  """Shapes of TRD at the paper's lengths."""
  student = PackShape(2048, 1, 1152), PackShape(18_432, 1, 16_384)
  teacher = PackShape(16_384, 1, 16_384), PackShape(34_816, 1, 34_816)
  return Layout(groups, student, teacher, 131_072 // groups)


def short(groups) -> Layout:
  """A student of few tokens, whose teacher reads many."""
  return dataclasses.replace(
    paper_lengths(groups), student=(PackShape(128, 1, 64),)
  )


def sizes(student, teacher=None, dtype="bfloat16", **changes) -> Sizes:
  made = Sizes(
    ModelSize(MODELS[student], dtype),
    ModelSize(MODELS[teacher], dtype) if teacher else None,
    LoraConfig(),
    paper_lengths,
    512,
    "full",
  )
  return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
  ("student", "teacher", "devices", "limit", "chosen"),
  [
    ("1.7b", "8b", 8, H100, (8, 1, 1)),
    ("4b", "8b", 8, H100, (8, 1, 1)),
    ("8b", None, 8, H100, (8, 1, 1)),
    ("8b", None, 1, H100, (1, 1, 1)),
    ("8b", None, 6, H100, (6, 1, 1)),
    ("32b", None, 8, H100, (2, 4, 1)),
    ("32b", None, 16, H100, (4, 4, 1)),
    ("32b", None, 8, 100 * GIB, (4, 2, 1)),
    # A third of 4,096 is no size.
    ("8b", None, 6, 32 * GIB, (3, 2, 1)),
    # No fsdp is enough: a row's activations have to be split, too.
    ("4b", "8b", 8, 17 * GIB, (2, 2, 2)),
  ],
)
def test_as_few_parts_as_fit(student, teacher, devices, limit, chosen):
  tried = mesh_choice.choose(sizes(student, teacher), devices, limit)
  assert tried[-1].shape == chosen
  assert np.prod(chosen) == devices
  usable = 0.9 * limit
  assert tried[-1].total <= usable
  assert all(e.total > usable for e in tried[:-1])
  # The order: fsdp 1, 2, 4, … before tensor 2.
  assert [e.shape[:0:-1] for e in tried] == sorted(
    e.shape[:0:-1] for e in tried
  )


def test_the_table_adds_up():
  tried = mesh_choice.choose(sizes("32b"), 8, H100)
  head, titles, *rows = mesh_choice.table(tried, H100).splitlines()
  assert "60.00 GiB a device" in head
  assert titles.split()[-1] == "all"
  assert [row.split()[:3] for row in rows] == [
    ["data=8", "fsdp=1", "tensor=1"],
    ["data=4", "fsdp=2", "tensor=1"],
    ["data=2", "fsdp=4", "tensor=1"],
  ]
  for row in rows:
    fits = "fits" if row is rows[-1] else "too much"
    assert row.endswith(fits)
    *parts, total = map(float, row.removesuffix(fits).split()[3:])
    assert sum(parts) == pytest.approx(total, abs=0.005 * len(parts) + 0.005)
  assert max(map(len, rows)) <= 100


@pytest.mark.parametrize("tensor", [1, 2])
def test_only_a_teacher_that_is_there_is_counted(tensor):
  shape = (1, 8 // tensor, tensor)

  def parts(weights, **changes):
    made = sizes("1.7b", "8b", weights=weights, **changes)
    return mesh_choice.estimate(made, shape).parts

  teacher = MODELS["8b"]
  head = teacher.vocab_size * teacher.hidden_size * 2
  whole = parts("model")["teacher"] * 8
  assert whole == pytest.approx(2 * teacher.num_parameters(), rel=1e-3)
  # While the cache is filled the student is not there yet, but here the
  # student's passes take more than the teacher's weights.
  cached = parts("head", remat="none")
  assert cached["teacher"] * 8 == head
  assert cached["buffer"] == 2 * parts("model")["buffer"]
  filling = parts("head", layout=short)
  assert filling["teacher"] * 8 == whole
  assert "student" not in filling
  slots = paper_lengths(8 // tensor).buffer_slots
  found = sizes("1.7b", weights="none", recorded=20)
  found = mesh_choice.estimate(found, shape).parts
  assert "teacher" not in found
  assert found["buffer"] == 2 * slots * (20 * 8 + 4)


def test_heads_that_devices_share_are_counted_in_parts():
  V = MODELS["8b"].vocab_size
  assert [sizes("8b").vocab(n) for n in (1, 2, 3)] == [V, V // 2, V]
  assert sizes("8b", weights="none").vocab(2) == V


def test_the_weights_are_counted_exactly_as_they_are_placed():
  made = sizes("32b")
  for shape in ((8, 1, 1), (2, 4, 1), (1, 2, 4)):
    parts = mesh_choice.estimate(made, shape).parts
    split = shape[1] * shape[2]
    whole = 2 * MODELS["32b"].num_parameters()
    # Norms of heads stay whole; nothing else does.
    assert parts["student"] == pytest.approx(whole / split, rel=1e-4)
  alone = mesh_choice.estimate(made, (8, 1, 1)).parts
  assert alone["student"] == 2 * MODELS["32b"].num_parameters()
  # The paper's size of the 8B adapter (Appendix C.6).
  adapter = mesh_choice.estimate(sizes("8b"), (8, 1, 1)).parts["adapter"]
  assert adapter / 5 / 4 == pytest.approx(174.6e6, rel=1e-3)


@pytest.mark.parametrize(
  ("changes", "limit", "told"),
  [
    ({}, 18 * GIB, "train.pack_tokens"),
    ({"dtype": "float32"}, 26 * GIB, "train.pack_tokens"),
    ({"student": "8b", "lora": LoraConfig(rank=2048)}, 40 * GIB, "lora.rank"),
  ],
)
def test_what_fits_nowhere_is_refused_with_what_to_lower(changes, limit, told):
  made = sizes(**({"student": "32b"} | changes))
  with pytest.raises(UserError, match=told) as caught:
    mesh_choice.choose(made, 8, limit)
  assert "\n" not in str(caught.value)
  assert f"{limit / GIB:.1f} GiB a device" in str(caught.value)


def test_weights_that_are_too_wide_are_to_be_narrowed():
  small = lambda groups: Layout(  # noqa: E731
    groups, (PackShape(512, 1, 256),), (PackShape(512, 1, 512),), 256
  )
  made = sizes("8b", dtype="float32", layout=small)
  with pytest.raises(UserError, match=r"set student\.dtype to bfloat16"):
    mesh_choice.choose(made, 1, 20 * GIB)
  made = sizes("8b", layout=small)
  with pytest.raises(UserError, match="choose smaller models"):
    mesh_choice.choose(made, 1, 12 * GIB)


def test_sizes_in_the_config_are_taken_and_the_rest_is_filled_up():
  assert Mesh().sizes is None
  assert Mesh(memory_gib=4.0).sizes is None
  assert Mesh(data=2).sizes == (2, 1, 1)
  assert Mesh(fsdp=2).sizes == (-1, 2, 1)
  assert Mesh(tensor=-1).sizes == (1, 1, -1)
  assert Mesh(data=-1, tensor=2).sizes == (-1, 1, 2)
  mesh, told = mesh_choice.make(Mesh(fsdp=2, tensor=2), sizes("32b"))
  assert (dict(mesh.shape), told) == ({"data": 2, "fsdp": 2, "tensor": 2}, "")
  mesh, told = mesh_choice.make(Mesh(memory_gib=60.0), sizes("32b"))
  assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
  assert told == mesh_choice.table(
    mesh_choice.choose(sizes("32b"), 8, H100), H100
  )
  # CPUs don't say what memory they have.
  mesh, told = mesh_choice.make(Mesh(), sizes("32b"))
  assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
  assert "mesh.memory_gib" in told


@pytest.mark.parametrize("teacher", [None, "1.7b"])
def test_kernels_are_not_split_below_a_key_head(teacher):
  few = dataclasses.replace(MODELS["4b"], num_kv_heads=2)
  made = sizes("1.7b", teacher)
  side = "teacher" if teacher else "student"
  made = dataclasses.replace(made, **{side: ModelSize(few, "bfloat16")})
  asked = Mesh(tensor=4)
  with pytest.raises(UserError, match=r"mesh\.tensor=4: cudnn") as caught:
    mesh_choice.make(asked, made, "cudnn")
  assert "2 key heads over 4 devices" in str(caught.value)
  assert "train.attention=xla" in str(caught.value)
  for section, attention in ((asked, "xla"), (Mesh(tensor=2), "cudnn")):
    mesh, _ = mesh_choice.make(section, made, attention)
    assert mesh.shape["tensor"] == section.tensor


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "none"])
def test_the_estimate_is_near_what_xla_plans(remat):
  """Of the temporaries of both programs, in float32 on a CPU."""
  config = ModelConfig(4096, 256, 768, 6, 8, 4, 32, tie_embeddings=True)
  made = Sizes(
    ModelSize(config, "float32"),
    None,
    LoraConfig(),
    lambda groups: Layout(
      groups, (PackShape(1024, 2, 512),), (PackShape(2048, 1, 2048),), 1024
    ),
    512,
    remat,
  )
  learn, teach = programs(made)
  layout = made.layout(1)
  # The pack's own gradient is part of what XLA counts here.
  gradient = mesh_choice.estimate(made, (1, 1, 1)).parts["adapter"] / 5
  (pack,) = layout.student
  learning = mesh_choice._kept(made, pack, 1) + mesh_choice._loss(made, pack, 1)
  assert 0.9 < (learning + gradient) / temporaries(learn) < 1.35
  teaching = mesh_choice._forward(made.student, layout.teacher[0], 1)
  assert 0.9 < teaching / temporaries(teach) < 1.35


def programs(made: Sizes):
  """`learn` and `teach` for one device, compiled from shapes alone."""
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  config, lora = made.student.config, made.lora
  model = jax.eval_shape(lambda: Qwen3(config, lora=lora, rngs=nnx.Rngs(0)))
  student, adapter, base = nnx.split(model, nnx.LoRAParam, ...)
  bare = jax.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0)))
  setup = Setup(
    student=student,
    teacher=nnx.graphdef(bare),
    loss=objective.slot_loss(Objective(), (3, 5)),
    optimizer=None,  # type: ignore[arg-type]  not part of either
    schedule=None,  # type: ignore[arg-type]
    mesh=mesh,
    remat=made.remat,  # type: ignore[arg-type]
  )
  layout = made.layout(1)
  packs = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), packing.blank(layout)
  )
  shape = (1, layout.buffer_slots, config.hidden_size)
  buffer = jax.ShapeDtypeStruct(shape, np.float32)
  key = jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))
  with jax.set_mesh(mesh):
    learn = jax.jit(functools.partial(step.learn, setup))
    teach = jax.jit(functools.partial(step.teach, setup), donate_argnums=0)
    trees = nnx.to_pure_dict(adapter), nnx.to_pure_dict(base)
    yield learn.lower(*trees, trees[1], buffer, packs.student[0], key)
    yield teach.lower(buffer, trees[1], packs.teacher[0])


def temporaries(lowered) -> int:
  return lowered.compile().memory_analysis().temp_size_in_bytes
