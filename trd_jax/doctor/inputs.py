"""What a config reads: local files, and what the hub or its cache holds."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trd_jax import hub
from trd_jax.doctor import finding
from trd_jax.doctor.finding import Finding
from trd_jax.doctor.machine import Machine
from trd_jax.errors import UserError
from trd_jax.experiment import Experiment
from trd_jax.problems import benchmarks, deepscaler, sources, store, taco

_PROBE = "hub"
_SECONDS = 90.0
_CORPORA = {"deepscaler": deepscaler.HUB, "taco": taco.HUB}
_RANDOM = "random:"
# Asked for where no config names anything: whether the hub answers.
_ANY = {"repo": "Qwen/Qwen3-8B", "kind": "model", "revision": None}


def local(machine: Machine) -> Finding:
  """Checks that folders and files that the config names are there.

  Raises:
    UserError: one is not.
  """
  e, run_dir = machine.experiment, machine.workdir
  there = []
  for key, path in _model_paths(e):
    if path.startswith(_RANDOM) or _from_hub(path):
      continue
    if key.endswith("tokenizer"):
      hub.tokenizer_folder(path)
    else:
      hub.model_folder(path)
    there.append(path)
  files = {"student.adapter": e.student.adapter}
  for side, model in (("student", e.student), ("teacher", e.teacher_model)):
    files[f"{side}.chat_template"] = model.chat_template
  for key, path in files.items():
    if path is not None and not Path(path).expanduser().exists():
      raise UserError(f"{key}={path}: there is no such file; name one that is")
    if path is not None:
      there.append(path)
  store.check_files(e, run_dir)
  there += [root for root in (e.data.root, e.evaluate.root) if root]
  told = ", ".join(dict.fromkeys(there))
  return finding.ok(told or "the config names no local files")


def _model_paths(experiment: Experiment) -> Iterator[tuple[str, str]]:
  """Both models' and tokenizers' paths, by key."""
  sides = {"student": experiment.student, "teacher": experiment.teacher_model}
  for side, model in sides.items():
    yield f"{side}.path", model.path
    if model.tokenizer is not None:
      yield f"{side}.tokenizer", model.tokenizer


def _from_hub(path: str) -> bool:
  return not Path(path).expanduser().is_dir() and hub.is_hub_id(path)


def wanted(experiment: Experiment) -> list[dict[str, Any]]:
  """Returns what is to be had from the hub, as `hub_probe` takes it.

  Each has a `name` and, for people, the `key` that asks for it.
  """
  e = experiment
  found: dict[str, dict[str, Any]] = {}
  sides = {"student": e.student, "teacher": e.teacher_model}
  for side, model in sides.items():
    if _from_hub(model.path):
      found.setdefault(
        model.path,
        {
          "key": f"{side}.path",
          "repo": model.path,
          "kind": "model",
          "revision": model.revision,
          "patterns": list(hub.HUB_FILES),
          "needs": ["*.safetensors"],
        },
      )
    if model.tokenizer is not None and _from_hub(model.tokenizer):
      found.setdefault(
        model.tokenizer,
        {
          "key": f"{side}.tokenizer",
          "repo": model.tokenizer,
          "kind": "model",
          "revision": None,
          "patterns": list(hub.TOKENIZER_FILES),
          "needs": ["tokenizer.json"],
        },
      )
  for key, name, root in _data_sets(e):
    if root is not None:
      continue
    repositories, urls = [], []
    if name in _CORPORA:
      repositories = [(*_CORPORA[name], None)]
    elif name in benchmarks.BENCHMARKS:
      one = benchmarks.BENCHMARKS[name]
      repositories = [(h.repo_id, h.pattern, h.revision) for h in one.hub]
      urls = [(u, one.sha256[u.rpartition("/")[2]]) for u in one.urls]
    for repo, pattern, revision in repositories:
      found.setdefault(
        f"{repo} {pattern}",
        {
          "key": key,
          "repo": repo,
          "kind": "dataset",
          "revision": revision,
          "patterns": [pattern],
          "needs": [pattern],
        },
      )
    for url, digest in urls:
      kept = str(sources.cached(url, digest))
      found.setdefault(url, {"key": key, "url": url, "kept": kept})
  return [{"name": name, **one} for name, one in found.items()]


def _data_sets(experiment: Experiment) -> Iterator[tuple[str, str, str | None]]:
  """Key, canonical name and local root of each data set that is read."""
  data, section = experiment.data, experiment.evaluate
  yield "data.source", benchmarks.canonical(data.source), data.root
  for name in section.benchmarks:
    called = benchmarks.canonical(name)
    if called == "livecodebench" and section.livecodebench == "v6":
      called = "livecodebenchv6"
    yield "evaluate.benchmarks", called, section.root


def begin_hub(machine: Machine) -> None:
  """Starts asking."""
  files = wanted(machine.experiment)
  if not files:
    files = [{**_ANY, "patterns": [], "needs": ["config.json"]}]
  what = "trd_jax.doctor.hub_probe"
  asked = {"files": files}
  machine.start(_PROBE, sys.executable, what, asked, seconds=_SECONDS)


def from_hub(machine: Machine) -> Finding:
  """Checks that what the config names is in the cache or can be fetched."""
  begin_hub(machine)
  facts = machine.result(_PROBE)
  if "failure" in facts:
    return finding.failed(facts["failure"], "see that the network answers")
  return judge_hub(wanted(machine.experiment), facts["answers"])


def by_hub(experiment: Experiment) -> bool:
  """Whether an experiment reads anything that may come from the hub."""
  return bool(wanted(experiment))


def judge_hub(
  files: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]
) -> Finding:
  """Judges what can be had.

  Args:
    files: as `wanted` gives them; empty where nothing is wanted, and one
      answer says whether the hub is there at all.
    answers: of `hub_probe`.
  """
  if not files:
    if answers[0]["cached"] or not answers[0]["error"]:
      return finding.ok("the hub answers, or its cache does")
    return finding.warning(
      f"the hub doesn't answer ({answers[0]['error']})",
      "name local copies in the config, or fill the cache beforehand",
    )
  pairs = list(zip(files, answers, strict=True))
  wrong = [(f, a["error"]) for f, a in pairs if not a["cached"] and a["error"]]
  if wrong:
    names = ", ".join(f"{f['key']}: {f['name']}" for f, _ in wrong)
    return finding.failed(
      f"neither in the cache nor to be fetched: {names} ({wrong[0][1]})",
      "correct the name, let the machine out to the hub (a gated one needs"
      " HF_TOKEN), fill its cache where there is a network, or name local"
      " copies",
    )
  ready = [f["name"] for f, a in pairs if a["cached"]]
  fetch = [f["name"] for f, a in pairs if not a["cached"]]
  told = [
    *([f"in the cache: {', '.join(ready)}"] if ready else []),
    *([f"to be fetched: {', '.join(fetch)}"] if fetch else []),
  ]
  return finding.ok("; ".join(told))
