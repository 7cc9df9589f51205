"""The teacher's likeliest tokens, as Stage 2 recorded them, stand for it.

Shape key: G groups, U buffer slots, R response tokens, K recorded tokens.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from trd_jax.distill.loss import tail_divergence
from trd_jax.distill.loss.tail_divergence import Recorded
from trd_jax.distill.packing.layout import Layout, Sample
from trd_jax.distill.packing.packing import MicroBatch
from trd_jax.distill.teacher.source import TeacherRun, Weights, places
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import Trajectory

_ROUNDING = 1e-3  # by which a log-probability may be above 0


@dataclasses.dataclass(frozen=True)
class TopkFromRollout:
  """See `source.TeacherSource`; the buffer holds recorded tokens."""

  weights: ClassVar[Weights] = "none"
  slot_loss = staticmethod(tail_divergence.slot_loss)

  layout: Layout
  slot: Recorded
  by_key: dict[str, Recorded]
  facts: dict[str, Any]

  @classmethod
  def prepare(cls, run: TeacherRun) -> "TopkFromRollout":
    """Reads and checks what Stage 2 recorded, and says what that leaves out.

    Raises:
      UserError: a trajectory has no recorded tokens, another model's, or ones
        that don't belong to it; their number varies; or they leave out more
        than `train.teacher_tail_limit`.
    """
    again = (
      "run trd_jax.refine with refine.teacher_top_k above 0 in a new --workdir,"
      " or use train.teacher=recompute"
    )
    by_key = _read(run, again)
    widths = {made.ids.shape[1] for made in by_key.values()}
    if len(widths) != 1:
      raise UserError(
        f"{run.run_dir.stage('refine')}: between {min(widths)} and"
        f" {max(widths)} tokens a position are recorded; {again}"
      )
    (K,) = widths
    # As the loss weighs them: a mean over trajectories of means over tokens.
    tail = float(np.mean([made.tail.mean() for made in by_key.values()]))
    limit = run.experiment.train.teacher_tail_limit
    told = f"the {K} recorded tokens leave out a mass of {tail:.3g} on average"
    # Not `tail > limit`, which lets NaN pass.
    if not tail <= limit:
      raise UserError(
        f"train.teacher=topk_from_rollout: {told}, over"
        f" train.teacher_tail_limit={limit:g}; record more"
        " (refine.teacher_top_k, in a new --workdir), raise the limit, or use"
        " train.teacher=hidden_cache"
      )
    print(
      f"train: teacher: {told} (train.teacher_tail_limit={limit:g}); gradients"
      " with respect to the logits are off by at most twice that in the L1"
      " norm",
      flush=True,
    )
    slot = Recorded(
      ids=jax.ShapeDtypeStruct((K,), np.int32),
      log_probs=jax.ShapeDtypeStruct((K,), np.float32),
      tail=jax.ShapeDtypeStruct((), np.float32),
    )
    facts = {
      "source": "topk_from_rollout",
      "trajectories": len(by_key),
      "tokens_kept": K,
      "mean_tail_mass": tail,
    }
    # No teacher is run, so no shapes for its packs.
    layout = dataclasses.replace(run.layout, teacher=())
    return cls(layout, slot, by_key, facts)

  def fill(
    self, batch: Sequence[Sample], packs: Iterable[MicroBatch]
  ) -> Iterator[MicroBatch]:
    """Adds buffers of recorded tokens, see `TeacherSource`."""
    size = self.layout.groups, self.layout.buffer_slots
    for micro in packs:
      buffer = jax.tree.map(
        lambda x: np.zeros((*size, *x.shape), x.dtype), self.slot
      )
      for number, at in places(batch, micro):
        rows = self.by_key[batch[number].key]
        for all_GU, one_R in zip(buffer, rows, strict=True):
          all_GU[at] = one_R
      yield micro._replace(buffer=buffer)

  def summary(self, logged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns also how far off the divergence may be, see `TeacherSource`."""
    gaps = [row["D_gap_bound"] for row in logged if "D_gap_bound" in row]
    return self.facts | ({"largest_gap_bound": max(gaps)} if gaps else {})


def _read(run: TeacherRun, again: str) -> dict[str, Recorded]:
  """Reads what Stage 2 recorded for the run's trajectories, by their key.

  Args:
    run: whose `run_dir` holds Stage 2's trajectories.
    again: what to do where they are of no use.

  Raises:
    UserError: a trajectory has no recorded tokens, another model's, or ones
      that don't belong to it.
  """
  where = run.run_dir.stage("refine")
  samples = {sample.key: sample for batch in run.batches for sample in batch}
  columns = ["key", "model_revision", "teacher_top_ids", "teacher_top_logprobs"]
  # An id that the student's head lacks can't be compared with anything.
  head_rows = min(config.vocab_size for config in run.pair.configs)
  table = run.run_dir.table("refine", Trajectory, columns)
  by_key: dict[str, Recorded] = {}
  # Scalars of arrow rather than lists of Python: there may be 10^9 numbers.
  for key, revision, ids, log_probs in zip(
    *(table[name] for name in columns), strict=True
  ):
    key = key.as_py()
    if key not in samples:
      continue
    if not ids.is_valid:
      raise UserError(
        f"{where}: trajectory {key} has no recorded tokens of the teacher;"
        f" {again}"
      )
    if revision.as_py() != run.teacher.revision:
      raise UserError(
        f"{where}: trajectory {key} was written by revision {revision} of the"
        f" teacher, and {run.teacher.name} is now {run.teacher.revision};"
        f" {again}"
      )
    length = len(samples[key].response)
    ids, log_probs = (x.values.to_numpy() for x in (ids, log_probs))
    if (
      not ids.size
      or ids.size % length
      or ids.size != log_probs.size
      or not (0 <= ids.min() <= ids.max() < head_rows)
    ):
      raise UserError(
        f"{where}: trajectory {key} has {ids.size} recorded ids and"
        f" {log_probs.size} log-probabilities for {length} tokens and a head of"
        f" {head_rows} rows: they don't belong together; {again}"
      )
    # Infinite or above 0, as after a server's fault: no tail would be left out.
    if not np.all(np.isfinite(log_probs) & (log_probs <= _ROUNDING)):
      raise UserError(
        f"{where}: trajectory {key} has recorded log-probabilities that are"
        f" none; {again}"
      )
    log_probs_RK = log_probs.reshape(length, -1)
    mass_R = np.exp(log_probs_RK.astype(np.float64)).sum(1)
    tail_R = np.maximum(1 - mass_R, 0).astype(np.float32)
    by_key[key] = Recorded(ids.reshape(length, -1), log_probs_RK, tail_R)
  return by_key
