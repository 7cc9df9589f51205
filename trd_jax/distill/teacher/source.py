"""Where the teacher's side of the loss comes from: what every source offers.

`train.teacher` names one of `registry.SOURCES`. `recompute` passes every
context through the teacher in every update (`step.teach`). `hidden_cache` does
so once and keeps the hidden states on disk; `topk_from_rollout` reads what
Stage 2 recorded. The latter two fill from the host the buffer that `teach`
fills on the devices.

Shape key: G groups, U buffer slots.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from trd_jax.distill.loss.objective import Objective
from trd_jax.distill.model_pair import Pair
from trd_jax.distill.packing.layout import Layout, Sample
from trd_jax.distill.packing.packing import MicroBatch
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.run_dir import RunDir
from trd_jax.model.weights.model_files import ModelFiles

# What of a teacher is in memory while the student learns.
Weights = Literal["model", "head", "none"]


@dataclasses.dataclass(frozen=True)
class TeacherRun:
  """What a source is made from: the run, and the teacher in it.

  Attributes:
    experiment: its section `train`.
    run_dir: holds the recorded tokens and, by default, the cache.
    pair: the models; the teacher's distributions are wanted.
    batches: the whole run's, in their order.
    layout: what the teacher's packs are cut into, where it has to be run.
    mesh: where it is run then.
  """

  experiment: Experiment
  run_dir: RunDir
  pair: Pair
  batches: Sequence[Sequence[Sample]]
  layout: Layout
  mesh: Mesh

  @property
  def teacher(self) -> ModelFiles:
    """Returns the teacher on disk."""
    return self.pair.teacher


class TeacherSource(Protocol):
  """The teacher's side of the loss, whoever computes it.

  Attributes:
    weights: what of the teacher has to be loaded for training: the `model`,
      which is run in every update; the `head`, which scores hidden states that
      are known; or `none`.
  """

  weights: ClassVar[Weights]

  @property
  def layout(self) -> Layout:
    """Returns the shapes of updates, with a teacher's side if they run it."""
    ...

  @property
  def slot(self) -> Any:
    """Returns shapes and dtypes, a tree, of a response token in the buffer."""
    ...

  @staticmethod
  def slot_loss(
    objective: Objective, onset_ids: tuple[int, ...]
  ) -> Callable[..., Any]:
    """Returns the loss that reads such slots; see `objective.slot_loss`."""
    ...

  @classmethod
  def prepare(cls, run: TeacherRun) -> Self:
    """Makes ready, before models are loaded, what updates will read.

    Raises:
      UserError: a file can't be used or has no room, or what was recorded is
        missing or leaves out too much.
    """
    ...

  def fill(
    self, batch: Sequence[Sample], packs: Iterable[MicroBatch]
  ) -> Iterable[MicroBatch]:
    """Adds to a batch's packs what the host knows of the teacher, one a time.

    Args:
      batch: the optimizer batch that was packed.
      packs: what `packing.pack` made of it.
    """
    ...

  def summary(self, logged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what is said of the teacher once the updates are done.

    Args:
      logged: the rows of metrics.
    """
    ...


def hidden_slot(
  width: int, dtype: jax.typing.DTypeLike
) -> jax.ShapeDtypeStruct:
  """Returns the shape and dtype of a slot that holds a hidden state."""
  return jax.ShapeDtypeStruct((width,), jnp.dtype(dtype))


def places(
  batch: Sequence[Sample], micro: MicroBatch
) -> Iterator[tuple[int, tuple[int, slice]]]:
  """Yields where in the buffer each trajectory of a micro-batch stands.

  Its number in the batch, and its group and slots `[G, U]`: read off the
  student's slots, which say where in the buffer they look.
  """
  for pack in micro.student:
    slots = pack.slots
    starts = (slots.trajectory >= 0) & (slots.offset == 0)
    for g, number, first in zip(
      starts.nonzero()[0],
      slots.trajectory[starts],
      slots.teacher_slot[starts],
      strict=True,
    ):
      length = len(batch[number].response)
      yield int(number), (int(g), slice(int(first), int(first) + length))
