"""What one process costs that feeds several copies of a model under vLLM.

    .venv-vllm/bin/python benchmarks/vllm_frontend.py --engines 8

With engine.vllm.data_parallel=N each step of each copy sends its tokens to one
event loop. It decodes the message and counts each token to its request, though
a request's tokens leave it only once, at the end.

Here the copies are stubs: a process sends, over a socket of the kind that vLLM
uses, what N copies send at a step, as fast as it is taken. vLLM's own code
receives it, decodes it (`MsgpackDecoder`) and processes it (`OutputProcessor`)
in the order of `AsyncLLM`'s output handler. No model runs.

The table has, for a step of all copies, the CPU milliseconds of that process,
and so the steps a second at which it does nothing else: it can't keep up with
more. With `--top K` each token carries K log-probabilities, as
`refine.teacher_top_k` asks for them.
"""

import argparse
import asyncio
import multiprocessing
import os
import statistics
import tempfile
import time

import numpy as np
import zmq
import zmq.asyncio

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import (
  EngineCoreOutput,
  EngineCoreOutputs,
  EngineCoreRequest,
)
from vllm.v1.engine.output_processor import (
  OutputProcessor,
  RequestOutputCollector,
)
from vllm.v1.outputs import LogprobsLists
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

VOCABULARY = 151_936
WARM = 5  # steps before the clock starts


def name(engine: int, sequence: int) -> str:
  """A request's id, as long as those of a stage."""
  return f"{engine:04d}-{sequence:056d}"


def step_of(engine: int, sequences: int, top: int) -> EngineCoreOutputs:
  """What a copy says after a step: one token a sequence."""
  rng = np.random.default_rng(engine)
  outputs = []
  for sequence in range(sequences):
    logprobs = None
    if top:
      logprobs = LogprobsLists(
        rng.integers(0, VOCABULARY, (1, top + 1)).astype(np.int32),
        -rng.random((1, top + 1)).astype(np.float32),
        np.ones(1, np.int32),
      )
    token = int(rng.integers(0, VOCABULARY))
    outputs.append(
      EngineCoreOutput(name(engine, sequence), [token], new_logprobs=logprobs)
    )
  return EngineCoreOutputs(engine_index=engine, outputs=outputs)


def send(address: str, engines: int, sequences: int, top: int, steps: int):
  """The stubs: sends every copy's messages, step by step."""
  socket = zmq.Context().socket(zmq.PUSH)
  socket.set_hwm(4 * engines)
  socket.connect(address)
  encoder = MsgpackEncoder()
  messages = [
    [bytes(part) for part in encoder.encode(step_of(engine, sequences, top))]
    for engine in range(engines)
  ]
  for _ in range(steps):
    for message in messages:
      socket.send_multipart(message)
  socket.close(linger=60_000)


def processor(engines: int, sequences: int, top: int) -> OutputProcessor:
  """vLLM's, with the requests of all copies under way."""
  made = OutputProcessor(None, log_stats=False)
  params = SamplingParams(
    max_tokens=1 << 20,
    detokenize=False,
    logprobs=top or None,
    flat_logprobs=bool(top),
    output_kind=RequestOutputKind.FINAL_ONLY,
    ignore_eos=True,
  )
  for engine in range(engines):
    for sequence in range(sequences):
      key = name(engine, sequence)
      request = EngineCoreRequest(
        request_id=key,
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id=key,
      )
      queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, key)
      made.add_request(request, None, queue=queue)
  return made


async def receive(
  address: str, engines: int, sequences: int, top: int, steps: int
) -> list[float]:
  """The front-end: CPU-seconds of each step of all copies."""
  socket = zmq.asyncio.Context().socket(zmq.PULL)
  socket.bind(address)
  decoder = MsgpackDecoder(EngineCoreOutputs)
  taken = processor(engines, sequences, top)
  outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()

  async def read() -> None:
    while True:
      outputs.put_nowait(
        decoder.decode(await socket.recv_multipart(copy=False))
      )

  reader = asyncio.create_task(read())
  spent = []
  for _ in range(steps):
    began = time.thread_time()
    for _ in range(engines):
      one = await outputs.get()
      taken.process_outputs(one.outputs, one.timestamp, None)
    spent.append(time.thread_time() - began)
  reader.cancel()
  socket.close(linger=0)
  return spent


def measure(engines: int, sequences: int, top: int, steps: int) -> float:
  """The median CPU-seconds of a step."""
  with tempfile.TemporaryDirectory() as folder:
    address = f"ipc://{folder}/outputs"
    stubs = multiprocessing.get_context("spawn").Process(
      target=send, args=(address, engines, sequences, top, WARM + steps)
    )
    stubs.start()
    try:
      spent = asyncio.run(
        receive(address, engines, sequences, top, WARM + steps)
      )
    finally:
      stubs.terminate()
      stubs.join()
  return statistics.median(spent[WARM:])


def main() -> None:
  """Measures and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("--engines", type=int, default=8, help="copies")
  parser.add_argument(
    "--sequences",
    default="64,256,1024",
    help="decoded at once by a copy, separated by commas",
  )
  parser.add_argument("--top", default="0,20", help="values of K, likewise")
  parser.add_argument("--steps", type=int, default=30, help="timed ones")
  asked = parser.parse_args()
  print(
    "copies sequences  K  CPU ms a step of all  us a token  busy at steps/s"
  )
  for top in map(int, asked.top.split(",")):
    for sequences in map(int, asked.sequences.split(",")):
      for engines in sorted({1, asked.engines}):
        seconds = measure(engines, sequences, top, asked.steps)
        each = seconds / (engines * sequences)
        print(
          f"{engines:6d} {sequences:9d} {top:2d} {1e3 * seconds:21.2f}"
          f" {1e6 * each:11.2f} {1 / seconds:16.0f}",
          flush=True,
        )


if __name__ == "__main__":
  main()
