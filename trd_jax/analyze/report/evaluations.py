"""The inspector's benchmark questions: samples before and after training."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from trd_jax.analyze.report.catalogue import HEAD, NO_GRADE, RIGHT, WRONG
from trd_jax.analyze.report.details import wrong_step
from trd_jax.analyze.report.pieces import Family
from trd_jax.analyze.runs import Run
from trd_jax.data.problems import questions
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import LAB_BENCHMARKS
from trd_jax.experiment.records import NO_VERDICT, Problem

MODELS = ("base", "trained")


def write(
  run: Run, most: int | None, family: Callable[[str], Family]
) -> dict[str, Any] | None:
  """Writes the texts of samples; returns the list's part, None without any.

  Args:
    run: where they lie.
    most: how many texts of each model, None for all. Each question has its
      first samples, as many as the others.
    family: makes a family of pieces by its name.

  Raises:
    UserError: a shard is damaged, or the folder can't be written.
  """
  tables = {
    model: run.samples(f"evaluate/{model}")
    for model in MODELS
    if run.state(f"evaluate/{model}") != "missing"
  }
  if not any(table.num_rows for table in tables.values()):
    return None
  asked = _asked(run)
  number: dict[tuple[str, str], int] = {}
  for table in tables.values():
    pairs = zip(
      table["benchmark"].to_pylist(),
      table["problem_id"].to_pylist(),
      strict=True,
    )
    for pair in sorted(set(pairs)):
      number.setdefault(pair, len(number))
  texts = family("q")
  heads = []
  for pair in number:
    problem = asked.get(pair)
    text = problem.text if problem else ""
    heads.append(" ".join(text[: 2 * HEAD].split())[:HEAD])
    texts.add([text, problem.answer if problem else ""])
  return {
    "benchmarks": [benchmark for benchmark, _ in number],
    "ids": [name for _, name in number],
    "heads": heads,
    "models": {
      model: _write_samples(run, model, table, number, asked, most, family)
      for model, table in tables.items()
    },
  }


def _write_samples(
  run: Run,
  model: str,
  table: pa.Table,
  number: dict[tuple[str, str], int],
  asked: dict[tuple[str, str], Problem],
  most: int | None,
  family: Callable[[str], Family],
) -> dict[str, Any]:
  """Writes the texts of one model's samples; returns their columns."""
  stage = f"evaluate/{model}"
  samples = np.asarray(table["sample"].to_pylist(), int)
  keep = len(samples) if most is None else most
  # By sample first, so that all questions have as many.
  wanted = np.argsort(samples, kind="stable")[:keep]
  keys = table["key"].to_pylist()
  mine = frozenset(keys[n] for n in wanted.tolist())
  pieces = family("b" if model == "base" else "t")
  at: dict[str, int] = {}
  columns = ("benchmark", "problem_id", "text", "extracted", "detail")
  for row in run.rows(stage, columns, mine):
    problem = asked.get((row["benchmark"], row["problem_id"]))
    wrong = wrong_step(problem, row["text"]) if problem else None
    at[row["key"]] = pieces.add(
      [row["text"], row["extracted"], row["detail"], wrong]
    )
  pairs = zip(
    table["benchmark"].to_pylist(), table["problem_id"].to_pylist(), strict=True
  )
  reasons = table["reason"].to_pylist()
  names = sorted(set(reasons))
  return {
    "question": [number[pair] for pair in pairs],
    "sample": table["sample"].to_pylist(),
    "verdict": [
      NO_GRADE
      if correct is None or reason in NO_VERDICT
      else RIGHT
      if correct
      else WRONG
      for correct, reason in zip(
        table["correct"].to_pylist(), reasons, strict=True
      )
    ],
    "tokens": table["num_tokens"].to_pylist(),
    "cut": [int(one) for one in table["truncated"].to_pylist()],
    "reasons": names,
    "reason": [names.index(one) for one in reasons],
    "row": [at.get(key, -1) for key in keys],
  }


def _asked(run: Run) -> dict[tuple[str, str], Problem]:
  """Returns the questions where their files are here, and none elsewhere."""
  found: dict[tuple[str, str], Problem] = {}
  for name in run.config.evaluate.benchmarks:
    # A report downloads nothing: files that a root names are read, and the
    # laboratory's questions are made.
    if name not in LAB_BENCHMARKS and run.config.evaluate.root is None:
      continue
    try:
      loaded = questions.load(run.config, name)
    except UserError:
      continue  # moved since; the samples are there all the same
    found |= {(name, one.problem_id): one for one in loaded.problems}
  return found
