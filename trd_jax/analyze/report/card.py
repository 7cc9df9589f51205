"""The run's card: what was asked, how, at what cost, and what to beware of."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import trd_jax
from trd_jax.analyze.analysis import Result, registry
from trd_jax.analyze.report.escaping import text
from trd_jax.analyze.runs import Run
from trd_jax.experiment import alarms, experiment, metric_log, paper_recipe
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.experiment import KEYS, Experiment
from trd_jax.experiment.methods import (
  DIVERGENCES,
  TEACHER_CONTEXTS,
  TRAJECTORIES,
)
from trd_jax.experiment.progress import duration

_RECIPES = {"opd": ("1.7b", "4b"), "opsd": ("1.7b", "4b", "8b")}
# What says where and how a run is carried out, and nothing about its result.
_QUIET = ("engine.", "python.", "distributed.", "metrics.")
_JUDGED_BY = 12  # sentences on Avg@K and Pass@K, by benchmark and run


def html(run: Run, results: Mapping[str, Result]) -> str:
  """Returns a run's card as HTML.

  Args:
    run: the run.
    results: what analyses found, whose first findings the card says again; of
      the run that is compared with, none.
  """
  parts = [
    f'<p class="question">{text(question(run.config))}</p>',
    f'<p class="how-it-learns">{text(how(run.config))}</p>',
    _findings(results),
    _warnings(warnings(run)),
    '<div class="facts">',
    _fact("Settings", _settings(run.config)),
    _fact("Cost", _cost(run)),
    _fact("Made of", _made_of(run)),
    "</div>",
  ]
  return "\n".join(part for part in parts if part)


def question(config: Experiment) -> str:
  """Returns in words what a run asks."""
  return (
    f"Does {config.student.path} get better at {config.domain} by"
    f" {config.method}, in {config.regime.upper()}?"
  )


def how(config: Experiment) -> str:
  """Returns in words how a run's student learns, by its coordinates."""
  chosen = config.coordinates
  along = TRAJECTORIES[chosen.trajectory].meaning
  says = f"It learns along {chosen.trajectory}, {along}."
  if chosen.teacher_context is not None:
    teacher = config.teacher_model.path
    if config.regime == "opsd":
      teacher = "its own frozen base"
    says += (
      f" Its teacher is {teacher}, which reads"
      f" {TEACHER_CONTEXTS[chosen.teacher_context]}."
    )
  says += f" The loss is {DIVERGENCES[chosen.divergence].formula}"
  if chosen.token_weights:
    says += f", weighted by {chosen.token_weights}"
  if chosen.clip is not None:
    says += f", clipped at {chosen.clip:g} nats a token"
  return f"{says}."


def state(run: Run) -> str:
  """Returns how far a run is, `done` or which stages are missing."""
  wanted = [*run.config.stages]
  if run.config.evaluate.benchmarks and run.config.pipeline.evaluates:
    wanted += ["evaluate/base", "evaluate/trained"]
  missing = [stage for stage in wanted if run.state(stage) != "done"]
  if not missing:
    return "done"
  return f"partial: {', '.join(missing)} not finished"


def warnings(run: Run) -> list[str]:
  """Returns what to beware of, a line each."""
  found = []
  how_far = state(run)
  if how_far != "done":
    found.append(f"This run is {how_far}.")
  for stage in ("problems", *run.config.stages):
    try:
      run.done(stage)
    except UserError as error:
      found.append(str(error))
  try:
    fired = alarms.of_run(run.run_dir)
  except UserError as error:
    fired = []
    found.append(str(error))
  found += [one.line for one in fired]
  return list(dict.fromkeys(found))


def differing(config: Experiment) -> tuple[str, list[tuple[str, Any, Any]]]:
  """Returns which keys differ from the recipe, or from the defaults.

  Returns:
    The name of what they are compared with, and of each key its name, its value
    and the other's.
  """
  values = experiment.flat(config)
  against, base = "default", {n: key.default for n, key in KEYS.items()}
  if config.domain in paper_recipe.BENCHMARKS:
    near: tuple[int, dict[str, Any]] | None = None
    for model in _RECIPES[config.regime]:
      arg = f"model={model},domain={config.domain},method={config.method}"
      try:
        recipe = paper_recipe.build(config.regime, _RECIPES[config.regime], arg)
        other = experiment.flat(experiment.from_config(recipe))
      except UserError:  # no row of the paper's
        continue
      differ = sum(values[name] != other[name] for name in values)
      if near is None or differ < near[0]:
        near = differ, other
    if near is not None:
      against, base = "recipe", near[1]
  return against, [
    (name, value, base[name])
    for name, value in values.items()
    if value != base[name] and not name.startswith(_QUIET)
  ]


def _findings(results: Mapping[str, Result]) -> str:
  analyses = registry()
  items = []
  for name, result in results.items():
    if not result.findings:
      continue
    # What a run is judged by is said whole: the first sentence alone would be
    # of the first benchmark, and what got worse might stand below.
    said = result.findings[: _JUDGED_BY if name == "results" else 1]
    title = analyses[name].title if name in analyses else name
    items.append(
      f'<li><a href="#{text(name)}">{text(title)}</a>'
      f"<span>{'<br>'.join(map(text, said))}</span></li>"
    )
  if not items:
    return ""
  return (
    '<h3 class="eyebrow">What it found</h3>'
    f'<ul class="found">{"".join(items)}</ul>'
  )


def _warnings(lines: Sequence[str]) -> str:
  if not lines:
    return ""
  items = "".join(f"<li>{text(line)}</li>" for line in lines)
  return (
    f'<div class="warnings" role="note"><h3>Beware</h3><ul>{items}</ul></div>'
  )


def _fact(title: str, body: str) -> str:
  if not body:
    return ""
  return (
    f'<section class="fact"><h3 class="eyebrow">{title}</h3>{body}</section>'
  )


def _settings(config: Experiment) -> str:
  chosen = config.coordinates
  rows = [
    ("regime", config.regime),
    ("method", config.method),
    ("coordinates", chosen.describe()),
    ("student", config.student.path),
    ("teacher", config.teacher_model.path),
  ]
  made = _pairs(rows)
  against, keys = differing(config)
  known = {"regime", "method", "student.path", "teacher.path"}
  keys = [key for key in keys if key[0] not in known]
  if not keys:
    return f"{made}<p>Every other key has its {against}.</p>"
  lines = "".join(
    f'<tr><th scope="row"><code>{text(name)}</code></th>'
    f"<td>{text(_value(value))}</td><td>{text(_value(base))}</td></tr>"
    for name, value, base in keys
  )
  return (
    f"{made}<details><summary>{len(keys)} keys differ from the"
    f" {'paper’s recipe' if against == 'recipe' else 'defaults'}</summary>"
    '<div class="scroll"><table class="plain"><thead><tr><th scope="col">key'
    f'</th><th scope="col">here</th><th scope="col">{against}</th></tr></thead>'
    f"<tbody>{lines}</tbody></table></div></details>"
  )


def _value(value: Any) -> str:
  if isinstance(value, tuple):
    return ", ".join(value) or "none"
  return "none" if value is None else str(value)


def _cost(run: Run) -> str:
  seconds = {
    stage: spent
    for stage, spent in metric_log.seconds_by_stage(run.run_dir.timings).items()
    if spent
  }
  if not seconds:
    return ""
  whole = sum(seconds.values())
  most = max(seconds.values())
  rows = "".join(
    f'<tr><th scope="row">{text(stage)}</th><td>{duration(spent)}</td>'
    '<td class="bar"><svg viewBox="0 0 100 8" preserveAspectRatio="none"'
    ' aria-hidden="true">'
    f'<rect width="{100 * spent / most:.1f}" height="8" rx="1"/></svg>'
    "</td></tr>"
    for stage, spent in seconds.items()
  )
  made = (
    '<table class="plain cost"><caption class="unseen">Wall-clock time by stage'
    f'</caption><tbody>{rows}</tbody><tfoot><tr><th scope="row">all</th>'
    f"<td>{duration(whole)}</td><td></td></tr></tfoot></table>"
  )
  if tokens := dict(_tokens(run)):
    made += _pairs((f"tokens of {k}", f"{v:,}") for k, v in tokens.items())
  return made


def _tokens(run: Run) -> Iterator[tuple[str, int]]:
  for stage in ("rollout", "refine"):
    if run.run_dir.finished(stage):
      found = run.run_dir.record(stage).get("tokens")
      if isinstance(found, int):
        yield stage, found


def _made_of(run: Run) -> str:
  rows: list[tuple[str, str]] = [
    ("report by", f"trd-jax {trd_jax.__version__}, Python {_python()}"),
    ("workdir", str(run.workdir)),
  ]
  rows += _recorded(run)
  return _pairs(rows)


def _recorded(run: Run) -> Iterator[tuple[str, str]]:
  """Yields what stages recorded of versions, weights, data and rows."""
  weights: dict[str, str] = {}
  for stage in ("problems", *run.config.stages, "evaluate/base"):
    if not run.run_dir.finished(stage):
      continue
    try:
      record = run.run_dir.record(stage)
      left = run.run_dir.rows_left(stage)
    except UserError:
      continue  # among the warnings
    for name, fingerprint in (record.get("weights") or {}).items():
      weights.setdefault(str(name), str(fingerprint).partition(":")[0])
    for name, version in (record.get("versions") or {}).items():
      yield str(name), str(version)
    for name, file in (record.get("files") or {}).items():
      yield str(name), str(file)
    if left:
      yield (
        f"{stage} rows",
        f"{left.get('number', 0):,}, digest {str(left.get('digest'))[:12]}",
      )
  for name, revision in weights.items():
    yield f"weights {name}", revision[:12]


def _python() -> str:
  return platform.python_version()


def _pairs(rows: Any) -> str:
  lines = "".join(
    f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>"
    for name, value in rows
  )
  return f'<dl class="pairs">{lines}</dl>'
