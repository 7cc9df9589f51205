"""The shape of a dense decoder, read from and written as `config.json`.

The file is Hugging Face's. The project is about Qwen3; Qwen2 (with Qwen2.5) and
Llama (up to 3.x) differ from it only in a bias, the norm of the heads, and the
rotary scaling.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import json_fields
from trd_jax.experiment.files.json_fields import (
  NAMES,
  OBJECT,
  POSITIVE,
  SIZE,
  SWITCH,
  TEXT,
  Kind,
)

CONFIG = "config.json"
_REMEDY = "copy the file from the checkpoint again"


class Architecture(NamedTuple):
  """What tells one family of checkpoints from another.

  Attributes:
    model_type: its name in `config.json`, in lower case.
    qkv_bias: whether queries, keys and values have a bias.
    qk_norm: whether each query and key head is normed.
    head_dim: width of a head where the file doesn't say; None: the residual's
      over the number of heads.
    max_positions: longest context where the file doesn't say.
  """

  model_type: str
  qkv_bias: bool
  qk_norm: bool
  head_dim: int | None
  max_positions: int


ARCHITECTURES = {
  "Qwen3ForCausalLM": Architecture("qwen3", False, True, 128, 32_768),
  "Qwen2ForCausalLM": Architecture("qwen2", True, False, None, 32_768),
  "LlamaForCausalLM": Architecture("llama", False, False, None, 2_048),
}
_BASE = Kind("a number above 1", lambda x: POSITIVE.holds(x) and x > 1)
# Sizes are looked at as they are read (`read_size`).
_FIELDS: Mapping[str, Kind] = {
  "architectures": NAMES,
  "model_type": TEXT,
  "use_sliding_window": SWITCH,
  "attention_bias": SWITCH,
  "mlp_bias": SWITCH,
  "tie_word_embeddings": SWITCH,
  "hidden_act": TEXT,
  "rms_norm_eps": POSITIVE,
  "rope_theta": _BASE,
  "rope_scaling": OBJECT,
  "rope_parameters": OBJECT,
}
# Types of rotary scaling and the fields that each may have.
_TRAINED = "original_max_position_embeddings"
_ROPE_KINDS: Mapping[str, Kind] = {
  "type": TEXT,
  "rope_type": TEXT,
  "rope_theta": _BASE,
  "factor": POSITIVE,
  "attention_factor": POSITIVE,
  "beta_fast": POSITIVE,
  "beta_slow": POSITIVE,
  "low_freq_factor": POSITIVE,
  "high_freq_factor": POSITIVE,
  "truncate": SWITCH,
  _TRAINED: SIZE,
}
_ROPE_FIELDS = {
  "default": set(),
  "linear": {"factor", _TRAINED},
  "yarn": {
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "truncate",
    _TRAINED,
  },
  "llama3": {"factor", "low_freq_factor", "high_freq_factor", _TRAINED},
}

# A tenfold of the deepest and of the largest models that there are. Tables are
# made of a row a layer, and sizes have to fit into an int64.
_MOST_LAYERS = 10_000
_MOST_PARAMETERS = 10**14


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes and constants of a dense model.

  Attributes:
    vocab_size: rows of the embedding and of the head; may exceed the
      tokenizer's ids (Qwen3 pads 151,669 ids to 151,936 rows).
    hidden_size: width of the residual stream (D).
    intermediate_size: width of the SwiGLU's two inner products (F).
    num_layers: transformer blocks (L).
    num_heads: query heads (N).
    num_kv_heads: key and value heads (K); N is a multiple of K.
    head_dim: width of a head (H); N * H need not equal D.
    max_positions: the longest context that the checkpoint claims, in tokens.
    rope_theta: base of the rotary frequencies.
    rope_scaling: scaling of the rotary frequencies as `(key, value)` pairs of
      the checkpoint's own field, `()` for none; types linear, yarn, llama3.
    norm_eps: epsilon inside every RMSNorm.
    tie_embeddings: whether the head is the embedding itself.
    architecture: a name of `ARCHITECTURES`.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_positions: int = 40_960
  rope_theta: float = 1_000_000.0
  rope_scaling: tuple[tuple[str, Any], ...] = ()
  norm_eps: float = 1e-6
  tie_embeddings: bool = False
  architecture: str = "Qwen3ForCausalLM"

  @property
  def family(self) -> Architecture:
    """Returns what the architecture has and what it lacks."""
    return ARCHITECTURES[self.architecture]

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise UserError(
        f"config.json: num_attention_heads={self.num_heads} is not a multiple"
        f" of num_key_value_heads={self.num_kv_heads}; check the file"
      )
    if self.head_dim % 2:
      raise UserError(
        f"config.json: head_dim={self.head_dim} is odd, so rotary embedding"
        " cannot pair its channels; check the file"
      )
    if (
      self.num_layers > _MOST_LAYERS or self.num_parameters() > _MOST_PARAMETERS
    ):
      raise UserError(
        f"config.json: num_hidden_layers={self.num_layers} and its other sizes"
        f" make {self.num_parameters():.1e} parameters, more than any model"
        " has; check the file"
      )

  @classmethod
  def from_hf(cls, fields: dict[str, Any]) -> "ModelConfig":
    """Reads the fields of a `config.json`.

    Accepts both spellings of the rotary fields: `rope_theta` with
    `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5).

    Raises:
      UserError: on an architecture that is none of `ARCHITECTURES`, on a
        field that is missing or of another type, and on a feature that this
        model doesn't have (sliding windows, attention bias, another activation,
        an unknown rope type).
    """
    json_fields.check(fields, _FIELDS, CONFIG, _REMEDY)
    architecture = _architecture(fields)
    family = ARCHITECTURES[architecture]
    # What this model lacks is refused. Passed over, the weights would load all
    # the same and compute something else.
    if fields.get("use_sliding_window"):
      raise UserError(
        "config.json: use_sliding_window=true is not supported; use a"
        " checkpoint with full attention"
      )
    for name in ("attention_bias", "mlp_bias"):
      if fields.get(name):
        raise UserError(
          f"config.json: {name}=true is not {architecture}'s usual layout;"
          " use a checkpoint without it"
        )
    if (fields.get("hidden_act") or "silu") != "silu":
      raise UserError(
        f"config.json: hidden_act={fields['hidden_act']!r} is not supported;"
        " use a checkpoint with 'silu'"
      )

    size = functools.partial(read_size, fields)
    theta, scaling = _rope(fields)
    width, heads = size("hidden_size"), size("num_attention_heads")
    # As in transformers: an absent field has the default of its config class,
    # a null one is derived from the widths.
    absent = None if "head_dim" in fields else family.head_dim
    head_dim = size("head_dim", absent or width // heads)
    return cls(
      vocab_size=size("vocab_size"),
      hidden_size=width,
      intermediate_size=size("intermediate_size"),
      num_layers=size("num_hidden_layers"),
      num_heads=heads,
      num_kv_heads=size("num_key_value_heads", heads),
      head_dim=head_dim,
      max_positions=read_positions(fields),
      rope_theta=theta,
      rope_scaling=scaling,
      norm_eps=float(fields.get("rms_norm_eps") or 1e-6),
      tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
      architecture=architecture,
    )

  def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
    """Returns the fields of a `config.json` that transformers and vLLM read.

    Args:
      dtype: the weights' dtype in the file, such as 'bfloat16'.
    """
    # Each family gets the fields that its own config class has, so that a
    # folder that is written looks like one of its makers'.
    bias, window = {"attention_bias": False}, {}
    if self.family.model_type == "llama":
      bias["mlp_bias"] = False
    else:
      window = {
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": self.num_layers,
      }
    if self.family.qkv_bias:
      bias = {}  # Qwen2's is no field
    return {
      "architectures": [self.architecture],
      "model_type": self.family.model_type,
      "vocab_size": self.vocab_size,
      "hidden_size": self.hidden_size,
      "intermediate_size": self.intermediate_size,
      "num_hidden_layers": self.num_layers,
      "num_attention_heads": self.num_heads,
      "num_key_value_heads": self.num_kv_heads,
      "head_dim": self.head_dim,
      "max_position_embeddings": self.max_positions,
      "rope_theta": self.rope_theta,
      "rope_scaling": dict(self.rope_scaling) or None,
      "rms_norm_eps": self.norm_eps,
      "tie_word_embeddings": self.tie_embeddings,
      "hidden_act": "silu",
      **bias,
      "attention_dropout": 0.0,
      **window,
      "initializer_range": 0.02,
      "use_cache": True,
      "torch_dtype": dtype,
    }

  def linear_layers(self) -> dict[str, tuple[int, int]]:
    """Returns channels in and out of a block's seven linear layers, by name.

    The model is built from these widths, and files, FLOPs and memory are
    reckoned with them.
    """
    D, F = self.hidden_size, self.intermediate_size
    queries = self.num_heads * self.head_dim
    keys = self.num_kv_heads * self.head_dim
    return {
      "q": (D, queries),
      "k": (D, keys),
      "v": (D, keys),
      "o": (queries, D),
      "gate": (D, F),
      "up": (D, F),
      "down": (F, D),
    }

  def linear_parameters(self) -> int:
    """Counts the weights of a block's linear layers."""
    return sum(ins * outs for ins, outs in self.linear_layers().values())

  def adapter_parameters(self, rank: int) -> int:
    """Counts the parameters of an adapter on every block's linear layers."""
    channels = sum(ins + outs for ins, outs in self.linear_layers().values())
    return self.num_layers * rank * channels

  def num_parameters(self) -> int:
    """Counts the parameters of the base model, a tied head once."""
    bias = 0
    if self.family.qkv_bias:
      bias = sum(self.linear_layers()[name][1] for name in "qkv")
    norms = 2 * self.hidden_size
    if self.family.qk_norm:
      norms += 2 * self.head_dim
    heads = 1 if self.tie_embeddings else 2
    return (
      self.num_layers * (self.linear_parameters() + bias + norms)
      + heads * self.vocab_size * self.hidden_size
      + self.hidden_size
    )


def read_size(
  fields: dict[str, Any], name: str, default: int | None = None
) -> int:
  """Reads a size from a `config.json`, the default where it is absent or null.

  Raises:
    UserError: the field and the default are missing, or the field is not a
      positive integer.
  """
  value = fields.get(name)
  value = default if value is None else value
  if value is None:
    raise json_fields.wrong(name, "missing", CONFIG, _REMEDY)
  json_fields.check({name: value}, {name: SIZE}, CONFIG, _REMEDY)
  return value


def read_positions(fields: dict[str, Any]) -> int:
  """Reads the longest context that a `config.json` claims, in tokens.

  Raises:
    UserError: the field is no size, or is left to an unknown architecture.
  """
  json_fields.check(fields, _FIELDS, CONFIG, _REMEDY)
  name, default = "max_position_embeddings", None
  if fields.get(name) is None:
    default = ARCHITECTURES[_architecture(fields)].max_positions
  return read_size(fields, name, default)


def _architecture(fields: dict[str, Any]) -> str:
  """Returns the architecture's name in `ARCHITECTURES`, as the file says it.

  Raises:
    UserError: the architecture is not in `ARCHITECTURES`.
  """
  names = fields.get("architectures") or []
  for name, family in ARCHITECTURES.items():
    # Some exports leave `architectures` out and have the type only. Where both
    # are there the architecture counts: a type has several.
    if name in names or (
      not names and fields.get("model_type") == family.model_type
    ):
      return name
  told = ", ".join(names) or fields.get("model_type")
  raise UserError(
    f"config.json: architecture {told} is not supported; use a dense checkpoint"
    f" of {', '.join(ARCHITECTURES)}"
  )


def _rope(fields: dict[str, Any]) -> tuple[float, tuple[tuple[str, Any], ...]]:
  """Reads base and scaling of the rotary embedding, in either spelling.

  Raises:
    UserError: the type of scaling is unknown, or a field of it is unknown,
      missing or of another type.
  """
  # transformers 5 keeps base and scaling together, transformers 4 apart and
  # calls the type `type` at first. Where a file has both, the older counts.
  scaling = dict(fields.get("rope_parameters") or {})
  scaling.update(fields.get("rope_scaling") or {})
  json_fields.check(scaling, _ROPE_KINDS, CONFIG, _REMEDY)
  theta = scaling.pop("rope_theta", None)
  theta = fields.get("rope_theta") or theta or 10_000.0
  old_name = scaling.pop("type", None) or "default"
  rope_type = scaling["rope_type"] = scaling.get("rope_type") or old_name
  if rope_type not in _ROPE_FIELDS:
    raise UserError(
      f"config.json: rope type {rope_type!r} is not supported; known types:"
      f" {', '.join(_ROPE_FIELDS)}"
    )
  # A field that isn't known may change the frequencies: it is refused, too.
  unknown = sorted(scaling.keys() - {"rope_type"} - _ROPE_FIELDS[rope_type])
  if unknown:
    raise UserError(
      f"config.json: the rope scaling's field {unknown[0]!r} is not supported"
      f" for type {rope_type!r}; use a checkpoint without it"
    )
  if rope_type == "default":
    return float(theta), ()
  # yarn's other fields have defaults; llama3's have none.
  needed = _ROPE_FIELDS[rope_type] if rope_type == "llama3" else {"factor"}
  for name in sorted(needed):
    if scaling.get(name) is None:
      raise UserError(
        f"config.json: rope scaling of type {rope_type!r} needs a number"
        f" {name!r}; add it"
      )
  if rope_type == "llama3" and not (
    scaling["low_freq_factor"] < scaling["high_freq_factor"]
  ):
    raise UserError(
      f"config.json: low_freq_factor={scaling['low_freq_factor']:g} of the rope"
      " scaling is not below"
      f" high_freq_factor={scaling['high_freq_factor']:g}; check the file"
    )
  return float(theta), tuple(sorted(scaling.items()))


def rope_frequencies(config: ModelConfig) -> tuple[list[float], float]:
  """Computes the rotary embedding's frequencies and the factor on its values.

  Returns:
    The `head_dim / 2` frequencies in radians a token, slowest last, and the
    factor that multiplies cosines and sines: 1 unless the scaling is yarn
    (Peng et al. 2023, section 3.4), which sharpens attention by
    `0.1 ln(factor) + 1`.
  """
  dim = config.head_dim
  base = config.rope_theta
  plain = [base ** (-2 * i / dim) for i in range(dim // 2)]
  scaling = dict(config.rope_scaling)
  rope_type = scaling.get("rope_type", "default")
  if rope_type == "default":
    return plain, 1.0
  factor = float(scaling["factor"])
  if rope_type == "linear":
    # Linear scaling divides positions by the factor, and an angle is their
    # product: to divide the frequencies is the same.
    return [f / factor for f in plain], 1.0
  if rope_type == "llama3":
    return [_llama3(f, scaling) for f in plain], 1.0
  # yarn: channels that turn often within the trained context keep their
  # frequency, for they tell near tokens apart; slow ones are divided by the
  # factor, for they would leave the angles seen in training; in between, from
  # `low` to `high`, the two are mixed linearly.
  trained = scaling.get(_TRAINED) or config.max_positions

  def channel(rotations: float) -> float:
    # The channel that turns `rotations` times over the trained context.
    turns = trained / (rotations * 2 * math.pi)
    return dim * math.log(turns) / (2 * math.log(base))

  low = channel(scaling.get("beta_fast") or 32)
  high = channel(scaling.get("beta_slow") or 1)
  if scaling.get("truncate", True):
    low, high = math.floor(low), math.ceil(high)
  # Bounds and the ramp's least width are as in transformers, against which
  # logits are tested.
  low, high = max(low, 0), min(high, dim - 1)
  width = (high - low) or 0.001
  frequencies = []
  for i, f in enumerate(plain):
    ramp = min(max((i - low) / width, 0.0), 1.0)
    frequencies.append(f / factor * ramp + f * (1 - ramp))
  attention = scaling.get("attention_factor")
  if attention is None:
    attention = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
  return frequencies, float(attention)


def _llama3(frequency: float, scaling: dict[str, Any]) -> float:
  """Scales a frequency as Llama 3.1 does.

  A slow channel's is divided by the factor, a fast one's is kept. In between
  the two are mixed linearly by how often the channel turns over the trained
  context.
  """
  turns = scaling[_TRAINED] * frequency / (2 * math.pi)
  low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
  share = min(max((turns - low) / (high - low), 0.0), 1.0)
  return frequency * (share + (1 - share) / scaling["factor"])
