"""Finds weights that are NaN or infinite, before any engine loads them.

One NaN in one weight makes every logit NaN, and what is sampled from those is
garbage that looks like a bad model. Values are read as integers: NumPy's own
test takes fifteen times as long for bfloat16, and in vLLM's environment NumPy
has no bfloat16 at all.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from trd_jax.experiment.errors import UserError

# By safetensors' name of a dtype: an unsigned integer of its size, and the bits
# of its first value, counted from zero, that is no finite number. FP8's E4M3
# has one NaN and no infinity.
_DTYPES = {
  "F64": (np.dtype("<u8"), 0x7FF0_0000_0000_0000),
  "F32": (np.dtype("<u4"), 0x7F80_0000),
  "F16": (np.dtype("<u2"), 0x7C00),
  "BF16": (np.dtype("<u2"), 0x7F80),
  "F8_E5M2": (np.dtype("u1"), 0x7C),
  "F8_E4M3": (np.dtype("u1"), 0x7F),
}
_NAMES = {
  "float64": "F64",
  "float32": "F32",
  "float16": "F16",
  "bfloat16": "BF16",
}
# Values that are looked at together, where a file is read for this alone.
_BLOCK = 1 << 24
_HEADER_BYTES = 8


def count(values: np.ndarray, dtype: str | None = None) -> int:
  """Counts the values that are NaN or infinite.

  Args:
    values: any shape, strides and dtype; integers are all finite.
    dtype: what its bits mean, as safetensors spells it; None: what the array's
      own dtype says.
  """
  name = dtype or _NAMES.get(values.dtype.name)
  if name not in _DTYPES or not values.size:
    return 0
  unsigned, first = _DTYPES[name]
  bits = values.view(unsigned)
  sign = 1 << (8 * unsigned.itemsize - 1)
  # Read as integers, NaN and infinity are the largest values of their sign. So
  # two maxima settle the usual case without an array in between: the unsigned
  # one for negative values, whose top bit is set, the signed one for the rest.
  signed = bits.view(f"i{unsigned.itemsize}")
  if int(bits.max()) < sign + first and int(signed.max()) < first:
    return 0
  return int(np.count_nonzero((bits & unsigned.type(sign - 1)) >= first))


def refusal(where: Path | str, name: str, wrong: int, size: int) -> UserError:
  """Returns the error about a tensor or array with NaN or infinite values.

  Args:
    where: the file or checkpoint that holds it.
    name: its name there.
    wrong: how many of its values are NaN or infinite.
    size: how many values it has.
  """
  return UserError(
    f"{where}: {name} has {wrong:,} of {size:,} values that are NaN or"
    " infinite; nothing can be computed with them: fetch or make it again"
  )


def check_folder(folder: Path) -> None:
  """Refuses a folder whose weights are NaN or infinite somewhere.

  For programs that load weights without such a test. Reads every
  `*.safetensors` once. Tensors that are not of floating point, or of an unknown
  dtype, are passed over. So is a file that is not in the format, which its
  reader will say.

  Raises:
    UserError: a tensor has a value that is NaN or infinite.
  """
  for path in sorted(folder.glob("*.safetensors")):
    header, start = _header(path)
    # Mapped and read block by block: the file may be larger than the memory
    # that is free, and its pages warm the cache for who loads it next.
    data = np.memmap(path, np.uint8, mode="r") if header else None
    for name, about in header.items():
      if data is None or about["dtype"] not in _DTYPES:
        continue
      first, end = (start + offset for offset in about["data_offsets"])
      unsigned, _ = _DTYPES[about["dtype"]]
      raw = data[first:end]
      step = _BLOCK * unsigned.itemsize
      wrong = sum(
        count(raw[at : at + step].view(unsigned), about["dtype"])
        for at in range(0, end - first, step)
      )
      if wrong:
        size = (end - first) // unsigned.itemsize
        raise refusal(path, f"tensor {name}", wrong, size)


def _header(path: Path) -> tuple[dict[str, Any], int]:
  """Reads what a file says of each tensor, and where their bytes begin.

  Returns `({}, 0)` where the file is none of safetensors' format.
  """
  try:
    with path.open("rb") as file:
      size = int.from_bytes(file.read(_HEADER_BYTES), "little")
      # Of another kind of file the first eight bytes may say anything; nobody
      # is to allocate that much.
      if size > path.stat().st_size:
        return {}, 0
      header = dict(json.loads(file.read(size)))
      header.pop("__metadata__", None)
      room = path.stat().st_size - _HEADER_BYTES - size
      whole = all(_fits(about, room) for about in header.values())
  except (OSError, ValueError, TypeError, RecursionError):
    return {}, 0
  return (header, _HEADER_BYTES + size) if whole else ({}, 0)


def _fits(about: Any, room: int) -> bool:
  """Returns whether a header's entry is a tensor in so many bytes."""
  if not isinstance(about, dict) or not isinstance(about.get("dtype"), str):
    return False
  offsets = about.get("data_offsets")
  if not isinstance(offsets, list) or [*map(type, offsets)] != [int, int]:
    return False
  first, end = offsets
  unsigned, _ = _DTYPES.get(about["dtype"], (np.dtype(np.uint8), 0))
  return 0 <= first <= end <= room and not (end - first) % unsigned.itemsize
