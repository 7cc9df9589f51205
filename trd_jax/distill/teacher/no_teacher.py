"""No teacher: for a loss that reads none, as cross-entropy."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from trd_jax.distill.loss import objective
from trd_jax.distill.packing.layout import Layout, Sample
from trd_jax.distill.packing.packing import MicroBatch
from trd_jax.distill.teacher.source import TeacherRun, Weights


@dataclasses.dataclass(frozen=True)
class NoTeacher:
  """See `source.TeacherSource`; nothing is loaded and the buffer is empty."""

  weights: ClassVar[Weights] = "none"
  slot_loss = staticmethod(objective.slot_loss)

  layout: Layout
  # No leaf: nothing of a teacher has a place on the mesh, and every `tree.map`
  # over the buffer has nothing to do.
  slot: tuple[()] = ()

  @classmethod
  def prepare(cls, run: TeacherRun) -> "NoTeacher":
    """Takes the teacher's packs out of the layout: nobody runs them."""
    return cls(dataclasses.replace(run.layout, teacher=()))

  def fill(
    self, batch: Sequence[Sample], packs: Iterable[MicroBatch]
  ) -> Iterable[MicroBatch]:
    """Returns the packs as they are: there is nothing to add."""
    del batch
    return packs

  def summary(self, logged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what the stage records of its source of the teacher."""
    del logged
    return {"source": "none"}
