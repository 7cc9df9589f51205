"""Makes the adapter's optimizer: schedule, clipping, AdamW, placement.

The defaults of its keys are those of the paper's Table 14.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from trd_jax.experiment.schema import Train
from trd_jax.model import sharding


def schedule(train: Train, num_steps: int) -> optax.Schedule:
  """Makes a schedule: linear warm-up, then a cosine to `final_lr_ratio`.

  Of `num_steps` updates the first `W = ceil(warmup_ratio * num_steps)` use
  `peak * (n + 1) / W`, so that no update has rate 0 and update W - 1 has the
  peak; the last one has `final_lr_ratio * peak`, where the cosine ends.

  Args:
    train: learning_rate (the peak), warmup_ratio, final_lr_ratio.
    num_steps: updates of the whole run, at least 1.

  Returns:
    A function from the number n of an update, from 0, to its rate.
  """
  warmup = math.ceil(train.warmup_ratio * num_steps)
  decay = max(num_steps - max(warmup, 1), 1)
  final = train.final_lr_ratio

  def rate(n):
    n = jnp.asarray(n, jnp.float32)
    rising = (n + 1) / max(warmup, 1)
    done = jnp.clip((n + 1 - max(warmup, 1)) / decay, 0, 1)
    falling = final + (1 - final) * (1 + jnp.cos(jnp.pi * done)) / 2
    return train.learning_rate * jnp.where(n < warmup, rising, falling)

  return rate


def make_optimizer(
  train: Train, num_steps: int
) -> optax.GradientTransformation:
  """Makes AdamW (Loshchilov & Hutter 2019) behind a clip of the global norm.

  The gradient over the whole adapter is scaled to norm `grad_clip` where it is
  longer; weight decay is decoupled and acts on every adapter matrix.
  """
  return optax.chain(
    optax.clip_by_global_norm(train.grad_clip),
    optax.adamw(
      schedule(train, num_steps),
      b1=train.beta1,
      b2=train.beta2,
      eps=train.eps,
      weight_decay=train.weight_decay,
    ),
  )


def state_shardings(
  optimizer: optax.GradientTransformation,
  abstract_params: Any,
  param_shardings: Any,
  mesh: Mesh,
) -> Any:
  """Derives shardings of the optimizer's state from its parameters'.

  What has a parameter's shape (both moments) is placed as the parameter is;
  counters are replicated. `jax.jit(optimizer.init)` left alone would
  replicate everything.

  Args:
    optimizer: what `make_optimizer` returns.
    abstract_params: the adapter as arrays or `ShapeDtypeStruct`s.
    param_shardings: the same tree of `NamedSharding`s.
    mesh: where counters are replicated.
  """
  state = jax.eval_shape(optimizer.init, abstract_params)
  return optax.tree.map_params(
    optimizer,
    lambda _, placement: placement,
    state,
    param_shardings,
    transform_non_params=lambda _: sharding.replicated(mesh),
  )
