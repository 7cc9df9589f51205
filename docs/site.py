"""Makes the documents a site: a hook of MkDocs, used by `make docs`.

Documents link to each other and to files of the repository as GitHub shows
them, relative to the file. The site has the pages of docs/ at its root, so what
lies outside of docs/ is brought in under its own path: a document as a page,
any other file as it is. Links are rewritten to match.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
  "README.md",
  "CONTRIBUTING.md",
  "CHANGELOG.md",
  "BENCHMARKS.md",
  "SECURITY.md",
  "benchmarks/README.md",
  "trd_jax/lab/README.md",
)
"""What is a page though it lies outside of docs/."""

_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


def place(path: str) -> str:
  """Returns where the site has a file of the repository.

  Of the two pages that would be the site's root index.md is it, and README is
  the page `start`: MkDocs makes one page of both else.
  """
  if path == "README.md":
    return "start.md"
  path = re.sub(r"(^|/)README\.md$", r"\1about.md", path)
  return path.removeprefix("docs/")


def on_config(config):
  """Names the pages of the navigation as the site has them."""
  config.nav = _placed(config.nav)
  return config


def _placed(nav):
  if isinstance(nav, str):
    return place(nav)
  if isinstance(nav, list):
    return [_placed(one) for one in nav]
  return {title: _placed(inner) for title, inner in nav.items()}


def on_files(files, config):
  """Adds the documents outside of docs/, and all files that are linked to."""
  pages = [ROOT / name for name in DOCUMENTS]
  linked = set()
  for page in [*pages, *(ROOT / "docs").glob("*.md")]:
    for target in _targets(page):
      if target.is_file() and not target.is_relative_to(ROOT / "docs"):
        linked.add(target)
  for path in sorted({*pages, *linked}):
    name = path.relative_to(ROOT).as_posix()
    files.append(File.generated(config, place(name), abs_src_path=str(path)))
  return files


def _targets(page: Path):
  text = _FENCE.sub("", page.read_text("utf-8"))
  for _, target, _ in _LINK.findall(text):
    if "://" not in target:
      yield (page.parent / target).resolve()


def on_page_markdown(markdown, page, config, files):
  """Rewrites a page's links to where the site has their targets."""
  source = Path(page.file.abs_src_path).resolve()
  here = posixpath.dirname(page.file.src_uri)

  def rewritten(found):
    begin, target, end = found.groups()
    if "://" in target:
      return found[0]
    path = (source.parent / target).resolve()
    if not path.is_relative_to(ROOT):
      return found[0]
    there = place(path.relative_to(ROOT).as_posix())
    return f"{begin}{posixpath.relpath(there, here or '.')}{end}"

  # Code is left as it is.
  pieces = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
  return "".join(
    piece if piece.startswith("```") else _LINK.sub(rewritten, piece)
    for piece in pieces
  )
