"""Gradients of single trajectories, and what both models say along them.

Plain rows, one trajectory each and padded to one length: unlike the trainer's
packs they keep the gradients of different trajectories apart. They are taken
with respect to the kernels of the seven linear layers that adapters stand
beside. At an adapter's beginning B is zero: A has no gradient, and B's is
(alpha / r) Aᵀ G, a random projection of the kernel's gradient G.

Shape key: B rows, T tokens of a row, D residual channels, V vocabulary. A
response's tokens are slots, as many in each row; those that don't count have
weight 0.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from trd_jax.distill.loss.divergences import (
  CrossEntropy,
  Divergence,
  ForwardKl,
  ReverseKl,
  SampledReverseKl,
)
from trd_jax.distill.loss.row_statistics import (
  Part,
  in_chunks,
  logits,
  read_rows,
)
from trd_jax.distill.loss.token_stats import Scoring, token_stats
from trd_jax.model.weights.peft import LINEAR

Tree = Any
Kernels = dict[str, jax.Array]
"""Arrays by a linear layer's name: q, k, v, o, gate, up, down."""

# Where a kernel stands in a model's tree, by its layer's name.
_PLACES = {path[-1]: ("layers", *path, "kernel") for _, path in LINEAR}
KINDS = tuple(_PLACES)
_CHUNK = 512  # slots whose logits exist at one time


class Objective(NamedTuple):
  """A loss of a slot.

  Attributes:
    divergence: D of the slot, or of its label.
    halved_square: whether the loss is D² / 2. That has the gradient D ∇D: where
      D is δ = log π_S(label) − log π_T(label), Equation 3's δ ∇ log π_S(label)
      with δ a constant.
  """

  divergence: Divergence
  halved_square: bool = False


OBJECTIVES: Mapping[str, Objective] = {
  "equation_3": Objective(SampledReverseKl(discount=0.0), True),
  # The same of a teacher that is certain of the label: log π_T(label) = 0.
  "equation_3_certain": Objective(CrossEntropy(), True),
  "forward_kl": Objective(ForwardKl()),
  "reverse_kl": Objective(ReverseKl()),
}


class Rows(NamedTuple):
  """One model's inputs.

  Attributes:
    tokens: int32 [B, T], prompt and response, right-padded.
    length: int32 [B], how many count.
    start: int32 [B], the position that predicts slot 0.
  """

  tokens: np.ndarray
  length: np.ndarray
  start: np.ndarray


class Target(NamedTuple):
  """A loss along rows: Σ weight · loss(label).

  Attributes:
    labels: int32 [B, slots].
    weight: float32 [B, slots].
  """

  labels: Any
  weight: Any


class Sides(NamedTuple):
  """Student and teacher.

  Attributes:
    graphs: their graph definitions, without adapters.
    kernels: the student's.
    rest: what else is in the student's tree, by path.
    teacher: the teacher's tree, by path.
  """

  graphs: tuple[nnx.GraphDef, nnx.GraphDef]
  kernels: Kernels
  rest: Tree
  teacher: Tree

  @classmethod
  def of(cls, student: nnx.Module, teacher: nnx.Module) -> "Sides":
    """Splits two models without adapters."""
    graphs, trees = [], []
    for model in (student, teacher):
      graph, state = nnx.split(model)
      graphs.append(graph)
      trees.append(flatten_dict(nnx.to_pure_dict(state)))
    rest, other = trees
    kernels = {name: rest.pop(path) for name, path in _PLACES.items()}
    return cls((graphs[0], graphs[1]), kernels, rest, other)


class Read(NamedTuple):
  """What is read of some rows.

  Attributes:
    grads: by a target's name, `[B, L, in, out]` by a linear layer's name: the
      gradient of each row by itself.
    said: of the student and of the teacher, float32 `[B, slots]` each: the
      probabilities of the queried ids by their names, `onset` (the mass on the
      onset ids) and `entropy` in nats.
    divergence: float32 `[B, slots]` by a target's name.
  """

  grads: dict[str, Kernels]
  said: tuple[dict[str, jax.Array], dict[str, jax.Array]]
  divergence: dict[str, jax.Array]


def read(
  sides: Sides,
  student_rows: Rows,
  teacher_rows: Rows,
  targets: Mapping[str, tuple[str, Target]],
  queries: Mapping[str, np.ndarray],
  onset_ids: tuple[int, ...],
) -> Read:
  """Computes gradients of each row by itself, and what both models say.

  A program each for the parts, not one for all: so what takes long to compile,
  the way back through the network, is compiled once for rows of one shape,
  however many targets there are.

  Args:
    sides: the models, float32.
    student_rows: the student's contexts with the responses.
    teacher_rows: the teacher's, with the same responses.
    targets: by name, the name of an objective and along what.
    queries: int32 [B, slots] ids by name.
    onset_ids: distinct ids of the onset words.
  """
  slots = next(iter(queries.values())).shape[1]
  student, teacher = sides.graphs
  rest = sides.rest, sides.kernels
  hidden = (
    _hidden(student, slots, *rest, student_rows),
    _hidden(teacher, slots, sides.teacher, {}, teacher_rows),
  )
  heads = _head(student, *rest), _head(teacher, sides.teacher, {})
  grads, divergence = {}, {}
  for name, (kind, target) in targets.items():
    # Of each slot the slope on its hidden state, which is its own; then those
    # of each row are pulled through the network.
    slope, divergence[name] = _slope(kind, *hidden, *heads, target)
    grads[name] = _pull(student, *rest, student_rows, slope)
  said = tuple(
    _said(x, head, dict(queries), onset_ids)
    for x, head in zip(hidden, heads, strict=True)
  )
  return Read(grads, (said[0], said[1]), divergence)


def _model(graph: nnx.GraphDef, rest: Tree, kernels: Kernels) -> Any:
  """Puts a model together of a flat tree and the kernels that it lacks."""
  flat = rest | {_PLACES[name]: x for name, x in kernels.items()}
  return nnx.merge(graph, unflatten_dict(flat))


@functools.partial(jax.jit, static_argnums=0)
def _head(graph, rest, kernels) -> jax.Array:
  return _model(graph, rest, kernels).head_VD


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hidden(graph, slots, rest, kernels, rows: Rows) -> jax.Array:
  """Returns the hidden states that predict the slots, `[B, slots, D]`."""
  position_BT = jnp.broadcast_to(
    jnp.arange(rows.tokens.shape[1]), rows.tokens.shape
  )
  segment_BT = (position_BT < rows.length[:, None]).astype(jnp.int32)
  model = _model(graph, rest, kernels)
  hidden_BTD = model(rows.tokens, position_BT, segment_BT)
  # Slots behind a row's end read its last position, and have no weight.
  at = rows.start[:, None] + jnp.arange(slots)
  at = jnp.minimum(at, rows.tokens.shape[1] - 1)
  return jnp.take_along_axis(hidden_BTD, at[..., None], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _slope(
  kind, student_hidden, teacher_hidden, student_head, teacher_head, target
):
  """Returns the slope of a target on the student's hidden states, and D."""
  objective = OBJECTIVES[kind]

  def loss(student_hidden):
    stats = token_stats(
      _flat(student_hidden),
      _flat(teacher_hidden),
      student_head,
      teacher_head,
      target.labels.reshape(-1),
      jnp.zeros(0, jnp.int32),
      Scoring(objective.divergence, chunk_tokens=_CHUNK, diagnostics=False),
    )
    divergence = stats.divergence.reshape(target.labels.shape)
    each = divergence
    if objective.halved_square:
      each = jnp.square(divergence) / 2
    return jnp.sum(target.weight * each), divergence

  return jax.grad(loss, has_aux=True)(student_hidden)


@functools.partial(jax.jit, static_argnums=0)
def _pull(graph, rest, kernels, rows: Rows, slope: jax.Array) -> Kernels:
  """Returns the gradient of each row, `[B, L, in, out]` of each kernel."""

  def row(one, slope):
    one = jax.tree.map(lambda x: x[None], one)
    slots = slope.shape[0]
    _, back = jax.vjp(lambda k: _hidden(graph, slots, rest, k, one)[0], kernels)
    return back(slope)[0]

  return jax.vmap(row)(rows, slope)


def _flat(x: jax.Array) -> jax.Array:
  return x.reshape(-1, x.shape[-1])


@functools.partial(jax.jit, static_argnums=3)
def _said(hidden, head_VD, queries, onset_ids) -> dict[str, jax.Array]:
  """Returns probabilities, onset mass and entropy of one side."""
  names = tuple(queries)
  onset = jnp.array(onset_ids, jnp.int32)

  def chunk(hidden_CD, *ids):
    rows, _, _ = read_rows(
      logits(hidden_CD, head_VD),
      None,
      Part(head_VD.shape[0]),
      temperature=1.0,
      kl_under=None,
    )
    assert rows is not None
    found = {
      name: jnp.exp(-rows.nll(x)) for name, x in zip(names, ids, strict=True)
    }
    return found | {"onset": rows.mass_on(onset), "entropy": rows.entropy_C}

  ids = [queries[name].reshape(-1) for name in names]
  found = in_chunks(chunk, (_flat(hidden), *ids), _CHUNK)
  return {name: x.reshape(hidden.shape[:2]) for name, x in found.items()}


# -- how gradients lie to one another ----------------------------------------


class Products(NamedTuple):
  """Inner products of gradients, `[n, N, …, L, 7]`: a layer, a kind each.

  Attributes:
    pairs: float32 `[n, N, N, L, 7]`, of the N gradients of each row.
    before: float32 `[n, N, references, L, 7]`, of a row's gradients with the
      references of the row before; 0 in the first row.
  """

  pairs: Any
  before: Any


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 4))
def relate(
  references: tuple[int, ...],
  grads: Sequence[Kernels],
  before: Kernels,
  weight: jax.Array,
  sums: Kernels,
  lora_a: Kernels,
) -> tuple[Products, Products, Kernels, Kernels]:
  """Multiplies each row's gradients with one another, and adds up means.

  Args:
    references: which of the N gradients others are compared with.
    grads: the N gradients of each row, `[B, L, in, out]`.
    before: the references of the row before, `[1, references, L, in, out]`;
      donated.
    weight: `[means, B]`, what each row counts in each mean.
    sums: the means so far, `[means, N, L, in, out]`; donated.
    lora_a: an adapter's A, `[L, in, rank]`, by a linear layer's name.

  Returns:
    Products with respect to kernels; the same with respect to the adapter's B;
    the last row's references; the means.
  """
  mine = {k: jnp.stack([g[k] for g in grads], 1) for k in KINDS}
  refer = {k: x[:, jnp.array(references)] for k, x in mine.items()}
  others = {k: jnp.concatenate([before[k], x[:-1]]) for k, x in refer.items()}
  to_b = functools.partial(_to_b, lora_a=lora_a)
  in_b = to_b(mine)
  sums = {
    k: sums[k] + _einsum("sb,bnlio->snlio", weight, x) for k, x in mine.items()
  }
  return (
    Products(_inner(mine, mine), _inner(mine, others)),
    Products(_inner(in_b, in_b), _inner(in_b, to_b(others))),
    {k: x[-1:] for k, x in refer.items()},
    sums,
  )


@jax.jit
def relate_means(sums: Kernels, lora_a: Kernels) -> tuple[jax.Array, jax.Array]:
  """Returns the `Products.pairs` of means, for kernels and for B."""
  projected = _to_b(sums, lora_a)
  return _inner(sums, sums), _inner(projected, projected)


def _inner(one: Kernels, other: Kernels) -> jax.Array:
  return jnp.stack(
    [_einsum("bnlio,bmlio->bnml", one[k], other[k]) for k in KINDS], axis=-1
  )


def _to_b(grads: Kernels, lora_a: Kernels) -> Kernels:
  """Returns the gradients of the adapter's B but for its scale."""
  return {
    k: _einsum("lir,bnlio->bnlro", lora_a[k], x) for k, x in grads.items()
  }


# On GPUs float32 operands would be rounded to TF32.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
