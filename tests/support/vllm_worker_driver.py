"""Loads and drives `vllm_worker.SurplusRows` as vLLM's two model runners do.

usage: python vllm_worker_driver.py

It runs under an interpreter that has vLLM, without a model, and prints one JSON
object: how each runner's loader takes the class, and by name, for each batch
that is driven, the `limits` that each row of logits should have and the ids
that were left to be drawn (`open`).
"""

import json
import types

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.sample.logits_processor.interface import (
  BatchUpdate,
  MoveDirectionality,
)
from vllm.v1.worker.gpu.sample import logits_processor as v2

from trd_jax.generation.engines.vllm_worker import KEY

NAME = "trd_jax.generation.engines.vllm_worker:SurplusRows"
V, SLOTS, NONE = 40, 8, 40


def params(limit: int) -> SamplingParams:
  """A request's, with so many ids to draw from; NONE: all of them."""
  extra = None if limit == NONE else {KEY: limit}
  return SamplingParams(temperature=0.6, seed=1, extra_args=extra)


def left(logits: torch.Tensor, before: torch.Tensor) -> list[list[int]]:
  """Ids of each row that may be drawn; what may be is as it was."""
  kept = torch.isfinite(logits)
  assert torch.equal(logits[kept], before[kept])
  assert torch.all(logits[~kept] == float("-inf"))
  return [torch.nonzero(row).ravel().tolist() for row in kept]


def of_v2(processor, slots: list[int], drafts: list[int]) -> list[list[int]]:
  """Applies it to a step in which each slot has a row, and one a draft.

  Rows stand in the batch's order, which is none of the slots'.
  """
  rows = [s for s, more in zip(slots, drafts, strict=True) for _ in range(more)]
  logits = torch.randn(len(rows), V)
  before = logits.clone()
  nothing = torch.zeros(len(rows), dtype=torch.int64)
  context = v2.LogitsContext(
    expanded_idx_mapping=torch.tensor(rows, dtype=torch.int32),
    idx_mapping=torch.tensor(slots, dtype=torch.int32),
    idx_mapping_np=np.array(slots, np.int32),
    expanded_local_pos=nothing,
    input_ids=nothing,
    pos=nothing,
    seq_lens_upper_bound_np=np.zeros(len(slots), np.int32),
  )
  processor.apply_staged_writes()
  return left(processor.apply(logits, context), before)


def drive_v2(done: dict) -> None:
  """V2: by slot, rows reordered, slots used again, several rows a request."""
  state = types.SimpleNamespace(
    device=torch.device("cpu"),
    max_num_reqs=SLOTS,
    vocab_size=V,
    all_token_ids=None,
    prompt_len=None,
    prefill_len=None,
    total_len=None,
  )
  config = types.SimpleNamespace(use_v2_model_runner=True)
  validate = v2.build_custom_logits_processors_params_validator([NAME])
  validate(params(20))
  (processor,) = v2.build_custom_logits_processors(config, state, False, [NAME])
  limit_of: dict[int, int] = {}

  def enter(slot: int, limit: int) -> None:
    limit_of[slot] = limit
    changes = processor.add_request(slot, params(limit))
    assert changes == (limit != NONE), (slot, limit, changes)

  def step(name: str, slots: list[int], drafts: list[int]) -> None:
    expected = [
      limit_of[slot]
      for slot, more in zip(slots, drafts, strict=True)
      for _ in range(more)
    ]
    open_ids = of_v2(processor, slots, drafts)
    done[name] = {"limits": expected, "open": open_ids}

  for slot, limit in ((7, 20), (2, 20), (5, 20)):
    enter(slot, limit)
  step("v2 all alike", [7, 2, 5], [1, 1, 1])
  for slot, limit in ((0, 3), (1, NONE), (3, 39)):
    enter(slot, limit)
  step("v2 mixed", [7, 1, 0, 5, 3, 2], [1] * 6)
  step("v2 reordered", [0, 3, 2, 1, 7, 5], [1] * 6)
  step("v2 drafts", [3, 0, 1], [3, 1, 2])
  step("v2 alike with drafts", [5, 7], [2, 3])
  step("v2 without any limit", [1], [2])
  # A slot that another request had before.
  enter(0, NONE)
  enter(1, 8)
  step("v2 slots used again", [0, 1, 2], [1, 1, 1])
  # One that is more than the head has rows changes nothing.
  enter(4, V + 9)
  step("v2 beyond the head", [4, 1], [1, 1])


def drive_v1(done: dict) -> None:
  """V1: by row, followed through removals, moves and swaps."""
  config = types.SimpleNamespace(
    use_v2_model_runner=False,
    speculative_config=None,
    scheduler_config=types.SimpleNamespace(max_num_seqs=SLOTS),
    model_config=types.SimpleNamespace(
      is_reasoning_model=False, logits_processors=[NAME]
    ),
    reasoning_config=None,
  )
  found = build_logitsprocs(config, torch.device("cpu"), False, False, [NAME])
  (processor,) = (
    each for each in found.all if type(each).__name__ == "SurplusRows"
  )

  def step(name: str, limits: list[int], **changes) -> None:
    update = {"removed": [], "added": [], "moved": []} | changes
    processor.update_state(BatchUpdate(batch_size=len(limits), **update))
    logits = torch.randn(len(limits), V)
    before = logits.clone()
    open_ids = left(processor.apply(logits), before)
    done[name] = {"limits": limits, "open": open_ids}

  def enters(row: int, limit: int) -> tuple:
    return row, params(limit), [1], []

  alike = [enters(row, 20) for row in range(3)]
  step("v1 all alike", [20] * 3, added=alike)
  more = [enters(3, 3), enters(4, NONE), enters(5, 39)]
  step("v1 mixed", [20, 20, 20, 3, NONE, 39], added=more)
  swap = MoveDirectionality.SWAP
  step("v1 swapped", [3, 20, 20, 20, NONE, 39], moved=[(0, 3, swap)])
  one_way = MoveDirectionality.UNIDIRECTIONAL
  step(
    "v1 condensed", [3, 39, 20, 20, NONE], removed=[1], moved=[(5, 1, one_way)]
  )
  step("v1 rows used again", [NONE, 39, 20, 20, 5], added=[
    enters(0, NONE),
    enters(4, 5),
  ])  # fmt: skip


def main() -> None:
  done: dict = {}
  assert VllmConfig.use_v2_model_runner is not None  # what the class reads
  torch.manual_seed(0)
  drive_v2(done)
  drive_v1(done)
  print(json.dumps(done))


main()
