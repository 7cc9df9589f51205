import collections
import dataclasses
import gc
import logging
import subprocess
import sys
import threading
import time

import pytest

from tests.support import serving
from tests.support.serving import FakeServer, by_key, card
from trd_jax.experiment.engines import ServerEngine as Spec
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.schema import Engine
from trd_jax.generation.engines import factory, server_client, server_run
from trd_jax.generation.engines.engine import Request
from trd_jax.generation.engines.server_engine import ServerEngine

pytestmark = pytest.mark.slow

GREEDY = serving.sampling()
WARM = serving.sampling(1.0, top_p=0.95, top_k=20)
COUNT = 24


@pytest.fixture(scope="module")
def asked():
  return serving.requests(COUNT)


@pytest.fixture(scope="module")
def greedy(asked):
  return by_key(serving.embedded().generate(asked, GREEDY))


@pytest.fixture(scope="module")
def warm(asked):
  return by_key(serving.embedded().generate(asked, WARM))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  """The same rules with shorter pauses, and nothing left behind."""
  for name in ("_FIRST_PAUSE", "_FIRST_PROBE"):
    monkeypatch.setattr(server_run, name, 0.05)
  monkeypatch.delenv("VLLM_API_KEY", raising=False)
  yield
  assert not [t for t in threading.enumerate() if t.name == "servers"]
  gc.collect()  # What a loop or a socket has to say, it says here.


def engine(*servers, model=None, max_model_tokens=600, **fields):
  urls = tuple(getattr(server, "url", server) for server in servers)
  known = {"concurrency": 4, "start_seconds": 10.0}
  return ServerEngine(
    Spec(urls=urls, **known | fields),
    model or serving.files(),
    max_model_tokens=max_model_tokens,
  )


def test_greedy_completions_equal_the_embedded_engine_s(asked, greedy):
  with FakeServer() as one, FakeServer() as two:
    made = engine(one, two.url + "/v1/")
    assert by_key(made.generate(asked, GREEDY)) == greedy
    # And again: nothing of a run is left in the engine.
    assert by_key(made.generate(asked[:3], GREEDY)) == {
      r.key: greedy[r.key] for r in asked[:3]
    }
    assert one.bodies
    assert two.bodies
    assert max(one.most, two.most) <= 4
  assert {c.finish_reason for c in greedy.values()} == {"stop", "length"}


def test_servers_that_draft_are_asked_for_the_same_and_for_their_counts(asked):
  few = [dataclasses.replace(r, max_new_tokens=9) for r in asked]
  # With 20 ids the model's own choice is nearly always out.
  narrow = dataclasses.replace(GREEDY, vocab_size=20, stop_ids=())
  expected = by_key(serving.embedded().generate(few, narrow))
  with FakeServer(drafts=True) as one, FakeServer() as two:
    made = engine(one, two)
    assert made.drafted() == (0, 0, 0)
    assert by_key(made.generate(few, narrow)) == expected
    done = len(one.bodies)
    assert 0 < done < len(few)
    assert made.drafted() == (done, 3 * done, 2 * done)
    assert engine(two).drafted() is None


def test_seeded_draws_equal_the_embedded_engine_s(asked, warm, greedy):
  with FakeServer() as server:
    assert by_key(engine(server).generate(asked, WARM)) == warm
  assert warm != greedy


def test_the_longest_prompts_go_first_and_equal_ones_together(asked):
  twice = [r for r in asked for r in (r, dataclasses.replace(r, key=r.key * 2))]
  with FakeServer() as server:
    by_key(engine(server, concurrency=1).generate(twice, GREEDY))
  prompts = [sent["prompt"] for sent in server.bodies]
  assert [len(p) for p in prompts] == sorted(map(len, prompts), reverse=True)
  assert all(prompts[n] == prompts[n + 1] for n in range(0, len(prompts), 2))


@pytest.mark.parametrize("how", ["drop", "busy", "broken", "abort"])
def test_a_failed_try_is_made_again_with_the_same_seed(asked, warm, how):
  with FakeServer(lambda number, _: how if number % 5 == 1 else None) as server:
    found = by_key(engine(server).generate(asked, WARM))
    assert found == warm
  tries = collections.Counter(sent["seed"] for sent in server.bodies)
  assert set(tries) == {r.seed for r in asked}
  assert sum(tries.values()) > COUNT


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(asked, greedy):
  moments = []

  def busy_once(number, _):
    moments.append(time.monotonic())
    return "busy" if number == 1 else None

  with FakeServer(busy_once) as server:
    made = engine(server, concurrency=1)
    found = by_key(made.generate(asked[:3], GREEDY))
  assert found == {r.key: greedy[r.key] for r in asked[:3]}
  assert moments[1] - moments[0] >= 1.0


def test_to_be_refused_by_a_busy_server_is_no_failure(asked, greedy):
  with FakeServer(lambda number, _: "busy" if number < 3 else None) as server:
    made = engine(server, concurrency=1, retries=0)
    (found,) = made.generate(asked[:1], GREEDY)
  assert found == greedy[found.key]


def test_servers_that_are_always_busy_end_the_run(asked):
  with FakeServer(lambda *_: "busy") as server:
    made = engine(server, request_seconds=0.5)
    with pytest.raises(UserError, match=r"completed for 0\.5 s.* is busy") as e:
      by_key(made.generate(asked[:2], GREEDY))
  assert "429: too much to do" in str(e.value)
  assert "the same command goes on" in str(e.value)


def test_a_request_given_to_a_server_that_falls_silent_just_then_is_not_lost(
  asked, greedy, monkeypatch
):
  """Its task is there and hasn't come to its first step."""
  freest, calls = server_run.Run._freest, []

  def silent_at_once(self, *args):
    found = freest(self, *args)
    calls.append(found)
    if len(calls) == 2:
      assert calls[0].in_flight == 1
      self._give_up(calls[0], "no sign of life")
      return None
    return found

  monkeypatch.setattr(server_run.Run, "_freest", silent_at_once)
  with FakeServer() as server:
    made = engine(server, concurrency=4)
    assert by_key(made.generate(asked[:3], GREEDY)) == {
      r.key: greedy[r.key] for r in asked[:3]
    }
    assert {s.in_flight for s in made._servers} == {0}


def test_a_silent_server_loses_what_it_was_given(
  asked, greedy, monkeypatch, caplog
):
  monkeypatch.setattr(server_run, "_WATCH_SECONDS", 0.05)
  silent, checked = threading.Event(), server_client.Server.health

  def hold(number, body):
    silent.set()
    time.sleep(30)

  async def health(self, *args):
    if self.url == one.url and silent.is_set():
      return "no answer"
    return await checked(self, *args)

  monkeypatch.setattr(server_client.Server, "health", health)
  with FakeServer(hold) as one, FakeServer() as two:
    made = engine(one, two)
    assert by_key(made.generate(asked, GREEDY)) == greedy
  assert any("no sign of life" in r.message for r in caplog.records)


def test_a_server_that_dies_is_set_aside_and_loses_nothing(asked, warm, caplog):
  with (
    FakeServer(lambda number, _: "die" if number == 6 else None) as one,
    FakeServer() as two,
  ):
    assert by_key(engine(one, two).generate(asked, WARM)) == warm
    told = [r.message for r in caplog.records if "set aside" in r.message]
    assert len(told) == 1
    assert one.url in told[0]


def test_a_server_that_comes_back_is_taken_back(asked, greedy, caplog):
  with FakeServer(lambda number, _: "die" if number == 9 else None) as first:
    made = engine(first)
    stream = made.generate(asked, GREEDY)
    found = [next(stream)]
    # It is dead for a while before another takes its place.
    first.dead.wait(60)
    time.sleep(0.3)
    with FakeServer(port=first.server_address[1]) as second:
      found += stream
    assert second.bodies
  assert by_key(found) == greedy
  assert any("taken back" in r.message for r in caplog.records)


def test_where_no_server_is_left_the_error_says_so(asked):
  with FakeServer(lambda number, _: "die" if number == 3 else None) as server:
    made = engine(server)
    made._spec = dataclasses.replace(made._spec, start_seconds=0.5)
    with pytest.raises(UserError, match="no server has been ready") as e:
      by_key(made.generate(asked, GREEDY))
    assert server.url in str(e.value)
    assert "the same command goes on where it stopped" in str(e.value)


def test_a_server_that_only_fails_is_set_aside(asked, greedy, caplog):
  with FakeServer(lambda *_: "broken") as one, FakeServer() as two:
    made = engine(one, two, retries=20)
    assert by_key(made.generate(asked, GREEDY)) == greedy
  assert any(
    one.url in r.message and "8 failures in a row" in r.message
    for r in caplog.records
  )


def test_tries_are_bounded(asked):
  with FakeServer(lambda *_: "broken") as server:
    made = engine(server, retries=2)
    with pytest.raises(UserError, match=r"failed 3 times.*500: out of memory"):
      by_key(made.generate(asked[:1], GREEDY))
    assert len(server.bodies) == 3


def test_the_free_server_gets_the_load(asked, greedy):
  done = threading.Event()

  def slow(number, body):
    done.wait(60)

  def quick(number, body):
    if number == COUNT - 2:
      done.set()

  with FakeServer(slow) as one, FakeServer(quick) as two:
    made = engine(one, two, concurrency=2)
    assert by_key(made.generate(asked, GREEDY)) == greedy
    assert (len(one.bodies), len(two.bodies)) == (2, COUNT - 2)
  with FakeServer() as one, FakeServer() as two:
    by_key(engine(one, two, concurrency=4).generate(asked[:4], GREEDY))
    assert (len(one.bodies), len(two.bodies)) == (2, 2)


def test_a_reader_that_leaves_gives_up_what_is_in_flight(asked):
  done = threading.Event()

  def hold(number, body):
    if number > 1:
      done.wait(60)

  with FakeServer(hold) as server:
    stream = engine(server, concurrency=2).generate(asked, GREEDY)
    next(stream)
    while server.now < 2:
      time.sleep(0.01)
    stream.close()
    # The server is still at it, and nobody has waited for that.
    assert server.now == 2
    done.set()
    assert len(server.bodies) == 3


def test_a_slow_reader_is_not_buried(asked):
  with FakeServer() as server:
    stream = engine(server, concurrency=2).generate(asked, GREEDY)
    next(stream)
    time.sleep(2.0)
    # Twice what may be in flight is read ahead, and what was in flight then.
    assert len(server.bodies) <= 1 + 4 + 2
    assert len(list(stream)) == COUNT - 1


def test_a_server_that_is_loading_is_waited_for(asked, greedy, caplog):
  with FakeServer(loads_after=3.0) as server:
    made = engine(server)
    assert by_key(made.generate(asked[:2], GREEDY)) == {
      r.key: greedy[r.key] for r in asked[:2]
    }
  assert any(f"waiting for {server.url} (" in r.message for r in caplog.records)


def test_servers_of_other_models_are_left_out(asked, greedy):
  other = card(id="lab/teacher", root="/models/teacher")
  with FakeServer(cards=[other]) as one, FakeServer() as two:
    made = engine(one, two)
    assert by_key(made.generate(asked[:2], GREEDY)) == {
      r.key: greedy[r.key] for r in asked[:2]
    }
    assert not one.bodies
    with pytest.raises(UserError, match=r"serves lab/teacher.*launch/serve.sh"):
      engine(one)
    # Unless the config says that it is the one.
    by_name = ServerEngine(
      Spec(urls=(one.url,), model="lab/teacher"),
      serving.files(),
      max_model_tokens=600,
    )
    by_key(by_name.generate(asked[:1], GREEDY))
    assert one.bodies[0]["model"] == "lab/teacher"
    with pytest.raises(UserError, match='no server serves "lab/theacher"'):
      ServerEngine(
        Spec(urls=(one.url,), model="lab/theacher"),
        serving.files(),
        max_model_tokens=600,
      )


@pytest.mark.parametrize("known", ["lab:student", "0123"])
def test_the_model_is_found_by_its_name_and_revision(asked, known):
  with FakeServer(cards=[card(id=known, root="elsewhere")]) as server:
    by_key(engine(server).generate(asked[:1], GREEDY))
    assert server.bodies[0]["model"] == known


def test_an_adapter_is_loaded_once_and_applied(asked, greedy, tmp_path):
  adapter = serving.save_adapter(tmp_path / "one")
  expected = by_key(serving.embedded(adapter).generate(asked, GREEDY))
  assert expected != greedy
  with FakeServer() as server:
    model = serving.files(adapter)
    for _ in range(2):
      made = engine(server, model=model)
      assert by_key(made.generate(asked, GREEDY)) == expected
    assert server.adapters == {"trd-0123+one": adapter.resolve()}
    assert server.others == ["/v1/load_lora_adapter"]


def test_an_adapter_that_the_server_was_started_with_is_used(asked, tmp_path):
  adapter = serving.save_adapter(tmp_path / "one")
  mine = card(id="mine", root=str(adapter), parent=str(serving.STUDENT))
  # One under a name of ours is of weights that lay there before.
  former = mine | {"id": "trd-0123+former"}
  with FakeServer(cards=[card(), former, mine], lora=False) as server:
    server.adapters = {"mine": adapter}
    made = engine(server, model=serving.files(adapter))
    by_key(made.generate(asked[:1], GREEDY))
    assert server.bodies[0]["model"] == "mine"
    server.cards.pop()
    with pytest.raises(UserError, match=r"launch/serve.sh --lora=RANK"):
      engine(server, model=serving.files(adapter))


def test_a_server_that_comes_back_gets_the_adapter_again(asked, tmp_path):
  adapter = serving.save_adapter(tmp_path / "one")
  expected = by_key(serving.embedded(adapter).generate(asked, GREEDY))

  def forget(number, _):
    if number == 5:
      server.forget()

  with FakeServer(forget) as server:
    made = engine(server, model=serving.files(adapter))
    assert by_key(made.generate(asked, GREEDY)) == expected
    assert len(server.others) == 2


def test_a_server_without_token_ids_is_refused_in_one_line(asked):
  with FakeServer(lambda *_: "text") as server:
    with pytest.raises(UserError, match="returns no token ids") as error:
      by_key(engine(server).generate(asked, GREEDY))
    assert "\n" not in str(error.value)


def test_a_reply_that_never_ends_is_given_up(asked, greedy, monkeypatch):
  monkeypatch.setattr(server_client, "_CONNECT_SECONDS", 0.1)
  with FakeServer(lambda number, _: "drip" if number == 1 else None) as server:
    made = engine(server, concurrency=1, request_seconds=0.5)
    began = time.monotonic()
    (found,) = made.generate(asked[:1], GREEDY)
  assert found == greedy[found.key]
  assert time.monotonic() - began < 30
  assert len(server.bodies) == 2


def test_a_server_asks_for_no_longer_pause_than_a_request_may_take(
  asked, greedy
):
  for pause in ("86400", "9" * 5000, "Fri, 01 Jan 2100 00:00:00 GMT"):
    with FakeServer(
      lambda number, _, pause=pause: f"busy{pause}" if number == 1 else None
    ) as server:
      made = engine(server, concurrency=1, request_seconds=2.0)
      (found,) = made.generate(asked[:1], GREEDY)
    assert found == greedy[found.key]


@pytest.mark.parametrize(
  "cards",
  [
    [[]],
    [{}],
    [None],
    ["name"],
    [{"id": ["a"]}],
    [{"id": None}],
    {"id": "a"},
    7,
    None,
  ],
)
def test_a_list_of_models_of_any_shape_is_one_line(asked, cards):
  with FakeServer(cards=[]) as server:
    server.cards = cards
    with pytest.raises(UserError, match="has no list of models") as error:
      by_key(engine(server).generate(asked[:1], GREEDY))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "odd", [{"root": ["a"]}, {"parent": {}}, {"max_model_len": "long"}]
)
def test_odd_fields_of_another_model_are_no_matter(asked, greedy, odd):
  other = serving.card(id="other\x1b[31m", root="elsewhere") | odd
  with FakeServer(cards=[other, serving.card()]) as server:
    (found,) = engine(server).generate(asked[:1], GREEDY)
  assert found == greedy[found.key]


def test_a_refused_request_ends_the_run_with_what_the_server_says(asked):
  with (
    FakeServer(lambda *_: "refuse: top_p is odd") as server,
    pytest.raises(UserError, match="refuse: top_p is odd"),
  ):
    by_key(engine(server).generate(asked, GREEDY))
  said = "refuse: sample logprobs of 64, which is greater than max allowed: 20"
  many = dataclasses.replace(GREEDY, top_logprobs=64)
  with (
    FakeServer(lambda *_: said) as server,
    pytest.raises(UserError, match="--max-logprobs 64"),
  ):
    by_key(engine(server).generate(asked, many))


def test_the_api_key_is_sent_and_never_shown(asked, monkeypatch, caplog):
  caplog.set_level(logging.DEBUG)
  with FakeServer(key="s3cret") as server:
    with pytest.raises(UserError, match="TRD_TEST_KEY is not set"):
      engine(server, api_key_variable="TRD_TEST_KEY")
    monkeypatch.setenv("TRD_TEST_KEY", "s3cret")
    made = engine(server, api_key_variable="TRD_TEST_KEY")
    assert len(by_key(made.generate(asked[:2], GREEDY))) == 2
    server.misbehave = lambda *_: "refuse the key s3cret"
    with pytest.raises(UserError, match=r"refuse the key \*\*\*") as refused:
      by_key(made.generate(asked[:2], GREEDY))
    monkeypatch.setenv("TRD_TEST_KEY", "wr0ng")
    with pytest.raises(UserError, match="TRD_TEST_KEY holds another") as wrong:
      engine(server, api_key_variable="TRD_TEST_KEY")
    monkeypatch.setenv("TRD_TEST_KEY", "wr\n0ng")
    with pytest.raises(UserError, match="TRD_TEST_KEY holds char") as odd:
      engine(server, api_key_variable="TRD_TEST_KEY")
  said = caplog.text + "".join(str(e.value) for e in (refused, wrong, odd))
  assert "s3cret" not in said
  assert "0ng" not in said


def test_a_proxy_of_the_environment_is_not_asked_for_loopback(
  asked, monkeypatch
):
  for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
    monkeypatch.setenv(name, "http://127.0.0.1:9")
  for name in ("no_proxy", "NO_PROXY"):
    monkeypatch.delenv(name, raising=False)
  with FakeServer() as server:
    assert len(by_key(engine(server).generate(asked[:2], GREEDY))) == 2


def test_too_short_a_context_is_refused():
  with (
    FakeServer(cards=[card(max_model_len=512)]) as server,
    pytest.raises(UserError, match="--max-model-len 600"),
  ):
    engine(server)
  # More than the model has needs no more than the model has.
  with FakeServer() as server:
    engine(server, max_model_tokens=5000)


def test_a_config_may_leave_the_context_to_its_architecture():
  config = {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 416}
  wanted = server_client.Wanted.of(serving.files(), config, None, 50_000)
  assert (wanted.positions, wanted.context) == (32_768, 32_768)


def test_a_completion_ends_where_the_context_does(asked):
  long = Request("long", [5] * 500, 0, 10_000)
  with FakeServer(cards=[card(max_model_len=520)]) as server:
    made = engine(server, max_model_tokens=510)
    (done,) = made.generate([long], dataclasses.replace(GREEDY, stop_ids=()))
    assert len(done.ids) == 20
    assert done.finish_reason == "length"
    with pytest.raises(UserError, match="context of 520"):
      made.generate([dataclasses.replace(long, prompt_ids=[5] * 520)], GREEDY)


@pytest.mark.parametrize(
  ("wrong", "says"),
  [
    (Request("k", [], 0, 5), "k: the prompt is empty"),
    (Request("k", [416], 0, 5), "k: token id 416"),
    (Request("k", [1], 0, -1), "max_new_tokens=-1"),
  ],
)
def test_bad_requests_are_refused_before_anything_is_sent(asked, wrong, says):
  with FakeServer() as server:
    with pytest.raises(UserError, match=says):
      engine(server).generate([*asked, wrong], GREEDY)
    assert not server.bodies


def test_nothing_to_generate_asks_nobody():
  with FakeServer() as server:
    made = engine(server)
    assert list(made.generate([], GREEDY)) == []
    (done,) = made.generate([Request("k", [1], 0, 0)], GREEDY)
    assert (done.ids, done.finish_reason) == ((), "length")
    assert not server.bodies


@pytest.mark.parametrize(
  ("url", "says"),
  [
    ("127.0.0.1:8000", "is no base address"),
    ("http://user:pw@127.0.0.1:8000", "api_key_variable"),
    ("http://127.0.0.1:8000/v1?x=1", "is no base address"),
  ],
)
def test_odd_addresses_are_refused(url, says):
  with pytest.raises(UserError, match=says) as error:
    engine(url)
  assert "pw" not in str(error.value)


def test_where_nothing_answers_the_error_names_the_address():
  with FakeServer() as server:
    gone = server.url
  with pytest.raises(UserError, match=rf"{gone} \(.*launch/serve.sh"):
    engine(gone, start_seconds=0.3)


def test_a_late_server_is_gone_on_without(asked, greedy, caplog):
  with FakeServer() as gone:
    pass
  with FakeServer() as server:
    made = engine(server, gone.url, start_seconds=0.5)
    assert by_key(made.generate(asked, GREEDY)) == greedy
  assert any(f"without {gone.url}" in r.message for r in caplog.records)


def test_an_experiment_s_engine_is_made_with_servers(asked, greedy):
  with FakeServer() as server:
    spec = Engine(name="server", server=Spec(urls=(server.url,)))
    made = factory.make(spec, serving.files(), max_model_tokens=600)
    assert by_key(made.generate(asked, GREEDY)) == greedy


def test_more_than_a_server_takes_is_refused_at_once(asked):
  with FakeServer() as server:
    made = engine(server)
    made._wanted = dataclasses.replace(made._wanted, head_rows=5000)
    with pytest.raises(UserError, match="4601 more rows"):
      made.generate(asked, GREEDY)
    made._wanted = dataclasses.replace(made._wanted, head_rows=416)
    many = dataclasses.replace(GREEDY, stop_ids=tuple(range(200)))
    with pytest.raises(UserError, match="stop ids are more"):
      made.generate(asked, many)


def test_the_engine_needs_neither_jax_nor_vllm():
  code = (
    "import sys; import trd_jax.generation.engines.server_engine;"
    "raise SystemExit(bool({'jax', 'vllm', 'torch'} & set(sys.modules)))"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
