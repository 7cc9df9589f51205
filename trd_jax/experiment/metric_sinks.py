"""Further places for metrics, behind one door.

TensorBoard, Weights & Biases, trackio and MLflow get the rows of training's
metrics and the figures of the stages, under grouped names: `train/loss`,
`rollout/accuracy`, `evaluate/arithmetic/avg_at_k`. A run has one page in each,
which is found again when the run goes on. Unless the user's own settings say
otherwise all of it stays in the workdir or is the tracker's own business; what
counts is the JSON lines beside (`metric_log`).

To add one: a class with the methods of `Sink`, an entry of `SINKS`, and its
keys in the config's section `metrics`.
"""

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from trd_jax.experiment.errors import UserError, one_line
from trd_jax.experiment.records import content_key
from trd_jax.experiment.schema import Metrics


class Sink(Protocol):
  """A further place for metrics."""

  def begin(self, start_step: int) -> None:
    """Is called once, with the step of the first row to come."""
    ...

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Takes numbers by grouped name, finite ones."""
    ...

  def close(self) -> None:
    """Ends it."""
    ...


class Page(NamedTuple):
  """Which run a sink writes about.

  Attributes:
    folder: of training, where a sink may keep files.
    name: of the run's workdir.
    id: the same as long as the workdir stays where it is.
    config: every key of the run with its value.
    metrics: the section that asks for the sink.
  """

  folder: Path
  name: str
  id: str
  config: Mapping[str, Any]
  metrics: Metrics


class Kind(NamedTuple):
  """A kind of sink: an entry of `SINKS`.

  Attributes:
    package: what it imports, and what pip calls it.
    open: opens it; its errors are made `UserError`s here.
    title: what people call it.
    remedy: what helps where it refuses a run.
  """

  package: str
  open: Callable[[Any, Page], Sink]
  title: str
  remedy: str


def open_sinks(
  path: Path, metrics: Metrics, config: Mapping[str, Any] | None = None
) -> list[Sink]:
  """Opens the further places that are requested, seen to be usable.

  Args:
    path: the JSON lines of training, in the workdir's folder of it.
    metrics: says which.
    config: what the run is shown with there.

  Raises:
    UserError: one that was asked for is not installed, or refuses the run.
  """
  # MLflow tells its makers what it is used for, unless it is told not to.
  os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
  workdir = path.resolve().parent.parent
  key = content_key(str(workdir))[:8]
  page = Page(path.parent, workdir.name, key, dict(config or {}), metrics)
  return [_open(name, page) for name in requested(metrics)]


def _open(name: str, page: Page) -> Sink:
  """Opens one of `SINKS`; its errors are as `open_sinks`'s."""
  kind = SINKS[name]
  try:
    module = importlib.import_module(kind.package)
  except ImportError:
    raise UserError(
      f"metrics.{name} needs {kind.package}: pip install 'trd-jax[{name}]', or"
      " set it to False"
    ) from None
  try:
    page.folder.mkdir(parents=True, exist_ok=True)
    return kind.open(module, page)
  except Exception as error:
    raise UserError(
      f"metrics.{name}: {kind.title} refuses the run ({one_line(error)});"
      f" {kind.remedy}, or set the key to False"
    ) from error


def requested(metrics: Metrics) -> dict[str, Kind]:
  """Returns the kinds of sinks that a config asks for, by their key."""
  return {name: kind for name, kind in SINKS.items() if getattr(metrics, name)}


def write_figures(
  path: Path,
  metrics: Metrics,
  config: Mapping[str, Any],
  step: int,
  figures: Mapping[str, float],
) -> None:
  """Writes the figures of a stage that has ended, of whose rows none is lost.

  A tracker that can't be had costs a note and not the stage.

  Args:
    path: as `open_sinks`; so are the next two.
    metrics: says which.
    config: what the run is shown with.
    step: updates that the figures are of.
    figures: by grouped name.
  """
  for name in requested(metrics):
    alone = Metrics(
      **{**vars(metrics), **dict.fromkeys(SINKS, False), name: True}
    )
    try:
      (sink,) = open_sinks(path, alone, config)
      with contextlib.closing(sink):
        sink.begin(step)
        sink.write(step, figures)
    except UserError as error:
      print(f"note: {error}", flush=True)
    except Exception as error:
      print(
        f"note: metrics.{name}: the figures aren't there ({one_line(error)})",
        flush=True,
      )


class _TensorBoard:
  """Event files; steps from `start_step` on replace older ones."""

  def __init__(self, module: Any, page: Page):
    self._module, self._folder = module, page.folder / "tensorboard"
    self._writer: Any = None

  def begin(self, start_step: int) -> None:
    self._writer = self._module.SummaryWriter(
      str(self._folder), purge_step=start_step
    )

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
      self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()


class _Wandb:
  """A run of Weights & Biases, found again by its id."""

  def __init__(self, module: Any, page: Page):
    self._run = module.init(
      dir=str(page.folder),
      project=page.metrics.wandb_project,
      id=page.id,
      name=page.name,
      resume="allow",
      config=dict(page.config),
    )

  def begin(self, start_step: int) -> None:
    """Does nothing: the run itself knows up to which step it has rows."""

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    self._run.log(dict(metrics), step=step)

  def close(self) -> None:
    self._run.finish()


class _Trackio:
  """A run of trackio, found again by its name.

  It lies where trackio keeps runs on this machine (TRACKIO_DIR), or where the
  user's TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say.
  """

  def __init__(self, module: Any, page: Page):
    self._run = module.init(
      project=page.metrics.trackio_project,
      # By its name alone it is found: two workdirs may be called alike.
      name=f"{page.name}-{page.id}",
      config=dict(page.config),
      resume="allow",
      embed=False,
      auto_log_cpu=False,
      auto_log_gpu=False,
    )

  def begin(self, start_step: int) -> None:
    """Does nothing: trackio keeps the rows that it has."""

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    self._run.log(dict(metrics), step=step)

  def close(self) -> None:
    self._run.finish()


class _Mlflow:
  """A run of MLflow, found again by a tag."""

  _TAG = "trd_jax.run"
  _MOST = 100  # parameters that a call may bring

  def __init__(self, module: Any, page: Page):
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    artifacts = None
    if not uri:
      folder = page.folder.resolve() / "mlflow"
      folder.mkdir(exist_ok=True)
      # Its own default is a file of the folder that the command was typed in.
      uri = f"sqlite:///{folder / 'mlflow.db'}"
      artifacts = (folder / "artifacts").as_uri()
    self._module = module
    self._client = module.MlflowClient(tracking_uri=uri)
    name = page.metrics.mlflow_experiment
    known = self._client.get_experiment_by_name(name)
    experiment = (
      known.experiment_id
      if known is not None
      else self._client.create_experiment(name, artifact_location=artifacts)
    )
    found = self._client.search_runs(
      [experiment], f"tags.`{self._TAG}` = '{page.id}'"
    )
    if found:
      self._id = found[0].info.run_id
      self._client.update_run(self._id, status="RUNNING")
    else:
      self._id = self._begin(experiment, page)

  def _begin(self, experiment: str, page: Page) -> str:
    """Makes a run, with its parameters: these can't be changed afterwards."""
    run = self._client.create_run(
      experiment, run_name=page.name, tags={self._TAG: page.id}
    )
    parameters = [
      self._module.entities.Param(name, str(value)[:500])
      for name, value in page.config.items()
    ]
    for at in range(0, len(parameters), self._MOST):
      some = parameters[at : at + self._MOST]
      self._client.log_batch(run.info.run_id, params=some)
    return run.info.run_id

  def begin(self, start_step: int) -> None:
    """Does nothing: MLflow keeps the rows that it has."""

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    now = round(1000 * time.time())
    self._client.log_batch(
      self._id,
      metrics=[
        self._module.entities.Metric(name, float(value), now, step)
        for name, value in metrics.items()
      ],
    )

  def close(self) -> None:
    self._client.set_terminated(self._id)


SINKS: dict[str, Kind] = {
  "tensorboard": Kind(
    "tensorboardX", _TensorBoard, "TensorBoard", "look at its message"
  ),
  "wandb": Kind(
    "wandb",
    _Wandb,
    "Weights & Biases",
    "set WANDB_API_KEY or call wandb login, set WANDB_MODE=offline",
  ),
  "trackio": Kind(
    "trackio",
    _Trackio,
    "trackio",
    "look at TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL",
  ),
  "mlflow": Kind("mlflow", _Mlflow, "MLflow", "look at MLFLOW_TRACKING_URI"),
}
"""All kinds, by the key of the section `metrics` that asks for one."""
