"""Which attention a run uses: its choice, printed with why, and its check.

Shape key: B rows, T tokens, N query heads, K key heads, H channels
of a head.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from trd_jax.experiment.errors import UserError, one_line
from trd_jax.model.attention.attention import Implementation, attend
from trd_jax.model.config import ModelConfig

# The largest distance from the XLA path, relative to what is compared, in
# units of the dtype's epsilon.
_TOLERANCE = 4.0

# Lengths that a kernel is checked at. Rows are multiples of 64, and kernels cut
# them into blocks of 128: the second length ends in half a block.
LENGTHS = (256, 192)


class Choice(NamedTuple):
  """What runs.

  Attributes:
    implementation: as `attend` takes it.
    packing: whether rows hold several samples.
    why: for people.
  """

  implementation: Implementation
  packing: bool
  why: str


def choose(
  wanted: str,
  packing: bool | None,
  *,
  platform: str,
  dtypes: Sequence[str],
) -> Choice:
  """Chooses what `train.attention` and `train.packing` mean on these devices.

  `experiment` has already refused keys that contradict each other: packed rows
  or dtypes other than bfloat16 under cudnn and tokamax.

  Args:
    wanted: auto, xla, cudnn or tokamax.
    packing: None to choose.
    platform: of the devices: 'cpu', 'gpu', …
    dtypes: of the models that run, such as 'bfloat16'.

  Raises:
    UserError: the kernel that is asked for doesn't run here.
  """
  half = all(dtype == "bfloat16" for dtype in dtypes)
  cudnn: Implementation = "cudnn" if packing is False else "cudnn_packed"
  if wanted == "auto":
    if platform == "gpu" and half:
      return Choice(cudnn, packing is not False, "bfloat16 on GPUs")
    where = f"{'/'.join(sorted(set(dtypes)))} on {platform}"
    return Choice("xla", packing is not False, where)
  asked = f"train.attention={wanted}"
  if wanted == "xla":
    return Choice("xla", packing is not False, "as asked")
  if platform != "gpu":
    raise UserError(
      f"{asked} runs on GPUs, and JAX's devices here are {platform}: set"
      " train.attention=xla, or install JAX for the GPU"
    )
  if wanted == "tokamax" and importlib.util.find_spec("tokamax") is None:
    raise UserError(
      f"{asked} needs the package tokamax, which is not installed: pip install"
      " tokamax, or set train.attention=cudnn"
    )
  if wanted == "cudnn":
    return Choice(cudnn, packing is not False, "as asked")
  return Choice(cast(Implementation, wanted), False, "as asked")


# Queries, keys, values, positions and segments of the same rows -> outputs.
Attend = Callable[..., jax.Array]


def attention_of(implementation: Implementation) -> Attend:
  """Returns `attend` as a function of whole rows, as `check` takes it."""

  def run(query, key, value, position_BT, segment_BT):
    return attend(
      query,
      key,
      value,
      query_position_BT=position_BT,
      key_position_BS=position_BT,
      query_segment_BT=segment_BT,
      key_segment_BS=segment_BT,
      implementation=implementation,
    )

  return run


def check(
  attention: Attend,
  name: str,
  config: ModelConfig,
  dtype: jax.typing.DTypeLike,
  *,
  packed: bool,
  lengths: Sequence[int] = LENGTHS,
) -> float:
  """Compares an attention and its gradient with the XLA path in float32.

  Each length has three random rows with the model's heads: a full one, one
  that ends in padding, and one of a single token and padding. With `packed` the
  first two hold several segments.

  Args:
    attention: what is to be checked.
    name: for the error.
    config: the model's heads.
    dtype: the dtype that it runs in.
    packed: whether rows hold several samples.
    lengths: tokens of a row.

  Returns:
    The largest relative error of output and gradients.

  Raises:
    UserError: it fails, or differs by more than rounding explains.
  """
  return max(
    _distance(attention, name, config, dtype, packed, length)
    for length in lengths
  )


def _distance(
  attention: Attend,
  name: str,
  config: ModelConfig,
  dtype: jax.typing.DTypeLike,
  packed: bool,
  length: int,
) -> float:
  """Returns the error that `check` measures, of one length; raises as it."""
  N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
  rng = np.random.default_rng(0)
  inputs = [
    jnp.asarray(rng.standard_normal((3, length, heads, H)), dtype)
    # Query, key, value, and the cotangent of the output.
    for heads in (N, K, K, N)
  ]
  position_BT, segment_BT = np.zeros((2, 3, length), np.int32)
  full, part = length, length * 5 // 8
  rows = ((full,), (part,), (1,))
  if packed:
    rows = ((full // 3, full - full // 3), (part // 2, part // 4), (1,))
  for row, parts in enumerate(rows):
    start = 0
    for number, size in enumerate(parts, 1):
      position_BT[row, start : start + size] = np.arange(size)
      segment_BT[row, start : start + size] = number
      start += size
  real = jnp.asarray(segment_BT > 0)[..., None, None]

  @functools.partial(jax.jit, static_argnums=0)
  def both(attention, query, key, value, ct):
    def run(*inputs):
      return attention(*inputs, position_BT, segment_BT)

    # Outputs at padding are undefined: they are compared as 0, and no gradient
    # starts from them.
    out, back = jax.vjp(run, query, key, value)
    ct = jnp.where(real, ct, 0).astype(out.dtype)
    return jnp.where(real, out, 0), *back(ct)

  single = [x.astype(jnp.float32) for x in inputs]
  # The reference starts from the same rounded inputs, so that only the kernel's
  # own rounding is measured. On GPUs float32 products are computed in TF32
  # unless precision is asked for.
  with jax.default_matmul_precision("highest"):
    expected = both(attention_of("xla"), *single)
  try:
    got = jax.device_get(both(attention, *inputs))
  except Exception as error:
    reason = one_line(error)
    raise UserError(
      f"train.attention={name} fails on this model's heads ({N} of {H} on {K}"
      f" in {jnp.dtype(dtype).name}, {length} tokens): {reason}; set"
      " train.attention=xla"
    ) from error
  # Relative to the whole array: single elements near 0 have no meaningful
  # relative error in bfloat16.
  errors = [
    np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
    for a, b in zip(got, map(np.asarray, expected), strict=True)
  ]
  worst = float(np.max(errors))
  bound = _TOLERANCE * float(jnp.finfo(dtype).eps)
  # Not `worst > bound`, which lets NaN pass.
  if not worst <= bound:
    raise UserError(
      f"train.attention={name} is wrong on this machine: {worst:.2g} from the"
      f" XLA path on a random case of {length} tokens, where rounding explains"
      f" {bound:.2g}; set train.attention=xla, and tell whoever makes the"
      " kernel"
    )
  return worst


def settle(
  found: Choice,
  wanted: str,
  packing: bool | None,
  configs: Sequence[ModelConfig],
  agree: Callable[[bool], bool] = bool,
) -> Choice:
  """Checks the chosen kernel, which gives way to another one if it is bad.

  Packed rows give way to rows of one sample unless they are asked for, and a
  kernel to xla unless it is.

  Args:
    found: what `choose` returned.
    wanted: as given to `choose`.
    packing: as given to `choose`.
    configs: of the models that run.
    agree: whether something holds in all processes of the run.

  Returns:
    What runs, with what the check found in `why`.

  Raises:
    UserError: a kernel that is asked for by name fails, see `check`.
  """
  name = found.implementation
  if name == "xla":
    return found
  error, failure = 0.0, f"it fails in another process of this run ({name})"
  try:
    # A student and a teacher with the same heads are checked once.
    for config in dict.fromkeys(configs):
      attention = attention_of(name)
      error = max(
        error, check(attention, name, config, "bfloat16", packed=found.packing)
      )
    good = True
  except UserError as caught:
    good, failure = False, str(caught)
  # All processes of a run compile one program together: one that went on with
  # another attention would leave the others waiting for it.
  if agree(good):
    return found._replace(why=f"{found.why}; {error:.1g} from the XLA path")
  tried = f"{name} was tried: {failure}"
  if name == "cudnn_packed" and packing is None:
    why = f"{found.why}; {tried}"
    fallback = Choice("cudnn", False, why)
    return settle(fallback, wanted, packing, configs, agree)
  if wanted != "auto":
    raise UserError(failure)
  return Choice("xla", packing is not False, tried)
