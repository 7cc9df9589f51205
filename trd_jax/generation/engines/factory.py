"""Makes the engine that an experiment names.

An engine's name is an entry of `experiment.engines.Engines`, and its code is in
the file `<name>_engine.py` beside this one. Its function `make` is called with
the engine's section of keys, the model, and `max_model_tokens`. It is imported
when the engine is made, so that nothing here needs JAX or vLLM.
"""

import importlib
import importlib.util
from collections.abc import Callable

from trd_jax.experiment.schema import Engine as Spec
from trd_jax.generation.engines.engine import Engine, Sampling, missing
from trd_jax.model.weights.model_files import ModelFiles


def check_installed(spec: Spec) -> None:
  """Checks that an engine's packages are installed, without importing them.

  Raises:
    UserError: one that the engine, or Ray, needs is not installed here.
  """
  for key, packages in spec.packages.items():
    for package, advice in packages.items():
      if importlib.util.find_spec(package) is None:
        raise missing(key, package, advice, "it is not installed")


def constructor(name: str) -> Callable[..., Engine]:
  """Returns the function that makes an engine: `make` of its file."""
  return importlib.import_module(f"{__package__}.{name}_engine").make


def drafting(spec: Spec, sampling: Sampling, in_prompts: bool) -> Spec:
  """Returns the section as a stage can use it: maybe without drafts.

  Where they are wanted and can't be had it says so in a line: the stage's rows
  are the same without.

  Args:
    spec: the experiment's `engine` section.
    sampling: how tokens are drawn.
    in_prompts: whether each prompt holds what its response rewrites.
  """
  if not spec.chosen.drafts:
    return spec
  if not in_prompts:
    return spec.without_drafts()
  module = importlib.import_module(f"{__package__}.{spec.name}_engine")
  if reason := module.refuses_drafts(spec.chosen, sampling):
    print(f"{spec.name}: goes on without drafts: {reason}", flush=True)
    return spec.without_drafts()
  return spec


def make(spec: Spec, model: ModelFiles, *, max_model_tokens: int) -> Engine:
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
  return constructor(spec.name)(
    spec.chosen, model, max_model_tokens=max_model_tokens
  )
