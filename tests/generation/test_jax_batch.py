"""What the embedded engine computes once; how its batches join and shrink."""

import dataclasses

import numpy as np
import pytest

from tests.generation.test_jax_engine import (
  GREEDY,
  TIED,
  WARM,
  complete,
  engine,
  full_logits,
  requests,
  watched,
)
from tests.support.small_models import LORA, SMALL, model
from trd_jax.generation.engines import (
  jax_batch,
  jax_engine,
  jax_programs,
  jax_prompts,
)
from trd_jax.generation.engines.engine import Request
from trd_jax.generation.engines.jax_engine import JaxEngine

pytestmark = pytest.mark.slow

# No completion ends before its limit.
ENDLESS = dataclasses.replace(WARM, stop_ids=())


@pytest.mark.parametrize(("slots", "devices"), [(8, 1), (12, 1), (16, 2)])
def test_batches_take_turns_and_join(slots, devices, monkeypatch):
  asked = requests(40, prompt=(1, 66), new=(1, 60))
  together = complete(engine(), asked, WARM)
  monkeypatch.setattr(jax_engine, "_SLOTS", {"cpu": 4})
  seen = []

  def saw(name, arguments):
    # Sizes of what decodes, and of what moves from one batch to another.
    if name == "decode":
      seen.append(arguments[2].shape[1])
    elif name == "insert" and arguments[1].values[0].shape[0] == 4 * devices:
      seen.append("join")

  made = watched(engine(slots=slots, devices=devices), saw)
  sampling = dataclasses.replace(WARM, top_logprobs=3)
  found = complete(made, asked, sampling)
  plain = {k: dataclasses.replace(c, top=None) for k, c in found.items()}
  assert plain == together
  assert all(len(c.top.ids) == len(c.ids) for c in found.values())
  assert set(seen) == {4 * devices, "join"}
  # One batch after the other goes into the next until there is one.
  assert 1 <= seen.count("join") < slots // (4 * devices)
  assert seen.index("join") > len(seen) // 2


def test_equal_prompts_are_computed_once():
  computed = []

  def saw(name, arguments):
    if name == "prefill":
      computed.extend(arguments[2][arguments[2] > 0])

  asked = [
    Request(f"{p}-{n}", list(range(p + 3)), n, 3)
    for n in range(9)
    for p in (0, 5)
  ]
  complete(watched(engine(), saw), asked, WARM)
  assert sorted(computed) == [2, 7]


@pytest.mark.parametrize(
  ("config", "lora", "devices", "prompt"),
  [
    (SMALL, None, 1, (1, 20)),
    (TIED, LORA, 2, (1, 90)),
    (TIED, None, 3, (1, 3)),
  ],
)
def test_what_all_prompts_begin_with_is_computed_once(
  config, lora, devices, prompt, monkeypatch
):
  made = model(config, lora=lora)
  instructions = list(range(5, 5 + 21))
  asked = [
    dataclasses.replace(r, prompt_ids=[*instructions, *r.prompt_ids])
    for r in requests(40, prompt=prompt, new=(1, 30))
  ]
  seen = []

  def saw(name, arguments):
    if name == "prefill":
      seen.append((arguments[1].shape, arguments[2].tolist()))

  apart = complete(watched(engine(made, devices=devices), saw), asked, GREEDY)
  assert sum(sum(lengths) for _, lengths in seen) > 20 * 40
  seen.clear()
  monkeypatch.setattr(jax_prompts, "_PREFILL_TOKENS", {"cpu": 60})
  shared = complete(watched(engine(made, devices=devices), saw), asked, GREEDY)
  # The last token of the shortest prompt is left to its row, and so is the one
  # before; rounded down.
  assert seen[0] == ((devices, 20), [20] * devices)
  distinct = {tuple(r.prompt_ids) for r in asked}
  assert sum(sum(lengths) for _, lengths in seen[1:]) == sum(
    len(ids) - 1 - 20 for ids in distinct
  )
  assert shared == apart
  for request, rows_TV in full_logits(made, asked, shared):
    assert shared[request.key].ids == tuple(rows_TV.argmax(axis=-1).tolist())


@pytest.mark.parametrize(
  "prompts",
  [
    # One begins otherwise; one is too short; there is but one.
    [[1, 2, 3, 4], [1, 2, 3, 5, 6], [5, 2, 3, 4]],
    [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2]],
    [[1, 2, 3, 4]] * 3,
  ],
)
def test_prompts_without_a_common_beginning_share_nothing(prompts, monkeypatch):
  monkeypatch.setattr(jax_prompts, "_PREFILL_TOKENS", {"cpu": 1})
  seen = []
  asked = [Request(f"{n}", ids, n, 2) for n, ids in enumerate(prompts)]

  def saw(name, arguments):
    if name == "prefill":
      seen.append(arguments[3])

  complete(watched(engine(), saw), asked, WARM)
  assert set(seen) == {None}


def test_what_is_left_goes_into_fewer_slots(monkeypatch):
  asked = requests(60, prompt=(1, 66), new=(1, 60))
  together = complete(engine(), asked, WARM)
  monkeypatch.setattr(jax_batch, "_LEAST_SHARE", {"cpu": 4})
  slots = []

  def saw(name, arguments):
    if name == "decode":
      slots.append(arguments[2].shape[1])

  assert (
    complete(watched(engine(slots=64, devices=2), saw), asked, WARM) == together
  )
  assert slots[0] == 64
  assert slots == sorted(slots, reverse=True)
  # Never below the least share of a device.
  assert slots[-1] == 8


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("samples", [1, 2])
def test_a_prompt_asked_for_once_stays_on_its_device(
  samples, devices, monkeypatch
):
  asked = [
    Request(f"{p}-{n}", [p, *range(p % 7)], n, 3)
    for p in range(4 * devices)
    for n in range(samples)
  ]
  alone = complete(engine(), asked, WARM)
  spread, split = [], []

  def spreads(cache, *, mesh):
    spread.append(mesh.size)
    return kept(cache, mesh=mesh)

  kept = jax_programs.spread
  monkeypatch.setattr(jax_programs, "spread", spreads)
  made = engine(slots=len(asked), devices=devices)

  def run(program, *arguments, **rest):
    if program is jax_programs.insert:
      split.append(rest["split"])
    return JaxEngine.run(made, program, *arguments, **rest)

  made.run = run
  assert complete(made, asked, WARM) == alone
  # One group of prompts, and a free slot for each beside it.
  expected = ([], [True]) if samples == 1 else ([devices], [False])
  assert (spread, split) == expected


def test_free_slots_take_prompts_that_another_device_computed():
  # All on the second device end at once, and all that is left is to go there.
  asked = [Request(f"{n}", [n + 1] * 9, n, 30 - 27 * (n % 2)) for n in range(8)]
  asked += [Request(f"late {n}", [n + 1] * 5, n, 9) for n in range(4)]
  alone = complete(engine(), asked, ENDLESS)
  places = []

  def saw(name, arguments):
    if name == "insert":
      places.append(np.flatnonzero(arguments[2] >= 0).tolist())

  made = watched(engine(slots=8, devices=2), saw)
  assert complete(made, asked, ENDLESS) == alone
  late = [slot for some in places[1:] for slot in some]
  assert sorted(late)[:4] == [4, 5, 6, 7]


@pytest.mark.parametrize("device", [0, 1])
def test_what_is_left_changes_devices_where_that_saves_slots(
  device, monkeypatch
):
  monkeypatch.setattr(jax_batch, "_LEAST_SHARE", {"cpu": 4})
  # The long ones are all on one device.
  asked = [
    Request(f"{n}", [n + 1] * 9, n, 40 if n % 2 == device else 5)
    for n in range(16)
  ]
  alone = complete(engine(), asked, ENDLESS)
  seen = []

  def saw(name, arguments):
    if name in ("pick", "decode"):
      rows = arguments[1] if name == "pick" else arguments[2][3]
      seen.append((name, np.shape(rows)[0], np.count_nonzero(rows)))

  made = watched(engine(slots=16, devices=2), saw)
  assert complete(made, asked, ENDLESS) == alone
  names = [name for name, *_ in seen]
  moved = names.index("pick")
  # Eight requests on a device that has four of the eight slots there are now.
  assert seen[moved + 1] == ("decode", 8, 8)
  assert names.count("pick") == 1


def test_a_chunk_ends_when_half_of_the_slots_would_do(monkeypatch):
  monkeypatch.setattr(jax_batch, "_LEAST_SHARE", {"cpu": 4})
  asked = [Request(f"{n}", [n + 1] * 9, n, 3 + n // 4 * 9) for n in range(8)]
  seen = []

  def saw(name, arguments):
    if name == "decode":
      rows = jax_programs.Rows(*arguments[2])
      seen.append((rows.index.size, rows.index.max()))

  made = watched(engine(slots=8, decode_steps=64), saw)
  assert {len(c.ids) for c in made.generate(asked, ENDLESS)} == {3, 12}
  assert seen == [(8, 0), (4, 3)]
