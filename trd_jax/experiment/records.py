"""Rows that the stages hand to each other, and their parquet schemas.

A record is a frozen dataclass. Its parquet schema is derived from its
annotations, so that each column is declared once. A file carries the record's
name and schema version in its metadata, and is refused where either is not
ours.

Every record has a `key`, unique among the rows of a stage: stages skip keys
that are already on disk, and readers drop repeats of one.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import pyarrow as pa

from trd_jax.experiment.errors import UserError, one_line

Domain = Literal["arithmetic", "math", "code"]
FinishReason = Literal["stop", "length"]
TrajectoryStage = Literal["rollout", "refine"]
ScoredTrajectory = Literal["y_o", "y_r", "y_star", "teacher"]
ScoredStudent = Literal["base", "trained"]
TeacherContext = Literal["x", "x_reference", "refine"]
Reason = Literal[
  "match",
  "mismatch",
  "no_box",
  "no_code",
  "unparsed",
  "error",
  "timeout",
  "memory",
  "output",
  "ungradable",
  "no_gold",
  "not_graded",
]
NO_ANSWER: tuple[Reason, ...] = ("no_box", "no_code")
"""Reasons that say that a completion holds nothing to be judged."""
NO_GOLD: Reason = "no_gold"
"""The reason that says that its problem has nothing to judge it by."""
NOT_GRADED: Reason = "not_graded"
"""The reason that says that its stage was told to grade nothing."""
NO_VERDICT: tuple[Reason, ...] = (NO_GOLD, NOT_GRADED)
"""Reasons that say that nobody has looked."""
SYSTEM_TURN = "system_turn"
"""What `Problem.meta` has a system turn under."""

_MOST_REASONS = 3  # that a line names

# Token ids as int32 and probabilities as float32: half the size, and nothing is
# lost, for vocabularies are far below 2^31.
_ARROW_TYPES: dict[Any, pa.DataType] = {
  str: pa.string(),
  bool: pa.bool_(),
  int: pa.int64(),
  list[int]: pa.list_(pa.field("element", pa.int32(), nullable=False)),
  list[float]: pa.list_(pa.field("element", pa.float32(), nullable=False)),
}

# One spelling for one value, or keys would differ between runs: sorted keys, no
# spaces, and no NaN, which equals not even itself.
_CANONICAL = json.JSONEncoder(
  sort_keys=True, separators=(",", ":"), allow_nan=False
)


def content_key(*parts: Any) -> str:
  """Computes a key of all parts: equal parts give equal keys, anywhere.

  Args:
    *parts: JSON-serialisable values (mappings in any order of their keys).

  Returns:
    32 hexadecimal digits of the SHA-256 of the parts' canonical JSON.

  Raises:
    TypeError: a part is not JSON-serialisable.
    ValueError: a part holds a NaN or an infinity.
  """
  return hashlib.sha256(_CANONICAL.encode(parts).encode()).hexdigest()[:32]


class _Record:
  """A row; checks its fields with a closed set of values when it is made."""

  VERSION: ClassVar[int] = 1
  KEY: ClassVar[str] = "key"

  def __post_init__(self) -> None:
    for name, choices in _closed_fields(type(self)):
      if (value := getattr(self, name)) not in choices:
        raise ValueError(
          f"{type(self).__name__}.{name} is {value!r}, not one of {choices}"
        )


@dataclasses.dataclass(frozen=True)
class Problem(_Record):
  """A problem x, and its gold answer where it has one.

  Attributes:
    problem_id: unique within its source.
    text: the problem statement, x.
    answer: the gold final answer, as the source writes it; '' for none.
    solution: the worked reference y*, or None where there is none.
    domain: chooses prompts and grader.
    source: the data set it comes from.
    tests: JSON of a code problem's tests, or None.
    meta: JSON object of whatever else the source knows (level, subject); under
      `SYSTEM_TURN` the system turn that x begins with, if there is one.
  """

  KEY: ClassVar[str] = "problem_id"

  problem_id: str
  text: str
  answer: str
  solution: str | None
  domain: Domain
  source: str
  tests: str | None
  meta: str

  @property
  def key(self) -> str:
    """Returns the problem's id."""
    return self.problem_id

  @property
  def has_gold(self) -> bool:
    """Returns whether there is something to judge a response by."""
    return bool(self.answer or self.tests)


@dataclasses.dataclass(frozen=True)
class Verdict(_Record):
  """What a grader says of one completion.

  Attributes:
    correct: True, False, or None where it could not be judged.
    reason: why.
    extracted: the answer that was found in the completion, or None.
    detail: what more the grader knows: of a program, JSON with how many tests
      passed, how many there are, and the first that failed.
  """

  correct: bool | None
  reason: Reason
  extracted: str | None
  detail: str | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    # Half a surrogate pair can be spelt in JSON and not in UTF-8, so a model's
    # answer may hold one, and the shard with it could not be written.
    for name in ("extracted", "detail"):
      if (text := getattr(self, name)) is not None:
        whole = text.encode("utf-8", "backslashreplace").decode()
        object.__setattr__(self, name, whole)

  @classmethod
  def unparsed(cls, error: Exception) -> "Verdict":
    """Returns the verdict on a text at which its grader itself failed.

    A text that nobody has thought of spoils its own sample and not the stage.
    `detail` says what was raised, for the stage's summary to count.
    """
    why = f"{type(error).__name__}: {one_line(error)}"
    return cls(False, "unparsed", None, why)

  @classmethod
  def without_gold(cls) -> "Verdict":
    """Returns what stands for a verdict where there is no gold answer."""
    return cls(None, NO_GOLD, None)

  @classmethod
  def not_graded(cls) -> "Verdict":
    """Returns what stands for a verdict where a stage is told to grade none."""
    return cls(None, NOT_GRADED, None)


def unparsed_because(
  verdicts: Iterable[tuple[str, str | None]],
) -> dict[str, int]:
  """Counts what graders raised, the most frequent first.

  Args:
    verdicts: reason and detail of each; see `Verdict.unparsed`.
  """
  counts = collections.Counter(
    detail for reason, detail in verdicts if reason == "unparsed" and detail
  )
  return dict(counts.most_common())


def because_of(counts: Mapping[str, int]) -> str:
  """Returns what `unparsed_because` counted, in brackets; '' for nothing."""
  reasons = [f"{n:,} {why}" for why, n in counts.items()]
  if more := len(reasons) - _MOST_REASONS:
    reasons[_MOST_REASONS:] = [f"{more} other errors"] if more > 0 else []
  return f" (its grader raised: {'; '.join(reasons)})" if reasons else ""


@dataclasses.dataclass(frozen=True)
class Trajectory(_Record):
  """One raw rollout y_o or one refined trajectory y_r, graded.

  Attributes:
    key: content key of all that determines the row.
    problem_id: the problem that it answers.
    stage: 'rollout' for y_o, 'refine' for y_r.
    prompt_ids: int32 token ids, generation prompt included.
    response_ids: int32 token ids as sampled; the terminating stop id is
      their last if and only if `finish_reason` is 'stop'.
    text: the decoded response without the stop token.
    finish_reason: 'stop', or 'length' where a budget ended it.
    truncated: True where `finish_reason` is 'length'.
    seed: the request's sampling seed.
    thinking: whether the prompt let the response open with a thinking block;
      None in rows of earlier versions that left the switch at its default.
    sampling: JSON of the sampling parameters.
    model: folder or hub id of the model that wrote it.
    model_revision: see `hub.model_revision`.
    prompt_version: `prompts.VERSION` of the template.
    draft_key: the key of the y_o in the prompt; None for a rollout.
    draft_elided_tokens: how many of the draft's tokens were left out.
    correct: the verdict (see `Verdict`).
    reason: the verdict's reason.
    extracted: the verdict's extracted answer.
    grader_version: version of the grader.
    detail: the verdict's detail.
    teacher_top_ids: [T * K] int32, for each response token the ids that the
      teacher held likeliest, likeliest first; like the two below None where
      they were not kept (`refine.teacher_top_k`).
    teacher_top_logprobs: [T * K] float32, their log-probabilities, before
      temperature and truncation of the sampling.
    teacher_top_mass: [T] float32, the probability that they cover.
  """

  VERSION: ClassVar[int] = 3

  key: str
  problem_id: str
  stage: TrajectoryStage
  prompt_ids: list[int]
  response_ids: list[int]
  text: str
  finish_reason: FinishReason
  truncated: bool
  seed: int
  thinking: bool | None
  sampling: str
  model: str
  model_revision: str
  prompt_version: str
  draft_key: str | None
  draft_elided_tokens: int
  correct: bool | None
  reason: Reason
  extracted: str | None
  grader_version: str
  detail: str | None = None
  teacher_top_ids: list[int] | None = None
  teacher_top_logprobs: list[float] | None = None
  teacher_top_mass: list[float] | None = None


@dataclasses.dataclass(frozen=True)
class GradedSample(_Record):
  """One of the K samples of a benchmark problem, graded.

  Attributes:
    key: content key of all that determines the row.
    benchmark: the benchmark's name.
    problem_id: the problem's id in it.
    sample: 0 … K-1.
    prompt_sha256: SHA-256 of the prompt's token ids.
    response_ids: int32 token ids as sampled, stop id included.
    text: the decoded response without the stop token.
    num_tokens: how many tokens were sampled.
    finish_reason: as in `Trajectory`; so are all fields below, but that
      `prompt_version` is what `benchmark_prompts` calls the words of the
      benchmark's questions.
  """

  VERSION: ClassVar[int] = 3

  key: str
  benchmark: str
  problem_id: str
  sample: int
  prompt_sha256: str
  response_ids: list[int]
  text: str
  num_tokens: int
  finish_reason: FinishReason
  truncated: bool
  seed: int
  thinking: bool | None
  sampling: str
  model: str
  model_revision: str
  prompt_version: str
  correct: bool | None
  reason: Reason
  extracted: str | None
  grader_version: str
  detail: str | None = None


@dataclasses.dataclass(frozen=True)
class TokenScores(_Record):
  """What student and teacher say of each token of one trajectory.

  T is the number of the response's tokens and K is `top_k`. Probabilities,
  entropies and NLLs are those of the plain softmax (temperature 1), all
  logarithms are natural.

  Attributes:
    key: content key of all that determines the row. Its first half is of the
      models and the loss, the other of the trajectory and its contexts.
    trajectory_key: key of the trajectory; of a reference the one that training
      gives it.
    problem_id: the problem that it answers.
    trajectory: whose words it is, of `methods.TRAJECTORIES`.
    student: 'base' before the run's training, 'trained' after its last
      checkpoint.
    context: what the teacher read before the response, of
      `methods.TEACHER_CONTEXTS`.
    divergence_name: of `methods.DIVERGENCES`: the run's, or forward_kl where
      the run's reads no teacher.
    student_model: folder or hub id of the student.
    student_revision: see `hub.model_revision`; of a trained one with how many
      updates it has had, and a digest of what its training has recorded.
    teacher_model: folder or hub id of the teacher.
    teacher_revision: its revision.
    response_ids: [T] int32 token ids that were scored.
    divergence: [T] nats, before any clip.
    loss_weight: [T] weight of the token in the loss over the mean weight in
      its trajectory; 1 where the run has no token weights.
    clipped: [T] 1 where the run's clip bounds the token, else 0.
    student_nll: [T] -log of the student's probability of the token.
    teacher_nll: [T] of the teacher's.
    student_entropy: [T] of the student's distribution.
    teacher_entropy: [T] of the teacher's.
    student_onset_mass: [T] the student's probability of the onset words.
    teacher_onset_mass: [T] the teacher's.
    top_k: K, how many likeliest ids are kept of each side.
    student_top_ids: [T * K] int32, the student's likeliest ids at each token,
      likeliest first.
    student_top_logprobs: [T * K] their log-probabilities.
    teacher_top_ids: [T * K] int32, the teacher's.
    teacher_top_logprobs: [T * K] their log-probabilities.
  """

  key: str
  trajectory_key: str
  problem_id: str
  trajectory: ScoredTrajectory
  student: ScoredStudent
  context: TeacherContext
  divergence_name: str
  student_model: str
  student_revision: str
  teacher_model: str
  teacher_revision: str
  response_ids: list[int]
  divergence: list[float]
  loss_weight: list[float]
  clipped: list[int]
  student_nll: list[float]
  teacher_nll: list[float]
  student_entropy: list[float]
  teacher_entropy: list[float]
  student_onset_mass: list[float]
  teacher_onset_mass: list[float]
  top_k: int
  student_top_ids: list[int]
  student_top_logprobs: list[float]
  teacher_top_ids: list[int]
  teacher_top_logprobs: list[float]


@dataclasses.dataclass(frozen=True)
class Rejected(_Record):
  """A row that was set aside, and why.

  Attributes:
    problem_id: the row's problem (or whatever names it in its source).
    source: the data set or stage that it comes from.
    stage: the stage that set it aside.
    reason: one line for a person.
  """

  KEY: ClassVar[str] = "problem_id"

  problem_id: str
  source: str
  stage: str
  reason: str

  @property
  def key(self) -> str:
    """Returns the problem's id, for a stage sets a row aside once."""
    return self.problem_id


RecordT = TypeVar("RecordT", bound=_Record)

BY_STAGE: dict[str, type[_Record]] = {
  "problems": Problem,
  "rollout": Trajectory,
  "refine": Trajectory,
  "evaluate/base": GradedSample,
  "evaluate/trained": GradedSample,
  "analyze/scores": TokenScores,
}
"""The folders of stages that have rows, and what kind of rows."""


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  """Returns annotations by field name, in the order of the fields."""
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _closed_fields(cls: type) -> tuple[tuple[str, tuple[str, ...]], ...]:
  """Returns the fields annotated with a Literal, each with its values."""
  return tuple(
    (name, typing.get_args(hint))
    for name, hint in _hints(cls).items()
    if typing.get_origin(hint) is Literal
  )


def _arrow_field(name: str, hint: Any) -> pa.Field:
  """Returns a field's column; only a hint `X | None` makes it nullable."""
  optional = isinstance(hint, types.UnionType)
  if optional:
    (hint,) = (arg for arg in hint.__args__ if arg is not types.NoneType)
  if typing.get_origin(hint) is Literal:
    hint = str
  return pa.field(name, _ARROW_TYPES[hint], nullable=optional)


@functools.cache
def schema(cls: type[_Record]) -> pa.Schema:
  """Returns the parquet schema of a record kind, with its name and version."""
  return pa.schema(
    [_arrow_field(name, hint) for name, hint in _hints(cls).items()],
    # In the file itself, so that a shard that is copied elsewhere still says
    # what it is and what its key is.
    metadata={
      "trd_jax.record": cls.__name__,
      "trd_jax.version": str(cls.VERSION),
      "trd_jax.key": cls.KEY,
    },
  )


def to_table(
  rows: Sequence[RecordT], cls: type[RecordT] | None = None
) -> pa.Table:
  """Converts rows of one record kind to one arrow table.

  Args:
    rows: the rows.
    cls: their record kind; needed only where there may be no row.

  Raises:
    ValueError: a column that must not be empty holds a None.
    pa.ArrowInvalid, pa.ArrowTypeError: a value of the wrong type.
  """
  cls = cls or type(rows[0])
  table = pa.Table.from_pylist([vars(row) for row in rows], schema=schema(cls))
  # Arrow keeps a None in a column that is declared without: it has to be looked
  # for.
  for field, column in zip(table.schema, table.columns, strict=True):
    if column.null_count and not field.nullable:
      raise ValueError(f"{cls.__name__}.{field.name} is None in a row")
  return table


def from_table(
  cls: type[RecordT], table: pa.Table, where: str = "the table"
) -> list[RecordT]:
  """Converts a table that `to_table` made back to rows.

  Args:
    cls: the record kind that is expected.
    table: an arrow table.
    where: names the table in an error.

  Raises:
    UserError: the table holds another record kind, or a schema version that
      this program does not know.
  """
  check_schema(cls, table.schema, where)
  return [cls(**row) for row in table.to_pylist()]


def check_schema(cls: type[_Record], actual: pa.Schema, where: str) -> None:
  """Refuses a schema that is not this program's schema of `cls`.

  Raises:
    UserError: record kind, version or columns differ.
  """
  expected = schema(cls)
  ours, theirs = (
    tuple(
      (s.metadata or {}).get(name, b"").decode()
      for name in (b"trd_jax.record", b"trd_jax.version")
    )
    for s in (expected, actual)
  )
  if theirs != ours:
    what = f"{theirs[0]} version {theirs[1]}" if all(theirs) else "foreign rows"
    raise UserError(
      f"{where} holds {what}, and this program reads {ours[0]} version "
      f"{ours[1]}: use the trd-jax that wrote it, or another --workdir"
    )
  # The version promises these columns: with others somebody has edited the
  # file, or a change was made without a new version.
  if not actual.equals(expected):
    raise UserError(
      f"{where} calls itself {ours[0]} version {ours[1]} but its columns "
      "differ: it is damaged or was edited; remove it and run the stage again"
    )


def digest_of_rows(rows: Sequence[_Record]) -> str:
  """Computes the digest of rows of one record kind, in whichever order."""
  if not rows:
    return digest_of({})
  digests = row_digests(to_table(rows))
  keys = [getattr(row, row.KEY) for row in rows]
  return digest_of(dict(zip(keys, digests, strict=True)))


def digest_of(digests: Mapping[str, bytes]) -> str:
  """Computes one digest of the digests of rows, by the rows' keys."""
  every = hashlib.sha256()
  for key in sorted(digests):
    every.update(f"{key}\0".encode() + digests[key])
  return every.hexdigest()[:32]


def row_digests(table: pa.Table) -> list[bytes]:
  """Computes a SHA-256 of each row of a table, 32 bytes each.

  Equal rows have equal digests, however a table is cut into chunks and a file
  is compressed.
  """
  digests = [hashlib.sha256() for _ in range(table.num_rows)]
  for name, column in zip(table.column_names, table.columns, strict=True):
    start = 0
    for chunk in column.chunks:
      for number, value in enumerate(_values(chunk), start):
        # Length first, so that no value runs into the next; None has none.
        length = -1 if value is None else len(value)
        digests[number].update(f"{name}\0{length}\0".encode() + (value or b""))
      start += len(chunk)
  return [one.digest() for one in digests]


def _values(chunk: pa.Array) -> Iterator[bytes | None]:
  """Yields the bytes of each value of a column's chunk, None for a None."""
  if not pa.types.is_list(chunk.type):
    for value in chunk.to_pylist():
      yield None if value is None else str(value).encode()
    return
  # Lists have a row's thousands of ids: as bytes, and never as Python numbers.
  numbers = chunk.flatten().to_numpy()
  end = 0
  for length in chunk.value_lengths().to_pylist():
    if length is None:
      yield None
      continue
    yield numbers[end : end + length].tobytes()
    end += length
