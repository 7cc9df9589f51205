"""Where along a trajectory is there a signal? Means of per-token scores."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from trd_jax.analyze import look, trajectories
from trd_jax.analyze.analysis import (
  Analysis,
  Cell,
  Column,
  Figure,
  Result,
  Table,
)
from trd_jax.analyze.runs import Run

_STAGE = "analyze/scores"
_NUMBERS = {
  "divergence": "divergence",
  "teacher_entropy": "teacher's entropy",
  "teacher_onset_mass": "teacher's onset mass",
  "student_nll": "student's NLL",
  "teacher_nll": "teacher's NLL",
}
"""By column of a score, what it is called."""
_SHOWN = ("divergence", "teacher_entropy", "teacher_onset_mass")
_LONGEST = 200  # tokens up to which positions are binned evenly
_BINS = 14
_FAR = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Tokens from the first one in which y_o and y_r differ, which is 0.
_DISTANCES = np.array([*(-far for far in _FAR[::-1]), 0, *_FAR], float)


class _Key(NamedTuple):
  """Whose tokens: of which run, trajectory and verdict, by which student."""

  run: str
  trajectory: str
  verdict: str
  student: str


class _Sums(NamedTuple):
  """Sums over tokens, whole, by position and by distance.

  Attributes:
    trajectories: how many, in a list of one.
    tokens: [1 + bins + distances] how many tokens.
    sums: by column the sum of its numbers over the same.
  """

  trajectories: list[int]
  tokens: np.ndarray
  sums: Mapping[str, np.ndarray]


def make(runs: Sequence[Run]) -> Result | None:
  """Makes means of per-token scores, whole, by position and by distance."""
  edges = _edges(runs)
  if edges is None:
    return None
  found: dict[_Key, _Sums] = {}
  for run in runs:
    for key, columns, distance in _scored(run):
      if key not in found:
        size = 1 + len(edges) - 1 + len(_DISTANCES)
        found[key] = _Sums(
          [0], np.zeros(size), {name: np.zeros(size) for name in _NUMBERS}
        )
      _add(found[key], columns, edges, distance)
  # The run that was asked for first, as everywhere, and not by its name.
  place = {run.label: number for number, run in enumerate(runs)}
  order = sorted(found, key=lambda key: (place[key.run], *key[1:]))
  found = {key: found[key] for key in order}
  figures = [
    Figure(
      "scores_by_position",
      "Mean of a token's scores by its position in the trajectory, base"
      " student whole and trained student dashed.",
      look.drawing(_draw, found, edges, None, len(runs)),
      _described(found),
    )
  ]
  if any(one.tokens[len(edges) :].any() for one in found.values()):
    figures.append(
      Figure(
        "scores_by_distance",
        "Mean of a token's scores along drafts, by its distance from the first"
        " token in which the rewrite differs (0), base student whole and"
        " trained student dashed.",
        look.drawing(_draw, found, edges, _DISTANCES, len(runs)),
        _described(found),
      )
    )
  table = Table(
    "token_scores",
    "Means of scores over the tokens of the trajectories that were scored; the"
    " divergence is the run's before any clip, in nats.",
    [
      Column("run"),
      Column("trajectory"),
      Column("verdict"),
      Column("student"),
      Column("trajectories", "count"),
      Column("tokens", "count"),
      *(Column(called, "number") for called in _NUMBERS.values()),
    ],
    [_row(key, one) for key, one in found.items()],
  )
  tables = [table]
  if len(figures) > 1:
    tables.append(_distance_table(found, len(edges)))
  return Result(_findings(found, len(runs)), figures, tables)


def _distance_table(found: Mapping[_Key, _Sums], before: int) -> Table:
  """Returns means by distance.

  Args:
    found: the sums.
    before: how many entries of them come before those by distance.
  """
  rows: list[list[Cell]] = []
  for key, one in found.items():
    for place, distance in enumerate(_DISTANCES.tolist(), before):
      if tokens := int(one.tokens[place]):
        means = [float(sums[place] / tokens) for sums in one.sums.values()]
        rows.append([*key, int(distance), tokens, *means])
  return Table(
    "scores_by_distance",
    "Means of scores along drafts from so many tokens before (negative) or"
    " after the first token in which the rewrite differs, up to the next row's;"
    " what is farther is in the outermost rows.",
    [
      Column("run"),
      Column("trajectory"),
      Column("verdict"),
      Column("student"),
      Column("distance from", "count"),
      Column("tokens", "count"),
      *(Column(called, "number") for called in _NUMBERS.values()),
    ],
    rows,
  )


def _edges(runs: Sequence[Run]) -> np.ndarray | None:
  """Returns the ends of the bins of positions; None: nothing was scored."""
  lengths = [
    np.diff(chunk.offsets.to_numpy())
    for run in runs
    for part in run.parts(_STAGE, ("response_ids",))
    for chunk in part["response_ids"].chunks
  ]
  if not lengths:
    return None
  longest = max(int(np.concatenate(lengths).max(initial=0)), 2)
  if longest <= _LONGEST:
    return np.unique(np.linspace(0, longest, _BINS + 1).round())
  return np.unique(np.geomspace(1, longest, _BINS + 1).round()) - 1


def _scored(
  run: Run,
) -> Iterator[tuple[_Key, dict[str, np.ndarray], int | None]]:
  """Yields each scored trajectory: whose it is, its scores, its fork.

  The fork is the number of the first token in which y_o and y_r differ.
  """
  if run.state(_STAGE) == "missing":
    return
  verdicts: dict[str, int] = {}
  for stage in ("rollout", "refine"):
    rows = trajectories.rows(run, stage)
    if rows is not None:
      verdicts |= dict(zip(rows.keys, rows.verdict.tolist(), strict=True))
  forks = _forks(run)
  columns = ("trajectory_key", "problem_id", "trajectory", "student")
  for part in run.parts(_STAGE, (*columns, *_NUMBERS)):
    part = part.combine_chunks()
    about = part.select(columns).to_pylist()
    lists = {name: _rows_of(part[name]) for name in _NUMBERS}
    for number, row in enumerate(about):
      verdict = verdicts.get(row["trajectory_key"])
      called = "–" if verdict is None else trajectories.VERDICTS[verdict]
      key = _Key(run.label, row["trajectory"], called, row["student"])
      fork = forks.get(row["problem_id"]) if key.trajectory == "y_o" else None
      yield key, {name: rows[number] for name, rows in lists.items()}, fork


def _rows_of(column: pa.ChunkedArray) -> list[np.ndarray]:
  """Returns the lists of a column as arrays, without numbers of Python's."""
  rows: list[np.ndarray] = []
  for chunk in column.chunks:
    values = chunk.values.to_numpy()
    ends = chunk.offsets.to_numpy()
    rows += [
      values[start:end] for start, end in itertools.pairwise(ends.tolist())
    ]
  return rows


def _forks(run: Run) -> dict[str, int]:
  """Returns by problem the first token in which y_o and y_r differ."""
  ids: dict[tuple[str, str], np.ndarray] = {}
  columns = ("problem_id", "trajectory")
  for part in run.parts(_STAGE, (*columns, "response_ids")):
    rows = _rows_of(part["response_ids"])
    for about, response in zip(
      part.select(columns).to_pylist(), rows, strict=True
    ):
      # A copy, or the whole shard stays.
      ids[about["problem_id"], about["trajectory"]] = response.copy()
  forks = {}
  for (problem, trajectory), draft in ids.items():
    refined = ids.get((problem, "y_r"))
    if trajectory != "y_o" or refined is None:
      continue
    both = min(len(draft), len(refined))
    differ = np.flatnonzero(draft[:both] != refined[:both])
    if len(differ):
      forks[problem] = int(differ[0])
    elif len(draft) != len(refined):
      forks[problem] = both
  return forks


def _add(
  sums: _Sums,
  columns: Mapping[str, np.ndarray],
  edges: np.ndarray,
  fork: int | None,
) -> None:
  """Adds the tokens of a trajectory to the sums."""
  length = len(columns["divergence"])
  positions = np.arange(length)
  bins = len(edges) - 1
  places = [
    np.zeros(length, int),
    1 + np.clip(np.searchsorted(edges, positions, "right") - 1, 0, bins - 1),
  ]
  if fork is not None:
    away = np.searchsorted(_DISTANCES, positions - fork, "right") - 1
    places.append(1 + bins + np.clip(away, 0, len(_DISTANCES) - 1))
  sums.trajectories[0] += 1
  size = len(sums.tokens)
  for place in places:
    sums.tokens[:] += np.bincount(place, minlength=size)
    for name, values in columns.items():
      sums.sums[name][:] += np.bincount(
        place, values.astype(np.float64), minlength=size
      )


def _row(key: _Key, one: _Sums) -> list[Cell]:
  means = [float(sums[0] / one.tokens[0]) for sums in one.sums.values()]
  return [*key, one.trajectories[0], int(one.tokens[0]), *means]


def _mean(one: _Sums, column: str) -> float:
  return float(one.sums[column][0] / one.tokens[0])


def _findings(found: Mapping[_Key, _Sums], runs: int) -> list[str]:
  said = []
  for run in dict.fromkeys(key.run for key in found):
    whose = f" of {run}" if runs > 1 else ""
    parts = {}
    for trajectory in ("y_o", "y_r"):
      for student in ("base", "trained"):
        mine = [
          one
          for key, one in found.items()
          if (key.run, key.trajectory, key.student)
          == (run, trajectory, student)
        ]
        if mine:
          parts[trajectory, student] = sum(
            one.sums["divergence"][0] for one in mine
          ) / sum(one.tokens[0] for one in mine)
    for trajectory in ("y_o", "y_r"):
      before = parts.get((trajectory, "base"))
      after = parts.get((trajectory, "trained"))
      if before is not None and after is not None:
        said.append(
          f"Along {trajectory}{whose} a token's mean divergence went from"
          f" {before:.3g} before training to {after:.3g} after it."
        )
    wrong = found.get(_Key(run, "y_o", "wrong", "base"))
    right = found.get(_Key(run, "y_o", "right", "base"))
    if wrong and right:
      said.append(
        f"Before training a token of a wrong draft{whose} had a mean divergence"
        f" of {_mean(wrong, 'divergence'):.3g}, of a right one"
        f" {_mean(right, 'divergence'):.3g}."
      )
  return said


def _described(found: Mapping[_Key, _Sums]) -> str:
  return "; ".join(
    f"{', '.join(key)}: mean divergence {_mean(one, 'divergence'):.3g}"
    for key, one in found.items()
  )


def _pooled(
  found: Mapping[_Key, _Sums], kept: slice
) -> dict[_Key, tuple[np.ndarray, dict[str, np.ndarray]]]:
  """Returns tokens and sums of what is drawn: y_o by verdict, y_r whole."""
  pooled: dict[_Key, tuple[np.ndarray, dict[str, np.ndarray]]] = {}
  for key, one in found.items():
    if key.trajectory == "y_star" or not one.tokens[kept].any():
      continue
    if key.trajectory != "y_o":
      key = key._replace(verdict="–")
    tokens, sums = pooled.get(key, (0, dict.fromkeys(_NUMBERS, 0)))
    pooled[key] = (
      tokens + one.tokens[kept],
      {name: sums[name] + one.sums[name][kept] for name in _NUMBERS},
    )
  return pooled


def _draw(
  found: Mapping[_Key, _Sums],
  edges: np.ndarray,
  distances: np.ndarray | None,
  runs: int,
) -> Any:
  """Draws means by bin, of positions or, where they are given, of distances."""
  figure, axes = look.panels(len(_SHOWN))
  bins = len(edges) - 1
  if distances is None:
    x, kept = (edges[:-1] + edges[1:] - 1) / 2, slice(1, 1 + bins)
  else:
    x, kept = distances, slice(1 + bins, None)
  pooled = _pooled(found, kept)
  kinds = list(dict.fromkeys(key[:3] for key in pooled))
  for panel, column in zip(axes, _SHOWN, strict=True):
    scale = 1000 if column == "teacher_onset_mass" else 1
    for key, (tokens, sums) in pooled.items():
      # Training doesn't change the teacher.
      if column.startswith("teacher") and key.student != "base":
        continue
      there = tokens > 0
      means = scale * sums[column][there] / tokens[there]
      run, trajectory, verdict = key[:3]
      name = trajectory if verdict == "–" else f"{trajectory} {verdict}"
      label = name if runs == 1 else f"{run}, {name}"
      is_base = key.student == "base"
      look.line(
        panel,
        kinds.index(key[:3]),
        x[there],
        means,
        label if is_base else None,
        solid=is_base,
        bare=not is_base,
      )
    name = _NUMBERS[column] + (" (‰)" if scale > 1 else "")
    look.name_panel(panel, name)
    if distances is None:
      panel.set_xlabel("token of the trajectory")
      if edges[-1] > _LONGEST:
        panel.set_xscale("symlog", linthresh=4)
      look.thousands(panel.xaxis)
    else:
      panel.axvline(0, color=look.color("quiet"), linewidth=0.8)
      panel.set_xscale("symlog", linthresh=2)
      panel.set_xlabel("tokens from the first difference")
      look.thousands(panel.xaxis)
    look.from_zero(panel)
  look.legend(figure, axes)
  return figure


ANALYSIS = Analysis(
  name="token_scores",
  title="Where the teacher's signal is",
  question="At which tokens do teacher and student differ, before and after?",
  paper="Figures 2 and 3, along trajectories",
  order=55,
  make=make,
)
