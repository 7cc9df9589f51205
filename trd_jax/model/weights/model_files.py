"""A model on disk, as engines and the trainer load it."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class ModelFiles:
  """A model on disk, under its name.

  Attributes:
    name: the path as the config says it.
    folder: a Hugging Face folder of Qwen3 weights.
    revision: short digest of the weights, adapter included.
    dtype: 'float32' or 'bfloat16', of weights and activations.
    adapter: a PEFT folder whose adapter is applied unmerged, or None.
  """

  name: str
  folder: Path
  revision: str
  dtype: str
  adapter: Path | None = None
