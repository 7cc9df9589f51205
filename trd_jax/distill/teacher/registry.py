"""The sources of the teacher's side of the loss, by name."""

from collections.abc import Mapping

from trd_jax.distill.teacher.hidden_cache import HiddenCache
from trd_jax.distill.teacher.recompute import Recompute
from trd_jax.distill.teacher.source import TeacherSource
from trd_jax.distill.teacher.topk_from_rollout import TopkFromRollout

# The config names the same ones, without JAX: `schema.Train.teacher`.
SOURCES: Mapping[str, type[TeacherSource]] = {
  "recompute": Recompute,
  "hidden_cache": HiddenCache,
  "topk_from_rollout": TopkFromRollout,
}
