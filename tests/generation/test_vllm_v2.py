"""vLLM's model runner for GPUs (V2), for real, without one.

Triton's interpreter runs its kernels on a CPU, a few hundred times slower. It
has none of CUDA's kernels for top-k and top-p, so requests here use neither.
"""

import dataclasses
import os

import pytest

from tests.support import serving
from tests.support.engine_env import ROOT, triton_folder
from tests.support.serving import by_key, check_likeliest
from tests.support.vllm_jobs import SPEC, Driver, job

pytestmark = pytest.mark.vllm

TOP = 7
WARM = serving.sampling(1.0)
GREEDY = serving.sampling()
FEW = serving.sampling(0.0, vocab_size=20, stop_ids=())


@pytest.fixture(scope="module")
def asked():
  return [
    dataclasses.replace(request, max_new_tokens=5 + n % 3)
    for n, request in enumerate(serving.requests(10, limits=(8,)))
  ]


@pytest.fixture(scope="module")
def driver(tmp_path_factory, asked):
  environment = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": os.pathsep.join(
      [
        str(ROOT / "tests" / "support" / "v2_runner"),
        str(triton_folder()),
        str(ROOT),
      ]
    ),
  }
  topped = dataclasses.replace(WARM, top_logprobs=TOP)
  alone = [
    job("greedy", asked, GREEDY),
    job("warm", asked, WARM),
    job("warm reversed", asked[::-2], WARM),
    job("warm with top", asked[:5], topped),
    job("few", asked[3:7], FEW),
    job("few, hot", asked[:6], dataclasses.replace(FEW, temperature=2.0)),
  ]
  # Requests with and without a bound on their ids, side by side, and more of
  # them than slots, so that slots are used again.
  together = [
    job("warm beside few", asked, WARM),
    job("few beside warm", asked[3:7], FEW),
  ]
  made = Driver(
    tmp_path_factory.mktemp("v2"),
    [*([each] for each in alone), together],
    environment=environment,
    spec=SPEC | {"max_num_seqs": 4, "max_batched_tokens": 512},
    max_model_tokens=512,
  )
  yield made
  made.end()


def test_it_is_the_runner_for_gpus(driver):
  assert driver.made["runner"] == "V2"


def test_greedy_ids_equal_the_embedded_engine_s(driver, asked):
  expected = by_key(serving.embedded().generate(asked, GREEDY))
  assert driver["greedy"] == expected


def test_a_seed_draws_the_same_in_any_company_and_order(driver):
  first = driver["warm"]
  for name in ("warm reversed", "warm beside few"):
    again = driver[name]
    assert again
    assert again == {key: first[key] for key in again}
  assert first != driver["greedy"]


def test_ids_beyond_the_tokenizer_are_never_drawn(driver, asked):
  made = driver["few"]
  assert by_key(serving.embedded().generate(asked[3:7], FEW)) == made
  assert driver["few beside warm"] == made
  drawn = {i for c in driver.list("few, hot") for i in c.ids}
  assert max(drawn) < 20
  assert len(drawn) > 6
  assert max(i for c in driver.list("warm") for i in c.ids) >= 20


def test_the_likeliest_tokens_are_the_model_s_own(driver, asked):
  by_name = {request.key: request for request in asked}
  bare = driver["warm"]
  for key, done in driver["warm with top"].items():
    assert dataclasses.replace(done, top=None) == bare[key]
    check_likeliest(by_name[key], done, TOP)
