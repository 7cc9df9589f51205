"""The server engine against `vllm serve`, two of them on this machine."""

import dataclasses
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.support import serving
from tests.support.engine_env import ROOT, vllm_python
from tests.support.serving import by_key
from trd_jax.experiment.engines import ServerEngine as Spec
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import Trajectory
from trd_jax.experiment.run_dir import RunDir
from trd_jax.generation.engines.engine import Request
from trd_jax.generation.engines.server_engine import ServerEngine
from trd_jax.model.weights import hub

pytestmark = pytest.mark.vllm

KEY = "a-key-of-the-tests"
GREEDY = serving.sampling()
WARM = serving.sampling(1.0, top_p=0.95, top_k=20)
SCRIPT = ROOT / "launch" / "serve.sh"


def free_ports(count: int) -> int:
  """The first of so many free ports in a row."""
  for first in range(18_000, 32_000, count):
    with socket.socket() as one, socket.socket() as two:
      try:
        one.bind(("127.0.0.1", first))
        two.bind(("127.0.0.1", first + 1))
      except OSError:
        continue
      return first
  raise AssertionError("no port is free")


def processes():
  """Every process: its id, its group's, and the words it was called with."""
  for folder in os.listdir("/proc"):
    if folder.isdigit():
      try:
        with open(f"/proc/{folder}/cmdline", "rb") as file:
          words = file.read().split(b"\0")
        yield int(folder), os.getpgid(int(folder)), words
      except OSError:  # It has ended.
        continue


def server_of(port: int) -> int:
  """The process that serves on a port; it leads a group of its own."""
  (server,) = [
    pid
    for pid, group, words in processes()
    if pid == group and {b"serve", str(port).encode()} <= set(words)
  ]
  return server


def members(group: int) -> list[int]:
  """The processes of a group that have not ended."""
  return [pid for pid, its, words in processes() if its == group and words[0]]


@pytest.fixture(scope="module")
def urls():
  """Two servers of the student in float32, that take adapters."""
  environment = os.environ | {
    "TRD_VLLM_PYTHON": str(vllm_python()),
    "VLLM_API_KEY": KEY,
    "HF_HUB_OFFLINE": "1",
  }
  # These are for the JAX of the tests.
  for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
    environment.pop(name, None)
  port = free_ports(2)
  command = [SCRIPT, "lab:student", "--servers", "2", f"--port={port}"]
  command += ["--lora", "8", "--", "--dtype", "float32", "--enforce-eager"]
  command += ["--max-logprobs", "300"]
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, text=True, env=environment
  ) as script:
    try:
      assert script.stdout is not None
      readable, _, _ = select.select([script.stdout], [], [], 400)
      line = script.stdout.readline() if readable else ""
      found = re.search(r"--config\.engine\.server\.urls=(\S+)", line)
      assert found, f"no servers: {line!r}"
      groups = [server_of(port), server_of(port + 1)]
      # A server's own processes are in its group.
      assert all(len(members(group)) > 1 for group in groups)
      yield found[1].split(",")
    finally:
      script.send_signal(signal.SIGTERM)
      script.wait(60)
  # Everything that it started has ended with it.
  assert not [pid for group in groups for pid in members(group)]


@pytest.fixture(autouse=True)
def _key(monkeypatch):
  monkeypatch.setenv("VLLM_API_KEY", KEY)


@pytest.fixture(scope="module")
def asked():
  return serving.requests(64, limits=(128,))


@pytest.fixture(scope="module")
def greedy(asked):
  return by_key(serving.embedded().generate(asked, GREEDY))


def engine(urls, model=None, **fields):
  known = {"concurrency": 16, "start_seconds": 120.0}
  return ServerEngine(
    Spec(urls=tuple(urls), **known | fields),
    model or serving.files(),
    max_model_tokens=600,
  )


def test_greedy_ids_equal_the_embedded_engine_s(urls, asked, greedy):
  assert by_key(engine(urls).generate(asked, GREEDY)) == greedy
  # The prompt, the ids and the end of a turn survive the way there and back.
  assert {c.finish_reason for c in greedy.values()} == {"stop"}
  stop_ids = {c.ids[-1] for c in greedy.values()}
  assert stop_ids == set(GREEDY.stop_ids)


def test_a_seed_draws_the_same_in_any_company(urls, asked):
  made = engine(urls)
  first = by_key(made.generate(asked, WARM))
  alone = by_key(made.generate(asked[::-7], WARM))
  assert all(alone[key].ids == first[key].ids for key in alone)
  others = [dataclasses.replace(r, seed=r.seed + 1) for r in asked]
  assert by_key(made.generate(others, WARM)) != first


def test_seed_minus_one_is_a_seed(urls, asked):
  made = engine(urls)
  hot = dataclasses.replace(WARM, temperature=2.0, top_p=1.0, top_k=-1)
  once = [
    dataclasses.replace(r, seed=seed, key=f"{r.key}/{seed}")
    for r in asked[:8]
    for seed in (-1, -(2**63), 2**63 - 1)
  ]
  first = by_key(made.generate(once, hot))
  assert by_key(made.generate(once, hot)) == first
  assert len({c.ids for c in first.values()}) == len(once)


def test_it_ends_at_the_stop_ids_that_are_asked_for_alone(urls, asked, greedy):
  made = engine(urls)
  never = dataclasses.replace(GREEDY, stop_ids=())
  short = [dataclasses.replace(r, max_new_tokens=60) for r in asked[:8]]
  for done in made.generate(short, never):
    # It goes on behind the end of the turn, which the model's files name.
    assert len(done.ids) == 60
    assert done.finish_reason == "length"
    former = greedy[done.key].ids
    assert done.ids[: len(former)] == former[:60]
  # Another one ends it, the first of it.
  line = 198
  sooner = dataclasses.replace(GREEDY, stop_ids=(line,))
  for done in made.generate(short, sooner):
    former = greedy[done.key].ids
    assert done.ids == former[: former.index(line) + 1]
    assert done.finish_reason == "stop"


def test_ids_beyond_the_tokenizer_are_never_drawn(urls):
  made = engine(urls)
  # With a vocabulary of 20 ids the model's own choice is nearly always out.
  few = serving.sampling(0.0, vocab_size=20, stop_ids=())
  asked = serving.requests(8, limits=(20,))
  expected = by_key(serving.embedded().generate(asked, few))
  assert by_key(made.generate(asked, few)) == expected
  hot = dataclasses.replace(few, temperature=2.0)
  drawn = {i for c in made.generate(asked, hot) for i in c.ids}
  assert max(drawn) < 20
  assert len(drawn) > 10


def test_the_likeliest_tokens_are_the_model_s_own(urls, asked):
  K = 12
  how = dataclasses.replace(WARM, temperature=2.0, top_logprobs=K)
  few = asked[:6]
  found = by_key(engine(urls).generate(few, how))
  for request in few:
    serving.check_likeliest(request, found[request.key], K)


def test_more_likeliest_tokens_than_the_server_gives_are_refused(urls, asked):
  how = dataclasses.replace(GREEDY, top_logprobs=301)
  with pytest.raises(UserError, match="--max-logprobs 301"):
    list(engine(urls).generate(asked[:1], how))


def test_more_likeliest_tokens_than_there_are_are_refused(urls, asked):
  how = dataclasses.replace(GREEDY, top_logprobs=1025)
  with pytest.raises(UserError, match="1025 is more than the 416 tokens"):
    engine(urls).generate(asked[:1], how)


def test_a_wrong_key_is_refused_without_showing_it(urls, monkeypatch):
  monkeypatch.setenv("VLLM_API_KEY", "an0ther")
  with pytest.raises(UserError, match="VLLM_API_KEY holds another") as error:
    engine(urls)
  assert "an0ther" not in str(error.value)


def test_a_completion_ends_where_the_context_does(urls):
  long = Request("long", [5] * 1000, 0, 500)
  never = dataclasses.replace(GREEDY, stop_ids=())
  (done,) = engine(urls).generate([long], never)
  assert (len(done.ids), done.finish_reason) == (24, "length")
  assert [done] == list(serving.embedded().generate([long], never))


def test_an_adapter_is_loaded_and_applied(urls, asked, greedy, tmp_path):
  adapter = serving.save_adapter(tmp_path / "adapter")
  expected = by_key(serving.embedded(adapter).generate(asked, GREEDY))
  changed = sum(expected[key].ids != greedy[key].ids for key in greedy)
  assert changed > 0.9 * len(asked)
  for _ in range(2):  # The second time it is there.
    made = engine(urls, serving.files(adapter))
    found = by_key(made.generate(asked, GREEDY))
    # Adapted and merged weights round differently, in the last bits.
    equal = sum(found[key] == expected[key] for key in expected)
    assert equal >= 0.95 * len(asked)
  # And the base is as it was.
  assert by_key(engine(urls).generate(asked[:8], GREEDY)) == {
    r.key: greedy[r.key] for r in asked[:8]
  }


def test_an_adapter_that_is_too_large_is_refused(urls, tmp_path):
  adapter = serving.save_adapter(tmp_path / "large", rank=16)
  with pytest.raises(UserError, match="--max-lora-rank"):
    engine(urls, serving.files(adapter))


def test_the_stages_that_generate_run_on_servers(urls, tmp_path):
  run_dir = RunDir(tmp_path / "run")
  flags = [
    "--config=configs/demo.py",
    f"--workdir={run_dir.root}",
    "--config.data.arithmetic.num_problems=24",
    "--config.refine.teacher_top_k=3",
    "--config.evaluate.benchmarks=arithmetic",
    "--config.evaluate.num_problems=8",
    "--config.evaluate.k=2",
    "--config.engine.name=server",
    f"--config.engine.server.urls={','.join(urls)}",
    "--config.engine.server.concurrency=8",
  ]
  wanted = {"rollout": 24, "refine": 24, "evaluate": 16}
  for stage, samples in wanted.items():
    base = ["--model=base"] if stage == "evaluate" else []
    done = subprocess.run(
      [sys.executable, "-m", f"trd_jax.{stage}", *flags, *base],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    name = "evaluate/base" if base else stage
    keys = [
      key
      for path in run_dir.stage(name).glob("shard-*.parquet")
      for key in pq.read_table(path, columns=["key"])["key"].to_pylist()
    ]
    assert len(keys) == len(set(keys)) == samples
    assert run_dir.done(name) is not None
  drafts = {row.key: row for row in run_dir.read("rollout", Trajectory)}
  refined = run_dir.read("refine", Trajectory)
  assert {row.draft_key for row in refined} == drafts.keys()
  # OPSD: the student is its own teacher.
  models = {(r.model, r.model_revision) for r in [*drafts.values(), *refined]}
  assert models == {("lab:student", hub.model_revision(serving.STUDENT))}
  for row in refined:
    T = len(row.response_ids)
    assert len(row.teacher_top_ids) == len(row.teacher_top_logprobs) == 3 * T
    assert len(row.teacher_top_mass) == T
    assert 0 < min(row.teacher_top_mass) <= max(row.teacher_top_mass) <= 1
  # Beside the reference it is right more often.
  right = [sum(r.correct for r in side) for side in (drafts.values(), refined)]
  assert right[0] < right[1]
  # Drawn again by one of them, they are the same.
  again = [
    Request(row.key, list(row.prompt_ids), row.seed, 192)
    for row in drafts.values()
  ]
  how = serving.sampling(0.6, top_p=0.95, top_k=20)
  for done in engine(urls[:1]).generate(again, how):
    assert list(done.ids) == list(drafts[done.key].response_ids)


def test_a_server_takes_more_prompts_than_fit_a_step(urls):
  # 6,400 tokens at once: a step takes 2,048, and must not cut a prompt.
  draws = np.random.default_rng(0).integers(10, 390, (64, 100)).tolist()
  asked = [Request(f"{n}", ids, n, 4) for n, ids in enumerate(draws)]
  found = by_key(engine(urls[:1]).generate(asked, WARM))
  assert found.keys() == {request.key for request in asked}


# The last one: a server is gone afterwards.
def test_a_server_that_is_killed_loses_nothing(urls, asked, caplog):
  made = engine(urls)
  expected = by_key(made.generate(asked, WARM))
  stream = made.generate(asked, WARM)
  found = [next(stream)]
  server = server_of(int(urls[0].rpartition(":")[2]))
  os.kill(server, signal.SIGKILL)
  found += stream
  assert by_key(found) == expected
  told = [r.message for r in caplog.records if "set aside" in r.message]
  assert len(told) == 1
  assert urls[0] in told[0]
  # The other one goes on, and what the killed one had started is gone.
  deadline = time.monotonic() + 30
  while members(server) and time.monotonic() < deadline:
    time.sleep(0.2)
  assert not members(server)
  assert by_key(engine(urls[1:]).generate(asked, WARM)) == expected


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ([], "name a model"),
    (["lab:student", "--servers", "none"], '"none" is no number'),
    (["lab:student", "--port"], "--port wants a value"),
    (["lab:student", "--gpus=1"], "no option --gpus"),
    (["lab:student", "lab:teacher"], "one model only"),
    (["lab:nobody"], 'no model "lab:nobody"'),
  ],
)
def test_bad_arguments_end_the_script_in_one_line(arguments, says):
  environment = os.environ | {"TRD_VLLM_PYTHON": str(vllm_python())}
  done = subprocess.run(
    [SCRIPT, *arguments],
    capture_output=True,
    text=True,
    env=environment,
    check=False,
  )
  assert done.returncode == 2
  assert says in done.stderr
  assert done.stderr.count("\n") == 1
  assert not done.stdout
