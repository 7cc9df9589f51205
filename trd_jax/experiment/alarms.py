"""Alarms: what is wrong with a run, by name, as its figures tell.

An alarm looks at the rows of a training's metrics, or at what finished stages
said of themselves. Training prints one when it first fires; the pipeline's
table, `--status` and the report show all that fired:

    for alarm in alarms.of_run(RunDir("runs/demo")):
      print(alarm.line)

To add one: a function of `_of_rows` or `_of_stages`, with its meaning and what
helps; docs/training.md lists them, and a test sees that it does.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trd_jax.experiment import metric_log
from trd_jax.experiment.run_dir import RunDir

# Thresholds. Each is far from what the shipped runs show, and from what a
# training that goes well is known to do: an alarm that is wrong once is not
# read the second time.

# A response's first tokens differ more between two contexts than others do, but
# a token that one side all but rules out, as a thinking block that the other
# doesn't open, costs five nats and more: one among five is a mean of 1.
FIRST_TOKENS_NATS = 1.0
FIRST_TOKENS_TIMES = 10.0
# Rounding in bfloat16 moves a token's divergence by some 1e-4. Of the
# laboratory's methods the one that begins lowest (jsd) has a D_p99 of 0.06.
SAME_NATS = 1e-3
# Weight decay and AdamW move an adapter in each update that has a gradient, far
# enough to be seen in its norm's float32 after a few of them.
IDLE_UPDATES = 10
# Gradients of neighbouring updates differ two- or threefold, and a spoilt batch
# or an exploding loss shows in orders of magnitude.
SPIKE_TIMES = 10.0
SPIKE_AFTER = 10  # rows, before which nobody knows what is usual
_SPIKE_MEMORY = 50  # rows that say what is usual
# In the paper one of two thinking models needs less than half of its budget: if
# three of ten samples end at it, the budget says more than the model.
TRUNCATED_SHARE = 0.3
# One trajectory in twenty that speaks of what the student can't see.
LEAK_SHARE = 0.05
# `pipeline.collapse_length`: TRD shortens answers, to half and less, and is
# right to; to a fifth is another matter.
LENGTH_COLLAPSE = 0.2
# No method here makes answers longer on purpose.
LENGTH_RUNAWAY = 2.0
# An adapter that was applied changes nearly every sample at a temperature above
# 0, and on the laboratory three of five.
IDENTICAL_SHARE = 0.95

Row = Mapping[str, Any]
Summaries = Mapping[str, Mapping[str, Any]]
"""What finished stages said of themselves, by stage."""


class Alarm(NamedTuple):
  """A kind of alarm.

  Attributes:
    name: what it is called in logs and files.
    when: what makes it fire.
    remedy: what to do.
    of_row: says of a row of metrics and those before it what is wrong; None
      where nothing is, or where the alarm is of stages.
    of_stages: yields stages with what is wrong with each.
  """

  name: str
  when: str
  remedy: str
  of_row: Callable[[Sequence[Row], int], str | None] | None = None
  of_stages: Callable[[Summaries], Iterator[tuple[str, str]]] | None = None


class Fired(NamedTuple):
  """An alarm that fired; `_asdict` gives it as files have it.

  Attributes:
    name: of `ALARMS`.
    stage: whose figures made it fire.
    update: the first update that did, counted from 1; None of a whole stage.
    what: the figures, in words.
    remedy: what to do.
  """

  name: str
  stage: str
  update: int | None
  what: str
  remedy: str

  @property
  def line(self) -> str:
    """Returns all of it in one line."""
    after = f" at update {self.update:,}" if self.update is not None else ""
    return f"alarm {self.name}{after}: {self.what}; {self.remedy}"


ALARMS: dict[str, Alarm] = {}
"""All alarms by name."""


def _of_rows(when: str, remedy: str):
  """Registers a function of rows under its own name."""

  def register(function: Callable[[Sequence[Row], int], str | None]):
    name = function.__name__.lstrip("_")
    ALARMS[name] = Alarm(name, when, remedy, of_row=function)
    return function

  return register


def _of_stages(when: str, remedy: str):
  """Registers a function of finished stages under its own name."""

  def register(function: Callable[[Summaries], Iterator[tuple[str, str]]]):
    name = function.__name__.lstrip("_")
    ALARMS[name] = Alarm(name, when, remedy, of_stages=function)
    return function

  return register


def of_run(run_dir: RunDir) -> list[Fired]:
  """Returns the alarms of a run, finished or not.

  Raises:
    UserError: its metrics or a stage's record are damaged.
  """
  rows = metric_log.read_metrics(run_dir.metrics_file("train"))
  stages = ("rollout", "refine", "evaluate/base", "evaluate/trained")
  summaries = {
    stage: run_dir.record(stage) for stage in stages if run_dir.finished(stage)
  }
  return [*of_stages(summaries), *of_rows(rows)]


def of_rows(rows: Sequence[Row]) -> list[Fired]:
  """Returns the alarms of a training, each once, in the order of updates."""
  watch = Watch()
  return [fired for row in rows for fired in watch.look(row)]


def of_stages(summaries: Summaries) -> list[Fired]:
  """Returns the alarms of finished stages.

  Args:
    summaries: by stage (`rollout`, `evaluate/base`, …) what its `done.json`
      has. Stages that make no figures may be among them.
  """
  return [
    Fired(alarm.name, stage, None, what, alarm.remedy)
    for alarm in ALARMS.values()
    if alarm.of_stages is not None
    for stage, what in alarm.of_stages(summaries)
  ]


class Watch:
  """Looks at a training's rows as they come.

  Args:
    rows: those that are there already; what they make fire isn't said again.
  """

  def __init__(self, rows: Sequence[Row] = ()):
    self._rows: list[Row] = []
    self._fired: set[str] = set()
    for row in rows:
      self.look(row)

  def look(self, row: Row) -> list[Fired]:
    """Returns the alarms that a further row makes fire for the first time."""
    self._rows.append(row)
    found = []
    for alarm in ALARMS.values():
      if alarm.of_row is None or alarm.name in self._fired:
        continue
      what = alarm.of_row(self._rows, len(self._rows) - 1)
      if what is None:
        continue
      self._fired.add(alarm.name)
      step = row.get("step")
      update = step + 1 if isinstance(step, int) else None
      found.append(Fired(alarm.name, "train", update, what, alarm.remedy))
    return found


# -- of a training's rows ----------------------------------------------------


@_of_rows(
  "the loss, D or the gradient's norm is no finite number",
  "lower train.learning_rate, or look at the batch of that update",
)
def nan(rows: Sequence[Row], at: int) -> str | None:
  """Sees figures that are none."""
  row = rows[at]
  wrong = [
    name
    for name in ("loss", "D", "grad_norm")
    if name in row and _number(row, name) is None
  ]
  return f"{' and '.join(wrong)}: not a finite number" if wrong else None


@_of_rows(
  f"`D_first_5` is above {FIRST_TOKENS_NATS:g} nat and above"
  f" {FIRST_TOKENS_TIMES:g} times `D`",
  "the chat template or the thinking mode of a context doesn't fit the"
  " trajectories: look at train's lines on thinking, at train.student_thinking"
  " and teacher.thinking",
)
def first_tokens(rows: Sequence[Row], at: int) -> str | None:
  """Sees contexts after which a trajectory can't begin as it does."""
  first, every = _number(rows[at], "D_first_5"), _number(rows[at], "D")
  if first is None or every is None:
    return None
  if first <= FIRST_TOKENS_NATS or first <= FIRST_TOKENS_TIMES * abs(every):
    return None
  return f"D_first_5 is {first:.3g} nats where D is {every:.3g}"


@_of_rows(
  f"`D_p99` is below {SAME_NATS:g} nats in the first update",
  "both sides read the same under the same weights, and nothing can be learnt:"
  " look at teacher_context, and at which models are compared",
)
def teacher_equals_student(rows: Sequence[Row], at: int) -> str | None:
  """Sees a teacher that has nothing to say from the beginning."""
  # Of a divergence that may be negative D is near 0 among good teachers, too.
  name = "D_p99" if "D_p99" in rows[at] else "D"
  size = _number(rows[at], name)
  if rows[at].get("step", at) != 0 or size is None or abs(size) >= SAME_NATS:
    return None
  return f"{name} is {size:.3g} nats in the first update"


@_of_rows(
  f"`grad_norm` is 0, or `adapter_norm` stays the same, over {IDLE_UPDATES}"
  " logged updates with a learning rate",
  "the adapter learns nothing: look at the divergence, at train.learning_rate"
  " and at what is frozen",
)
def adapter_idle(rows: Sequence[Row], at: int) -> str | None:
  """Sees an adapter that no update moves."""
  last = [
    row
    for row in rows[max(0, at + 1 - IDLE_UPDATES) : at + 1]
    if _number(row, "learning_rate")
  ]
  if len(last) < IDLE_UPDATES:
    return None
  if all(_number(row, "grad_norm") == 0 for row in last):
    return f"grad_norm was 0 in {IDLE_UPDATES} logged updates"
  norms = {_number(row, "adapter_norm") for row in last}
  if len(norms) == 1 and None not in norms:
    return f"adapter_norm was {norms.pop():.6g} in {IDLE_UPDATES} of them"
  return None


@_of_rows(
  f"`grad_norm` is above {SPIKE_TIMES:g} times the median of the rows before",
  "one such is clipped (train.grad_clip) and passes; if more come, lower"
  " train.learning_rate, or look at the trajectories of that update",
)
def gradient_spike(rows: Sequence[Row], at: int) -> str | None:
  """Sees a gradient of another order of magnitude than those before it."""
  before = [
    norm
    for row in rows[max(0, at - _SPIKE_MEMORY) : at]
    if (norm := _number(row, "grad_norm")) is not None
  ]
  norm = _number(rows[at], "grad_norm")
  if norm is None or len(before) < SPIKE_AFTER:
    return None
  usual = statistics.median(before)
  if usual <= 0 or norm <= SPIKE_TIMES * usual:
    return None
  return f"grad_norm is {norm:.3g}, {norm / usual:.0f} times what is usual here"


# -- of finished stages ------------------------------------------------------


@_of_stages(
  f"at least {TRUNCATED_SHARE:.0%} of y_o, of y_r or of an evaluation's samples"
  " end at their budget",
  "raise max_response_tokens of that stage, or look whether the model ends its"
  " turns",
)
def truncated_share(summaries: Summaries) -> Iterator[tuple[str, str]]:
  """Sees samples that a budget ended."""
  for stage, name in (("rollout", "y_o"), ("refine", "y_r")):
    share = _share(summaries.get(stage, {}), "truncated")
    if share is not None and share >= TRUNCATED_SHARE:
      yield stage, f"{share:.0%} of {name} are truncated"
  for stage in ("evaluate/base", "evaluate/trained"):
    for benchmark, figures in _benchmarks(summaries, stage):
      share = _number(figures, "truncated_share")
      if share is not None and share >= TRUNCATED_SHARE:
        yield stage, f"{share:.0%} of the samples of {benchmark} are truncated"


@_of_stages(
  f"at least {LEAK_SHARE:.0%} of y_r speak of a draft or a reference",
  "the student is taught to speak of what it can't see: train.leaks=drop leaves"
  " them out; look at some with trd_jax.show --only=leak",
)
def leak_share(summaries: Summaries) -> Iterator[tuple[str, str]]:
  """Sees trajectories that speak of what only their writer had."""
  share = _share(summaries.get("refine", {}), "leaks")
  if share is not None and share >= LEAK_SHARE:
    yield "refine", f"{share:.0%} of y_r speak of a draft or a reference"


@_of_stages(
  f"the trained student's median length is below {LENGTH_COLLAPSE:g} of base's",
  "look at some answers (trd_jax.show --benchmark=NAME); take an earlier"
  " checkpoint, or lower train.learning_rate",
)
def length_collapse(summaries: Summaries) -> Iterator[tuple[str, str]]:
  """Sees answers that have shrunk."""
  for name, base, trained in _lengths(summaries):
    if trained < LENGTH_COLLAPSE * base:
      yield _TRAINED, _longer(name, base, trained)


@_of_stages(
  f"the trained student's median length is above {LENGTH_RUNAWAY:g} times"
  " base's",
  "look whether it ends its answers (trd_jax.show --benchmark=NAME); no"
  " truncated trajectory should be learnt from: train.truncated=drop",
)
def runaway_length(summaries: Summaries) -> Iterator[tuple[str, str]]:
  """Sees answers that have grown."""
  for name, base, trained in _lengths(summaries):
    if trained > LENGTH_RUNAWAY * base:
      yield _TRAINED, _longer(name, base, trained)


@_of_stages(
  "the trained student's Pass@K is below the 95% interval of base's",
  "the student has lost ways to the answer: fewer updates, a lower"
  " train.learning_rate, or another method or teacher_context",
)
def pass_collapse(summaries: Summaries) -> Iterator[tuple[str, str]]:
  """Sees questions that no sample answers any more."""
  base = dict(_benchmarks(summaries, _BASE))
  for name, figures in _benchmarks(summaries, _TRAINED):
    before = base.get(name, {})
    interval = before.get("pass_at_k_interval")
    now, then = _number(figures, "pass_at_k"), _number(before, "pass_at_k")
    if now is None or then is None or not interval:
      continue
    # Of other numbers of samples they can't be compared.
    if figures.get("k") == before.get("k") and now < interval[0]:
      k = figures.get("k")
      yield (
        _TRAINED,
        f"Pass@{k} of {name} is {now:.1%}, and base's {then:.1%}"
        f" [{interval[0]:.1%}, {interval[1]:.1%}]",
      )


@_of_stages(
  f"at least {IDENTICAL_SHARE:.0%} of the trained student's samples are base's,"
  " token for token, on every benchmark",
  "the adapter changes nothing, or wasn't applied: look at merge/done.json"
  " (largest_logit_distance_to_base) and at what the engine has loaded",
)
def samples_of_base(summaries: Summaries) -> Iterator[tuple[str, str]]:
  """Sees a trained student that answers as base does."""
  shares = {
    name: share
    for name, figures in _benchmarks(summaries, _TRAINED)
    if (share := _number(figures, "identical_to_base")) is not None
  }
  # One benchmark with other samples is enough to know that it isn't base.
  if shares and min(shares.values()) >= IDENTICAL_SHARE:
    said = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    yield _TRAINED, f"samples that are base's: {said}"


_BASE, _TRAINED = "evaluate/base", "evaluate/trained"


def _number(row: Mapping[str, Any], name: str) -> float | None:
  """Returns a finite number; None where there is none."""
  value = row.get(name)
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return None
  return value if math.isfinite(value) else None


def _share(summary: Mapping[str, Any], name: str) -> float | None:
  """Returns a count's share of a stage's samples."""
  count, total = _number(summary, name), _number(summary, "samples")
  return count / total if count is not None and total else None


def _benchmarks(
  summaries: Summaries, stage: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """Yields the benchmarks of an evaluation with their figures."""
  for name, figures in summaries.get(stage, {}).items():
    # Beside them the record has what it was made by.
    if isinstance(figures, Mapping) and "avg_at_k" in figures:
      yield name, figures


def _lengths(summaries: Summaries) -> Iterator[tuple[str, float, float]]:
  """Yields benchmarks with base's and the trained student's median length."""
  base = dict(_benchmarks(summaries, _BASE))
  for name, figures in _benchmarks(summaries, _TRAINED):
    lengths = [
      _number(one, "median_tokens") for one in (base.get(name, {}), figures)
    ]
    if lengths[0] and lengths[1] is not None:
      yield name, lengths[0], lengths[1]


def _longer(name: str, base: float, trained: float) -> str:
  return (
    f"answers on {name} have a median of {trained:,.0f} tokens, and base's of"
    f" {base:,.0f}"
  )


def documented() -> str:
  """Returns all alarms as rows of a table for a document."""
  return "\n".join(
    f"| `{one.name}` | {one.when} | {one.remedy} |" for one in ALARMS.values()
  )
