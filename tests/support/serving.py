"""A completion server on loopback that really generates, or misbehaves.

It speaks as much of vLLM's HTTP as the server engine uses, and completes with
the embedded engine on the laboratory's student.
"""

import contextlib
import functools
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.support.small_models import forward, packed, tree
from trd_jax.data.chat import Chat
from trd_jax.data.problems import arithmetic
from trd_jax.data.prompts import default
from trd_jax.generation.engines.engine import Request, Sampling
from trd_jax.generation.engines.jax_engine import JaxEngine
from trd_jax.model.lora_config import LoraConfig
from trd_jax.model.qwen3 import Qwen3, logits
from trd_jax.model.weights import adapters, hf, hub
from trd_jax.model.weights.model_files import ModelFiles

STUDENT = hub.model_folder("lab:student").resolve()
HEAD_ROWS, POSITIONS = 416, 1024


@functools.cache
def chat() -> Chat:
  return Chat.load(STUDENT)


def files(adapter: Path | None = None) -> ModelFiles:
  """The laboratory's student in float32."""
  revision = "0123" if adapter is None else f"0123+{adapter.name}"
  return ModelFiles("lab:student", STUDENT, revision, "float32", adapter)


def sampling(temperature: float = 0.0, **fields) -> Sampling:
  """As a stage samples: the tokenizer's ids, and the end of a turn stops."""
  known = {"stop_ids": tuple(chat().stop_ids), "vocab_size": chat().vocab_size}
  return Sampling(temperature=temperature, **known | fields)


def requests(count: int, limits: tuple[int, ...] = (14, 56)) -> list[Request]:
  """Problems of the held-out split as the student is given them."""
  problems = arithmetic.generate("heldout", count, 0)
  prompts = [
    default().fit_initial(chat(), problem, None, 448) for problem in problems
  ]
  return [
    Request(f"r{n}", list(ids), 1000 + n, limits[n % len(limits)])
    for n, ids in enumerate(prompts)
  ]


@functools.cache
def embedded(adapter: Path | None = None) -> JaxEngine:
  """The embedded engine in float32, an adapter merged into its weights."""
  device = jax.devices()[:1]
  model = hf.load(STUDENT, dtype="float32")
  if adapter is not None:
    model = merged(model, adapter)
  return JaxEngine(model, slots=8, decode_steps=8, devices=device)


def merged(model, adapter: Path):
  """A model with a PEFT folder's adapter in its kernels."""
  config = model.config
  lora, change = adapters.load_peft(adapter, config)
  return adapters.plain_model(config, adapters.merge(tree(model), change, lora))


def save_adapter(folder: Path, rank: int = 4, scale: float = 0.2) -> Path:
  """A PEFT folder of random weights that change what the student says."""
  lora = LoraConfig(rank=rank, alpha=2.0 * rank, dropout=0.0)
  shape = jax.eval_shape(
    lambda: Qwen3(embedded().config, lora=lora, rngs=nnx.Rngs(0))
  )
  rng = np.random.default_rng(0)
  change = jax.tree.map(
    lambda leaf: scale * rng.standard_normal(leaf.shape).astype(np.float32),
    nnx.to_pure_dict(nnx.state(shape, nnx.LoRAParam)),
  )
  adapters.save_peft(change, lora, folder, base=str(STUDENT))
  return folder


def by_key(completions) -> dict:
  """Completions by key, each of which comes once."""
  found = {}
  for completion in completions:
    assert completion.key not in found
    found[completion.key] = completion
  return found


def _without_stop(choice: dict) -> None:
  choice["token_ids"] = choice["token_ids"][:-1] or [HEAD_ROWS]


# What a server may say that isn't so, by name; each changes an honest choice.
LIES: dict[str, Callable[[dict], None]] = {
  "an id that isn't": lambda choice: choice["token_ids"].append(HEAD_ROWS),
  "a negative id": lambda choice: choice["token_ids"].insert(0, -1),
  "an id that is no integer": lambda choice: choice["token_ids"].append(1.5),
  "too many": lambda choice: choice.update(token_ids=[7] * POSITIONS),
  "another prompt": lambda choice: choice["prompt_token_ids"].pop(),
  "a stop that isn't": _without_stop,
  "no ids": lambda choice: choice.pop("token_ids"),
  "no choice": lambda choice: choice.clear(),
}


class FakeServer(ThreadingHTTPServer):
  """A server at `url`; a context manager.

  Args:
    misbehave: called with the number of the completion request, from 1, and
      its body; says what to do in place of answering: 'drop', 'drip', 'busy'
      (with seconds to wait behind it), 'broken', 'abort', 'text', 'die', 'lie'
      (with one of `LIES` behind it), None.
    key: the API key that it wants.
    cards: entries of /v1/models in place of the student's.
    loads_after: seconds until /health is well.
    seconds: that a completion takes at least.
    drafts: whether it speculates: it takes no biases then, and counts.

  Attributes:
    bodies: of the completion requests.
    most: completion requests at once.
    lora: whether adapters may be loaded; adapters: by name.
    dead: set once it is.
  """

  daemon_threads = True
  allow_reuse_address = True
  request_queue_size = 128  # many clients connect at once

  def __init__(
    self,
    misbehave: Callable[[int, dict], str | None] = lambda number, body: None,
    *,
    key: str | None = None,
    cards: list[dict] | None = None,
    loads_after: float = 0.0,
    seconds: float = 0.0,
    lora: bool = True,
    drafts: bool = False,
    port: int = 0,
  ):
    super().__init__(("127.0.0.1", port), _Handler)
    self.misbehave, self.key, self.lora = misbehave, key, lora
    self.cards = [card()] if cards is None else cards
    self.well_from = time.monotonic() + loads_after
    self.seconds = seconds
    self.drafts = drafts
    self.bodies: list[dict] = []
    self.others: list[str] = []
    self.now = self.most = 0
    self.mutex = threading.Lock()
    self.connections: set[socket.socket] = set()
    self.adapters: dict[str, Path] = {}
    self.dead = threading.Event()
    self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_address[1]}"

  def __enter__(self):
    self._thread.start()
    return self

  def __exit__(self, *exception):
    self.die()
    self._thread.join()

  def die(self):
    """Stops listening and breaks every connection, as a killed process."""
    self.shutdown()
    with contextlib.suppress(OSError):
      self.socket.close()
    with self.mutex:
      for connection in self.connections:
        with contextlib.suppress(OSError):
          connection.shutdown(socket.SHUT_RDWR)
    self.dead.set()

  def forget(self):
    """Loses its adapters, as a server that was started again at once."""
    with self.mutex:
      self.cards[:] = [card()]
      self.adapters.clear()

  def handle_error(self, request, client_address):
    """Broken connections are what is tested."""


def card(**fields) -> dict:
  known = {"id": str(STUDENT), "root": str(STUDENT), "parent": None}
  return known | {"max_model_len": POSITIONS} | fields


_generating = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server: FakeServer

  def setup(self):
    super().setup()
    with self.server.mutex:
      self.server.connections.add(self.connection)

  def finish(self):
    with self.server.mutex:
      self.server.connections.discard(self.connection)
    super().finish()

  def log_message(self, format, *args):
    pass

  def answer(self, status: int, value, **headers):
    data = json.dumps(value).encode()
    self.send_response(status)
    for name, text in headers.items():
      self.send_header(name.replace("_", "-"), text)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def error(self, status: int, message: str, **headers):
    self.answer(status, {"error": {"message": message}}, **headers)

  def allowed(self) -> bool:
    wanted = self.server.key
    given = self.headers.get("Authorization")
    if wanted is None or given == f"Bearer {wanted}":
      return True
    # As servers may do, it repeats what it was sent.
    self.error(401, f"wrong key in {given}")
    return False

  def do_GET(self):
    if self.path == "/health":
      well = time.monotonic() >= self.server.well_from
      self.answer(200 if well else 503, {})
    elif self.path == "/metrics":
      self.metrics()
    elif self.allowed():
      assert self.path == "/v1/models"
      self.answer(200, {"object": "list", "data": self.server.cards})

  def metrics(self):
    """Counts, where it drafts, three tokens a completion and two right ones."""
    names = ("drafts", "draft_tokens", "accepted_tokens")
    done = len(self.server.bodies)
    lines = [
      f'vllm:spec_decode_num_{name}_total{{engine="0"}} {times * done}.0'
      for name, times in zip(names, (1, 3, 2), strict=True)
      if self.server.drafts
    ]
    data = "\n".join(["vllm:num_requests_running 0.0", *lines]).encode()
    self.send_response(200)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def do_POST(self):
    length = int(self.headers["Content-Length"])
    body = json.loads(self.rfile.read(length))
    if not self.allowed():
      return
    if self.path == "/v1/load_lora_adapter":
      self.load(body)
      return
    assert self.path == "/v1/completions"
    server = self.server
    with server.mutex:
      server.bodies.append(body)
      number = len(server.bodies)
      server.now += 1
      server.most = max(server.most, server.now)
    try:
      time.sleep(server.seconds)
      self.complete(body, server.misbehave(number, body))
    finally:
      with server.mutex:
        server.now -= 1

  def drip(self):
    """Sends a byte now and then, and never all."""
    self.send_response(200)
    self.send_header("Content-Length", "1000000")
    self.end_headers()
    with contextlib.suppress(OSError):
      while not self.server.dead.wait(0.05):
        self.wfile.write(b" ")

  def load(self, body: dict):
    self.server.others.append(self.path)
    if not self.server.lora:
      self.answer(404, {"detail": "Not Found"})
      return
    name, path = body["lora_name"], Path(body["lora_path"])
    with self.server.mutex:
      self.server.adapters[name] = path
      self.server.cards.append(
        card(id=name, root=str(path), parent=str(STUDENT), max_model_len=None)
      )
    self.answer(200, "Success")

  def complete(self, body: dict, how: str | None):
    if how == "drop":
      self.close_connection = True
      self.connection.shutdown(socket.SHUT_RDWR)
      return
    if how == "die":
      threading.Thread(target=self.server.die).start()
      return
    if how == "drip":
      self.drip()
      return
    if how and how.startswith("busy"):
      self.error(429, "too much to do", Retry_After=how[4:] or "1")
      return
    if how == "broken":
      self.error(500, "out of memory")
      return
    if how and how.startswith("refuse"):
      self.error(400, how)
      return
    model = body["model"]
    # At one moment: a server may forget the adapter while it generates with it.
    with self.server.mutex:
      known = model in [card["id"] for card in self.server.cards]
      adapter = self.server.adapters.get(model)
    if not known:
      self.error(404, f"The model `{model}` does not exist.")
      return
    with _generating:
      done = self.generate(body, adapter)
    choice = {
      "index": 0,
      "text": chat().decode(list(done.ids)),
      "finish_reason": done.finish_reason,
      "token_ids": list(done.ids),
      "prompt_token_ids": body["prompt"],
    }
    if how == "text":
      del choice["token_ids"], choice["prompt_token_ids"]
    if how and how.startswith("lie "):
      LIES[how[4:]](choice)
    if how == "abort":
      choice |= {"finish_reason": "abort", "token_ids": choice["token_ids"][:1]}
    self.answer(200, {"id": "cmpl", "choices": [choice]})

  def generate(self, body: dict, adapter: Path | None):
    """What vLLM makes of the fields, its defaults included."""
    masked = [int(i) for i, bias in body.get("logit_bias", {}).items()]
    assert all(bias == -100 for bias in body.get("logit_bias", {}).values())
    assert masked == list(range(HEAD_ROWS - len(masked), HEAD_ROWS))
    # Beside drafts vLLM refuses biases, and says of others' arguments nothing.
    assert not (masked and self.server.drafts)
    rows = HEAD_ROWS - len(masked)
    if self.server.drafts:
      rows = body.get("vllm_xargs", {}).get("trd_jax_vocab_size", rows)
    assert body["ignore_eos"]
    assert body["return_token_ids"]
    how = Sampling(
      temperature=body["temperature"],
      top_p=body["top_p"],
      top_k=body["top_k"] or -1,
      stop_ids=tuple(body["stop_token_ids"]),
      vocab_size=rows,
    )
    prompt = tuple(body["prompt"])
    return _completion(prompt, body["seed"], body["max_tokens"], how, adapter)


@functools.cache
def _completion(prompt, seed, limit, how: Sampling, adapter: Path | None):
  """Generates a request alone, once however many servers are asked for it."""
  request = Request("", list(prompt), seed, limit)
  (done,) = embedded(adapter).generate([request], how)
  return done


def scores(ids) -> np.ndarray:
  """JAX's log-probabilities behind each of a sequence's tokens, [T, V]."""
  model = hf.load(STUDENT, dtype="float32")
  position, segment = packed([len(ids)], 256)  # one width: compiled once
  padded = np.zeros_like(position)
  padded[: len(ids)] = ids
  hidden = forward(
    model, *(jnp.asarray(a)[None] for a in (padded, position, segment))
  )
  rows_TV = jax.nn.log_softmax(logits(hidden, model.head_VD)[0])
  return np.asarray(rows_TV)[: len(ids)]


def check_likeliest(request, done, top) -> None:
  """Sees that a completion's likeliest tokens are the model's own."""
  T = len(done.ids)
  rows_TV = scores([*request.prompt_ids, *done.ids])[-T - 1 : -1]
  assert done.top is not None
  assert done.top.ids.shape == done.top.logprobs.shape == (T, top)
  best_TK = -np.sort(-rows_TV, axis=1)[:, :top]
  np.testing.assert_allclose(done.top.logprobs, best_TK, atol=2e-4)
  picked_TK = np.take_along_axis(rows_TV, done.top.ids, axis=1)
  np.testing.assert_allclose(done.top.logprobs, picked_TK, atol=2e-4)
  assert all(len(set(row)) == top for row in done.top.ids.tolist())
