"""Prompts in, graded samples out: what rollout, refine and evaluate share.

An engine streams completions as they finish; each is decoded, graded and
handed on at once, so that the stage can write it down before the next one is
there.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from trd_jax.data.chat import Chat
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.metrics import Progress
from trd_jax.experiment.records import (
  GradedSample,
  RecordT,
  Trajectory,
  TrajectoryStage,
  content_key,
)
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.sections import Generation
from trd_jax.generation import samples, top_tokens
from trd_jax.generation.chat_model import ChatModel
from trd_jax.generation.engines import factory
from trd_jax.generation.engines.engine import Request, Sampling
from trd_jax.generation.samples import Prompt, Sample
from trd_jax.grading.code import programs as code_grading
from trd_jax.model.weights import finite_weights


def sampling_of(
  section: Generation, chat: Chat, top_logprobs: int = 0
) -> Sampling:
  """The engine's view of a section's sampling keys."""
  return Sampling(
    temperature=section.temperature,
    top_p=section.top_p,
    top_k=section.top_k,
    stop_ids=tuple(chat.stop_ids),
    vocab_size=chat.vocab_size,
    top_logprobs=top_logprobs,
  )


@functools.lru_cache
def sampling_json(section: Generation) -> str:
  """The sampling keys as they are recorded with each sample."""
  return json.dumps(
    {
      "temperature": section.temperature,
      "top_p": section.top_p,
      "top_k": section.top_k,
      "max_response_tokens": section.max_response_tokens,
    },
    sort_keys=True,
  )


def identity(
  stage: str,
  model: ChatModel,
  section: Generation,
  ids: Sequence[int],
  *parts: Any,
) -> tuple[str, int]:
  """Key and seed of a sample: equal for equal causes, else unrelated.

  Args:
    stage: the stage or benchmark that asks.
    model: the model that answers.
    section: how it samples.
    ids: the prompt's token ids.
    *parts: what else tells samples apart: problem, number, seed.
  """
  sampling = sampling_json(section)
  key = content_key(
    stage, model.revision, model.dtype, sampling, list(map(int, ids)), *parts
  )
  return key, int(key[:15], 16)


def paired_seed(*parts: Any) -> int:
  """A seed from what is asked alone, the same for every model."""
  return int(content_key("sample", *parts)[:15], 16)


def generate(
  experiment: Experiment,
  model: ChatModel,
  section: Generation,
  prompts: Sequence[Prompt],
  *,
  desc: str,
  already: int = 0,
  top_logprobs: int = 0,
) -> Iterator[Sample]:
  """Completes prompts with the experiment's engine and grades each answer.

  Args:
    experiment: chooses the engine, and the sandbox for programs.
    model: the model.
    section: how it samples.
    prompts: what to complete, in any order.
    desc: what the progress bar says.
    already: samples that are on disk from before, for the bar.
    top_logprobs: how many of the model's likeliest tokens to keep; what that
      costs is measured and printed.

  Yields:
    Samples in the order in which they are finished and judged; where the
    engine fails, first all that it has finished.

  Raises:
    UserError: there are programs to grade and no sandbox to run them in, or
      the weights have values that are NaN or infinite.
  """
  if not prompts:
    return
  by_key = {prompt.key: prompt for prompt in prompts}
  longest = max(len(prompt.ids) for prompt in prompts)
  requests = [
    Request(p.key, list(p.ids), p.seed, section.max_response_tokens)
    for p in prompts
  ]
  sampling = sampling_of(section, model.chat, top_logprobs)
  stops = set(model.chat.stop_ids)
  with contextlib.ExitStack() as stack:
    programs = None
    if any(prompt.problem.domain == "code" for prompt in prompts):
      # Before the model is loaded: a machine without a sandbox says so now.
      grader = code_grading.Grader(experiment.sandbox)
      programs = stack.enter_context(grader)
    if experiment.engine.name != "jax":  # which looks as it loads
      for folder in (model.folder, model.adapter):
        if folder is not None:
          finite_weights.check_folder(folder)
    engine = factory.make(
      experiment.engine,
      model.files,
      max_model_tokens=longest + section.max_response_tokens,
    )
    stack.enter_context(contextlib.closing(engine))
    # Under Ray every call would load the model anew.
    if top_logprobs and not experiment.engine.ray.actors:
      cost = top_tokens.cost(engine, requests, sampling)
      print(f"{desc}: {cost}", flush=True)
    completions = engine.generate(requests, sampling)
    with Progress(
      already + len(prompts), desc, "samples", initial=already
    ) as progress:

      def decoded() -> Iterator[samples.Answer]:
        for completion in completions:
          ids = list(completion.ids)
          if completion.finish_reason == "stop" and ids and ids[-1] in stops:
            ids.pop()
          yield by_key[completion.key], completion, model.chat.decode(ids)

      for sample in samples.graded(decoded(), programs):
        progress.update(1)
        yield sample


def fill(
  experiment: Experiment,
  run_dir: RunDir,
  stage: str,
  model: ChatModel,
  section: Generation,
  prompts: Sequence[Prompt],
  record_cls: type[RecordT],
  to_row: Callable[[Sample], RecordT],
  *,
  desc: str,
  top_logprobs: int = 0,
) -> None:
  """Gives a stage the rows of all prompts that aren't on disk yet.

  A row is written as its sample is judged, so that a process that is killed
  loses one unfinished shard, what is still being judged (`samples.graded`
  bounds that) and what an engine hasn't handed over yet (`engines.feeder`), and
  the next one draws only what is missing.

  Args:
    experiment: chooses the engine.
    run_dir: where the stage's rows are.
    stage: whose rows they are.
    model: the model.
    section: how it samples.
    prompts: all that the stage wants completed.
    record_cls: the stage's kind of row.
    to_row: makes one of a sample.
    desc: what the progress bar says.
    top_logprobs: see `generate`.
  """
  there = run_dir.keys(stage)
  pending = [prompt for prompt in prompts if prompt.key not in there]
  if not pending:
    return
  already = len(prompts) - len(pending)
  with run_dir.shard_writer(stage, record_cls) as writer:
    for sample in generate(
      experiment,
      model,
      section,
      pending,
      desc=desc,
      already=already,
      top_logprobs=top_logprobs,
    ):
      writer.add(to_row(sample))


def trajectory(
  sample: Sample,
  stage: TrajectoryStage,
  model: ChatModel,
  section: Generation,
  thinking: bool | None,
  prompt_version: str,
) -> Trajectory:
  """The row of a rollout or refinement; `thinking` is the prompt's switch."""
  prompt, completion, verdict = sample.prompt, sample.completion, sample.verdict
  return Trajectory(
    key=prompt.key,
    problem_id=prompt.problem.problem_id,
    stage=stage,
    prompt_ids=list(prompt.ids),
    response_ids=list(completion.ids),
    text=sample.text,
    finish_reason=completion.finish_reason,
    truncated=completion.finish_reason == "length",
    seed=prompt.seed,
    thinking=model.chat.thinks(thinking),
    sampling=sampling_json(section),
    model=model.name,
    model_revision=model.revision,
    prompt_version=prompt_version,
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
  sample: Sample,
  benchmark: str,
  model: ChatModel,
  section: Generation,
  thinking: bool | None,
) -> GradedSample:
  """The row of a benchmark sample; `thinking` is the prompt's switch."""
  prompt, completion, verdict = sample.prompt, sample.completion, sample.verdict
  ids = np.asarray(prompt.ids, "<i4").tobytes()
  return GradedSample(
    key=prompt.key,
    benchmark=benchmark,
    problem_id=prompt.problem.problem_id,
    sample=prompt.sample,
    prompt_sha256=hashlib.sha256(ids).hexdigest(),
    response_ids=list(completion.ids),
    text=sample.text,
    num_tokens=len(completion.ids),
    finish_reason=completion.finish_reason,
    truncated=completion.finish_reason == "length",
    seed=prompt.seed,
    thinking=model.chat.thinks(thinking),
    sampling=sampling_json(section),
    model=model.name,
    model_revision=model.revision,
    correct=verdict.correct,
    reason=verdict.reason,
    extracted=verdict.extracted,
    detail=verdict.detail,
    grader_version=sample.grader,
  )
