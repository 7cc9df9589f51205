"""The device mesh, and the one table of what is split over it.

A parameter declares logical axes where it is made (`axes` in its metadata);
everything else about its placement is derived from `RULES` here: partition
specs, shardings to load weights into, constraints on activations.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from trd_jax.experiment.errors import UserError

# `data` holds replicas of the weights, `fsdp` splits the weights along the
# residual width, `tensor` splits heads, the inner width and the vocabulary.
MESH_AXES = ("data", "fsdp", "tensor")

Rules = Mapping[str, str | tuple[str, ...] | None]

# `batch` goes over `fsdp`, too: FSDP is data parallelism with split weights, so
# each of its devices has rows of its own. `layers` stays whole because a scan
# takes one layer after the other, `head_dim` because the norm and the rotation
# mix a head's channels, and `rank` because it is too small to be worth a sum
# over devices.
RULES: Rules = {
  "batch": ("data", "fsdp"),
  "layers": None,
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "mlp": "tensor",
  "rank": None,
}

_STACKED = "layers"


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  *,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """Makes a mesh of the three axes, all of them `AxisType.Auto`.

  Args:
    data: replicas of the weights; -1 for all devices that the others leave.
    fsdp: parts along the residual width; -1 likewise.
    tensor: parts along heads, inner width and vocabulary; -1 likewise.
    devices: the JAX devices to use, in order; all of them by default. With no
      axis at -1 the first `data * fsdp * tensor` of them are used.

  Raises:
    UserError: when a size is neither positive nor -1, when more than one is
      -1, when the sizes don't fit the number of devices, or when they would
      leave out devices of a run of several processes.
  """
  given = list(jax.devices() if devices is None else devices)
  sizes: dict[str, int] = dict(
    zip(MESH_AXES, (data, fsdp, tensor), strict=True)
  )
  shown = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
  if any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f"{shown}: each size must be positive, or -1 for the rest")
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise UserError(f"{shown}: only one axis can be -1; give the others a size")
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if free:
    if len(given) % fixed:
      raise UserError(
        f"{shown}: {len(given)} devices don't divide by {fixed}; choose sizes"
        " whose product divides the number of devices"
      )
    sizes[free[0]] = len(given) // fixed
  elif fixed > len(given):
    raise UserError(
      f"{shown}: {fixed} devices are needed and {len(given)} are there; choose"
      " smaller sizes or set one to -1"
    )
  # In one process the devices that are left over may serve something else.
  elif fixed < len(given) and jax.process_count() > 1:
    raise UserError(
      f"{shown}: {fixed} of {len(given)} devices would leave processes idle;"
      " set one axis to -1"
    )
  shape = tuple(sizes.values())
  grid = np.array(given[: math.prod(shape)], dtype=object).reshape(shape)
  # Auto, for the compiler derives what isn't pinned. `jax.make_mesh` makes axes
  # Explicit by default, and every operation would have to say where it goes. It
  # may also reorder devices; here they stay in the order of the list.
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def partition(
  shape: Sequence[int],
  axes: Sequence[str | None],
  mesh: Mesh | AbstractMesh,
  rules: Rules = RULES,
) -> PartitionSpec:
  """Returns the spec of an array whose dimensions carry logical names.

  A dimension that its mesh axes don't divide stays whole, and so does one
  named None. Mesh axes of size 1 are kept: the spec depends only on the names
  and on divisibility.

  Raises:
    ValueError: on a name that the table lacks, on names that don't match the
      dimensions, and when two dimensions would be split over one mesh axis.
  """
  if len(shape) != len(axes):
    raise ValueError(f"{len(shape)} dimensions, logical axes {tuple(axes)}")
  entries = []
  owner: dict[str, str] = {}
  for size, name in zip(shape, axes, strict=True):
    if name is None:
      entries.append(None)
      continue
    if name not in rules:
      raise ValueError(f"unknown logical axis {name!r}; known: {list(rules)}")
    target = rules[name]
    parts = _parts(target)
    for part in parts:
      # JAX would refuse such a spec too, later and without the logical names.
      if part in owner:
        raise ValueError(
          f"logical axes {owner[part]!r} and {name!r} of one array both go to"
          f" mesh axis {part!r}"
        )
      owner[part] = name
    split = math.prod(mesh.shape[part] for part in parts)
    # Whole, and no error: a small model has fewer heads or channels than a
    # large mesh has devices, and is right all the same.
    entries.append(target if parts and size % split == 0 else None)
  return PartitionSpec(*entries)


def shardings(state: nnx.State, mesh: Mesh | AbstractMesh) -> nnx.State:
  """Returns the sharding of every parameter of a model's state.

  Args:
    state: state of a model, abstract (`jax.eval_shape`) or concrete, or a
      part of one (`nnx.split(model, nnx.LoRAParam, ...)`). A parameter with
      one more dimension than logical axes is stacked over layers.
    mesh: the mesh to place it on; an abstract one does for sizes.

  Returns:
    The same state with a `NamedSharding` in the place of every array; fit for
    `jax.jit(..., in_shardings=...)` and `nnx.to_pure_dict`.
  """

  def place(variable: nnx.Variable) -> nnx.Variable:
    shape = variable.get_value().shape
    axes = tuple(variable.get_metadata()["axes"])
    if len(shape) == len(axes) + 1:
      # `jax.vmap` over the constructor adds a dimension to each value and knows
      # nothing of its metadata, which name the axes of one layer.
      axes = (_STACKED, *axes)
    return variable.replace(NamedSharding(mesh, partition(shape, axes, mesh)))

  return jax.tree.map(
    place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
  )


def abstract(state: nnx.State, mesh: Mesh) -> nnx.State:
  """Returns the state as `ShapeDtypeStruct`s that carry their shardings."""
  return jax.tree.map(
    lambda array, sharding: jax.ShapeDtypeStruct(
      array.shape, array.dtype, sharding=sharding
    ),
    state,
    shardings(state, mesh),
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Puts a tree of arrays on the mesh, each whole on every device.

  CPU devices are threads of one process. They share one array: a copy for each
  would take memory, and push the others out of the processor's caches. What is
  in the host's memory already is used where it lies.
  """
  if mesh.devices.flat[0].platform == "cpu":
    tree = jax.tree.map(np.asarray, tree)
    return jax.device_put(tree, replicated(mesh), may_alias=True)
  return jax.device_put(tree, replicated(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: groups G over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def num_groups(mesh: Mesh) -> int:
  """Returns how many parts a batch's leading axis is split into (G)."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def shard_batch(batch: Any, mesh: Mesh) -> Any:
  """Puts host arrays `[G, ...]` on the mesh, the group axis split.

  Every process passes the same whole batch; each device gets its own part.

  Raises:
    ValueError: when the leading axis isn't a multiple of `num_groups(mesh)`.
  """
  sharding = batch_sharding(mesh)
  groups = num_groups(mesh)

  def put(array: Any) -> jax.Array:
    array = np.asarray(array)
    if not array.shape or array.shape[0] % groups:
      raise ValueError(
        f"shape {array.shape} doesn't split into {groups} groups"
      )
    # By callback rather than `device_put`: in a run of several processes each
    # can fill only the devices that it can address.
    return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index]
    )

  return jax.tree.map(put, batch)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins the placement of an activation by the logical names of its axes.

  Acts under `jax.set_mesh`, and inside `jax.shard_map` over those axes that are
  left to the compiler. Without a mesh `x` is returned as it is.
  """
  mesh = jax.sharding.get_abstract_mesh()
  # Inside `shard_map` the axes that it maps are Manual: the array is one
  # device's part already, and a constraint that names them is an error.
  auto = {
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Auto
  }
  if not auto:
    return x
  rules = {
    name: tuple(part for part in _parts(target) if part in auto)
    for name, target in RULES.items()
  }
  return jax.lax.with_sharding_constraint(
    x, partition(x.shape, axes, mesh, rules)
  )


def _parts(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return (target,) if isinstance(target, str) else tuple(target or ())
