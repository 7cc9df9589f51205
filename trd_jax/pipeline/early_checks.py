"""Everything that a run will need, looked at before anything starts.

What is wrong with a teacher shows at the third stage, hours after the first
began; so the pipeline, its dry run and its preflight look at all that is still
to be done needs: both models, their ids, the benchmarks and problems, every
stage's interpreter, graders, the sandbox. It takes seconds, imports no JAX and
writes nothing (but for what `fetch` downloads).
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from trd_jax.experiment import findings, metric_sinks, printing
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import Experiment
from trd_jax.experiment.findings import Finding
from trd_jax.experiment.processes import interpreters
from trd_jax.experiment.run_dir import RunDir
from trd_jax.experiment.schema import Model
from trd_jax.pipeline import data_checks, model_checks
from trd_jax.pipeline.model_checks import Opened

_THREADS = 16
# What stages import; engines say it of themselves.
_SHARED: tuple[str, ...] = (
  *("trd_jax", "absl", "ml_collections", "numpy", "pyarrow"),
  *("tokenizers", "jinja2", "huggingface_hub"),
)
_LEARNING: tuple[str, ...] = ("jax", "flax", "optax", "orbax", "grain")
_GENERATING = ("rollout", "refine", "evaluate")


def enter(experiment: Experiment, run_dir: RunDir) -> None:
  """Checks all that a run will need, and refuses it where something lacks.

  Config and tokenizer of a hub id are downloaded for it.

  Raises:
    UserError: something is wrong or not there; one line, with all of it.
  """
  began = time.monotonic()
  results = look(experiment, run_dir, fetch=True)
  findings.refuse(results, "wrong", "missing")
  for one in results:
    if one.state in ("note", "unchecked"):
      prefix = "" if one.state == "note" else "not checked: "
      line = f"note: {prefix}{one.message}"
      print(printing.wrapped(line, sys.stdout), flush=True)
  if results:
    seconds = time.monotonic() - began
    checked = ", ".join(summary(experiment, results))
    print(f"checked: {checked} ({seconds:.1f} s)", flush=True)


def look(
  experiment: Experiment, run_dir: RunDir, *, fetch: bool = False
) -> list[Finding]:
  """Looks at all that the stages still to be done need.

  Args:
    experiment: what is to be run.
    run_dir: where, and what is done there.
    fetch: whether to download the small files of models that are on the hub;
      without, nothing is written anywhere.

  Returns:
    What was found, in a fixed order; mistakes are among it.
  """
  stages = ("evaluate/base", *experiment.stages, "evaluate/trained")
  if experiment.pipeline.round > 1 and not experiment.pipeline.evaluates:
    stages = experiment.stages
  left = [stage for stage in stages if run_dir.complete(stage) is None]
  if not left:
    return []
  jobs: list[Callable[[], Iterable[Finding]]] = []
  jobs.append(lambda: _models(experiment, run_dir, left, fetch))
  evaluates = any(stage.startswith("evaluate") for stage in left)
  reads = run_dir.complete("problems") is None and "rollout" in left
  # Benchmarks are read for training, too, where their questions are to be taken
  # out of it.
  cleans = reads and experiment.data.decontaminate != "none"
  for name in experiment.evaluate.benchmarks if evaluates or cleans else ():
    jobs.append(lambda name=name: data_checks.benchmark(experiment, name))
  jobs.append(lambda: data_checks.prompts(experiment, run_dir))
  jobs.append(lambda: data_checks.data(experiment, run_dir))
  jobs.append(lambda: data_checks.split(experiment, run_dir))
  for key, python, packages in _interpreters(experiment, left):
    jobs.append(lambda k=key, p=python, n=packages: _interpreter(k, p, n))
  python = experiment.python.of("evaluate" if evaluates else "rollout")
  jobs.append(lambda: data_checks.graders(experiment, evaluates, python))
  if "train" in left:
    jobs.append(lambda: data_checks.cache_dir(experiment))
  if "train" in left and experiment.train.teacher_dtype == "float8":
    jobs.append(model_checks.float8)
  if "merge" in left:
    jobs.append(lambda: data_checks.outputs(experiment, run_dir))
  for url in experiment.engine.chosen.addresses:
    jobs.append(lambda url=url: data_checks.server(url))
  # Each job mostly waits, for the hub or for an interpreter's imports: all at
  # once they take as long as the slowest. Results come in the order of the
  # jobs, whichever ends first.
  with ThreadPoolExecutor(_THREADS) as pool:
    futures = [
      pool.submit(lambda job=job: list(_findings_of(job))) for job in jobs
    ]
    return [one for future in futures for one in future.result()]


def _findings_of(job: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
  """Yields what a job finds; a mistake ends it and is a finding, too."""
  try:
    yield from job()
  except UserError as error:
    yield Finding("config", "wrong", " ".join(str(error).split()))


def _models(
  experiment: Experiment, run_dir: RunDir, left: Sequence[str], fetch: bool
) -> Iterator[Finding]:
  """Opens both models, side by side, and sees how they fit each other."""
  e = experiment
  sides: dict[str, Model] = {"student": e.student}
  if e.reads_own_teacher and {"refine", "train"} & set(left):
    sides["teacher"] = e.teacher
  with ThreadPoolExecutor(len(sides)) as pool:
    futures: dict[str, Future[Opened]] = {
      side: pool.submit(model_checks.open_model, side, model, run_dir, fetch)
      for side, model in sides.items()
    }
  opened: dict[str, Opened] = {}
  for side, future in futures.items():
    try:
      opened[side] = future.result()
    except UserError as error:
      message = " ".join(str(error).split())
      named = (
        message if message.startswith(f"{side}.") else f"{side}: {message}"
      )
      # The other model is looked at all the same: all mistakes are named
      # at once.
      yield Finding(side, "wrong", named)
      continue
    yield from opened[side].findings()
  student = opened.get("student")
  if student is None:
    return
  for one in opened.values():
    yield from _findings_of(lambda one=one: model_checks.system_turn(e, one))
  yield from _findings_of(lambda: model_checks.adapter(e, student))
  yield from _findings_of(lambda: model_checks.sizes(e, student))
  yield from model_checks.unmerged(e)
  # What compares two models says nothing where one can't be opened.
  if opened.keys() != sides.keys():
    return
  teacher = opened.get("teacher", student)
  yield from _findings_of(lambda: model_checks.compare(e, student, teacher))
  yield from model_checks.budgets(e, student, teacher)


def _interpreters(
  experiment: Experiment, left: Sequence[str]
) -> Iterator[tuple[str, str | None, dict[str, str]]]:
  """Yields each interpreter once: its key, itself, and what it must import."""
  e = experiment
  modules = list(dict.fromkeys(stage.partition("/")[0] for stage in left))
  if any(model.path.startswith("random:") for model in (e.student, e.teacher)):
    modules.append("convert")
  # By interpreter, however many keys name it: each takes seconds to start and
  # import.
  wanted: dict[str | None, tuple[str, dict[str, str]]] = {}
  named = interpreters.keys_of(modules, e.python)
  for module, (key, python) in named.items():
    packages = wanted.setdefault(python, (key, {}))[1]
    packages.update(_needs(e, module))
  for python, (key, packages) in wanted.items():
    yield key, python, packages


def _needs(experiment: Experiment, module: str) -> Mapping[str, str]:
  """Returns the modules that a stage imports, each with how to get it."""
  e = experiment
  needs = dict.fromkeys(_SHARED, interpreters.INSTALL)
  if module in _GENERATING:
    for packages in e.engine.packages.values():
      needs.update(packages)
  else:
    needs.update(dict.fromkeys(_LEARNING, interpreters.INSTALL))
  if module == "train":
    for name, kind in metric_sinks.requested(e.metrics).items():
      advice = f"pip install 'trd-jax[{name}]' there, or set"
      needs[kind.package] = f"{advice} metrics.{name}=False"
  return needs


def _interpreter(
  key: str, python: str | None, packages: Mapping[str, str]
) -> Iterator[Finding]:
  """Starts an interpreter and sees that it imports what it must."""
  try:
    version = interpreters.check(key, python, packages)
  except interpreters.NotMade as error:
    yield Finding("interpreters", "missing", str(error))
    return
  named = f"{key}: {python}" if python else "the pipeline's own"
  yield Finding("interpreters", "ok", f"{named}, {version}")


def summary(
  experiment: Experiment, results: Sequence[Finding]
) -> Iterator[str]:
  """Yields what was found to be well, in a few words each."""
  fine = [one.what for one in results if one.state == "ok"]
  for what in dict.fromkeys(fine):
    count = fine.count(what)
    if what in ("student", "teacher"):
      yield f"{what} {getattr(experiment, what).path}"
    elif what.endswith("s") and what != "problems":
      yield f"{count} {what if count > 1 else what.removesuffix('s')}"
    elif what != "vocabulary":
      yield what
