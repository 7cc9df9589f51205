"""What is sent to a server, and how its answers are read."""

import dataclasses

import numpy as np
import pytest

from tests.support import serving
from trd_jax.experiment.errors import UserError
from trd_jax.generation.engines.engine import Request
from trd_jax.generation.engines.server_protocol import (
  VOCAB_KEY,
  body,
  completion,
  drafted,
)

GREEDY = serving.sampling()


def sent(request=None, sampling=GREEDY, **fields):
  known = {"model": "m", "head_rows": 416, "context": 1024}
  request = request or Request("k", np.array([3, 4]), 7, 5)
  return body(request, sampling, **known | fields)


def test_what_is_sent_leaves_nothing_to_the_server_s_defaults():
  told = sent(sampling=serving.sampling(0.7, top_p=0.9))
  assert told["logit_bias"] == {str(i): -100 for i in range(399, 416)}
  assert (told["temperature"], told["top_p"], told["top_k"]) == (0.7, 0.9, -1)
  assert told["prompt"] == [3, 4]
  assert all(type(i) is int for i in told["prompt"])
  for name in ("repetition_penalty", "min_p", "min_tokens", "ignore_eos"):
    assert name in told
  assert "logit_bias" not in sent(head_rows=399)
  # To vLLM, -1 is no seed at all.
  assert sent(Request("k", [1], -1, 5))["seed"] not in (-1, None)
  assert sent(Request("k", [1], -(2**63), 5))["seed"] == -(2**63)


def test_a_server_that_drafts_is_sent_no_bias():
  told = sent(drafts=True)
  assert "logit_bias" not in told
  assert told["vllm_xargs"] == {VOCAB_KEY: 399}
  assert "vllm_xargs" not in sent(drafts=True, head_rows=399)
  assert "vllm_xargs" not in sent()


def test_counts_of_drafts_are_added_over_the_copies():
  names = ("drafts", "draft_tokens", "accepted_tokens")
  lines = ["# TYPE vllm:spec_decode_num_drafts counter"]
  for copy in (0, 1):
    for number, name in enumerate(names, 1):
      labels = f'{{engine="{copy}",model_name="m"}}'
      lines.append(f"vllm:spec_decode_num_{name}_total{labels} {number}0.0")
      lines.append(f"vllm:spec_decode_num_{name}_created{labels} 1.7e+09")
  assert drafted("\n".join(lines)) == (20, 40, 60)
  assert drafted("vllm:num_requests_running 1.0") is None
  assert drafted("\n".join(lines[:2])) is None
  assert drafted("\n".join(lines).replace(" 10.0", " 1.0.0")) is None


def answer(ids, reason, **fields):
  return {"choices": [{"finish_reason": reason, "token_ids": ids} | fields]}


def read(told, sampling=GREEDY, limit=2):
  return completion(
    Request("k", [1], 0, 9),
    sampling,
    told,
    "http://x",
    limit=limit,
    head_rows=416,
  )


@pytest.mark.parametrize(
  ("told", "says"),
  [
    (answer([5, 6], "stop"), "at token id 6, which is no stop id"),
    (answer([5, 400], "length"), "drew token id 400"),
    (answer([5, 416], "length"), "'416' for a token id"),
    (answer([5, -1], "length"), "'-1' for a token id"),
    (answer([5, True], "length"), "'True' for a token id"),
    (answer([5, 6.0], "length"), "'6.0' for a token id"),
    (answer([5, "6"], "length"), "'6' for a token id"),
    (answer([5, None], "length"), "'None' for a token id"),
    (answer([5, 6, 7], "length"), "3 tokens .* asked for 2"),
    (answer([5], "length"), "after 1 of 2 tokens"),
    (answer([396, 5], "length"), "went on after stop id 396"),
    (answer([5], "length", prompt_token_ids=[1, 2]), "another prompt"),
    ({"object": "error"}, "something else than a completion"),
    (None, "something else than a completion"),
  ],
)
def test_answers_that_are_not_what_was_asked_are_refused(told, says):
  with pytest.raises(UserError, match=says):
    read(told)


def test_a_stop_id_at_the_very_limit_is_a_stop():
  done = read(answer([5, 396], "length"))
  assert (done.ids, done.finish_reason) == ((5, 396), "stop")


def test_the_likeliest_tokens_are_read_in_order():
  # The drawn token comes first, where it is none of the likeliest.
  positions = [
    {"token_id:9": -7.0, "token_id:3": -0.5, "token_id:4": -1.5},
    {"token_id:4": -2.0, "token_id:8": -0.25},
  ]
  both = dataclasses.replace(GREEDY, top_logprobs=2)
  done = read(
    answer([9, 4], "length", logprobs={"top_logprobs": positions}), both
  )
  assert done.top is not None
  assert done.top.ids.tolist() == [[3, 4], [8, 4]]
  assert done.top.logprobs.tolist() == [[-0.5, -1.5], [-0.25, -2.0]]
  assert done.top.ids.dtype == np.int32
  assert done.top.logprobs.dtype == np.float32
  for first in (
    *({"token_id:3": float("nan"), "token_id:4": -1.5},),
    *({"token_id:3": -float("inf"), "token_id:4": -1.5},),
    *({"token_id:3": 0.5, "token_id:4": -1.5},),
    *({"token_id:416": -0.5, "token_id:4": -1.5},),
    *({"token_id:-3": -0.5, "token_id:4": -1.5},),
    *({f"token_id:{10**12}": -0.5, "token_id:4": -1.5},),
    *({"token_id:3": -0.5},),
    *({"three": -0.5, "four": -1.5},),
    None,
  ):
    wrong = {"top_logprobs": [first, positions[1]]}
    with pytest.raises(UserError, match="2 likeliest token ids"):
      read(answer([9, 4], "length", logprobs=wrong), both)
  with pytest.raises(UserError, match="--max-logprobs 2"):
    read(answer([9, 4], "length"), both)
