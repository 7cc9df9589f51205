"""What the rollout stage costs over the bare engine, in one run.

    .venv-vllm/bin/python benchmarks/rollout_overhead.py

The same problems with the same sampling and seeds go, alternately, through
`vllm.LLM.generate`, as prompts that are ready, and through everything that
`trd_jax.rollout` does with them: prompts, preflight, generation, decoding,
grading, shards and summary. Each has one vLLM, loaded before the clock starts
and used again; a run of either begins with an empty prefix cache, and the
stage's with a workdir that holds the problems and nothing else. The ratio is
of medians. Run by an interpreter that has vLLM (third_party/vllm/install.sh).

One side holds no memory or thread that slows the other: each sits in a process
of its own, which waits on a pipe while the other is on the clock.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "demo.py"


def experiment_of(args):
  """The demo, with as many problems as there are requests."""
  from trd_jax import config_file, experiment

  config, source = config_file.load(str(CONFIG))
  return experiment.from_config(
    config
    | {
      "data.arithmetic.num_problems": args.requests,
      "engine.name": "vllm",
      "engine.vllm.eager": not args.compile,
      "student.dtype": args.dtype,
    },
    source,
  )


def answer(side, args) -> None:
  """Runs a side each time a line comes in, and says what it returned."""
  say = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # What the work prints is no answer.
  work, finish = side(args)
  work()  # A first run warms up.
  print("ready", file=say, flush=True)
  for _ in sys.stdin:
    print(json.dumps(work()), file=say, flush=True)
  finish()


def bare(args):
  """`vllm.LLM.generate` on the prompts of the stage."""
  os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
  from vllm import LLM, SamplingParams

  from trd_jax import generation
  from trd_jax.problems import store
  from trd_jax.prompts import fit_initials
  from trd_jax.run_dir import RunDir

  e = experiment_of(args)
  who = generation.speaker(e.student, None)
  section = e.rollout
  with tempfile.TemporaryDirectory() as folder:
    problems = list(store.load(e, RunDir(folder)))
  prompts = list(
    fit_initials(who.chat, problems, None, section.max_prompt_tokens)
  )
  requests, params = [], []
  for problem, ids in zip(problems, prompts, strict=True):
    _, seed = generation.identity(
      "rollout", who, section, ids, problem.problem_id, 0, e.seed
    )
    requests.append({"prompt_token_ids": list(ids)})
    params.append(
      SamplingParams(
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        max_tokens=section.max_response_tokens,
        stop_token_ids=list(who.chat.stop_ids),
        seed=seed,
      )
    )
  longest = max(map(len, prompts)) + section.max_response_tokens
  llm = LLM(
    str(who.folder),
    dtype=who.dtype,
    max_model_len=longest,
    enforce_eager=not args.compile,
    enable_chunked_prefill=False,
    kv_cache_memory_bytes=4 << 30,
    generation_config="vllm",
    seed=0,
  )

  def work() -> dict:
    llm.reset_prefix_cache()
    start = time.perf_counter()
    outputs = llm.generate(requests, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = sum(len(made.outputs[0].token_ids) for made in outputs)
    return {"seconds": seconds, "requests": len(outputs), "tokens": tokens}

  return work, lambda: None


def stage(args):
  """`trd_jax.rollout`, whole, on an engine that is loaded already."""
  from trd_jax import rollout
  from trd_jax.engines import engine as engines
  from trd_jax.problems import store
  from trd_jax.records import Trajectory
  from trd_jax.run_dir import RunDir

  e = experiment_of(args)
  make, loaded, finish = engines.make, [], []

  def keep(*arguments, **keywords):
    if not loaded:
      loaded.append(make(*arguments, **keywords))
      finish.append(loaded[0].close)
      loaded[0].close = lambda: None  # It is used again.
    return loaded[0]

  engines.make = keep

  def work() -> dict:
    folder = Path(tempfile.mkdtemp())
    try:
      if loaded:
        loaded[0].reset_prefix_cache()
      run_dir = RunDir(folder)
      store.load(e, run_dir)
      start = time.perf_counter()
      rollout.run(e, run_dir, None)
      seconds = time.perf_counter() - start
      rows = run_dir.read("rollout", Trajectory)
    finally:
      shutil.rmtree(folder)
    return {
      "seconds": seconds,
      "requests": len(rows),
      "tokens": sum(len(row.response_ids) for row in rows),
      "graded": sum(row.correct is not None for row in rows),
    }

  return work, lambda: finish[0]()


@contextlib.contextmanager
def started(side: str, args):
  """A process for one side; yields what makes it do a run."""
  command = [sys.executable, __file__, f"--side={side}"]
  command += [f"--requests={args.requests}", f"--dtype={args.dtype}"]
  command += ["--compile"] if args.compile else []
  with subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdin is not None
    assert process.stdout is not None

    def run() -> dict:
      process.stdin.write("\n")
      process.stdin.flush()
      return json.loads(process.stdout.readline())

    if process.stdout.readline().strip() != "ready":
      sys.exit(f"{side}: did not start; what it says stands above")
    try:
      yield run
    finally:
      process.stdin.close()


def main() -> None:
  """Measures and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--requests", type=int, default=2048)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--compile", action="store_true", help="not eager")
  parser.add_argument("--side", choices=["bare", "stage"])
  args = parser.parse_args()
  if args.side:
    answer({"bare": bare, "stage": stage}[args.side], args)
    return
  runs: dict[str, list[dict]] = {"bare": [], "stage": []}
  with started("bare", args) as on_bare, started("stage", args) as on_stage:
    for repeat in range(args.repeats):
      # Neither side is always the first.
      order = [("bare", on_bare), ("stage", on_stage)]
      for side, run in order if repeat % 2 == 0 else order[::-1]:
        runs[side].append(run())
        print(f"{side:>6} {runs[side][-1]}", file=sys.stderr, flush=True)
  report(args, runs)


def report(args, runs: dict[str, list[dict]]) -> None:
  """Prints what was seen, and the ratio."""
  print(f"\n{platform.machine()}, {os.cpu_count()} cores, {args.dtype}")
  print(f"{'':<24}{'requests':>9}{'tokens':>9}{'seconds':>9}{'tokens/s':>10}")
  median = {}
  for side, title in (
    ("bare", "vllm.LLM.generate"),
    ("stage", "trd_jax.rollout, whole"),
  ):
    seconds = [run["seconds"] for run in runs[side]]
    median[side] = statistics.median(seconds)
    first = runs[side][0]
    print(
      f"{title:<24}{first['requests']:>9,}{first['tokens']:>9,}"
      f"{median[side]:>9.2f}{first['tokens'] / median[side]:>10,.0f}"
    )
  pairs = zip(runs["bare"], runs["stage"], strict=True)
  ratios = [s["seconds"] / b["seconds"] for b, s in pairs]
  print(
    f"ratio of medians {median['stage'] / median['bare']:.3f}; by pair"
    f" {', '.join(f'{ratio:.3f}' for ratio in ratios)}"
  )


if __name__ == "__main__":
  main()
