r"""The laboratory: the whole pipeline on two CPU cores, in minutes.

A 1M-parameter Qwen3 that solves chains of modular arithmetic, and slips, is
distilled from itself beside the reference solution (OPSD) or from a 3M-
parameter teacher (OPD).

    python -m trd_jax.pipeline --config=configs/demo.py --workdir=runs/demo
    python -m trd_jax.pipeline --config=configs/demo.py:regime=opd \
        --workdir=runs/demo-opd
    python -m trd_jax.pipeline --config=configs/demo.py \
        --config.method=forward_kl --workdir=runs/demo-forward_kl

What differs from the paper's recipe, and why: a learning rate and an adapter
for a model 8,000 times smaller, a batch of 32 so that 512 problems make 16
updates, budgets of hundreds of tokens, and no rematerialisation, since all of
it fits.
"""

from trd_jax.experiment import experiment


def get_config(arg=None):
  variant = experiment.parse_arg(arg, regime="opsd")
  config = experiment.default_config()
  config.regime = variant.regime
  config.student.path = "lab:student"
  config.teacher.path = "lab:teacher"

  config.domain = "arithmetic"
  config.data.source = "arithmetic"
  config.data.arithmetic.num_problems = 512

  for stage in (config.rollout, config.refine, config.evaluate):
    stage.max_prompt_tokens = 448
    stage.max_response_tokens = 192
  config.evaluate.benchmarks = ("arithmetic", "arithmetic_hard")
  config.evaluate.num_problems = 64

  config.lora.rank = 16
  config.lora.alpha = 32.0
  config.lora.dropout = 0.0
  config.train.batch_size = 32
  config.train.learning_rate = 2e-3
  config.train.max_student_tokens = 320
  config.train.max_teacher_tokens = 640
  config.train.remat = "none"
  config.train.checkpoint_every = 4
  return config
