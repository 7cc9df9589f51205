r"""OPSD on DeepScaleR: Tables 3 and 4 of the paper, and a nano twin of them.

    python -m trd_jax.pipeline --config=configs/opsd_math.py:model=8b \
        --workdir=runs/opsd-8b-trd
    python -m trd_jax.pipeline --config=configs/opsd_math.py:model=nano \
        --config.data.root=DEEPSCALER --config.evaluate.root=BENCHMARKS \
        --workdir=runs/opsd-nano

Models: `8b` (Qwen/Qwen3-8B), `4b` (Qwen/Qwen3-4B-Instruct-2507) and `nano`, a
randomly initialised Qwen3 with the full vocabulary of 151,936 rows that takes
16 real problems through every stage with the real chat template. Its accuracy
is 0: what it proves is the path. `tokenizer` is the nano model's, a folder or a
hub id; DEEPSCALER and BENCHMARKS are folders with local copies of the files,
and both may be left out where the hub can be reached.

The real models generate with vLLM, one copy a GPU (`gpus=8`), in the
environment that `third_party/vllm/install.sh cuda` makes; the nano model with
the embedded engine.

Expected on 8xH100, 8b (Table 11): rollout 4:20 h, refinement 2:50 h, training
2:10 h. Everything else is SPEC's table of defaults.
"""

from trd_jax import experiment
from trd_jax.errors import UserError, did_you_mean

_MODELS = {
  "8b": "Qwen/Qwen3-8B",
  "4b": "Qwen/Qwen3-4B-Instruct-2507",
  "nano": "random:nano",
}


def get_config(arg=None):
  variant = experiment.parse_arg(
    arg, model="8b", method="trd", tokenizer="Qwen/Qwen3-8B", gpus=8
  )
  config = experiment.default_config()
  config.regime = "opsd"
  config.method = variant.method
  config.domain = "math"
  config.data.source = "deepscaler"
  if variant.model not in _MODELS:
    hint = did_you_mean(variant.model, _MODELS)
    raise UserError(f"model={variant.model}: no such model; {hint}")
  config.student.path = _MODELS[variant.model]
  config.refine.max_prompt_tokens = 22_528
  refines = variant.method == "trd"
  config.train.max_teacher_tokens = 38_912 if refines else 22_528
  config.train.max_student_tokens = 22_528
  config.evaluate.benchmarks = ("aime24", "aime25", "hmmt25", "beyondaime")

  if variant.model == "nano":
    config.student.tokenizer = variant.tokenizer
    config.student.thinking = False
    config.teacher.thinking = False
    config.data.limit = 16
    for stage in (config.rollout, config.refine):
      stage.max_response_tokens = 48
    config.evaluate.k = 2
    config.evaluate.num_problems = 4
    config.evaluate.max_response_tokens = 48
    config.lora.rank = 8
    config.lora.alpha = 16.0
    config.train.batch_size = 8
    config.train.truncated = "keep"
  else:
    config.student.dtype = "bfloat16"
    config.engine.name = "vllm"
    config.engine.vllm.data_parallel = variant.gpus
    config.python.generation = ".venv-vllm/bin/python"
    if variant.model == "8b":
      config.student.thinking = True
      config.teacher.thinking = True
  return config
