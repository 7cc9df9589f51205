"""Floating-point operations of a sample, from the models' shapes.

What groups of devices are given is balanced by it: on long rows attention
costs as much again as the linear layers, so tokens alone mislead.
"""

from typing import NamedTuple

from trd_jax.model.config import ModelConfig

# Times that a remat policy runs a block's linear layers, and its attention's
# forward pass, to have a gradient: forward, where needed again, and backward
# (a linear layer with frozen weights costs one forward there, attention two
# and a half: its scores again, and a product for each of four gradients).
_LINEAR = {"none": 2.0, "dots": 2.0, "full": 3.0, "attention": 3.0}
_ATTENTION = {"none": 3.5, "dots": 4.5, "full": 4.5, "attention": 3.5}
# An adapter has weight gradients: its backward costs two forwards.
_ADAPTER = {"none": 3.0, "dots": 3.0, "full": 4.0, "attention": 4.0}


class SampleFlops(NamedTuple):
  """FLOPs that a sample's parts cost.

  Attributes:
    student_token: of an input token of the student, forward and backward.
    student_pair: of its length squared, that is of causal attention.
    teacher_token: of an input token of the teacher, forward.
    teacher_pair: of its length squared.
    response_token: of both heads at a response token, forward, and the
      student's backward.
  """

  student_token: float
  student_pair: float
  teacher_token: float
  teacher_pair: float
  response_token: float

  def of(self, student: int, teacher: int, response: int) -> float:
    """Returns the FLOPs of a sample with so many tokens on each side."""
    return (
      self.student_token * student
      + self.student_pair * student**2
      + self.teacher_token * teacher
      + self.teacher_pair * teacher**2
      + self.response_token * response
    )


# Where nothing is known of the models: a student's token passes forward twice
# and backward, a teacher's forward, and pairs count for nothing.
BY_TOKENS = SampleFlops(3.0, 0.0, 1.0, 0.0, 0.0)


def sample_flops(
  student: ModelConfig, teacher: ModelConfig, *, rank: int, remat: str
) -> SampleFlops:
  """Returns the FLOPs of a sample under two models.

  Args:
    student: shape of the student.
    teacher: shape of the teacher.
    rank: of the student's adapters.
    remat: what the student's backward pass keeps, see `Qwen3`.
  """
  heads = 2 * student.vocab_size * student.hidden_size
  return SampleFlops(
    student_token=2 * _LINEAR[remat] * _linear(student)
    + 2 * _ADAPTER[remat] * student.adapter_parameters(rank),
    student_pair=_ATTENTION[remat] * _pair(student),
    teacher_token=2.0 * _linear(teacher),
    teacher_pair=_pair(teacher),
    response_token=2.0 * heads + 2 * teacher.vocab_size * teacher.hidden_size,
  )


def _linear(c: ModelConfig) -> int:
  """Returns how many weights every token is multiplied with, heads aside."""
  return c.num_layers * c.linear_parameters()


def _pair(c: ModelConfig) -> float:
  """Returns the FLOPs of the two products of a pair that is seen, forward."""
  return 2.0 * c.num_layers * c.num_heads * c.head_dim
