"""A process that holds a VllmEngine and does what a file asks of it.

usage: python vllm_driver.py ASKED.json DONE.json

It runs under an interpreter that has vLLM and need not have JAX. ASKED holds
`spec` (keys of `engine.vllm`), `model` (those of `ModelFiles`),
`max_model_tokens` and `jobs`: lists of jobs, each list generated at once by
threads of their own. A job is a `name`, `requests`, `sampling`, and maybe
`take`, the completions after which its iterator is closed. DONE gets, by name,
the `completions` or the `error` of a user, and of the process the names of its
`modules`, those in its `environment` once vLLM is loaded, how many objects are
`frozen` by then, its counts of drafts (`drafted`), and vLLM's model `runner`;
then the line "done" is printed. With `then`, requests, these are generated on
and on. Otherwise the engine is closed when stdin is.
"""

import contextlib
import dataclasses
import gc
import itertools
import json
import os
import sys
import threading
from pathlib import Path

from trd_jax.experiment.engines import VllmEngine as Spec
from trd_jax.experiment.errors import UserError
from trd_jax.generation.engines.engine import Request, Sampling
from trd_jax.generation.engines.vllm_engine import VllmEngine
from trd_jax.model.weights.model_files import ModelFiles


def plain(completion) -> dict:
  """A completion as JSON has it."""
  fields = dataclasses.asdict(completion) | {"top": None}
  if completion.top is not None:
    fields["top"] = [
      {"values": part.tolist(), "dtype": part.dtype.name}
      for part in completion.top
    ]
  return fields


def do(engine: VllmEngine, job: dict, done: dict) -> None:
  """Does one job."""
  requests = [Request(**fields) for fields in job["requests"]]
  fields = job["sampling"]
  sampling = Sampling(**fields | {"stop_ids": tuple(fields["stop_ids"])})
  try:
    with contextlib.closing(engine.generate(requests, sampling)) as stream:
      made = list(itertools.islice(stream, job.get("take")))
  except UserError as error:
    done[job["name"]] = {"error": str(error)}
  else:
    done[job["name"]] = {"completions": [plain(each) for each in made]}


def main() -> None:
  asked = json.loads(Path(sys.argv[1]).read_text())
  fields = asked["model"]
  adapter = fields["adapter"] and Path(fields["adapter"])
  model = ModelFiles(
    **fields | {"folder": Path(fields["folder"]), "adapter": adapter}
  )
  engine = VllmEngine(
    Spec(**asked["spec"]), model, max_model_tokens=asked["max_model_tokens"]
  )
  done: dict = {"environment": sorted(os.environ)}
  done["frozen"] = gc.get_freeze_count()
  v2 = engine._llm.vllm_config.use_v2_model_runner
  done["runner"] = "V2" if v2 else "V1"
  for group in asked["jobs"]:
    threads = [
      threading.Thread(target=do, args=(engine, job, done)) for job in group
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  drafted = engine.drafted()
  done["drafted"] = drafted and list(drafted)
  done["modules"] = sorted(sys.modules)
  Path(sys.argv[2]).write_text(json.dumps(done))
  print("done", flush=True)
  while "then" in asked:
    do(engine, asked["then"], {})
  sys.stdin.read()
  engine.close()


# vLLM starts its processes anew: they import this file.
if __name__ == "__main__":
  main()
