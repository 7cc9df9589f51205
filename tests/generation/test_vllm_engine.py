"""vLLM in process, for real, against the embedded engine.

A driver under an interpreter with vLLM does every job in one start; what it
made is compared here.
"""

import collections
import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.support import serving
from tests.support.engine_env import ROOT
from tests.support.processes import below, still_there, title
from tests.support.serving import by_key, check_likeliest, scores
from tests.support.vllm_jobs import SPEC, Driver, job
from trd_jax.experiment.engines import VllmEngine as Spec
from trd_jax.experiment.errors import UserError
from trd_jax.generation.engines import vllm_engine
from trd_jax.generation.engines.engine import Completion, Request
from trd_jax.generation.engines.vllm_engine import VllmEngine

pytestmark = pytest.mark.vllm

GREEDY = serving.sampling()
WARM = serving.sampling(1.0, top_p=0.95, top_k=20)
HOT = dataclasses.replace(WARM, temperature=2.0, top_p=1.0, top_k=-1)
# The paper's sampling; here it has tokens to leave out by either bound.
PAPER = serving.sampling(0.6, top_p=0.95, top_k=20)
FEW = serving.sampling(0.0, vocab_size=20, stop_ids=())
NEVER = dataclasses.replace(GREEDY, stop_ids=())
DRAWS, TOP = 4000, 12
ODD_SEEDS = (-1, -(2**63), 2**63 - 1)


@pytest.fixture(scope="module")
def asked() -> list[Request]:
  return serving.requests(64, limits=(128,))


@pytest.fixture(scope="module")
def greedy(asked):
  return by_key(serving.embedded().generate(asked, GREEDY))


def draws() -> list[Request]:
  """One token behind one prompt, many times.

  The prompt ends inside of a problem, where the next token can be many.
  """
  prompt = list(serving.requests(10)[9].prompt_ids[:25])
  return [Request(f"d{n}", prompt, 7000 + n, 1) for n in range(DRAWS)]


def odd_seeds(asked) -> list[Request]:
  return [
    dataclasses.replace(r, seed=seed, key=f"{r.key}/{seed}", max_new_tokens=24)
    for r in asked[:8]
    for seed in ODD_SEEDS
  ]


def bad(asked) -> dict[str, Request]:
  """Requests that can't be met, by what is said of them."""
  one = asked[0]
  return {
    "the prompt is empty": dataclasses.replace(one, prompt_ids=[]),
    "leaves no room": dataclasses.replace(one, prompt_ids=[5] * 1024),
    "token id 416 is outside": dataclasses.replace(one, prompt_ids=[5, 416]),
    "token id -1 is outside": dataclasses.replace(one, prompt_ids=[-1]),
    "is negative": dataclasses.replace(one, max_new_tokens=-1),
  }


@pytest.fixture(scope="module")
def driver(tmp_path_factory, asked):
  few = asked[:8]
  none = [dataclasses.replace(r, max_new_tokens=0) for r in few[:2]]
  short = [dataclasses.replace(r, max_new_tokens=60) for r in few]
  others = [dataclasses.replace(r, seed=r.seed + 1) for r in asked]
  masked = [
    dataclasses.replace(r, max_new_tokens=9 + n)
    for n, r in enumerate(asked[8:24])
  ]
  topped = dataclasses.replace(WARM, top_logprobs=TOP)
  alone = [
    job("greedy", asked, GREEDY),
    job("warm", asked, WARM),
    job("warm reversed", asked[::-7], WARM),
    job("warm, other seeds", others, WARM),
    job("warm with top", asked[:16], topped),
    job("hot with top", few[:6], dataclasses.replace(HOT, top_logprobs=TOP)),
    job("odd seeds", odd_seeds(asked), HOT),
    job("odd seeds again", odd_seeds(asked), HOT),
    job("draws", draws(), PAPER),
    job("few", masked, FEW),
    job("few, hot", few, dataclasses.replace(FEW, temperature=2.0)),
    job("none", [*none, few[2]], GREEDY),
    job("never", short, NEVER),
    job("sooner", short, dataclasses.replace(GREEDY, stop_ids=(198,))),
    job("long", [Request("long", [5] * 1000, 0, 500)], NEVER),
    job("closed early", asked, WARM, take=3),
    job("after closing", asked[:16], WARM),
    *(job(says, [few[0], r], GREEDY) for says, r in bad(asked).items()),
  ]
  # Requests with and without a bound on their ids, side by side.
  together = [
    job("warm beside few", asked, WARM),
    job("few beside warm", masked, FEW),
  ]
  made = Driver(
    tmp_path_factory.mktemp("vllm"), [*([each] for each in alone), together]
  )
  yield made
  made.end()


def test_greedy_ids_equal_the_embedded_engine_s(driver, greedy):
  assert driver["greedy"] == greedy
  assert {c.finish_reason for c in greedy.values()} == {"stop"}


def test_a_seed_draws_the_same_in_any_company_and_order(driver):
  first = driver["warm"]
  for name in ("warm reversed", "after closing", "warm beside few"):
    again = driver[name]
    assert again
    assert again == {key: first[key] for key in again}
  others = driver["warm, other seeds"]
  assert sum(others[key].ids != first[key].ids for key in first) > 32


def test_any_int64_is_a_seed(driver):
  first = driver["odd seeds"]
  assert driver["odd seeds again"] == first
  assert len({c.ids for c in first.values()}) == len(first)


def test_first_tokens_are_drawn_as_often_as_they_are_likely(driver):
  from scipy import stats  # here, as every process of the tests reads this file

  prompt = draws()[0].prompt_ids
  exact = expected(prompt)
  # No rounding decides which tokens are in.
  assert exact.keys() == expected(prompt, top_p=0.952).keys()
  assert exact.keys() == expected(prompt, top_p=0.948).keys()
  here = by_key(serving.embedded().generate(draws(), PAPER))
  for made in (driver["draws"], here):
    assert {len(c.ids) for c in made.values()} == {1}
    counts = collections.Counter(c.ids[0] for c in made.values())
    # Nothing that top-k and top-p leave out.
    assert set(counts) <= set(exact)
    seen = [counts[token] for token in exact]
    wanted = [DRAWS * p for p in exact.values()]
    assert min(wanted) > 40
    # Of right engines one choice of seeds in 1,000 would fail; these are fixed.
    assert stats.chisquare(seen, wanted).pvalue > 1e-3


def test_the_share_of_first_tokens_sees_a_wrong_sampling():
  from scipy import stats

  # The bound of the test above isn't idle.
  prompt = draws()[0].prompt_ids
  exact = expected(prompt)
  wrong = {
    "temperature": expected(prompt, temperature=0.7),
    "top_k": expected(prompt, top_k=400),
    "top_p": expected(prompt, top_p=1.0),
  }
  assert len(exact) < len(wrong["top_p"]) < len(wrong["top_k"])
  # Had the tokens of another temperature come, each as often as it should:
  shares = np.array([wrong["temperature"][token] for token in exact])
  wanted = [DRAWS * p for p in exact.values()]
  assert stats.chisquare(DRAWS * shares / shares.sum(), wanted).pvalue < 1e-3


def expected(prompt, temperature=0.6, top_k=20, top_p=0.95) -> dict:
  """What the next token is drawn from: probabilities by id."""
  scaled = scores(prompt)[-1][: PAPER.vocab_size].astype(float) / temperature
  order = np.argsort(-scaled)[:top_k]
  p = np.exp(scaled[order] - scaled.max())
  p /= p.sum()
  kept = np.cumsum(p) - p < top_p
  return dict(zip(order[kept].tolist(), p[kept] / p[kept].sum(), strict=True))


def test_the_likeliest_tokens_are_the_model_s_own(driver, asked):
  by_name = {request.key: request for request in asked}
  for name in ("warm with top", "hot with top"):
    for key, done in driver[name].items():
      check_likeliest(by_name[key], done, TOP)


def test_keeping_the_likeliest_tokens_changes_none(driver):
  bare = driver["warm"]
  for key, done in driver["warm with top"].items():
    assert dataclasses.replace(done, top=None) == bare[key]


def test_ids_beyond_the_tokenizer_are_never_drawn(driver, asked):
  # With 20 ids the model's own choice is nearly always out.
  made = driver["few"]
  requests = [
    dataclasses.replace(r, max_new_tokens=len(made[r.key].ids))
    for r in asked[8:24]
  ]
  assert by_key(serving.embedded().generate(requests, FEW)) == made
  assert driver["few beside warm"] == made
  drawn = {i for c in driver.list("few, hot") for i in c.ids}
  assert max(drawn) < 20
  assert len(drawn) > 10


def test_the_stop_id_is_the_last_iff_it_ended_it(driver, greedy):
  for done in driver.list("greedy") + driver.list("warm"):
    stops = [i in GREEDY.stop_ids for i in done.ids]
    assert not any(stops[:-1])
    assert stops[-1] == (done.finish_reason == "stop")
  for done in driver.list("never"):
    # It goes on behind the end of the turn, which the model's files name.
    former = greedy[done.key].ids
    assert (len(done.ids), done.finish_reason) == (60, "length")
    assert done.ids[: len(former)] == former[:60]
  for done in driver.list("sooner"):
    former = greedy[done.key].ids
    assert done.finish_reason == "stop"
    assert done.ids == former[: former.index(198) + 1]


def test_no_tokens_are_made_where_none_are_asked_for(driver, asked, greedy):
  empty = {r.key: Completion(r.key, (), "length") for r in asked[:2]}
  third = asked[2].key
  assert driver["none"] == empty | {third: greedy[third]}


def test_a_completion_ends_where_the_context_does(driver):
  (done,) = driver.list("long")
  assert (len(done.ids), done.finish_reason) == (24, "length")
  long = Request("long", [5] * 1000, 0, 500)
  assert [done] == list(serving.embedded().generate([long], NEVER))


def test_an_iterator_that_is_closed_gave_whole_completions(driver):
  some = driver["closed early"]
  assert len(some) == 3
  assert some == {key: driver["warm"][key] for key in some}


def test_requests_that_cannot_be_met_are_refused(driver, asked):
  for says in bad(asked):
    told = driver.made[says]["error"]
    assert says in told
    assert "\n" not in told


def test_it_needs_no_jax(driver):
  assert not {"jax", "jaxlib", "flax"} & set(driver.made["modules"])


def test_its_process_works_on_unhindered(driver):
  # Prompts are encoded on all cores, and what vLLM has loaded is no garbage.
  assert "VLLM_LOGGING_LEVEL" in driver.made["environment"]
  assert "TOKENIZERS_PARALLELISM" not in driver.made["environment"]
  assert driver.made["frozen"] > 100_000


def test_an_adapter_is_applied_unmerged_and_a_kill_leaves_nothing(
  greedy, tmp_path
):
  asked = serving.requests(64, limits=(48,))
  adapter = serving.save_adapter(tmp_path / "adapter", rank=16)
  expected = by_key(serving.embedded(adapter).generate(asked, GREEDY))
  changed = sum(
    expected[key].ids != base.ids[:48] for key, base in greedy.items()
  )
  assert changed > 0.9 * len(asked)
  many = [
    dataclasses.replace(r, key=f"{r.key}-{n}", max_new_tokens=600)
    for n in range(8)
    for r in asked
  ]
  made = Driver(
    tmp_path,
    [[job("adapted", asked, GREEDY)]],
    adapter,
    spec=SPEC | {"data_parallel": 2},
    then=job("on and on", many, NEVER),
  )
  try:
    found = made["adapted"]
    # Adapted and merged weights round differently, in the last bits.
    equal = sum(found[key] == expected[key] for key in expected)
    assert equal >= 0.95 * len(asked)

    # It is generating now. Killed, it can't tidy up, and nothing stays.
    started = below(made.process.pid)
    names = " ".join(title(pid) for pid in started)
    # The copies' coordinator would go on for ever: nobody ends it.
    for name in ("EngineCore_DP0", "EngineCore_DP1", "DPCoordinator"):
      assert name in names
    os.kill(made.process.pid, signal.SIGKILL)
    left = still_there(started, seconds=15)
    for pid in left:
      os.kill(pid, signal.SIGKILL)
    assert not left
  finally:
    made.end()


def test_logits_that_are_no_numbers_end_it_in_one_line(tmp_path, asked):
  # A folder's bfloat16 is read by torch, which not every machine has.
  from safetensors.torch import load_file, save_file

  # Finite weights, whose products no float32 holds.
  folder = tmp_path / "model"
  shutil.copytree(serving.STUDENT, folder)
  (file,) = folder.glob("*.safetensors")
  tensors = load_file(file)
  tensors["model.norm.weight"] = tensors["model.norm.weight"] * 0 + 3e38
  save_file(tensors, file, {"format": "pt"})
  model = {
    "name": "the-model",
    "folder": str(folder),
    "revision": "0",
    "dtype": "float32",
    "adapter": None,
  }
  made = Driver(tmp_path, [[job("it", asked[:4], WARM)]], model=model)
  try:
    told = made.made["it"]["error"]
    assert "the-model: its logits in float32 are no numbers" in told
    assert "NaNs detected in logits" in told
    assert str(folder) in told
    assert "\n" not in told
  finally:
    made.end()


@pytest.mark.parametrize(
  ("sampling", "says"),
  [
    (dataclasses.replace(WARM, temperature=0.001), "temperature=0.001 is none"),
    (dataclasses.replace(WARM, temperature=2.5), "temperature=2.5 is none"),
    (dataclasses.replace(WARM, top_logprobs=417), "417 is more than the 416"),
  ],
)
def test_what_vllm_would_not_do_as_asked_is_refused(sampling, says):
  engine = VllmEngine.__new__(VllmEngine)
  engine._rows = serving.HEAD_ROWS
  with pytest.raises(UserError, match=says):
    engine.generate([], sampling)


@pytest.mark.parametrize(("rank", "room"), [(1, 8), (9, 16), (257, 320)])
def test_adapters_get_room_that_vllm_has(rank, room):
  assert vllm_engine._lora_rank(rank) == room


def test_adapters_that_vllm_has_no_room_for_are_refused():
  with pytest.raises(UserError, match=r"rank 513.*up to rank 512"):
    vllm_engine._lora_rank(513)


def test_less_room_than_is_asked_for_is_refused_before_anything_loads():
  spec = Spec(max_model_tokens=599)
  with pytest.raises(UserError, match=r"max_model_tokens=599 and 600 are need"):
    VllmEngine(spec, serving.files(), max_model_tokens=600)
  # The model ends before both.
  spec = Spec(max_model_tokens=serving.POSITIONS - 1)
  with pytest.raises(UserError, match=f"and {serving.POSITIONS} are needed"):
    VllmEngine(spec, serving.files(), max_model_tokens=5000)


# The last of the driver's: it ends here.
def test_a_closed_engine_leaves_no_process(driver):
  started = below(driver.process.pid)
  # A copy of the model is one process, which has imported vLLM once.
  names = " ".join(title(pid) for pid in started)
  assert "EngineCore" in names
  assert "Worker" not in names
  driver.process.stdin.close()
  assert driver.process.wait(60) == 0
  assert not still_there(started, seconds=15)


@pytest.mark.parametrize(
  ("flag", "says"),
  [
    ("--config.engine.name=vllm", "can't import vllm"),
    ("--config.engine.ray.actors=1", "can't import ray"),
  ],
)
def test_what_is_not_installed_is_named_in_one_line(tmp_path, flag, says):
  package = says.split()[-1]
  if importlib.util.find_spec(package):
    pytest.skip(f"{package} is installed here")
  command = [sys.executable, "-m", "trd_jax.rollout"]
  command += ["--config=configs/demo.py", f"--workdir={tmp_path / 'run'}"]
  command += ["--config.data.arithmetic.num_problems=8", flag]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 2
  last = done.stderr.splitlines()[-1]
  assert last.startswith("trd-jax rollout: engine.")
  assert says in last
  assert "Traceback" not in done.stderr
  # Before anything is counted, which may take minutes.
  assert "preflight" not in done.stdout + done.stderr
  # The place is as free as it was.
  assert not (tmp_path / "run" / "config.json").exists()
  assert not list(tmp_path.rglob("*.parquet"))
