"""The shapes that the paper trains at, and the arithmetic of their work.

Symbols: P weights of a model's linear layers (those of its blocks, without
embedding and head), S and T tokens that student and teacher read, R response
tokens, V vocabulary, D model width.
"""

import dataclasses

from trd_jax.model.config import ModelConfig

_QWEN3 = {"vocab_size": 151_936, "num_kv_heads": 8, "head_dim": 128}

MODELS = {
  "1.7b": ModelConfig(
    hidden_size=2048,
    intermediate_size=6144,
    num_layers=28,
    num_heads=16,
    tie_embeddings=True,
    **_QWEN3,
  ),
  "4b": ModelConfig(
    hidden_size=2560,
    intermediate_size=9728,
    num_layers=36,
    num_heads=32,
    tie_embeddings=True,
    **_QWEN3,
  ),
  "8b": ModelConfig(
    hidden_size=4096,
    intermediate_size=12_288,
    num_layers=36,
    num_heads=32,
    **_QWEN3,
  ),
  # For a machine without a GPU: it shows that a script runs, nothing else.
  "tiny": ModelConfig(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
  ),
}


# NVIDIA's figures for an H100 SXM5: dense bfloat16 and memory.
PEAK_TFLOPS = 989.0
PEAK_TBYTES = 3.35


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Tokens of a trajectory on both sides.

  Attributes:
    student: prompt and response of the student (S).
    teacher: prompt and response of the teacher (T).
    response: the response, which both share (R).
  """

  student: int
  teacher: int
  response: int


def linear_weights(config: ModelConfig) -> int:
  """Returns P."""
  return config.num_layers * config.linear_parameters()


def attention_flops(config: ModelConfig, tokens: int) -> float:
  """A forward pass's products with keys and values, the causal half."""
  width = config.num_heads * config.head_dim
  return 4 * width * config.num_layers * tokens**2 / 2


def head_flops(
  student: ModelConfig, teacher: ModelConfig, tokens: int
) -> float:
  """The loss's three products: both sides' logits and the pull-back."""
  width = 2 * student.hidden_size + teacher.hidden_size
  return 2 * student.vocab_size * width * tokens


def teacher_flops(config: ModelConfig, lengths: Lengths) -> float:
  """A forward pass: 2 P T and attention."""
  T = lengths.teacher
  return 2 * linear_weights(config) * T + attention_flops(config, T)


def student_flops(config: ModelConfig, lengths: Lengths, rank: int) -> float:
  """Forward, forward again (full rematerialisation), backward.

  Each takes 2 FLOPs a token of a frozen weight; of the adapter's, 2, 2 and 4;
  of attention, 1, 1 and 2.5 forward passes. A block's last product, `down`, is
  not made again: nothing of the backward pass reads it, and XLA leaves it out.
  """
  S = lengths.student
  linear = 6 * linear_weights(config) + 8 * config.adapter_parameters(rank)
  inputs = config.num_layers * (config.intermediate_size + rank)
  once = 2 * inputs * config.hidden_size
  return (linear - once) * S + 4.5 * attention_flops(config, S)


def step_flops(
  student: ModelConfig,
  teacher: ModelConfig,
  lengths: Lengths,
  rank: int,
  *,
  teach: bool = True,
) -> float:
  """A trajectory's share of an update, padding not counted.

  Args:
    student: its shape.
    teacher: its shape; the student's own in OPSD.
    lengths: of the trajectory.
    rank: of the adapter.
    teach: whether the teacher runs, rather than being read from a cache.
  """
  return (
    student_flops(student, lengths, rank)
    + head_flops(student, teacher, lengths.response)
    + (teacher_flops(teacher, lengths) if teach else 0)
  )


# The paper's medians on Qwen3-8B: y_r of 880 tokens after a prompt of 200, the
# teacher reading 7.7K tokens of y_o and the reference besides.
MEDIANS = Lengths(student=1080, teacher=9420, response=880)
# Its bounds for TRD in OPSD.
LONGEST = Lengths(student=22_528, teacher=38_912, response=16_384)
