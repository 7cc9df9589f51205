"""JSON that others wrote: whatever is wrong with it is one kind of error."""

import json
from collections.abc import Callable
from typing import Any


def loads(
  text: str | bytes, parse_int: Callable[[str], Any] | None = None
) -> Any:
  """As `json.loads`, whose parser gives up on deep nesting in its own way.

  Raises:
    ValueError: it is no JSON, or nested too deeply.
  """
  try:
    return json.loads(text, parse_int=parse_int)
  except RecursionError:
    raise ValueError("nested too deeply") from None
