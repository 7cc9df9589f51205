import collections
import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.generation.test_sampling import assert_drawn_from, exact
from tests.support.small_models import LORA, SMALL, forward, model, tree
from trd_jax.data import prompts
from trd_jax.data.chat import Chat
from trd_jax.data.problems import arithmetic
from trd_jax.experiment.engines import JaxEngine as JaxSection
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.schema import Engine
from trd_jax.generation.engines import factory
from trd_jax.generation.engines.engine import Completion, Request, Sampling
from trd_jax.generation.engines.jax_engine import JaxEngine
from trd_jax.generation.engines.jax_programs import bucket
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.qwen3 import logits
from trd_jax.model.weights import adapters, hf, hub
from trd_jax.model.weights.model_files import ModelFiles

pytestmark = pytest.mark.slow

TIED = dataclasses.replace(SMALL, tie_embeddings=True)
GREEDY = Sampling(temperature=0.0)
WARM = Sampling(temperature=1.2, top_k=12, top_p=0.95, stop_ids=(7,))

_compiled = collections.Counter()
jax.monitoring.register_event_duration_secs_listener(
  lambda event, *_, **__: _compiled.update([event])
)


def compilations():
  return _compiled["/jax/core/compile/backend_compile_duration"]


def engine(made=None, *, slots=4, decode_steps=5, devices=1, **kwargs):
  return JaxEngine(
    made or model(),
    slots=slots,
    decode_steps=decode_steps,
    devices=jax.devices()[:devices],
    **kwargs,
  )


def requests(count, *, prompt=(1, 90), new=(1, 40), seed=0):
  """Requests of mixed lengths, deterministic."""
  generator = np.random.default_rng(seed)
  made = []
  for number in range(count):
    length = generator.integers(*prompt)
    ids = generator.integers(0, SMALL.vocab_size, length).tolist()
    limit = int(generator.integers(*new))
    made.append(
      Request(f"r{number}", ids, int(generator.integers(2**60)), limit)
    )
  return made


def complete(made, asked, sampling):
  """Completions by key, one for each request."""
  found = list(made.generate(asked, sampling))
  by_key = {c.key: c for c in found}
  assert len(by_key) == len(found)
  assert by_key.keys() == {r.key for r in asked}
  return by_key


def watched(made, saw):
  """The engine, telling `saw` of each program that it is about to run."""

  def run(program, *arguments, **rest):
    saw(program.__name__, arguments)
    return JaxEngine.run(made, program, *arguments, **rest)

  made.run = run
  return made


def full_logits(made, asked, found):
  """Logits of the full forward at the places the completions came from."""
  width = max(len(r.prompt_ids) + len(found[r.key].ids) for r in asked)
  tokens = np.zeros((len(asked), width), np.int32)
  segment = np.zeros_like(tokens)
  for row, request in enumerate(asked):
    ids = [*request.prompt_ids, *found[request.key].ids]
    tokens[row, : len(ids)] = ids
    segment[row, : len(ids)] = 1
  position = np.broadcast_to(np.arange(width), tokens.shape)
  hidden = forward(made, tokens, position, segment)
  all_BTV = np.asarray(logits(hidden, made.head_VD))
  for row, request in enumerate(asked):
    start = len(request.prompt_ids) - 1
    yield request, all_BTV[row, start : start + len(found[request.key].ids)]


@pytest.mark.parametrize(
  ("config", "lora", "devices", "longest"),
  [(SMALL, None, 1, 130), (TIED, LORA, 1, 30), (TIED, None, 2, 30)],
)
def test_greedy_is_the_argmax_of_the_full_forward(
  config, lora, devices, longest
):
  made = model(config, lora=lora)
  # More requests than slots; from a prompt of one token to contexts over
  # several buckets.
  asked = [
    Request("one", [5], 0, longest),
    Request("two", [5, 6], 0, 1),
    *requests(14, prompt=(3, longest), new=(1, 1 + longest // 2)),
  ]
  found = complete(engine(made, devices=devices), asked, GREEDY)
  for request, rows_TV in full_logits(made, asked, found):
    completion = found[request.key]
    assert completion.finish_reason == "length"
    assert len(completion.ids) == request.max_new_tokens
    assert list(completion.ids) == rows_TV.argmax(axis=1).tolist()
  assert len({i for c in found.values() for i in c.ids}) > 20


def test_greedy_in_bfloat16_is_within_rounding_of_the_full_forward():
  made = model(TIED, dtype=jnp.bfloat16)
  asked = requests(24, prompt=(1, 40), new=(10, 20))
  found = complete(engine(made), asked, GREEDY)
  missed = []
  for request, rows_TV in full_logits(made, asked, found):
    ids = np.array(found[request.key].ids)
    lost = rows_TV.max(axis=1) - rows_TV[np.arange(len(ids)), ids]
    # A lost argmax is a near tie, and rare.
    assert np.all(lost <= 0.05 * rows_TV.std())
    missed.extend(lost > 0)
  assert np.mean(missed) <= 0.03


def test_a_completion_ends_with_the_first_stop_id_or_at_its_limit():
  made, asked = engine(), requests(20, prompt=(1, 30), new=(2, 30))
  free = complete(made, asked, GREEDY)
  common, _ = collections.Counter(
    i for c in free.values() for i in c.ids
  ).most_common(1)[0]
  # Another that ends a completion at its very limit.
  last = next(
    c.ids[-1]
    for c in free.values()
    if common not in c.ids and c.ids.count(c.ids[-1]) == 1
  )
  stops = (last, common, 10**6)
  ended = complete(made, asked, dataclasses.replace(GREEDY, stop_ids=stops))
  reasons = set()
  for key, completion in ended.items():
    ids = free[key].ids
    first = next((n for n, i in enumerate(ids, 1) if i in stops), None)
    assert completion.ids == ids[:first]
    assert completion.finish_reason == ("stop" if first else "length")
    reasons.add((completion.finish_reason, len(completion.ids) == len(ids)))
  assert ("stop", True) in reasons
  assert ("stop", False) in reasons
  assert ("length", True) in reasons


def test_tokens_depend_neither_on_company_nor_on_order_slots_or_devices():
  made, asked = model(), requests(40, prompt=(1, 66), new=(1, 30))
  together = complete(engine(made), asked, WARM)
  assert {c.finish_reason for c in together.values()} == {"stop", "length"}
  one = engine(made)
  for request in asked[:6]:
    (alone,) = one.generate([request], WARM)
    assert alone == together[request.key]
  assert complete(one, asked[::-1], WARM) == together
  assert (
    complete(engine(made, slots=3, decode_steps=1), asked, WARM) == together
  )
  assert complete(engine(made, slots=50), asked, WARM) == together
  assert complete(engine(made, devices=2), asked, WARM) == together


def test_the_seed_and_nothing_else_tells_equal_prompts_apart():
  asked = [Request(f"r{n}", [1, 2, 3], n // 2, 12) for n in range(60)]
  found = complete(engine(), asked, WARM)
  for n in range(0, 60, 2):
    assert found[f"r{n}"].ids == found[f"r{n + 1}"].ids
  assert len({c.ids for c in found.values()}) == 30


def test_first_and_second_tokens_follow_the_model_s_distribution():
  made, prompt, count = model(), [3, 1, 4], 4000
  sampling = Sampling(temperature=0.7, top_k=8, top_p=0.9)
  asked = [Request(str(n), prompt, n, 2) for n in range(count)]
  found = complete(engine(made, slots=64), asked, sampling)
  first = np.array([c.ids[0] for c in found.values()])
  ones = [Request("", prompt, 0, 1)]
  ((_, rows_TV),) = full_logits(
    made, ones, {"": Completion("", (0,), "length")}
  )
  assert_drawn_from(first, exact(rows_TV[0], 0.7, 8, 0.9))
  common = int(np.bincount(first).argmax())
  second = np.array([c.ids[1] for c in found.values() if c.ids[0] == common])
  ones = [Request("", [*prompt, common], 0, 1)]
  ((_, rows_TV),) = full_logits(
    made, ones, {"": Completion("", (0,), "length")}
  )
  assert second.size > 500
  assert_drawn_from(second, exact(rows_TV[0], 0.7, 8, 0.9))


def test_two_hundred_mixed_requests_cause_few_compilations():
  # No other test has this number of slots, so nothing is compiled before.
  made = engine(slots=7)
  before = compilations()
  complete(made, requests(200), WARM)
  first = compilations() - before
  kinds = collections.Counter(program[0] for program in made.programs)
  # Contexts of 1 to 128 tokens: three buckets of prompts and of the cache.
  assert kinds["prefill"] <= 2
  assert kinds["decode"] <= 3
  assert kinds["insert"] <= 6
  assert first <= len(made.programs) <= 16
  complete(made, requests(200, seed=1), WARM)
  complete(made, requests(30, seed=2), WARM)
  later = compilations() - before - first
  assert first + later <= len(made.programs) <= 16
  steady = compilations()
  complete(made, requests(200), WARM)
  assert compilations() == steady


def test_completions_come_as_they_end_and_slots_are_filled_again():
  asked = [
    Request("long", [1] * 9, 0, 100),
    *(Request(f"short{n}", [2, n], n, 2) for n in range(30)),
  ]
  chunks = []
  made = watched(engine(), lambda name, _: chunks.append(name == "decode"))
  after = {c.key: sum(chunks) for c in made.generate(asked, GREEDY)}
  assert len(after) == 31
  # Three slots are left for thirty short ones, a chunk for each three; and
  # what a chunk ends comes once the next one is on its way.
  assert list(after)[-1] == "long"
  assert after["long"] >= 100 / made.decode_steps
  short = sorted(after[f"short{n}"] for n in range(30))
  assert short == [chunk for chunk in range(2, 12) for _ in range(3)]


def test_nothing_asked_is_nothing_given():
  made = engine()
  assert list(made.generate([], WARM)) == []
  none = Request("none", [1], 0, 0)
  assert list(made.generate([none], WARM)) == [Completion("none", (), "length")]
  found = complete(made, [none, Request("some", [1], 0, 2)], GREEDY)
  assert found["none"].ids == ()
  assert len(found["some"].ids) == 2


def test_a_completion_ends_where_the_context_is_full():
  made = engine(model(dataclasses.replace(SMALL, max_positions=40)))
  asked = [
    Request("full", [1] * 39, 0, 9),
    Request("almost", [1] * 35, 0, 9),
    Request("room", [1] * 20, 0, 9),
  ]
  found = complete(made, asked, GREEDY)
  lengths = {key: len(c.ids) for key, c in found.items()}
  assert lengths == {"full": 1, "almost": 5, "room": 9}
  assert {c.finish_reason for c in found.values()} == {"length"}


def test_ids_that_the_tokenizer_lacks_are_never_drawn():
  made, asked = engine(), requests(10, prompt=(1, 30), new=(1, 30))
  free = complete(made, asked, GREEDY)
  assert max(i for c in free.values() for i in c.ids) >= 30
  for sampling in (GREEDY, Sampling(temperature=5.0)):
    cut = dataclasses.replace(sampling, vocab_size=30)
    found = complete(made, asked, cut)
    assert max(i for c in found.values() for i in c.ids) < 30


@pytest.mark.parametrize(("count", "devices"), [(5, 1), (64, 2)])
def test_the_likeliest_tokens_are_those_of_the_full_forward(count, devices):
  made = model(TIED)
  # Over several buckets and refills; a third of the head is never drawn.
  asked = [
    Request("none", [1], 0, 0),
    *requests(10, prompt=(1, 70), new=(1, 40)),
  ]
  plain = dataclasses.replace(WARM, vocab_size=43)
  sampling = dataclasses.replace(plain, top_logprobs=count)
  found = complete(engine(made, devices=devices), asked, sampling)
  bare = complete(engine(made, devices=devices), asked, plain)
  assert found["none"].top.ids.shape == (0, count)
  beyond = 0
  for request, rows_TV in full_logits(made, asked[1:], found):
    completion = found[request.key]
    assert bare[request.key].top is None
    assert completion.ids == bare[request.key].ids
    ids_TK, logprobs_TK = completion.top
    assert ids_TK.shape == logprobs_TK.shape == (len(completion.ids), count)
    assert (ids_TK.dtype, logprobs_TK.dtype) == (np.int32, np.float32)
    exact_TV = np.asarray(jax.nn.log_softmax(rows_TV))
    order_TK = np.argsort(-exact_TV, axis=1)[:, :count]
    np.testing.assert_array_equal(ids_TK, order_TK)
    np.testing.assert_allclose(
      logprobs_TK, np.take_along_axis(exact_TV, order_TK, 1), atol=2e-5
    )
    beyond += int(np.sum(ids_TK >= 43))
  assert beyond > 20


def test_the_likeliest_tokens_in_bfloat16_are_within_rounding():
  made = model(TIED, dtype=jnp.bfloat16)
  asked = requests(12, prompt=(1, 40), new=(5, 20))
  sampling = dataclasses.replace(GREEDY, top_logprobs=4)
  found = complete(engine(made), asked, sampling)
  # Two bfloat16 forwards round in other places: each is held against float32
  # arithmetic on the same weights, and the engine's is to be no worse.
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(made))
  exact = nnx.merge(nnx.graphdef(model(TIED)), exact)
  errors, forward_errors = [], []
  for (request, rows_TV), (_, exact_TV) in zip(
    full_logits(made, asked, found),
    full_logits(exact, asked, found),
    strict=True,
  ):
    ids_TK, logprobs_TK = found[request.key].top
    assert ids_TK[:, 0].tolist() == list(found[request.key].ids)
    assert np.all(np.diff(logprobs_TK, axis=1) <= 0)
    rows_TK, exact_TK = (
      np.take_along_axis(np.asarray(jax.nn.log_softmax(x)), ids_TK, 1)
      for x in (rows_TV, exact_TV)
    )
    errors.append(logprobs_TK - exact_TK)
    forward_errors.append(rows_TK - exact_TK)
  error, forward_error = (
    np.sqrt(np.mean(np.concatenate(x) ** 2)) for x in (errors, forward_errors)
  )
  assert error < 1.2 * forward_error


def test_no_more_likeliest_tokens_than_the_head_has():
  made = engine()
  sampling = dataclasses.replace(WARM, top_logprobs=65)
  with pytest.raises(UserError, match=r"top_logprobs=65 .* 64 tokens"):
    made.generate([Request("good", [1], 0, 1)], sampling)
  assert not made.programs


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (Request("bad", [], 0, 1), "request bad: the prompt is empty"),
    (Request("bad", [1] * 40, 0, 1), "a prompt of 40 tokens .* context of 40"),
    (Request("bad", [1, 64], 0, 1), "token id 64 .* vocabulary of 64"),
    (Request("bad", [1, -1], 0, 1), "token id -1 "),
    (Request("bad", [1], 0, -1), "max_new_tokens=-1"),
  ],
)
def test_what_cannot_be_generated_is_refused_before_anything_is(wrong, message):
  made = engine(model(dataclasses.replace(SMALL, max_positions=40)))
  with pytest.raises(UserError, match=message):
    made.generate([Request("good", [1], 0, 1), wrong], WARM)
  assert not made.programs


def test_slots_and_steps_must_be_positive():
  for wrong in ({"slots": 0}, {"decode_steps": 0}):
    with pytest.raises(UserError, match="at least 1"):
      engine(**wrong)


def test_a_bucket_holds_its_length_and_wastes_little():
  sizes = [bucket(length) for length in range(1, 5000)]
  assert sizes == sorted(sizes)
  for length, size in enumerate(sizes, 1):
    assert length <= size < max(65, 1.5 * length)
  assert len(set(sizes)) == 14


def test_an_experiment_s_engine_is_made_from_a_folder(tmp_path):
  made = model(TIED)
  hf.save_hf(TIED, tree(made), tmp_path / "m", dtype="float32")
  spec = Engine(jax=JaxSection(slots=8, decode_steps=3))
  files = ModelFiles("m", tmp_path / "m", "0", "float32")
  loaded = factory.make(spec, files, max_model_tokens=64)
  assert (loaded.slots, loaded.decode_steps) == (8, 3)
  asked = requests(6, prompt=(1, 30), new=(1, 20))
  assert complete(loaded, asked, WARM) == complete(engine(made), asked, WARM)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
  """The laboratory's student, an adapter for it, and the two merged."""
  folder = tmp_path_factory.mktemp("adapted")
  base = hub.model_folder("lab:student", None)
  config = hf.read_config(base)
  lora = LoraConfig(rank=8, alpha=16.0, dropout=0.5)
  made = hf.load(base, dtype="float32", lora=lora)
  generator = np.random.default_rng(0)
  adapter = jax.tree.map(
    lambda x: generator.normal(0, 0.14, x.shape).astype(np.float32),
    tree(made, nnx.LoRAParam),
  )
  adapters.save_peft(adapter, lora, folder / "adapter", base="lab:student")
  plain = tree(hf.load(base, dtype="float32"))
  merged = adapters.merge(plain, adapter, lora)
  hf.save_hf(config, merged, folder / "merged", dtype="float32")
  return base, folder / "adapter", folder / "merged"


def test_an_unmerged_adapter_gives_the_merged_model_s_tokens(adapted):
  base, adapter, merged = adapted
  chat = Chat.load(base)
  asked = [
    Request(
      str(n), prompts.default().fit_initial(chat, problem, None, 448), n, 64
    )
    for n, problem in enumerate(arithmetic.generate("heldout", 64, 0))
  ]
  sampling = dataclasses.replace(GREEDY, stop_ids=tuple(chat.stop_ids))

  def completed(folder, adapter=None):
    files = ModelFiles("m", folder, "0", "float32", adapter)
    made = factory.make(Engine(), files, max_model_tokens=512)
    return complete(made, asked, sampling)

  beside, whole, base_alone = (
    completed(base, adapter),
    completed(merged),
    completed(base),
  )
  same = np.mean([beside[r.key] == whole[r.key] for r in asked])
  moved = np.mean([beside[r.key] != base_alone[r.key] for r in asked])
  print(f"as merged {same:.3f}, other than the base {moved:.3f}")
  assert same >= 0.99
  assert moved >= 0.5


def test_an_adapter_of_another_model_is_refused(adapted, tmp_path):
  _, adapter, _ = adapted
  hf.save_hf(TIED, tree(model(TIED)), tmp_path / "m", dtype="float32")
  with pytest.raises(UserError, match=r"adapter_model\.safetensors: tensor"):
    JaxEngine.load(tmp_path / "m", dtype="float32", adapter=adapter)
  with pytest.raises(UserError, match=r"none.adapter_config\.json"):
    JaxEngine.load(tmp_path / "m", dtype="float32", adapter=tmp_path / "none")


def test_the_protocol_does_not_import_jax():
  code = (
    "import sys, trd_jax.generation.engines.factory;"
    " assert 'jax' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
