"""Refinements are drafted from their prompts, and nothing else is changed.

What a draft can't be had for is generated without, and a line says why.
"""

import dataclasses
from typing import Any, cast

import numpy as np
import pytest

from tests.support import serving
from tests.support.serving import by_key, check_likeliest
from tests.support.vllm_jobs import SPEC, Driver, job
from trd_jax.data.problems import arithmetic
from trd_jax.data.prompts import default
from trd_jax.experiment import experiment
from trd_jax.experiment.engines import VllmEngine as Spec
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.schema import Engine
from trd_jax.generation import generate
from trd_jax.generation.engines import factory, vllm_engine
from trd_jax.generation.engines.engine import Completion, Drafted, Request
from trd_jax.generation.samples import Prompt

GREEDY = serving.sampling()
WARM = serving.sampling(0.6, top_p=0.95, top_k=20)
FEW = dataclasses.replace(GREEDY, vocab_size=20, stop_ids=())
TOP = 8
DRAFTING = Engine(name="vllm", vllm=Spec(speculative="ngram"))


def refinements(count: int) -> list[Request]:
  """Refinement prompts of the student's own answers, as in OPSD."""
  chat = serving.chat()
  problems = arithmetic.generate("heldout", count, 0)
  asked = serving.requests(count, limits=(128,))
  drafts = by_key(serving.embedded().generate(asked, GREEDY))
  texts = [chat.decode(list(drafts[r.key].ids)[:-1]) for r in asked]
  pairs = zip(problems, texts, strict=True)
  fitted = default().fit_refinements(chat, pairs, "opsd", None, 448)
  return [
    Request(f"y{n}", list(cast(Any, one).ids), 2000 + n, 128)
    for n, one in enumerate(fitted)
  ]


@pytest.mark.vllm
def test_greedy_tokens_are_those_of_a_model_without_drafts(tmp_path):
  asked = refinements(48)
  few = [dataclasses.replace(r, max_new_tokens=40) for r in asked[:12]]
  made = Driver(
    tmp_path,
    [
      [job("greedy", asked, GREEDY)],
      [job("top", asked[:12], dataclasses.replace(GREEDY, top_logprobs=TOP))],
      [job("few", few, FEW)],
    ],
    spec=SPEC | {"speculative": "ngram", "speculative_tokens": 6},
  )
  try:
    expected = by_key(serving.embedded().generate(asked, GREEDY))
    assert made["greedy"] == expected
    # Drafts were made, and most of a refinement is its draft.
    drafts, drafted, accepted = made.made["drafted"]
    assert drafts < drafted <= 6 * drafts
    assert 0.5 * drafted < accepted < drafted
    # The recorded log-probabilities are the model's own at each token, of those
    # that were accepted with others in one pass, too.
    by_name = {request.key: request for request in asked}
    for key, done in made["top"].items():
      assert dataclasses.replace(done, top=None) == expected[key]
      check_likeliest(by_name[key], done, TOP)
    # Ids beyond the tokenizer's are in no draft and are never drawn.
    assert made["few"] == by_key(serving.embedded().generate(few, FEW))
    assert made.made["runner"] == "V1"
  finally:
    made.end()


@pytest.mark.vllm
def test_an_adapter_is_no_obstacle_to_drafts(tmp_path):
  asked = refinements(24)
  adapter = serving.save_adapter(tmp_path / "adapter", rank=16, scale=0.05)
  made = Driver(
    tmp_path,
    [[job("adapted", asked, GREEDY)]],
    adapter,
    spec=SPEC | {"speculative": "ngram"},
  )
  try:
    expected = by_key(serving.embedded(adapter).generate(asked, GREEDY))
    found = made["adapted"]
    # Adapted and merged weights round differently, in the last bits.
    equal = sum(found[key] == expected[key] for key in expected)
    assert equal >= 0.9 * len(asked)
    assert made.made["drafted"][2] > 0
  finally:
    made.end()


def test_only_prompts_that_hold_a_draft_are_drafted_from(monkeypatch, capsys):
  monkeypatch.setattr(vllm_engine, "refuses_drafts", lambda *_: None)
  assert factory.drafting(DRAFTING, WARM, True) is DRAFTING
  without = factory.drafting(DRAFTING, WARM, False)
  assert without == dataclasses.replace(DRAFTING, vllm=Spec())
  # Of other keys nothing is changed.
  tuned = dataclasses.replace(DRAFTING.vllm, max_num_seqs=7)
  other = dataclasses.replace(DRAFTING, vllm=tuned)
  assert factory.drafting(other, WARM, False).vllm.max_num_seqs == 7
  assert not capsys.readouterr().out


def test_an_engine_that_drafts_nothing_is_asked_nothing(monkeypatch):
  monkeypatch.setattr(vllm_engine, "refuses_drafts", pytest.fail)
  for spec in (Engine(), Engine(name="vllm")):
    for in_prompts in (True, False):
      assert factory.drafting(spec, WARM, in_prompts) is spec


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_where_drafts_would_be_checked_wrongly_there_are_none(
  monkeypatch, capsys, on_cpu, v2
):
  monkeypatch.setattr(vllm_engine, "_import", lambda spec: None)
  monkeypatch.setattr(vllm_engine, "_on_cpu", lambda: on_cpu)
  monkeypatch.setattr(vllm_engine, "_runs_v2", lambda: v2)
  assert factory.drafting(DRAFTING, GREEDY, True) is DRAFTING
  found = factory.drafting(DRAFTING, WARM, True)
  said = capsys.readouterr().out
  if on_cpu and not v2:
    assert not found.chosen.drafts
    assert said.startswith("vllm: goes on without drafts: vLLM's CPU build")
    assert "temperature 0 alone, and it is 0.6" in said
    assert said.count("\n") == 1
  else:
    assert found is DRAFTING
    assert not said


def test_v1_is_told_the_ids_that_may_be_drawn():
  engine = VllmEngineOf(v1_drafts=True)
  assert engine._allowed(FEW) == list(range(20))
  # No row of the head is surplus.
  whole = dataclasses.replace(FEW, vocab_size=serving.HEAD_ROWS)
  assert engine._allowed(whole) is None
  assert VllmEngineOf(v1_drafts=False)._allowed(FEW) is None


class VllmEngineOf(vllm_engine.VllmEngine):
  """An engine without vLLM, as far as it makes parameters of a sampling."""

  def __init__(self, v1_drafts: bool):
    self._v1_drafts = v1_drafts
    self._rows = serving.HEAD_ROWS
    self._worker = type("Worker", (), {"KEY": "limit"})


def test_a_method_that_refines_nothing_has_no_use_for_drafts():
  keys = {"engine.name": "vllm", "engine.vllm.speculative": "ngram"}
  assert experiment.from_config(keys).engine.chosen.drafts
  with pytest.raises(UserError, match=r"speculative=ngram: only a refinement"):
    experiment.from_config(keys | {"method": "forward_kl"})
  with pytest.raises(UserError, match=r"speculative is for engine\.name=vllm"):
    experiment.from_config(keys | {"engine.name": "jax"})


class Counting:
  """An engine that answers at once and says that it has drafted."""

  def __init__(self):
    self.counts = Drafted(100, 800, 300)  # of an earlier call

  def drafted(self):
    return self.counts

  def generate(self, requests, sampling):
    for request in requests:
      self.counts = Drafted(*np.add(self.counts, (2, 16, 12)))
      yield Completion(request.key, (5, 6, 7), "length")

  def close(self):
    pass


def test_what_came_of_drafts_is_told_and_kept(monkeypatch, capsys):
  engine = Counting()
  monkeypatch.setattr(factory, "make", lambda *_, **__: engine)
  config = experiment.from_config({})
  (problem, *_) = arithmetic.generate("heldout", 1, 0)
  prompts = [Prompt(f"k{n}", problem, [1, 2], n, draft_key="d") for n in (0, 1)]
  model = cast(Any, type("Model", (), {}))
  model.chat, model.folder, model.adapter = serving.chat(), None, None
  model.files = None
  facts: dict[str, Any] = {}
  samples = generate.generate(
    config,
    model,
    config.refine,
    prompts,
    desc="refine",
    grade=False,
    facts=facts,
  )
  assert len(list(samples)) == 2
  speed = facts["speculation"].pop("tokens_per_second")
  assert speed > 0
  assert facts["speculation"] == {
    "drafts": 4,
    "drafted": 32,
    "accepted": 24,
    "acceptance": 0.75,
    "accepted_length": 6.0,
  }
  assert (
    "refine: 24 of 32 drafted tokens accepted (75.0%), 6.00 of each draft;"
    in capsys.readouterr().out
  )


def test_counts_of_no_draft_are_no_division_by_nothing():
  none = Drafted(0, 0, 0)
  assert (none.acceptance, none.accepted_length) == (0, 0)
