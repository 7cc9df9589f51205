"""The prompt sets that ship, by the folders that hold them."""

from pathlib import Path

# Their texts are the room data's: here is only what a config may name.
FOLDER = Path(__file__).parents[1] / "data" / "prompt_sets"
DEFAULT = "default"


def shipped() -> tuple[str, ...]:
  """Returns the names of the shipped sets, the default one first."""
  names = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
  return (DEFAULT, *(name for name in names if name != DEFAULT))
