r"""How large, how quick: the report of a run of the paper's size.

    python benchmarks/report_page.py [--problems=40000]

Writes a workdir of that many problems with texts of the paper's lengths (drafts
of 8,000 tokens, refined ones of 900), makes its report in a process of its own,
and opens it in Chromium where that and playwright are installed. Prints the
memory that the process needed, sizes, and how long the page took to show its
list.
"""

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from trd_jax.experiment import experiment, records, shards
from trd_jax.experiment.records import Problem, Trajectory
from trd_jax.experiment.run_dir import RunDir

SHARD = 256
TOKENS = {"rollout": 8_000, "refine": 900}
CHARACTERS = 3.5  # a token


def main():
  """Writes the workdir, starts the process that reports it, opens the page."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--problems", type=int, default=40_000)
  parser.add_argument("--inspect", type=int, default=2_000)
  parser.add_argument("--write", help="used by itself: makes a report")
  arguments = parser.parse_args()
  if arguments.write:
    write(Path(arguments.write), arguments.inspect)
    return
  with tempfile.TemporaryDirectory() as folder:
    workdir = Path(folder) / "run"
    make(workdir, arguments.problems)
    command = [sys.executable, __file__, f"--inspect={arguments.inspect}"]
    out = subprocess.run(
      [*command, f"--write={workdir}"], capture_output=True, check=True
    )
    figures = json.loads(out.stdout.splitlines()[-1])
    report = workdir / "analyze" / "report"
    pieces = [path.stat().st_size for path in (report / "pieces").iterdir()]
    index = (report / "index.html").stat().st_size
    rows = {
      "problems": f"{arguments.problems:,}",
      "with their texts": f"{arguments.inspect:,}",
      "made in": f"{figures['seconds']:.0f} s",
      "memory to make it": f"{figures['bytes'] / 2**30:.2f} GiB",
      "index.html": f"{index / 1e6:.1f} MB",
      "pieces": f"{len(pieces)}, the largest {max(pieces) / 1e6:.2f} MB",
    }
    problem = RunDir(workdir).table("problems", Problem, ["text"])[0][0]
    words = problem.as_py()[150:175].strip()  # which no list shows
    for name, seconds in opened(report / "index.html", words).items():
      rows[name] = f"{seconds:.2f} s"
    for name, value in rows.items():
      print(f"{name:28} {value}")


def make(workdir: Path, problems: int) -> None:
  """Writes the workdir, as columns and not row by row."""
  rng = random.Random(0)
  run_dir = RunDir(workdir, experiment.to_json(experiment.Experiment()))
  words = [f"w{n}" for n in range(2_000)] + ["\n"] * 200
  text = " ".join(rng.choices(words, k=400_000))
  numbers = np.random.default_rng(0)
  for stage in ("problems", "rollout", "refine"):
    folder = run_dir.stage(stage)
    for start in range(0, problems, SHARD):
      count = min(SHARD, problems - start)
      ids = [f"deepscaler-{n:06d}" for n in range(start, start + count)]
      made = (
        _problems(ids, text, rng)
        if stage == "problems"
        else _trajectories(ids, stage, text, rng, numbers)
      )
      folder.mkdir(parents=True, exist_ok=True)
      shards.write_table(folder / f"shard-{start:020d}.parquet", made)
    run_dir.mark_done(stage, {})


def _part(text: str, length: int, rng: random.Random) -> str:
  start = rng.randrange(len(text) - length)
  return text[start : start + length]


def _problems(ids, text, rng) -> pa.Table:
  rows = {
    "problem_id": ids,
    "text": [_part(text, 300, rng) for _ in ids],
    "answer": ["1"] * len(ids),
    "solution": [_part(text, 2_000, rng) for _ in ids],
    "domain": ["math"] * len(ids),
    "source": ["deepscaler"] * len(ids),
    "tests": [None] * len(ids),
    "meta": ["{}"] * len(ids),
  }
  return pa.table(rows, schema=records.schema(Problem))


def _trajectories(ids, stage, text, rng, numbers) -> pa.Table:
  count = len(ids)
  lengths = numbers.integers(
    TOKENS[stage] // 2, TOKENS[stage] * 3 // 2, count
  ).astype(np.int32)
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
  values = pa.array(numbers.integers(0, 150_000, offsets[-1], np.int32))
  schema = records.schema(Trajectory)
  right = numbers.random(count) < 0.5
  columns = {
    "key": [f"{stage}-{one}" for one in ids],
    "problem_id": ids,
    "stage": [stage] * count,
    "text": [_part(text, int(n * CHARACTERS), rng) for n in lengths],
    "draft_key": [
      f"rollout-{one}" if stage == "refine" else None for one in ids
    ],
    "correct": right.tolist(),
    "reason": ["match" if one else "mismatch" for one in right],
    "extracted": ["1"] * count,
    "finish_reason": ["stop"] * count,
    "response_ids": pa.ListArray.from_arrays(
      pa.array(offsets), values, type=schema.field("response_ids").type
    ),
  }
  plain = {
    pa.string(): "x",
    pa.bool_(): False,
    pa.int64(): 0,
    schema.field("prompt_ids").type: [0],
  }
  return pa.table(
    {
      field.name: columns.get(
        field.name,
        [None if field.nullable else plain[field.type]] * count,
      )
      for field in schema
    },
    schema=schema,
  )


def write(workdir: Path, inspect: int) -> None:
  """Makes the report, and prints what that took as JSON."""
  from trd_jax.analyze import report
  from trd_jax.analyze.runs import Run

  start = time.monotonic()
  report.write([Run(workdir)], {}, workdir / "analyze" / "report", inspect)
  seconds = time.monotonic() - start
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  print(json.dumps({"seconds": seconds, "bytes": most}))


def opened(index: Path, words: str) -> dict[str, float]:
  """Opens the page; returns how long what took, {} without a browser.

  Args:
    index: the page.
    words: that are in a problem, and searched for.
  """
  chromium = shutil.which("chromium")
  try:
    from playwright.sync_api import sync_playwright
  except ImportError:
    return {}
  if chromium is None:
    return {}
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=chromium, args=["--no-sandbox"]
    )
    page = browser.new_page()
    found = {}

    def timed(name, action, selector):
      start = time.monotonic()
      action()
      page.locator(selector).first.wait_for()
      found[name] = time.monotonic() - start

    url = index.as_uri() + "#inspect"
    timed("opened in", lambda: page.goto(url), "#list a")
    timed(
      "a trajectory opened in",
      lambda: page.keyboard.press("j"),
      ".lane .words",
    )
    timed(
      "all problems searched in",
      lambda: page.locator("#query").fill(words),
      "#list a",
    )
    browser.close()
  return found


if __name__ == "__main__":
  main()
