"""Prefix failure measured on a small workdir, and what is made of it."""

import dataclasses
import json
import random
import shutil

import numpy as np
import pytest

from tests.support import training_runs
from trd_jax.analyze import (
  formats,
  look,
  prefix_failure,
  prefix_result,
  prefix_summary,
)
from trd_jax.analyze.analyses.prefix_failure import ANALYSIS
from trd_jax.analyze.failed_prefixes import Prefix
from trd_jax.analyze.prefix_gradients import Products
from trd_jax.analyze.runs import Run
from trd_jax.data.chat import Chat
from trd_jax.data.problems import arithmetic
from trd_jax.data.prompts import default
from trd_jax.experiment import experiment
from trd_jax.experiment.errors import UserError
from trd_jax.experiment.records import NOT_GRADED
from trd_jax.experiment.run_dir import RunDir
from trd_jax.lab import corpus
from trd_jax.model.weights import hub

STUDENT = "lab:student"
COUNT = 10


def chosen(**changes):
  config = experiment.default_config()
  config.update_from_flattened_dict(
    {"student.path": STUDENT, "data.arithmetic.num_problems": COUNT} | changes
  )
  return experiment.from_config(config)


def workdir(root, domain="arithmetic", **of_rollouts) -> RunDir:
  """Drafts that a fallible writer wrote, and references as refined drafts."""
  chat = Chat.load(hub.model_folder(STUDENT))
  revision = hub.model_revision(hub.model_folder(STUDENT))
  writer = arithmetic.Writer(corpus.RECIPES["student"].solver.slip, caught=0.0)
  run_dir = RunDir(root, experiment.to_json(chosen(domain=domain)))
  problems = arithmetic.generate("train", COUNT, seed=0)
  training_runs.write(run_dir, "problems", problems)
  rng = random.Random(1)
  rows = {"rollout": [], "refine": []}
  for number, problem in enumerate(problems):
    chain = _chain(problem)
    draft = arithmetic.write(chain, writer, rng)
    draft = chain.solution if number % 3 == 0 else draft
    answers = f"\\boxed{{{problem.answer}}}"
    texts = {"rollout": draft, "refine": chain.solution}
    for stage, text in texts.items():
      message = default().initial(problem)
      if stage == "refine":
        message = default().refinement(problem, draft, "opsd")
      fields = {
        "prompt_ids": chat.render(message, None),
        "response_ids": [*chat.encode(text), chat.stop_ids[0]],
        "text": text,
        "correct": text.endswith(answers),
        "model_revision": revision,
      }
      if stage == "rollout":
        fields |= of_rollouts
      rows[stage].append(
        training_runs.trajectory(chat, problem, stage, number, **fields)
      )
  for stage, made in rows.items():
    training_runs.write(run_dir, stage, made)
  return run_dir


def _chain(problem):
  from trd_jax.data.problems import arithmetic_steps

  chain = arithmetic_steps.parse(problem.text)
  assert chain is not None
  return chain


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """A workdir that was measured in batches of two, the last one not full."""
  run_dir = workdir(tmp_path_factory.mktemp("run") / "w")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prefix_failure, "_ROWS", 2)
    prefix_failure.measure(chosen(), run_dir, number=1, seeds=(0, 1))
    yield run_dir


def rows(result, table, **wanted):
  return [
    row
    for row in result[table]
    if all(row[name] == value for name, value in wanted.items())
  ]


@pytest.mark.slow
def test_what_is_measured_fits_together(measured):
  result = prefix_result.load(measured)
  assert result is not None
  counts = result["counts"]
  assert counts["drafts"] == COUNT
  assert counts["wrong_drafts"] + counts["right_drafts"] == COUNT
  assert 1 <= counts["failed"] <= 2
  assert counts["failed_prefixes"] >= counts["failed"]
  assert result["made_of"]["teacher_contexts"] == {
    "y_o": "x_reference",
    "y_r": "refine",
  }
  # A right draft's end is its right path: the same pairs, so the same
  # gradient; of the refined draft, which is the reference too, only the
  # teacher's context differs.
  for name, reference in (("forward_after", "ideal"), ("trd", "avoid")):
    (right,) = rows(
      result,
      "cosines",
      group="right",
      gradient=name,
      reference=reference,
      part="all",
    )
    (failed,) = rows(
      result,
      "cosines",
      group="failed",
      gradient=name,
      reference=reference,
      part="all",
    )
    assert right["cosine"]["mean"] > 0.5
    assert right["cosine"]["n"] == counts["right"]
    assert failed["cosine"]["mean"] < right["cosine"]["mean"] or name == "trd"
  for row in result["cosines"]:
    cosine = row["cosine"]
    assert -1.001 <= cosine["low"] <= cosine["mean"] <= cosine["high"] <= 1.001
  # Masses of exclusive tokens are one distribution's.
  for row in result["modes"]:
    if row["place"] == "line":
      masses = [row[k]["mean"] for k in ("continue", "onset", "right")]
      assert 0 < sum(masses) <= 1.0001
    if row["place"] == "value" and row["distance"] == [0, 0]:
      assert row["right"] == row["consistent"]
  for group in ("failed", "right"):
    shares = rows(result, "divergence", group=group, divergence="forward_kl")
    assert sum(row["share"]["mean"] for row in shares) == pytest.approx(
      1, abs=1e-4
    )


@pytest.mark.slow
def test_the_same_call_finds_the_same(measured):
  before = prefix_result.path(measured).read_text()
  again = prefix_failure.measure(chosen(), measured, number=1, seeds=(0, 1))
  first = json.loads(before)
  for result in (first, again):
    result.pop("seconds")
  assert json.loads(json.dumps(again)) == first


@pytest.mark.slow
def test_the_analysis_shows_what_was_measured(measured, tmp_path):
  result = prefix_result.load(measured)
  made = ANALYSIS.make([Run(measured.root)])
  assert result is not None
  assert made is not None
  assert made.partial is None
  counts = result["counts"]
  assert f"{counts['failed']} of them were measured" in made.findings[0]
  for table in made.tables:
    assert table.rows
    assert {len(row) for row in table.rows} == {len(table.columns)}
    formats.to_csv(table)
    formats.to_latex(table)
  for figure in made.figures:
    assert figure.described
    assert len(look.svg(figure.draw())) < 60_000
  # Numbers are those of the file.
  (table,) = (t for t in made.tables if t.name == "prefix_failure_gradients")
  heads = [column.name for column in table.columns]
  for row in table.rows:
    group = {"failed prefix": "failed", "right prefix": "right"}[str(row[1])]
    for name in prefix_result.REFERENCES:
      found = rows(
        result,
        "cosines",
        group=group,
        gradient=row[2],
        reference=name,
        part="all",
      )
      cell = row[heads.index(f"with {name}")]
      assert (
        [cell.value, cell.low, cell.high]
        == [found[0]["cosine"][k] for k in ("mean", "low", "high")]
        if found
        else cell is None
      )
  # Other drafts than those that were measured are told.
  copy = tmp_path / "copy"
  shutil.copytree(measured.root, copy)
  path = prefix_result.path(RunDir(copy))
  stale = json.loads(path.read_text())
  stale["made_of"]["rollouts"] = "0"
  path.write_text(json.dumps(stale))
  made = ANALYSIS.make([Run(copy), Run(measured.root)])
  assert made is not None
  assert "copy has other drafts now" in str(made.partial)
  assert len({figure.name for figure in made.figures}) == 4


@pytest.mark.slow
def test_a_run_without_refined_or_right_drafts_is_shown_without(
  measured, tmp_path
):
  run_dir = RunDir(tmp_path / "w")
  shutil.copytree(measured.root, run_dir.root)
  path = prefix_result.path(run_dir)
  result = json.loads(path.read_text())
  for name in ("cosines", "means", "modes", "divergence", "paths"):
    result[name] = [
      row
      for row in result[name]
      if row["group"] == "failed" and row.get("gradient") != "trd"
    ]
  del result["counts"]["right"]
  path.write_text(json.dumps(result))
  made = ANALYSIS.make([Run(run_dir.root)])
  assert made is not None
  assert "and 0 right drafts" in made.findings[0]
  assert not any("TRD" in sentence for sentence in made.findings)
  for figure in made.figures:
    assert look.svg(figure.draw())
  for table in made.tables:
    assert not any("trd" in row or "right prefix" in row for row in table.rows)


@pytest.mark.slow
@pytest.mark.parametrize(
  "damage",
  [
    b"",
    b"[]",
    b"{}",
    b'{"version": 1}',
    b'{"version": "\x1b[2J"}',
    b'{"version": 1, "counts": 3, "cosines": [{}], "made_of": {}}',
  ],
)
def test_a_damaged_file_is_one_line(measured, tmp_path, damage):
  run_dir = RunDir(tmp_path / "w")
  shutil.copytree(measured.root, run_dir.root)
  prefix_result.path(run_dir).write_bytes(damage)
  with pytest.raises(UserError, match=r"prefix_failure.*again"):
    ANALYSIS.make([Run(run_dir.root)])


def test_without_a_measurement_there_is_nothing_to_show(tmp_path):
  run_dir = RunDir(tmp_path, experiment.to_json(chosen()))
  assert ANALYSIS.make([Run(run_dir.root)]) is None


def test_what_cannot_be_measured_is_refused(tmp_path):
  measure = prefix_failure.measure
  with pytest.raises(UserError, match="at least one draft"):
    measure(chosen(), RunDir(tmp_path / "none"), number=0)
  with pytest.raises(UserError, match="seeds that differ"):
    measure(chosen(), RunDir(tmp_path / "none"), seeds=(1, 1))
  other = dataclasses.replace(chosen(), domain="math")
  with pytest.raises(UserError, match="domain=math"):
    measure(other, RunDir(tmp_path / "none"))
  # Nothing is written where nothing was measured.
  assert not (tmp_path / "none").exists()
  run_dir = workdir(tmp_path / "other", model_revision="another")
  with pytest.raises(UserError, match="written by revision another"):
    measure(chosen(), run_dir)
  unjudged = {"correct": None, "reason": NOT_GRADED}
  run_dir = workdir(tmp_path / "unjudged", **unjudged)
  with pytest.raises(UserError, match="none of 0 wrong drafts"):
    measure(chosen(), run_dir)
  assert not run_dir.stage("analyze").exists()


# -- what is made of numbers -------------------------------------------------


def test_intervals_are_bootstraps_of_the_mean():
  rng = np.random.default_rng(0)
  values = rng.normal(0.3, 0.1, 100)
  found = prefix_summary.interval(values)
  assert found["n"] == 100
  assert found["mean"] == pytest.approx(values.mean(), rel=1e-5)
  # That of a normal mean, to a tenth of its width.
  width = 2 * 1.96 * values.std() / 10
  assert found["high"] - found["low"] == pytest.approx(width, rel=0.1)
  assert found == prefix_summary.interval([*values, np.nan, np.inf])
  assert prefix_summary.interval([np.nan])["mean"] is None


def test_cosines_are_those_of_parts_of_the_weights():
  """Of gradients whose products are known: one of two layers each."""
  names = [*prefix_result.REFERENCES, "one"]
  rng = np.random.default_rng(3)
  vectors = rng.standard_normal((5, 4, 2, 7, 6))  # rows, N, layers, kinds, -
  pairs = np.einsum("anlkd,amlkd->anmlk", vectors, vectors)
  before = np.zeros((5, 4, 3, 2, 7))
  before[1:] = np.einsum("anlkd,amlkd->anmlk", vectors[1:], vectors[:-1, :3])
  products = Products(pairs, before)
  group = prefix_summary.Group(
    names,
    [Prefix(f"{n}", "p", True, 0, 0, 1, (1,), 1, (1,), ()) for n in range(5)],
    [(0,), (0, 1), (1,), (0,), (1,)],
    (products, products),
    (pairs[-2:], pairs[-2:]),
    [],
  )
  found = list(prefix_summary._cosines("failed", group))

  def cosine(a, b):
    return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())

  parts = {"all": np.s_[:, :], "layer 1": np.s_[1, :], "k": np.s_[:, 1]}
  for part, at in parts.items():
    for place, reference in enumerate(prefix_result.REFERENCES):
      (row,) = (
        r
        for r in found
        if (r["gradient"], r["reference"], r["part"])
        == ("one", reference, part)
      )
      each = [cosine(v[3][at], v[place][at]) for v in vectors]
      assert row["cosine"]["mean"] == pytest.approx(np.mean(each), abs=1e-5)
      if part != "all":
        continue
      others = [
        cosine(v[3], w[place])
        for v, w in zip(vectors[1:], vectors, strict=False)
      ]
      assert row["other"]["n"] == 4
      assert row["other"]["mean"] == pytest.approx(np.mean(others), abs=1e-5)
      assert row["by_seed"] == pytest.approx(
        [
          np.mean([each[i] for i in (0, 1, 3)]),
          np.mean([each[i] for i in (1, 2, 4)]),
        ],
        abs=1e-5,
      )
      norms = [np.linalg.norm(v[3]) / np.linalg.norm(v[place]) for v in vectors]
      assert row["norm_ratio"]["mean"] == pytest.approx(
        np.exp(np.mean(np.log(norms))), rel=1e-4
      )


def test_a_gradient_of_zero_has_no_cosine():
  zero = np.zeros((2, 4, 4, 1, 7))
  group = prefix_summary.Group(
    [*prefix_result.REFERENCES, "one"],
    [],
    [(0,), (0,)],
    (Products(zero, zero[:, :, :3]),) * 2,
    (zero, zero),
    [],
  )
  for row in prefix_summary._cosines("failed", group):
    assert row["cosine"] == {"n": 0, "mean": None, "low": None, "high": None}
  for row in prefix_summary._means("failed", group):
    assert row["cosine"] is None
