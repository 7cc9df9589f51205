"""One update of the adapter: pure functions, compiled once a shape.

An update is `teach` for every teacher pack, then `learn` for every student
pack, of each micro-batch; then `update` once. Each token brings its weight, so
gradients and metrics are sums that nothing divides by the way. Where weights
are replicated each device keeps its own sums and they cross the mesh once, in
`update`; where they are split (fsdp, tensor) the compiler places the traffic.

Shape key: G groups, U buffer slots, B rows, T tokens and R response slots of a
row as in `packing` (of all B rows, where B is not an axis), D residual
channels, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trd_jax.distill.loss import metrics as loss_metrics
from trd_jax.distill.packing.packing import StudentPack, TeacherPack
from trd_jax.model import sharding
from trd_jax.model.attention.attention import Implementation
from trd_jax.model.qwen3 import Remat

# A tree of arrays: nested dicts, named tuples.
Tree = Any
# (student_hidden_RD, the buffer's rows_R, student_head_VD, teacher_head_VD,
# slots_R, vocab_axis) -> loss and what metrics are made of.
SlotLoss = Callable[..., tuple[jax.Array, loss_metrics.Sums]]

_GROUPS = P(sharding.RULES["batch"])


class TrainState(NamedTuple):
  """All that an update changes, and the key that it only reads.

  Attributes:
    step: int32 scalar, updates done.
    lora: the adapter as nested dicts of float32.
    opt_state: the optimizer's state.
    rng: uint32 key data; dropout is keyed by (rng, step, pack, device).
  """

  step: jax.Array
  lora: Tree
  opt_state: Tree
  rng: jax.Array


class Totals(NamedTuple):
  """Sums over the packs so far, one for each device that keeps its own.

  Attributes:
    grads: the adapter's tree, each leaf with a leading axis of the copies.
    metrics: `name -> float32 [copies, 2]`, numerators and denominators, or a
      `Spread` of `[copies, ...]`.
  """

  grads: Tree
  metrics: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherSetup:
  """What the teacher's program is compiled for besides shapes.

  Attributes:
    teacher: graph definition of the teacher; in OPSD that of the student
      without adapters, and its arrays are the student's base arrays. Where
      `teach` is not called, of anything with the teacher's `head_VD`.
    mesh: where everything is placed.
    attention: what computes it, see `attention.attend`.
    deterministic: whether GPUs leave out what adds in no fixed order.
  """

  teacher: nnx.GraphDef
  mesh: Mesh
  attention: Implementation = "xla"
  deterministic: bool = False

  @property
  def compiler_options(self) -> dict[str, bool]:
    """Returns what XLA is told, as `jax.jit` takes it.

    In the programs' own options, because XLA reads its flags once a process.
    """
    if not self.deterministic:
      return {}
    return {"xla_gpu_exclude_nondeterministic_ops": True}

  @property
  def replicated(self) -> bool:
    """Returns whether every device holds the whole of the weights."""
    return self.mesh.shape["fsdp"] * self.mesh.shape["tensor"] == 1

  @property
  def copies(self) -> int:
    """Counts the sums of `Totals`: one a device where each keeps its own."""
    return self.mesh.shape["data"] if self.replicated else 1

  def on_each_device(self, f: Callable, split: Sequence[bool]) -> Callable:
    """Runs `f` on each device by itself, where weights are replicated.

    The arguments that `split` marks, and all results, have one row a device
    in front; where weights aren't replicated `f` gets everything at once.
    """
    if not self.replicated:
      return f
    specs = tuple(P("data") if s else P() for s in split)
    # Nothing in here communicates, so there is nothing to check or transpose.
    return jax.shard_map(
      f, mesh=self.mesh, in_specs=specs, out_specs=P("data"), check_vma=False
    )

  def on_each_group(self, f: Callable, split: Sequence[bool]) -> Callable:
    """Runs `f` on each group by itself, inside `on_each_device`.

    Where weights are split the compiler sees all groups at once. That slots
    never point out of their group is not known to it.
    """
    if self.replicated:
      return f
    specs = tuple(_GROUPS if s else P() for s in split)
    return jax.shard_map(
      f, mesh=self.mesh, in_specs=specs, out_specs=_GROUPS, check_vma=False
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup(TeacherSetup):
  """What the programs are compiled for besides shapes.

  Attributes:
    student: graph definition of the adapted model.
    loss: scores the slots of one device.
    optimizer: updates the adapter.
    schedule: the optimizer's rate, for the metrics.
    remat: what the student's backward pass keeps.
    dropout: whether the adapters' dropout is on.
    split_vocab: whether the loss can score with a part of the heads.
  """

  student: nnx.GraphDef
  loss: SlotLoss
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  remat: Remat = "full"
  dropout: bool = True
  split_vocab: bool = True


def teach(
  setup: TeacherSetup, buffer_GUD: jax.Array, base: Tree, pack: TeacherPack
) -> jax.Array:
  """Puts the teacher's hidden states of one pack into their buffer slots."""

  def run(buffer_GUD, base, pack):
    model = nnx.merge(setup.teacher, base)
    hidden = model(*map(_flat, pack.rows), attention=setup.attention)
    scatter = setup.on_each_group(_scatter, (True, True, True))
    return scatter(buffer_GUD, _groups(hidden, pack), pack.slot)

  run = setup.on_each_device(run, (True, False, True))
  return run(buffer_GUD, base, pack)


def _scatter(buffer_GUD, hidden_GBTD, slot_GBT):
  hidden_TD = hidden_GBTD.reshape(-1, hidden_GBTD.shape[-1])
  # One slot past the end stands for none.
  buffer_UD = buffer_GUD[0].at[slot_GBT.reshape(-1)].set(hidden_TD, mode="drop")
  return buffer_UD[None]


def _flat(x_GBT: jax.Array) -> jax.Array:
  return x_GBT.reshape(-1, x_GBT.shape[-1])


def _groups(hidden: jax.Array, pack: TeacherPack | StudentPack) -> jax.Array:
  return hidden.reshape(*pack.rows.tokens.shape, hidden.shape[-1])


def learn(
  setup: Setup,
  lora: Tree,
  base: Tree,
  teacher_base: Tree,
  buffer: Tree,
  pack: StudentPack,
  key: jax.Array,
) -> Totals:
  """Computes one pack's gradient and metrics.

  Args:
    setup: see `Setup`.
    lora: the adapter; the gradient is with respect to it alone.
    base: the student's frozen base.
    teacher_base: the teacher's weights, for its head.
    buffer: `[G, U, ...]`, the teacher's hidden states that `teach` has filled,
      or whatever else of the teacher the loss reads.
    pack: the student's rows and slots.
    key: of the dropout of this pack.
  """

  def run(lora, base, teacher_base, buffer, pack, key):
    if setup.replicated:
      key = jax.random.fold_in(key, jax.lax.axis_index("data"))
    # Merged for the head only: what of the teacher isn't read costs nothing.
    teacher_head_VD = nnx.merge(setup.teacher, teacher_base).head_VD

    # A function of the adapter: so no gradient of a frozen weight is made.
    def loss(lora):
      model = nnx.merge(setup.student, lora, base)
      hidden = model(
        *map(_flat, pack.rows),
        remat=setup.remat,
        dropout_key=key if setup.dropout else None,
        attention=setup.attention,
      )
      loss_G, metrics = score_groups(
        setup,
        _groups(hidden, pack),
        buffer,
        pack.slots,
        model.head_VD,
        teacher_head_VD,
      )
      return loss_G.sum(), loss_metrics.add_up(metrics)

    grads, metrics = jax.grad(loss, has_aux=True)(lora)
    return _one_copy(Totals(grads, metrics))

  run = setup.on_each_device(run, (False, False, False, True, True, False))
  return run(lora, base, teacher_base, buffer, pack, key)


def _one_copy(tree: Tree) -> Tree:
  return jax.tree.map(lambda x: x[None], tree)


def score_groups(
  setup, hidden_GBTD, buffer, slots_GBR, student_head_VD, teacher_head_VD
):
  """Scores each group: loss `[G]` and metrics `[G, 2]`."""
  args = hidden_GBTD, buffer, slots_GBR, student_head_VD, teacher_head_VD
  return each_group(
    setup,
    functools.partial(score, setup.loss),
    *args,
    split_vocab=setup.split_vocab,
  )


def each_group(
  setup: TeacherSetup,
  score_one: Callable[..., Tree],
  *args: Any,
  split_vocab: bool = True,
) -> Tree:
  """Scores the slots of each group, inside `on_each_device`.

  A vocabulary that is split over devices stays so: each scores its slots with
  its own part of the heads. One that doesn't divide is scored whole by all.

  Args:
    setup: its mesh.
    score_one: as `score` behind its loss; all that it returns has an axis of
      the one group in front.
    *args: hidden states, buffer, slots and both heads, see `score`.
    split_vocab: whether `score_one` can do with a part of the heads.
  """
  if setup.replicated:
    return score_one(*args)
  size = args[-1].shape[0]
  (axis,) = sharding.partition((size,), ("vocab",), setup.mesh)
  if not split_vocab or (axis and setup.mesh.shape[axis] == 1):
    axis = None
  head = P(axis)
  # Checked, because then results known to be the same along an axis get their
  # cotangents as they are, with no further all-reduce of hidden states' ones.
  score_each = jax.shard_map(
    functools.partial(score_one, vocab_axis=axis),
    mesh=setup.mesh,
    in_specs=(_GROUPS, _GROUPS, _GROUPS, head, head),
    out_specs=_GROUPS,
    check_vma=split_vocab,
  )
  return score_each(*args)


def score(
  loss,
  hidden_GBTD,
  buffer,
  slots_GBR,
  student_head_VD,
  teacher_head_VD,
  vocab_axis=None,
):
  """Computes loss `[1]` and metrics `[1, 2]` of the one group that is here."""
  student_RD, teacher, slots_R = at_slots(hidden_GBTD, buffer, slots_GBR)
  value, metrics = loss(
    student_RD,
    teacher,
    student_head_VD,
    teacher_head_VD,
    slots_R,
    vocab_axis=vocab_axis,
  )
  metrics["loss"] = value, slots_R.weight.sum()
  return _one_copy((value, loss_metrics.as_arrays(metrics)))


def at_slots(
  hidden_GBTD: jax.Array, buffer: Tree, slots_GBR: Tree
) -> tuple[jax.Array, Tree, Tree]:
  """Returns what both sides have at the slots of the one group that is here.

  Of each row only what predicts a response token goes to the head, which is
  the dearest product of a short row.

  Returns:
    The student's hidden states and what the teacher's buffer holds, `[R, ...]`
    over the slots of all rows, and the slots.
  """
  index_BR = slots_GBR.index[0]
  student_BRD = jnp.take_along_axis(hidden_GBTD[0], index_BR[..., None], axis=1)
  slots_R = jax.tree.map(lambda x: x.reshape(-1), slots_GBR)
  return (
    student_BRD.reshape(-1, student_BRD.shape[-1]),
    jax.tree.map(lambda x_GU: x_GU[0][slots_R.teacher_slot], buffer),
    slots_R,
  )


def update(
  setup: Setup, state: TrainState, totals: Totals
) -> tuple[TrainState, Totals, dict[str, jax.Array]]:
  """Takes one step of the optimizer; also makes the next totals, all zero.

  Returns:
    The new state, the totals, and the metrics as `name -> float32 [2]`: those
    of the totals, `grad_norm` before clipping, `adapter_norm` after the step,
    and `learning_rate`.
  """
  grads = jax.tree.map(lambda x: x.sum(0), totals.grads)
  updates, opt_state = setup.optimizer.update(
    grads, state.opt_state, state.lora
  )
  lora = optax.apply_updates(state.lora, updates)
  metrics = loss_metrics.add_up(totals.metrics)
  own = {
    "grad_norm": optax.tree.norm(grads),
    "adapter_norm": optax.tree.norm(lora),
    "learning_rate": setup.schedule(state.step),
  }
  for name, value in own.items():
    metrics[name] = jnp.stack([value, jnp.ones_like(value)])
  state = TrainState(state.step + 1, lora, opt_state, state.rng)
  return state, jax.tree.map(jnp.zeros_like, totals), metrics
