"""Writes requests to an OpenAI-compatible server, and reads its answers.

Tokens go in and come out as ids. Everything that bears on the sampling is sent
with each request. What is missing a server takes from the model's
generation_config.json, and it would end at stop ids of its own.
"""

import re
from typing import Any

import numpy as np

from trd_jax.experiment.engines import vllm_refuses
from trd_jax.experiment.errors import UserError
from trd_jax.generation.engines.engine import (
  Completion,
  Drafted,
  Request,
  Sampling,
  TopTokens,
  check_sampling,
)

# vLLM reads the seed -1 as "no seed", and any int64 may be drawn: this one, as
# good as any, is sent in its place.
MINUS_ONE = -0x7D5A_3C1E_96B4_8F02
VOCAB_KEY = "trd_jax_vocab_size"
"""In a request's further arguments: ids from here on are never drawn."""
COUNTERS = ("drafts", "draft_tokens", "accepted_tokens")
"""What vLLM calls its counts of drafts, in the order of `engine.Drafted`."""
# The lowest bias that the API takes. It is no mask: an id can still be drawn if
# its logit is about that much above all others, and is refused then.
_NEVER = -100
# vLLM's newer model runner has room for so many; more would end its process.
_MOST_BIASES = 1024
_MOST_STOP_IDS = 128
_ROUNDING = 1e-3  # by which a log-probability may be above 0


class Failed(Exception):
  """A try that failed and may be repeated.

  Attributes:
    pause: seconds that the server asks to be left alone, if it does.
    busy: whether the server is well and only refuses more work for now.
    forgot: whether the server doesn't know the model (any more).
  """

  def __init__(
    self,
    reason: str,
    *,
    pause: float | None = None,
    busy: bool = False,
    forgot: bool = False,
  ):
    super().__init__(reason)
    self.pause = pause
    self.busy = busy
    self.forgot = forgot


def check_servable(sampling: Sampling, head_rows: int) -> None:
  """Refuses sampling that no server can do.

  Args:
    sampling: how requests are to be completed.
    head_rows: rows of the model's head.

  Raises:
    UserError: there are more stop ids, or more rows that aren't tokens, than
      a server takes, or the temperature is none that vLLM draws at.
  """
  check_sampling(sampling, head_rows)
  if problem := vllm_refuses(sampling.temperature):
    raise UserError(problem)
  surplus = head_rows - min(sampling.vocab_size or head_rows, head_rows)
  if surplus > _MOST_BIASES:
    raise UserError(
      f"the model's head has {surplus} more rows than the tokenizer has ids,"
      f" and a server keeps at most {_MOST_BIASES} from being drawn; use"
      " engine.name=vllm or jax"
    )
  if len(sampling.stop_ids) > _MOST_STOP_IDS:
    raise UserError(
      f"{len(sampling.stop_ids)} stop ids are more than the {_MOST_STOP_IDS}"
      " that a server takes"
    )


def body(
  request: Request,
  sampling: Sampling,
  *,
  model: str,
  head_rows: int,
  context: int,
  drafts: bool = False,
) -> dict[str, Any]:
  """Returns the JSON object to post to /v1/completions.

  Args:
    request: its prompt is shorter than `context`.
    sampling: see `check_servable`.
    model: the name that the server knows the model by.
    head_rows: rows of the model's head.
    context: longest prompt with its response.
    drafts: whether the server speculates. vLLM takes no biases then, and one
      that `launch/serve.sh` started has `SurplusRows`.
  """
  prompt = [int(i) for i in request.prompt_ids]
  fields: dict[str, Any] = {
    "model": model,
    "prompt": prompt,
    "max_tokens": min(request.max_new_tokens, context - len(prompt)),
    "temperature": sampling.temperature,
    "top_p": sampling.top_p,
    "top_k": sampling.top_k,
    "seed": MINUS_ONE if request.seed == -1 else request.seed,
    "stop_token_ids": [i for i in sampling.stop_ids if 0 <= i < head_rows],
    # Of a model's own stop ids only those that are asked for.
    "ignore_eos": True,
    # All that follows is sent though it is the API's default: the defaults of a
    # server are those of its model's folder.
    "n": 1,
    "stream": False,
    "echo": False,
    "min_p": 0.0,
    "min_tokens": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "watermarking": False,
    "add_special_tokens": False,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "return_token_ids": True,
  }
  rows = sampling.vocab_size
  if rows is not None and rows < head_rows and drafts:
    fields["vllm_xargs"] = {VOCAB_KEY: rows}
  elif rows is not None and rows < head_rows:
    fields["logit_bias"] = {str(i): _NEVER for i in range(rows, head_rows)}
  if sampling.top_logprobs:
    fields["logprobs"] = sampling.top_logprobs
    # As ids, for texts of different tokens may be equal and can't be told
    # apart.
    fields["return_tokens_as_token_ids"] = True
  return fields


def completion(
  request: Request,
  sampling: Sampling,
  answer: Any,
  url: str,
  *,
  limit: int,
  head_rows: int,
) -> Completion:
  """Reads a server's answer to `body`; nothing in it is taken on trust.

  Args:
    request: the request.
    sampling: how it was to be completed.
    answer: the JSON value of the response.
    url: the server's, for errors.
    limit: the most tokens that it was asked for.
    head_rows: rows of the model's head.

  Raises:
    Failed: the server gave the request up.
    UserError: the server isn't one that can be used.
  """
  try:
    choice = answer["choices"][0]
    reason = choice["finish_reason"]
    ids = choice.get("token_ids")
    prompt = choice.get("prompt_token_ids")
  except (AttributeError, IndexError, KeyError, TypeError):
    raise UserError(
      f"{url} answers with something else than a completion; name an"
      " OpenAI-compatible server in engine.server.urls"
    ) from None
  if reason in (None, "abort", "error"):
    raise Failed(f"it gave the request up (finish_reason {reason})")
  if not isinstance(ids, list):
    raise UserError(
      f"{url} returns no token ids, and text is no substitute; use a server"
      " that knows return_token_ids, such as vllm serve"
    )
  for token in ids:
    if type(token) is not int or not 0 <= token < head_rows:
      raise UserError(
        f"{url} returns {str(token)[:40]!r} for a token id, and the model has"
        f" ids from 0 to {head_rows - 1}; use vllm serve"
      )
  if len(ids) > limit:
    raise UserError(
      f"{url} returns {len(ids)} tokens for request {request.key}, which asked"
      f" for {limit} at most; use a server that knows max_tokens"
    )
  if prompt is not None and prompt != [int(i) for i in request.prompt_ids]:
    raise UserError(
      f"{url} completed another prompt than request {request.key}'s; use a"
      " server that takes token ids as they are"
    )
  if not ids:
    raise Failed("it returned no token")
  rows = sampling.vocab_size
  if rows is not None and max(ids) >= rows:
    raise UserError(
      f"{url} drew token id {max(ids)} where the tokenizer has {rows}; use a"
      " server that knows logit_bias, or, where it drafts, one that"
      " launch/serve.sh --speculative has started"
    )
  # Told by the last id, not by the server's word: an end token that isn't asked
  # for here would look like a finished answer.
  stops = {*sampling.stop_ids}
  stopped = ids[-1] in stops
  early = next((i for i in ids[:-1] if i in stops), None)
  if early is not None:
    raise UserError(
      f"{url} went on after stop id {early} in request {request.key}; use a"
      " server that knows stop_token_ids"
    )
  if not stopped and reason != "length":
    raise UserError(
      f"{url} ended request {request.key} ({reason}) at token id {ids[-1]},"
      " which is no stop id here; start it with --generation-config vllm"
    )
  if not stopped and len(ids) < limit:
    raise UserError(
      f"{url} ended request {request.key} after {len(ids)} of {limit} tokens"
      " and says that this was the limit; its context may be shorter than its"
      " list of models says: set engine.server.urls to another"
    )
  top = None
  if sampling.top_logprobs:
    top = _top(choice, len(ids), sampling.top_logprobs, url, head_rows)
  ended = "stop" if stopped else "length"
  return Completion(request.key, tuple(ids), ended, top)


def drafted(metrics: str) -> Drafted | None:
  """Reads vLLM's counts of drafts from the text of /metrics, over all copies.

  Returns:
    None where the server drafts nothing.
  """
  counts = []
  for name in COUNTERS:
    lines = re.findall(
      rf"^vllm:spec_decode_num_{name}_total(?:{{.*}})? ([\d.e+]{{1,25}})$",
      metrics,
      re.MULTILINE,
    )
    try:
      counts.append(int(sum(map(float, lines))))
    except (ValueError, OverflowError):
      return None
    if not lines:
      return None
  return Drafted(*counts)


def _top(
  choice: dict[str, Any], tokens: int, k: int, url: str, head_rows: int
) -> TopTokens:
  """Reads the K likeliest tokens at each position.

  A server lists the token that was drawn besides, first, where it isn't one of
  the likeliest; so they are sorted and cut to K.

  Raises:
    UserError: the server returns other or fewer of them.
  """
  ids = np.empty((tokens, k), np.int32)
  logprobs = np.empty((tokens, k), np.float32)
  try:
    positions = choice["logprobs"]["top_logprobs"]
    if len(positions) != tokens:
      raise ValueError(f"{len(positions)} positions of {tokens} tokens")
    for position, found in enumerate(positions):
      best = sorted(found.items(), key=lambda item: -item[1])[:k]
      for rank, (token, logprob) in enumerate(best):
        ids[position, rank] = int(token.removeprefix("token_id:"))
        logprobs[position, rank] = logprob
      if len(best) < k:
        raise ValueError(f"{len(best)} of {k} tokens")
    # No comparison with a NaN is true: what has to hold is asked, not what may
    # not.
    if not np.all(np.isfinite(logprobs) & (logprobs <= _ROUNDING)):
      raise ValueError("a log-probability that is none")
    if not np.all((ids >= 0) & (ids < head_rows)):
      raise ValueError("an id that the model hasn't")
  except (
    *(AttributeError, KeyError, TypeError, ValueError, OverflowError),
  ) as error:
    raise UserError(
      f"{url} doesn't return the {k} likeliest token ids of each position"
      f" ({error}); use vllm serve, with --max-logprobs {k} or more"
    ) from None
  return TopTokens(ids, logprobs)
