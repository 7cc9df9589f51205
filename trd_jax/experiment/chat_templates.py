"""The chat templates that ship, by the files that hold them."""

from pathlib import Path

# As `prompt_sets`: their texts are the room data's.
FOLDER = Path(__file__).parents[1] / "data" / "chat_templates"


def shipped() -> tuple[str, ...]:
  """Returns the names of the shipped templates."""
  return tuple(sorted(path.stem for path in FOLDER.glob("*.jinja")))


def file(named: str | Path) -> Path:
  """Returns the file that a key `chat_template` names: a shipped one's, or it.

  Args:
    named: a shipped template's name, or a file.
  """
  if str(named) in shipped():
    return FOLDER / f"{named}.jinja"
  return Path(named)
