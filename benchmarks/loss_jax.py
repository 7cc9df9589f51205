"""The losses of `loss.py` in JAX: ours, its floor, and two plain ways.

Shape suffixes: N tokens, C tokens of a chunk, D width, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from trd_jax.distill.loss import row_statistics
from trd_jax.distill.loss.divergences import TopKReverseKl
from trd_jax.distill.loss.token_stats import Scoring, token_stats

# As many onset ids as the paper's list has forms, about.
_ONSETS = 40
_OURS = {
  "ours": {"diagnostics": False},
  "ours, all diagnostics": {"diagnostics": True},
  "ours, top-32": {"divergence": TopKReverseKl(32), "diagnostics": False},
}


def prepare(
  variant: str, arrays: tuple[np.ndarray, ...], chunk: int
) -> tuple[Callable, Callable]:
  """Compiles a variant.

  Args:
    variant: its name.
    arrays: student's hidden states `[N, D]`, teacher's, head `[V, D]`.
    chunk: tokens of a chunk.

  Returns:
    A run, and what turns its result into the summed loss and its gradient with
    respect to the student's hidden states, float32 `[N, D]`; either None where
    the variant has none.
  """
  operands = jax.block_until_ready(jax.device_put(arrays))
  f = jax.jit(gradient(variant, chunk)).lower(*operands).compile()

  def read(made):
    if variant == "products":
      return None, None
    value, gradient_ND, *_ = made
    return float(value), np.asarray(gradient_ND, np.float32)

  return lambda: jax.block_until_ready(f(*operands)), read


def gradient(variant: str, chunk: int) -> Callable:
  """A variant as a function of what `prepare` calls arrays.

  Returns:
    The summed loss, its gradient `[N, D]`, and what else the variant makes.
  """
  if variant in _OURS:
    return _ours(Scoring(chunk_tokens=chunk, **_OURS[variant]))
  if variant == "products":
    return _products(chunk)
  whole = {"jax, full logits": _full, "jax, checkpointed scan": _scanned(chunk)}
  return lambda hidden_ND, teacher_ND, head_VD: jax.value_and_grad(
    whole[variant]
  )(hidden_ND, teacher_ND, head_VD)


def _ours(spec):
  def program(hidden_ND, teacher_ND, head_VD):
    def loss(hidden_ND):
      stats = token_stats(
        hidden_ND,
        teacher_ND,
        head_VD,
        head_VD,
        jnp.zeros(len(hidden_ND), jnp.int32),
        jnp.arange(_ONSETS),
        spec,
      )
      return stats.divergence.sum(), stats

    (value, stats), gradient_ND = jax.value_and_grad(loss, has_aux=True)(
      hidden_ND
    )
    # What is no result would not be computed.
    return value, gradient_ND, stats

  return program


def _products(chunk):
  """The three matrix products alone."""

  def program(hidden_ND, teacher_ND, head_VD):
    def body(carry, x):
      blocks = [row_statistics.logits(x_CD, head_VD) for x_CD in x]
      # Both products must be made, though only one is read whole.
      student_CV, teacher_CV = jax.lax.optimization_barrier(tuple(blocks))
      slope_CD = row_statistics.pull_back(student_CV, head_VD)
      return carry, (teacher_CV[:, 0], slope_CD)

    chunks = [x.reshape(-1, chunk, x.shape[1]) for x in (hidden_ND, teacher_ND)]
    return jax.lax.scan(body, None, chunks)[1]

  return program


def _full(hidden_ND, teacher_ND, head_VD):
  log_q_NV, log_p_NV = (
    jax.nn.log_softmax(row_statistics.logits(x_ND, head_VD))
    for x_ND in (hidden_ND, teacher_ND)
  )
  return (jnp.exp(log_p_NV) * (log_p_NV - log_q_NV)).sum()


def _scanned(chunk):
  """Chunks whose logits the backward pass makes again."""

  def loss(hidden_ND, teacher_ND, head_VD):
    @jax.checkpoint
    def body(total, x):
      return total + _full(*x, head_VD), None

    chunks = [x.reshape(-1, chunk, x.shape[1]) for x in (hidden_ND, teacher_ND)]
    return jax.lax.scan(body, jnp.float32(0), chunks)[0]

  return loss
