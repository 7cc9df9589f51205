"""What `gpu.py` leaves, as a table and as figures of targets.

Its document has `devices`, and `rows` of a section and a case with either
`measures`, numbers by name, or `not_measured`, a reason.
"""

from collections.abc import Callable, Mapping

import results


def tables(document: dict) -> list[results.Table]:
  """One table of all that was measured."""
  rows = []
  for row in document["rows"]:
    numbers = row.get("measures", {}).items()
    text = ", ".join(f"{name} {value:.4g}" for name, value in numbers)
    text = text or f"not measured: {row['not_measured']}"
    rows.append((row["section"], row["case"], text))
  devices = "; ".join(document["devices"])
  columns = ("section", "case", "measured")
  return [results.Table("One GPU", f"{devices}.", columns, rows)]


def figure(
  section: str, name: str, case: str = "", factor: float = 1.0
) -> Callable[[Mapping[str, dict]], float | None]:
  """The first number of that name in a section's cases that have `case`.

  None of another card than an H100, to which the targets belong.
  """

  def find(documents: Mapping[str, dict]) -> float | None:
    document = documents.get("gpu", {"devices": [], "rows": []})
    if not any("H100" in device for device in document["devices"]):
      return None
    for row in document["rows"]:
      found = row["section"] == section and case in row["case"]
      if found and name in row.get("measures", {}):
        return row["measures"][name] * factor
    return None

  return find
