"""Makes the engine that an experiment names.

Nothing here imports jax: an engine that needs it does so when it is made.
"""

import importlib.util

from trd_jax.experiment.schema import Engine as EngineSection
from trd_jax.generation.engines.engine import Engine, missing
from trd_jax.model.weights.model_files import ModelFiles


def check_installed(spec: EngineSection) -> None:
  """Checks that an engine's packages are installed, without importing them.

  Raises:
    UserError: Ray or vLLM is asked for and not installed here.
  """
  needed = {"ray": spec.ray.actors, "vllm": spec.name == "vllm"}
  for package, asked in needed.items():
    if asked and importlib.util.find_spec(package) is None:
      raise missing(package, "it is not installed")


def make(
  spec: EngineSection, model: ModelFiles, *, max_model_tokens: int
) -> Engine:
  """Makes the engine that an experiment names, with a model loaded.

  Args:
    spec: the experiment's `engine` section.
    model: the model that the engine loads.
    max_model_tokens: longest prompt with its response, for engines that
      reserve memory ahead; the embedded one lets its cache grow.

  Raises:
    UserError: the weights can't be read, or what the engine needs is not
      installed or not reachable.
  """
  # Ray first: its actors make the engine that the section names, each by a call
  # of this function.
  if spec.ray.actors:
    from trd_jax.generation.engines.ray_engine import RayEngine

    return RayEngine(spec, model, max_model_tokens=max_model_tokens, make=make)
  if spec.name == "jax":
    from trd_jax.generation.engines.jax_engine import JaxEngine

    return JaxEngine.load(
      model.folder,
      dtype=model.dtype,
      adapter=model.adapter,
      slots=spec.jax.slots,
      decode_steps=spec.jax.decode_steps,
    )
  if spec.name == "vllm":
    from trd_jax.generation.engines.vllm_engine import VllmEngine

    return VllmEngine(spec.vllm, model, max_model_tokens=max_model_tokens)
  from trd_jax.generation.engines.server_engine import ServerEngine

  return ServerEngine(spec.server, model, max_model_tokens=max_model_tokens)
