"""A child that does on JAX's devices what training does there.

Asked for is `kind`: `attention`, `float8`, `update` or `reduce`; see the
functions.
"""

import functools
import time
from typing import Any

from trd_jax.doctor.probe import Facts, Tell, answer

_REDUCE_MIB = {"cpu": 16, "gpu": 256}
_REDUCE_TIMES = 5
_SAMPLES = 8


def attention(requested: Facts, tell: Tell) -> None:
  """Compares fused attention with the XLA path, gradients included.

  Asked are `implementation`, and `heads`: (queries, keys, width) of each model.
  Told are `errors`, the largest of each.
  """
  import dataclasses

  from trd_jax.doctor import tiny
  from trd_jax.model.attention import choice

  name = requested["implementation"]
  errors = []
  for queries, keys, width in requested["heads"]:
    config = dataclasses.replace(
      tiny.CONFIG, num_heads=queries, num_kv_heads=keys, head_dim=width
    )
    errors.append(
      choice.check(
        choice.attention_of(name),
        name,
        config,
        "bfloat16",
        packed=name == "cudnn_packed",
      )
    )
  tell(errors=errors)


def float8(requested: Facts, tell: Tell) -> None:
  """Compares products in eight bits with those of the same numbers in float32.

  Asked are `sizes`, channels in and out of kernels. Told are `errors`, the
  distance of each product relative to its norm.

  Raises:
    UserError: a GPU doesn't multiply in eight bits.
  """
  import jax
  import jax.numpy as jnp
  import numpy as np

  from trd_jax.model import float8 as eight_bits

  eight_bits.check_devices(jax.local_devices(), requested["setting"])
  rng = np.random.default_rng(0)
  errors = []
  for width, out in requested["sizes"]:
    x = jnp.asarray(rng.standard_normal((256, width)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((width, out)), jnp.bfloat16)
    kernel8, kernel_scale = jax.jit(eight_bits.quantize)(kernel)
    x8, scale = jax.jit(eight_bits.rounded, static_argnums=1)(x, -1)
    got = jax.jit(eight_bits.product)(x, kernel8, kernel_scale)
    got, x8, scale, kernel8, kernel_scale = (
      np.asarray(a, np.float32) for a in (got, x8, scale, kernel8, kernel_scale)
    )
    # On the host, from the numbers that were rounded on the device.
    exact = (x8 * scale) @ (kernel8.T * kernel_scale)
    errors.append(float(np.linalg.norm(got - exact) / np.linalg.norm(exact)))
  tell(errors=errors)


def update(requested: Facts, tell: Tell) -> None:
  """Makes one update on all devices and the same on one.

  Asked is `mesh`, its sizes along data, fsdp and tensor. Told are, by `one`
  and `all`, the loss, the gradient's norm and that of the updated adapter, and
  the largest distance of gradients and adapters, relative to their norms.
  """
  import jax
  import numpy as np

  from trd_jax.model import backend

  # Else sums of another order differ.
  backend.exact_products(jax.default_backend(), ["float32"])
  results = {
    "one": _updated((1, 1, 1), jax.devices()[:1]),
    "all": _updated(tuple(requested["mesh"]), jax.devices()),
  }
  tell(
    devices=jax.device_count(),
    **{name: metrics for name, (metrics, *_) in results.items()},
  )

  def distance(one, other) -> float:
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    gap = sum(float(np.sum((x - y) ** 2)) for x, y in pairs)
    return (gap / sum(float(np.sum(x**2)) for x, _ in pairs)) ** 0.5

  (_, grads, lora), (_, other_grads, other_lora) = results.values()
  tell(
    gradient_distance=distance(grads, other_grads),
    adapter_distance=distance(lora, other_lora),
  )


def _updated(shape: tuple[int, ...], devices: list) -> tuple[dict, Any, Any]:
  """Makes one update on a mesh, of a random student taught by its own base.

  Returns:
    Its metrics, the gradient and the updated adapter, as host arrays.
  """
  import jax
  import numpy as np
  import optax
  from flax import nnx

  from trd_jax.distill.distiller import Distiller
  from trd_jax.distill.loss import metrics as loss_metrics
  from trd_jax.distill.loss import objective
  from trd_jax.distill.loss.objective import Objective
  from trd_jax.distill.packing import layout, packing
  from trd_jax.distill.step import Setup
  from trd_jax.distill.teacher.source import hidden_slot
  from trd_jax.doctor import tiny
  from trd_jax.model import sharding
  from trd_jax.model.qwen3 import Qwen3

  rng = np.random.default_rng(0)

  def ids() -> np.ndarray:
    length = rng.integers(4, 24)
    return rng.integers(1, tiny.CONFIG.vocab_size, length).astype(np.int32)

  # Lengths differ, so that packs and padding take part; all from one seed, so
  # that both meshes train on the same.
  samples = [
    layout.Sample(f"s{i}", ids(), ids(), ids(), correct=True)
    for i in range(_SAMPLES)
  ]
  mesh = sharding.make_mesh(*shape, devices=devices)
  base, lora = tiny.random_trees()
  made = jax.eval_shape(
    lambda: Qwen3(tiny.CONFIG, lora=tiny.LORA, rngs=nnx.Rngs(0))
  )
  student, lora_shape, base_shape = nnx.split(made, nnx.LoRAParam, ...)
  bare = jax.eval_shape(lambda: Qwen3(tiny.CONFIG, rngs=nnx.Rngs(0)))

  def place(tree, shape):
    where = nnx.to_pure_dict(sharding.shardings(shape, mesh))
    return jax.device_put(tree, where)

  shapes = layout.choose_layout(
    samples, groups=sharding.num_groups(mesh), batch_size=len(samples)
  )
  # The trace of a gradient that nothing decays is the gradient.
  optimizer = optax.chain(
    optax.trace(decay=0.0), optax.scale_by_learning_rate(0.1)
  )
  setup = Setup(
    student=student,
    teacher=nnx.graphdef(bare),
    loss=objective.slot_loss(Objective(), (3,)),
    optimizer=optimizer,
    schedule=lambda step: 0.1,
    mesh=mesh,
    remat="none",
    dropout=False,
  )
  lora, base = place(lora, lora_shape), place(base, base_shape)
  slot = hidden_slot(tiny.CONFIG.hidden_size, "float32")
  distiller = Distiller(setup, lora, base, base, shapes.buffer_slots, slot)
  state, sums = distiller.update(
    distiller.init(lora, seed=0), packing.pack(samples, shapes)
  )
  metrics = loss_metrics.finish(jax.device_get(sums))
  state = jax.device_get(state)
  metrics = {
    name: float(metrics[name]) for name in ("loss", "grad_norm", "adapter_norm")
  }
  return metrics, state.opt_state[0].trace, state.lora


def reduce(requested: Facts, tell: Tell) -> None:
  """Sums an array over all devices, and measures how fast that is.

  Told are `devices`, `bytes` of the array, `seconds` of the quickest sum, and
  `error`, the largest distance from what the sum has to be.
  """
  import jax
  import jax.numpy as jnp
  from jax.sharding import PartitionSpec as P

  from trd_jax.model import sharding

  del requested
  mesh = sharding.make_mesh()
  size = _REDUCE_MIB.get(jax.default_backend(), 64) << 18  # of float32

  @jax.jit
  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=(), out_specs=P("data"), check_vma=False
  )
  def make():
    # Small whole numbers: their sum has no rounding.
    number = jax.lax.axis_index("data") + 1
    return (jnp.arange(size) % 128 * number).astype(jnp.float32)[None]

  @jax.jit
  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data")
  )
  def total(x):
    return jax.lax.pcast(jax.lax.psum(x, "data"), "data", to="varying")

  @jax.jit
  def error(x):
    n = mesh.size
    expected = (jnp.arange(size) % 128 * (n * (n + 1) // 2)).astype(jnp.float32)
    return jnp.max(jnp.abs(x - expected))

  parts = jax.block_until_ready(make())
  # Compiled by this call, which is not timed.
  sums = jax.block_until_ready(total(parts))
  seconds = []
  for _ in range(_REDUCE_TIMES):
    began = time.perf_counter()
    sums = jax.block_until_ready(total(parts))
    seconds.append(time.perf_counter() - began)
  tell(
    devices=mesh.size,
    bytes=4 * size,
    seconds=min(seconds),
    error=float(error(sums)),
  )


if __name__ == "__main__":
  kinds = {f.__name__: f for f in (attention, float8, update, reduce)}
  answer(lambda requested, tell: kinds[requested["kind"]](requested, tell))
