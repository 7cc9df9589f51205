"""The teacher is run along: its hidden states are made anew in every update."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax

from trd_jax.distill.loss import objective
from trd_jax.distill.packing.layout import Layout, Sample
from trd_jax.distill.packing.packing import MicroBatch
from trd_jax.distill.teacher.source import TeacherRun, Weights, hidden_slot


@dataclasses.dataclass(frozen=True)
class Recompute:
  """See `source.TeacherSource`; the teacher's packs fill the buffer."""

  weights: ClassVar[Weights] = "model"
  slot_loss = staticmethod(objective.slot_loss)

  layout: Layout
  slot: jax.ShapeDtypeStruct

  @classmethod
  def prepare(cls, run: TeacherRun) -> "Recompute":
    """Makes the source; nothing has to be done before, see `TeacherSource`."""
    width = run.pair.configs[1].hidden_size
    return cls(run.layout, hidden_slot(width, run.teacher.dtype))

  def fill(
    self, batch: Sequence[Sample], packs: Iterable[MicroBatch]
  ) -> Iterable[MicroBatch]:
    """Returns the packs as they are, see `TeacherSource`."""
    del batch
    return packs

  def summary(self, logged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the source's name, see `TeacherSource`."""
    del logged
    return {"source": "recompute"}
