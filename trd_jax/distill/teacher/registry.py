"""The sources of the teacher's side of the loss, by name."""

from collections.abc import Mapping

from trd_jax.distill.teacher.hidden_cache import HiddenCache
from trd_jax.distill.teacher.no_teacher import NoTeacher
from trd_jax.distill.teacher.recompute import Recompute
from trd_jax.distill.teacher.source import TeacherSource
from trd_jax.distill.teacher.topk_from_rollout import TopkFromRollout
from trd_jax.experiment.experiment import Experiment

# The config names the same ones, without JAX: `schema.Train.teacher`.
SOURCES: Mapping[str, type[TeacherSource]] = {
  "recompute": Recompute,
  "hidden_cache": HiddenCache,
  "topk_from_rollout": TopkFromRollout,
}


def source_of(experiment: Experiment) -> type[TeacherSource]:
  """Returns where an experiment's teacher comes from, if it reads one."""
  if experiment.context_of_teacher is None:
    return NoTeacher
  return SOURCES[experiment.train.teacher]
