"""Workdirs with rows that are made by hand, for what reads them afterwards."""

import json
from pathlib import Path

import numpy as np

from trd_jax.experiment import experiment
from trd_jax.experiment.metric_log import MetricWriter
from trd_jax.experiment.records import (
  GradedSample,
  Problem,
  TokenScores,
  Trajectory,
)
from trd_jax.experiment.run_dir import RunDir
from trd_jax.grading import scores

QUESTIONS, K = 6, 4
BENCHMARKS = ("arithmetic", "arithmetic_hard")


def problem(number: int) -> Problem:
  """A problem; every third one has an answer alone, and the last one none."""
  return Problem(
    problem_id=f"p{number:02d}",
    text=f"Start at {number}, add 7.",
    answer="" if number == 11 else str(number + 7),
    solution=None if number % 3 == 2 else f"{number}+7={number + 7}\n" * 3,
    domain="arithmetic",
    source="made",
    tests=None,
    meta="{}",
  )


def trajectory(stage: str, number: int, **fields) -> Trajectory:
  """A row of rollout or refine whose numbers follow from its own."""
  rng = np.random.default_rng([number, stage == "refine"])
  length = int(rng.integers(5, 200 if stage == "rollout" else 40))
  correct = bool(rng.random() < (0.4 if stage == "rollout" else 0.8))
  values = {
    "key": f"{stage}-{number:02d}",
    "problem_id": f"p{number:02d}",
    "stage": stage,
    "prompt_ids": [1, 2, 3],
    "response_ids": rng.integers(3, 200, length).tolist(),
    "text": f"{number}+7={number + 7}",
    "finish_reason": "stop",
    "truncated": False,
    "seed": number,
    "thinking": None,
    "sampling": "{}",
    "model": "made",
    "model_revision": "0",
    "prompt_version": "1",
    "draft_key": f"rollout-{number:02d}" if stage == "refine" else None,
    "draft_elided_tokens": 0,
    "correct": correct,
    "reason": "match" if correct else "mismatch",
    "extracted": None,
    "grader_version": "0",
  }
  return Trajectory(**(values | fields))


def sample(benchmark: str, question: int, number: int, trained: bool, **fields):
  """A graded sample; the trained model is right more often."""
  rng = np.random.default_rng(
    [question, number, trained, len(benchmark), fields.pop("seed", 0)]
  )
  correct = bool(rng.random() < (question + 1) / 8 + 0.3 * trained)
  values = {
    "key": f"{benchmark}-{question}-{number}-{trained}",
    "benchmark": benchmark,
    "problem_id": f"q{question}",
    "sample": number,
    "prompt_sha256": "0",
    "response_ids": [3] * (5 + question),
    "text": "text",
    "num_tokens": int(rng.integers(5, 300)),
    "finish_reason": "stop",
    "truncated": False,
    "seed": number,
    "thinking": None,
    "sampling": "{}",
    "model": "trained" if trained else "base",
    "model_revision": "after" if trained else "before",
    "prompt_version": "1",
    "correct": correct,
    "reason": "match" if correct else "mismatch",
    "extracted": "7",
    "grader_version": "g",
  }
  return GradedSample(**(values | fields))


def rows_of(stage: str, seed: int = 0) -> list:
  """All rows of a stage, some truncated, some without a verdict."""
  if stage == "problems":
    return [problem(n) for n in range(12)]
  if stage in ("rollout", "refine"):
    changes: dict[int, dict] = {
      3: {"truncated": True, "finish_reason": "length"},
      4: {"correct": None, "reason": "timeout"},
      11: {"correct": None, "reason": "no_gold"},
    }
    if stage == "refine":
      changes[5] = {"text": "As the reference solution says, 12."}
      changes[7] = {"correct": False, "reason": "no_box"}
    return [trajectory(stage, n, **changes.get(n, {})) for n in range(12)]
  trained = stage.endswith("trained")
  rows = []
  for name in BENCHMARKS:
    for question in range(QUESTIONS):
      for number in range(K):
        fields = {}
        if (question, number) == (2, 1):
          fields = {"correct": None, "reason": "timeout"}
        if (question, number) == (3, 3):
          fields = {"truncated": True, "finish_reason": "length"}
        rows.append(
          sample(name, question, number, trained, seed=seed * trained, **fields)
        )
  return rows


def write(
  run_dir: RunDir, stage: str, rows: list, *, done: bool = True
) -> None:
  """Writes a stage's rows in shards of five, the first ones twice.

  A row that comes again, as after a kill, has another content here: who reads
  it would be seen to.
  """
  with run_dir.shard_writer(stage, type(rows[0]), rows_per_shard=5) as writer:
    for row in rows:
      writer.add(row)
    if stage in ("rollout", "refine"):
      writer.flush()
      number = int(rows[0].key[-2:])
      writer.add(trajectory(stage, number, response_ids=[9] * 999))
  if not done:
    return
  if not stage.startswith("evaluate"):
    run_dir.mark_done(stage, _summary(stage, rows))
    return
  base = None
  if stage.endswith("trained") and (of_base := run_dir.done("evaluate/base")):
    base = {name: row["verdicts"] for name, row in of_base.items()}
  run_dir.mark_done(
    stage,
    {
      name: scores.figures(
        [row for row in rows if row.benchmark == name],
        {"rows": QUESTIONS, "files": []},
        base and base[name],
      )
      for name in BENCHMARKS
    },
  )


def _summary(stage: str, rows: list) -> dict:
  summary: dict = {"samples": len(rows)}
  if stage in ("rollout", "refine"):
    summary["tokens"] = sum(len(row.response_ids) for row in rows)
  if stage == "refine":
    summary |= {"leaks": 1, "leaks_in_thoughts": 0, "leaks_in_answer": 1}
  return summary


def workdir(
  root: Path,
  stages: tuple[str, ...] = (
    *("problems", "evaluate/base", "rollout", "refine", "train"),
    "evaluate/trained",
  ),
  unfinished: tuple[str, ...] = (),
  seed: int = 0,
  **config,
) -> RunDir:
  """Makes a workdir.

  Args:
    root: its folder.
    stages: those that have rows.
    unfinished: those of them that have half of theirs.
    seed: of the trained model's samples.
    **config: keys of the config; two underscores are a dot.
  """
  values = {
    "data.source": "arithmetic",
    "domain": "arithmetic",
    "evaluate.benchmarks": BENCHMARKS,
    "evaluate.k": K,
    "evaluate.num_problems": QUESTIONS,
  }
  values |= {name.replace("__", "."): value for name, value in config.items()}
  chosen = experiment.from_config(values)
  run_dir = RunDir(root, experiment.to_json(chosen))
  for stage in stages:
    if stage == "train":
      _write_training(run_dir, stage not in unfinished)
      continue
    rows = rows_of(stage, seed)
    if stage in unfinished:
      rows = rows[: len(rows) // 2 + 1]
    write(run_dir, stage, rows, done=stage not in unfinished)
  return run_dir


def score(of: Trajectory, student: str) -> TokenScores:
  """Random scores of a trajectory under one student."""
  rng = np.random.default_rng([len(of.key), of.seed, student == "base"])
  numbers = {
    name: rng.random(len(of.response_ids)).tolist()
    for name in (
      *("divergence", "loss_weight", "student_nll", "teacher_nll"),
      *("student_entropy", "teacher_entropy", "student_onset_mass"),
      *("teacher_onset_mass", "student_top_logprobs", "teacher_top_logprobs"),
    )
  }
  return TokenScores(
    key=f"{of.key}-{student}",
    trajectory_key=of.key,
    problem_id=of.problem_id,
    trajectory="y_o" if of.stage == "rollout" else "y_r",
    student="base" if student == "base" else "trained",
    context="x",
    divergence_name="forward_kl",
    student_model="made",
    student_revision="0",
    teacher_model="made",
    teacher_revision="0",
    response_ids=of.response_ids,
    clipped=[0] * len(of.response_ids),
    top_k=1,
    student_top_ids=of.response_ids,
    teacher_top_ids=of.response_ids,
    **numbers,
  )


def write_scores(run_dir: RunDir) -> None:
  """Scores what a workdir has, y_r as y_o with one other token."""
  with run_dir.shard_writer("analyze/scores", TokenScores, 7) as writer:
    for row in rows_of("rollout")[:8]:
      place = row.seed % len(row.response_ids)
      ids = list(row.response_ids)
      ids[place] += 1000
      refined = trajectory("refine", row.seed, response_ids=ids)
      # One was taken over as it is: it has no place where it differs.
      if row.seed == 5:
        refined = trajectory("refine", 5, response_ids=list(row.response_ids))
      for student in ("base", "trained"):
        writer.add(score(row, student))
        writer.add(score(refined, student))


def _write_training(run_dir: RunDir, done: bool) -> None:
  with MetricWriter(run_dir.metrics_file("train")) as writer:
    for step in range(20 if done else 7):
      row = {
        "loss": 1 / (step + 2),
        "D": 1 / (step + 3),
        "D_correct": 1 / (step + 4),
        # No draft of this update's was wrong.
        "D_incorrect": None if step == 5 else 1 / (step + 1),
        "ppl_gap": 0.5 / (step + 1),
        "epistemic_mass_teacher": 0.007 - step * 1e-4,
        "grad_norm": 1.0 + step % 3,
        "response_length": 40.0 + step,
        "entropy_student": 0.3,
      }
      if row["D_incorrect"] is None:
        del row["D_incorrect"]
      writer.write(step, row)
  with run_dir.timings.open("a") as file:
    for stage, seconds in (("rollout", 12.5), ("train", 30.25)):
      row = {"stage": stage, "seconds": seconds, "finished": True}
      file.write(json.dumps(row) + "\n")
  if done:
    run_dir.mark_done(
      "train",
      {"updates": 20, "trajectories": 12, "tokens_per_second": 100.0},
    )
