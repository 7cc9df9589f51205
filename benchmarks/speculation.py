"""What drafts looked up in the prompt give the refine stage.

    python benchmarks/speculation.py                 # lookup and vLLM, demo
    python benchmarks/speculation.py --workdir=RUN   # lookup alone, of any run

**Lookup** needs no engine. For each refinement in a workdir it walks y_r: the
last tokens are looked up in prompt and response, what followed there is the
draft, and what of it agrees with y_r would have been accepted, had the model
been greedy. Tokens a pass are so what speculation could gain at most: if a
pass took as long with a draft in it as without, and looking up took no time.

**vLLM** generates the refinements of the demo (the laboratory's student, OPSD,
temperature 0) with and without drafts, alternately (`turns.py`), as many
sequences at once as the table says. Both sides are checked to give the same
tokens. Acceptance is vLLM's own count.

Run by an interpreter with JAX, which makes the demo's rollouts; the sides run
in --vllm-python.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import results
import turns

CONFIG = results.ROOT / "configs" / "demo.py"
WITHOUT, WITH = "without", "ngram"
# Shortest and longest end of a text that is looked up, and tokens of a draft.
LOOKUPS = ((1, 3), (2, 4), (3, 8), (5, 5))
LENGTHS = (4, 8, 16)
OURS = ((3, 8), 8)
NOT_MEASURED = ("H100, Qwen3-8B", *["not measured"] * 4)


@dataclasses.dataclass(frozen=True)
class Counts:
  """What looking up would have given.

  Attributes:
    tokens: of the responses.
    passes: of the model, in which they are made.
    drafts: passes that had a draft to check.
    drafted: tokens of the drafts.
    accepted: of those, the ones that the response has, too.
  """

  tokens: int = 0
  passes: int = 0
  drafts: int = 0
  drafted: int = 0
  accepted: int = 0

  def __add__(self, other: "Counts") -> "Counts":
    """Returns the counts of both."""
    mine, its = dataclasses.astuple(self), dataclasses.astuple(other)
    return Counts(*(a + b for a, b in zip(mine, its, strict=True)))


class Lookup:
  """A text, and where each of its short runs of tokens went on.

  As vLLM's CPU build looks up: of all places at which the longest end of the
  text stood before, the first.

  Args:
    shortest: the fewest tokens that are looked up.
    longest: the most.
  """

  def __init__(self, shortest: int, longest: int):
    self._lengths = range(longest, shortest - 1, -1)
    self._text: list[int] = []
    self._next: dict[tuple[int, ...], int] = {}

  def add(self, tokens: Iterable[int]) -> None:
    """Appends tokens; the runs that end before each of them go on there."""
    for token in tokens:
      end = len(self._text)
      for length in self._lengths:
        if length <= end:
          self._next.setdefault(tuple(self._text[end - length :]), end)
      self._text.append(token)

  def draft(self, tokens: int) -> list[int]:
    """Returns what followed the longest end that was there before, or []."""
    for length in self._lengths:
      if length <= len(self._text):
        found = self._next.get(tuple(self._text[-length:]))
        if found is not None:
          return self._text[found : found + tokens]
    return []


def looked_up(
  prompt: Sequence[int],
  response: Sequence[int],
  tokens: int,
  shortest: int,
  longest: int,
) -> Counts:
  """Returns what drafts would have given a response.

  Args:
    prompt: ids, with the text that the response rewrites.
    response: ids.
    tokens: the most of a draft.
    shortest: see `Lookup`.
    longest: see `Lookup`.
  """
  text = Lookup(shortest, longest)
  text.add(prompt)
  # The pass over the prompt gives the first token, before any draft.
  text.add(response[:1])
  done = min(1, len(response))
  passes, drafts, drafted, accepted = done, 0, 0, 0
  while done < len(response):
    draft = text.draft(tokens)
    right = 0
    for guess, token in zip(draft, response[done:], strict=False):
      if guess != token:
        break
      right += 1
    passes += 1
    drafts += bool(draft)
    drafted += len(draft)
    accepted += right
    # Behind the accepted ones each pass gives a token of the model's own.
    new = response[done : done + right + 1]
    text.add(new)
    done += len(new)
  return Counts(len(response), passes, drafts, drafted, accepted)


def lookup_table(workdir: Path) -> results.Table:
  """The arithmetic over all refinements of a workdir."""
  from trd_jax.experiment.records import Trajectory
  from trd_jax.experiment.run_dir import RunDir

  run = RunDir(workdir)
  columns = ["key", "correct"]
  right = {
    row["key"]: row["correct"]
    for row in run.table("rollout", Trajectory, columns).to_pylist()
  }
  columns = ["draft_key", "prompt_ids", "response_ids"]
  asked = run.table("refine", Trajectory, columns).to_pylist()

  def row(what: str, rows, bounds, tokens: int) -> tuple[str, ...]:
    counts = sum(
      (
        looked_up(one["prompt_ids"], one["response_ids"], tokens, *bounds)
        for one in rows
      ),
      Counts(),
    )
    return (
      what,
      f"{bounds[0]}-{bounds[1]}",
      str(tokens),
      f"{counts.accepted / max(1, counts.tokens):.1%}",
      f"{counts.accepted / max(1, counts.drafted):.1%}",
      f"{counts.accepted / max(1, counts.drafts):.2f}",
      f"{counts.tokens / max(1, counts.passes):.2f}",
      f"{(counts.passes + counts.drafted) / max(1, counts.tokens):.2f}",
    )

  rows = [row("all", asked, b, k) for b in LOOKUPS for k in LENGTHS]
  for what, verdict in (("y_o right", True), ("y_o wrong", False)):
    some = [one for one in asked if right.get(one["draft_key"]) is verdict]
    rows.append(row(what, some, *OURS))
  return results.Table(
    "Lookup: what of y_r stands in its prompt",
    f"{len(asked):,} refinements; no engine. Drafts and looked-up ends in"
    " tokens; positions: what the model computes for each token.",
    (
      *("refinements", "looked up", "draft", "of y_r's tokens", "of drafted"),
      *("a draft", "tokens a pass", "positions a token"),
    ),
    rows,
  )


def make_workdir(workdir: Path, problems: int) -> None:
  """The demo's rollouts and greedy refinements, by the embedded engine."""
  for stage in ("rollout", "refine"):
    command = [sys.executable, "-m", f"trd_jax.{stage}", f"--config={CONFIG}"]
    command += [f"--workdir={workdir}", *flags(problems)]
    subprocess.run(
      command, check=True, stdout=sys.stderr, env=_environment(os.environ)
    )


def flags(problems: int) -> list[str]:
  """What the demo is changed to."""
  return [
    f"--config.data.arithmetic.num_problems={problems}",
    "--config.refine.temperature=0.0",
  ]


def _environment(mine: Mapping[str, str]) -> dict[str, str]:
  """The environment in which the stages of this folder are found."""
  return {**mine, "PYTHONPATH": str(results.ROOT)}


def prepare(side: str, args):
  """A side's process: see `turns.serve`."""
  from trd_jax.experiment import config_file, experiment
  from trd_jax.experiment.engines import VllmEngine as Spec
  from trd_jax.experiment.records import Trajectory
  from trd_jax.experiment.run_dir import RunDir
  from trd_jax.generation import chat_model, generate
  from trd_jax.generation.engines.engine import Request
  from trd_jax.generation.engines.vllm_engine import VllmEngine

  config, source = config_file.load(str(CONFIG))
  e = experiment.from_config(config | {"refine.temperature": 0.0}, source)
  run = RunDir(args.workdir)
  model = chat_model.open_model(e.teacher_model, run)
  rows = run.read("refine", Trajectory)
  longest = max(len(row.prompt_ids) for row in rows)
  limit = e.refine.max_response_tokens
  requests = [Request(r.key, list(r.prompt_ids), r.seed, limit) for r in rows]
  expected = {row.key: tuple(row.response_ids) for row in rows}
  sampling = generate.sampling_of(e.refine, model.chat)
  spec = Spec(
    speculative="ngram" if side == WITH else "none",
    speculative_tokens=args.tokens,
  )
  engine = VllmEngine(spec, model.files, max_model_tokens=longest + limit)

  def work() -> dict:
    """Each number of sequences at once, on as many requests as last."""
    found = {}
    for at_once in args.at_once:
      some = requests[: min(len(requests), args.most * at_once)]
      engine.reset_prefix_cache()
      before, tokens, equal = engine.drafted(), 0, 0
      start = time.perf_counter()
      for begin in range(0, len(some), at_once):
        batch = some[begin : begin + at_once]
        for done in engine.generate(batch, sampling):
          tokens += len(done.ids)
          equal += done.ids == expected[done.key]
      seconds = time.perf_counter() - start
      case = {"tokens_s": tokens / seconds, "tokens": tokens}
      case |= {"requests": len(some), "equal": equal}
      after = engine.drafted()
      if before is not None and after is not None:
        case |= after.since(before)._asdict()
      found[str(at_once)] = case
    return found

  work()
  return work, {}


def vllm_table(cases: results.Cases, args) -> results.Table:
  """Both sides by the number of sequences at once, H100's row last."""
  rows = []
  for at_once in map(str, args.at_once):
    by_side = {
      side: {"runs": [run[at_once] for run in case.get("runs", ())]}
      for side, case in cases.items()
    }
    if not all(case["runs"] for case in by_side.values()):
      continue
    for case in by_side.values():
      for run in case["runs"]:
        if run["equal"] < run["requests"]:
          raise ValueError(
            f"{run['equal']} of {run['requests']} refinements are those of the"
            " embedded engine"
          )
    counts = by_side[WITH]["runs"][-1]
    ratios = results.ratios(by_side, WITH, WITHOUT, "tokens_s")
    rows.append(
      (
        f"{at_once} at once, {counts['requests']} refinements",
        *(
          results.spread(results.values(by_side[side], "tokens_s"), ",.0f")
          for side in (WITHOUT, WITH)
        ),
        results.spread(ratios, ".2f"),
        f"{counts['accepted'] / max(1, counts['drafted']):.1%},"
        f" {counts['accepted'] / max(1, counts['drafts']):.2f} a draft",
      )
    )
  return results.Table(
    "vLLM: refinements with and without drafts",
    f"The laboratory's student in float32 on vLLM's CPU build, temperature 0,"
    f" drafts of {args.tokens}; {args.repeats} alternating runs, median"
    f" (lowest-highest). {results.failures(cases)}".strip(),
    (
      *("sequences", "tokens/s without", "tokens/s with", "with / without"),
      "accepted",
    ),
    [*rows, NOT_MEASURED],
  )


def main() -> None:
  """Measures and prints the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--workdir", type=Path, help="a run with refinements")
  parser.add_argument("--problems", type=int, default=256)
  parser.add_argument("--tokens", type=int, default=OURS[1], help="of a draft")
  parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8, 256])
  parser.add_argument(
    "--most", type=int, default=16, help="refinements by sequences at once"
  )
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--vllm-python", default=".venv-vllm/bin/python")
  parser.add_argument("--side", choices=(WITHOUT, WITH), help=argparse.SUPPRESS)
  args = parser.parse_args()
  sys.path.insert(0, str(results.ROOT))
  if args.side:
    turns.serve(lambda: prepare(args.side, args))
    return
  if args.workdir is not None:
    results.show([lookup_table(args.workdir)])
    return
  with tempfile.TemporaryDirectory() as folder:
    workdir = Path(folder) / "run"
    make_workdir(workdir, args.problems)
    results.show([lookup_table(workdir)])
    command = [args.vllm_python, __file__, f"--workdir={workdir}"]
    command += [f"--tokens={args.tokens}", f"--most={args.most}"]
    command += ["--at-once", *map(str, args.at_once)]
    cases = turns.take_turns(
      {side: [*command, f"--side={side}"] for side in (WITHOUT, WITH)},
      args.repeats,
    )
  results.show([vllm_table(cases, args)])


if __name__ == "__main__":
  main()
