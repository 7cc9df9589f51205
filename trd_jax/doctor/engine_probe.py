"""A child that has an engine generate from the tiny model.

Asked for are `engine` (vllm or jax), the `model` folder, the `adapter` folder
or null, `dtype`, and `spec` (keys of the engine's section). Its phases, by the
facts that they leave:

    start     seconds until the engine was ready
    runs      tokens of the same requests, in the same order, once and again
    alone     tokens of each of them by itself, twice
    other     tokens of them among others
    surplus   all ids drawn at high temperature below `limit` of `rows`
    top       the likeliest tokens of all rows, and the tokens drawn greedily
    adapter   `top` with the adapter on, in an engine of its own

`phase` is the one at work.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trd_jax.doctor.probe import Facts, Tell, answer
from trd_jax.experiment import schema
from trd_jax.experiment.engines import ENGINES
from trd_jax.experiment.files.json_files import read_object
from trd_jax.generation.engines import factory
from trd_jax.generation.engines.engine import Request, Sampling
from trd_jax.model.config import read_size
from trd_jax.model.weights.model_files import ModelFiles
from trd_jax.model.weights.model_folder import CONFIG

_PROMPTS = 4
_TOKENS = 12
_MOST_RUNS = 4
_HOT = 2.0  # vLLM takes no more
_HOT_REQUESTS, _HOT_TOKENS = 8, 32
_TOP_TOKENS = 4
_LONGEST = 64
_DRAWN = Sampling(temperature=1.0)

Tokens = dict[str, list[int]]


def requests(count: int, tokens: int) -> list[Request]:
  """Returns short prompts.

  A block of a prefix cache holds more tokens than any of them has.
  """
  return [
    Request(
      f"{n}", [1 + (7 * n + 3 * i) % 200 for i in range(5 + n)], n, tokens
    )
    for n in range(count)
  ]


def _tokens(engine: Any, requests: Sequence[Request], how: Sampling) -> Tokens:
  made = {one.key: one.ids for one in engine.generate(requests, how)}
  return {one.key: list(made[one.key]) for one in requests}


def _top(engine: Any, rows: int) -> list[dict[str, Any]]:
  """Returns the likeliest tokens of greedy completions of two prompts."""
  greedy = Sampling(temperature=0.0, top_logprobs=rows)
  made = engine.generate(requests(2, _TOP_TOKENS), greedy)
  results = []
  for one in sorted(made, key=lambda one: one.key):
    assert one.top is not None
    results.append(
      {
        "drawn": list(one.ids),
        "ids": one.top.ids.tolist(),
        "logprobs": one.top.logprobs.tolist(),
      }
    )
  return results


def examine(requested: Facts, tell: Tell) -> None:
  """Goes through the phases and tells what each of them leaves."""
  import time

  folder = Path(requested["model"])
  adapter = requested["adapter"] and Path(requested["adapter"])
  rows = read_size(read_object(folder / CONFIG), "vocab_size")

  def make(adapter: Path | None) -> Any:
    files = ModelFiles("tiny", folder, "tiny", requested["dtype"], adapter)
    name = requested["engine"]
    section: Any = ENGINES[name](**requested["spec"])
    spec = schema.Engine(name=name, **{name: section})
    return factory.make(spec, files, max_model_tokens=_LONGEST)

  # Half of the rows stand in for a head's surplus rows: if the limit did not
  # act, one of them would show within a few draws.
  tell(phase="start", rows=rows, limit=rows // 2)
  began = time.monotonic()
  engine = make(None)
  tell(start=time.monotonic() - began, phase="runs")

  batch = requests(_PROMPTS, _TOKENS)
  runs: list[Tokens] = []
  # Requests come one by one, so that on GPUs a first step can hold fewer of
  # them: what differs once is drawn again.
  while len(runs) < 2 or (runs[-1] != runs[-2] and len(runs) < _MOST_RUNS):
    runs.append(_tokens(engine, batch, _DRAWN))
  tell(runs=runs, phase="alone")
  alone: list[Tokens] = [
    {one.key: _tokens(engine, [one], _DRAWN)[one.key] for one in batch}
    for _ in range(2)
  ]
  tell(alone=alone, phase="other")
  other = _tokens(engine, requests(3 * _PROMPTS, _TOKENS)[::-1], _DRAWN)
  tell(other={one.key: other[one.key] for one in batch}, phase="surplus")
  hot = Sampling(temperature=_HOT, vocab_size=rows // 2)
  drawn = _tokens(engine, requests(_HOT_REQUESTS, _HOT_TOKENS), hot)
  tell(surplus=[i for ids in drawn.values() for i in ids], phase="top")
  tell(top=_top(engine, rows), phase="adapter")
  # Before the next one starts, which takes the same device.
  engine.close()
  if adapter is not None:
    engine = make(adapter)
    tell(adapter=_top(engine, rows))
    engine.close()
  tell(phase="end")


# vLLM starts its processes anew: they import this file.
if __name__ == "__main__":
  answer(examine)
