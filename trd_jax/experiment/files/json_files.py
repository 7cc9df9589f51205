"""JSON files of a run: written whole or not at all, read with one error."""

import json
from pathlib import Path
from typing import Any

from trd_jax.experiment import shards
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import json_text


def write_json_atomic(path: Path, value: Any) -> None:
  """Writes JSON so that a reader sees the old file or the new, whole.

  Raises:
    TypeError: the value is not JSON-serialisable.
    ValueError: it holds a NaN or an infinity.
  """
  text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
  with shards.atomic_file(path) as file:
    file.write((text + "\n").encode())


def read_json(path: Path) -> Any:
  """Reads JSON that `write_json_atomic` wrote.

  Raises:
    UserError: it is absent or damaged.
  """
  try:
    return json_text.loads(path.read_bytes())
  except FileNotFoundError:
    raise UserError(f"{path} is not there: run its stage first") from None
  except ValueError as error:
    raise UserError(f"{path} is not JSON ({error}): remove it") from None
