"""Per-token scores in the inspector: the rows of `analyze/scores` as pieces.

A row becomes parts of some thousand tokens, so that no piece is large and a
trajectory of a hundred thousand tokens is loaded where it is looked at.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trd_jax.analyze.report.catalogue import Catalogue
from trd_jax.analyze.report.details import units
from trd_jax.analyze.report.pieces import Family
from trd_jax.analyze.runs import Run
from trd_jax.data.chat import Chat
from trd_jax.experiment import shards
from trd_jax.experiment.records import TokenScores

PART = 3_000
"""Tokens of a part."""

KINDS = ("y_o", "y_r", "y_star", "teacher")
STUDENTS = ("base", "trained")
CONTEXTS = ("x", "x_reference", "refine")
NUMBERS = (
  *("divergence", "loss_weight", "clipped"),
  *("student_nll", "teacher_nll", "student_entropy", "teacher_entropy"),
  *("student_onset_mass", "teacher_onset_mass"),
)
"""The columns of a number a token, in the order of a part."""

_SHARE = 0.99  # of tokens whose value lies within a shade's scale


@dataclasses.dataclass
class Scored:
  """A row of scores, as the list knows it.

  Attributes:
    kind: of `KINDS`, by its number.
    of: the entry's number; for a reference and a teacher's own answer it is
      the first entry of its problem.
    student: of `STUDENTS`, by its number.
    context: of `CONTEXTS`, by its number.
    tokens: how many it has.
    mean: its mean divergence, in nats a token.
    first: the row of its first part in the family, -1 where it isn't written.
  """

  kind: int
  of: int
  student: int
  context: int
  tokens: int
  mean: float
  first: int = -1

  def row(self) -> list[Any]:
    """Returns it as the page reads it."""
    mean = float(f"{self.mean:.4g}")
    return [
      *(self.kind, self.of, self.student, self.context),
      *(self.tokens, mean, self.first),
    ]


@dataclasses.dataclass
class Scores:
  """All rows of scores of a run.

  Attributes:
    rows: by their keys.
    divergence: the name of what was measured, "" without rows.
    scales: of each of `NUMBERS` the value below which nearly all tokens lie.
  """

  rows: dict[str, Scored]
  divergence: str
  scales: list[float]


def folder(run: Run) -> Path:
  """Returns where a run's scores lie."""
  return run.workdir / "analyze" / "scores"


def read(run: Run, found: Catalogue) -> Scores:
  """Reads which trajectories are scored, and the scales of their numbers.

  Raises:
    UserError: a shard is damaged.
  """
  first_of = {found.ids[n]: e for n, e in found.by_problem.items()}
  rows: dict[str, Scored] = {}
  name = ""
  samples: list[list[np.ndarray]] = [[] for _ in NUMBERS]
  for row in _rows(run, (*_HEAD, *NUMBERS)):
    name = row["divergence_name"]
    of = {
      "y_o": found.by_draft.get(row["trajectory_key"]),
      "y_r": found.by_refined.get(row["trajectory_key"]),
    }.get(row["trajectory"], first_of.get(row["problem_id"]))
    if of is None or row["key"] in rows:
      continue
    numbers = [np.asarray(row[name], np.float32) for name in NUMBERS]
    for kept, values in zip(samples, numbers, strict=True):
      # Enough of a long row for a scale.
      kept.append(values[:: max(1, len(values) // 1_000)])
    mean = float(np.mean(numbers[0])) if len(numbers[0]) else 0.0
    rows[row["key"]] = Scored(
      kind=KINDS.index(row["trajectory"]),
      of=of,
      student=STUDENTS.index(row["student"]),
      context=CONTEXTS.index(row["context"]),
      tokens=len(numbers[0]),
      mean=mean if np.isfinite(mean) else 0.0,
    )
  scales = [_scale(np.concatenate(kept)) if kept else 1.0 for kept in samples]
  return Scores(rows, name, scales)


def divergences(
  scores: Scores, trajectory: str
) -> dict[int, tuple[str, float]]:
  """Returns entries' mean divergences, and along what they are.

  Before training, where that was scored, and along any other trajectory where
  the one that was trained on wasn't.
  """
  found: dict[int, tuple[tuple[bool, int], tuple[str, float]]] = {}
  for one in scores.rows.values():
    rank = (KINDS[one.kind] != trajectory, one.student)
    if one.of not in found or rank < found[one.of][0]:
      found[one.of] = rank, (KINDS[one.kind], one.mean)
  return {of: mean for of, (_, mean) in found.items()}


def write(
  run: Run,
  scores: Scores,
  chat: Chat,
  family: Callable[[str], Family],
) -> None:
  """Writes the scores into pieces, and notes where each begins.

  Raises:
    UserError: a shard is damaged, or the folder can't be written.
  """
  pieces = family("k")
  done = set()
  for row in _rows(run, None):
    key = row["key"]
    if key in done or key not in scores.rows:
      continue
    done.add(key)
    for start in range(0, max(len(row["response_ids"]), 1), PART):
      # Whole characters only: a part's text is shown as it is.
      number = pieces.add(_part(row, chat, start))
      if not start:
        scores.rows[key].first = number


def _part(row: Mapping[str, Any], chat: Chat, start: int) -> list[Any]:
  """Returns a part as the page reads it.

  Its text; the length of each token in UTF-16 units; the columns of numbers;
  texts of likeliest tokens; and of student and teacher the numbers of those
  texts and their probabilities in units of 0.01%.
  """
  if start == 0:
    row["texts"] = chat.token_texts(row["response_ids"])  # type: ignore[index]
  texts = row["texts"][start : start + PART]
  end = start + len(texts)
  numbers = [_rounded(row[name][start:end]) for name in NUMBERS]
  k = row["top_k"]
  vocabulary: dict[int, int] = {}
  top: list[list[int]] = []
  for side in ("student", "teacher"):
    ids = row[f"{side}_top_ids"][start * k : end * k]
    logprobs = row[f"{side}_top_logprobs"][start * k : end * k]
    top.append([vocabulary.setdefault(i, len(vocabulary)) for i in ids])
    shares = np.exp(np.asarray(logprobs, np.float64)) * 1e4
    top.append(np.nan_to_num(shares).round().astype(int).tolist())
  names = [chat.token_name(i) for i in vocabulary]
  return ["".join(texts), [units(t) for t in texts], numbers, names, k, *top]


def _rounded(values: Any) -> list[Any]:
  """Returns numbers to four digits, whole ones as integers."""
  return [
    int(value) if value == int(value) else float(f"{value:.4g}")
    for value in np.nan_to_num(np.asarray(values, np.float64)).tolist()
  ]


def _scale(values: np.ndarray) -> float:
  values = np.abs(values[np.isfinite(values)])
  most = float(np.quantile(values, _SHARE)) if len(values) else 0.0
  return float(f"{most:.2g}") or 1.0


_HEAD = (
  *("trajectory_key", "problem_id", "trajectory", "student", "context"),
  "divergence_name",
)


def _rows(
  run: Run, columns: tuple[str, ...] | None
) -> Iterator[dict[str, Any]]:
  """Yields the rows of scores, a shard at a time."""
  where = folder(run)
  for name in shards.names(where):
    read_columns = None if columns is None else ["key", *columns]
    table = shards.read_table(where / name, TokenScores, read_columns)
    for batch in table.to_batches(max_chunksize=8):
      yield from batch.to_pylist()
