"""Holds the shapes in names to the table of letters in CONTRIBUTING.md."""

import ast
import collections
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SUFFIX = re.compile(r"_?[a-z][a-z0-9_]*_([A-Z][A-Z0-9]*)")
# A line of the table: letter, meaning, rooms.
_LINE = re.compile(r"\| ([A-Z]) \| (.+) \| (.+) \|")


def _letters():
  """Returns each room's letters with their meanings."""
  known = collections.defaultdict(list)
  for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
    if found := _LINE.fullmatch(line):
      letter, meaning, rooms = found.groups()
      for room in rooms.replace("`", "").split(", "):
        known[room, letter].append(meaning)
  return known


def _named(tree):
  """Yields the names that code gives to arrays."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Name):
      yield node.id
    elif isinstance(node, ast.arg):
      yield node.arg
    elif isinstance(node, ast.Attribute):
      yield node.attr


def test_the_shape_in_a_name_is_made_of_the_tables_letters():
  known, used, wrong = _letters(), set(), []
  for path in sorted((ROOT / "trd_jax").rglob("*.py")):
    room = path.relative_to(ROOT / "trd_jax").parts[0]
    for name in sorted(set(_named(ast.parse(path.read_text())))):
      if not (found := _SUFFIX.fullmatch(name)):
        continue
      for letter in filter(str.isalpha, found[1]):
        key = (room if (room, letter) in known else "everywhere", letter)
        used.add(key)
        if key not in known:
          wrong.append(f"{path.relative_to(ROOT)}: {name}: {letter}")
  assert not wrong
  assert used, "no name has a shape: is the pattern right?"
  # What nobody uses is no letter of ours: it can have another meaning.
  unused = {letter for _, letter in known} - {letter for _, letter in used}
  assert not unused


def test_a_letter_has_one_meaning_in_a_room():
  known = _letters()
  assert known
  rooms = {room for room, _ in known} - {"everywhere"}
  for room in rooms:
    for _, letter in known:
      meanings = known.get((room, letter), []) + known.get(
        ("everywhere", letter), []
      )
      assert len(meanings) <= 1, (room, letter, meanings)
