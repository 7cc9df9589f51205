"""Asks the Hugging Face hub with one small request what a repository holds.

HF_ENDPOINT, HF_HUB_OFFLINE, tokens and proxies hold as for every download.
"""

import fnmatch
from pathlib import Path
from typing import Literal, NamedTuple

from trd_jax.experiment.errors import UserError, one_line

Kind = Literal["model", "dataset"]
_SECONDS = 5.0  # until the hub counts as out of reach


class Unreachable(Exception):
  """The hub can't be asked from here; the message says why."""


class Listing(NamedTuple):
  """What the hub says of a repository.

  Attributes:
    files: paths in it.
    architectures: of a model, as its config.json has them, if the hub says.
  """

  files: tuple[str, ...]
  architectures: tuple[str, ...] = ()

  def has(self, pattern: str) -> bool:
    """Returns whether a file matches a pattern whose `*` crosses folders."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in self.files)


def look(repo_id: str, revision: str | None, kind: Kind, key: str) -> Listing:
  """Asks the hub about a repository, and downloads nothing.

  Args:
    repo_id: as `Qwen/Qwen3-8B`.
    revision: a commit, tag or branch; None: the newest.
    kind: what it holds.
    key: the config's key that names it, for the error.

  Raises:
    UserError: the hub knows no such repository or revision, or refuses it.
    Unreachable: the hub can't be asked.
  """
  # Slow to import, and only needed here.
  from huggingface_hub import HfApi, errors

  at = f" at {revision}" if revision else ""
  try:
    api = HfApi()
    ask = api.model_info if kind == "model" else api.dataset_info
    info = ask(repo_id, revision=revision, timeout=_SECONDS)
    if getattr(info, "gated", None):
      # A gated repository shows its files to everybody and gives them to few:
      # without this the download would fail hours later.
      api.auth_check(repo_id, repo_type=kind)
  # Gated first: the hub's error for it is a subclass of the one for an unknown
  # repository.
  except errors.GatedRepoError:
    raise UserError(
      f"{key}: the hub gives {repo_id} to those alone who were granted access;"
      " ask for it on its page, and set HF_TOKEN"
    ) from None
  except errors.RevisionNotFoundError:
    raise UserError(
      f"{key}: {repo_id} on the hub has no revision {revision}; name one of its"
      " commits, tags or branches, or leave the revision out"
    ) from None
  except errors.RepositoryNotFoundError:
    raise UserError(
      f"{key}: the hub has no {kind} {repo_id}, or shows it to others alone"
    ) from None
  except errors.HFValidationError as error:
    raise UserError(f"{key}: {one_line(error)}") from None
  except Exception as error:  # whatever happens between here and the hub
    raise Unreachable(f"{repo_id}{at}: {one_line(error)}") from error
  config = getattr(info, "config", None) or {}
  return Listing(
    tuple(sibling.rfilename for sibling in info.siblings or ()),
    tuple(config.get("architectures") or ()),
  )


def cached(
  repo_id: str, revision: str | None, kind: Kind = "model"
) -> Path | None:
  """Returns the folder of what is cached of a repository, None for nothing."""
  from huggingface_hub import snapshot_download

  try:
    return Path(
      snapshot_download(
        repo_id, repo_type=kind, revision=revision, local_files_only=True
      )
    )
  except Exception:  # not there, or no name of a repository
    return None


def known(kind: Kind = "model") -> list[str]:
  """Returns the names of all repositories of which something is cached."""
  from huggingface_hub import constants

  # The cache names a folder models--ORGANISATION--NAME.
  folders = Path(constants.HF_HUB_CACHE).glob(f"{kind}s--*--*")
  return sorted("/".join(f.name.split("--")[1:]) for f in folders)
