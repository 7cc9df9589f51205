"""The sections of an experiment that are about engines; see `sections`."""

import dataclasses
from dataclasses import field

from trd_jax.experiment import schema
from trd_jax.experiment.schema import above, at_least, key, one_of, within


@dataclasses.dataclass(frozen=True)
class JaxEngine:
  """The embedded engine."""

  slots: int | None = key(
    None,
    "sequences decoded at once; None: 64 to 128 a CPU device, up to 256 an"
    " accelerator, as its memory allows",
    at_least(1),
  )
  decode_steps: int = key(
    16, "tokens decoded between two looks at what has ended", at_least(1)
  )


@dataclasses.dataclass(frozen=True)
class VllmEngine:
  """vLLM in the stage's own process."""

  tensor_parallel: int = key(1, "devices that share each layer", at_least(1))
  data_parallel: int = key(
    1,
    "copies of the model, each on devices of its own, which one process feeds;"
    " with engine.ray.actors each engine has a process of its own",
    at_least(1),
  )
  max_num_seqs: int | None = key(
    None, "sequences decoded at once, a copy; None: vLLM's own", at_least(1)
  )
  max_batched_tokens: int | None = key(
    None, "tokens of one step, a copy; None: vLLM's own", at_least(1)
  )
  max_model_tokens: int | None = key(
    None, "longest prompt with its response; None: what is asked", at_least(2)
  )
  memory_share: float = key(
    0.9,
    "share of a GPU's memory that vLLM may take; more than 0.95 leaves no room"
    " for the sampling of large batches",
    within(0.01, 1),
  )
  kv_cache_gib: float | None = key(
    None,
    "KV cache of a copy, whatever memory_share says; None: what that leaves",
    above(0),
  )
  prefix_caching: bool = key(True, "keep the KV cache of shared prefixes")
  chunked_prefill: bool = key(
    True, "mix prefill and decoding in one step (on GPUs)"
  )
  eager: bool | None = key(
    None, "neither compile nor capture, to start sooner; None: on CPUs"
  )
  batch_invariant: bool = key(
    False,
    "kernels whose results don't follow the batch, for runs on GPUs that can be"
    " repeated; slower",
  )


# Between these vLLM draws as it is told; below it takes 0.01 without a word
# that we would hear, above it refuses. And 0 is greedy.
_LOWEST_TEMPERATURE, _HIGHEST_TEMPERATURE = 0.01, 2.0
# Ranks of adapters that vLLM 0.32 has room for.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
FLOAT32_ADAPTER = (
  "engine.weights=adapter: vLLM applies adapters on GPUs in bfloat16 alone; set"
  " student.dtype=bfloat16, or engine.weights=merged"
)
"""What is said of a float32 student where vLLM runs on GPUs."""


def vllm_refuses(temperature: float) -> str | None:
  """Returns why vLLM, and so a server, can't draw at a temperature, or None."""
  if temperature == 0:
    return None
  if _LOWEST_TEMPERATURE <= temperature <= _HIGHEST_TEMPERATURE:
    return None
  return (
    f"temperature={temperature:g} is none that vLLM draws at: give 0 (greedy),"
    f" or {_LOWEST_TEMPERATURE:g} to {_HIGHEST_TEMPERATURE:g}, or use"
    " engine.name=jax"
  )


@dataclasses.dataclass(frozen=True)
class ServerEngine:
  """OpenAI-compatible servers, such as `vllm serve`."""

  urls: tuple[str, ...] = key(
    (), "their base addresses, as http://127.0.0.1:8000, separated by commas"
  )
  model: str | None = key(
    None,
    "the name that a server knows the model by; None: found by its folder",
  )
  concurrency: int = key(256, "requests in flight at a server", at_least(1))
  retries: int = key(
    8,
    "further tries of a request that failed, each after a longer pause; one"
    " that a busy server refuses hasn't",
    at_least(0),
  )
  start_seconds: float = key(
    600.0,
    "how long to wait until a server is ready, and, once none is left, until "
    "one is back",
    above(0),
  )
  request_seconds: float = key(
    3600.0,
    "how long a server may take over a request, and how long all of them may"
    " be too busy for any",
    above(0),
  )
  api_key_variable: str = key(
    "VLLM_API_KEY",
    "environment variable that holds the API key, if servers want one",
    schema.filled(),
  )


@dataclasses.dataclass(frozen=True)
class Ray:
  """The same engine in many processes and machines, under Ray Data."""

  actors: int = key(0, "engines at work at once; 0: no Ray", at_least(0))
  address: str | None = key(
    None, "of a running cluster, or auto; None: this machine alone"
  )
  cpus: float = key(1.0, "CPUs that an actor reserves", at_least(0))
  gpus: float | None = key(
    None,
    "GPUs that an actor reserves; None: as many as its engine needs",
    at_least(0),
  )
  batch: int = key(256, "requests that an actor is given at once", at_least(1))
  batches: int = key(
    2, "batches that an actor works on at once, where it can", at_least(1)
  )


@dataclasses.dataclass(frozen=True)
class Engine:
  """What generates."""

  name: str = key(
    "jax",
    "embedded, vLLM in process, or servers",
    one_of("jax", "vllm", "server"),
  )
  weights: str = key(
    "merged",
    "the trained student's form: merged, or the base with its adapter",
    one_of("merged", "adapter"),
  )
  jax: JaxEngine = field(default_factory=JaxEngine)
  vllm: VllmEngine = field(default_factory=VllmEngine)
  server: ServerEngine = field(default_factory=ServerEngine)
  ray: Ray = field(default_factory=Ray)
