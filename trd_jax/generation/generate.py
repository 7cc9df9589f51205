"""Prompts in, graded samples out.

An engine streams completions as they finish; each is decoded, graded and
handed on at once, so that the stage can write it down before the next one is
there.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from trd_jax.data.chat import Chat
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.progress import Progress
from trd_jax.experiment.schema import Generation
from trd_jax.generation import samples, top_tokens
from trd_jax.generation.chat_model import ChatModel
from trd_jax.generation.engines import factory
from trd_jax.generation.engines.engine import (
  Drafted,
  Drafts,
  Engine,
  Request,
  Sampling,
)
from trd_jax.generation.samples import GradedCompletion, Prompt
from trd_jax.grading import graders
from trd_jax.model.weights import finite_weights


def sampling_of(
  section: Generation, chat: Chat, top_logprobs: int = 0
) -> Sampling:
  """Returns the engine's view of a section's sampling keys."""
  return Sampling(
    temperature=section.temperature,
    top_p=section.top_p,
    top_k=section.top_k,
    stop_ids=tuple(chat.stop_ids),
    vocab_size=chat.vocab_size,
    top_logprobs=top_logprobs,
  )


def generate(
  experiment: Experiment,
  model: ChatModel,
  section: Generation,
  prompts: Sequence[Prompt],
  *,
  desc: str,
  already: int = 0,
  top_logprobs: int = 0,
  grade: bool = True,
  facts: dict[str, Any] | None = None,
) -> Iterator[GradedCompletion]:
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
    grade: whether answers are judged.
    facts: gets, under `speculation`, what came of an engine's drafts.

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
    # Before the model is loaded: a machine without a sandbox says so now.
    domains = (
      p.problem.domain for p in prompts if grade and p.problem.has_gold
    )
    judges = stack.enter_context(graders.opened(domains, experiment))
    # Weights that are no numbers would give tokens all the same.
    if not experiment.engine.chosen.checks_weights:
      for folder in (model.folder, model.adapter):
        if folder is not None:
          finite_weights.check_folder(folder)
    # Only where the prompt holds what is rewritten can drafts be looked up.
    rewrites = all(p.draft_key is not None for p in prompts)
    engine = factory.make(
      factory.drafting(experiment.engine, sampling, rewrites),
      model.files,
      max_model_tokens=longest + section.max_response_tokens,
    )
    stack.enter_context(contextlib.closing(engine))
    # Under Ray every call would load the model anew.
    if top_logprobs and not experiment.engine.ray.actors:
      cost = top_tokens.cost(engine, requests, sampling)
      print(f"{desc}: {cost}", flush=True)
    earlier, tokens, start = _drafted(engine), 0, time.monotonic()
    completions = engine.generate(requests, sampling)
    with Progress(
      already + len(prompts), desc, "samples", initial=already
    ) as progress:

      def decoded() -> Iterator[samples.Answer]:
        nonlocal tokens
        for completion in completions:
          ids = list(completion.ids)
          tokens += len(ids)
          if completion.finish_reason == "stop" and ids and ids[-1] in stops:
            ids.pop()
          yield by_key[completion.key], completion, model.chat.decode(ids)

      for sample in samples.graded(decoded(), judges, grade):
        progress.update(1)
        yield sample
    if earlier is not None and (now := _drafted(engine)) is not None:
      found = now.since(earlier)
      speed = tokens / (time.monotonic() - start)
      print(f"{desc}: {_told(found, speed)}", flush=True)
      if facts is not None:
        facts["speculation"] = {
          **found._asdict(),
          "acceptance": round(found.acceptance, 4),
          "accepted_length": round(found.accepted_length, 2),
          "tokens_per_second": round(speed, 1),
        }


def _drafted(engine: Engine) -> Drafted | None:
  """Returns an engine's counts of drafts, or None where it drafts nothing."""
  return engine.drafted() if isinstance(engine, Drafts) else None


def _told(found: Drafted, speed: float) -> str:
  """Returns a line about drafts, for people."""
  return (
    f"{found.accepted:,} of {found.drafted:,} drafted tokens accepted"
    f" ({found.acceptance:.1%}), {found.accepted_length:.2f} of each draft;"
    f" {speed:,.0f} tokens/s"
  )
