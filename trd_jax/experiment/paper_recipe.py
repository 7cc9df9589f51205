"""Builds configs of the paper's recipe; a config file picks a row of it.

`configs/opd.py` and `configs/opsd.py` are its two halves, and what they share
is here. A value that is not set here is its key's default, which is also the
paper's (Tables 9, 10, 13, 14; C.7). The variant `settings=authors` replaces
what the authors' published code does otherwise (docs/authors.md).
"""

import types
from typing import Any

from ml_collections import config_dict

from trd_jax.experiment import experiment, methods
from trd_jax.experiment.errors import UserError, did_you_mean

METHODS = tuple(name for name, m in methods.METHODS.items() if m.in_paper)
SUBSETS = ("all", "fail", "succ", "fail_to_succ")
BENCHMARKS = {
  "math": ("aime24", "aime25", "hmmt25", "beyondaime", "amobench"),
  "code": ("humanevalplus", "mbppplus", "livecodebench"),
}
_SOURCES = {"math": "deepscaler", "code": "taco"}
_PROMPT_TOKENS = {"math": 4_096, "code": 2_048}
_EVALUATION_TOKENS = {"math": 38_912, "code": 16_384}
# Longest length at training: on y_o, and on y_r beside its refinement prompt.
_TRAIN_TOKENS = {"opd": (18_432, 34_816), "opsd": (22_528, 38_912)}
# Of x, y_o and in OPSD y*.
_REFINE_TOKENS = {"opd": 18_432, "opsd": 22_528}

_HUB = {
  "1.7b": "Qwen/Qwen3-1.7B",
  "4b": "Qwen/Qwen3-4B-Instruct-2507",
  "8b": "Qwen/Qwen3-8B",
  "nano": "random:nano",
}
# These think before they answer unless told otherwise; Instruct-2507 can't.
# The nano model has the tokenizer and the template of such a one.
_HYBRID = ("1.7b", "8b", "nano")
_THINKING = ("default", "on", "off")
_SETTINGS = ("paper", "authors")


def build(
  regime: str, models: tuple[str, ...], arg: str | None
) -> config_dict.ConfigDict:
  """Builds the config of one row of the paper, or of its nano twin.

  Args:
    regime: opd or opsd.
    models: the students that the regime has rows for; the first is the
      default.
    arg: what stands behind the colon of --config=FILE.py: `model`, `domain`
      (math or code), `method`, `subset` (trajectories to train on, by
      verdict), `cot` (all, with_cot or answer_only problems), `thinking` (see
      `_think`), `settings` (paper, or authors: see `_as_authors`), `gpus`, and
      `tokenizer`, which only the nano model reads.

  Raises:
    UserError: no such variant or value, a student that can't think, or two
      variants that contradict each other.
  """
  variant = experiment.parse_arg(
    arg,
    model=models[0],
    domain="math",
    method="trd",
    subset="all",
    cot="all",
    thinking="default",
    settings="paper",
    gpus=8,
    tokenizer="Qwen/Qwen3-8B",
  )
  _choose("model", variant.model, (*models, "nano"))
  _choose("domain", variant.domain, tuple(BENCHMARKS))
  _choose("method", variant.method, tuple(methods.METHODS))
  _choose("subset", variant.subset, SUBSETS)
  _choose("thinking", variant.thinking, _THINKING)
  _choose("settings", variant.settings, _SETTINGS)
  config: Any = experiment.default_config()
  config.regime = regime
  config.method = variant.method
  config.domain = variant.domain
  config.data.source = _SOURCES[variant.domain]
  config.data.subset = variant.cot
  config.data.decontaminate = "ngram"
  config.train.subset = variant.subset
  # The paper's counts leave no trajectory out (Appendix B.3).
  config.train.truncated = "keep"

  prompt = _PROMPT_TOKENS[variant.domain]
  config.rollout.max_prompt_tokens = prompt
  config.evaluate.max_prompt_tokens = prompt
  config.evaluate.max_response_tokens = _EVALUATION_TOKENS[variant.domain]
  config.evaluate.benchmarks = BENCHMARKS[variant.domain]
  # Published figures of programs come out of these tools whole. (Mathematics is
  # asked as its figures are where nothing else is said.)
  config.evaluate.code_prompt = "official"
  config.refine.max_prompt_tokens = _REFINE_TOKENS[regime]
  on_draft, on_refined = _TRAIN_TOKENS[regime]
  config.train.max_student_tokens = on_draft
  refines = methods.METHODS[variant.method].trajectory == "y_r"
  # Under a refinement prompt the teacher reads the draft besides the
  # trajectory; the student's side never does.
  config.train.max_teacher_tokens = on_refined if refines else on_draft

  if variant.model == "nano":
    _nano(config, variant)
  else:
    _real(config, variant)
  _think(config, variant)
  if variant.settings == "authors":
    _as_authors(config, variant)
  return config


def _choose(name: str, value: Any, choices: tuple[str, ...]) -> None:
  if value not in choices:
    message = f"choose from {', '.join(choices)}"
    hint = did_you_mean(value, choices)
    message += f"; {hint}" if hint not in ("", message) else ""
    raise UserError(f"{name}={value}: {message}")


def _think(config: Any, variant: types.SimpleNamespace) -> None:
  """Sets the thinking mode of each stage.

  By default a hybrid student thinks in rollouts and in mathematics benchmarks,
  and no model thinks while refining or in benchmarks of programs. `on` and
  `off` set all of these. A student that can't think answers as with thinking
  off, and what is refined for it is written so, too. The contexts that score a
  trajectory take the mode in which it was written.

  Raises:
    UserError: thinking=on for a student that can't.
  """
  chosen = variant.thinking
  can_think = variant.model in _HYBRID
  if chosen == "on" and not can_think:
    raise UserError(
      f"thinking=on: model={variant.model} ({_HUB[variant.model]}) has no"
      " thinking mode, and would learn thoughts that it can't open; leave"
      " thinking out, or choose another model"
    )
  # The paper's refinements are so short (a median under 900 tokens) that they
  # can hardly open with thoughts.
  config.refine.thinking = chosen == "on"
  if can_think:
    config.student.thinking = chosen != "off"
    config.evaluate.thinking = {
      "default": variant.domain == "math",
      "on": True,
      "off": False,
    }[chosen]


def _as_authors(config: Any, variant: types.SimpleNamespace) -> None:
  """Sets what the authors' published code does otherwise than the paper.

  What of it no key can express is in docs/authors.md.

  Raises:
    UserError: a thinking mode, where that code chooses none.
  """
  if variant.thinking != "default":
    raise UserError(
      f"settings=authors,thinking={variant.thinking}: the authors' code chooses"
      " no thinking mode in any stage; leave one of the two out"
    )
  # No switch anywhere is the template's own mode: hybrids think, y_r too.
  for section in (config.student, config.refine, config.evaluate):
    section.thinking = None
  config.prompts.set = "authors"
  config.evaluate.math_prompt = "card"
  config.data.decontaminate = "none"
  config.refine.overflow = "drop"
  if variant.domain == "math":
    config.rollout.max_prompt_tokens = 2_048
    config.evaluate.max_prompt_tokens = 2_048
  config.evaluate.top_k = -1
  config.train.context = "plain"
  config.train.beta2 = 0.95
  config.lora.dropout = 0.0
  # Theirs is the mean over the tokens of 8 trajectories, then over 16 of such
  # means. Within each of these long trajectories count more, as in the mean
  # over all tokens of the batch.
  config.loss.mean = "token"
  if variant.method == "forward_kl_clip":
    config.loss.clip = 0.1


def _real(config: Any, variant: types.SimpleNamespace) -> None:
  """Sets weights from the hub, bfloat16, and vLLM on every GPU of the node."""
  teacher = "8b" if config.regime == "opd" else variant.model
  sides = (config.student, variant.model), (config.teacher, teacher)
  for model, name in sides:
    model.path = _HUB[name]
    model.dtype = "bfloat16"
  config.engine.name = "vllm"
  config.engine.vllm.data_parallel = variant.gpus
  config.python.generation = ".venv-vllm/bin/python"


def _nano(config: Any, variant: types.SimpleNamespace) -> None:
  """Sets sixteen problems, and a model that knows nothing, for every stage."""
  for model in (config.student, config.teacher):
    model.path = _HUB["nano"]
    model.tokenizer = variant.tokenizer
  config.data.limit = 16
  for stage in (config.rollout, config.refine, config.evaluate):
    stage.max_response_tokens = 48
  config.evaluate.k = 2
  config.evaluate.num_problems = 4
  config.lora.rank = 8
  config.lora.alpha = 16.0
  config.train.batch_size = 8
