"""Reads the tensors of a folder's safetensors files slice by slice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  gives numpy the bfloat16 that files may hold
import numpy as np
from safetensors import SafetensorError, safe_open

from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import json_files
from trd_jax.model.weights import finite_weights

_DTYPES = ("F64", "F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"
# Rows that a comparison of two tensors holds in memory.
_ROWS = 8192


class TensorFiles:
  """The tensors of a folder's safetensors files, as one mapping of names.

  Reads the single file where there is one, else the files that
  `model.safetensors.index.json` names, else every `*.safetensors`.

  Args:
    folder: the folder.
    single: name of the single file.

  Raises:
    UserError: there are no such files, one is missing, damaged or of another
      content than the index says, a tensor is there twice or has a dtype
      other than float64, float32, float16 and bfloat16.
  """

  def __init__(self, folder: Path | str, single: str = "model.safetensors"):
    self.folder = Path(folder)
    self._single = single
    paths, index = self._paths()
    self._open: dict[str, Any] = {}
    self._file: dict[str, Path] = {}
    self._shape: dict[str, tuple[int, ...]] = {}
    # Handles map the files into memory and stay open: tensors are read by the
    # slice, in the order in which devices ask for them.
    for path in paths:
      try:
        handle = safe_open(path, framework="np")
        names = list(handle.keys())
      except (SafetensorError, OSError) as error:
        missing = isinstance(error, FileNotFoundError)
        problem = "is missing" if missing else f"can't be read ({error})"
        raise UserError(f"{path} {problem}; fetch the file again") from error
      for name in names:
        self._add(name, path, handle)
    # Files of two downloads may each be whole and not belong together.
    for name, file in index.items():
      if name not in self._file or self._file[name].name != file:
        raise UserError(
          f"{self.folder / file}: tensor {name} is missing, though {INDEX}"
          " places it there; fetch the checkpoint again"
        )

  def _paths(self) -> tuple[list[Path], dict[str, str]]:
    """Finds the files, and reads the index that they must agree with.

    Returns:
      The files' paths, and the index, file name by tensor; empty without one.
    """
    if (self.folder / self._single).exists():
      return [self.folder / self._single], {}
    if (self.folder / INDEX).exists():
      path = self.folder / INDEX
      try:
        index = dict(json_files.read_object(path)["weight_map"])
        names = sorted(set(index.values()))
        # An index comes from outside: no path in it may lead out of the folder.
        if any(Path(name).name != name for name in names):
          raise ValueError("a file outside the folder")
        for name in names:
          name.encode()  # half a surrogate pair, which JSON has, names no file
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
          f"{path} is no index of files ({error}); fetch it again"
        ) from error
      return [self.folder / name for name in names], index
    paths = sorted(self.folder.glob("*.safetensors"))
    if not paths:
      raise UserError(
        f"{self.folder} holds no safetensors; name a folder that does (pickled"
        " .bin files are never read)"
      )
    return paths, {}

  def _add(self, name: str, path: Path, handle: Any) -> None:
    """Adds a tensor of an open file; refuses a second one of that name."""
    part = handle.get_slice(name)
    shape = tuple(part.get_shape())
    if name in self._file:
      raise UserError(
        f"{path}: tensor {name} {shape} is there twice, first in"
        f" {self._file[name]} as {self._shape[name]}; remove one file"
      )
    if part.get_dtype() not in _DTYPES:
      raise UserError(
        f"{path}: tensor {name} {shape} is {part.get_dtype()}, which is not"
        f" supported; use a checkpoint in one of {', '.join(_DTYPES)}"
      )
    self._open[name], self._file[name] = handle, path
    self._shape[name] = shape

  def __contains__(self, name: str) -> bool:
    return name in self._file

  def __iter__(self) -> Iterator[str]:
    return iter(self._file)

  def expect(
    self, name: str, shape: tuple[int, ...], by: str = "config.json"
  ) -> None:
    """Checks that a tensor is there and has the shape that `by` implies.

    Raises:
      UserError: the tensor is missing or has another shape.
    """
    if name not in self:
      raise UserError(
        f"{self.folder}: tensor {name} {shape} is missing; fetch the"
        " checkpoint again"
      )
    if self.shape(name) != shape:
      raise UserError(
        f"{self.file(name)}: tensor {name} is {self.shape(name)} where {by}"
        f" asks for {shape}; fetch files that belong together"
      )

  def file(self, name: str) -> Path:
    """Returns the file that holds a tensor."""
    return self._file[name]

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns a tensor's shape."""
    return self._shape[name]

  def dtypes(self) -> set[str]:
    """Returns the dtypes of all tensors, as safetensors spells them."""
    return {self._open[name].get_slice(name).get_dtype() for name in self}

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """Reads a part of a tensor in the file's dtype; all of it by default.

    The values are checked as they are read, so that the disk is read once.

    Raises:
      UserError: a value of the part is NaN or infinite.
    """
    part = self._open[name].get_slice(name)
    values = part[index or ...]
    if finite_weights.count(values):
      # The error counts over the whole tensor, so that it doesn't depend on how
      # many devices share it.
      whole = part[...]
      raise finite_weights.refusal(
        self._file[name],
        f"tensor {name}",
        finite_weights.count(whole),
        whole.size,
      )
    return values

  def equal(self, one: str, other: str) -> bool:
    """Returns whether two tensors are equal, compared by blocks of rows."""
    if self._shape[one] != self._shape[other]:
      return False
    size = self._shape[one][0]
    # A head of 150K rows has gigabytes: both are never in memory whole.
    for start in range(0, size, _ROWS):
      rows = (slice(start, min(start + _ROWS, size)),)
      if not np.array_equal(self.read(one, rows), self.read(other, rows)):
        return False
    return True
