"""What rollout, refine and evaluate have in common.

A stage that samples opens a model, makes prompts of its problems, has them
counted (`preflight`), gives every prompt that has no row yet one, and sums up.
Its file says what is its own: which prompts, which rows, which summary.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from trd_jax.data.problems import store
from trd_jax.data.prompts import PromptSet, of_run
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.progress import Progress
from trd_jax.experiment.records import (
  GradedSample,
  Problem,
  RecordT,
  Rejected,
  Trajectory,
  TrajectoryStage,
  content_key,
)
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Generation
from trd_jax.generation import generate, summaries, top_tokens
from trd_jax.generation.chat_model import ChatModel
from trd_jax.generation.engines.factory import check_installed
from trd_jax.generation.samples import GradedCompletion, Prompt

_T = TypeVar("_T")


def begins(experiment: Experiment, run_dir: RunDir, stage: str) -> bool:
  """Returns whether a stage of trajectories is still to be sampled.

  Raises:
    UserError: the prompt set is wrong or another than that of the rows that
      are there, a data file has changed since the problems were read, or the
      engine isn't installed.
  """
  of_run(experiment, run_dir)
  if run_dir.complete(stage) is not None:
    store.check_source(experiment, run_dir)  # or else as they are loaded
  if summaries.skip_if_done(run_dir, stage, summaries.describe):
    return False
  if not experiment.preflight_only:
    check_installed(experiment.engine)
  return True


def counted(items: Iterable[_T], total: int, desc: str) -> Iterator[_T]:
  """Yields the items; a progress bar counts each as a prompt that is made."""
  with Progress(total, desc, "prompts") as progress:
    for item in items:
      progress.update()
      yield item


def sort_out(
  candidates: Iterable[Prompt | Rejected],
) -> tuple[list[Prompt], list[Rejected]]:
  """Returns the prompts within their budget, and the rows for the others."""
  prompts: list[Prompt] = []
  rejected: list[Rejected] = []
  for one in candidates:
    if isinstance(one, Rejected):
      rejected.append(one)
    else:
      prompts.append(one)
  return prompts, rejected


@dataclasses.dataclass(frozen=True)
class SamplingStage:
  """A stage that samples, with all that determines its samples.

  Attributes:
    experiment: chooses engine, graders and sandbox.
    run_dir: where the stage's rows are.
    name: the stage, such as 'rollout' or 'evaluate/base'.
    model: the model that answers.
    section: its budgets and how it samples.
    thinking: the switch that its prompts are made with, as `Chat.render` takes
      it.
  """

  experiment: Experiment
  run_dir: RunDir
  name: str
  model: ChatModel
  section: Generation
  thinking: bool | None

  @functools.cached_property
  def prompt_set(self) -> PromptSet:
    """Returns what it asks, in which words."""
    return of_run(self.experiment, self.run_dir)

  def identity(self, ids: Sequence[int], *parts: Any) -> tuple[str, int]:
    """Returns key and seed of a sample: equal for equal causes, else unrelated.

    Args:
      ids: the prompt's token ids.
      *parts: what else tells samples apart: problem, number, seed.
    """
    key = content_key(
      self.name,
      self.model.revision,
      self.model.dtype,
      _sampling_json(self.section),
      list(map(int, ids)),
      *parts,
    )
    return key, int(key[:15], 16)

  def prompt(
    self,
    problem: Problem,
    ids: Sequence[int],
    *parts: Any,
    seed: int | None = None,
    sample: int = 0,
    draft_key: str | None = None,
    elided_tokens: int = 0,
    version: str = "",
    thinks: bool | None = None,
  ) -> Prompt:
    """Returns a prompt with its sample's key and seed.

    Args:
      problem: what it asks.
      ids: its token ids.
      *parts: see `identity`.
      seed: in place of the key's own.
      sample: see `Prompt`, as those below.
      draft_key: key of the draft in it.
      elided_tokens: tokens of that draft that were left out.
      version: what a benchmark's words are called.
      thinks: see `Prompt`.
    """
    key, own_seed = self.identity(ids, *parts)
    return Prompt(
      key,
      problem,
      ids,
      own_seed if seed is None else seed,
      sample,
      draft_key,
      elided_tokens,
      version,
      thinks,
    )

  def fill(
    self,
    prompts: Sequence[Prompt],
    record_cls: type[RecordT],
    to_row: Callable[[GradedCompletion], RecordT],
    *,
    top_logprobs: int = 0,
    grade: bool = True,
  ) -> dict[str, Any]:
    """Gives the stage the rows of all prompts that aren't on disk yet.

    A row is written as its sample is judged, so that a process that is killed
    loses one unfinished shard, what is still being judged (`samples.graded`
    bounds that) and what an engine hasn't handed over yet (`engines.feeder`),
    and the next one draws only what is missing.

    Args:
      prompts: all that the stage wants completed.
      record_cls: the stage's kind of row.
      to_row: makes one of a sample.
      top_logprobs: see `generate.generate`.
      grade: whether answers are judged.

    Returns:
      What of this run belongs into the stage's summary: `generate.generate`.
    """
    facts: dict[str, Any] = {}
    # By content key and not by count: a problem, prompt or model that has
    # changed since asks for rows that aren't there.
    on_disk = self.run_dir.keys(self.name)
    pending = [prompt for prompt in prompts if prompt.key not in on_disk]
    if kept := len(prompts) - len(pending):
      # A bar on a terminal shows it; a log would only show where that begins.
      print(
        f"{self.name}: goes on: {kept:,} of {len(prompts):,} samples are kept",
        flush=True,
      )
    if not pending:
      return facts
    with self.run_dir.shard_writer(self.name, record_cls) as writer:
      for sample in generate.generate(
        self.experiment,
        self.model,
        self.section,
        pending,
        desc=self.name.replace("/", " "),
        already=len(prompts) - len(pending),
        top_logprobs=top_logprobs,
        grade=grade,
        facts=facts,
      ):
        writer.add(to_row(sample))
    return facts

  def trajectory(self, sample: GradedCompletion) -> Trajectory:
    """Returns the row of a rollout or refinement."""
    prompt, completion = sample.prompt, sample.completion
    verdict = sample.verdict
    return Trajectory(
      key=prompt.key,
      problem_id=prompt.problem.problem_id,
      stage=cast(TrajectoryStage, self.name),
      prompt_ids=list(prompt.ids),
      response_ids=list(completion.ids),
      text=sample.text,
      finish_reason=completion.finish_reason,
      truncated=completion.finish_reason == "length",
      seed=prompt.seed,
      thinking=self.model.chat.thinks(self.thinking),
      sampling=_sampling_json(self.section),
      model=self.model.name,
      model_revision=self.model.revision,
      prompt_version=self.prompt_set.version,
      draft_key=prompt.draft_key,
      draft_elided_tokens=prompt.elided_tokens,
      correct=verdict.correct,
      reason=verdict.reason,
      extracted=verdict.extracted,
      detail=verdict.detail,
      grader_version=sample.grader,
      **top_tokens.columns(completion.top),
    )

  def graded_sample(
    self, sample: GradedCompletion, benchmark: str
  ) -> GradedSample:
    """Returns the row of a benchmark's sample."""
    prompt, completion = sample.prompt, sample.completion
    verdict = sample.verdict
    # A prompt is the same for all samples of a question, and long: a digest
    # tells whether two runs asked alike.
    return GradedSample(
      key=prompt.key,
      benchmark=benchmark,
      problem_id=prompt.problem.problem_id,
      sample=prompt.sample,
      prompt_sha256=prompt_sha256(prompt.ids),
      response_ids=list(completion.ids),
      text=sample.text,
      num_tokens=len(completion.ids),
      finish_reason=completion.finish_reason,
      truncated=completion.finish_reason == "length",
      seed=prompt.seed,
      thinking=(
        self.model.chat.thinks(self.thinking)
        if prompt.thinks is None
        else prompt.thinks
      ),
      sampling=_sampling_json(self.section),
      model=self.model.name,
      model_revision=self.model.revision,
      prompt_version=prompt.version,
      correct=verdict.correct,
      reason=verdict.reason,
      extracted=verdict.extracted,
      detail=verdict.detail,
      grader_version=sample.grader,
    )

  def summarize(
    self, prompts: Sequence[Prompt], rejected: Sequence[Rejected]
  ) -> dict[str, Any]:
    """Returns the summary of a stage of trajectories; writes rejected rows.

    Raises:
      UserError: as `summaries.summarize`.
    """
    self.run_dir.write_rejected(self.name, rejected)
    wanted = {prompt.key for prompt in prompts}
    summary = summaries.summarize(self.run_dir, self.name, wanted)
    return {**summary, "rejected": len(rejected)}

  def finish(self, summary: dict[str, Any]) -> None:
    """Marks a stage of trajectories as done, and prints its summary."""
    weights = {self.model.name: self.model.fingerprint}
    self.run_dir.mark_done(self.name, summary, weights=weights)
    print(f"{self.name}: {summaries.describe(summary)}", flush=True)
    if warning := summaries.without_answers(self.name, summary):
      print(f"{self.name}: {warning}", flush=True)


def prompt_sha256(ids: Sequence[int]) -> str:
  """Returns the SHA-256 of a prompt's ids, as int32 with the low byte first."""
  return hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()


def paired_seed(*parts: Any) -> int:
  """Returns a seed of the question alone, so the same for every model."""
  return int(content_key("sample", *parts)[:15], 16)


@functools.lru_cache
def _sampling_json(section: Generation) -> str:
  """Returns the sampling keys as they are recorded with each sample."""
  return json.dumps(
    {
      "temperature": section.temperature,
      "top_p": section.top_p,
      "top_k": section.top_k,
      "max_response_tokens": section.max_response_tokens,
    },
    sort_keys=True,
  )
