"""A child that asks whether files of the hub are, or can be, had.

Asked are `files`: dictionaries of `repo`, `kind` (model or dataset),
`revision`, `patterns`, and `needs`, one of which must be there; or of `url` and
`kept`, the path that it is kept at. To each, `answers` has `cached`, and where
it isn't, `error`: why it can't be fetched, or ''. Nothing is downloaded.
"""

import fnmatch
import json
import urllib.request
from pathlib import Path
from typing import Any

from trd_jax.doctor.probe import Facts, Tell, answer
from trd_jax.errors import one_line

_SECONDS = 5.0


def cached(asked: dict[str, Any]) -> bool:
  """Whether a snapshot of a repository is here, with what is needed of it."""
  from huggingface_hub import snapshot_download

  try:
    folder = Path(
      snapshot_download(
        asked["repo"],
        repo_type=asked["kind"],
        revision=asked["revision"],
        allow_patterns=asked["patterns"],
        local_files_only=True,
      )
    )
  except Exception:  # it says in many ways that there is none
    return False
  names = [
    path.relative_to(folder).as_posix()
    for path in folder.rglob("*")
    if path.is_file()
  ]
  if not any(fnmatch.filter(names, pattern) for pattern in asked["needs"]):
    return False
  # Weights in several files are there when all of them are.
  for index in folder.glob("*.safetensors.index.json"):
    wanted = json.loads(index.read_text())["weight_map"].values()
    if not set(wanted) <= set(names):
      return False
  return True


def unreachable(asked: dict[str, Any]) -> tuple[str, bool]:
  """Asks for what is known of a repository.

  Returns:
    Why it can't be had, or '', and whether anybody answered.
  """
  from huggingface_hub import HfApi, constants
  from huggingface_hub.errors import HfHubHTTPError

  if constants.HF_HUB_OFFLINE:
    return "HF_HUB_OFFLINE is set", False
  api = HfApi()
  ask = api.model_info if asked["kind"] == "model" else api.dataset_info
  try:
    ask(asked["repo"], revision=asked["revision"], timeout=_SECONDS)
  except HfHubHTTPError as error:
    return one_line(error), True
  except Exception as error:  # whatever happens between here and the hub
    return one_line(error), False
  return "", True


def unreachable_url(url: str) -> str:
  """Asks for a file's head; why there is no answer, or ''."""
  try:
    request = urllib.request.Request(url, method="HEAD")
    urllib.request.urlopen(request, timeout=_SECONDS).close()
  except (OSError, ValueError) as error:
    return one_line(error)
  return ""


def examine(asked: Facts, tell: Tell) -> None:
  """Asks for each."""
  answers = []
  silence = ""  # why nobody answers at the hub: it is not asked again then
  for one in asked["files"]:
    url = one.get("url")
    here = cached(one) if url is None else Path(one["kept"]).is_file()
    found: dict[str, Any] = {"cached": here}
    if not here and url is not None:
      found["error"] = unreachable_url(url)
    elif not here:
      why, answered = (silence, False) if silence else unreachable(one)
      found["error"] = why
      silence = "" if answered else why
    answers.append(found)
  tell(answers=answers)


if __name__ == "__main__":
  answer(examine)
