"""Per-token numbers of student and teacher, in the packs of an update.

The teacher's buffer is filled by the program of an update (`step.teach`), and
the student's slots are scored as an update scores them: with the run's own
divergence, clip and token weights. But nothing is summed and nothing has a
gradient: what an update would average is fetched, token by token.

Shape key: G groups, U buffer slots, R response slots of a group's pack, C those
of a chunk, D residual channels, V vocabulary, E onset ids, K likeliest tokens.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trd_jax.distill import programs
from trd_jax.distill import step as distill_step
from trd_jax.distill.compilation import Program, compile_all
from trd_jax.distill.loss.divergences import ForwardKl
from trd_jax.distill.loss.objective import Objective
from trd_jax.distill.loss.row_statistics import Part, in_chunks
from trd_jax.distill.loss.token_stats import (
  TokenStats,
  read_chunk,
  score_chunk,
)
from trd_jax.distill.loss.trajectories import LossSlots
from trd_jax.distill.models import Models
from trd_jax.distill.packing import packing
from trd_jax.distill.packing.layout import Layout, Sample
from trd_jax.distill.packing.packing import MicroBatch, StudentPack
from trd_jax.distill.step import TeacherSetup, Tree
from trd_jax.model import sharding


class Scores(NamedTuple):
  """Numbers of response tokens, an array each, float32 [R] but for these.

  As of a pack they have the groups in front, `[G, R]`.

  Attributes:
    divergence: nats, before any clip and without cross-entropy beside it; a
      forward KL for an objective that reads no teacher.
    loss_weight: what the objective weighs the token by. Weights have a mean of
      1 over the tokens of a trajectory, or are all 0 (`EntropyGate`).
    clipped: int32, 1 where the objective's clip bounds the token.
    student_nll: -log π_S(token), nats, at T = 1 as all below.
    teacher_nll: -log π_T(token).
    student_entropy: nats.
    teacher_entropy: nats.
    student_onset_mass: π_S on the onset ids.
    teacher_onset_mass: π_T on them.
    student_top_ids: int32 [R, K], the likeliest first.
    student_top_logprobs: [R, K].
    teacher_top_ids: int32 [R, K].
    teacher_top_logprobs: [R, K].
  """

  divergence: Any
  loss_weight: Any
  clipped: Any
  student_nll: Any
  teacher_nll: Any
  student_entropy: Any
  teacher_entropy: Any
  student_onset_mass: Any
  teacher_onset_mass: Any
  student_top_ids: Any
  student_top_logprobs: Any
  teacher_top_ids: Any
  teacher_top_logprobs: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreSetup(TeacherSetup):
  """What the programs are compiled for besides shapes.

  Attributes:
    student: graph definition of the adapted model.
    objective: the run's, whose clip and token weights are told.
    onset_ids: distinct ids of the epistemic onsets.
    top_k: how many of each side's likeliest tokens are kept.
  """

  student: nnx.GraphDef
  objective: Objective
  onset_ids: tuple[int, ...]
  top_k: int


def score_pack(
  setup: ScoreSetup,
  lora: Tree,
  base: Tree,
  teacher_base: Tree,
  buffer_GUD: jax.Array,
  pack: StudentPack,
) -> Scores:
  """Scores one pack's slots: `Scores` of `[G, R]`, whatever is in padding.

  Args:
    setup: see `ScoreSetup`.
    lora: the adapter; its dropout is off.
    base: the student's base.
    teacher_base: the teacher's weights, for its head.
    buffer_GUD: the teacher's hidden states that `step.teach` has filled in.
    pack: the student's rows and slots.
  """

  def run(lora, base, teacher_base, buffer_GUD, pack):
    teacher_head_VD = nnx.merge(setup.teacher, teacher_base).head_VD
    model = nnx.merge(setup.student, lora, base)
    tokens, positions, segments = (
      x.reshape(-1, x.shape[-1]) for x in pack.rows
    )
    hidden = model(tokens, positions, segments, attention=setup.attention)
    return distill_step.each_group(
      setup,
      functools.partial(_score, setup),
      hidden.reshape(*pack.rows.tokens.shape, hidden.shape[-1]),
      buffer_GUD,
      pack.slots,
      model.head_VD,
      teacher_head_VD,
    )

  run = setup.on_each_device(run, (False, False, False, True, True))
  return run(lora, base, teacher_base, buffer_GUD, pack)


def _score(
  setup: ScoreSetup,
  hidden_GBTD,
  buffer_GUD,
  slots_GBR,
  student_head_VD,
  teacher_head_VD,
  vocab_axis=None,
) -> Scores:
  """Scores the one group that is here: `Scores` of `[1, R]`."""
  student_RD, teacher_RD, slots_R = distill_step.at_slots(
    hidden_GBTD, buffer_GUD, slots_GBR
  )
  scores = slot_scores(
    student_RD,
    teacher_RD,
    student_head_VD,
    teacher_head_VD,
    slots_R,
    setup.objective,
    jnp.asarray(setup.onset_ids, jnp.int32),
    setup.top_k,
    vocab_axis=vocab_axis,
  )
  return jax.tree.map(lambda x: x[None], scores)


def slot_scores(
  student_hidden_RD: jax.Array,
  teacher_hidden_RD: jax.Array,
  student_head_VD: jax.Array,
  teacher_head_VD: jax.Array,
  slots: LossSlots,
  objective: Objective,
  onset_ids_E: jax.Array,
  top_k: int,
  *,
  vocab_axis: str | None = None,
) -> Scores:
  """Scores slots, over chunks as `token_stats` does, and without a slope.

  Args:
    student_hidden_RD: as of `token_stats`, and so are the three that follow.
    teacher_hidden_RD: its width may differ.
    student_head_VD: frozen.
    teacher_head_VD: frozen.
    slots: see `LossSlots`.
    objective: see `ScoreSetup`.
    onset_ids_E: int32, distinct; may be empty.
    top_k: K; fewer are kept of a vocabulary that has fewer.
    vocab_axis: the mesh axis that the heads are split along, or None.
  """
  own = objective.scoring
  # What is told is a divergence from the teacher, also where the loss has none;
  # cross-entropy beside it isn't. Diagnostics, as the student's whole row of
  # logits is read in any case.
  told = dataclasses.replace(own, diagnostics=True, cross_entropy=0.0)
  if not objective.reads_teacher:
    told = dataclasses.replace(told, divergence=ForwardKl())
  vocab, width = student_head_VD.shape
  part = Part(vocab, vocab_axis)

  def body(student_CD, teacher_CD, labels_C):
    chunk = read_chunk(
      told,
      part,
      student_CD,
      teacher_CD,
      student_head_VD,
      teacher_head_VD,
      labels_C,
    )
    stats, _ = score_chunk(told, chunk, onset_ids_E, want_slope=False)
    mine_C = stats.divergence
    if not objective.reads_teacher:
      mine_C, _ = own.divergence.of_rows(chunk)
    sides = chunk.sides
    likeliest = [x for side in sides for x in side.likeliest(top_k)]
    return stats, mine_C, sides[1].own_entropy(), likeliest

  stats, mine_R, teacher_entropy_R, likeliest = in_chunks(
    body,
    (student_hidden_RD, teacher_hidden_RD, slots.label),
    own.chunk(width, vocab, student_head_VD.dtype),
  )
  weight_R, clipped_R = _in_the_loss(
    stats._replace(divergence=mine_R), slots, objective
  )
  return Scores(
    stats.divergence,
    weight_R,
    clipped_R,
    stats.student_nll,
    stats.teacher_nll,
    stats.student_entropy,
    teacher_entropy_R,
    stats.student_onset_mass,
    stats.teacher_onset_mass,
    *likeliest,
  )


def _in_the_loss(
  stats: TokenStats, slots: LossSlots, objective: Objective
) -> tuple[jax.Array, jax.Array]:
  """Returns each token's weight, and whether the clip bounds it.

  Args:
    stats: with the objective's own divergence.
    slots: of these statistics.
    objective: what `objective.token_loss` would make of them.
  """
  divergence_R = stats.divergence
  weight_R = jnp.ones_like(divergence_R)
  if objective.token_weights is not None:
    weight_R = objective.token_weights.of_tokens(stats, slots)
  clipped_R = jnp.zeros(divergence_R.shape, jnp.int32)
  if objective.clip is not None:
    loss_R = objective.scoring.divergence.token_losses(divergence_R, slots)
    clipped_R = jnp.int32(loss_R > objective.clip)
  return weight_R, clipped_R


class Scorer:
  """Scores trajectories, with programs for a layout's shapes.

  Args:
    setup: what the programs are compiled for.
    models: student and teacher on the mesh.
    layout: the shapes of packs.
    slot: shape and dtype of a slot of the teacher's buffer.
  """

  def __init__(
    self,
    setup: ScoreSetup,
    models: Models,
    layout: Layout,
    slot: jax.ShapeDtypeStruct,
  ):
    self._setup, self._layout = setup, layout
    self._base, self._teacher_base = models.base, models.teacher_base
    lora_at, base_at, teacher_at = jax.tree.map(
      lambda x: x.sharding, (models.lora, models.base, models.teacher_base)
    )
    groups = sharding.batch_sharding(setup.mesh)
    self._teach = programs.teacher_program(setup, teacher_at)
    self._score = Program(
      functools.partial(score_pack, setup),
      varies=4,
      in_shardings=(lora_at, base_at, teacher_at, groups, groups),
      out_shardings=groups,
      compiler_options=setup.compiler_options,
    )
    self._abstract = jax.ShapeDtypeStruct(
      (layout.groups, layout.buffer_slots, *slot.shape),
      slot.dtype,
      sharding=groups,
    )
    self._buffer: Any = None

  def compile(self, lora: Tree) -> None:
    """Compiles the programs of every shape, for adapters such as `lora`."""
    mesh = self._setup.mesh
    packs = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding.batch_sharding(mesh)
      ),
      packing.blank(self._layout),
    )
    buffer, teacher_base = self._abstract, self._teacher_base
    wanted: dict[str, tuple[Program, tuple]] = {}
    for pack in packs.teacher:
      name = f"teach {pack.rows.tokens.shape[-1]}"
      wanted[name] = self._teach, (buffer, teacher_base, pack)
    for pack in packs.student:
      name = f"score {pack.rows.tokens.shape[-1]}"
      arguments = lora, self._base, teacher_base, buffer, pack
      wanted[name] = self._score, arguments
    with jax.set_mesh(mesh):
      compile_all(wanted)

  def score(
    self, batch: Sequence[Sample], loras: Sequence[Tree]
  ) -> Iterator[tuple[int, list[Scores]]]:
    """Yields each trajectory's scores, by its number in the batch.

    The teacher reads each context once, however many students there are.

    Args:
      batch: trajectories that fit the layout; which ones stand together in a
        batch decides, as in an update, how sums are rounded.
      loras: the adapter of each student.

    Yields:
      The trajectory's number, and for each student numpy arrays `[T, ...]`.
    """
    pending = None
    for micro in packing.pack(batch, self._layout):
      self._fill(micro)
      for pack in micro.student:
        scores = self._launch(pack, loras)
        # One is fetched while the devices are at work on the next.
        if pending is not None:
          yield from _by_trajectory(*pending)
        pending = pack, scores
    if pending is not None:
      yield from _by_trajectory(*pending)

  def _fill(self, micro: MicroBatch) -> None:
    """Passes the teacher's packs through it, into the buffer."""
    mesh = self._setup.mesh
    with jax.set_mesh(mesh):
      if self._buffer is None:
        self._buffer = programs.zeros(self._abstract)
      for pack in micro.teacher:
        pack = sharding.shard_batch(pack, mesh)
        self._buffer = self._teach(self._buffer, self._teacher_base, pack)

  def _launch(self, pack: StudentPack, loras: Sequence[Tree]) -> list[Scores]:
    """Begins to score a pack with each adapter; the devices are at it."""
    mesh = self._setup.mesh
    with jax.set_mesh(mesh):
      pack = sharding.shard_batch(pack, mesh)
      rest = self._base, self._teacher_base, self._buffer, pack
      return [self._score(lora, *rest) for lora in loras]


def _by_trajectory(
  pack: StudentPack, scores: Sequence[Scores]
) -> Iterator[tuple[int, list[Scores]]]:
  """Fetches a pack's scores and yields those of each trajectory."""
  fetched = jax.device_get(scores)
  numbers_GR = pack.slots.trajectory.reshape(len(pack.slots.trajectory), -1)
  for g, numbers_R in enumerate(numbers_GR):
    for number in np.unique(numbers_R[numbers_R >= 0]):
      # A trajectory's slots lie next to each other, in its order.
      at = g, np.flatnonzero(numbers_R == number)
      yield int(number), [Scores(*(x[at] for x in one)) for one in fetched]
