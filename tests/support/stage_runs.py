"""A small experiment whose stages tests run."""

from trd_jax.experiment import experiment


def chosen(**changes):
  config = experiment.default_config()
  config.data.arithmetic.num_problems = 24
  for stage in (config.rollout, config.refine, config.evaluate):
    stage.max_prompt_tokens = 448
    stage.max_response_tokens = 160
  config.evaluate.num_problems = 8
  config.evaluate.k = 4
  config.engine.jax.slots = 16
  config.update_from_flattened_dict(changes)
  return experiment.from_config(config)
