"""Whether an engine keeps its promises, judged by what `engine_probe` tells.

Each judgement takes the facts of one engine; `of_all` puts those of several
GPUs together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from trd_jax.doctor import diagnosis
from trd_jax.doctor.diagnosis import Diagnosis
from trd_jax.doctor.probe import Facts

Judge = Callable[[Facts], Diagnosis]

# The mass of a whole softmax in float32 is 1 up to rounding.
_MASS_ERROR = 1e-3
# What the last bits of bfloat16's logits may move a log-probability by; an
# adapter as large as the tiny one moves them by nats.
_LEAST_CHANGE = 1e-2
_MAKE = "make the engine's environment (for vLLM: third_party/vllm/install.sh)"


def _lacks(facts: Facts, phase: str) -> Diagnosis | None:
  """Returns what there is to say where a phase has left nothing."""
  if phase in facts:
    return None
  stopped = facts.get("phase", "start")
  if stopped != phase:
    return diagnosis.skipped(f"it came no further than its phase {stopped}")
  why = facts.get("failure", "it ended without a word")
  return diagnosis.failed(why, _MAKE)


def starts(facts: Facts) -> Diagnosis:
  """Judges whether the engine loads the model."""
  if lack := _lacks(facts, "start"):
    return lack
  return diagnosis.ok(f"ready after {facts['start']:.0f} s")


def repeats(facts: Facts) -> Diagnosis:
  """Judges whether equal requests in equal batches get equal tokens."""
  for phase in ("runs", "alone", "other"):
    if lack := _lacks(facts, phase):
      return lack
  runs, alone = facts["runs"], facts["alone"]
  # Alone first: where even that doesn't repeat, batches are not to blame.
  if alone[0] != alone[1]:
    return diagnosis.failed(
      "a request by itself got other tokens the second time, with the same"
      f" seed ({_differ(*alone)})",
      "seeds don't reach the sampler, or a kernel isn't deterministic: check"
      " that the versions are the pinned ones",
    )
  # The last two: the child draws again until two runs agree, or gives up.
  if runs[-1] != runs[-2]:
    return diagnosis.failed(
      f"the same batch with the same seeds got other tokens in each of"
      f" {len(runs)} runs ({_differ(*runs[-2:])})",
      "seeds don't reach the sampler, or a kernel isn't deterministic: check"
      " that the versions are the pinned ones",
    )
  said = [
    f"{'the same' if tokens == runs[-1] else 'other tokens'} {where}"
    for where, tokens in (
      ("alone", alone[0]),
      ("in another batch", facts["other"]),
    )
  ]
  message = f"same batch and seeds, same tokens; {', '.join(said)}"
  if len(runs) > 2:
    return diagnosis.warning(
      f"{message}; the first {len(runs) - 2} of {len(runs)} runs differed",
      "requests come one by one, so that batches are cut otherwise now and"
      " then: expect tokens to differ between runs here",
    )
  return diagnosis.ok(message)


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
  keys = [key for key in one if one[key] != other.get(key)]
  return f"{len(keys)} of {len(one)} requests"


def surplus(facts: Facts) -> Diagnosis:
  """Judges whether rows of the head that no token belongs to are drawn."""
  if lack := _lacks(facts, "surplus"):
    return lack
  drawn, limit, rows = facts["surplus"], facts["limit"], facts["rows"]
  wrong = [token for token in drawn if not 0 <= token < limit]
  if wrong or not drawn:
    return diagnosis.failed(
      f"{len(wrong)} of {len(drawn)} tokens were of the head's surplus rows,"
      f" such as {wrong[0] if wrong else '-'} of {limit} ids",
      "the engine's limit on ids doesn't act: responses would hold tokens that"
      " decode to nothing; take the pinned version of vLLM",
    )
  return diagnosis.ok(
    f"{len(drawn)} tokens at high temperature, none of the {rows - limit}"
    " surplus rows"
  )


def logprobs(facts: Facts) -> Diagnosis:
  """Judges shape, order and mass of the likeliest tokens' probabilities."""
  if lack := _lacks(facts, "top"):
    return lack
  worst = 0.0
  for one in facts["top"]:
    wrong, off = _wrong_top(one, facts["rows"])
    if wrong:
      return diagnosis.failed(
        f"top log-probabilities: {wrong}",
        "refine.teacher_top_k would record wrong numbers: take the pinned"
        " version of vLLM, or leave refine.teacher_top_k at 0",
      )
    worst = max(worst, off)
  return diagnosis.ok(
    f"all {facts['rows']} rows, likeliest first, their mass 1 up to {worst:.0e}"
  )


def _wrong_top(one: Mapping[str, Any], rows: int) -> tuple[str, float]:
  """Returns what is wrong, or '', and how far a mass is off 1."""
  drawn = np.asarray(one["drawn"])
  ids, logprobs = np.asarray(one["ids"]), np.asarray(one["logprobs"])
  # Shapes before values: what follows counts on them.
  if ids.shape != (len(drawn), rows) or logprobs.shape != ids.shape:
    return f"shape {ids.shape} of {len(drawn)} tokens and {rows} rows", 0.0
  if not len(drawn):
    return "there is no token", 0.0
  if not np.isfinite(logprobs).all():
    return "they aren't finite", 0.0
  if np.any(np.sort(ids) != np.arange(rows)):
    return "ids come twice or aren't the head's", 0.0
  if not np.all(np.diff(logprobs) <= 0):
    return "they don't fall", 0.0
  off = float(np.max(np.abs(np.exp(logprobs.astype(float)).sum(1) - 1)))
  if not off <= _MASS_ERROR:
    return f"their mass is off 1 by {off:.2g}: they aren't normalised", off
  # Each row of `ids` holds every id once (seen above): one value a token drawn.
  of_drawn = logprobs[ids == drawn[:, None]]
  if not np.all(of_drawn >= logprobs[:, 0]):
    return "the token drawn at temperature 0 isn't the likeliest", off
  return "", off


def adapter(facts: Facts) -> Diagnosis:
  """Judges whether an adapter is loaded and does something."""
  if lack := _lacks(facts, "adapter"):
    return lack
  for one in facts["adapter"]:
    wrong, _ = _wrong_top(one, facts["rows"])
    if wrong:
      return diagnosis.failed(
        f"with the adapter, top log-probabilities: {wrong}",
        "set engine.weights=merged",
      )
  # The first position alone: later ones follow what was drawn.
  # numpy's maximum: Python's passes over a NaN that isn't the first.
  changes = [
    np.max(np.abs(_by_id(plain) - _by_id(adapted)))
    for plain, adapted in zip(facts["top"], facts["adapter"], strict=True)
  ]
  change = float(np.max(changes))
  if not change > _LEAST_CHANGE:
    return diagnosis.failed(
      f"the adapter changes no log-probability by more than {change:.2g} nats:"
      " it isn't applied",
      "set engine.weights=merged, and take the pinned version of vLLM",
    )
  return diagnosis.ok(
    f"loaded from its folder, moves log-probabilities by up to {change:.1f}"
    " nats"
  )


def _by_id(one: Mapping[str, Any]) -> np.ndarray:
  """Returns a completion's first log-probabilities, in the order of ids."""
  ids, logprobs = np.asarray(one["ids"][0]), np.asarray(one["logprobs"][0])
  return logprobs[np.argsort(ids)]


def of_all(judge: Judge, facts: Sequence[tuple[str, Facts]]) -> Diagnosis:
  """Judges the engines of several GPUs together.

  Args:
    judge: a judgement of one.
    facts: by the engine's place, as 'GPU 3'.

  Returns:
    The gravest diagnosis. Where it is a failure it names the places that have
    one; else it says how many there are.
  """
  results = {where: judge(one) for where, one in facts}
  worst = diagnosis.gravest(list(results.values()))
  if len(results) == 1:
    return worst
  same = [where for where, one in results.items() if one.status == worst.status]
  where = f"all {len(results)} GPUs" if len(same) == len(results) else same[0]
  if 1 < len(same) < len(results):
    where = ", ".join(same)
  return Diagnosis(worst.status, f"{where}: {worst.message}", worst.remedy)
