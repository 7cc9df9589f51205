"""Benchmarks, problems and graders, found before anything starts."""

import contextlib
import functools
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from trd_jax.data import problems
from trd_jax.data.problems import (
  benchmarks,
  parts,
  questions,
  rows,
  sources,
  store,
)
from trd_jax.data.problems.sources import Source
from trd_jax.data.prompts import of_run
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import LAB_BENCHMARKS, Experiment
from trd_jax.experiment.findings import Finding
from trd_jax.experiment.processes import interpreters
from trd_jax.experiment.prompt_sets import DEFAULT
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Data
from trd_jax.grading import graders as judges
from trd_jax.grading.grader_protocol import Environment
from trd_jax.grading.sandbox import sandbox
from trd_jax.model.weights import hub_look, peft
from trd_jax.model.weights.model_folder import check_replaceable

_SECONDS = 5.0
_MOST_BYTES = 1 << 26  # of files whose rows are counted: a second or two
# Rows of the public data sets.
_KNOWN_ROWS = {"deepscaler": 40_308, "taco": 25_443}


def benchmark(experiment: Experiment, name: str) -> Iterator[Finding]:
  """Finds the files of a benchmark; asks for those to be fetched.

  Raises:
    UserError: an unknown name, or a file that isn't there.
  """
  if name in LAB_BENCHMARKS:
    yield Finding("benchmarks", "ok", f"{name}, made here")
    return
  section = experiment.evaluate
  canonical = questions.canonical_name(experiment, name)
  if section.root is not None:
    benchmarks.find(canonical, section.root, questions.ROOT)
    yield Finding("benchmarks", "ok", f"{name}, in {section.root}")
    return
  absent = list(_absent_files(benchmarks.source(canonical), name))
  yield from absent or [Finding("benchmarks", "ok", name)]


def data(experiment: Experiment, run_dir: RunDir) -> Iterator[Finding]:
  """Finds what the problems are read from, unless they have been read.

  Raises:
    UserError: there is no such source or part of one, or a local file isn't
      there or has changed.
  """
  store.check_files(experiment, run_dir)
  if run_dir.complete(store.STAGE) is not None:
    yield Finding("problems", "ok", f"read before, in {run_dir.problems_dir}")
    return
  section = experiment.data
  source = problems.check(section)
  absent: list[Finding] = []
  if section.root is None:
    absent += _absent_files(
      source, f"data.source={benchmarks.canonical(section.source)}"
    )
  where = f", {section.root}" if section.root else ""
  yield from absent or [Finding("problems", "ok", section.source + where)]


def num_problems(experiment: Experiment) -> int | None:
  """Returns how many problems there are, at most; None where nothing says.

  The rows of a file of one's own are counted, unless it is large.
  """
  data = experiment.data
  known = _KNOWN_ROWS.get(data.source)
  if data.source == "arithmetic":
    known = data.arithmetic.num_problems
  elif is_counted(data):
    known = _num_rows(tuple(_about_files(data)))
  if data.limit is None:
    return known
  return data.limit if known is None else min(data.limit, known)


def is_counted(data: Data) -> bool:
  """Returns whether the problems' rows are counted before they are read.

  That is where they come from files of one's own that take little time.
  """
  about = list(_about_files(data)) if data.source == "jsonl" else []
  return bool(about) and sum(size for _, size, _ in about) <= _MOST_BYTES


def _about_files(data: Data) -> Iterator[tuple[Path, int, int]]:
  """Yields each local file, with its bytes and when it was changed."""
  # What is wrong with them is another finding.
  with contextlib.suppress(UserError, OSError):
    for path in problems.local_files(data):
      about = path.stat()
      yield path, about.st_size, about.st_mtime_ns


@functools.cache
def _num_rows(files: tuple[tuple[Path, int, int], ...]) -> int | None:
  """Counts the rows of files; None where one can't be read.

  They are asked for several times, and read once as long as they don't change.
  """
  try:
    return sum(1 for path, _, _ in files for _ in rows.read(path))
  except UserError:
    return None


def split(experiment: Experiment, run_dir: RunDir) -> list[Finding]:
  """Sees that there are problems enough for all split rounds.

  Raises:
    UserError: there are not.
  """
  # Before they are read it is the most that there can be; then once more.
  done = run_dir.complete(store.STAGE) or {}
  count = done.get("problems", num_problems(experiment))
  if experiment.pipeline.parts > 1 and count is not None:
    parts.cuts(experiment, count)
  return []


def prompts(experiment: Experiment, run_dir: RunDir) -> Iterator[Finding]:
  """Reads a prompt set that the config names.

  Raises:
    UserError: see `data.prompts.of_run`.
  """
  read = of_run(experiment, run_dir)
  # What ships with the program isn't worth a word.
  if experiment.prompts.set != DEFAULT:
    named = f"{experiment.prompts.set}, version {read.version}"
    yield Finding("wording", "ok", named)


def graders(
  experiment: Experiment, graded: bool, python: str | None
) -> Iterator[Finding]:
  """Finds what programs are run in and judged by, where any are.

  Args:
    experiment: its benchmarks and interpreters.
    graded: whether answers to benchmarks are still to be judged.
    python: the interpreter of the stage that runs programs.

  Raises:
    UserError: a named interpreter isn't one.
  """
  e = experiment
  names = judges.of_benchmarks(e.evaluate.benchmarks if graded else (), e)
  if e.domain == "code" and e.grades:
    names.append(judges.of_domain(e.domain))
  for grader in (judges.GRADERS[name] for name in names):
    if grader.environment is not None:
      yield from _environment(grader.environment, e)
  programs = any(judges.GRADERS[name].runs_programs for name in names)
  if programs and not e.sandbox.unsafe:
    try:
      sandbox.open(python=e.sandbox.python or python)
      yield Finding("sandbox", "ok", "bubblewrap works")
    except UserError as error:
      yield Finding("sandbox", "missing", str(error))


def _environment(needs: Environment, e: Experiment) -> Iterator[Finding]:
  """Tries the interpreter of an environment that a grader has to itself."""
  key, path = f"python.{needs.field}", needs.named(e) or needs.python
  script = (
    f"third_party/{needs.package}/install.sh makes an environment with it"
  )
  try:
    least = (3, 9)
    version = interpreters.check(key, path, {needs.package: script}, least)
    yield Finding("interpreters", "ok", f"{key}: {path}, {version}")
  except interpreters.NotMade as error:
    yield Finding("interpreters", "missing", str(error))


def outputs(experiment: Experiment, run_dir: RunDir) -> Iterator[Finding]:
  """Checks that nothing of a user's is where the merge will write.

  Raises:
    UserError: something is.
  """
  check_replaceable(run_dir.adapter, compared_later=peft.FILES)
  if experiment.engine.weights == "merged":
    check_replaceable(run_dir.merged)
  # Finds nothing, but is a generator as the other jobs are.
  yield from ()


def cache_dir(experiment: Experiment) -> Iterator[Finding]:
  """Checks that the teacher's hidden states can be kept where they will be.

  Raises:
    UserError: the folder can't be made or written.
  """
  train = experiment.train
  if train.teacher != "hidden_cache" or train.cache_dir is None:
    return
  path = Path(train.cache_dir).absolute()
  there = next(one for one in (path, *path.parents) if os.path.lexists(one))
  if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
    why = "can't be written" if there.is_dir() else "is no folder"
    raise UserError(
      f"train.cache_dir={train.cache_dir}: {there} {why}; name another folder"
    )
  yield Finding("cache", "ok", train.cache_dir)


def server(url: str) -> Iterator[Finding]:
  """Says whether a server answers; one that is still to come may not."""
  # Without the environment's proxy: it can't reach a server of one's own, and
  # would answer in its stead.
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  try:
    direct.open(f"{url.rstrip('/')}/health", timeout=_SECONDS).close()
  except urllib.error.HTTPError:
    pass  # it answers
  except (OSError, ValueError) as error:
    why = getattr(error, "reason", error)
    message = f"{url} doesn't answer yet ({why})"
    yield Finding("servers", "note", message)
    return
  yield Finding("servers", "ok", url)


def _absent_files(source: Source, name: str) -> Iterator[Finding]:
  """Looks for what is to be downloaded for a source, each data set once."""
  patterns: dict[tuple[str, str | None], list[str]] = {}
  for one in source.hub:
    patterns.setdefault((one.repo_id, one.revision), []).append(one.pattern)
  for (repo_id, revision), wanted in patterns.items():
    yield from _of_hub(repo_id, revision, wanted, name)
  yield from _of_web(source, name)


def _of_hub(
  repo_id: str, revision: str | None, patterns: Sequence[str], name: str
) -> Iterator[Finding]:
  """Looks for a data set's files in the cache, else on the hub."""
  folder = hub_look.cached(repo_id, revision, "dataset")
  if folder is not None:
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*")]
    there = hub_look.Listing(tuple(files))
    # An earlier download may have brought some of its files only.
    if all(map(there.has, patterns)):
      return
  try:
    listing = hub_look.look(repo_id, revision, "dataset", name)
  except hub_look.Unreachable as error:
    yield _absent(name, f"the hub can't be asked for it ({error})")
    return
  for pattern in patterns:
    if not listing.has(pattern):
      raise UserError(f"{name}: {repo_id} on the hub has no {pattern}")


def _of_web(source: Source, name: str) -> Iterator[Finding]:
  """Asks for the heads of a source's files that aren't cached."""
  for url, digest in source.urls.items():
    if sources.cached(url, digest).is_file():
      continue
    request = urllib.request.Request(url, method="HEAD")
    try:
      urllib.request.urlopen(request, timeout=_SECONDS).close()
    except OSError as error:
      yield _absent(name, f"{url} can't be had ({error})")


def _absent(name: str, why: str) -> Finding:
  of_problems = name.startswith("data.")
  key = "data.root" if of_problems else questions.ROOT
  message = f"{name} is not on this machine, and {why}; give a local copy with"
  what = "problems" if of_problems else "benchmarks"
  return Finding(what, "missing", f"{message} {key}")
