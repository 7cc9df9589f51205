"""What the rollout stage costs over the bare engine, in one run.

    .venv-vllm/bin/python benchmarks/rollout_overhead.py

The same problems with the same sampling and seeds go, alternately, through
`vllm.LLM.generate`, as prompts that are ready, and through everything that
`trd_jax.rollout` does with them: prompts, preflight, generation, decoding,
grading, shards and summary. Each has one vLLM, loaded before the clock starts
and used again; a run of any begins with an empty prefix cache, and the
stage's with a workdir that holds the problems and nothing else. The sides take
turns (`turns.py`). Run by an interpreter that has vLLM
(third_party/vllm/install.sh).

The stage sends the longest prompts first, which ends with fewer idle sequences.
A third side shows what bare vLLM makes of that order: beside it the stage's own
work stands alone.

Beside the wall time stand the seconds before the engine gets its first request
and after it has given its last completion, and the CPU-seconds of this side's
own process, in which vLLM's engine isn't: what the stage adds to both is what
it costs.
"""

import argparse
import atexit
import functools
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import results
import turns

CONFIG = results.ROOT / "configs" / "demo.py"
BARE, STAGE = "vllm.LLM.generate", "trd_jax.rollout, whole"
ORDERED = "vllm.LLM.generate, longest prompts first"
SIDES = (BARE, ORDERED, STAGE)


def experiment_of(args):
  """The demo, with as many problems as there are requests."""
  from trd_jax.experiment import config_file, experiment

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


def prepare(side: str, args):
  """A side's process: see `turns.serve`."""
  makers = {
    BARE: bare,
    ORDERED: functools.partial(bare, longest_first=True),
    STAGE: stage,
  }
  work = makers[side](args)
  work()
  return work, {}


def bare(args, longest_first: bool = False):
  """`vllm.LLM.generate` on the prompts of the stage."""
  os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
  from vllm import LLM, SamplingParams

  from trd_jax.data.problems import store
  from trd_jax.experiment.run_dir import RunDir
  from trd_jax.generation import chat_model
  from trd_jax.generation.sampling_stage import SamplingStage

  e = experiment_of(args)
  model = chat_model.open_model(e.student, None)
  section = e.rollout
  with tempfile.TemporaryDirectory() as folder:
    run_dir = RunDir(folder)
    problems = list(store.load(e, run_dir))
  sampling = SamplingStage(e, run_dir, "rollout", model, section, None)
  prompts = list(
    sampling.prompt_set.fit_initials(
      model.chat, problems, None, section.max_prompt_tokens
    )
  )
  asked = list(zip(problems, prompts, strict=True))
  if longest_first:
    asked.sort(key=lambda pair: -len(pair[1]))
  requests, params = [], []
  for problem, ids in asked:
    _, seed = sampling.identity(ids, problem.problem_id, 0, e.seed)
    requests.append({"prompt_token_ids": list(ids)})
    params.append(
      SamplingParams(
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        max_tokens=section.max_response_tokens,
        stop_token_ids=list(model.chat.stop_ids),
        seed=seed,
      )
    )
  longest = max(map(len, prompts)) + section.max_response_tokens
  llm = LLM(
    str(model.folder),
    dtype=model.dtype,
    max_model_len=longest,
    enforce_eager=not args.compile,
    enable_chunked_prefill=False,
    kv_cache_memory_bytes=4 << 30,
    generation_config="vllm",
    seed=0,
  )

  def work() -> dict:
    llm.reset_prefix_cache()
    cpu, start = time.process_time(), time.perf_counter()
    outputs = llm.generate(requests, params, use_tqdm=False)
    return {
      "wall_s": time.perf_counter() - start,
      "before_s": 0.0,
      "after_s": 0.0,
      "cpu_s": time.process_time() - cpu,
      "requests": len(outputs),
      "tokens": sum(len(made.outputs[0].token_ids) for made in outputs),
    }

  return work


def stage(args):
  """`trd_jax.rollout`, whole, on an engine that is loaded already."""
  from trd_jax import rollout
  from trd_jax.data.problems import store
  from trd_jax.experiment.records import Trajectory
  from trd_jax.experiment.run_dir import RunDir
  from trd_jax.generation.engines import factory

  e = experiment_of(args)
  make, loaded, ends = factory.make, [], []

  def keep(*arguments, **keywords):
    if not loaded:
      loaded.append(engine := make(*arguments, **keywords))
      atexit.register(engine.close)
      engine.close = lambda: None  # It is used again.
      engine.generate = functools.partial(timed, engine.generate)
    return loaded[0]

  def timed(generate, *arguments):
    ends[:] = [time.perf_counter()]
    yield from generate(*arguments)
    ends.append(time.perf_counter())

  factory.make = keep

  def work() -> dict:
    folder = Path(tempfile.mkdtemp())
    try:
      if loaded:
        loaded[0].reset_prefix_cache()
      run_dir = RunDir(folder)
      store.load(e, run_dir)
      cpu, start = time.process_time(), time.perf_counter()
      rollout.run(e, run_dir, None)
      end, cpu = time.perf_counter(), time.process_time() - cpu
      rows = run_dir.read("rollout", Trajectory)
    finally:
      shutil.rmtree(folder)
    return {
      "wall_s": end - start,
      "before_s": ends[0] - start,
      "after_s": end - ends[1],
      "cpu_s": cpu,
      "requests": len(rows),
      "tokens": sum(len(row.response_ids) for row in rows),
      "graded": sum(row.correct is not None for row in rows),
    }

  return work


def main() -> None:
  """Measures and prints a table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--requests", type=int, default=2048)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--compile", action="store_true", help="not eager")
  parser.add_argument("--quick", action="store_true", help="a smoke test")
  parser.add_argument(
    "--json", type=results.output, help="write the results here"
  )
  parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
  args = parser.parse_args()
  sys.path.insert(0, str(results.ROOT))
  if args.side:
    turns.serve(lambda: prepare(args.side, args))
    return
  if args.quick:
    args.requests, args.repeats = 16, 2
  document = results.Document("rollout_overhead", args.json, args.quick)
  command = [sys.executable, __file__]
  command += [f"--requests={args.requests}", f"--dtype={args.dtype}"]
  command += ["--compile"] if args.compile else []
  cases = turns.take_turns(
    {side: [*command, f"--side={side}"] for side in SIDES}, args.repeats
  )
  names = ("requests", "repeats", "dtype", "compile")
  settings = {name: getattr(args, name) for name in names}
  document.add("rollout_overhead", settings, cases)
  results.show(tables(document.fields))


def tables(document: dict) -> list[results.Table]:
  """One table: seconds and what the stage adds."""
  made = []
  for found in document["groups"].values():
    settings, cases = found["settings"], found["cases"]
    rows = [
      (
        side,
        f"{case['runs'][0]['requests']:,}",
        f"{case['runs'][0]['tokens']:,}",
        results.spread(results.values(case, "wall_s"), ".2f"),
        results.spread(results.ratios(cases, side, BARE, "wall_s"), ".3f"),
        *(
          results.spread(results.values(case, name), ".2f")
          for name in ("before_s", "after_s", "cpu_s")
        ),
      )
      for side, case in cases.items()
      if "failed" not in case
    ]
    text = (
      f"The laboratory's student in {settings['dtype']} on vLLM;"
      f" {settings['repeats']} alternating runs; median (lowest-highest),"
      f" ratios by round. {results.failures(cases)}"
    )
    columns = ("side", "requests", "tokens", "seconds", "it / bare")
    columns += ("before", "after", "CPU-s")
    made.append(
      results.Table("Rollout: what it adds", text.strip(), columns, rows)
    )
  return made


if __name__ == "__main__":
  main()
