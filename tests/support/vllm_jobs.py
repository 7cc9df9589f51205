"""Jobs for a process that holds a VllmEngine (`vllm_driver.py`)."""

import dataclasses
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.support import serving
from tests.support.engine_env import ROOT, vllm_python
from tests.support.processes import below, still_there
from tests.support.serving import by_key
from trd_jax.generation.engines.engine import Completion, TopTokens

DRIVER = ROOT / "tests" / "support" / "vllm_driver.py"
# What vLLM tries out and reserves at its start is larger than needed here.
SPEC = {
  "eager": True,
  "kv_cache_gib": 0.5,
  "max_num_seqs": 64,
  "max_batched_tokens": serving.POSITIONS,
}


def job(name, requests, sampling, **fields) -> dict:
  return {
    "name": name,
    "requests": [dataclasses.asdict(request) for request in requests],
    "sampling": dataclasses.asdict(sampling),
  } | fields


class Driver:
  """A driver at work, and what it made."""

  def __init__(
    self,
    folder: Path,
    jobs,
    adapter: Path | None = None,
    environment: Mapping[str, str] | None = None,
    **more,
  ):
    model = dataclasses.asdict(serving.files(adapter))
    for field in ("folder", "adapter"):
      model[field] = model[field] and str(model[field])
    asked, done = folder / "asked.json", folder / "done.json"
    asked.write_text(
      json.dumps(
        {
          "spec": SPEC,
          "model": model,
          "max_model_tokens": serving.POSITIONS,
          "jobs": jobs,
        }
        | more
      )
    )
    # These are for the JAX of the tests.
    foreign = ("XLA_FLAGS", "JAX_PLATFORMS")
    mine = {k: v for k, v in os.environ.items() if k not in foreign}
    with (folder / "stderr").open("wb") as stderr:
      self.process = subprocess.Popen(
        [vllm_python(), DRIVER, asked, done],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=mine | dict(environment or {}),
      )
    assert self.process.stdout is not None
    said = " "
    while said not in ("done\n", ""):
      # vLLM's processes tell of their errors there, too.
      said = self.process.stdout.readline()
    assert said, (folder / "stderr").read_text()[-3000:]
    self.made = json.loads(done.read_text())

  def __getitem__(self, name: str) -> dict[str, Completion]:
    return by_key(self.list(name))

  def list(self, name: str) -> list[Completion]:
    """The completions of a job, as they came."""
    assert "error" not in self.made[name], self.made[name]
    return [completion(f) for f in self.made[name]["completions"]]

  def end(self) -> None:
    """Ends it and what it started."""
    started = below(self.process.pid)
    self.process.kill()
    self.process.wait()
    for pipe in (self.process.stdin, self.process.stdout):
      assert pipe is not None
      pipe.close()
    for pid in still_there(started, seconds=30):
      os.kill(pid, signal.SIGKILL)


def completion(fields: dict) -> Completion:
  top = fields["top"]
  if top is not None:
    top = TopTokens(*(np.array(each["values"], each["dtype"]) for each in top))
    assert (top.ids.dtype, top.logprobs.dtype) == (np.int32, np.float32)
  return Completion(**fields | {"ids": tuple(fields["ids"]), "top": top})
