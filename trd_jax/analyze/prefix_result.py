"""The file that the measurement of prefix failure leaves, and its words.

Without JAX: what only shows the result doesn't load it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files.json_files import read_json
from trd_jax.experiment.run_dir import RunDir

VERSION = 1
"""Of the measurement: another number where its figures mean something else."""

GRADIENTS: Mapping[str, str] = {
  "forward": "forward KL along the whole draft y_o",
  "reverse": "reverse KL along the whole draft y_o",
  "forward_at": "forward KL along the line that is the first wrong one",
  "forward_after": "forward KL along the draft behind that line",
  "reverse_after": "reverse KL along the draft behind that line",
  "frag": "g_frag: Equation 3 of the onset word along the draft behind it",
  "frag_certain": "g_frag of a teacher that is certain of the onset word",
  "ideal": "g_ideal: Equation 3 along the correction path",
  "ideal_certain": "g_ideal of a teacher that is certain of the path",
  "ideal_first": "g_ideal of a path that ends with the corrected step",
  "avoid": "Equation 3, a certain teacher, along the right path from before the"
  " wrong line",
  "trd": "forward KL along the refined y_r, the loss of TRD",
}
"""What is compared, by name; each is a mean over its (context, token) pairs.

In a right draft the line is one drawn by chance, the path is the draft's own
rest, and the onset word is the first token of that.
"""

REFERENCES = ("ideal", "ideal_certain", "avoid")
"""The gradients that all others are compared with."""


def path(run_dir: RunDir) -> Path:
  """Returns the JSON file of a run's measurement."""
  return run_dir.stage("analyze") / "prefix_failure.json"


def load(run_dir: RunDir) -> dict[str, Any] | None:
  """Reads a run's measurement; None: it has none.

  Raises:
    UserError: the file is damaged or another version's.
  """
  file = path(run_dir)
  if not file.exists():
    return None
  remedy = "run trd_jax.analyze with --prefix_failure=64 again"
  found = read_json(file, remedy)
  if found.get("version") != VERSION:
    raise UserError(
      f"{file}: is of version {str(found.get('version'))[:20]} of the"
      f" measurement, not of {VERSION}; {remedy}"
    )
  return found


def damaged(run_dir: RunDir) -> UserError:
  """Returns the complaint about a file that lacks what the measurement has."""
  return UserError(
    f"{path(run_dir)}: isn't what trd_jax.analyze wrote; run trd_jax.analyze"
    " with --prefix_failure=64 again"
  )
