"""The protocol of generation engines: requests, sampling, completions."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from trd_jax.experiment.errors import UserError


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to complete.

  Attributes:
    key: the caller's name for the request; comes back with the completion.
    prompt_ids: token ids, at least one.
    seed: any int64. Prompt, sampling and seed determine what is drawn from the
      model's distributions, and so the tokens as long as these distributions
      are the same: see docs/generation.md for what holds on GPUs.
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
    top_logprobs: K, the number of the model's likeliest tokens that come back
      with each generated one (`Completion.top`); 0 for none.
  """

  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = -1
  stop_ids: tuple[int, ...] = ()
  vocab_size: int | None = None
  top_logprobs: int = 0

  def __post_init__(self):
    # Written as what must hold, which NaN fails, too.
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
    if self.top_logprobs < 0:
      raise UserError(
        f"top_logprobs={self.top_logprobs} must be 0 (none) or positive"
      )


class TopTokens(NamedTuple):
  """The model's likeliest tokens at each of R generated positions.

  Log-probabilities are the model's own, of the softmax over the whole head
  before temperature, top-k, top-p and any mask.

  Attributes:
    ids: [R, K] int32, likeliest first.
    logprobs: [R, K] float32.
  """

  ids: np.ndarray
  logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Completion:
  """What was generated for a request.

  Attributes:
    key: the request's.
    ids: generated token ids; a stop id is the last one if it ended them.
    finish_reason: 'stop' at a stop id, 'length' at the limit or at the
      longest context of the model.
    top: the likeliest tokens, where `Sampling.top_logprobs` asks for them.
  """

  key: str
  ids: tuple[int, ...]
  finish_reason: Literal["stop", "length"]
  top: TopTokens | None = None


def check_request(
  request: Request, *, vocab_size: int, max_positions: int
) -> None:
  """Refuses a request that can't be completed.

  Args:
    request: the request.
    vocab_size: rows of the model's embedding.
    max_positions: longest context of the model.

  Raises:
    UserError: an empty prompt, one that leaves no room for a token, an unknown
      token id, or a negative number of tokens.
  """
  ids = np.asarray(request.prompt_ids)
  if not ids.size:
    raise UserError(
      f"request {request.key}: the prompt is empty; give at least one token"
    )
  if ids.size >= max_positions:
    raise UserError(
      f"request {request.key}: a prompt of {ids.size} tokens leaves no room in"
      f" the model's context of {max_positions}; shorten it or lower"
      " max_prompt_tokens"
    )
  # JAX clamps an index that is too large: another token's embedding would be
  # read without an error.
  if ids.min() < 0 or ids.max() >= vocab_size:
    wrong = ids.min() if ids.min() < 0 else ids.max()
    raise UserError(
      f"request {request.key}: token id {wrong} is outside of the model's"
      f" vocabulary of {vocab_size}; use the model's own tokenizer"
    )
  if request.max_new_tokens < 0:
    raise UserError(
      f"request {request.key}: max_new_tokens={request.max_new_tokens} is"
      " negative; give 0 or more"
    )


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
  """Refuses sampling that no engine can do.

  Args:
    sampling: how requests are to be completed.
    vocab_size: rows of the model's head.

  Raises:
    UserError: more likeliest tokens are asked for than the head has rows.
  """
  if sampling.top_logprobs > vocab_size:
    raise UserError(
      f"top_logprobs={sampling.top_logprobs} is more than the {vocab_size}"
      " tokens of the model's head; lower it (refine.teacher_top_k)"
    )


def longest_first(requests: Sequence[Request]) -> list[Request]:
  """Sorts requests by falling length of prompt; equal ones keep their order.

  Long prompts tend to take longest. One that is begun last would keep a machine
  busy by itself while the others wait.
  """
  return sorted(requests, key=lambda request: -len(request.prompt_ids))


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

  def close(self) -> None:
    """Releases what the engine holds; it can't generate afterwards."""
    ...


class Drafted(NamedTuple):
  """What came of drafts that an engine checked several tokens at a time.

  Attributes:
    drafts: how many there were; each costs one pass of the model.
    drafted: tokens in them.
    accepted: tokens of them that the model would have drawn, too.
  """

  drafts: int
  drafted: int
  accepted: int

  @property
  def acceptance(self) -> float:
    """Returns the share of the drafted tokens that was accepted."""
    return self.accepted / max(1, self.drafted)

  @property
  def accepted_length(self) -> float:
    """Returns the accepted tokens of a draft, on average."""
    return self.accepted / max(1, self.drafts)

  def since(self, earlier: "Drafted") -> "Drafted":
    """Returns what has been added to earlier counts."""
    pairs = zip(self, earlier, strict=True)
    return Drafted(*(now - then for now, then in pairs))


@runtime_checkable
class Drafts(Protocol):
  """An engine that may draft tokens, and counts those that were right."""

  def drafted(self) -> Drafted | None:
    """Returns the counts since the engine was made; None: it drafts nothing."""
    ...


def missing(key: str, package: str, advice: str, why: object) -> UserError:
  """Returns the error that a package can't be imported.

  Args:
    key: the key of the config that asks for it.
    package: its name in an import.
    advice: how to get it.
    why: what is wrong with it.
  """
  return UserError(
    f"{key}: {sys.executable} can't import {package} ({why}); {advice}"
  )
