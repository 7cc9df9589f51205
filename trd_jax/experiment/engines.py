"""The engines there are: their keys, and what each of them needs.

An engine is a field of `Engines`: its name, and its section of keys. The class
of the section also declares which packages the engine imports, which devices it
runs on, and which configs it refuses. Choices, help, checks, the dry run and
the doctor read it there. The code that generates is in
`generation/engines/<name>_engine.py`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

from trd_jax.experiment import declarations
from trd_jax.experiment.declarations import (
  above,
  at_least,
  key,
  one_of,
  within,
)
from trd_jax.experiment.processes import interpreters

Devices = Literal["none", "jax", "gpus", "remote"]
"""What an engine runs on.

none: no device. jax: those that JAX finds in the stage's process. gpus: GPUs
of its own, as many as its keys say (`EngineSection.gpus`). remote: those of the
servers that it asks (`EngineSection.addresses`).
"""


class Gpus(NamedTuple):
  """The GPUs that one engine takes for itself.

  Attributes:
    who: what messages call the engine.
    copies: how many copies of the model there are.
    split: how many GPUs each copy is split over.
    share: the share of each GPU's memory that is taken at once.
    copies_key: the key that gives `copies`, below the engine's section.
    split_key: that of `split`.
    share_key: that of `share`.
  """

  who: str
  copies: int
  split: int
  share: float
  copies_key: str
  split_key: str
  share_key: str

  @property
  def count(self) -> int:
    """Returns how many GPUs there are in all."""
    return self.copies * self.split


class EngineSection:
  """What the section of an engine declares besides its keys.

  Attributes:
    summary: what it is, in a few words, for the help.
    devices: what it runs on.
    packages: what it imports, by the names in an import, each with how to get
      it.
    applies_adapters: whether it can generate with an adapter beside the base
      (`engine.weights=adapter`, `student.adapter`).
    checks_weights: whether it refuses weights that are NaN or infinite as it
      loads them; where it doesn't, the stage reads them before and refuses.
    batches_calls: whether it batches requests of several calls together; where
      it doesn't, calls at the same time would only compete.
    asks_for_it: keys of the section that only a user of this engine sets: they
      are refused where another one is chosen.
  """

  summary: ClassVar[str]
  devices: ClassVar[Devices]
  packages: ClassVar[Mapping[str, str]] = {}
  applies_adapters: ClassVar[bool] = True
  checks_weights: ClassVar[bool] = False
  batches_calls: ClassVar[bool] = False
  asks_for_it: ClassVar[tuple[str, ...]] = ()

  @property
  def gpus(self) -> Gpus | None:
    """Returns the GPUs of its own that it takes, where it does."""
    return None

  @property
  def addresses(self) -> tuple[str, ...]:
    """Returns the base addresses of the servers that it asks."""
    return ()

  @property
  def connections(self) -> int:
    """Returns how many connections it may have open at once."""
    return 0

  @property
  def drafts(self) -> bool:
    """Whether it drafts tokens where a prompt holds what is rewritten."""
    return False

  def without_drafts(self) -> Self:
    """Returns the section for a stage whose prompts hold no draft."""
    return self

  # `Any`: the class `Experiment` is made of these sections, and naming it here
  # would be a ring of imports.
  def contradictions(self, experiment: Any) -> Iterator[str]:
    """Yields what of a config the engine can't do, each with what to set.

    Args:
      experiment: the `Experiment`, which names this engine.
    """
    del experiment
    yield from ()

  def contradictions_on_gpus(self, experiment: Any) -> Iterator[str]:
    """Yields what it can't do if it runs on GPUs, as `contradictions`."""
    del experiment
    yield from ()


@dataclasses.dataclass(frozen=True)
class JaxEngine(EngineSection):
  """The embedded engine."""

  summary = "embedded"
  devices = "jax"
  packages = dict.fromkeys(("jax", "flax"), interpreters.INSTALL)
  checks_weights = True

  slots: int | None = key(
    None,
    "sequences decoded at once; None: 64 to 128 a CPU device, up to 256 an"
    " accelerator, as its memory allows",
    at_least(1, 65_536),
  )
  decode_steps: int = key(
    16,
    "tokens decoded between two looks at what has ended",
    at_least(1, 65_536),
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


def _temperatures(experiment: Any) -> Iterator[str]:
  """Yields each stage's temperature that vLLM, or a server, can't draw at."""
  for stage in ("rollout", "refine", "evaluate"):
    if problem := vllm_refuses(getattr(experiment, stage).temperature):
      yield f"{stage}.{problem}"


@dataclasses.dataclass(frozen=True)
class VllmEngine(EngineSection):
  """vLLM in the stage's own process."""

  summary = "vLLM in process"
  devices = "gpus"
  asks_for_it = ("speculative",)
  packages: ClassVar[Mapping[str, str]] = {
    "vllm": "make an environment with third_party/vllm/install.sh and use its"
    " Python: for the pipeline,"
    f" --config.python.generation={interpreters.VLLM}"
  }
  batches_calls = True

  tensor_parallel: int = key(
    1, "devices that share each layer", at_least(1, 65_536)
  )
  data_parallel: int = key(
    1,
    "copies of the model, each on devices of its own, which one process feeds;"
    " with engine.ray.actors each engine has a process of its own",
    at_least(1, 65_536),
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
  speculative: str = key(
    "none",
    "ngram: refinements are drafted by looking their last tokens up in the"
    " prompt, which holds y_o, and checked in one pass, without loss; faster"
    " where few sequences are decoded, slower on busy CPUs",
    one_of("none", "ngram"),
  )
  speculative_tokens: int = key(
    8, "tokens of a draft, with speculative=ngram", at_least(1, 128)
  )

  @property
  def drafts(self) -> bool:
    """Whether it speculates."""
    return self.speculative != "none"

  def without_drafts(self) -> Self:
    """Returns the section without speculation: there is nothing to look up."""
    return dataclasses.replace(self, speculative="none")

  @property
  def gpus(self) -> Gpus:
    """Returns the copies and the GPUs that each is split over."""
    return Gpus(
      "vLLM",
      self.data_parallel,
      self.tensor_parallel,
      self.memory_share,
      copies_key="data_parallel",
      split_key="tensor_parallel",
      share_key="memory_share",
    )

  def contradictions(self, experiment: Any) -> Iterator[str]:
    """Yields temperatures, adapters' ranks and idle keys that it can't use."""
    yield from _temperatures(experiment)
    if self.drafts and experiment.teacher_writes != "y_r":
      yield (
        f"engine.vllm.speculative={self.speculative}: only a refinement's"
        f" prompt holds a draft, and method={experiment.method} along"
        f" {experiment.trains_on} refines nothing: leave it out"
      )
    rank, highest = experiment.lora.rank, LORA_RANKS[-1]
    if experiment.engine.weights == "adapter" and rank > highest:
      yield (
        f"lora.rank={rank}: vLLM applies adapters of a rank up to {highest}:"
        " lower it, or set engine.weights=merged"
      )

  def contradictions_on_gpus(self, experiment: Any) -> Iterator[str]:
    """Yields that vLLM's adapters on GPUs know no float32."""
    unmerged = experiment.engine.weights == "adapter"
    if unmerged and experiment.student.dtype == "float32":
      yield FLOAT32_ADAPTER


@dataclasses.dataclass(frozen=True)
class ServerEngine(EngineSection):
  """OpenAI-compatible servers, such as `vllm serve`."""

  summary = "servers"
  devices = "remote"
  batches_calls = True
  asks_for_it = ("urls",)

  urls: tuple[str, ...] = key(
    (), "their base addresses, as http://127.0.0.1:8000, separated by commas"
  )
  model: str | None = key(
    None,
    "the name that a server knows the model by; None: found by its folder",
  )
  concurrency: int = key(
    256, "requests in flight at a server", at_least(1, 1_000_000)
  )
  retries: int = key(
    8,
    "further tries of a request that failed, each after a longer pause; one"
    " that a busy server refuses hasn't",
    at_least(0, 10_000),
  )
  start_seconds: float = key(
    600.0,
    "how long to wait until a server is ready, and, once none is left, until "
    "one is back",
    declarations.seconds(),
  )
  request_seconds: float = key(
    3600.0,
    "how long a server may take over a request, and how long all of them may"
    " be too busy for any",
    declarations.seconds(),
  )
  api_key_variable: str = key(
    "VLLM_API_KEY",
    "environment variable that holds the API key, if servers want one",
    declarations.filled(),
  )

  @property
  def addresses(self) -> tuple[str, ...]:
    """Returns the servers' base addresses."""
    return self.urls

  @property
  def connections(self) -> int:
    """Returns the most requests that are in flight at all servers."""
    return self.concurrency * len(self.urls)

  def contradictions(self, experiment: Any) -> Iterator[str]:
    """Yields that no server is named, its temperatures, and Ray's actors."""
    # A preflight counts prompts, for which nothing has to be served.
    if not self.urls and not experiment.preflight_only:
      yield "engine.name=server needs engine.server.urls: name the servers"
    if self.model is not None and experiment.pipeline.parts > 1:
      yield (
        f"engine.server.model={self.model} names one model for a whole run, and"
        " with pipeline.split each round has another: leave it out, and have"
        " each served under its folder"
      )
    yield from _temperatures(experiment)
    if experiment.engine.ray.actors:
      yield (
        "engine.ray.actors puts engines on machines, and servers have theirs: "
        "set engine.ray.actors=0"
      )


@dataclasses.dataclass(frozen=True)
class Engines:
  """The registry: an engine's name, and its section.

  Each has a file `generation/engines/<name>_engine.py`, whose `make` makes it.
  """

  jax: JaxEngine = declarations.section(JaxEngine)
  vllm: VllmEngine = declarations.section(VllmEngine)
  server: ServerEngine = declarations.section(ServerEngine)


ENGINES: Mapping[str, type[EngineSection]] = {
  field.name: type(getattr(Engines(), field.name))
  for field in dataclasses.fields(Engines)
}
"""The sections by the name of their engine."""


def summaries() -> str:
  """Returns what the engines are, for the help."""
  *others, last = (section.summary for section in ENGINES.values())
  return f"{', '.join(others)}, or {last}"


def contradictions(experiment: Any) -> Iterator[str]:
  """Yields what of an `Experiment` its engine can't do, each with what to set.

  Keys that only make sense with another engine come first.
  """
  engine = experiment.engine
  for name, section in ENGINES.items():
    if name == engine.name:
      continue
    for own in section.asks_for_it:
      if getattr(getattr(engine, name), own) != getattr(section(), own):
        yield (
          f"engine.{name}.{own} is for engine.name={name}, not {engine.name}:"
          f" set engine.name={name}, or leave the {own} out"
        )
  if not engine.chosen.applies_adapters:
    problem = f"engine.name={engine.name} applies no adapter"
    able = (name for name, one in ENGINES.items() if one.applies_adapters)
    if experiment.student.adapter is not None:
      yield (
        f"student.adapter={experiment.student.adapter}: {problem}; set"
        f" engine.name={' or '.join(able)}"
      )
    if engine.weights == "adapter":
      yield f"engine.weights=adapter: {problem}; set engine.weights=merged"
  yield from engine.chosen.contradictions(experiment)
