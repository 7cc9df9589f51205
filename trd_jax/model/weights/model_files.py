"""Where a model lies on disk, for engines and the trainer to load."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class ModelFiles:
  """A model on disk and its name in the config.

  Attributes:
    name: the model's path as the config spells it.
    folder: a Hugging Face folder of Qwen3 weights.
    revision: short digest of the weights and the adapter.
    dtype: 'float32' or 'bfloat16', of weights and activations.
    adapter: a PEFT folder whose adapter is applied unmerged, or None.
    fingerprint: the revision, and of large files a digest of every byte (see
      `hub.fingerprint`); '' where nobody has computed it.
  """

  name: str
  folder: Path
  revision: str
  dtype: str
  adapter: Path | None = None
  fingerprint: str = ""
