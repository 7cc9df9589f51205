"""The embedded engine beside transformers and vLLM: tokens a second.

    python benchmarks/engines.py --prompts 256 --vllm-python VENV/bin/python

Arithmetic problems of the held-out split, completed by the laboratory's
student with the demo's sampling. All engines get the same token ids, limit,
stop id and dtype. What is counted are generated tokens up to the stop id, that
one included, and no padding.

Each variant is a process of its own that loads the model, completes everything
once to warm up, and then waits for its turn: the timed runs alternate, and the
table has their medians. Loading, compiling and the warm-up are in the column
`start`, not in tokens/s.

Variants:
  jax              the embedded engine, as the demo has it
  transformers-N   `generate`, N prompts at a time, sorted by length and padded
                   on the left
  vllm             `vllm.LLM` of the interpreter that --vllm-python or
                   TRD_VLLM_PYTHON names, without its prefix cache, since the
                   same prompts come again
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("jax", "transformers-64", "transformers-256", "vllm")
PACKAGES = ("jax", "torch", "transformers", "vllm")
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}

# Completes all prompts and returns the numbers of tokens that it generated.
Complete = Callable[[], list[int]]


def make_task(args) -> dict:
  """What every variant is given, as JSON."""
  from trd_jax import hub
  from trd_jax.chat import Chat
  from trd_jax.problems import arithmetic
  from trd_jax.prompts import fit_initial

  folder = hub.model_folder(args.model, None)
  chat = Chat.load(folder)
  problems = arithmetic.generate("heldout", args.prompts, 0)
  prompts = [fit_initial(chat, problem, None, 448) for problem in problems]
  assert all(isinstance(ids, list) for ids in prompts)
  return {
    "folder": str(folder),
    "dtype": args.dtype,
    "prompts": [list(ids) for ids in prompts],
    "stop_ids": sorted(chat.stop_ids),
    "vocab_size": chat.vocab_size,
    "max_new_tokens": args.max_new_tokens,
    "slots": args.slots,
    "decode_steps": args.decode_steps,
    "vllm_memory": args.vllm_memory,
  }


def of_jax(task: dict) -> Complete:
  """The embedded engine."""
  sys.path.insert(0, str(ROOT))
  from trd_jax.engines.engine import Request, Sampling
  from trd_jax.engines.jax_engine import JaxEngine

  engine = JaxEngine.load(
    task["folder"],
    dtype=task["dtype"],
    slots=task["slots"],
    decode_steps=task["decode_steps"],
  )
  sampling = Sampling(
    **SAMPLING,
    stop_ids=tuple(task["stop_ids"]),
    vocab_size=task["vocab_size"],
  )
  requests = [
    Request(str(n), ids, n, task["max_new_tokens"])
    for n, ids in enumerate(task["prompts"])
  ]
  return lambda: [len(c.ids) for c in engine.generate(requests, sampling)]


def of_transformers(task: dict, batch: int) -> Complete:
  """`generate` on batches of about equally long prompts."""
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  model = transformers.AutoModelForCausalLM.from_pretrained(
    task["folder"], dtype=getattr(torch, task["dtype"])
  ).eval()
  stops = task["stop_ids"]
  prompts = sorted(task["prompts"], key=len, reverse=True)

  def complete():
    torch.manual_seed(0)
    counts = []
    for start in range(0, len(prompts), batch):
      rows = prompts[start : start + batch]
      width = max(map(len, rows))
      pads = [width - len(row) for row in rows]
      ids = torch.tensor(
        [[stops[0]] * pad + row for pad, row in zip(pads, rows, strict=True)]
      )
      mask = torch.arange(width)[None] >= torch.tensor(pads)[:, None]
      with torch.inference_mode():
        out = model.generate(
          ids,
          attention_mask=mask.long(),
          do_sample=True,
          **SAMPLING,
          max_new_tokens=task["max_new_tokens"],
          eos_token_id=stops,
          pad_token_id=stops[0],
        )
      for row in out[:, width:].tolist():
        end = (n for n, i in enumerate(row, 1) if i in stops)
        counts.append(next(end, len(row)))
    return counts

  return complete


def of_vllm(task: dict) -> Complete:
  """`vllm.LLM`."""
  import vllm

  llm = vllm.LLM(
    task["folder"],
    dtype=task["dtype"],
    max_model_len=max(map(len, task["prompts"])) + task["max_new_tokens"],
    enable_prefix_caching=False,
    # Of a CPU's memory as well, where vLLM's own default is nearly all.
    gpu_memory_utilization=task["vllm_memory"],
    seed=0,
  )
  sampling = vllm.SamplingParams(
    **SAMPLING,
    max_tokens=task["max_new_tokens"],
    stop_token_ids=task["stop_ids"],
    detokenize=False,
  )
  prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]

  def complete():
    found = llm.generate(prompts, sampling, use_tqdm=False)
    return [len(request.outputs[0].token_ids) for request in found]

  return complete


def work(variant: str, task: dict) -> None:
  """Runs one variant: a line of JSON to stdout for each line on stdin."""
  replies = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # What libraries print goes elsewhere.
  start = time.perf_counter()
  name, _, batch = variant.partition("-")
  if name == "jax":
    complete = of_jax(task)
  elif name == "transformers":
    complete = of_transformers(task, int(batch))
  else:
    complete = of_vllm(task)
  complete()
  versions = {}
  for package in PACKAGES:
    try:
      versions[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      continue
  first = {"start_s": time.perf_counter() - start, "versions": versions}
  print(json.dumps(first), file=replies, flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    counts = complete()
    seconds = time.perf_counter() - start
    assert len(counts) == len(task["prompts"])
    reply = {"seconds": seconds, "tokens": sum(counts)}
    print(json.dumps(reply), file=replies, flush=True)


class Worker:
  """A variant's process.

  Raises:
    RuntimeError: it ended before its time; its last words are in the message.
  """

  def __init__(self, variant: str, python: str, task: Path, log: Path):
    """Starts it and waits until it is warm."""
    self._log = log.open("w+")
    self._process = subprocess.Popen(
      [python, __file__, f"--work={variant}", f"--task={task}"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._log,
      text=True,
    )
    self.runs: list[dict] = []
    self.about = self._reply()

  def run(self) -> None:
    """Has everything completed once more."""
    assert self._process.stdin is not None
    self._process.stdin.write("\n")
    self._process.stdin.flush()
    self.runs.append(self._reply())

  def end(self) -> None:
    """Lets it end."""
    assert self._process.stdin is not None
    self._process.stdin.close()
    self._process.wait()
    self._log.close()

  def _reply(self) -> dict:
    assert self._process.stdout is not None
    if line := self._process.stdout.readline():
      return json.loads(line)
    self._process.wait()
    self._log.seek(0)
    raise RuntimeError(self._log.read()[-2000:])


def rates(runs: list[dict]) -> list[float]:
  """Tokens a second of each run."""
  return [run["tokens"] / run["seconds"] for run in runs]


def facts() -> str:
  """The machine, in a line."""
  model = platform.processor() or platform.machine()
  for line in Path("/proc/cpuinfo").read_text().splitlines():
    if line.startswith("model name"):
      model = line.partition(":")[2].strip()
      break
  load = ", ".join(f"{x:.2f}" for x in os.getloadavg())
  return f"{os.cpu_count()} cores, {model}; load before: {load}"


def main() -> None:
  """Starts the variants, runs them by turns and prints a table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--model", default="lab:student")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--prompts", type=int, default=256)
  parser.add_argument("--max-new-tokens", type=int, default=192)
  parser.add_argument("--slots", type=int)
  parser.add_argument("--decode-steps", type=int, default=16)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--variants", nargs="+", default=VARIANTS)
  parser.add_argument(
    "--vllm-python", default=os.environ.get("TRD_VLLM_PYTHON")
  )
  parser.add_argument("--vllm-memory", type=float, default=0.3)
  parser.add_argument("--json", type=Path, help="append results here")
  parser.add_argument("--work", help=argparse.SUPPRESS)
  parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.work:
    work(args.work, json.loads(args.task.read_text()))
    return
  sys.path.insert(0, str(ROOT))
  print("python", *sys.argv)
  print(facts())
  task = make_task(args)
  workers: dict[str, Worker] = {}
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "task.json"
    path.write_text(json.dumps(task))
    try:
      for variant in args.variants:
        python = args.vllm_python if variant == "vllm" else sys.executable
        if python:
          log = Path(folder) / f"{variant}.log"
          workers[variant] = Worker(variant, python, path, log)
      for _ in range(args.repeats):
        for worker in workers.values():
          worker.run()
    finally:
      for worker in workers.values():
        worker.end()
  report(args, task, workers)


def report(args, task: dict, workers: dict[str, Worker]) -> None:
  """Prints the table; `--json` keeps the runs."""
  versions = {}
  for worker in workers.values():
    # Those of this interpreter before those of vLLM's.
    versions = worker.about["versions"] | versions
  print(", ".join(f"{name} {version}" for name, version in versions.items()))
  print(
    f"{args.model}, {args.dtype}, {len(task['prompts'])} prompts of"
    f" {min(map(len, task['prompts']))} to {max(map(len, task['prompts']))}"
    f" tokens, {args.max_new_tokens} new at most;"
    f" {args.slots or 'automatic'} slots and {args.decode_steps} steps;"
    f" medians of {args.repeats} alternating runs\n"
  )
  base = None
  if "jax" in workers:
    base = statistics.median(rates(workers["jax"].runs))
  print("| variant | tokens/s | lowest | highest | jax / it | tokens | start |")
  print("|---|---|---|---|---|---|---|")
  for variant in args.variants:
    if variant not in workers:
      print(f"| {variant} | not measured: no interpreter | | | | | |")
      continue
    worker = workers[variant]
    speeds = rates(worker.runs)
    middle = statistics.median(speeds)
    print(
      f"| {variant} | {middle:,.0f} | {min(speeds):,.0f} | {max(speeds):,.0f}"
      f" | {f'{base / middle:.2f}' if base else ''}"
      f" | {worker.runs[-1]['tokens']:,} | {worker.about['start_s']:.1f} s |"
    )
    if args.json:
      row = {"variant": variant, **worker.about, "runs": worker.runs}
      with args.json.open("a") as file:
        file.write(json.dumps({**vars(args), **row}, default=str) + "\n")


if __name__ == "__main__":
  main()
