"""One OpenAI-compatible server: its address, its models, its state."""

import asyncio
import contextlib
import dataclasses
import email.utils
import ipaddress
import os
import time
import urllib.parse
from pathlib import Path
from typing import Any

import httpx2 as httpx

from trd_jax.experiment.engines import ServerEngine as Spec
from trd_jax.experiment.errors import UserError
from trd_jax.generation.engines.engine import (
  Completion,
  Drafted,
  Request,
  Sampling,
)
from trd_jax.generation.engines.server_protocol import (
  Failed,
  body,
  completion,
  drafted,
)
from trd_jax.model.config import read_positions, read_size
from trd_jax.model.weights.model_files import ModelFiles

_CONNECT_SECONDS = 20.0
_ANSWER_SECONDS = 30.0  # to what isn't a completion
_LOAD_SECONDS = 300.0  # of an adapter
# Shorter than vLLM keeps an idle connection, or requests would be sent over
# connections that it has just closed.
_IDLE_SECONDS = 3.0
_LONGEST_MESSAGE = 400
_LONGEST_PAUSE = 600.0
_DIGITS = 12  # of a pause that are read: beyond them any is too long
_OURS = "trd-"


@dataclasses.dataclass(frozen=True)
class Wanted:
  """The model that a server must serve.

  Attributes:
    name: the name in `engine.server.model`, if any. It alone counts then; else
      an entry is the model by one of the next two.
    names: its `id` or `root` is one of these.
    folder: its `root` is this folder.
    adapter: a PEFT folder to be applied, or None.
    adapter_name: the name under which a server is to load the adapter.
    head_rows: rows of the model's head.
    positions: the model's longest context.
    context: longest prompt with its response that a server must take.
  """

  name: str | None
  names: frozenset[str]
  folder: Path
  adapter: Path | None
  adapter_name: str
  head_rows: int
  positions: int
  context: int

  @classmethod
  def of(
    cls,
    model: ModelFiles,
    config: dict[str, Any],
    name: str | None,
    max_model_tokens: int,
  ) -> "Wanted":
    """Makes it of a model's files and its config.json."""
    base = model.name.removesuffix(f" with {model.adapter}")
    revision = model.revision.partition("+")[0] if model.adapter else ""
    positions = read_positions(config)
    return cls(
      name=name,
      names=frozenset(
        {str(model.folder), base, revision or model.revision} - {""}
      ),
      folder=model.folder.resolve(),
      adapter=model.adapter and model.adapter.resolve(),
      adapter_name=f"{_OURS}{model.revision}",
      head_rows=read_size(config, "vocab_size"),
      positions=positions,
      context=min(max_model_tokens, positions),
    )

  def is_served_as(self, card: dict[str, Any]) -> bool:
    """Returns whether an entry of /v1/models is the model or its base."""
    if self.name is not None:
      return card["id"] == self.name
    root = card.get("root") or ""
    # An entry with a parent is an adapter, which is served under the root of
    # its own folder: never the base.
    return not card.get("parent") and (
      bool({card["id"], root} & self.names)
      or (os.path.isabs(root) and Path(root).resolve() == self.folder)
    )

  @property
  def spoken(self) -> str:
    """Returns the model's name for an error."""
    return f'"{self.name}"' if self.name else str(self.folder)


class Server:
  """A server and its state.

  An asynchronous context manager: requests can be sent inside only.

  Attributes:
    url: without /v1 at its end.
    model: the name of our model there; None until `find` has found it.
    context: longest prompt with its response, for our model.
    serves: names of all models that it serves, for errors.
    drafts: whether it speculates, whatever it is asked.
    ready: whether it may be given requests.
    problem: why it isn't ready.
    in_flight: requests that it has.
    strikes: tries that have failed since the last success.
    setbacks: how often it was set aside since then.
    rests_until: time (`time.monotonic`) before which it wants no request.
  """

  def __init__(self, url: str, spec: Spec):
    self.url = _address(url)
    self.model: str | None = None
    self.context = 0
    self.serves: list[str] = []
    self.drafts = False
    self.ready = False
    self.problem = ""
    self.in_flight = 0
    self.strikes = 0
    self.setbacks = 0
    self.rests_until = 0.0
    self._spec = spec
    self._key = _api_key(spec.api_key_variable)
    self._client: httpx.AsyncClient | None = None

  async def __aenter__(self) -> "Server":
    headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
    self._client = httpx.AsyncClient(
      headers=headers,
      # A proxy of the environment can't reach this machine's loopback.
      trust_env=not _is_loopback(self.url),  # proxies
      limits=httpx.Limits(
        # No bound: `in_flight` is the bound, and a request that counts there
        # should be on its way.
        max_connections=None,
        max_keepalive_connections=self._spec.concurrency + 8,
        keepalive_expiry=_IDLE_SECONDS,
      ),
    )
    self.in_flight = 0
    return self

  async def __aexit__(self, *exception: object) -> None:
    if self._client is not None:
      await self._client.aclose()
      self._client = None

  async def health(self, seconds: float = _ANSWER_SECONDS) -> str | None:
    """Returns None where the server is well, else what is wrong."""
    try:
      response = await self._send("GET", "/health", seconds)
    except Failed as failed:
      return str(failed)
    # A server may lack this page.
    if response.is_success or response.status_code == 404:
      return None
    return f"/health says {response.status_code}"

  async def find(self, wanted: Wanted) -> bool:
    """Finds the model on the server; loads the adapter there if need be.

    Returns:
      Whether the server serves the model.

    Raises:
      Failed: the server doesn't answer.
      UserError: the server can't be used.
    """
    response = await self._send("GET", "/v1/models", _ANSWER_SECONDS)
    if response.status_code >= 500:
      raise Failed(self._message(response))
    try:
      cards = [_card(one) for one in response.json()["data"]]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
      raise UserError(
        f"{self.url}/v1/models has no list of models"
        f" ({self._message(response)}); name an OpenAI-compatible server in"
        " engine.server.urls"
      ) from None
    self.serves = [self._one_line(card["id"]) for card in cards]
    ours = next((card for card in cards if wanted.is_served_as(card)), None)
    if ours is None:
      self.model = None
      return False
    context = ours.get("max_model_len") or wanted.positions
    if context < wanted.context:
      raise UserError(
        f"{self.url} takes {context} tokens a request and"
        f" {wanted.context} are needed; start it with --max-model-len"
        f" {wanted.context} or more, or lower the token limits"
      )
    self.context = min(context, wanted.positions)
    self.model = ours["id"]
    self.drafts = await self.drafted() is not None
    if wanted.adapter is not None and not ours.get("parent"):
      self.model = await self._adapter(wanted, ours["id"], cards)
    return True

  async def drafted(self) -> Drafted | None:
    """Returns the server's counts of drafts; None: it has or tells none."""
    try:
      response = await self._send("GET", "/metrics", _ANSWER_SECONDS)
    except (Failed, UserError):  # A page that a server may lack or lock.
      return None
    return drafted(response.text) if response.is_success else None

  async def _adapter(
    self, wanted: Wanted, base: str, cards: list[dict[str, Any]]
  ) -> str:
    """Returns the adapter's name on the server; loads it where it isn't yet.

    Raises:
      UserError: the server refuses to load it.
    """
    if any(card["id"] == wanted.adapter_name for card in cards):
      return wanted.adapter_name
    for card in cards:
      # Loaded from the same folder under another name, it will do. But a name
      # of ours holds a revision: under another than this one it was loaded from
      # files that have changed since.
      if (
        card.get("root") == str(wanted.adapter)
        and card.get("parent") in (None, base)
        and not card["id"].startswith(_OURS)
      ):
        return card["id"]
    response = await self._send(
      "POST",
      "/v1/load_lora_adapter",
      _LOAD_SECONDS,
      {"lora_name": wanted.adapter_name, "lora_path": str(wanted.adapter)},
    )
    message = self._message(response)
    # A rollout and an evaluation may ask for it at once: whoever is second is
    # told that it is there.
    if response.is_success or "already been loaded" in message:
      return wanted.adapter_name
    raise UserError(
      f"{self.url} doesn't load the adapter {wanted.adapter} ({message}); it"
      " must see that folder and be started by launch/serve.sh --lora=RANK of"
      " at least the adapter's rank (VLLM_ALLOW_RUNTIME_LORA_UPDATING=True,"
      " --enable-lora, --max-lora-rank), or set engine.weights=merged"
    )

  async def complete(
    self, request: Request, sampling: Sampling, wanted: Wanted
  ) -> Completion:
    """Completes a request.

    Raises:
      Failed: the request may succeed another time or at another server.
      UserError: the request can never succeed.
    """
    assert self.model is not None
    asked = body(
      request,
      sampling,
      model=self.model,
      head_rows=wanted.head_rows,
      context=wanted.context,
      drafts=self.drafts,
    )
    response = await self._send(
      "POST", "/v1/completions", self._spec.request_seconds, asked
    )
    status = response.status_code
    if response.is_success:
      try:
        answer = response.json()
      except ValueError:
        answer = None
      return completion(
        request,
        sampling,
        answer,
        self.url,
        limit=asked["max_tokens"],
        head_rows=wanted.head_rows,
      )
    message = self._message(response)
    # Overload, time and faults of the server pass; all else that it refuses it
    # would refuse again.
    if status in (408, 429) or status >= 500:
      # No longer than a request may take: a server that asks for an hour is
      # one that doesn't answer.
      longest = min(_LONGEST_PAUSE, self._spec.request_seconds)
      pause = _retry_after(response)
      if pause is not None:
        pause = min(pause, longest)
      raise Failed(message, pause=pause, busy=status == 429)
    if status == 404:
      raise Failed(message, forgot=True)
    hint = ""
    if sampling.top_logprobs and "logprobs" in message:
      hint = (
        f"; start the server with --max-logprobs {sampling.top_logprobs} or"
        " lower refine.teacher_top_k"
      )
    raise UserError(
      f"{self.url} refuses request {request.key}: {message}{hint}"
    )

  async def _send(
    self, method: str, path: str, seconds: float, json: Any = None
  ) -> httpx.Response:
    assert self._client is not None, "outside of the context"
    timeout = httpx.Timeout(seconds, connect=_CONNECT_SECONDS, pool=None)
    try:
      # Of the whole reply: httpx's own limit is that between two bytes, and a
      # server that drips would hold a request for ever.
      async with asyncio.timeout(seconds + _CONNECT_SECONDS):
        response = await self._client.request(
          method, self.url + path, json=json, timeout=timeout
        )
    except (httpx.TimeoutException, TimeoutError) as error:
      raise Failed(
        f"no answer in {seconds:g} s ({type(error).__name__})"
      ) from None
    except httpx.RequestError as error:
      told = self._one_line(str(error)) or "the connection broke"
      raise Failed(f"{told} ({type(error).__name__})") from None
    if response.status_code in (401, 403):
      state = "holds another" if self._key else "is not set"
      raise UserError(
        f"{self.url} wants an API key ({response.status_code}), and the"
        f" environment variable {self._spec.api_key_variable} {state}; put"
        " the server's there (engine.server.api_key_variable names it)"
      )
    return response

  def _message(self, response: httpx.Response) -> str:
    """Returns what an error response says, in one line."""
    try:
      said = response.json()
      for name in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(name):
          said = said[name]
    except ValueError:
      said = response.text
    return f"{response.status_code}: {self._one_line(str(said))}"

  def _one_line(self, text: str) -> str:
    """Returns a short text for a message, without the API key."""
    if self._key:
      text = text.replace(self._key, "***")
    # What a server writes may hold control characters for a terminal.
    text = "".join(c if c.isprintable() or c.isspace() else "?" for c in text)
    return " ".join(text.split())[:_LONGEST_MESSAGE]


def _card(entry: Any) -> dict[str, Any]:
  """Returns what is read of an entry of /v1/models.

  Raises:
    AttributeError, KeyError, TypeError: it is none.
  """
  card: dict[str, Any] = {}
  for field in ("root", "parent"):
    text = entry.get(field)
    card[field] = text if isinstance(text, str) else None
  if not isinstance(name := entry["id"], str):
    raise TypeError(name)
  longest = entry.get("max_model_len")
  is_number = isinstance(longest, int) and not isinstance(longest, bool)
  card["max_model_len"] = longest if is_number and longest > 0 else None
  return {"id": name, **card}


def _address(url: str) -> str:
  """Returns a base URL without /v1.

  Raises:
    UserError: the text is no base URL, or holds a password.
  """
  parts = urllib.parse.urlsplit("")
  try:
    parts = urllib.parse.urlsplit(url.strip())
    usable = parts.scheme in ("http", "https") and parts.hostname
    usable = usable and (parts.port is None or parts.port > 0)
  except ValueError:
    usable = False
  if "@" in parts.netloc:
    raise UserError(
      "engine.server.urls: an address holds a user name or password; give an"
      " API key in the environment variable that"
      " engine.server.api_key_variable names"
    )
  if not usable or parts.query or parts.fragment:
    raise UserError(
      f'engine.server.urls: "{url}" is no base address; write it as'
      " http://127.0.0.1:8000"
    )
  path = parts.path.rstrip("/").removesuffix("/v1")
  return f"{parts.scheme}://{parts.netloc}{path}"


def _is_loopback(url: str) -> bool:
  host = urllib.parse.urlsplit(url).hostname or ""
  with contextlib.suppress(ValueError):
    return ipaddress.ip_address(host).is_loopback
  return host == "localhost" or host.endswith(".localhost")


def _api_key(variable: str) -> str:
  key = os.environ.get(variable, "").strip()
  if not (key.isascii() and key.isprintable()):
    raise UserError(
      f"the environment variable {variable} holds characters that no API key"
      " has; set it again"
    )
  return key


def _retry_after(response: httpx.Response) -> float | None:
  """Returns the seconds that a server asks to be left alone, if any."""
  text = response.headers.get("Retry-After", "").strip()
  if text.isdecimal():
    return float(text[:_DIGITS])
  with contextlib.suppress(ValueError):
    moment = email.utils.parsedate_to_datetime(text).timestamp()
    return max(moment - time.time(), 0.0)
  return None
