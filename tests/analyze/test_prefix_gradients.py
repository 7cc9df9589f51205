"""Gradients of single trajectories against plain ones, a row at a time.

The reference has no padding, no batch and no slots: it runs one row in float64,
takes `log_softmax` of all logits, and lets JAX differentiate the formulas of
the paper as they stand, with the teacher and each δ a constant.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.support import distilling, small_models
from trd_jax.analyze import prefix_gradients
from trd_jax.analyze.prefix_gradients import KINDS, Rows, Sides, Target
from trd_jax.model.qwen3 import Qwen3

ONSETS = (3, 5)
SLOTS, WIDTHS = 8, (24, 32)
LENGTHS = [(5, 9, 6), (7, 3, 8), (4, 11, 3)]  # both prompts, the response


@functools.cache
def models():
  return (
    small_models.model(distilling.STUDENT),
    small_models.model(distilling.TEACHER, seed=1),
  )


@functools.cache
def batch():
  """Random rows: both sides' prompts, the responses, labels and weights."""
  rng = np.random.default_rng(0)
  made = []
  for student, teacher, response in LENGTHS:
    ids = [rng.integers(1, 64, n) for n in (student, teacher, response)]
    labels = rng.integers(1, 64, response)
    weight = rng.random(response) * (rng.random(response) < 0.7)
    made.append((*ids, labels, weight))
  return made


def padded(rows, width, dtype=np.int32):
  out = np.zeros((len(rows), width), dtype)
  for line, row in zip(out, rows, strict=True):
    line[: len(row)] = row
  return out


@functools.cache
def read():
  """What the code under test reads of the batch, for every objective."""
  sides = []
  for side, width in enumerate(WIDTHS):
    rows = [np.concatenate([row[side], row[2]]) for row in batch()]
    sides.append(
      Rows(
        padded(rows, width),
        np.array([len(row) for row in rows], np.int32),
        np.array([len(row[side]) - 1 for row in batch()], np.int32),
      )
    )
  labels = padded([row[3] for row in batch()], SLOTS)
  weight = padded([row[4] for row in batch()], SLOTS, np.float32)
  target = Target(labels, weight)
  return prefix_gradients.read(
    Sides.of(*models()),
    *sides,
    {name: (name, target) for name in prefix_gradients.OBJECTIVES},
    {"own": labels},
    ONSETS,
  )


def log_probs(graph, tree, prompt, response):
  """log π of every token of a response, alone in its row, [slots, V]."""
  model = nnx.merge(graph, tree)
  tokens = jnp.asarray(np.concatenate([prompt, response]))[None]
  place = jnp.arange(tokens.shape[1])[None]
  hidden = model(tokens, place, jnp.ones_like(place))[0]
  logits = hidden @ model.head_VD.T
  first = len(prompt) - 1
  return jax.nn.log_softmax(logits[first : first + len(response)])


def plain_loss(kind, log_q, log_p, labels, weight):
  """Σ weight · loss, each as the paper writes it."""
  rows = jnp.arange(len(labels))
  if kind == "forward_kl":
    return jnp.sum(weight * jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))
  if kind == "reverse_kl":
    return jnp.sum(weight * jnp.sum(jnp.exp(log_q) * (log_q - log_p), -1))
  teacher = log_p[rows, labels] if kind == "equation_3" else 0.0
  delta = jax.lax.stop_gradient(log_q[rows, labels] - teacher)
  return jnp.sum(weight * delta * log_q[rows, labels])


@functools.cache
def plain(kind):
  """The reference's gradient of each row, and its loss as a function."""
  grads = []
  with jax.enable_x64(True):
    parts = []
    for model in models():
      graph, state = nnx.split(model)
      tree = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64), nnx.to_pure_dict(state)
      )
      parts.append((graph, tree))
    (student, tree), (teacher, other) = parts

    def loss(tree, row, kind=kind):
      log_q = log_probs(student, tree, row[0], row[2])
      log_p = log_probs(teacher, other, row[1], row[2])
      return plain_loss(kind, log_q, log_p, row[3], row[4])

    for row in batch():
      flat = flatten_dict(jax.grad(loss)(tree, row))
      grads.append(
        {
          path[-2]: np.asarray(x)
          for path, x in flat.items()
          if path[-1] == "kernel"
        }
      )
  return grads, loss, tree


@pytest.mark.slow
@pytest.mark.parametrize("kind", prefix_gradients.OBJECTIVES)
def test_gradients_are_those_of_each_row_alone(kind):
  found = jax.device_get(read().grads[kind])
  wanted, _, _ = plain(kind)
  assert set(found) == set(KINDS) == set(wanted[0])
  for number, row in enumerate(wanted):
    for name in KINDS:
      scale = np.abs(row[name]).max()
      assert scale > 0
      np.testing.assert_allclose(
        found[name][number] / scale, row[name] / scale, atol=2e-5
      )


@pytest.mark.slow
def test_the_reference_s_gradients_are_finite_differences():
  """Of the KLs: Equation 3 is the gradient of no loss as it stands."""
  rng = np.random.default_rng(1)
  for kind in ("forward_kl", "reverse_kl"):
    grads, loss, tree = plain(kind)
    row = batch()[0]
    with jax.enable_x64(True):
      flat = flatten_dict(tree)
      kernels = [path for path in flat if path[-1] == "kernel"]
      step = {
        path: 1e-3 * rng.standard_normal(flat[path].shape) for path in kernels
      }
      ends = [
        float(
          loss(
            unflatten_dict(
              flat | {p: flat[p] + sign * x for p, x in step.items()}
            ),
            row,
          )
        )
        for sign in (1, -1)
      ]
    slope = sum(np.sum(grads[0][p[-2]] * x) for p, x in step.items())
    assert (ends[0] - ends[1]) / 2 == pytest.approx(slope, rel=2e-3)


@pytest.mark.slow
def test_what_both_sides_say_is_their_softmax():
  said = jax.device_get(read().said)
  for side, model in enumerate(models()):
    graph, state = nnx.split(model)
    tree = nnx.to_pure_dict(state)
    for number, row in enumerate(batch()):
      share = np.exp(log_probs(graph, tree, row[side], row[2]))
      n = len(row[2])
      mine = {name: x[number, :n] for name, x in said[side].items()}
      rows = np.arange(n)
      np.testing.assert_allclose(mine["own"], share[rows, row[3]], rtol=1e-4)
      np.testing.assert_allclose(
        mine["onset"], share[:, list(ONSETS)].sum(1), rtol=1e-4
      )
      np.testing.assert_allclose(
        mine["entropy"], -(share * np.log(share)).sum(1), rtol=1e-4
      )


@pytest.mark.slow
def test_products_are_those_of_the_gradients():
  """Also over batches: a row's neighbour may be the last of the one before."""
  rng = np.random.default_rng(2)
  sizes = {"q": (6, 4), "k": (6, 2), "v": (6, 2), "o": (4, 6)}
  sizes |= {"gate": (6, 8), "up": (6, 8), "down": (8, 6)}
  layers, rank, count = 2, 3, 4
  names = range(3)
  every = [
    {
      k: rng.standard_normal((count, layers, *size)).astype(np.float32)
      for k, size in sizes.items()
    }
    for _ in names
  ]
  lora_a = {
    k: rng.standard_normal((layers, size[0], rank)).astype(np.float32)
    for k, size in sizes.items()
  }
  weight = rng.random((2, count)).astype(np.float32)
  references = (2, 0)
  before = {k: np.zeros((1, 2, layers, *size)) for k, size in sizes.items()}
  sums = {k: np.zeros((2, 3, layers, *size)) for k, size in sizes.items()}
  before, sums = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.float32), (before, sums)
  )
  parts = []
  for first in (0, 2):
    at = slice(first, first + 2)
    *products, before, sums = prefix_gradients.relate(
      references,
      [{k: jnp.asarray(x[at]) for k, x in g.items()} for g in every],
      before,
      weight[:, at],
      sums,
      lora_a,
    )
    parts.append(jax.device_get(products))
  of_kernels, of_adapter = jax.tree.map(
    lambda *x: np.concatenate(x), *map(tuple, parts)
  )
  means = prefix_gradients.relate_means(sums, lora_a)
  for place, kind in enumerate(KINDS):
    g = np.stack([one[kind] for one in every], 1)  # [rows, N, L, in, out]
    b = np.einsum("lir,bnlio->bnlro", lora_a[kind], g)
    for products, mine in ((of_kernels, g), (of_adapter, b)):
      pairs = np.einsum("bnlio,bmlio->bnml", mine, mine)
      np.testing.assert_allclose(products.pairs[..., place], pairs, rtol=1e-3)
      refer = mine[:-1, list(references)]
      later = np.einsum("bnlio,bmlio->bnml", mine[1:], refer)
      np.testing.assert_allclose(
        products.before[1:, ..., place], later, rtol=1e-3, atol=1e-4
      )
      assert not products.before[0].any()
    for of_mean, mine in zip(means, (g, b), strict=True):
      mean = np.einsum("sb,bnlio->snlio", weight, mine)
      np.testing.assert_allclose(
        of_mean[..., place],
        np.einsum("snlio,smlio->snml", mean, mean),
        rtol=1e-3,
        atol=1e-4,
      )


def test_kernels_are_those_that_adapters_stand_beside():
  model = models()[0]
  assert isinstance(model, Qwen3)
  sides = Sides.of(model, model)
  adapted = nnx.state(
    small_models.model(distilling.STUDENT, lora=small_models.LORA),
    nnx.LoRAParam,
  )
  paths = {path[:-1] for path in flatten_dict(nnx.to_pure_dict(adapted))}
  assert set(sides.kernels) == {path[-1] for path in paths}
  for path in paths:
    assert (*path, "kernel") not in sides.rest
    assert (*path, "kernel") in sides.teacher
