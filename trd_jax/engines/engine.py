"""What a generation engine is, and the one place that makes one.

Nothing here imports jax: an engine that needs it does so when it is made.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

from trd_jax.errors import UserError, did_you_mean
from trd_jax.sections import Engine as EngineSection

ENGINES = ("jax",)


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to complete.

  Attributes:
    key: the caller's name for it; comes back with the completion.
    prompt_ids: token ids, at least one.
    seed: any int64; with the prompt and the sampling it determines the tokens.
    max_new_tokens: most tokens to generate, the stop id included.
  """

  key: str
  prompt_ids: Sequence[int]
  seed: int
  max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn, and what ends a completion.

  Temperature comes first, then top-k, then top-p on what top-k left.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token.
    top_p: keeps the likeliest tokens until their mass reaches it; 1 is off.
    top_k: keeps so many of the likeliest tokens; -1 is off.
    stop_ids: each of them ends a completion and is its last id.
    vocab_size: ids from here on are never drawn; None for the model's head.
      Heads have more rows than tokenizers have ids.
  """

  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = -1
  stop_ids: tuple[int, ...] = ()
  vocab_size: int | None = None

  def __post_init__(self):
    if not 0 <= self.temperature < float("inf"):
      raise UserError(
        f"temperature={self.temperature} must be 0 (greedy) or a positive"
        " number"
      )
    if not 0 < self.top_p <= 1:
      raise UserError(
        f"top_p={self.top_p} must be over 0 and at most 1; 1 turns it off"
      )
    if self.top_k < 1 and self.top_k != -1:
      raise UserError(f"top_k={self.top_k} must be positive, or -1 for off")
    if self.vocab_size is not None and self.vocab_size < 1:
      raise UserError(
        f"vocab_size={self.vocab_size} leaves no token to draw; give the number"
        " of the tokenizer's ids"
      )


@dataclasses.dataclass(frozen=True)
class Completion:
  """What a request became.

  Attributes:
    key: the request's.
    ids: generated token ids; the last is the stop id iff that is what ended
      it.
    finish_reason: 'stop' at a stop id, 'length' at the limit or at the
      longest context of the model.
  """

  key: str
  ids: tuple[int, ...]
  finish_reason: Literal["stop", "length"]


class Engine(Protocol):
  """Completes prompts."""

  def generate(
    self, requests: Sequence[Request], sampling: Sampling
  ) -> Iterator[Completion]:
    """Yields one completion a request as they finish, in any order.

    Raises:
      UserError: before anything is generated, where a request can't be met:
        an empty prompt, one too long for the model, an unknown token id.
    """
    ...


def make(
  spec: EngineSection,
  model_folder: Path | str,
  *,
  dtype: str = "float32",
  max_model_tokens: int | None = None,
) -> Engine:
  """The engine that an experiment names, with a model loaded.

  Args:
    spec: the experiment's `engine` section.
    model_folder: a Hugging Face folder of Qwen3 weights.
    dtype: 'float32' or 'bfloat16', of weights and activations.
    max_model_tokens: longest prompt with its response, for engines that
      reserve memory ahead; the embedded one grows as it needs.

  Raises:
    UserError: on an unknown name and on weights that can't be read.
  """
  del max_model_tokens
  if spec.name == "jax":
    from trd_jax.engines.jax_engine import JaxEngine

    return JaxEngine.load(
      model_folder,
      dtype=dtype,
      slots=spec.jax.slots,
      decode_steps=spec.jax.decode_steps,
    )
  raise UserError(
    f"engine.name={spec.name}: no such engine; "
    f"{did_you_mean(spec.name, ENGINES)}"
  )
