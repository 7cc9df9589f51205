"""A workdir of as many problems as a real run has, made quickly.

    python -m tests.support.large_workdir FOLDER [ROWS]

Lengths are the paper's of its 8B model: y_o has a median of 7.7K tokens and
y_r of 0.88K. Ids and text mean nothing.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trd_jax.experiment import experiment, records
from trd_jax.experiment.files.json_files import write_json
from trd_jax.experiment.records import GradedSample, Problem, Trajectory
from trd_jax.experiment.run_dir import RunDir
from trd_jax.grading import estimators

ROWS = 40_245
_SHARD = 256
_MOST = 16_384  # tokens of a response
_CHARACTERS = 4  # a token
_POOL = 1 << 22
BENCHMARKS = {"aime24": 30, "hmmt25": 30, "beyondaime": 100, "amobench": 39}
K = 16


def workdir(root: Path, rows: int = ROWS, seed: int = 0) -> Path:
  """Makes a finished TRD run of mathematics."""
  chosen = experiment.from_config(
    {
      "data.source": "deepscaler",
      "domain": "math",
      "evaluate.benchmarks": tuple(BENCHMARKS),
      "evaluate.k": K,
    }
  )
  run_dir = RunDir(root, experiment.to_json(chosen))
  rng = np.random.default_rng(seed)
  letters = rng.integers(97, 123, _POOL).astype(np.uint8)
  letters[rng.random(_POOL) < 0.18] = 32
  pool = letters.tobytes()
  draft_right = rng.random(rows) < 0.694
  refined_right = rng.random(rows) < np.where(draft_right, 0.96, 0.355)
  _problems(run_dir, rng, pool, rows)
  for stage, median, spread, right in (
    ("rollout", 7_700, 0.75, draft_right),
    ("refine", 880, 0.6, refined_right),
  ):
    lengths = np.minimum(rng.lognormal(np.log(median), spread, rows), _MOST)
    lengths = np.maximum(lengths.astype(np.int64), 2)
    for number, start in enumerate(range(0, rows, _SHARD)):
      part = slice(start, min(start + _SHARD, rows))
      _trajectories(
        run_dir, stage, number, part, lengths[part], right[part], rng, pool
      )
    summary = {
      "samples": rows,
      "correct": int(right.sum()),
      "tokens": int(lengths.sum()),
    }
    if stage == "refine":
      summary |= {"leaks": 12, "leaks_in_thoughts": 0, "leaks_in_answer": 12}
    write_json(run_dir.stage(stage) / "done.json", summary)
  for stage, ahead in (("evaluate/base", 0.0), ("evaluate/trained", 0.08)):
    _evaluation(run_dir, stage, ahead, rng)
  _metrics(run_dir, rows // 128)
  return root


def _write(run_dir: RunDir, stage: str, number: int, table: pa.Table) -> None:
  sink = pa.BufferOutputStream()
  pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
  content = sink.getvalue()
  digest = hashlib.sha256(content).hexdigest()[:32]
  folder = run_dir.stage(stage)
  folder.mkdir(parents=True, exist_ok=True)
  name = f"shard-{10**18 + number:020d}-1-{number:06d}-{digest}.parquet"
  (folder / name).write_bytes(content)


def _texts(lengths: np.ndarray, rng, pool: bytes) -> list[str]:
  """Returns a text of each length in characters, cut out of the pool."""
  starts = rng.integers(
    0, _POOL - int(lengths.max(initial=0)) - 1, len(lengths)
  )
  return [
    pool[start : start + length].decode()
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
  ]


def _problems(run_dir: RunDir, rng, pool: bytes, rows: int) -> None:
  has_solution = rng.random(rows) < 0.11
  lengths = np.where(has_solution, rng.lognormal(7.5, 0.6, rows), 1)
  solutions = _texts(lengths.astype(np.int64), rng, pool)
  texts = _texts(np.full(rows, 250), rng, pool)
  for number, start in enumerate(range(0, rows, _SHARD)):
    made = [
      Problem(
        f"p{n}",
        texts[n],
        str(n),
        solutions[n] if has_solution[n] else None,
        "math",
        "made",
        None,
        "{}",
      )
      for n in range(start, min(start + _SHARD, rows))
    ]
    _write(run_dir, "problems", number, records.to_table(made))
  write_json(run_dir.problems_dir / "done.json", {"problems": rows})


def _trajectories(
  run_dir, stage, number, part, lengths, right, rng, pool
) -> None:
  rows = len(lengths)
  names = [f"{n:06d}" for n in range(part.start, part.stop)]
  ids = rng.integers(0, 4096, int(lengths.sum()), dtype=np.int32)
  cut = lengths == _MOST
  columns = {
    "key": [f"{stage}-{name}" for name in names],
    "problem_id": [f"p{int(name)}" for name in names],
    "stage": [stage] * rows,
    "prompt_ids": [[1, 2, 3]] * rows,
    "text": _texts(_CHARACTERS * lengths, rng, pool),
    "finish_reason": np.where(cut, "length", "stop"),
    "truncated": cut,
    "seed": np.arange(part.start, part.stop),
    "thinking": [stage == "rollout"] * rows,
    "sampling": ["{}"] * rows,
    "model": ["made"] * rows,
    "model_revision": ["0"] * rows,
    "prompt_version": ["1"] * rows,
    "draft_key": [f"rollout-{n}" if stage == "refine" else None for n in names],
    "draft_elided_tokens": np.zeros(rows, np.int64),
    "correct": right & ~cut,
    "reason": np.where(right & ~cut, "match", "mismatch"),
    "extracted": [None] * rows,
    "grader_version": ["math-8"] * rows,
  }
  arrays = []
  schema = records.schema(Trajectory)
  for field in schema:
    if field.name == "response_ids":
      offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
      arrays.append(
        pa.ListArray.from_arrays(
          pa.array(offsets), pa.array(ids), type=field.type
        )
      )
    elif field.name in columns:
      arrays.append(pa.array(columns[field.name], field.type))
    else:
      arrays.append(pa.nulls(rows, field.type))
  _write(run_dir, stage, number, pa.Table.from_arrays(arrays, schema=schema))


def _evaluation(run_dir: RunDir, stage: str, ahead: float, rng) -> None:
  summary = {}
  for number, (name, questions) in enumerate(BENCHMARKS.items()):
    chance = np.clip(rng.beta(0.7, 0.9, questions) + ahead, 0, 1)
    marks = rng.random((questions, K)) < chance[:, None]
    tokens = rng.lognormal(9.4, 0.6, (questions, K)).astype(int) + 1
    made = [
      GradedSample(
        key=f"{stage}-{name}-{q}-{k}",
        benchmark=name,
        problem_id=f"q{q:03d}",
        sample=k,
        prompt_sha256="0",
        response_ids=[1],
        text="text",
        num_tokens=int(tokens[q, k]),
        finish_reason="stop",
        truncated=False,
        seed=k,
        thinking=True,
        sampling="{}",
        model="made",
        model_revision=stage,
        prompt_version="1",
        correct=bool(marks[q, k]),
        reason="match" if marks[q, k] else "mismatch",
        extracted=None,
        grader_version="math-8",
      )
      for q in range(questions)
      for k in range(K)
    ]
    _write(run_dir, stage, number, records.to_table(made))
    verdicts = {f"q{q:03d}": marks[q].tolist() for q in range(questions)}
    summary[name] = estimators.summarize(verdicts) | {"verdicts": verdicts}
  write_json(run_dir.stage(stage) / "done.json", summary)


def _metrics(run_dir: RunDir, updates: int) -> None:
  from trd_jax.experiment.metric_log import MetricWriter

  with MetricWriter(run_dir.metrics_file("train")) as writer:
    for step in range(updates):
      fall = 1 / (1 + step / 50)
      row = {name: 0.1 * fall for name in ("loss", "D", "D_correct", "ppl_gap")}
      writer.write(step, row | {"D_incorrect": 0.2 * fall, "grad_norm": 1.0})
  write_json(run_dir.stage("train") / "done.json", {"updates": updates})


if __name__ == "__main__":
  workdir(Path(sys.argv[1]), *map(int, sys.argv[2:]))
