"""Trajectories of a run by verdict and by kind of reference, as arrays."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trd_jax.analyze.runs import Run
from trd_jax.experiment.records import NO_VERDICT, NOT_GRADED

RIGHT, WRONG, UNJUDGED = 1, 0, -1
VERDICTS = {RIGHT: "right", WRONG: "wrong", UNJUDGED: "unjudged"}
ALL, SOLUTION, ANSWER = "all", "solution", "answer alone"
"""What a problem's reference is."""

_BATCH = 512


class Rows(NamedTuple):
  """A stage's trajectories, an entry each.

  Attributes:
    keys: their keys.
    drafts: the keys of their drafts, None of a rollout.
    tokens: how many tokens they have.
    verdict: `RIGHT`, `WRONG` or `UNJUDGED`.
    graded: whether somebody looked: not so without a gold answer.
    not_graded: whether their stage grades nothing.
    truncated: whether a budget ended them.
    elided: how many tokens of the draft weren't shown.
    reasons: of their verdicts.
    reference: `SOLUTION` or `ANSWER`, or "" for a problem without either.
  """

  keys: np.ndarray
  drafts: np.ndarray
  tokens: np.ndarray
  verdict: np.ndarray
  graded: np.ndarray
  not_graded: np.ndarray
  truncated: np.ndarray
  elided: np.ndarray
  reasons: np.ndarray
  reference: np.ndarray


def rows(run: Run, stage: str) -> Rows | None:
  """Returns a stage's trajectories; None where it has none."""
  table = run.trajectories(stage)
  if not table.num_rows:
    return None
  kinds = references(run)
  reasons = _objects(table, "reason")
  return Rows(
    _objects(table, "key"),
    _objects(table, "draft_key"),
    table["tokens"].to_numpy(),
    pc.fill_null(table["correct"].cast(pa.int8()), UNJUDGED).to_numpy(),  # type: ignore[attr-defined]
    np.array([reason not in NO_VERDICT for reason in reasons], bool),
    reasons == NOT_GRADED,
    table["truncated"].to_numpy(),
    table["draft_elided_tokens"].to_numpy(),
    reasons,
    np.array([kinds.get(p, "") for p in table["problem_id"].to_pylist()]),
  )


def _objects(table: pa.Table, column: str) -> np.ndarray:
  return np.array(table[column].to_pylist(), object)


@functools.cache
def references(run: Run) -> Mapping[str, str]:
  """Returns what the reference of each problem is that has one, by its id."""
  found: dict[str, str] = {}
  for part in run.parts("problems", ("solution", "answer")):
    for row in part.to_pylist():
      if row["solution"] and row["solution"].strip():
        found[row["problem_id"]] = SOLUTION
      elif row["answer"].strip():
        found[row["problem_id"]] = ANSWER
  return found


class ReferenceLengths(NamedTuple):
  """How long references are.

  Attributes:
    unit: `tokens`, or `characters` where the student's tokenizer isn't here.
    lengths: of each.
    reference: `SOLUTION` or `ANSWER` of each.
  """

  unit: str
  lengths: np.ndarray
  reference: np.ndarray


def reference_lengths(run: Run) -> ReferenceLengths | None:
  """Returns the length of each y*, the end of its turn counted; None of none.

  Nothing is downloaded for it.
  """
  tokenizer = _tokenizer(run)
  lengths: list[int] = []
  kinds: list[str] = []
  of_problem = references(run)
  for part in run.parts("problems", ("solution", "answer")):
    texts = []
    for row in part.to_pylist():
      if kind := of_problem.get(row["problem_id"]):
        kinds.append(kind)
        texts.append(row["solution"] if kind == SOLUTION else row["answer"])
    for start in range(0, len(texts), _BATCH):
      batch = [text.strip() for text in texts[start : start + _BATCH]]
      if tokenizer is None:
        lengths += map(len, batch)
      else:
        encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        lengths += [len(one.ids) + 1 for one in encoded]
  if not lengths:
    return None
  unit = "characters" if tokenizer is None else "tokens"
  return ReferenceLengths(unit, np.array(lengths), np.array(kinds))


def _tokenizer(run: Run):
  """Returns the student's tokenizer, None where it isn't on this machine."""
  from tokenizers import Tokenizer

  from trd_jax.model.weights import hub

  student = run.config.student
  path = student.tokenizer_path
  try:
    if hub.is_hub_id(path):
      from huggingface_hub import try_to_load_from_cache

      file = try_to_load_from_cache(
        path, "tokenizer.json", revision=student.revision
      )
      if not isinstance(file, str):
        return None
    else:
      file = str(hub.tokenizer_folder(path, run.run_dir) / "tokenizer.json")
    return Tokenizer.from_file(file)
  # `tokenizers` raises a bare Exception for a file that is none.
  except Exception:
    return None


def distinct(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
  """Returns runs whose trajectories differ, and who shares whose.

  The points of a sweep take rollouts over from one another. Keys are of all
  that a row depends on, so that equal keys are equal rows.
  """
  kept: dict[tuple[frozenset[str], ...], Run] = {}
  shared: dict[str, list[str]] = {}
  for run in runs:
    keys = tuple(
      frozenset(run.trajectories(stage)["key"].to_pylist())
      for stage in ("rollout", "refine")
    )
    first = kept.setdefault(keys, run)
    if first is not run and any(keys):
      shared.setdefault(first.label, []).append(run.label)
  said = [
    f"{', '.join(labels)} had the same trajectories as {first}."
    for first, labels in shared.items()
  ]
  return list(kept.values()), said


def written(run: Run) -> str:
  """Returns what a run's refine stage writes: y_r, or teacher."""
  return run.config.teacher_writes or "y_r"


class Pairs(NamedTuple):
  """Verdicts of drafts and of what they became, an entry each.

  Attributes:
    before: whether y_o is right.
    after: whether y_r is right.
    reference: what the problem's reference is.
  """

  before: np.ndarray
  after: np.ndarray
  reference: np.ndarray


def pairs(run: Run) -> Pairs | None:
  """Pairs each y_r that was graded with its y_o; None where there is none.

  As in a refinement's summary, no verdict counts as not right.
  """
  drafts, refined = rows(run, "rollout"), rows(run, "refine")
  if drafts is None or refined is None or written(run) != "y_r":
    return None
  verdicts = dict(zip(drafts.keys, drafts.verdict == RIGHT, strict=True))
  looked = dict(zip(drafts.keys, ~drafts.not_graded, strict=True))
  kept = refined.graded & np.array(
    [looked.get(draft, False) for draft in refined.drafts], bool
  )
  if not kept.any():
    return None
  before = np.array([verdicts[d] for d in refined.drafts[kept]], bool)
  return Pairs(before, refined.verdict[kept] == RIGHT, refined.reference[kept])


def groups(reference: np.ndarray) -> dict[str, np.ndarray]:
  """Returns which entries have which kind of reference, and all.

  Kinds stand apart only where there are two.
  """
  found = {ALL: np.ones(len(reference), bool)}
  kinds = [one for one in (SOLUTION, ANSWER) if (reference == one).any()]
  if len(kinds) > 1:
    found |= {one: reference == one for one in kinds}
  return found
