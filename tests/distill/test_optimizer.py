"""The optimizer is the paper's AdamW; its state is placed like the adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests.support import small_models
from trd_jax.distill import optimizer
from trd_jax.experiment.schema import Train
from trd_jax.model import sharding


def test_schedule_rises_over_a_tenth_and_falls_to_a_tenth():
  train = Train(learning_rate=2.0)
  rate = optimizer.schedule(train, 50)
  rates = np.asarray(rate(np.arange(50)))
  np.testing.assert_allclose(rates[:5], 2.0 * np.arange(1, 6) / 5, rtol=1e-6)
  # Halfway down the cosine: the mean of both ends.
  np.testing.assert_allclose(rates[4 + 45 // 2 : 4 + 45 // 2 + 2].mean(), 1.1)
  assert rates[-1] == pytest.approx(0.2)
  assert rates.argmax() == 4
  assert (np.diff(rates[4:]) < 0).all()


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_no_update_of_a_short_run_is_wasted(num_steps):
  rate = optimizer.schedule(Train(learning_rate=1.0), num_steps)
  rates = rate(np.arange(num_steps)).tolist()
  assert rates[0] == 1.0
  assert min(rates) >= 0.1


def test_updates_are_clipped_adamw():
  train = Train(learning_rate=0.1, weight_decay=0.3, grad_clip=0.5)
  num_steps = 4
  made = optimizer.make_optimizer(train, num_steps)
  rng = np.random.default_rng(0)
  params = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=5)}
  ours = jax.tree.map(jnp.float32, params)
  state = made.init(ours)
  rates = optimizer.schedule(train, num_steps)(np.arange(num_steps))
  step_by = jax.jit(made.update)
  mean = {name: np.zeros_like(x) for name, x in params.items()}
  square = {name: np.zeros_like(x) for name, x in params.items()}
  for n in range(num_steps):
    # The first gradients are longer than the clip, the last ones shorter.
    size = 10.0 ** (1 - n)
    grads = {
      name: size * rng.normal(size=x.shape) for name, x in params.items()
    }
    updates, state = step_by(jax.tree.map(jnp.float32, grads), state, ours)
    ours = jax.tree.map(jnp.add, ours, updates)
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    for name, g in grads.items():
      g = g * min(1, 0.5 / norm)
      mean[name] = 0.9 * mean[name] + 0.1 * g
      square[name] = 0.999 * square[name] + 0.001 * g**2
      step = mean[name] / (1 - 0.9 ** (n + 1))
      step /= np.sqrt(square[name] / (1 - 0.999 ** (n + 1))) + 1e-8
      params[name] -= float(rates[n]) * (step + 0.3 * params[name])
  for name, x in params.items():
    np.testing.assert_allclose(ours[name], x, rtol=1e-4, atol=1e-6)


def test_moments_are_placed_like_the_adapter():
  mesh = sharding.make_mesh(2, 2, 2)
  model = jax.eval_shape(lambda: small_models.model(lora=small_models.LORA))
  state = nnx.state(model, nnx.LoRAParam)
  where = nnx.to_pure_dict(sharding.shardings(state, mesh))
  lora = jax.tree.map(
    lambda x, at: jax.device_put(np.zeros(x.shape, x.dtype), at),
    nnx.to_pure_dict(state),
    where,
  )
  made = optimizer.make_optimizer(Train(), 10)
  placed = optimizer.state_shardings(made, lora, where, mesh)
  init = jax.jit(made.init, out_shardings=placed)(lora)
  adam = init[1][0]
  for moment in (adam.mu, adam.nu):
    a = moment["layers"]["mlp"]["up"]["lora_a"]
    assert a.sharding.spec == P(None, "fsdp", None)
    specs = jax.tree.map(lambda x: x.sharding.spec, moment)
    assert specs == jax.tree.map(lambda s: s.spec, where)
  assert adam.count.sharding.is_fully_replicated
