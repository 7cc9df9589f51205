"""The embedded engine beside transformers and vLLM: tokens a second.

    python benchmarks/engines.py [--vllm-python VENV/bin/python] [--quick]

Arithmetic problems of the held-out split, completed by the laboratory's
student with the demo's sampling. All engines get the same token ids, limit,
stop id and dtype. What is counted are generated tokens up to the stop id, that
one included, and no padding.

Each variant is a process of its own and they take turns (`turns.py`), after
completing everything once to warm up. Loading, compiling and the warm-up are in
the column `start`, not in tokens/s.

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
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import results
import turns

VARIANTS = ("jax", "transformers-64", "transformers-256", "vllm")
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}

# Completes all prompts and returns the numbers of tokens that it generated.
Complete = Callable[[], list[int]]


def make_task(args) -> dict:
  """What every variant is given, as JSON."""
  from trd_jax.data.chat import Chat
  from trd_jax.data.problems import arithmetic
  from trd_jax.data.prompts import default
  from trd_jax.model.weights import hub

  folder = hub.model_folder(args.model, None)
  chat = Chat.load(folder)
  problems = arithmetic.generate("heldout", args.prompts, 0)
  prompts = [
    default().fit_initial(chat, problem, None, 448) for problem in problems
  ]
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
  sys.path.insert(0, str(results.ROOT))
  from trd_jax.generation.engines.engine import Request, Sampling
  from trd_jax.generation.engines.jax_engine import JaxEngine

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


def prepare(variant: str, task: dict):
  """A variant's process: see `turns.serve`."""
  name, _, batch = variant.partition("-")
  if name == "jax":
    complete = of_jax(task)
  elif name == "transformers":
    complete = of_transformers(task, int(batch))
  else:
    complete = of_vllm(task)
  complete()

  def run() -> dict:
    start = time.perf_counter()
    counts = complete()
    seconds = time.perf_counter() - start
    assert len(counts) == len(task["prompts"])
    tokens = sum(counts)
    return {"wall_s": seconds, "tokens": tokens, "rate": tokens / seconds}

  return run, {}


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
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--variants", nargs="+", default=VARIANTS)
  parser.add_argument(
    "--vllm-python", default=os.environ.get("TRD_VLLM_PYTHON")
  )
  parser.add_argument("--vllm-memory", type=float, default=0.3)
  parser.add_argument("--quick", action="store_true", help="a smoke test")
  parser.add_argument(
    "--json", type=results.output, help="write the results here"
  )
  parser.add_argument("--work", help=argparse.SUPPRESS)
  parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.work:
    turns.serve(lambda: prepare(args.work, json.loads(args.task.read_text())))
    return
  if args.quick:
    args.prompts, args.max_new_tokens, args.repeats = 8, 16, 2
  sys.path.insert(0, str(results.ROOT))
  document = results.Document("engines", args.json, args.quick)
  task = make_task(args)
  commands = {}
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "task.json"
    path.write_text(json.dumps(task))
    for variant in args.variants:
      python = args.vllm_python if variant == "vllm" else sys.executable
      if python:
        commands[variant] = [python, __file__, f"--work={variant}"]
        commands[variant] += [f"--task={path}"]
    cases = turns.take_turns(commands, args.repeats)
  if "vllm" in set(args.variants) - commands.keys():
    cases["vllm"] = {"failed": "there is no vLLM: run make vllm"}
  lengths = [len(ids) for ids in task["prompts"]]
  settings = {
    "model": args.model,
    "dtype": args.dtype,
    "prompts": len(lengths),
    "shortest": min(lengths),
    "longest": max(lengths),
    "new_tokens": args.max_new_tokens,
    "slots": args.slots or "automatic",
    "decode_steps": args.decode_steps,
    "repeats": args.repeats,
  }
  document.add("engines", settings, cases)
  results.show(tables(document.fields))


def tables(document: dict) -> list[results.Table]:
  """One table: tokens a second."""
  made = []
  for found in document["groups"].values():
    settings, cases = found["settings"], found["cases"]
    rows = [
      (
        name,
        results.spread(results.values(case, "rate"), ",.0f"),
        results.spread(results.ratios(cases, "jax", name, "rate"), ".2f"),
        f"{case['runs'][-1]['tokens']:,}",
        f"{case['about']['start_s']:.1f} s",
      )
      for name, case in cases.items()
      if "failed" not in case
    ]
    text = (
      f"{settings['model']}, {settings['dtype']}, {settings['prompts']} prompts"
      f" of {settings['shortest']} to {settings['longest']} tokens,"
      f" {settings['new_tokens']} new at most; {settings['slots']} slots and"
      f" {settings['decode_steps']} steps; {settings['repeats']} alternating"
      " runs; median (lowest-highest), ratios by round."
      f" {results.failures(cases)}"
    )
    columns = ("variant", "tokens/s", "jax / it", "tokens", "start")
    made.append(
      results.Table("Generation: engines", text.strip(), columns, rows)
    )
  return made


if __name__ == "__main__":
  main()
