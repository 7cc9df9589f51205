"""The size of adapters, for code that doesn't import JAX."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Size of the adapters; the defaults are the paper's (Appendix C.6).

  Attributes:
    rank: inner width r.
    alpha: the adapter's output is scaled by `alpha / rank`.
    dropout: probability of dropping a channel of the adapter's input.
  """

  rank: int = 64
  alpha: float = 128.0
  dropout: float = 0.05

  @property
  def scale(self) -> float:
    """Returns the factor on `x A B`, `alpha / rank`."""
    return self.alpha / self.rank
