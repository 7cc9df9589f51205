"""What a data source is, and data files: here, on the hub or elsewhere."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from trd_jax.experiment.errors import UserError
from trd_jax.experiment.files import paths
from trd_jax.experiment.files.atomic_files import atomic_file
from trd_jax.experiment.records import Problem, Rejected
from trd_jax.experiment.schema import Data

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".jsonl.gz", ".json", ".json.gz")
# The key that names a local copy of what a run trains on.
ROOT = "data.root"
_BLOCK = 1 << 20
_CONNECT_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Hub:
  """Files on the Hugging Face hub.

  Attributes:
    repo_id: the data set.
    pattern: of its files' paths; `*` stands for folders, too.
    revision: a commit, tag or branch; None: the newest.
  """

  repo_id: str
  pattern: str
  revision: str | None = None


def _nothing_to_check(data: Data) -> None:
  del data


@dataclasses.dataclass(frozen=True)
class Source:
  """Where problems come from: an entry of `problems.SOURCES`.

  Attributes:
    load: returns all problems, and the rows that were set aside.
    files: returns the local files that it reads of `data.root`, by that path;
      None for a source that makes its problems.
    needs_root: whether it can't do without `data.root`.
    hub: the data sets that are downloaded without a `data.root`, or
    urls: the addresses, each with the SHA-256 of what is there.
    check: raises `UserError` where its own keys ask for what there isn't.
    load_ungraded: as `load`, with rows that nothing can be graded by, too;
      None: there are no others.
    in_paper: how many of its rows the paper trained on, as a person says it;
      None: it trained on none.
  """

  load: Callable[[Data], tuple[list[Problem], list[Rejected]]]
  files: Callable[[str | None], list[Path]] | None = None
  needs_root: bool = False
  hub: tuple[Hub, ...] = ()
  urls: Mapping[str, str] = dataclasses.field(default_factory=dict)
  check: Callable[[Data], None] = _nothing_to_check
  load_ungraded: (
    Callable[[Data], tuple[list[Problem], list[Rejected]]] | None
  ) = None
  in_paper: str | None = None


def fetch(hub: Hub, name: str, key: str = ROOT) -> tuple[str, list[Path]]:
  """Downloads a data set's files that match its pattern.

  Args:
    hub: the data set, its files and its revision.
    name: what it is for, in an error.
    key: what names a local copy instead, in an error.

  Returns:
    The commit that it came to, and the files by name.

  Raises:
    UserError: the hub does not give them.
  """
  import huggingface_hub  # slow to import, and only needed here

  repo_id, pattern = hub.repo_id, hub.pattern
  at = f" at {hub.revision}" if hub.revision else ""
  try:
    folder = Path(
      huggingface_hub.snapshot_download(
        repo_id,
        repo_type="dataset",
        revision=hub.revision,
        allow_patterns=[pattern],
      )
    )
  except Exception as error:  # the library's errors share no base class
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(
      f"{name}: {repo_id}{at} can't be fetched from the Hugging Face hub "
      f"({text[:160]}); give a local copy with {key}"
    ) from error
  # A snapshot folder may hold more than was asked for this time.
  files = sorted(
    path
    for path in folder.rglob("*")
    if path.is_file()
    and fnmatch.fnmatchcase(path.relative_to(folder).as_posix(), pattern)
  )
  if not files:
    raise UserError(
      f"{name}: {repo_id}{at} on the Hugging Face hub has no {pattern}; give a "
      f"local copy with {key}"
    )
  return folder.name, files


def download(url: str, digest: str, name: str, key: str = ROOT) -> Path:
  """Downloads a file that is known by its SHA-256, once.

  `name` is what it is for and `key` what names a local copy instead, in errors.

  Raises:
    UserError: it can't be had, or is another file than it should be.
  """
  path = cached(url, digest)
  if path.is_file() and sha256(path) == digest:
    return path
  try:
    with (
      urllib.request.urlopen(url, timeout=_CONNECT_SECONDS) as answer,
      atomic_file(path) as file,
    ):
      found = hashlib.sha256()
      while block := answer.read(_BLOCK):
        found.update(block)
        file.write(block)
      # Inside the block: raising here leaves nothing in the cache.
      if found.hexdigest() != digest:
        raise UserError(
          f"{name}: {url} has SHA-256 {found.hexdigest()}, not {digest}: it is "
          f"another file now; give a local copy with {key}"
        )
  except OSError as error:
    raise UserError(
      f"{name}: {url} can't be fetched ({error}); give a local copy with {key}"
    ) from error
  return path


def cached(url: str, digest: str) -> Path:
  """Returns where `download` keeps a file of this SHA-256."""
  return paths.cache() / "data" / digest[:16] / url.rpartition("/")[2]


def sha256(path: Path) -> str:
  """Computes the SHA-256 of a file's bytes, in hexadecimal.

  Raises:
    OSError: it can't be read.
  """
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def local_root(root: str, downloads: bool = True, key: str = ROOT) -> Path:
  """Returns the path of an existing file or folder.

  Args:
    root: its path.
    downloads: whether the data can be had without it, too.
    key: what gave it.

  Raises:
    UserError: there is nothing at `root`.
  """
  path = Path(root)
  if not path.exists():
    other = f", or leave {key} out to download it" if downloads else ""
    raise UserError(
      f"{key}={root}: no such file or folder; give the local copy's path{other}"
    )
  return path


def in_folder(folder: Path, stem: str) -> Path | None:
  """Finds the file called `stem` with a suffix that we read, or None."""
  paths = (folder / f"{stem}{suffix}" for suffix in SUFFIXES)
  return next((path for path in paths if path.is_file()), None)


def data_files(folder: Path) -> list[Path]:
  """Lists all files in a folder that we read, by name."""
  return sorted(
    path
    for path in folder.iterdir()
    if path.is_file() and path.name.endswith(SUFFIXES)
  )
