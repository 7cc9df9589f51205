"""Counts and checks a stage's prompts before an engine is made.

The prompts are counted with the model's own tokenizer and compared with every
budget. One report says what doesn't fit, what is trimmed, which thinking mode
applies, and what in the texts is suspicious; it is printed and kept as
`preflight.json` beside the stage's rows (docs/generation.md, "Preflight").
Nothing here imports jax or loads weights: a budget that is wrong costs no GPU
time.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from trd_jax.data import contexts
from trd_jax.data.chat import Chat
from trd_jax.data.leakage import mentions_reference
from trd_jax.data.prompts import (
  PromptSet,
  is_all_thoughts,
  of_run,
  refinement_reference,
  shown_draft,
)
from trd_jax.experiment import tables
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment, flat
from trd_jax.experiment.files.json_files import read_object, write_json
from trd_jax.experiment.progress import Progress
from trd_jax.experiment.records import Problem, Rejected, Trajectory
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Model
from trd_jax.generation import forecasts
from trd_jax.generation.chat_model import open_chat
from trd_jax.generation.forecasts import Forecast, Lengths
from trd_jax.generation.samples import Prompt
from trd_jax.generation.sampling_stage import SamplingStage
from trd_jax.model.config import read_positions
from trd_jax.model.weights.model_folder import CONFIG

STOPPED = "preflight only: nothing was generated"
_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class PreflightReport:
  """What a stage is about to do; lengths are in tokens.

  Attributes:
    stage: such as 'rollout' or 'evaluate/base'.
    model: its name as the config says it.
    dtype: what it runs in.
    applies: the thinking key that these prompts are made with.
    thinking: its value.
    thinks: whether a response to them may open with a thinking block.
    can_choose: whether the model has another mode.
    elsewhere: the modes of other stages, by stage.
    scoring: in which modes training will score what (rollout and refine only).
    problems: how many problems (for refine: drafts) there are.
    prompts: how many prompts are within their budget, samples included.
    prompt_tokens: their lengths; None where there is none.
    max_prompt_tokens: their budget.
    max_response_tokens: the longest response.
    max_positions: the model's longest context.
    cut_short: prompts that leave the model's context less than the longest
      response.
    filled: prompts that fill the model's context, so that nothing can follow.
    aside: problems that are rejected.
    aside_examples: the first of them, as [problem id, reason].
    trimmed: drafts that lose their middle.
    elided: how many tokens each of these loses; None where there is none.
    elided_tokens: how many they lose together.
    all_thoughts: drafts with nothing after their thoughts, which
      `refine.draft_think=answer` shows whole.
    marks: how many texts spell out a control token, by where (problems,
      references, drafts) and token. The tokenizer keeps these as plain text.
    leaks: how many texts speak of a draft or reference, by where.
    leak_examples: the first of them, as [problem id, phrase], by where.
    forecast: what later stages would make of it (rollout only).
    warnings: one line each.
    wordings: whose words the questions are asked in, by benchmark (evaluate
      only; see `benchmark_prompts`).
  """

  stage: str
  model: str
  dtype: str
  applies: str
  thinking: bool | None
  thinks: bool
  can_choose: bool
  elsewhere: dict[str, bool]
  scoring: str | None
  problems: int
  prompts: int
  prompt_tokens: Lengths | None
  max_prompt_tokens: int
  max_response_tokens: int
  max_positions: int
  cut_short: int
  filled: int
  aside: int
  aside_examples: list[list[str]]
  trimmed: int
  elided: Lengths | None
  elided_tokens: int
  all_thoughts: int
  marks: dict[str, dict[str, int]]
  leaks: dict[str, int]
  leak_examples: dict[str, list[list[str]]]
  forecast: Forecast | None
  warnings: list[str]
  wordings: dict[str, str] = dataclasses.field(default_factory=dict)

  def to_json(self) -> dict[str, Any]:
    """Returns plain values, as `preflight.json` holds them."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> Self:
    """Returns the report that `to_json` took apart."""
    fields = dict(value)
    for name in ("prompt_tokens", "elided"):
      fields[name] = fields[name] and Lengths(**fields[name])
    if fields["forecast"] is not None:
      ahead = dict(fields["forecast"])
      ahead["fixed"] = ahead["fixed"] and Lengths(**ahead["fixed"])
      fields["forecast"] = Forecast(**ahead)
    return cls(**fields)


def count(
  stage: SamplingStage,
  applies: str,
  *,
  problems: int,
  prompts: Sequence[Prompt],
  rejected: Sequence[Rejected],
  texts: Mapping[str, Sequence[tuple[str, str]]],
  elsewhere: Mapping[str, bool] | None = None,
  scoring: str | None = None,
  all_thoughts: int = 0,
  forecast: Forecast | None = None,
  warnings: Sequence[str] = (),
  wordings: Mapping[str, str] | None = None,
) -> PreflightReport:
  """Counts a stage's prompts and holds them against its budgets.

  Args:
    stage: its model and budgets.
    applies: the thinking key that the prompts are made with.
    problems: how many problems or drafts there are.
    prompts: those within their budget.
    rejected: rows for the others.
    texts: (problem id, text) of all that goes into the prompts, by where it
      comes from.
    elsewhere: for the report, as all below.
    scoring: as `contexts.describe_modes` says it.
    all_thoughts: of drafts.
    forecast: what later stages would make of it.
    warnings: those about budgets are added.
    wordings: whose words the questions are asked in, by benchmark.
  """
  # Counted as ids of the model's own tokenizer: a budget in characters would
  # be wrong by a factor that differs between mathematics and code.
  lengths = [len(prompt.ids) for prompt in prompts]
  elided = [p.elided_tokens for p in prompts if p.elided_tokens]
  model, section = stage.model, stage.section
  room = read_positions(read_object(model.folder / CONFIG))
  marks, leaks = _inspected(model.chat, texts)
  thinking = flat(stage.experiment)[applies]
  return PreflightReport(
    stage=stage.name,
    model=model.name,
    dtype=model.dtype,
    applies=applies,
    thinking=thinking,
    thinks=model.chat.thinks(thinking),
    can_choose=model.chat.supports_thinking,
    elsewhere=dict(elsewhere or {}),
    scoring=scoring,
    problems=problems,
    prompts=len(prompts),
    prompt_tokens=Lengths.of(lengths),
    max_prompt_tokens=section.max_prompt_tokens,
    max_response_tokens=section.max_response_tokens,
    max_positions=room,
    cut_short=sum(n + section.max_response_tokens > room for n in lengths),
    filled=sum(n >= room for n in lengths),
    aside=len(rejected),
    aside_examples=[[r.problem_id, r.reason] for r in rejected[:_EXAMPLES]],
    trimmed=len(elided),
    elided=Lengths.of(elided),
    elided_tokens=sum(elided),
    all_thoughts=all_thoughts,
    marks=marks,
    leaks={where: len(phrases) for where, phrases in leaks.items()},
    leak_examples={where: f[:_EXAMPLES] for where, f in leaks.items()},
    forecast=forecast,
    warnings=[*warnings, *(forecast.impossible if forecast else ())],
    wordings=dict(wordings or {}),
  )


def of_rollout(
  stage: SamplingStage,
  problems: Sequence[Problem],
  prompts: Sequence[Prompt],
  rejected: Sequence[Rejected],
) -> PreflightReport:
  """Returns the report of the rollout stage, with a look ahead.

  The teacher's tokenizer is read for it, not its weights; where it isn't to
  be had there is a warning instead.

  Raises:
    UserError: a thinking key asks for a mode that a template hasn't, or the
      teacher's has no system turn where one is to be made.
  """
  experiment, chat = stage.experiment, stage.model.chat
  teacher, warnings = _other_chat(stage, experiment.teacher)
  modes = contexts.outlook(experiment, chat, teacher)
  # The student's is seen as its prompts are made.
  if teacher is not None and experiment.reads_own_teacher:
    _check_system(teacher, stage.prompt_set, problems)
  ahead = None
  if teacher is not None:
    lengths = {p.problem.problem_id: len(p.ids) for p in prompts}
    if lengths:
      ahead = forecasts.of_rollouts(
        experiment, stage.prompt_set, chat, teacher, problems, lengths
      )
  texts = {
    "problems": [(p.problem_id, p.text) for p in problems],
    "references": [
      (p.problem_id, refinement_reference(p) or "") for p in problems
    ],
  }
  return count(
    stage,
    "student.thinking",
    problems=len(problems),
    prompts=prompts,
    rejected=rejected,
    texts=texts,
    elsewhere=modes.without("rollout"),
    scoring=modes.scoring,
    forecast=ahead,
    warnings=[*warnings, *modes.warnings],
  )


def of_refine(
  stage: SamplingStage,
  problems: Mapping[str, Problem],
  drafts: Sequence[Trajectory],
  prompts: Sequence[Prompt],
  rejected: Sequence[Rejected],
) -> PreflightReport:
  """Returns the report of the refine stage; `problems` by id."""
  experiment = stage.experiment
  draft_think = experiment.refine.draft_think
  shown = {draft.problem_id: problems[draft.problem_id] for draft in drafts}
  texts = {
    "problems": [(name, p.text) for name, p in shown.items()],
    "drafts": [
      (draft.problem_id, shown_draft(draft.text, draft_think))
      for draft in drafts
    ],
  }
  if experiment.regime == "opsd":
    texts["references"] = [
      (name, refinement_reference(p) or "") for name, p in shown.items()
    ]
  student, warnings = _other_chat(stage, experiment.student)
  modes = contexts.outlook(experiment, student, stage.model.chat)
  all_thoughts = 0
  if draft_think == "answer":
    all_thoughts = sum(is_all_thoughts(draft.text) for draft in drafts)
  return count(
    stage,
    "refine.thinking",
    problems=len(drafts),
    prompts=prompts,
    rejected=rejected,
    texts=texts,
    elsewhere=modes.without("refine"),
    scoring=modes.scoring,
    all_thoughts=all_thoughts,
    warnings=[*warnings, *modes.warnings],
  )


def of_teacher_samples(
  stage: SamplingStage,
  problems: Sequence[Problem],
  prompts: Sequence[Prompt],
  rejected: Sequence[Rejected],
) -> PreflightReport:
  """Returns the report of the refine stage where the teacher answers x."""
  student, warnings = _other_chat(stage, stage.experiment.student)
  modes = contexts.outlook(stage.experiment, student, stage.model.chat)
  return count(
    stage,
    "refine.thinking",
    problems=len(problems),
    prompts=prompts,
    rejected=rejected,
    texts={"problems": [(p.problem_id, p.text) for p in problems]},
    elsewhere=modes.without("refine"),
    scoring=modes.scoring,
    warnings=[*warnings, *modes.warnings],
  )


def of_evaluation(
  stage: SamplingStage,
  problems: Sequence[Problem],
  prompts: Sequence[Prompt],
  rejected: Sequence[Rejected],
  wordings: Mapping[str, str],
) -> PreflightReport:
  """Returns the report of an evaluation; `wordings` by benchmark."""
  own = stage.experiment.evaluate.thinking is not None
  return count(
    stage,
    "evaluate.thinking" if own else "student.thinking",
    problems=len(problems),
    prompts=prompts,
    rejected=rejected,
    texts={"problems": [(p.problem_id, p.text) for p in problems]},
    wordings=wordings,
  )


def check_systems(
  experiment: Experiment, run_dir: RunDir, problems: Sequence[Problem]
) -> None:
  """Checks that all models that are asked have the system turns of problems.

  Raises:
    UserError: a template has none.
  """
  prompt_set = of_run(experiment, run_dir)
  if all(prompt_set.system(problem) is None for problem in problems):
    return
  models = [experiment.student]
  models += [experiment.teacher] if experiment.reads_own_teacher else []
  for model in models:
    _check_system(open_chat(model, run_dir), prompt_set, problems)


def _check_system(
  chat: Chat, prompt_set: PromptSet, problems: Sequence[Problem]
) -> None:
  if any(prompt_set.system(problem) is not None for problem in problems):
    chat.check_system()


def _other_chat(
  stage: SamplingStage, other: Model
) -> tuple[Chat | None, list[str]]:
  """Opens the other side's tokenizer and template, without its weights.

  In OPSD both sides are one. In OPD a stage can do without the other model:
  where that isn't to be had, there is a warning instead.
  """
  if stage.experiment.regime == "opsd":
    return stage.model.chat, []
  try:
    return open_chat(other, stage.run_dir), []
  except UserError as error:
    return None, [f"what {other.path} will make of it is not checked: {error}"]


def publish(report: PreflightReport, run_dir: RunDir) -> None:
  """Prints and keeps a report.

  Raises:
    UserError: after that, where the stage would have nothing to generate or a
      prompt fills the model's context.
  """
  # Before what may refuse the stage: the report is what explains the refusal.
  print(table(report), flush=True)
  write_json(run_dir.preflight(report.stage), report.to_json())
  section = report.stage.partition("/")[0]
  key = f"{section}.max_prompt_tokens"
  if report.filled:
    raise UserError(
      f"{report.stage}: {report.filled:,} prompts fill the"
      f" {report.max_positions:,} positions of {report.model}; lower {key}"
      f" below {report.max_positions} so that they are set aside"
    )
  if not report.prompts:
    name, reason = (report.aside_examples or [["-", "there is none"]])[0]
    too_long = "max_prompt_tokens=" in reason
    advice = f"raise {key}" if too_long else "use regime=opd"
    raise UserError(
      f"{report.stage}: nothing to generate, all {report.problems:,} prompts"
      f" are set aside ({name}: {reason}); {advice}"
    )


def stops(experiment: Experiment) -> bool:
  """Returns whether only the preflight was asked for, and prints that."""
  if experiment.preflight_only:
    print(STOPPED, flush=True)
  return experiment.preflight_only


def table(report: PreflightReport) -> str:
  """Renders the report for people; what is nothing to say is left out."""
  head = f"{report.stage}: {report.model}, {report.dtype}"
  return "\n".join(
    [
      f"preflight of {head}",
      tables.columns(list(_rows(report)), indent="  "),
      *(f"  note: {warning}" for warning in report.warnings),
    ]
  )


def _rows(report: PreflightReport) -> Iterator[tuple[str, str]]:
  section = report.stage.partition("/")[0]
  mode = contexts.on_or_off
  only = "" if report.can_choose else ", as the template has no switch"
  others = "".join(f"; {s} {mode(on)}" for s, on in report.elsewhere.items())
  key = f"{report.applies}={report.thinking}"
  yield "thinking", f"{mode(report.thinks)} ({key}{only}){others}"
  if report.scoring:
    yield "scoring", report.scoring
  if report.wordings:
    said = (f"{name} {version}" for name, version in report.wordings.items())
    yield "asked as", ", ".join(said)
  what = "drafts" if section == "refine" else "problems"
  yield what, f"{report.problems:,}"
  yield "prompts", f"{report.prompts:,} within the budget"
  if report.prompt_tokens:
    yield (
      "prompt tokens",
      f"{_spread(report.prompt_tokens)} of"
      f" {section}.max_prompt_tokens={report.max_prompt_tokens:,}",
    )
    # Budgets beyond the model's positions are no mistake by themselves: few
    # prompts are the longest, and few responses use what they may.
    longest = report.prompt_tokens.max + report.max_response_tokens
    context = f" of the model's {report.max_positions:,}"
    if report.cut_short:
      context += f": {report.cut_short:,} prompts leave a response less"
    yield (
      "with response",
      f"at most {longest:,}{context}"
      f" ({section}.max_response_tokens={report.max_response_tokens:,})",
    )
  yield "set aside", f"{report.aside:,}"
  for name, reason in report.aside_examples:
    yield "", f"{name}: {reason}"
  if report.elided:
    yield (
      "trimmed",
      f"{report.trimmed:,} drafts lose {report.elided_tokens:,} tokens of their"
      f" middle ({_spread(report.elided)})",
    )
  if report.all_thoughts:
    yield (
      "shown whole",
      f"{report.all_thoughts:,} drafts: nothing follows their thoughts"
      " (refine.draft_think=answer)",
    )
  for where, counts in report.marks.items():
    marks = ", ".join(f"{mark} in {n:,}" for mark, n in counts.items())
    yield f"marks in {where}", f"{marks}; they stay plain text"
  for where, count in report.leaks.items():
    name, phrase = report.leak_examples[where][0]
    yield (
      f"leaks in {where}",
      f'{count:,} speak of a draft or a reference ({name}: "{phrase}")',
    )
  if report.forecast:
    yield from _ahead(report.forecast)


def _ahead(ahead: Forecast) -> Iterator[tuple[str, str]]:
  if ahead.fixed:
    room = f" ({ahead.no_room:,} have room for none)" if ahead.no_room else ""
    yield (
      "refine, no draft",
      f"{_spread(ahead.fixed)} of"
      f" refine.max_prompt_tokens={ahead.max_prompt_tokens:,}",
    )
    yield (
      "refine, at worst",
      f"{ahead.trimmed:,} drafts trimmed, {ahead.dropped:,} set aside{room}",
    )
  if ahead.no_reference:
    yield (
      "no reference",
      f"{ahead.no_reference:,} problems; the teacher needs it",
    )
  yield (
    "train, at worst",
    f"{ahead.over_student:,} over"
    f" train.max_student_tokens={ahead.max_student_tokens:,},"
    f" {ahead.over_teacher:,} over"
    f" train.max_teacher_tokens={ahead.max_teacher_tokens:,}",
  )


def _spread(lengths: Lengths) -> str:
  return (
    f"min {lengths.min:,} · median {lengths.median:,.0f} ·"
    f" p95 {lengths.p95:,} · max {lengths.max:,}"
  )


def _inspected(
  chat: Chat, texts: Mapping[str, Sequence[tuple[str, str]]]
) -> tuple[dict[str, dict[str, int]], dict[str, list[list[str]]]]:
  """Counts control marks and leaks, by where; only where there are any."""
  marks: dict[str, dict[str, int]] = {}
  leaks: dict[str, list[list[str]]] = {}
  total = sum(map(len, texts.values()))
  with Progress(total, "marks and leaks", "texts") as progress:
    for where, named in texts.items():
      spelt: collections.Counter[str] = collections.Counter()
      spoken = []
      for name, text in named:
        spelt.update(chat.control_marks(text))
        if phrase := mentions_reference(text):
          spoken.append([name, phrase])
        progress.update()
      if spelt:
        marks[where] = dict(sorted(spelt.items()))
      if spoken:
        leaks[where] = spoken
  return marks, leaks
